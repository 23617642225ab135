"""Publishing models and folders: what goes up, what goes, what stays, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deeparc_hf.publish import made_by_us
from local_hub import Client, ClientError
from tests.publishing import BEGIN


def test_weights_and_reports_of_an_earlier_push_go(hub, publisher):
    publisher.run(
        """
        from huggingface_hub import HfApi
        model = ZOO["llama"].model()
        push_to_hub(model, "owner/stale")
        import tempfile
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, max_shard_size="20KB")
            push_to_hub(folder, "owner/stale")
        api = HfApi()
        api.upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id="owner/stale")
        sharded = api.list_repo_files("owner/stale")
        remove_blocks(model, {"model.layers": [1]})
        push_to_hub(model, "owner/stale")
        result = sharded, api.list_repo_files("owner/stale")
        """
    )
    sharded, last = publisher.run("result = sharded, api.list_repo_files('owner/stale')")
    assert "model.safetensors" not in sharded and "model.safetensors.index.json" in sharded
    assert [name for name in last if name.endswith((".safetensors", "index.json"))] == ["model.safetensors"]
    assert "notes.txt" in last


def test_a_card_that_somebody_edited_goes_along_as_it_is(hub, publisher, tmp_path):
    publisher.run(
        """
        model = ZOO["bert"].model(); remove_blocks(model, {"bert.encoder.layer": [1]}); save_pruned(model, folder)
        create_model_card(folder)
        push_to_hub(folder, "owner/edited")
        """,
        folder=tmp_path,
    )
    assert made_by_us(hub.files("owner/edited")["README.md"].decode())
    mine = (tmp_path / "README.md").read_text("utf-8").replace("## Limits", "My own words.\n\n## Limits")
    (tmp_path / "README.md").write_text(mine, "utf-8")
    publisher.run('push_to_hub(folder, "owner/edited", commit_message="Edited")')
    assert hub.files("owner/edited")["README.md"].decode() == mine
    assert hub.commits("owner/edited")[0].title == "Edited"


def test_private_repositories_branches_and_pull_requests(hub, publisher):
    found = publisher.run(
        """
        from huggingface_hub import HfApi
        model = ZOO["bert"].model(); remove_blocks(model, {"bert.encoder.layer": [1]})
        push_to_hub(model, "owner/private", private=True)
        remove_blocks(model, {"bert.encoder.layer": [1]})
        push_to_hub(model, "private", revision="small", commit_message="On a branch")
        pull = push_to_hub(model, "owner/private", create_pr=True)
        revisions = ("main", "small", "refs/pr/1")
        result = [HfApi().model_info("owner/private").private, pull.pr_num,
                  [PrunedConfig.from_pretrained("owner/private", revision=r).kept for r in revisions]]
        """
    )
    assert found == [True, 1, [{"bert.encoder.layer": [0, 2, 3]}] + [{"bert.encoder.layer": [0, 3]}] * 2]
    assert hub.commits("owner/private", "small")[0].title == "On a branch"
    with (
        Client(hub.environment("hf_visitor")) as stranger,
        pytest.raises(ClientError, match="Check the spelling of owner/private") as error,
    ):
        stranger.run('import deeparc_hf; deeparc_hf.PrunedConfig.from_pretrained("owner/private")')
    assert error.value.type == "RepositoryNotFoundError"


def test_errors_of_the_hub_are_its_own_with_a_line_of_help(hub, publisher):
    cases = {
        'PrunedConfig.from_pretrained("owner/nothing")': (
            "RepositoryNotFoundError",
            "Check the spelling of owner/nothing",
        ),
        'PrunedConfig.from_pretrained("owner/there", revision="nowhere")': (
            "RevisionNotFoundError",
            "has no such branch, tag or commit",
        ),
        'HfApi().create_repo("owner/empty", exist_ok=True); PrunedConfig.from_pretrained("owner/empty")': (
            "RemoteEntryNotFoundError|EntryNotFoundError",
            "lacks that file",
        ),
        'push_to_hub(ZOO["bert"].model(), "visitor/mine")': ("HfHubHTTPError", "log in"),
    }
    publisher.run('from huggingface_hub import HfApi; push_to_hub(ZOO["bert"].model(), "owner/there")')
    for code, (kind, text) in cases.items():
        with pytest.raises(ClientError, match=text) as error:
            publisher.run(code)
        assert re.fullmatch(kind, error.value.type), code
    with Client(hub.environment("hf_owner_reads")) as reader, pytest.raises(ClientError, match="write access") as error:
        reader.run(BEGIN + 'push_to_hub(ZOO["bert"].model(), "owner/there")')
    assert error.value.type == "HfHubHTTPError"


def test_what_is_no_whole_checkpoint_is_refused_before_anything_is_made(hub, publisher, tmp_path):
    publisher.run(
        """
        import os, pathlib, shutil
        def folder_of(name, **settings):
            folder = pathlib.Path(place, name); model = ZOO["llama"].model()
            model.save_pretrained(folder, **settings)
            return folder
        shards = folder_of("shards", max_shard_size="20KB"); sorted(shards.glob("model-*"))[0].unlink()
        empty = folder_of("empty"); (empty / "model.safetensors").write_bytes(b"")
        bare = folder_of("bare"); (bare / "config.json").unlink()
        link, key = folder_of("link"), pathlib.Path(place) / "key"
        key.write_text("secret key"); (link / "vocab.txt").symlink_to(key)
        card = folder_of("card"); (card / "pruning_report.json").write_text("{")
        """,
        place=tmp_path,
    )
    for name, said in {
        "shards": "is not there, or is damaged",
        "empty": "is not there, or is damaged",
        "bare": "it has no config.json",
        "link": "is a link to a file elsewhere",
        "card": "is not what deeparc_hf writes",
    }.items():
        with pytest.raises(ClientError, match=said):
            publisher.run(f'push_to_hub({name}, "owner/refused-{name}")')
        assert hub.store.find("models", f"owner/refused-{name}") is None


def test_only_files_of_a_checkpoint_are_pushed(hub, publisher, tmp_path):
    publisher.run(
        """
        import pathlib
        save_pruned(ZOO["bert"].model(), place); tiny_tokenizer().save_pretrained(place)
        for name in ("id_rsa", "credentials.json", "notes.txt", "x.pickle", "weights.npz", "train.csv", "run.log",
                     "events.out.1.host"):
            pathlib.Path(place, name).write_text("secret")
        push_to_hub(place, "owner/clean")
        """,
        place=tmp_path,
    )
    wanted = {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(hub.files("owner/clean")) == wanted


def test_what_a_loader_would_prefer_goes_and_the_rest_stays(hub, publisher):
    publisher.run(
        """
        from huggingface_hub import HfApi
        api, model = HfApi(), ZOO["bert"].model()
        push_to_hub(model, "owner/old", processing_class=tiny_tokenizer())
        for name in ("adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "chat_template.jinja",
                     "pruning_plan.json", "report.md", "model_ema.safetensors", "heatmap.png"):
            api.upload_file(path_or_fileobj=name.encode(), path_in_repo=name, repo_id="owner/old")
        remove_blocks(model, {"bert.encoder.layer": [1]})
        push_to_hub(model, "owner/old", processing_class=tiny_tokenizer())
        """
    )
    left = set(hub.files("owner/old"))
    assert {"report.md", "model_ema.safetensors", "heatmap.png"} <= left
    assert (
        not {
            "adapter_config.json",
            "adapter_model.safetensors",
            "pytorch_model.bin",
            "chat_template.jinja",
            "pruning_plan.json",
        }
        & left
    )


def test_a_card_that_was_edited_on_the_hub_stays(hub, publisher):
    mine = publisher.run(
        """
        model = ZOO["bert"].model()
        push_to_hub(model, "owner/on-the-hub")
        from huggingface_hub import HfApi, ModelCard
        mine = str(ModelCard.load("owner/on-the-hub")).replace("## Limits", "My words.\\n\\n## Limits")
        HfApi().upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="owner/on-the-hub")
        remove_blocks(model, {"bert.encoder.layer": [1]})
        push_to_hub(model, "owner/on-the-hub")
        result = mine
        """
    )
    files = hub.files("owner/on-the-hub")
    assert files["README.md"].decode() == mine and json.loads(files["config.json"])["num_hidden_layers"] == 3


def test_the_first_of_several_processes_pushes(hub, tmp_path):
    script = tmp_path / "push.py"
    script.write_text(
        "import torch.distributed as dist\nfrom tests.zoo import ZOO\nfrom deeparc_hf import push_to_hub\n"
        "dist.init_process_group('gloo')\ndone = push_to_hub(ZOO['bert'].model(), 'owner/ranks')\n"
        "assert (done is None) == (dist.get_rank() != 0)\ndist.barrier()\ndist.destroy_process_group()\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29741",
        str(script),
    ]
    environment = {**hub.environment("hf_owner"), "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(hub.commits("owner/ranks")) == 2 and "model.safetensors" in hub.files("owner/ranks")


def test_a_bare_timm_model_in_a_trainer_is_published_whole(hub, publisher, tmp_path):
    publisher.run(
        """
        from transformers import Trainer, TrainingArguments
        trainer = Trainer(ZOO["timm_resnet"].model(), TrainingArguments(place, use_cpu=True, report_to="none"))
        push_to_hub(trainer, "owner/timm-in-trainer")
        """,
        place=tmp_path,
    )
    assert {"config.json", "model.safetensors"} <= set(hub.files("owner/timm-in-trainer"))


def test_licences_are_those_that_the_hub_tells(hub, publisher):
    found = publisher.run(
        """
        model = ZOO["bert"].model()
        push_to_hub(model, "owner/licensed", license="mit")
        remove_blocks(model, {"bert.encoder.layer": [1]})
        cards = [create_model_card(model, finetuned_from=name) for name in ("owner/licensed", "owner/not-there")]
        own = create_model_card(model, finetuned_from="owner/licensed", license="apache-2.0")
        result = [[card.data.license for card in (*cards, own)], "licence by its card: mit" in str(cards[0])]
        """
    )
    assert found == [["mit", None, "apache-2.0"], True]


def test_the_trainers_hub_arguments_are_the_defaults(hub, publisher, tmp_path):
    found = publisher.run(
        """
        from huggingface_hub import HfApi
        from transformers import Trainer, TrainingArguments
        told = {"hub_model_id": "owner/by-args", "hub_private_repo": True, "hub_revision": "small"}
        args = TrainingArguments(place, use_cpu=True, report_to="none", **told)
        push_to_hub(Trainer(ZOO["bert"].model(), args))
        result = HfApi().model_info("owner/by-args").private
        """,
        place=tmp_path,
    )
    assert found is True
    assert "model.safetensors" in hub.files("owner/by-args", "small") and "model.safetensors" not in hub.files(
        "owner/by-args"
    )
