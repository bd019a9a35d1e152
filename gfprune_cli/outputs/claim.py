"""The frame of a run: an output that it alone works on, from the first check to the last rename."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gfprune_cli.errors import UsageError
from gfprune_cli.outputs.durable import check_destination, is_output, refuse_overlaps
from gfprune_cli.outputs.locks import claimed
from gfprune_cli.outputs.state import StateFolder
from gfprune_cli.recipes.run_options import RunOptions


@dataclass(frozen=True)
class Claim:
    """The output of one run.

    Args:
        destination: the folder, or the file, that will appear when the run is done.
        force: replace what is there, and discard the state of an interrupted run.
        resume: go on from that state.
        main: whether this process writes.
    """

    destination: Path
    force: bool
    resume: bool
    main: bool = True

    @property
    def finished(self) -> bool:
        """Whether the run to be continued may have ended: an output is there, which may be its own."""
        return self.resume and not self.force and is_output(self.destination)

    def refuse_inputs(self, inputs: Mapping[str, Path | str | None]) -> None:
        """Refuse to replace what the run reads: flag -> what it names."""
        refuse_overlaps(self.destination, inputs)

    def state(self, identity: Mapping[str, Any]) -> StateFolder:
        """The resumable state beside the output, as yet untouched."""
        return StateFolder(self.destination, identity, writes=self.main)

    def prepare(self, state: StateFolder) -> None:
        """Discard or refuse the state of an earlier run, unless it is to be continued."""
        if self.force and not self.resume:
            state.clear()
        self.refuse_state()

    def refuse_state(self) -> None:
        """Refuse the state of an earlier run.

        Raises:
            UsageError: there is one, and neither flag says what to do with it.
        """
        state = self.state({})
        if state.exists() and not (self.force or self.resume):
            raise UsageError(
                f"an interrupted run left its state in {state.folder}: "
                "continue it with --resume, or discard it with --force"
            )


@contextmanager
def claim(
    destination: Path,
    options: RunOptions,
    *,
    main: bool = True,
    check: Callable[..., None] = check_destination,
) -> Iterator[Claim]:
    """Work on an output as the only run that does; a dry run works on none, and is refused what a run is.

    Args:
        main: whether this process writes; the others only ask what it asks, so that none waits for another.
        check: refuses a destination that cannot be written or is not ours to replace.

    Raises:
        UsageError: the destination is in use; GfpruneError: it cannot be written.
    """
    own = Claim(destination, options.force, options.resume, main)
    resumed = {"resume": True} if options.resume else {}
    asked = partial(check, destination, force=options.force, **resumed)
    if not main or options.dry_run:
        asked()
    with claimed(destination, asked) if main and not options.dry_run else nullcontext():
        yield own
