"""A trial from its config to its last epoch: the schedule, the epochs, and the checkpoints between them.

Knows nothing of Ray, of stores or of terminals. Where `torch.distributed` is initialised with more than one process,
these processes are the trial's workers and train it together.
"""

import errno
import hashlib
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mixmo_core import augment, capture, cost, data, evaluate, mixing, networks
from mixmo_core.config import TrialConfig, digest, identity, map_size, training_images
from mixmo_core.step import Due, Purpose, Step, autocast, draw_seed

FORMAT = 1
"""Version of the checkpoints. A newer one than this is refused. Those in the middle of an epoch did not raise it: a
version that does not know them passes over their names, and goes on from the last whole epoch.
"""
EVALUATION_BATCH = 500
AGREEMENT_STEPS = 8
"""So often several workers agree on whether to save: each time they wait for their devices and for one another."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or of another trial."""


class DivergedError(ArithmeticError):
    """The training loss or a weight is no finite number any more; no later epoch could mend that."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch gave."""

    epoch: int
    """1 is the first."""
    metrics: dict[str, float]
    """By their names in `mixmo_core.metrics`: `loss` and `lr` always, the others where the epoch was evaluated."""
    images: int
    """Slots trained on, by all workers."""
    seconds: float
    """Of training and evaluation."""
    history: tuple[dict[str, float], ...]
    """The metrics of epochs 1 to this one, those before a resumption included."""
    logits: Tensor | None = field(repr=False, compare=False)
    """Of the held-out images (M, N, K), on the CPU; None where the epoch was not evaluated. Every worker has all."""
    labels: Tensor | None = field(repr=False, compare=False)
    """What these images show (N), on the CPU; None where there are no logits."""
    _state: Callable[[], dict[str, Any]] = field(repr=False)

    def state(self) -> dict[str, Any]:
        """A checkpoint: tensors and plain values. It shares memory with the training, so it is valid until the
        generator is advanced; `save` it or copy it before that.
        """
        return self._state()


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment in the middle of an epoch, because `save_when` asked for one."""

    epoch: int
    """The one in progress; 1 is the first."""
    step: int
    """Its steps that are done: 1 to all of them, of which the last still lacks the evaluation."""
    _state: Callable[[], dict[str, Any]] = field(repr=False)

    def state(self) -> dict[str, Any]:
        """A checkpoint, as `Epoch.state` gives it: a training that resumes from it goes on with the next step."""
        return self._state()


# ------------------------------------------------------------------------------------------------------------ schedule


def learning_rate(step: int, epoch: int, config: TrialConfig) -> float:
    """The rate of a step; the trial's first step and first epoch are 1.

    Linear over the warm-up of `warmup * repetition` times an epoch of batches at repetition 1 (a part of a batch
    counts), whatever the epoch; then `lr / repetition`, times `decay_by` for each of `decay_at` that has passed.
    """
    optim = config.optim
    base = optim.lr / config.data.repetition
    warmup = optim.warmup * config.data.repetition * -(-training_images(config) // config.data.batch_size)
    if step <= warmup:
        return base * step / warmup
    return base * optim.decay_by ** sum(epoch > round(part * optim.epochs) for part in optim.decay_at)


# -------------------------------------------------------------------------------------------------------------- epochs


@overload
def train(
    config: TrialConfig,
    *,
    device: torch.device | str = ...,
    data_dir: Path | None = ...,
    resume: Mapping[str, Any] | None = ...,
    save_when: None = ...,
    known_as: str | None = ...,
    captured: bool = ...,
) -> Iterator[Epoch]: ...
@overload
def train(
    config: TrialConfig,
    *,
    device: torch.device | str = ...,
    data_dir: Path | None = ...,
    resume: Mapping[str, Any] | None = ...,
    save_when: Callable[[], bool],
    known_as: str | None = ...,
    captured: bool = ...,
) -> Iterator[Epoch | Moment]: ...
def train(
    config: TrialConfig,
    *,
    device: torch.device | str = "cpu",
    data_dir: Path | None = None,
    resume: Mapping[str, Any] | None = None,
    save_when: Callable[[], bool] | None = None,
    known_as: str | None = None,
    captured: bool = True,
) -> Iterator[Epoch | Moment]:
    """The epochs of a trial, each when it is done, and the moments between two steps at which to save it.

    `resume` is an earlier `state()` of an epoch or a moment: what comes after it follows, nothing if it was the last
    epoch. On the CPU in fp32 with the same torch and thread count all that follows equals an uninterrupted training to
    the bit. With more than one worker batch norm sees the slots of its own worker, running statistics are averaged at
    the end of each epoch, and every worker gets the same metrics and state.

    `save_when` is asked after each step, and a moment follows where it says True. Several workers ask after every
    AGREEMENT_STEPS-th step of an epoch and after its last; all of them give `save_when` or none does, and one that says
    True is enough.

    `known_as` is the digest by which checkpoints are known to be of this trial, where more than its config, seed and
    workers has made it: with `resume` a network goes on that other settings may have begun.

    `captured`: on a GPU the steps of one worker are replayed as a CUDA graph, once that is seen to be the same
    (`capture`).

    Raises CheckpointError at once where `resume` is not of this trial, ValueError where the batch cannot be split;
    data.DatasetError, when the first epoch is asked for, where the images are not there; DivergedError instead of an
    epoch or moment whose loss or weights are not finite, so that no state is one to go on from in vain.
    """
    return _alone(
        steps(
            config, device=device, data_dir=data_dir, resume=resume, save_when=save_when, known_as=known_as,
            captured=captured,
        )
    )  # fmt: skip


def steps(
    config: TrialConfig,
    *,
    device: torch.device | str = "cpu",
    data_dir: Path | None = None,
    resume: Mapping[str, Any] | None = None,
    save_when: Callable[[], bool] | None = None,
    known_as: str | None = None,
    captured: bool = True,
) -> Iterator[Due | Epoch | Moment]:
    """As `train`, for whoever trains several trials in turn (`step.side_by_side`): each step is yielded when it is due,
    and who asks for more has taken it. The seconds of an epoch go on while others take theirs.
    """
    rank, workers = _world()
    _check_split(config, workers)
    trial = known_as or digest(identity(config, workers))
    if resume is not None:
        _check(resume)
        _check_origin(resume, trial, cost.steps_per_epoch(config))
    return _epochs(
        config, torch.device(device), data_dir, resume, _World(rank, workers, trial), save_when=save_when,
        captured=captured,
    )  # fmt: skip


def slots(config: TrialConfig, *, device: torch.device | str, data_dir: Path | None = None) -> int:
    """How many trials like this one to train side by side on the device, by trying (`capture.slots`); 1 where steps are
    not captured. Takes seconds. Raises data.DatasetError where the images are not there.
    """
    if not capture.can(torch.device(device)):
        return 1
    training, _ = data.load(config.data, split=config.evaluate.split, folder=data_dir, device=device)
    return capture.slots(config, training)


def _alone(steps: Iterator[Due | Epoch | Moment]) -> Iterator[Epoch | Moment]:
    for told in steps:
        if isinstance(told, Due):
            told.take()
        else:
            yield told


def _world() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _check_split(config: TrialConfig, workers: int) -> None:
    """Raises ValueError unless the slots of a batch can be shared out, and batch norm has values enough of each."""
    slots, rest = divmod(config.data.batch_size, workers)
    if rest:
        raise ValueError(
            f"batch_size {config.data.batch_size} cannot be split over {workers} workers: it must be a multiple of them"
        )
    halvings = 3 if config.model.arch == "preact_resnet" else 2
    if slots == 1 and map_size(config) <= 2**halvings:
        raise ValueError(
            f"batch_size {config.data.batch_size} leaves one slot to each of {workers} workers, and batch norm needs "
            f"two, since the last maps of a {config.model.arch} on {config.data.dataset} are 1x1: use fewer workers or "
            f"a larger batch"
        )


class _World(NamedTuple):
    """Who trains: this worker among all of them, and the digest of the trial."""

    rank: int
    workers: int
    trial: str


class _Part(NamedTuple):
    """What is done of an epoch in progress."""

    step: int
    """Its steps that are done."""
    seconds: float
    """That they took, over all attempts."""
    statistics_RS: Tensor
    """A row for each worker, in fp64 on the CPU: the sum of its losses, then the running statistics of its network."""


def _epochs(
    config: TrialConfig,
    device: torch.device,
    data_dir: Path | None,
    resume: Mapping[str, Any] | None,
    world: _World,
    *,
    save_when: Callable[[], bool] | None,
    captured: bool,
) -> Iterator[Due | Epoch | Moment]:
    training, held_out = data.load(config.data, split=config.evaluate.split, folder=data_dir, device=device)
    corrupted = data.corrupted(config.data.dataset, data_dir) if config.evaluate.robustness == "cifar_c" else []
    with closing(_Run(config, world, training, held_out, captured=captured)) as run:
        history: tuple[dict[str, float], ...] = ()
        part: _Part | None = None
        if resume is not None:
            history = tuple(dict(metrics) for metrics in resume["history"])
            part = _Part(**resume["part"]) if "part" in resume else None
            run.restore(resume, part)
        for epoch in range(len(history) + 1, config.optim.epochs + 1):
            started = time.perf_counter() - (part.seconds if part else 0.0)
            for told in run.train(epoch, part.step if part else 0, save_when):
                if isinstance(told, Due):
                    yield told
                    continue
                part = run.part(epoch, told, started)
                yield Moment(epoch, told, _state=partial(run.state, epoch, history, part))
                started = time.perf_counter() - part.seconds
            part = None
            metrics, logits_MNK = run.finish(epoch), None
            if epoch % config.evaluate.every == 0 or epoch == config.optim.epochs:
                evaluated, logits_MNK = run.evaluate()
                metrics |= evaluated
            if epoch == config.optim.epochs and corrupted:
                metrics |= run.robustness(corrupted)
            history = (*history, metrics)
            yield Epoch(
                epoch=epoch,
                metrics=metrics,
                images=cost.steps_per_epoch(config) * config.data.batch_size,
                seconds=time.perf_counter() - started,
                history=history,
                logits=logits_MNK,
                labels=None if logits_MNK is None else held_out.labels_N.cpu(),
                _state=partial(run.state, epoch, history),
            )


class _Run:
    """A network in training, on one worker."""

    def __init__(
        self, config: TrialConfig, world: _World, training: data.Images, held_out: data.Images, *, captured: bool
    ) -> None:
        device = training.pixels_NCHW.device
        self._config, self._world, self._held_out = config, world, held_out
        self._images = len(training)
        self._lent: capture.CapturedStep | None = None
        if captured and world.workers == 1 and capture.can(device):
            self._step: Step = (lent := capture.lend(config, training))
            self._net, self._lent = lent.net, lent
            return
        self._net = networks.build(config).to(device)
        stepped = self._net if world.workers == 1 else _averaging(self._net, device)
        self._step = Step(config, stepped, training, rank=world.rank, workers=world.workers)

    def close(self) -> None:
        """The network is no longer this trial's."""
        if self._lent is not None:
            capture.give_back(self._lent)

    def train(self, epoch: int, done: int, save_when: Callable[[], bool] | None) -> Iterator[Due | int]:
        """One pass over the training images, of which `done` steps are done. Yields each step when it is due, and the
        number of one that is taken where it is to be saved.
        """
        config = self._config
        batches_SMB = self._order(epoch).to(self._step.total_loss.device)
        p = mixing.probability(epoch, config.optim.epochs, config.mixing.probability)
        before = (epoch - 1) * len(batches_SMB)
        self._net.train()
        if done == 0:
            self._step.total_loss.zero_()
        for step, indices_MB in enumerate(batches_SMB[done:], start=done + 1):
            number = before + step
            yield Due(self._step, indices_MB, number=number, p=p, lr=learning_rate(number, epoch, config))
            if save_when is not None and self._is_wanted(save_when, step, last=step == len(batches_SMB)):
                yield step

    def _is_wanted(self, save_when: Callable[[], bool], step: int, *, last: bool) -> bool:
        """Whether a worker says so. Alike on all of them, which stand at the same step."""
        if self._world.workers == 1:
            return save_when()
        if step % AGREEMENT_STEPS and not last:
            return False
        wanted = torch.tensor(float(save_when()), device=self._step.total_loss.device)
        distributed.all_reduce(wanted, op=distributed.ReduceOp.MAX)
        return bool(wanted)

    def finish(self, epoch: int) -> dict[str, float]:
        """What all workers have of an epoch whose steps are done: the mean loss, the last learning rate, and one set
        of running statistics. Raises DivergedError.
        """
        total_loss, workers = self._step.total_loss, self._world.workers
        if workers > 1:
            distributed.all_reduce(total_loss)
            _average(list(self._statistics().values()), workers)
        steps = cost.steps_per_epoch(self._config)
        loss = float(total_loss) / (workers * steps)
        self._check_finite(f"epoch {epoch}", loss, self._own_statistics())
        return {"loss": loss, "lr": learning_rate(epoch * steps, epoch, self._config)}

    def part(self, epoch: int, step: int, started: float) -> _Part:
        """The epoch in progress, as all workers have it. Raises DivergedError."""
        workers, own_S = self._world.workers, self._own_statistics()
        rows = [own_S]
        if workers > 1:
            rows = [torch.empty_like(own_S) for _ in range(workers)]
            distributed.all_gather(rows, own_S)
        statistics_RS = torch.stack(rows).cpu()  # waits for the device, so that the time is that of the steps
        part = _Part(step, time.perf_counter() - started, statistics_RS)
        loss = float(statistics_RS[:, 0].sum()) / (workers * step)
        self._check_finite(f"epoch {epoch}, step {step}", loss, statistics_RS)
        return part

    def _statistics(self) -> dict[str, Tensor]:
        """What the network holds besides its parameters, by name."""
        parameters = {name for name, _ in self._net.named_parameters()}
        return {name: tensor for name, tensor in self._net.state_dict().items() if name not in parameters}

    def _own_statistics(self) -> Tensor:
        """A row of `_Part.statistics_RS`, on the device."""
        tensors = (self._step.total_loss, *self._statistics().values())
        return torch.cat([tensor.double().flatten() for tensor in tensors])

    def _check_finite(self, when: str, loss: float, statistics: Tensor) -> None:
        weights = torch.stack([parameter.isfinite().all() for parameter in self._net.parameters()]).all()
        if not math.isfinite(loss):
            what = f"the training loss is {loss}"
        elif not (weights.item() and statistics.isfinite().all().item()):
            what = "its last step made weights that are no finite numbers"
        else:
            return
        raise DivergedError(
            f"diverged at {when}: {what}. Try a smaller optim.lr ({self._config.optim.lr:g} here) or a longer "
            f"optim.warmup"
        )

    def _order(self, epoch: int) -> Tensor:
        """The epoch's batches: positions of images (steps, M, B). Drawn on the CPU, alike for every device."""
        config = self._config
        return data.batch_repetition(
            self._images,
            config.data.batch_size,
            config.data.repetition,
            config.model.subnetworks,
            input_repetition=config.data.input_repetition,
            generator=torch.Generator().manual_seed(draw_seed(config.seed, epoch, Purpose.ORDER)),
        )

    def evaluate(self) -> tuple[dict[str, float], Tensor]:
        return _evaluated(self._net, self._config, self._held_out, self._world)

    def robustness(self, corruptions: Sequence[data.Corrupted]) -> dict[str, float]:
        device = self._held_out.labels_N.device
        return _robustness(self._net, self._config, corruptions, device, self._world)

    def state(self, epoch: int, history: tuple[dict[str, float], ...], part: _Part | None = None) -> dict[str, Any]:
        model = dict(self._net.state_dict())
        if part is not None:  # the first worker's running statistics stand for all, so that all give the same state
            model |= _split(part.statistics_RS[0, 1:], self._statistics())
        state = {
            "format": FORMAT,
            "torch": str(torch.__version__),
            "digest": self._world.trial,
            "epoch": epoch,
            "history": [dict(metrics) for metrics in history],
            "model": model,
            "momentum": self._momentum(),
        }
        return state if part is None else {**state, "part": part._asdict()}

    def restore(self, state: Mapping[str, Any], part: _Part | None) -> None:
        """Copies the tensors of a checkpoint into the network and the optimiser."""
        for kind, own in (("model", self._net.state_dict()), ("momentum", self._momentum())):
            given = state[kind]
            if {name: tensor.shape for name, tensor in given.items()} != {n: t.shape for n, t in own.items()}:
                raise CheckpointError(f"the checkpoint's {kind} is not that of this network")
            for name, tensor in own.items():
                tensor.copy_(given[name])
        if part is not None:
            self._take_up(part)

    def _take_up(self, part: _Part) -> None:
        """Go on within an epoch: with this worker's own losses and running statistics."""
        rows, columns = self._world.workers, len(self._own_statistics())
        if part.statistics_RS.shape != (rows, columns):
            raise CheckpointError("the checkpoint's statistics are not those of this network and its workers")
        own_S = part.statistics_RS[self._world.rank]
        self._step.total_loss.copy_(own_S[0])
        statistics = self._statistics()
        for name, tensor in _split(own_S[1:], statistics).items():
            statistics[name].copy_(tensor)

    def _momentum(self) -> dict[str, Tensor]:
        """By parameter; empty where there is no momentum."""
        held = self._step.optimiser.state
        buffers = {name: held[p].get("momentum_buffer") for name, p in self._net.named_parameters() if p in held}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def _averaging(net: nn.Module, device: torch.device) -> nn.Module:
    """The network, with gradients that are averaged over the workers while others are still computed; they come in the
    same order in every step. Batch norm stays local, as the reference's is
    on its one GPU: running statistics are not broadcast with every step but averaged, once an epoch.
    """
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters  # in torch 2.13
    local: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    devices = [device] if device.type == "cuda" else None
    averaging: nn.Module = DistributedDataParallel(
        net, device_ids=devices, gradient_as_bucket_view=True, static_graph=True, **local
    )
    return averaging


