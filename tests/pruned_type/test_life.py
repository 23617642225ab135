"""A Swin and an EfficientNet in a training: fine-tuned, pruned by the callback, pushed, and loaded by somebody else."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.stock import StockError, StockProcess

from .test_pruned_type import efficientnet, swin

MAKERS = {"swin": swin, "efficientnet": efficientnet}
BLOCKS = {"swin": {"swin.encoder.layers.1.blocks": 4}, "efficientnet": {"efficientnet.encoder.blocks": 14}}


@pytest.mark.parametrize("name", MAKERS)
def test_pruned_in_a_training_pushed_and_loaded_by_the_auto_class(name, hub, hub_client, tmp_path):
    client = hub_client("hf_owner")
    client.run(
        """
        import torch
        from safetensors.torch import save_file
        from transformers import Trainer
        from deeparc_hf import MPruneCallback, push_to_hub
        from tests.pruned_type.test_life import MAKERS
        from tests.trainers import arguments, image_data

        torch.set_num_threads(1)
        model, data = MAKERS[name](), image_data(classes=3)
        pruning = dict(num_blocks=blocks, similarity=similarity, retrain_epochs=1, calibration_samples=16)
        settings = dict(eval_strategy="epoch", save_strategy="epoch", hub_model_id="owner/" + name)
        trainer = Trainer(model, arguments(folder, **settings), train_dataset=data, eval_dataset=data,
                          callbacks=[MPruneCallback(**pruning)])
        trainer.train()
        resumed = Trainer(MAKERS[name](), arguments(folder, **settings), train_dataset=data, eval_dataset=data,
                          callbacks=[MPruneCallback(**pruning)])
        resumed.train(resume_from_checkpoint=True)
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            logits, again = (t.model.eval()(pixel_values=pixels).logits for t in (trainer, resumed))
        assert torch.equal(logits, again)
        save_file({"logits": logits, "pixel_values": pixels}, folder + "/expected.safetensors")
        push_to_hub(trainer)
        """,
        folder=str(tmp_path),
        name=name,
        blocks=BLOCKS[name],
        # blocks that put out images of different sizes are compared by what the model puts out
        similarity="effect" if name == "efficientnet" else "cka",
    )
    files = hub.files(f"owner/{name}")
    config = json.loads(files["config.json"])
    assert (config["model_type"], config["base_model_type"]) == ("deeparc_pruned", name)
    card = files["README.md"].decode()
    assert "import deeparc_hf" in card and "AutoModelForImageClassification" in card
    expected = load_file(tmp_path / "expected.safetensors")
    inputs = {"pixel_values": expected["pixel_values"]}
    with StockProcess(hub.environment("hf_visitor", tmp_path / "owner"), package=True) as owner:
        loaded = owner.load(f"owner/{name}", "AutoModelForImageClassification", inputs)
        assert loaded.clean and torch.equal(loaded.outputs["output"], expected["logits"])
    with (
        StockProcess(hub.environment("hf_visitor", tmp_path / "stock")) as stock,
        pytest.raises(StockError, match="model type `deeparc_pruned` but Transformers does not recognize"),
    ):
        stock.load(f"owner/{name}", "AutoModelForImageClassification", inputs)
