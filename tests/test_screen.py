"""What people see of a sweep: frames, plain lines, and the numbers behind them."""

import dataclasses
import io
import itertools
import json
import os
import re
import statistics
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import made_picture
import pytest
import sample_sweep
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text
from sample_sweep import NAME, NOW, Moment

from mixmo_core.config import DataConfig, MixingConfig, ModelConfig, TrialConfig, cell_id, digest, identity
from orchestrator import lines, progress
from orchestrator.errors import ExitCode, NotFoundError, UnreachableError
from orchestrator.rows import FINAL, TrialRow, config_columns
from orchestrator.rows import State as TrialState
from orchestrator.screen import Scene, Screen, State, Terms, changes, counts, press, render, summary, watch
from orchestrator.screen.frame import HELP, SHORT_HELP, drawn
from orchestrator.store import Header, ResultStore, Snapshot
from orchestrator.sweep import Budget, Price

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
FRAMES: list[tuple[Moment, tuple[int, int], bool | None]] = [
    ("middle", (60, 15), True),
    ("middle", (80, 24), True),
    ("middle", (120, 40), True),
    ("middle", (200, 60), True),
    ("beginning", (80, 24), True),
    ("end", (80, 24), False),
    ("middle", (81, 24), False),
    ("middle", (82, 24), None),
]
"""Moment, size, and whether a driver holds the sweep: yes, no, or who knows."""


def shot(rows: list[TrialRow], **header: Any) -> Snapshot:
    return Snapshot(Header(fence=1, written_at=NOW, **header), rows, [], [])


def row(config: TrialConfig | None = None, **changes: Any) -> TrialRow:
    config = config or TrialConfig()
    name = digest(identity(config))
    return TrialRow(
        sweep="s", position=config.seed, trial_id=name[:12], digest=name, cell_id=cell_id(config), epochs=10,
        fence=1, config=config_columns(config), **changes,
    )  # fmt: skip


def shown(snapshot: Snapshot, size: tuple[int, int], *, driven: bool | None = True, now: datetime = NOW) -> Text:
    """A frame that nobody is at the keys of."""
    return render(Scene(snapshot, now, driven=driven), now, size)


# ---------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(("moment", "size", "driven"), FRAMES)
def test_a_frame_is_the_recorded_one(moment: Moment, size: tuple[int, int], driven: bool | None) -> None:
    """Record anew with MIXMO_RECORD=1, then look at what changed."""
    frame = shown(sample_sweep.snapshot(moment), size, driven=driven, now=NOW + timedelta(seconds=200)).plain + "\n"
    file = GOLDEN / f"screen_{moment}_{size[0]}x{size[1]}.txt"
    if os.environ.get("MIXMO_RECORD"):
        file.write_text(frame)
    assert frame == file.read_text()


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    rows = []
    for seed in range(draw(st.integers(0, 14))):
        model = ModelConfig(width=draw(st.integers(1, 10)), subnetworks=draw(st.integers(1, 3)))
        state: TrialState = draw(st.sampled_from(["PENDING", "RUNNING", "PAUSED", "TERMINATED", "ERROR", "CANCELLED"]))
        text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=40)
        rows.append(
            row(
                TrialConfig(model=model, seed=seed),
                state=state,
                label=draw(st.none() | text),
                epoch=10 if state == "TERMINATED" else draw(st.integers(0, 10)),
                error_cause=draw(st.none() | text),
                wall_s=draw(st.floats(0, 1e7)),
                train_flops=draw(st.none() | st.floats(0, 1e20)),
                started_at=NOW - timedelta(hours=2),
                updated_at=NOW - timedelta(seconds=draw(st.integers(0, 7200))),
                metrics={"top1": draw(st.none() | st.floats(0, 1))},
            )
        )
    return shot(rows)


@settings(deadline=None, max_examples=25)
@given(snapshots(), st.integers(1, 12) | st.integers(1, 240), st.integers(1, 70), st.sampled_from([True, False, None]))
def test_no_frame_exceeds_its_size(snapshot: Snapshot, width: int, height: int, driven: bool | None) -> None:
    frame = shown(snapshot, (width, height), driven=driven)
    drawn = frame.split("\n")
    assert len(drawn) <= height
    assert max(line.cell_len for line in drawn) <= width


