"""The refit: what reads masked units gives the dense network's outputs as well as it can.

pytest tests/flow/test_refit.py
"""

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import networks
import pytest
import test_traced
import torch
import transformers_zoo as zoo
from forked import Server
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._pytree import tree_map

from gfprune_cli.diffusion.conditions import Condition, Conditions, call
from gfprune_cli.flow.layers import is_fittable
from gfprune_cli.flow.mask import MaskedModel, Masks, full_masks
from gfprune_cli.flow.refit import Refit
from gfprune_cli.flow.residuals import find_residuals
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.runtime.processes import Processes
from gfprune_cli.structure.blocks import block_groups
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.removal import remove

Batch = tuple[torch.Tensor, torch.Tensor, Condition]


def network(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """A random network of any family, and what it takes for one sample."""
    if name in zoo.ZOO:
        model = zoo.build(name, dtype=dtype)
        floating = lambda value: isinstance(value, torch.Tensor) and value.is_floating_point()  # noqa: E731
        return model, tree_map(lambda value: value.to(dtype) if floating(value) else value, zoo.inputs(model))
    known = name in networks.NETWORKS
    model = networks.build(name, dtype=dtype) if known else test_traced.network(name, dtype)
    return model, example_inputs(model)


def batch_for(template: dict[str, Any], count: int, seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Random samples, noise levels and side inputs in the shapes of a template for one sample."""
    source = torch.Generator().manual_seed(seed)
    sample = next(iter(template))
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, Any] = {}

    def draw(value: torch.Tensor) -> torch.Tensor:
        shape = (count, *value.shape[1:])
        if not value.is_floating_point():
            return torch.randint(1, 5, shape, generator=source)
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

    for key, value in template.items():
        if isinstance(value, dict):
            tensors |= {f"{key}.{inner}": draw(part).unsqueeze(1) for inner, part in value.items()}
        elif isinstance(value, torch.Tensor) and not key.endswith("ids") and "rotary" not in key:
            tensors[key] = draw(value).unsqueeze(1)
        else:
            shared[key] = value
    x, levels = tensors.pop(sample)[:, 0], 1 + 18 * torch.rand(count, generator=source)
    timed = tensors.pop("timestep", None)
    whole = timed is not None and not timed.is_floating_point()
    names = (sample, None if timed is None else "timestep")
    return x, levels.long() if whole else levels, Conditions(tensors, shared, *names)


def random_masks(groups: Sequence[ChannelGroup], level: float = 0.0, seed: int = 0) -> Masks:
    """Half of the units of every group at one level, the others at 1."""
    source = torch.Generator().manual_seed(seed)
    masks = full_masks(tuple(groups))
    for group in groups:
        masks[group.name][torch.randperm(group.units, generator=source)[: group.units // 2]] = level
    return masks


class Pair:
    """A dense network and the masked one that is fitted to it."""

    def __init__(self, model: Any, groups: tuple[ChannelGroup, ...], template: dict[str, Any]) -> None:
        self.dense, self.template = copy.deepcopy(model), template
        self.masked = MaskedModel(model.requires_grad_(True), groups)
        self.residuals = find_residuals(self.dense, {**template, "return_dict": False})
        self.dtype = next(model.parameters()).dtype

    def fit(self, seed: int = 0, count: int = 64, poll: Callable[[], None] = lambda: None) -> Any:
        refit = Refit(self.masked, self.dense, self.residuals, seed)
        return refit.fit(*batch_for(self.template, count, 1, self.dtype), 1, poll)

    def distance(self) -> float:
        """From the dense network, on samples that no fit has seen, relative to its outputs."""
        held_out = batch_for(self.template, 32, 2, self.dtype)
        with torch.no_grad():
            expected = call(self.dense, *held_out)
            found = self.masked.forward(self.masked.passing(), *held_out)
        return float((found - expected).square().sum() / expected.square().sum())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in self.masked.weights.items()}


def pair(name: str, *, blocks: bool = False) -> Pair:
    model, template = network(name)
    groups = discover(model, template)[0] + (block_groups(model) if blocks else ())
    return Pair(model, groups, template)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# --- whole networks ------------------------------------------------------------------------------

FALLS = {  # network -> share of the distance that a refit takes away at least, half of all units masked
    **{"ddpm": 0.6, "seams": 0.5, "ncsnpp": 0.5, "scale-shift": 0.5, "resnet-classes": 0.4},
    **{"sd1": 0.6, "sd2": 0.4, "sdxl": 0.4, "sd-classes": 0.5, "vae": 0.3, "vae-bare": 0.4},
    **{"dit": 0.5, "pixart": 0.4, "sd3": 0.1, "sd3.5": 0.4, "flux": 0.4, "sana": 0.3, "wan-image": 0.6},
    **{"cogvideox-rotary": 0.5, "ltx": 0.6, "stable-audio": 0.2},
}


@pytest.mark.matrix(3)
@pytest.mark.parametrize("name", FALLS)
def test_a_refit_brings_the_masked_network_near_the_dense_one(name: str) -> None:
    """Half of the units are gone; on samples that it has not seen the network is much nearer than before."""
    found = pair(name)
    found.masked.set_masks(random_masks(found.masked.groups))
    before = found.distance()
    assert found.fit()
    assert found.distance() < (1 - FALLS[name]) * before


@pytest.mark.parametrize("name", ["ddpm", "dit", "flux"])
def test_at_soft_masks_what_stays_takes_over(name: str) -> None:
    """Once the units that are on their way out are gone, much of what they gave is there already."""
    found = pair(name)
    leaving, gone = (random_masks(found.masked.groups, level) for level in (0.5, 0.0))
    found.masked.set_masks(gone)
    before = found.distance()
    found.masked.set_masks(leaving)
    found.fit()
    found.masked.set_masks(gone)
    assert found.distance() < 0.6 * before


@pytest.mark.parametrize("name", ["ddpm", "vae", "sd3"])
def test_full_masks_leave_every_weight(name: str) -> None:
    """Nothing is missing, nothing is fitted, bit for bit."""
    found = pair(name)
    before = found.weights()
    assert found.fit() == {}
    assert same(found.weights(), before)


@pytest.mark.parametrize("name", ["seams", "sd2", "vae", "dit", "flux"])
def test_the_fitted_network_without_its_masked_units_is_the_masked_one(name: str) -> None:
    """Removal stays exact, to float64 rounding, whatever the weights became."""
    model, template = network(name, torch.float64)
    found = Pair(model, discover(model, template)[0], template)
    kept = {key: mask == 1 for key, mask in random_masks(found.masked.groups).items()}
    with zoo.double_precision():
        found.masked.set_masks({key: units.double() for key, units in kept.items()})
        assert found.fit(count=16)
        held_out = batch_for(template, 2, 3, torch.float64)
        fitted = copy.deepcopy(found.dense)
        fitted.load_state_dict(found.masked.model.state_dict(), strict=False)
        with torch.no_grad():
            narrow = call(remove(fitted, found.masked.groups, kept), *held_out)
            expected = found.masked.forward(found.masked.passing(), *held_out)
            dense = call(found.dense, *held_out)
    assert float((narrow - expected).norm() / expected.norm()) < 1e-9
    assert float((dense - expected).norm() / expected.norm()) > 1e-3


@pytest.mark.parametrize("name", ["no-middle-attention", "flux"])
def test_units_at_mask_zero_keep_what_produces_them(name: str) -> None:
    """Their targets say nothing: they come back as they were, if they come back."""
    found = pair(name)
    found.masked.set_masks(random_masks(found.masked.groups))
    before, changed = found.weights(), found.fit()
    after, frozen = found.weights(), 0
    for (member, _), mask in found.masked.member_masks().items():
        for key in (f"{member}.weight", f"{member}.bias"):
            if key in changed:
                assert torch.equal(after[key][mask == 0], before[key][mask == 0])
                assert not torch.equal(after[key][mask == 1], before[key][mask == 1])
                frozen += int((mask == 0).sum())
    assert frozen > 10
    assert same({key: after[key] for key in after if key not in changed}, before)


def test_equal_seeds_give_equal_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which positions are looked at follows from the seed alone."""
    monkeypatch.setattr("gfprune_cli.flow.layers.LEAST_ROWS", 64)
    results = []
    for seed in (1, 1, 2):
        found = pair("no-middle-attention")
        found.masked.set_masks(random_masks(found.masked.groups))
        found.fit(seed)
        results.append(found.weights())
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_convolutions_stored_channels_last_are_fitted_alike() -> None:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        found = pair("no-middle-attention")
        for parameter in found.masked.model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)
                assert parameter.is_contiguous(memory_format=layout)
        found.masked.set_masks(random_masks(found.masked.groups))
        found.fit()
        strides = {name: weight.stride() for name, weight in found.masked.weights.items()}
        assert strides["conv_out.weight"][1] == (9 if layout is torch.contiguous_format else 1)
        results.append(found.weights())
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("at", [1, 2, 20, "last"])
def test_a_stop_in_the_middle_leaves_every_weight(at: int | str) -> None:
    """Whatever was fitted before is taken back, bit by bit, and no hook stays behind."""

    class Stopped(BaseException):
        pass

    def build() -> Pair:
        found = pair("no-middle-attention")
        found.masked.set_masks(random_masks(found.masked.groups))
        return found

    polls: list[int] = []
    build().fit(poll=lambda: polls.append(0))
    last = len(polls) if at == "last" else at
    found = build()
    before = found.weights()

    def poll() -> None:
        polls.append(0)
        if len(polls) == last:
            raise Stopped

    polls.clear()
    with pytest.raises(Stopped):
        found.fit(poll=poll)
    assert same(found.weights(), before)
    for model in (found.dense, found.masked.model):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    again = build()
    assert same(again.fit(), found.fit())
    assert same(again.weights(), found.weights())


def test_layers_of_a_block_that_is_gone_are_left_alone() -> None:
    """What they give goes nowhere; layers of a block that is on its way out are fitted."""
    found = pair("no-middle-attention", blocks=True)
    gone, leaving = [group.name for group in found.masked.groups if group.stack][:2]
    masks = random_masks([group for group in found.masked.groups if not group.stack])
    one = torch.ones(1, dtype=torch.float64)
    found.masked.set_masks(found.masked.masks | masks | {gone: 0 * one, leaving: one / 2})
    before = found.distance()
    changed = found.fit()
    assert not any(name.startswith(f"{gone}.") for name in changed)
    assert any(name.startswith(f"{leaving}.") for name in changed)
    assert found.distance() < before


SHARE = """
import sys
sys.path[:0] = {path!r}
import test_refit
test_refit.fit_a_share({name!r}, {folder!r})
"""
SAMPLES, SEVERAL = 32, 3


def fit_a_share(name: str, folder: str) -> None:
    """The refit of one of several processes: its weights, and how many samples it looked at."""
    processes = Processes.start("cpu")
    own, seen = pair(name), 0
    own.masked.set_masks(random_masks(own.masked.groups))
    first = next(module for module in own.masked.model.modules() if is_fittable(module))

    def look(_layer: Any, given: Any) -> None:
        nonlocal seen
        seen = max(seen, len(given[0]))

    hook = first.register_forward_pre_hook(look)
    refit = Refit(own.masked, own.dense, own.residuals, 0, processes=processes)
    refit.fit(*batch_for(own.template, SAMPLES, 1, own.dtype), 1)
    hook.remove()
    found = {name: weight.clone() for name, weight in own.weights().items()}
    save_file(found, f"{folder}/{processes.rank}.safetensors", {"seen": str(seen)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seams", "sd3"])  # the second has layers with more inputs than rows
def test_processes_share_the_samples_and_fit_what_one_fits(server: Server, tmp_path: Path, name: str) -> None:
    script = SHARE.format(path=sys.path, name=name, folder=str(tmp_path))
    outcomes = server.together(SEVERAL, script=script)
    assert [outcome.code for outcome in outcomes] == [0] * SEVERAL, outcomes[0].stderr
    alone = pair(name)
    alone.masked.set_masks(random_masks(alone.masked.groups))
    before = alone.weights()
    alone.fit(count=SAMPLES)
    expected = alone.weights()
    moved = sum(float((expected[key] - before[key]).square().sum()) for key in expected)
    assert moved > 0
    for rank in range(SEVERAL):
        with safe_open(tmp_path / f"{rank}.safetensors", "pt") as found:
            assert int(found.metadata()["seen"]) <= SAMPLES // SEVERAL + 1
            gaps = [(found.get_tensor(key) - expected[key]).square().sum() for key in expected]
        assert float(torch.stack(gaps).sum()) < 1e-6 * moved
