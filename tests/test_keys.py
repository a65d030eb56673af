"""What keys do: bytes of a terminal as keys, and the state that they change. No terminal is needed for any of it."""

import dataclasses

import pytest
import sample_sweep
from hypothesis import given
from hypothesis import strategies as st
from sample_sweep import NOW

from orchestrator.rows import FINAL
from orchestrator.screen import Order, Scene, State, press
from orchestrator.screen.keys import decode
from orchestrator.screen.scene import PANES, SORTS, Pane, Search
from orchestrator.screen.state import Effect, Quit, Read, choice

SCENES = {moment: Scene(sample_sweep.snapshot(moment), NOW) for moment in ("beginning", "middle", "end")}
MIDDLE = SCENES["middle"]
NAMED = [
    "up",
    "down",
    "left",
    "right",
    "home",
    "end",
    "pageup",
    "pagedown",
    "enter",
    "esc",
    "tab",
    "backtab",
    "backspace",
]
keys = st.lists(st.sampled_from([*NAMED, *"KRPyn/sq?jkw=510 x"]), max_size=40)
scenes = st.sampled_from(list(SCENES.values()))


def played(pressed: list[str] | str, scene: Scene = MIDDLE, state: State | None = None) -> tuple[State, list[Effect]]:
    state, effects = state or State(), []
    for key in pressed:
        state, effect = press(state, key, scene)
        effects += [effect] if effect else []
    return state, effects


# ------------------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize(
    ("sent", "expected"),
    [("a", ["a"]), ("\x1b[A", ["up"]), ("\x1bOB", ["down"]), ("\x1b[5~", ["pageup"]), ("\r", ["enter"]),
     ("\t\x1b[Z", ["tab", "backtab"]), ("\x1b[1;5Cx", ["x"]), ("\x1bq", ["esc", "q"]), ("é\x7f", ["é", "backspace"]),
     ("\x01\x00", []), ("\x1b\x1b[A", ["esc", "up"]), ("\x1b[200~K\x1b[201~", ["K"])],
)  # fmt: skip
def test_what_a_terminal_sends_is_known(sent: str, expected: list[str]) -> None:
    assert decode(sent) == (expected, "")


@given(st.text(st.sampled_from("\x1b[]OAB;159~ZqK\r\té"), max_size=30), st.integers(0, 30))
def test_it_makes_no_difference_how_what_is_sent_is_cut(sent: str, at: int) -> None:
    first, rest = decode(sent[:at])
    second, left = decode(rest + sent[at:])
    assert (first + second, left) == decode(sent)


@given(st.text(max_size=60))
def test_nothing_that_is_sent_is_kept_for_ever(sent: str) -> None:
    """What may be the beginning of a key is short; and a key is a name, or one character that can be shown."""
    found, rest = decode(sent)
    assert len(rest) <= 18
    assert all(key.isprintable() for key in found)


# ------------------------------------------------------------------------------------------------------------ laws


@given(keys, scenes)
def test_any_keys_leave_a_state_that_can_be_drawn(pressed: list[str], scene: Scene) -> None:
    state, _ = played(pressed, scene)
    assert state.pane in PANES
    assert state.sort in SORTS
    assert state.opened is None or state.opened in scene.rows
    assert all(choice(state, scene, pane) in {None, *scene.keys(pane, state.wanted, state.sort)} for pane in PANES)


@given(keys, scenes)
def test_no_order_is_given_that_was_not_agreed_to(pressed: list[str], scene: Scene) -> None:
    state = State()
    for key in pressed:
        before = state
        state, effect = press(state, key, scene)
        if isinstance(effect, Order):
            assert effect == before.asking
            assert key in "yY"
        if before.asking:
            assert state.asking is None


@given(keys, scenes)
def test_an_order_names_trials_that_it_can_change(pressed: list[str], scene: Scene) -> None:
    state = State()
    for key in pressed:
        state, _ = press(state, key, scene)
        order = state.asking
        if order and order.trials is not None:
            states = {scene.rows[each].state for each in order.trials}
            assert states
            assert states.isdisjoint(FINAL) if order.verb == "cancel" else states <= {"ERROR", "CANCELLED"}


@given(keys, scenes)
def test_escape_leads_back_to_where_it_began(pressed: list[str], scene: Scene) -> None:
    state, _ = played(pressed, scene)
    state, effects = played(["esc"] * 8, scene, state)
    assert state == State()
    assert not effects


@given(keys, st.sampled_from(["tab", "backtab"]))
def test_tab_goes_round(pressed: list[str], key: str) -> None:
    state, _ = played(pressed)
    state, _ = played(["esc"] * 8, state=state)
    panes = []
    for _ in PANES:
        state, _ = press(state, key, MIDDLE)
        panes.append(state.pane)
    assert sorted(panes) == sorted(PANES)
    assert state == State()


