"""Which positions count in a repair: against the Fisher information by the whole Jacobian, and in planted cases."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

from deeparc_hf import heal_model, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.healing.sensitivity import output_sensitivities
from deeparc_hf.observe.forward import evaluating
from deeparc_hf.observe.hooks import hidden_states, with_hidden_states
from deeparc_hf.similarity.divergence import Head, divergence
from tests.zoo import TEXT, ZOO, spread

LAYERS = "bert.encoder.layer"


def sensitivities(model, path, batch):
    block = model.get_submodule(path)
    with evaluating(model):
        return output_sensitivities(describe(model).host, {block: 2}, batch)[block]


def outputs_by(model, path, batch):
    """The hidden states of a block, and the function from them to the heads."""
    kept = {}

    def logits(hidden=None):
        def hook(module, args, output):
            kept["hidden"] = hidden_states(output)
            return None if hidden is None else with_hidden_states(output, hidden)

        handle = model.get_submodule(path).register_forward_hook(hook)
        try:
            return [value for name, value in model(**batch).items() if name.endswith("logits")]
        finally:
            handle.remove()

    with torch.no_grad():
        logits()
    return kept["hidden"].clone(), logits


def question_answering():
    torch.manual_seed(0)
    return spread(tf.BertForQuestionAnswering(tf.BertConfig(**TEXT)))


@pytest.mark.parametrize(
    ("make", "name", "path"),
    [
        (ZOO["bert"].model, "bert", f"{LAYERS}.1"),
        (ZOO["llama"].model, "llama", "model.layers.2"),
        (question_answering, "bert", f"{LAYERS}.3"),  # two heads, whose signs are their own
    ],
)
def test_squares_are_the_fisher_information_of_each_position_in_the_mean(make, name, path):
    model = make().eval()
    batch = {key: value[:2] for key, value in ZOO[name].batches(2)[0].items() if key != "labels"}
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    hidden, heads = outputs_by(model, path, batch)
    exact = 0.0
    for number, p in enumerate(head.detach().softmax(-1) for head in heads(hidden)):
        jacobian = torch.autograd.functional.jacobian(lambda given, number=number: heads(given)[number], hidden)
        rows, classes = p.numel() // p.shape[-1], p.shape[-1]
        jacobian, p = jacobian.reshape(rows, classes, *hidden.shape), p.reshape(rows, classes)
        fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        exact = exact + torch.einsum("rcbtd,rce,rebtd->bt", jacobian, fisher, jacobian)
    block, host = model.get_submodule(path), describe(model).host
    with evaluating(model):
        found = [output_sensitivities(host, {block: 2}, batch, seed=seed)[block] for seed in range(400)]
    draws = [norms[..., 0].square() for norms in found]
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


def test_predicted_numbers_count_alike_however_large_they_are():
    """As the divergence of numbers is measured: in the unit of all samples together."""
    torch.manual_seed(0)
    model = spread(tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=1)))
    with torch.no_grad():
        model.classifier.bias.zero_()
    (batch, *_) = ZOO["bert"].batches(4)
    batch = {key: value for key, value in batch.items() if key != "labels"}
    last = f"{LAYERS}.{len(model.bert.encoder.layer) - 1}"
    before = sensitivities(model, last, batch)
    with torch.no_grad():
        predicted = model.eval()(**batch).logits[0, 0]
        model.classifier.bias.sub_(predicted)  # the first sample's is 0 now
    torch.testing.assert_close(sensitivities(model, last, batch), before)


def test_samples_that_no_output_counts_for_count_for_nothing_in_whatever_batch():
    """Labels say which outputs count: the samples without any leave the repair as it is without them."""
    model = ZOO["llama"].model()
    (batch,) = [dict(each) for each in ZOO["llama"].batches(1, size=40)]
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][::2] = -100
    singles = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(40)]
    changes = []
    for batches in ([batch], singles, [*singles[1:6], *singles[:1], *singles[6:]]):
        pruned = ZOO["llama"].model()
        remove_blocks(pruned, {"model.layers": [2]})
        heal_model(pruned, model, batches)
        changes.append(pruned.model.layers[1].mlp.down_proj.weight.detach())
    torch.testing.assert_close(changes[1], changes[0], atol=1e-4, rtol=1e-3)
    assert not torch.equal(changes[0], ZOO["llama"].model().model.layers[1].mlp.down_proj.weight)
    # held-out samples are each fifth, so another order is another fit, but no other way to count
    assert (changes[2] - changes[0]).norm() < 2 * changes[0].norm()


def test_half_precision_neither_vanishes_nor_overflows():
    model = ZOO["llama"].model()
    (batch, *_) = ZOO["llama"].batches(4)
    wanted = sensitivities(model, "model.layers.1", batch)
    found = sensitivities(copy.deepcopy(model).half(), "model.layers.1", batch)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.01 * float(wanted.max()))
    with torch.no_grad():  # small hidden states, for which outputs are the more sensitive
        model.model.embed_tokens.weight.mul_(1e-3)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
    found = sensitivities(copy.deepcopy(model).half(), "model.layers.1", batch)
    assert bool(found.isfinite().all()) and float(found.max()) > 100 * float(wanted.max())


def test_what_runs_before_the_block_is_not_recorded():
    model = ZOO["llama"].model()
    (batch, *_) = ZOO["llama"].batches(4)

    def recorded(path):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sensitivities(model, path, batch)
        return sum(sizes)

    first, last = recorded("model.layers.0"), recorded("model.layers.3")
    assert last < 0.5 * first


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_it_can_be_told_wherever_it_is_asked(grad):
    model = ZOO["bert"].model()
    (batch, *_) = ZOO["bert"].batches(4)
    wanted = sensitivities(model, f"{LAYERS}.1", batch)
    with grad():
        torch.testing.assert_close(sensitivities(model, f"{LAYERS}.1", batch), wanted)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError])
def test_a_model_that_cannot_run_backward_is_repaired_with_all_positions_alike(error, caplog):
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise error("no way back")

    class Wrapped(torch.nn.Module):
        def __init__(self, head, around):
            super().__init__()
            self.head, self.around = head, around

        def forward(self, x):
            return self.around(self.head(x))

    def healed(around):
        model = ZOO["bert"].model()
        model.classifier = Wrapped(model.classifier, around)
        pruned = copy.deepcopy(model)
        remove_blocks(pruned, {LAYERS: [2]})
        (site,) = heal_model(pruned, model, ZOO["bert"].batches(20))
        assert site.reason is None
        return pruned.bert.state_dict()

    with caplog.at_level("INFO", "deeparc_hf"):
        one, other = healed(OneWay.apply), healed(torch.Tensor.detach)
    told = f"cannot be differentiated, so all positions count alike: {error.__name__}: no way back"
    assert caplog.text.count(told) == 1  # after the first batch it is not tried again
    assert all(torch.equal(one[name], other[name]) for name in one)
    usual = healed(torch.Tensor.clone)
    assert any(not torch.equal(one[name], usual[name]) for name in one)


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
