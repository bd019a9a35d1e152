"""The standard output, kept for the result: what libraries print meanwhile goes to stderr."""

import os
import sys
from contextlib import suppress
from typing import TextIO


class ResultStream:
    """Python's stream and the descriptor below it, which native code writes to."""

    def __init__(self) -> None:
        self.stream: TextIO | None = None
        self.kept: int | None = None  # the descriptor of the real standard output

    def divert(self) -> None:
        """From now on whatever is printed goes to stderr."""
        self.stream, sys.stdout = sys.stdout, sys.stderr
        with suppress(OSError, ValueError):  # no descriptor: a stream in memory, or one that is closed
            number = self.stream.fileno()
            self.stream.flush()
            kept = os.dup(number)
            try:
                os.dup2(sys.stderr.fileno(), number)
            except (OSError, ValueError):
                os.close(kept)
                return
            self.kept = kept

    def restore(self) -> None:
        """Give the standard output back; a second time does nothing."""
        if self.stream is None:
            return
        if self.kept is not None:
            os.dup2(self.kept, self.stream.fileno())
            os.close(self.kept)
            self.kept = None
        sys.stdout, self.stream = self.stream, None
