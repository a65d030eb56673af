"""What a device is called, and how much memory it has."""

import contextlib
import os
import platform
import resource
from pathlib import Path

import torch


def name(device: torch.device) -> str:
    """The model of a GPU or a processor: trials on devices of one name take about the same time."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory(device: torch.device) -> str:
    """How much there is, for people."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return f"{whole / 1e9:.3g} GB, {free / 1e9:.3g} free"
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{(whole if limit == resource.RLIM_INFINITY else min(limit, whole)) / 1e9:.3g} GB"
