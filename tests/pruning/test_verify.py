"""A removal is verified by a forward pass, or it is refused with what is needed; a verification leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from deeparc_hf import PrunedConfig, find_stacks, prune_model, remove_blocks
from deeparc_hf.architectures import find_host
from deeparc_hf.errors import SurgeryError
from deeparc_hf.observe.forward import evaluating
from deeparc_hf.pruning.verify import Expectation
from tests.odd_models import ODD
from tests.zoo import CAUSAL, TEXT, VOCAB, ZOO, spread

QWEN3_VL = {
    "text_config": {
        **CAUSAL,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
    "image_token_id": 100,
    "video_token_id": 101,
    "vision_start_token_id": 102,
    "vision_end_token_id": 103,
}


def built(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return spread(make()).eval()


def refused(model: nn.Module, blocks: dict[str, list[int]], message: str, **more: Any) -> None:
    """The removal is refused, and the model is what it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = copy.deepcopy(getattr(model, "config", None))
    with pytest.raises(SurgeryError, match=message):
        remove_blocks(model, blocks, **more)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert settings is None or model.config.to_dict() == settings.to_dict()


def texts(images: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    if not images:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}
    ids[:, 2], ids[:, 3:7], ids[:, 7] = 102, 100, 103
    pictures = {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 100).long(),
        **pictures,
    }


def test_an_example_must_reach_the_part_that_sees():
    """Qwen3-VL adds image features to what its first language blocks put out, by their place: texts do not show it."""

    def model() -> nn.Module:
        return built(lambda: tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(**QWEN3_VL)))

    name = "model.language_model.layers"
    refused(
        model(),
        {name: [0]},
        r"do not reach model\.visual\.blocks\. Give a batch that does: example=batch",
        example=texts(False),
    )
    refused(model(), {name: [0]}, "does not compute what the original computes", example=texts(True))
    refused(model(), {name: [0]}, "example=batch")
    remove_blocks(model(), {name: [3]}, example=texts(True))


@pytest.mark.parametrize("stack", ["pvt_v2.encoder.layers", "upscale_block.block"])
def test_blocks_that_change_the_shape_of_their_input_are_no_residual_blocks(stack):
    if stack.startswith("pvt"):
        kinds = {
            "hidden_sizes": [16] * 4,
            "num_attention_heads": [1, 1, 2, 2],
            "depths": [2] * 4,
            "mlp_ratios": [2] * 4,
        }
        model = built(lambda: tf.PvtV2ForImageClassification(tf.PvtV2Config(image_size=64, **kinds)))
    else:
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_blocks": 2,
            "image_size": 64,
            "num_queries": 8,
        }
        model = built(lambda: tf.EomtForUniversalSegmentation(tf.EomtConfig(**sizes, patch_size=16)))
    for index in range(len(find_stacks(model).get(stack, ()))):
        refused(model, {stack: [index]}, "cannot express the removal|no residual block|is pinned")


