"""A checkout of the reference implementation (github.com/alexrame/mixmo-pytorch), imported and run as it is.

What it needs and this project does not has a stand-in: names that NumPy has dropped, packages that colour its log or
draw its progress bar, and the dictionary whose entries are attributes that holds its constants.
"""

import importlib
import logging
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixmo_core.config import DATASETS, TrialConfig
from mixmo_core.data import Images
from mixmo_core.mixing import loss_weights

L2 = 3e-4
"""Its weight decay on CIFAR: this times the squared weights, in the loss."""


class _Attributes(dict[str, Any]):
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class Reference:
    """Networks, losses, metrics, training step and data path of a checkout."""

    def __init__(self, checkout: Path) -> None:
        sys.path.insert(0, str(checkout))
        vars(np).setdefault("int", int)
        for name, provides in (
            ("coloredlogs", {"install": lambda **_: None}),
            ("verboselogs", {"install": lambda **_: None}),
            ("easydict", {"EasyDict": _Attributes}),
            ("tqdm", {"tqdm": iter}),
        ):
            try:
                importlib.import_module(name)
            except ImportError:
                stand_in = types.ModuleType(name)
                stand_in.__spec__ = ModuleSpec(name, None)
                vars(stand_in).update(provides)
                sys.modules[name] = stand_in
        logging.disable(logging.WARNING)
        self._checkout = checkout
        self.metrics = self._module("core.metrics_wrapper")

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"mixmo.{name}")

    # ------------------------------------------------------------------------------------------- network and loss

    def network(self, config: TrialConfig, classes: int) -> Any:
        """In fp64, with random weights."""
        model = config.model
        wide = model.arch == "wide_resnet"
        names = ("WideResNet", "WideResNetMixMo") if wide else ("PreActResNet", "PreActResNetMixMo")
        kind = getattr(self._module("networks.wrn" if wide else "networks.resnet"), names[model.subnetworks > 1])
        depth = model.depth if wide else 18
        return kind({"depth": depth, "widen_factor": model.width}, _arguments(config, classes)).double()

    def loss(self, config: TrialConfig, classes: int, net: Any) -> Any:
        each = {"name": "soft_cross_entropy", "coeff": 1}
        subs = [
            {**each, "display_name": f"ce{m}", "input": f"logits_{m}", "target": f"target_{m}"}
            for m in range(config.model.subnetworks)
        ]
        spec = {"name": "multitask", "display_name": "loss", "l2_reg": L2, "listloss": subs}
        loss = self._module("core.loss").WrapperLoss(spec, _arguments(config, classes), torch.device("cpu"))
        loss.set_regularized_network(net)
        loss.start_accumulator()
        return loss

    # ---------------------------------------------------------------------------------------------- training step

    def settings(self, config: TrialConfig) -> dict[str, Any]:
        """Those of its own published configuration of Cut-MixMo, at the width, M and batch of `config`."""
        import yaml

        name = {
            "wide_resnet": "cifar100/exp_cifar100_wrn2810-2_cutmixmo-p5_standard_bar4.yaml",
            "preact_resnet": "tiny/exp_tinyimagenet_res182-2_cutmixmo-p5_standard_bar4.yaml",
        }[config.model.arch]
        settings: dict[str, Any] = yaml.safe_load((self._checkout / "config" / name).read_text())
        settings["num_members"] = config.model.subnetworks
        settings["training"]["batch_size"] = config.data.batch_size
        settings["training"]["batch_sampler"]["batch_repetitions"] = config.data.repetition
        if config.model.subnetworks > 1:
            settings["model_wrapper"]["network"]["widen_factor"] = config.model.width
        wrapper = settings["training"]["dataset_wrapper"]
        wrapper["da_method"] = "augmix" if config.data.augmentation == "augmix" else None
        wrapper["msda"]["mix_method"] = None if config.data.msda == "none" else config.data.msda
        return settings

    def trainer(self, config: TrialConfig, device: torch.device) -> Any:
        """Its network, loss with the l2 term, SGD and metrics, in training mode."""
        settings = self.settings(config)
        wrapper = self._module("learners.model_wrapper").ModelWrapper(settings["model_wrapper"], settings, device)
        wrapper.mode = "train"
        wrapper.network.train()
        wrapper.loss.start_accumulator()
        wrapper._init_metrics()
        return wrapper

    @staticmethod
    def train(wrapper: Any, batch: dict[str, Any]) -> None:
        """One step on ready tensors: what its training loop does with a batch, its progress bar left out."""
        wrapper.optimizer.zero_grad()
        output = wrapper.predict({"pixels": batch["pixels"], "metadata": batch["metadata"]})
        wrapper.step(output=output, target=batch["target"], backprop=True)
        wrapper.get_short_logs()
        wrapper.optimizer.step()

    # -------------------------------------------------------------------------------------------------- data path

    def batches(self, config: TrialConfig, images: Images) -> Iterator[Any]:
        """Its training batches of these images, made in this process: its transforms, its dataset wrapper, its sampler.
        Its own loader is the same in ten processes.
        """
        settings = self.settings(config)
        loaders = self._module("loaders.loader")
        tiny = config.data.dataset == "tiny_imagenet"
        transform, _ = self._module("augmentations.standard_augmentations").get_default_composed_augmentations(
            "tinyimagenet" if tiny else "cifar"
        )
        properties = (loaders.TinyImagenet200Loader if tiny else loaders.CIFAR10Loader).properties
        source = _Decoded(images, transform) if tiny else self._cifar(images, transform)
        wrappers = self._module("loaders.dataset_wrapper")
        kind = wrappers.MixMoDataset if config.model.subnetworks > 1 else wrappers.MSDADataset
        classes = DATASETS[config.data.dataset].classes
        dataset = kind(source, classes, config.model.subnetworks, settings["training"]["dataset_wrapper"], properties)
        sampler = self._module("loaders.batch_repetition_sampler").BatchRepetitionSampler(
            sampler=torch.utils.data.RandomSampler(dataset),
            batch_size=config.data.batch_size,
            num_members=config.model.subnetworks,
            drop_last=True,
            config_batch_sampler=settings["training"]["batch_sampler"],
        )
        return iter(torch.utils.data.DataLoader(dataset, batch_sampler=sampler))

    def _cifar(self, images: Images, transform: Any) -> Any:
        kind = self._module("loaders.cifar_dataset").CustomCIFAR10
        source = kind.__new__(kind)  # what it would read from its files is given
        source.data = images.pixels_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
        source.targets = images.labels_N.tolist()
        source.transform, source.target_transform = transform, None
        return source


