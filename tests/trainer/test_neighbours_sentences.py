"""MPruneCallback in the trainers of sentence-transformers: of encoders, cross encoders and sparse encoders, judged by
what their evaluators measure; and SetFit's models, which are pruned beside their trainer.
"""

from __future__ import annotations

import shutil

import datasets
import pytest
import torch
import transformers as tf

pytest.importorskip("sentence_transformers")

import sentence_transformers as st
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sparse_encoder import SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

from deeparc_hf import MPruneCallback, PrunedConfig, prune_model
from deeparc_hf.errors import UnsupportedModelError
from tests.sentence_encoders import batches, encoder, stock, texts, transformer
from tests.trainers import arguments
from tests.zoo import TEXT

ANCHORS, POSITIVES = texts(1, 32), texts(2, 32)
PAIRS = list(zip(ANCHORS, POSITIVES, strict=True))
SETTINGS = {"start_epoch": 1, "retrain_epochs": 1, "calibration_samples": 32}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    encoder(folder / "bert").save_pretrained(str(folder / "whole"))
    return folder / "whole"


def trained(whole, folder, callback, resume=None, **settings):
    """A training with pairs, whose evaluations have the metric dev_cosine_ndcg@10."""
    model = st.SentenceTransformer(str(whole), device="cpu")
    data = datasets.Dataset.from_dict({"anchor": ANCHORS, "positive": POSITIVES})
    numbers = [str(number) for number in range(len(ANCHORS))]
    evaluator = InformationRetrievalEvaluator(
        dict(zip(numbers, ANCHORS, strict=True)),
        dict(zip(numbers, POSITIVES, strict=True)),
        {number: {number} for number in numbers},
        name="dev",
        write_csv=False,
    )
    shared = {"num_train_epochs": 3, "learning_rate": 1e-3, "eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=arguments(folder, st.SentenceTransformerTrainingArguments, **{**shared, **settings}),
        train_dataset=data,
        loss=MultipleNegativesRankingLoss(model),
        evaluator=evaluator,
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def gated(**settings):
    shared = {"num_blocks": [3, 2], "iterations": 2, "heal": "lstsq", "metric": "dev_cosine_ndcg@10", **SETTINGS}
    return MPruneCallback(**{**shared, **settings})


@pytest.fixture(scope="module")
def run(whole, tmp_path_factory):
    folder, callback = tmp_path_factory.mktemp("run"), gated(max_drop=0.08, baseline=0.1, keep_snapshots=True)
    trainer = trained(whole, folder, callback)
    trainer.save_model(str(folder / "saved"))
    return trainer, callback, folder


def test_what_is_saved_is_the_whole_encoder_and_loads_without_the_package(run):
    trainer, callback, folder = run
    assert [attempt.get("decision") for attempt in callback.attempts] == [None, "accepted", "accepted"]
    name = "eval_dev_cosine_ndcg@10"
    noted = [evaluation["metrics"][name] for attempt in callback.attempts for evaluation in attempt["evaluations"]]
    assert noted == [entry[name] for entry in trainer.state.log_history if name in entry] and len(noted) == 3
    assert PrunedConfig.from_pretrained(folder / "saved") == callback.record
    expected = trainer.model.encode(ANCHORS, convert_to_tensor=True)
    ((modules, values),) = stock(("SentenceTransformer", folder / "saved", ANCHORS))
    assert modules == ["Transformer", "Pooling", "Dense", "Normalize"]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    again = st.SentenceTransformer(str(folder / "saved"), device="cpu")
    assert again[0].auto_model.config.num_hidden_layers == 2 and again.max_seq_length == 12
    torch.testing.assert_close(again[2].linear.weight, trainer.model[2].linear.weight)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_resumed_training_ends_as_it_would_have_ended(run, whole, tmp_path, epoch):
    trainer, _, folder = run
    shutil.copytree(folder / "_pruning_snapshots", tmp_path / "_pruning_snapshots")
    callback = gated(max_drop=0.08, baseline=0.1, keep_snapshots=True)
    again = trained(whole, tmp_path, callback, str(folder / f"checkpoint-{4 * epoch}"))
    ours, theirs = again.model.state_dict(), trainer.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_pruning_that_costs_too_much_is_taken_back(whole, tmp_path):
    callback = gated(max_drop=0.0, baseline=1.0, num_blocks=2, iterations=1, k_max=1)
    trainer = trained(whole, tmp_path, callback, save_strategy="no")
    assert [attempt.get("decision") for attempt in callback.attempts] == [None, "rolled back"]
    assert len(trainer.model[0].auto_model.encoder.layer) == 4


def test_cross_encoders_whose_batches_hold_texts(tmp_path):
    """Their losses tokenize: calibration does so too."""
    model = tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=1))
    model = st.CrossEncoder(transformer(tmp_path / "bert", model), device="cpu")
    labels = [number % 2 for number in range(len(PAIRS))]
    data = datasets.Dataset.from_dict({"query": ANCHORS, "answer": POSITIVES, "label": [float(i) for i in labels]})
    evaluator = CrossEncoderClassificationEvaluator(PAIRS, labels, name="dev", write_csv=False)
    callback = MPruneCallback(
        num_blocks=3, heal="lstsq", metric="dev_average_precision", max_drop=0.4, baseline=0.5, **SETTINGS
    )
    trainer = CrossEncoderTrainer(
        model=model,
        args=arguments(tmp_path / "out", CrossEncoderTrainingArguments, num_train_epochs=2, eval_strategy="epoch"),
        train_dataset=data,
        loss=BinaryCrossEntropyLoss(model),
        evaluator=evaluator,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.plan.samples == 32 and callback.attempts[-1]["decision"] == "accepted"
    trainer.save_model(str(tmp_path / "saved"))
    expected = torch.as_tensor(model.predict(PAIRS))
    again = st.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert again.config.num_hidden_layers == 3
    torch.testing.assert_close(torch.as_tensor(again.predict(PAIRS)), expected)


def test_a_row_of_several_documents_is_several_pairs(tmp_path):
    """As losses of rankings take them: a query, and a list of documents."""
    bert = tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=1))
    folder = transformer(tmp_path / "bert", bert)
    documents = [POSITIVES[i : i + 2] for i in range(0, 32, 2)]
    ranked = [{"query": ANCHORS[:16], "docs": documents, "labels": [[1, 0]] * 16}]
    pairs = [(query, text) for query, several in zip(ANCHORS[:16], documents, strict=True) for text in several]
    plans = [prune_model(st.CrossEncoder(folder, device="cpu"), data, num_blocks=3) for data in (ranked, [pairs])]
    assert plans[0].samples == plans[1].samples == 32
    assert plans[0].to_dict()["stacks"] == plans[1].to_dict()["stacks"]