def _average(buffers: Sequence[Tensor], workers: int) -> None:
    """One set of running statistics for all workers, whose batch norms have seen different slots."""
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    distributed.all_reduce(flat)
    flat /= workers
    for buffer, mean in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were put one behind the other, by name, each as the one `like` it."""
    parts = torch.split(flat, [tensor.numel() for tensor in like.values()])
    return {name: part.view_as(like[name]).to(like[name]) for name, part in zip(like, parts, strict=True)}


def _gathered(own_MnK: Tensor, count: int, workers: int) -> Tensor:
    """The logits (M, N, K) of all images, of which worker r has evaluated the r-th, the r + workers-th, and so on."""
    if workers == 1:
        return own_MnK
    most = -(-count // workers)
    padded_MnK = nn.functional.pad(own_MnK, (0, 0, 0, most - own_MnK.shape[1])).contiguous()
    parts = [torch.empty_like(padded_MnK) for _ in range(workers)]
    distributed.all_gather(parts, padded_MnK)
    return torch.stack(parts, dim=2).flatten(1, 2)[:, :count]


# ---------------------------------------------------------------------------------------------------------- evaluation


def measure(
    net: networks.MixMoNet,
    config: TrialConfig,
    *,
    device: torch.device | str = "cpu",
    data_dir: Path | str | None = None,
) -> dict[str, float]:
    """The metrics of any network on the images that `config` holds out, as those of a trained one: of a published
    checkpoint, say, that `networks.load_reference` has put into it. Leaves `net` on the device, in evaluation mode.

    Raises data.DatasetError where the images are not there.
    """
    folder = None if data_dir is None else Path(data_dir)
    _, held_out = data.load(config.data, split=config.evaluate.split, folder=folder, device=device)
    alone = _World(0, 1, "")
    metrics, _ = _evaluated(net.to(device), config, held_out, alone)
    if config.evaluate.robustness == "cifar_c":
        corruptions = data.corrupted(config.data.dataset, folder)
        metrics |= _robustness(net, config, corruptions, held_out.labels_N.device, alone)
    return metrics


@torch.inference_mode()
def _evaluated(
    net: networks.MixMoNet, config: TrialConfig, held_out: data.Images, world: _World
) -> tuple[dict[str, float], Tensor]:
    """The metrics on the held-out images, of which each worker evaluates its share, and those of the weights; and the
    images' logits (M, N, K), on the CPU.
    """
    pixels_NCHW, labels_N = held_out.pixels_NCHW[world.rank :: world.workers], held_out.labels_N
    net.eval()
    parts = [_logits(net, config, part_NCHW) for part_NCHW in torch.split(pixels_NCHW, EVALUATION_BATCH)]
    logits_MNK = _gathered(torch.cat(parts, dim=1), len(labels_N), world.workers)
    return evaluate.summarize(logits_MNK, labels_N) | networks.filter_activity(net), logits_MNK.cpu()


@torch.inference_mode()
def _robustness(
    net: networks.MixMoNet,
    config: TrialConfig,
    corruptions: Sequence[data.Corrupted],
    device: torch.device,
    world: _World,
) -> dict[str, float]:
    """The metrics on the corrupted test images, of which each worker evaluates its share of every file."""
    tallies_CT = torch.zeros((len(corruptions), evaluate.TALLY), dtype=torch.float64, device=device)
    net.eval()
    for images, tally_T in zip(corruptions, tallies_CT, strict=True):
        for part in images.batches(EVALUATION_BATCH, device=device, rank=world.rank, workers=world.workers):
            tally_T += evaluate.tally(_logits(net, config, part.pixels_NCHW), part.labels_N)
    if world.workers > 1:
        distributed.all_reduce(tallies_CT)
    return evaluate.robustness(tallies_CT, data.STANDARD_CORRUPTIONS)


def _logits(net: networks.MixMoNet, config: TrialConfig, pixels_NCHW: Tensor) -> Tensor:
    with autocast(config, pixels_NCHW.device):
        logits_MNK: Tensor = net(augment.normalise(pixels_NCHW, config.data.dataset))
    return logits_MNK


# --------------------------------------------------------------------------------------------------------- checkpoints


def _check(state: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless this is a checkpoint that can be read."""
    if not isinstance(state, Mapping) or not isinstance(state.get("format"), int):
        raise CheckpointError("not a checkpoint of mixmo")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"a checkpoint of format {state['format']}, written by a newer mixmo; this one reads up to {FORMAT}"
        )
    kinds = {"digest": str, "epoch": int, "history": list, "model": dict, "momentum": dict}
    faults = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    if "part" in state and not _is_part(state["part"]):
        faults.append("part")
    if faults or len(state["history"]) != state["epoch"] - ("part" in state):
        raise CheckpointError(f"an incomplete checkpoint: {', '.join(faults) or 'history'} is missing or wrong")


