"""README and the documents: their tables follow the code, their examples run, their links lead somewhere.

`python -m tests.test_documents` writes the tables anew.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

import deeparc_hf
from deeparc_hf.architectures import families
from deeparc_hf.publish.elsewhere import difference_text, told
from deeparc_hf.publish.ways_out import FAULTS, WAYS_OUT
from deeparc_hf.search.objectives import objectives
from deeparc_hf.search.strategies import strategies
from deeparc_hf.similarity import metrics
from deeparc_hf.sparsity.methods import methods
from tests.test_project import PUBLIC, ROOT, imported, required

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = {page.stem: page.read_text("utf-8") for page in sorted(DOCS.glob("*.md"))}
README_LINES = 180
SETTINGS = {
    "settings": deeparc_hf.MPruneConfig,
    "distillation": deeparc_hf.DistillConfig,
    "sparsity": deeparc_hf.WandaConfig,
}
REGISTRIES = {
    "families": families,
    "metrics": metrics,
    "methods": methods,
    "objectives": objectives,
    "strategies": strategies,
}
TABLES = {
    "architectures": ["families"],
    "search": ["strategies", "objectives"],
    "settings": ["settings", "distillation", "sparsity"],
    "similarity": ["metrics"],
    "sparsity": ["methods"],
    "ways_out": ["ways_out", "lines", "faults"],
}
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_EXAMPLE = re.compile(r"<!-- (\w+) -->\n```python\n(.*?)```", re.DOTALL)


def examples(text: str, kind: str = "runnable") -> list[str]:
    """Examples of a page: runnable ones go on from each other, a process is whole in itself, hub ones need a Hub (see
    tests/publish/test_push.py).
    """
    return [code for found, code in _EXAMPLE.findall(text) if found == kind]


# ---- tables ----


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [
        header,
        ["---"] * len(header),
        *[[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in rows],
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_table(config: type) -> str:
    def shown(value: object) -> str:
        if value is None or value == ():
            return ""
        return f"`{json.dumps(value)}`" if isinstance(value, str) else f"`{value}`"

    fields = dataclasses.fields(config)
    return markdown_table(
        ["setting", "default", "meaning"], [[f"`{f.name}`", shown(f.default), f.metadata["help"]] for f in fields]
    )


def registry_table(kind: str) -> str:
    return markdown_table(["name", "what"], [[f"`{entry.name}`", entry.summary] for entry in REGISTRIES[kind]])


def ways_out_table() -> str:
    """The tools that pruned models were run with; types that differ by as much stand together."""
    rows = []
    for name, way in WAYS_OUT.items():
        versions = ", ".join(f"{package} {version}" for package, version in way.versions.items())
        for bound in sorted({*way.within.values(), *way.packaged.values()}):
            types = [f"`{kind}`" for kind, other in way.within.items() if other == bound]
            types += [f"`{kind}` (deeparc_pruned)" for kind, other in way.packaged.items() if other == bound]
            rows.append([name, versions, ", ".join(types), way.compared, difference_text(bound)])
    return markdown_table(["tool", "tried", "types", "compared", "largest difference"], rows)


def faults_table() -> str:
    rows = [[fault.way, f"`{fault.model_type}`", told(fault)] for fault in FAULTS]
    return markdown_table(["tool", "type", "what, and what to do"], rows)


def lines_of_ways_out() -> str:
    """What to type, as indented code: tests/ways_out runs it."""

    def indented(lines: str) -> str:
        text = lines.replace("{model}", "FOLDER").replace("{auto_class}", "AutoModelForCausalLM")
        return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))

    return "\n\n".join(f"{name}:\n\n{indented(way.lines)}" for name, way in WAYS_OUT.items())


MADE = {"faults": faults_table, "lines": lines_of_ways_out, "ways_out": ways_out_table}


def with_tables(text: str) -> str:
    """A page with its tables made from the code."""

    def fill(match: re.Match[str]) -> str:
        if match[2] in MADE:
            table = MADE[match[2]]()
        else:
            table = settings_table(SETTINGS[match[2]]) if match[2] in SETTINGS else registry_table(match[2])
        return f"{match[1]}\n{table}\n\n{match[3]}"

    return _TABLE.sub(fill, text)


def test_tables_follow_the_code():
    found = {name: [match[2] for match in _TABLE.finditer(text)] for name, text in PAGES.items()}
    assert {name: tables for name, tables in found.items() if tables} == TABLES
    for name in TABLES:
        assert PAGES[name] == with_tables(PAGES[name]), "write them anew: python -m tests.test_documents"


# ---- what is there ----


def test_the_readme_is_short():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= README_LINES
    assert [match[1] for match in re.finditer(r"!\[[^]]*\]\(([^)]+)\)", text)] == ["docs/pictures/how_it_works.svg"]


def test_every_page_is_in_the_contents():
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert len(named) == len(set(named))
    assert {Path(page).stem for page in named if "/" not in page} == PAGES.keys() | {"CONTRIBUTING", "CHANGELOG"}
    assert all((ROOT / page).exists() or (DOCS / page).exists() for page in named)


def test_every_public_name_is_in_the_reference_once():
    named = re.findall(r"^::: deeparc_hf\.(\w+)$", PAGES["reference"], re.MULTILINE)
    assert sorted(named) == sorted([*PUBLIC, "errors"])


def links(path: Path) -> Iterator[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text("utf-8"))
    for token in tokens:
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if target and not re.match(r"[a-z]+:", target):
                yield target


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


LINKING = [README, *sorted(ROOT.glob("C*.md")), *sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*/README.md"))]


@pytest.mark.parametrize("path", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in links(path):
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_the_site_has_what_its_pages_link_to():
    """Files beside docs/ are in the site where docs/hooks.py lists them."""
    assigned = [node for node in ast.parse((DOCS / "hooks.py").read_text("utf-8")).body if isinstance(node, ast.Assign)]
    patterns = next(ast.literal_eval(node.value) for node in assigned if node.targets[0].id == "BESIDE")
    there = {path.resolve() for pattern in patterns for path in ROOT.glob(pattern)}
    for path in DOCS.glob("*.md"):
        beside = [target.partition("#")[0] for target in links(path) if target.startswith("../")]
        missing = [target for target in beside if (DOCS / target).resolve() not in there]
        assert not missing, (path.name, missing)


# ---- examples ----


def test_every_piece_of_python_is_an_example_that_runs():
    count = 0
    for text in (README.read_text("utf-8"), *PAGES.values()):
        kinds = [kind for kind, _ in _EXAMPLE.findall(text)]
        assert len(kinds) == text.count("```python") and set(kinds) <= {"runnable", "process", "hub"}
        count += len(kinds) - kinds.count("hub")
    assert count >= 12


def test_what_is_shown_first_runs_after_the_first_command():
    for text in (README.read_text("utf-8"), PAGES["get_started"]):
        assert re.findall(r"^    (pip install .*?)(?:  .*)?$", text, re.MULTILINE)[0] == "pip install ."
        needs = [imported(example) for example in examples(text)]
        assert {"datasets", "transformers"} <= needs[0] and set().union(*needs) <= required()
    others = [imported(example) - required() for text in PAGES.values() for example in examples(text)]
    # whoever has adapters has PEFT, which is no extra, and whoever has a sentence encoder has its library
    assert 'pip install "peft>=0.18"' in PAGES["adapters"]
    assert 'pip install "sentence-transformers>=6"' in PAGES["sentence_encoders"]
    assert [more for more in others if more] == [{"peft"}, {"sentence_transformers"}, {"timm"}] and "timm" in required(
        "timm"
    ) & required("all")
    assert {"datasets", "evaluate"} <= required()


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


def run(text: str, namespace: dict[str, Any], page: str) -> None:
    """The examples of a page, in order; the Hub ids stand for a small checkpoint and small data on the disk."""
    for example in examples(text):
        local = example.replace("google-bert/bert-base-uncased", "bert").replace("dair-ai/emotion", "emotion")
        exec(compile(local, page, "exec"), namespace)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Iterator[pytest.MonkeyPatch]:
    """One thread, since small models are quicker with it; and a data cache of its own."""
    threads, cache = torch.get_num_threads(), tmp_path_factory.mktemp("cache")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(cache))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        yield patch
    torch.set_num_threads(threads)


def prepared(folder: Path) -> Path:
    tiny_checkpoint(folder / "bert", tiny_emotions(folder / "emotion"))
    return folder


def test_the_examples_of_the_readme_run(small, monkeypatch, tmp_path):
    monkeypatch.chdir(prepared(tmp_path))
    namespace: dict[str, Any] = {}
    run(README.read_text("utf-8"), namespace, "README.md")
    report = json.loads(Path("runs/pruned/pruning_report.json").read_text("utf-8"))
    accepted = [a for a in report["attempts"] if a.get("decision") == "accepted"]
    gone = sum(len(blocks) for attempt in accepted for blocks in attempt["plan_removed"].values())
    assert accepted and namespace["model"].config.num_hidden_layers == 12 - gone
    assert len(accepted[0]["plan_removed"]["bert.encoder.layer"]) == 2  # a sixth


@pytest.fixture(scope="module")
def started(small, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder in which the examples of the first page ran, and the names that they left."""
    folder, namespace = prepared(tmp_path_factory.mktemp("documents")), dict[str, Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(PAGES["get_started"], namespace, "get_started.md")
    return folder, namespace


def test_the_examples_of_the_first_page_run(started):
    folder, names = started
    assert len(names["record"].kept["bert.encoder.layer"]) == 8 and names["plan"].num_kept == 8
    assert names["model"].config.num_hidden_layers == 8
    assert {path.name for path in (folder / "runs").iterdir()} == {"pruned", "finetuned", "pruned_at_once"}


def distilled(names: dict[str, Any]) -> None:
    last = deeparc_hf.PrunedConfig.from_pretrained("runs/taught").iterations[-1]
    assert last["settings"]["distill"]["alpha"] == 0.5
    assert {"before", "removed", "healed", "retrained"} == set(last["stages"])


def healed(names: dict[str, Any]) -> None:
    assert names["pruned"].config.num_hidden_layers == 9 and "is healed" in str(names["site"])


def searched(names: dict[str, Any]) -> None:
    assert [point.num_blocks for point in names["frontier"].points] == [12, 11, 10, 9, 8]
    record = deeparc_hf.PrunedConfig.from_pretrained("runs/searched")
    assert len(record.kept["bert.encoder.layer"]) == 9 and record.iterations[-1]["healing"]
    assert Path("runs/search.journal").is_file()


def sparse(names: dict[str, Any]) -> None:
    record = deeparc_hf.PrunedConfig.from_pretrained("runs/sparse")
    assert len(record.kept["bert.encoder.layer"]) == 8 and len(record.sparsity["matrices"]) == 48
    assert deeparc_hf.PrunedConfig.from_pretrained("runs/sparse_at_once").sparsity["settings"]["sparsity"] == 0.3


def trained(names: dict[str, Any]) -> None:
    assert names["report"]["end"]


def by_hand(names: dict[str, Any]) -> None:
    assert names["plan"].num_kept == 8 and len(names["model"].layer3) == 4


def adapted(names: dict[str, Any]) -> None:
    assert len(names["again"].get_base_model().bert.encoder.layer) == 9
    assert deeparc_hf.PrunedConfig.from_pretrained("runs/adapted").kept["bert.encoder.layer"]


def encoded(names: dict[str, Any]) -> None:
    again = names["SentenceTransformer"]("runs/small_encoder", device="cpu")
    assert [type(module).__name__ for module in again] == ["Transformer", "Pooling"]
    assert len(again[0].auto_model.encoder.layer) == 8


CHECKS = {
    "adapters": adapted,
    "distillation": distilled,
    "healing": healed,
    "search": searched,
    "sentence_encoders": encoded,
    "sparsity": sparse,
    "trainer": trained,
    "without_trainer": by_hand,
}


def test_every_other_page_with_examples_is_checked():
    assert {name for name, text in PAGES.items() if examples(text)} == {"get_started", *CHECKS}


@pytest.mark.parametrize("page", CHECKS)
def test_the_examples_of_a_page_go_on_from_the_first(page, started, monkeypatch):
    folder, names = started
    names = dict(names)
    monkeypatch.chdir(folder)
    run(PAGES[page], names, f"{page}.md")
    CHECKS[page](names)


def test_what_is_registered_in_a_script_is_known_there(tmp_path):
    (example,) = examples(PAGES["extend"], "process")
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "random" in result.stdout


if __name__ == "__main__":
    for name in TABLES:
        (DOCS / f"{name}.md").write_text(with_tables(PAGES[name]), "utf-8")
