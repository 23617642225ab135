"""MPruneCallback in other Trainers than the plain one: sequence to sequence, TRL, sentence-transformers; and with
adapters from PEFT.
"""

from __future__ import annotations

import datasets
import pytest
import torch
import transformers as tf
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from deeparc_hf import PrunedConfig
from deeparc_hf.errors import ConfigError, UnsupportedModelError
from tests.trainers import ROWS, arguments, pruning, text_data, train
from tests.zoo import TEXT, VOCAB, ZOO, spread

from .test_neighbours import STEPS, TWICE, Notes, equal, is_reloaded_by_stock, weights

WORDS = [f"word{number}" for number in range(VOCAB - 4)]


def tokenizer():
    """One token a word, made without the Hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]  # at 0, 1 and 2, as in the config of the zoo's Llama
    core = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate([*special, *WORDS])}, unk_token="[UNK]")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **names)


def texts(seed, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 10, (rows,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator)) for length in lengths
    ]


def count(model):
    """Number of blocks in both stacks of a T5 or a BART."""
    if model.config.model_type == "t5":
        return len(model.encoder.block) + len(model.decoder.block)
    return len(model.model.encoder.layers) + len(model.model.decoder.layers)


@pytest.mark.parametrize(
    ("name", "second"), [pytest.param("t5", "rolled back", marks=pytest.mark.slow), ("bart", "accepted")]
)
def test_the_gate_judges_by_what_a_seq2seq_model_generates(tmp_path, name, second):
    model, notes, values = ZOO[name].model(), Notes(2 * STEPS), []
    planted = {7: 0.5, 4: 0.45, 3: 0.1 if second == "rolled back" else 0.4}

    def compute(prediction):
        ids, labels = prediction.predictions, prediction.label_ids
        assert ids.ndim == 2 and ids.dtype.kind == "i" and len(ids) == len(labels) == ROWS
        width = min(ids.shape[1] - 1, labels.shape[1])
        values.append(planted[count(model)] + 1e-3 * float((ids[:, 1 : width + 1] == labels[:, :width]).mean()))
        return {"match": values[-1]}

    callback = pruning(
        start_epoch=1, iterations=2, num_blocks=[4, 3], max_drop=0.2, metric="match", k_max=1, freeze="partial"
    )
    train(
        model,
        tmp_path,
        callback,
        notes,
        data=text_data("tokens"),
        cls=Seq2SeqTrainer,
        args=Seq2SeqTrainingArguments,
        predict_with_generate=True,
        generation_max_length=7,
        eval_strategy="epoch",
        save_strategy="epoch",
        num_train_epochs=3,
        learning_rate=1e-3,
        compute_metrics=compute,
    )
    assert [attempt.get("decision") for attempt in callback.attempts] == [None, "accepted", second]
    assert [attempt["value"] for attempt in callback.attempts[1:]] == values[1:] and callback.attempts[1][
        "baseline"
    ] == values[0]
    kept = 3 if second == "accepted" else 4
    assert count(model) == kept == sum(len(stack.kept) for stack in callback.record.stacks.values())
    if second == "rolled back":
        assert equal(weights(model), notes.weights[2 * STEPS])
        step, end = 2 * STEPS, notes.weights[2 * STEPS]
    else:
        step, end = 3 * STEPS, weights(model)
    loaded, info = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / f"checkpoint-{step}", output_loading_info=True)
    assert (
        not (info["missing_keys"] or info["unexpected_keys"])
        and count(loaded) == kept
        and equal(loaded.state_dict(), end)
    )


# TRL's own defaults are given by a name that transformers has deprecated
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    model, notes = ZOO["llama"].model(), Notes(2 * STEPS)
    callback = pruning(**TWICE, max_drop=100.0)  # of the loss
    data = datasets.Dataset.from_dict({"text": texts(1)})
    settings = arguments(
        tmp_path,
        trl.SFTConfig,
        num_train_epochs=3,
        learning_rate=1e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        bf16=False,
        max_length=16,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        callbacks=[callback, notes],
    )
    trainer.train()
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert [attempt.get("decision") for attempt in callback.attempts] == [None, "accepted", "accepted"]
    assert callback.plan.samples == ROWS and callback.record == PrunedConfig.from_model(model)
    for position, old in enumerate(callback.plan.stacks["model.layers"].kept):
        before = notes.weights[2 * STEPS][f"model.layers.{old}.mlp.up_proj.weight"]
        assert not torch.equal(model.model.layers[position].mlp.up_proj.weight, before)
    folder = tmp_path / f"checkpoint-{3 * STEPS}"
    assert is_reloaded_by_stock(folder, model, tf.AutoModelForCausalLM)
    again = tf.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tf.AutoTokenizer.from_pretrained(folder)(texts(2, 1), return_tensors="pt", return_token_type_ids=False)
    assert (
        again.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1]
        == prompt["input_ids"].shape[1] + 3
    )


def test_trainers_with_a_loss_of_their_own_are_not_taught(tmp_path):
    """sentence-transformers has loss modules."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tokenizer().save_pretrained(tmp_path / "bert")
    spread(tf.BertModel(tf.BertConfig(**TEXT))).save_pretrained(tmp_path / "bert")
    model = st.SentenceTransformer(
        modules=[Transformer(str(tmp_path / "bert")), Pooling(TEXT["hidden_size"])], device="cpu"
    )
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, st.SentenceTransformerTrainingArguments, num_train_epochs=1),
        train_dataset=datasets.Dataset.from_dict({"anchor": texts(1), "positive": texts(2)}),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[pruning(num_blocks=2, distill={})],
    )
    with pytest.raises(ConfigError, match="has not reached the weights"):
        trainer.train()