@settings(deadline=None, max_examples=30)
@given(snapshots())
def test_what_is_counted_adds_up(snapshot: Snapshot) -> None:
    state = progress.measure(snapshot, NOW)
    assert state.total == state.done + state.running + state.queued + state.paused + state.failed + state.cancelled
    assert 0 <= state.fraction <= 1 + 1e-9
    assert state.eta_s is None or state.eta_s >= 0
    assert (state.status == "finished") == all(each.state in FINAL for each in snapshot.rows)


def test_a_paused_sweep_says_who_had_it_paused_and_what_waits() -> None:
    rows = [row(TrialConfig(seed=seed), state="PAUSED", epoch=4, wall_s=40.0) for seed in range(2)]
    paused = shot(rows, paused_by="ada@lab")
    frame = shown(paused, (100, 20)).plain
    assert "‖ paused by ada@lab" in frame
    assert "2 paused" in frame
    assert "4/10" in frame
    assert " left" not in frame
    state = progress.measure(paused, NOW)
    assert (state.status, state.paused, state.eta_s) == ("paused", 2, None)
    assert "Paused" in frame
    # Its driver has gone: nobody pauses it any more, it waits for the next run.
    assert progress.measure(paused, NOW, driven=False).status == "stopped"
    assert "To resume" in shown(paused, (100, 20), driven=False).plain


def test_trials_that_run_side_by_side_are_said_to() -> None:
    rows = [row(TrialConfig(seed=seed), state="RUNNING", epoch=4, wall_s=40.0, slots=3) for seed in range(2)]
    assert "2 running (3 slots a gang)" in shown(shot(rows), (100, 20)).plain
    alone = [each.replace(slots=1) for each in rows]
    assert "2 running" in shown(shot(alone), (100, 20)).plain
    assert "slots" not in shown(shot(alone), (100, 20)).plain


def test_a_frame_says_all_without_colour() -> None:
    """Each state is a word, not only a colour."""
    plain = shown(sample_sweep.snapshot("middle"), (80, 24)).plain
    for word in ("● running", "16 done (3 cached)", "6 running", "14 queued", "3 failed", "CUDA out of memory"):
        assert word in plain


def test_bytes_of_a_frame_respect_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> str:
        stream = io.StringIO()
        Console(file=stream, force_terminal=True, width=80).print(shown(sample_sweep.snapshot("end"), (80, 24)))
        return stream.getvalue()

    assert "\x1b[1;32m" in drawn()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "32m" not in drawn()


def test_the_screen_is_in_the_time_zone_of_its_reader() -> None:
    zone = NOW.astimezone().tzinfo
    assert lines.clock(NOW, NOW) == "14:02:11"
    assert lines.clock(NOW - timedelta(days=1), NOW.astimezone(zone)) == "20 Nov"


# ------------------------------------------------------------------------------------------------- numbers and names


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(1.0, 1.0, "x ± 0 %"), (1.0, 1.0 + 1e-15, "x ± 0 %"), (0.973, 1.02, "x ± 2.7 %"), (0.5, 3.1, "x ± 210 %"),
     (None, None, "x")],
)  # fmt: skip
def test_a_band_is_told_in_digits_that_people_read(low: float | None, high: float | None, text: str) -> None:
    assert lines.spanned({"mean": 1.0, "low": low, "high": high}, "x") == text


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return made_picture.scene(tmp_path_factory.mktemp("pictured"))


@pytest.mark.parametrize("width", range(108, 221, 4))
def test_the_heat_map_keeps_deviation_and_seeds_as_the_terminal_gets_wider(width: int, pictured: Scene) -> None:
    frame = "\n".join(line.plain for line in drawn(pictured, NOW, (width, 50), State()))
    assert re.search(r"^ *vanilla +75\.(5|46) ?±0\.22? 3/3 ", frame, re.MULTILINE)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 m 00 s"), (185, "3 m 05 s"), (3600, "1 h 00 m"), (8040, "2 h 14 m"),
     (86400, "1 d 00 h"), (273600, "3 d 04 h"), (-3, "0 s")],
)  # fmt: skip
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert lines.duration(seconds) == text


@given(st.lists(st.floats(0, 1), max_size=400), st.integers(1, 40))
def test_a_sparkline_fits_and_reaches_from_its_lowest_to_its_highest(values: list[float], width: int) -> None:
    drawn = lines.sparkline(values, width)
    assert len(drawn) == min(width, len(values))
    if len(values) > 1 and len(set(values)) == len(values) <= width:
        assert drawn[values.index(min(values))] == "▁"
        assert drawn[values.index(max(values))] == "█"


