"""What can go wrong, as one line each: what happened, where, and what to do about it.

Messages are written with flags, `--sample-steps`, and made in the words of the caller: an argument in Python,
`sample_steps`, and where a checkpoint goes by another name there, `--teacher` in the place of `--model`.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

# not within a path or a quoted name
FLAG = re.compile(r"(?<![\w/'\"-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])")
T = TypeVar("T")
_flags: ContextVar[bool] = ContextVar("flags", default=False)
_names: ContextVar[dict[str, str] | None] = ContextVar("names", default=None)


def in_words_of_the_caller(text: str) -> str:
    """A message about options as the caller knows them."""
    names, dashes = _names.get() or {}, _flags.get()

    def written(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        name = names.get(name, name)
        return "--" + name.replace("_", "-") if dashes else name

    return FLAG.sub(written, text)


@contextmanager
def _set(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def flags() -> AbstractContextManager[None]:
    """In the block the caller is a command line."""
    return _set(_flags, True)


def named(**names: str) -> AbstractContextManager[None]:
    """In the block options go by other names: `named(model="teacher")`."""
    return _set(_names, {**(_names.get() or {}), **names})


class GfpruneError(Exception):
    """A run-time failure (exit code 1). The message is one line and names the next step."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(in_words_of_the_caller(message))


class UsageError(GfpruneError):
    """A wrong flag, value or recipe (exit code 2)."""

    exit_code = 2


class GateMissed(GfpruneError):
    """A limit that the user set was missed (exit code 3)."""

    exit_code = 3


class Interrupted(GfpruneError):
    """The run was stopped by a signal (exit code 128 + signal).

    Args:
        within_step: not at an event, but anywhere: what is in memory may be half-changed and is not saved.
    """

    def __init__(self, message: str, signal_number: int, *, within_step: bool = False) -> None:
        super().__init__(message)
        self.within_step = within_step
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
