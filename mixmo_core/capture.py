"""A trial's step as one CUDA graph: recorded once, replayed for every step, taken over by the next trial of its shape.

A GPU does the few hundred operations of a narrow network's step faster than a host can ask for them; a graph asks for
all of them at once. `Step` alone says what a step is. Here its `take` is recorded over inputs that stay where they are,
and a trial that comes later puts its weights, momenta and seeds where the ones before were.

Nothing is believed: the step that is recorded is also taken eagerly, from the same state, and where the two differ, or
nothing can be recorded, there is a warning and the trial goes on eagerly. Each captured step has a stream of its own,
so those of several trials are on the device at once (`step.side_by_side`).
"""

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mixmo_core import networks
from mixmo_core.config import TrialConfig, shape_of
from mixmo_core.data import Images
from mixmo_core.step import Due, Step, side_by_side

WARM_UP = 2
"""Steps before the recorded one: libraries choose their algorithms, and allocate what they keep."""
SAME_STEP = 0.02
"""Part of what an eager step changes by which a replayed one may differ. Sums in no fixed order differ by less, another
draw or another rate by more.
"""
ROUNDING = 1e-6
"""The same, as a part of what there is: a first step of a warm-up may be as small as what fp32 can tell."""
KEPT_FREE = 0.5
"""Part of a device's memory; where less is free, captured steps that no trial has are given up, the oldest first."""

Recorder = Callable[[Callable[[], None], Collection[torch.Generator]], Callable[[], None]]
"""Takes what is to be recorded and the generators that it draws from; returns what does it again."""