def test_a_sparkline_passes_over_what_is_no_number() -> None:
    assert lines.sparkline([float("nan"), 0.0, 1.0, float("inf")], 10) == "▁█"


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_the_spread_of_a_cell_is_the_sample_deviation(values: list[float]) -> None:
    cell = progress.Cell("id", "name", len(values), tuple(values))
    assert cell.mean == pytest.approx(statistics.fmean(values))
    assert cell.std == pytest.approx(statistics.stdev(values), abs=1e-12)


def test_trials_that_were_stopped_early_are_done_and_said_to_be() -> None:
    rows = [row(TrialConfig(seed=seed), state="TERMINATED", stopped_early=seed < 2, epoch=3) for seed in range(3)]
    state = progress.measure(shot(rows), NOW)
    assert (state.done, state.stopped_early, state.failed, state.status, state.fraction) == (3, 2, 0, "finished", 1.0)
    assert "3 done (2 stopped early)" in counts(shot(rows), NOW)


def test_results_count_whole_trials_only_and_begin_with_the_best() -> None:
    wide, narrow = ModelConfig(width=10), ModelConfig(width=2)
    rows = [
        row(TrialConfig(model=narrow, seed=0), state="TERMINATED", metrics={"top1": 0.5}),
        row(TrialConfig(model=narrow, seed=1), state="TERMINATED", metrics={"top1": 0.9}, stopped_early=True),
        row(TrialConfig(model=narrow, seed=2), state="RUNNING", metrics={"top1": 0.9}),
        row(TrialConfig(model=wide, seed=0), state="TERMINATED", metrics={"top1": 0.7}),
    ]
    found = progress.results(rows, progress.cell_names(rows))
    assert [(cell.name, cell.top1, cell.planned) for cell in found] == [("w=10", (0.7,), 1), ("w=2", (0.5,), 3)]


configs = st.builds(
    lambda width, subnetworks, method, repetition: TrialConfig(
        data=DataConfig(repetition=repetition),
        model=ModelConfig(width=width, subnetworks=subnetworks),
        mixing=MixingConfig(method=method),
    ),
    st.integers(1, 10), st.integers(1, 4), st.sampled_from(["sum", "linear", "cutmix"]), st.sampled_from([1, 2, 4]),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.tuples(configs, st.sampled_from([None, "vanilla", "ours"])), min_size=1, max_size=12))
def test_different_cells_of_a_label_have_different_names(given: list[tuple[TrialConfig, str | None]]) -> None:
    rows = {config_row.cell_id: config_row for config, label in given for config_row in [row(config, label=label)]}
    names = progress.cell_names(list(rows.values()))
    spoken = [(rows[cell].label, name) for cell, name in names.items()]
    assert len(set(spoken)) == len(rows)


def test_names_are_written_as_in_papers() -> None:
    names = set(progress.cell_names(sample_sweep.snapshot("middle").rows).values())
    assert {"vanilla w=2", "cutmix w=10 M=2", "linear w=5 M=3"} <= names


def test_the_time_left_is_what_the_cell_took_spread_over_what_runs() -> None:
    rows = [
        row(TrialConfig(seed=0), state="TERMINATED", epoch=10, wall_s=100.0),
        row(TrialConfig(seed=1), state="RUNNING", epoch=5),
        row(TrialConfig(seed=2), state="RUNNING", epoch=5),
        row(TrialConfig(seed=3)),
    ]
    assert progress.measure(shot(rows), NOW).eta_s == pytest.approx(100.0)  # half + half + one, two at a time
    assert progress.measure(shot(rows[:3]), NOW).eta_s == pytest.approx(50.0)
    assert progress.measure(shot(rows[1:]), NOW).eta_s is None  # nothing is known
    assert progress.measure(shot(rows[:1]), NOW).eta_s is None  # nothing is left


def test_a_speed_next_to_nothing_gives_no_time_left() -> None:
    rows = [row(state="TERMINATED", epoch=10, wall_s=1e7, train_flops=1e-310), row(TrialConfig(seed=1), epoch=10)]
    rows[0] = dataclasses.replace(rows[0], cell_id="another")
    assert progress.measure(shot(rows), NOW).eta_s is None


