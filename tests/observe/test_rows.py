"""Observation: forms of batches, padding, streaming, and a model left as it was."""

from __future__ import annotations

import contextlib
import io
import random

import numpy as np
import pytest
import torch
import transformers as tf
from transformers.modeling_outputs import BaseModelOutput

from deeparc_hf import analyze, find_stacks
from deeparc_hf.architectures import describe
from deeparc_hf.errors import CalibrationError, CalibrationWarning
from deeparc_hf.observe.axes import Axes
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.rows import StackObserver, observe
from deeparc_hf.similarity import SimilarityMetric, metrics
from tests.zoo import TEXT, VOCAB, ZOO, spread


class Keeper(SimilarityMetric):
    """Keeps all rows, to look at."""

    rows = "tokens"
    min_rows = 1

    def __init__(self):
        self.taken: list[tuple[list[torch.Tensor], torch.Tensor]] = []

    def update(self, rows, samples):
        self.taken.append(([r.clone() for r in rows], samples.clone()))

    def finish(self):
        return {}

    @staticmethod
    def matrix(sums):
        raise AssertionError("not asked for")


def keep(model, batches, rows, side_limit=None, samples=10**6):
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    observers = [StackObserver(stack, Keeper(), rows) for stack in stacks.values()]
    for observer in observers:
        observer.metric.tokens_per_sample = side_limit
    observe(host, observers, Calibration(batches, samples), progress=False)
    return observers


def reference_hidden(model, batch):
    """Outputs of the blocks, as the model itself gives them out."""
    model.eval()
    with torch.no_grad():
        return model(**batch, output_hidden_states=True).hidden_states[1:]


@pytest.mark.parametrize("rows", ["tokens", "mean", "first"])
def test_rows_are_those_of_the_models_own_hidden_states(rows):
    specimen = ZOO["bert"]
    model, (batch,) = specimen.model(), specimen.batches(1, 40)
    observer = keep(model, [batch], rows)[0]
    taken, samples = observer.metric.taken[0]
    mask = batch["attention_mask"].bool()
    for block, hidden in enumerate(reference_hidden(model, batch)):
        expected = {
            "tokens": hidden[mask],
            "mean": torch.stack([h[m].mean(0) for h, m in zip(hidden, mask, strict=True)]),
            "first": hidden[:, 0],
        }[rows]
        torch.testing.assert_close(taken[block], expected)
    owners = mask.nonzero()[:, 0] if rows == "tokens" else torch.arange(40)
    assert torch.equal(samples, owners)


def test_padding_on_the_left_is_masked_too():
    specimen = ZOO["llama"]
    model, (batch,) = specimen.model(), specimen.batches(1, 40)
    flipped = {key: value.flip(1) for key, value in batch.items()}
    taken, _ = keep(model, [flipped], "first")[0].metric.taken[0]
    first = flipped["attention_mask"].argmax(1)
    hooked = []
    handle = model.model.layers[1].register_forward_hook(
        lambda m, a, o: hooked.append(o if isinstance(o, torch.Tensor) else o[0])
    )
    with torch.no_grad():
        model(**flipped)
    handle.remove()
    torch.testing.assert_close(taken[1], hooked[0][torch.arange(40), first])


def test_tokens_are_at_most_the_limit_and_evenly_spaced():
    specimen = ZOO["bert"]
    model, (batch,) = specimen.model(), specimen.batches(1, 40)
    observer = keep(model, [batch], "tokens", side_limit=3)[0]
    _, samples = observer.metric.taken[0]
    lengths = batch["attention_mask"].sum(1)
    assert torch.equal(torch.bincount(samples), lengths.clamp(max=3))
    full = int(lengths.argmax())
    hidden = reference_hidden(model, batch)[0][full]
    expected = hidden[torch.tensor([0, round((int(lengths[full]) - 1) / 2), int(lengths[full]) - 1])]
    torch.testing.assert_close(observer.metric.taken[0][0][0][samples == full], expected)


def test_decoder_rows_follow_the_labels():
    specimen = ZOO["t5"]
    model, (batch,) = specimen.model(), specimen.batches(1, 40)
    batch["labels"][:, 4:] = -100
    encoder, decoder = keep(model, [batch], "tokens")
    assert encoder.count == int(batch["attention_mask"].sum())
    assert decoder.count == 40 * 4


def test_image_rows_are_positions_or_their_mean():
    specimen = ZOO["resnet"]
    model, (batch,) = specimen.model(), specimen.batches(1, 40)
    hooked = []
    stack = next(iter(find_stacks(model).values()))
    handle = stack.blocks[1].register_forward_hook(lambda m, a, o: hooked.append(o.clone()))
    taken, _ = keep(model, [batch], "mean")[0].metric.taken[0]
    tokens, _ = keep(model, [batch], "tokens")[0].metric.taken[0]
    handle.remove()
    torch.testing.assert_close(taken[1], hooked[-1].mean((2, 3)))
    torch.testing.assert_close(tokens[1], hooked[-1].permute(0, 2, 3, 1).flatten(0, 2))


