"""One command's dealings with the terminal: one sink for results, one map from errors to exit codes."""

import json as json_module
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

from gfprune_cli.errors import GfpruneError, Interrupted, UsageError
from gfprune_cli.launch import launched, main_process
from gfprune_cli.progress import Event

PATIENCE = 8.0  # seconds from a signal to the next event, before the run is stopped where it is
LINES_PER_PHASE = 10  # of progress, where there is no terminal to draw a bar on


class Session:
    """Results to stdout, everything else to stderr; signals become `Interrupted` at the next event.

    Args:
        quiet: errors only.
        debug: tracebacks with errors.
        json: the result is a JSON document.
        offline: tell every library in this process to stay off the network.
    """

    def __init__(self, *, quiet: bool, debug: bool, json: bool, offline: bool) -> None:
        self.quiet, self.debug, self.json = quiet or not main_process(), debug, json
        self.signal_number = 0
        self.bar: Any = None
        self.phase, self.shown = "", -1
        self.began, self.first = 0.0, 0  # when and where the phase began, for the time that is left
        if offline:
            os.environ["HF_HUB_OFFLINE"] = "1"

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        quiet_libraries()
        return self

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal asks the run to save and stop, the second one ends it."""
        if launched():  # a launcher repeats the signal that its processes got; they stop together
            self.signal_number = self.signal_number or number
            return
        if self.signal_number:
            os._exit(128 + number)
        self.signal_number = number
        signal.signal(signal.SIGALRM, self.on_patience_lost)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def on_patience_lost(self, number: int, frame: FrameType | None) -> None:
        """No event came in time: stop where the run is. What it saved before stands."""
        name = signal.Signals(self.signal_number).name
        raise Interrupted(
            f"stopped by {name} within a long operation; --resume continues", self.signal_number
        )

    def report(self, event: Event) -> None:
        """Show an event; the place where a signal takes effect.

        Raises:
            Interrupted: a signal arrived.
        """
        if self.signal_number:
            signal.setitimer(signal.ITIMER_REAL, 0)  # saving may take its time
            name = signal.Signals(self.signal_number).name
            raise Interrupted(f"stopped by {name}", self.signal_number)
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
        print(f"{event.phase}{count}{text}{values}{left}", file=sys.stderr, flush=True)

    def time_left(self, event: Event) -> str:
        done = event.step - self.first
        if not done or event.step >= event.total:
            return ""
        seconds = (time.monotonic() - self.began) / done * (event.total - event.step)
        return f"  {timedelta(seconds=round(seconds))} left"

    def note(self, text: str) -> None:
        self.close_bar()
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def show(self, renderable: Any) -> None:
        """A table, on stderr."""
        self.close_bar()
        if not self.quiet:
            from rich.console import Console

            Console(stderr=True, highlight=False).print(renderable)

    def result(self, document: dict[str, Any], text: str) -> None:
        """The one thing that goes to stdout."""
        self.close_bar()
        if not main_process():
            return
        try:
            output = json_module.dumps(document, indent=2, allow_nan=False) if self.json else text
            if output:
                print(output, flush=True)
        except BrokenPipeError:
            # the reader has what it wanted; keep the interpreter from complaining at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.close_bar()
        if error is None or isinstance(error, SystemExit):
            return
        if self.debug:
            traceback.print_exception(error)
        if main_process() or not isinstance(error, (UsageError, Interrupted)):  # said once, not by each
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(exit_code(error)) from None


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
    return f"unexpected {type(error).__name__}: {text}; run again with --debug and report the traceback"


def quiet_libraries() -> None:
    """Libraries log through their own channels; only warnings that name a problem may pass."""
    import warnings

    warnings.filterwarnings("ignore", module=r"(torch|diffusers|torch_pruning|huggingface_hub)\b")
    # diffusers reads it once, at import: no configuration can then switch remote code on
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's log; read when torch is imported
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; for equal bytes


__all__ = ["Interrupted", "Session"]
