"""Cards on the Hub: one that somebody wrote, metadata that was set there, one that is given, and what a Trainer's own
pushes leave.
"""

from __future__ import annotations

import inspect
import json
import os

import pytest
from huggingface_hub.utils import filter_repo_objects

from deeparc_hf import create_model_card, push_to_hub
from deeparc_hf.cli import main
from deeparc_hf.publish import made_by_us
from local_hub import ClientError
from tests.publishing import card_of, trained
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def here(publisher):
    """The publisher, with a model and a way to see what is warned of."""
    publisher.run(
        """
        import contextlib, io, pathlib, warnings
        from huggingface_hub import HfApi
        def told(act):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                act()
            return [str(w.message) for w in caught if isinstance(w.message, deeparc_hf.errors.DeepArcWarning)]
        def on_hub(text, name):
            HfApi().create_repo(name, exist_ok=True)
            HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=name)
        model = ZOO["bert"].model(); remove_blocks(model, {"bert.encoder.layer": [1]})
        """
    )
    return publisher


def test_one_signature_which_is_checked(here):
    card, push = (inspect.signature(function).parameters for function in (create_model_card, push_to_hub))
    assert set(card) - {"trainer_or_model", "path"} <= set(push)
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in push.values())
    with pytest.raises(TypeError, match=r"push_to_hub\(\) got an unexpected keyword argument 'overwite'"):
        push_to_hub(ZOO["bert"].model(), "owner/x", overwite=True)


def test_a_card_that_stays_is_told_and_can_be_replaced(hub, here, tmp_path):
    said = here.run('on_hub("# Mine", "owner/mine"); result = told(lambda: push_to_hub(model, "owner/mine"))')
    assert len(said) == 1 and "README.md of owner/mine on the Hub was written or edited by somebody" in said[0]
    assert (
        "overwrite=True" in said[0] and "--overwrite" in said[0] and hub.files("owner/mine")["README.md"] == b"# Mine"
    )
    assert here.run('result = told(lambda: push_to_hub(model, "owner/mine", overwrite=True))') == []
    assert made_by_us(hub.files("owner/mine")["README.md"].decode())
    said = here.run(
        'save_pruned(model, folder); pathlib.Path(folder, "README.md").write_text("# Here"); '
        'result = told(lambda: push_to_hub(folder, "mine"))',
        folder=tmp_path,
    )
    assert len(said) == 1 and hub.files("owner/mine")["README.md"] == b"# Here"
    code = here.run(
        'from deeparc_hf.cli import main; result = main(["push", folder, "owner/mine", "--overwrite", "--license", '
        '"mit"])'
    )
    assert code == 0 and "license: mit" in hub.files("owner/mine")["README.md"].decode()
    assert (tmp_path / "README.md").read_text() == "# Here"


def test_metadata_that_was_set_on_the_hub_is_no_edited_card(hub, here, tmp_path):
    set_there = "---\nlicense: cc-by-4.0\ntags:\n- theirs\nextra_gated_prompt: Ask.\n---\n"
    assert (
        here.run(
            'on_hub(text, "owner/set"); result = told(lambda: push_to_hub(model, "owner/set", tags="ours"))',
            text=set_there,
        )
        == []
    )
    text = hub.files("owner/set")["README.md"].decode()
    data = card_of(hub, "owner/set").data.to_dict()
    assert (
        made_by_us(text)
        and "1 of its 4 blocks" in text
        and data["license"] == "cc-by-4.0"
        and data["extra_gated_prompt"] == "Ask."
    )
    assert {"theirs", "ours", "deeparc"} <= set(data["tags"])
    here.run('on_hub(text, "owner/set"); push_to_hub(model, "owner/set", license="mit")', text=set_there)
    assert card_of(hub, "owner/set").data.license == "mit"  # what is told now counts more
    here.run(
        'save_pruned(model, folder); pathlib.Path(folder, "README.md").write_text(text); create_model_card(folder)',
        folder=tmp_path,
    )
    written = (tmp_path / "README.md").read_text()
    assert made_by_us(written) and "license: cc-by-4.0" in written and "- theirs" in written


