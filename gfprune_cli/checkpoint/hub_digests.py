"""Whether files of the Hub cache are what the Hub declares them to be: SHA-256, or git's object id.

Large files are declared by their SHA-256, small ones by the id that git gives them (SHA-1 of a header and the
content). huggingface_hub itself compares sizes only.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from gfprune_cli.errors import GfpruneError
from gfprune_cli.progress import Event, Progress

_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
CHUNK = 1 << 24  # bytes between two events


def verify(
    folder: Path,
    names: list[str],
    declared: Mapping[str, str],
    repo_id: str,
    progress: Progress,
    *,
    offline: bool,
) -> None:
    """Compare files of a snapshot with their declared digests; a damaged one leaves the cache.

    Args:
        folder: the snapshot.
        names: files in it; those that are not there are passed over.
        declared: name -> digest, as the server says now. For the others the cache knows what the server said
            when they were downloaded: it names its blobs so.
        offline: whether the remedy needs a network that this run may not use.

    Raises:
        GfpruneError: a file is not what was declared.
    """
    for name in names:
        path = folder / name
        expected = declared.get(name) or path.resolve().name
        if not path.is_file() or not (_SHA256.fullmatch(expected) or _GIT.fullmatch(expected)):
            continue
        found = digest(path, progress, git=len(expected) == 40)
        if found != expected:
            if (blob := path.resolve()).parent.name == "blobs":  # what the snapshot's link leads to
                blob.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            again = "run once with network access" if offline else "try again"
            raise GfpruneError(
                f"{name} of {repo_id} is damaged: its digest is {found[:12]}, and the Hub declares "
                f"{expected[:12]}; it was removed from the cache, {again}"
            )


def digest(path: Path, progress: Progress, *, git: bool) -> str:
    """Hexadecimal SHA-256 of a file, or its id as a git blob."""
    found = hashlib.sha1(usedforsecurity=False) if git else hashlib.sha256()
    if git:
        found.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            progress(Event("load"))  # a place to stop: a large file takes a while
            found.update(chunk)
    return found.hexdigest()
