"""The sequence of an experiment: fine-tune, prune and retrain in iterations, zero weights, measure, make the card."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
import shutil
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

from deeparc_hf.core.distributed import gather
from deeparc_hf.core.files import write_whole
from deeparc_hf.core.plain_text import did_you_mean
from deeparc_hf.core.progress_bars import shows_bars
from deeparc_hf.errors import ConfigError
from deeparc_hf.observe.calibration import Calibration, chosen_rows
from deeparc_hf.pruning.config import MPruneConfig
from deeparc_hf.pruning.plan import PruningPlan
from deeparc_hf.publish import create_model_card
from deeparc_hf.publish.gather import PLAN_FILE, SPARSITY_FILE
from deeparc_hf.publish.push import push_to_hub
from deeparc_hf.reports.plan_report import Measurement, timed_evaluation, write_report
from deeparc_hf.reports.provenance import TIMES, origin_of, training_settings
from deeparc_hf.reports.run_report import structure_of
from deeparc_hf.search.prune import analyze, apply_healed
from deeparc_hf.sparsity.config import WandaConfig
from deeparc_hf.sparsity.sparsify import sparsify_model
from deeparc_hf.trainer import MPruneCallback, WandaCallback
from deeparc_hf.trainer.follow_checkpoint import Structure, record_of
from deeparc_hf.trainer.gate import metric_of

from .arguments import METRIC, DataArguments, PruningArguments
from .journal import JOURNAL, Clock, Journal, folder_of, newest_checkpoint
from .recovery import Taught, adapted, healings_in, merged
from .results import RESULTS, TEXTS, Measured, Row, Speed, whereabouts, write_evaluations, write_results
from .splits import Splits

__all__ = ["Experiment"]

logger = logging.getLogger(__name__)

TOLD = "card.json"
_OF_THE_CARD = ("repo_id", "repo_private", "license", "language")
# arguments of a Trainer that change no figure, by how their names begin
_NO_MATTER = (
    *("output_dir", "resume_from", "save_", "logging_", "log_", "report_to", "run_name", "project", "trackio", "hub_"),
    *("push_to", "disable_tqdm", "dataloader_num_workers", "dataloader_pin", "dataloader_persistent", "restore_call"),
    *("local_rank", "ddp_timeout", "do_", "n_gpu"),
)
ORIGINAL, SCRATCH, TURNS = "original", "_scratch", 5
REMOVED = ", removed"  # ends the name of a removal that is a row of its own


@dataclass
class Experiment:
    """One experiment.

    Attributes:
        data, pruning: model and data, and what is done to the model.
        training: the Trainer's arguments; epochs and output folders are set for each training.
        load: a model by Hub id or folder.
        trainer: makes a Trainer of `model`, `args` and `callbacks`, with the training and validation data.
        splits: the data as the Trainer takes it. The tables are measured on the test data; nothing is decided on it.
        calibration: data to compare blocks on and to zero weights by, a part or a view of the training data; default:
            the training data.
        measure: metrics of a Trainer's model on the test data; default: Trainer.evaluate. The same work is timed.
        timed: the part of `measure` that is timed, where it is not all of it.
        provenance: how it was asked for (`provenance.provenance`), for the report; its command is for the card too.
        notes: sentences beneath the table, after those about the splits.
        average_tokens: whether the model's loss follows the number of tokens of all processes. Where it does not, the
            Trainer would multiply it by their number (`average_tokens_across_devices`).
        known: the metrics that an evaluation gives, beside the loss; what the gate judges by must be one of them.
        once: more about a Trainer's model, measured once and not timed: metrics, those of other data too, and texts.
        sections: sections of results.md, by the texts of each row that has any.
        finish: called with the rows in the end, in the first process.
        taught: makes the Trainer of a retraining in place of `trainer`, given the original first: where it lies, or
            its Hub id.
    """

    data: DataArguments
    pruning: PruningArguments
    training: TrainingArguments
    load: Callable[[str], nn.Module]
    trainer: Callable[..., Trainer]
    splits: Splits
    measure: Callable[[Trainer], Measured] | None = None
    calibration: Any = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    average_tokens: bool = False
    known: Collection[str] = ()
    once: Callable[[Trainer], Measured] | None = None
    sections: Callable[[Mapping[str, list[dict[str, str]]]], list[str]] = lambda texts: []
    finish: Callable[[list[Row]], None] = lambda rows: None
    taught: Callable[..., Trainer] | None = None
    timed: Callable[[Trainer], Any] | None = None

    def run(self) -> list[Row]:
        """Run it all. The output folder gets results.md and .json, the models, and the last one's card; its end says
        where they are.
        """
        journal = self._journal
        gather(lambda: None)  # until every process has looked for an earlier experiment
        journal.write()  # before any training: what a checkpoint was trained with must be known to go on from it
        rows = [self._done(ORIGINAL, self._original)]
        for iteration in range(self.pruning.iterations):
            made = self._steps(iteration, f"iteration {iteration + 1}", rows[-1], rows[0])
            rows += made
            if not made:
                break
        self.notes += [f"{name}: {why}; the table ends before it." for name, why in journal.ends.items()]
        last = rows[-1]
        if last is not rows[0] and last.name not in journal.speeds:
            journal.speeds[last.name] = self._speed(rows[0], last)
            journal.write()
        speeds = journal.speeds
        dense = [row for row in rows if not row.name.endswith(REMOVED)]
        for row in dense[0 if self.pruning.sparsity_original else 1 :]:
            for config in self.pruning.grid():
                rows += self._sparse(row, config)
        if self._main and (not journal.complete or self.data.repo_id is not None or self._told_otherwise(last)):
            shutil.rmtree(self._out / SCRATCH, ignore_errors=True)
            for folder in self._out.iterdir():  # those that a Trainer made and nothing was saved to
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            facts, judged = origin_of(self._test), "same as" in self.splits.sources.get("test", {})
            texts = self._texts(rows)
            for row in [row for row in rows if row.folder is not None]:
                told = {"judged": judged, "answers": _beside(texts, rows[0].name, row.name)}
                told["training"] = self._training_of(row)
                write_evaluations(self._out / row.folder, row, rows[0], facts, speeds.get(row.name), **told)
            # figures are kept whatever happens then; a sweep counts an experiment as done when all of it is
            known = {"notes": self.notes, "ends": journal.ends, "sections": self.sections(texts)}
            write_results(self._out, rows, speeds, {**self._facts(), "complete": False}, **known)
            self._publish(last)
            self.finish(rows)
            write_results(self._out, rows, speeds, {**self._facts(), "complete": True}, **known)
            journal.complete = True
            journal.write()
        if self._main:
            sys.stdout.write(
                f"\n{whereabouts(self._out, rows, self.data.repo_id if last.folder is not None else None)}\n"
            )
        return rows

    def __post_init__(self) -> None:
        self.notes = [*self.splits.notes, *self.notes]
        self._test = self.splits.test
        if self.training.push_to_hub:
            raise ConfigError(
                "push_to_hub would publish every model of the experiment. Give repo_id: the last one is published "
                "there."
            )
        if self.training.num_train_epochs != TrainingArguments.num_train_epochs or self.training.max_steps > 0:
            raise ConfigError(
                "finetune_epochs and retrain_epochs say how long the trainings are. Leave num_train_epochs, max_steps "
                "out."
            )
        named = (self.pruning.metric or "loss").removeprefix("eval_")
        if self.known and named not in {"loss", *self.known}:
            raise self._no_metric([*self.known, "loss"])
        if self.data.repo_id is not None and self.pruning.finetune_epochs == self.pruning.iterations == 0:
            raise ConfigError(
                "repo_id publishes the last model, and with finetune_epochs and iterations 0 none is made. Leave one "
                "out."
            )
        self._journal = Journal(self._out, self._asked(), self._main)
        self._resumes = self._goes_on()

    def _goes_on(self) -> bool:
        """Whether this experiment goes on with what lies in the output folder.

        Raises:
            ConfigError: if that is another one, or it was not said that it shall go on.
        """
        given = str(self.training.resume_from_checkpoint or "false")
        says_so = given.lower() in ("true", "false")
        if not says_so and Path(given).resolve() != self._out.resolve():
            raise ConfigError(
                f"resume_from_checkpoint={given} is not the experiment's folder. Say resume_from_checkpoint=true: what "
                f"lies in output_dir ({self._out}) goes on where it stood."
            )
        goes_on = given.lower() != "false"
        if goes_on and self._journal.read():
            return True
        how = (
            f"There is no {JOURNAL}, so where it stood is not known. Give"
            if goes_on
            else ("To go on with it, say --resume_from_checkpoint true; else give")
        )
        for pattern in (JOURNAL, f"{RESULTS}.json", *(f"{name}*/*" for name in (ORIGINAL, "iteration-"))):
            for earlier in filter(Path.is_file, self._out.glob(pattern)):
                raise ConfigError(
                    f"{self._out} holds {earlier.relative_to(self._out)} of an earlier experiment. {how} another "
                    "output_dir, or delete that folder."
                )
        return False

    # ---- steps ----

    def _original(self) -> Row:
        folder, seconds = None, None
        epochs: dict[str, tuple[float, ...]] = {}
        trainer = self._trainer(None, ORIGINAL, self.pruning.finetune_epochs or 1)
        self._journal.revision = getattr(getattr(trainer.model, "config", None), "_commit_hash", None)
        if self.pruning.finetune_epochs > 0:
            seconds, epochs = self._train(trainer)
            folder = self._save(trainer)
        return self._row(ORIGINAL, trainer, training_seconds=seconds, **epochs, folder=folder)

    def _done(self, name: str, work: Callable[[], Row]) -> Row:
        row = self._journal.row(name, work)
        assert row is not None
        return row

    def _steps(self, iteration: int, name: str, before: Row, original: Row) -> list[Row]:
        """The rows of one iteration; none where nothing could be removed, or everything was taken back."""
        if not self.pruning.in_stages:
            row = self._journal.row(name, partial(self._iteration, iteration, name, before, original))
            return [] if row is None else [row]
        early = f"{name}{REMOVED}"
        removed = self._journal.row(early, partial(self._removal, iteration, early, before))
        if removed is None:
            return []
        return [removed, self._done(name, partial(self._recovered, name, before, removed, original))]

    def _iteration(self, iteration: int, name: str, before: Row, original: Row) -> Row | None:
        """One pruning and its retraining; None where nothing could be removed, or everything was taken back."""
        if self.pruning.retrain_epochs == 0:
            return self._removal(iteration, name, before)
        baseline = None
        if self.pruning.max_drop is not None:
            # of the original, on the data that judges: drops must not add up over the iterations
            baseline = self._judged(self._trainer(original, SCRATCH))
        config = self.pruning.pruning(iteration, baseline, before.blocks)
        callback = MPruneCallback(config, calibration=self.calibration)
        tries = 1 if self.pruning.max_drop is None else self.pruning.k_max - self.pruning.k + 1  # of a search as many
        trainer = self._trainer(before, name, self.pruning.retrain_epochs * tries, callback)
        _, epochs = self._train(trainer)
        standing = [attempt for attempt in callback.attempts[1:] if attempt.get("decision") == "accepted"]
        if not standing:
            return self._nothing(
                name, "every pruning was taken back" if len(callback.attempts) > 1 else "nothing could be removed"
            )
        attempt = standing[-1]
        return self._row(
            name,
            trainer,
            frozen=sum(map(len, attempt["frozen"].values())),
            threshold=_only(attempt["thresholds"].values()),
            k=attempt["k"],
            training_seconds=attempt["training_seconds"],
            **{name: values[-self.pruning.retrain_epochs :] for name, values in epochs.items()},
            folder=self._save(trainer),
            verdict=None if self.pruning.max_drop is None else "accepted",
        )

    def _removal(self, iteration: int, name: str, before: Row) -> Row | None:
        """One pruning without a retraining; None where nothing could be removed."""
        trainer = self._trainer(before, name)
        config, bars = self.pruning.pruning(iteration, lengths=before.blocks), shows_bars(trainer.args)
        calibration = Calibration(self._batches(trainer, config), config.calibration_samples)
        measured: dict[str, Any] = {}
        if config.objective == METRIC:
            judge = partial(self._judged_copy, name)
            larger = metric_of(config.replace(metric=self._metric), trainer.args)[1]
            measured = {"evaluate": judge, "greater_is_better": larger}
        plan = analyze(trainer.model, calibration, config, progress=bars, **measured)
        if not plan.removed:
            return self._nothing(name, "nothing could be removed")
        _, healings = apply_healed(trainer.model, plan, calibration, progress=bars)
        threshold = _only(stack.threshold for stack in plan.stacks.values())
        folder = self._save(trainer)
        row = self._row(name, trainer, threshold=threshold, k=config.k, folder=folder)
        if self._main:
            plan.to_json(self._out / folder / PLAN_FILE)
            rows = [_measurement("before", before), _measurement("removed", row)]
            write_report(self._out / folder, plan, rows, healings=healings)
        return row

    def _recovered(self, name: str, before: Row, removed: Row, original: Row) -> Row:
        """The retraining after a removal, as a training of its own."""
        taught = []
        if (teaching := self.pruning.pruning(0).distill) is not None:
            taught.append(Taught(self.load(self._place(original)), teaching))
        facts = {"threshold": removed.threshold, "k": removed.k}
        row = self._retrained(name, self.load(self._place(removed)), *taught, **facts)
        if self._main:
            assert removed.folder is not None and row.folder is not None
            early, folder = self._out / removed.folder, self._out / row.folder
            plan = PruningPlan.from_json(early / PLAN_FILE)
            plan.to_json(folder / PLAN_FILE)
            measured = [_measurement(*each) for each in (("before", before), ("removed", removed), ("retrained", row))]
            write_report(folder, plan, measured, healings=healings_in(early))
        return row

    def _retrained(self, name: str, model: nn.Module, *callbacks: TrainerCallback, **facts: Any) -> Row:
        """A training of a model that is given: of what is not frozen, or of adapters that are merged in the end."""
        model = adapted(model, self.pruning, self.training.seed)
        trainer = self._trainer(None, name, self.pruning.retrain_epochs, *callbacks, model=model, retrains=True)
        record, frozen = record_of(model), 0
        if self.pruning.freeze != "none" and record is not None:
            Structure(record, record.frozen).freeze(trainer.model)
            frozen = sum(map(len, record.frozen.values()))
        seconds, epochs = self._train(trainer)
        folder = self._save(trainer) if self.pruning.lora_rank is None else self._save_merged(trainer)
        if self.pruning.lora_rank is not None:
            trainer = self._trainer(None, SCRATCH, model=self.load(str(self._out / folder)))
        return self._row(name, trainer, frozen=frozen, training_seconds=seconds, **epochs, folder=folder, **facts)

    def _save_merged(self, trainer: Trainer) -> str:
        folder, whole = Path(trainer.args.output_dir), merged(trainer.model)
        if self._main:
            whole.save_pretrained(folder)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
        trainer.accelerator.wait_for_everyone()
        return folder.name

    def _nothing(self, name: str, why: str) -> None:
        self._journal.ends[name] = why

    def _sparse(self, row: Row, config: WandaConfig) -> Iterator[Row]:
        """One share of the Wanda grid on one model: right after the zeroing, and retrained where that was asked for."""
        name = f"{row.name}, {config.pattern or f'{100 * config.sparsity:g} %'} zeros"
        yield self._done(name, partial(self._zeroed, row, config, name))
        if config.sparsity in self.pruning.sparsity_retrain:
            name = f"{name}, retrained"
            yield self._done(name, partial(self._sparse_retrained, row, config, name))

    def _zeroed(self, row: Row, config: WandaConfig, name: str) -> Row:
        trainer = self._trainer(row, SCRATCH)
        batches, bars = self._batches(trainer, config), shows_bars(trainer.args)
        report = sparsify_model(trainer.model, batches, config, progress=bars)
        facts = {"frozen": row.frozen, "threshold": row.threshold, "k": row.k}
        return self._row(name, trainer, **facts, sparsity=report.measured)

    def _sparse_retrained(self, row: Row, config: WandaConfig, name: str) -> Row:
        if self.pruning.lora_rank is not None:
            trainer = self._trainer(row, SCRATCH)
            report = sparsify_model(trainer.model, self._batches(trainer, config), config, progress=False)
            facts = {"sparsity": report.measured, "threshold": row.threshold, "k": row.k}
            retrained = self._retrained(name, trainer.model, **facts)
            if self._main and retrained.folder is not None:
                text = json.dumps(report.to_dict(), indent=1) + "\n"
                write_whole(self._out / retrained.folder / SPARSITY_FILE, text)
            return retrained
        callback = WandaCallback(config, calibration=self.calibration)
        trainer = self._trainer(row, name, self.pruning.retrain_epochs, callback)
        if row.frozen and (record := record_of(trainer.model)) is not None:  # as in the retraining before it
            Structure(record, record.frozen).freeze(trainer.model)
        seconds, epochs = self._train(trainer)
        share = None if callback.report is None else callback.report.measured
        trained = {"training_seconds": seconds, **epochs, "folder": self._save(trainer)}
        return self._row(name, trainer, frozen=row.frozen, sparsity=share, **trained)

    def _speed(self, original: Row, last: Row) -> Speed:
        """Time both models in turns: what disturbs one disturbs the other."""
        works = []
        for row in (original, last):
            works.append(self._timed_work(self._trainer(row, SCRATCH)))
            works[-1]()  # warm
        ratios = []
        for turn in range(TURNS):
            times = [0.0, 0.0]
            for index in (0, 1) if turn % 2 == 0 else (1, 0):
                times[index] = timed_evaluation(works[index], repeats=1, warmup=0).seconds
            ratios.append(times[1] / times[0])
        share = sum(last.blocks.values()) / sum(original.blocks.values())
        return Speed(statistics.median(ratios), min(ratios), max(ratios), share, TURNS)

    def _publish(self, row: Row) -> None:
        """The card of the last model, beside its checkpoint, and the push that was asked for."""
        if row.folder is None:
            if self.data.repo_id is not None:
                self.notes.append("Nothing was published: no model was made.")
                logger.warning(self.notes[-1])
            return
        folder = self._out / row.folder
        told = {name: getattr(self.data, name) for name in ("license", "language")}
        told["command"] = self.provenance.get("command")
        dataset = None if self.data.train_file is not None else self.data.dataset  # local files stand for it
        if dataset is not None and not Path(dataset).exists():  # cards name no local paths
            told["dataset_tags"] = dataset
        if not Path(self.data.model).exists():
            told["finetuned_from"] = self.data.model
        create_model_card(folder, repo_id=self.data.repo_id, **told)
        # to make it again
        write_whole(folder / TOLD, json.dumps({"repo_id": self.data.repo_id, **told}, indent=1) + "\n")
        if self.data.repo_id is not None:
            push_to_hub(folder, self.data.repo_id, private=self.data.repo_private or None, **told)

    # ---- helpers ----

    def _told_otherwise(self, row: Row) -> bool:
        """Whether a licence or language is given that the card does not have yet."""
        if row.folder is None:
            return False  # and there is no card
        file = self._out / row.folder / TOLD
        known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return any(getattr(self.data, name) not in (None, known.get(name)) for name in ("license", "language"))

    @property
    def _out(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def _main(self) -> bool:
        return self.training.process_index == 0

    def _place(self, row: Row | None) -> str:
        """Where the model of a row lies (None: the model that is given)."""
        return self.data.model if row is None or row.folder is None else str(self._out / row.folder)

    def _trainer(
        self,
        row: Row | None,
        name: str,
        epochs: float = 1,
        *callbacks: TrainerCallback,
        model: nn.Module | None = None,
        retrains: bool = False,
    ) -> Trainer:
        """A Trainer of the model of a row (None: of the one that the experiment begins with), or of another one, with a
        folder of its own.
        """
        folder = self._out / folder_of(name)
        evaluates = "epoch" if self.training.eval_strategy == "no" else self.training.eval_strategy
        settings = {"eval_strategy": evaluates, "average_tokens_across_devices": self.average_tokens}
        settings["resume_from_checkpoint"] = None  # each training is told its own
        args = dataclasses.replace(self.training, output_dir=str(folder), num_train_epochs=epochs, **settings)
        clock = Clock([self._metric] if self.pruning.metric else ["eval_accuracy", "eval_loss"])
        make = self.trainer
        if (callbacks or retrains) and self.taught is not None:
            tuned = self.pruning.finetune_epochs > 0
            make = partial(self.taught, str(self._out / ORIGINAL) if tuned else self.data.model)
        # first of all, so that it measures a model before a gate takes it back
        model = self.load(self._place(row)) if model is None else model
        return make(model=model, args=args, callbacks=[clock, *callbacks])

    def _train(self, trainer: Trainer) -> tuple[float, dict[str, tuple[float, ...]]]:
        """Train; time of the training in s, evaluations left out, and the main metric after each epoch: of the
        validation data, and of the test data where that was asked for.
        """
        clock = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Clock))
        clock.test = partial(self._tested, trainer) if self.pruning.test_each_epoch else None
        checkpoint = newest_checkpoint(Path(trainer.args.output_dir)) if self._resumes else None
        if checkpoint is not None:
            clock.resume(checkpoint)
            if self._main:
                sys.stdout.write(f"{checkpoint.parent.name}: goes on from {checkpoint.name}\n")
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        clock.test = None
        return clock.seconds, {"validation": tuple(clock.values), "tested": tuple(clock.tested)}

    def _tested(self, trainer: Trainer) -> Mapping[str, float]:
        """Metrics on the test data. `predict` and not `evaluate`: no callback takes them for an evaluation."""
        found = trainer.predict(self._test, metric_key_prefix="eval").metrics
        return found or {}

    def _save(self, trainer: Trainer) -> str:
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        return Path(trainer.args.output_dir).name

    def _row(self, name: str, trainer: Trainer, **facts: Any) -> Row:
        """The row of a Trainer's model: structure, metrics on the test data, and the warm time of measuring them."""
        work = self._work(trainer)
        measured = work()
        if self.once is not None:
            measured = measured.with_more(self.once(trainer))
        if measured.texts and self._main:
            lines = [json.dumps(pair, ensure_ascii=False) for pair in measured.texts]
            (self._out / TEXTS).mkdir(parents=True, exist_ok=True)
            write_whole(self._out / TEXTS / f"{folder_of(name)}.jsonl", "\n".join(lines) + "\n")
        timing = timed_evaluation(self._timed_work(trainer), repeats=self.pruning.repeats, warmup=0)
        measured = dataclasses.replace(measured, seconds=timing.seconds)
        gc.collect()
        return Row(name, **structure_of(trainer.model), measured=measured, **facts)

    def _texts(self, rows: Sequence[Row]) -> dict[str, list[dict[str, str]]]:
        """What was generated, by row."""
        files = {row.name: self._out / TEXTS / f"{folder_of(row.name)}.jsonl" for row in rows}
        kept = {name: file.read_text("utf-8").splitlines() for name, file in files.items() if file.is_file()}
        return {name: [json.loads(line) for line in lines] for name, lines in kept.items()}

    def _work(self, trainer: Trainer) -> Callable[[], Measured]:
        if self.measure is not None:
            return partial(self.measure, trainer)
        return lambda: Measured.of_metrics(trainer.evaluate(self._test, metric_key_prefix="test"), len(self._test))

    def _timed_work(self, trainer: Trainer) -> Callable[[], Any]:
        return self._work(trainer) if self.timed is None else partial(self.timed, trainer)

    @property
    def _metric(self) -> str:
        """The metric that judges, as the evaluation names it."""
        return f"eval_{(self.pruning.metric or 'loss').removeprefix('eval_')}"

    def _judged(self, trainer: Trainer) -> float:
        metrics = trainer.evaluate()
        if self._metric not in metrics:
            known = sorted(
                key.removeprefix("eval_") for key in metrics if key.startswith("eval_") and not key.endswith(TIMES)
            )
            raise self._no_metric(known)
        return float(metrics[self._metric])

    def _judged_copy(self, name: str, model: nn.Module) -> float:
        """The metric of a model that a search has made, on the data that judge."""
        return self._judged(self._trainer(None, name, model=model))

    def _no_metric(self, known: Sequence[str]) -> ConfigError:
        hint = did_you_mean(str(self.pruning.metric), known)
        return ConfigError(
            f"metric={self.pruning.metric!r} is not among the metrics of the evaluation: {', '.join(known)}.{hint}"
        )

    def _batches(self, trainer: Trainer, config: MPruneConfig | WandaConfig) -> Iterable[Any]:
        """Batches of randomly chosen samples, collated as for a training; one can go through them again and again, and
        they are the same in each process.
        """
        loader = trainer.get_train_dataloader()
        data = loader.dataset if self.calibration is None else self.calibration
        chosen = Subset(data, chosen_rows(len(data), config.calibration_samples, config.seed))
        return DataLoader(chosen, batch_size=trainer.args.train_batch_size, collate_fn=loader.collate_fn)

    def _training_of(self, row: Row) -> dict[str, Any] | None:
        """Settings of the training that led to a row; None where there was none."""
        if not row.training_seconds:
            return None
        epochs = self.pruning.finetune_epochs if row.name == ORIGINAL else self.pruning.retrain_epochs
        found = {**training_settings(self.training), "epochs": epochs}
        if row.name != ORIGINAL:
            known = {"lora_rank": self.pruning.lora_rank, "weight_of_the_teacher": self.pruning.distill_alpha}
            found |= {name: value for name, value in known.items() if value is not None}
        return found

    def _asked(self) -> dict[str, Any]:
        """What the figures depend on, as it was given. Folders and files are told apart by a hash of their paths: no
        report names a place of one machine.
        """
        data = {name: value for name, value in dataclasses.asdict(self.data).items() if name not in _OF_THE_CARD}
        training = {
            name: value for name, value in self.training.to_sanitized_dict().items() if not name.startswith(_NO_MATTER)
        }
        own = {name: dict(self.provenance.get(name) or {}) for name in ("settings", "data", "metrics")}
        own["settings"] = {name: value for name, value in own["settings"].items() if name not in _OF_THE_CARD}
        given = {"model": data, "trainer": {**training, "processes": self.training.world_size}}
        hashed = {part: {name: _hashed(value) for name, value in each.items()} for part, each in given.items()}
        return {**own, **hashed, "pruning": dataclasses.asdict(self.pruning)}

    def _facts(self) -> dict[str, Any]:
        return {
            **{key: value for key, value in self.provenance.items() if key != "settings"},
            "model": self.data.model if not Path(self.data.model).exists() else Path(self.data.model).name,
            "model revision": self._journal.revision,
            "settings": self.provenance.get("settings"),
            "pruning": dataclasses.asdict(self.pruning),
            # epochs are of pruning
            "training": {key: value for key, value in training_settings(self.training).items() if key != "epochs"},
            "test data": origin_of(self._test),
        }


def _hashed(value: Any) -> Any:
    if isinstance(value, str) and value and Path(value).exists():
        return hashlib.sha256(str(Path(value).resolve()).encode()).hexdigest()
    return value


def _beside(texts: Mapping[str, list[dict[str, str]]], original: str, name: str) -> list[dict[str, str]]:
    """The answers of a model beside those of the original, of texts that were prompted for."""
    if name == original or original not in texts or name not in texts:
        return []
    pairs = zip(texts[original], texts[name], strict=True)
    return [{**now, "before": then["generated"]} for then, now in pairs if "prompt" in now]


def _only(values: Iterable[float]) -> float | None:
    """The value that all of them are; None if they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _measurement(label: str, row: Row) -> Measurement:
    metrics = row.measured.metrics
    return Measurement(
        label,
        blocks=sum(row.blocks.values()),
        parameters=row.parameters,
        accuracy=metrics.get("accuracy"),
        samples=row.measured.samples,
        evaluation_loss=metrics.get("loss"),
        evaluation_seconds=row.measured.seconds,
        training_seconds=row.training_seconds,
        threshold=row.threshold,
        k=row.k,
    )
