"""Trainer callbacks: lifecycle only, no mathematics."""

from __future__ import annotations

from .mprune import MPruneCallback
from .wanda import WandaCallback

__all__ = ["MPruneCallback", "WandaCallback"]
