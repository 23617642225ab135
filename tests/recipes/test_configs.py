"""The files under recipes/: every config parses for its recipe and holds the seed's settings, every grid the seed's
figures.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from deeparc_hf.errors import ConfigError
from experiment.arguments import DataArguments, PruningArguments, parse, read_config
from experiment.sweep import Sweep, SweepFile, recipe_types

from .tiny import RECIPES, ROOT

# TRL's own defaults are given by a name that transformers has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

RESULTS = ROOT.parent / "shared" / "seed" / "RESULTS.md"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
GRIDS = sorted((RECIPES / "grids").glob("*.yaml"))
LAUNCHERS = sorted((RECIPES / "accelerate_configs").glob("*.yaml"))
RESNET, BERT = {"size": 64, "rate": 2e-4, "tune": 3}, {"size": 32, "rate": 5e-5, "tune": 1}
WANDA = [0.1, 0.2, 0.3, 0.4, 0.5]
# settings of the first experiments; thresholds and strides are those that their grid must have
SEED = {
    "resnet152_imagenet": {
        **RESNET,
        "model": "microsoft/resnet-152",
        "thresholds": [0.99, 0.98],
        "ks": [1, 2],
        "iterations": 2,
    },
    "resnet50_imagenet": {
        **RESNET,
        "model": "microsoft/resnet-50",
        "thresholds": [0.99, 0.98, 0.95],
        "ks": [1],
        "iterations": 2,
    },
    "bert_base_emotion": {
        **BERT,
        "model": "google-bert/bert-base-uncased",
        "thresholds": [0.99, 0.98],
        "ks": [1],
        "iterations": 2,
    },
    "bert_base_yahoo": {
        **BERT,
        "model": "google-bert/bert-base-uncased",
        "thresholds": [0.99, 0.98],
        "ks": [1],
        "iterations": 1,
    },
}
DATA = {
    "resnet152_imagenet": "ILSVRC/imagenet-1k",
    "resnet50_imagenet": "ILSVRC/imagenet-1k",
    "bert_base_emotion": "dair-ai/emotion",
    "bert_base_yahoo": "community-datasets/yahoo_answers_topics",
    "t5_base_squad": "rajpurkar/squad",
}


def recipe_of(path: Path) -> Path:
    """The recipe that the command at the top of a config names."""
    command = re.search(r"^#     python (recipes/\w+\.py) --config (\S+)$", path.read_text(), re.MULTILINE)
    assert command and ROOT / command[2] == path, "the top of the file shows its command"
    return ROOT / command[1]


def parsed(path: Path, *words: str):
    """The arguments that a recipe gets from a config, by type; the recipe is one of those that are there."""
    recipe = recipe_of(path)
    if not recipe.exists():
        pytest.skip(f"{recipe.name} is not there")
    *types, training = recipe_types(recipe)
    if training is Seq2SeqTrainingArguments and recipe.stem not in ("speech_recognition", "t5_qg"):
        training = TrainingArguments
    found = parse([*types, training], ["--config", str(path), "--use_cpu", *words])
    by_type = {type(each): each for each in found}
    return by_type[DataArguments], by_type[PruningArguments], by_type[training]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_parse_for_their_recipe(path):
    data, pruning, training = parsed(path)
    written = read_config(path)
    for key, value in written.items():
        holder = next((each for each in (data, pruning, training) if hasattr(each, key)), None)
        if holder is not None and key != "num_blocks" and not isinstance(getattr(holder, key), bool):
            assert getattr(holder, key) == value or str(getattr(holder, key).value) == value, key
    assert training.output_dir == f"runs/{path.stem}" and training.seed == 42
    assert parsed(path, "--learning_rate", "0.5")[2].learning_rate == 0.5  # the command line wins


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_misspelt_setting_is_found(path, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({**read_config(path), "lerning_rate": 0.5}))
    if not recipe_of(path).exists():
        pytest.skip(f"{recipe_of(path).name} is not there")
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        parse(recipe_types(recipe_of(path)), ["--config", str(bad)])


@pytest.mark.parametrize("name", SEED)
def test_configs_hold_the_seed_s_settings(name):
    told = SEED[name]
    data, pruning, training = parsed(RECIPES / "configs" / f"{name}.yaml")
    assert (data.model, data.dataset) == (told["model"], DATA[name])
    assert (training.per_device_train_batch_size, training.learning_rate) == (told["size"], told["rate"])
    assert (training.optim, training.weight_decay) == ("adamw_torch", 0)
    assert (pruning.finetune_epochs, pruning.retrain_epochs, pruning.iterations) == (
        told["tune"],
        3,
        told["iterations"],
    )
    measure = (pruning.similarity, pruning.rows, pruning.across_stacks)
    assert measure == (("cka", "flat", True) if "resnet" in name else ("cka_biased", None, False))
    assert pruning.max_drop is None
    assert pruning.threshold in told["thresholds"] and pruning.k in told["ks"]
    assert (pruning.sparsity, pruning.sparsity_retrain) == (
        WANDA if "bert" in name else [],
        [0.5] if "emotion" in name else [],
    )
    grid = yaml.safe_load((RECIPES / "grids" / f"{name}.yaml").read_text())["grid"]
    assert list(grid["threshold"].values()) == told["thresholds"]
    assert list(grid.get("k", {"": 1}).values()) == told["ks"]
    assert grid["freeze"] == {"full": "none", "Part": "partial"}


def test_the_t5_config_holds_the_seed_s_settings():
    data, pruning, _ = parsed(RECIPES / "configs" / "t5_base_squad.yaml")
    assert (data.model, data.dataset) == ("google-t5/t5-base", DATA["t5_base_squad"])
    assert (pruning.threshold, pruning.k, pruning.retrain_epochs, pruning.iterations) == (0.99, 1, 3, 2)
    assert pruning.similarity == "cka_biased"


@pytest.mark.parametrize("name", DATA)
def test_the_published_settings_differ_in_what_the_code_tells_alone(name):
    path = RECIPES / "configs" / f"{name}_published.yaml"
    told, ours = read_config(RECIPES / "configs" / f"{name}.yaml"), read_config(path)
    found = {key: value for key, value in ours.items() if told.get(key) != value}
    assert found.pop("output_dir") == f"runs/{name}_published"
    bert = {"warmup_steps": 500, "weight_decay": 1e-3}
    expected = {
        "bert_base_emotion": bert,
        "bert_base_yahoo": {**bert, "text_pair_column": None, "max_length": 512},
        "t5_base_squad": {"prefix": "", "max_new_tokens": 19, "learning_rate": 3e-5},
    }
    assert found == expected.get(name, {"lr_scheduler_type": "constant", "mirror": False, "shift": 0})
    parsed(path)
    grid = SweepFile.read(RECIPES / "grids" / f"{name}.yaml", path)
    assert all(str(path) in command for _, command in Sweep(grid, Path("out")).commands())


def test_a_base_is_one_file(tmp_path):
    for name, text in (
        ("a", "k: 1\nseed: 1"),
        ("b", "base: a.yaml\nk: 2"),
        ("c", "base: b.yaml"),
        ("d", "base: none.yaml"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
    assert read_config(tmp_path / "b.yaml") == {"k": 2, "seed": 1}
    with pytest.raises(ConfigError, match="has a base too"):
        read_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="base: there is no file"):
        read_config(tmp_path / "d.yaml")


@pytest.mark.parametrize("name", DATA)
def test_nothing_is_decided_on_test_data(name):
    data = parsed(RECIPES / "configs" / f"{name}.yaml")[0]
    splits = [data.train_split, data.validation_split, data.test_split]
    assert len({*splits}) == 3 and data.train_split == "train" and data.max_test_samples is None


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_grids_make_sense(path):
    data = yaml.safe_load(path.read_text())
    if not (path.parent / data["recipe"]).exists():
        pytest.skip(f"{data['recipe']} is not there")
    sweep = Sweep(SweepFile.read(path), Path("out"))
    assert recipe_of(sweep.file.config_path).name == sweep.file.recipe.name
    assert all("--config" in command for _, command in sweep.commands())
    cells = {cell for cell in sweep.file.seed if cell != "original"}
    expected = {
        "resnet152_imagenet": 8,
        "resnet50_imagenet": 5,
        "bert_base_emotion": 4,
        "bert_base_yahoo": 4,
        "t5_base_squad": 1,
    }
    assert len(cells) == expected.get(path.stem, 0)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    kinds = {"one_process": "NO", "deepspeed_zero2": "DEEPSPEED", "fsdp2": "FSDP"}
    assert config.distributed_type.value == kinds.get(path.stem, "MULTI_GPU")
    assert config.num_processes == {"one_process": 1, "two_cpu_processes": 2}.get(path.stem, 4)
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if path.stem == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_the_readme_lists_them_all():
    text = (RECIPES / "README.md").read_text()
    missing = [path.name for path in [*CONFIGS, *LAUNCHERS] if path.name not in text]
    missing += [f"grids/{path.name}" for path in GRIDS if f"grids/{path.name}" not in text]
    assert not missing


# ---- figures ----


def tables() -> dict[str, list[list[str]]]:
    """The tables of RESULTS.md, by their headings: rows of cells, the header first."""
    found: dict[str, list[list[str]]] = {}
    section = heading = ""
    for line in RESULTS.read_text("utf-8").splitlines():
        if line.startswith("## "):
            section, heading = line[3:].strip(), ""
        elif line.startswith("### "):
            heading = line[4:].strip()
        elif line.startswith("|"):
            found.setdefault(f"{section} / {heading}", []).append(
                [cell.strip() for cell in line.strip()[1:-1].split("|")]
            )
    return {name: [rows[0], *rows[2:]] for name, rows in found.items()}


SECTIONS = {
    "Resnet152": "resnet152_imagenet",
    "Resnet 50": "resnet50_imagenet",
    "Dair AI Emotion": "bert_base_emotion",
    "Yahoo Answers Topics": "bert_base_yahoo",
}
FIGURES = {  # header: where the figure stands in a grid's row, and in the row of the same model retrained
    "1epoch": "epoch 0",
    "2epoch": "epoch 1",
    "3epoch": "epoch 2",
    "Num. of layers": "blocks",
    "Num. of encoders": "blocks",
    "Parameter": "parameters",
    "Evaluation time(s)": "seconds",
    "Training time(s)": "training_seconds",
    "freeze": "freeze",
    "Accuracy": "accuracy",
    "Accuracy before training": "accuracy",
    "Accuracy after training": "retrained accuracy",
    "Evaluation loss": "loss",
    "Evaluation loss before training": "loss",
    "Evaluation loss after training": "retrained loss",
}


def printed() -> Counter:
    """Every figure of the ResNet and BERT tables: (grid, cell, row, what, value)."""
    figures: Counter = Counter()
    for name, (header, *rows) in tables().items():
        section, _, heading = name.partition(" / ")
        if section not in SECTIONS:
            continue
        zeros = re.search(r"Sparsity (\d+)%", heading)
        for row in rows:
            threshold = re.match(r"Threshold(\d+)(\(Part\))?", row[0])
            stride = re.search(r"K\s*=\s*(\d)", heading) if section == "Resnet152" else None
            iteration = re.search(r"\[(\d)", row[0]) or re.search(r"\[(\d)", heading)
            if threshold is None:
                cell, model = "original", "original"
                if heading.startswith("Wanda"):
                    model = f"original, {float(row[0]) * 100:g} % zeros"
            else:
                parts = [f"T{threshold[1]}", *([f"K{stride[1]}"] if stride else []), "Part" if threshold[2] else "full"]
                cell = " ".join(parts)
                model = f"iteration {iteration[1] if iteration else 1}" + (f", {zeros[1]} % zeros" if zeros else "")
            after = "Accuracy after training" in header
            for head, text in zip(header[1:], row[1:], strict=True):
                number = re.match(r"[\d.]+", text)
                if number is None or "original" in text:
                    continue
                what, value, where = FIGURES[head], float(number[0]), model
                if what == "parameters":
                    value = round(value * 1e6)
                if what.startswith("retrained ") or (after and what == "training_seconds"):
                    what, where = what.removeprefix("retrained "), f"{model}, retrained"
                figures[SECTIONS[section], cell, where, what, value] += 1
                if what == "epoch 2":
                    figures[SECTIONS[section], cell, where, "accuracy", value] += 1
    return figures


def written(grids) -> Counter:
    """The same of the grids."""
    figures: Counter = Counter()
    for name in grids:
        for cell, rows in yaml.safe_load((RECIPES / "grids" / f"{name}.yaml").read_text())["seed"].items():
            for model, row in rows.items():
                flat = {
                    **row.get("metrics", {}),
                    **{f"epoch {i}": value for i, value in enumerate(row.get("tested", [])) if value},
                }
                flat |= {key: value for key, value in row.items() if key not in ("metrics", "tested", "slip", "note")}
                if set(row) == {"blocks", "note"}:  # "= original"
                    continue
                for what, value in flat.items():
                    if not (model.endswith("retrained") and what == "parameters"):  # these stand once in the seed's row
                        figures[name, cell, model, what, value] += 1
    return figures


@pytest.mark.skipif(not RESULTS.exists(), reason="the seed is not beside the repository")
def test_every_figure_is_the_seed_s():
    there, ours = printed(), written(SECTIONS.values())
    assert len(there) > 400
    assert sorted(map(str, (ours - there).elements())) == [] and sorted(map(str, (there - ours).elements())) == []


@pytest.mark.skipif(not RESULTS.exists(), reason="the seed is not beside the repository")
def test_every_figure_of_the_t5_is_the_seed_s():
    header, *rows = tables()["T5 model - SQuAD (QG) / "]
    seed = yaml.safe_load((RECIPES / "grids" / "t5_base_squad.yaml").read_text())["seed"]
    ours = [seed["original"]["original"], seed["T99"]["iteration 1"], seed["T99"]["iteration 2"]]
    assert len(header) == 4 and len(rows) == 15
    values = {row[0]: row[1:] for row in rows}
    for index, row in enumerate(ours):
        assert [str(count) for count in row["blocks"]] == [
            values["Num of encoder"][index],
            values["Num of decoder"][index],
        ]
        assert f"({row['parameters']:,})" in values["Num of parameter"][index]
        scores = [float(each[index]) for name, each in values.items() if not name.startswith("Num")]
        assert list(row["metrics"].values()) == scores
    assert list(yaml.safe_load((RECIPES / "grids" / "t5_base_squad.yaml").read_text())["metrics"]) == list(
        ours[0]["metrics"]
    )


def test_known_slips_are_marked():
    slips = Counter()
    for path in GRIDS:
        for cell, rows in yaml.safe_load(path.read_text()).get("seed", {}).items():
            slips.update((path.stem, cell, model) for model, row in rows.items() if "slip" in row)
    assert sorted(slips) == [
        ("bert_base_emotion", "original", "original"),
        ("resnet152_imagenet", "T99 K1 Part", "iteration 1"),
        ("resnet152_imagenet", "T99 K2 full", "iteration 2"),
        ("resnet50_imagenet", "T95 Part", "iteration 2"),
        ("resnet50_imagenet", "T95 full", "iteration 1"),
        ("resnet50_imagenet", "T98 Part", "iteration 2"),
        ("t5_base_squad", "T99", "iteration 2"),
        ("t5_base_squad", "original", "original"),
    ]


BOTTLENECKS = [70_400, 280_064, 1_117_184, 4_462_592]


def test_parameters_follow_from_the_blocks():
    """What is printed and not marked as a slip agrees with the sizes of the blocks."""
    for path, per_block in {"bert_base_emotion": 7_087_872, "bert_base_yahoo": 7_087_872}.items():
        seed = yaml.safe_load((RECIPES / "grids" / f"{path}.yaml").read_text())["seed"]
        whole = seed["original"]["original"]
        for rows in seed.values():
            for row in rows.values():
                if "parameters" in row and "blocks" in row:
                    assert whole["parameters"] - row["parameters"] == per_block * (whole["blocks"] - row["blocks"])
    for path in ("resnet152_imagenet", "resnet50_imagenet"):
        seed = yaml.safe_load((RECIPES / "grids" / f"{path}.yaml").read_text())["seed"]
        whole = seed["original"]["original"]
        for cell, rows in seed.items():
            for model, row in rows.items():
                if "parameters" in row:
                    fits = _fits(whole["parameters"] - row["parameters"], whole["blocks"] - row["blocks"])
                    wrong = "slip" in row and ("parameters" in row["slip"])
                    assert fits != wrong, (path, cell, model)


def _fits(parameters: int, blocks: int) -> bool:
    """Whether so many blocks can have so many parameters."""
    first, second, third, fourth = BOTTLENECKS
    for c in range(blocks + 1):
        for d in range(min(2, blocks - c) + 1):
            rest, left = parameters - c * third - d * fourth, blocks - c - d
            for b in range(left + 1):
                if rest == b * second + (left - b) * first:
                    return True
    return False
