"""A tiny model of each type that transformers knows: one rule for the numbers in all configs, and exceptions by type.

The rule goes by the names of entries (`RULES`). What a config works out by itself from other entries (a list with a
value per layer) is left to it. Where the whole rule does not fit, it is tried again without some of its groups.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..zoo import as_trained, spread
from .exceptions import CLASSES, SETTINGS, in_turn

__all__ = ["NotBuiltError", "build", "model_class", "tiny_config", "types"]

WIDTH, HEADS = 64, 4
# what an entry becomes that a class leaves without a value, though its model needs one
FILLED = {"head_dim": WIDTH // HEADS, "num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 320}
# the first of these that a type has is built; else its base model
TASKS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "CTC",
    "RNNT",
    "TDT",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "IMAGE_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "MASKED_LM",
    "IMAGE_TO_IMAGE",
    "IMAGE_MATTING",
    "TEXT_RECOGNITION",
    "TABLE_RECOGNITION",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "POSE_ESTIMATION",
    "POINTMAP_ESTIMATION",
    "NORMAL_ESTIMATION",
    "TEXT_TO_SPECTROGRAM",
    "TEXT_TO_WAVEFORM",
    "TIME_SERIES_PREDICTION",
    "RETRIEVAL",
    "DECISION",
    "PRETRAINING",
)


class NotBuiltError(RuntimeError):
    """The general rule does not give a model of this type; the message says why."""


def _at_most(bound: int) -> Callable[[int], int]:
    return lambda value: min(value, bound)


def _each(number: Callable[[int], int]) -> Callable[[list[int]], list[int]]:
    return lambda values: [number(value) for value in values]


# by group: a pattern of names, and what a number, or a list of numbers, becomes
Rule = tuple[str, Callable[[Any], Any]]
RULES: dict[str, list[Rule]] = {
    "layers": [
        (
            r"((num|n)_(.*_)?)?(hidden_|h_)?layers?|(num|n)_(.*_)?(hidden_)?(layers|blocks)|(.*_)?depth|(.*_)layers|"
            r"(.*_)?n_blocks?|(.*_)?num_hidden_layers(_.*)?|.*_num_layers",
            _at_most(4),
        ),
        (r"depths|(.*_)?num_blocks_per_stage|layers_per_stage|block_sizes|num_layers_per_stage", _each(_at_most(3))),
        (r"depths|num_blocks|.*depths", _each(_at_most(3))),
    ],
    "vocabulary": [
        (r"(.*_)?vocab(ulary)?_size(_.*)?|n_tokens|n_vocab|text_vocab_size", _at_most(320)),
        (r"(.*_)?codebook_size", _at_most(256)),
    ],
    "heads": [
        (r"(num|n)_(.*_)?heads?(_.*)?|(.*_)?attention_heads|(.*_)?num_heads|(.*_)?num_attention_heads", _at_most(4)),
        (r"(.*_)?num_key_value_heads|(.*_)?n_kv_heads?|num_query_groups|(.*_)?kv_heads", _at_most(2)),
        (r"num_heads|(.*_)?num_attention_heads", _each(_at_most(4))),
    ],
    "head sizes": [
        (
            r"(.*_)?head_dim|d_kv|d_head|attention_head_size|(.*_)?(nope|rope)_head_dim|v_head_dim|kv_channels|"
            r"(.*_)?head_size",
            _at_most(WIDTH // HEADS),
        )
    ],
    "widths": [
        (
            r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_dim|hidden_dim|emb_dim|width|embedding_size|"
            r"d_embed|projection_dim|n_state|proj_dim|out_dim|output_dim|hidden_channels|encoder_dim|adapter_dim)|dim|"
            r"(.*_)?hidden_size_.*|(.*_)?(embed|embedding|proj|projector)_size|lru_width|codebook_dim|neck_dim|"
            r"(.*_)?in_features|feature_size|upsample_initial_channel",
            _at_most(WIDTH),
        ),
        (
            r"(.*_)?(hidden_sizes|embed_dims|dims|encoder_hidden_size|hidden_channels|embed_dim)|decoder_in_channels",
            _each(_at_most(WIDTH)),
        ),
    ],
    "inner widths": [
        (
            r"(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|mlp_dim|inner_dim|d_inner|n_inner|dim_feedforward|"
            r"ff_dim|mlp_hidden_size|inner_size|intermediate_dim|intermediate_size_.*|linear_units)|dim_ff|"
            r"feed_forward(_.*)?_(dim|size)",
            _at_most(96),
        )
    ],
    "experts": [
        (r"(.*_)?(num|n)_(.*_)?experts|num_local_experts", _at_most(4)),
        (r"(.*_)?(experts?_per_tok(en)?|moe_top_?k|num_selected_experts)|top_?k|moe_k", _at_most(2)),
        (r"n_group|topk_group|num_expert_group", _at_most(1)),
    ],
    "ranks": [(r"(.*_)?(lora_rank|lora_dim)|(.*_)?time_step_rank", _at_most(16))],
    "images": [
        (r"(.*_)?(image_size|img_size|crop_size|input_size)", _at_most(64)),
        (r"(.*_)?patch_size", _at_most(16)),
    ],
    "lengths": [
        (r"num_queries", _at_most(10)),
        (
            r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_source_positions|max_target_positions|max_seq_len)",
            _at_most(256),
        ),
    ],
    "states": [
        (r"(.*_)?(state_size|d_state|ssm_state_size)", _at_most(8)),
        (r"(.*_)?chunk_size", _at_most(16)),
    ],
}


def types() -> list[str]:
    """All model types of the installed transformers that have a model."""
    return sorted(kind for kind in CONFIG_MAPPING_NAMES if model_class(kind) is not None)


def model_class(kind: str) -> type[nn.Module] | None:
    """The class that is built for a type: that of its first task, else its base model; None if it has none."""
    if kind in CLASSES:
        return getattr(tf, CLASSES[kind])
    found = [getattr(tf, name, None) for name in _class_names(kind)]
    own = (cls for cls in found if cls is not None and _config_class(cls) is tf.CONFIG_MAPPING[kind])
    return next(own, found[0] if found else None)  # some types have but the class of another, which takes their config


def _class_names(kind: str) -> Iterator[str]:
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES  # BERT can also write, but hardly ever does
    for task in (*(f"FOR_{task}" for task in TASKS), "", "FOR_BACKBONE"):
        names = getattr(modeling_auto, f"MODEL_{task}_MAPPING_NAMES".replace("__", "_"))
        name = names.get(kind)
        if name is not None and not (masked and task == "FOR_CAUSAL_LM"):
            yield name[0] if isinstance(name, (list, tuple)) else name


def _config_class(cls: type[nn.Module]) -> Any:
    """A causal model of a composite type takes the config of a part; what lacks a library answers to no attribute."""
    return inspect.getattr_static(cls, "config_class", None)


def build(kind: str, seed: int = 0) -> nn.Module:
    """A tiny model of a type with random weights, each block of which changes its input a good deal.

    Raises:
        NotBuiltError: with what went wrong.
    """
    cls = model_class(kind)
    assert cls is not None
    problems = []
    for left_out in _choices():
        try:
            config = _taken(kind, left_out)
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > 30_000_000:
                raise NotBuiltError(f"{size:,} parameters")
            torch.manual_seed(seed)
            model = as_trained(spread(cls(_taken(kind, left_out)))).eval()
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.return_dict_in_generate = False  # tokens alone can be held against others
            return model
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    raise NotBuiltError(problems[0])


def _taken(kind: str, left_out: tuple[str, ...]) -> PreTrainedConfig:
    """What the class that is built takes: the config of its type, or the part that an exception builds of it."""
    config = tiny_config(kind, left_out)
    if kind not in CLASSES:
        return config
    wanted = _config_class(getattr(tf, CLASSES[kind]))
    part: PreTrainedConfig = next(value for value in (config, *vars(config).values()) if type(value) is wanted)
    return part


def tiny_config(kind: str, left_out: tuple[str, ...] = ()) -> PreTrainedConfig:
    """The config of a type, with the rule's numbers."""
    cls, exceptions = tf.CONFIG_MAPPING[kind], SETTINGS.get(kind, {})
    rules = [rule for group, rules in RULES.items() if group not in left_out for rule in rules]
    try:
        config = cls()
    except Exception:  # the defaults do not fit together
        config = cls(**copy.deepcopy(exceptions))
    return cls(**_merged(_settings(config, rules, "layers" not in left_out), exceptions))


