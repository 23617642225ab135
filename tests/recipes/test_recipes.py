"""What every recipe is: short, with a PEP 723 header and its command, made of deeparc_hf and public libraries, and
runnable anywhere.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from .running import RECIPES, recipe

NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))
TASKS = ["causal_lm", "image_classification", "text_classification"]
PUBLIC = {"accelerate", "datasets", "deeparc_hf", "numpy", "torch", "transformers", "yaml"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_short_and_stands_alone(name):
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
    strange = {module.partition(".")[0] for module in modules} - PUBLIC - sys.stdlib_module_names
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


def test_a_recipe_runs_where_it_was_copied_to(tmp_path):
    shutil.copy(RECIPES / "causal_lm.py", tmp_path / "mine.py")
    command = [
        sys.executable,
        str(tmp_path / "mine.py"),
        "--model",
        "m",
        "--treshold",
        "0.9",
        "--output_dir",
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (
        result.returncode == 2
        and "error: There is no argument '--treshold'. Did you mean '--threshold'?" in result.stderr
    )
    assert "Traceback" not in result.stderr
