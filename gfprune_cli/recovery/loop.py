"""The training loop: steps, saved states, what people see, and stopping without loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gfprune_cli.data.latent_decoder import NotShown
from gfprune_cli.data.sample_rows import Samples
from gfprune_cli.errors import Interrupted
from gfprune_cli.progress import Event, Progress, notice
from gfprune_cli.recovery.logs import Watch
from gfprune_cli.recovery.trainer import Stopped, Trainer
from gfprune_cli.runtime.processes import Together


class State(Protocol):
    """Where a run survives a kill: a `StateFolder`, or a part of another command's state."""

    def begin(self) -> None:
        """Say that the run has begun."""

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, numbers) last saved; None at the start."""

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Keep what the next steps depend on; durable when it returns."""


@dataclass
class Loop:
    """One run over one network.

    Args:
        trainer: makes the steps.
        state: where they survive a kill.
        save_every, sample_every: steps between saved states, and between grids; 0 for none.
        samples: the dense row of the grids; None where samples are no pictures.
        open_watch: (steps done) -> where metrics go; None in all processes but the first.
    """

    trainer: Trainer
    state: State
    progress: Progress
    save_every: int
    sample_every: int = 0
    samples: Samples | None = None
    open_watch: Callable[[int], Watch] | None = None
    done: int = 0

    def __post_init__(self) -> None:
        self.heard = Together.of(self.progress, self.trainer.processes)

    def run(self) -> None:
        """Run to the end, from the last durable state if there is one.

        Raises:
            Interrupted: told to stop; the state is saved.
        """
        self.restore()
        if self.trainer.processes.main:
            self.state.begin()  # before the logs, which are then known as this run's
        watch = self.open_watch(self.done) if self.open_watch else None
        try:
            if watch is not None and self.picture_due() and not watch.pictured(self.done):
                self.picture(watch)  # stopped between the state and its grid
            self.steps(watch)
        finally:
            if watch is not None:
                watch.close()

    def restore(self) -> None:
        """Go on from the last durable state, which is let go before the next step."""
        saved = self.state.load()
        if saved is not None:
            tensors, numbers = saved
            self.trainer.restore(tensors, numbers)
            self.done = numbers["done"]
            notice(self.progress, f"continuing after step {self.done}")

    def steps(self, watch: Watch | None) -> None:
        trainer, total = self.trainer, self.trainer.recipe.steps
        while self.done < total:
            try:
                values = trainer.step(self.done, self.stopping)
            except Stopped:
                self.interrupt()
            self.done += 1
            if watch is not None:
                watch.log(self.done, values)
            shown = {"loss": values["loss"], "lr": values["lr"]}
            self.heard(Event("finetune", self.done, total, values=shown))
            if self.done == total or (self.save_every and self.done % self.save_every == 0):
                self.save()
            if self.picture_due():
                self.picture(watch)

    def picture_due(self) -> bool:
        """Whether a grid belongs to the steps done so far."""
        last = self.done == self.trainer.recipe.steps
        return bool(self.sample_every and self.done and (self.done % self.sample_every == 0 or last))

    def stopping(self) -> bool:
        """Asked before every pass: a signal may arrive within a long step."""
        self.heard(Event("pass"))
        return self.heard.stop is not None

    def interrupt(self) -> None:
        self.save()
        stop = self.heard.interrupt()
        raise Interrupted(f"{stop}; the state is saved, continue with --resume", stop.signal_number) from stop

    def save(self) -> None:
        processes = self.trainer.processes
        if processes.main or processes.sharded:
            tensors, numbers = self.trainer.state()
            self.state.save(tensors, {**numbers, "done": self.done})

    def picture(self, watch: Watch | None) -> None:
        """A grid of the averaged weights' samples; given up when the run is to stop."""
        if watch is None or self.samples is None or self.heard.stop is not None:
            return
        samples = self.samples
        try:
            with self.trainer.averaged() as network:
                pruned = samples.drawn_by(network, self.poll)
            watch.picture(self.done, samples.dense, pruned)
        except Stopped:
            pass  # the next step saves and stops, together with the other processes
        except NotShown as reason:
            notice(self.progress, f"no samples are shown: {reason}")
        except OSError as error:
            notice(self.progress, f"no samples were written in {watch.folder}: {error.strerror}")

    def poll(self) -> None:
        if self.stopping():
            raise Stopped
