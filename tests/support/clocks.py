"""A machine whose times are made up: nothing runs, a clock moves by what each call would take."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from torch import nn

from gfprune_cli.evaluation import latency
from gfprune_cli.structure.trace import CONVOLUTIONS
from gfprune_cli.timing.kinds import Kind, layers_run
from gfprune_cli.timing.runtimes import RUNTIMES, Bench, Runtime


@dataclass
class Machine:
    """Seconds of layers and networks.

    Args:
        surprise: what whole networks of a width ratio take beyond their layers.
        block: widths take what the next multiple of it takes.
        jitter: relative, of each call in turn.
        calls: of networks that were built.
    """

    launch: float = 2e-6
    per_pair: float = 1e-9  # of an output, an input, a place
    per_number: float = 5e-9
    block: int = 1  # channels that a kernel works on at once
    surprise: Callable[[float], float] = lambda seconds: 0.0
    jitter: tuple[float, ...] = (0.0,)
    now: float = 0.0
    networks: int = 0
    turns: Any = field(default_factory=count)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds * (1 + self.jitter[next(self.turns) % len(self.jitter)])

    def layer_seconds(self, kind: Kind, out: int, into: int) -> float:
        out, into = (-(-width // self.block) * self.block for width in (out, into))
        places = 1
        for size in (*kind.shape, *kind.kernel):
            places *= size
        if kind.operator == "attention":
            return self.launch + self.per_pair * places * kind.keys * out
        return self.launch + self.per_pair * places * out * (1 if kind.operator == "depthwise" else into)

    def layer(self, bench: Bench, kind: Kind, out: int, into: int) -> Callable[[], object]:
        return lambda: self.pass_time(self.layer_seconds(kind, out, into))

    def network_seconds(self, bench: Bench, network: Any) -> float:
        seconds = 0.0
        modules: dict[str, Any] = dict(network.named_modules())
        for name, run in layers_run(network, bench.inputs(network)).items():
            module = modules[name]
            seconds += self.launch + self.per_number * run.places * width_of_output(module)
            if run.kind is not None:
                seconds += run.calls * self.layer_seconds(run.kind, *widths_of(module))
        return seconds + self.surprise(seconds)

    def network(self, bench: Bench, network: nn.Module) -> Callable[[], object]:
        self.networks += 1
        seconds = self.network_seconds(bench, network)
        return lambda: self.pass_time(seconds)

    def install(self, patch: pytest.MonkeyPatch, *names: str) -> "Machine":
        """Put it in the place of this machine, for these runtimes."""
        patch.setattr(latency, "CLOCK", lambda: self.now)
        for name in names or ("eager",):
            patch.setitem(RUNTIMES, name, Runtime(layer=self.layer, network=self.network))  # type: ignore[arg-type]
        return self


def widths_of(module: Any) -> tuple[int, int]:
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels, module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.to_q.out_features, 1


def width_of_output(module: Any) -> int:
    if isinstance(module, CONVOLUTIONS):
        return int(module.out_channels)
    if isinstance(module, nn.Linear):
        return int(module.out_features)
    return int(getattr(module, "num_channels", 0) or 0)
