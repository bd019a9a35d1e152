"""The least squares behind a refit: each layer against an independent solver, and the streams behind it.

pytest tests/flow/test_refit_layers.py
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_refit import Pair, batch_for, pair, same
from torch import nn

from gfprune_cli.diffusion.conditions import Conditions
from gfprune_cli.flow import least_squares
from gfprune_cli.flow.least_squares import OFFSET_RIDGE, RIDGE, Problem
from gfprune_cli.flow.refit import JUDGES, Refit
from gfprune_cli.flow.residuals import find_residuals
from gfprune_cli.structure.groups import ChannelGroup, Member

# --- one layer -----------------------------------------------------------------------------------


class Two(nn.Module):
    """One layer behind another; the second may be added to what the first is given, or run twice."""

    def __init__(self, first: nn.Module, second: nn.Module, *, residual: bool = False, twice: bool = False):
        super().__init__()
        self.first, self.second, self.residual, self.twice = first, second, residual, twice
        self.start: nn.Module = nn.Identity()

    def forward(self, sample: torch.Tensor, timestep: Any = None, return_dict: bool = True) -> Any:
        stream = self.start(sample)
        found = self.second(nn.functional.silu(self.first(stream)))
        if self.twice:
            found = found + self.second(stream)
        return (found + stream if self.residual else found,)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 8), lambda: nn.Linear(8, 5), (9, 5)),
    "no bias": (lambda: nn.Linear(5, 8), lambda: nn.Linear(8, 5, bias=False), (9, 5)),
    "conv1d": (lambda: nn.Conv1d(5, 8, 1), lambda: nn.Conv1d(8, 5, 3, padding=2, stride=2), (5, 12)),
    "conv2d": (
        lambda: nn.Conv2d(5, 8, 3, padding=1),
        lambda: nn.Conv2d(8, 5, (3, 2), padding=(1, 0), stride=(2, 1)),
        (5, 6, 7),
    ),
    "conv3d": (
        lambda: nn.Conv3d(5, 8, 1),
        lambda: nn.Conv3d(8, 5, (1, 2, 3), stride=(1, 1, 2), padding=(0, 1, 1)),
        (5, 3, 4, 5),
    ),
}


def toy_group(name: str, reader: str, channels: int) -> ChannelGroup:
    every = torch.arange(channels)
    members = (Member(name, "out", "linear", every, every), Member(reader, "in", "linear", every, every))
    return ChannelGroup(name, channels, 1, every.view(1, -1), members)


def two(kind: str, **options: bool) -> Pair:
    torch.manual_seed(0)
    first, second, shape = LAYERS[kind]
    template = {"sample": torch.zeros(1, *shape)}
    return Pair(Two(first(), second(), **options), (toy_group("first", "second", 8),), template)


def patches(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """[positions, fan in] what a layer reads, found with a convolution whose outputs are its inputs."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).double()
    inputs = layer.weight[0].numel()
    picks = torch.eye(inputs, dtype=torch.float64).view(inputs, *layer.weight.shape[1:])
    convolve = [nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d][layer.weight.ndim - 3]
    found = convolve(x.double(), picks, stride=layer.stride, padding=layer.padding)
    return found.movedim(1, -1).reshape(-1, inputs)


