"""A sweep whose driver is killed at random moments, again and again. Run by `make chaos`, not by `make test`."""

import json
import os
import random
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from command_line import Mixmo, kill

ROOT = Path(__file__).resolve().parent.parent.parent
KILLS = 10


@pytest.mark.timeout(3600)
def test_ten_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    sweep = (ROOT / "sweeps/quickstart.yaml").read_text()
    quiet, hunted = [Mixmo(tmp_path / name, sweep) for name in ("quiet", "hunted")]
    quiet("run", "sweep.yaml")

    seed = os.environ.get("MIXMO_TEST_SEED") or f"{time.time_ns()}"
    moments = random.Random(seed)
    kills: list[dict[str, float]] = []
    while len(kills) < KILLS:
        running = hunted.start("run", "sweep.yaml")
        # Some while it starts and takes the sweep over, most while it trains.
        before = hunted.epochs()
        while_training = moments.random() < 0.7 and before < 12 * 10
        if while_training:
            hunted.until(running, lambda rows, least=before: sum(row.epoch for row in rows) > least)  # type: ignore[misc]
        after_s = moments.uniform(0, 8)
        try:
            running.communicate(timeout=after_s)
        except subprocess.TimeoutExpired:
            kill(running)
            kills.append({"while_training": while_training, "after_s": after_s, "epochs_in_store": hunted.epochs()})
            continue
        # It came to its end before the moment did: begin again from nothing, with the kills that are left.
        assert running.returncode == 0, f"seed {seed}"
        hunted = Mixmo(tmp_path / f"hunted-{len(kills)}", sweep)

    hunted("run", "sweep.yaml")
    hunted("verify", "quickstart")
    assert [row.state for row in hunted.rows()] == ["TERMINATED"] * 12
    assert hunted.results() == quiet.results(), f"seed {seed}"
    tables = [mixmo("table", "quickstart", "--format", "csv").stdout for mixmo in (quiet, hunted)]
    assert tables[0] == tables[1]
    record(seed, kills, attempts=sum(row.attempts for row in hunted.rows()))


def record(seed: str, kills: list[dict[str, float]], attempts: int) -> None:
    """What was survived, for people who were not there."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    done = {
        "command": "make chaos", "passed": True, "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(), "seed": seed, "kills": kills, "trials": 12, "attempts": attempts,
    }  # fmt: skip
    (ROOT / "benchmarks/results/chaos.json").write_text(json.dumps(done, indent=1) + "\n")
