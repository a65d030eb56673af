"""The driver's side of the fleet: the Ray it lives on, its dispatcher and its gangs.

A gang is one Ray Train worker group. It is formed once, with torch imported and its process group standing, and then
takes one trial after another from the dispatcher; a Train run per trial would cost 18 to 25 s each (CONTRIBUTING.md,
"Warm gangs"). When a worker dies, Ray Train forms the group again and the gang's loop asks for work anew.

Only this module and `gang` import `ray.train`.
"""

import contextlib
import dataclasses
import fcntl
import functools
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Ray reads its settings when it is imported, so they stand before it. What the user has set holds.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a late call of Tune's thread starts a second Ray after the first has ended
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a worker stays where it is, so that relative paths mean what they say
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",  # a cloud node takes minutes to come
    "RAY_AIR_NEW_OUTPUT": "0",  # else Tune prints tables on stdout, which belongs to our own output
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
if not os.environ.get("RAY_ADDRESS"):
    # Ray listens on every interface: one of our own asks for a token that only this process and its children know.
    _ENVIRONMENT |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
import ray.exceptions  # noqa: E402
import ray.train  # noqa: E402
import ray.train.torch  # noqa: E402
import ray.tune  # noqa: E402 - here, before any thread starts: Ray's packages import each other in circles
from ray.train.v2.api import data_parallel_trainer  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402
from ruamel.yaml import YAML  # noqa: E402
from ruamel.yaml.error import YAMLError  # noqa: E402

from orchestrator import gang  # noqa: E402
from orchestrator.casualties import (  # noqa: E402
    Head,
    Messenger,
    RayLostError,
    dead_nodes,
    found_no_place,
    missed_within_s,
    own_processes,
    waiting_groups,
)
from orchestrator.dispatcher import NAMESPACE, Dispatcher, Order, Retries, Roll, Update, Worker  # noqa: E402
from orchestrator.errors import RefusedError, TokenError, UnreachableError  # noqa: E402
from orchestrator.gang import GangPlan  # noqa: E402
from orchestrator.population import Population  # noqa: E402
from orchestrator.roster import ACCELERATOR, MARKET, Doubts, Node, Offer, Scene, coming_of, decide, most_of  # noqa: E402
from orchestrator.stopping import Judge  # noqa: E402

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves its file on the head."""
TEND_S = 2.0
"""Between two looks at which gangs there should be."""
FORMATIONS = 8
"""A gang that was formed so often, and whose first rank never came to work, is given up."""
ANSWER_S = 2.0
"""After which it is looked whether Ray's head is still there to say what has become of the dispatcher."""
STARTS = 4
"""So often Ray Train may fail to form a gang for another reason than room."""


class _Carried:
    """What Ray Train carries a loop in, without Ray's object store. An object of ours there would be lost with the
    raylet of this machine, and Ray ends a process that cannot write down the loss of its objects, with 1 and no word.
    """

    def __init__(self, loop: Any) -> None:
        self._pickled = ray.cloudpickle.dumps(loop)

    def get(self) -> Any:
        return ray.cloudpickle.loads(self._pickled)


data_parallel_trainer.ObjectRefWrapper = _Carried  # tests/test_faults.py holds Ray to it

# --------------------------------------------------------------------------------------------------------- the Ray