def best(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, soft: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(W, b) that minimise |W x + b - y|^2 + sum soft |x W|^2 + ridge |W - W_0|^2, by one call of lstsq."""
    n, power = x.shape[1], x.square().sum(0)
    ridge = (RIDGE * power[power > 0].mean()).sqrt()
    ones = torch.ones(len(x), 1, dtype=torch.float64) * (bias is not None)
    old = torch.zeros(y.shape[1], dtype=torch.float64) if bias is None else bias.double()
    last = torch.zeros(1, n + 1, dtype=torch.float64)
    last[0, n] = (OFFSET_RIDGE * len(x)) ** 0.5
    wide = torch.zeros(n, 1, dtype=torch.float64)
    parts = [
        (torch.cat([x, ones], 1), y),
        (torch.cat([torch.diag((soft * power).sqrt()), wide], 1), torch.zeros(n, y.shape[1]).double()),
        (torch.cat([ridge * torch.eye(n, dtype=torch.float64), wide], 1), ridge * weight.double().T),
        (last, last[0, n] * old.unsqueeze(0)),
    ]
    solution = torch.linalg.lstsq(torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])).solution
    return solution[:n].T, solution[n]


MASKS = {
    "hard": torch.tensor([1, 0, 1, 1, 0, 1, 0, 1], dtype=torch.float64),
    "soft": torch.tensor([1, 0.5, 1, 0.25, 0, 1, 0.5, 0.75], dtype=torch.float64),
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_fit_of_a_layer_is_the_best_there_is(kind: str, masks: str) -> None:
    """Weights are those of an independent solver; the last eighth of the samples is not fitted to."""
    found, mask = two(kind), MASKS[masks]
    found.masked.set_masks({"first": mask})
    before, layer, x = found.weights(), found.dense.second, batch_for(found.template, 2 * JUDGES, 1)[0]
    with torch.no_grad():
        whole = nn.functional.silu(found.dense.first(x))
        per_unit = mask.float().view(-1, *[1] * (whole.ndim - 2)) if whole.shape[-1] != 8 else mask.float()
        inputs = patches(layer, nn.functional.silu(found.dense.first(x) * per_unit))
        outputs = layer(whole).movedim(-1 if whole.shape[-1] == 8 else 1, -1).flatten(0, -2).double()
    known = len(inputs) * (JUDGES - 1) // JUDGES
    odds = torch.where(mask > 0, (1 - mask) / mask, 0).repeat_interleave(inputs.shape[1] // 8)
    old = layer.weight.detach().flatten(1)
    weight, bias = best(inputs[:known], outputs[:known], old, layer.bias, odds)
    assert same(found.fit(count=2 * JUDGES), {key: before[key] for key in before if key[:6] == "second"})
    new = found.masked.weights["second.weight"].detach().flatten(1)
    live = inputs.abs().amax(0) > 0
    torch.testing.assert_close(new.double()[:, live], weight[:, live], rtol=1e-3, atol=1e-4)
    assert torch.equal(new[:, ~live], old[:, ~live])
    assert not torch.allclose(new[:, live], old[:, live], atol=1e-2)
    if layer.bias is not None:
        found_bias = found.masked.weights["second.bias"].detach().double()
        torch.testing.assert_close(found_bias, bias, rtol=1e-3, atol=1e-4)


class Plain(nn.Module):
    """A linear layer whose inputs are columns of the sample, each a unit."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(weight.shape[1], weight.shape[1], bias=False)
        self.second = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.first.weight.data.copy_(torch.eye(weight.shape[1]))
        self.second.weight.data.copy_(weight)

    def forward(self, sample: torch.Tensor, timestep: Any = None, return_dict: bool = True) -> Any:
        return (self.second(self.first(sample)),)


def plain(inputs: int) -> Pair:
    weight = torch.randn(3, inputs, generator=torch.Generator().manual_seed(0))
    return Pair(Plain(weight), (toy_group("first", "second", inputs),), {"sample": torch.zeros(1, inputs)})


def fit_to(found: Pair, x: torch.Tensor) -> torch.Tensor:
    """The second layer's weights after a fit on these samples."""
    Refit(found.masked, found.dense, {}, 0).fit(x, torch.zeros(len(x)), Conditions({}, {}, "sample", None), 1)
    return found.masked.weights["second.weight"].detach().double()


def test_a_soft_mask_is_the_chance_that_its_unit_stays() -> None:
    """The fit is the best over all choices of what stays, each counted as often as the masks say."""
    found, mask = plain(5), torch.tensor([0.5, 1, 0.25, 1, 0.75]).double()
    source = torch.Generator().manual_seed(1)
    x = torch.randn(400, 5, generator=source) @ torch.randn(5, 5, generator=source)  # correlated
    found.masked.set_masks({"first": mask})
    old = found.dense.second.weight.detach().double()
    known = x[: 400 - 400 // JUDGES].double()
    parts, wanted = [], []
    for choice in itertools.product((0.0, 1.0), repeat=3):
        stays = torch.tensor([choice[0], 1, choice[1], 1, choice[2]]).double()
        chance = float(torch.where(stays == 1, mask, 1 - mask).prod()) ** 0.5
        parts.append(chance * known * stays)
        wanted.append(chance * known @ old.T)
    ridge = (RIDGE * (known * mask).square().sum(0).mean()).sqrt()
    parts.append(ridge * torch.eye(5, dtype=torch.float64))
    wanted.append(ridge * old.T)
    expected = torch.linalg.lstsq(torch.cat(parts), torch.cat(wanted)).solution.T
    new = fit_to(found, x)
    torch.testing.assert_close(new, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(new, old, atol=0.05)


def test_a_mask_of_one_half_does_not_double_what_reads_it() -> None:
    """Nothing else knows what the unit says: its weights stay, and its share of the output is halved."""
    found, x = plain(4), torch.randn(4000, 4, generator=torch.Generator().manual_seed(1))
    old = found.dense.second.weight.detach().double()
    found.masked.set_masks({"first": torch.tensor([0.5, 1, 1, 1]).double()})
    assert float((fit_to(found, x) - old).abs().max()) < 0.05 * float(old.abs().max())


def test_a_fit_that_does_not_hold_on_other_samples_is_dropped() -> None:
    """Two units agree on the samples that are fitted to, and contradict each other on those that judge."""
    source = torch.Generator().manual_seed(1)
    x = torch.randn(64, 2, generator=source)
    x[:, 1] = x[:, 0]
    results = []
    for sign in (1, -1):
        found = plain(2)
        found.masked.set_masks({"first": torch.tensor([1.0, 0]).double()})
        x[56:, 1] = sign * x[56:, 0]
        results.append(torch.equal(fit_to(found, x), found.dense.second.weight.double()))
    assert results == [False, True]


def test_a_layer_that_runs_twice_is_left_alone() -> None:
    """No single set of weights serves both."""
    torch.manual_seed(0)
    found = Pair(
        Two(nn.Linear(8, 8), nn.Linear(8, 5), twice=True), (toy_group("first", "second", 8),),
        {"sample": torch.zeros(1, 8)},
    )  # fmt: skip
    found.masked.set_masks({"first": MASKS["hard"]})
    assert found.fit() == {}


def test_samples_that_are_not_finite_change_nothing() -> None:
    found = plain(3)
    found.masked.set_masks({"first": torch.tensor([1.0, 0, 1]).double()})
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    x[5] = math.nan
    assert torch.equal(fit_to(found, x), found.dense.second.weight.double())


# --- residual streams ----------------------------------------------------------------------------


def test_streams_of_residual_blocks_are_found() -> None:
    """Each last layer of a branch, and where what it is added to can be seen."""
    seen = {name: (c.module, c.argument) for name, c in pair("ddpm").residuals.items()}
    assert seen["down_blocks.0.resnets.1.conv2"] == ("down_blocks.0.resnets.0", None)
    shortcut = "up_blocks.0.resnets.0.conv_shortcut"  # runs last, and makes up for the other branch
    assert seen[shortcut] == ("up_blocks.0.resnets.0.conv2", None)
    assert "up_blocks.0.resnets.0.conv2" not in seen
    assert seen["mid_block.attentions.0.to_out.0"] == ("mid_block.resnets.0", None)
    seen = {name: (c.module, c.argument) for name, c in pair("sd2").residuals.items()}
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert seen[f"{block}.ff.net.2"] == (f"{block}.norm3", 0)
    assert seen["mid_block.attentions.0.proj_out"] == ("mid_block.resnets.0", None)


def test_the_target_of_a_branch_is_what_its_stream_lacks() -> None:
    """A stream of which a part is masked: the branch gives the dense sum less what is left of it."""
    distances = []
    for blind in (False, True):
        torch.manual_seed(0)
        model = Two(nn.Linear(8, 32), nn.Linear(32, 8), residual=True)
        model.start = nn.Linear(8, 8)
        group = toy_group("start", "first", 8)
        found = Pair(model, (group,), {"sample": torch.zeros(1, 4, 8)})
        assert {name: carrier.module for name, carrier in found.residuals.items()} == {"second": "start"}
        found.residuals = {} if blind else found.residuals
        mask, old = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1]).float(), found.dense.second
        found.masked.set_masks({"start": mask.double()})
        found.fit(count=512)
        distances.append(found.distance())
        x = batch_for(found.template, 512, 1)[0][: 512 - 512 // JUDGES]
        with torch.no_grad():
            left = found.dense.start(x) * mask
            first = found.masked.model.get_submodule("first")  # as it was fitted just before
            hidden = nn.functional.silu(first(left)).flatten(0, 1)
            sum_of_dense = found.dense(x)[0]
            wanted = sum_of_dense - (found.dense.start(x) if blind else left)
        expected = best(
            hidden.double(),
            wanted.flatten(0, 1).double(),
            old.weight.detach(),
            old.bias.detach(),
            torch.zeros(32),
        )
        for leaf, values in zip(("weight", "bias"), expected, strict=True):
            fitted = found.masked.weights[f"second.{leaf}"].detach().double()
            torch.testing.assert_close(fitted, values, rtol=1e-3, atol=1e-3)
    assert distances[0] < 0.8 * distances[1]


@given(
    seed=st.integers(0, 2**16),
    known=st.integers(3, 30),
    inputs=st.integers(2, 40),
    soft=st.booleans(),
    bias=st.booleans(),
)
@settings(max_examples=60)
def test_equations_as_wide_as_rows_give_what_those_as_wide_as_inputs_give(
    seed: int, known: int, inputs: int, soft: bool, bias: bool
) -> None:
    """With dead inputs, soft masks and offsets; more or fewer rows than inputs."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(known + 4, inputs, generator=source, dtype=torch.float64)
    x[:, :: max(2, inputs // 3)] = 0
    y = torch.randn(known + 4, 5, generator=source, dtype=torch.float64) + 3
    odds = torch.rand(inputs, generator=source, dtype=torch.float64) if soft else None
    problem = Problem(lambda first, end: x[first:end], y, odds, known)
    weight = torch.randn(5, inputs, generator=source, dtype=torch.float64)
    offset = torch.randn(5, generator=source, dtype=torch.float64) if bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(least_squares, "OFFSET_RIDGE", 1e-12)  # rows centre instead
        ways = [way(weight, offset) for way in (problem.step_of_moments, problem.step_of_rows)]
    if not bool(x[:known].any()):
        return
    (moments, first), (rows, second) = [way for way in ways if way is not None]
    torch.testing.assert_close(rows, moments, rtol=1e-4, atol=1e-6)
    assert (first is None) is (second is None)
    if first is not None:
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)


class Shifted(nn.Module):
    """A number is the first summand of one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (torch.add(1.0, self.layer(sample)) + sample,)


def test_sums_with_a_number_have_no_second_stream() -> None:
    assert find_residuals(Shifted(), {"sample": torch.zeros(1, 3)}) == {}
