"""What a card is made of and what is published: a Trainer, a model, or the folder of a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """One of the three.

    Attributes:
        folder: of the checkpoint; None for a live model.
        model: the live model, without what an accelerator wraps around it; None for a folder.
        trainer: the Trainer that the model is in; None where there is none.
    """

    folder: Path | None = None
    model: nn.Module | None = None
    trainer: Any = None

    @classmethod
    def of(cls, given: Any) -> Source:
        """Tell which of the three was given.

        Raises:
            FileNotFoundError: if there is no such folder. ConfigError: if it is something else.
        """
        if isinstance(given, (str, os.PathLike)):
            folder = Path(given)
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"There is no folder {folder}. Give a checkpoint's folder, a model or a Trainer."
                )
            return cls(folder=folder)
        if isinstance(given, nn.Module):
            return cls(model=given)
        model = getattr(given, "model", None)
        if not hasattr(given, "args") or not isinstance(model, nn.Module):
            raise ConfigError(f"A Trainer, a model or a checkpoint's folder is needed, found a {type(given).__name__}.")
        return cls(model=given.accelerator.unwrap_model(model), trainer=given)

    @property
    def args(self) -> Any:
        """The arguments of the Trainer; None where there is none."""
        return None if self.trainer is None else self.trainer.args

    @property
    def output(self) -> Path | None:
        """The folder that its card and its reports lie in; None for a model by itself."""
        return self.folder if self.args is None else Path(self.args.output_dir)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return self.args is None or self.args.process_index == 0
