"""Trainer callbacks: lifecycle only, no mathematics."""

from __future__ import annotations

from .mprune import MPruneCallback

__all__ = ["MPruneCallback"]
