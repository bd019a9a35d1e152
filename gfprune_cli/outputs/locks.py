"""Who works where: locks, staging folders that die with their owners, and what killed runs left."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from gfprune_cli.errors import GfpruneError, UsageError

LOCK_ATTEMPTS = 5


def hidden(destination: Path, suffix: str) -> Path:
    """A name beside the destination that listings leave out."""
    return destination.parent / f".{destination.name}.gfprune-{suffix}"


def state_folder(destination: Path) -> Path:
    """Where the state of a run lies: hidden beside its output."""
    return hidden(destination, "state")


def lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


@contextmanager
def exclusive(folder: Path, *, what: str = "") -> Iterator[None]:
    """Keep other runs away from a folder; the lock lies beside it and dies with the process.

    Args:
        folder: need not exist; the lock is `NAME.lock` beside it.
        what: how to call it in the message, instead of its path.

    Raises:
        UsageError: another run works there; GfpruneError: the lock cannot be made.
    """
    path = lock_of(folder)
    descriptor, made = open_lock(path)
    try:
        if not locked(descriptor, path):
            raise UsageError(
                f"another run is working in {what or folder}: wait for it, or name another output"
            )
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
        remove_empty(made)


def open_lock(path: Path) -> tuple[int, list[Path]]:
    """A file to lock, and the folders that were made for it, the deepest first."""
    made: list[Path] = []
    for attempt in range(LOCK_ATTEMPTS):
        try:
            made = make_parents(path) or made
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666), made
        except OSError as error:
            # a run that ended may just have removed the folder that it had made for itself
            if isinstance(error, FileNotFoundError) and attempt + 1 < LOCK_ATTEMPTS:
                continue
            remove_empty(made)
            raise GfpruneError(f"cannot write {path}: {error.strerror or error}") from error
    raise AssertionError("the last attempt returns or raises")


def locked(descriptor: int, path: Path) -> bool:
    """Try to lock a file that was opened; whether it is ours, and still the one at its path.

    Raises:
        GfpruneError: the file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        raise GfpruneError(
            f"cannot lock {path} ({error.strerror}): name an output on a file system that has locks"
        ) from error


def make_parents(path: Path) -> list[Path]:
    """Make the folders above a path; those that were missing, the deepest first."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """A run that failed leaves no empty folders behind."""
    for folder in folders:
        with suppress(OSError):  # not empty, or somebody else's by now
            folder.rmdir()


@contextmanager
def claimed(destination: Path, check: Callable[[], None]) -> Iterator[None]:
    """Work on an output as the only run that does, after cleaning up what killed runs left there.

    Args:
        check: refuses a destination that cannot be used; asked before anything is touched, and again when
            an output that a killed run had moved aside is back.

    Raises:
        UsageError: another run works on it; GfpruneError: the lock cannot be made.
    """
    check()
    with exclusive(state_folder(destination), what=f"--out {destination}"):
        restore_output(destination)
        check()
        yield


def restore_output(destination: Path) -> None:
    """Clean up after killed runs: bring back an output that was never replaced, drop staging folders.

    For the one that holds the lock: whatever is there has no owner any more, in this container or another.
    """
    for old in destination.parent.glob(f".{escape(destination.name)}.gfprune-old-*"):
        if destination.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(destination)
    sweep(destination)
    sweep(state_folder(destination))


@contextmanager
def own_folder(destination: Path) -> Iterator[Path]:
    """A new staging folder beside `destination`, removed when the block ends.

    It is locked: the lock dies with the process, and so tells the folders of the dead from those of runs
    that go on, in the caches too, which runs share. Process ids would not: containers each count from 1.
    """
    folder, descriptor = locked_folder(destination)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def locked_folder(destination: Path) -> tuple[Path, int]:
    """A new staging folder, and the descriptor that holds its lock."""
    while True:
        folder = hidden(destination, f"staging-{secrets.token_hex(4)}")
        folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # swept away by another run before it was locked
            continue
        with suppress(OSError):  # some network file systems know no locks; nothing is ever swept there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)


def sweep(destination: Path) -> None:
    """Remove the staging folders beside `destination` whose processes are gone."""
    sweep_folder(destination.parent, escape(destination.name))


def sweep_folder(folder: Path, name: str = "*") -> None:
    """Remove the staging folders in a folder whose processes are gone.

    Args:
        name: a pattern of what they stage.
    """
    for orphan in folder.glob(f".{name}.gfprune-staging-*"):
        remove_abandoned(orphan)


def remove_abandoned(folder: Path) -> None:
    """Remove a staging folder if the process that made it is gone.

    Under the folder's lock: a run that has just made it, and not locked it yet, finds out and makes another.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # another run was faster
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # its process lives
        return
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove a folder at once: a kill meanwhile leaves nothing that could pass for it.

    Raises:
        GfpruneError: it stays.
    """
    doomed = hidden(folder, f"staging-{secrets.token_hex(4)}")
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    except OSError as error:
        raise GfpruneError(f"cannot clear {folder}: {error.strerror}; remove it") from error
    shutil.rmtree(doomed, ignore_errors=True)
