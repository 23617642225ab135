"""The Hub's refusals: the client picks its exception by the status and by `X-Error-Code`."""

from __future__ import annotations

from collections.abc import Mapping


class HubError(Exception):
    """A refusal that becomes the answer.

    Args:
        status: of HTTP.
        message: for people; also sent as `X-Error-Message`.
        code: `X-Error-Code`, which the client turns into an exception of its own.
        headers: further ones, such as `X-Repo-Commit`, by which the client remembers that a file is missing.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        named = {"X-Error-Message": message.replace("\n", " "), **(headers or {})}
        self.headers = named | ({"X-Error-Code": code} if code else {})


def no_repository(status: int = 404) -> HubError:
    return HubError(status, "Repository not found", "RepoNotFound")


def no_revision(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def no_entry(message: str = "Entry not found", commit: str | None = None) -> HubError:
    return HubError(404, message, "EntryNotFound", {"X-Repo-Commit": commit} if commit else None)
