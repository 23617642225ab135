"""The speech recognition recipe on a tiny Whisper with random weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, WhisperProcessor

from deeparc_hf import PrunedConfig
from deeparc_hf.errors import ConfigError
from experiment.audio import read_sound
from experiment.results import read_rows
from experiment.spread import evenly_spread
from tests.publishing import card_of
from tests.speech import RATE, make_speech, sound_of

from .running import RECIPES, check_files, recipe, without_times, words

pytest.importorskip("jiwer")
pytest.importorskip("soundfile")
pytest.importorskip("soxr")

ENCODER, DECODER = "model.encoder.layers", "model.decoder.layers"
TARGETS = [f"{ENCODER}=4,{DECODER}=3", f"{ENCODER}=3,{DECODER}=3"]
SHORT = {"max_new_tokens": 12, "calibration_samples": 64}
ONCE = {**SHORT, "finetune_epochs": 0, "retrain_epochs": 0, "num_blocks": TARGETS[:1]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    return folder, make_speech(folder)


@pytest.fixture(scope="module")
def alone(place):
    """Fine-tuned, pruned twice and retrained."""
    folder, data = place
    settings = {"iterations": 2, "num_blocks": TARGETS, "retrain_epochs": 1, "heal": "lstsq", "search": "greedy"}
    given = words(**data, **SHORT, **settings, output_dir=folder / "alone")
    return recipe("speech_recognition").main(given), folder / "alone", given


def run(place, name, **settings):
    folder, data = place
    return recipe("speech_recognition").main(words(**{**data, **ONCE, **settings}, output_dir=folder / name))


def errors(found: list[str], wanted: list[str]) -> int:
    """Words that are wrong, missing or added, by Levenshtein's algorithm."""
    row = list(range(len(wanted) + 1))
    for index, word in enumerate(found, start=1):
        before, row[0] = row[0], index
        for column, other in enumerate(wanted, start=1):
            before, row[column] = row[column], min(before + (word != other), row[column] + 1, row[column - 1] + 1)
    return row[-1]


def said_in(folder):
    lines = (folder / "test.csv").read_text().splitlines()[1:]
    return [line.split(",") for line in lines]


def test_the_table_the_card_and_the_texts_tell_of_each_model(alone):
    rows, folder, _ = alone
    assert [list(row.blocks.values()) for row in rows] == [[4, 4], [4, 3], [3, 3]]
    check_files(folder, rows)
    text = (folder / "scores.md").read_text()
    for line in ("Num of encoder", "Num of decoder", "WER", "WER, texts as they are", "CER", "Times real time"):
        assert f"| {line} |" in text
    assert "10 test recordings, 6 s in all" in text and "bootstrap intervals over the texts, n = 10" in text
    shown = [line for line in text.splitlines() if line.startswith("| reference |")]
    assert shown == ["| reference | original | iteration 1 | iteration 2 |"] or "All models give the same" in text
    assert all(len(row.validation) == 1 for row in rows)
    results = (folder / "results.md").read_text()
    assert "wer: jiwer" in results and "Whisper's normalizer for English without its list of British" in results
    card = (folder / "iteration-2" / "README.md").read_text()
    assert "pipeline_tag: automatic-speech-recognition" in card and "- wer\n" in card
    assert 'pipeline("automatic-speech-recognition"' in card


