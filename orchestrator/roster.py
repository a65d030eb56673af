"""How many gangs there should be, and on which machines they fit. Pure: what there is goes in, what to do comes out."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import UsageError

ACCELERATOR = "accelerator_type:"
"""Ray's resource for a type of GPU begins so."""
MARKET = "ray.io/market-type"
"""Ray's label for what may be taken away, `spot`, and what may not, `on-demand`."""
IDLE_S = 60.0
"""After which a gang that finds no trial goes, so that its machine can be released; and one that waits for its place
while there are more gangs than trials is called off, so that no machine is brought for it.
"""
AGAIN_S = 600.0
"""After which what a gang was given up for may have passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a gang is made of."""

    workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    accelerator: str | None = None
    """Type of GPU, in Ray's words."""
    spot: bool = True
    """Whether machines that may be taken away will do."""

    def __str__(self) -> str:
        parts = [f"{self.workers * self.cpus_per_worker:g} CPU(s)", f"{self.workers * self.gpus_per_worker:g} GPU(s)"]
        kinds = [f"of type {self.accelerator}"] if self.accelerator else []
        kinds += [] if self.spot else ["on machines that are not spot"]
        return " ".join([f"a gang of {self.workers} worker(s) needs {' and '.join(parts)}", *kinds])


@dataclass(frozen=True, slots=True)
class Node:
    """A machine."""

    cpus: float
    gpus: float = 0.0
    accelerators: frozenset[str] = frozenset()
    spot: bool = False
    on_demand: bool = False
    """Labelled so. Machines of one's own are neither."""

    def holds(self, needs: Needs) -> int:
        """How many of a gang's workers."""
        if (self.spot and not needs.spot) or (needs.accelerator and needs.accelerator not in self.accelerators):
            return 0
        asked = [(self.cpus, needs.cpus_per_worker), (self.gpus, needs.gpus_per_worker)]
        return min(int(has / each + 1e-9) for has, each in asked if each)

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPU(s) {' '.join(sorted(self.accelerators))}".rstrip() if self.gpus else ""
        return f"{self.cpus:g} CPU(s){gpus}{', spot' if self.spot else ''}"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a cluster has, and what its autoscaler may bring."""

    nodes: tuple[Node, ...]
    coming: tuple[Node, ...] = ()
    """Every machine that may come, those that are there already among them."""
    most: int | None = None
    """So many machines of `coming` may be there at once; None: all of them."""

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    @property
    def has_gpus(self) -> bool:
        """Now, or once machines come."""
        return any(node.gpus >= 1 for node in (*self.nodes, *self.coming))

    def spares(self, needs: Needs) -> bool:
        """Whether a gang leaves machines on demand to those who will have no others: where spot machines may come for
        it. Ray's autoscaler goes by how well a machine is filled, not by its price: for three gangs of a GPU each it
        would launch a machine on demand that has four.
        """
        return needs.spot and self._brought([node for node in self.coming if node.spot], needs) >= 1

    def market(self, needs: Needs) -> dict[str, str] | None:
        """The label that a gang's machines must have, as Ray wants it told; None where any will do."""
        if not needs.spot:
            return {MARKET: "!spot"}
        return {MARKET: "!on-demand"} if self.spares(needs) else None

    def room(self, needs: Needs) -> int:
        """How many gangs it holds, at most."""
        spares = self.spares(needs)
        now, later = ([node for node in kind if not (spares and node.on_demand)] for kind in (self.nodes, self.coming))
        return max(_gangs_on(now, needs), self._brought(later, needs))

    def _brought(self, nodes: Sequence[Node], needs: Needs) -> int:
        """How many gangs the autoscaler can bring room for: by the machines that hold the most."""
        best = sorted(nodes, key=lambda node: node.holds(needs), reverse=True)
        return _gangs_on(best[: self.most], needs)

    def refuse_if_never(self, needs: Needs) -> None:
        """Raises UsageError if no gang will ever stand here."""
        if self.room(needs) < 1:
            kinds = "; ".join(_counted(self.nodes)) or "no machine"
            later = f". Its autoscaler may bring: {'; '.join(_counted(self.coming))}" if self.coming else ""
            if self.coming and self.most is not None and self.most < len(self.coming):
                later += f", {self.most} of them at once"
            raise UsageError(
                f"resources: {needs}, but the cluster has {self.cpus:g} and {self.gpus:g} ({kinds}){later}. Ask for "
                f"less in the sweep file's resources{_advice(needs)}."
            )


