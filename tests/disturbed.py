"""Sweeps whose store fails them for a while: its server, its disk, or the path to it. Without Ray, as in `hunted`.

No driver is killed here: each has to come to its end by itself, with every row, and no trial trained twice.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_proxy import FaultProxy
from hunted import HUNG_S, Child, Game, Tally, Terms, until
from made_ceph import Ceph

LONG = Terms(seeds=4, epochs=20, epoch_s=0.25)
"""Five seconds of training: time enough for something to happen."""


class CannotError(Exception):
    """This machine does not allow it; why."""


def disturbed(game: Game, disturb: Callable[[Child], None]) -> float:
    """Run a sweep and disturb it once it trains; how long it took, in seconds."""
    process = game.start()
    try:
        until(lambda: not process.is_alive() or _trained(game) > game.terms.epochs // 2)
        disturb(process)
        process.join(game.terms.seeds * game.terms.epochs * game.terms.epoch_s + HUNG_S)
        took_s = time.monotonic() - game.began
    finally:
        process.kill()
    if process.exitcode != 0:
        game.tally.faults.append(f"{game.folder}: the driver ended with {process.exitcode}: {game.said()}")
    game.look()
    game.tally.rerun += sum(row.attempts > 1 for row in game.store.trial_rows(game.name))
    game.close()
    return took_s


def _trained(game: Game) -> int:
    return sum(line[1] == "epoch" for line in game.trail())


def nothing(process: Child) -> None:
    """No disturbance."""


def server_killed(folder: Path, uri: str, server: Ceph, times: int, *, gone_s: float = 2.0) -> Tally:
    """Kill the server and start it again, so many times while a sweep runs."""
    game = Game(folder, uri, LONG, through=uri)

    def disturb(process: Child) -> None:
        for _ in range(times):
            server.kill_gateway()
            time.sleep(gone_s)
            server.start_gateway()
            time.sleep(1.0)
            game.tally.struck["server killed"] += process.is_alive()

    disturbed(game, disturb)
    return game.tally


def away(folder: Path, uri: str, server: str, away_s: float, terms: Terms = LONG) -> Tally:
    """Take the store away: half the time it answers nobody, half the time nobody is there."""
    with FaultProxy(server) as proxy:
        game = Game(folder, uri, terms, through=uri.replace(server, proxy.endpoint))

        def disturb(process: Child) -> None:
            with proxy.away("silent"):
                time.sleep(away_s / 2)
            with proxy.away("refused"):
                time.sleep(away_s / 2)
            game.tally.struck["store away"] += process.is_alive()

        disturbed(game, disturb)
    return game.tally


def at_rate(folder: Path, uri: str, proxy: FaultProxy, server: str, terms: Terms = LONG) -> tuple[Tally, float]:
    """Run a sweep over a path that fails as the proxy is set; and how long it took, in seconds."""
    game = Game(folder, uri, terms, through=uri.replace(server, proxy.endpoint))
    took_s = disturbed(game, nothing)
    game.tally.struck.update(proxy.fired)
    return game.tally, took_s


# ---------------------------------------------------------------------- disks


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "4m") -> Iterator[Path]:
    """A disk of its own. Raises CannotError where none may be mounted."""
    folder.mkdir(parents=True)
    if os.geteuid() != 0:
        raise CannotError("NO FULL DISK WAS TESTED: only root may mount one")
    done = _mount("-t", "tmpfs", "-o", f"size={size}", "mixmo-chaos", str(folder))
    if done.returncode:
        raise CannotError(f"NO FULL DISK WAS TESTED: none may be mounted here ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def disk_full(folder: Path) -> Tally:
    """Fill the disk while a sweep runs until its driver has met it, and make room again."""
    with small_disk(folder / "disk") as disk:
        game = Game(folder / "sweep", str(disk / "results"), LONG, through=str(disk / "results"))

        def disturb(process: Child) -> None:
            ballast = disk / "ballast"

            def filled_and_met() -> bool:
                with contextlib.suppress(OSError):  # a checkpoint that is dropped makes room, which is taken again
                    while True:
                        file.write(bytes(4096))
                return _met(game, process, "No space left")

            with ballast.open("wb", buffering=0) as file:
                until(filled_and_met)
            ballast.unlink()

        disturbed(game, disturb)
    return game.tally


def read_only(folder: Path) -> Tally:
    """Let nobody write to the folder while a sweep runs, until its driver has met it."""
    with small_disk(folder / "disk", "64m") as disk:
        game = Game(folder / "sweep", str(disk / "results"), LONG, through=str(disk / "results"))

        def disturb(process: Child) -> None:
            until(lambda: _mount("-o", "remount,ro", str(disk)).returncode == 0)  # not while a file is being written
            until(lambda: _met(game, process, "Read-only file system"))
            assert _mount("-o", "remount,rw", str(disk)).returncode == 0

        disturbed(game, disturb)
    return game.tally


def _met(game: Game, process: Child, reason: str) -> bool:
    """Whether the driver has said why the store takes nothing, and lives. One that has ended never will."""
    told = reason in game.said()
    game.tally.struck[reason] += told and process.is_alive()
    return told or not process.is_alive()


def _mount(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["mount", *words], check=False, capture_output=True, text=True)
