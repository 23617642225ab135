"""Settings of all tests: few threads, no Hub, no telemetry."""

from __future__ import annotations

import gc
import os

for name, value in {
    # idle threads must not spin: on a busy machine torch is several times slower if they do
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

import pytest
import torch

torch.set_num_threads(1)  # models are tiny: more threads only get into each other's way


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """What is imported by now is no garbage: accelerate collects after each training, and need not look there."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