class _Decoded(torch.utils.data.Dataset[Any]):
    """Images that are decoded already. Its loader of TinyImageNet opens a JPEG each time, which is not counted here."""

    def __init__(self, images: Images, transform: Any) -> None:
        from PIL import Image

        self._pictures = [Image.fromarray(each) for each in images.pixels_NCHW.permute(0, 2, 3, 1).numpy()]
        self._labels, self._transform = images.labels_N.tolist(), transform

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._transform(self._pictures[index]), self._labels[index]


def _arguments(config: TrialConfig, classes: int) -> dict[str, Any]:
    return {"num_members": config.model.subnetworks, "data": {"num_classes": classes}}


def ready(images_MBCHW: Tensor, labels_MB: Tensor, masks_MBHW: Tensor, kappa_MB: Tensor, config: TrialConfig) -> Any:
    """A batch as its loader hands it over: stacked images, weighted soft labels, masks in half precision."""
    weights_MB = loss_weights(kappa_MB, config.mixing.weight_root)
    classes = DATASETS[config.data.dataset].classes
    soft_MBK = nn.functional.one_hot(labels_MB, classes).float() * weights_MB[..., None]
    given = masks_MBHW[:1] if len(masks_MBHW) == 2 else masks_MBHW
    masks = [mask_BHW.unsqueeze(1).half() for mask_BHW in given]
    return {
        "pixels": images_MBCHW.transpose(0, 1).flatten(1, 2).contiguous(),
        "target": {f"target_{m}": soft_BK for m, soft_BK in enumerate(soft_MBK)},
        "metadata": {"mode": "train", "mixmo_masks": masks},
    }
