"""The life of prunings and zeros in a Trainer: callbacks, schedule, following checkpoints, snapshots. Lifecycle only,
no mathematics.

May import everything but `cli`.
"""

from __future__ import annotations

from .mprune import MPruneCallback
from .own_loop import KeptZeros, follow
from .wanda import WandaCallback

__all__ = ["KeptZeros", "MPruneCallback", "WandaCallback", "follow"]
