"""Files go up and come down: by the commit itself, by LFS, in parts;
and never with a token to where contents are kept.
"""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from local_hub import ClientError
from local_hub.store import git_sha1

REPO = "owner/files"
CREATE = """
from huggingface_hub import HfApi, snapshot_download, hf_hub_download
api = HfApi()
api.create_repo(repo, exist_ok=True)
"""


@pytest.fixture(scope="module")
def owner(hub_client):
    client = hub_client("hf_owner")
    client.run(CREATE, repo=REPO)
    return client


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    contents = {
        "config.json": b"{}",
        "a/b/notes.txt": b"notes",
        "empty.txt": b"",
        "model.safetensors": bytes(range(256)) * 40,
        "a b/ü.bin": b"x",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_a_folder_comes_back_as_it_went(hub, owner, folder, tmp_path):
    oid = owner.run(
        "result = api.upload_folder(repo_id=repo, folder_path=folder, commit_message='all').oid", folder=folder
    )
    assert hub.head(REPO) == oid
    assert hub.files(REPO) == contents(folder) | {".gitattributes": hub.files(REPO)[".gitattributes"]}
    large = {path for path, entry in hub.commits(REPO)[0].files.items() if entry.sha256}
    assert large == {"model.safetensors", "a b/ü.bin"}
    owner.run("snapshot_download(repo, local_dir=target); result = snapshot_download(repo)", target=tmp_path)
    assert contents(tmp_path) == hub.files(REPO)


def test_pushing_the_same_makes_no_commit_and_sends_nothing(hub, owner, folder):
    owner.run("api.upload_folder(repo_id=repo, folder_path=folder)", folder=folder)
    before = hub.commits(REPO), len(hub.requests())
    owner.run("api.upload_folder(repo_id=repo, folder_path=folder)", folder=folder)
    assert hub.commits(REPO) == before[0]
    assert not [each for each in hub.requests()[before[1] :] if "/commit/" in each["path"] or each["method"] == "PUT"]


def test_what_is_known_already_is_not_sent_again(hub, owner):
    owner.run("api.upload_file(path_or_fileobj=b'same' * 100, path_in_repo='one.bin', repo_id=repo)")
    sent = [each for each in hub.requests() if each["method"] == "PUT"]
    owner.run("api.upload_file(path_or_fileobj=b'same' * 100, path_in_repo='two.bin', repo_id=repo)")
    assert [each for each in hub.requests() if each["method"] == "PUT"] == sent
    assert hub.files(REPO)["two.bin"] == b"same" * 100


def test_a_large_file_goes_in_parts(hub, owner, tmp_path):
    content = bytes(range(251)) * 42_000
    (tmp_path / "large.txt").write_bytes(content)  # not by its name, but by its size a large file is one
    (tmp_path / "large.bin").write_bytes(content[::-1])
    owner.run("api.upload_folder(repo_id=repo, folder_path=folder, path_in_repo='large')", folder=tmp_path)
    assert hub.files(REPO)["large/large.bin"] == content[::-1]
    assert hub.files(REPO)["large/large.txt"] == content
    parts = [each for each in hub.requests() if each["path"].startswith("/lfs/part/")]
    assert len(parts) == 2 * 3
    assert not any(each["authorized"] for each in parts)


def test_no_token_goes_to_where_contents_are_kept(hub, owner, folder, tmp_path):
    owner.run("api.create_repo('owner/private', private=True, exist_ok=True)")
    owner.run("api.upload_folder(repo_id='owner/private', folder_path=folder)", folder=folder)
    owner.run("hf_hub_download('owner/private', 'model.safetensors', local_dir=target)", target=tmp_path)
    stored = [each for each in hub.requests() if each["path"].startswith("/lfs/")]
    assert {each["method"] for each in stored} >= {"PUT", "GET"}
    assert not any(each["authorized"] for each in stored)
    assert all(each["host"].startswith("localhost:") for each in stored)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def batch(hub, content: bytes, **changes) -> dict:
    known = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)} | changes
    body = json.dumps(
        {"operation": "upload", "transfers": ["basic"], "objects": [known], "hash_algo": "sha256"}
    ).encode()
    status, _, answer = hub.ask("POST", f"/{REPO}.git/info/lfs/objects/batch", body, token="hf_owner")
    assert status == 200
    return json.loads(answer)["objects"][0]


def commit(hub, *lines: dict) -> tuple[int, str]:
    body = b"\n".join(json.dumps(line).encode() for line in ({"key": "header", "value": {"summary": "raw"}}, *lines))
    status, headers, _ = hub.ask("POST", f"/api/models/{REPO}/commit/main", body, token="hf_owner")
    return status, headers.get("x-error-message", "")


