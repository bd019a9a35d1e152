"""Imports, and installations that cannot work: no docstrings, packages that do not fit each other."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

from gfprune_cli.checkpoint.files import shortened
from gfprune_cli.errors import UsageError

# as diffusers and transformers say that importing a part of themselves failed
_IMPORTING = ("Failed to import", "Could not import module")
_PASSING_ON = ("gfprune_cli", "diffusers", "transformers", "importlib", "__main__")


def check_interpreter() -> None:
    """Refuse an interpreter that strips docstrings.

    Raises:
        UsageError: transformers builds its classes from them, and cannot be imported.
    """
    if sys.flags.optimize > 1:
        raise UsageError(
            "PYTHONOPTIMIZE=2 (python -OO) strips the docstrings that transformers is built from: unset it"
        )


@contextmanager
def importing() -> Iterator[None]:
    """What is imported stays: half a million objects are looked through neither now nor later."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def broken_import(error: BaseException) -> str | None:
    """Which package cannot be imported, and why; None where an error is no failed import of a library."""
    if not str(error).startswith(_IMPORTING):
        return None
    while str(error).startswith(_IMPORTING) and (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    package = _package_of(error)
    why = shortened(" ".join(str(error).split())) or type(error).__name__
    if package in ("torchvision", "torchaudio"):
        return (
            f"the installed {package} {_version(package)} does not fit torch {_version('torch')} ({why}): "
            f"install the {package} built for it, or pip uninstall {package}, which gfprune does not need"
        )
    return (
        f"{package} {_version(package)} cannot be imported ({why}): install it again, at a version that fits"
    )


def _package_of(error: BaseException) -> str:
    """The package that was being imported: the first in the traceback that does more than pass it on."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in modules]
    for package in packages:
        if package not in _PASSING_ON:
            return package
    name = getattr(error, "name", None)  # of a module that is not there
    return name.partition(".")[0] if isinstance(name, str) else next(reversed(packages), "a library")


def _version(package: str) -> str:
    from gfprune_cli.checkpoint.record import installed_version

    return installed_version(package) or "(of unknown version)"
