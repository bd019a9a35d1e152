"""Whether a name after `--data` that is no path here can be a data set of the Hub: settled by one request."""

import os
import re
from typing import Any

from gfprune_cli.errors import UsageError

SECONDS = 10.0  # for the Hub to answer; the library of data sets would try for half a minute and more
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# how no data set is called: what ends like this is a file that is not there
_FILES = (".npz", ".npy", ".zip", ".tar", ".gz", ".tgz", ".png", ".jpg", ".jpeg", ".webp", ".parquet")


def looks_like_dataset(source: str) -> bool:
    """Whether a value that names nothing on this machine has the form of a data set's name.

    A folder that is there says that a missing entry of it is meant, and no data set of an owner so called.
    """
    if not _DATASET_ID.fullmatch(source) or source.lower().endswith(_FILES):
        return False
    return not ("/" in source and os.path.isdir(source.partition("/")[0]))


def check_dataset(source: str) -> None:
    """Ask the Hub for a data set.

    Raises:
        UsageError: there is none of that name, or the Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    no_answer: Any = errors.HfHubHTTPError.__mro__[1]  # of the HTTP library that huggingface_hub is built on
    if huggingface_hub.is_offline_mode():  # the cache alone is asked, which takes no time
        return
    try:
        huggingface_hub.HfApi(library_name="gfprune").dataset_info(source, timeout=SECONDS)
    except errors.GatedRepoError:  # it is there: whatever opens it will say what it needs
        return
    except errors.RepositoryNotFoundError:
        raise UsageError(
            f"--data {source!r}: no such folder or .npz file, and no data set of that name on the Hub "
            "(or a private one: set HF_TOKEN)"
        ) from None
    except errors.HfHubHTTPError:  # a mirror that does not answer this question
        return
    except no_answer:
        raise UsageError(  # a path that was mistyped is likelier than a network that is away
            f"--data {source!r}: no such folder or .npz file, and the Hub cannot be asked for a data set of "
            "that name: check the path, or the network"
        ) from None


def missing_offline(source: str) -> UsageError | None:
    """What a data set that cannot be opened means where nothing may be downloaded; None where it may."""
    import huggingface_hub

    if not huggingface_hub.is_offline_mode():
        return None
    return UsageError(
        f"--data {source!r}: no such folder or .npz file, and no data set of that name that can be read "
        "offline: check the path, or unset HF_HUB_OFFLINE"
    )
