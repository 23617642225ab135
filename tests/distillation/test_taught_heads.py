"""Every kind of head is taught: weights stay finite, and differ from those of a training without a teacher."""

from __future__ import annotations

import datasets
import pytest
import torch
import transformers as tf

from deeparc_hf.architectures import describe
from deeparc_hf.errors import ConfigError
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.outputs import heads_of
from deeparc_hf.observe.quality import measure_quality
from tests.trainers import pruning, text_data, train
from tests.zoo import TEXT, ZOO, as_trained, spread


def bert(kind, **settings):
    torch.manual_seed(0)
    config = tf.BertConfig(**TEXT, **settings, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return as_trained(spread(getattr(tf, kind)(config)))


def llama():
    model = ZOO["llama"].model()
    model.config.use_cache = False
    return model


def texts(**columns):
    data = text_data().remove_columns("labels")
    for name, values in columns.items():
        data = data.add_column(name, values)
    return data


def choices():
    return datasets.Dataset.from_dict(
        {"input_ids": [[row, row[::-1]] for row in text_data()["input_ids"]], "labels": [0, 1] * 32}
    )


ROWS = [list(row) for row in text_data()["input_ids"]]
HEADS = {
    "question answering": (
        lambda: bert("BertForQuestionAnswering"),
        lambda: texts(start_positions=[1] * 64, end_positions=[3] * 64),
        {},
    ),
    "regression": (lambda: bert("BertForSequenceClassification", num_labels=1), lambda: texts(labels=[0.5] * 64), {}),
    "several labels": (
        lambda: bert("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        lambda: texts(labels=[[0.0, 1.0, 0.0]] * 64),
        {},
    ),
    "tokens": (
        lambda: bert("BertForTokenClassification", num_labels=3),
        lambda: texts(labels=[[-100, 1, 2, 0, 1, 2, 0, 1, -100, -100]] * 64),
        {},
    ),
    "masked tokens": (lambda: bert("BertForMaskedLM"), lambda: texts(labels=[[-100] * 4 + [7] + [-100] * 5] * 64), {}),
    "several choices": (lambda: bert("BertForMultipleChoice"), choices, {}),
    "micro-batches without a label": (
        llama,
        lambda: texts(labels=[[-100] * 10 if index % 2 else row for index, row in enumerate(ROWS)]),
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_taught(tmp_path, name):
    make, data, arguments = HEADS[name]
    weights = []
    for distill in ({"alpha": 0.9, "hidden": 0.5}, None):
        model = make()
        callback = pruning(num_blocks=2, distill=distill)
        train(model, tmp_path, callback, data=data(), num_train_epochs=1, optim="sgd", learning_rate=1e-2, **arguments)
        assert sum(map(len, callback.plan.removed.values())) == 2
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.isfinite(weights[0]).all() and torch.isfinite(weights[1]).all()
    assert float((weights[0] - weights[1]).abs().max()) > 1e-5


def test_a_model_that_puts_out_tuples_is_refused(tmp_path):
    model = bert("BertForSequenceClassification")
    model.config.return_dict = False
    with pytest.raises(ConfigError, match="return_dict = True"):
        train(model, tmp_path, pruning(num_blocks=2, distill={}), num_train_epochs=1)


def test_labels_tell_what_the_logits_are_where_the_config_does_not():
    """Divergence by sigmoids for float labels, as by the config that transformers notes."""
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=3)).eval()
    host = describe(model).host
    batch = ZOO["bert"].batches(1)[0]
    with torch.no_grad():
        output = model(**batch)
    floats = {**batch, "labels": torch.zeros(8, 3)}
    assert [head.kind for head in heads_of(host, output, batch)] == ["softmax"]
    assert [head.kind for head in heads_of(host, output, {**batch, "labels": torch.zeros(8, dtype=torch.long)})] == [
        "softmax"
    ]
    assert [head.kind for head in heads_of(host, output, floats)] == ["sigmoid"]
    assert measure_quality(model, Calibration([floats], 8))["samples"] == 8 and model.config.problem_type is None
