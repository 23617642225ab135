"""Kills of the server and of clients, at the moments that hurt most: nothing acknowledged is lost, nothing half done is
seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from local_hub import Client, ClientError, HubServer

# of the tests' own Hub; what the package does with it is tested in test_hub*.py
pytestmark = pytest.mark.slow

START = """
from huggingface_hub import CommitOperationAdd as Add, HfApi
api = HfApi()
api.create_repo('owner/model', exist_ok=True)
def push(text):
    adds = [Add('config.json', text.encode()), Add('model.safetensors', text.encode() * 100_000)]
    return api.create_commit('owner/model', adds, commit_message=text).oid
"""


@pytest.fixture
def server(tmp_path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", tokens=["owner=hf_owner"]) as server:
        yield server


@pytest.fixture
def client(server) -> Iterator[Client]:
    with Client(server.environment("hf_owner")) as client:
        client.run(START + "result = push('old')")
        yield client


def state(server: HubServer) -> tuple[str, int]:
    """The two files of the head, as one word each, and the number of commits; no commit mixes the two."""
    repo, history = server.repo("owner/model"), server.commits("owner/model")
    for commit in history[:-1]:
        assert repo.read(commit.files["config.json"]).decode() == commit.title
        assert repo.read(commit.files["model.safetensors"]).decode() == commit.title * 100_000
    return history[0].title, len(history)


def test_everything_is_there_after_a_restart(server, client):
    head, port = server.head("owner/model"), server.endpoint
    server.restart()
    assert (server.head("owner/model"), server.endpoint) == (head, port)
    assert client.run("result = api.whoami()['name'], api.model_info('owner/model').sha") == ["owner", head]
    assert client.run("result = open(api.hf_hub_download('owner/model', 'config.json')).read()") == "old"


@pytest.mark.parametrize(
    ("point", "after"), [("in-lfs", ("old", 2)), ("before-ref", ("old", 2)), ("after-ref", ("new", 3))]
)
def test_the_server_dies_in_a_push(server, client, point, after):
    server.restart(stall=point)
    # a retry of the client's own would meet a Hub that is back, and the test could not tell what it sees
    with Client(server.environment("hf_owner")) as pushing:
        pushing.run(START)
        pushing.send("push('new')")
        server.wait_until_stalled()
        assert state(server) == after
        pushing.kill()
    server.restart()
    assert state(server) == after
    assert not list(server.store.incoming.iterdir())
    assert client.run("result = [each.title for each in api.list_repo_commits('owner/model')]")[0] == after[0]
    client.run("push('end')")
    assert state(server) == ("end", after[1] + 1)


def test_an_unacknowledged_commit_cannot_be_had_by_its_hash(server, client):
    server.restart(stall="before-ref")
    client.send("push('new')")
    server.wait_until_stalled()
    commits = {path.stem for path in (server.repo("owner/model").folder / "commits").iterdir()}
    [orphan] = commits - {each.id for each in server.commits("owner/model")}
    server.restart()
    with pytest.raises(ClientError):
        client.receive()
    with pytest.raises(ClientError) as caught:
        client.run("api.model_info('owner/model', revision=orphan)", orphan=orphan)
    assert caught.value.type == "RevisionNotFoundError"


def test_a_client_sees_that_the_server_died(server, client):
    server.restart(stall="after-ref")
    client.send("push('new')")
    server.wait_until_stalled()
    server.kill()
    with pytest.raises(ClientError) as caught:
        client.receive()
    assert caught.value.type in ("RemoteProtocolError", "ReadError")
    server.restart()
    before = state(server)
    client.run("api.upload_file(path_or_fileobj=b'new', path_in_repo='config.json', repo_id='owner/model')")
    assert state(server) == before, "the commit had come through, and the same again makes no other"


def test_a_client_dies_in_an_upload(server, client):
    server.restart(stall="in-lfs")
    with Client(server.environment("hf_owner")) as pushing:
        pushing.run(START)
        pushing.send("push('new')")
        server.wait_until_stalled()
        pushing.kill()
    assert state(server) == ("old", 2)
    assert client.run("result = api.model_info('owner/model').siblings[0].rfilename") == ".gitattributes"
    server.restart()
    client.run("push('new')")
    assert state(server) == ("new", 3)


def test_a_client_dies_at_any_moment(server, client):
    """After each number of requests that a push makes. What the server had received whole may still come, but never
    half of it.
    """
    words = ("one", "two", "six", "ten", "end")
    for count, word in enumerate(words):
        with Client(server.environment("hf_owner")) as pushing:
            pushing.run(START)
            seen = len(server.requests())
            pushing.send("push(word)", word=word)
            server.wait_until(lambda enough=seen + count: len(server.requests()) >= enough)
            pushing.kill()
        state(server)
    client.run("push('was')")
    assert state(server)[0] == "was"


def test_the_server_dies_at_any_moment(server, client):
    """Again and again while one pushes, wherever that is: what was acknowledged stays, in one whole line of history."""
    pushes = """
    acknowledged = []
    for number in range(100, 112):
        try:
            acknowledged.append(push(str(number)))
        except Exception as error:
            assert type(error).__module__.startswith("httpx"), error
    result = acknowledged
    """
    client.send(pushes)
    for kill in range(4):
        enough = len(server.requests()) + 4 + 3 * kill
        server.wait_until(lambda enough=enough: len(server.requests()) >= enough)
        server.restart()
        state(server)
    acknowledged = client.receive()
    assert acknowledged
    assert set(acknowledged) <= {each.id for each in server.commits("owner/model")}
    state(server)
