"""Repositories and who may do what with them, as the real client sees it."""

from __future__ import annotations

import pytest

from local_hub import ClientError

API = "from huggingface_hub import HfApi; api = HfApi(); import io"


def raised(client, code: str, **variables) -> ClientError:
    with pytest.raises(ClientError) as caught:
        client.run(f"{API}\n{code}", **variables)
    return caught.value


@pytest.fixture(scope="module")
def owner(hub_client):
    client = hub_client("hf_owner")
    client.run(API)
    return client


def test_whoami(owner, hub_client):
    me = owner.run("result = api.whoami()")
    assert (me["name"], [org["name"] for org in me["orgs"]], me["auth"]["accessToken"]["role"]) == (
        "owner",
        ["org"],
        "write",
    )
    error = raised(owner, "api.whoami(token='hf_nobody')")
    assert error.type == "HfHubHTTPError" and "Invalid user token" in str(error)


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_a_repository_begins_with_one_commit_and_exists_once(hub, owner, kind):
    code = (
        "result = [str(api.create_repo(f'org/first-{kind}', repo_type=kind, space_sdk='static', exist_ok=again)) "
        "for again in (0, 1)]"
    )
    urls = owner.run(code, kind=kind)
    assert urls == [f"{hub.endpoint}/{'' if kind == 'model' else kind + 's/'}org/first-{kind}"] * 2
    error = raised(owner, f"api.create_repo('org/FIRST-{kind}', repo_type=kind, space_sdk='static')", kind=kind)
    assert "409" in str(error) and f"A {kind} repository called org/first-{kind} already exists" in str(error)
    [first] = hub.commits(f"org/first-{kind}", kind=f"{kind}s")
    assert first.title == "initial commit" and ".gitattributes" in first.files
    assert owner.run(
        "result = [api.repo_exists('org/first-' + kind, repo_type=each) for each in ('model', 'dataset', 'space')]"
    ) == [kind == each for each in ("model", "dataset", "space")]


def test_a_name_without_a_namespace_is_ones_own(hub, owner):
    assert owner.run("result = api.create_repo('mine').repo_id") == "owner/mine"
    assert hub.repo("owner/mine").about["private"] is False


@pytest.mark.parametrize("repo_id", ["org/nothing", "nothing"])
def test_what_is_missing(owner, hub_client, repo_id):
    for client in (owner, hub_client()):
        assert raised(client, "api.model_info(name)", name=repo_id).type == "RepositoryNotFoundError"
        assert (
            raised(client, "api.hf_hub_download(name, 'config.json')", name=repo_id).type == "RepositoryNotFoundError"
        )
        assert client.run(f"{API}\nresult = api.repo_exists(name)", name=repo_id) is False
    owner.run("api.create_repo('org/here', exist_ok=True)")
    assert raised(owner, "api.model_info('org/here', revision='nowhere')").type == "RevisionNotFoundError"
    assert raised(owner, "api.hf_hub_download('org/here', 'nothing.txt')").type == "RemoteEntryNotFoundError"
    assert hub_client().run(
        f"{API}\nresult = [api.file_exists('org/here', name) for name in ('.gitattributes', 'nothing')]"
    ) == [
        True,
        False,
    ]


def test_private_is_missing_for_others(hub, owner, hub_client):
    owner.run("api.create_repo('owner/secret', private=True); result = api.model_info('owner/secret').private")
    for client in (hub_client("hf_visitor"), hub_client()):
        for code in (
            "api.model_info('owner/secret')",
            "api.hf_hub_download('owner/secret', '.gitattributes')",
            "api.auth_check('owner/secret')",
        ):
            assert raised(client, code).type == "RepositoryNotFoundError"
    assert [
        hub.ask("GET", "/api/models/owner/secret", token=token)[0] for token in (None, "hf_visitor", "hf_owner_reads")
    ] == [
        401,
        404,
        200,
    ]
    owner.run("api.update_repo_settings('owner/secret', private=False)")
    assert hub_client().run("result = api.model_info('owner/secret').private") is False


def test_writing_takes_a_right(hub, owner, hub_client):
    owner.run("api.create_repo('org/guarded')")
    head = hub.head("org/guarded")
    upload = "api.upload_file(path_or_fileobj=b'x', path_in_repo='x.txt', repo_id='org/guarded')"
    for token, status in (("hf_visitor", "403"), ("hf_owner_reads", "403"), (None, "401")):
        for code in (
            upload,
            "api.delete_repo('org/guarded')",
            "api.create_branch('org/guarded', branch='new')",
            "api.create_repo('org/more')",
        ):
            assert status in str(raised(hub_client(token), code))
    assert "403" in str(raised(hub_client("hf_visitor"), "api.auth_check('org/guarded', write=True)"))
    assert hub.head("org/guarded") == head and hub.repo("org/guarded").refs().keys() == {"refs/heads/main"}


def test_a_wrong_token_is_told_as_such(owner):
    error = raised(owner, "HfApi(token='hf_wrong').model_info('org/here')")
    assert error.type == "HfHubHTTPError" and "Invalid credentials in Authorization header" in str(error)


def test_gated_files_are_for_those_who_were_let_in(owner, hub_client):
    owner.run("api.create_repo('org/gated'); api.update_repo_settings('org/gated', gated='manual')")
    visitor = hub_client("hf_visitor")
    assert visitor.run(f"{API}\nresult = api.model_info('org/gated').gated") == "manual"
    for client in (visitor, hub_client()):
        error = raised(client, "api.hf_hub_download('org/gated', '.gitattributes')")
        assert error.type == "GatedRepoError" and "is restricted" in str(error)
    assert raised(visitor, "api.auth_check('org/gated')").type == "GatedRepoError"
    owner.run("api.grant_access('org/gated', 'visitor')")
    visitor.run("api.auth_check('org/gated'); api.hf_hub_download('org/gated', '.gitattributes')")


def test_a_moved_repository_leads_on_and_a_deleted_one_is_gone(hub, owner):
    owner.run("""
        api.create_repo('owner/old')
        api.upload_file(path_or_fileobj=b'kept', path_in_repo='a.txt', repo_id='owner/old')
        api.move_repo('owner/old', 'org/new')
        result = open(api.hf_hub_download('owner/old', 'a.txt')).read(), api.model_info('owner/old').id
        """)
    assert hub.files("org/new")["a.txt"] == b"kept"
    assert owner.run(
        "result = open(api.hf_hub_download('owner/old', 'a.txt')).read(), api.model_info('owner/old').id"
    ) == [
        "kept",
        "org/new",
    ]
    owner.run("api.delete_repo('org/new')")
    assert raised(owner, "api.delete_repo('org/new')").type == "RepositoryNotFoundError"
    owner.run("api.delete_repo('org/new', missing_ok=True); api.create_repo('org/new')")
    assert hub.files("org/new").keys() == {".gitattributes"}


def test_unknown_calls_are_not_found(hub, owner):
    owner.run("api.create_repo('org/here', exist_ok=True)")
    for path in ("/api/agent-harnesses", "/api/models/org/here/xet-read-token/main", "/v1/telemetry", "/nothing"):
        status, headers, _ = hub.ask("GET", path)
        assert (status, headers.get("x-error-code")) == (404, None)
