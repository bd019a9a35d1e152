"""How much memory a run will need, from the meta device, before a weight is read; and how it is split to fit.

    memory = MemoryPlan(device, params, one_pass(network, inputs), phases)
    memory.check()
    memory.at_once("scoring")

Results do not depend on how many samples go through a network at once, beyond the rounding of sums.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gfprune_cli.errors import GfpruneError
from gfprune_cli.flow.layers import is_fittable
from gfprune_cli.flow.recompute import can_recompute
from gfprune_cli.inputs.signature import in_tuples
from gfprune_cli.runtime.memory import Alive
from gfprune_cli.structure.norms import plain_stand_ins
from gfprune_cli.structure.trace import gradients_as_before, hooked

GIB = 1 << 30
FLOAT = 4  # bytes; weights, gradients and moments are float32
MARGIN = 0.95  # of what is free
KEPT_BACK = 2.0  # of what tensors take: what glibc may hold, unless it is told to give back at once


@dataclass(frozen=True)
class Pass:
    """Numbers that one sample takes in a network, its branches of guidance included.

    Args:
        kept: by autograd for the backward pass, attention weights left out.
        recomputed: the same where blocks are computed again on the way back; None where they cannot be.
        maps: attention weights, which second derivatives keep as well: fused kernels have first ones only.
        forward: alive at once without autograd.
        layers: positions, inputs of each, and channels of the outputs of those with a matrix of weights.
    """

    kept: int = 0
    recomputed: int | None = None
    maps: int = 0
    forward: int = 0
    layers: tuple[tuple[int, int, int], ...] = ()

    def then(self, other: "Pass") -> "Pass":
        """With what a frozen network takes that goes on with its outputs."""
        recomputed = None if self.recomputed is None else self.recomputed + other.kept
        maps, forward = self.maps + other.maps, self.forward + other.forward
        return Pass(self.kept + other.kept, recomputed, maps, forward, self.layers)


class AttentionMaps(TorchFunctionMode):
    """Counts the numbers in the attention weights of a pass, and leaves them out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs or {}).values())[:3]
            self.counted += query.shape[:-1].numel() * key.shape[-2]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **(kwargs or {}))


