"""How many gangs there should be: laws, and what a cluster that cannot hold one says."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.roster import IDLE_S, MARKET, Change, Needs, Node, Offer, Scene, coming_of, decide

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
offers = st.builds(Offer, st.lists(nodes, max_size=4).map(tuple), st.lists(nodes, max_size=4).map(tuple))


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    idle = draw(st.lists(st.none() | st.floats(0, 3 * IDLE_S), max_size=6))
    gangs = {f"gang-{number}": seconds for number, seconds in enumerate(idle)}
    slots = draw(st.integers(1, 3))
    in_hand = draw(st.integers(0, slots * sum(seconds is None for seconds in idle)))
    return Scene(
        queued=draw(st.integers(0, 9)), in_hand=in_hand, gangs=gangs, room=draw(st.integers(0, 8)),
        limit=draw(st.none() | st.integers(1, 8)), slots=slots,
    )  # fmt: skip


@given(scenes())
def test_what_is_decided_keeps_to_the_room_and_the_limit_and_sends_nobody_home_who_works(scene: Scene) -> None:
    change = decide(scene)
    assert change.form == 0 or not change.dismiss
    if change.form:
        after = len(scene.gangs) + change.form
        assert after <= min(scene.room, scene.limit or scene.room)
        assert (after - 1) * scene.slots < scene.queued + scene.in_hand, "the last one fills a slot"
    for gang in change.dismiss:
        assert (scene.gangs[gang] or 0) >= IDLE_S
        assert scene.queued == 0
    assert (len(scene.gangs) - len(change.dismiss)) * scene.slots >= scene.in_hand


@given(scenes())
def test_once_it_is_done_there_is_no_more_to_do(scene: Scene) -> None:
    change = decide(scene)
    left = {gang: idle for gang, idle in scene.gangs.items() if gang not in change.dismiss}
    formed: dict[str, float | None] = {f"new-{number}": None for number in range(change.form)}
    assert decide(replace(scene, gangs=left | formed)) == Change()


@given(scenes().filter(lambda scene: scene.queued and scene.room))
def test_a_trial_that_waits_where_there_is_room_finds_a_gang(scene: Scene) -> None:
    assert len(scene.gangs) + decide(scene).form >= 1


def test_idle_gangs_go_one_busy_gang_stays_and_all_go_while_a_sweep_is_paused() -> None:
    gangs = {"a": None, "b": IDLE_S + 1, "c": IDLE_S - 1}
    assert decide(Scene(queued=0, in_hand=1, gangs=gangs, room=3)) == Change(dismiss=("b",))
    assert decide(Scene(queued=5, in_hand=1, gangs=gangs, room=9, limit=3)) == Change()
    assert decide(Scene(queued=0, in_hand=0, gangs={"a": IDLE_S}, room=1)) == Change(dismiss=("a",))
    assert decide(Scene(queued=5, in_hand=0, gangs={}, room=3)) == Change(form=3)


@given(offers, needs)
def test_more_machines_never_hold_fewer_gangs_and_asking_for_less_never_fits_worse(offer: Offer, each: Needs) -> None:
    room = offer.room(each)
    assert Offer((*offer.nodes, Node(64, 8, frozenset({"L4"}))), offer.coming).room(each) >= room
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
    assert coming_of(config) == (L4,) * 6 + (Node(4, on_demand=True),) * 2
    assert coming_of({}) == ()


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