@given(st.text("abq?KR/=1 ", min_size=1, max_size=20))
def test_what_is_typed_is_the_filter_whatever_the_letters_do_elsewhere(text: str) -> None:
    state, effects = played(["/", *text])
    assert (state.wanted, state.typing, effects) == (Search(text), True, [])
    kept, _ = press(state, "enter", MIDDLE)
    assert (kept.wanted, kept.typing) == (Search(text), False)
    gone, _ = press(state, "esc", MIDDLE)
    assert (gone.wanted, gone.typing) == (Search(), False)


ALIKE = ["CutMix", "Linear-MixMo msda=cutmix", "cutmix", "mix", None]
"""Labels of which one is a word of another."""
FAULTS = ["out of memory", "cuda: out of memory", "memory", "lost 1 of 2", "lost 1 of 3", None]


@st.composite
def alike(draw: st.DrawFn) -> Scene:
    """A sweep whose cells, and whose causes of failure, have names of which one is in another."""
    shot = sample_sweep.snapshot("middle")
    labels = {row.cell_id: draw(st.sampled_from(ALIKE)) for row in shot.rows}
    rows = [dataclasses.replace(row, label=labels[row.cell_id]) for row in shot.rows]
    for i in range(0, len(rows), 2):
        rows[i] = dataclasses.replace(rows[i], state="ERROR", error_cause=draw(st.sampled_from(FAULTS)))
    return Scene(dataclasses.replace(shot, rows=rows), NOW)


@given(alike(), st.sampled_from(["results", "failures"]), st.integers(0, 50), st.sampled_from(["", "5"]))
def test_enter_lists_the_trials_of_what_is_chosen_and_no_others(
    scene: Scene, pane: Pane, number: int, typed: str
) -> None:
    pressed = [*(["/", *typed, "enter"] if typed else []), *["tab"] * PANES.index(pane), "home"]
    keys = scene.keys(pane)
    key = keys[number % len(keys)]
    state, _ = played(pressed, scene)
    state, _ = press(dataclasses.replace(state, chosen={pane: key}), "enter", scene)
    assert state.pane == "trials"
    assert sorted(scene.keys("trials", state.wanted, state.sort)) == sorted(scene.members(pane, key))
    assert choice(state, scene) == scene.members(pane, key)[0]
    assert state.wanted.group is not None
    assert state.wanted.group.name == scene.called(pane, key)
    # Words choose among them.
    narrowed, _ = played(["/", *"seed=1"], scene, state)
    assert set(scene.trials(narrowed.wanted)) == {
        each for each in scene.members(pane, key) if scene.rows[each].config["seed"] == 1
    }


@given(alike())
def test_each_cause_has_a_key_of_its_own(scene: Scene) -> None:
    keys = scene.keys("failures")
    assert len(set(keys)) == len(keys)
    assert sum(len(scene.members("failures", key)) for key in keys) == scene.progress.failed


def test_a_cause_that_is_listed_stays_so_when_its_name_changes() -> None:
    """One more trial fails of it, with another number in its message."""
    shot = sample_sweep.snapshot("middle")
    failed = [i for i, row in enumerate(shot.rows) if row.error_cause == "CUDA out of memory"]

    def scene(count: int) -> Scene:
        rows = [row for row in shot.rows if row.state != "ERROR"]
        rows += [dataclasses.replace(shot.rows[i], error_cause=f"no memory: {i} MiB") for i in failed[:count]]
        return Scene(dataclasses.replace(shot, rows=rows), NOW)

    state, _ = played(["tab", "tab", "down", "enter"], scene(1))
    assert state.wanted.group is not None
    assert state.wanted.group.name == f"no memory: {failed[0]} MiB"
    assert scene(2).called("failures", state.wanted.group.key) == "no memory: … MiB"
    assert scene(2).trials(state.wanted) == [shot.rows[i].trial_id for i in failed]


@given(st.lists(st.sampled_from(["up", "down", "pageup", "pagedown"]), max_size=30), scenes)
def test_moving_keeps_within_the_list(pressed: list[str], scene: Scene) -> None:
    state, _ = played(["down", *pressed], scene)
    assert choice(state, scene) in scene.trials()


