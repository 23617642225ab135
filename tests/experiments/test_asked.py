"""How an experiment was asked for: the command without what is only on this machine, settings, data."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from deeparc_hf.experiments.asked import asked_for, command_of
from deeparc_hf.experiments.splits import Splits


@dataclass
class Own:
    """A recipe's own settings."""

    text_column: str = "text"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("--num_blocks 5 4 --use_cpu", "--num_blocks 5 4 --use_cpu"),
        ("--model org/name --train_file=FILE", "--model org/name --train_file=train.csv"),
        ("--model FOLDER --threshold=0.9", "--model FOLDER --threshold=0.9"),
        ("--output_dir FOLDER/x --seed 3", "--seed 3"),
        ("--repo_id me/mine --repo_private --seed 3", "--seed 3"),
        ("--hub_token hf_secret --seed 3", "--seed 3"),
        ("--hub_token=hf_secret --model hf_other", "--model TOKEN"),
        ("--logging_dir /not/there --learning_rate -1e-3", "--logging_dir there --learning_rate -1e-3"),
        ("--config FOLDER/configs/mine.yaml", "--config recipes/configs/mine.yaml"),
    ],
)
def test_the_command_holds_no_places_and_no_tokens(tmp_path, given, shown):
    file = tmp_path / "train.csv"
    file.touch()
    words = given.replace("FILE", str(file)).replace("FOLDER/x", str(tmp_path / "x")).replace("FOLDER/c", f"{tmp_path}/c")
    words = words.replace("FOLDER", str(tmp_path))
    assert command_of("a.py", words.split()) == f"python recipes/a.py {shown}"


def test_several_processes_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_of("a.py", []) == "accelerate launch --num_processes 2 recipes/a.py"


def test_facts(monkeypatch):
    monkeypatch.setattr("sys.argv", ["a.py", "--seed", "1"])
    splits = Splits(SimpleNamespace(), None, None, (), {"train": {"rows": 3}})
    assert asked_for("a.py", None, Own(), splits) == {
        "recipe": "a.py",
        "command": "python recipes/a.py --seed 1",
        "settings": {"text_column": "text"},
        "data": {"train": {"rows": 3}},
    }