def test_the_rates_are_those_of_the_saved_model(alone, place):
    """One recording at a time, by the stock classes and another way to count errors."""
    rows, folder, _ = alone
    last = folder / rows[-1].folder
    model, processor = AutoModelForSpeechSeq2Seq.from_pretrained(last).eval(), WhisperProcessor.from_pretrained(last)
    wrong = count = 0
    heard = []
    for name, text in said_in(place[0]):
        sound = read_sound({"path": str(place[0] / name), "bytes": None}, RATE)
        features = processor.feature_extractor(sound, sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(features["input_features"], max_length=12, num_beams=1)
        heard.append(processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip())
        wrong, count = wrong + errors(heard[-1].split(), text.split()), count + len(text.split())
    assert rows[-1].measured.metrics["wer_ortho"] == pytest.approx(wrong / count)
    lines = (folder / "texts" / "iteration-2.jsonl").read_text().splitlines()
    assert [json.loads(line)["generated"] for line in lines] == heard
    assert [json.loads(line)["reference"] for line in lines] == [text for _, text in said_in(place[0])]
    assert PrunedConfig.from_pretrained(last).kept.keys() == {ENCODER, DECODER}


STOCK = """
import sys
sys.modules["deeparc_hf"] = None  # an import of it fails
from transformers import pipeline
import numpy
hear = pipeline("automatic-speech-recognition", sys.argv[1])
sound = numpy.load(sys.argv[2])
found = hear({"raw": sound, "sampling_rate": 16000}, return_timestamps="word", generate_kwargs={"max_length": 12})
assert not [name for name in sys.modules if name.startswith("deeparc_hf.")]
print(len(hear.model.model.decoder.layers), len(hear.model.model.encoder.layers), len(found["chunks"]))
"""


def test_a_stock_process_hears_by_the_pipeline(alone, tmp_path):
    import numpy

    rows, folder, _ = alone
    numpy.save(tmp_path / "sound.npy", sound_of("press star"))
    command = [sys.executable, "-I", "-c", STOCK, str(folder / rows[-1].folder), str(tmp_path / "sound.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    decoder, encoder, chunks = done.stdout.split()[-3:]
    assert (decoder, encoder) == ("3", "3") and int(chunks) > 0


def test_it_goes_on_where_it_stood(alone, place, capsys):
    """As if it had been killed in its last iteration."""
    rows, folder, given = alone
    again = shutil.copytree(folder, place[0] / "again")
    journal = json.loads((again / "experiment.json").read_text())
    journal["rows"], journal["speeds"], journal["complete"] = journal["rows"][:2], {}, False
    (again / "experiment.json").write_text(json.dumps(journal))
    shutil.rmtree(again / "iteration-2")
    (again / "texts" / "iteration-2.jsonl").unlink()
    given = [*given, "--output_dir", str(again), "--resume_from_checkpoint", "true"]
    found = recipe("speech_recognition").main(given)
    assert without_times(found) == without_times(rows) and "Results:" in capsys.readouterr().out
    texts = [(path / "texts" / "iteration-2.jsonl").read_text() for path in (folder, again)]
    assert texts[0] == texts[1] and without_times(read_rows(again)) == without_times(rows)


@pytest.mark.parametrize("heal", [None, "lstsq"])
def test_blocks_that_are_spread_evenly(place, heal):
    rows = run(place, f"spread-{heal}", spread_evenly=True, heal=heal)
    folder = place[0] / f"spread-{heal}" / "iteration-1"
    record = PrunedConfig.from_pretrained(folder)
    assert record.kept == {ENCODER: (0, 1, 2, 3), DECODER: tuple(evenly_spread(4, 3))}
    before = AutoModelForSpeechSeq2Seq.from_pretrained(place[1]["model"]).state_dict()
    after = AutoModelForSpeechSeq2Seq.from_pretrained(folder).state_dict()
    same = torch.equal(after["model.decoder.layers.1.fc2.weight"], before["model.decoder.layers.1.fc2.weight"])
    assert same == (heal is None)
    assert torch.equal(after["model.decoder.layers.2.fc1.weight"], before["model.decoder.layers.3.fc1.weight"])
    assert list(rows[-1].blocks.values()) == [4, 3]
    results = json.loads((place[0] / f"spread-{heal}" / "results.json").read_text())
    assert results["pruning"]["spread_evenly"]


def test_a_search_can_go_by_what_the_model_does_on_the_validation_data(place):
    """Each of the decoder's blocks taken out by name tells which one should go; test data have no say in it."""
    data, settings = place[1], {"num_blocks": f"{DECODER}=3", "search": "greedy", "repeats": 1}
    losses = {}
    for block in range(4):
        others = [f"{DECODER}.{each}" for each in range(4) if each != block]
        forced = {**settings, "protect": [f"{ENCODER}.*", *others], "test_file": data["validation_file"]}
        losses[block] = run(place, f"without-{block}", **forced)[-1].measured.metrics["loss"]
    run(place, "by-metric", **settings, objective="metric")
    kept = PrunedConfig.from_pretrained(place[0] / "by-metric" / "iteration-1").kept[DECODER]
    assert set(range(4)) - set(kept) == {min(losses, key=losses.get)}
    plan = json.loads((place[0] / "by-metric" / "iteration-1" / "pruning_plan.json").read_text())
    assert plan["config"]["objective"] == "metric"


def test_as_distil_whisper_was_made(place):
    """The encoder stays and is frozen; the whole model teaches, by its outputs and by what it hears."""
    settings = {"retrain_epochs": 1, "spread_evenly": True, "freeze": f"{ENCODER}.*", "distill_alpha": 0.5}
    rows = run(place, "distilled", **settings, pseudo_labels=True, num_blocks=f"{DECODER}=2")
    folder = place[0] / "distilled" / "iteration-1"
    before = AutoModelForSpeechSeq2Seq.from_pretrained(place[1]["model"]).state_dict()
    after = AutoModelForSpeechSeq2Seq.from_pretrained(folder).state_dict()
    frozen = [name for name in after if name.startswith(("model.encoder.layers", "model.encoder.conv"))]
    assert frozen and all(torch.equal(after[name], before[name]) for name in frozen)
    trained = after["model.decoder.layers.1.fc1.weight"]
    assert not torch.equal(trained, before["model.decoder.layers.3.fc1.weight"])
    assert rows[-1].frozen == 4 and list(rows[-1].blocks.values()) == [4, 2]
    results = json.loads((place[0] / "distilled" / "results.json").read_text())
    assert "Trained on what the whole model hears in 64 of 64 training recordings." in results["notes"]
    report = json.loads((folder / "pruning_report.json").read_text())
    assert report["config"]["distill"]["alpha"] == 0.5


@pytest.mark.parametrize("pads", [True, False])
def test_the_gate_judges_by_the_error_rate(place, pads, tmp_path):
    settings = {"retrain_epochs": 1, "metric": "wer", "max_drop": 5}
    if not pads:  # the end token does
        settings["model"] = shutil.copytree(place[1]["model"], tmp_path / "model")
        processor = WhisperProcessor.from_pretrained(settings["model"])
        processor.tokenizer.pad_token = None
        processor.save_pretrained(settings["model"])
        assert WhisperProcessor.from_pretrained(settings["model"]).tokenizer.pad_token_id is None
    rows = run(place, f"gate-{pads}", **settings)
    report = json.loads((place[0] / f"gate-{pads}" / "iteration-1" / "pruning_report.json").read_text())
    last = report["attempts"][-1]["evaluations"][-1]["metrics"]
    assert rows[-1].verdict == "accepted" and report["metric"] == "wer"
    assert rows[-1].validation[-1] == pytest.approx(last["eval_wer"])


def test_a_multilingual_model_is_told_the_language(tmp_path):
    data = make_speech(tmp_path, multilingual=True)
    with pytest.raises(ConfigError, match=r"knows de, en, zh, found spoken_language=None"):
        recipe("speech_recognition").main(words(**data, **ONCE, output_dir=tmp_path / "none"))
    with pytest.raises(ConfigError, match="task must be one of transcribe, translate, found 'hear'"):
        settings = {"spoken_language": "de", "task": "hear"}
        recipe("speech_recognition").main(words(**data, **ONCE, **settings, output_dir=tmp_path / "none"))
    given = words(**data, **ONCE, spoken_language="de", output_dir=tmp_path / "out")
    recipe("speech_recognition").main(given)
    told = json.loads((tmp_path / "out" / "iteration-1" / "generation_config.json").read_text())
    assert (told["language"], told["task"]) == ("de", "transcribe")
    assert "Whisper's basic normalizer" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spoken_language": "de"}, "hears English only"),
        ({"task": "translate"}, "hears English only"),
        ({"audio_column": "sound"}, "audio_column: there is no column 'sound'"),
        ({"text_column": "words"}, "text_column: there is no column 'words'"),
        ({"spread_evenly": True, "search": "greedy"}, "found search"),
        ({"spread_evenly": True, "num_blocks": None, "threshold": 0.9}, "found threshold"),
        ({"spread_evenly": True, "num_blocks": 7}, "needs num_blocks for each stack"),
        ({"objective": "metric"}, "Give search, and measure_removal"),
        ({"objective": "metric", "search": "greedy", "retrain_epochs": 1}, "Give search, and measure_removal"),
        ({"pseudo_labels": True}, "retrain_epochs=0"),
        ({"max_pseudo_wer": 0.1}, "pseudo_labels=False"),
        ({"metric": "wer_ortho", "retrain_epochs": 1, "max_drop": 1}, "metric='wer_ortho' is not among"),
    ],
)
def test_what_makes_no_sense_is_refused(place, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(place, "refused", **settings)
    assert not list((place[0]).glob("refused/*/model.safetensors"))


def test_the_last_model_is_published_with_what_the_pipeline_needs(place, hub, publisher):
    """In a process that reaches the tests' Hub."""
    folder, data = place
    given = words(**data, **ONCE, repo_id="owner/hears", license="mit", language="en", output_dir=folder / "published")
    publisher.run(f"import sys; sys.path.insert(0, {str(RECIPES)!r}); import speech_recognition")
    publisher.run(f"speech_recognition.main({given!r})")
    files = hub.files("owner/hears")
    needed = {"model.safetensors", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json"}
    assert needed <= set(files)
    card = card_of(hub, "owner/hears")
    assert card.data.pipeline_tag == "automatic-speech-recognition" and "wer" in card.data.metrics
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    row = read_rows(folder / "published")[-1]
    assert figures["wer"] == pytest.approx(row.measured.metrics["wer"])
    assert 'pipeline("automatic-speech-recognition", "owner/hears")' in card.text


@pytest.mark.slow
def test_killed_in_a_retraining_and_started_again(place, tmp_path):
    data = place[1]
    settings = {**SHORT, "finetune_epochs": 0, "iterations": 1, "num_blocks": TARGETS[0], "retrain_epochs": 6}
    settings |= {"metric": "wer", "save_strategy": "epoch", "save_total_limit": 1}

    def start(output, *more):
        command = [sys.executable, str(RECIPES / "speech_recognition.py")]
        environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        given = words(**data, **settings, output_dir=output)
        return subprocess.Popen([*command, *given, *more], env=environment, start_new_session=True, **pipes)

    undisturbed = start(tmp_path / "undisturbed")
    said = undisturbed.communicate(timeout=400)[0]
    assert undisturbed.returncode == 0, said
    running, end = start(tmp_path / "out"), time.monotonic() + 200
    while not list((tmp_path / "out").glob("iteration-1/checkpoint-*/clock.json")):
        assert running.poll() is None and time.monotonic() < end, running.communicate()[0]
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    again = start(tmp_path / "out", "--resume_from_checkpoint", "true")
    said = again.communicate(timeout=400)[0]
    assert again.returncode == 0 and "iteration-1: goes on from checkpoint-" in said, said
    assert without_times(read_rows(tmp_path / "out")) == without_times(read_rows(tmp_path / "undisturbed"))


@pytest.mark.slow
def test_two_processes_hear_every_recording_once_and_in_order(place):
    folder, data = place
    settings = {**ONCE, "iterations": 0, "per_device_eval_batch_size": 4}
    one = recipe("speech_recognition").main(words(**data, **settings, output_dir=folder / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29751"]
    given = words(**data, **settings, output_dir=folder / "two")
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(RECIPES / "speech_recognition.py"), *given],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [(folder / name / "texts" / "original.jsonl").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]
    two = read_rows(folder / "two")
    for rate in ("wer", "wer_ortho", "cer"):
        assert two[0].measured.metrics[rate] == one[0].measured.metrics[rate]


def test_adapters_on_what_stays_taught_by_the_whole_model(place):
    """The removal is a row of its own; the adapters are merged, and nothing is left of them."""
    rows = run(place, "lora", retrain_epochs=1, lora_rank=2, distill_alpha=0.5)
    assert [row.name for row in rows] == ["original", "iteration 1, removed", "iteration 1"]
    folder = place[0] / "lora" / "iteration-1"
    before, after = (
        AutoModelForSpeechSeq2Seq.from_pretrained(path).state_dict()
        for path in (place[0] / "lora" / "iteration-1-removed", folder)
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) for name in moved)
    assert not list(folder.glob("adapter*")) and (folder / "README.md").is_file()
    assert {"wer", "cer", "loss"} <= rows[2].measured.metrics.keys()
