"""recipes/image_classification.py, end to end on a tiny ResNet; timm through its wrapper, a model from scratch, a
folder of images.
"""

from __future__ import annotations

import io
import random
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from deeparc_hf.errors import ConfigError
from tests.zoo import ZOO

from .running import check_files, parameters, recipe, watched, without_times, words

main = recipe("image_classification").main
MARKS = {"train": 51, "validation": 102, "test": 204}  # how red every image of a split is
NAMES = ["bright", "dark"]
SIZE = 16


def picture(split, number):
    """An image whose red tells its split, whose green tells its label, and whose blue is noise."""
    noise = np.random.default_rng([MARKS[split], number]).integers(0, 256, (SIZE, SIZE))
    pixels = np.stack(
        [np.full((SIZE, SIZE), MARKS[split]), np.full((SIZE, SIZE), 220 if number % 2 == 0 else 30), noise], axis=2
    )
    return Image.fromarray(pixels.astype(np.uint8))


def table(split, count):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [picture(split, n) for n in range(count)], "label": [n % 2 for n in range(count)]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of the three splits, and a tiny model without an image processor."""
    folder = tmp_path_factory.mktemp("images")
    ZOO["resnet"].model().save_pretrained(folder / "resnet")
    files = {}
    for split in MARKS:
        files[f"{split}_file"] = str(folder / f"{split}.parquet")
        table(split, 64 if split == "train" else 24).to_parquet(files[f"{split}_file"])
    return {"model": str(folder / "resnet"), "image_size": 32, **files}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pruning = {
        "finetune_epochs": 2,
        "iterations": 2,
        "num_blocks": [9, 8],
        "retrain_epochs": 1,
        "rows": "flat",
        "across_stacks": True,
        "test_each_epoch": True,
        "heal": "lstsq",
        "freeze": "partial",
        "metric": "accuracy",
        "max_drop": 0.6,
        "k_max": 1,
        "sparsity": [0.3],
        "sparsity_retrain": [0.3],
    }
    with watched(tf.ResNetForImageClassification) as seen:
        rows = main(words(**data, output_dir=str(folder), **pruning))
    return SimpleNamespace(rows={row.name: row for row in rows}, folder=folder, seen=seen, data=data)


def plain_pixels(image):
    """32 x 32 in [-1, 1]."""
    pixels = np.asarray(image.convert("RGB").resize((32, 32), Image.BILINEAR), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


def test_every_model_has_a_row_and_its_files(run):
    models = ["original", "iteration 1", "iteration 2"]
    assert list(run.rows) == [
        *models,
        *(f"{model}, 30 % zeros{more}" for model in models for more in ("", ", retrained")),
    ]
    check_files(run.folder, list(run.rows.values()))


def test_rows_tell_structure_and_measured_accuracy(run):
    """By a plain forward pass of the saved models over the test file, image by image."""
    for name, blocks in (("original", 11), ("iteration 1", 9), ("iteration 2", 8)):
        row = run.rows[name]
        model = tf.AutoModelForImageClassification.from_pretrained(run.folder / row.folder).eval()
        assert list(row.blocks.values()) == model.config.depths and sum(model.config.depths) == blocks
        assert row.parameters == parameters(model) and model.config.id2label == dict(enumerate(NAMES))
        right = 0
        for number in range(24):
            with torch.no_grad():
                right += int(model(plain_pixels(picture("test", number))).logits.argmax() == number % 2)
        assert row.measured.metrics["accuracy"] == pytest.approx(right / 24)
        assert row.measured.samples == 24
    assert run.rows["original"].frozen == 0 < run.rows["iteration 1"].frozen


def test_each_epoch_is_measured_on_held_out_and_on_test_data(run):
    epochs = {"original": 2, "iteration 1": 1, "iteration 2": 1, "original, 30 % zeros, retrained": 1}
    for name, count in epochs.items():
        row = run.rows[name]
        assert len(row.validation) == len(row.tested) == count
        assert row.tested[-1] == pytest.approx(row.measured.metrics["accuracy"])  # the model is that of the last epoch


def test_card_and_report_tell_the_batches_that_blocks_were_compared_in(run):
    told = "on 64 calibration samples in batches of 8"
    assert told in (run.folder / "iteration-2" / "README.md").read_text()
    assert f"compared by cka (rows: flat) {told}" in (run.folder / "iteration-1" / "pruning_report.md").read_text()


def test_the_saved_image_processor_scales_as_the_recipe_did(run):
    processor = tf.AutoImageProcessor.from_pretrained(run.folder / "iteration-2")
    found = processor(picture("test", 3), return_tensors="pt")["pixel_values"]
    assert found.shape == (1, 3, 32, 32) and torch.allclose(found, plain_pixels(picture("test", 3)), atol=0.02)


def calibration_images(run):
    """Images of 32 pixels without labels: larger ones are made up, and one of three is changed to try what a dimension
    means.
    """
    return [
        seen.inputs for seen in run.seen if not seen.labelled and seen.inputs.shape[-1] == 32 and len(seen.inputs) != 3
    ]


def test_calibration_and_training_see_training_images_only(run):
    marks = {split: value / 127.5 - 1 for split, value in MARKS.items()}

    def split_of(pixels):
        red = pixels[:, 0].mean((1, 2))
        return {min(marks, key=lambda split: abs(marks[split] - float(value))) for value in red}

    calibration = calibration_images(run)
    training = [seen.inputs for seen in run.seen if seen.training]
    assert calibration and training
    assert set().union(*map(split_of, [*calibration, *training])) == {"train"}
    assert set().union(*(split_of(seen.inputs) for seen in run.seen if seen.labelled)) == set(MARKS)


def test_training_images_are_changed_at_random_and_calibration_images_are_not(run):
    plain = torch.cat([plain_pixels(picture("train", number)) for number in range(64)])

    def distances(pixels):
        return torch.cdist(pixels.flatten(1), plain.flatten(1)).min(1).values

    calibration = torch.cat(calibration_images(run))
    training = torch.cat([seen.inputs for seen in run.seen if seen.training])
    assert float(distances(calibration).max()) < 2
    assert float((distances(training) > 5).float().mean()) > 0.8


def test_the_same_seed_gives_the_same_table(data, tmp_path):
    given = {**data, "finetune_epochs": 1, "iterations": 0}
    tables = [
        without_times(main(words(**given, output_dir=str(tmp_path / name), seed=seed)))
        for name, seed in ("a3", "b3", "c4")
    ]
    assert tables[0] == tables[1] != tables[2]


def test_a_timm_model_from_a_folder_of_images_with_its_own_processor(tmp_path):
    """A folder by class, of which the test part lacks a class; the model is timm's, through transformers' wrapper."""
    for split, count in (("train", 36), ("validation", 6), ("test", 6)):
        for number in range(count):
            kind = ("a", "b", "c")[number % 3]
            if split == "test" and kind == "a":
                continue
            folder = tmp_path / "images" / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            picture(split, number).save(folder / f"{number}.png")
    vit = ZOO["wrapped_vit"].model()
    vit.config.pretrained_cfg = {
        "input_size": [3, 32, 32],
        "crop_pct": 1.0,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }  # as on the Hub
    vit.save_pretrained(tmp_path / "vit")
    given = {"model": str(tmp_path / "vit"), "dataset": str(tmp_path / "images"), "output_dir": str(tmp_path / "run")}
    with watched(tf.TimmWrapperForImageClassification) as seen:
        rows = main(words(**given, finetune_epochs=1, num_blocks=3, retrain_epochs=1))
    assert [sum(row.blocks.values()) for row in rows] == [4, 3] and rows[0].measured.samples == 4
    model = tf.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / rows[1].folder)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and rows[1].parameters == parameters(model)
    processor = tf.AutoImageProcessor.from_pretrained(tmp_path / "vit")
    wanted = processor(picture("test", 1), return_tensors="pt")["pixel_values"]
    assert any(
        torch.equal(wanted[0], pixels) for entry in seen for pixels in entry.inputs if pixels.shape == wanted[0].shape
    )


def test_a_folder_with_a_config_alone_is_trained_from_scratch(data, tmp_path):
    """And nothing is retrained: blocks are removed and healed."""
    ZOO["resnet"].make().config.save_pretrained(tmp_path / "scratch")
    given = {**data, "model": str(tmp_path / "scratch"), "output_dir": str(tmp_path / "run")}
    rows = main(
        words(
            **given,
            finetune_epochs=1,
            retrain_epochs=0,
            iterations=2,
            num_blocks=[9, 8],
            heal="lstsq",
            mirror=False,
            shift=0,
        )
    )
    assert [sum(row.blocks.values()) for row in rows] == [11, 9, 8]
    assert all(row.training_seconds is None for row in rows[1:])
    check_files(tmp_path / "run", rows, retrained=False)


def encoded(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "img"}, "image_column: there is no column 'img'"),
        ({"image_column": "label"}, "image_column: 'label' holds int64, neither images nor paths"),
        ({"label_column": "class"}, "label_column: there is no column 'class'"),
        ({"image_size": None}, "cannot load an image processor.*Give image_size"),
        ({"shift": 3}, r"shift must be in \[0, 0.5\)"),
        ({"train_file": None}, "There is no data"),
        ({"model": "."}, "holds no config.json"),
    ],
)
def test_wrong_input_is_refused(data, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        main(words(**{**data, **changes}, output_dir=str(tmp_path)))


def test_a_label_that_training_lacks_is_refused(data, tmp_path):
    """Files without features of the datasets library: bytes and names."""
    files = {}
    for split, names in (("train", "ab"), ("validation", "ab"), ("test", "ac")):
        rows = {
            "image": [encoded(picture(split, n)) for n in range(6)],
            "label": [random.Random(n).choice(names) for n in range(6)],
        }
        files[f"{split}_file"] = str(tmp_path / f"{split}.parquet")
        datasets.Dataset.from_dict(rows).to_parquet(files[f"{split}_file"])
    with pytest.raises(ConfigError, match="'c' is not among those of the training split: a, b"):
        main(words(**{**data, **files}, output_dir=str(tmp_path)))


def test_an_unknown_key_of_a_config_file_is_refused(data, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("image_colum: picture\n")
    with pytest.raises(ConfigError, match=r"'image_colum'\. Did you mean 'image_column'"):
        main(["--config", str(file), *words(**data, output_dir=str(tmp_path))])


def test_adapters_of_convolutions_are_named_and_merged(data, tmp_path):
    """A ResNet has no linear maps but its head; its convolutions are named."""
    settings = {"num_blocks": 9, "retrain_epochs": 1, "finetune_epochs": 1, "lora_rank": 2}
    rows = main(words(**data, **settings, lora_targets=["convolution"], output_dir=str(tmp_path)))
    assert [row.name for row in rows] == ["original", "iteration 1, removed", "iteration 1"]
    before, after = (
        tf.AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict()
        for name in ("iteration-1-removed", "iteration-1")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("convolution.weight") for name in moved)