def test_a_cell_that_has_no_time_yet_is_priced_by_its_flops() -> None:
    from mixmo_core import cost

    narrow, wide = TrialConfig(model=ModelConfig(width=2)), TrialConfig(model=ModelConfig(width=4))
    flops = cost.trial_flops(narrow)
    rows = [row(narrow, state="TERMINATED", epoch=10, wall_s=100.0, train_flops=flops), row(wide, state="RUNNING")]
    expected = 100.0 * cost.trial_flops(wide) / flops
    assert progress.measure(shot(rows), NOW).eta_s == pytest.approx(expected)


def test_the_pace_is_that_of_the_last_hour_and_of_this_driver() -> None:
    def ended(seed: int, minutes_ago: float, **changes: Any) -> TrialRow:
        began, end = NOW - timedelta(hours=3), NOW - timedelta(minutes=minutes_ago)
        return row(TrialConfig(seed=seed), state="TERMINATED", epoch=10, started_at=began, updated_at=end, **changes)

    rows = [ended(0, 10), ended(1, 50), ended(2, 90), ended(3, 5, cached_from="other"), row(TrialConfig(seed=4))]
    assert progress.measure(shot(rows), NOW).trials_per_hour == pytest.approx(2.0)


def test_failures_are_grouped_by_cause() -> None:
    groups = progress.failures(sample_sweep.snapshot("middle").rows)
    assert [(cause, len(rows)) for cause, rows in groups] == [
        ("CUDA out of memory", 2),
        ("a worker was killed by signal 9", 1),
    ]


# ------------------------------------------------------------------------------------------------------ plain lines


COPIED = json.dumps([{
    "number": 3, "epoch": 8, "value": 0.5, "checkpoint": None,
    "copy": {"parent_id": "aaaa", "line": "", "epoch": 8, "checkpoint": "key", "settings": {"optim.lr": 0.12},
             "before": {"optim.lr": 0.1}},
}])  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, {"state": "RUNNING", "attempts": 1}, "started   cutmix, seed 0"),
        ({"state": "RUNNING", "attempts": 1}, {"state": "RUNNING", "attempts": 2, "epoch": 4},
         "started   cutmix, seed 0 · attempt 2 · from epoch 4"),
        ({"state": "RUNNING"}, {"state": "TERMINATED", "metrics": {"top1": 0.5}, "wall_s": 65.0},
         "finished  cutmix, seed 0 · top-1 50.0 % · 1 m 05 s"),
        ({}, {"state": "TERMINATED", "metrics": {"top1": 0.5}, "cached_from": "pilot"},
         "cached    cutmix, seed 0 · top-1 50.0 % · from pilot"),
        ({"state": "RUNNING"}, {"state": "ERROR", "error_cause": "boom"}, "failed    cutmix, seed 0 · boom"),
        ({"state": "RUNNING"}, {"state": "PENDING"}, "given back cutmix, seed 0"),
        ({"state": "RUNNING"}, {"state": "PAUSED"}, "paused    cutmix, seed 0"),
        ({}, {"state": "CANCELLED"}, "cancelled cutmix, seed 0"),
        ({"state": "RUNNING"}, {"state": "PENDING", "checkpoint": "key", "lineage": COPIED},
         "exploited cutmix, seed 0 · aaaa at epoch 8: optim.lr 0.1 -> 0.12"),
    ],
)  # fmt: skip
def test_a_change_is_one_line(before: dict[str, Any], after: dict[str, Any], said: str) -> None:
    old, new = row(**before), row(**after)
    assert changes(shot([old]), shot([new]), NOW) == [f"14:02:11  {new.trial_id[:7]}  {said}"]


def test_an_epoch_is_no_change() -> None:
    assert changes(shot([row(state="RUNNING", epoch=1)]), shot([row(state="RUNNING", epoch=2)]), NOW) == []


def test_the_header_in_one_line() -> None:
    said = counts(sample_sweep.snapshot("end"), NOW)
    assert said.startswith("14:02:11  finished, 3 failed · 36 done (3 cached)  3 failed of 39 · ")
    assert "\n" not in said