@contextlib.contextmanager
def cluster(*, cpus: int) -> Iterator[Offer]:
    """Join the cluster that RAY_ADDRESS names, else start a Ray on this machine that ends with the block.

    A Ray of our own asks for a token and keeps its files in a folder that goes with it. `cpus` is what it is told to
    have at least. Yields what the cluster offers.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    with _local_ray(cpus) if not address else _joined_ray(address):
        yield offered()


def offered() -> Offer:
    """What the cluster has now, and what its autoscaler may bring, if this is the head of one of `ray up`."""
    nodes = tuple(_node(each["Resources"], each["Labels"]) for each in ray.nodes() if each["Alive"])
    coming: tuple[Node, ...] = ()
    most: int | None = None
    if os.environ.get("RAY_ADDRESS"):
        with contextlib.suppress(OSError, YAMLError):
            file = BOOTSTRAP.expanduser()
            coming, most = _coming(file, file.stat().st_mtime_ns)
    return Offer(nodes, coming, most)


@functools.lru_cache(maxsize=1)
def _coming(file: Path, changed_ns: int) -> tuple[tuple[Node, ...], int]:
    """Parsed again only when another `ray up` has changed it: the fleet asks every two seconds."""
    return coming_of(YAML(typ="safe").load(file.read_text()) or {})


def _node(resources: Mapping[str, float], labels: Mapping[str, str]) -> Node:
    types = frozenset(name.partition(":")[2] for name in resources if name.startswith(ACCELERATOR))
    cpus, gpus, market = resources.get("CPU", 0.0), resources.get("GPU", 0.0), labels.get(MARKET)
    return Node(cpus, gpus, types, market == "spot", market == "on-demand")


@contextlib.contextmanager
def _joined_ray(address: str) -> Iterator[None]:
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if isinstance(error, ray.exceptions.AuthenticationError):
            raise TokenError(f"the Ray cluster at RAY_ADDRESS={address}") from error
        if "Version mismatch" in str(error):  # Ray has no class for it
            raise RefusedError(
                f"the Ray cluster at RAY_ADDRESS={address} is of another version than this machine: {error}. Install "
                "what the cluster has (`mixmo doctor` tells what is here), or `mixmo submit` from where it matches"
            ) from error
        raise UnreachableError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {error}. Start it, or unset RAY_ADDRESS to run here."
        ) from error
    with _left():
        yield


@contextlib.contextmanager
def _left() -> Iterator[None]:
    """Leave Ray at the end. One that is lost is not asked: what is left of our own ends with this process."""
    try:
        yield
    except RayLostError:
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


@contextlib.contextmanager
def _local_ray(cpus: int) -> Iterator[None]:
    with _folder_of_this_ray() as folder:
        try:
            ray.init(
                address="local", namespace=NAMESPACE, num_cpus=max(cpus, _cores()),
                include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False, logging_level="ERROR",
                _temp_dir=str(folder),
            )  # fmt: skip
        except Exception as error:  # Ray raises a bare one where its node is not up within 30 s
            ray.shutdown()
            raise UnreachableError(
                f"Ray cannot start on this machine: {error} Nothing was trained. Run the same command again when the "
                f"machine is less busy; `mixmo doctor` says more."
            ) from error
        with _left():
            yield


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _folder_of_this_ray() -> Iterator[Path]:
    """A short-named folder that goes with the block. Those of drivers that were killed go first: nobody holds their
    lock any more, in whatever PID namespace they lived.
    """
    for old in Path("/tmp").glob("mixmo-ray-*"):
        with contextlib.suppress(OSError), (old / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - old.stat().st_ctime > 60:  # a younger one may be about to take its lock
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="mixmo-ray-", dir="/tmp"))  # Ray's sockets may have 107 characters
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


# -------------------------------------------------------------------------------------------------------- the fleet


class Fleet:
    """A dispatcher and its gangs, as the driver sees them."""

    def __init__(
        self,
        orders: Sequence[Order],
        plan: GangPlan,
        *,
        fence: int,
        retries: Retries,
        judge: Judge | None = None,
        population: Population | None = None,
    ) -> None:
        self.plan = plan
        self._head = Head(ray.get_runtime_context().gcs_address, own_processes())
        actor = ray.remote(num_cpus=0, max_concurrency=100_000)(Dispatcher)
        # Beside the driver: Ray would put it on any machine, and one that goes must not take the sweep with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        placed = actor.options(name=plan.dispatcher, namespace=plan.namespace, scheduling_strategy=here)
        self.dispatcher: Any = placed.remote(
            orders, fence=fence, retries=retries, judge=judge, population=population, missed_within_s=missed_within_s()
        )
        self.limit: int | None = None
        """`max_gangs` of the sweep file."""
        self._tended_at = self._stood_at = self._filled_at = time.monotonic()
        self._dead: frozenset[str] = frozenset()
        self._doubts = Doubts()
        self._room = offered().room(plan)
        """How many gangs the cluster holds, as last seen."""
        self._scratch = tempfile.mkdtemp(prefix="mixmo-train-")
        self._threads: list[threading.Thread] = []
        self._ended: dict[str, str] = {}
        """Gangs that are gone, and why."""
        self._acknowledged = 0

    def form(self, gangs: int) -> None:
        """Start gangs. Each lives in a thread of this process, in which its `fit()` blocks until it leaves."""
        for _ in range(gangs):
            name = f"gang-{len(self._threads)}"
            thread = threading.Thread(target=self._keep, args=(name,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def updates(self, wait_s: float) -> list[Update]:
        """What happened since the last call; waits up to `wait_s` seconds for something.

        Now and then gangs come and go by it. Raises UnreachableError when there is work and no gang can be kept or
        formed, or the dispatcher or Ray's head is gone.
        """
        here = self._head.look()
        if here and time.monotonic() - self._tended_at > 5 * TEND_S:  # there has been news ever since
            self._tend()
        news: list[Update] = self._tell("updates", self._acknowledged, wait_s)
        if news:
            self._acknowledged = news[-1].seq
        elif here and time.monotonic() - self._tended_at > TEND_S:
            self._tend()
        return news

    def _tend(self) -> None:
        """Have as many gangs as there is work and room for. Raises UnreachableError when there can be none."""
        self._head.look(anew=True)  # what asks it hangs, if it is gone
        now = self._tended_at = time.monotonic()
        roll: Roll = self._tell("roll")
        gangs = {thread.name: roll.standing.get(thread.name) for thread in self._threads if thread.is_alive()}
        work = roll.queued + roll.in_hand
        given_up = self._doubts.count(frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"]), now)
        if work and not gangs and given_up:
            raise UnreachableError(
                f"no gang could be kept: {self._doubts}. Finished trials are safe; run the same command again."
            )
        if not work or gangs.keys() & roll.standing.keys():
            self._stood_at = now
        elif now - self._stood_at > self.plan.form_within_s:
            raise UnreachableError(_unformed(self.plan))
        dead = dead_nodes()
        if dead - self._dead:
            self._tell("nodes_lost", dead - self._dead)
            self._dead = dead
        self._room = offered().room(self.plan) - given_up
        scene = Scene(
            queued=roll.queued, in_hand=roll.in_hand, gangs=gangs, room=self._room, limit=self.limit,
            slots=self.plan.slots, spare_s=now - self._filled_at,
        )  # fmt: skip
        self._make_so(scene)
        if not scene.spare:
            self._filled_at = now

    def _make_so(self, scene: Scene) -> None:
        waiting = waiting_groups() if scene.is_overdue else []
        change = decide(dataclasses.replace(scene, pending=len(waiting)))
        self.form(change.form)
        if change.dismiss:
            self._tell("dismiss", change.dismiss)
        for group in waiting[: change.withdraw]:
            ray.util.remove_placement_group(group)

    def workers(self) -> list[Worker]:
        found: list[Worker] = ray.get(self.dispatcher.workers.remote())
        return found

    def drain(self) -> None:
        self._tell("drain")

    def size(self) -> int:
        """How many trials could be trained at once by as many gangs as there is room for."""
        return max(1, most_of(self._room, self.limit)) * self.plan.slots

    def in_hand(self) -> int:
        """How many trials are being trained."""
        return int(self._tell("in_hand"))

    def idle(self) -> int:
        return int(self._tell("idle"))

    def submit(self, indices: Iterable[int]) -> None:
        """Queue trials past Tune. Those that it has submitted are left as they are."""
        ray.get([self.dispatcher.submit.remote(index) for index in sorted(indices)])

    def pause(self) -> None:
        self._tell("pause")

    def resume(self) -> None:
        self._tell("resume")

    def cancel(self, indices: Iterable[int], cause: str) -> None:
        self._tell("cancel", list(indices), cause)

    def retry(self, orders: Iterable[Order], text: str) -> None:
        self._tell("retry", list(orders), text)

    def add(self, orders: Iterable[Order]) -> None:
        self._tell("add", list(orders))

    def hold_back(self, indices: Iterable[int]) -> None:
        self._tell("hold_back", list(indices))

    def release(self, indices: Iterable[int]) -> None:
        self._tell("release", list(indices))

    def withdraw(self, indices: Iterable[int], text: str) -> None:
        self._tell("withdraw", list(indices), text)

    def _tell(self, method: str, *words: Any) -> Any:
        try:
            answer = getattr(self.dispatcher, method).remote(*words)
            while True:
                # What became of an actor is the head's to say: without one, Ray waits for what will not come.
                with contextlib.suppress(ray.exceptions.GetTimeoutError):
                    return ray.get(answer, timeout=ANSWER_S)
                self._head.look(anew=True)
        except ray.exceptions.RayError as error:
            self._head.look(anew=True)  # that says more
            raise _lost(error) from error

    def close(self, wait_s: float = 15.0) -> list[Update]:
        """Send the gangs home, wait a while until they are gone, and return what they still said."""
        if not self._head.answers:
            wait_s = min(1.0, wait_s)  # before another stands in its place
        deadline = time.monotonic() + wait_s
        last: list[Update] = []
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self.dispatcher.close.remote(), timeout=wait_s)
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            last = ray.get(self.dispatcher.updates.remote(self._acknowledged, 0.0), timeout=wait_s)
        shutil.rmtree(self._scratch, ignore_errors=True)
        return last

    def _keep(self, name: str) -> None:
        """One gang's life, from its first worker to its last."""
        why = "it was sent home"
        try:
            self._fit(name)
        except BaseException as error:  # whatever ended it, the sweep goes on with the others
            why = f"{type(error).__name__}: {error}"
            if found_no_place(error):
                why = "no machine had room for it in its time, or no trial waited for it any more"
            else:
                with contextlib.suppress(Exception):
                    if not self._tell("formed", name):
                        self._doubts.add(why, time.monotonic())
        self._ended[name] = why
        with contextlib.suppress(Exception):  # at the end of a sweep the dispatcher may be gone before its gangs
            ray.get(self.dispatcher.gang_ended.remote(name, why))

    def _fit(self, name: str) -> None:
        """Have Ray Train keep the gang: again after so many failures, unless no worker of it ever came to work, or no
        machine has room for it. Then the fleet decides whether it wants another.
        """
        formed = fruitless = 0
        while True:
            self._head.look(anew=True)  # nothing is formed where Ray is lost
            try:
                self._trainer(name).fit()
                return
            except ray.train.TrainingFailedError as error:
                before, formed = formed, int(self._tell("formed", name))
                fruitless = 0 if formed > before else fruitless + 1
                is_at_start = isinstance(error, ray.train.ControllerError)
                if found_no_place(error) or fruitless >= (STARTS if is_at_start else 1):
                    raise

    def _trainer(self, name: str) -> Any:
        plan = self.plan
        per_worker = {"CPU": float(plan.cpus_per_worker)}  # a pending group of these is what an autoscaler goes by
        if plan.gpus_per_worker:
            per_worker["GPU"] = plan.gpus_per_worker
        return ray.train.torch.TorchTrainer(
            gang.loop,
            train_loop_config={"gang": name, "plan": dataclasses.asdict(plan)},
            torch_config=ray.train.torch.TorchConfig(
                backend="nccl" if plan.gpus_per_worker else "gloo", timeout_s=int(plan.group_timeout_s)
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=plan.workers,
                use_gpu=bool(plan.gpus_per_worker),
                resources_per_worker=per_worker,
                accelerator_type=plan.accelerator,
                label_selector=offered().market(plan),
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=self._scratch,
                callbacks=[Messenger(name, plan.dispatcher, plan.namespace)],
                # The dispatcher counts a trial's attempts; over a gang's life there is no limit to count to (`_fit`).
                failure_config=ray.train.FailureConfig(max_failures=FORMATIONS - 1, controller_failure_limit=0),
            ),
        )


def _lost(error: BaseException) -> RayLostError:
    said = str(error).strip().partition("\n")[0].rstrip(".")
    return RayLostError(
        f"Ray lost the dispatcher: {said}. Finished trials are safe. Where the cluster is gone, start it again; then "
        "run the same command again."
    )


def _unformed(plan: GangPlan) -> str:
    """What to say of a fleet of which no gang stands."""
    free = ray.available_resources()
    return (
        f"no group of workers has formed in {plan.form_within_s:.0f} s: {plan}; of the cluster's "
        f"{ray.cluster_resources().get('CPU', 0):g} CPU(s) and {ray.cluster_resources().get('GPU', 0):g} GPU(s), "
        f"{free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free. Where others use it, wait for them or share it "
        "(max_gangs); where machines have yet to come, see `ray status`, or set resources.form_within_s. Then run the "
        "same command again."
    )