def coming_of(config: Mapping[str, Any]) -> tuple[tuple[Node, ...], int]:
    """The machines that an autoscaler may bring, and how many of them at once, by its file (`ray up`'s, resources
    filled in).
    """
    most = int(config.get("max_workers") or 0)
    found: list[Node] = []
    for kind in (config.get("available_node_types") or {}).values():
        resources = kind.get("resources") or {}
        types = frozenset(name.partition(":")[2] for name in resources if name.startswith(ACCELERATOR))
        market = (kind.get("node_config") or {}).get("InstanceMarketOptions") or {}
        label = (kind.get("labels") or {}).get(MARKET)
        spot = label == "spot" or market.get("MarketType") == "spot"
        cpus, gpus = (float(resources.get(name, 0)) for name in ("CPU", "GPU"))
        node = Node(cpus, gpus, types, spot, label == "on-demand")
        found += [node] * min(int(kind.get("max_workers", most)), most)
    return tuple(found), most


def _gangs_on(nodes: Sequence[Node], needs: Needs) -> int:
    return sum(node.holds(needs) for node in nodes) // needs.workers


def _counted(nodes: Sequence[Node]) -> list[str]:
    """The machines, those that are alike together."""
    kinds = dict.fromkeys(map(str, nodes))
    return [f"{sum(str(node) == kind for node in nodes)} x {kind}" for kind in kinds]


def _advice(needs: Needs) -> str:
    advice = ", or set gpus_per_worker: 0 to train on CPUs" if needs.gpus_per_worker else ""
    advice += ", or set accelerator: any" if needs.accelerator else ""
    return advice + ("" if needs.spot else ", or set spot: true")


# ------------------------------------------------------------------------------------------------- gangs come and go


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """How a fleet stands."""

    queued: int
    """Trials that wait for a gang, and may have one."""
    in_hand: int
    gangs: Mapping[str, float | None]
    """Those that stand or are being formed, and for how many seconds each has found no trial; None: it has one, or has
    not asked yet."""
    pending: int = 0
    """How many of them wait for their place on a machine."""
    spare_s: float = 0.0
    """For how long some have been spare."""
    room: int
    """How many the cluster holds."""
    limit: int | None = None
    """`max_gangs` of the sweep file."""
    slots: int = 1
    """Trials that a gang trains side by side."""

    @property
    def filled(self) -> int:
        """How many gangs the trials fill."""
        return math.ceil((self.queued + self.in_hand) / self.slots)

    @property
    def spare(self) -> int:
        """How many gangs there are more than that."""
        return max(0, len(self.gangs) - self.filled)

    @property
    def is_overdue(self) -> bool:
        """Whether spare ones that wait for their place are to wait no longer."""
        return self.spare > 0 and self.spare_s >= IDLE_S


@dataclass(frozen=True, slots=True)
class Change:
    form: int = 0
    dismiss: tuple[str, ...] = ()
    withdraw: int = 0
    """So many of those that wait for their place are called off."""


def most_of(room: int, limit: int | None) -> int:
    """How many gangs there may be at once."""
    return room if limit is None else min(room, limit)


def decide(scene: Scene) -> Change:
    """Which gangs to form or to send home. Never both at once, never more than there is room for; a gang with a trial,
    or one that a trial waits for, stays. Slots are filled before there are more gangs.
    """
    wanted = min(scene.filled, most_of(scene.room, scene.limit))
    if wanted > len(scene.gangs):
        return Change(form=wanted - len(scene.gangs))
    withdraw = min(scene.spare, scene.pending) if scene.is_overdue else 0
    if scene.queued:
        return Change(withdraw=withdraw)
    idle = [gang for gang, idle_s in scene.gangs.items() if idle_s is not None and idle_s >= IDLE_S]
    return Change(dismiss=tuple(sorted(idle)), withdraw=withdraw)


class Doubts:
    """Gangs that were given up since no worker of theirs came to work: for each there is less room than it seems. Not
    for ever: a machine that comes may be better than those that are there, and what ails these may pass.
    """

    def __init__(self) -> None:
        self._given_up: deque[tuple[float, str]] = deque()
        self._known: frozenset[str] = frozenset()

    def add(self, why: str, now: float) -> None:
        """From any thread."""
        self._given_up.append((now, why))

    def count(self, machines: frozenset[str], now: float) -> int:
        """How many gangs are to be counted off, now that these machines are there."""
        if machines - self._known:
            self._given_up.clear()
        self._known |= machines
        while self._given_up and now - self._given_up[0][0] > AGAIN_S:
            self._given_up.popleft()
        return len(self._given_up)

    def __str__(self) -> str:
        return "; ".join(sorted({why for _, why in self._given_up}))
