"""Records and base checkpoints from a Hub: the real client, over HTTP, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from deeparc_hf import PrunedConfig, remove_blocks, save_pruned
from local_hub import HubServer
from tests.zoo import ZOO

LOAD = """
import sys, transformers
from safetensors.torch import save_file
from deeparc_hf import PrunedConfig, load_pruned
record = PrunedConfig.from_pretrained("org/pruned")
model = load_pruned(transformers.AutoModelForCausalLM, "org/base", "org/pruned")
save_file({k: v.clone() for k, v in model.state_dict().items()}, sys.argv[1])
print(record.kept, model.config.pruning_config["base_model"], model.config.pruning_config["base_revision"])
"""


UPLOAD = """
from huggingface_hub import HfApi
HfApi().create_repo(repo_id)
HfApi().upload_folder(repo_id=repo_id, folder_path=folder)
"""


def run(hub: HubServer, home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = hub.environment(home=home)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, hub, hub_client) -> dict[str, Path]:
    folders = {f"org/{name}": tmp_path_factory.mktemp(name) for name in ("base", "pruned")}
    model = ZOO["llama"].model()
    model.save_pretrained(folders["org/base"], max_shard_size="20KB")
    remove_blocks(model, {"model.layers": [1, 2]})
    save_pruned(model, folders["org/pruned"])
    for repo_id, folder in folders.items():
        hub_client("hf_owner").run(UPLOAD, repo_id=repo_id, folder=folder)
    return folders


def test_only_the_shards_that_hold_what_stays_are_downloaded(hub, checkpoints, tmp_path):
    index = json.loads((checkpoints["org/base"] / "model.safetensors.index.json").read_text())["weight_map"]
    gone = ("model.layers.1.", "model.layers.2.")
    wanted = {shard for key, shard in index.items() if not key.startswith(gone)}
    assert wanted < set(index.values())
    before = len(hub.downloads())
    result = run(hub, tmp_path / "home", "-c", LOAD, str(tmp_path / "state.safetensors"))
    downloads = hub.downloads()[before:]
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{{'model.layers': (0, 3)}} org/base {hub.head('org/base')}"
    shards = {
        name.rpartition("/")[2] for name in downloads if name.startswith("org/base/") and name.endswith(".safetensors")
    }
    assert shards == wanted
    assert "org/pruned/model.safetensors" not in downloads
    expected = tf.AutoModelForCausalLM.from_pretrained(checkpoints["org/pruned"]).state_dict()
    found = load_file(tmp_path / "state.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("verify", [False, True])
def test_surgery_on_files_of_the_hub(verify, hub, checkpoints, tmp_path):
    """Without the verification, which reads all blocks, only what holds a tensor that stays is downloaded."""
    index = json.loads((checkpoints["org/base"] / "model.safetensors.index.json").read_text())["weight_map"]
    gone = ("model.layers.1.", "model.layers.2.")
    wanted = {shard for key, shard in index.items() if verify or not key.startswith(gone)}
    before, out = len(hub.downloads()), tmp_path / "out"
    command = ["remove", "org/base", "--blocks", "model.layers=1-2", "-o", str(out)]
    result = run(hub, tmp_path / "home", "-m", "deeparc_hf", *command, *([] if verify else ["--no-verify", "--json"]))
    assert result.returncode == 0, result.stderr
    downloads = {name.rpartition("/")[2] for name in hub.downloads()[before:] if name.endswith(".safetensors")}
    assert downloads == wanted
    expected = tf.AutoModelForCausalLM.from_pretrained(checkpoints["org/pruned"]).state_dict()
    found = tf.AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    record = PrunedConfig.from_pretrained(out)
    assert (record.base_model, record.base_revision) == ("org/base", hub.head("org/base"))


def test_inspect_reads_the_config_only(hub, checkpoints, tmp_path):
    before = len(hub.downloads())
    result = run(hub, tmp_path / "home", "-m", "deeparc_hf", "inspect", "org/pruned", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert PrunedConfig.from_dict(facts["record"]).kept == {"model.layers": (0, 3)}
    assert not any(name.endswith(".safetensors") for name in hub.downloads()[before:])


def test_a_missing_repository_is_the_hubs_own_error(hub, tmp_path):
    result = run(
        hub, tmp_path / "home", "-c", "import deeparc_hf; deeparc_hf.PrunedConfig.from_pretrained('org/nothing')"
    )
    told = run(hub, tmp_path / "home", "-m", "deeparc_hf", "inspect", "org/nothing")
    assert result.returncode == 1
    assert "RepositoryNotFoundError" in result.stderr
    assert told.returncode == 2
    # transformers imports torchao where it is installed, of which torch has something to say
    said = [line for line in told.stderr.splitlines() if "torch/utils/_pytree.py" not in line]
    assert len(said) == 1 and said[0].startswith("error: Cannot load org/nothing")
