"""One command's dealings with the terminal: one sink for results, one map from errors to exit codes."""

import json as json_module
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TextIO

from gfprune_cli.cli.environment import broken_import, check_interpreter
from gfprune_cli.cli.signals import Signals
from gfprune_cli.cli.streams import ResultStream
from gfprune_cli.errors import GfpruneError, Interrupted, UsageError, flags
from gfprune_cli.outputs.filesystem import WeakerWrites
from gfprune_cli.progress import Event
from gfprune_cli.runtime.launch import main_process

LINES_PER_PHASE = 10  # of progress, where there is no terminal to draw a bar on


class Session:
    """Results to stdout, everything else to stderr; signals become `Interrupted` at the next event.

    Args:
        quiet: errors only.
        debug: tracebacks with errors.
        json: the result is a JSON document.
        offline: tell every library in this process to stay off the network.
        check: refuses what the command cannot do in this environment, before anything heavy is imported.
    """

    def __init__(
        self, *, quiet: bool, debug: bool, json: bool, offline: bool, check: Callable[[], None] | None = None
    ) -> None:
        self.check = check
        self.quiet, self.debug, self.json = quiet or not main_process(), debug, json
        self.signals, self.output, self.words = Signals(), ResultStream(), flags()
        self.bar: Any = None
        self.phase, self.shown = "", -1
        self.warnings, self.warned = warnings.catch_warnings(), set[str]()
        self.began, self.first = 0.0, 0  # when and where the phase began, for the time that is left
        if offline:
            os.environ["HF_HUB_OFFLINE"] = "1"

    def __enter__(self) -> Self:
        self.words.__enter__()
        self.signals.listen()
        self.output.divert()
        self.warnings.__enter__()
        quiet_libraries()
        self.show_warnings()
        try:
            check_interpreter()
            if self.check is not None:
                self.check()
        except UsageError as error:
            if not main_process():  # in peace: launchers stop the first process when another one fails
                raise SystemExit(0) from None
            self.__exit__(type(error), error, error.__traceback__)
        return self

    def show_warnings(self) -> None:
        """What the file system cannot do is a notice, and said once."""
        plain = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, WeakerWrites):
                plain(message, category, *place, **more)
            elif str(message) not in self.warned:
                self.warned.add(str(message))
                self.note(f"note: {message}")

        warnings.simplefilter("always", WeakerWrites)
        warnings.showwarning = show

    def progress(self, event: Event) -> None:
        """Show an event; the place where a signal takes effect.

        Raises:
            Interrupted: a signal arrived.
        """
        self.signals.take()
        if self.quiet:
            return
        if event.phase == "notice":
            self.note(f"note: {event.text}")
        elif sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
            self.draw(event)
        else:
            self.print_progress(event)

    def draw(self, event: Event) -> None:
        """A progress bar per phase."""
        from gfprune_cli.cli.bars import Bars

        if self.bar is None:
            self.bar = Bars()
        self.bar.update(event)

    def print_progress(self, event: Event) -> None:
        """A few plain lines per phase, for logs."""
        if not event.total and not event.text:
            return
        repeated = event.phase in ("score", "evaluate")
        tenth = event.step * LINES_PER_PHASE // event.total if event.total else 0
        if event.phase == self.phase and (tenth == self.shown or repeated):
            return
        if event.phase != self.phase:
            self.began, self.first = time.monotonic(), event.step
        self.phase, self.shown = event.phase, tenth
        count = f" {event.step}/{event.total}" if event.total and not repeated else ""
        values = "".join(f"  {name} {value:.4g}" for name, value in event.values.items())
        text = f" {event.text}" if event.text else ""
        left = self.time_left(event) if event.phase == "finetune" else ""
        say(f"{event.phase}{count}{text}{values}{left}")

    def time_left(self, event: Event) -> str:
        done = event.step - self.first
        if not done or event.step >= event.total:
            return ""
        seconds = (time.monotonic() - self.began) / done * (event.total - event.step)
        return f"  {timedelta(seconds=round(seconds))} left"

    def note(self, text: str) -> None:
        self.close_bar()
        if not self.quiet:
            say(text)

    def show(self, renderable: Any) -> None:
        """A table, on stderr."""
        self.close_bar()
        if not self.quiet:
            from rich.console import Console

            console = Console(stderr=True, highlight=False)
            with console.capture() as captured:
                console.print(renderable)
            say(captured.get().rstrip("\n"))

    def result(self, document: dict[str, Any], text: str) -> None:
        """The one thing that goes to stdout."""
        self.close_bar()
        if not main_process():
            return
        self.output.restore()
        try:
            output = json_module.dumps(document, indent=2, allow_nan=False) if self.json else text
            if output:
                put(output)
        except BrokenPipeError:  # the reader has what it wanted
            silence(sys.stdout)
        except OSError as error:
            silence(sys.stdout)
            raise GfpruneError(
                f"the result cannot be written to standard output: {error.strerror or error}; "
                "what the run wrote stands"
            ) from error

    def close_bar(self) -> None:
        if self.bar is not None:
            with suppress(OSError):  # a terminal that is gone
                self.bar.stop()
            self.bar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say what went wrong, and end the process with its code."""
        try:
            self.signals.close()
            self.close_bar()
            self.output.restore()
            self.warnings.__exit__(kind, error, trace)
            if error is None or isinstance(error, SystemExit):
                return
            if self.signals.lost_patience and (not isinstance(error, GfpruneError) or cut_short(error)):
                error = self.signals.interrupted(within_step=True)  # what a library made of it
            if self.debug:
                traceback.print_exception(error)
            if main_process() or not isinstance(error, (UsageError, Interrupted)):  # said once, not by each
                say(f"error: {one_line(error)}")
            raise SystemExit(exit_code(error)) from None
        finally:
            self.words.__exit__(None, None, None)


def put(text: str) -> None:
    """A line on stdout; in the bytes that the file system knows it by where stdout has no such characters."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        sys.stdout.buffer.write(os.fsencode(text) + b"\n")
        sys.stdout.flush()


def say(text: str) -> None:
    """A line on stderr; a reader that went away, or a full disk under a log, does not end the run."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Send what follows nowhere, so that the interpreter does not complain at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def cut_short(error: BaseException | None) -> bool:
    """Whether an error came of a run that was stopped where it was."""
    while error is not None:
        if isinstance(error, Interrupted) and error.within_step:
            return True
        error = error.__context__
    return False


def exit_code(error: BaseException) -> int:
    """130 for an interrupt, the error's own code for ours, 1 for all else."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, GfpruneError) else 1


def one_line(error: BaseException) -> str:
    """What happened, without line breaks or escape codes; for errors that are not ours, what to do next."""
    words = " ".join(str(error).split())
    text = "".join(character if character.isprintable() else "?" for character in words)
    if isinstance(error, GfpruneError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of device memory: {text}; use --device cpu"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:  # PyTorch's own, a RuntimeError
        return "out of memory: ask for a smaller --batch or fewer images, or use a machine with more"
    if (broken := broken_import(error)) is not None:
        return broken
    return f"unexpected {type(error).__name__}: {text}; run again with --debug and report the traceback"


def quiet_libraries() -> None:
    """Libraries log through their own channels; only warnings that name a problem may pass."""
    warnings.filterwarnings("ignore", module=r"(torch|diffusers|torch_pruning|huggingface_hub)\b")
    # diffusers reads it once, at import: no configuration can then switch remote code on
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # each retry would be a warning that quotes the request
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's log; read when torch is imported
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; for equal bytes
