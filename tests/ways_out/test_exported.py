"""Pruned models as programs: torch.export, torch.compile, ONNX in ONNX Runtime, OpenVINO, ExecuTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from deeparc_hf.publish.ways_out import WAYS_OUT

from .models import case, difference, logits_of, other_sizes, typed

QUICK = {"bert"}  # what `make test` takes
pytestmark = [
    # of the exporters, and of what they call
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def tried(way: str) -> list[Any]:
    """The model types that a way out is said to take, with the largest difference that is claimed."""
    known = {**WAYS_OUT[way].within, **WAYS_OUT[way].packaged}
    return [pytest.param(n, b, marks=() if n in QUICK else pytest.mark.slow, id=n) for n, b in known.items()]


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")


def assert_same(program: Callable[..., Any], name: str, within: float, *, other: bool = True) -> None:
    """What the program puts out is what the model does, for other sizes of the inputs too."""
    model, inputs = case(name)
    for each in (inputs, other_sizes(inputs)) if other else (inputs,):
        assert difference(logits_of(program, each), logits_of(model, each), each) <= within


def exported(way: str, name: str) -> Any:
    """A model as a program. Swin, which takes minutes for all sizes, for those of its inputs alone."""
    model, inputs = case(name)
    dynamic = f"dynamic={name != 'swin'}"
    return typed(way, model=model, inputs=inputs, change=lambda lines: lines.replace("dynamic=True", dynamic))[
        "exported"
    ]


@pytest.mark.parametrize(("name", "within"), tried("torch.export"))
def test_torch_export(name, within):
    needs()
    assert_same(exported("torch.export", name), name, within, other=name != "swin")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "within"), tried("torch.compile"))
def test_torch_compile(name, within):
    model, inputs = case(name)
    typed("torch.compile", model=model, inputs=inputs)
    assert_same(torch.compile(model), name, within, other=False)


@pytest.mark.parametrize(("name", "within"), tried("ONNX"))
def test_onnx(name, within, tmp_path, monkeypatch):
    """The file by itself, in ONNX Runtime, without torch or transformers."""
    needs("onnx", "onnxscript", "onnxruntime")
    import onnx
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    exported("ONNX", name)
    if name == "bert":  # one softmax for each block that is left
        graph = onnx.load("onnx/model.onnx", load_external_data=False).graph
        assert sum(node.op_type == "Softmax" for node in graph.node) == case(name)[0].config.num_hidden_layers == 3
    session = onnxruntime.InferenceSession("onnx/model.onnx", providers=["CPUExecutionProvider"])
    wanted = {port.name for port in session.get_inputs()}

    def run(**inputs: Tensor) -> Any:
        (logits,) = session.run(["logits"], {key: value.numpy() for key, value in inputs.items() if key in wanted})
        return tf.utils.ModelOutput(logits=torch.from_numpy(logits))

    assert_same(run, name, within, other=name != "swin")


def test_openvino_reports_nothing_from_here():
    needs("openvino")
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"


@pytest.mark.parametrize(("name", "within"), tried("OpenVINO"))
def test_openvino(name, within, tmp_path, monkeypatch):
    """The file by itself. Left alone OpenVINO computes in 16 bits where a processor can."""
    needs("openvino")
    import openvino

    monkeypatch.chdir(tmp_path)
    exported("OpenVINO", name)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(Path("openvino/openvino_model.xml"), "CPU", exact)
    wanted = {port.any_name for port in compiled.inputs}

    def run(**inputs: Tensor) -> Any:
        outputs = compiled({key: value.numpy() for key, value in inputs.items() if key in wanted})
        return tf.utils.ModelOutput(logits=torch.from_numpy(outputs["logits"]))

    assert_same(run, name, within, other=name != "swin")


@pytest.mark.parametrize(("name", "within"), tried("ExecuTorch"))
def test_executorch(name, within, tmp_path, monkeypatch):
    needs("executorch")
    monkeypatch.chdir(tmp_path)
    assert_same(exported("ExecuTorch", name), name, within, other=False)
    assert list(Path("executorch").glob("*.pte"))