@pytest.mark.parametrize("given", [False, True])
def test_sentence_transformer_trainer(tmp_path, given):
    """A batch has the inputs of several texts a row ("anchor_input_ids", "positive_input_ids"); or calibration data is
    given.
    """
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tokenizer().save_pretrained(tmp_path / "bert")
    spread(tf.BertModel(tf.BertConfig(**TEXT))).save_pretrained(tmp_path / "bert")
    model = st.SentenceTransformer(
        modules=[Transformer(str(tmp_path / "bert")), Pooling(TEXT["hidden_size"])], device="cpu"
    )
    anchors = texts(1)
    calibration = (
        [dict(tokenizer()(anchors[i : i + 8], padding=True, return_tensors="pt")) for i in range(0, ROWS, 8)]
        if given
        else None
    )
    callback, notes = pruning(**TWICE, calibration=calibration), Notes(2 * STEPS)
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=arguments(
            tmp_path,
            st.SentenceTransformerTrainingArguments,
            num_train_epochs=3,
            learning_rate=1e-3,
            save_strategy="epoch",
        ),
        train_dataset=datasets.Dataset.from_dict({"anchor": anchors, "positive": texts(2)}),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[callback, notes],
    )
    trainer.train()
    bert = model[0].auto_model
    assert len(bert.encoder.layer) == bert.config.num_hidden_layers == 2
    assert len(callback.record.iterations) == 2 and callback.plan.samples >= ROWS
    (stack,) = callback.plan.stacks.values()
    before = {key.rpartition("encoder.layer.")[2]: value for key, value in notes.weights[2 * STEPS].items()}
    for position, old in enumerate(stack.kept):
        assert not torch.equal(bert.encoder.layer[position].output.dense.weight, before[f"{old}.output.dense.weight"])
    folder = tmp_path / f"checkpoint-{3 * STEPS}"
    assert is_reloaded_by_stock(folder, bert, tf.AutoModel)
    again = st.SentenceTransformer(str(folder), device="cpu")
    torch.testing.assert_close(
        again.encode(anchors, convert_to_tensor=True), model.encode(anchors, convert_to_tensor=True)
    )


def test_a_model_with_adapters_of_another_kind_is_refused_with_advice_when_the_trainer_is_made(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(ZOO["bert"].model(), peft.LoHaConfig(r=2, target_modules=["query", "value"]))
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        Trainer(model, arguments(tmp_path), train_dataset=text_data(), callbacks=[pruning(**TWICE)])
    # the advice is good, but PEFT leaves what it has merged frozen
    merged = model.merge_and_unload().requires_grad_(True)
    train(merged, tmp_path, pruning(**TWICE), num_train_epochs=3, save_strategy="epoch")
    assert len(merged.bert.encoder.layer) == merged.config.num_hidden_layers == 2
    assert is_reloaded_by_stock(tmp_path / f"checkpoint-{3 * STEPS}", merged)
