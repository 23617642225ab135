"""The model type "deeparc_pruned": checkpoints that lack blocks which no setting of their library can leave out.

Such a config.json holds the settings of the whole model and which blocks are left. `import deeparc_hf` makes the type
known to AutoConfig and the Auto classes of transformers: they build the whole model, drop the blocks, and load the
weights. Without the package the type is unknown, and the checkpoint is refused.

Importing this module loads nothing else; transformers is told of the type when it loads its own list of types.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["MODEL_TYPE", "make_known"]

MODEL_TYPE = "deeparc_pruned"
_TYPES = "transformers.models.auto.configuration_auto"


def make_known() -> None:
    """Tell AutoConfig of the type: now if transformers' list of types is loaded, else as soon as it is."""
    if _TYPES in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting:
    """A finder that finds nothing itself, but has the type registered once the list of types is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TYPES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        loader = None if spec is None else spec.loader
        if loader is not None:
            load = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _register()

            loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one module's loader
        return spec


def _register() -> None:
    importlib.import_module(".config", __name__).register()
