"""What the arguments of a network are: its sample, its noise level, what differs from sample to sample."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gfprune_cli.diffusion.conditions import AFTER, BEFORE, LEVELS
from gfprune_cli.errors import GfpruneError, Interrupted
from gfprune_cli.inputs.joined import Joined, as_batch
from gfprune_cli.inputs.pictures import ONE_EACH
from gfprune_cli.inputs.pipeline_run import PipelineRun
from gfprune_cli.inputs.rows import as_entries, flattened, own_row, shared_values

SAMPLE_NAMES = ("hidden_states", "sample", "x")
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "timestep_ratio")


@dataclass(frozen=True)
class Names:
    """What the arguments of a network are.

    Args:
        own: that differ from sample to sample.
        lists: that are lists with one entry for each sample.
        nested: that are lists of batches.
        twins: that say the noise level once more.
    """

    sample: str
    timestep: str
    joined: Joined
    own: set[str]
    lists: set[str]
    nested: set[str] = field(default_factory=set)
    twins: tuple[str, ...] = ()

    @staticmethod
    def of(run: PipelineRun, joined: Joined) -> "Names":
        """Seen by asking for the same thing twice; by first dimensions where a pipeline cannot do that."""
        call = run.observer.calls[0]
        sample, timestep = argument_names(run.observer.network, call)
        twins = twins_of(run.observer.calls, timestep)
        left_out, branches = {sample, timestep, *twins}, len(call[sample])
        given = flattened(call, left_out)
        doubles = [flattened(both, left_out) for both in asked_twice(run) if len(both[sample]) > branches]
        grown = Grown.most(given, doubles, branches, pictured=bool(run.filled))
        lists = grown.lists | ({sample} if isinstance(call[sample], list | tuple) else set())
        return Names(sample, timestep, joined, grown.own, lists, grown.nested, twins)

    def arguments(self, call: dict[str, Any]) -> dict[str, Any]:
        """Of one call, with the parts of its sample that are no noise."""
        found = as_entries(flattened(call, {self.sample, self.timestep, *self.twins}), self.nested)
        found |= self.joined.parts(as_batch(call[self.sample]))
        times = call[self.timestep]
        if times.ndim > 1:
            found[LEVELS] = times / times.max().clamp_min(1e-9)
        return found

    def row(self, calls: list[dict[str, Any]], order: Sequence[int]) -> dict[str, torch.Tensor]:
        """[branches, ...] of one prompt, by name."""
        given = [self.arguments(call) for call in calls]
        own = self.own | ({BEFORE, AFTER, LEVELS} & given[0].keys())
        return own_row(given, own, [len(call[self.sample]) for call in calls], order)

    def shared(self, calls: list[dict[str, Any]], branch: int) -> dict[str, Any]:
        """What every sample gets, in the call that has a branch."""
        ends = torch.tensor([len(call[self.sample]) for call in calls]).cumsum(0)
        call = calls[int((ends <= branch).sum())]
        return shared_values(self.arguments(call), self.own | {BEFORE, AFTER, LEVELS})


@dataclass(frozen=True)
class Grown:
    """Arguments that grow with the batch: see `Names`."""

    own: set[str]
    lists: set[str]
    nested: set[str]

    @staticmethod
    def most(
        given: dict[str, Any], doubles: list[dict[str, Any]], branches: int, *, pictured: bool
    ) -> "Grown":
        """Compare a call with the one of those for twice as many samples that shows most.

        Where there is none, as pictures are taken one by one, dimensions must do; and where of several
        pictures the pipeline has looked at the first alone, so that nothing grew.
        """
        found = [Grown.of(given, double, branches, 2) for double in doubles]
        best = max(found, key=lambda one: len(one.own), default=None)
        unlooked = pictured and branches > 1 and best is not None and not best.own
        return Grown.of(given, given, branches, 1) if best is None or unlooked else best

    @staticmethod
    def of(given: dict[str, Any], double: dict[str, Any], branches: int, factor: int) -> "Grown":
        """Compare a call with one for `factor` times as many samples."""
        grown = Grown(set(), set(), set())
        for name, value in given.items():
            kind = growth(value, double.get(name), branches, factor)
            if kind == "entries":
                grown.lists.add(name)
                if isinstance(value[0], torch.Tensor):
                    grown.own.add(name)
            elif kind == "nested":
                grown.nested.add(name)
                grown.own.update(as_entries({name: value}, [name]))
            elif kind == "rows":
                grown.own.add(name)
        return grown


def asked_twice(run: PipelineRun) -> Iterator[dict[str, Any]]:
    """Calls of the network where the pipeline is asked for the same thing twice: with one picture for both,
    then with a picture for each, which some pipelines need and others take for several references."""
    shared = [name for name in run.filled if name not in ONE_EACH]
    try:
        for run.several in (False, True) if shared else (False,):
            try:
                run(0, 0, limit=1)
            except Interrupted:
                raise
            except GfpruneError:
                continue
            yield run.observer.calls[0]
    finally:
        run.several = False


def growth(value: Any, double: Any, branches: int, factor: int) -> str:
    """How an argument grows with the batch: "rows" of a tensor, "entries" of a list, "nested" batches, or "".

    Args:
        double: the same argument for `factor` times as many samples.
        branches: samples in the network's batch.
    """

    def grows(one: Any, other: Any) -> bool:
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or not one.ndim:
            return False
        if factor > 1:
            return len(other) == factor * len(one)
        return len(one) == branches or (one.ndim > 2 and len(one) % branches == 0)  # no table of positions

    if isinstance(value, list | tuple):
        if factor > 1 and isinstance(double, list | tuple) and len(double) == factor * len(value):
            return "entries" if len(value) else ""
        matched = isinstance(double, list | tuple) and len(double) == len(value) > 0
        some = any if factor > 1 else all  # without a second call, none may look like anything else
        return "nested" if matched and some(map(grows, value, double)) else ""
    if grows(value, double):
        return "rows"
    layers = isinstance(value, torch.Tensor) and isinstance(double, torch.Tensor) and value.ndim > 2
    return (
        "nested" if layers and factor > 1 and len(double) == len(value) and grows(value[0], double[0]) else ""
    )


def twins_of(calls: list[dict[str, Any]], timestep: str) -> tuple[str, ...]:
    """Other arguments that are the timestep at every noise level that was seen."""
    levels = {float(call[timestep].max()) for call in calls}
    return tuple(
        name
        for name, value in calls[0].items()
        if name != timestep and isinstance(value, torch.Tensor) and len(levels) > 1
        if all(same(call.get(name), call[timestep]) for call in calls)
    )


def same(one: Any, other: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and one.shape == other.shape and bool((one == other).all())


def argument_names(network: Any, call: dict[str, Any]) -> tuple[str, str]:
    """Names of the noisy sample and of the noise level."""
    sample = next((name for name in SAMPLE_NAMES if is_samples(call.get(name))), next(iter(call)))
    timestep = next((name for name in TIMESTEP_NAMES if isinstance(call.get(name), torch.Tensor)), None)
    if not is_samples(call[sample]) or timestep is None:
        raise GfpruneError(
            f"{type(network).__name__} takes no batch of samples with their timesteps: gfprune cannot call it"
        )
    return sample, timestep


def is_samples(value: Any) -> bool:
    """Whether a value is a batch: a tensor, or a list of tensors of one shape."""
    if isinstance(value, list | tuple):
        return bool(value) and len({getattr(entry, "shape", None) for entry in value}) == 1
    return isinstance(value, torch.Tensor)
