"""Publishing on a Hub over real HTTP: what is there afterwards, who can load it, and what failures leave."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.repocard_data import model_index_to_eval_results
from packaging.version import Version
from safetensors.torch import load, load_file

from deeparc_hf import PrunedConfig
from deeparc_hf.publish import made_by_us
from local_hub import Client, ClientError
from tests.publishing import BEGIN, card_of
from tests.stock import StockProcess, aligned, forwarded


@pytest.fixture(scope="module")
def stock(hub):
    with StockProcess(hub.environment("hf_owner", hub.root / "stock_home")) as process:
        yield process


def layers_in(weights):
    return len({name.split(".layer.")[1].split(".")[0] for name in load(weights) if ".layer." in name})


# ---- a Trainer, from its training to a process that has never heard of this package ----


@pytest.fixture(scope="module")
def published(hub, publisher, tmp_path_factory):
    """A run with both callbacks and push_to_hub=True, published by push_to_hub; its logits on one batch."""
    folder = tmp_path_factory.mktemp("run")
    publisher.run(
        """
        trainer = trained(folder, push_to_hub=True, hub_model_id="owner/e2e", hub_strategy="every_save")
        trainer.evaluate()
        commit = push_to_hub(trainer, commit_message="The smaller model", dataset_tags="dair-ai/emotion",
                             language="en", license="mit")
        ids = torch.arange(5, 25).reshape(2, 10)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits = trainer.model.eval()(**inputs).logits
        save_file({"logits": logits, **inputs}, folder + "/expected.safetensors")
        result = commit.oid
        """,
        folder=folder,
    )
    return load_file(folder / "expected.safetensors"), folder


def test_one_commit_holds_all_that_belongs_together(hub, published):
    last, *earlier = hub.commits("owner/e2e")
    assert last.title == "The smaller model" and earlier
    files = hub.files("owner/e2e")
    record = PrunedConfig.from_dict(json.loads(files["config.json"])["pruning_config"])
    assert record.kept["bert.encoder.layer"] == tuple(range(2)) or len(record.kept["bert.encoder.layer"]) == 2
    assert layers_in(files["model.safetensors"]) == 2
    assert record.sparsity is not None
    wanted = {
        "README.md",
        "config.json",
        "model.safetensors",
        "pruning_plan.json",
        "pruning_report.json",
        "pruning_report.md",
    }
    assert wanted | {"similarity.png", "sparsity_report.json", "sparsity_report.md", "tokenizer.json"} <= files.keys()
    assert files["similarity.png"].startswith(b"\x89PNG")


def test_a_stock_process_downloads_it_and_gives_equal_logits(published, stock):
    expected, _ = published
    loaded = stock.load(
        "owner/e2e", "AutoModelForSequenceClassification", {k: v for k, v in expected.items() if k != "logits"}
    )
    assert loaded.clean
    torch.testing.assert_close(loaded.outputs["output"], expected["logits"], rtol=0, atol=1e-6)


def test_the_card_is_valid_and_tells_every_metric(hub, publisher, published):
    card = card_of(hub, "owner/e2e")
    if Version(huggingface_hub.__version__) >= Version("2"):  # earlier ones ask huggingface.co, whatever the endpoint
        publisher.run('from huggingface_hub import ModelCard; ModelCard.load("owner/e2e").validate()')
    metadata = card.data.to_dict()
    assert (
        metadata["datasets"] == ["dair-ai/emotion"] and metadata["license"] == "mit" and metadata["language"] == ["en"]
    )
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-classification"
    assert {"deeparc", "pruned", "depth-pruning", "cka", "wanda"} <= set(metadata["tags"])
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "e2e"
    final = json.loads(hub.files("owner/e2e")["pruning_report.json"])["final"][0]["metrics"]
    assert {r.metric_type: r.metric_value for r in results} == {
        "loss": final["eval_loss"],
        "accuracy": final["eval_accuracy"],
    }


def test_the_cards_code_runs(publisher, published, hub):
    (code,) = re.findall(r"## Use it\n\n```python\n(.*?)```", card_of(hub, "owner/e2e").content, re.DOTALL)
    assert 'pipeline("text-classification", "owner/e2e")' in code
    found = publisher.run(f"{code}\nresult = model('w3 w4 w5')")
    assert found[0].keys() == {"label", "score"}


def test_the_recipe_in_the_card_makes_the_same_structure(publisher, published):
    found = publisher.run(
        """
        base = ZOO["bert"].model(); base.save_pretrained(folder + "/base")
        model = deeparc_hf.load_pruned(transformers.AutoModelForSequenceClassification, folder + "/base", "owner/e2e")
        result = [model.config.num_hidden_layers, deeparc_hf.PrunedConfig.from_pretrained("owner/e2e").kept]
        """,
        folder=published[1],
    )
    assert found[0] == 2 and len(found[1]["bert.encoder.layer"]) == 2


def test_no_token_path_or_pickle_is_published(hub, published):
    _, folder = published
    for commit in hub.commits("owner/e2e")[:1]:
        for name, content in hub.files("owner/e2e", commit.id).items():
            assert b"hf_owner" not in content and str(folder).encode() not in content, name
            assert not name.endswith((".bin", ".pt", ".pth", ".pkl")), name


def test_the_trainers_own_pushes_carry_the_config_weights_and_card_that_belong_together(hub, published):
    seen = set()
    for commit in hub.commits("owner/e2e"):
        files = hub.files("owner/e2e", commit.id)
        assert not any("snapshot" in name for name in files)
        if "model.safetensors" not in files:
            continue
        layers = json.loads(files["config.json"])["num_hidden_layers"]
        assert layers_in(files["model.safetensors"]) == layers
        text = files["README.md"].decode()
        if layers < 4:
            assert f"{4 - layers} of its 4 blocks (layers) removed" in text
        else:
            assert "No block was removed." in text
        assert made_by_us(text)
        seen.add(layers)
    assert len(seen) >= 2  # uploads that are not finished when the next save comes are left out by the Trainer


@pytest.mark.parametrize("strategy", ["end", "checkpoint", "all_checkpoints"])
def test_each_strategy_of_the_trainer_ends_with_this_card(hub, publisher, tmp_path, strategy):
    publisher.run(
        """
        from functools import partial
        from deeparc_hf import MPruneCallback
        name = f"owner/{strategy}"
        callback = MPruneCallback(num_blocks=3, retrain_epochs=1, calibration_samples=32)
        trainer = trained(folder, [callback], num_train_epochs=1, push_to_hub=True, hub_model_id=name,
                          hub_strategy=strategy, hub_always_push=True)
        trainer.create_model_card = partial(create_model_card, trainer)
        trainer.push_to_hub(commit_message="The end", language="en")
        """,
        folder=tmp_path,
        strategy=strategy,
    )
    files = hub.files(f"owner/{strategy}")
    text = files["README.md"].decode()
    assert made_by_us(text) and "1 of its 4 blocks (layers) removed" in text and "language:\n- en" in text
    assert layers_in(files["model.safetensors"]) == json.loads(files["config.json"])["num_hidden_layers"] == 3
    folders = {name.partition("/")[0] for name in files if "/" in name}
    assert bool(folders) == (strategy != "end") and not any("snapshot" in name for name in files)


def test_a_card_that_cannot_be_made_is_a_warning_and_the_run_goes_on(hub, publisher, tmp_path):
    said = publisher.run(
        """
        import pathlib, warnings
        from deeparc_hf import MPruneCallback
        from transformers import TrainerCallback
        class Breaks(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                pathlib.Path(args.output_dir, "sparsity_report.json").write_text("no JSON")
            def on_epoch_begin(self, *a, **k):
                pathlib.Path(a[0].output_dir, "sparsity_report.json").write_text("no JSON")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callback = MPruneCallback(num_blocks=3, retrain_epochs=1, calibration_samples=32)
            trainer = trained(folder, [Breaks(), callback], num_train_epochs=1, push_to_hub=True,
                              hub_model_id="owner/broken", hub_strategy="every_save")
        result = [str(w.message) for w in caught if "model card" in str(w.message)], trainer.state.global_step
        """,
        folder=tmp_path,
    )
    assert "sparsity_report.json is not what deeparc_hf writes there" in said[0][0] and said[1] == 8
    assert "model.safetensors" in hub.files("owner/broken")


# ---- timm, the documents, the cache ----


@pytest.mark.parametrize("name", ["timm_resnet", pytest.param("wrapped", marks=pytest.mark.slow)])
def test_timm_models_are_trained_and_published_in_timms_own_layout(hub, publisher, stock, tmp_path, name):
    """Both callbacks in one training, as for transformers' models."""
    publisher.run(
        """
        import timm
        from deeparc_hf import MPruneCallback, WandaCallback
        from tests.publishing import TimmTrainer
        from tests.trainers import train
        torch.manual_seed(0)
        model = ZOO["timm_resnet"].model()
        if name == "wrapped":
            save_pruned(model, folder + "/bare")  # as a model on the Hub: timm's own layout, which transformers wraps
            model = transformers.AutoModelForImageClassification.from_pretrained(folder + "/bare").eval()
            assert isinstance(model, transformers.TimmWrapperForImageClassification)
        blocks = sum(len(stack) for stack in deeparc_hf.find_stacks(model).values())
        rows = [{"pixel_values": torch.randn(3, 64, 64), "labels": i % 5} for i in range(40)]
        callbacks = [MPruneCallback(num_blocks=blocks - 1, retrain_epochs=1, calibration_samples=32),
                     WandaCallback(sparsity=0.3, start_epoch=1, calibration_samples=32)]
        kind = TimmTrainer if name == "timm_resnet" else transformers.Trainer
        trainer = train(model, folder + "/run", *callbacks, data=rows, cls=kind, push_to_hub=True,
                        hub_model_id=f"owner/{name}", hub_strategy="every_save", save_strategy="epoch",
                        remove_unused_columns=False)
        commit = push_to_hub(trainer, license="apache-2.0")
        pixels = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            output = trainer.model.eval()(pixels)
        output = getattr(output, "logits", output)
        save_file({"pixel_values": pixels, "output": output}, folder + "/expected.safetensors")
        """,
        folder=tmp_path,
        name=name,
    )
    files = hub.files(f"owner/{name}")
    record = PrunedConfig.from_dict(json.loads(files["config.json"])["pruning_config"])
    assert sum(map(len, record.removed.values())) == 1 and record.sparsity is not None
    assert not any(file.endswith(".bin") for file in files)
    expected = load_file(tmp_path / "expected.safetensors")
    loaded = stock.load(f"owner/{name}", "timm", {"pixel_values": expected["pixel_values"]})
    assert loaded.clean
    torch.testing.assert_close(loaded.outputs["output"], expected["output"], rtol=1e-5, atol=1e-5)
    card = card_of(hub, f"owner/{name}")
    if name == "wrapped":
        other = stock.load(
            f"owner/{name}", "AutoModelForImageClassification", {"pixel_values": expected["pixel_values"]}
        )
        assert other.clean
        torch.testing.assert_close(other.outputs["output"], expected["output"], rtol=1e-5, atol=1e-5)
    else:
        assert card.data.library_name == "timm"
        (code,) = re.findall(r"## Use it\n\n```python\n(.*?)```", card.content, re.DOTALL)
        publisher.run(code)


def test_what_was_downloaded_is_there_offline(hub, publisher, published):
    home = hub.root / "offline_home"
    look = 'from deeparc_hf import PrunedConfig\nresult = PrunedConfig.from_pretrained("owner/e2e").kept'
    with Client(hub.environment("hf_owner", home)) as online:
        kept = online.run(look)
    with Client(
        {**hub.environment("hf_owner", home), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    ) as offline:
        assert offline.run(look) == kept
        with pytest.raises(ClientError, match="neither in the cache nor to be reached") as error:
            offline.run('PrunedConfig.from_pretrained("owner/stale")')
    assert error.value.type == "LocalEntryNotFoundError"


def test_the_code_in_the_documents_publishes(hub, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "publishing.md").read_text("utf-8")
    blocks = re.findall(r"<!-- hub -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    with Client(hub.environment("hf_me")) as publisher:
        publisher.run(BEGIN)
        publisher.run("from deeparc_hf import MPruneCallback")
        publisher.run(
            """
            callback = MPruneCallback(num_blocks=3, retrain_epochs=1, calibration_samples=32)
            trainer = trained(folder, [callback], num_train_epochs=1, save_strategy="no", hub_model_id="me/again")
            """,
            folder=tmp_path,
        )
        for block in blocks:
            publisher.run(block)
    assert card_of(hub, "me/bert-emotion-8-blocks").data.datasets == ["dair-ai/emotion"]
    assert made_by_us(hub.files("me/again")["README.md"].decode())


def test_a_stock_comparison_is_not_vacuous(published):
    expected, _ = published
    from tests.zoo import ZOO

    other = aligned(ZOO["bert"].model()).eval()
    with torch.no_grad():
        output = forwarded(other, {k: v for k, v in expected.items() if k != "logits"})
    assert not torch.allclose(output, expected["logits"], atol=1e-3)
