"""Looking on while a pipeline runs: what it passes to its denoiser, and what it gives its scheduler."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gfprune_cli.diffusion.conditions import NESTED, first_tensor
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.inputs.rows import flattened

ADDING = "adding"  # before the names of what a ControlNet or T2I adapter is given, among those of a call


class Enough(Exception):
    """Ends a run of the pipeline: everything wanted was seen."""


@dataclass(frozen=True)
class Adding:
    """A network of the pipeline that adds to the states of the one that is looked at.

    Args:
        own: names of the noisy sample and the noise level among its arguments, if it is told those.
        taken: arguments of the other network that take what it returns.
    """

    network: Any
    own: tuple[str, ...]
    taken: tuple[str, ...]


@dataclass
class Observer:
    """Hooks on one network and its scheduler.

    Args:
        adding: what it is given is noted among the arguments of the network, in the place of what it returns.
        limit: network calls after which a run ends; None: after the second noise level.
    """

    network: Any
    scheduler: Any
    adding: Adding | None = None
    limit: int | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    first: int = 0  # calls before the first step
    mu: float | None = None
    image: tuple[int, int, int] = (0, 0, 0)
    answers: dict[Any, Any] = field(default_factory=dict)  # of networks, by the form of what they were given
    given: dict[str, Any] = field(default_factory=dict)  # to what adds, the last time

    def __deepcopy__(self, memo: Any) -> "Observer":
        """Copies of a scheduler, as for the frames of a video, are looked at by the same observer."""
        return self

    def forget(self, limit: int | None) -> None:
        self.limit, self.calls, self.outputs, self.steps, self.first = limit, [], [], [], 0

    def network_call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note the arguments; answer with noise in the form of what the network answered the first time.

        Further calls for the same sample may have other branches than the first.
        """
        bound = arguments_of(original, args, kwargs)
        noted = {name: value for name, value in bound.items() if name != "return_dict"}
        self.calls.append(noted if self.adding is None else self.with_added(self.adding, noted))
        if self.limit is not None and len(self.calls) >= self.limit:
            raise Enough
        answer = self.answer(self.network, original, bound, f"stand-in/{len(self.calls)}")
        self.outputs.append(first_tensor(answer))
        return answer

    def adding_call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same for what adds to the states of the network; it may be called once for all steps."""
        self.given = arguments_of(original, args, kwargs)
        assert self.adding is not None
        return self.answer(self.adding.network, original, self.given, "what is added")

    def answer(self, network: Any, original: Callable[..., Any], bound: dict[str, Any], purpose: str) -> Any:
        """Noise in the form of what a network answers."""
        form = (network is self.network, not bound.get("return_dict", True), first_batch(bound))
        if form not in self.answers:
            dtype = next(network.parameters()).dtype
            cast = pytree.tree_map_only(
                torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, bound
            )
            self.answers[form] = original(**cast)
        return noise_like(self.answers[form], purpose, bound)

    def with_added(self, adding: Adding, noted: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, and what adds to it was given, with a row for each of its samples: for
        all branches alike where it is told neither sample nor noise level."""
        batch, known = first_batch(noted), {*adding.own, "return_dict"}
        given = flattened({name: value for name, value in self.given.items() if name not in known}, set())
        if not adding.own:
            given = {
                name: torch.cat([value] * (batch // len(value))) if isinstance(value, torch.Tensor) else value
                for name, value in given.items()
            }
        rest = {name: value for name, value in noted.items() if name not in adding.taken}
        return rest | {f"{ADDING}{NESTED}{name}": value for name, value in given.items()}

    def other_call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Noise in place of what a network without weights would answer."""
        bound = arguments_of(original, args, kwargs)
        empty = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), bound)
        return noise_like(original(**empty), "another network", bound)

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note what the scheduler is given; end the run once two noise levels were seen."""
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        if len(self.calls) > (self.steps[-1]["calls"] if self.steps else 0):  # else it is another network's
            self.first = self.first or len(self.calls)
            self.steps.append({**bound, "calls": len(self.calls)})
            if len({float(step["timestep"]) for step in self.steps}) > 1:
                raise Enough
        try:
            return original(*args, **kwargs)
        except ImportError:  # a stochastic solver whose library is missing: its samples are not wanted
            from diffusers.schedulers.scheduling_utils import SchedulerOutput

            self.scheduler._step_index = (self.scheduler.step_index or 0) + 1
            return SchedulerOutput(prev_sample=bound["sample"])

    def set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mu = kwargs.get("mu")
        self.mu = self.mu if mu is None else float(mu)
        return original(*args, **kwargs)

    def prepare_latents(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        found = (bound.get("height"), bound.get("width"), bound.get("num_frames"))
        self.image = tuple(value if isinstance(value, int) else 0 for value in found)  # type: ignore[assignment]
        return original(*args, **kwargs)

    @contextmanager
    def watching(self, pipeline: Any) -> Iterator[None]:
        """Look at everything in the block."""
        places = [
            (self.network, "forward", self.network_call),
            *([] if self.adding is None else [(self.adding.network, "forward", self.adding_call)]),
            (self.scheduler, "step", self.step),
            (self.scheduler, "set_timesteps", self.set_timesteps),
            (pipeline, "prepare_latents", self.prepare_latents),
            *((other, "forward", self.other_call) for other in without_weights(pipeline)),
        ]
        places = [place for place in places if hasattr(place[0], place[1])]
        processors = [
            (module, module.processor) for module in self.network.modules() if hasattr(module, "processor")
        ]
        for owner, name, watch in places:
            original = getattr(owner, name)
            # pipelines look at the signatures of what they call
            vars(owner)[name] = functools.wraps(original)(functools.partial(watch, original))
        try:
            yield
        finally:
            for owner, name, _ in places:
                vars(owner).pop(name, None)
            for module, processor in processors:  # a pipeline that is stopped does not put its own away
                module.processor = processor


def arguments_of(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """What a function is called with, by name."""
    bound = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    return bound | bound.pop("kwargs", {})


def first_batch(call: dict[str, Any]) -> int:
    """Samples in the batch of a call, by its first tensor."""
    found = (leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.ndim)
    return len(next(found, ()))


def without_weights(pipeline: Any) -> list[nn.Module]:
    """Networks of a pipeline that were made from their configuration alone, without decoders."""
    parts = [part for part in getattr(pipeline, "components", {}).values() if isinstance(part, nn.Module)]
    return [
        part for part in parts if any(p.is_meta for p in part.parameters()) and not hasattr(part, "decode")
    ]


def noise_like(answer: Any, purpose: str, call: dict[str, Any]) -> Any:
    """Standard normal noise in the form of a network's answer, on the device and in the type of its input."""
    like = next(leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor))
    source = generator(0, purpose)
    return pytree.tree_map_only(
        torch.Tensor, lambda tensor: torch.randn(tensor.shape, generator=source).to(like), answer
    )