def as_tuple(batch):
    return batch["input_ids"], batch["attention_mask"], torch.zeros(len(batch["input_ids"]), dtype=torch.long)


def as_model_output(batch):
    return BaseModelOutput(batch)  # an ordered mapping with tensors, as some collators give


@pytest.mark.parametrize("form", [dict, as_tuple, as_model_output, lambda b: {**b, "text": ["x"], "id": 3}])
def test_batches_may_be_dicts_tuples_or_model_outputs(form):
    specimen = ZOO["bert"]
    model, batches = specimen.model(), specimen.batches()
    plan = analyze(model, [form(batch) for batch in batches])
    assert plan == analyze(model, batches)


def test_a_timm_model_takes_tuples_and_dicts_of_images():
    specimen = ZOO["timm_vit"]
    model, batches = specimen.model(), specimen.batches()
    plan = analyze(model, [(batch["pixel_values"], torch.zeros(8)) for batch in batches])
    assert plan == analyze(model, batches) == analyze(model, [batch["pixel_values"] for batch in batches])


@pytest.mark.parametrize("metric", metrics.names())
def test_similarities_do_not_depend_on_the_batch_size(metric):
    specimen = ZOO["bert"]
    model = specimen.model()
    (whole,) = specimen.batches(1, 96)
    matrices = []
    for size in (96, 32, 7, 1):
        batches = [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, 96, size)]
        plan = analyze(model, batches, similarity=metric)
        matrices.append(torch.tensor(plan.stacks["bert.encoder.layer"].similarity))
    for matrix in matrices[1:]:
        torch.testing.assert_close(matrix, matrices[0], atol=1e-5, rtol=0)


def test_calibration_samples_bounds_the_data_to_the_sample():
    specimen = ZOO["bert"]
    model, batches = specimen.model(), specimen.batches(100, 8)

    def counted():
        for number, batch in enumerate(batches):
            assert number < 6, "the seventh batch was asked for"
            yield batch

    plan = analyze(model, counted(), calibration_samples=43)
    assert plan.samples == 43


def bytes_of(thing):
    """As it is saved: the whole storage of each tensor."""
    stream = io.BytesIO()
    torch.save(thing, stream)
    return stream.tell()


def test_memory_does_not_grow_with_the_samples():
    specimen = ZOO["bert"]
    model, batches = specimen.model(), specimen.batches(1, 64)
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    sizes = []
    for repeats in (30, 120):
        (observer,) = [StackObserver(stack, metrics.get("cka")(), "tokens") for stack in stacks.values()]
        observe(host, [observer], Calibration(batches * repeats, 10**6), progress=False)
        sizes.append(bytes_of(observer.metric))
    # two groups of 512 rows of four blocks, in the storage of three; 120 batches have more than 100 groups
    assert min(sizes) > 0 and max(sizes) <= 3 * 512 * 4 * 32 * 4 + 10_000


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_states_are_left_as_they_were(fails):
    specimen = ZOO["bert"]
    model, batches = specimen.model(), specimen.batches()
    model.train()
    model.bert.encoder.layer[2].eval()
    model.classifier.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)

    def noisy():
        for batch in batches:
            random.random(), np.random.rand(), torch.rand(1)
            yield batch
        if fails:
            raise OSError("the disk is gone")

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    if fails:
        with pytest.raises(OSError):
            analyze(model, noisy())
    else:
        analyze(model, noisy())
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.classifier.weight.requires_grad and model.bert.pooler.dense.weight.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_is_off():
    specimen = ZOO["bert"]
    model, batches = specimen.model().train(), specimen.batches()
    assert analyze(model, batches) == analyze(model, batches)


def test_half_precision_models_are_compared():
    specimen = ZOO["vit"]
    model, batches = specimen.model(), specimen.batches()
    (exact,) = (stack.similarity for stack in analyze(model, batches).stacks.values())
    (rough,) = (stack.similarity for stack in analyze(model.bfloat16(), batches).stacks.values())
    torch.testing.assert_close(torch.tensor(rough), torch.tensor(exact), atol=0.05, rtol=0)


def test_nan_names_the_block_and_half_precision_gets_its_advice():
    specimen = ZOO["bert"]
    model, batches = specimen.model(), specimen.batches()
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.bias[3] = float("nan")
    with pytest.raises(CalibrationError, match=r"Block 2 of bert\.encoder\.layer puts out NaN.*weights and the inputs"):
        analyze(model, batches)
    with pytest.raises(CalibrationError, match=r"torch\.float16.*Load it in float32 or bfloat16"):
        analyze(model.half(), batches)


