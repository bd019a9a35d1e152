"""Two passes that run in turns, so that what one makes for the other need not be kept until it is over.

    with relayed(lambda hand: run(first, hand)) as ask:    # hand(name, value), anywhere within the first pass
        run(second, ask)                                   # ask(name) -> value, anywhere within the second

The first pass has a thread of its own and goes on only while the second waits for something that it has not
reached.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Hand = Callable[[str, Any], None]
Ask = Callable[[str], Any]


class Stopped(Exception):
    """Ends the first pass where nobody asks any more."""


class Relay:
    """What was handed over and not asked for yet, and whose turn it is."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.handed: dict[str, Any] = {}
        self.wanted: str | None = None
        self.over = self.stopped = False
        self.error: BaseException | None = None

    def hand(self, name: str, value: Any) -> None:
        with self.turn:
            self.handed[name] = value
            self.turn.notify_all()
            self.wait_to_be_asked()

    def wait_to_be_asked(self) -> None:
        while not self.stopped and (self.wanted is None or self.wanted in self.handed):
            self.turn.wait()
        if self.stopped:
            raise Stopped

    def ask(self, name: str) -> Any:
        """What was handed over under a name; None where the first pass never comes to it."""
        with self.turn:
            self.wanted = name
            self.turn.notify_all()
            while name not in self.handed and not self.over:
                self.turn.wait()
            self.wanted = None
            if self.error is not None:
                raise self.error
            return self.handed.pop(name, None)

    def run(self, first: Callable[[Hand], Any], threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            with self.turn:
                self.wait_to_be_asked()
            with torch.no_grad():  # a thread has modes of its own
                first(self.hand)
        except Stopped:
            pass
        except BaseException as error:  # raised again where its results are asked for
            self.error = error
        with self.turn:
            self.over = True
            self.turn.notify_all()


@contextmanager
def relayed(first: Callable[[Hand], Any]) -> Iterator[Ask]:
    """Start a pass whose results can be asked for; it ends with the context at the latest."""
    relay = Relay()
    thread = threading.Thread(target=relay.run, args=(first, torch.get_num_threads()), daemon=True)
    thread.start()
    try:
        yield relay.ask
    finally:
        with relay.turn:
            relay.stopped = True
            relay.turn.notify_all()
        thread.join()