def test_plain_lines_say_whether_anything_runs_and_when_that_changes() -> None:
    """By the minute nothing would be said: only `stopped` and `paused` are news here."""
    middle = sample_sweep.snapshot("middle")
    rests = dataclasses.replace(middle, header=dataclasses.replace(middle.header, paused_by="ada@lab"))
    stream = io.StringIO()
    with Screen(Console(file=stream, width=100), now=lambda: NOW) as screen:
        for shot, driven in [(middle, True), (middle, True), (rests, True), (middle, False), (middle, False)]:
            screen.show(shot, driven=driven)
        told = [line for line in stream.getvalue().splitlines() if " of 39" in line]
    assert [line.removeprefix("14:02:11  ").partition(" · ")[0] for line in told] == [
        "running", "pausing by ada@lab", "stopped before its end"
    ]  # fmt: skip
    assert "16 done (3 cached)  6 to resume  14 queued  3 failed of 39" in told[-1]


# ------------------------------------------------------------------------------------------------------ the screen


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> object:
        return self.now


def played(moments: list[Snapshot], *, terminal: bool, gap_s: float = 1.0) -> str:
    """Everything that a screen writes while these snapshots come."""
    stream, clock = io.StringIO(), Clock()
    with Screen(Console(file=stream, force_terminal=terminal, width=100, height=30), now=clock) as screen:  # type: ignore[arg-type]
        for moment in moments:
            screen._rest_until = 0.0
            screen.show(moment)
            clock.now += timedelta(seconds=gap_s)
    return stream.getvalue()


def test_without_a_terminal_there_are_plain_lines_and_a_summary() -> None:
    text = played([sample_sweep.snapshot(moment) for moment in ("beginning", "middle", "end")], terminal=False)
    assert "\x1b" not in text
    told = [line.split()[2] for line in text.splitlines() if line.startswith("14:02:") and len(line.split()[1]) == 7]
    assert told.count("finished") == 33
    assert told.count("failed") == 3
    assert text.splitlines()[0] == "14:02:11  running · 0 done  2 running  37 queued of 39"
    assert "✗ finished, 3 failed" in text


def test_without_a_terminal_the_counts_are_told_once_a_minute() -> None:
    shots = [sample_sweep.snapshot("middle")] * 130
    assert sum("of 39" in line for line in played(shots, terminal=False).splitlines()) == 3


def test_a_terminal_is_drawn_on_when_something_changed_and_given_back() -> None:
    middle = sample_sweep.snapshot("middle")
    once, often = (played([middle] * times, terminal=True) for times in (1, 50))
    assert len(often) == len(once)
    assert once.count("\x1b[?1049h") == once.count("\x1b[?1049l") == 1
    assert "Causes of failure" in once.rpartition("\x1b[?1049l")[2]
    later = dataclasses.replace(middle.rows[19], epoch=84)
    changed = dataclasses.replace(middle, rows=[*middle.rows[:19], later, *middle.rows[20:]])
    assert len(played([middle, changed], terminal=True)) > len(once)


def test_nothing_is_drawn_before_there_is_something_to_see() -> None:
    assert played([], terminal=True) == ""


def test_what_the_driver_says_is_on_the_screen_and_stays() -> None:
    stream = io.StringIO()
    with Screen(Console(file=stream, force_terminal=True, width=100, height=30)) as screen:
        screen.show(sample_sweep.snapshot("middle"))
        screen.say("stopping: running trials finish")
    during, _, after = stream.getvalue().rpartition("\x1b[?1049l")
    assert "stopping: running trials finish" in during
    assert "stopping: running trials finish" in after


def test_a_summary_is_as_long_as_it_has_to_be() -> None:
    assert len(summary(sample_sweep.snapshot("end"), NOW, 80).plain.splitlines()) == 4 + 14 + 3


# -------------------------------------------------------------------------------------------------------------- watch


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.mark.parametrize(("moment", "code"), [("end", ExitCode.FAULTS)])
def test_watching_ends_with_the_sweep(tmp_path: Path, moment: Moment, code: ExitCode) -> None:
    assert watch(sample_sweep.stored(tmp_path, moment), NAME, quiet()) is code


def test_watching_once_shows_one_frame(tmp_path: Path) -> None:
    console = quiet()
    assert watch(sample_sweep.stored(tmp_path, "middle"), NAME, console, once=True) is ExitCode.OK
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "stopped before its end" in shown
    assert "To resume 6" in shown


def test_watching_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no sweep nothing"):
        watch(ResultStore.open(tmp_path), "nothing", quiet())


class Flaky:
    """A store that is away at some looks, and whose sweep ends at the last."""

    def __init__(self, away: Callable[[int], bool]) -> None:
        self.looks, self.away = 0, away

    def follow(self, sweep: str) -> "Flaky":
        return self

    def driven(self) -> bool:
        return False

    def look(self) -> Snapshot:
        self.looks += 1
        if self.away(self.looks):
            raise UnreachableError("the disk is away")
        return sample_sweep.snapshot("end" if self.looks > 4 else "middle")