def llava() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**sizes, "model_type": "llama", "vocab_size": VOCAB, "num_key_value_heads": 4}
    vision = {**sizes, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=119)
    return built(lambda: tf.LlavaForConditionalGeneration(config))


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_verdict_does_not_depend_on_whether_the_model_has_run(ran_before):
    """transformers collects hidden states by hooks that it installs in the first forward pass: they must see a block as
    skipped.
    """
    ids = torch.tensor([[5, 6] + [119] * 16 + [7, 8, 9]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 32, 32)}
    name = next(stack for stack in find_stacks(llava()) if "vision" in stack)

    def model() -> nn.Module:
        made = llava()
        if ran_before:
            with torch.no_grad():
                made(**batch)
        return made

    expected, pruned = model(), model()
    expected.get_submodule(name)[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    remove_blocks(pruned, {name: [1]}, example=batch)
    with torch.no_grad():
        torch.testing.assert_close(pruned(**batch).logits, expected(**batch).logits)
    # the output is taken from block -2
    refused(model(), {name: [3]}, "does not compute what the original computes", example=batch)


def test_verifying_and_comparing_leave_a_models_own_switches_alone():
    """BigBird turns to full attention for good where a text is short."""
    sizes = {**TEXT, "block_size": 4, "num_random_blocks": 1}
    model = built(lambda: tf.BigBirdForSequenceClassification(tf.BigBirdConfig(**sizes)))
    blocks = list(model.bert.encoder.layer)
    attention = [block.attention.self for block in blocks]
    short = {"input_ids": torch.randint(5, VOCAB, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    with evaluating(model):
        model(**short)
        assert model.bert.attention_type == "original_full"
    assert model.bert.attention_type == "block_sparse"
    remove_blocks(model, {"bert.encoder.layer": [3]}, example=short)
    assert model.bert.attention_type == "block_sparse" and model.bert.encoder.attention_type == "block_sparse"
    assert [block.attention.self for block in model.bert.encoder.layer] == attention[:3]


def test_a_pass_leaves_attributes_submodules_and_the_kind_of_labels_alone():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.inner = 0, nn.Linear(2, 2)
            self.register_buffer("scale", torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.last = x
            self.inner, self.scale = nn.Identity(), self.scale + 1
            return x

    model = Counting()
    inner, scale = model.inner, model.scale
    with evaluating(model):
        model(torch.ones(1, 2))
    assert (
        (model.calls, model.inner, model.scale) == (0, inner, scale) and not hasattr(model, "last") and model.training
    )
    bert = ZOO["bert"].model()
    with evaluating(bert):
        bert(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([1]))
        assert bert.config.problem_type is not None
    assert bert.config.problem_type is None


def test_what_cannot_be_verified_goes_through_only_where_the_user_says_so():
    model = ODD["patch_tst"].model()
    name = "model.encoder.layers"
    refused(
        model,
        {name: [1]},
        r"no inputs can be made up for PatchTSTForPrediction\. Give a batch that shows it: example=batch\. Or say",
    )
    copied = copy.deepcopy(model)
    remove_blocks(copied, {name: [1]}, verify=False)
    (batch,) = ODD["patch_tst"].batches(2)
    assert remove_blocks(model, {name: [1]}, example=batch).kept == {name: (0, 2, 3)}
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], copied(**batch)[0])


def test_a_batch_that_the_model_cannot_run_on_is_no_verification():
    model = ZOO["bert"].model()
    wrong = {"input_ids": torch.full((2, 4), VOCAB + 9), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    refused(
        model,
        {"bert.encoder.layer": [1]},
        "cannot run on the batch with these blocks skipped. IndexError",
        example=wrong,
    )


@pytest.mark.parametrize("part", ["bert.encoder.layer.3", ""])
def test_a_model_without_weights_is_not_verified(part):
    model = ZOO["bert"].model()
    model.get_submodule(part).to("meta")
    with pytest.raises(SurgeryError, match=rf"{part}.* has no weights \(meta device\).* Or say verify=False"):
        remove_blocks(model, {"bert.encoder.layer": [1]})
    assert isinstance(remove_blocks(model, {"bert.encoder.layer": [1]}, verify=False), PrunedConfig)


def test_prune_model_can_do_without_verification():
    specimen = ZOO["bert"]
    plan = prune_model(specimen.model(), specimen.batches(), num_blocks=3, verify=False)
    assert len(plan.removed["bert.encoder.layer"]) == 1


def test_what_has_one_entry_a_block_is_passed_over():
    """output_router_logits gives each block's, and a loss of all of them."""
    config = tf.MixtralConfig(**CAUSAL, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    model = built(lambda: tf.MixtralForCausalLM(config))
    assert remove_blocks(model, {"model.layers": [1]}).kept == {"model.layers": (0, 2, 3)}
    model = built(
        lambda: tf.BertForSequenceClassification(
            tf.BertConfig(**TEXT, output_hidden_states=True, output_attentions=True)
        )
    )
    remove_blocks(model, {"bert.encoder.layer": [1]})


class InPlace(tf.models.bert.modeling_bert.BertLayer):
    """A block that works on its input in place, as custom and compiled layers do."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(hidden_states, *args, **kwargs)
        hidden_states.copy_(output[0] if isinstance(output, tuple) else output)
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


def test_a_block_may_work_on_its_input_in_place():
    class InPlaceBert(tf.BertForSequenceClassification):
        def __init__(self, config: tf.BertConfig) -> None:
            super().__init__(config)
            self.bert.encoder.layer = nn.ModuleList(InPlace(config) for _ in range(config.num_hidden_layers))

    model, expected = (built(lambda: InPlaceBert(tf.BertConfig(**TEXT))) for _ in range(2))
    remove_blocks(model, {"bert.encoder.layer": [2]})
    expected.bert.encoder.layer[2].forward = lambda hidden_states, *args, **kwargs: hidden_states
    ids = torch.randint(5, VOCAB, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("required", [True, False])
def test_labels_are_given_where_the_forward_pass_cannot_do_without(required):
    class Own(tf.BertForSequenceClassification):
        pass

    def forward(
        self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: Any
    ) -> dict[str, torch.Tensor]:
        logits = self.classifier(self.bert(input_ids, attention_mask=attention_mask).pooler_output)
        return {"loss": nn.functional.cross_entropy(logits, labels.view(-1)), "logits": logits}

    def optional(
        self: Any, input_ids: torch.Tensor, attention_mask: Any = None, labels: Any = None
    ) -> dict[str, torch.Tensor]:
        return forward(self, input_ids, attention_mask, labels)

    Own.forward = forward if required else optional
    model = built(lambda: Own(tf.BertConfig(**TEXT)))
    data = [{**batch, "labels": torch.zeros(8, dtype=torch.long)} for batch in ZOO["bert"].batches()]
    assert prune_model(model, data, num_blocks=3).samples == 48


def test_plain_values_of_a_batch_reach_the_model():
    model = built(lambda: tf.ViTForImageClassification(tf.ViTConfig(**{**TEXT, "image_size": 32, "patch_size": 8})))
    data = [
        {"pixel_values": torch.randn(12, 3, 48, 48), "interpolate_pos_encoding": True, "note": "not an argument"}
        for _ in range(4)
    ]
    assert prune_model(model, data, num_blocks=3).samples == 48


def test_a_vision_tower_of_its_own_is_verified_on_packed_patches():
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [],
    }
    model = built(lambda: tf.AutoModel.from_config(tf.Qwen2_5_VLConfig(vision_config=vision).vision_config))
    example = {"hidden_states": torch.randn(64, 1176), "grid_thw": torch.tensor([[1, 8, 8]])}
    refused(model, {"blocks": [2]}, "no inputs can be made up")
    assert remove_blocks(model, {"blocks": [2]}, example=example).kept == {"blocks": (0, 1, 3)}


def test_masked_logits_neither_hide_a_difference_nor_make_one():
    """Chameleon's logits of image tokens are as low as can be: they say nothing of the scale of the others."""
    host = find_host(ZOO["vit"].model())
    for low in (torch.finfo(torch.float32).min, float("-inf")):
        expected = torch.tensor([[0.5, low, 1.0]])
        expectation = Expectation(host, {}, {"logits": expected}, set())
        expectation.compare(expected, expected.clone())
        for other in ([[0.6, low, 1.0]], [[0.5, 0.0, 1.0]], [[0.5, low, low]]):
            with pytest.raises(SurgeryError, match="does not compute"):
                expectation.compare(expected, torch.tensor(other))
