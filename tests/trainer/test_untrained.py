"""A model that cannot do its task yet is known by what its checkpoint lacked, or by norms and biases that no training
has touched.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
import transformers as tf

from deeparc_hf.errors import DeepArcWarning
from deeparc_hf.trainer.untrained import untrained_weights
from tests.trainers import arguments, pruning, text_data, train
from tests.zoo import TEXT, ZOO

HEAD = ["classifier.bias", "classifier.weight"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model and one with a trained head."""
    folder = tmp_path_factory.mktemp("saved")
    model = ZOO["bert"].model()
    model.save_pretrained(folder / "whole")
    model.bert.save_pretrained(folder / "base")
    return folder


def load(folder, **kwargs):
    return tf.BertForSequenceClassification.from_pretrained(folder, **kwargs)


def test_what_the_checkpoint_lacks_is_known_until_it_is_trained(saved, tmp_path):
    assert untrained_weights(load(saved / "whole")) == []
    assert untrained_weights(load(saved / "base")) == HEAD
    assert untrained_weights(load(saved / "whole", num_labels=5, ignore_mismatched_sizes=True)) == HEAD
    model = load(saved / "base").to(torch.bfloat16)
    assert untrained_weights(model) == HEAD
    tf.Trainer(model, arguments(tmp_path, num_train_epochs=1), train_dataset=text_data()).train()
    assert untrained_weights(model) == []
    other = load(saved / "base")
    other.load_state_dict(load(saved / "whole").state_dict())
    assert untrained_weights(other) == []
    wider = load(saved / "whole")
    wider.resize_token_embeddings(TEXT["vocab_size"] + 3, mean_resizing=False)
    assert untrained_weights(wider) == []
    headless = tf.BertModel.from_pretrained(saved / "base")
    assert untrained_weights(headless) == []


def test_models_that_are_made_without_a_checkpoint():
    fresh = tf.BertForSequenceClassification(tf.BertConfig(**TEXT))
    assert untrained_weights(fresh) == sorted(name for name, _ in fresh.named_parameters())
    assert untrained_weights(ZOO["bert"].model()) == []
    assert untrained_weights(copy.deepcopy(ZOO["bert"].model())) == []
    bare = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3
    )
    assert len(untrained_weights(bare)) == len(list(bare.parameters()))
    with torch.no_grad():
        bare.norm.weight[0] = 0.5
    assert untrained_weights(bare) == ["head.bias", "head.weight"]
    with torch.no_grad():
        bare.head.bias[0] = 0.5
    assert untrained_weights(bare) == []


def test_a_head_whose_biases_are_drawn_too(tmp_path):
    model = ZOO["resnet"].model()
    model.resnet.save_pretrained(tmp_path)
    assert untrained_weights(model) == []
    fresh = tf.ResNetForImageClassification(model.config)
    assert len(untrained_weights(fresh)) == len(list(fresh.parameters()))
    loaded = tf.ResNetForImageClassification.from_pretrained(tmp_path)
    assert untrained_weights(loaded) == ["classifier.1.bias", "classifier.1.weight"]
    with torch.no_grad():
        loaded.classifier[1].weight.data += 0.05
    assert untrained_weights(loaded) == []


def test_pruned_at_once_it_is_told_of(saved, tmp_path):
    with pytest.raises(
        DeepArcWarning, match=r"classifier.bias and classifier.weight are as drawn at random.*start_epoch=1 or more"
    ):
        train(load(saved / "base"), tmp_path, pruning(num_blocks=3), num_train_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeepArcWarning)
        train(load(saved / "base"), tmp_path, pruning(num_blocks=3, start_epoch=1))
