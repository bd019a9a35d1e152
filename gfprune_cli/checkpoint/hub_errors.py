"""What can go wrong between here and the Hub, in one line each. None quotes a request: the token is in it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub import constants, errors, is_offline_mode

from gfprune_cli.checkpoint.files import quoted
from gfprune_cli.errors import GfpruneError, UsageError


@contextmanager
def explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line.

    `from None` keeps its exceptions out of tracebacks: a rejected header is quoted there, token included.
    """
    try:
        yield
    except (GfpruneError, KeyboardInterrupt):
        raise
    except Exception as error:
        explained = _explain(error, repo_id, revision)
        if explained is None:
            raise
        raise explained from None


def _explain(error: Exception, repo_id: str, revision: str | None) -> GfpruneError | None:
    at = f"{repo_id} (revision {quoted(revision)})" if revision else repo_id
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"--model {quoted(repo_id)} is not a Hub id: it looks like owner/name")
    if isinstance(error, errors.GatedRepoError):
        return GfpruneError(f"{repo_id} is gated: accept its terms on its Hub page and set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        return GfpruneError(
            f"{repo_id} is no folder here, and not on the Hub, or is private: check the id, or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return GfpruneError(f"{repo_id} has no revision {quoted(revision or 'main')}: check --revision")
    if isinstance(error, errors.DisabledRepoError):
        return GfpruneError(f"{repo_id} was disabled on the Hub: choose another model")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        refused = status in (401, 403)
        advice = "check HF_TOKEN" if refused else "try again later, or HF_HUB_OFFLINE=1 for a cached copy"
        return GfpruneError(f"the Hub ({host()}) answered HTTP {status} for {at}: {advice}")
    # After the HTTP answers: what is left of these means "not in the cache" or "no connection".
    if isinstance(error, errors.IncompleteSnapshotError):
        return GfpruneError(f"only a part of {at} is in the Hub cache: run once with network access")
    return _explain_transport(error, at)


def _explain_transport(error: Exception, at: str) -> GfpruneError | None:
    unreachable = GfpruneError(
        f"cannot reach the Hub ({host()}) for {at}: check the network, or HF_HUB_OFFLINE=1 for a cached copy"
    )
    base = errors.HfHubHTTPError.__mro__[1]  # HTTPError of the httpx that this huggingface_hub is built on
    if isinstance(error, base):
        return unreachable
    absent = (errors.RevisionResolutionError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    if isinstance(error, absent):
        cause = error.__cause__
        if isinstance(cause, base) and not is_offline_mode():
            return unreachable
        return GfpruneError(
            f"{at} is no folder here and is not in the Hub cache: run once with network access"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return GfpruneError(f"the disk is full while downloading {at}: free some, or point HF_HOME elsewhere")
    if isinstance(error, (errors.FileMetadataError, errors.XetDownloadError, OSError)):
        return GfpruneError(f"downloading {at} failed ({type(error).__name__}): try again")
    if isinstance(error, (ValueError, TypeError, KeyError)):
        return GfpruneError(
            f"{host()} does not answer like a Hub ({type(error).__name__}): check HF_ENDPOINT"
        )
    return None


def check_token(token: str | None) -> None:
    # An HTTP library quotes the header it rejects, so a broken token must not get that far.
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise GfpruneError("HF_TOKEN holds a character that no token has: set it again")


def host() -> str:
    """The endpoint's host, without what else a URL may hold (user, password)."""
    parts = urlsplit(constants.ENDPOINT)
    return parts.netloc.rpartition("@")[2] or "unknown host"
