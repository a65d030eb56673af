"""Whether every host of a cluster reaches one and the same store, proved by a token that each of them reads back.

A folder such as ./results is on every host, and another one on each: gangs there would write checkpoints and logits
that nobody finds again. A bucket may be out of reach for the credentials of one host.
"""

import secrets
from collections.abc import Mapping

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import MixmoError, RefusedError
from orchestrator.store import Folder, ResultStore

PATIENCE_S = 180.0
"""How long hosts have to answer: each boots a process for it."""


_NOBODY = {"workers": "none is there yet that could say what it sees of a folder"}


def prove(store: ResultStore) -> None:
    """Have every host of the Ray that we are connected to read what is written here. Raises RefusedError, with the
    hosts that cannot and the line to type; UnreachableError where the store takes no token.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) < 2:
        if isinstance(store.folder, Folder) and not trains(alive[0]["Resources"]):
            raise RefusedError(_refusal(store.uri, _NOBODY, "those that will train"))
        return
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in alive}
    key, token = f".reach-{secrets.token_hex(6)}", secrets.token_hex(16)
    store.folder.put(key, token.encode())
    try:
        answers = _ask(hosts, store.uri, key)
    finally:
        store.folder.delete(key)
    failed = {host: said for host, said in answers if said != token}
    if failed:
        raise RefusedError(_refusal(store.uri, failed, f"{len(failed)} of the cluster's {len(hosts)} hosts"))


def trains(resources: Mapping[str, float]) -> bool:
    """Whether a host of these may train: the head of a cluster whose workers come and go does not."""
    return bool(resources.get("CPU") or resources.get("GPU"))


def _ask(hosts: dict[str, str], uri: str, key: str) -> list[tuple[str, str]]:
    """What each host reads, or why it cannot."""
    look = ray.remote(num_cpus=0, max_retries=2)(read_back)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(uri, key): host
        for node_id, host in hosts.items()
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=PATIENCE_S)
    answers = [(asked[each], f"no answer in {PATIENCE_S:.0f} s") for each in late]
    for each in done:
        try:
            answers.append((asked[each], str(ray.get(each))))
        except ray.exceptions.RayError as error:
            answers.append((asked[each], f"it was lost meanwhile ({type(error).__name__})"))
    return answers


def read_back(uri: str, key: str) -> str:
    """The token, or one line of why there is none. Runs on the host that is asked."""
    try:
        stored = ResultStore.open(uri).folder.read(key)
    except MixmoError as error:
        return str(error).splitlines()[0]
    return "it sees another folder of that name" if stored is None else stored.data.decode(errors="replace")


def _refusal(uri: str, failed: Mapping[str, str], whose: str) -> str:
    told = "\n".join(f"  {host}: {said}" for host, said in sorted(failed.items())[:5])
    others = f"\n  and {len(failed) - 5} more" if len(failed) > 5 else ""
    return (
        f"results in {uri} are not in reach of {whose}:\n{told}{others}\n"
        "Name a bucket that all of them may use, or a folder that all of them mount, and give the command again:\n"
        "  --results s3://BUCKET/results"
    )


def prove_on_cluster(results: str) -> None:
    """As `prove`, in a process of its own on a host of the cluster."""
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    prove(ResultStore.open(results, create=True))
