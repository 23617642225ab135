"""Cards of real runs, of checkpoints, of models of every kind; of reports that are hostile, of another run,
or missing.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import partial

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import AutoModelForSequenceClassification

from deeparc_hf import (
    MPruneConfig,
    PrunedConfig,
    create_model_card,
    prune_model,
    remove_blocks,
    save_pruned,
    sparsify_model,
)
from deeparc_hf.errors import ConfigError, RecordError
from deeparc_hf.publish import made_by_us
from deeparc_hf.publish.card import may_replace
from deeparc_hf.publish.gather import content_of_folder, content_of_model
from deeparc_hf.publish.usage import usage
from local_hub.cards import judge
from tests.publishing import image_of, tiny_tokenizer, trained
from tests.zoo import ZOO

RENDERER = MarkdownIt("commonmark").enable("table")
OUR_HTML = re.compile(
    r"<summary>(The numbers|The loss|Epochs, settings and times|All settings|What to type)</summary>|</?details>|"
    r"<!-- deeparc_hf [0-9a-f]{64} -->|\s"
)


def section(card, title):
    found = re.search(rf"\n## {title}\n(.*?)(?=\n## |\n<!-- )", str(card), re.DOTALL)
    return None if found is None else found.group(1).strip()


def tables_in(text):
    """The cells of each Markdown table, without the line of dashes."""
    found = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    rows = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.strip().splitlines()] for part in found
    ]
    return [[head, *body] for head, _, *body in rows]


def first_screen(card):
    """What stands before "Use it": the table by its first column, and the rest."""
    top = str(card).split("\n# ", 1)[1].split("\n## ", 1)[0]
    (cells,) = tables_in(top)
    return {row[0].split(" (")[0]: row[1:] for row in cells[1:]}, top


def copied(folder, target, *left_out):
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "README.md", *left_out))
    return target


def check_harmless(card):
    """No HTML but ours, no picture but ours, and links to known places only."""
    for token in RENDERER.parse(ModelCard(str(card)).text):
        for part in [token, *(token.children or [])]:
            if part.type in ("html_block", "html_inline"):
                assert OUR_HTML.sub("", part.content) == "", part.content
            if part.type == "link_open":
                assert part.attrs["href"].startswith(("https://huggingface.co/", "https://arxiv.org/abs/"))
            if part.type == "image":
                assert part.attrs["src"] in ("similarity.png", "quality.png")


# ---- what a card tells ----


def test_the_card_of_a_trainer_tells_the_whole_run(run, tmp_path):
    trainer, folder = run
    card = create_model_card(trainer, tmp_path / "README.md", model_name="tiny")
    text = str(card)
    assert (tmp_path / "README.md").read_text("utf-8") == text and (tmp_path / "similarity.png").read_bytes()[
        :4
    ] == b"\x89PNG"
    assert judge(text).errors == [] and judge(text).warnings == []
    report = json.loads((folder / "pruning_report.json").read_text())
    before, now = report["attempts"][0]["parameters"], report["attempts"][-1]["parameters"]
    assert "with 2 of its 4 blocks (layers) removed (found by debiased CKA)" in text
    assert f"{before:,} → {now:,} parameters ({100 * (now - before) / before:+.1f} %)" in text
    for attempt in report["attempts"][1:]:
        for stage in ("before", "removed", "healed", "retrained"):
            found = attempt["stages"][stage]
            assert (
                f"{found['loss']:.4f} ({found['loss_interval'][0]:.4f} .. {found['loss_interval'][1]:.4f})"
                in section(card, "What each step did")
            )
    first, *tables = tables_in(section(card, "Iterations"))
    assert [row[0] for row in first[1:]] == ["before pruning", "pruning 1", "pruning 2", "pruning 2, weights zeroed"]
    assert first[0] == ["model", "blocks", "parameters", "accuracy", "change", "training (s)", "verdict"]
    assert ["model", "epoch 1", "epoch 2"] in [rows[0] for rows in tables]
    assert ["model", "k", "threshold", "frozen blocks", "evaluation (s)"] in [rows[0] for rows in tables]
    assert "CPU" in section(card, "Iterations") and "8 samples a batch" in section(card, "Iterations")
    final = report["final"][0]["metrics"]
    assert (
        f"| accuracy | {final['eval_accuracy']:.4f} (" in section(card, "Evaluation")
        and "| 64 | data not named, validation |" in text
    )
    pictures = dict(re.findall(r"!\[(.+?)\]\((\w+).png\)", text))
    assert {"similarity", "quality"} == set(pictures.values()) and (tmp_path / "quality.png").read_bytes()[
        :4
    ] == b"\x89PNG"
    assert "similarities from" in next(iter(pictures)) or "similarities from" in list(pictures)[1]
    assert "% of the" in section(card, "Zeroed weights")
    given, whole = (
        json.loads(block)
        for block in re.findall(r"```json\n(.*?)```", section(card, "How to reproduce it"), re.DOTALL)[:2]
    )
    asked = {"num_blocks": [3, 2], "start_epoch": 1, "retrain_epochs": 1, "heal": "lstsq", "calibration_samples": 32}
    assert given == {**asked, "iterations": 2} or given == asked
    assert MPruneConfig.from_dict(whole) == MPruneConfig(**asked)
    check_harmless(card)


def test_the_card_of_the_folder_is_that_of_the_trainer(run, tmp_path):
    trainer, folder = run
    of_trainer = create_model_card(trainer, tmp_path / "a.md", repo_id="org/tiny")
    of_folder = create_model_card(folder, tmp_path / "b.md", repo_id="org/tiny")
    assert str(of_trainer) == str(of_folder)


def test_the_record_alone_makes_a_card(run, tmp_path):
    _, folder = run
    alone = copied(folder, tmp_path / "alone", "*report*", "pruning_plan.json", "*.png")
    card = create_model_card(alone, model_name="tiny")
    assert "with 2 of its 4 blocks (layers) removed" in str(card) and "51,490 → 36,482 parameters" in str(card)
    assert section(card, "What each step did").count("\n|") >= 3
    assert section(card, "Similarity of blocks") is None
    # zeros came after the last evaluation that the record knows of
    assert section(card, "Evaluation") == "No evaluation that was noted is of the model as it is."
    check_harmless(card)


def test_the_strip_says_which_block_went_when(run):
    card = create_model_card(run[0].model)
    record = PrunedConfig.from_model(run[0].model)
    marks = re.search(r"bert\.encoder\.layer  ([#*12]+)  2 of 4 stay", section(card, "What was removed")).group(1)
    for number, entry in enumerate(record.iterations, 1):
        for block in entry["removed"]["bert.encoder.layer"]:
            assert marks[block] == str(number)
    assert [i for i, mark in enumerate(marks) if mark in "#*"] == list(record.kept["bert.encoder.layer"])


def test_reports_of_another_run_are_left_out(run, tmp_path):
    _, folder = run
    other = copied(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    model = ZOO["bert"].model()
    remove_blocks(model, {"bert.encoder.layer": [0]})
    model.save_pretrained(other)
    card = create_model_card(other)
    assert config["num_hidden_layers"] == 2 and "with 1 of its 4 blocks (layers) removed" in str(card)
    assert (
        "pruning 2" not in str(card)
        and section(card, "Similarity of blocks") is None
        and section(card, "Zeroed weights") is None
    )


def test_a_model_that_was_taken_back_is_not_called_pruned(tmp_path):
    from deeparc_hf import MPruneCallback

    callback = MPruneCallback(
        num_blocks=3, retrain_epochs=1, max_drop=0.0, baseline=2.0, metric="accuracy", k_max=1, calibration_samples=32
    )
    trainer = trained(tmp_path, [callback], num_train_epochs=1, save_strategy="no")
    card = create_model_card(trainer)
    assert section(card, "What was removed") == "No block was removed." and "rolled back" in section(card, "Iterations")
    assert "with nothing removed or zeroed" in str(card)


def test_a_second_training_tells_of_the_first_ones_prunings_too(tmp_path):
    from deeparc_hf import MPruneCallback

    first = trained(
        tmp_path / "a", [MPruneCallback(num_blocks=3, retrain_epochs=1, calibration_samples=32)], num_train_epochs=1
    )
    first.save_model(str(tmp_path / "a"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    second = trained(
        tmp_path / "b",
        [MPruneCallback(num_blocks=2, retrain_epochs=1, calibration_samples=32)],
        model=model,
        num_train_epochs=1,
    )
    card = create_model_card(second)
    iterations, *more = tables_in(section(card, "Iterations"))
    assert [row[0] for row in iterations[1:]] == ["pruning 1", "pruning 2"] and not any(
        "epoch 1" in rows[0] for rows in more
    )
    assert [[row[0] for row in rows[1:]] for rows in tables_in(section(card, "What each step did"))] == [
        ["pruning 1", "pruning 2"]
    ] * 2


def test_without_a_trainer(tmp_path):
    model = ZOO["bert"].model()
    ids = torch.randint(5, 100, (32, 10))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
    prune_model(model, batches, num_blocks=3, progress=False)
    card = create_model_card(model, model_name="a", finetuned_from="google-bert/bert-base-uncased")
    assert card.data.base_model == "google-bert/bert-base-uncased" and card.data.base_model_relation == "finetune"
    assert (
        "[google-bert/bert-base-uncased](https://huggingface.co/google-bert/bert-base-uncased) with 1 of its 4 blocks"
        in str(card)
    )
    assert "deeparc prune google-bert/bert-base-uncased --data TRAINING_DATA --num-blocks 3 -o pruned" in str(card)
    assert (
        "model-index" not in card.data.to_dict()
        and section(card, "Evaluation") == "No evaluation that was noted is of the model as it is."
    )
    sparse = ZOO["bert"].model()
    sparsify_model(sparse, batches, sparsity=0.5, progress=False)
    card = create_model_card(sparse)
    assert "sparse" in card.data.tags and "pruned" not in card.data.tags and "No block was removed." in str(card)


# ---- every kind of model ----


@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_model_has_a_card_whose_code_runs(name, tmp_path, monkeypatch):
    from deeparc_hf import find_stacks

    specimen = ZOO[name]
    model = specimen.model()
    stack = next(s for s in find_stacks(model).values() if len(s) - len(s.pinned) > 1)
    remove_blocks(model, {stack.name: [i for i in range(len(stack)) if i not in stack.pinned][-1:]})
    folder = tmp_path / "model"
    save_pruned(model, folder)
    card = create_model_card(folder, repo_id="org/model")
    assert judge(str(card)).errors == []
    check_harmless(card)
    assert str(create_model_card(model, repo_id="org/model", model_name="model")) == str(card)
    content = content_of_folder(folder)
    assert content.parameters == (
        content.record.iterations[0]["parameters"]["before"],
        sum(p.numel() for p in model.parameters()),
    )
    if specimen.auto is not None:
        monkeypatch.chdir(tmp_path)
        exec(usage(content, str(folder)), {})
    else:
        assert 'timm.create_model("hf-hub:org/model", pretrained=True)' in usage(content, "org/model")


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_code_with_a_tokenizer_or_image_processor_runs(name, tmp_path, monkeypatch):
    from transformers import ViTImageProcessor

    folder = tmp_path / "model"
    save_pruned(ZOO[name].model(), folder)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}) if name == "vit" else tiny_tokenizer()
    processor.save_pretrained(folder)
    image_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    program = usage(content_of_folder(folder), str(folder))
    assert "pipeline(" in program or "generate(" in program
    exec(program, {})
    assert usage(content_of_model(ZOO[name].model(), processor), str(folder)) == program


def test_code_that_hears_runs(tmp_path, monkeypatch):
    """With the sound in place of the file, which ffmpeg would read."""
    from tests import speech

    folder = tmp_path / "model"
    speech.whisper().save_pretrained(folder)
    assert "pipeline(" not in usage(content_of_folder(folder), str(folder))  # nothing that reads sound lies there
    speech.whisper_tokenizer().save_pretrained(folder)
    assert "pipeline(" not in usage(content_of_folder(folder), str(folder))
    speech.whisper_processor().save_pretrained(folder)
    program = usage(content_of_folder(folder), str(folder))
    assert 'pipeline("automatic-speech-recognition"' in program and program.count('"speech.wav"') == 1
    recording = {"raw": speech.sound_of("one"), "sampling_rate": speech.RATE}
    exec(program.replace('"speech.wav"', "recording"), {"recording": recording})
    assert usage(content_of_model(speech.whisper(), speech.whisper_processor()), str(folder)) == program


# ---- hostile names and files ----

EVIL = (
    "x](javascript:alert(1)) <script>alert(1)</script> | `code` \n# heading\n--- {{ 7 * 7 }} "
    "![i](http://evil.example/i.png)"
)
SEEN = EVIL.replace("\n", " ")  # a record with signs that cannot be seen is refused


def test_names_with_markup_in_them_do_no_harm(run, tmp_path):
    _, folder = run
    evil = copied(folder, tmp_path / "evil")
    path = evil / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {"0": SEEN, "1": "fine"}
    config["architectures"] = [SEEN]
    record = config["pruning_config"]
    record["base_model"] = SEEN[:100]
    record["base_revision"] = SEEN[:100]
    record["versions"] = {SEEN[:50]: SEEN[:100]}
    for key in ("stacks",):
        record[key] = {SEEN[:100]: record[key].pop("bert.encoder.layer")}
    for entry in record["iterations"]:
        entry["removed"] = {SEEN[:100]: entry["removed"].pop("bert.encoder.layer")}
        entry["frozen"] = {}
        entry["settings"]["similarity"] = SEEN[:60]
        entry["settings"]["protect"] = [SEEN]
        entry["metrics"] = {SEEN: 0.5, "eval_accuracy": 0.25}
        entry["data"] = {"evaluation": {"id": SEEN[:80], "rows": 8, "split": SEEN}}
    record["sparsity"] = None
    path.write_text(json.dumps(config))
    for name in ("pruning_report.json", "sparsity_report.json", "pruning_plan.json"):
        (evil / name).unlink()
    card = create_model_card(evil, model_name=EVIL, language="en", command=f"```\n{EVIL}\n```", dataset=EVIL)
    check_harmless(card)
    assert "49" not in str(card).split("---")[2][:200]  # templates in names are text
    metadata = yaml.safe_load(str(card).split("---\n")[1])
    assert (
        "base_model" not in metadata
        and "datasets" not in metadata
        and metadata["tags"] == ["deeparc", "pruned", "depth-pruning"]
    )
    headings = [token for token in RENDERER.parse(card.text) if token.type == "heading_open"]
    assert [token.tag for token in headings][:1] == ["h1"] and [token.tag for token in headings].count("h1") == 1


def test_reports_with_markup_in_them_do_no_harm(run, tmp_path):
    _, folder = run
    evil = copied(folder, tmp_path / "evil")
    path = evil / "pruning_report.json"
    report = json.loads(path.read_text())
    report["hardware"] = {"device": EVIL, "device_name": EVIL, "cpu_count": EVIL, "torch_threads": EVIL}
    report["training"] = {EVIL: EVIL, "seed": EVIL}
    report["reason"] = report["phase"] = report["metric"] = EVIL
    report["data"] = {"training": {"id": EVIL, "rows": 1}, "evaluation": {"id": EVIL, "rows": 2}}
    report["final"] = [{"metrics": {EVIL: 1.0, "eval_accuracy": 0.5}, "data": {"id": EVIL, "rows": 4, "config": EVIL}}]
    for attempt in report["attempts"]:
        attempt["name"] = EVIL
        attempt["blocks"] = attempt["blocks"] if attempt.get("decision") else {EVIL: 4}
        for stage in attempt["stages"].values():
            stage["data"] = EVIL
        for site in attempt.get("healing", []):
            site.update(stack=EVIL, healed=False, reason=EVIL)
    path.write_text(json.dumps(report))
    card = create_model_card(evil)
    assert section(card, "Iterations") is not None
    check_harmless(card)
    assert judge(str(card)).errors == []


@pytest.mark.parametrize("file", ["pruning_report.json", "sparsity_report.json", "pruning_plan.json"])
@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "{",
        '{"attempts": 3}',
        '{"attempts": [{}], "report": 3}',
        "[" * 100_000,
        '{"format_version": 1, "stacks": {"a": 1}}',
    ],
)
def test_files_that_are_no_reports_are_refused_by_name(run, tmp_path, file, content):
    broken = copied(run[1], tmp_path / "broken")
    (broken / file).write_text(content)
    with pytest.raises(RecordError, match=file) as error:
        create_model_card(broken)
    assert "is made without it" in str(error.value)
    assert not (broken / "README.md").exists()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("attempts", 1, "parameters"), "many"),
        (("attempts", 1, "parameters"), -1),
        (("attempts", 1, "evaluations"), {"a": 1}),
        (("attempts", 1, "stages", "before", "loss"), None),
        (("attempts", 1, "stages", "before", "loss_interval"), [1]),
        (("attempts", 1, "epoch"), True),
        (("attempts", 1, "blocks"), {"a": 1.5}),
        (("final",), [3]),
        (("accepted",), None),
        (("config",), {"threshold": 98}),
    ],
)
def test_wrong_entries_of_a_report_are_refused(run, tmp_path, where, value):
    broken = copied(run[1], tmp_path / "broken")
    report = json.loads((broken / "pruning_report.json").read_text())
    place = report
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    (broken / "pruning_report.json").write_text(json.dumps(report))
    with pytest.raises(RecordError, match=r"pruning_report\.json"):
        create_model_card(broken)


def test_figures_that_overflowed_are_left_out(run, tmp_path):
    odd = copied(run[1], tmp_path / "odd")
    report = json.loads((odd / "pruning_report.json").read_text())
    for evaluation in report["attempts"][1]["evaluations"]:
        evaluation["metrics"]["eval_loss"] = None
    report["final"][0]["metrics"]["eval_loss"] = None
    (odd / "pruning_report.json").write_text(json.dumps(report))
    (odd / "sparsity_report.json").unlink()
    assert {r.metric_type for r in create_model_card(odd).data.eval_results} == {"accuracy"}


# ---- what is given, and what is replaced ----


@pytest.mark.parametrize("setting", ["finetuned_from", "dataset_tags"])
def test_local_paths_are_no_names(run, setting, tmp_path):
    for wrong in (str(tmp_path), "/home/somebody/data", "a/b/c"):
        with pytest.raises(ConfigError, match="is not the id of a repository"):
            create_model_card(run[1], tmp_path / "README.md", **{setting: wrong})


def test_it_takes_what_the_trainers_own_takes(run, tmp_path):
    trainer, _ = run
    import inspect

    theirs, ours = inspect.signature(type(trainer).create_model_card), inspect.signature(create_model_card)
    assert set(theirs.parameters) - {"self"} <= set(ours.parameters)
    make = partial(create_model_card, trainer, tmp_path / "README.md")
    card = make(
        model_name="n",
        language="en",
        license="mit",
        tags="t",
        tasks="text-classification",
        dataset="D",
        dataset_args="c",
    )
    told = {"name": "D", "type": "unknown", "config": "c", "split": "validation"}
    assert card.data.to_dict()["model-index"][0]["results"][0]["dataset"] == told
    assert card.data.license == "mit" and "t" in card.data.tags


def test_an_edited_card_is_known(run, tmp_path):
    text = str(create_model_card(run[1], tmp_path / "README.md"))
    assert made_by_us(text) and may_replace(tmp_path / "README.md") and may_replace(tmp_path / "nothing.md")
    (tmp_path / "README.md").write_text(text.replace("Limits", "My limits"), "utf-8")
    assert not may_replace(tmp_path / "README.md")
    (tmp_path / "README.md").write_text(text.replace("\n", "\r\n").replace("\r\n", "\n"), "utf-8")
    assert may_replace(tmp_path / "README.md")
    assert not made_by_us("# Mine") and not made_by_us(text + "\nmore")


def test_nothing_but_a_trainer_a_model_or_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="found a int"):
        create_model_card(3)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        create_model_card(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        create_model_card(tmp_path)


def test_a_checkpoint_without_a_record_has_a_plain_card(tmp_path):
    AutoModelForSequenceClassification.from_config(ZOO["bert"].model().config).save_pretrained(tmp_path)
    card = create_model_card(tmp_path)
    assert "No block was removed." in str(card) and card.data.tags == ["deeparc"]
