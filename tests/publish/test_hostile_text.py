"""Text of a downloaded checkpoint: whatever a record holds,
nothing that steers a terminal or forges a line gets out.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import shutil
import unicodedata
import warnings
from pathlib import Path

import pytest

from deeparc_hf import MPruneConfig, PrunedConfig, PruningPlan, create_model_card, remove_blocks, save_pruned
from deeparc_hf.cli import main
from deeparc_hf.cli.inspect import description_of, description_text
from deeparc_hf.core.plain_text import allowed, is_plain, listed, plain, plain_lines, quoted
from deeparc_hf.errors import DeepArcError, DeepArcWarning, RecordError
from deeparc_hf.publish.card import render
from deeparc_hf.publish.gather import content_of_folder
from deeparc_hf.publish.metadata import metadata
from tests.zoo import ZOO

STACK = "bert.encoder.layer"
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
# escape codes, direction marks, line breaks, private and lone surrogate signs, a forged line, and length
HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07\x9b2J\u202eevil\u2066\u200b\r\nerror: forged\u2028\u2029\ue000\udcff\x00" + "A" * 5000
)


def unseen(text, lines=True):
    return {sign for sign in text if unicodedata.category(sign) in UNSEEN and not (lines and sign == "\n")}


def check(text, longest=3000):
    assert not unseen(text), sorted(map(ascii, unseen(text)))
    assert not any(line.startswith("error: forged") for line in text.splitlines())
    assert max(map(len, text.splitlines()), default=0) <= longest


# ---- the door ----


def test_plain_text_is_one_visible_line_of_limited_length():
    assert plain(HOSTILE).startswith("red") and len(plain(HOSTILE)) == 200 and not unseen(plain(HOSTILE), lines=False)
    assert plain("a\u0301e\u0301") == "a\u0301e\u0301" and len(plain("a" + "\u0301" * 50)) < 5
    assert plain(10**5000) == "a int too long to print" and quoted([10**5000]) == "a list too long to print"
    assert plain("naïve 日本語 🙂") == "naïve 日本語 🙂"
    assert not unseen(quoted(HOSTILE), lines=False) and len(quoted(HOSTILE)) <= 80
    assert listed([HOSTILE] * 9).endswith(" and 4 more") and not unseen(listed([HOSTILE] * 9), lines=False)
    assert allowed("cka", ("cka",)) == "cka" and allowed("\u202ecka", ("cka",)) is None and allowed(3, ("cka",)) is None
    assert is_plain("a b") and not is_plain("a\nb") and not is_plain("a" * 201) and not is_plain(3)


def test_several_lines_keep_their_breaks_and_columns():
    table = "stack  blocks   kept\n-----  ------\n  a    1"
    assert plain_lines(table) == table
    assert unseen(plain_lines(HOSTILE)) == set() and plain_lines("a\x1b[2Jb\nc") == "ab\nc"


# ---- every entry of a record ----


def full_record():
    stage = {
        "loss": 0.5,
        "loss_interval": [0.4, 0.6],
        "accuracy": 0.5,
        "accuracy_interval": [0.4, 0.6],
        "samples": 8,
        "data": "training data",
    }
    entry = {
        "settings": {"similarity": "cka", "k": 1, "num_blocks": 3, "protect": ["x.0"], "calibration_samples": 8},
        "samples": 8,
        "thresholds": {STACK: 0.9},
        "removed": {STACK: [1]},
        "frozen": {STACK: [0]},
        "parameters": {"before": 51490, "after": 43986},
        "healing": [
            {
                "stack": STACK,
                "removed": [1],
                "kept": 0,
                "healed": False,
                "reason": "no gain",
                "held_out": None,
                "strength": None,
            }
        ],
        "metrics": {"eval_accuracy": 0.5},
        "weights": "0" * 32,
        "left": "0" * 32,
        "data": {
            "training": {"id": "org/data", "rows": 9},
            "evaluation": {"id": "org/data", "revision": "a", "config": "c", "split": "s"},
        },
        "stages": {"before": stage, "removed": stage},
    }
    return {
        "format_version": 1,
        "base_model": "org/model",
        "base_revision": "abc",
        "stacks": {STACK: {"length": 4, "kept": [0, 2, 3]}},
        "iterations": [entry],
        "sparsity": {
            "settings": {"method": "wanda"},
            "samples": 8,
            "matrices": {f"{STACK}.0.output.dense": {"zeros": 1, "size": 4}},
        },
        "versions": {"torch": "2"},
    }


def places(data, path=()):
    """Every entry of nested data, and every key."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key), "value"
        if isinstance(data, dict):
            yield (*path, key), "key"
        yield from places(value, (*path, key))