def _is_part(given: Any) -> bool:
    """Whether this is a `_Part`, as a checkpoint holds it."""
    kinds = {"step": int, "seconds": float, "statistics_RS": Tensor}
    if not isinstance(given, dict) or given.keys() != kinds.keys():
        return False
    return all(isinstance(given[name], kind) for name, kind in kinds.items()) and given["step"] >= 1


def _check_origin(state: Mapping[str, Any], trial: str, steps: int) -> None:
    """Raises CheckpointError unless the checkpoint is of this trial, whose epochs have so many steps."""
    if state["digest"] != trial:
        raise CheckpointError(
            f"the checkpoint is of trial {state['digest'][:12]}, not of {trial[:12]}: another config, seed or number "
            f"of workers"
        )
    if "part" in state and state["part"]["step"] > steps:
        raise CheckpointError(f"the checkpoint is of step {state['part']['step']} of an epoch that has {steps}")


_NAME = re.compile(r"epoch-(\d{5,})-(?:step-(\d{6,})-)?([0-9a-f]{16})\.pt")


def save(state: Mapping[str, Any], folder: Path) -> Path:
    """Writes a checkpoint, all of it or nothing. Returns its path.

    It is called `epoch-<epoch>-<first 16 hex digits of the file's SHA-256>.pt` after an epoch and
    `epoch-<epoch>-step-<step>-<16 digits>.pt` in one. Raises OSError where the folder cannot be written; no
    half-written file has such a name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=folder, prefix=".checkpoint-")
    step = f"step-{state['part']['step']:06d}-" if "part" in state else ""
    try:
        with os.fdopen(handle, "w+b") as file:
            _pack(state, file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            content = hashlib.file_digest(file, "sha256").hexdigest()
        path = folder / f"epoch-{state['epoch']:05d}-{step}{content[:16]}.pt"
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return path


def _pack(state: Mapping[str, Any], file: Any) -> None:
    try:
        torch.save(dict(state), file)
    except RuntimeError as error:  # torch's way to say that the disk is full
        raise OSError(errno.EIO, f"the checkpoint could not be written whole: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, onto the CPU. Nothing in the file is executed.

    Raises CheckpointError where the file is missing, damaged, renamed or no checkpoint of mixmo.
    """
    name = _NAME.fullmatch(path.name)
    if name is None:
        raise CheckpointError(f"{path}: not the name of a checkpoint, which is like epoch-00012-0123456789abcdef.pt")
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
            if content[:16] != name[3]:
                raise CheckpointError(
                    f"{path}: damaged or renamed: its content has SHA-256 {content[:16]}, its name says {name[3]}. "
                    f"Delete it; an older checkpoint is taken instead"
                )
            file.seek(0)
            state: dict[str, Any] = _unpack(file, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    step = state["part"]["step"] if "part" in state else None
    if (state["epoch"], step) != (int(name[1]), int(name[2]) if name[2] else None):
        held = f"epoch {state['epoch']}" + (f", step {step}" if step else "")
        raise CheckpointError(f"{path}: renamed: it holds {held}")
    return state


def _unpack(file: Any, path: Path) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        _check(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # whatever a foreign file makes of the reader
        raise CheckpointError(f"{path}: not a checkpoint of mixmo: {type(error).__name__}") from error
    return dict(state)
