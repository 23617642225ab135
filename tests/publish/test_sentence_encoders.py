"""Cards and pushes of sentence encoders: sentence-transformers' own card stays, with ours in it; all modules go up."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

pytest.importorskip("sentence_transformers")

import datasets
import sentence_transformers as st
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from deeparc_hf import MPruneCallback, create_model_card, prune_checkpoint, remove_blocks, save_pruned
from deeparc_hf.cli import main
from deeparc_hf.errors import ConfigError, DeepArcWarning
from deeparc_hf.publish import made_by_us
from deeparc_hf.publish.files import checkpoint_files, outdated
from tests.publishing import card_of
from tests.sentence_encoders import STACK, encoder, stock, texts
from tests.trainers import arguments

TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction", "dense"]
MODULES = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"}
NAMES = ["Transformer", "Pooling", "Dense", "Normalize"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    encoder(folder / "bert").save_pretrained(str(folder / "whole"))
    return folder / "whole"


@pytest.fixture(scope="module")
def trainer(whole, tmp_path_factory):
    """A training that prunes, with an evaluator; evaluated after its end."""
    model = st.SentenceTransformer(str(whole), device="cpu")
    anchors, positives = texts(1, 32), texts(2, 32)
    evaluator = EmbeddingSimilarityEvaluator(anchors, positives, [i / 32 for i in range(32)], write_csv=False)
    found = st.SentenceTransformerTrainer(
        model=model,
        args=arguments(
            tmp_path_factory.mktemp("run"),
            st.SentenceTransformerTrainingArguments,
            num_train_epochs=2,
            learning_rate=1e-3,
            eval_strategy="epoch",
        ),
        train_dataset=datasets.Dataset.from_dict({"anchor": anchors, "positive": positives}),
        loss=MultipleNegativesRankingLoss(model),
        evaluator=evaluator,
        callbacks=[MPruneCallback(num_blocks=3, start_epoch=1, retrain_epochs=1, calibration_samples=32)],
    )
    found.train()
    return found


def results_of(card):
    return {(result.metric_type, result.metric_value) for result in card.data.eval_results}


def test_a_trained_encoder_s_card_is_both(trainer, tmp_path):
    card = create_model_card(trainer, tmp_path / "README.md", repo_id="me/small", license="mit")
    text = (tmp_path / "README.md").read_text("utf-8")
    assert text == str(card) and made_by_us(text)
    data = card.data.to_dict()
    assert data["library_name"] == "sentence-transformers" and data["pipeline_tag"] == "sentence-similarity"
    assert data["tags"][:4] == TAGS and {"deeparc", "pruned", "depth-pruning", "cka"} <= set(data["tags"])
    assert "loss:MultipleNegativesRankingLoss" in data["tags"] and data["license"] == "mit" and data["widget"]
    name = "eval_spearman_cosine"
    measured = [entry[name] for entry in trainer.state.log_history if name in entry][-1]
    assert ("spearman_cosine", measured) in results_of(card)  # once, though both tell it
    assert [kind for kind, _ in results_of(card)].count("spearman_cosine") == 1
    # theirs: the code with the repository's name, the architecture, the evaluator's table, the training's settings
    assert 'SentenceTransformer("me/small")' in text and "(2): Dense(" in text
    assert "transformers_model_id" not in text
    assert "[<code>EmbeddingSimilarityEvaluator</code>]" in text and "#### Non-Default Hyperparameters" in text
    # ours: the first screen before their first section, the rest at the end
    assert text.index("with 1 of its 4 blocks (layers) removed") < text.index("## Model Details")
    assert text.index("## Citation") < text.index("## Pruning") < text.index("### What was removed")
    assert "It loads with plain sentence-transformers" in text
    assert re.findall(r"^## .*$", text, re.MULTILINE)[-1] == "## Pruning"


def test_made_again_it_is_the_same_and_an_edited_one_stays(trainer, tmp_path):
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    first = str(create_model_card(folder, repo_id="me/small"))
    assert "## Pruning" in first and str(create_model_card(folder, repo_id="me/small")) == first
    edited = first.replace("## Model Details", "My own words.\n\n## Model Details")
    (folder / "README.md").write_text(edited, "utf-8")
    with pytest.warns(DeepArcWarning, match="stays as it is"):
        create_model_card(folder, repo_id="me/small")
    assert (folder / "README.md").read_text("utf-8") == edited
    create_model_card(folder, repo_id="me/small", overwrite=True)
    again = (folder / "README.md").read_text("utf-8")
    assert "My own words." in again and again.count("## Pruning") == 1
    mine = "# Mine\n\nNothing of any library.\n"
    (folder / "README.md").write_text(mine, "utf-8")
    with pytest.warns(DeepArcWarning, match="stays as it is"):
        create_model_card(folder)
    assert (folder / "README.md").read_text("utf-8") == mine


def test_the_code_of_their_card_gets_the_name_that_it_is_published_under(trainer, tmp_path):
    """As a recipe does it: the card is made in a folder first, and the repository's name is known when it is pushed."""
    folder = tmp_path / "iteration-1"
    trainer.save_model(str(folder))
    before = str(create_model_card(folder))
    assert 'SentenceTransformer("iteration-1")' in before and "before it was pruned" not in before
    text = str(create_model_card(folder, repo_id="me/small"))
    assert 'SentenceTransformer("me/small")' in text and '"iteration-1"' not in text
    assert "before it was pruned" not in text and text.count("## Pruning") == 1
    assert str(create_model_card(folder)) == before


