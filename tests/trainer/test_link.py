"""What a Trainer is refused that is made in a link of a chain, before any work is done."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers as tf
from transformers import Trainer, TrainingArguments

from deeparc_hf import MPruneCallback, WandaCallback
from deeparc_hf.errors import ConfigError, RecordError, SurgeryError, UnsupportedModelError
from deeparc_hf.pruning.config import MPruneConfig
from deeparc_hf.trainer.link import LINK_VARIABLE, Kind, Link, Standing, Told, Wish
from deeparc_hf.trainer.linked_run import prepare_link
from tests.trainers import text_data
from tests.zoo import TEXT, ZOO


@pytest.fixture
def link(tmp_path, monkeypatch):
    folder = tmp_path / "001"
    model = ZOO["bert"].model()
    model.save_pretrained(tmp_path / "begin")
    made = Link(Kind.TRAIN, str(tmp_path / "begin"), folder / "output", folder, Standing(str(tmp_path / "begin")))
    made.write(folder / "link.json")
    monkeypatch.setenv(LINK_VARIABLE, str(folder / "link.json"))
    return made


def trainer(link, callback=None, model=None, **arguments):
    settings = {"use_cpu": True, "num_train_epochs": 4, "output_dir": str(link.output), **arguments}
    loaded = type(ZOO["bert"].model()).from_pretrained(link.model) if model is None else model
    callback = MPruneCallback(num_blocks=3, start_epoch=1) if callback is None else callback
    return Trainer(loaded, TrainingArguments(**settings), train_dataset=text_data(), callbacks=[callback])


def test_the_epochs_are_those_of_the_link(link):
    assert trainer(link).args.num_train_epochs == 1  # before the first pruning
    assert trainer(link, MPruneCallback(num_blocks=3)).args.num_train_epochs == 4  # it prunes at once, or trains on


@pytest.mark.parametrize(
    ("settings", "arguments", "match"),
    [
        ({"distill": {"alpha": 0.5}}, {}, "distill does not go"),
        ({"rewind_lr": False}, {}, "learning rate of its own"),
        ({}, {"max_steps": 5}, "num_train_epochs"),
        ({}, {"auto_find_batch_size": True}, "a batch size that fits"),
        ({}, {"torch_compile": True}, "compile the model that the chain ends with"),
        ({}, {"output_dir": "elsewhere"}, "in the place of {output}"),
        (
            {},
            {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"},
            "the model as the link leaves it",
        ),
    ],
)
def test_what_does_not_go_with_a_chain_is_refused(link, tmp_path, settings, arguments, match):
    if arguments.get("output_dir"):
        arguments = {"output_dir": str(tmp_path / "elsewhere")}
    with pytest.raises(ConfigError, match=match):
        trainer(link, MPruneCallback(**{"num_blocks": 3, "start_epoch": 1, **settings}), **arguments)


def test_the_first_version_of_fsdp_is_refused(link):
    made = trainer(link)
    made.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    with pytest.raises(ConfigError, match="Set fsdp_version: 2"):
        prepare_link(link, MPruneConfig(num_blocks=3), made)
    made.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2, activation_checkpointing=True)
    with pytest.raises(ConfigError, match="gradient_checkpointing=True"):
        prepare_link(link, MPruneConfig(num_blocks=3), made)
    del made.accelerator.state.fsdp_plugin


def test_another_model_is_refused(link):
    other = ZOO["bert"].model()  # made from its config: it carries no name
    with pytest.raises(SurgeryError, match="a model without a name"):
        trainer(link, model=other)
    other.config.name_or_path = "somebody/else"
    with pytest.raises(SurgeryError, match="'somebody/else', and this link of the chain is for"):
        trainer(link, model=other)


def test_models_that_cannot_be_written_from_file_to_file_are_refused(link):
    kind = type(ZOO["bert"].model())
    own = type("Own", (kind,), {}).from_pretrained(link.model)
    with pytest.raises(UnsupportedModelError, match="transformers' own classes"):
        trainer(link, model=own)
    with pytest.raises(UnsupportedModelError, match=r"contact_head.* has a part for each block"):
        trainer(link, model=tf.EsmForSequenceClassification(tf.EsmConfig(**TEXT, pad_token_id=0)))
    quantized = kind.from_pretrained(link.model)
    quantized.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(UnsupportedModelError, match="not quantized"):
        trainer(link, model=quantized)


def test_a_trainer_that_makes_its_own_model_is_refused(link):
    arguments = TrainingArguments(str(link.output), use_cpu=True)
    with pytest.raises(ConfigError, match="not model_init"):
        Trainer(args=arguments, model_init=lambda trial: ZOO["bert"].model(), callbacks=[MPruneCallback(num_blocks=3)])


def test_weights_are_zeroed_after_a_chain(link):
    with pytest.raises(ConfigError, match="deeparc sparsify"):
        trainer(link, WandaCallback(sparsity=0.5))


def test_what_is_told_is_read_as_it_was_written(link, tmp_path):
    read = Link.read(link.folder / "link.json")
    assert (read.kind, read.model, read.output) == (link.kind, link.model, link.output)
    assert read.standing == link.standing
    told = Told(Wish.PRUNE, Standing("a", steps_done=3, validation=["x"]), "a", plan={"p": 1}, repairs="r")
    told.write(tmp_path / "told.json")
    assert Told.read(tmp_path / "told.json") == told
    for text in ("{}", "[]", "no", '{"kind": "train"}'):
        (tmp_path / "bad.json").write_text(text)
        for kind in (Link, Told):
            with pytest.raises(RecordError, match="deeparc run"):
                kind.read(tmp_path / "bad.json")