def test_only_what_has_the_promised_hash_is_kept(hub, owner):
    content, head = b"what was promised", hub.head(REPO)
    actions = batch(hub, content)["actions"]
    file = {
        "key": "lfsFile",
        "value": {"path": "x.bin", "algo": "sha256", "oid": hashlib.sha256(content).hexdigest(), "size": len(content)},
    }
    assert hub.ask("PUT", actions["upload"]["href"], b"something else...")[0] == 400
    assert hub.ask("PUT", actions["upload"]["href"], content[:-1])[0] == 400
    assert hub.ask("PUT", actions["upload"]["href"].replace("signature=", "signature=0"), content)[0] == 403
    verify = json.dumps({"oid": file["value"]["oid"], "size": len(content)}).encode()
    assert hub.ask("POST", actions["verify"]["href"], verify, token="hf_owner")[0] == 404
    assert commit(hub, file)[0] == 400
    assert hub.head(REPO) == head
    assert hub.ask("PUT", actions["upload"]["href"], content)[0] == 200
    assert hub.ask("POST", actions["verify"]["href"], verify, token="hf_owner")[0] == 200
    assert "actions" not in batch(hub, content)
    assert batch(hub, content, oid="0")["error"]["code"] == 422
    assert commit(hub, {**file, "value": file["value"] | {"size": 1}})[0] == 400
    assert commit(hub, file)[0] == 200
    assert hub.files(REPO)["x.bin"] == content


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/x", "a\\..\\x", "", ".git/config", "a//b"])
def test_paths_that_lead_out_are_refused(hub, owner, path):
    file = {"key": "file", "value": {"path": path, "content": "eA==", "encoding": "base64"}}
    assert commit(hub, file)[0] == 422


def test_malformed_commits_are_refused(hub, owner):
    head = hub.head(REPO)
    assert commit(hub, {"key": "file", "value": {"path": "x.txt", "content": "?", "encoding": "base64"}})[0] == 400
    assert commit(hub, {"key": "new", "value": {"path": "x.txt"}})[0] == 400
    assert commit(hub, {"key": "deletedFile", "value": {"path": "nothing"}})[0] == 404
    assert (
        commit(hub, {"key": "file", "value": {"path": ".gitattributes/x", "content": "eA==", "encoding": "base64"}})[0]
        == 422
    )
    assert hub.ask("POST", f"/api/models/{REPO}/commit/main", b"no json", token="hf_owner")[0] == 400
    assert hub.head(REPO) == head


def test_etags_and_ranges(hub, owner):
    regular, large = b"some regular text", b"a large file's content"
    owner.run(
        "api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id=repo)",
        text=regular.decode(),
        name="regular.txt",
    )
    owner.run(
        "api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id=repo)",
        text=large.decode(),
        name="large.bin",
    )
    status, headers, body = hub.ask("HEAD", f"/{REPO}/resolve/main/regular.txt")
    assert (status, headers["etag"], headers["content-length"], body) == (
        200,
        f'"{git_sha1(regular)}"',
        str(len(regular)),
        b"",
    )
    assert headers["x-repo-commit"] == hub.head(REPO)
    status, headers, _ = hub.ask("HEAD", f"/{REPO}/resolve/main/large.bin")
    assert (status, headers["x-linked-etag"], headers["x-linked-size"]) == (
        302,
        f'"{hashlib.sha256(large).hexdigest()}"',
        str(len(large)),
    )
    location = headers["location"]
    assert re.match(r"http://localhost:\d+/lfs/", location)
    for url, content in ((f"/{REPO}/resolve/main/regular.txt", regular), (location, large)):
        assert hub.ask("GET", url)[2] == content
        status, headers, body = hub.ask("GET", url, Range="bytes=5-")
        assert (status, body, headers["content-range"]) == (
            206,
            content[5:],
            f"bytes 5-{len(content) - 1}/{len(content)}",
        )
        assert hub.ask("GET", url, Range="bytes=2-4")[2] == content[2:5]
        assert hub.ask("GET", url, Range=f"bytes={len(content)}-")[0] == 416
    assert hub.ask("GET", location.replace("signature=", "signature=f"))[0] == 403