def with_hostile(place, what, text):
    data = copy.deepcopy(full_record())
    inside = data
    for key in place[:-1]:
        inside = inside[key]
    if what == "key":
        inside[text] = inside.pop(place[-1])
    else:
        inside[place[-1]] = text
    return data


PLACES = sorted(set(places(full_record())), key=str)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "model"
    model = ZOO["bert"].model()
    remove_blocks(model, {STACK: [1]})
    save_pruned(model, folder)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("text", [HOSTILE, "<b>visible</b> `x` | y"], ids=["unseen", "visible"])
def test_no_entry_of_a_record_gets_out_as_it_is(checkpoint, text, caplog):
    """Through the record's own errors and warnings, the facts that `inspect` prints, and the card, in each place in
    turn.
    """
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    model = ZOO["bert"].model()
    remove_blocks(model, {STACK: [1]})
    caplog.set_level(logging.INFO)
    told = 0
    for place, what in PLACES if text is HOSTILE else PLACES[::3]:
        record = with_hostile(place, what, text)
        (checkpoint / "config.json").write_text(json.dumps({**config, "pruning_config": record}), "utf-8")
        model.config.pruning_config = record
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                PrunedConfig.from_dict(record)
            except RecordError as error:  # by the record itself, before any work is done
                check(str(error))
                continue
            told += 1
            check(str(create_model_card(checkpoint, checkpoint / "card.md", overwrite=True)))
            tags = metadata(content_of_folder(checkpoint)).tags
            assert set(tags) <= {"deeparc", "pruned", "depth-pruning", "cka", "sparse"}, (place, tags)
            try:
                check(description_text(description_of(model)))
            except DeepArcError as error:  # it does not fit the model
                check(str(error))
        for warning in caught:
            check(str(warning.message))
    check(caplog.text)
    assert told > 5  # what this version does not know is left alone
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")


@pytest.mark.parametrize("place", [("base_model",), ("iterations", 0, "settings", "k"), ("versions", "torch")], ids=str)
def test_the_command_line_prints_one_visible_line_of_a_hostile_record(checkpoint, place, capfd):
    text = (checkpoint / "config.json").read_text("utf-8")
    hostile = {**json.loads(text), "pruning_config": with_hostile(place, "value", HOSTILE)}
    (checkpoint / "config.json").write_text(json.dumps(hostile), "utf-8")
    for arguments in (["inspect", str(checkpoint)], ["card", str(checkpoint), "-o", "-"]):
        assert main(arguments) == 2
        out, err = capfd.readouterr()
        check(out)
        check(err)
        assert err.count("\n") == 1 and "malformed" in err
    (checkpoint / "config.json").write_text(text, "utf-8")


def test_names_of_unknown_settings_are_shown_as_text():
    with pytest.warns(DeepArcWarning) as caught:
        MPruneConfig.from_dict({HOSTILE: 1, **{f"{HOSTILE}{i}": 1 for i in range(50)}})
    check(str(caught[0].message), 600)
    with pytest.raises(DeepArcError) as error:
        MPruneConfig.from_dict({"similarity": HOSTILE})
    check(str(error.value), 600)


