"""Distillation in a stock Trainer: the loss against an independent computation, step by step, and what happens around
it.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback

from deeparc_hf import remove_blocks
from tests.trainers import pruning, text_data, train
from tests.zoo import ZOO

STACKS = {"bert": "bert.encoder.layer", "llama": "model.layers", "gpt2": "transformer.h", "t5": "decoder.block"}
LENGTHS = {"bert": 4, "llama": 4, "gpt2": 4, "t5": 3}
REMOVED = {"bert": [1, 2], "llama": [1, 2], "gpt2": [1, 2], "t5": [1]}
RATE = 1e-2


def still(name):
    """A model without dropout."""
    model = ZOO[name].model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def data_for(name, rows=32):
    """Labels of unequal number in each row, so that means over batches are not means over tokens."""
    data = text_data("class" if name == "bert" else "tokens", rows=rows)
    if name == "bert":
        return data
    length = 6 if name == "t5" else 10

    def cover(row, index):
        labels = (row["labels"] if name == "t5" else row["input_ids"])[:length]
        hidden = index % 4
        return {
            "labels": [-100] * hidden + labels[hidden:] if name != "t5" else labels[: length - hidden] + [-100] * hidden
        }

    return data.map(cover, with_indices=True)


def keep_only(name):
    """The settings that remove REMOVED: protect the others, and take as many as there are."""
    stacks = {"t5": {"encoder.block": 4, "decoder.block": 2}}
    return {
        "num_blocks": stacks.get(name, 2),
        "protect": [f"{STACKS[name]}.{i}" for i in range(LENGTHS[name]) if i not in REMOVED[name]],
    }


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append({key: value.detach().clone() for key, value in model.state_dict().items()})


def reference(name, model, batches, distill, accumulation, honours_items):
    """Stochastic gradient descent on the loss as it is defined, written out by hand; the weights after each step."""
    teacher = copy.deepcopy(model).eval()
    student = copy.deepcopy(model)
    remove_blocks(student, {STACKS[name]: REMOVED[name]})
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    shift = name in ("llama", "gpt2")
    outputs = []

    def logits_and_hidden(net, batch, index):
        seen = {}
        block = net.get_submodule(STACKS[name])[index]
        handle = block.register_forward_hook(lambda m, a, o: seen.update(out=o if torch.is_tensor(o) else o[0]))
        out = net(**batch)
        handle.remove()
        return out.logits, seen["out"]

    for start in range(0, len(batches), accumulation):
        group = batches[start : start + accumulation]
        items = group[0][1]  # as the Trainer counts them: in some versions with the first labels, which predict nothing
        for batch, _ in group:
            ours, our_hidden = logits_and_hidden(student, batch, REMOVED[name][0] - 1)
            with torch.no_grad():
                theirs, their_hidden = logits_and_hidden(teacher, batch, REMOVED[name][-1])
            labels = batch["labels"]
            mask = torch.ones(our_hidden.shape[:2], dtype=bool)
            if name == "t5":
                mask = labels != -100
            if shift:
                ours, theirs, labels = ours[:, :-1], theirs[:, :-1], labels[:, 1:]
            ours, theirs, labels = (
                ours.reshape(-1, ours.shape[-1]),
                theirs.reshape(-1, theirs.shape[-1]),
                labels.reshape(-1),
            )
            kept = labels != -100
            t = distill["temperature"]
            p = (theirs[kept] / t).softmax(-1)
            kl = (p * (p.log() - (ours[kept] / t).log_softmax(-1))).sum(-1).mean() * t * t
            far = ((our_hidden - their_hidden) ** 2).sum(-1) / (their_hidden**2).sum(-1)
            term = distill["alpha"] * kl + distill["hidden"] * far[mask].mean()
            loss = (1 - distill["alpha"]) * cross_entropy(ours[kept], labels[kept]) + term
            # models that honour num_items_in_batch weigh micro-batches by their tokens; the others do not divide at all
            (loss * (kept.sum() / items if honours_items else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append({key: value.detach().clone() for key, value in student.state_dict().items()})
    return outputs


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_each_step_is_that_of_the_loss_written_out_by_hand(tmp_path, name, accumulation):
    distill = {"alpha": 0.7, "temperature": 3.0, "hidden": 0.4}
    model, data, weights = still(name), data_for(name), Weights()
    model.config.use_cache = False
    batches = []

    class Noting(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            batches.append(({key: value.clone() for key, value in inputs.items()}, num_items_in_batch))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    start = copy.deepcopy(model)
    callback = pruning(distill=distill, **keep_only(name))
    train(
        model,
        tmp_path,
        callback,
        weights,
        data=data,
        cls=Noting,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        gradient_accumulation_steps=accumulation,
    )
    assert {key: list(value) for key, value in callback.plan.removed.items()} == {STACKS[name]: REMOVED[name]}
    expected = reference(name, start, batches, distill, accumulation, honours_items=name in ("llama", "gpt2"))
    assert len(expected) == len(weights.after) == 4 // accumulation
    for ours, theirs in zip(weights.after, expected, strict=True):
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, atol=2e-6, rtol=2e-4, msg=lambda m, key=key: f"{key}: {m}")
    # and not those of a training without a teacher
    plain = reference(
        name, start, batches, {"alpha": 0.0, "temperature": 1.0, "hidden": 0.0}, accumulation, name in ("llama", "gpt2")
    )
    assert max(float((plain[0][key] - value).abs().max()) for key, value in expected[0].items()) > 1e-4
