"""What a recipe's process prints, and how it exits."""

from __future__ import annotations

import pytest

from deeparc_hf.errors import ConfigError
from experiment.command import run


def ends(work):
    with pytest.raises(SystemExit) as end:
        run(work)
    return end.value.code


def raises(error):
    def work():
        raise error

    return work


def test_exit_codes(capsys):
    assert ends(lambda: ["rows"]) == ends(lambda: 0) == 0
    assert ends(lambda: 1) == 1  # a sweep with a failed cell
    assert ends(raises(ConfigError("threshold must be a share."))) == 2
    assert ends(raises(OSError("modle is not a local folder"))) == 2
    assert ends(raises(KeyboardInterrupt())) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[0] == "error: threshold must be a share." and "Stopped" in err


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a fault"):
        run(raises(RuntimeError("a fault")))
