"""The training that comes after a removal, where it is a training of its own: LoRA adapters on the blocks that stay,
merged in the end, and the whole model as a teacher.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from deeparc_hf.distillation.config import DistillConfig
from deeparc_hf.distillation.fused import is_sft
from deeparc_hf.distillation.loss import Distillation
from deeparc_hf.errors import ConfigError, MissingDependencyError
from deeparc_hf.healing.sites import Healing, Site
from deeparc_hf.sparsity.adapters import merge_keeping_zeros
from deeparc_hf.trainer.follow_checkpoint import record_of

from .arguments import PruningArguments

__all__ = ["Taught", "adapted", "healings_in", "merged"]


def adapted(model: nn.Module, pruning: PruningArguments, seed: int) -> nn.Module:
    """The model with new LoRA adapters on its linear maps, which alone are trained; as it is where no rank is given.
    The same seed draws the same adapters.

    Raises:
        ConfigError: if PEFT finds nothing to adapt.
        MissingDependencyError: if PEFT is not installed.
    """
    if pruning.lora_rank is None:
        return model
    peft = _peft()
    settings = {"lora_alpha": pruning.lora_alpha or 2 * pruning.lora_rank, "lora_dropout": pruning.lora_dropout}
    config = peft.LoraConfig(r=pruning.lora_rank, target_modules=pruning.lora_targets or "all-linear", **settings)
    set_seed(seed)
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"LoRA adapters cannot be put on {type(model).__name__} ({' '.join(str(error).split())}). Name its linear "
            "maps in lora_targets."
        ) from error


def merged(model: nn.Module) -> nn.Module:
    """The model with its adapters merged into the weights; weights that the record lists as zeros stay zero."""
    unmerged: Any = model
    record = record_of(unmerged.get_base_model())
    if record is not None and record.sparsity is not None:
        return merge_keeping_zeros(model)
    whole: nn.Module = unmerged.merge_and_unload()
    return whole


def healings_in(folder: Path) -> list[Healing]:
    """The outcomes of the repairs that the report in a folder tells of."""
    entries = json.loads((folder / "report.json").read_text("utf-8"))["healing"]
    return [
        Healing(
            Site(entry["stack"], entry["kept"], tuple(entry["removed"])),
            **{name: entry[name] for name in ("reason", "held_out", "strength")},
        )
        for entry in entries
    ]


class Taught(TrainerCallback):
    """Has a whole model teach the model of a Trainer from the first step to the last.

    Raises:
        ConfigError: in the training, if it does not learn from the teacher's term.
    """

    def __init__(self, teacher: nn.Module, config: DistillConfig) -> None:
        self._teacher = teacher.requires_grad_(False).eval()
        self._config = config
        self._at_work: Distillation | None = None

    def on_train_begin(self, args: TrainingArguments, *event: Any, model: nn.Module, **more: Any) -> None:
        """Begin to teach, where the model is."""
        self._stop()
        teacher = self._teacher.to(next(model.parameters()).device)
        self._at_work = Distillation(model, teacher, self._config, [], fused_head=is_sft(args))

    def on_pre_optimizer_step(self, *event: Any, **more: Any) -> None:
        """Check that the teacher has a say in this step."""
        if self._at_work is not None and not self._at_work.reached:
            raise ConfigError(
                "The teacher's term has not reached the weights: this training does not learn from the loss that the "
                "model puts out. Leave distill_alpha out."
            )
        if self._at_work is not None:
            self._at_work.reached = False

    def on_train_end(self, *event: Any, **more: Any) -> None:
        """Leave the model as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._at_work is not None:
            self._at_work.stop()
            self._at_work = None


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError('lora_rank needs PEFT: pip install "deeparc_hf[chat]".') from error
    return peft
