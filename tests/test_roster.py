"""How many gangs there should be: laws, and what a cluster that cannot hold one says."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.roster import AGAIN_S, IDLE_S, MARKET, Change, Doubts, Needs, Node, Offer, Scene, coming_of, decide

L4 = Node(8, 1, frozenset({"L4"}), spot=True)
FOUR = Node(48, 4, frozenset({"L4"}), on_demand=True)
HEAD = Node(0)

needs = st.builds(
    Needs, workers=st.integers(1, 4), cpus_per_worker=st.sampled_from([0.5, 1, 4]),
    gpus_per_worker=st.sampled_from([0, 0.25, 0.5, 1, 2]), accelerator=st.sampled_from([None, "L4"]),
    spot=st.booleans(),
)  # fmt: skip
nodes = st.builds(
    Node, st.integers(0, 16), st.integers(0, 4), st.sampled_from([frozenset(), frozenset({"L4"})]), st.booleans()
)
some = st.lists(nodes, max_size=4).map(tuple)
offers = st.builds(Offer, some, some, st.none() | st.integers(0, 4))


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    idle = draw(st.lists(st.none() | st.floats(0, 3 * IDLE_S), max_size=6))
    gangs = {f"gang-{number}": seconds for number, seconds in enumerate(idle)}
    slots = draw(st.integers(1, 3))
    in_hand = draw(st.integers(0, slots * sum(seconds is None for seconds in idle)))
    return Scene(
        queued=draw(st.integers(0, 9)), in_hand=in_hand, gangs=gangs, room=draw(st.integers(0, 8)),
        limit=draw(st.none() | st.integers(1, 8)), slots=slots, spare_s=draw(st.floats(0, 3 * IDLE_S)),
        pending=draw(st.integers(0, sum(seconds is None for seconds in idle) - math.ceil(in_hand / slots))),
    )  # fmt: skip


@given(scenes())
def test_what_is_decided_keeps_to_the_room_and_the_limit_and_sends_nobody_home_who_works(scene: Scene) -> None:
    change = decide(scene)
    assert change.form == 0 or not (change.dismiss or change.withdraw)
    if change.form:
        after = len(scene.gangs) + change.form
        assert after <= min(scene.room, scene.limit or scene.room)
        assert (after - 1) * scene.slots < scene.queued + scene.in_hand, "the last one fills a slot"
    for gang in change.dismiss:
        assert (scene.gangs[gang] or 0) >= IDLE_S
        assert scene.queued == 0
    assert (len(scene.gangs) - len(change.dismiss) - change.withdraw) * scene.slots >= scene.in_hand
    if change.withdraw:
        assert change.withdraw <= scene.pending
        assert (len(scene.gangs) - change.withdraw) * scene.slots >= scene.queued + scene.in_hand, "each has a gang"
        assert scene.spare_s >= IDLE_S, "a queue is empty for a moment between two pages"


@given(scenes())
def test_once_it_is_done_there_is_no_more_to_do(scene: Scene) -> None:
    change = decide(scene)
    waiting = [gang for gang, idle in scene.gangs.items() if idle is None][: change.withdraw]
    left = {gang: idle for gang, idle in scene.gangs.items() if gang not in (*change.dismiss, *waiting)}
    formed: dict[str, float | None] = {f"new-{number}": None for number in range(change.form)}
    assert decide(replace(scene, gangs=left | formed, pending=scene.pending - change.withdraw)) == Change()


@given(scenes().filter(lambda scene: scene.queued and scene.room))
def test_a_trial_that_waits_where_there_is_room_finds_a_gang(scene: Scene) -> None:
    assert len(scene.gangs) + decide(scene).form >= 1


def test_idle_gangs_go_one_busy_gang_stays_and_all_go_while_a_sweep_is_paused() -> None:
    gangs = {"a": None, "b": IDLE_S + 1, "c": IDLE_S - 1}
    assert decide(Scene(queued=0, in_hand=1, gangs=gangs, room=3)) == Change(dismiss=("b",))
    assert decide(Scene(queued=5, in_hand=1, gangs=gangs, room=9, limit=3)) == Change()
    assert decide(Scene(queued=0, in_hand=0, gangs={"a": IDLE_S}, room=1)) == Change(dismiss=("a",))
    assert decide(Scene(queued=5, in_hand=0, gangs={}, room=3)) == Change(form=3)


@given(scenes().filter(lambda scene: scene.queued == 0))
def test_a_gang_that_no_trial_waits_for_asks_for_a_machine_no_longer_than_an_idle_one_stays(scene: Scene) -> None:
    busy = math.ceil(scene.in_hand / scene.slots)
    change = decide(replace(scene, spare_s=IDLE_S, limit=None, room=0))
    assert change.withdraw == min(scene.pending, len(scene.gangs) - busy)


def test_gangs_in_a_dry_spell_keep_asking_and_at_the_end_of_a_sweep_they_ask_no_more() -> None:
    """One works through what is left; fifteen have waited for an hour."""
    dry = Scene(queued=20, in_hand=1, gangs={"a": None} | {f"b{n}": None for n in range(15)}, pending=15, room=16)
    assert decide(dry) == Change()
    assert decide(replace(dry, queued=5, spare_s=IDLE_S - 1)) == Change()
    assert decide(replace(dry, queued=5, spare_s=IDLE_S)) == Change(withdraw=10)
    # Gangs that gave up waiting are gone, and formed again while there are trials.
    assert decide(replace(dry, gangs={"a": None}, pending=0)) == Change(form=15)


def test_a_gang_that_was_given_up_is_counted_off_until_a_machine_comes_or_a_while_has_passed() -> None:
    doubts, machines = Doubts(), frozenset("ab")
    assert doubts.count(machines, 0.0) == 0
    doubts.add("torch is not installed", 10.0)
    doubts.add("torch is not installed", 300.0)
    assert doubts.count(machines, 301.0) == 2
    assert str(doubts) == "torch is not installed"
    assert doubts.count(machines, 11.0 + AGAIN_S) == 1
    assert doubts.count(frozenset("a"), 12.0 + AGAIN_S) == 1, "one that goes brings no room"
    assert doubts.count(frozenset("ab"), 12.0 + AGAIN_S) == 1, "nor one that was known"
    assert doubts.count(frozenset("ac"), 13.0 + AGAIN_S) == 0


@given(offers, needs)
def test_more_machines_never_hold_fewer_gangs_and_asking_for_less_never_fits_worse(offer: Offer, each: Needs) -> None:
    room = offer.room(each)
    assert replace(offer, nodes=(*offer.nodes, Node(64, 8, frozenset({"L4"})))).room(each) >= room
    assert replace(offer, most=None).room(each) >= room
    assert offer.room(replace(each, accelerator=None)) >= room
    assert offer.room(replace(each, spot=True)) >= room
    assert offer.room(replace(each, workers=1)) >= room
    if room < 1:
        with pytest.raises(UsageError, match="but the cluster has"):
            offer.refuse_if_never(each)
    else:
        offer.refuse_if_never(each)


def test_what_an_autoscaler_may_bring_is_read_from_its_file() -> None:
    config = {
        "max_workers": 6,
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "spot": {
                "resources": {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}, "max_workers": 8,
                "node_config": {"InstanceMarketOptions": {"MarketType": "spot"}},
            },
            "more": {"resources": {"CPU": 4}, "labels": {"ray.io/market-type": "on-demand"}, "max_workers": 2},
        },
    }  # fmt: skip
    assert coming_of(config) == ((L4,) * 6 + (Node(4, on_demand=True),) * 2, 6)
    assert coming_of({}) == ((), 0)


@pytest.mark.parametrize(
    ("offer", "each", "room"),
    [
        (Offer((Node(8),)), Needs(workers=2), 4),
        (Offer((Node(8, 1),)), Needs(gpus_per_worker=0.25), 4),
        (Offer((Node(8, 1),) * 2), Needs(workers=2, gpus_per_worker=1), 1),
        (Offer((Node(3), Node(3))), Needs(cpus_per_worker=2), 2),  # no worker lies on two machines
        (Offer((HEAD,), (L4,) * 4), Needs(gpus_per_worker=1, accelerator="L4"), 4),  # scaled up from zero
        (Offer((HEAD, L4), (L4,) * 4), Needs(gpus_per_worker=1), 4),
        (Offer((HEAD,), (L4,) * 4), Needs(gpus_per_worker=1, spot=False), 0),
        (Offer((HEAD, Node(8, 1, frozenset({"A100"})))), Needs(gpus_per_worker=1, accelerator="L4"), 0),
        (Offer((HEAD, FOUR), (FOUR,) * 4 + (L4,) * 3), Needs(gpus_per_worker=1), 3),  # those on demand are spared
        (Offer((HEAD, FOUR), (FOUR,) * 4 + (L4,) * 3), Needs(gpus_per_worker=1, spot=False), 16),
        (Offer((HEAD, FOUR), (FOUR,) * 4 + (L4,) * 3), Needs(gpus_per_worker=2), 8),  # for which no spot machine comes
        (Offer((HEAD,), (FOUR,) * 4 + (L4,) * 16, 16), Needs(gpus_per_worker=1), 16),  # no more machines in all
        (Offer((HEAD,), (FOUR,) * 4 + (L4,) * 16, 6), Needs(gpus_per_worker=1), 6),
        (Offer((HEAD,), (FOUR,) * 4 + (L4,) * 16, 3), Needs(gpus_per_worker=1, spot=False), 12),
        (Offer((HEAD,), (FOUR,) * 4 + (Node(8),) * 16, 6), Needs(), 4 * 48 + 2 * 8),  # by those that hold the most
        (Offer((HEAD, FOUR, L4)), Needs(gpus_per_worker=1), 5),  # nothing more comes: what is there is used
    ],
)  # fmt: skip
def test_how_many_gangs_a_cluster_holds(offer: Offer, each: Needs, room: int) -> None:
    assert offer.room(each) == room


@pytest.mark.parametrize(
    ("offer", "each", "said"),
    [
        (Offer((Node(2),)), Needs(workers=4), r"gang of 4 .* needs 4 CPU.*0 GPU.*cluster has 2 and 0 \(1 x 2 CPU"),
        (Offer((Node(8),)), Needs(gpus_per_worker=1), "gpus_per_worker: 0"),
        (Offer((HEAD,), (L4,) * 4), Needs(gpus_per_worker=1, spot=False),
         r"not spot.*may bring: 4 x 8 CPU\(s\), 1 GPU\(s\) L4, spot.*or set spot: true"),
        (Offer((L4,)), Needs(gpus_per_worker=1, accelerator="H100"), "of type H100.*accelerator: any"),
        (Offer(()), Needs(), "no machine"),
    ],
)  # fmt: skip
def test_what_the_cluster_can_never_give_is_refused_with_what_there_is(offer: Offer, each: Needs, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        offer.refuse_if_never(each)


def test_which_market_a_gangs_machines_must_be_of() -> None:
    cloud = Offer((HEAD,), (FOUR,) * 4 + (L4,) * 3)
    assert cloud.market(Needs(gpus_per_worker=1)) == {MARKET: "!on-demand"}
    assert cloud.market(Needs(gpus_per_worker=2)) is None
    assert cloud.market(Needs(gpus_per_worker=1, spot=False)) == {MARKET: "!spot"}
    assert Offer((Node(8, 1),)).market(Needs(gpus_per_worker=1)) is None