def _choices() -> Iterator[tuple[str, ...]]:
    yield ()
    groups = [group for group in RULES if group != "layers"]
    yield from ((group,) for group in groups)
    yield from itertools.combinations(groups, 2)


def _settings(config: PreTrainedConfig, rules: list[Rule], fewer: bool) -> dict[str, Any]:
    """Entries of a config that the rules change, with those of the configs in it."""
    changed: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(config)}
    kinds = _each_kind(config, fields) if fewer else {}
    layers = next((v for k, v in vars(config).items() if re.fullmatch(RULES["layers"][0][0], k) and type(v) is int), 0)
    named = {of: name for name, of in type(config).attribute_map.items() if of not in fields}
    for key, value in vars(config).items():
        key = named.get(key, key)  # the name that the class takes it by
        if isinstance(value, PreTrainedConfig):
            changed[key] = _part(config, key, value, rules, fewer)
        elif key not in fields or key.startswith("_"):
            continue
        elif fewer and isinstance(value, list) and layers > 4 and len(value) == layers and _given(fields[key]):
            changed[key] = value[: kinds.get("num_hidden_layers", 4)]
        elif value is None and key in FILLED:
            changed[key] = FILLED[key]
        else:
            new = _replaced(key, value, rules)
            if new != value:
                changed[key] = new
    changed |= kinds
    if "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ()):
        changed |= _rope_sections(config, changed)
    if fewer and getattr(config, "stage_names", None):
        _put_out_stages(config, changed)
    changed |= _tokens(config, changed)
    return changed


