"""Faults of WandaCallback that were found by trying, each as a test."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertModel, TrainerCallback

from deeparc_hf import MPruneCallback, PrunedConfig, WandaCallback, load_pruned, sparsify_model
from deeparc_hf.errors import ConfigError, DeepArcWarning, RecordError, SparsityError
from deeparc_hf.sparsity.adapters import merge_keeping_zeros
from deeparc_hf.trainer.sparsity_run import SparsityProgress
from tests.trainers import pruning, train
from tests.zoo import ZOO

from .test_resume import blocks, equal, scripted
from .test_wanda_callback import zeroing, zeros

GATE = {"num_blocks": 2, "start_epoch": 2, "max_drop": 0.1, "metric": "accuracy", "keep_snapshots": True}
STEPWISE = {"eval_strategy": "epoch", "save_strategy": "epoch", "learning_rate": 1e-3}


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def judged():
    """The first try at two blocks fails, the second one passes."""
    tries = []

    def accuracy(model):
        if blocks(model) == 4:
            return 0.9
        layer = model.bert.encoder.layer[1]
        if all(layer is not seen for seen in tries):
            tries.append(layer)
        return 0.1 if len(tries) == 1 else 0.88

    return accuracy


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_zeros_of_blocks_that_come_back_in_a_resumed_run_are_kept(tmp_path, order, sparse):
    def run(folder, resume=None):
        model = ZOO["bert"].model()
        if sparse:
            sparsify_model(model, ZOO["bert"].batches(2), progress=False)
        callbacks = [WandaCallback() if sparse else zeroing(start_epoch=1), pruning(**GATE, k_max=2)][::order]
        accuracy = {4: 0.9, 2: 0.1, 3: 0.1}
        train(
            model,
            folder,
            *callbacks,
            resume=resume,
            num_train_epochs=5,
            compute_metrics=scripted(model, accuracy),
            **STEPWISE,
        )
        return model

    whole = run(tmp_path / "whole")
    assert blocks(whole) == 4 and len(zeros(whole)) == 24
    for point in sorted((tmp_path / "whole").glob("checkpoint-*")):
        again = tmp_path / point.name
        shutil.copytree(tmp_path / "whole", again)
        resumed = run(again, str(again / point.name))
        assert equal(whole.state_dict(), resumed.state_dict()), point.name
        assert PrunedConfig.from_model(resumed).sparsity == PrunedConfig.from_model(whole).sparsity


def test_a_second_try_after_a_resume_keeps_its_zeros(tmp_path):
    def run(folder, resume=None):
        model = ZOO["bert"].model()
        accuracy = judged()
        callbacks = [pruning(**GATE, k_max=2), zeroing(start_epoch=1)]
        train(
            model,
            folder,
            *callbacks,
            resume=resume,
            num_train_epochs=5,
            compute_metrics=scripted(model, accuracy),
            **STEPWISE,
        )
        return model

    whole = run(tmp_path / "whole")
    assert blocks(whole) == 2 and all(mask.float().mean() == 0.5 for mask in zeros(whole).values())
    resumed = run(tmp_path / "whole", str(tmp_path / "whole" / "checkpoint-24"))
    assert all(mask.float().mean() == 0.5 for mask in zeros(resumed).values())


def test_parameters_that_were_all_replaced_are_a_violation(tmp_path):
    class Replace(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 10:
                for module in model.modules():
                    if isinstance(module, torch.nn.Linear):
                        module.weight = torch.nn.Parameter(torch.ones_like(module.weight))

    with pytest.raises(SparsityError):
        train(ZOO["bert"].model(), tmp_path, Replace(), zeroing())


def test_an_interrupted_pruning_does_not_stop_a_later_zeroing(tmp_path):
    model = ZOO["bert"].model()
    with pytest.raises(KeyboardInterrupt):
        gate = pruning(**{**GATE, "start_epoch": 1})
        train(
            model,
            tmp_path,
            gate,
            Interrupt(10),
            compute_metrics=scripted(model, {4: 0.9, 2: 0.9}),
            num_train_epochs=3,
            **STEPWISE,
        )
    train(model, tmp_path / "later", zeroing())
    assert zeros(model)


def test_an_interrupted_zeroing_does_not_prolong_a_later_pruning(tmp_path):
    model = ZOO["bert"].model()
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, zeroing(start_epoch=1), Interrupt(3))
    gate = pruning(**{**GATE, "start_epoch": 1})
    compute = scripted(model, {4: 0.9, 2: 0.9})
    trainer = train(model, tmp_path / "later", gate, compute_metrics=compute, num_train_epochs=6, **STEPWISE)
    assert trainer.state.global_step == 16


def test_an_optimizer_that_saves_other_weights_is_refused(tmp_path):
    class ScheduleFree(torch.optim.SGD):
        def eval(self):
            pass

        def train(self):
            pass

    from transformers import Trainer

    from tests.trainers import arguments, text_data

    model = ZOO["bert"].model()
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=text_data(), optimizers=(optimizer, None), callbacks=[zeroing()]
    )
    with pytest.raises(ConfigError, match="ScheduleFree trains one set of weights"):
        trainer.train()


def test_weights_that_are_swapped_for_an_evaluation_are_found_there(tmp_path):
    class Swap(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 12:
                model.bert.encoder.layer[0].output.dense.weight.data += 1
                control.should_evaluate = True

    with pytest.raises(SparsityError):
        train(ZOO["bert"].model(), tmp_path, Swap(), zeroing(), eval_strategy="steps", eval_steps=100)


def test_a_resume_with_other_settings_warns_and_the_report_tells_those_that_count(tmp_path):
    settings = {"save_strategy": "epoch", "num_train_epochs": 2}
    train(ZOO["bert"].model(), tmp_path, zeroing(sparsity=0.3), **settings)
    model = ZOO["bert"].model()
    with pytest.warns(DeepArcWarning, match=r"sparsity 0\.3 -> 0\.8\): what was zeroed stays as it is"):
        train(model, tmp_path, zeroing(sparsity=0.8), resume=str(tmp_path / "checkpoint-8"), **settings)
    assert all(abs(mask.float().mean() - 0.3) < 0.03 for mask in zeros(model).values())
    assert '"sparsity": 0.8' not in (tmp_path / "sparsity_report.json").read_text()


@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ctrl_c_and_a_resume_from_before_the_zeroing_in_one_process(tmp_path, both):
    def callbacks(*more):
        return [*([pruning(num_blocks=3, start_epoch=1)] if both else []), zeroing(start_epoch=2), *more]

    settings = {"save_strategy": "steps", "save_steps": 10, "num_train_epochs": 4}
    whole, model = ZOO["bert"].model(), ZOO["bert"].model()
    train(whole, tmp_path / "whole", *callbacks(), **settings)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "again", *callbacks(Interrupt(18)), **settings)
    model = model if not both else ZOO["bert"].model()
    train(model, tmp_path / "again", *callbacks(), resume=str(tmp_path / "again" / "checkpoint-10"), **settings)
    assert equal(whole.state_dict(), model.state_dict())


def test_a_checkpoint_by_steps_at_the_end_of_the_epoch_is_sparse(tmp_path):
    model = ZOO["bert"].model()

    def planted(prediction):
        return {"accuracy": 0.9 if blocks(model) == 4 and trainer_steps[0] <= 2 else 0.5}

    trainer_steps = [0]

    class Count(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            trainer_steps[0] += 1

    settings = {
        "save_strategy": "steps",
        "save_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 8,
        "load_best_model_at_end": True,
    }
    train(
        model,
        tmp_path,
        zeroing(start_epoch=1),
        Count(),
        compute_metrics=planted,
        metric_for_best_model="accuracy",
        **settings,
    )
    zeros(model)
    assert zeros(AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8"))


def test_the_last_checkpoint_of_a_training_that_ends_with_the_zeroing_is_sparse(tmp_path):
    train(ZOO["bert"].model(), tmp_path, zeroing(start_epoch=2), save_strategy="steps", save_steps=8)
    assert zeros(AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-16"))


@pytest.mark.parametrize("kind", ["zero matrix", "zeros without a record"])
def test_zeros_that_nobody_chose_are_free_to_be_trained(tmp_path, kind):
    model = ZOO["bert"].model()
    name = "bert.encoder.layer.1.output.dense"
    if kind == "zero matrix":
        torch.nn.init.zeros_(model.get_submodule(name).weight)
    else:
        sparsify_model(model, method="magnitude", progress=False)
        del model.config.pruning_config
    train(model, tmp_path, zeroing(sparsity=0.3), learning_rate=1e-3)
    listed = PrunedConfig.from_model(model).sparsity["matrices"][name]
    assert int((model.get_submodule(name).weight == 0).sum()) == listed["zeros"] < 0.31 * listed["size"]


def test_a_zero_matrix_of_a_downloaded_checkpoint_is_trained_where_it_was_not_chosen(tmp_path):
    model = ZOO["bert"].model()
    weight = model.bert.encoder.layer[1].output.dense.weight
    torch.nn.init.zeros_(weight)
    sparsify_model(model, method="magnitude", progress=False)
    train(model, tmp_path, WandaCallback(), learning_rate=1e-3)
    assert (weight == 0).float().mean() == 0.5


def test_adapters_on_a_classifier_of_a_sparse_headless_model(tmp_path):
    peft = pytest.importorskip("peft")
    headless = BertModel(ZOO["bert"].model().config)
    sparsify_model(headless, method="magnitude", progress=False)
    headless.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    merged = merge_keeping_zeros(
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    )
    assert all(mask.float().mean() == 0.5 for mask in zeros(_with_own_names(merged)).values())
    whole = peft.LoraConfig(target_modules=["query"], modules_to_save=["value"])
    with pytest.raises(SparsityError, match="modules_to_save"):
        merge_keeping_zeros(peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path), whole))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model.config.pruning_config["sparsity"] = []
    with pytest.raises(RecordError, match="sparsity must be"):
        merge_keeping_zeros(peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"])))


def _with_own_names(model):
    model.config.pruning_config = PrunedConfig.from_model(model).to_dict()
    return model


def test_the_order_of_the_callbacks_does_not_matter_behind_a_gate(tmp_path):
    steps = []
    for order in (1, -1):
        model = ZOO["bert"].model()
        callbacks = [pruning(**{**GATE, "start_epoch": 1}), zeroing(start_epoch=2)]
        compute = scripted(model, {4: 0.9, 2: 0.88})
        train(
            model, tmp_path / str(order), *callbacks[::order], compute_metrics=compute, num_train_epochs=4, **STEPWISE
        )
        steps.append(json.loads((tmp_path / str(order) / "sparsity_report.json").read_text())["step"])
    assert steps == [16, 16]


def test_zeros_of_the_base_are_what_load_pruned_brings(tmp_path):
    model = ZOO["bert"].model()
    sparsify_model(model, ZOO["bert"].batches(2), sparsity=0.3, progress=False)
    model.save_pretrained(tmp_path / "base")
    other = ZOO["bert"].model()
    train(other, tmp_path / "pruned", pruning(num_blocks=3))
    loaded = load_pruned(AutoModelForSequenceClassification, tmp_path / "base", PrunedConfig.from_model(other))
    assert len(zeros(loaded)) == 18
    train(loaded, tmp_path / "on", WandaCallback())
    assert all(mask.float().mean() < 0.31 for mask in zeros(loaded).values())


def test_pruning_alone_warns_of_zeros_and_leaves_them_out_of_the_record(tmp_path):
    model = ZOO["bert"].model()
    sparsify_model(model, method="magnitude", progress=False)
    with pytest.warns(DeepArcWarning, match=r"add WandaCallback\(\)"):
        train(model, tmp_path, pruning(num_blocks=3))
    assert PrunedConfig.from_model(model).sparsity is None


def test_only_keeping_stays_only_keeping_over_a_resume(tmp_path):
    model = ZOO["bert"].model()
    sparsify_model(model, method="magnitude", sparsity=0.3, progress=False)
    callback = WandaCallback(keep_zeros=False)
    train(model, tmp_path, callback, save_strategy="epoch")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    callback = WandaCallback(keep_zeros=False)
    train(again, tmp_path, callback, resume=str(tmp_path / "checkpoint-8"))
    assert callback.report is None and equal(model.state_dict(), again.state_dict())


def test_callbacks_are_copied_and_pickled_without_their_training(tmp_path):
    callbacks = [zeroing(), MPruneCallback(num_blocks=3, retrain_epochs=1)]
    train(ZOO["bert"].model(), tmp_path, *callbacks)
    for callback in callbacks:
        for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):  # noqa: S301
            assert twin.config == callback.config and twin.state()["attributes"]["saved_progress"] is None
        assert callback.state()["attributes"]["saved_progress"] is not None


@pytest.mark.parametrize("change", [{"phase": "?"}, {"report": {}}, {"report": 3}, {"measured": None}, {"more": 1}])
def test_a_state_that_nobody_wrote_is_refused(change):
    with pytest.raises(RecordError, match="does not tell what was zeroed"):
        SparsityProgress.from_dict({**SparsityProgress().to_dict(), **change})


def test_zeroing_that_would_wait_past_the_end_is_refused_before_any_step(tmp_path):
    model = ZOO["bert"].model()
    gate = pruning(**{**GATE, "start_epoch": 1, "retrain_epochs": 2})
    compute = scripted(model, {4: 0.9, 2: 0.9})
    with pytest.raises(ConfigError, match="after 3 epochs at the earliest, and the training has 3"):
        train(model, tmp_path, zeroing(start_epoch=2), gate, compute_metrics=compute, num_train_epochs=3, **STEPWISE)


def test_the_terminal_tells_what_is_planned_and_where_the_reports_are(tmp_path, capsys):
    train(ZOO["bert"].model(), tmp_path, zeroing(start_epoch=1), pruning(num_blocks=3))
    printed = capsys.readouterr().out
    assert "Zeroing: wanda, 50 %, after 1 epochs (of the training's 2)." in printed
    assert f"Zeros are kept in 18 matrices. Report: {tmp_path / 'sparsity_report'}.md" in printed
    assert "Weights were zeroed at step 8" in (tmp_path / "pruning_report.md").read_text()


def test_fewer_zeros_than_there_are_say_so():
    model = ZOO["bert"].model()
    sparsify_model(model, method="magnitude", progress=False)
    assert "Zeros that were there before stay" in str(
        sparsify_model(model, method="magnitude", sparsity=0.3, progress=False)
    )


def test_zeros_that_are_not_kept_are_reported_so(tmp_path):
    train(ZOO["bert"].model(), tmp_path, zeroing(keep_zeros=False))
    assert "the model at the end is dense" in (tmp_path / "sparsity_report.md").read_text()