def test_the_card_of_the_model_before_is_no_card_of_the_pruned_one(whole, tmp_path):
    """sentence-transformers keeps the card of a model from the Hub, whose code and results are of that one."""
    base = shutil.copytree(whole, tmp_path / "base")
    card = (base / "README.md").read_text("utf-8").replace("sentence_transformers_model_id", "org/whole")
    results = "model-index:\n- name: whole\n  results:\n  - task:\n      type: x\n    dataset:\n      name: y\n"
    results += "      type: y\n    metrics:\n    - type: spearman_cosine\n      value: 0.9\n"
    (base / "README.md").write_text(card.replace("library_name:", f"{results}library_name:", 1), "utf-8")
    model = st.SentenceTransformer(str(base), device="cpu")
    remove_blocks(model, {STACK: [1]})
    made = create_model_card(model, repo_id="me/small")
    text = str(made)
    assert 'SentenceTransformer("org/whole")' in text and 'SentenceTransformer("me/small")' in text
    assert text.index('"me/small"') < text.index("before it was pruned") < text.index('"org/whole"')
    assert made.data.eval_results is None


def test_where_there_is_no_card_ours_stands_alone(whole, tmp_path, capsys):
    prune_checkpoint(whole, tmp_path / "out", {STACK: [1]}, verify=False)
    assert main(["card", str(tmp_path / "out"), "--repo-id", "me/small"]) == 0
    capsys.readouterr()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "sentence-transformers" and card.data.pipeline_tag == "sentence-similarity"
    assert "sentence-transformers" in card.data.tags
    code = re.search(r"## Use it\n\n```python\n(.*?)```", str(card), re.DOTALL)[1]
    assert code.startswith("from sentence_transformers import SentenceTransformer\n")
    exec(code.replace("me/small", str(tmp_path / "out")), {})
    assert capsys.readouterr().out.strip() in ("(2, 16)", "torch.Size([2, 16])")


def test_files_of_modules_go_along_but_no_pickles(whole, tmp_path):
    files = checkpoint_files(whole)
    assert (
        files.keys() >= MODULES and {"config_sentence_transformers.json", "sentence_bert_config.json"} <= files.keys()
    )
    old = ["model.safetensors", "3_Dense/pytorch_model.bin", "1_Pooling/config.json", "notes.txt", "modules.json"]
    assert outdated(old, files) == ["3_Dense/pytorch_model.bin"]
    assert "modules.json" in outdated(old, {"model.safetensors": whole / "model.safetensors"})
    odd = shutil.copytree(whole, tmp_path / "odd")
    torch.save({}, odd / "2_Dense" / "pytorch_model.bin")
    (odd / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"2_Dense/pytorch_model\.bin is a pickle.*save it anew"):
        checkpoint_files(odd)


