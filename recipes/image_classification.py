# /// script
# requires-python = ">=3.11"
# dependencies = ["deeparc_hf[recipes]"]
# ///
r"""Image classification: fine-tune a ResNet or another classifier, remove blocks in iterations, retrain, zero weights,
and measure it all.

    python recipes/image_classification.py --config recipes/configs/resnet152_imagenet.yaml
    accelerate launch recipes/image_classification.py --config recipes/configs/resnet152_imagenet.yaml --threshold 0.98

Every setting of the config file may be given on the command line, which wins. Any image classifier of transformers will
do, and one of timm by its Hub id (timm/resnet50.a1_in1k), which loads through transformers' TimmWrapper. A folder with
a config.json and no weights is trained from scratch. Data: any data set with a column of images and one of labels, a
local file of these, or a folder of images by class.

    python recipes/image_classification.py --model timm/resnet50.a1_in1k --dataset uoft-cs/cifar10 --image_column img \
        --keep_ratio 0.8 --output_dir runs/cifar10
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from deeparc_hf.core.settings import setting


@dataclass
class ImageArguments:
    """Columns, size and random changes of the images."""

    image_column: str = setting("image", "column of the images, or of paths to image files")
    label_column: str = setting("label", "column of the labels, numbers or names")
    image_size: int | None = setting(
        None, "scale images to this size and to [-1, 1]; default: the checkpoint's own image processor"
    )
    mirror: bool = setting(True, "mirror training images by chance")
    shift: float = setting(0.125, "shift training images by up to this share of their sides; 0: not")


def main(argv: list[str] | None = None) -> list[Any]:
    """Run the experiment and return the rows of its table."""
    from transformers import AutoModelForImageClassification, DefaultDataCollator, Trainer

    from experiment.arguments import begin
    from experiment.images import ImageEncoder, image_processor, with_images
    from experiment.labels import encode_labels
    from experiment.metrics import Accuracy, Metrics
    from experiment.models import loader, named_classes
    from experiment.provenance import provenance
    from experiment.sequence import Experiment
    from experiment.splits import load_splits

    data, image, pruning, training = begin(ImageArguments, argv, __doc__)
    training.remove_unused_columns = False  # the images' column is not one of the model's
    splits = with_images(load_splits(data, training.seed), image.image_column)
    splits, names = encode_labels(splits, image.label_column, named_classes(data, pruning))
    processor = image_processor(data.model, data.model_revision, image.image_size)
    plain = ImageEncoder(processor, image.image_column)
    changed = ImageEncoder(processor, image.image_column, mirror=image.mirror, shift=image.shift)
    train, seen = splits.train.with_transform(changed), splits.each(lambda part: part.with_transform(plain))

    metrics = Metrics(["accuracy"], data.evaluate_scripts)
    trainer = partial(
        Trainer,
        train_dataset=train,
        eval_dataset=seen.validation,
        processing_class=processor,
        data_collator=DefaultDataCollator(),
        compute_metrics=Accuracy(metrics),
    )
    load = loader(AutoModelForImageClassification, data, pruning, labels=names)
    made_by = provenance(__file__, argv, data, image, training, splits, metrics.told)
    # blocks are compared on the training images as they are
    return Experiment(
        data,
        pruning,
        training,
        load,
        trainer,
        seen,
        calibration=seen.train,
        provenance=made_by,
        notes=[f"{metrics}"],
        known=["accuracy"],
    ).run()


if __name__ == "__main__":
    from experiment.command import run

    run(main)