def test_an_interrupted_download_goes_on_where_it_stopped(hub, owner, tmp_path):
    content = bytes(range(256)) * 1000
    (tmp_path / "model.bin").write_bytes(content)
    (tmp_path / "half").write_bytes(content[:100_000])
    code = """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    api.upload_file(path_or_fileobj=file, path_in_repo='model.bin', repo_id=repo)
    found = get_hf_file_metadata(hf_hub_url(repo, 'model.bin'))
    with open(half, 'ab') as target:
        http_get(found.location, target, resume_size=target.tell(), expected_size=found.size)
    """
    owner.run(code, file=tmp_path / "model.bin", half=tmp_path / "half")
    assert (tmp_path / "half").read_bytes() == content
    last = hub.requests()[-1]
    assert (last["status"], last["range"]) == (206, "bytes=100000-")


def test_what_is_cached_is_not_loaded_again(hub, owner):
    owner.run(
        "api.upload_file(path_or_fileobj=b'x', path_in_repo='cached.txt', repo_id=repo); hf_hub_download(repo, "
        "'cached.txt')"
    )
    before = len(hub.requests())
    owner.run("result = hf_hub_download(repo, 'cached.txt')")
    assert [each["method"] for each in hub.requests()[before:]] == ["HEAD"]


def test_a_long_tree_comes_in_pages(hub, owner):
    code = """
    from huggingface_hub import CommitOperationAdd
    api.create_repo('owner/many')
    adds = [CommitOperationAdd(f'part-{n % 7}/{n:04d}.txt', b'%d' % (n % 10)) for n in range(1100)]
    api.create_commit('owner/many', adds, commit_message='many')
    found = list(api.list_repo_tree('owner/many', recursive=True))
    top = [each.path for each in api.list_repo_tree('owner/many')]
    some = list(api.list_repo_tree('owner/many', 'part-1', expand=True))
    result = [each.path for each in found], top, [(each.path, each.last_commit.title) for each in some]
    """
    paths, top, some = owner.run(code)
    files = set(hub.files("owner/many"))
    folders = {f"part-{n}" for n in range(7)}
    assert set(paths) == files | folders and len(paths) == len(files) + 7
    assert set(top) == folders | {".gitattributes"}
    assert len(some) == 157 and {title for _, title in some} == {"many"}
    pages = [each for each in hub.requests() if each["path"].startswith("/api/models/owner/many/tree/")]
    assert len(pages) == 2 + 1 + 4


def test_facts_about_files(hub, owner):
    owner.run("api.upload_file(path_or_fileobj=b'12345', path_in_repo='facts.bin', repo_id=repo)")
    blob, lfs = owner.run("""
        info = api.model_info(repo, files_metadata=True)
        [file] = [each for each in info.siblings if each.rfilename == 'facts.bin']
        [path] = api.get_paths_info(repo, ['facts.bin', 'nothing'], expand=True)
        assert path.last_commit.oid == info.sha and path.lfs.sha256 == file.lfs.sha256
        result = file.blob_id, vars(file.lfs)
        """)
    entry = hub.commits(REPO)[0].files["facts.bin"]
    assert (blob, lfs["sha256"], lfs["size"]) == (entry.oid, entry.sha256, 5)


def test_files_and_folders_are_deleted_and_copied(hub, owner):
    owner.run("""
        from huggingface_hub import CommitOperationAdd as Add, CommitOperationCopy as Copy
        from huggingface_hub import CommitOperationDelete as Delete
        files = [Add('gone/a.txt', b'a'), Add('gone/b.bin', b'b'), Add('c.txt', b'c')]
        api.create_commit(repo, files, commit_message='three')
        copies = [Copy('gone/b.bin', 'kept/b.bin'), Copy('c.txt', 'kept/c.txt')]
        api.create_commit(repo, copies, commit_message='copies')
        api.delete_folder('gone', repo)
        api.delete_file('c.txt', repo)
        """)
    files = hub.files(REPO)
    assert (files["kept/b.bin"], files["kept/c.txt"]) == (b"b", b"c")
    assert not [path for path in files if path.startswith("gone/") or path == "c.txt"]
    with pytest.raises(ClientError, match="A file with this name doesn't exist"):
        owner.run("api.delete_file('c.txt', repo)")


def test_ignored_files_stay_at_home(hub, owner):
    owner.run("""
        api.create_repo('owner/ignoring')
        from huggingface_hub import CommitOperationAdd as Add
        ignored = b'*.log' + bytes([10]) + b'build/'
        files = {'.gitignore': ignored, 'x.log': b'x', 'build/y.txt': b'y', 'z.txt': b'z'}
        files = [Add(name, content) for name, content in files.items()]
        api.create_commit('owner/ignoring', files, commit_message='some')
        """)
    assert hub.files("owner/ignoring").keys() == {".gitattributes", ".gitignore", "z.txt"}
