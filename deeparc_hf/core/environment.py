"""What figures and checkpoints were made with: hardware, and versions of packages."""

from __future__ import annotations

import contextlib
import os
import platform
from functools import cache
from importlib import metadata
from typing import Any

import torch

__all__ = ["hardware", "package_versions"]


def hardware(device: torch.device | str | None = None) -> dict[str, Any]:
    """The hardware that figures depend on; device None: the accelerator if there is one, else the CPU."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(device)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.machine() if device.type == "cpu" else device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": device.type, "device_name": name, "cpu_count": usable, "torch_threads": torch.get_num_threads()}


def package_versions() -> dict[str, str]:
    """Versions of the packages that a pruning depends on, and of Python."""
    return dict(_installed())


@cache  # reports are written at every event of a training, and each look at the metadata reads and parses a file
def _installed() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("deeparc_hf", "transformers", "torch", "accelerate", "timm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
