"""Everything that goes into a trial: frozen settings with meaning, symbol and limits, and the trial's identity.

Only the standard library is imported, so that a plan or a table never pays for torch. The symbols are those of the
MixMo paper (Ramé et al., ICCV 2021).
"""

import dataclasses
import functools
import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

DatasetName = Literal["digits", "cifar10", "cifar100", "tiny_imagenet", "synthetic"]
Augmentation = Literal["none", "standard", "augmix"]
Msda = Literal["none", "mixup", "cutmix", "manifold_mixup", "resizemix"]
Arch = Literal["wide_resnet", "preact_resnet"]
MixingMethod = Literal[
    "sum", "linear", "cutmix", "cowmix", "fmix", "horizontal", "vertical", "channel",
    "channel_split", "patchup_hard", "patchup_hard_2d", "patchup_soft",
]  # fmt: skip
All = Literal["all"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a field means. It travels in the dataclass field's metadata under the key `setting`."""

    birth: Any
    """The value that is left out of a trial's identity. It never changes, even if the default does."""
    meaning: str
    symbol: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    changeable: bool = False
    """Whether a training may go on from a checkpoint with another value: what it shapes is made anew at every step."""


def _setting(default: Any, meaning: str, **limits: Any) -> Any:
    birth = limits.pop("birth", default)
    return field(default=default, metadata={"setting": Setting(birth, meaning, **limits)})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """Coerces numbers by type (1 is 1.0 where a float is meant) and holds every field to its limits."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = _hints(kind)
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            # + 0.0 makes -0.0 a 0.0: equal numbers must have equal text, which the identity hashes.
            if hints[spec.name] is float and isinstance(value, int | float) and not isinstance(value, bool):
                object.__setattr__(self, spec.name, float(value) + 0.0)
            if get_args(hints[spec.name]) == (float, ...):
                object.__setattr__(self, spec.name, tuple(float(each) + 0.0 for each in value))
            check_limits(spec.name, getattr(self, spec.name), spec.metadata["setting"])


@functools.cache
def _hints(section: Any) -> dict[str, Any]:
    """Resolving annotations costs more than all the rest of making a config."""
    return get_type_hints(section)


def check_limits(name: str, value: Any, setting: Setting) -> None:
    """Raise ValueError, beginning with `name`, for a number outside the limits that the setting's metadata gives."""
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, bool) or not isinstance(each, int | float):
            continue
        if not math.isfinite(each):
            raise ValueError(f"{name} must be a finite number, got {each}")
        if setting.at_least is not None and each < setting.at_least:
            raise ValueError(f"{name} must be at least {setting.at_least:g}, got {each:g}")
        if setting.above is not None and each <= setting.above:
            raise ValueError(f"{name} must be above {setting.above:g}, got {each:g}")
        if setting.at_most is not None and each > setting.at_most:
            raise ValueError(f"{name} must be at most {setting.at_most:g}, got {each:g}")


