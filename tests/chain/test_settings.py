"""What a chain is told, in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeparc_hf.chain.settings import ChainSettings
from deeparc_hf.errors import ConfigError

GOOD = {"model": "m", "output": "o", "script": __file__, "arguments": "--m {model} -o {output} --on {checkpoint} x"}


def made(**changed):
    return ChainSettings.from_dict({**GOOD, **changed}, "chain.yaml")


def test_places_are_filled_in():
    checkpoint = Path("out/checkpoint-8")
    assert made().filled("ORG/it", Path("out"), checkpoint) == [
        *("--m", "ORG/it", "-o", "out", "--on", "out/checkpoint-8", "x")
    ]
    assert made().filled("a b", Path("out"), None) == ["--m", "a b", "-o", "out", "x"]
    joined = made(arguments=["{model}", "--o={output}", "--resume={checkpoint}", 3])
    assert joined.filled("m", Path("out"), None) == ["m", "--o=out", "3"]
    assert joined.filled("m", Path("out"), checkpoint) == ["m", "--o=out", "--resume=out/checkpoint-8", "3"]
    short = made(arguments="{model} {output} -r {checkpoint}")
    assert short.filled("m", Path("out"), None) == ["m", "out"]
    assert made().goes_on_within and not made(arguments="{model} {output}").goes_on_within


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"arguments": "--m {model}"}, r"lack \{output\}"),
        ({"arguments": "-o {output}"}, r"lack \{model\}"),
        ({"arguments": "'{model} {output}"}, "no line that a shell"),
        ({"arguments": {"a": 1}}, "a list of words"),
        ({"arguments": [["{model}"], "{output}"]}, "a list of words"),
        ({"script": "nowhere.py"}, "no script nowhere.py"),
        ({"script": 3}, "script must be a text"),
        ({"model": None}, "lacks model"),
        ({"verify": "yes"}, "true or false"),
        ({"modle": "m"}, "Did you mean model"),
        ({"quite_another": "m"}, "Known are"),
    ],
)
def test_what_makes_no_sense_is_told(changed, match):
    with pytest.raises(ConfigError, match=match):
        made(**changed)


@pytest.mark.parametrize("text", ["- a list", "model: [", "\x00"])
def test_a_file_that_is_no_settings_is_told(tmp_path, text):
    file = tmp_path / "chain.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        ChainSettings.from_yaml(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        ChainSettings.from_yaml(tmp_path / "missing.yaml")