def cuda_graph(body: Callable[[], None], generators: Collection[torch.Generator]) -> Callable[[], None]:
    """Record what `body` asks of the current stream, without doing it. A replay draws from the seeds of its moment."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        # It has drawn since it was seeded, in the eager step: others would only cost replays.
        if generator.get_offset():
            graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        body()
    return graph.replay


RECORDERS: dict[str, Recorder] = {"cuda": cuda_graph}
"""By type of device. Steps on others are not captured."""


class CapturedStep(Step):
    """A step that is replayed, and the network that it trains. It takes one batch a call, as `Step` does; of one worker
    alone.
    """

    def __init__(self, config: TrialConfig, images: Images) -> None:
        """The trial's network is built on the device of `images`."""
        device = images.pixels_NCHW.device
        self.net = networks.build(config).to(device)
        super().__init__(config, self.net, images)
        shape = (config.model.subnetworks, config.data.batch_size)
        self._indices_MB = torch.zeros(shape, dtype=torch.int64, device=device)
        self._p, self._lr = torch.zeros((), device=device), torch.zeros((), device=device)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._replay: Callable[[], None] | None = None
        self._steps = 0
        self.is_replayed = False
        """Whether steps are replayed by now, and not taken eagerly."""

    def begin(self, indices_MB: Tensor, *, number: int, p: float, lr: float) -> None:
        with self._aside():
            self._indices_MB.copy_(indices_MB)
            self._p.fill_(p)
            self._lr.fill_(lr)
            self.seed(number)
            if self._replay is not None:
                self._replay()
            elif self._steps < WARM_UP:
                self._eagerly()
            else:
                self._replay = self._proven(number)
        self._steps += 1

    def join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def fits(self, config: TrialConfig, images: Images) -> bool:
        """Whether the step of this trial is the same work on the same memory. The optimiser has its weight decay from
        the host, so that it is recorded with the rest.
        """
        alike = images is self._images and config.optim.weight_decay == self._config.optim.weight_decay
        return alike and shape_of(config) == shape_of(self._config)

    def restart(self, config: TrialConfig) -> None:
        """Be the step of another trial, which `fits`, before its first step."""
        self._config = config
        self.net.load_state_dict(networks.build(config).state_dict())
        self.net.train()
        for tensor in (*self._momenta(), self.total_loss):
            tensor.zero_()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the step's own stream, after all that was asked of the current one."""
        if self._stream is None:
            yield
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                yield

    def _eagerly(self) -> None:
        self.take(self._indices_MB, self._p, self._lr)

    def _proven(self, number: int) -> Callable[[], None] | None:
        """Take a step eagerly; record it, and take it again from where it began. What to take all later ones by; None
        where its numbers are none, which prove nothing.
        """
        before = self._copies()
        self._eagerly()
        expected = self._copies()
        if not all(math.isfinite(_distance(tensors)) for tensors in expected.values()):
            return None
        self._put(before)
        try:
            replay = RECORDERS[self._device.type](self._eagerly, self.generators.values())
            self.seed(number)
            replay()
            fault = self._fault(before, expected)
        except RuntimeError as error:  # of whatever kind: torch has no other for what cannot be recorded
            fault = str(error).partition("\n")[0]
        if fault is None:
            self.is_replayed = True
            return replay
        warnings.warn(f"steps are taken eagerly, since one that was captured is not the same: {fault}", stacklevel=4)
        self._put(expected)
        return self._eagerly

    def _momenta(self) -> list[Tensor]:
        return [held["momentum_buffer"] for held in self.optimiser.state.values() if "momentum_buffer" in held]

    def _state(self) -> dict[str, list[Tensor]]:
        """All that a step changes."""
        return {
            "weights": [parameter.detach() for parameter in self.net.parameters()],
            "momenta": self._momenta(),
            "running statistics": list(self.net.buffers()),
            "loss": [self.total_loss],
        }

    def _copies(self) -> dict[str, list[Tensor]]:
        return {what: [tensor.clone() for tensor in tensors] for what, tensors in self._state().items()}

    def _put(self, copies: dict[str, list[Tensor]]) -> None:
        for what, tensors in self._state().items():
            for tensor, copied in zip(tensors, copies[what], strict=True):
                tensor.copy_(copied)

    def _fault(self, before: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> str | None:
        """What is not as the eager step has left it. Waits for the device."""
        for what, tensors in self._state().items():
            apart, moved = _distance(tensors, expected[what]), _distance(before[what], expected[what])
            if not apart <= SAME_STEP * moved + ROUNDING * _distance(expected[what]):
                return f"{what} are {apart:.2g} apart, where a step moves them by {moved:.2g}"
        return None


def _distance(some: Sequence[Tensor], others: Sequence[Tensor] | None = None) -> float:
    """Euclidean, over all tensors; from the origin where there are no others."""
    if others is not None:
        some = [one - other for one, other in zip(some, others, strict=True)]
    return float(torch.stack([one.double().square().sum() for one in some]).sum().sqrt()) if some else 0.0


# -------------------------------------------------------------------------------------------- from trial to trial

_idle: list[CapturedStep] = []
"""Steps that no trial has, the oldest first."""


def can(device: torch.device) -> bool:
    return device.type in RECORDERS


def lend(config: TrialConfig, images: Images) -> CapturedStep:
    """The step of a trial before its first, its network beside it: one that a trial of its shape has left, or a new
    one.
    """
    for step in _idle:
        if step.fits(config, images):
            _idle.remove(step)
            step.restart(config)
            return step
    while _idle and _free_part(images.pixels_NCHW.device) < KEPT_FREE:
        del _idle[0]
    return CapturedStep(config, images)


def give_back(step: CapturedStep) -> None:
    """The trial is over, however it ended: nobody reads its network any more."""
    step.join()
    if step.is_replayed:
        _idle.append(step)


def _free_part(device: torch.device) -> float:
    """Of the device's memory."""
    if device.type != "cuda":
        return 1.0
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info(device)
    return free / whole


# --------------------------------------------------------------------------------------- how many trials side by side

PAYS = 1.1
"""Twice as many trials are worth it where they take so many times the steps in a second."""
MOST = 16
TURNS = 30


def slots(config: TrialConfig, images: Images) -> int:
    """How many trials of this one's shape to train side by side, by trying on the device of `images`: 1 where steps are
    not captured. The steps that were tried are there for the trials that follow.
    """
    steps: list[CapturedStep] = []
    try:
        return worthwhile(partial(_rate, steps, config, images)) if can(images.pixels_NCHW.device) else 1
    finally:
        for step in steps:
            give_back(step)


def worthwhile(rate: Callable[[int], float | None]) -> int:
    """The last of 1, 2, 4 ... MOST that pays. `rate` tells how many steps in a second so many trials take together, and
    None where memory is too short for them.
    """
    count, best = 1, rate(1)
    while best is not None and 2 * count <= MOST:
        found = rate(2 * count)
        if found is None or found < PAYS * best:
            break
        count, best = 2 * count, found
    return count


def _rate(steps: list[CapturedStep], config: TrialConfig, images: Images, count: int) -> float | None:
    """Of so many trials, whose steps are added to `steps` where there are fewer."""
    try:
        while len(steps) < count:
            steps.append(lend(replace(config, seed=len(steps)), images))
        _turns(steps, config, images, WARM_UP + 2)
        return count * TURNS / _turns(steps, config, images, TURNS)
    except torch.OutOfMemoryError:
        return None


def _turns(steps: Sequence[CapturedStep], config: TrialConfig, images: Images, count: int) -> float:
    """Seconds of so many turns of all of them, at a learning rate at which nothing diverges."""
    device = images.pixels_NCHW.device
    shape, generator = (config.model.subnetworks, config.data.batch_size), torch.Generator().manual_seed(0)
    indices_MB = torch.randint(len(images), shape, generator=generator).to(device)
    began = time.perf_counter()
    for number in range(1, count + 1):
        faults = side_by_side([Due(step, indices_MB, number, p=0.5, lr=config.optim.lr / 100) for step in steps])
        if fault := next(filter(None, faults), None):
            raise fault
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
