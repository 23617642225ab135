"""Who asks, and what they may do: the statuses and codes here are those that the real client tells apart."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .disk import write_whole
from .errors import HubError, no_repository
from .store import Repo, Store


@dataclass(frozen=True)
class User:
    """The holder of a token. `spaces` are the namespaces that are theirs: their own and their organizations'."""

    name: str
    role: str
    spaces: frozenset[str]

    @property
    def orgs(self) -> list[str]:
        return sorted(self.spaces - {self.name})


class Access:
    """Tokens, organizations, and the key by which addresses of contents are signed.

    Args:
        store: where the key is kept, so that addresses stay good after a restart.
        tokens: "NAME=TOKEN", or "NAME=TOKEN:read" for one that may not write.
        orgs: "ORG=NAME", once for each member.
    """

    def __init__(self, store: Store, tokens: Iterable[str], orgs: Iterable[str]) -> None:
        members = [tuple(each.split("=", 1)) for each in orgs]
        self._users: dict[str, User] = {}
        for each in tokens:
            name, _, token = each.partition("=")
            token, _, role = token.partition(":")
            spaces = frozenset({name, *(org for org, member in members if member == name)})
            self._users[token] = User(name, role or "write", spaces)
        self._key = _kept_key(store.root / "signing-key", store.incoming)

    def user(self, authorization: str | None) -> User | None:
        """Who a header stands for; nobody without one."""
        if authorization is None:
            return None
        user = self._users.get(authorization.removeprefix("Bearer ").strip())
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def sign(self, *what: object) -> str:
        return hmac.new(self._key, "\n".join(map(str, what)).encode(), hashlib.sha256).hexdigest()

    def check_signature(self, signature: str, *what: object) -> None:
        if not hmac.compare_digest(signature, self.sign(*what)):
            raise HubError(403, "The signature does not fit the request")


def _kept_key(file: Path, incoming: Path) -> bytes:
    if not file.is_file():
        write_whole(file, secrets.token_bytes(32), incoming)
    return file.read_bytes()


def may_see(user: User | None, repo: Repo) -> bool:
    return not repo.about.get("private") or (user is not None and repo.namespace in user.spaces)


def check_visible(user: User | None, repo: Repo | None) -> Repo:
    """A private repository is, for strangers, one that does not exist; to the nameless the Hub says 401 for both."""
    if repo is None or not may_see(user, repo):
        raise no_repository(404 if user else 401)
    return repo


def check_namespace(user: User | None, namespace: str) -> User:
    if user is None:
        raise HubError(401, "Invalid username or password.")
    if namespace not in user.spaces:
        raise HubError(
            403, f'You don\'t have the rights to create or change a repository under the namespace "{namespace}"'
        )
    if user.role != "write":
        raise HubError(403, "This token has no write permission")
    return user


def check_named(user: User | None) -> User:
    if user is None:
        raise HubError(401, "Invalid username or password.")
    return user


def check_files(user: User | None, repo: Repo) -> None:
    """What is gated can be seen by all, but its files are only for those who were let in."""
    about = repo.about
    if not about["gated"] or (
        user is not None and (repo.namespace in user.spaces or user.name in about.get("granted", ()))
    ):
        return
    if user is None:
        raise HubError(
            401, f"Access to {repo.kind[:-1]} {repo.id} is restricted. You must be authenticated.", "GatedRepo"
        )
    message = f"Access to {repo.kind[:-1]} {repo.id} is restricted and you are not in the authorized list."
    raise HubError(403, message, "GatedRepo")
