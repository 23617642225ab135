"""How an experiment was asked for: the command without what is only on this machine, settings, data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import TrainingArguments

from experiment.arguments import DataArguments
from experiment.provenance import provenance, published_command
from experiment.splits import Splits

RECIPE = Path(__file__).parents[3] / "recipes" / "t5_qg.py"


@dataclass
class Own:
    """A recipe's own settings."""

    text_column: str = "text"
    prefix: str = "ask: "
    gguf_file: str | None = None


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--num_blocks", "5", "4", "--use_cpu"], "--num_blocks 5 4 --use_cpu"),
        (["--model", "org/name", "--train_file=FILE"], "--model org/name --train_file=train.csv"),
        (["--model", "HERE", "--threshold=0.9"], "--model FOLDER --threshold=0.9"),
        (["--model", "a/b/c", "--seed", "3"], "--model c --seed 3"),
        (["--output_dir", "HERE/x", "--seed", "3"], "--seed 3"),
        (["--output-dir", "HERE/x", "--learning-rate", "-1e-3"], "--learning_rate -1e-3"),
        (["--repo_id", "me/mine", "--repo-private", "--seed", "3"], "--seed 3"),
        (["--hub_token", "secret", "--hub-token=secret", "--push_to_hub_token", "secret"], ""),
        (["--logging_dir", "../secret/logs", "--run_name", "at /home/me", "--deepspeed", '{"x": "/home/me"}'], ""),
        (["--model", "https://me:hf_abc@huggingface.co/x/y"], "--model y"),
        (["--prefix", "say hf_abc1 x"], "--prefix 'say TOKEN x'"),
        (["--prefix", "/answer: ", "--text_column", "HERE"], "--prefix '/answer: ' --text_column HERE"),
        (["--prefix", "~you are: ", "--model", "~nobody-of-that-name/x"], "--prefix '~you are: ' --model FOLDER"),
        (["--model", "m" * 300], "--model FOLDER"),
        (["--gguf_file", "/models/mine.gguf"], "--gguf_file mine.gguf"),
        (["--config", "HERE/configs/mine.yaml"], "--config mine.yaml"),
        (
            ["--config", str(RECIPE.parent / "configs" / "t5_base_squad.yaml")],
            "--config recipes/configs/t5_base_squad.yaml",
        ),
        (["--config=HERE/t5_base_squad.yaml"], "--config=t5_base_squad.yaml"),
    ],
)
def test_the_command_holds_no_places_and_no_tokens(tmp_path, given, shown):
    (tmp_path / "train.csv").touch()
    (tmp_path / "t5_base_squad.yaml").write_text("an edited copy")
    words = [word.replace("FILE", str(tmp_path / "train.csv")).replace("HERE", str(tmp_path)) for word in given]
    expected = shown.replace("HERE", str(tmp_path))  # a column may be called anything
    assert (
        published_command(RECIPE, words, ["text_column", "prefix", "gguf_file"])
        == f"python recipes/t5_qg.py {expected}".strip()
    )


@pytest.mark.parametrize(
    ("here", "launcher"), [("2", "torchrun --nproc_per_node 2"), ("1", "torchrun --nnodes 2 --nproc_per_node 1")]
)
def test_several_processes_are_told(monkeypatch, here, launcher):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert published_command(RECIPE, []) == f"{launcher} recipes/t5_qg.py"


def test_facts(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["t5_qg.py", "--seed", "1"])
    splits = Splits(None, None, None, (), {"train": {"rows": 3}})
    data = DataArguments(model=str(tmp_path), train_file=str(tmp_path / "a.csv"), repo_id="me/x", max_train_samples=3)
    training = TrainingArguments(
        str(tmp_path), seed=1, warmup_steps=7, hub_token="secret", run_name=str(tmp_path), use_cpu=True
    )
    facts = provenance(str(RECIPE), None, data, Own(gguf_file=str(tmp_path / "m.gguf")), training, splits)
    assert facts == {
        "recipe": "t5_qg.py",
        "command": "python recipes/t5_qg.py --seed 1",
        "settings": {
            "model": "FOLDER",
            "train_file": "a.csv",
            "max_train_samples": 3,
            "text_column": "text",
            "prefix": "ask: ",
            "gguf_file": "m.gguf",
        },
        "trainer": {"seed": 1, "warmup_steps": 7, "use_cpu": True},
        "data": {"train": {"rows": 3}},
    }
    assert str(tmp_path) not in json.dumps(facts)