def _part(config: PreTrainedConfig, key: str, part: PreTrainedConfig, rules: list[Rule], fewer: bool) -> dict[str, Any]:
    """The entries of a config in another: what the outer one gives it, then what the rules and exceptions change."""
    spec = type(config).sub_configs_defaults.get(key)
    inner = dict(spec.init_kwargs) if spec is not None and part.model_type == spec.model_type else {}
    if part.model_type == "timm_backbone":
        inner["out_indices"] = list(part.out_indices)
    inner |= _settings(part, rules, fewer)
    if "out_indices" in inner:
        inner.pop("out_features", None)
    return {"model_type": part.model_type, **_merged(inner, SETTINGS.get(part.model_type, {}))}


def _each_kind(config: PreTrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Several layers of each kind, where there are several kinds."""
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if len(kinds) < 2 or not {"layer_types", "num_hidden_layers"} <= fields.keys():
        return {}
    return {"num_hidden_layers": 6, "layer_types": in_turn(*kinds)}


def _rope_sections(config: PreTrainedConfig, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose sections for time, height and width make up half of what is rotated of a head."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    rotated = int(changed.get("head_dim", WIDTH // HEADS) * rope.get("partial_rotary_factor", 1.0))
    section = {"mrope_section": [rotated // 2 - 2 * (rotated * 3 // 16), *[rotated * 3 // 16] * 2]}
    kinds = [kind for kind, value in rope.items() if isinstance(value, dict)]
    return {"rope_parameters": {**rope, **({kind: {**rope[kind], **section} for kind in kinds} if kinds else section)}}


def _put_out_stages(config: PreTrainedConfig, changed: dict[str, Any]) -> None:
    """Have a backbone put out as many stages as before, of those that there are."""
    cls, own = type(config), [key for key in changed if not isinstance(changed[key], dict) and key != "out_indices"]
    stages = len(cls(**{key: changed[key] for key in own}).stage_names) - 1
    out = list(config.out_indices or ())
    if out and max(out) > stages:
        changed["out_indices"] = list(range(max(1, stages + 1 - len(out)), stages + 1))


def _given(field: dataclasses.Field[Any]) -> bool:
    """Whether the class itself has a value for it, which does not follow others."""
    return field.default is not dataclasses.MISSING and field.default is not None


def _replaced(key: str, value: Any, rules: list[Rule]) -> Any:
    for pattern, number in rules:
        if not re.fullmatch(pattern, key):
            continue
        lists = number.__qualname__.startswith("_each")
        if not lists and type(value) is int:
            return number(value)
        if lists and isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            return number(list(value))
    if isinstance(value, dict) and isinstance(value.get("mrope_section"), list):
        return {**value, "mrope_section": [2, 3, 3]}
    return value


def _tokens(config: PreTrainedConfig, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens that lie outside of the smaller vocabulary, each with one of its own inside."""
    parts = [changed, changed.get("text_config"), changed.get("llm_config"), *changed.values()]
    vocabulary = next((part["vocab_size"] for part in parts if isinstance(part, dict) and "vocab_size" in part), None)
    if vocabulary is None:
        return {}
    found, free = {}, itertools.count(vocabulary - 1, -1)
    for key, value in vars(config).items():
        if re.search(r"token_(id|index)$", key) and type(value) is int and value >= vocabulary - 40:
            found[key] = next(free)
        elif (
            re.search(r"token_(id|index)s?$", key)
            and isinstance(value, list)
            and any(type(item) is int and item >= vocabulary - 40 for item in value)
        ):
            found[key] = [next(free) for _ in value]
    return found


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(one)
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
