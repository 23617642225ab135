"""Images for training and for everything else."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from deeparc_hf.errors import ConfigError
from experiment.images import ImageEncoder, image_processor, with_images
from experiment.splits import Splits

SIZE = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
ROWS = {"image": [Image.fromarray(pixels) for pixels in PIXELS], "labels": list(range(6))}
PLAIN = torch.from_numpy(PIXELS.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


def encoder(**settings):
    return ImageEncoder(image_processor("nowhere", None, SIZE), "image", **settings)


def test_plain_scaling():
    found = encoder()(ROWS)
    assert found["labels"] == ROWS["labels"] and torch.allclose(found["pixel_values"], PLAIN, atol=1e-5)


def test_grey_images_become_coloured_ones():
    found = encoder()({"image": [Image.new("L", (5, 9), 255)], "labels": [0]})["pixel_values"]
    assert found.shape == (1, 3, SIZE, SIZE) and torch.allclose(found, torch.ones(1, 3, SIZE, SIZE))


def test_mirroring_by_chance():
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        for index, image in enumerate(encoder(mirror=True)(ROWS)["pixel_values"]):
            plain, mirrored = (
                torch.allclose(image, wanted, atol=1e-5) for wanted in (PLAIN[index], PLAIN[index].flip(2))
            )
            assert plain or mirrored
            seen.add((index, mirrored))
    assert len(seen) == 12


def test_shifting_by_chance_in_every_direction():
    """What stays in the picture is the picture's, moved; the border is mirrored into the gap."""
    torch.manual_seed(0)
    wide = torch.nn.functional.pad(PLAIN, (2, 2, 2, 2), mode="reflect")
    places = {}
    for top in range(5):
        for left in range(5):
            places[top, left] = wide[:, :, top : top + SIZE, left : left + SIZE]
    seen = set()
    for _ in range(60):
        for index, image in enumerate(encoder(shift=0.25)(ROWS)["pixel_values"]):
            found = [place for place, wanted in places.items() if torch.allclose(image, wanted[index], atol=1e-5)]
            assert len(found) == 1
            seen.update(found)
    assert seen == set(places)


def test_chance_comes_from_the_seed_that_the_trainer_sets():
    work = encoder(mirror=True, shift=0.25)
    torch.manual_seed(4)
    first = work(ROWS)["pixel_values"]
    assert not torch.equal(work(ROWS)["pixel_values"], first)
    torch.manual_seed(4)
    assert torch.equal(work(ROWS)["pixel_values"], first)
    state = torch.get_rng_state()
    encoder()(ROWS)
    assert torch.equal(torch.get_rng_state(), state)


def test_columns_of_paths_and_bytes_become_images(tmp_path):
    paths = []
    for number, image in enumerate(ROWS["image"][:2]):
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    given = datasets.Dataset.from_dict({"image": paths})
    raw = datasets.Dataset.from_dict({"image": [(tmp_path / "0.png").read_bytes()]})
    splits = with_images(Splits(given, raw, given), "image")
    assert np.array_equal(np.asarray(splits.train[1]["image"]), PIXELS[1])
    assert np.array_equal(np.asarray(splits.validation[0]["image"]), PIXELS[0])


def test_what_is_no_image_is_refused():
    part = datasets.Dataset.from_dict({"image": [1, 2]})
    with pytest.raises(ConfigError, match="image_column: 'image' holds int64, neither images nor paths"):
        with_images(Splits(part, part, part), "image")
    with pytest.raises(ConfigError, match=r"shift must be in \[0, 0\.5\)"):
        encoder(shift=0.5)
    with pytest.raises(ConfigError, match="nowhere: cannot load an image processor"):
        image_processor("nowhere", None, None)
