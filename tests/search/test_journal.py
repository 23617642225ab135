"""Searches that were killed go on with their journal, and end as they would have ended."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from deeparc_hf import search_blocks
from deeparc_hf.errors import ConfigError
from deeparc_hf.search.journal import Journal
from deeparc_hf.search.objectives import Score
from tests.zoo import ZOO

SETTINGS = {"num_blocks": 1, "measure_times": False, "progress": False}


class KilledError(Exception):
    pass


def search(journal, evaluate=None, kind="gpt2", count=6, seed=0, **settings):
    model, batches = ZOO[kind].model(seed), ZOO[kind].batches(count=count)
    return search_blocks(model, batches, journal=journal, evaluate=evaluate, **{**SETTINGS, **settings})


def killed_at(call: int):
    """An `evaluate` that ends the process, so to speak, when it is called so often."""
    calls = []

    def evaluate(model) -> float:
        calls.append(model)
        if len(calls) == call:
            raise KilledError
        return float(sum(p.numel() for p in model.parameters()))

    return evaluate


def same(one, other) -> bool:
    return dataclasses.replace(one, passes=0.0) == dataclasses.replace(other, passes=0.0)


@pytest.fixture(scope="module")
def whole():
    return search(None, killed_at(99))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The text of a whole journal."""
    path = tmp_path_factory.mktemp("journal") / "journal"
    search(path, killed_at(99))
    return path.read_text("utf-8")


@pytest.mark.parametrize("call", [2, 3, 4])
def test_a_killed_search_ends_as_it_would_have_ended(whole, tmp_path, call):
    path = tmp_path / "made" / "journal"
    with pytest.raises(KilledError):
        search(path, killed_at(call))
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) > call - 1
    again = search(path, killed_at(99))
    assert same(again, whole) and again.passes < 0.95 * whole.passes
    assert path.read_text("utf-8").splitlines()[: len(lines)] == lines


def test_the_more_is_known_the_less_is_computed(whole, written, tmp_path):
    passes = []
    for lines in (1, 3, len(written.splitlines())):
        path = tmp_path / f"{lines}"
        path.write_text("".join(written.splitlines(keepends=True)[:lines]), "utf-8")
        found = search(path, killed_at(99))
        assert same(found, whole) and path.read_text("utf-8") == written
        passes.append(found.passes)
    assert passes[0] == whole.passes > passes[1] > passes[2]


@pytest.mark.parametrize("cut", [1, 30])
def test_a_line_that_was_cut_off_is_made_again(whole, written, tmp_path, cut):
    path = tmp_path / "journal"
    path.write_text(written[:-cut], "utf-8")
    assert same(search(path, killed_at(99)), whole)
    assert path.read_text("utf-8") == written


def test_an_empty_file_is_a_new_journal(whole, written, tmp_path):
    path = tmp_path / "journal"
    path.touch()
    assert same(search(path, killed_at(99)), whole) and path.read_text("utf-8") == written


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"heal": None}, "settings"),
        ({"objective": "hidden"}, "objective"),
        ({"min_blocks": 2}, "settings"),
        ({"protect": ["*.3"]}, "protect"),
        ({"count": 5}, "data"),
        ({"seed": 1}, "weights"),
        ({"kind": "bert"}, "config, model, weights"),
    ],
    ids=str,
)
def test_the_journal_of_another_search_is_refused_and_stays(written, tmp_path, settings, differs):
    path = tmp_path / "journal"
    path.write_text(written, "utf-8")
    with pytest.raises(ConfigError, match=rf"journal is of another search: {differs} differ"):
        search(path, **settings)
    assert path.read_text("utf-8") == written


def test_the_journal_of_another_evaluation_is_refused(tmp_path):
    """Functions that are made alike, of other data."""

    def by(index):
        return lambda smaller: float(smaller.classifier.weight[0, index])

    model, batches = ZOO["bert"].model(), ZOO["bert"].batches()
    settings = {"objective": "metric", "heal": None, "measure_times": False, "progress": False, "num_blocks": 3}
    for _ in range(2):
        search_blocks(model, batches, evaluate=by(0), journal=tmp_path / "journal", **settings)
    with pytest.raises(ConfigError, match="is of another search: objective differ"):
        search_blocks(model, batches, evaluate=by(1), journal=tmp_path / "journal", **settings)


def test_a_journal_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    settings = {"journal": tmp_path / "file" / "journal", "measure_times": False, "progress": False}
    with pytest.raises(ConfigError, match="The journal cannot be written"):
        search_blocks(ZOO["bert"].model(), ZOO["bert"].batches(), **settings)
    assert (tmp_path / "file").read_text() == "mine"


def test_how_far_to_go_is_not_part_of_a_search(written, tmp_path):
    path = tmp_path / "journal"
    path.write_text(written, "utf-8")
    assert [point.num_blocks for point in search(path, num_blocks=3).points] == [4, 3]


SCORE = [[[0.5, 0.25]], [[1.0, 1.0]]]


@pytest.mark.parametrize(
    "text",
    [
        b"words\n",
        b"words",
        b"\xff\xfe\n",
        b"[]\n",
        b"{}\n",
        b'{"asked": 3}\n',
        b"[" * 50_000 + b"\n",
        *(
            f'{{"asked": {{}}}}\n{json.dumps(line)}\n'.encode()
            for line in (
                {"step": "x"},
                {"step": 3, "scores": {}},
                {"step": "x", "scores": {"score": SCORE[:1]}},
                {"step": "x", "scores": {"score": [[], []]}},
                {"step": "x", "scores": {"score": [SCORE[0], [[1.0]]]}},
                {"step": "x", "scores": {"score": [[["a", "b"]], SCORE[1]]}},
            )
        ),
    ],
    ids=lambda text: text[:40].decode("ascii", "replace"),
)
def test_what_is_no_journal_is_refused_and_stays(tmp_path, text):
    path = tmp_path / "journal"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"journal is (not the journal of a search|of another)") as caught:
        Journal(path, {})
    assert path.read_bytes() == text and len(str(caught.value)) < 500


def test_scores_come_back_to_the_bit(tmp_path):
    score = Score(torch.rand(2, 5).double() / 3, torch.rand(2, 5).double() / 7)
    journal = Journal(tmp_path / "journal", {"of": [1]})
    journal.put("screen", {("b", 1), ("a", 2)}, {"a.3": score}, [("a", 3)])
    again = Journal(tmp_path / "journal", {"of": (1,)})
    found = again.get("screen", {("a", 2), ("b", 1)}, ["a.3"], [("a", 3)])["a.3"]
    assert torch.equal(found.losses, score.losses) and torch.equal(found.weights, score.weights)
    assert again.get("screen", {("a", 2)}, ["a.3"], [("a", 3)]) is None
    assert again.get("follow", {("a", 2), ("b", 1)}, ["score"]) is None
    with pytest.raises(ConfigError, match=r"it has scores of a\.3 where those of a\.4 belong"):
        again.get("screen", {("a", 2), ("b", 1)}, ["a.4"], [("a", 3)])