@pytest.mark.parametrize("metric", [metric.name for metric in metrics if issubclass(metric, SimilarityMetric)])
def test_a_constant_block_is_named(metric):
    specimen = ZOO["bert"]
    model, batches = specimen.model(), specimen.batches()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight.zero_()
    with pytest.raises(CalibrationError, match=r"Block 1 of bert\.encoder\.layer puts out the same for every"):
        analyze(model, batches, similarity=metric)


@pytest.mark.parametrize("data", [[], iter(()), [{"input_ids": torch.zeros(0, 4, dtype=torch.long)}]])
def test_empty_data_is_an_error(data):
    with pytest.raises(CalibrationError, match="gave no samples"):
        analyze(ZOO["bert"].model(), data)


def test_one_row_is_an_error_that_says_how_many_are_needed():
    specimen = ZOO["bert"]
    with pytest.raises(CalibrationError, match=r"only 1 calibration sample.*some hundreds"):
        analyze(specimen.model(), specimen.batches(1, 1))
    with pytest.raises(CalibrationError, match=r"3 calibration samples gave 3 row.*at least 4"):
        analyze(specimen.model(), specimen.batches(1, 3), rows="mean")


def test_few_samples_warn():
    specimen = ZOO["bert"]
    with pytest.warns(CalibrationWarning, match="only 8 samples"):
        analyze(specimen.model(), specimen.batches(1, 8))


def test_padding_that_its_mask_does_not_tell_warns():
    specimen = ZOO["bert"]
    model, (batch,) = specimen.model(), specimen.batches(1, 40)
    square = batch["attention_mask"][:, None, None, :].expand(-1, 1, 10, -1).bool()  # who may look where
    with pytest.warns(
        CalibrationWarning, match=r"an attention_mask of shape \(40, 1, 10, 10\), which does not say where it is"
    ):
        analyze(model, [{**batch, "attention_mask": square}])
    model, (batch,) = ZOO["t5"].model(), ZOO["t5"].batches(1, 40)
    decoded = batch.pop("labels").masked_fill(torch.arange(7) > 4, 0)
    with pytest.warns(CalibrationWarning, match=r"in decoder_input_ids but no decoder_attention_mask"):
        analyze(model, [{**batch, "decoder_input_ids": decoded}])
    analyze(
        model,
        [
            {
                **batch,
                "decoder_input_ids": decoded,
                "decoder_attention_mask": (torch.arange(7) <= 4).long().expand(40, -1),
            }
        ],
    )


def test_padding_without_a_mask_warns_and_no_padding_does_not():
    specimen = ZOO["bert"]
    model, batches = specimen.model(), specimen.batches()
    with pytest.warns(CalibrationWarning, match="padding .token 0. but no attention_mask"):
        analyze(model, [{"input_ids": batch["input_ids"]} for batch in batches])
    analyze(model, [{"input_ids": batch["input_ids"].clamp(min=5)} for batch in batches])


@pytest.mark.parametrize(
    ("name", "batch", "message"),
    [
        ("bert", {"text": ["a"], "labels": torch.zeros(2)}, r"no 'input_ids'.*text: list.*Tokenize"),
        ("bert", "some text", "type str"),
        ("bert", [], "type list"),
        ("bert", None, "type NoneType"),
        (
            "bert",
            {"input_ids": torch.full((40, 4), VOCAB + 7)},
            r"cannot run on a calibration batch .input_ids: \(40, 4\)",
        ),
        ("vit", {"pixel_values": torch.zeros(40, 3, 48, 48)}, "cannot run on a calibration batch"),
        ("t5", (torch.zeros(4, 4, dtype=torch.long), torch.ones(4, 4)), "Give dicts with input_ids"),
        ("timm_vit", {"input_ids": torch.zeros(4, 4)}, "no images for a timm model"),
        ("whisper", {"input_ids": torch.zeros(4, 4)}, "no 'input_features'"),
    ],
)
def test_batches_that_do_not_fit_are_described(name, batch, message):
    with pytest.raises(CalibrationError, match=message):
        analyze(ZOO[name].model(), [batch])


def test_a_model_on_the_meta_device_has_nothing_to_compare():
    specimen = ZOO["bert"]
    with pytest.raises(CalibrationError, match="no weights"):
        analyze(specimen.model().to("meta"), specimen.batches())


def test_labels_mask_the_decoder_also_beside_decoder_inputs():
    """DataCollatorForSeq2Seq(model=...) puts both into a batch."""
    specimen = ZOO["bart"]
    model, (batch,) = specimen.model(), specimen.batches(1, 40)
    batch["labels"][:, 4:] = -100
    batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    _, decoder = keep(model, [batch], "tokens")
    assert decoder.count == 40 * 4


