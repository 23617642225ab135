"""JSON from outside: what is right comes back, what is wrong is refused with its place, and sizes are bounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deeparc_hf.core.checks import MAX_ENTRIES, Entry, MalformedError, at_most, read_json, unboxed

DATA = {"list": [1, 2], "object": {"a": {"b": 0.5}}, "text": "visible", "null": None, "number": 3}


def test_what_is_right_comes_back():
    entry = Entry(DATA)
    assert entry["list"].wholes() == (1, 2) and entry["list"].numbers(2) == [1.0, 2.0]
    assert [item.whole() for item in entry["list"].items()] == [1, 2]
    assert entry["object"]["a"]["b"].number() == 0.5 and entry["number"].number() == 3.0
    assert entry["text"].text() == "visible" and entry["number"].whole(0, 3) == 3
    assert entry.get("null") is None and entry.get("missing") is None and entry.get("text") is not None
    assert entry.entries().keys() == entry.named().keys() == DATA.keys()


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda e: e["object"]["a"]["b"].whole(), r"object\.a\.b must be a whole number from 0, found 0\.5"),
        (lambda e: e["object"]["a"]["c"].number(), r"object\.a\.c must be a finite number, found None"),
        (lambda e: e["list"].items()[1].text(), r"list\[1\] must be a text of at most 512 visible characters, found 2"),
        (lambda e: e["list"]["a"], r"list must be an object, found \[1, 2\]"),
        (lambda e: e["list"].items(1), "list must be a list of at most 1, found"),
        (lambda e: e["list"].wholes(1), "list must be a list of whole numbers from 0 to 1, found"),
        (lambda e: e["list"].numbers(3), "list must be a list of 3 finite numbers, found"),
        (lambda e: e["text"].items(), "text must be a list"),
        (lambda e: e["number"].whole(4, 5), "number must be a whole number from 4 to 5, found 3"),
        (lambda e: e.entries(2), "it must be an object with at most 2 entries"),
        (lambda e: e.named(limit=4), "it must be named by texts of at most 4 visible characters, found 'object'"),
        (lambda e: e["number"].must_be(False, "something else"), "number must be something else, found 3"),
    ],
)
def test_what_is_wrong_is_named(check, said):
    with pytest.raises(MalformedError, match=said):
        check(Entry(DATA))


@pytest.mark.parametrize("value", [True, "1", None, [1], float("nan"), float("inf"), 1e301, -(10**400)], ids=repr)
def test_no_finite_number(value):
    with pytest.raises(MalformedError, match="must be a finite number"):
        Entry(value).number()
    with pytest.raises(MalformedError, match="must be a whole number"):
        Entry(value).whole()


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "a" * 513, 3], ids=["empty", "line", "escape", "long", "int"])
def test_names_are_visible(name):
    with pytest.raises(MalformedError, match="visible characters") as error:
        Entry({name: 1}, "place").named()
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_hostile_places_and_values_are_shown_as_text():
    with pytest.raises(MalformedError) as error:
        Entry({"\x1b[31mred\n" + "A" * 5000: "\u202e" * 5000}).entries().popitem()[1].number()
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_sizes_are_bounded():
    with pytest.raises(MalformedError, match=f"at most {MAX_ENTRIES}"):
        Entry([0] * (MAX_ENTRIES + 1)).items()
    with pytest.raises(MalformedError, match=f"at most {MAX_ENTRIES}"):
        Entry(dict.fromkeys(map(str, range(MAX_ENTRIES + 1)))).entries()


NO_JSON = {"empty": "", "cut": "{", "deep": "[" * 200_000, "long": '{"a": ' + "1" * 5000 + "}"}


@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_what_is_not_json(text, tmp_path):
    (tmp_path / "file.json").write_text(text)
    for source in (text, tmp_path / "file.json"):
        with pytest.raises(MalformedError, match="it is not JSON"):
            read_json(source)


def test_a_file_is_read_unless_it_is_too_large(tmp_path):
    file = tmp_path / "file.json"
    file.write_text('{"a": [1]}')
    assert read_json(file) == read_json('{"a": [1]}') == {"a": [1]}
    with file.open("wb") as opened:
        opened.truncate(17 * 2**20)
    with pytest.raises(MalformedError, match="larger than 16777216 bytes"):
        read_json(file)


def test_a_folder_is_no_json(tmp_path):
    with pytest.raises(MalformedError, match="it is a folder, not a file"):
        read_json(tmp_path)


def test_a_limit_allows_for_rounding_alone():
    assert at_most(0.92 - 0.91, 0.01) and 0.92 - 0.91 > 0.01 and at_most(0.0, 0.0) and at_most(-1.0, 0.0)
    assert not at_most(0.0100001, 0.01) and not at_most(float("nan"), 1.0) and not at_most(1e-9, 0.0)


@pytest.mark.parametrize(
    ("value", "own"), [(np.int64(3), 3), (np.uint8(3), 3), (np.float32(0.5), 0.5), (np.float64(0.5), 0.5)], ids=repr
)
def test_numbers_of_numpy_become_pythons_own(value, own):
    assert unboxed(value) == own and type(unboxed(value)) is type(own)


@pytest.mark.parametrize("value", [True, 3, 0.5, "3", None, [3], np.bool_(True), np.ones(1), torch.ones(())], ids=repr)
def test_anything_else_stays_as_it_is(value):
    assert unboxed(value) is value
