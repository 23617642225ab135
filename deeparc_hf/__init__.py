"""deeparc_hf: make trained models smaller inside ordinary training.

    from transformers import Trainer
    from deeparc_hf import MPruneCallback

    trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=[MPruneCallback(threshold=0.98)])
    trainer.train()

Names are imported when they are first used, so that `import deeparc_hf` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .architectures import Stack, find_stacks
    from .checkpoint.loading import load_pruned, save_pruned
    from .checkpoint.record import PrunedConfig
    from .distillation.config import DistillConfig
    from .healing.heal import heal_model
    from .pruning.config import MPruneConfig
    from .pruning.plan import PruningPlan
    from .pruning.prune import analyze, prune_model
    from .pruning.surgery import apply_plan, remove_blocks
    from .publish import create_model_card
    from .publish.push import push_to_hub
    from .sparsity.config import WandaConfig
    from .sparsity.sparsify import sparsify_model
    from .trainer import MPruneCallback, WandaCallback

__version__ = "0.1.0.dev0"

_HOMES = {
    "DistillConfig": "distillation.config",
    "MPruneCallback": "trainer",
    "MPruneConfig": "pruning.config",
    "PrunedConfig": "checkpoint.record",
    "PruningPlan": "pruning.plan",
    "Stack": "architectures",
    "WandaCallback": "trainer",
    "WandaConfig": "sparsity.config",
    "analyze": "pruning.prune",
    "apply_plan": "pruning.surgery",
    "create_model_card": "publish",
    "find_stacks": "architectures",
    "heal_model": "healing.heal",
    "load_pruned": "checkpoint.loading",
    "prune_model": "pruning.prune",
    "push_to_hub": "publish.push",
    "remove_blocks": "pruning.surgery",
    "save_pruned": "checkpoint.loading",
    "sparsify_model": "sparsity.sparsify",
}

__all__ = [
    "DistillConfig",
    "MPruneCallback",
    "MPruneConfig",
    "PrunedConfig",
    "PruningPlan",
    "Stack",
    "WandaCallback",
    "WandaConfig",
    "__version__",
    "analyze",
    "apply_plan",
    "create_model_card",
    "find_stacks",
    "heal_model",
    "load_pruned",
    "prune_model",
    "push_to_hub",
    "remove_blocks",
    "save_pruned",
    "sparsify_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
