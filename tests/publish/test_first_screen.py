"""What a card says on its first screen, and what it must not say: settings nobody used, training that was not done,
data by two names.
"""

from __future__ import annotations

import json
import re

import pytest
import torch

from deeparc_hf import PrunedConfig, create_model_card, prune_model, remove_blocks, save_pruned
from deeparc_hf.errors import ConfigError
from tests.zoo import ZOO

from .test_card import first_screen, section, tables_in

STACK = "bert.encoder.layer"


def pruned(**settings):
    model = ZOO["bert"].model()
    ids = torch.randint(5, 100, (32, 10))
    prune_model(
        model,
        [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)],
        **{"num_blocks": 3, "progress": False, **settings},
    )
    return model


def test_the_original_against_this_model(run):
    rows, top = first_screen(create_model_card(run[0], repo_id="org/tiny"))
    report = json.loads((run[1] / "pruning_report.json").read_text())
    final = report["final"][0]["metrics"]["eval_accuracy"]
    before, now = report["attempts"][0]["parameters"], report["attempts"][-1]["parameters"]
    first = report["attempts"][0]["evaluations"][-1]["metrics"]["eval_accuracy"]
    original, this = rows["accuracy"]
    assert original.startswith(f"{first:.4f} (") and this.startswith(f"{final:.4f} (") and ".." in this
    assert "accuracy (data not named, validation; n = 64)" in top
    assert rows["time of one evaluation"] == ["not measured"] * 2
    assert rows["parameters"] == [f"{before:,}", f"{now:,} ({100 * (now - before) / before:+.1f} %)"]
    assert rows["size of the weights"] == [f"{before * 4 / 1e6:.1f}", f"{now * 4 / 1e6:.1f}"] and "MB, float32" in top
    assert rows["blocks"] == ["4", "2"]
    assert "Trained after the removal." in top and "in the middle" not in top


def test_a_removal_by_hand_shows_no_settings_that_nobody_used(tmp_path):
    model = ZOO["bert"].model()
    remove_blocks(model, {STACK: [1]})
    remove_blocks(model, {STACK: [1]})  # block 2 of the original
    card = create_model_card(model, finetuned_from="google-bert/bert-base-uncased")
    rows, top = first_screen(card)
    assert rows["quality"] == ["not measured"] * 2 and rows["blocks"] == ["4", "2"]
    assert (
        "chosen by hand" in top
        and "**Not trained after the removal**" in top
        and "No evaluation of these weights was noted." in top
    )
    how = section(card, "How to reproduce it")
    assert f'remove_blocks(model, {{"{STACK}": [1, 2]}})' in how
    assert not any(
        word in str(card)
        for word in ("threshold", "similarity", "calibration", "epoch", "deeparc prune", "CKA", "MPruner")
    )
    again = ZOO["bert"].model()
    exec(
        re.search(r"```python\n(from deeparc_hf import remove_blocks.*?)```", how, re.DOTALL).group(1), {"model": again}
    )
    assert PrunedConfig.from_model(again).kept == PrunedConfig.from_model(model).kept
    save_pruned(model, tmp_path)
    named = {"model_name": "a", "repo_id": "org/a"}
    assert str(create_model_card(tmp_path, **named)) == str(create_model_card(model, **named))


def test_a_pruning_without_a_trainer_shows_none_of_its_settings(tmp_path):
    card = create_model_card(pruned(heal="lstsq"))
    given, whole = (
        json.loads(block) for block in re.findall(r"```json\n(.*?)```", section(card, "How to reproduce it"), re.DOTALL)
    )
    assert given == {"heal": "lstsq", "num_blocks": 3}
    assert not {"iterations", "retrain_epochs", "start_epoch", "max_drop", "metric", "rewind_lr"} & set(whole)
    assert whole["similarity"] == "cka" and "the weights are as" in str(card)


def test_whether_it_was_trained_since_shows_by_its_weights(tmp_path):
    model = pruned()
    save_pruned(model, tmp_path)
    assert "**Not trained after the removal**" in first_screen(create_model_card(tmp_path))[1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # a training of one's own
    assert (
        "The weights were changed after the removal (trained or converted)" in first_screen(create_model_card(model))[1]
    )
    del model.config.pruning_config["iterations"][-1]["left"]  # of an earlier version
    assert "Whether it was trained after the removal was not noted." in first_screen(create_model_card(model))[1]
    whole = first_screen(create_model_card(ZOO["bert"].model()))[1]
    assert "rained" not in whole and "original was" not in whole


def test_blocks_have_the_originals_numbers_everywhere(run, tmp_path):
    card = create_model_card(run[0], tmp_path / "README.md")
    record = PrunedConfig.from_model(run[0].model)
    gone = record.removed[STACK]
    removed = section(card, "What was removed")
    assert removed.startswith(f"`{STACK}`: {', '.join(map(str, gone))}. All block numbers on this page")
    last = record.iterations[-1]["removed"][STACK]
    repaired = re.findall(
        rf"- `{STACK}` \(pruning (\d)\): (\d+) removed, (?:block (\d+) refitted|left as it is)", removed
    )
    assert repaired, removed
    for number, block, kept in repaired:
        assert [int(block)] == record.iterations[int(number) - 1]["removed"][STACK]
        assert not kept or int(kept) < int(block)
    (numbers,) = tables_in(section(card, "Similarity of blocks"))
    left = sorted({*record.kept[STACK], *last})
    assert [row[0] for row in numbers[1:]] == [f"{block} (removed)" if block in last else str(block) for block in left]
    assert f"block {last[0]} removed" in re.search(r"!\[(Heatmap.*?)\]", str(card)).group(1)


def test_data_has_one_name(run):
    card = create_model_card(run[0], dataset_tags="dair-ai/emotion")
    assert "not named" not in str(card)
    assert (
        "accuracy ([dair-ai/emotion](https://huggingface.co/datasets/dair-ai/emotion), validation; n = 64)"
        in first_screen(card)[1]
    )
    made = section(card, "Made from, and with")
    assert made.count("dair-ai/emotion](") == 2 and made.count("(as told by who published this)") == 2
    assert {result.dataset_type for result in card.data.eval_results} == {"dair-ai/emotion"}
    assert {(result.metric_type, result.dataset_split) for result in card.data.eval_results} == {
        ("accuracy", "validation"),
        ("loss", "validation"),
    }


def test_a_name_for_people_is_the_same_everywhere_too(run):
    card = create_model_card(run[0], dataset="Moods", dataset_args="six")
    assert "not named" not in str(card) and "accuracy (Moods, six, validation; n = 64)" in first_screen(card)[1]
    assert section(card, "Made from, and with").count("Moods, six (as told by who published this)") == 2


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"license": "foo"}, "knows no licence 'foo'"),
        ({"license": "apache2"}, "Did you mean 'apache-2.0'"),
        ({"language": "English"}, "two or three letters"),
        ({"tasks": "text-classifcation"}, "Did you mean 'text-classification'"),
        ({"tags": ["a\u202eb"]}, "visible text"),
    ],
)
def test_what_the_hub_would_refuse_is_refused(told, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        create_model_card(ZOO["bert"].model(), tmp_path / "README.md", **told)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("told", "said"), [({"license": "foo"}, "knows no licence"), ({"language": "English"}, "two or three letters")]
)
def test_a_recipe_refuses_it_before_it_trains(told, said):
    from experiment.arguments import DataArguments

    with pytest.raises(ConfigError, match=said):
        DataArguments(model="m", **told)
