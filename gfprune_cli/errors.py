"""What can go wrong, as one line each: what happened, where, and what to do about it."""


class GfpruneError(Exception):
    """A run-time failure (exit code 1). The message is one line and names the next step."""

    exit_code = 1


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
