"""SIGINT, SIGTERM and SIGHUP: the first one asks the run to save and stop, the second one ends it."""

import os
import select
import signal
import threading
import time
from types import FrameType
from typing import Any

from gfprune_cli.errors import Interrupted
from gfprune_cli.runtime.launch import joined, launched

PATIENCE = 8.0  # seconds from a signal to the next event, before the run is stopped where it is
LAST_CALL = 1.0  # and from there to the end of the process, whatever it is doing
REPEAT = 0.5  # within this time the same signal is the first one again: `timeout` and shells send it twice
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """What arrived so far, and what is still to come of it.

    Python runs signal handlers between two steps of the main thread, so never within one long call into a
    library. A thread therefore reads the numbers of arriving signals from a pipe that the system's own
    handler writes to, and ends the process when the main thread cannot.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        self.taken = threading.Event()  # the run knows: it may take its time to save
        self.lost_patience = False
        self.pipe: tuple[int, int] | None = None
        self.before: dict[int, Any] = {}  # the handlers that were there

    def listen(self) -> None:
        """From now on; signals that whoever started the process chose to ignore (nohup) stay ignored."""
        for number in HANDLED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.arrived)
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self.watch, args=(self.pipe[0],), name="signals", daemon=True).start()

    def close(self) -> None:
        """The run is over: from here on signals end the process in their usual way."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
        if self.pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self.pipe[1])  # the thread reads the end of the pipe, and ends
            self.pipe = None

    def arrived(self, number: int, frame: FrameType | None) -> None:
        """The main thread's part: note it, and start to wait for the next event."""
        if not self.number:
            self.number = number
            if not launched():
                signal.signal(signal.SIGALRM, self.on_patience_lost)
                signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def on_patience_lost(self, number: int, frame: FrameType | None) -> None:
        """No event came in time: stop where the run is. What it saved before stands."""
        self.lost_patience = True
        raise self.interrupted(within_step=True)

    def interrupted(self, *, within_step: bool = False) -> Interrupted:
        """The error that stops the run."""
        name = signal.Signals(self.number).name
        where = " within a long operation" if within_step else ""
        return Interrupted(f"stopped by {name}{where}", self.number, within_step=within_step)

    def take(self) -> None:
        """Let the first signal take effect, if there was one; called at every event, from any thread.

        Raises:
            Interrupted: a signal arrived.
        """
        if self.number:
            self.taken.set()
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise self.interrupted()

    def watch(self, reader: int) -> None:
        """The thread: end the process at the second signal, or when the first one has no effect in time."""
        first, deadline, since = 0, 0.0, 0.0
        while True:
            left = max(0.0, deadline - time.monotonic()) if first and not self.taken.is_set() else None
            ready, _, _ = select.select([reader], [], [], left)
            if joined.is_set():  # a launcher repeats the signal that its processes got; they stop together
                first = 0
            elif not ready and not self.taken.is_set():
                end(first, "nothing could be saved within a long operation")
            numbers = os.read(reader, 64) if ready else None
            if numbers == b"":
                os.close(reader)
                return
            for number in numbers or b"":
                if (
                    joined.is_set()
                    or number not in HANDLED
                    or (number == first and time.monotonic() - since < REPEAT)
                ):
                    continue
                if first:
                    end(number, "the second signal, without saving")
                first, since = number, time.monotonic()
                deadline = since + PATIENCE + LAST_CALL


def end(number: int, why: str) -> None:
    """End the process now, from any thread and in the middle of anything."""
    name = signal.Signals(number).name
    try:
        os.write(2, f"error: stopped by {name}, {why}; what was saved before stands\n".encode())
    except OSError:
        pass
    finally:
        os._exit(128 + number)
