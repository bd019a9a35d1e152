"""What a file system may not know: making entries durable, and modes. It is asked; a refusal is said once.

SMB shares, FUSE mounts and some NFS servers answer so. Everything is then written as safely as they allow:
staged, whole, renamed into place. A full disk and damaged ones are errors as ever.
"""

import errno
import os
import warnings
from pathlib import Path

UNKNOWN = {errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
DURABILITY = "the file system of the output cannot be told to make writes durable: a power cut may lose them"
MODES = "the file system of the output keeps no file modes: its own decide who may read the files"


class WeakerWrites(UserWarning):
    """Something about the safety of what is written that the file system does not give."""


def sync(path: Path) -> None:
    """Make a file's or a folder's entries durable, where the file system can.

    Raises:
        OSError: it can, and failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        weaker(error, DURABILITY)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def give_default_mode(path: Path) -> None:
    """Give a file the mode that the umask gives to new files; libraries create some that others cannot read.

    Raises:
        OSError: the file system keeps modes, and the file could not be given this one.
    """
    mask = os.umask(0)
    os.umask(mask)
    try:
        path.chmod(0o666 & ~mask)
    except OSError as error:
        weaker(error, MODES)


def weaker(error: OSError, text: str) -> None:
    """Go on where a file system does not know what it was asked; a warning says so.

    Raises:
        OSError: the error, where it is another one.
    """
    if error.errno not in UNKNOWN:
        raise error
    warnings.warn(f"{text} ({error.strerror})", WeakerWrites, stacklevel=2)