def test_padding_that_cannot_be_masked_warns():
    """Funnel pools its positions, so that later stages have fewer of them than the mask."""
    sizes = {"block_sizes": [2, 2], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "vocab_size": VOCAB}
    model = spread(tf.FunnelForSequenceClassification(tf.FunnelConfig(**sizes, num_decoder_layers=1))).eval()
    ids = torch.randint(5, VOCAB, (32, 21))
    mask = torch.ones_like(ids)
    analyze(model, [{"input_ids": ids, "attention_mask": mask}])
    mask[:, 12:] = 0
    with pytest.warns(
        CalibrationWarning,
        match=r"Which positions of funnel\.encoder\.blocks\.1 are padding cannot be told.*equal length",
    ):
        analyze(model, [{"input_ids": ids, "attention_mask": mask}])


def test_padding_up_to_a_multiple_of_a_block_is_padding():
    """BigBird pads to its block size inside, so that its outputs have more positions than the mask."""
    sizes = {"num_hidden_layers": 3, "block_size": 16, "num_random_blocks": 1, "max_position_embeddings": 256}
    model = spread(tf.BigBirdForSequenceClassification(tf.BigBirdConfig(**{**TEXT, **sizes}))).eval()
    ids = torch.randint(5, VOCAB, (32, 129))
    mask = torch.ones_like(ids)
    mask[:, 100:] = 0
    (observer,) = keep(model, [{"input_ids": ids, "attention_mask": mask}], "tokens")
    assert len(observer.metric.taken[0][0][0]) == 32 * 100


@pytest.mark.parametrize("second", ["types", "labels"])
def test_a_second_tensor_that_may_not_be_a_mask_is_not_taken_for_one(second):
    specimen = ZOO["bert"]
    model, (batch,) = specimen.model(), specimen.batches(1, 40)
    other = {"types": torch.arange(10).ge(5).long().expand(40, 10), "labels": batch["input_ids"] % 2}[second]
    with pytest.raises(CalibrationError, match=r"Cannot tell whether the second tensor.*Give dicts"):
        analyze(model, [(batch["input_ids"], other, batch["attention_mask"])])


def test_labels_do_not_write_into_the_config():
    """A classifier notes the kind of loss that its labels call for; nobody asked for a loss."""
    specimen = ZOO["bert"]
    model, batches = specimen.model(), specimen.batches()
    before = model.config.to_dict()
    analyze(model, [{**batch, "labels": torch.zeros(8, dtype=torch.long)} for batch in batches])
    assert model.config.to_dict() == before


@pytest.mark.parametrize("similarity", ["cka", "effect"])
def test_an_interruption_between_batches_leaves_no_hooks_as_long_as_its_traceback_is_kept(similarity):
    """A notebook keeps the last traceback, with all that its frames hold."""
    model = ZOO["bert"].model()

    def batches():
        yield from ZOO["bert"].batches(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        analyze(model, batches(), similarity=similarity, progress=False)
    assert caught.tb is not None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Stopped(Calibration):
    """Ctrl-C comes while the progress is told, when the batch's pass is done and its hooks still stand."""

    def bar(self, what, show):
        def advance(count):
            raise KeyboardInterrupt

        return contextlib.nullcontext(advance)


def test_an_interruption_while_progress_is_told_leaves_no_hooks():
    subject = describe(ZOO["bert"].model())
    observers = [StackObserver(stack, metrics.get("cka")(), "tokens") for stack in subject.stacks.values()]
    with pytest.raises(KeyboardInterrupt) as caught:
        observe(subject.host, observers, Stopped(ZOO["bert"].batches(), 48), progress=False)
    assert caught.tb is not None
    assert not any(module._forward_hooks for module in subject.host.root.modules())


def test_blocks_of_different_widths_are_not_compared_and_that_is_told():
    (stack,) = describe(ZOO["bert"].model()).stacks.values()
    observer = StackObserver(stack, metrics.get("cka")(), "tokens")
    observer.settle({stack.name: Axes(2, 0)})
    observer.begin({})
    for index, width in enumerate((32, 32, 32, 64)):
        observer.take(index, stack.blocks[index], (), torch.randn(8, 5, width))
    observer.flush()
    assert observer.observed().obstacle == "they put out 40 rows of 32 values and 40 rows of 64 values for one batch"


def test_a_model_whose_last_block_puts_out_other_widths_is_refused_with_a_way_out():
    model = tf.BertModel(tf.BertConfig(**TEXT), add_pooling_layer=False).eval()
    model.encoder.layer[3].register_forward_hook(lambda module, args, output: torch.cat([output, output], dim=-1))
    with pytest.raises(CalibrationError, match=r"40 rows of 32 values and 40 rows of 64 values.*similarity='effect'"):
        analyze(model, [{"input_ids": torch.randint(5, VOCAB, (8, 5))}] * 8, progress=False)
