"""The libraries' own doors: transformers pushes and loads here as on the Hub, and later without it."""

from __future__ import annotations

import pytest

from local_hub import Client, ClientError

# of the tests' own Hub; what the package does with it is tested in test_hub*.py
pytestmark = pytest.mark.slow

MODEL = """
import torch, transformers
from huggingface_hub import HfApi, model_info
torch.manual_seed(0)
torch.set_num_threads(1)
sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=16)
config = transformers.BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
model = transformers.BertModel(config).eval()
ids = torch.arange(8)[None]
def told(model):
    return model(input_ids=ids).last_hidden_state.sum(-1).flatten().tolist()
"""


@pytest.fixture(scope="module")
def owner(hub_client):
    client = hub_client("hf_owner")
    client.run(MODEL)
    return client


def test_a_model_is_pushed_and_loaded(hub, owner):
    owner.run("model.push_to_hub('owner/bert', commit_message='whole'); first = told(model)")
    assert hub.commits("owner/bert")[0].title == "whole"
    assert hub.files("owner/bert").keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert owner.run("result = told(transformers.AutoModel.from_pretrained('owner/bert')) == first")
    info = owner.run("info = model_info('owner/bert'); result = info.library_name, info.tags")
    assert info[0] == "transformers" and {"bert", "safetensors"} <= set(info[1])


def test_a_revision_stays_what_it_was(hub, owner):
    owner.run("""
        model.push_to_hub('owner/turned')
        first = told(model)
        HfApi().create_tag('owner/turned', tag='v1')
        with torch.no_grad():
            model.embeddings.word_embeddings.weight.neg_()
        model.push_to_hub('owner/turned')
        """)
    assert len(hub.commits("owner/turned")) == 3
    different = owner.run("""
        load = transformers.AutoModel.from_pretrained
        result = told(load('owner/turned')) == told(model), told(load('owner/turned', revision='v1')) == first
        """)
    assert different == [True, True]


def test_a_trainer_pushes_while_it_trains(hub, owner, tmp_path):
    owner.run(
        """
        config.num_labels = 2
        arguments = transformers.TrainingArguments(
            output, hub_model_id='owner/trained', push_to_hub=True, save_steps=2, max_steps=4,
            report_to=[], use_cpu=True
        )
        data = [{'input_ids': [n] * 8, 'labels': n % 2} for n in range(16)]
        classifier = transformers.BertForSequenceClassification(config)
        trainer = transformers.Trainer(classifier, arguments, train_dataset=data)
        trainer.train()
        trainer.push_to_hub(finetuned_from='org/base', tasks='text-classification')
        """,
        output=tmp_path,
    )
    titles = [each.title for each in hub.commits("owner/trained")]
    assert titles[-1] == "initial commit" and "End of training" in titles
    assert {"README.md", "config.json", "model.safetensors", "training_args.bin"} <= hub.files("owner/trained").keys()
    assert owner.run("result = model_info('owner/trained').card_data.base_model") == "org/base"


def test_what_was_loaded_once_loads_offline(hub, owner):
    owner.run(
        "model.push_to_hub('owner/offline'); transformers.AutoModel.from_pretrained('owner/offline'); now = told(model)"
    )
    before = len(hub.requests())
    with Client(hub.environment("hf_owner") | {"HF_HUB_OFFLINE": "1"}) as offline:
        found = offline.run(MODEL + "result = told(transformers.AutoModel.from_pretrained('owner/offline'))")
        with pytest.raises(ClientError) as caught:
            offline.run("transformers.AutoModel.from_pretrained('owner/never')")
    assert found == owner.run("result = now")
    assert caught.value.type == "OSError"
    assert len(hub.requests()) == before
