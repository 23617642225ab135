# /// script
# requires-python = ">=3.11"
# dependencies = ["deeparc_hf[recipes]"]
# ///
r"""Speech recognition: fine-tune a Whisper, or take it as it is; remove blocks of encoder and decoder, which are stacks
of their own, heal or retrain, and measure word error rates of what it hears.

    python recipes/speech_recognition.py --config recipes/configs/whisper_tiny_prompts.yaml
    accelerate launch recipes/speech_recognition.py --config recipes/configs/whisper_small_librispeech.yaml

Every setting of the config file may be given on the command line, which wins. Any data set with recordings and
transcripts will do, or a local .csv, .jsonl or .parquet file of names of sound files (relative to its folder) and
transcripts. A multilingual model is told the language of the recordings: --spoken_language de. Recordings of more than
30 seconds, which a Whisper hears in parts, are left out.

As Distil-Whisper was made (arXiv 2311.00430): the encoder stays and is frozen, the decoder's layers are spread evenly,
and the model from before the removal teaches, also by its own transcripts of the training recordings:

    python recipes/speech_recognition.py --model openai/whisper-small.en --dataset openslr/librispeech_asr \
        --dataset_config clean --train_split train.100 --finetune_epochs 0 --num_blocks model.decoder.layers=4 \
        --spread_evenly --freeze "model.encoder.layers.*" --distill_alpha 0.5 --pseudo_labels --output_dir runs/spread

A gate (--max_drop) is on the loss, or on the error rate (--metric wer).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deeparc_hf.core.settings import setting


@dataclass
class SpeechArguments:
    """Columns, language, and how transcripts are generated."""

    audio_column: str = setting("audio", "column of the recordings: audio, bytes of files, or names of files")
    text_column: str = setting("text", "column of the transcripts")
    spoken_language: str | None = setting(
        None, "code of the recordings' language (de), for multilingual models; others hear English"
    )
    task: str = setting("transcribe", "transcribe, or translate (into English), for multilingual models")
    max_new_tokens: int = setting(225, "longest transcript that is generated, in tokens")
    num_beams: int = setting(1, "beams of the search")
    pseudo_labels: bool = setting(
        False, "train on the transcripts that the model gives of the training data before anything is removed"
    )
    max_pseudo_wer: float | None = setting(
        None, "leave out pseudo-labels with a larger word error rate than this against the transcript of the data"
    )


def main(argv: list[str] | None = None) -> list[Any]:
    """Run the experiment and return the rows of its table."""
    from transformers import AutoModelForSpeechSeq2Seq, Seq2SeqTrainingArguments

    from experiment import speech
    from experiment.arguments import begin
    from experiment.audio import with_recordings
    from experiment.metrics import Metrics
    from experiment.models import loader
    from experiment.provenance import provenance
    from experiment.pseudo_labels import check_pseudo_labels, with_pseudo_labels
    from experiment.seq2seq import GeneratingTrainer
    from experiment.sequence import Experiment
    from experiment.splits import load_splits

    data, own, pruning, training = begin(SpeechArguments, argv, __doc__, Seq2SeqTrainingArguments)
    check_pseudo_labels(own.pseudo_labels, own.max_pseudo_wer, pruning)
    training.remove_unused_columns = False  # the recordings' column is not one of the model's
    hearing = speech.Hearing.of(data.model, data.model_revision, own.spoken_language, own.task)
    splits = load_splits(data, training.seed)
    splits.need_texts(text_column=own.text_column)
    splits = with_recordings(splits, own.audio_column, data)
    splits, left_out = hearing.fitting(splits, own.audio_column, own.text_column)
    references, seconds = list(splits.test[own.text_column]), sum(splits.test["seconds"])
    encoder = speech.SpeechEncoder(hearing.features, own.audio_column)
    seen = splits.each(lambda part: part.with_transform(encoder))
    train = seen.train

    metrics = Metrics(["wer", "cer"], data.evaluate_scripts)
    search = {"num_beams": own.num_beams, "max_new_tokens": own.max_new_tokens}
    measure = speech.SpeechMeasure(seen.test, references, hearing, metrics, **search)
    generates = (pruning.metric or "loss").removeprefix("eval_") != "loss"
    if generates:  # the gate judges by an error rate of generated transcripts
        training.predict_with_generate = True
        training.generation_max_length, training.generation_num_beams = own.max_new_tokens, own.num_beams

    def trainer(model: Any, args: Any, callbacks: list[Any]) -> GeneratingTrainer:
        return GeneratingTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=seen.validation,
            processing_class=hearing.processor,
            data_collator=speech.SpeechCollator(),
            callbacks=callbacks,
            compute_metrics=partial(speech.error_rates, hearing, metrics) if generates else None,
        )

    load = hearing.asked(loader(AutoModelForSpeechSeq2Seq, data, pruning))
    made_by = provenance(__file__, argv, data, own, training, splits, metrics.told)
    notes = [f"{metrics} WER and CER: after {hearing.told}.", *([left_out] if left_out else [])]
    how = {
        "calibration": train,
        "provenance": made_by,
        "notes": notes,
        "known": ["wer", "cer"],
        "finish": lambda rows: speech.write_speech_scores(Path(training.output_dir), rows, seconds, hearing.told),
    }
    experiment = Experiment(data, pruning, training, load, trainer, seen, measure, **how)
    if own.pseudo_labels:  # once it is known that the experiment can begin
        heard = measure.generate(trainer(load(data.model), training, []), seen.train)
        taught, told = with_pseudo_labels(splits.train, own.text_column, heard, hearing, own.max_pseudo_wer)
        experiment.calibration = train = taught.with_transform(encoder)
        experiment.notes.append(told)
    return experiment.run()


if __name__ == "__main__":
    from experiment.command import run

    run(main)