def test_a_card_that_is_given_goes_with_its_pictures_and_reports(hub, here, tmp_path):
    here.run(
        """
        from deeparc_hf import MPruneCallback
        callback = MPruneCallback(num_blocks=3, retrain_epochs=1, calibration_samples=32)
        trainer = trained(folder, [callback], num_train_epochs=1, save_strategy="no", hub_model_id="owner/given")
        trainer.evaluate()
        card = create_model_card(trainer, language="en")
        card.text = card.text.replace("## Limits", "Mine.\\n\\n## Limits")
        push_to_hub(trainer, card=card)
        """,
        folder=tmp_path,
    )
    files = hub.files("owner/given")
    text = files["README.md"].decode()
    assert "Mine." in text and "(similarity.png)" in text and files["similarity.png"].startswith(b"\x89PNG")
    assert {"pruning_report.json", "pruning_report.md", "pruning_plan.json"} <= files.keys()


def test_a_licence_that_the_hub_does_not_know_is_refused_before_anything_is_made(hub, here, tmp_path, capsys):
    with pytest.raises(ClientError, match="knows no licence 'foo'"):
        here.run('push_to_hub(model, "owner/foo", license="foo")')
    assert hub.store.find("models", "owner/foo") is None
    ZOO["bert"].model().save_pretrained(tmp_path)
    for command in (["card", str(tmp_path)], ["push", str(tmp_path), "owner/foo"]):
        assert main([*command, "--license", "foo"]) == 2
        err = capsys.readouterr().err
        assert "knows no licence 'foo'" in err and err.count("\n") == 1
    assert not (tmp_path / "README.md").exists()


def test_an_upload_that_breaks_off_is_one_line_of_help(hub, here, tmp_path):
    code, said = here.run(
        """
        import huggingface_hub._commit_api as uploads
        from deeparc_hf.cli import main
        torch.nn.init.ones_(model.classifier.weight)  # else the weights are on the Hub already
        save_pruned(model, folder)
        def breaks(**more):
            raise ConnectionResetError("connection reset")
        whole, uploads.lfs_upload = uploads.lfs_upload, breaks
        err = io.StringIO()
        try:
            with contextlib.redirect_stderr(err):
                code = main(["push", folder, "owner/broken-off"])
        finally:
            uploads.lfs_upload = whole
        result = code, err.getvalue()
        """,
        folder=tmp_path,
    )
    assert code == 2 and "The upload broke off" in said and "Nothing was committed" in said and "Traceback" not in said
    assert "model.safetensors" not in hub.files("owner/broken-off")


def test_no_upload_of_a_trainer_takes_up_a_draft(monkeypatch, tmp_path):
    # It lists its output folder, and then reads: a file that is gone by then breaks it off, without a word.
    drafts, replace = set(), os.replace

    def seen(source, target):
        if os.path.dirname(os.path.abspath(source)) == str(tmp_path):
            drafts.add(os.path.basename(source))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", seen)
    create_model_card(trained(tmp_path))
    assert {name.rsplit(".", 1)[0] for name in drafts} >= {
        "_pruning_report.json", "_pruning_report.md", "_sparsity_report.json", "_similarity.png", "_README.md",
    }  # fmt: skip
    left_out = ["_*", "checkpoint-*"]  # as Trainer._push_from_checkpoint and push_to_hub say
    assert list(filter_repo_objects(sorted(drafts), ignore_patterns=left_out)) == []


def test_pushes_in_a_training_say_where_it_stood_and_the_end_says_how_the_card_is_kept(hub, here, tmp_path):
    printed = here.run(
        """
        import time
        from deeparc_hf import MPruneCallback
        class AfterThePush(transformers.TrainerCallback):
            # Uploads run in the background, from the folder that the next save writes to.
            def on_epoch_begin(self, args, state, control, **more):
                def pushed(commit):
                    return f"epoch {round(state.epoch)}" in commit.title
                while state.epoch and not any(map(pushed, HfApi().list_repo_commits("owner/pushes"))):
                    time.sleep(0.05)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            callback = MPruneCallback(num_blocks=3, retrain_epochs=1, calibration_samples=32)
            trained(folder, [callback, AfterThePush()], num_train_epochs=2, push_to_hub=True,
                    hub_model_id="owner/pushes", hub_strategy="every_save", hub_always_push=True)._finish_current_push()
        result = out.getvalue()
        """,
        folder=tmp_path,
    )
    assert printed.count("trainer.create_model_card = functools.partial(deeparc_hf.create_model_card, trainer)") == 1
    cards = [hub.files("owner/pushes", commit.id) for commit in hub.commits("owner/pushes") if "epoch" in commit.title]
    last, first = (files["README.md"].decode() for files in cards if "model.safetensors" in files)
    assert "It was saved in the middle of its training" in first and "in the middle of its training" not in last
    assert all(made_by_us(text) and "1 of its 4 blocks" in text for text in (last, first))
    assert json.loads(cards[0]["config.json"])["num_hidden_layers"] == 3