def test_sparse_encoders(tmp_path):
    bert = tf.BertForMaskedLM(tf.BertConfig(**TEXT))
    model = st.SparseEncoder(transformer(tmp_path / "bert", bert), device="cpu")
    callback = MPruneCallback(num_blocks=3, **SETTINGS)
    trainer = SparseEncoderTrainer(
        model=model,
        args=arguments(tmp_path / "out", SparseEncoderTrainingArguments, num_train_epochs=2),
        train_dataset=datasets.Dataset.from_dict({"anchor": ANCHORS, "positive": POSITIVES}),
        loss=SpladeLoss(model, SparseMultipleNegativesRankingLoss(model), 1e-3, 1e-3),
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = st.SparseEncoder(str(tmp_path / "saved"), device="cpu")
    assert [type(module).__name__ for module in again] == [type(module).__name__ for module in model]
    assert again[0].auto_model.config.num_hidden_layers == 3
    torch.testing.assert_close(again.encode(ANCHORS).to_dense(), model.encode(ANCHORS).to_dense())


# setfit wraps a dataloader in a way that torch has deprecated
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_setfit_is_pruned_between_its_two_trainings(tmp_path):
    setfit = pytest.importorskip("setfit")
    folder = tmp_path / "body"
    encoder(tmp_path / "bert").save_pretrained(str(folder))
    data = datasets.Dataset.from_dict({"text": ANCHORS, "label": [i % 2 for i in range(len(ANCHORS))]})
    settings = {"num_epochs": 1, "batch_size": 16, "max_steps": 3, "report_to": "none"}

    def trainer_of(model, *callbacks):
        args = setfit.TrainingArguments(output_dir=str(tmp_path / "out"), **settings)
        return setfit.Trainer(model=model, args=args, train_dataset=data, callbacks=list(callbacks))

    with pytest.raises(UnsupportedModelError, match="between train_embeddings and train_classifier"):
        model = setfit.SetFitModel.from_pretrained(str(folder), labels=["no", "yes"])
        trainer_of(model, MPruneCallback(num_blocks=3, **SETTINGS)).train()
    model = setfit.SetFitModel.from_pretrained(str(folder), labels=["no", "yes"])
    trainer_of(model).train()
    before, head = model.predict_proba(ANCHORS), model.model_head.coef_.copy()
    prune_model(model.model_body, batches(64), num_blocks=3, heal="lstsq")
    after = model.predict_proba(ANCHORS)
    assert (model.model_head.coef_ == head).all() and not torch.allclose(after, before, atol=1e-6)
    trainer = trainer_of(model)
    trainer.train_classifier(*trainer.dataset_to_parameters(data))
    assert not (model.model_head.coef_ == head).all()
    model.save_pretrained(str(tmp_path / "saved"))
    again = setfit.SetFitModel.from_pretrained(str(tmp_path / "saved"))
    assert len(again.model_body[0].auto_model.encoder.layer) == 3
    assert PrunedConfig.from_model(again.model_body) == PrunedConfig.from_model(model.model_body)
    torch.testing.assert_close(again.predict_proba(ANCHORS), model.predict_proba(ANCHORS))
