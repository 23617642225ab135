"""deeparc_hf: make trained models smaller inside ordinary training.

    from transformers import Trainer
    from deeparc_hf import MPruneCallback

    trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=[MPruneCallback(threshold=0.98)])
    trainer.train()

Names are imported when they are first used, so that `import deeparc_hf` costs next to nothing. It makes the model type
"deeparc_pruned" known to transformers (`pruned_type`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .pruned_type import make_known

if TYPE_CHECKING:
    from .architectures import Stack as Stack
    from .architectures import find_stacks as find_stacks
    from .checkpoint.loading import load_pruned as load_pruned
    from .checkpoint.loading import save_pruned as save_pruned
    from .checkpoint.record import PrunedConfig as PrunedConfig
    from .distillation.config import DistillConfig as DistillConfig
    from .healing.heal import heal_model as heal_model
    from .pruning.config import MPruneConfig as MPruneConfig
    from .pruning.on_disk import prune_checkpoint as prune_checkpoint
    from .pruning.plan import PruningPlan as PruningPlan
    from .pruning.surgery import apply_plan as apply_plan
    from .pruning.surgery import remove_blocks as remove_blocks
    from .publish import create_model_card as create_model_card
    from .publish.push import push_to_hub as push_to_hub
    from .search.frontier import Frontier as Frontier
    from .search.prune import analyze as analyze
    from .search.prune import prune_model as prune_model
    from .search.search import search_blocks as search_blocks
    from .sparsity.config import WandaConfig as WandaConfig
    from .sparsity.sparsify import sparsify_model as sparsify_model
    from .trainer import KeptZeros as KeptZeros
    from .trainer import MPruneCallback as MPruneCallback
    from .trainer import WandaCallback as WandaCallback
    from .trainer import follow as follow

__version__ = "0.1.0.dev0"

_NAMES = {
    "architectures": ["Stack", "find_stacks"],
    "checkpoint.loading": ["load_pruned", "save_pruned"],
    "checkpoint.record": ["PrunedConfig"],
    "distillation.config": ["DistillConfig"],
    "healing.heal": ["heal_model"],
    "pruning.config": ["MPruneConfig"],
    "pruning.on_disk": ["prune_checkpoint"],
    "pruning.plan": ["PruningPlan"],
    "pruning.surgery": ["apply_plan", "remove_blocks"],
    "publish": ["create_model_card"],
    "publish.push": ["push_to_hub"],
    "search.frontier": ["Frontier"],
    "search.prune": ["analyze", "prune_model"],
    "search.search": ["search_blocks"],
    "sparsity.config": ["WandaConfig"],
    "sparsity.sparsify": ["sparsify_model"],
    "trainer": ["KeptZeros", "MPruneCallback", "WandaCallback", "follow"],
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = sorted(["__version__", *_HOMES])

make_known()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
