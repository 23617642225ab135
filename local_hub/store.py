"""Repositories on disk, after git's model: contents by hash, commits that never change, refs that name commits.

A ref is replaced last and at once. A server killed at any moment has lost no commit that it acknowledged, and what it
had not finished is reachable from nowhere. Readers need no lock, also from another process.

    objects/git/<sha1>, objects/lfs/<sha256>    contents
    repos/<type>/<namespace>/<name>/            about.json, commits/<sha>.json, refs/, discussions/<number>.json
    moved/<type>/<namespace>/<name>             the id that a moved repository has now
    incoming/                                   drafts; emptied at the start
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from .disk import move_in, remove_whole, write_json, write_whole
from .errors import no_revision

KINDS = ("models", "datasets", "spaces")
HEADS, TAGS, PULLS, DELETED = "refs/heads/", "refs/tags/", "refs/pr/", "refs/deleted/"
_SHA = re.compile(r"[0-9a-f]{7,40}")


def now() -> str:
    """The only form of a date that the client can read."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def git_sha1(content: bytes) -> str:
    """The id that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of a commit. `oid` is git's id of what git would hold: the content, or the pointer of an LFS file."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def pointer_size(self) -> int:
        return len(pointer(self.sha256 or "", self.size))

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A commit and its whole tree; `id` is the hash of all else."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Entry] = field(repr=False)


def pointer(sha256: str, size: int) -> bytes:
    """What git holds in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Repo:
    """One repository's folder. Whoever writes holds the server's lock of this repository."""

    def __init__(self, store: Store, kind: str, folder: Path) -> None:
        self.store, self.kind, self.folder = store, kind, folder
        self.namespace, self.name = folder.parent.name, folder.name
        self.id = f"{self.namespace}/{self.name}"

    @property
    def about(self) -> dict[str, Any]:
        return json.loads((self.folder / "about.json").read_text("utf-8"))

    def change(self, **settings: Any) -> None:
        write_json(self.folder / "about.json", self.about | settings, self.store.incoming)

    def refs(self, prefix: str = "refs/") -> dict[str, str]:
        """Full names of refs, and their commits."""
        files = [path for path in (self.folder / "refs").rglob("*") if path.is_file()]
        named = {unquote(path.relative_to(self.folder).as_posix()): path.read_text("utf-8") for path in sorted(files)}
        return {name: sha for name, sha in named.items() if name.startswith(prefix)}

    def set_ref(self, ref: str, sha: str) -> None:
        write_whole(self._ref(ref), sha.encode(), self.store.incoming)

    def delete_ref(self, ref: str) -> None:
        """Its commits stay reachable by their hashes, as they may be pinned."""
        sha = self._ref(ref).read_text("utf-8")
        move_in(self._ref(ref), self._ref(DELETED + sha))

    def _ref(self, ref: str) -> Path:
        kind, _, name = ref.removeprefix("refs/").partition("/")
        return self.folder / "refs" / kind / quote(name, safe="")

    def ref_of(self, revision: str) -> str | None:
        """The full name of the ref that is meant, if it is there."""
        names = [revision] if revision.startswith((HEADS, TAGS, PULLS)) else [HEADS + revision, TAGS + revision]
        return next((name for name in names if self._ref(name).is_file()), None)

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag, a pull request's ref or a (shortened) hash means.

        Raises:
            HubError: RevisionNotFound; also for a commit that was written but never acknowledged.
        """
        if ref := self.ref_of(revision):
            return self._ref(ref).read_text("utf-8")
        if _SHA.fullmatch(revision):
            found = {
                commit.id
                for head in set(self.refs().values())
                for commit in self.history(head)
                if commit.id.startswith(revision)
            }
            if len(found) == 1:
                return found.pop()
        raise no_revision(revision)

    def commit(self, revision: str) -> Commit:
        return _read_commit(self.folder / "commits" / f"{self.resolve(revision)}.json")

    def history(self, sha: str | None) -> Iterator[Commit]:
        """Newest first."""
        while sha:
            commit = _read_commit(self.folder / "commits" / f"{sha}.json")
            yield commit
            sha = commit.parent

    def write_commit(self, files: dict[str, Entry], parent: str | None, title: str, message: str, author: str) -> str:
        """Write a commit that no ref names yet."""
        listing = {path: files[path] for path in sorted(files)}
        return _write_commit(self.folder, self.store.incoming, listing, parent, title, message, author)

    def read(self, entry: Entry) -> bytes:
        return self.store.content(entry).read_bytes()

    def discussions(self) -> list[dict[str, Any]]:
        """Newest first, pull requests among them."""
        files = (self.folder / "discussions").glob("*.json")
        return sorted((json.loads(path.read_text("utf-8")) for path in files), key=lambda each: -each["num"])

    def write_discussion(self, discussion: dict[str, Any]) -> None:
        write_json(self.folder / "discussions" / f"{discussion['num']}.json", discussion, self.store.incoming)


class Store:
    """All repositories under a root folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.incoming = root, root / "incoming"

    def prepare(self) -> None:
        """For the server, before it listens: drafts of a killed one are of no use."""
        shutil.rmtree(self.incoming, ignore_errors=True)
        self.incoming.mkdir(parents=True)

    def content(self, entry: Entry) -> Path:
        return self.lfs(entry.sha256) if entry.sha256 else self.root / "objects" / "git" / entry.oid

    def lfs(self, sha256: str) -> Path:
        return self.root / "objects" / "lfs" / sha256

    def add(self, content: bytes) -> Entry:
        """Keep a regular file's content."""
        entry = Entry(git_sha1(content), len(content))
        if not self.content(entry).is_file():
            write_whole(self.content(entry), content, self.incoming)
        return entry

    def lfs_entry(self, sha256: str) -> Entry | None:
        """A large file, if its content has arrived."""
        file = self.lfs(sha256)
        return (
            Entry(git_sha1(pointer(sha256, file.stat().st_size)), file.stat().st_size, sha256)
            if file.is_file()
            else None
        )

    def find(self, kind: str, repo_id: str) -> Repo | None:
        """By the id in any case."""
        namespace, _, name = repo_id.lower().partition("/")
        for owner in self._folders(self.root / "repos" / kind):
            for folder in self._folders(owner) if owner.name.lower() == namespace else ():
                if folder.name.lower() == name:
                    return Repo(self, kind, folder)
        return None

    def all(self, kind: str) -> list[Repo]:
        return [
            Repo(self, kind, folder)
            for owner in self._folders(self.root / "repos" / kind)
            for folder in self._folders(owner)
        ]

    @staticmethod
    def _folders(folder: Path) -> list[Path]:
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def create(self, kind: str, repo_id: str, author: str, first: dict[str, bytes], **settings: Any) -> Repo:
        """A repository with its first commit; it appears when all of it is there."""
        draft, files = self.incoming / uuid.uuid4().hex, {path: self.add(content) for path, content in first.items()}
        draft.mkdir()
        sha = _write_commit(draft, self.incoming, files, None, "initial commit", "", author)
        write_whole(draft / "refs" / "heads" / "main", sha.encode(), self.incoming)
        write_json(
            draft / "about.json",
            {"_id": uuid.uuid4().hex[:24], "createdAt": now(), "gated": False, **settings},
            self.incoming,
        )
        folder = self.root / "repos" / kind / repo_id
        move_in(draft, folder)
        (self.root / "moved" / kind / repo_id.lower()).unlink(missing_ok=True)
        return Repo(self, kind, folder)

    def delete(self, repo: Repo) -> None:
        remove_whole(repo.folder, self.incoming)

    def move(self, repo: Repo, repo_id: str) -> None:
        """The old id leads to the new one from now on."""
        write_whole(self.root / "moved" / repo.kind / repo.id.lower(), repo_id.encode(), self.incoming)
        move_in(repo.folder, self.root / "repos" / repo.kind / repo_id)

    def moved(self, kind: str, repo_id: str) -> str | None:
        pointer = self.root / "moved" / kind / repo_id.lower()
        return pointer.read_text("utf-8") if pointer.is_file() else None


def _write_commit(
    folder: Path, incoming: Path, files: dict[str, Entry], parent: str | None, title: str, message: str, author: str
) -> str:
    body = {"parent": parent, "title": title, "message": message, "author": author, "date": now()}
    body["files"] = {path: asdict(entry) for path, entry in files.items()}
    sha = hashlib.sha1(json.dumps(body).encode(), usedforsecurity=False).hexdigest()
    write_json(folder / "commits" / f"{sha}.json", body, incoming)
    return sha


@lru_cache(maxsize=512)
def _read_commit(path: Path) -> Commit:
    """A commit never changes, so that it's read once."""
    body = json.loads(path.read_text("utf-8"))
    files = {name: Entry(**entry) for name, entry in body.pop("files").items()}
    return Commit(path.stem, files=files, **body)
