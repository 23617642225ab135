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
    from .callbacks import MPruneCallback, WandaCallback
    from .card import create_model_card
    from .config import MPruneConfig
    from .distill_config import DistillConfig
    from .healing import heal_model
    from .hub import push_to_hub
    from .loading import load_pruned, save_pruned
    from .plan import PruningPlan
    from .pruning import analyze, prune_model
    from .record import PrunedConfig
    from .sparsify import sparsify_model
    from .surgery import apply_plan, remove_blocks
    from .wanda_config import WandaConfig

__version__ = "0.1.0.dev0"

_HOMES = {
    "DistillConfig": "distill_config",
    "MPruneCallback": "callbacks",
    "MPruneConfig": "config",
    "PrunedConfig": "record",
    "PruningPlan": "plan",
    "Stack": "architectures",
    "WandaCallback": "callbacks",
    "WandaConfig": "wanda_config",
    "analyze": "pruning",
    "apply_plan": "surgery",
    "create_model_card": "card",
    "find_stacks": "architectures",
    "heal_model": "healing",
    "load_pruned": "loading",
    "prune_model": "pruning",
    "push_to_hub": "hub",
    "remove_blocks": "surgery",
    "save_pruned": "loading",
    "sparsify_model": "sparsify",
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
