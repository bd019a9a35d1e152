"""Writing so that nothing is lost: staged beside the destination, made durable, then renamed into place."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gfprune_cli.errors import GfpruneError, UsageError

KEPT_STATES = 2
LOCK_ATTEMPTS = 5


def default_mode() -> int:
    """The mode that the umask gives to new files."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def sync(path: Path) -> None:
    """Make a file's or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: tuple[str, str] = ("format", "pt")
) -> None:
    """Write a safetensors file: the same tensors always give the same bytes.

    One metadata key only (more are written in random order), names sorted, and the mode of any other new
    file (safetensors creates its files unreadable for others).
    """
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    try:
        save_file(ordered, path, metadata=dict([metadata]))
    except (
        SafetensorError
    ) as error:  # it wraps the system's errors; unwrap, so that a full disk is known as one
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(default_mode())


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def write_file(path: Path, content: bytes) -> None:
    """Write one file that appears whole or not at all.

    Raises:
        GfpruneError: it cannot be written; what was there is as it was.
    """
    staging = path.parent / f".{path.name}.gfprune-staging-{os.getpid()}"
    try:
        staging.write_bytes(content)
        sync(staging)
        staging.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise free_space_error(path.parent, len(content), error) from error
        raise GfpruneError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # a name too long cannot be removed either
            staging.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path, *, what: str = "") -> Iterator[None]:
    """Keep other runs away from a folder; the lock lies beside it and dies with the process.

    Args:
        folder: need not exist; the lock is `NAME.lock` beside it.
        what: how to call it in the message, instead of its path.

    Raises:
        UsageError: another run works there; GfpruneError: the lock cannot be made.
    """
    path = folder.with_name(f"{folder.name}.lock")
    descriptor, made = open_lock(path)
    try:
        if not locked(descriptor, path):
            raise UsageError(
                f"another run is working in {what or folder}: wait for it, or name another output"
            )
        try:
            yield
        finally:
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
            return os.open(path, os.O_RDWR | os.O_CREAT, default_mode()), made
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
    with exclusive(hidden(destination, "state"), what=f"--out {destination}"):
        recover(destination)
        check()
        yield


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    staging = hidden(destination, f"staging-{os.getpid()}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise free_space_error(destination.parent, needed, error) from error
        raise GfpruneError(f"cannot write {destination}: {error.strerror or error}; check --out") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def glob_escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def hidden(destination: Path, suffix: str) -> Path:
    """A name beside the destination that listings leave out."""
    return destination.parent / f".{destination.name}.gfprune-{suffix}"


def recover(destination: Path) -> None:
    """Clean up after killed runs: bring back an output that was never replaced, drop staging folders.

    For the one that holds the lock: whatever is there has no owner any more, in this container or another.
    """
    for old in destination.parent.glob(f".{glob_escape(destination.name)}.gfprune-old-*"):
        if destination.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(destination)
    for orphan in destination.parent.glob(f".{glob_escape(destination.name)}.gfprune-staging-*"):
        shutil.rmtree(orphan, ignore_errors=True)


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuse, before any work, what cannot be written and what the user did not offer up.

    `--force` replaces only what gfprune wrote: a folder with a gfprune.json.
    """
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        kind = "link" if destination.is_symlink() else "file"
        raise UsageError(f"--out {destination} is a {kind}: name a folder")
    if destination.name in ("", "..") or destination.resolve() == Path.cwd():
        raise UsageError(f"--out {str(destination)!r}: name a folder below the current one, or elsewhere")
    if os.path.ismount(destination):
        raise UsageError(f"--out {destination} is a mount point and cannot be replaced: name a folder in it")
    if destination.is_dir() and any(destination.iterdir()):
        check_replaceable(destination, force=force)
    check_writable(destination)


def check_writable(destination: Path) -> None:
    """Refuse a destination whose nearest folder that exists cannot be written to."""
    parent = existing_parent(destination)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise GfpruneError(f"{parent} is not writable: choose another --out")


def check_replaceable(destination: Path, *, force: bool) -> None:
    """Refuse to replace a folder without `--force`, or one that gfprune did not write."""
    if not force:
        raise UsageError(
            f"--out {destination} exists and is not empty: use --force to replace it, or another --out"
        )
    if not (destination / "gfprune.json").is_file():
        raise UsageError(
            f"--out {destination} has no gfprune.json, and --force replaces only what gfprune wrote: "
            "name another --out"
        )


def replace_folder(staging: Path, destination: Path, *, force: bool) -> None:
    """Rename a finished folder into place; a folder that was there survives until the new one stands."""
    check_destination(destination, force=force)
    old = hidden(destination, f"old-{os.getpid()}")
    if destination.exists():
        destination.rename(old)
    try:
        staging.rename(destination)
    except BaseException:
        if old.exists():
            old.rename(destination)
        raise
    sync(destination.parent)
    shutil.rmtree(old, ignore_errors=True)


class StateFolder:
    """The resumable state of one run: safetensors and JSON, two good states kept.

    Args:
        destination: the output of the run; the state lies hidden beside it.
        identity: what must be equal for a resumed run to end in the same bytes.
    """

    def __init__(self, destination: Path, identity: Mapping[str, Any]) -> None:
        self.folder = hidden(destination, "state")
        self.identity = json.loads(json.dumps(identity, sort_keys=True))

    def exists(self) -> bool:
        return bool(self.states())

    def states(self) -> list[Path]:
        """Published states, oldest first."""
        return sorted(self.folder.glob("state-" + "[0-9]" * 6)) if self.folder.is_dir() else []

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest state whose checksum holds.

        Raises:
            UsageError: the state belongs to a run with other settings.
            GfpruneError: states exist and none is intact.
        """
        states = self.states()
        for state in reversed(states):
            try:
                numbers = json.loads((state / "state.json").read_text(encoding="utf-8"))
                intact = numbers["sha256"] == sha256(state / "state.safetensors")
                identity, progress = dict(numbers["identity"]), dict(numbers["numbers"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if not intact:
                continue
            changed = [key for key, value in self.identity.items() if identity.get(key) != value]
            if changed:
                raise UsageError(
                    f"--resume: the state in {self.folder} is of a run with other {', '.join(changed)}: "
                    "repeat the settings of that run, or start over with --force"
                )
            return load_file(state / "state.safetensors"), progress
        if states:
            raise GfpruneError(f"--resume: no state in {self.folder} is intact: start over with --force")
        return None

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Publish a state; the one before the last is removed."""
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        states = self.states()
        number = int(states[-1].name.rpartition("-")[2]) + 1 if states else 0
        staging = self.folder / f"new-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for orphan in self.folder.glob("new-*"):
                shutil.rmtree(orphan, ignore_errors=True)
            staging.mkdir()
            write_tensors(staging / "state.safetensors", tensors)
            digest = sha256(staging / "state.safetensors")
            write_json(
                staging / "state.json",
                {"identity": self.identity, "numbers": dict(numbers), "sha256": digest},
            )
            sync_tree(staging)
            staging.rename(self.folder / f"state-{number:06d}")
            sync(self.folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise free_space_error(self.folder.parent, needed, error) from error
            raise GfpruneError(
                f"cannot write the state in {self.folder}: {error.strerror or error}"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        for old in self.states()[:-KEPT_STATES]:
            shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
