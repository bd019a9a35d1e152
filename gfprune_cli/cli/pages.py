"""Pages and files that commands write beside their result."""

import os
import re
from pathlib import Path

from gfprune_cli.errors import GfpruneError, UsageError

# How what each flag writes begins: `--force` replaces nothing else. The last is a zip file's first member.
BEGINNINGS = {
    "--html": rb"\s*<!doctype html",
    "--markdown": rb"# ",
    "--save-stats": rb"PK.{28}mu\.npy",
}
LONGEST_NAME = 200  # bytes; file systems take 255, and the staging file beside has a longer name


def check_page(path: Path, *, force: bool, flag: str = "--html") -> None:
    """Refuse before the work, not after it; with `--force` too, a file that is no such page."""
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UsageError(f"{flag}: the file name has more than {LONGEST_NAME} bytes: choose a shorter one")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: name a file in a folder that exists")
    if path.exists() and not force:
        raise UsageError(f"{flag} {path} exists: use --force to replace it, or another name")
    try:
        kept = path.exists() and not replaceable(path, BEGINNINGS[flag])
    except OSError as error:
        raise GfpruneError(f"{flag} {path} cannot be read: {error.strerror or error}") from error
    if kept:
        raise UsageError(f"{flag} {path} is a file of another kind, and --force replaces none: name another")


def replaceable(path: Path, beginning: bytes) -> bool:
    """Whether a file is empty or begins like what will take its place (a pattern)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(1024)
    return not head or re.match(beginning, head, re.IGNORECASE | re.DOTALL) is not None


def write_page(path: Path, page: str) -> None:
    """The page appears whole or not at all."""
    from gfprune_cli.outputs.durable import write_file

    write_file(path, page.encode())
