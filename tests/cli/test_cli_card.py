"""`deeparc card`, `push` and `env`."""

from __future__ import annotations

import json

import pytest

from deeparc_hf import remove_blocks, save_pruned
from deeparc_hf.cli import main
from deeparc_hf.publish import made_by_us
from tests.zoo import ZOO


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "small"
    model = ZOO["bert"].model()
    remove_blocks(model, {"bert.encoder.layer": [1]})
    save_pruned(model, folder)
    return folder


def test_card_writes_the_card(checkpoint, capsys):
    assert (
        main(
            [
                "card",
                str(checkpoint),
                "--license",
                "mit",
                "--dataset",
                "dair-ai/emotion",
                "--tag",
                "mine",
                "--language",
                "en",
            ]
        )
        == 0
    )
    text = (checkpoint / "README.md").read_text("utf-8")
    assert (
        made_by_us(text)
        and "license: mit" in text
        and "- dair-ai/emotion" in text
        and "- mine" in text
        and "# small" in text
    )
    assert capsys.readouterr().out == ""


def test_card_goes_elsewhere_when_told(checkpoint, tmp_path, capsys):
    assert main(["card", str(checkpoint), "-o", "-", "--model-name", "name", "--repo-id", "org/name"]) == 0
    out = capsys.readouterr().out
    assert "# name" in out and '"org/name"' in out and not (checkpoint / "README.md").exists()
    assert main(["card", str(checkpoint), "-o", str(tmp_path / "deep" / "card.md")]) == 0
    assert made_by_us((tmp_path / "deep" / "card.md").read_text("utf-8"))


def test_a_card_that_somebody_wrote_stays(checkpoint, capsys):
    (checkpoint / "README.md").write_text("# Mine\n", "utf-8")
    assert main(["card", str(checkpoint)]) == 2
    assert "was written or edited by somebody" in capsys.readouterr().err
    assert (checkpoint / "README.md").read_text("utf-8") == "# Mine\n"
    assert main(["card", str(checkpoint), "--overwrite"]) == 0
    assert made_by_us((checkpoint / "README.md").read_text("utf-8"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["card", "org/name"], "hf download org/name --local-dir"),
        (["card", "no/such/folder"], "There is no folder no/such/folder."),
        (["push", "no/such/folder", "org/name"], "There is no folder no/such/folder"),
        (["push", ".", "org/name"], "is no whole checkpoint"),
    ],
)
def test_what_is_not_there_is_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_local_path_is_no_base_model(checkpoint, capsys):
    assert main(["card", str(checkpoint), "--base-model", "/home/me/bert"]) == 2
    assert "is not the id of a repository on the Hub" in capsys.readouterr().err


def test_push_says_that_the_hub_cannot_be_reached(checkpoint, capsys):
    """The tests' own process is offline."""
    assert main(["push", str(checkpoint), "org/name"]) == 2
    err = capsys.readouterr().err
    assert "Hub" in err and err.count("\n") == 1


def test_env_tells_versions_and_hardware(capsys):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"python", "deeparc_hf", "torch", "transformers", "platform", "device"} <= facts.keys()
    assert main(["env"]) == 0
    assert "torch: " in capsys.readouterr().out
