"""Writing so that nothing is lost: staged beside the destination, made durable, then renamed into place."""

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs.filesystem import give_default_mode, sync, sync_tree
from gfprune_cli.outputs.locks import hidden, own_folder, sweep
from gfprune_cli.runtime.half import as_stored

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: tuple[str, str] = ("format", "pt")
) -> None:
    """Write a safetensors file: the same tensors always give the same bytes.

    One metadata key only (more are written in random order), names sorted, and the mode of any other new
    file (safetensors creates its files unreadable for others).
    """
    ordered = {name: as_stored(tensors[name]).detach().cpu().contiguous() for name in sorted(tensors)}
    try:
        save_file(ordered, path, metadata=dict([metadata]))
    except (
        SafetensorError
    ) as error:  # it wraps the system's errors; unwrap, so that a full disk is known as one
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    give_default_mode(path)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def write_file(path: Path, content: bytes) -> None:
    """Write one file that appears whole or not at all.

    Raises:
        GfpruneError: it cannot be written; what was there is as it was.
    """
    try:
        with replacing(path) as staging:
            staging.write_bytes(content)
    except OSError as error:
        raise not_written(error, str(path), path.parent, len(content)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when the block ends, and vanishes when it fails.

    What killed runs left of the same file is removed first.
    """
    sweep(path)
    with own_folder(path) as folder:
        staging = folder / path.name
        yield staging
        sync(staging)
        staging.replace(path)
        sync(path.parent)


def not_written(error: OSError, what: str, folder: Path, needed: int, advice: str = "") -> GfpruneError:
    """What to raise when the system refuses a write of `needed` bytes into a folder."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return free_space_error(folder, needed, error)
    return GfpruneError(f"cannot write {what}: {error.strerror or error}{advice}")


def free_space_error(folder: Path, needed: int, error: OSError) -> GfpruneError:
    free = shutil.disk_usage(folder).free
    return GfpruneError(
        f"no space left in {folder}: {needed:,} bytes are needed and {free:,} are free ({error.strerror}); "
        "nothing was changed there. Free some space, or choose another --out"
    )


@contextmanager
def staged(destination: Path, *, force: bool, needed: int = 0) -> Iterator[Path]:
    """A folder that becomes `destination` when the block ends, and vanishes when it fails.

    Args:
        destination: must not exist, or be empty, unless `force`.
        needed: bytes that will be written, for the message when the disk is full.

    Raises:
        UsageError: the destination is in use.
        GfpruneError: the disk is full or not writable; the destination is as it was.
    """
    check_destination(destination, force=force)
    with staging_folder(destination, needed) as staging:
        yield staging
        sync_tree(staging)
        replace_folder(staging, destination, force=force)


@contextmanager
def staging_folder(destination: Path, needed: int) -> Iterator[Path]:
    """A hidden folder beside `destination` that vanishes when the block ends; system errors in one line."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with own_folder(destination) as staging:
            yield staging
    except OSError as error:
        raise not_written(error, str(destination), destination.parent, needed, "; check --out") from error


def check_space(destination: Path, needed: int) -> None:
    """Refuse, before any work, what cannot fit: not every library survives a full disk.

    Raises:
        GfpruneError: fewer than `needed` bytes are free.
    """
    parent = existing_parent(destination)
    if shutil.disk_usage(parent).free < needed:
        raise free_space_error(parent, needed, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def existing_parent(destination: Path) -> Path:
    return next(folder for folder in destination.absolute().parents if folder.exists())


def check_destination(destination: Path, *, force: bool, resume: bool = False) -> None:
    """Refuse, before any work, what cannot be written and what the user did not offer up.

    `--force` replaces only what gfprune wrote: a folder with a gfprune.json. With `--resume` such a folder
    may be the output of the very run that is resumed; the caller has to make sure before it is replaced.
    """
    check_name(destination)
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        kind = "link" if destination.is_symlink() else "file"
        raise UsageError(f"--out {destination} is a {kind}: name a folder")
    if destination.name in ("", "..") or destination.resolve() == Path.cwd():
        raise UsageError(f"--out {str(destination)!r}: name a folder below the current one, or elsewhere")
    if os.path.ismount(destination):
        raise UsageError(f"--out {destination} is a mount point and cannot be replaced: name a folder in it")
    if destination.is_dir() and any(destination.iterdir()):
        if not (force or (resume and is_output(destination))):
            raise UsageError(
                f"--out {destination} exists and is not empty: use --force to replace it, or another --out"
            )
        if not is_output(destination):
            raise UsageError(
                f"--out {destination} has no gfprune.json, and --force replaces only what gfprune wrote: "
                "name another --out"
            )
    check_writable(destination)


def check_name(destination: Path) -> None:
    """Refuse a name that neither JSON nor a model card can hold, nor the terminal.

    Raises:
        UsageError: it is no text, but bytes in another encoding, as old archives leave them.
    """
    try:
        str(destination).encode("utf-8")
        os.fsencode(destination)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"--out {str(destination)!a}: the name is not text in UTF-8: name an output with --out"
        ) from error


def check_writable(destination: Path) -> None:
    """Refuse a destination whose nearest folder that exists cannot be written to."""
    parent = existing_parent(destination)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise GfpruneError(f"{parent} is not writable: choose another --out")


def refuse_overlaps(destination: Path, inputs: Mapping[str, Path | str | None]) -> None:
    """Refuse an output that would replace an input, or a folder that holds one.

    Args:
        inputs: flag -> what it names; None, or nothing, where it was not given.

    Raises:
        UsageError: which one.
    """
    for flag, used in inputs.items():
        if used and Path(used).resolve().is_relative_to(destination.resolve()):
            raise UsageError(f"--out {destination} would replace {flag} {used}: name another folder")


def is_output(destination: Path) -> bool:
    """Whether gfprune wrote a folder."""
    return (destination / "gfprune.json").is_file()


def replace_folder(staging: Path, destination: Path, *, force: bool) -> None:
    """Rename a finished folder into place; a folder that was there survives until the new one stands."""
    check_destination(destination, force=force)
    if not destination.exists():
        staging.rename(destination)
    elif not exchange(staging, destination):  # the old one is then where staging was, and goes with it
        replace_in_two_steps(staging, destination)
    sync(destination.parent)


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders at once, so that there is one at every moment; False where that is not possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux, not every file system
    return rename is not None and not rename(
        AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE
    )


def replace_in_two_steps(staging: Path, destination: Path) -> None:
    """Likewise; a kill between the steps is what `recover` mends at the next start."""
    old = hidden(destination, f"old-{secrets.token_hex(4)}")
    destination.rename(old)
    try:
        staging.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)