def test_a_hostile_plan_is_refused_or_shown_as_text(tmp_path):
    from deeparc_hf.pruning.clusters import ComparedStack
    from deeparc_hf.pruning.plan import make_plan

    plan = make_plan(
        {STACK: ComparedStack(((1.0, 0.9), (0.9, 1.0)), {0: "first"})}, MPruneConfig(threshold=0.95), 8
    ).to_dict()
    with pytest.raises(DeepArcError) as error:
        PruningPlan.from_dict({**plan, "stacks": {HOSTILE: plan["stacks"][STACK]}})
    check(str(error.value), 600)
    plan["stacks"][STACK]["pinned"] = {"0": HOSTILE}
    check(str(PruningPlan.from_dict(plan)))


# ---- every entry of the files beside a checkpoint ----

ODD = [None, 3, -1, "x", True, [], {}, [1], [None], [[1, 2]], {"a": 1}, {"a": None}, float("inf"), 10**400]
KEPT = Path(__file__).parents[2] / "model_cards" / "minilm-emotion-pruned"
FILES = ["config.json", "pruning_report.json", "sparsity_report.json", "pruning_plan.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_card_is_made_of_odd_files_or_the_file_is_refused(file, tmp_path):
    """Each entry in turn holds something else: there is a card, or an error of ours, and never another one."""
    folder = Path(shutil.copytree(KEPT, tmp_path / "model"))
    data = json.loads((folder / file).read_text("utf-8"))
    chance = random.Random(0)
    told = refused = 0
    for place, _ in chance.sample(sorted(set(places(data)), key=str), 60):
        odd = copy.deepcopy(data)
        inside = odd
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = chance.choice(ODD)
        (folder / file).write_text(json.dumps(odd), "utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check(str(render(content_of_folder(folder), "org/model")))
                told += 1
            except DeepArcError as error:
                check(str(error))
                refused += 1
    assert told and refused


# ---- records that could not be told afterwards ----


def test_a_full_record_is_refused_before_blocks_are_removed():
    model = ZOO["bert"].model()
    remove_blocks(model, {STACK: [1]})
    record = model.config.pruning_config
    record["iterations"] = [*record["iterations"], *({"removed": {}} for _ in range(255))]
    assert len(PrunedConfig.from_model(model).iterations) == 256
    with pytest.raises(RecordError, match=r"lists 256 prunings.*Nothing was removed"):
        remove_blocks(model, {STACK: [1]})
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 3


@pytest.mark.parametrize(
    "wrong", [{"stages": {"before": {"loss": None}}}, {"healing": [{"stack": "a"}]}, {"parameters": {"after": "many"}}]
)
def test_what_a_card_could_not_tell_is_refused_before_blocks_are_removed(wrong, tmp_path):
    from deeparc_hf import MPruneCallback, prune_model
    from tests.trainers import text_data, train

    model = ZOO["bert"].model()
    remove_blocks(model, {STACK: [1]})
    model.config.pruning_config["iterations"][0].update(wrong)
    for act in (
        lambda: remove_blocks(model, {STACK: [1]}),
        lambda: prune_model(model, [], num_blocks=2),
        lambda: train(model, tmp_path, MPruneCallback(num_blocks=2), data=text_data(), num_train_epochs=1),
    ):
        with pytest.raises(RecordError, match=r"malformed: iterations\[0\]"):
            act()
    assert len(model.bert.encoder.layer) == 3


def test_a_checkpoint_of_pickles_alone_is_refused_in_our_own_words(tmp_path, capfd):
    import torch

    from deeparc_hf.cli.sources import find_source, load_model

    class Runs:
        def __reduce__(self):
            return print, ("code of somebody else ran",)

    model = ZOO["bert"].model()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    torch.save({**model.state_dict(), "extra": Runs()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DeepArcError, match="weights as pickles only") as error:
        load_model(find_source(str(tmp_path)))
    shown = "".join(str(e) for e in (error.value, error.value.__cause__))
    assert "weights_only" not in shown and error.value.__suppress_context__
    assert (
        main(["sparsify", str(tmp_path), "--sparsity", "0.5", "--method", "magnitude", "-o", str(tmp_path / "out")])
        == 2
    )
    out = capfd.readouterr()
    assert "weights_only" not in out.err and "ran" not in out.out and "safetensors" in out.err
    shutil.rmtree(tmp_path)
