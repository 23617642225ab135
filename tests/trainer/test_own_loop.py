"""Loops of one's own: what accelerate prepared follows a removal, zeros stay zero, in one process and in two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from deeparc_hf import KeptZeros, PrunedConfig, follow, remove_blocks, sparsify_model
from deeparc_hf.errors import SparsityError, SurgeryError
from tests.zoo import ZOO

ROOT = Path(__file__).parents[2]
STACK = "bert.encoder.layer"
LOOP = ROOT / "examples" / "accelerate_loop.py"


def trained(model, optimizer, steps=2):
    for batch in ZOO["bert"].batches(steps):
        labels = torch.arange(len(batch["input_ids"])) % 2
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_removed_and_frozen_parameters_leave_the_optimizer():
    model = ZOO["bert"].model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trained(model, optimizer)
    groups = len(optimizer.param_groups)
    remove_blocks(model, {STACK: [2]}, freeze="partial")
    assert any(p not in set(model.parameters()) for group in optimizer.param_groups for p in group["params"])
    follow(model, optimizer)
    left = set(model.parameters())
    assert len(optimizer.param_groups) == groups
    assert {p for group in optimizer.param_groups for p in group["params"]} == left
    assert set(optimizer.state) == {p for p in left if p.requires_grad}
    trained(model, optimizer)


def test_zeros_stay_zero_through_steps_and_a_later_pruning():
    model = ZOO["bert"].model()
    assert len(KeptZeros(model)) == 0
    sparsify_model(model, method="magnitude", sparsity=0.5, progress=False)
    zeros = KeptZeros(model)
    names = PrunedConfig.from_model(model).sparsity["matrices"]
    places = {f"{name}.weight": model.get_submodule(name).weight == 0 for name in names}
    assert len(zeros) == len(places) > 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained(model, optimizer)
    with pytest.raises(SparsityError, match=r"are not zero any more.* Call apply after every step"):
        zeros.check()
    zeros.apply()
    zeros.check()
    parameters = dict(model.named_parameters())
    assert all(bool((parameters[name][mask] == 0).all()) for name, mask in places.items())
    remove_blocks(model, {STACK: [1]})
    follow(model, optimizer)
    trained(model, optimizer)
    zeros.apply()
    zeros.check()


def test_shards_are_refused():
    class FullyShardedDataParallel(torch.nn.Module):
        """By its name, as the package tells it."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(SurgeryError, match=r"Prune the model before accelerator\.prepare"):
        follow(FullyShardedDataParallel(ZOO["bert"].model()))


def launched(folder, *words, script=LOOP):
    """In two processes."""
    config = ROOT / "recipes" / "accelerate_configs" / "two_cpu_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "29753", str(script), "--use-cpu", "--output", str(folder), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)


@pytest.mark.slow
def test_the_example_in_two_processes_broken_off_and_gone_on_with(tmp_path):
    done = launched(tmp_path / "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    told = re.findall(r"epoch (\d): loss ([\d.]+), (\d) blocks, 2 processes", done.stdout)
    assert [(epoch, blocks) for epoch, _, blocks in told] == [
        ("1", "4"),
        ("2", "4"),
        *((str(epoch), "3") for epoch in range(3, 7)),
    ]
    assert float(told[-1][1]) < float(told[0][1]) / 4
    for words in (("--stop-after", "3"), ("--resume", "--stop-after", "5"), ("--resume",)):  # the last keeps zeros
        done = launched(tmp_path / "parts", *words)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "parts" / "model")  # plain transformers
    assert model.config.num_hidden_layers == 3
    record = PrunedConfig.from_pretrained(tmp_path / "parts" / "model")
    for name, entry in record.sparsity["matrices"].items():
        assert int((model.get_submodule(name).weight == 0).sum()) == entry["zeros"]
        assert torch.equal(whole[f"{name}.weight"] == 0, parts[f"{name}.weight"] == 0)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_without_following_the_next_step_fails_and_different_removals_are_refused(tmp_path):
    text = LOOP.read_text()
    call = "            follow(model, optimizer)"
    assert call in text
    script = tmp_path / "loop.py"
    script.write_text(text.replace(call, "            pass"))
    assert launched(tmp_path / "without", script=script).returncode != 0
    other = "; ".join(
        [
            "            apply_plan(inner, PruningPlan.from_json(plan[0]), example=calibration[0])",
            "from deeparc_hf import remove_blocks",
            "first = {'bert.encoder.layer': [0]}",
            "accelerator.process_index == 1 and remove_blocks(inner, first, example=calibration[0])",
        ]
    )
    line = next(line for line in text.splitlines() if "apply_plan(inner" in line)
    script.write_text(text.replace(line, other))
    done = launched(tmp_path / "differ", script=script)
    assert done.returncode != 0 and "The model in process 1 is not that in process 0" in done.stderr
