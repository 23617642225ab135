"""Distillation in TRL's SFTTrainer, which asks the model for log-probabilities instead of logits: the loss against an
independent computation, step by step.
"""

from __future__ import annotations

import copy
from functools import partial

import datasets
import pytest
import torch
from torch.nn.functional import cross_entropy

from deeparc_hf import remove_blocks
from deeparc_hf.core.copies import independent_copy
from deeparc_hf.errors import ConfigError
from tests.publishing import tiny_tokenizer
from tests.trainers import arguments, pruning
from tests.zoo import ZOO

from .test_loss import LENGTHS, RATE, REMOVED, STACKS, Weights

trl = pytest.importorskip("trl")

# TRL's own defaults are given by a name that transformers has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
KEEP = [f"{STACKS['llama']}.{i}" for i in range(LENGTHS["llama"]) if i not in REMOVED["llama"]]


def completions(rows=32):
    """Prompts and completions of unequal lengths, so that means over batches are not means over tokens."""
    words = [f"w{1 + (7 * row) % 50}" for row in range(rows)]
    return datasets.Dataset.from_dict(
        {
            "prompt": [f"{word} w2" for word in words],
            "completion": [" ".join([" w3", word, *["w4"] * (row % 4)]) for row, word in enumerate(words)],
        }
    )


def sft(model, folder, callbacks, data=None, **settings):
    settings = {"bf16": False, "max_length": 16, "num_train_epochs": 1, "gradient_checkpointing": False} | settings
    args = arguments(folder, trl.SFTConfig, **settings)
    return trl.SFTTrainer(
        model,
        args,
        train_dataset=completions() if data is None else data,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


class Noting(trl.SFTTrainer):
    """Keeps the batches that the losses are computed of."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.noted.append({key: value.clone() for key, value in inputs.items()})
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def note(seen, who, module, args, output):
    seen[who] = output if torch.is_tensor(output) else output[0]


def reference(model, batches, distill, accumulation):
    """Stochastic gradient descent on the loss as it is defined, over all labels of an optimizer's step."""
    teacher, student = copy.deepcopy(model).eval(), copy.deepcopy(model)
    remove_blocks(student, {STACKS["llama"]: REMOVED["llama"]})
    student.train()
    optimizer, heat, after = torch.optim.SGD(student.parameters(), lr=RATE), distill["temperature"], []
    for start in range(0, len(batches), accumulation):
        group = batches[start : start + accumulation]
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)
        for batch in group:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            seen: dict[str, torch.Tensor] = {}
            hooks = [
                net.get_submodule(STACKS["llama"])[index].register_forward_hook(partial(note, seen, who))
                for who, net, index in (
                    ("student", student, REMOVED["llama"][0] - 1),
                    ("teacher", teacher, REMOVED["llama"][-1]),
                )
            ]
            ours = student(**inputs).logits[:, :-1]
            with torch.no_grad():
                theirs = teacher(**inputs).logits[:, :-1]
            for hook in hooks:
                hook.remove()
            labels = batch["labels"][:, 1:]
            kept = labels != -100
            p = (theirs[kept] / heat).softmax(-1)
            kl = (p * (p.log() - (ours[kept] / heat).log_softmax(-1))).sum(-1).sum() * heat**2
            far = (seen["student"] - seen["teacher"]).square().sum(-1) / seen["teacher"].square().sum(-1)
            far = far[batch["attention_mask"].bool()] if "attention_mask" in batch else far
            loss = (1 - distill["alpha"]) * cross_entropy(ours[kept], labels[kept], reduction="sum")
            loss = loss + distill["alpha"] * kl + distill["hidden"] * far.mean() * kept.sum()
            (loss / items).backward()
        optimizer.step()
        optimizer.zero_grad()
        after.append({key: value.detach().clone() for key, value in student.state_dict().items()})
    return after


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_each_step_is_that_of_the_loss_written_out_by_hand(tmp_path, packing, accumulation):
    """The loss is of the completions alone; packed, several texts share a row."""
    distill = {"alpha": 0.7, "temperature": 3.0, "hidden": 0.0 if packing else 0.4}
    model, weights = ZOO["llama"].model(), Weights()
    start = copy.deepcopy(model)
    callback = pruning(num_blocks=2, protect=KEEP, distill=distill, freeze="none")
    settings = {"packing": True, "packing_strategy": "wrapped"} if packing else {}
    trainer = sft(
        model,
        tmp_path,
        [callback, weights],
        completions(160 if packing else 32),
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        gradient_accumulation_steps=accumulation,
        **settings,
    )
    trainer.__class__, trainer.noted = Noting, []
    trainer.train()
    wanted = reference(start, trainer.noted, distill, accumulation)
    assert len(weights.after) == len(wanted) > 1
    for ours, theirs in zip(weights.after, wanted, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=2e-4, atol=2e-6)
    labels = torch.cat([batch["labels"].flatten() for batch in trainer.noted])
    assert packing or 0 < float((labels == -100).float().mean()) < 1


