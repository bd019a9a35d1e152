"""Looking on while a pipeline runs: what it passes to its denoiser, and what it gives its scheduler."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gfprune_cli.diffusion.draws import generator


class Enough(Exception):
    """Ends a run of the pipeline: everything wanted was seen."""


@dataclass
class Observer:
    """Hooks on one network and its scheduler.

    Args:
        limit: network calls after which a run ends; None: after the second noise level.
    """

    network: Any
    scheduler: Any
    limit: int | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    first: int = 0  # calls before the first step
    mu: float | None = None
    image: tuple[int, int, int] = (0, 0, 0)
    shape: torch.Size | None = None  # of one output

    def forget(self, limit: int | None) -> None:
        self.limit, self.calls, self.outputs, self.steps = limit, [], [], []

    def network_call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note the arguments; answer with noise in the shape of the network's output."""
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        bound |= bound.pop("kwargs", {})
        plain = not bound.pop("return_dict", True)
        self.calls.append(bound)
        if self.limit is not None and len(self.calls) >= self.limit:
            raise Enough
        sample = next(iter(bound.values()))
        if self.shape is None:
            dtype = next(self.network.parameters()).dtype
            cast = pytree.tree_map_only(
                torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, bound
            )
            self.shape = original(**cast, return_dict=False)[0].shape[1:]
        source = generator(0, "stand-in", len(self.calls))
        noise = torch.randn((len(sample), *self.shape), generator=source).to(sample)
        self.outputs.append(noise)
        return (noise,) if plain else _output(noise)

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note what the scheduler is given; end the run once two noise levels were seen."""
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        self.first = self.first or len(self.calls)
        self.steps.append({**bound, "calls": len(self.calls)})
        if len({float(step["timestep"]) for step in self.steps}) > 1:
            raise Enough
        try:
            return original(*args, **kwargs)
        except ImportError:  # a stochastic solver whose library is missing: its samples are not wanted
            self.scheduler._step_index = (self.scheduler.step_index or 0) + 1
            return _output(bound["sample"], "prev_sample")

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
            (self.scheduler, "step", self.step),
            (self.scheduler, "set_timesteps", self.set_timesteps),
            (pipeline, "prepare_latents", self.prepare_latents),
        ]
        places = [place for place in places if hasattr(place[0], place[1])]
        for owner, name, watch in places:
            original = getattr(owner, name)
            # pipelines look at the signatures of what they call
            vars(owner)[name] = functools.wraps(original)(functools.partial(watch, original))
        try:
            yield
        finally:
            for owner, name, _ in places:
                vars(owner).pop(name, None)


def _output(tensor: torch.Tensor, name: str = "sample") -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    made = SchedulerOutput if name == "prev_sample" else Transformer2DModelOutput
    return made(**{name: tensor})
