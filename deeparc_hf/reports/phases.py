"""What a training with prunings in it is doing, in the words of its reports and checkpoints."""

from __future__ import annotations

__all__ = ["BEFORE", "FINISHED", "RETRAINING"]

BEFORE, RETRAINING, FINISHED = "before the first pruning", "retraining", "finished"
