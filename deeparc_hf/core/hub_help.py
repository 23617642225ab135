"""One line of help on huggingface_hub's own errors, which pass through unchanged otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ["hub_help", "is_connection_error", "no_answer", "notes_of"]

_BROKE_OFF = (
    "The upload broke off, and the repository is as its last commit left it. Check the connection and the space on the "
    "disk, and do it again: files that are there already are not sent again."
)
_LOG_IN = "log in (hf auth login) or set HF_TOKEN."
# by the kind of error, those of a narrower kind first
_ADVICE = {
    GatedRepoError: f"{{}} is gated: ask for access on its page on the Hub, then {_LOG_IN}",
    RepositoryNotFoundError: f"Check the spelling of {{}} (ORG/NAME). If it is private, {_LOG_IN}",
    RevisionNotFoundError: "{} has no such branch, tag or commit: see its branches on the Hub, or leave revision out.",
    OfflineModeIsEnabled: "The Hub is not asked while HF_HUB_OFFLINE is set: unset it.",
    LocalEntryNotFoundError: (
        "{} is neither in the cache nor to be reached: check the connection, and that HF_HUB_OFFLINE is not set."
    ),
    EntryNotFoundError: "{} lacks that file: it is not a checkpoint of transformers or timm, or not a whole one.",
}


@contextmanager
def hub_help(repo_id: object, uploads: bool = False) -> Iterator[None]:
    """Add a note to errors of the Hub that leave the block: what to do about it. With `uploads` also to an upload that
    breaks off, for which huggingface_hub and hf_xet raise bare errors of Python.
    """
    try:
        yield
    except Exception as error:
        note, cause = None, error.__cause__
        if isinstance(error, (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled)) or is_connection_error(error):
            note = _help(error, str(repo_id))
        elif uploads and isinstance(error, (RuntimeError, ConnectionError)):
            refused = isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403)
            note = _help(cause, str(repo_id)) if refused else _BROKE_OFF  # type: ignore[arg-type]
        if note is not None and not notes_of(error):
            error.add_note(note)
        raise


def is_connection_error(error: BaseException) -> bool:
    """Whether an error is one of the HTTP library beneath huggingface_hub (httpx, or its successor): no answer came."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2")


def no_answer(repo_id: str, file: str, revision: str | None = None, repo_type: str | None = None) -> Exception | None:
    """Ask the Hub for a file once, without retries, which last for minutes; gives what went wrong where no answer came
    in time (HF_HUB_ETAG_TIMEOUT, else 10 s), else None.
    """
    try:
        get_hf_file_metadata(
            hf_hub_url(repo_id, file, revision=revision, repo_type=repo_type), timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception as error:
        return error if is_connection_error(error) else None
    return None


def notes_of(error: BaseException) -> str:
    """The notes on an error, as one text."""
    return " ".join(getattr(error, "__notes__", ()))


def _help(error: Exception, repo_id: str) -> str:
    if is_connection_error(error):
        return "The Hub cannot be reached: check the connection, and HF_ENDPOINT if it is set."
    for kind, text in _ADVICE.items():
        if isinstance(error, kind):
            return text.format(repo_id)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"The token that is used may not do this to {repo_id}: log in (hf auth login) or set HF_TOKEN, with "
            "write access to it."
        )
    if status == 412:
        return f"Others committed to {repo_id} at the same time, several times. Try again."
    return "Nothing was changed on the Hub by the request that failed. Try again, or see https://status.huggingface.co."
