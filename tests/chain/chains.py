"""Chains for the tests: a small model, a config file, and the command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tests.zoo import ZOO

ROOT = Path(__file__).parents[2]
STACK = "bert.encoder.layer"
ONE = """
compute_environment: LOCAL_MACHINE
distributed_type: "NO"
num_machines: 1
num_processes: 1
machine_rank: 0
mixed_precision: "no"
use_cpu: true
"""
FSDP2 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
mixed_precision: "no"
use_cpu: true
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: BertLayer
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: false
  fsdp_state_dict_type: FULL_STATE_DICT
"""
ZERO = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
mixed_precision: "no"
deepspeed_config:
  zero_stage: {stage}
  zero3_save_16bit_model: true
  gradient_accumulation_steps: 1
  offload_optimizer_device: none
  offload_param_device: none
"""


def write_chain(folder, *arguments, launch=ONE, batch=16, callback=None, **settings):
    """A config file in a folder, with the model that its chain begins with."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "begin"
    if not model.exists():
        torch.manual_seed(1)
        tiny = ZOO["bert"].model()
        config = tiny.config
        config.num_hidden_layers, config.hidden_dropout_prob, config.attention_probs_dropout_prob = 6, 0.0, 0.0
        type(tiny)(config).save_pretrained(model)
    (folder / "accelerate.yaml").write_text(launch)
    known = ["--model", "{model}", "--output_dir", "{output}", "--batch", str(batch)]
    known += ["--after", str(folder / "after.json"), *map(str, arguments)]
    known += [] if callback is None else ["--callback", json.dumps(callback)]
    file = folder / "chain.yaml"
    data = {
        "model": str(model),
        "output": str(folder / "out"),
        "script": str(ROOT / "tests" / "chain" / "train.py"),
        "launch": f"--config_file {folder / 'accelerate.yaml'}",
        "arguments": known,
        **settings,
    }
    file.write_text(yaml.safe_dump(data))
    return file


def command(file):
    return [sys.executable, "-m", "deeparc_hf", "run", str(file)]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def run_chain(file, check=True):
    done = subprocess.run(command(file), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    if check:
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    return done


def report(folder):
    return json.loads((folder / "out" / "model" / "pruning_report.json").read_text())


def weights(folder):
    """The weights of the model that a chain ended with, by the names that the model has for them."""
    found = load_file(folder / "out" / "model" / "model.safetensors")
    # under ZeRO-3 transformers saves BERT's norms under their older names
    return {k.replace(".gamma", ".weight").replace(".beta", ".bias"): v for k, v in found.items()}


def difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
