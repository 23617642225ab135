"""Parameters that are sharded before training begins: pruned when the Trainer is made, or refused with the way out.

Two CPU processes: accelerate shards nothing there, but the Trainer's arguments ask for it, which is what the callback
goes by.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AutoModelForSequenceClassification

from deeparc_hf.errors import ConfigError
from deeparc_hf.pruning.config import MPruneConfig
from deeparc_hf.trainer.sharded import is_sharded, prune_before_sharding
from tests.zoo import ZOO

from .test_distributed import launch, same

FSDP = {
    "fsdp": True,
    "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]},
    "num_train_epochs": 2,
    "save_strategy": "epoch",
}
SETTINGS = {"num_blocks": 3, "retrain_epochs": 1}
BATCHES = [list(range(16)), list(range(16, 40))]


@pytest.mark.parametrize(
    ("deepspeed", "fsdp", "sharded"), [(None, None, False), ("zero2.json", None, True), (None, True, True)]
)
def test_the_trainers_arguments_tell(deepspeed, fsdp, sharded):
    assert is_sharded(SimpleNamespace(deepspeed=deepspeed, fsdp=fsdp)) == sharded


def launch_sharded(folder, job, check=True):
    results, done = launch(folder, {"settings": SETTINGS, "arguments": FSDP, **job}, check=False)
    if "no available devices found" in done.stderr:
        pytest.skip("this accelerate makes no FSDP settings without a GPU")
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return results, done


def test_without_calibration_data_the_training_is_refused_with_the_way_out(tmp_path):
    results, done = launch_sharded(tmp_path, {}, check=False)
    assert done.returncode != 0 and not results
    assert (
        "SurgeryError" in done.stderr
        and "MPruneCallback(calibration=...)" in done.stderr
        and "prune_model" in done.stderr
    )


@pytest.mark.slow
def test_with_calibration_data_the_model_is_pruned_when_the_trainer_is_made(tmp_path):
    job = {"calibration": BATCHES}
    whole, _ = launch_sharded(tmp_path, job)
    assert [result["blocks"] for result in whole] == [3, 3]
    assert same(whole[0]["weights"], whole[1]["weights"]) and whole[0]["plan"] == whole[1]["plan"]
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-16", output_loading_info=True)
    assert not any(info.values())
    resumed, done = launch_sharded(tmp_path / "again", {**job, "resume": str(tmp_path / "checkpoint-8")})
    assert same(resumed[0]["weights"], whole[0]["weights"])
    searched = {**job, "settings": {"search": "greedy", "heal": "lstsq", "num_blocks": 3, "retrain_epochs": 1}}
    found, _ = launch_sharded(tmp_path / "searched", searched)
    assert [result["blocks"] for result in found] == [3, 3] and found[0]["plan"] == found[1]["plan"]
    assert same(found[0]["weights"], found[1]["weights"]) and '"search": "greedy"' in found[0]["plan"]
    other = {
        **job,
        "calibration": BATCHES[::-1],
        "settings": {**SETTINGS, "num_blocks": 2},
        "resume": str(tmp_path / "checkpoint-8"),
    }
    results, done = launch_sharded(tmp_path / "other", other, check=False)
    assert done.returncode != 0 and not results  # the checkpoint's blocks do not fit, or its record does not


@pytest.mark.parametrize("settings", [{"start_epoch": 1}, {"iterations": 2}, {"max_drop": 0.1}])
def test_more_than_one_pruning_at_the_start_is_refused(settings):
    model = ZOO["bert"].model()
    with pytest.raises(ConfigError, match="one pruning is possible"):
        prune_before_sharding(
            model, MPruneConfig(num_blocks=3, **settings), [], SimpleNamespace(train_batch_size=8, process_index=0)
        )
    assert len(model.bert.encoder.layer) == 4