def test_pushes_of_models_and_folders_load_by_their_own_library(hub, publisher, whole, tmp_path):
    """A process without deeparc_hf loads what went up by its name."""
    found = publisher.run(
        """
        import sentence_transformers as st
        model = st.SentenceTransformer(str(whole), device="cpu")
        remove_blocks(model, {"encoder.layer": [1]})
        push_to_hub(model, "owner/encoder", license="mit")
        save_pruned(model, folder)
        push_to_hub(folder, "owner/from-folder", license="mit")
        result = model.encode(["w1 w2 w3", "w4 w5"], convert_to_tensor=True).tolist()
        """,
        folder=tmp_path / "saved",
        whole=whole,
    )
    for name in ("owner/encoder", "owner/from-folder"):
        assert hub.files(name).keys() >= MODULES
        card = card_of(hub, name)
        assert card.data.library_name == "sentence-transformers" and card.data.license == "mit"
        assert f'SentenceTransformer("{name}")' in str(card) and made_by_us(hub.files(name)["README.md"].decode())
    environment = hub.environment("hf_owner")
    wanted = [("SentenceTransformer", "owner/encoder", ["w1 w2 w3", "w4 w5"])]
    for modules, values in stock(*wanted, environment=environment):
        assert modules == NAMES
        torch.testing.assert_close(values, torch.tensor(found), rtol=0, atol=1e-6)


def test_save_pruned_of_a_pruned_encoder_writes_their_card(whole, tmp_path):
    model = st.SentenceTransformer(str(whole), device="cpu")
    remove_blocks(model, {STACK: [1]})
    save_pruned(model, tmp_path / "saved")
    assert "[sentence-transformers](https://www.SBERT.net)" in (tmp_path / "saved" / "README.md").read_text("utf-8")


def test_a_trainer_s_own_push_brings_the_same_card(hub, publisher, whole, tmp_path):
    """By the line that the documents give; and push_to_hub of the Trainer, whose files are those of its folder."""
    publisher.run(
        """
        import datasets, functools
        import sentence_transformers as st
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        from deeparc_hf import MPruneCallback
        from tests.sentence_encoders import texts
        model = st.SentenceTransformer(str(whole), device="cpu")
        data = datasets.Dataset.from_dict({"anchor": texts(1, 32), "positive": texts(2, 32)})
        pruning = MPruneCallback(num_blocks=3, start_epoch=1, retrain_epochs=1, calibration_samples=32)
        args = st.SentenceTransformerTrainingArguments(
            str(folder), num_train_epochs=2, use_cpu=True, report_to="none", disable_tqdm=True,
            hub_model_id="owner/trained", save_strategy="no",
        )
        trainer = st.SentenceTransformerTrainer(
            model, args, train_dataset=data, loss=MultipleNegativesRankingLoss(model), callbacks=[pruning]
        )
        trainer.train()
        push_to_hub(trainer, license="mit")
        trainer.args.hub_model_id = "owner/pushed"
        trainer.init_hf_repo()
        trainer.create_model_card = functools.partial(create_model_card, trainer, license="mit")
        trainer.push_to_hub()
        """,
        folder=tmp_path / "run",
        whole=whole,
    )
    cards = {name: hub.files(f"owner/{name}")["README.md"].decode() for name in ("trained", "pushed")}
    for name, card in cards.items():
        assert hub.files(f"owner/{name}").keys() >= MODULES
        assert made_by_us(card) and "## Pruning" in card and "loss:MultipleNegativesRankingLoss" in card
        assert f'SentenceTransformer("owner/{name}")' in card
