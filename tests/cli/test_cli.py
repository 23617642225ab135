"""The command line, with real tiny checkpoints, a real tokenizer and real files."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import timm
import torch
import transformers as tf
from PIL import Image

from deeparc_hf import PrunedConfig, PruningPlan, find_stacks
from deeparc_hf.cli import main, make_parser
from deeparc_hf.cli.sources import find_source, skeleton
from deeparc_hf.healing.sites import healing_text
from deeparc_hf.pruning.config import MPruneConfig
from deeparc_hf.sparsity.config import WandaConfig
from tests.zoo import VIT_STACK, ZOO

from . import cli_tools
from .cli_tools import error_of, run

checkpoints, data, own_cache = cli_tools.checkpoints, cli_tools.data, cli_tools.own_cache


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["search"], ["prune"]])
def test_help_renders(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: {' '.join(['deeparc', *arguments])}" in text
    if arguments == ["prune"]:  # choices come from the registry, help texts from the settings
        assert "{cka,cka_biased,cosine,effect}" in text
        assert "Stride of removal" in text


def test_without_arguments_the_help_is_printed(capsys):
    code, out, err = run(capsys)
    assert code == 0 and err == ""
    assert "usage: deeparc" in out and all(
        command in out for command in ("inspect", "search", "prune", "sparsify", "card", "push", "env")
    )


TRAINING_ONLY = {
    spec.name
    for config in (MPruneConfig, WandaConfig)
    for spec in dataclasses.fields(config)
    if spec.metadata.get("trainer")
}
ELSEWHERE = (
    r"callback|Trainer|\bdict\b|\blists?\b|Config\b|\biterations?\b|baseline|distill|training begins|\w\(\.\.\.\)"
)


@pytest.mark.parametrize("command", ["inspect", "search", "prune", "sparsify", "card", "push", "env"])
def test_help_speaks_of_nothing_that_the_command_does_not_take(command):
    parsers = make_parser([command])._subparsers._group_actions[0].choices
    actions = parsers[command]._actions
    options = {option for action in actions for option in action.option_strings}
    assert not {f"--{name.replace('_', '-')}" for name in TRAINING_ONLY} & options
    for action in actions:
        text = action.help or ""
        assert not re.search(ELSEWHERE, text), text
        mentioned = {found.rstrip(".,:;") for found in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}
        assert mentioned <= options, text
        assert not re.search(r"\b[a-z]+_[a-z_]+\b", text.replace("cka_biased", "")), text  # names of Python's settings


def test_inspect_shows_stacks_pins_and_parameters(capsys, checkpoints):
    model = ZOO["t5"].model()
    code, out, _ = run(capsys, "inspect", checkpoints / "t5", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["class"] == "T5ForConditionalGeneration"
    assert facts["parameters"] == model.num_parameters()
    for name, stack in find_stacks(model).items():
        assert facts["stacks"][name]["parameters"] == [
            sum(p.numel() for p in block.parameters()) for block in stack.blocks
        ]
        assert facts["stacks"][name]["pinned"] == {str(index): reason for index, reason in stack.pinned.items()}
    assert facts["record"] is None
    code, out, _ = run(capsys, "inspect", checkpoints / "t5")
    assert "block 0 is pinned: owns" in out
    assert f"{model.num_parameters():,} parameters" in out


@pytest.mark.parametrize("name", ["bert", "timm"])
def test_inspect_needs_no_weights(capsys, checkpoints, tmp_path, name):
    (tmp_path / "config.json").write_text((checkpoints / name / "config.json").read_text())
    code, out, _ = run(capsys, "inspect", tmp_path, "--json")
    assert code == 0
    assert len(json.loads(out)["stacks"]) == 1
    model = skeleton(find_source(str(tmp_path)))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_inspect_of_a_large_model_takes_no_memory(capsys, tmp_path):
    # about 2.6 TB of weights
    tf.LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=200, num_attention_heads=128
    ).save_pretrained(tmp_path)
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert code == 0
    assert "layers: 200 blocks" in out
    assert " B)" in out.splitlines()[0]


@pytest.mark.parametrize("name", ["timm:resnet50", "timm:vit_tiny_patch16_224"])
def test_inspect_of_a_timm_architecture(capsys, name):
    code, out, _ = run(capsys, "inspect", name, "--json")
    assert code == 0
    with torch.device("meta"):
        expected = timm.create_model(name.removeprefix("timm:"))
    assert json.loads(out)["parameters"] == sum(p.numel() for p in expected.parameters())


def test_inspect_with_another_class(capsys, checkpoints):
    _, out, _ = run(capsys, "inspect", checkpoints / "bert", "--json", "--auto-class", "AutoModel")
    assert json.loads(out)["class"] == "BertModel"


def test_prune_writes_a_checkpoint_that_stock_transformers_loads(capsys, checkpoints, data, tmp_path):
    out = tmp_path / "made" / "out"
    code, stdout, _ = run(
        capsys, "prune", checkpoints / "bert", "--data", data / "d.csv", "--num-blocks", "3", "-o", out
    )
    assert code == 0
    assert "remove 1 of 4 blocks" in stdout
    plan = PruningPlan.from_json(out / "pruning_plan.json")
    assert plan.num_kept == 3
    assert plan.samples == 64
    model, info = tf.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    whole = tf.AutoModelForSequenceClassification.from_pretrained(checkpoints / "bert").eval()
    kept = plan.stacks["bert.encoder.layer"].kept
    whole.bert.encoder.layer = torch.nn.ModuleList(whole.bert.encoder.layer[i] for i in kept)
    words = tf.AutoTokenizer.from_pretrained(out)("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        # not to the bit: where a tensor lies in memory decides in which order sums are taken
        torch.testing.assert_close(model.eval()(**words).logits, whole(**words).logits, atol=1e-6, rtol=0)
    assert PrunedConfig.from_pretrained(out).kept == {"bert.encoder.layer": kept}
    rows = json.loads((out / "report.json").read_text())["measurements"]
    assert [row["parameters"] for row in rows] == [
        tf.AutoModelForSequenceClassification.from_pretrained(checkpoints / "bert").num_parameters(),
        model.num_parameters(),
    ]
    assert rows[1]["accuracy"] is None
    assert Image.open(out / "heatmap.png").size[0] > 300
    assert str(tmp_path) not in (out / "report.md").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_tokenizer_is_saved_as_it_was(capsys, checkpoints, data, tmp_path):
    run(
        capsys,
        "prune",
        checkpoints / "bert",
        "--data",
        data / "d.csv",
        "--num-blocks",
        "3",
        "--max-length",
        "5",
        "-o",
        tmp_path / "out",
    )
    saved = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert saved["padding"] is None
    assert saved["truncation"] is None


def test_pruning_twice_composes_the_record(capsys, checkpoints, data, tmp_path):
    for source, blocks, out in ((checkpoints / "bert", 3, tmp_path / "a"), (tmp_path / "a", 2, tmp_path / "b")):
        assert run(capsys, "prune", source, "--data", data / "d.csv", "--num-blocks", blocks, "-o", out)[0] == 0
    record = PrunedConfig.from_pretrained(tmp_path / "b")
    assert record.stacks["bert.encoder.layer"].length == 4
    assert len(record.iterations) == 2
    _, text, _ = run(capsys, "inspect", tmp_path / "b")
    assert "pruned 2 time(s)" in text
    assert "2 of 4 blocks are left" in text


def test_every_file_format_gives_the_same_plan(capsys, checkpoints, data):
    plans = {}
    for suffix in ("csv", "tsv", "jsonl", "parquet", "txt"):
        arguments = (
            "prune",
            checkpoints / "bert",
            "--data",
            data / f"d.{suffix}",
            "--keep-ratio",
            "0.5",
            "--dry-run",
            "--json",
        )
        plans[suffix] = json.loads(run(capsys, *arguments)[1])["plan"]
    assert all(plan == plans["csv"] for plan in plans.values())


def test_dry_run_leaves_no_checkpoint(capsys, checkpoints, data, tmp_path):
    arguments = (
        "prune",
        checkpoints / "bert",
        "--data",
        data / "d.jsonl",
        "--text-column",
        "text",
        "--num-blocks",
        "2",
        "--dry-run",
    )
    code, stdout, _ = run(capsys, *arguments)
    assert code == 0
    assert "nothing was written" in stdout
    assert run(capsys, *arguments, "-o", tmp_path / "out")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "heatmap.png",
        "pruning_plan.json",
        "report.json",
        "report.md",
    ]


def test_json_is_all_there_is_on_stdout(capsys, checkpoints, data, tmp_path):
    arguments = ("--num-blocks", "transformer.h=3", "--freeze", "partial", "--json", "-o", tmp_path / "out")
    code, out, _ = run(
        capsys, "prune", checkpoints / "gpt2", "--data", data / "d.csv", "--text-column", "text", *arguments
    )
    result = json.loads(out)
    assert code == 0
    assert PruningPlan.from_dict(result["plan"]).num_kept == 3
    assert result["parameters"]["after"] < result["parameters"]["before"]
    assert sorted(result["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_encoder_decoder_prunes_with_a_target(capsys, checkpoints, data, tmp_path):
    common = (
        "prune",
        checkpoints / "t5",
        "--data",
        data / "d.csv",
        "--text-column",
        "text",
        "--keep-ratio",
        "0.6",
        "-o",
        tmp_path / "out",
    )
    assert "--target-column" in error_of(capsys, *common)
    assert run(capsys, *common, "--target-column", "answer")[0] == 0
    _, info = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_image_models_prune_from_a_folder(capsys, checkpoints, data, tmp_path, name):
    code, _, _ = run(
        capsys, "prune", checkpoints / name, "--data", data / "images", "--num-blocks", "3", "-o", tmp_path / "out"
    )
    assert code == 0
    if name == "vit":
        assert len(find_stacks(tf.AutoModelForImageClassification.from_pretrained(tmp_path / "out"))[VIT_STACK]) == 3
        tf.AutoImageProcessor.from_pretrained(tmp_path / "out")
    else:
        assert len(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).blocks) == 3
        record = json.loads(run(capsys, "inspect", tmp_path / "out", "--json")[1])["record"]
        assert len(record["stacks"]["blocks"]["kept"]) == 3


def test_nothing_to_remove_names_the_threshold_that_would(capsys, checkpoints, data):
    arguments = ("prune", checkpoints / "bert", "--data", data / "d.csv", "--text-column", "text", "--dry-run")
    code, _, err = run(capsys, *arguments, "--threshold", "1.0")
    assert code == 0
    first = err.partition("would go at threshold ")[2][:6]
    assert "remove 1 of 4" in run(capsys, *arguments, "--threshold", float(first) - 1e-4)[1]


def test_samples_are_chosen_by_the_seed(capsys, checkpoints, data):
    def plan(seed):
        out = run(
            capsys,
            "prune",
            checkpoints / "bert",
            "--data",
            data / "d.csv",
            "--text-column",
            "text",
            "--dry-run",
            "--json",
            "--calibration-samples",
            "40",
            "--seed",
            seed,
        )[1]
        return json.loads(out)["plan"]["stacks"]

    assert plan(1) == plan(1) != plan(2)


def test_prune_heals_where_asked(capsys, checkpoints, data, tmp_path):
    from transformers import AutoModelForSequenceClassification

    saved = []
    for name, more in (("plain", ()), ("healed", ("--heal", "lstsq"))):
        out = tmp_path / name
        code, said, _ = run(
            capsys, "prune", checkpoints / "bert", "--data", data / "d.csv", "--num-blocks", "3", *more, "-o", out
        )
        assert code == 0
        saved.append(AutoModelForSequenceClassification.from_pretrained(out).state_dict())
    (site,) = PrunedConfig.from_pretrained(tmp_path / "healed").iterations[-1]["healing"]
    text = healing_text(site)
    assert (
        f"Healing: {text}\n" in said and f"## Healing\n\n- {text}\n" in (tmp_path / "healed" / "report.md").read_text()
    )
    assert json.loads((tmp_path / "healed" / "report.json").read_text())["healing"] == [site]
    assert "Healing" not in (tmp_path / "plain" / "report.md").read_text()
    changed = {key for key, value in saved[0].items() if not torch.equal(value, saved[1][key])}
    assert bool(changed) == site["healed"]
    assert all(f".{site['kept']}.output." in key for key in changed)
