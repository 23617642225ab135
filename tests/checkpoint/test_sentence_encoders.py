"""Sentence encoders are saved and pruned with all of their modules, in memory, from file to file and from the shell."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf

pytest.importorskip("sentence_transformers")

import sentence_transformers as st

from deeparc_hf import (
    PrunedConfig,
    find_stacks,
    heal_model,
    prune_checkpoint,
    prune_model,
    remove_blocks,
    save_pruned,
    search_blocks,
    sparsify_model,
)
from deeparc_hf.cli import main
from deeparc_hf.errors import CalibrationError, DeepArcWarning, UnsupportedModelError
from tests.sentence_encoders import STACK, batches, encoder, stock, texts
from tests.zoo import TEXT

MODULES = ["Transformer", "Pooling", "Dense", "Normalize"]
FILES = {"1_Pooling", "2_Dense", "3_Normalize", "modules.json", "config_sentence_transformers.json"}


def embeddings(model):
    return model.encode(texts(1), convert_to_tensor=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    encoder(folder / "bert").save_pretrained(str(folder / "whole"))
    return folder / "whole"


def load(folder):
    return st.SentenceTransformer(str(folder), device="cpu")


def test_every_way_to_prune_one_leaves_all_of_its_modules(whole, tmp_path, capsys):
    """One process that has no deeparc_hf loads them all; the references are removals in memory."""
    model = load(whole)
    assert list(find_stacks(model)) == [STACK] and len(find_stacks(model)[STACK]) == 4
    remove_blocks(model, {STACK: [1]})
    expected = embeddings(model)
    assert not torch.allclose(expected, embeddings(load(whole)), atol=1e-3)
    save_pruned(model, tmp_path / "saved")
    model.save_pretrained(str(tmp_path / "stock"))
    prune_checkpoint(whole, tmp_path / "disk", {STACK: [1]})
    assert main(["remove", str(whole), "--blocks", f"{STACK}=1", "-o", str(tmp_path / "shell"), "--no-verify"]) == 0
    ways = ["saved", "stock", "disk", "shell"]
    found = stock(*[("SentenceTransformer", tmp_path / way, texts(1)) for way in ways])
    for way, (modules, values) in zip(ways, found, strict=True):
        assert modules == MODULES, way
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6, msg=way)
        assert PrunedConfig.from_pretrained(tmp_path / way).kept == {STACK: (0, 2, 3)}
        assert load(tmp_path / way).max_seq_length == 12
    capsys.readouterr()


def test_prune_and_sparsify_from_the_shell(whole, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("text\n" + "\n".join(texts(2, 48)) + "\n")
    shared = ["--data", str(rows)]
    assert main(["prune", str(whole), *shared, "--num-blocks", "3", "-o", str(tmp_path / "pruned")]) == 0
    assert main(["sparsify", str(whole), *shared, "-o", str(tmp_path / "sparse")]) == 0
    assert {path.name for path in (tmp_path / "pruned").iterdir()} >= FILES
    # what an earlier run wrote is replaced, its modules too
    again = ["prune", str(whole), *shared, "--num-blocks", "3", "-o", str(tmp_path / "pruned")]
    assert main([*again, "--overwrite"]) == 0
    capsys.readouterr()
    (removed,) = PrunedConfig.from_pretrained(tmp_path / "pruned").removed.values()
    pruned, sparse = load(whole), load(tmp_path / "sparse")
    remove_blocks(pruned, {STACK: list(removed)})
    torch.testing.assert_close(embeddings(load(tmp_path / "pruned")), embeddings(pruned))
    assert [type(module).__name__ for module in sparse] == MODULES
    weight = sparse[0].auto_model.encoder.layer[0].output.dense.weight
    assert float((weight == 0).float().mean()) == 0.5
    torch.testing.assert_close(sparse[2].linear.weight, pruned[2].linear.weight)


def test_texts_calibrate_an_encoder_as_their_tokens_do(whole):
    rows = texts(4, 48)
    ids = load(whole).tokenizer(rows, padding=True, truncation=True, max_length=12, return_tensors="pt")
    plans = [
        prune_model(load(whole), data, num_blocks=2)
        for data in ([dict(ids)], [rows], [{"anchor": rows[:24], "positive": rows[24:], "label": torch.ones(24)}])
    ]
    for plan in plans[1:]:
        assert plan.samples == 48 and plan.removed == plans[0].removed
        torch.testing.assert_close(
            torch.tensor(plan.stacks[STACK].similarity), torch.tensor(plans[0].stacks[STACK].similarity)
        )
    with pytest.raises(CalibrationError, match="Give dicts of tensors"):
        prune_model(load(whole)[0].auto_model, [rows], num_blocks=2)  # nobody knows its tokenizer


@pytest.mark.filterwarnings("ignore:Blocks were compared on only")
def test_a_search_is_evaluated_with_the_whole_encoder_and_leaves_it_alone(whole):
    model, seen = load(whole), []
    inner, before = model[0].auto_model, embeddings(model)

    def evaluate(given):
        seen.append((given is model, len(given[0].auto_model.encoder.layer), given.encode(texts(1)[:1]).shape))
        return float(given.encode(texts(1)).sum())

    frontier = search_blocks(model, batches(), evaluate=evaluate, measure_times=False)
    assert {entry[0] for entry in seen} == {True} and {entry[1] for entry in seen} == {4, 3, 2}
    assert {entry[2] for entry in seen} == {(1, 16)} and model[0].auto_model is inner
    assert torch.equal(embeddings(model), before)
    metric = {point.num_blocks: point.metric for point in frontier.points}[3]
    pruned = load(whole)
    prune_model(pruned, batches(), frontier.choose(num_blocks=3))
    assert metric == pytest.approx(float(embeddings(pruned).sum()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Blocks were compared on only")
def test_heal_and_sparsify_in_memory(whole):
    model, original = load(whole), load(whole)
    remove_blocks(model, {STACK: [2]})
    before = (embeddings(model) - embeddings(original)).norm()
    assert [healing.reason for healing in heal_model(model, original, batches())] == [None]
    assert (embeddings(model) - embeddings(original)).norm() < before
    assert sparsify_model(model, batches(), sparsity=0.5).measured == 0.5


def test_what_evaluators_noted_of_the_model_before_is_forgotten(whole):
    """sentence-transformers would put it into the card of the pruned one."""
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    model = load(whole)
    evaluator = EmbeddingSimilarityEvaluator(texts(1), texts(2), [float(i) for i in range(24)], write_csv=False)
    evaluator(model)
    assert model.model_card_data.eval_results_dict
    remove_blocks(model, {STACK: [1]})
    assert not model.model_card_data.eval_results_dict


def test_modules_that_are_no_part_of_the_library_and_models_elsewhere_are_refused(whole, tmp_path, capsys):
    listed = json.loads((whole / "modules.json").read_text())
    for changed, words in (
        ({0: {"path": "0_Transformer"}}, "lies in the folder '0_Transformer'.*save it anew"),
        ({1: {"type": "mine.Pooling"}}, "'mine.Pooling' in '1_Pooling'.*no code is run"),
        ({1: {"path": "../1_Pooling"}}, "no code is run"),
    ):
        folder = shutil.copytree(whole, tmp_path / "odd")
        odd = [{**entry, **changed.get(number, {})} for number, entry in enumerate(listed)]
        (folder / "modules.json").write_text(json.dumps(odd))
        with pytest.raises(UnsupportedModelError, match=words):
            prune_checkpoint(folder, tmp_path / "out", {STACK: [1]})
        assert not (tmp_path / "out").exists()
        assert main(["remove", str(folder), "--blocks", f"{STACK}=1", "-o", str(tmp_path / "out")]) != 0
        shutil.rmtree(folder)
    capsys.readouterr()


def test_adapters_are_to_be_merged_before_it_is_saved(whole, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(whole)
    remove_blocks(model, {STACK: [1]})
    inner = model[0].auto_model
    place, name = next((m, n) for m in model.modules() for n, child in m.named_children() if child is inner)
    config = peft.LoraConfig(r=2, target_modules=["query"])
    setattr(place, name, peft.get_peft_model(inner, config))
    with pytest.raises(UnsupportedModelError, match=r"carries PEFT adapters.*Merge them"):
        save_pruned(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.fixture(scope="module")
def big_bird(tmp_path_factory):
    """BigBird draws by the number of its layer: the type "deeparc_pruned" lies within the encoder's folder."""
    folder = tmp_path_factory.mktemp("big_bird")
    config = tf.BigBirdConfig(**{**TEXT, "max_position_embeddings": 64}, attention_type="block_sparse", block_size=2)
    model = encoder(folder / "model", tf.BigBirdModel(config))
    with pytest.warns(DeepArcWarning, match="deeparc_hf"):
        remove_blocks(model, {STACK: [1]})
    save_pruned(model, folder / "saved")
    return folder / "saved", embeddings(model)


def test_a_model_that_no_setting_describes_is_loaded_where_the_package_is(big_bird):
    folder, expected = big_bird
    assert json.loads((folder / "config.json").read_text())["model_type"] == "deeparc_pruned"
    again = load(folder)
    assert [type(module).__name__ for module in again] == MODULES and len(find_stacks(again)[STACK]) == 3
    torch.testing.assert_close(embeddings(again), expected)


@pytest.mark.slow
def test_a_process_needs_the_package_for_a_model_that_no_setting_describes(big_bird):
    folder, expected = big_bird
    ((modules, values),) = stock(("SentenceTransformer", folder, texts(1)), package=True)
    assert modules == MODULES
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    with pytest.raises(AssertionError, match="deeparc_pruned"):
        stock(("SentenceTransformer", folder, texts(1)))


def test_a_setfit_model_is_told_to_give_its_encoder():
    class SetFitModel:
        model_body = torch.nn.Linear(2, 2)

    with pytest.raises(UnsupportedModelError, match=r"its encoder, model\.model_body"):
        find_stacks(SetFitModel())