def test_watching_outlives_a_store_that_is_away_for_a_while() -> None:
    store = Flaky(lambda look: look in (2, 3))
    assert watch(store, NAME, quiet(), every_s=0.0) is ExitCode.FAULTS  # type: ignore[arg-type]
    assert store.looks == 5


def test_watching_a_store_that_is_away_from_the_beginning_fails() -> None:
    with pytest.raises(UnreachableError):
        watch(Flaky(lambda look: True), NAME, quiet())  # type: ignore[arg-type]


def test_a_section_that_is_cut_says_so() -> None:
    many = lines.Section("Things", "bold", (lines.Column("", 0),), [[Text(str(i))] for i in range(9)])
    drawn = [line.plain.rstrip() for line in many.draw(20, 4)]
    assert drawn == ["Things 3 of 9 ──────", "0", "1", "2"]


# --------------------------------------------------------------------------------------------------------- the grid


@settings(deadline=None, max_examples=25)
@given(snapshots())
def test_each_cell_has_one_place_in_the_grid(snapshot: Snapshot) -> None:
    grid = Scene(snapshot, NOW).plot
    if grid is not None:
        assert sorted(grid.cells.values()) == sorted({each.cell_id for each in snapshot.rows})
        shapes = {each.cell_id: each for each in snapshot.rows}
        assert all(shapes[cell].config[grid.across] == grid.columns[j] for (_, j), cell in grid.cells.items())
        assert len(grid.lines) > 1


def test_a_grid_of_holes_is_a_list() -> None:
    """Four methods by their labels, of which one has another number of subnetworks."""
    models = [ModelConfig(subnetworks=1), *[ModelConfig(subnetworks=2)] * 3]
    mixed = [MixingConfig(method=method) for method in ("sum", "sum", "linear", "cutmix")]
    rows = [
        row(TrialConfig(model=m, mixing=x), label=f"{i}") for i, (m, x) in enumerate(zip(models, mixed, strict=True))
    ]
    assert Scene(shot(rows), NOW).plot is None


def test_the_grid_fills_as_cells_finish() -> None:
    drawn = [shown(sample_sweep.snapshot(moment), (100, 30)).plain for moment in ("beginning", "middle", "end")]
    assert ["±" in each for each in drawn] == [False, True, True]
    assert "● 0 %" in drawn[0]
    assert "3/3" in drawn[2]


# ------------------------------------------------------------------------------------------------- money and time left


def test_cost_stands_against_what_there_is() -> None:
    snapshot = sample_sweep.snapshot("middle")
    scene = Scene(snapshot, NOW, terms=Terms(gpu_hour=2.5, gpu_hours=400, currency="EUR"))
    cost = f"{scene.progress.gpu_seconds / 3600 * 2.5:.2f}"
    assert f"6.3 of 400 GPU-hours · {cost} of 1,000.00 EUR" in render(scene, NOW, (100, 30)).plain
    assert "EUR" not in shown(snapshot, (100, 30)).plain


@pytest.mark.parametrize(("hours", "told"), [(400.0, "6.25 of 400 hours of training"), (0.5, "6.25 of 0.5 hours")])
def test_hours_of_training_stand_against_their_budget(hours: float, told: str) -> None:
    """The budget of a sweep on processors: no GPU, so nothing else says what is spent."""
    shot = sample_sweep.snapshot("middle")
    rows = [
        dataclasses.replace(each, gpu_seconds=0.0, wall_s=6.25 * 3600 if each.position == 4 else 0.0)
        for each in shot.rows
    ]
    terms = Terms.of(Price(), Budget(hours=hours))
    for driven, size in itertools.product((True, False), ((80, 24), (120, 40))):
        frame = render(Scene(dataclasses.replace(shot, rows=rows), NOW, terms=terms, driven=driven), NOW, size).plain
        assert told in frame
        assert "GPU-hours" not in frame


@settings(deadline=None)
@given(st.integers(80, 160))
def test_what_is_spent_goes_before_the_pace(width: int) -> None:
    terms = Terms(gpu_hour=2.5, gpu_hours=400, hours=300)
    line = render(Scene(sample_sweep.snapshot("middle"), NOW, terms=terms), NOW, (width, 24)).plain.splitlines()[3]
    assert "6.27 of 300 hours of training · 6.3 of 400 GPU-hours · 15.68 of 1,000.00 USD" in line
    assert ("trials/h" in line) == (width >= 92)


