"""Publishing when things go wrong: several at once, a client killed in mid-upload, a server killed in mid-commit."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load

from local_hub import Client, ClientError, HubServer

OWNER = "hf_owner"
BEGIN = """
import torch, deeparc_hf
from deeparc_hf import push_to_hub, remove_blocks
from tests.zoo import ZOO
torch.set_num_threads(1)

def pruned(*blocks):
    model = ZOO["llama"].model(len(blocks))
    if blocks:
        remove_blocks(model, {"model.layers": list(blocks)})
    return model
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub"), tokens=[f"owner={OWNER}"]) as server:
        yield server


@pytest.fixture
def clients(hub):
    with ExitStack() as stack:

        def one():
            client = stack.enter_context(Client(hub.environment(OWNER)))
            client.run(BEGIN)
            return client

        yield one


def whole(hub, repo_id, revision="main"):
    """Number of blocks of a commit, whose config, weights and card must be of one model."""
    files = hub.files(repo_id, revision)
    layers = json.loads(files["config.json"])["num_hidden_layers"]
    found = {name.split(".")[2] for name in load(files["model.safetensors"]) if name.startswith("model.layers.")}
    assert len(found) == layers
    text = ModelCard(files["README.md"].decode()).text
    assert (
        (f"{4 - layers} of its 4 blocks (layers) removed" in text) if layers < 4 else ("No block was removed" in text)
    )
    return layers


@pytest.mark.slow
def test_three_at_once_lose_nothing(hub, clients):
    processes = [clients() for _ in range(3)]
    processes[0].run('push_to_hub(pruned(), "owner/busy")')
    for process, blocks in zip(processes, ([1], [1, 2], [1, 2, 3]), strict=True):
        process.send(
            'result = push_to_hub(pruned(*blocks), "owner/busy", commit_message=f"Without {len(blocks)}").oid',
            blocks=blocks,
        )
    acknowledged = {process.receive() for process in processes}
    assert len(acknowledged) == 3
    commits = hub.commits("owner/busy")
    assert acknowledged < {commit.id for commit in commits}
    made = [commit for commit in commits if commit.title.startswith("Without")]
    assert [4 - whole(hub, "owner/busy", commit.id) for commit in made] == [int(commit.title[-1]) for commit in made]


@pytest.mark.slow
def test_a_client_that_is_killed_in_mid_upload_leaves_the_last_commit(hub, clients):
    victim, other = clients(), clients()
    other.run('push_to_hub(pruned(1), "owner/upload")')
    head = hub.head("owner/upload")
    hub.restart(stall="in-lfs")
    victim.send('push_to_hub(pruned(0, 3), "owner/upload")')  # weights that no other test has uploaded
    hub.wait_until_stalled()
    victim.kill()
    hub.restart()
    assert hub.head("owner/upload") == head and whole(hub, "owner/upload") == 3
    other.run('push_to_hub(pruned(0, 3), "owner/upload")')
    assert whole(hub, "owner/upload") == 2


@pytest.mark.parametrize(("stall", "after_the_kill"), [("before-ref", 3), ("after-ref", 2)])
def test_a_server_that_is_killed_in_mid_commit_shows_nothing_half_done(hub, clients, tmp_path, stall, after_the_kill):
    name = f"owner/{stall}"
    client = clients()
    client.run("push_to_hub(pruned(1), name)", name=name)
    client.run("deeparc_hf.save_pruned(pruned(1, 2), folder)", folder=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    hub.restart(stall=stall)
    client.send("push_to_hub(folder, name)")
    hub.wait_until_stalled()
    hub.kill()
    with pytest.raises(ClientError):
        client.receive()
    hub.restart()
    assert whole(hub, name) == after_the_kill
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    client.run("push_to_hub(folder, name)")
    assert whole(hub, name) == 2
    assert len(hub.commits(name)) == 3  # made empty, first push, second push: the retry adds nothing that is there


def test_a_refused_card_changes_nothing(hub, clients):
    client = clients()
    client.run('push_to_hub(pruned(1), "owner/refused")')
    head = hub.head("owner/refused")
    with pytest.raises(ClientError, match="license"):
        client.run('push_to_hub(pruned(1, 2), "owner/refused", license="no such licence")')
    assert hub.head("owner/refused") == head
