"""What every recipe is: short, with a PEP 723 header and its command, made of deeparc_hf, public libraries and the
`experiment` beside it, and runnable anywhere by every launcher.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from experiment.results import read_rows

from .running import RECIPES, recipe, words
from .tiny import make_tiny

NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))
TASKS = ["causal_lm", "image_classification", "sentence_embeddings", "speech_recognition", "text_classification"]
PUBLIC = {"accelerate", "datasets", "deeparc_hf", "numpy", "sentence_transformers", "torch", "transformers", "yaml"}
BESIDE = {"experiment"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_short_and_needs_what_lies_beside_it_alone(name):
    text = (RECIPES / f"{name}.py").read_text("utf-8")
    assert len(text.splitlines()) < 200
    header = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", text)
    script = tomllib.loads(re.sub(r"^# ", "", header[1], flags=re.MULTILINE))
    assert script["requires-python"].startswith(">=3.11") and any(
        need.startswith("deeparc_hf") for need in script["dependencies"]
    )
    tree = ast.parse(text)
    assert f"recipes/{name}.py" in ast.get_docstring(tree)
    modules = [
        module
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module in ([node.module] if isinstance(node, ast.ImportFrom) else [entry.name for entry in node.names])
    ]
    strange = {module.partition(".")[0] for module in modules} - PUBLIC - BESIDE - sys.stdlib_module_names
    assert not strange and not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


@pytest.mark.parametrize("name", TASKS)
def test_help_tells_every_argument(name, capsys):
    module = recipe(name)
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--num_blocks", "--config", "--output_dir", "--train_file"))
    assert module.__doc__.partition(":")[0] in " ".join(shown.split())


LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"],
    "accelerate": ["-m", "accelerate.commands.launch", "--config_file", "CONFIGS/two_cpu_processes.yaml"],
}


# test_sweep.py starts recipes by python
@pytest.mark.parametrize(
    "launcher", ["accelerate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("python", "torchrun"))]
)
def test_a_recipe_finds_what_lies_beside_it_however_it_is_started(launcher, tmp_path):
    """From any folder, and where it was copied to with what lies beside it."""
    copied = tmp_path / "my recipes"
    shutil.copytree(RECIPES, copied, ignore=shutil.ignore_patterns("__pycache__"))
    make_tiny(tmp_path)
    given = {f"{use}_file": tmp_path / f"{use}.csv" for use in ("train", "validation", "test")}
    given |= {"model": tmp_path / "model", "output_dir": tmp_path / "out", "finetune_epochs": 0, "retrain_epochs": 0}
    command = [word.replace("CONFIGS", str(copied / "accelerate_configs")) for word in LAUNCHERS[launcher]]
    command += [str(copied / "text_classification.py"), *words(**given, num_blocks=2)]
    # the package alone is installed; no path leads to the recipes
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row.name for row in read_rows(tmp_path / "out")] == ["original", "iteration 1"]


def test_a_copied_recipe_tells_what_is_wrong_in_one_line(tmp_path):
    shutil.copytree(RECIPES / "experiment", tmp_path / "experiment")
    shutil.copy(RECIPES / "causal_lm.py", tmp_path / "mine.py")
    command = [sys.executable, str(tmp_path / "mine.py"), "--model", "m", "--treshold", "0.9", "--output_dir", "out"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (
        result.returncode == 2
        and "error: There is no argument '--treshold'. Did you mean '--threshold'?" in result.stderr
    )
    assert "Traceback" not in result.stderr
