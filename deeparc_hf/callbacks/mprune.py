"""Similarity pruning in the life of a Trainer: prune when training begins, then train the smaller model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..architectures import describe
from ..architectures.hosts import RECORD_KEY
from ..config import MPruneConfig
from ..errors import CalibrationError, SurgeryError
from ..freezing import freeze_blocks
from ..plan import PruningPlan
from ..pruning import prune_model
from ..record import PrunedConfig

__all__ = ["MPruneCallback"]

PLAN_FILE = "pruning_plan.json"
_guarded: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that refuse weights of another layout


class MPruneCallback(TrainerCallback, ExportableState):
    """Removes redundant blocks when training begins; the Trainer then trains what is left.

    The blocks are compared on `calibration_samples` samples of the training data, chosen at random with the config's seed; the
    training itself is not disturbed (random states, data order and modes are restored). The optimizer follows. The plan
    is written to `pruning_plan.json` in the output folder, the record goes into the model's config and so into every checkpoint.

    Args:
        config: the settings.
        calibration: other data to compare blocks on: a data set (collated as the training data is), or an iterable of batches.
            Never the data that you evaluate on.
        settings: settings by keyword, instead of `config` or on top of it: `MPruneCallback(threshold=0.98)`.

    Attributes:
        plan: the plan that was carried out in the last run; None before.
        record: the record of the model after it, earlier prunings included; None if it carries none.

    Raises:
        UnsupportedModelError: when the Trainer is made, if its model cannot be pruned.
        SurgeryError: when training begins, in several processes or on a sharded model, and where a checkpoint is resumed into a model of
            another structure.
    """

    def __init__(self, config: MPruneConfig | None = None, *, calibration: Dataset | Iterable[Any] | None = None, **settings: Any) -> None:
        self.config = MPruneConfig.from_settings(config, settings)
        self.calibration = calibration
        self.plan: PruningPlan | None = None
        self.record: PrunedConfig | None = None
        self._done = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback, in trainer_state.json."""
        record = None if self.record is None else self.record.to_dict()
        return {"args": self.config.to_dict(), "attributes": {"_saved_record": record, "_done": self._done}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> MPruneCallback:
        """The callback that a checkpoint kept (`restore_callback_states_from_checkpoint`)."""
        callback = cls(MPruneConfig.from_dict(state["args"]))
        saved = state["attributes"].get("_saved_record")
        callback.record = None if saved is None else PrunedConfig.from_dict(saved)
        callback._done = bool(state["attributes"].get("_done"))
        return callback

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._done = False  # an interrupted run may have left it set
        model = kwargs.get("model")
        if model is not None:
            root = describe(model)[0].root  # an unsupported model is refused before any work is done
            if root not in _guarded:
                root.register_load_state_dict_pre_hook(_refuse_other_layout)
                _guarded.add(root)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        if state.global_step > 0:
            self._check_resumed(model, state)
            return
        if self._done and self._carries_own_record(model):
            return  # auto_find_batch_size starts the same run again
        _refuse_distributed(args)
        batches = self._calibration_batches(args, kwargs.get("train_dataloader"))
        self.plan = prune_model(
            model, batches, self.config, optimizer=kwargs.get("optimizer"), progress=state.is_local_process_zero and not args.disable_tqdm
        )
        self.record = None if describe(model)[0].record() is None else PrunedConfig.from_model(model)
        self._done = True
        if state.is_local_process_zero:
            tqdm.write(str(self.plan))
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self.plan.to_json(Path(args.output_dir) / PLAN_FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._done = False

    def _carries_own_record(self, model: nn.Module) -> bool:
        stored = describe(model)[0].record()
        return stored == (None if self.record is None else self.record.to_dict())

    def _check_resumed(self, model: nn.Module, state: TrainerState) -> None:
        """Refuse to go on where this callback did not begin, or with a model that was pruned otherwise than the checkpoint's."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) and saved else saved
        attributes = saved.get("attributes", {}) if isinstance(saved, dict) else {}
        if not attributes.get("_done"):
            raise SurgeryError(
                "The run that is resumed began without MPruneCallback, which prunes when a training begins. Load the model from the "
                "checkpoint's folder and start a new run with the callback, or resume without it."
            )
        record = attributes.get("_saved_record")
        host, _, stacks = describe(model)
        if record != host.record():
            raise SurgeryError(
                "The model was pruned otherwise than the one in the checkpoint that is resumed: their records differ. Load the model "
                f"from the checkpoint's own folder (from_pretrained reads the layout and {RECORD_KEY!r} from its config.json), then "
                "resume."
            )
        self.record = None if record is None else PrunedConfig.from_model(model)
        if self.record is not None and self.record.frozen:
            freeze_blocks(host, stacks, self.record.frozen)
        self._done = True

    def _calibration_batches(self, args: TrainingArguments, loader: DataLoader | None) -> Iterable[Any]:
        data = self.calibration
        if data is not None and not _is_dataset(data):
            return data
        if data is None:
            if loader is None:
                raise CalibrationError("There is no training data to compare blocks on. Give MPruneCallback(calibration=...).")
            data = loader.dataset
        return calibration_loader(data, getattr(loader, "collate_fn", None), args.train_batch_size, self.config)


def _refuse_other_layout(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Hook on the loading of weights, as when a checkpoint is resumed: blocks that a checkpoint lacks would stay random."""
    for name, stack in describe(module)[2].items():
        start = f"{prefix}{name}."
        held = {key[len(start) :].partition(".")[0] for key in state_dict if key.startswith(start)}
        if held and len(held) != len(stack):
            raise SurgeryError(
                f"The checkpoint that is loaded holds {len(held)} blocks in {name}, the model has {len(stack)}. Load the model from the "
                f"checkpoint's own folder (from_pretrained reads the layout and {RECORD_KEY!r} from its config.json), then resume."
            )


def calibration_loader(data: Dataset, collate: Any, batch_size: int, config: MPruneConfig) -> DataLoader:
    """A loader of its own over a random choice of samples, so that the training's sampler is not touched."""
    if not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        generator = torch.Generator().manual_seed(config.seed)
        data = Subset(data, torch.randperm(len(data), generator=generator)[: config.calibration_samples].tolist())
    return DataLoader(data, batch_size=batch_size, collate_fn=collate)


def _is_dataset(data: Any) -> bool:
    return isinstance(data, Dataset) or type(data).__module__.partition(".")[0] == "datasets"


def _refuse_distributed(args: TrainingArguments) -> None:
    if args.world_size > 1 or getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        raise SurgeryError(
            "MPruneCallback prunes in one process; this run has several, or shards the model. Call prune_model(model, dataloader, "
            "config) before the Trainer is made, with the same seed in every process, and leave the callback out."
        )
