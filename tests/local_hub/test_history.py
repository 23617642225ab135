"""Commits, refs and pull requests; and what several who push at once make of a branch."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from local_hub import Client, ClientError

START = """
from huggingface_hub import CommitOperationAdd as Add, HfApi, snapshot_download, hf_hub_download
api = HfApi()
def push(repo, name, text, **how):
    how['commit_message'] = f'{name} is {text}'
    return api.upload_file(repo_id=repo, path_in_repo=name, path_or_fileobj=text.encode(), **how)
"""


@pytest.fixture(scope="module")
def owner(hub_client):
    client = hub_client("hf_owner")
    client.run(START)
    return client


@pytest.fixture
def repo(owner, request):
    name = "org/" + request.node.name.replace("_", "-")[:60]
    owner.run("api.create_repo(repo)", repo=name)
    return name


def refusal(client, code: str, **variables) -> str:
    with pytest.raises(ClientError) as caught:
        client.run(code, **variables)
    return f"{caught.value.type} {caught.value}"


def test_branches_and_tags(hub, owner, repo):
    owner.run("""
        first = push(repo, 'a.txt', 'one').oid
        api.create_tag(repo, tag='v1', revision='main')
        api.create_branch(repo, branch='steps/10')
        push(repo, 'a.txt', 'two', revision='steps/10')
        push(repo, 'a.txt', 'three')
        """)
    read = (
        "result = [open(hf_hub_download(repo, 'a.txt', revision=each)).read() for each in ('main', 'v1', "
        "'steps/10', first, first[:8])]"
    )
    assert owner.run(read) == ["three", "one", "two", "one", "one"]
    refs = owner.run(
        "refs = api.list_repo_refs(repo); result = [each.name for each in refs.branches], [vars(each) for each in "
        "refs.tags]"
    )
    tag = {"name": "v1", "ref": "refs/tags/v1", "target_commit": owner.run("result = first")}
    assert refs == [["main", "steps/10"], [tag]]
    assert [each.title for each in hub.commits(repo, "steps/10")] == ["a.txt is two", "a.txt is one", "initial commit"]
    assert "409" in refusal(owner, "api.create_branch(repo, branch='steps/10')")
    assert "409" in refusal(owner, "api.create_tag(repo, tag='v1')")
    owner.run(
        "api.create_branch(repo, branch='steps/10', exist_ok=True); api.create_tag(repo, tag='v1', exist_ok=True)"
    )
    assert "BadRequestError" in refusal(owner, "api.create_branch(repo, branch='refs/heads/x')")
    assert "RevisionNotFoundError" in refusal(owner, "api.create_branch(repo, branch='x', revision='nowhere')")
    assert "RevisionNotFoundError" in refusal(owner, "push(repo, 'a.txt', 'four', revision='v1')")
    assert "Cannot delete refs/heads/main" in refusal(owner, "api.delete_branch(repo, branch='main')")
    pinned = hub.head(repo, "steps/10")
    owner.run("api.delete_branch(repo, branch='steps/10'); api.delete_tag(repo, tag='v1')")
    assert hub.repo(repo).refs("refs/heads/").keys() == {"refs/heads/main"}
    assert hub.ask("GET", f"/{repo}/resolve/{pinned}/a.txt")[2] == b"two", "a commit that somebody has pinned stays"
    assert "RevisionNotFoundError" in refusal(owner, "api.delete_branch(repo, branch='steps/10')")


def test_history_is_listed_newest_first(hub, owner, repo):
    owner.run("for n in range(3): push(repo, 'n.txt', str(n))")
    listed = owner.run("result = [(each.commit_id, each.title, each.authors) for each in api.list_repo_commits(repo)]")
    assert listed == [[each.id, each.title, ["owner"]] for each in hub.commits(repo)]
    assert [each.parent for each in hub.commits(repo)] == [each.id for each in hub.commits(repo)[1:]] + [None]
    owner.run("api.super_squash_history(repo, commit_message='one')")
    assert [each.title for each in hub.commits(repo)] == ["one"]


def test_a_stale_parent_is_refused(hub, owner, repo):
    owner.run("before = push(repo, 'a.txt', 'one').oid; after = push(repo, 'a.txt', 'two', parent_commit=before).oid")
    error = refusal(owner, "push(repo, 'a.txt', 'three', parent_commit=before)")
    assert "412" in error and "The branch was updated since you opened this page" in error
    assert hub.files(repo)["a.txt"] == b"two"
    owner.run("push(repo, 'a.txt', 'four', parent_commit=after[:10])")
    assert hub.files(repo)["a.txt"] == b"four"


def test_a_stranger_proposes_and_the_owner_merges(hub, owner, hub_client, repo):
    owner.run("push(repo, 'a.txt', 'one'); push(repo, 'b.txt', 'one')")
    visitor = hub_client("hf_visitor")
    visitor.run(START)
    pull = visitor.run(
        "info = push(repo, 'a.txt', 'proposed', create_pr=True); result = info.pr_url, info.pr_revision, info.pr_num",
        repo=repo,
    )
    assert pull == [f"{hub.endpoint}/{repo}/discussions/1", "refs/pr/1", 1]
    assert (hub.files(repo)["a.txt"], hub.files(repo, "refs/pr/1")["a.txt"]) == (b"one", b"proposed")
    visitor.run("push(repo, 'weights.bin', 'large', revision='refs/pr/1')")
    assert "403" in refusal(visitor, "push(repo, 'a.txt', 'x')")
    assert visitor.run("result = open(hf_hub_download(repo, 'weights.bin', revision='refs/pr/1')).read()") == "large"
    owner.run("push(repo, 'b.txt', 'two')")
    assert "RevisionNotFoundError" in refusal(owner, "push(repo, 'a.txt', 'x', revision='refs/pr/1', create_pr=True)")
    assert owner.run("result = [(each.num, each.status, each.author) for each in api.get_repo_discussions(repo)]") == [
        [1, "open", "visitor"]
    ]
    owner.run("api.merge_pull_request(repo, 1)")
    assert {path: hub.files(repo)[path] for path in ("a.txt", "b.txt", "weights.bin")} == {
        "a.txt": b"proposed",
        "b.txt": b"two",
        "weights.bin": b"large",
    }
    assert owner.run("result = api.get_discussion_details(repo, 1).status") == "merged"


def test_a_pull_request_that_conflicts_is_not_merged(hub, owner, repo):
    owner.run("push(repo, 'a.txt', 'one'); push(repo, 'a.txt', 'proposed', create_pr=True); push(repo, 'a.txt', 'two')")
    assert "409" in refusal(owner, "api.merge_pull_request(repo, 1)")
    assert hub.files(repo)["a.txt"] == b"two"


def test_a_draft_is_opened_before_its_commits(hub, owner, repo):
    pull = owner.run(
        "pull = api.create_pull_request(repo, title='later'); result = pull.num, pull.status, pull.git_reference"
    )
    assert pull == [1, "draft", "refs/pr/1"]
    assert hub.head(repo, "refs/pr/1") == hub.head(repo)
    owner.run("push(repo, 'a.txt', 'one', revision='refs/pr/1')")
    assert "a.txt" in hub.files(repo, "refs/pr/1") and "a.txt" not in hub.files(repo)


PUSHES = """
oids = []
for n in range(count):
    adds = [Add(f'{part}.{end}', f'{who} {n}'.encode()) for part in ('left', 'right') for end in ('txt', 'bin')]
    adds.append(Add(f'{who}/{n}.txt', b'x'))
    oids.append(api.create_commit(repo, adds, commit_message=f'{who} {n}').oid)
result = oids
"""


def test_who_push_at_once_lose_nothing_and_mix_nothing(hub, owner, repo):
    count, names = 5, ("one", "two", "three")
    with ExitStack() as stack:
        clients = {
            name: stack.enter_context(Client(hub.environment("hf_owner", hub.root / "homes" / name))) for name in names
        }
        for name, client in clients.items():
            client.run(START, repo=repo, who=name, count=count)
        for client in clients.values():
            client.send(PUSHES)
        acknowledged = {
            oid: f"{name} {n}" for name, client in clients.items() for n, oid in enumerate(client.receive())
        }
    history = hub.commits(repo)
    assert {each.id: each.title for each in history[:-1]} == acknowledged
    for older, newer in zip(history[1:], history, strict=False):
        assert newer.parent == older.id
        contents = {
            hub.repo(repo).read(newer.files[f"{part}.{end}"]).decode()
            for part in ("left", "right")
            for end in ("txt", "bin")
        }
        assert contents == {newer.title}
        assert older.files.keys() < newer.files.keys()
    assert len([path for path in history[0].files if "/" in path]) == count * len(names)
