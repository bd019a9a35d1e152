"""Modulation folding of a network: which layers, at what rank, with what error.

    found = Folder(network, probes, tolerance, dtype, report).fold(process, held_out)

Layers are folded in the order in which they run, so that each is fitted to the dense outputs on the inputs
that the layers folded before it give. What makes the embedding that others read gets a share of the
tolerance, and stays as it is where that leaves fewer parameters in all.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.files import quoted
from gfprune_cli.checkpoint.layout import stock_name
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import pruned_class
from gfprune_cli.diffusion.conditions import call, inputs_of, some_of
from gfprune_cli.diffusion.draws import Draws, generator
from gfprune_cli.diffusion.process import NoisingProcess
from gfprune_cli.errors import GfpruneError, Interrupted
from gfprune_cli.flow.folding import Factors, Samples, fold, relative_error
from gfprune_cli.progress import Event, Progress, notice
from gfprune_cli.pruning.probes import FIND, Probes
from gfprune_cli.pruning.result import FoldedLayer, Folding
from gfprune_cli.runtime.memory import parameter_count
from gfprune_cli.structure.modulation import (
    Hide,
    feeders,
    hidden_run,
    mismatched,
    modulation_layers,
    visited,
)
from gfprune_cli.structure.removal import carry_over, rebuild, stock_config

SAMPLES = 2  # of the passes that find layers
FIT, CHOOSE = 768, 256  # samples that bases are fitted to, at least, and those that ranks are chosen on
FIT_PER_FEATURE = 3  # of a pooled vector: half of the samples are random vectors, which have to span it
CHECKED = {"check": 256}
OUTPUT_DRAWS, OUTPUT_CHUNK = 16, 4  # noisy samples behind the error of the network's output
MARGIN = 0.9  # of the tolerance, for what the check will see
FEEDER_SHARE = 0.25  # of the tolerance, for layers that others read


@dataclass
class Folder:
    """Folds one network.

    Args:
        network: frozen, in float32; stays as it is.
        probes: timesteps and conditions to record.
        tolerance: see `Folding`.
        dtype: in which factors are stored.
        progress: events.
        at_once: samples that go through a network together.
    """

    network: nn.Module
    probes: Probes
    tolerance: float
    dtype: torch.dtype
    progress: Progress
    at_once: int = OUTPUT_CHUNK

    def fold(self, process: NoisingProcess, held_out: Draws) -> tuple[nn.Module, Folding] | None:
        """The folded network and what was measured; None where there is nothing to fold.

        Args:
            held_out: images whose noise and conditions nothing is fitted to.

        Raises:
            GfpruneError: a layer misses the tolerance on what was held out.
        """
        names = self.find()
        chosen = self.choose(names) if names else {}
        if not chosen:
            return None
        folded = factored(self.network, chosen)
        errors = self.errors(names, folded)
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= self.tolerance:
            raise GfpruneError(
                f"--fold {self.tolerance:g}: outputs of {quoted(worst)} are {errors[worst]:.2g} off at "
                "timesteps and conditions that were held out; give more --prompts, a larger tolerance, or 0"
            )
        layers = tuple(
            FoldedLayer(name, found.first.shape[1], len(found.second), found.rank, errors[name])
            for name, found in chosen.items()
        )
        params = {"before": parameter_count(self.network), "after": parameter_count(folded)}
        error = self.output_error(folded, process, held_out)
        whole = tuple(name for name in names if name not in chosen)
        return folded, Folding(self.tolerance, layers, whole, params, error, self.probes.ranges())

    def find(self) -> list[str]:
        """The layers, in the order in which they run; the probes learn what values conditions can have.

        A real pass confirms them: a network that writes what was hidden into a tensor of its own making
        would look as if it depended on nothing.
        """
        times, condition = self.probes.timesteps(FIND, SAMPLES), self.probes.conditions(FIND, SAMPLES)
        rows = SAMPLES * self.probes.branches
        found = modulation_layers(self.network, self.runs(self.network, {FIND: SAMPLES}), rows)
        self.probes = self.probes.know(found.tables, times, condition)
        real: dict[str, torch.Tensor] = {}

        def keep(name: str, _layer: Any, x: torch.Tensor, _output: torch.Tensor) -> None:
            real[name] = x.reshape(-1, x.shape[-1])

        source = generator(self.probes.seed, "fold")
        noise = torch.randn((SAMPLES, *self.probes.shape), generator=source).to(self.probes.device)
        with torch.no_grad(), visited(self.network, list(found.inputs), keep):
            self.network(**inputs_of(noise, times.to(noise.device), condition))
        wrong = mismatched(found.inputs, real)
        return [name for name in found.inputs if name not in wrong]

    def runs(self, network: nn.Module, parts: Mapping[str, int]) -> Any:
        """Calls a network on probes of several purposes -> counts, one behind the other."""

        def run(hide: Hide) -> None:
            times, condition = self.probes.several(parts, hide)
            x = hide(torch.empty((len(times), *self.probes.shape), device=self.probes.device))
            network(**inputs_of(x, times.to(self.probes.device), condition))

        return run

    @property
    def fitted(self) -> dict[str, int]:
        """Purpose -> samples that factors are made from."""
        return {"fit": max(FIT, FIT_PER_FEATURE * self.probes.features), "choose": CHOOSE}

    def inputs(self, names: Collection[str], parts: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """layer -> [rows, in] what it receives in the dense network, on probes of purposes -> counts.

        In main memory; layers in a row that read the same share it, as most do: outputs would take gigabytes.
        """
        found: dict[str, torch.Tensor] = {}

        def keep(name: str, _layer: Any, x: torch.Tensor, _output: torch.Tensor) -> None:
            rows, last = x.reshape(-1, x.shape[-1]).cpu(), next(reversed(found.values()), None)
            found[name] = last if last is not None and torch.equal(last, rows) else rows

        with visited(self.network, list(names), keep):
            hidden_run(self.runs(self.network, parts))
        return found

    def choose(self, names: list[str]) -> dict[str, Factors]:
        """Layer -> its factors, of those that are to be folded."""
        dense = self.inputs(names, self.fitted)
        feeding = feeders(self.network, self.runs(self.network, {FIND: SAMPLES}), names)
        alone = self.factorise(dense, dict.fromkeys(feeding, 0.0))
        if not feeding:
            return alone
        together = self.factorise(dense, dict.fromkeys(feeding, FEEDER_SHARE * self.tolerance))
        return max(alone, together, key=self.saved)

    def saved(self, chosen: Mapping[str, Factors]) -> int:
        """Parameters that are no longer there."""
        before = sum(parameter_count(self.network.get_submodule(name)) for name in chosen)
        return before - sum(found.size for found in chosen.values())

    def factorise(self, dense: Mapping[str, torch.Tensor], limits: Mapping[str, float]) -> dict[str, Factors]:
        """Factors by layer; none at all where a layer that stays would miss the tolerance.

        Args:
            dense: layer -> inputs in the dense network.
            limits: tolerance of the layers that others read; 0 keeps them as they are.
        """
        chosen: dict[str, Factors] = {}
        missed = False
        fitted = self.fitted["fit"] * self.probes.branches

        def visit(name: str, layer: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
            nonlocal missed
            self.progress(Event("fold", len(chosen), len(dense)))
            if name in chosen:  # called again
                return chosen[name](x)
            rows = Samples(x.reshape(-1, x.shape[-1]), linear(layer, dense[name].to(x.device)))
            limit = limits.get(name, self.tolerance) * MARGIN
            parts = rows[:fitted], rows[fitted:]
            found = fold(layer.weight.detach(), layer.bias, *parts, limit, self.stored) if limit else None
            if found is None:
                error = relative_error(output.reshape(rows.y.shape), rows.y)
                missed |= error > MARGIN * self.tolerance
                return None
            chosen[name] = found
            return found(rows.x).reshape(output.shape)

        with visited(self.network, list(dense), visit):
            hidden_run(self.runs(self.network, self.fitted))
        return {} if missed else chosen

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype).to(tensor.dtype)

    def errors(self, names: Collection[str], folded: nn.Module) -> dict[str, float]:
        """Layer -> relative error of its outputs on what was held out, of all that depend on it alone."""
        dense = self.inputs(names, CHECKED)
        found: dict[str, float] = {}

        def compare(name: str, _layer: Any, x: torch.Tensor, output: torch.Tensor) -> None:
            wanted = linear(self.network.get_submodule(name), dense[name].to(x.device))
            found[name] = relative_error(output.reshape(wanted.shape), wanted)

        with visited(folded, list(names), compare):
            hidden_run(self.runs(folded, CHECKED))
        return found

    @torch.no_grad()
    def output_error(self, folded: nn.Module, process: NoisingProcess, held_out: Draws) -> float:
        """Root mean square of what the networks' outputs differ by, over that of the dense one's.

        On stratified draws of images and conditions that were held out; the two are paired at random.
        """
        missed = wanted = 0.0
        conditions = self.probes.conditions("check", OUTPUT_DRAWS)
        for first in range(0, OUTPUT_DRAWS, self.at_once):
            batch = held_out.batch("fold", 0, self.at_once, first=first, of=OUTPUT_DRAWS)
            noisy = process.add_noise(batch.images, batch.noise, batch.index)
            given = some_of(conditions, slice(first, first + self.at_once))
            times = process.timesteps(batch.index)
            dense, narrow = (call(one, noisy, times, given).double() for one in (self.network, folded))
            missed += float((narrow - dense).square().sum())
            wanted += float(dense.square().sum())
        return (missed / max(wanted, torch.finfo(torch.float32).tiny)) ** 0.5


def folding_attempt(
    folder: Folder, process: NoisingProcess, held_out: Draws, *, asked: bool
) -> tuple[nn.Module, Folding] | None:
    """What `Folder.fold` gives; where the user did not ask for it, a failure is no more than a notice."""
    try:
        found = folder.fold(process, held_out)
    except Interrupted:
        raise
    except GfpruneError as error:
        if asked:
            raise
        notice(folder.progress, f"nothing is folded: {error}")
        return None
    if found is None and asked:
        notice(folder.progress, "--fold: no layer would save anything within the tolerance")
    return found


def factored(network: Any, chosen: Mapping[str, Factors]) -> nn.Module:
    """The network with these layers as two: a `Pruned<class>` whose configuration says so.

    All other weights are those of the dense network itself, which is on its way out.
    """
    config = stock_config(network)
    earlier = config.get("gfprune") or {}
    modules = dict(earlier.get("modules", {}))
    state = dict(network.state_dict())
    for name, found in chosen.items():
        if name in modules:  # narrowed before
            modules[f"{name}.0"] = {"out": found.rank, "in": found.first.shape[1]}
            modules[f"{name}.1"] = {"out": len(found.second), "in": found.rank}
        modules[name] = {"rank": found.rank}
        for leaf in ("weight", "bias"):
            state.pop(f"{name}.{leaf}", None)
        state |= {
            f"{name}.0.weight": found.first,
            f"{name}.1.weight": found.second,
            f"{name}.1.bias": found.bias,
        }
    config["gfprune"] = {"format": 1, **earlier, "modules": modules}
    built = rebuild(pruned_class(stock_name(type(network).__name__)), config, state)
    return carry_over(network, built)


def linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer gives, past the hooks that watch it."""
    return torch.nn.functional.linear(x, layer.weight, layer.bias)
