"""Which positions count in a repair: against the Fisher information by the whole Jacobian, and in planted cases."""

from __future__ import annotations

import copy

import pytest
import torch

from deeparc_hf import heal_model, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.healing.sensitivity import output_sensitivities
from deeparc_hf.observe.forward import evaluating
from deeparc_hf.observe.hooks import hidden_states, with_hidden_states
from deeparc_hf.similarity.divergence import Head, divergence
from tests.zoo import ZOO

LAYERS = "bert.encoder.layer"


def sensitivities(model, path, batch, seed=0, features=2):
    block = model.get_submodule(path)
    with evaluating(model):
        return output_sensitivities(describe(model).host, {block: features}, batch, seed=seed)[block]


def outputs_by(model, path, batch):
    """The hidden states of a block, and the function from them to the logits."""
    kept = {}

    def logits(hidden=None):
        def hook(module, args, output):
            kept["hidden"] = hidden_states(output)
            return None if hidden is None else with_hidden_states(output, hidden)

        handle = model.get_submodule(path).register_forward_hook(hook)
        try:
            return model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        finally:
            handle.remove()

    with torch.no_grad():
        logits()
    return kept["hidden"].clone(), logits


@pytest.mark.parametrize("name, path", [("bert", f"{LAYERS}.1"), ("llama", "model.layers.2")])
def test_squares_are_the_fisher_information_of_each_position_in_the_mean(name, path):
    model = ZOO[name].model().eval()
    batch = {key: value[:2] for key, value in ZOO[name].batches(2)[0].items()}
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    hidden, logits = outputs_by(model, path, batch)
    jacobian = torch.autograd.functional.jacobian(logits, hidden)
    p = logits(hidden).detach().softmax(-1)
    rows, classes = p.numel() // p.shape[-1], p.shape[-1]
    jacobian, p = jacobian.reshape(rows, classes, *hidden.shape), p.reshape(rows, classes)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("rcbtd,rce,rebtd->bt", jacobian, fisher, jacobian)
    draws = [sensitivities(model, path, batch, seed)[..., 0].square() for seed in range(400)]
    torch.testing.assert_close(torch.stack(draws).mean(0), exact, rtol=0.25, atol=0.02 * float(exact.max()))


def test_the_last_block_of_a_classifier_counts_at_its_first_position_alone():
    model = ZOO["bert"].model()
    (batch, *_) = ZOO["bert"].batches(4)
    last = len(model.bert.encoder.layer) - 1
    size = sensitivities(model, f"{LAYERS}.{last}", batch)[..., 0]
    assert bool((size[:, 0] > 0).all()) and not bool(size[:, 1:].any())


def test_a_sample_counts_alike_in_whatever_batch():
    model = ZOO["bert"].model()
    (batch, *_) = ZOO["bert"].batches(4)
    together = sensitivities(model, f"{LAYERS}.1", batch)
    for number in range(len(together)):
        alone = {key: value[number : number + 1] for key, value in batch.items()}
        torch.testing.assert_close(sensitivities(model, f"{LAYERS}.1", alone)[0], together[number])


def test_nothing_is_left_behind():
    model = ZOO["bert"].model().train()
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    (batch, *_) = ZOO["bert"].batches(4)
    assert not sensitivities(model, f"{LAYERS}.0", batch).requires_grad
    assert model.training
    assert all(p.grad is None and p.requires_grad == before[name][0] for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_cannot_run_backward_is_repaired_with_all_positions_alike():
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no way back")

    def healed(classifier):
        model = ZOO["bert"].model()
        model.classifier = classifier(model.classifier)
        pruned = copy.deepcopy(model)
        remove_blocks(pruned, {LAYERS: [2]})
        (site,) = heal_model(pruned, model, ZOO["bert"].batches(20))
        return site, pruned.state_dict()

    class Ended(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, x):
            return OneWay.apply(self.head(x))

    class Cut(Ended):
        def forward(self, x):
            return self.head(x.detach()).detach()

    (one, first), (other, second) = healed(Ended), healed(Cut)
    usual, third = healed(lambda head: head)
    assert one.reason is None and other.reason is None and usual.reason is None
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = f"{LAYERS}.1.output.dense.weight"
    assert not torch.equal(first[name], third[name])


def test_a_repair_serves_what_the_outputs_hang_on():
    """A block whose removal cannot be made good everywhere: the position that the classifier reads comes first."""
    model = ZOO["bert"].model()
    batches = ZOO["bert"].batches(60)
    last = len(model.bert.encoder.layer) - 1
    with torch.no_grad():  # far from what the map before it can make
        for parameter in model.bert.encoder.layer[last].parameters():
            parameter.mul_(1.5)
    errors = []
    for blind in (False, True):
        whole = copy.deepcopy(model)
        if blind:
            whole.classifier.forward = torch.no_grad()(whole.classifier.forward)
        pruned = copy.deepcopy(whole)
        remove_blocks(pruned, {LAYERS: [last]})
        heal_model(pruned, whole, batches)
        total = 0.0
        with torch.no_grad():
            for batch in batches:
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                found, wanted = (each.eval()(**inputs).logits for each in (pruned, model))
                total += float(divergence(Head("logits", "softmax", found), Head("logits", "softmax", wanted)).sum())
        errors.append(total)
    assert errors[0] < errors[1]


def test_what_runs_behind_a_site_may_change_its_output_in_place():
    """The target is what the block put out, and the positions still count by their sensitivity."""

    class InPlace(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, hidden, *args, **kwargs):
            copied = self.block(hidden.clone(), *args, **kwargs)
            hidden.mul_(3.0)
            return copied

    changes = []
    for in_place in (False, True):
        model = ZOO["llama"].model()
        layers = model.model.layers
        if in_place:
            layers[3].forward = InPlace(copy.deepcopy(layers[3])).forward
        pruned = ZOO["llama"].model()
        remove_blocks(pruned, {"model.layers": [2]})
        (site,) = heal_model(pruned, model, ZOO["llama"].batches(20))
        assert site.reason is None
        changes.append(pruned.model.layers[1].mlp.down_proj.weight)
    assert torch.equal(*changes)
