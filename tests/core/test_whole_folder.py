"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from deeparc_hf.core.files import drafted, whole_folder, write_whole
from deeparc_hf.errors import ConfigError


def write(folder, name="new"):
    (folder / name).touch()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", ["nothing", "empty", "full"])
def test_it_takes_its_place_at_the_end(before, tmp_path):
    out = tmp_path / "deep" / "out"
    if before != "nothing":
        out.mkdir(parents=True)
    if before == "full":
        write(out, "old")
    with whole_folder(out, replace=before == "full") as folder:
        write(folder)
        assert not out.exists() or "new" not in names(out)
    assert names(out) == ["new"]
    assert names(tmp_path / "deep") == ["out"]
    assert out.stat().st_mode == (tmp_path / "deep").stat().st_mode


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_may_not_be_replaced_stays(kind, tmp_path):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        write(out, "mine")
    else:
        out.write_text("mine")
    with pytest.raises(ConfigError, match="out exists and is not an empty folder"), whole_folder(out):
        raise AssertionError("no work is begun")
    assert names(tmp_path) == ["out"]


def test_what_appears_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="not an empty folder"), whole_folder(out) as folder:
        write(folder)
        out.mkdir()
        write(out, "mine")
    assert names(out) == ["mine"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_all_is_as_before(error, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(out, "old")
    with pytest.raises(error), whole_folder(out, replace=True) as folder:
        write(folder)
        raise error
    assert names(out) == ["old"]
    assert names(tmp_path) == ["out"]


def test_of_two_at_once_the_first_to_end_wins(tmp_path):
    out, ends, failures = tmp_path / "out", threading.Barrier(2), []

    def run(name):
        try:
            with whole_folder(out) as folder:
                write(folder, name)
                ends.wait()
        except (ConfigError, OSError) as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 1
    assert names(out) in (["a"], ["b"])
    assert names(tmp_path) == ["out"]


KILLED = """
import os, sys
from pathlib import Path
from deeparc_hf.core.files import whole_folder
with whole_folder(Path(sys.argv[1]), replace=True) as folder:
    (folder / "new").touch()
    if sys.argv[2] == "between":
        rename = Path.rename
        Path.rename = lambda path, target: rename(path, target) if str(target).endswith(".old") else os._exit(9)
    else:
        os._exit(9)
"""


@pytest.mark.parametrize("when", ["before", "between"])
def test_what_a_killed_process_left_goes_and_what_it_had_moved_comes_back(when, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(out, "old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(out), when], check=False).returncode == 9
    assert len(names(tmp_path)) == 2 and out.exists() == (when == "before")
    with pytest.raises(ConfigError, match="not an empty folder"), whole_folder(out):
        pass
    assert names(out) == ["old"]
    assert names(tmp_path) == ["out"]


def test_what_another_is_at_work_on_is_left_alone(tmp_path):
    out = tmp_path / "out"
    foreign = tmp_path / ".out.not-ours"
    foreign.mkdir()
    (tmp_path / ".out.link.new").symlink_to(foreign)
    with whole_folder(out) as first:
        write(first, "a")
        with pytest.raises(RuntimeError), whole_folder(out):
            assert first.exists()
            raise RuntimeError
        assert first.exists()
    assert names(out) == ["a"]
    assert foreign.exists() and os.stat(foreign)


def test_a_file_takes_its_place_at_the_end(tmp_path):
    write_whole(tmp_path / "report.json", "old")
    with pytest.raises(RuntimeError), drafted(tmp_path / "report.json") as draft:
        draft.write_text("half", "utf-8")
        raise RuntimeError
    assert names(tmp_path) == ["report.json"] and (tmp_path / "report.json").read_text("utf-8") == "old"
    write_whole(tmp_path / "report.json", "new")
    assert names(tmp_path) == ["report.json"] and (tmp_path / "report.json").read_text("utf-8") == "new"
