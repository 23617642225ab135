"""The first seconds of a command: Ctrl-C while libraries are imported, and a Hub that does not answer."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deeparc_hf.core.interrupts import exit_while_importing, work_begins
from experiment.command import run
from local_hub import Client
from tests.zoo import ZOO

ROOT = Path(__file__).parents[2]
# As a library that Ctrl-C reaches in the middle of its import: some lose it, some make another error of it.
INTERRUPTED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException as error:
    {then}
"""
SCRIPT = "import sys; from deeparc_hf.__main__ import main; sys.exit(main())"  # as the one that pip makes
COMMANDS = {
    "script": ["-c", SCRIPT, "prune", "model", "--data", "d.csv"],
    "module": ["-m", "deeparc_hf", "inspect", "model"],
    "recipe": [str(ROOT / "recipes" / "text_classification.py"), "--model", "model"],
    "sweep": [str(ROOT / "recipes" / "sweep.py"), "sweep.yaml"],
}


@pytest.fixture(autouse=True)
def usual_ctrl_c():
    """As in a shell, also where the tests run in the background, with Ctrl-C ignored, which processes inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.parametrize("then", ["pass", "raise RecursionError", "raise"])
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path, command, then):
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(INTERRUPTED.format(then=then))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, *COMMANDS[command]], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 130, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.lower().startswith(("interrupted", "stopped")), (
        done.stderr
    )
    assert done.stdout == ""


def test_the_script_of_setup_py_is_the_one_that_takes_care():
    source = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    scripts = [
        node.value
        for node in ast.walk(source)
        if isinstance(node, ast.Constant) and str(node.value).startswith("deeparc =")
    ]
    assert scripts == ["deeparc = deeparc_hf.__main__:main"]


def test_once_work_begins_ctrl_c_is_an_exception_in_imports_too(tmp_path, monkeypatch):
    (tmp_path / "interrupted_library.py").write_text(INTERRUPTED.format(then="raise"))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        exit_while_importing("stopped")
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):  # no import is under way
            signal.raise_signal(signal.SIGINT)
        work_begins()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            import interrupted_library  # noqa: F401
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        exit_while_importing("stopped")  # as under nohup
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_nothing_stays_of_it_when_a_command_has_ended():
    with pytest.raises(SystemExit):
        run(lambda: 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SAY = """
import io
from contextlib import redirect_stderr, redirect_stdout
import huggingface_hub.constants
import deeparc_hf.cli.sources
from deeparc_hf.cli import main
huggingface_hub.constants.ENDPOINT = endpoint
out, err = io.StringIO(), io.StringIO()
with redirect_stdout(out), redirect_stderr(err):
    code = main(command)
result = [code, out.getvalue(), err.getvalue()]
"""


@pytest.fixture(scope="module")
def silent():
    """A server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def client(tmp_path_factory, silent):
    """A process whose cache holds one model, org/kept."""
    home = tmp_path_factory.mktemp("home")
    cached = home / "hub" / "models--org--kept"
    snapshot = cached / "snapshots" / ("a" * 40)
    ZOO["bert"].model().save_pretrained(snapshot)
    (snapshot / "model.safetensors").unlink()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    own = {"HF_ENDPOINT": silent, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "1"}
    with Client({**os.environ, **own}) as process:
        yield process


# the libraries would ask such a Hub again for minutes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("model", ["org/none", "none", "hf-hub:org/none"])
@pytest.mark.parametrize("answer", ["silent", "refused"])
def test_a_hub_that_cannot_be_reached_is_told_at_once(client, silent, model, answer):
    endpoint = silent if answer == "silent" else "http://127.0.0.1:9"
    code, out, err = client.run(SAY, command=["inspect", model], endpoint=endpoint)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert f"the Hub ({endpoint}) does not answer" in err and "Check the connection, and HF_ENDPOINT" in err


@pytest.mark.timeout(120)
def test_data_of_a_hub_that_cannot_be_reached_is_told_at_once(client, silent, tmp_path):
    ZOO["bert"].model().save_pretrained(tmp_path)
    command = ["prune", str(tmp_path), "--data", "org/data", "--num-blocks", "3", "--dry-run"]
    code, _, err = client.run(SAY, command=command, endpoint=silent)
    assert (
        code == 2
        and "Cannot load the data org/data: there is no such file or folder" in err
        and "does not answer" in err
    )


@pytest.mark.timeout(120)
def test_a_cached_model_is_inspected_without_the_hub(client, silent):
    code, out, err = client.run(SAY, command=["inspect", "org/kept"], endpoint=silent)
    assert code == 0 and "encoder.layer: 4 blocks" in out
    assert "org/kept is taken from the cache" in err