# ------------------------------------------------------------------------------------------------------------ its keys


def pressed(keys: str, size: tuple[int, int]) -> list[str]:
    """The lines of the frame after these keys."""
    scene, state = Scene(sample_sweep.snapshot("middle"), NOW), State()
    for key in keys.split():
        state, _ = press(state, key, scene)
    return render(scene, NOW, size, state).plain.splitlines()


@settings(deadline=None, max_examples=60)
@given(st.integers(10, 140), st.integers(1, 50))
def test_help_is_whole_wherever_there_is_room_for_its_short_form(width: int, height: int) -> None:
    told = "\n".join(pressed("?", (width, height)))
    assert width < 40 or "q  " in told or height == 1
    if width >= 40 and height >= 11:
        for line in SHORT_HELP if "Keys" not in told else HELP:
            assert line in told
    assert "…" not in told or width < 40
    if width >= 78 and height >= 24:
        assert all(line in told for line in HELP)


@pytest.mark.parametrize(("keys", "size", "hint"), [
    ("", (80, 24), " ↑↓ enter open · tab panes · / filter · s sort · K R P act · ? help · q quit"),
    ("", (60, 15), " q quit · ? help · ↑↓ enter open · tab panes · / filter"),
    ("", (30, 15), " q quit · ? help"),
    ("down enter", (60, 15), " q quit · ? help · esc back · tab pages · ↑↓ scroll"),
])  # fmt: skip
def test_what_can_be_pressed_stands_at_the_foot(keys: str, size: tuple[int, int], hint: str) -> None:
    lines_shown = pressed(keys, size)
    assert len(lines_shown) == size[1]
    assert lines_shown[-1] == hint
    assert "? help" not in pressed(keys, (size[0], 9))[-1]  # every line counts there


def test_the_group_that_is_listed_stands_at_the_foot_by_its_name() -> None:
    assert pressed("tab down right right enter", (80, 24))[-1] == " of vanilla w=10  3 found"
    assert pressed("tab down right right enter / 1", (80, 24))[-1].startswith(" of vanilla w=10 /1▏  ")
    assert "…" in pressed("tab down right right enter / 1 2 3 4", (30, 24))[-1]


def test_the_band_of_the_time_left_is_that_of_the_longest_order_and_of_the_spread() -> None:
    """Two at a time with 300 s left, of which one trial takes 100: between 150 and 150 + 50; all took the same."""
    ended = [row(TrialConfig(seed=seed), state="TERMINATED", epoch=10, wall_s=100.0) for seed in range(2)]
    running = [row(TrialConfig(seed=seed), state="RUNNING") for seed in (2, 3)]
    state = progress.measure(shot([*ended, *running, row(TrialConfig(seed=4))]), NOW)
    assert (state.eta_low_s, state.eta_s, state.eta_high_s) == pytest.approx((150.0, 150.0, 200.0))


@settings(deadline=None, max_examples=30)
@given(snapshots())
def test_the_time_left_is_within_its_band(snapshot: Snapshot) -> None:
    state = progress.measure(snapshot, NOW)
    if state.eta_s is not None:
        assert state.eta_low_s is not None
        assert state.eta_high_s is not None
        assert 0 <= state.eta_low_s <= state.eta_s <= state.eta_high_s


def test_failures_that_differ_in_numbers_alone_are_one_cause() -> None:
    causes = ["CUDA out of memory: 512 MiB", "CUDA out of memory: 1.5e3 MiB", "no such file"]
    rows = [row(TrialConfig(seed=i), state="ERROR", error_cause=cause) for i, cause in enumerate(causes)]
    assert [(cause, len(each)) for cause, each in progress.failures(rows)] == [
        ("CUDA out of memory: … MiB", 2), ("no such file", 1)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ its picture


def test_the_picture_of_the_readme_is_what_the_screen_shows(tmp_path: Path) -> None:
    """Record anew with MIXMO_RECORD=1, then look at it."""
    file = ROOT / "docs" / "screen.svg"
    picture = made_picture.svg(made_picture.lines(tmp_path))
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")
    if os.environ.get("MIXMO_RECORD"):
        file.write_text(picture)
    assert picture == file.read_text()