class Kept:
    """Counts the numbers that layers put out, and what is left of them if blocks keep their inputs alone.

    A block is what the network calls through this object.
    """

    def __init__(self) -> None:
        self.numbers = self.inputs = self.of_blocks = self.largest = 0
        self.seen: dict[int, Any] = {}
        self.layers: list[tuple[int, int, int]] = []

    def count(self, module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.numbers += output.numel()
            if is_fittable(module):
                weight: Any = module.weight
                self.layers.append((output.numel() // len(weight), weight[0].numel(), len(weight)))

    def __call__(self, block: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        for tensor in (one for one in tree_leaves((inputs, named)) if isinstance(one, torch.Tensor)):
            known = self.seen.get(id(tensor))
            if known is None or known() is not tensor:  # what many blocks are given is kept once
                self.seen[id(tensor)] = weakref.ref(tensor)
                self.inputs += tensor.numel()
        before, within = self.numbers, self.of_blocks
        output = block(*inputs, **named)
        inside = self.numbers - before
        self.of_blocks = within + inside  # blocks within it are part of it
        self.largest = max(self.largest, inside)
        return output

    @property
    def recomputed(self) -> int:
        """Inputs of the blocks, what lies between them, and the block that is computed again."""
        return self.numbers - self.of_blocks + self.inputs + self.largest


def measured_pass(model: nn.Module, call: Callable[[nn.Module], Any]) -> Pass:
    """What one call of a network takes, nearly; runs on the meta device too."""
    kept = Kept()
    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    counting = hooked(module.register_forward_hook(kept.count) for module in leaves)
    alive = Alive([*model.parameters(), *model.buffers()])
    blocks, maps = block_calls(model, kept), AttentionMaps()
    with counting, plain_stand_ins(model), blocks as recomputes, maps, alive:
        call(model)
    recomputed = kept.recomputed if recomputes else None
    return Pass(kept.numbers, recomputed, maps.counted, alive.most // FLOAT, tuple(kept.layers))


@contextmanager
def block_calls(model: Any, through: Callable[..., Any]) -> Iterator[bool]:
    """Have the network call its blocks through a function, and take no gradients; whether it can."""
    recomputes = can_recompute(model)
    with gradients_as_before(model), torch.set_grad_enabled(recomputes):  # recomputing asks for that
        model.requires_grad_(False)
        if recomputes:
            model.enable_gradient_checkpointing(through)
        try:
            yield recomputes
        finally:
            if recomputes:
                model.disable_gradient_checkpointing()


def one_pass(model: nn.Module, inputs: Mapping[str, Any]) -> Pass:
    """The same for keyword arguments of one sample; nothing where a network's shapes depend on values.

    Args:
        model: on the meta device.
    """
    given = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), dict(inputs))
    try:
        return measured_pass(model, lambda network: network(**given | in_tuples(network)))
    except (RuntimeError, NotImplementedError, ValueError):  # or where a kernel asks for a device
        return Pass()


@dataclass(frozen=True)
class Phase:
    """A part of a run, and what it holds.

    Args:
        name: as in "while scoring".
        copies: of the weights of the dense network.
        sample: bytes of one sample.
        wanted: samples at once, where there is memory for them.
        least: fewer will not do.
        rest: samples at once -> bytes beside weights and what each sample takes.
        settings: with which the phase takes no more than that.
    """

    name: str
    copies: float
    sample: int
    wanted: int
    least: int = 1
    rest: Callable[[int], int] = lambda _samples: 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def need(self, weights: int, samples: int) -> float:
        return self.copies * weights + samples * self.sample + self.rest(samples)


@dataclass(frozen=True)
class MemoryPlan:
    """Whether the phases of a run fit, and how many samples go through a network at once in each.

    Args:
        device: that does the work.
        free: bytes on it, before the run has loaded anything.
        weights: bytes of the dense network's.
        phases: of the run.
        alternatives: flags -> the forms of the phases with them; those that would help are advised.
        half: the precision that the weights are kept in, by its name in torch; None for float32.
    """

    device: torch.device
    free: int
    weights: int
    phases: Sequence[Phase]
    alternatives: Mapping[str, Sequence[Sequence[Phase]]] = field(default_factory=dict)
    half: str | None = None

    def fits(self, phases: Sequence[Phase]) -> bool:
        return all(phase.need(self.weights, phase.least) <= MARGIN * self.free for phase in phases)

    def of(self, forms: Iterable[Sequence[Phase]]) -> "MemoryPlan":
        """The same for phases that each have several forms: of each the first that fits, or the last."""
        chosen = [next((one for one in each if self.fits([one])), each[-1]) for each in forms]
        return replace(self, phases=chosen)

    def check(self) -> None:
        """Refuse a run that cannot fit, before it has cost anything.

        Raises:
            GfpruneError: with both numbers, and flags with which it would fit.
        """
        if self.fits(self.phases):
            return
        worst = max(self.phases, key=lambda phase: phase.need(self.weights, phase.least))
        plans = {flags: self.of(forms) for flags, forms in self.alternatives.items()}
        found = [flags for flags, plan in plans.items() if plan.fits(plan.phases)]
        helping = [flags for flags in found if not any(other in flags and other != flags for other in found)]
        remedy = f"use {' or '.join(helping)}" if helping else "use a machine with more memory"
        raise GfpruneError(
            f"this run needs about {worst.need(self.weights, worst.least) / GIB:.1f} GiB on"
            f" {self.device.type} while {worst.name}, and {self.free / GIB:.1f} GiB are free: {remedy}"
        )

    def phase(self, name: str) -> Phase | None:
        """None where it does not take place."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def settings(self, name: str) -> Mapping[str, Any]:
        """What a phase has to do differently to fit."""
        phase = self.phase(name)
        return {} if phase is None else phase.settings

    def gave(self) -> dict[str, dict[str, Any]]:
        """Phase -> what it did differently from what is usual, of those that did."""
        usual = {"exact": True, "doubles": True}
        found = {
            phase.name: {key: value for key, value in phase.settings.items() if usual.get(key) is not value}
            for phase in self.phases
        }
        held = {} if self.half is None else {"weights": {"kept_in": self.half}}
        return held | {name: settings for name, settings in found.items() if settings}

    @property
    def peak(self) -> float:
        """The most bytes that a phase needs, with as many samples at once as it takes."""
        return max((phase.need(self.weights, self.at_once(phase.name)) for phase in self.phases), default=0)

    @property
    def plenty(self) -> bool:
        """Whether what is let go may stay with the process, which is faster: there is room for it."""
        return KEPT_BACK * self.peak <= self.free

    def at_once(self, name: str) -> int:
        """Samples that go through a network at once in a phase: as many as wanted, halved until they fit."""
        phase = self.phase(name)
        if phase is None:
            return 0  # it does not take place
        samples = phase.wanted
        while samples > phase.least and phase.need(self.weights, samples) > MARGIN * self.free:
            samples = max(phase.least, samples // 2)
        return samples