@dataclass(frozen=True, slots=True)
class Dataset:
    """The shape of a dataset: known before any file is opened."""

    train_images: int
    test_images: int
    classes: int
    size: int
    """Height and width in pixels."""
    channels: int = 3


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(train_images=1437, test_images=360, classes=10, size=8, channels=1),
    "cifar10": Dataset(train_images=50_000, test_images=10_000, classes=10, size=32),
    "cifar100": Dataset(train_images=50_000, test_images=10_000, classes=100, size=32),
    "tiny_imagenet": Dataset(train_images=100_000, test_images=10_000, classes=200, size=64),
    "synthetic": Dataset(train_images=512, test_images=128, classes=10, size=16),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(_Section):
    dataset: DatasetName = _setting("cifar100", "The images to train and evaluate on.")
    train_images: int | All = _setting(
        "all", "How many training images, drawn once by a fixed seed and balanced over the classes.", at_least=1
    )
    batch_size: int = _setting(
        64, "Slots in a batch, repeats included, split over the trial's workers.", symbol="B", at_least=2
    )
    repetition: int = _setting(
        1, "How often an image occurs in its batch; an epoch has as many times the steps.", symbol="b", at_least=1
    )
    input_repetition: float = _setting(
        0.0, "Share of the slots in which all subnetworks see the same image (MIMO).", symbol="rho",
        at_least=0, at_most=1, changeable=True,
    )  # fmt: skip
    augmentation: Augmentation = _setting(
        "standard", "Random crop and, where a mirror image makes sense, flip; augmix: AugMix after these."
    )
    msda: Msda = _setting(
        "none", "Mixed-sample augmentation before the encoders; manifold_mixup mixes hidden maps of a single network."
    )
    msda_probability: float = _setting(
        0.5, "Share of the images that msda mixes with another one.", at_least=0, at_most=1, changeable=True
    )
    msda_alpha: float = _setting(
        1.0, "Concentration of the Beta that draws lambda, the ratio of mixup, cutmix and manifold_mixup.", above=0,
        changeable=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super(DataConfig, self).__post_init__()
        available = DATASETS[self.dataset].train_images
        if self.train_images == available:
            object.__setattr__(self, "train_images", "all")
        if self.train_images != "all" and self.train_images > available:
            raise ValueError(
                f"train_images must be 'all' or at most {available} for {self.dataset}, got {self.train_images}"
            )
        if self.batch_size % self.repetition:
            raise ValueError(
                f"repetition must divide batch_size, which counts repeats: {self.batch_size} slots are not a whole "
                f"number of images at repetition {self.repetition}"
            )
        if self.images * self.repetition < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is larger than an epoch: {self.images} images at repetition "
                f"{self.repetition} fill {self.images * self.repetition} slots"
            )

    @property
    def images(self) -> int:
        """How many images are trained on, before a validation split takes its share."""
        return DATASETS[self.dataset].train_images if self.train_images == "all" else self.train_images


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(_Section):
    arch: Arch = _setting("wide_resnet", "Core network: WRN-depth-width, or PreActResNet-18-width.")
    depth: int = _setting(28, "Layers of a wide ResNet: 6 n + 4. PreActResNet has 18 whatever this says.", at_least=10)
    width: int = _setting(10, "Widening factor of the core network.", symbol="w", at_least=1)
    subnetworks: int = _setting(
        2, "Images mixed into one input, and predictions that come out.", symbol="M", at_least=1
    )
    encoders: int | All = _setting("all", "First convolutions: one for each subnetwork, or 1 shared.", at_least=1)
    classifiers: int | All = _setting("all", "Last linear layers: one for each subnetwork, or 1 shared.", at_least=1)
    classifier_roles: Literal["input", "dominant"] = _setting(
        "input", "With 1 encoder and M classifiers: classifier m predicts input m, or the m-th by mixing ratio."
    )

    def __post_init__(self) -> None:
        super(ModelConfig, self).__post_init__()
        if self.arch == "wide_resnet" and (self.depth - 4) % 6:
            raise ValueError(f"depth of a wide ResNet must be 6 n + 4 (10, 16, 22, 28, 40 ...), got {self.depth}")
        for name in ("encoders", "classifiers"):
            count = getattr(self, name)
            if count == self.subnetworks:
                object.__setattr__(self, name, "all")
            elif count not in (1, "all"):
                raise ValueError(f"{name} must be 'all', 1 or subnetworks ({self.subnetworks}), got {count}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingConfig(_Section):
    method: MixingMethod = _setting("cutmix", "How the M encoded images become one feature map.")
    probability: float = _setting(
        0.5, "Chance that a batch is mixed by binary masks; the others are mixed linearly. It decays to 0 over the "
        "last twelfth of the training.", symbol="p", at_least=0, at_most=1, changeable=True,
    )  # fmt: skip
    alpha: float = _setting(
        2.0, "Concentration of the Dirichlet that draws the mixing ratios kappa; 0 fixes them at 1/M.",
        at_least=0, symbol="alpha", changeable=True,
    )  # fmt: skip
    weight_root: float = _setting(
        3.0, "Loss weights are proportional to kappa^(1/r); large r weighs all inputs alike.", symbol="r", at_least=0.1,
        changeable=True,
    )  # fmt: skip
    # below 0.1, kappa^(1/r) may be 0 of all inputs in fp32


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(_Section):
    """SGD with Nesterov momentum; the rate is linear in the warm-up, then falls in steps."""

    epochs: int = _setting(300, "Passes over the training images.", symbol="E", at_least=1)
    lr: float = _setting(0.05, "Learning rate at repetition 1; the optimiser uses lr / repetition.", above=0,
                         changeable=True)  # fmt: skip
    momentum: float = _setting(0.9, "Momentum of SGD, in Nesterov's form.", at_least=0, at_most=0.9999)
    weight_decay: float = _setting(6e-4, "On all parameters. The recipe's l2 term 3e-4 in the loss is 6e-4 here.",
                                   at_least=0, changeable=True)  # fmt: skip
    warmup: float = _setting(
        1.0, "Length of the warm-up in epochs of steps at repetition 1, times repetition.", at_least=0
    )
    decay_at: tuple[float, ...] = _setting(
        (0.33333, 0.66667, 0.75), "Fractions of the epochs after which the rate is multiplied by decay_by.",
        at_least=0, at_most=1,
    )  # fmt: skip
    decay_by: float = _setting(0.1, "Factor of each decay.", above=0, at_most=1)

    def __post_init__(self) -> None:
        super(OptimConfig, self).__post_init__()
        if list(self.decay_at) != sorted(set(self.decay_at)):
            raise ValueError(f"decay_at must rise, got {list(self.decay_at)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(_Section):
    split: Literal["test", "validation"] = _setting(
        "test", "What is measured: the test images (the paper's protocol), or a tenth of the training images, "
        "held out by a fixed seed.",
    )  # fmt: skip
    every: int = _setting(1, "Epochs between evaluations; the last epoch is always evaluated.", at_least=1)
    robustness: Literal["none", "cifar_c"] = _setting(
        "none", "What is measured besides, after the last epoch: cifar_c is the published corrupted test images, in "
        "`CIFAR-10-C/` or `CIFAR-100-C/` beside the dataset.",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialConfig(_Section):
    data: DataConfig = _setting(DataConfig(), "What is trained on.")
    model: ModelConfig = _setting(ModelConfig(), "The network.")
    mixing: MixingConfig = _setting(MixingConfig(), "The mixing block and its loss weights. Without effect at M = 1.")
    optim: OptimConfig = _setting(OptimConfig(), "The optimiser and its schedule.")
    evaluate: EvaluateConfig = _setting(EvaluateConfig(), "What is measured, and when.")
    seed: int = _setting(0, "Decides initial weights, order, augmentation and mixing.", at_least=0, at_most=2**32 - 1)
    precision: Literal["fp32", "bf16"] = _setting(
        "fp32", "Arithmetic of the network. bf16 keeps weights, batch statistics and loss in fp32."
    )

    def __post_init__(self) -> None:
        super(TrialConfig, self).__post_init__()
        if self.evaluate.split == "validation" and not validation_images(self.data):
            raise ValueError(
                f"split: validation holds out a tenth of the training images, and {self.data.images} have no tenth: "
                f"give at least 10 train_images"
            )
        images, repetition = training_images(self), self.data.repetition
        if images * repetition < self.data.batch_size:
            raise ValueError(
                f"batch_size {self.data.batch_size} is larger than an epoch: the {images} images that the validation "
                f"split leaves fill {images * repetition} slots at repetition {repetition}"
            )
        _check_mixing(self)
        if self.data.msda == "manifold_mixup" and self.model.subnetworks > 1:
            raise ValueError(
                f"msda manifold_mixup mixes the hidden maps of a single network, and subnetworks is "
                f"{self.model.subnetworks}: mixup, cutmix and resizemix go with several"
            )
        if self.evaluate.robustness == "cifar_c" and self.data.dataset not in ("cifar10", "cifar100"):
            raise ValueError(f"robustness cifar_c belongs to cifar10 and cifar100, not to {self.data.dataset}")


def _check_mixing(config: TrialConfig) -> None:
    """Raise ValueError for a mixing block that these subnetworks and feature maps do not allow."""
    M, method = config.model.subnetworks, config.mixing.method
    if M > 2 and method not in ("sum", "linear", "cutmix"):
        raise ValueError(f"method {method} mixes 2 images, and subnetworks is {M}: sum, linear and cutmix mix more")
    if M > 1 and method.startswith("patchup") and map_size(config) < PATCHUP_BLOCK:
        raise ValueError(
            f"method {method} masks blocks of {PATCHUP_BLOCK}x{PATCHUP_BLOCK}, and the maps of {config.data.dataset} "
            f"in a {config.model.arch} are {map_size(config)}x{map_size(config)}"
        )


PATCHUP_BLOCK = 7
"""Height and width of the blocks that the patchup masks are made of."""
STEM_CHANNELS = {"wide_resnet": 16, "preact_resnet": 64}
"""Feature maps of an encoder, whatever the width."""


def map_size(config: TrialConfig) -> int:
    """Height and width of the feature maps that are mixed: the encoders of a PreActResNet halve the image's."""
    size = DATASETS[config.data.dataset].size
    return -(-size // 2) if config.model.arch == "preact_resnet" else size


def validation_images(data: DataConfig) -> int:
    """How many of the training images are held out under `evaluate.split: validation`: a tenth, rounded down."""
    return data.images // 10


def training_images(config: TrialConfig) -> int:
    """How many images an epoch visits: the chosen ones, less the tenth that a validation split holds out."""
    held_out = validation_images(config.data) if config.evaluate.split == "validation" else 0
    return config.data.images - held_out


RECIPES: dict[str, dict[str, Any]] = {
    "cifar": {
        "data.batch_size": 64, "optim.epochs": 300, "optim.lr": 0.05, "optim.momentum": 0.9,
        "optim.weight_decay": 6e-4, "optim.warmup": 1.0, "optim.decay_at": (0.33333, 0.66667, 0.75),
        "optim.decay_by": 0.1,
    },
    "tiny_imagenet": {
        "data.batch_size": 100, "optim.epochs": 1200, "optim.lr": 0.2, "optim.momentum": 0.9,
        "optim.weight_decay": 1e-4, "optim.warmup": 1.0, "optim.decay_at": (599 / 1200, 899 / 1200),
        "optim.decay_by": 0.1,
    },
}  # fmt: skip
"""The paper's optimiser settings. A sweep file's `recipe` stands for these values, laid under its `trial`."""

NUMERICS: dict[str, int] = {
    "training": 1,
    **{name: 2 for name in get_args(Arch)},
    **{name: 1 for literal in (MixingMethod, DatasetName) for name in get_args(literal)},
    **{f"augmentation_{name}": 1 for name in get_args(Augmentation)},
    **{f"msda_{name}": 1 for name in get_args(Msda)},
}
"""The version of each part's arithmetic. A change that alters a part's results raises its number here, and every
trial that uses the part gets a new id; results under the old number are stale."""


# --------------------------------------------------------------------------------------------- fields by dotted name


def leaves(section: Any = TrialConfig, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(dotted name, field) of every setting, in order: `data.dataset`, ..., `seed`, `precision`."""
    return iter(_leaves(section, prefix))


@functools.cache
def _leaves(section: Any, prefix: str) -> tuple[tuple[str, dataclasses.Field[Any]], ...]:
    found: list[tuple[str, dataclasses.Field[Any]]] = []
    for spec in dataclasses.fields(section):
        hint = _hints(section)[spec.name]
        if isinstance(hint, type) and issubclass(hint, _Section):
            found += leaves(hint, f"{prefix}{spec.name}.")
        else:
            found.append((prefix + spec.name, spec))
    return tuple(found)


def flatten(config: TrialConfig) -> dict[str, Any]:
    """Every setting by its dotted name, as it was given."""
    names, values = _values()
    return dict(zip(names, values(config), strict=True))


@functools.cache
def _values() -> tuple[tuple[str, ...], Callable[[TrialConfig], tuple[Any, ...]]]:
    names = tuple(name for name, _ in leaves())
    return names, operator.attrgetter(*names)


def unflatten(flat: Mapping[str, Any]) -> TrialConfig:
    """The config with these settings by dotted name; all others keep their defaults.

    Raises ValueError naming the field when a value is outside its limits, KeyError for a name that is no setting.
    """
    known = dict(leaves())
    sections: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        if name not in known:
            raise KeyError(name)
        head, _, rest = name.rpartition(".")
        sections.setdefault(head, {})[rest] = value
    hints = _hints(TrialConfig)
    top = sections.pop("", {})
    return TrialConfig(
        **top,
        **{
            name: _section(hints[name], tuple((key, type(value), _hashable(value)) for key, value in values.items()))
            for name, values in sections.items()
        },
    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@functools.lru_cache(maxsize=4096)
def _section(kind: Any, given: tuple[tuple[str, type, Any], ...]) -> Any:
    """The trials of a sweep share most of their sections, and to check one costs more than to find it. The types tell
    1 from 1.0 and True.
    """
    return kind(**{name: value for name, _, value in given})


def ineffective(config: TrialConfig) -> frozenset[str]:
    """The settings that change nothing under the others: left out of the identity, null in the rows."""
    names: set[str] = set()
    if config.model.subnetworks == 1:
        names |= {f"mixing.{spec.name}" for spec in dataclasses.fields(MixingConfig)}
        names |= {"data.input_repetition", "model.encoders", "model.classifiers"}
    if config.mixing.method == "sum":
        names |= {"mixing.alpha", "mixing.probability", "mixing.weight_root"}
    if config.mixing.method == "linear":
        names |= {"mixing.probability"}
    if not (config.model.encoders == 1 and config.model.classifiers == "all" and config.model.subnetworks > 1):
        names |= {"model.classifier_roles"}
    if config.model.arch == "preact_resnet":
        names |= {"model.depth"}
    if not config.optim.decay_at:
        names |= {"optim.decay_by"}
    if config.data.msda in ("none", "manifold_mixup"):  # the latter mixes every batch, as its authors do
        names |= {"data.msda_probability"}
    if config.data.msda in ("none", "resizemix"):  # the latter draws the size of what it pastes
        names |= {"data.msda_alpha"}
    return frozenset(names)


# -------------------------------------------------------------------------------------------------------- identity


def parts(config: TrialConfig) -> dict[str, int]:
    """The numerics versions that this trial depends on."""
    names = ["training", config.data.dataset, config.model.arch,
             f"augmentation_{config.data.augmentation}", f"msda_{config.data.msda}"]  # fmt: skip
    if config.model.subnetworks > 1:
        names.append(config.mixing.method)
    return {name: NUMERICS[name] for name in sorted(names)}


def identity(config: TrialConfig, workers: int = 1, population: str = "") -> dict[str, Any]:
    """What decides the trial's numbers, by dotted name: the settings that take effect and differ from their birth
    default, the seed, the workers and the numerics versions above 1; and the `population` that it belongs to, if any,
    whose other trials change its settings and its weights.
    """
    silent = ineffective(config)
    values = flatten(config)
    kept = {
        name: list(values[name]) if isinstance(values[name], tuple) else values[name]
        for name, spec in leaves()
        if name not in silent and values[name] != spec.metadata["setting"].birth
    }
    kept["seed"] = config.seed
    if workers > 1:
        kept["workers"] = workers
    if population:
        kept["population"] = population
    raised = {name: version for name, version in parts(config).items() if version > 1}
    if raised:
        kept["numerics"] = raised
    return kept


def digest(decides: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the canonical JSON of an identity."""
    text = json.dumps(decides, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def trial_id(config: TrialConfig, workers: int = 1) -> str:
    """12 hex digits: the same config and seed have the same id in every sweep and on every machine."""
    return digest(identity(config, workers))[:12]


def cell_id(config: TrialConfig, workers: int = 1, population: str = "") -> str:
    """12 hex digits: the trial's identity without its seed, shared by all its repetitions."""
    return cell_of(identity(config, workers, population))


def cell_of(decides: Mapping[str, Any]) -> str:
    """The cell's id, of an identity that is at hand."""
    return digest({name: value for name, value in decides.items() if name != "seed"})[:12]


_BETWEEN_STEPS = frozenset(
    {"seed", "optim.epochs", "optim.lr", "optim.weight_decay", "optim.warmup", "optim.decay_at", "optim.decay_by",
     "evaluate.every", "evaluate.robustness", "mixing.probability"}
)  # fmt: skip
"""What is given to each step as a number, or looked at between two: it fixes no tensor's shape and no operation."""


def shape_of(config: TrialConfig) -> str:
    """12 hex digits that trials share whose steps may be taken side by side: they work on tensors of the same shapes,
    over the same images, by the same operations with the same constants, as one captured graph must.

    A setting is of the shape unless it is said above that it is not. It is finer than the shapes by which times are
    told, which leave out what changes no operation's cost (`orchestrator.calibration`).
    """
    silent = ineffective(config) | _BETWEEN_STEPS
    return digest({name: value for name, value in flatten(config).items() if name not in silent})[:12]
