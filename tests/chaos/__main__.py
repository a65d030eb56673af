"""Everything that a sweep must survive, done at length and published: `make chaos`.

    python tests/chaos                                   all of it, in pieces; what is done already is not done again
    MIXMO_CHAOS=driver:40,gang:60 python tests/chaos     these pieces, so many times each
    MIXMO_CHAOS_SEED=7 python tests/chaos                the draws of an earlier run

Each piece that ends is kept in `results/chaos/state.json`; a run that is cut off goes on behind the last one. When all
that was asked for is there, `benchmarks/results/chaos.json` and `chaos.md` are written.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import disturbed  # noqa: E402
import hunted  # noqa: E402
import hunted_ray  # noqa: E402
import made_bucket  # noqa: E402
import made_ceph  # noqa: E402
from fault_proxy import FaultProxy  # noqa: E402
from hunted import Tally, Terms  # noqa: E402

STATE = ROOT / "results/chaos/state.json"
PUBLISHED = ROOT / "benchmarks/results"
LANES = 8
SLOW_SWAPS = Terms(lease_s=6.0, heartbeat_s=1.0)
"""Where the server has no conditions, every swap waits half a second to see whether it stayed."""
FAULTY = Terms(seeds=4, epochs=20, epoch_s=0.5)


@dataclass(frozen=True)
class Piece:
    """One row of the table, done in one go."""

    title: str
    harness: str
    number: int
    """How often, unless MIXMO_CHAOS says otherwise."""
    minutes: float
    """About how long all of it takes on two cores."""
    do: Callable[["Bench", int], tuple[Tally, dict[str, Any]]]


# ---------------------------------------------------------------------- places


class Bench:
    """Where the pieces are done: a folder, and servers that start when they are first asked for."""

    def __init__(self, folder: Path, seed: str) -> None:
        self.folder, self.seed = folder, seed
        self._stack = contextlib.ExitStack()
        self._moto: str | None = None
        self._ceph: made_ceph.Ceph | None = None
        self._rays: hunted_ray.Hunt | None = None
        os.environ |= {
            "AWS_ACCESS_KEY_ID": made_bucket.KEY, "AWS_SECRET_ACCESS_KEY": made_bucket.SECRET,
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }  # fmt: skip

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def on_disk(self, name: str) -> tuple[str, str]:
        uri = str(self.folder / "stores" / name)
        return uri, uri

    def ceph(self) -> made_ceph.Ceph:
        if self._ceph is None:
            if not made_ceph.installed():
                packages = " ".join(made_ceph.PACKAGES)
                raise disturbed.CannotError(f"no real S3 server: apt-get install --no-install-recommends {packages}")
            self._ceph = self._stack.enter_context(made_ceph.serve())
        return self._ceph

    def server(self) -> tuple[str, str]:
        """host:port of a server and what it is: Ceph where it is installed."""
        if made_ceph.installed():
            return self.ceph().endpoint, "Ceph"
        if self._moto is None:
            self._moto = self._stack.enter_context(made_bucket.serve())
        return self._moto, "moto"

    def bucket(self, server: str) -> Callable[[str], str]:
        name = made_bucket.make_bucket(server)
        return lambda prefix: f"s3://{name}/{prefix}?endpoint_override={server}&scheme=http"

    def fresh(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    @contextlib.contextmanager
    def path(self, **faults: Any) -> Iterator[tuple[FaultProxy, hunted.Place]]:
        """A proxy, and places on a server behind it."""
        server, _ = self.server()
        address = self.bucket(server)
        with FaultProxy(server, seed=self.seed, **faults) as proxy:
            yield proxy, lambda name: (address(name), address(name).replace(server, proxy.endpoint))

    def rays(self) -> hunted_ray.Hunt:
        """Sweeps on Ray, and how an undisturbed one ends."""
        if self._rays is None:
            server, _ = self.server()
            address = self.bucket(server)
            self._rays = hunted_ray.Hunt(self.fresh("ray"), address, server, self.seed, say)
        self._rays.tally = Tally()
        return self._rays


# ---------------------------------------------------------------------- pieces


def kills(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    folder, place = bench.fresh("kills"), bench.on_disk
    return hunted.in_parallel(hunted.by_killing, folder, place, bench.seed, number, Terms(), LANES, say), {}


def kills_s3(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    with bench.path(rate=0.05, stale_rate=0.1) as (proxy, place):
        folder, terms = bench.fresh("kills-s3"), Terms(lists_lag=True)
        tally = hunted.in_parallel(hunted.by_killing, folder, place, bench.seed, number, terms, 4, say)
        return tally, {"fired": dict(proxy.fired)}


def kills_bare(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    with bench.path(drop_conditions=(made_bucket.KEY, made_bucket.SECRET)) as (proxy, place):
        folder = bench.fresh("kills-bare")
        tally = hunted.in_parallel(hunted.by_killing, folder, place, bench.seed, number, SLOW_SWAPS, 4, say)
        return tally, {"fired": dict(proxy.fired)}


def wakes(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    folder, place = bench.fresh("wakes"), bench.on_disk
    return hunted.in_parallel(hunted.by_freezing, folder, place, bench.seed, number, Terms(), LANES, say), {}


def wakes_s3(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    with bench.path() as (_, place):
        folder, terms = bench.fresh("wakes-s3"), Terms(lease_s=2.0, heartbeat_s=0.4)
        return hunted.in_parallel(hunted.by_freezing, folder, place, bench.seed, number, terms, 4, say), {}


def wakes_bare(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    with bench.path(drop_conditions=(made_bucket.KEY, made_bucket.SECRET)) as (proxy, place):
        folder = bench.fresh("wakes-bare")
        tally = hunted.in_parallel(hunted.by_freezing, folder, place, bench.seed, number, SLOW_SWAPS, 4, say)
        return tally, {"fired": dict(proxy.fired)}


def server(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    ceph = bench.ceph()
    return disturbed.server_killed(bench.fresh("server"), bench.bucket(ceph.endpoint)("server"), ceph, number), {}


def disk(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    return sum((disturbed.disk_full(bench.fresh(f"disk-{each}")) for each in range(number)), Tally()), {}


def readonly(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    return sum((disturbed.read_only(bench.fresh(f"readonly-{each}")) for each in range(number)), Tally()), {}


def faults(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    """Over a path that fails at 5 and at 10 %, against one that does not."""
    total, ratios, undisturbed_s = Tally(), {}, [0.0]
    for rate in (0.0, 0.05, 0.1):
        times = []
        for each in range(number):
            with bench.path(rate=rate, stale_rate=2 * rate) as (proxy, place):
                uri, _ = place(f"at-{rate}")
                folder = bench.fresh(f"at-{rate}-{each}")
                tally, took_s = disturbed.at_rate(folder, uri, proxy, bench.server()[0], FAULTY)
            say(f"{rate:.0%} of the requests fail: {took_s:.1f} s, {tally.words}")
            times.append(took_s)
            total += tally
        undisturbed_s = undisturbed_s if rate else times
        ratios[f"{rate:.0%}"] = round(median(times) / median(undisturbed_s), 2)
    return total, {"time_ratio": ratios, "fired": dict(total.struck)}


def driver(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    hunt = bench.rays()
    hunt.kill_drivers(hunted_ray.driver_blows(number, bench.seed))
    return hunt.tally, {}


def gang(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    hunt = bench.rays()
    hunt.kill_processes(hunted_ray.victims(number, bench.seed))
    return hunt.tally, {}


def ray_faults(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    hunt = bench.rays()
    ratios = {}
    for rate in (0.05, 0.1):
        hunt.proxy.fired.clear()
        times = [hunted_ray.at_rate(hunt, rate) for _ in range(number)]
        ratios[f"{rate:.0%}"] = round(median(times), 2)
        hunt.tally.struck.update(hunt.proxy.fired)
        say(f"{rate:.0%} of the requests fail: {ratios[f'{rate:.0%}']} times the undisturbed time, {hunt.tally.words}")
    return hunt.tally, {"time_ratio": ratios, "fired": dict(hunt.tally.struck)}


def away(bench: Bench, number: int) -> tuple[Tally, dict[str, Any]]:
    """The store unreachable for so many seconds."""
    hunt = bench.rays()
    per_epoch_s = hunted_ray.epoch_s(hunt)
    epochs = max(100, round(0.25 * number / per_epoch_s))  # two trials end while the store is away, two begin
    trained = hunted_ray.while_away(hunt, number, epochs)
    hunt.tally.struck["store away"] += 1
    return hunt.tally, {"away_s": number, "trained_meanwhile": trained}


PIECES = {
    "kills": Piece("Driver killed", "in process, folder", 900, 6, kills),
    "kills-s3": Piece("Driver killed, 5 % of the requests fail", "in process, S3 behind the proxy", 70, 3, kills_s3),
    "kills-bare": Piece("Driver killed, no conditions", "in process, S3 behind the proxy", 30, 3, kills_bare),
    "wakes": Piece("Stale driver woken", "in process, folder", 920, 7, wakes),
    "wakes-s3": Piece("Stale driver woken", "in process, S3 behind the proxy", 50, 2, wakes_s3),
    "wakes-bare": Piece("Stale driver woken, no conditions", "in process, S3 behind the proxy", 30, 4, wakes_bare),
    "server": Piece("Server killed and restarted", "in process, Ceph", 3, 1, server),
    "disk": Piece("Disk full for a while", "in process, tmpfs", 2, 0.5, disk),
    "readonly": Piece("Folder read-only for a while", "in process, tmpfs", 2, 0.5, readonly),
    "faults": Piece("0, 5 and 10 % of the requests fail", "in process, S3 behind the proxy", 3, 4, faults),
    "driver": Piece("Driver killed", "Ray, S3 behind the proxy", 40, 12, driver),
    "gang": Piece("Gang process or raylet killed", "Ray, S3 behind the proxy", 60, 14, gang),
    "ray-faults": Piece("5 and 10 % of the requests fail", "Ray, S3 behind the proxy", 2, 2, ray_faults),
    "away": Piece("Store unreachable", "Ray, S3 behind the proxy", 600, 14, away),
}  # fmt: skip
"""`away` takes seconds."""


# ---------------------------------------------------------------------- the whole


def say(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", file=sys.stderr, flush=True)  # noqa: T201


def asked() -> dict[str, int]:
    """The pieces to do, and how often: MIXMO_CHAOS, as `driver:40,gang:60`; all where it is not set."""
    given = os.environ.get("MIXMO_CHAOS", "")
    if not given:
        return {name: piece.number for name, piece in PIECES.items()}
    pairs = [each.strip().partition(":")[::2] for each in given.split(",")]
    unknown = sorted({name for name, _ in pairs} - PIECES.keys())
    if unknown:
        sys.exit(f"MIXMO_CHAOS: no such piece: {', '.join(unknown)}; there are {', '.join(PIECES)}")
    return {name: int(number) if number else PIECES[name].number for name, number in pairs}


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def measure(bench: Bench, name: str, number: int) -> dict[str, Any]:
    """One row of the table. What cannot be done here says why."""
    piece, began = PIECES[name], time.monotonic()
    row = {"piece": name, "title": piece.title, "harness": piece.harness, "asked": number, "seed": bench.seed}
    try:
        tally, more = piece.do(bench, number)
    except disturbed.CannotError as error:
        say(f"{name}: {error}")
        return {**row, "not_run": str(error)}
    if "S3" in piece.harness:
        row["harness"] = piece.harness.replace("S3", bench.server()[1])
    times = sorted(tally.first_row_s)
    return {
        **row, "n": tally.refused or tally.struck.total(), "sweeps": tally.sweeps, "lost": tally.lost,
        "doubled": tally.doubled, "wrong": tally.wrong, "rerun": tally.rerun, "refused": tally.refused,
        "unnamed": tally.unnamed, "struck": dict(sorted(tally.struck.items())),
        "faults": [each.replace(f"{bench.folder}/", "") for each in tally.faults],
        "first_row_s": {"median": median(times), "worst": times[-1], "n": len(times)} if times else None,
        "command": f"MIXMO_CHAOS={name}:{number} MIXMO_CHAOS_SEED={bench.seed} make chaos",
        "took_s": round(time.monotonic() - began), "commit": commit(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"), **more,
    }  # fmt: skip


def main() -> int:
    wanted = asked()
    state: dict[str, Any] = json.loads(STATE.read_text()) if STATE.exists() else {"seed": None, "rows": {}}
    seed = os.environ.get("MIXMO_CHAOS_SEED") or state["seed"] or f"{time.time_ns() % 10**9}"
    state["seed"] = seed
    done = {name for name, row in state["rows"].items() if (row["asked"], row["seed"]) == (wanted.get(name), seed)}
    left = [name for name in wanted if name not in done]
    minutes = sum(PIECES[name].minutes * wanted[name] / PIECES[name].number for name in left)
    say(f"seed {seed}; {len(left)} of {len(wanted)} pieces to do, about {minutes:.0f} minutes on two idle cores")
    with tempfile.TemporaryDirectory(prefix="mixmo-chaos-") as scratch, Bench(Path(scratch), seed) as bench:
        for name in left:
            say(f"{name}: {PIECES[name].title} ({PIECES[name].harness}), {wanted[name]}")
            state["rows"][name] = row = measure(bench, name, wanted[name])
            STATE.parent.mkdir(parents=True, exist_ok=True)
            STATE.write_text(json.dumps(state, indent=1) + "\n")
            say(f"{name}: {'done' if clean(row) else 'FAULTS'}: {summary(row)}")
    publish([state["rows"][name] for name in PIECES if name in state["rows"]])
    return 0 if all(clean(state["rows"][name]) for name in wanted) else 1


def clean(row: dict[str, Any]) -> bool:
    return "not_run" in row or not (row["faults"] or any(row[name] for name in ("lost", "doubled", "wrong", "rerun")))


def summary(row: dict[str, Any]) -> str:
    if "not_run" in row:
        return str(row["not_run"])
    told = f"n {row['n']}, lost {row['lost']}, doubled {row['doubled']}, wrong {row['wrong']}, run again {row['rerun']}"
    return "\n".join([told, *row["faults"][:3]])


def publish(rows: list[dict[str, Any]]) -> None:
    record = {"command": "make chaos", "rows": rows}
    (PUBLISHED / "chaos.json").write_text(json.dumps(record, indent=1) + "\n")
    (PUBLISHED / "chaos.md").write_text(rendered(rows))
    say(f"written: {PUBLISHED.relative_to(ROOT)}/chaos.json and chaos.md")


def rendered(rows: list[dict[str, Any]]) -> str:
    head = [
        "# What a sweep has survived", "",
        "Made by `make chaos` (tests/chaos); each row's command, draws and commit are in chaos.json. Rows lost,",
        "doubled or wrong are counted against what every trial must reach: in process a function of its id and epoch,",
        "on Ray what an undisturbed run reached, to the bit. *Run again*: trials trained though they had finished, or",
        "over epochs that a checkpoint had passed. *First row*: from the command to the first new row in the store,",
        "after a kill, in seconds (median, worst). *Time*: against an undisturbed run. *No conditions*: a server that",
        "knows neither If-Match nor If-None-Match.", "",
        "| what | harness | n | lost | doubled | wrong | run again | first row | time | seed | commit | date |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join([*head, *(_line(row) for row in rows), "", *_notes(rows)]) + "\n"


def _line(row: dict[str, Any]) -> str:
    if "not_run" in row:
        return f"| {row['title']} | {row['harness']} | not run | | | | | | | | | |"
    times, ratio = row["first_row_s"], row.get("time_ratio")
    first = f"{times['median']:.1f}, {times['worst']:.1f}" if times else ""
    time_ratio = ", ".join(f"{rate}: {each:.2f}x" for rate, each in ratio.items()) if ratio else ""
    title = f"{row['title']} for {row['away_s']} s" if "away_s" in row else row["title"]
    cells = [title, row["harness"], row["n"], *(row[name] for name in ("lost", "doubled", "wrong", "rerun")), first]
    return "| " + " | ".join(map(str, [*cells, time_ratio, row["seed"], row["commit"][:9], row["at"][:10]])) + " |"


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """The moments of the blows, and what else a row has to tell."""
    notes = []
    for row in rows:
        if "not_run" in row:
            notes += [f"- {row['title']} ({row['harness']}): not run: {row['not_run']}"]
            continue
        struck = ", ".join(f"{kind} {count}" for kind, count in row["struck"].items())
        more = f"; trained to their end meanwhile: {row['trained_meanwhile']}" if "trained_meanwhile" in row else ""
        fired = ", ".join(f"{kind} {count}" for kind, count in sorted(row.get("fired", {}).items()))
        more += f"; of the path: {fired}" if fired and row["struck"] != row["fired"] else ""
        notes += [
            f"- {row['title']} ({row['harness']}): {struck}{more}",
            *(f"  - {' '.join(each.split())[:600]}" for each in row["faults"][:5]),
            *([f"  - and {len(row['faults']) - 5} more, in chaos.json"] if len(row["faults"]) > 5 else []),
        ]
    return notes


if __name__ == "__main__":
    sys.exit(main())