def test_what_the_trainer_logs_of_the_tokens_is_as_without_a_teacher(tmp_path):
    """Entropy and accuracy of the tokens come from the logits, whatever the loss is."""
    logged = {}
    for name, distill in (("taught", {"alpha": 1e-6}), ("plain", None)):
        callback = pruning(num_blocks=2, protect=KEEP, distill=distill, freeze="none")
        trainer = sft(
            ZOO["llama"].model(),
            tmp_path / name,
            [callback],
            learning_rate=1e-3,
            logging_strategy="steps",
            logging_steps=1,
        )
        trainer.train()
        logged[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged["taught"]) == len(logged["plain"]) > 2
    for taught, plain in zip(logged["taught"], logged["plain"], strict=True):
        for key in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert taught[key] == pytest.approx(plain[key], rel=1e-3, abs=1e-4), key


def test_half_precision_and_adapters(tmp_path):
    """TRL's own defaults: bfloat16 by autocast; and LoRA adapters, beneath which the blocks go."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)
    for name, model in {
        "whole": ZOO["llama"].model(),
        "adapters": peft.get_peft_model(ZOO["llama"].model(), lora),
    }.items():
        after = []
        for distill in ({"alpha": 0.9, "temperature": 2.0}, None):
            callback = pruning(num_blocks=2, protect=KEEP, distill=distill)
            trainer = sft(
                copy.deepcopy(model),
                tmp_path / name,
                [callback],
                bf16=True,
                gradient_checkpointing=True,
                learning_rate=1e-2,
            )
            trainer.train()
            trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
            after.append(torch.cat([parameter.detach().flatten() for parameter in trained]))
        assert all(bool(torch.isfinite(values).all()) for values in after)
        assert float((after[0] - after[1]).abs().max()) > 1e-4, name


def test_a_copy_of_a_model_with_a_fused_head_runs_by_itself(tmp_path):
    model = ZOO["llama"].model()
    sft(model, tmp_path, [])
    assert "forward" in vars(model)
    copied = independent_copy(model).eval()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        batch = {"input_ids": torch.tensor([[1, 2, 3]])}
        assert float(copied(**batch).logits.abs().max()) == 0 < float(model.eval()(**batch).logits.abs().max())


def test_losses_that_the_term_cannot_be_added_to_are_refused(tmp_path):
    callback = pruning(num_blocks=2, distill={})
    with pytest.raises(ConfigError, match="loss_type='dft'"):
        sft(ZOO["llama"].model(), tmp_path, [callback], loss_type="dft").train()


def test_other_trainers_that_fuse_their_head_are_refused(tmp_path):
    """The log-probabilities of a preference trainer are no loss to add to."""
    data = datasets.Dataset.from_dict(
        {"prompt": ["w1 w2"] * 16, "chosen": [" w3 w4"] * 16, "rejected": [" w5 w6"] * 16}
    )
    args = arguments(tmp_path, trl.DPOConfig, bf16=False, num_train_epochs=1, gradient_checkpointing=False)
    trainer = trl.DPOTrainer(
        ZOO["llama"].model(),
        ZOO["llama"].model(),
        args=args,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        callbacks=[pruning(num_blocks=2, distill={})],
    )
    with pytest.raises(ConfigError, match="no logits in this training"):
        trainer.train()