@given(st.sampled_from(["up", "down", "left", "right"]), st.integers(0, 20))
def test_in_the_grid_a_step_and_the_step_back_meet(key: str, start: int) -> None:
    grid = MIDDLE.plot
    assert grid is not None
    back = {"up": "down", "down": "up", "left": "right", "right": "left"}[key]
    cell = list(grid.cells.values())[start % len(grid.cells)]
    state = State(pane="results", chosen={"results": cell})
    moved, _ = press(state, key, MIDDLE)
    again, _ = press(moved, back, MIDDLE)
    assert moved.chosen["results"] == cell or again.chosen["results"] == cell


# --------------------------------------------------------------------------------------------------------- examples


def test_enter_opens_a_trial_and_its_pages_are_read_when_they_are_looked_at() -> None:
    state, effects = played(["down", "down", "enter"])
    second = MIDDLE.trials()[1]
    assert state.opened == second
    assert effects == [Read(second, "curves")]
    state, effects = played(["tab", "tab"], state=state)
    assert effects == [Read(second, "settings"), Read(second, "log")]
    state, effects = played(["esc"], state=state)
    assert state.opened is None
    assert choice(state, MIDDLE) == second


def test_a_trial_is_cancelled_after_a_question() -> None:
    state, effects = played(["down", "K"])
    first = MIDDLE.trials()[0]
    assert state.asking == Order("cancel", (first,), f"Cancel {first[:7]} (linear w=5 M=2, seed 1), for good?")
    assert effects == []
    declined, refused = press(state, "n", MIDDLE)
    assert (declined.asking, declined.note, refused) == (None, "nothing was done", None)
    _, effect = press(state, "y", MIDDLE)
    assert effect == state.asking


def test_all_of_a_cause_are_queued_again() -> None:
    state, _ = played(["tab", "tab", "down", "R"])
    assert state.pane == "failures"
    assert state.asking is not None
    assert state.asking.question == "Queue 2 trials again?"
    assert {MIDDLE.rows[each].error_cause for each in state.asking.trials or ()} == {"CUDA out of memory"}


def test_a_cell_of_the_grid_lists_its_trials() -> None:
    state, _ = played(["tab", "down", "right", "right", "enter"])
    assert state.pane == "trials"
    assert state.wanted.group is not None
    assert (state.wanted.group.name, state.wanted.words) == ("vanilla w=10", "")
    assert {MIDDLE.name(each) for each in MIDDLE.trials(state.wanted)} == {f"vanilla w=10, seed {n}" for n in range(3)}


def test_what_can_not_be_done_is_said() -> None:
    assert "nothing to retry" in played(["down", "R"])[0].note
    assert "nothing to cancel" in played(["K"])[0].note
    assert "nothing to cancel" in played(["down", "K"], SCENES["end"])[0].note
    undriven = Scene(sample_sweep.snapshot("middle"), NOW, driven=False)
    assert "no driver runs" in played(["P"], undriven)[0].note


def test_a_sweep_that_rests_is_asked_to_go_on() -> None:
    shot = sample_sweep.snapshot("middle")
    rests = dataclasses.replace(shot, header=dataclasses.replace(shot.header, paused_by="ada@lab"))
    verbs = [played(["P", "y"], Scene(each, NOW))[1] for each in (shot, rests)]
    assert [effects[0].verb for effects in verbs if isinstance(effects[0], Order)] == ["pause", "resume"]


def test_q_leaves_from_anywhere_but_where_words_are_typed() -> None:
    for before in ([], ["down", "enter"], ["?"], ["tab"]):
        assert played([*before, "q"])[1][-1] == Quit()
    assert played(["/", "q"])[1] == []


# ------------------------------------------------------------------------------------------------ lists that are found


def test_a_setting_is_found_whole_and_a_word_anywhere() -> None:
    widths = {MIDDLE.rows[each].config["model_width"] for each in MIDDLE.trials(Search("w=10"))}
    assert widths == {10}
    assert {MIDDLE.rows[each].state for each in MIDDLE.trials(Search("fail mem"))} == {"ERROR"}
    assert MIDDLE.trials(Search("no-such-word")) == []


@given(st.sampled_from(SORTS), st.text("acw=25 ", max_size=6))
def test_sorting_loses_nothing(sort: str, wanted: str) -> None:
    found = MIDDLE.trials(Search(wanted))
    assert sorted(MIDDLE.trials(Search(wanted), sort)) == sorted(found)  # type: ignore[arg-type]


def test_by_state_what_runs_comes_first_and_by_top1_the_best() -> None:
    states = [MIDDLE.rows[each].state for each in MIDDLE.trials()]
    assert states == sorted(states, key=["RUNNING", "ERROR", "PENDING", "TERMINATED"].index)
    best = MIDDLE.rows[MIDDLE.trials(sort="top-1")[0]]
    assert best.metrics["top1"] == max(row.metrics.get("top1") or 0 for row in MIDDLE.rows.values())
