"""Pages and files that commands write beside their result."""

import os
from pathlib import Path

LONGEST_NAME = 200  # bytes; file systems take 255, and the staging file beside has a longer name


def check_page(path: Path, *, force: bool, flag: str = "--html") -> None:
    """Refuse before the work, not after it."""
    from gfprune_cli.errors import UsageError

    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UsageError(f"{flag}: the file name has more than {LONGEST_NAME} bytes: choose a shorter one")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: name a file in a folder that exists")
    if path.exists() and not force:
        raise UsageError(f"{flag} {path} exists: use --force to replace it, or another name")


def write_page(path: Path, page: str) -> None:
    """The page appears whole or not at all."""
    from gfprune_cli.checkpoint.durable import write_file

    write_file(path, page.encode())
