"""What makes groups comparable: the rise of the loss when units go and a refit follows.

pytest tests/flow/test_comparison.py
"""

import gc
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import structure
from test_flow import TINY, masked_model, toy_images
from test_refit import Pair, batch_for, pair
from test_refit_layers import patches
from test_structure import toy_group
from torch import nn

from gfprune_cli.diffusion.draws import generator
from gfprune_cli.flow import comparison
from gfprune_cli.flow.comparison import (
    LEAST_RISE,
    RIDGE,
    Curves,
    comparable,
    missed_by_input,
    weakest_first,
)
from gfprune_cli.flow.mask import MaskedModel, Masks, full_masks
from gfprune_cli.flow.refit import Refit
from gfprune_cli.structure.blocks import gate
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.groups import ChannelGroup, Member, select
from gfprune_cli.structure.search import step_scores


def random_scores(groups: tuple[ChannelGroup, ...], seed: int = 3) -> Masks:
    return {
        group.name: torch.rand(group.units, generator=generator(seed, group.name), dtype=torch.float64)
        for group in groups
    }


def rises_of(found: Pair, scores: Mapping[str, torch.Tensor], seed: int = 0, count: int = 16) -> Masks:
    order = {group.name: weakest_first(group, scores[group.name]) for group in found.masked.groups}
    return Curves(found.masked, order, seed).take(*batch_for(found.template, count, 5))


def test_a_comparison_holds_nothing_when_it_is_done() -> None:
    """The way back ends where the first layer is; what lies before kept the weights for the rest of a run."""
    found = pair("ddpm")
    rises_of(found, random_scores(found.masked.groups), count=2)
    masked = weakref.ref(found.masked.weights["conv_in.weight"])
    del found
    gc.collect()
    assert masked() is None


# --- the closed form -----------------------------------------------------------------------------


class Three(nn.Module):
    """Layers one behind another, each reading what the one before gives."""

    def __init__(self, first: nn.Module, second: nn.Module, third: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.third = first, second, third

    def forward(self, sample: torch.Tensor, timestep: Any = None, return_dict: bool = True) -> Any:
        hidden = nn.functional.silu(self.first(sample))
        return (self.third(torch.tanh(self.second(hidden))),)


STACKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Three(nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 4)), (7, 5)),
    "conv": (
        lambda: Three(
            nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(6, 4, (1, 2))
        ),
        (5, 6, 6),
    ),
}
# eight units in two cells, and three units of two channels each
CELLS = {"first": torch.arange(8).view(4, 2).T.contiguous(), "second": torch.arange(3).view(1, 3)}


def stack(kind: str) -> Pair:
    torch.manual_seed(0)
    build, shape = STACKS[kind]
    groups = []
    for name, reader, channels, size in (("first", "second", 8, 1), ("second", "third", 6, 2)):
        every = torch.arange(channels)
        members = (Member(name, "out", "linear", every, every), Member(reader, "in", "linear", every, every))
        groups.append(ChannelGroup(name, channels, size, CELLS[name], members))
    found = Pair(build(), tuple(groups), {"sample": torch.zeros(1, *shape)})
    masks = full_masks(found.masked.groups)
    masks["first"][2], masks["first"][5] = 0, 0.5  # comparisons are made on the way, too
    found.masked.set_masks(masks)
    return found


def missed(x: torch.Tensor, weight: torch.Tensor, going: torch.Tensor) -> torch.Tensor:
    """[outputs] mean square that the best weights of the inputs that stay leave, by one call of lstsq.

    Args:
        x: [positions, inputs], weight: [outputs, inputs], going: bool [inputs].
    """
    ridge = RIDGE * x.square().mean(0).mean()
    wide = torch.cat([x / len(x) ** 0.5, ridge.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    wanted, staying = wide @ weight.T, wide[:, ~going]
    if staying.shape[1]:
        wanted = wanted - staying @ torch.linalg.lstsq(staying, wanted).solution
    return wanted.square().sum(0)


@pytest.mark.parametrize("kind", STACKS)
def test_rises_are_what_the_best_refit_leaves_weighted_by_curvature(kind: str) -> None:
    """Against a solver for each set of units, and derivatives of a network written out by hand."""
    found = stack(kind)
    scores = random_scores(found.masked.groups)
    rises = rises_of(found, scores, seed=7)
    x, _, _ = batch_for(found.template, 16, 5)
    weights = {name: weight.detach() for name, weight in found.masked.passing().items()}

    def run(name: str, given: torch.Tensor) -> torch.Tensor:
        own = {leaf: weights[f"{name}.{leaf}"] for leaf in ("weight", "bias")}
        return torch.func.functional_call(found.dense.get_submodule(name), own, (given,))

    hidden = nn.functional.silu(run("first", x)).requires_grad_()
    second = run("second", hidden)
    inner = torch.tanh(second)
    third = run("third", inner)
    along = torch.randn(third.shape, generator=generator(7, "curves"))
    slopes = torch.autograd.grad((third * along).sum(), [second, third])
    axis = -1 if kind == "linear" else 1
    cases = (("first", "second", hidden, slopes[0]), ("second", "third", inner, slopes[1]))
    for group, reader, read, slope in cases:
        layer = found.dense.get_submodule(reader)
        inputs, weight = patches(layer, read.detach()), weights[f"{reader}.weight"].flatten(1).double()
        curvature = slope.movedim(axis, -1).flatten(0, -2).double().square().sum(0)
        units = next(one for one in found.masked.groups if one.name == group)
        order, going = weakest_first(units, scores[group]), torch.zeros(units.units, dtype=torch.bool)
        for step, leaving in enumerate(order):
            going[leaving] = True
            columns = going.repeat_interleave(inputs.shape[1] // units.units)
            expected = float(missed(inputs, weight, columns) @ curvature)
            assert float(rises[group][step]) == pytest.approx(expected, rel=1e-3)
    assert min(len(curve) for curve in rises.values()) > 2


def test_the_weakest_units_of_every_cell_go_first() -> None:
    group = toy_group(2, 3, 1)
    scores = torch.tensor([5.0, 0, 1, 4, 3, 2])  # cells are the even and the odd units
    assert weakest_first(group, scores).tolist() == [[2, 1], [4, 5], [0, 3]]
    for steps in range(4):
        kept = select(group, scores, group.channels - steps * group.step)
        assert set(torch.nonzero(~kept).flatten().tolist()) == set(
            weakest_first(group, scores)[:steps].flatten().tolist()
        )


@pytest.mark.parametrize("name", ["no-middle-attention", "sd2", "flux"])
def test_curves_never_fall(name: str) -> None:
    """The more units go, the higher the rise; all of them together hurt."""
    found = pair(name, blocks=True)
    rises = rises_of(found, random_scores(found.masked.groups))
    for group in found.masked.groups:
        curve = rises[group.name]
        assert len(curve) == group.cells.shape[1]
        assert bool((curve.diff() >= -1e-9 * float(curve[-1])).all()), group.name
        assert 0 < float(curve[0]) <= float(curve[-1]) < math.inf


@pytest.mark.parametrize("name", ["no-middle-attention", "flux"])
def test_rises_rank_groups_as_a_refit_does(name: str) -> None:
    """Half of each group masked alone, the network fitted: what hurts most was said to hurt most."""
    found = pair(name, blocks=True)
    groups = found.masked.groups
    scores = random_scores(groups)
    rises, said, real = rises_of(found, scores), [], []
    for group in groups:
        order = weakest_first(group, scores[group.name])
        steps, masks = max(1, len(order) // 2), full_masks(groups)
        masks[group.name][order[:steps].flatten()] = 0
        found.masked.set_masks(masks)
        changed = found.fit()
        said.append(float(rises[group.name][steps - 1]))
        real.append(found.distance())
        Refit(found.masked, found.dense, found.residuals, 0).restore(changed)
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (said, real)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.85


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no-middle-attention", "flux", "sd2"])
def test_a_block_costs_what_it_adds_to_each_of_its_streams(name: str) -> None:
    """Mean square of what it adds times curvature, channel by channel, of images and of tokens."""
    found = pair(name, blocks=True)
    rises = rises_of(found, random_scores(found.masked.groups), seed=2)
    blocks = [group.name for group in found.masked.groups if group.stack]
    outputs: dict[str, Any] = {}
    streams: dict[str, Any] = {}

    def keep(block: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            outputs[block] = (output,) if isinstance(output, torch.Tensor) else output
            closed = gate(module, torch.tensor(0.0), args, kwargs, output)  # a gate that is shut: the streams
            streams[block] = (closed,) if isinstance(closed, torch.Tensor) else closed

        return hook

    for block in blocks:
        found.dense.get_submodule(block).register_forward_hook(keep(block), with_kwargs=True)
    plain = MaskedModel(found.dense.requires_grad_(True), ())
    result = plain.forward(plain.weights, *batch_for(found.template, 16, 5))
    along = torch.randn(result.shape, generator=generator(2, "curves"))
    for block in blocks:
        slopes = torch.autograd.grad(
            (result * along).sum(), outputs[block], retain_graph=True, allow_unused=True
        )
        expected = 0.0
        for slope, after, before in zip(slopes, outputs[block], streams[block], strict=True):
            if slope is not None:
                channels = [dim for dim in range(after.ndim) if dim != (1 if after.ndim == 4 else 2)]
                added = (after - before).detach().double().square().mean(channels)
                expected += float(added @ slope.double().square().sum(channels))
        assert rises[block].tolist() == pytest.approx([expected], rel=1e-3)


def test_a_block_that_only_matters_to_the_text_is_not_taken_for_free() -> None:
    """More text tokens than image tokens: both streams count, and no block costs nothing."""
    found = pair("flux", blocks=True)
    assert batch_for(found.template, 1, 0)[2].tensors["encoder_hidden_states"].shape[2] > 4  # type: ignore[union-attr]
    rises = rises_of(found, random_scores(found.masked.groups))
    blocks = [float(rises[group.name][0]) for group in found.masked.groups if group.stack]
    assert min(blocks) > 1e-2 * max(blocks)


# --- scores --------------------------------------------------------------------------------------


def compared(masked: MaskedModel, scores: Mapping[str, torch.Tensor], seed: int = 0) -> Masks:
    images = toy_images()
    return comparable(masked, scores, images, torch.arange(len(images)), None, seed)


@pytest.mark.parametrize("piece", [1, 3])
def test_pieces_change_rounding_alone(piece: int) -> None:
    masked = masked_model()
    scores, images = random_scores(masked.groups), toy_images()
    whole = compared(masked, scores)
    found = comparable(masked, scores, images, torch.arange(len(images)), None, 0, piece)
    for name, values in whole.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-9)


def test_samples_count_by_their_importance() -> None:
    """Rises are sums over the samples, each as often as it is told."""
    masked, images, wanted = masked_model(), toy_images(), torch.tensor([0.0, 1, 2, 0, 0.5, 21])
    scores = random_scores(masked.groups)
    order = {group.name: weakest_first(group, scores[group.name]) for group in masked.groups}

    def rises(importance: torch.Tensor | None) -> Masks:
        return Curves(masked, order, 0).take(images, torch.arange(len(images)), None, 4, importance)

    alone = [rises(nn.functional.one_hot(torch.tensor(number), len(images)).float()) for number in range(6)]
    for found, counts in ((rises(wanted), wanted), (rises(None), torch.ones(6))):
        for name, values in found.items():
            expected = sum(float(count) * one[name] for count, one in zip(counts, alone, strict=True))
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-9)


@settings(max_examples=8, derandomize=True)
@given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_within_a_group_units_keep_their_order(seed: int, ties: bool) -> None:
    """Prices rise from step to step, all are positive, and selection by them is that by the scores."""
    masked = masked_model()
    scores = random_scores(masked.groups, seed)
    scores = {name: (4 * values).round() if ties else values for name, values in scores.items()}
    found = compared(masked, scores)
    for group in masked.groups:
        values = found[group.name]
        assert (values.shape, values.dtype) == ((group.units,), torch.float64)
        assert bool((values > 0).all())
        prices = step_scores(group, values)
        assert prices == sorted(prices)
        for cell in group.cells:
            ranked = cell[scores[group.name][cell].argsort(stable=True)]
            assert bool((values[ranked].diff() >= 0).all())


def test_prices_add_up_to_the_rise() -> None:
    """All units of a group together cost the end of its curve, and a little for every step."""
    masked = masked_model()
    scores, images = random_scores(masked.groups), toy_images()
    order = {group.name: weakest_first(group, scores[group.name]) for group in masked.groups}
    rises = Curves(masked, order, 0).take(images, torch.arange(len(images)), None)
    found = compared(masked, scores)
    steps = sum(len(curve) for curve in rises.values())
    least = LEAST_RISE * sum(float(curve[-1]) for curve in rises.values()) / steps
    for group in masked.groups:
        curve = rises[group.name]
        assert float(found[group.name].sum()) == pytest.approx(float(curve[-1]) + len(curve) * least)
        cheapest = sorted(curve.diff(prepend=curve.new_zeros(1)).tolist())
        assert step_scores(group, found[group.name]) == pytest.approx([least + step for step in cheapest])


def test_a_group_that_no_layer_reads_costs_next_to_nothing() -> None:
    """And still more than nothing: what costs nothing would be taken whatever it saves."""
    masked = masked_model()
    first, *others = masked.groups
    alone = replace(first, members=first.producers)
    found = compared(MaskedModel(masked.model, (alone, *others)), random_scores(masked.groups))
    assert bool((found[first.name] > 0).all())
    assert len(found[first.name].unique()) == 1
    mean = float(torch.cat(list(found.values())).mean())
    assert float(found[first.name].max()) < 1e-3 * mean


def test_units_that_are_gone_already_cost_next_to_nothing() -> None:
    """The rest of the curve is that of the network that is left."""
    found = stack("linear")
    group, scores = found.masked.groups[0], random_scores(found.masked.groups)
    gone = weakest_first(group, scores["first"])[0]
    curves = []
    for level in (1.0, 0.0):
        masks = full_masks(found.masked.groups)
        masks["first"][gone] = level
        found.masked.set_masks(masks)
        curves.append(rises_of(found, scores)["first"])
    assert float(curves[1][0]) < 0.05 * float(curves[0][0])
    assert float(curves[1][1]) > 0.2 * float(curves[0][1] - curves[0][0])


def test_a_group_that_hurts_more_keeps_more() -> None:
    """Scores alone say that groups are alike; what reads the narrowest becomes a hundred times as loud."""
    groups, _, cost = structure(TINY)
    scores = {group.name: torch.ones(group.units) for group in groups}
    masked = masked_model()
    before = allocate(cost, compared(masked, scores), 0.4).kept
    quiet = min(groups, key=lambda group: before[group.name] / group.channels)
    assert before[quiet.name] < quiet.channels
    reader = next(member.module for member in quiet.members if member.side == "in")
    with torch.no_grad():
        masked.weights[f"{reader}.weight"].mul_(100)
    assert allocate(cost, compared(masked, scores), 0.4).kept[quiet.name] > before[quiet.name]


def test_a_comparison_follows_from_its_seed_and_leaves_the_network_alone() -> None:
    masked = masked_model()
    before = {name: weight.detach().clone() for name, weight in masked.weights.items()}
    scores = random_scores(masked.groups)
    first, again, other = (compared(masked, scores, seed) for seed in (1, 1, 2))
    assert all(torch.equal(values, again[name]) for name, values in first.items())
    assert not all(torch.equal(values, other[name]) for name, values in first.items())
    assert all(torch.equal(weight, before[name]) for name, weight in masked.weights.items())
    assert all(weight.grad is None for weight in masked.weights.values())
    assert not any(module._forward_hooks for module in masked.model.modules())


@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 60),
    inputs=st.integers(1, 60),
    block=st.integers(1, 70),
    mean=st.sampled_from((0, 4)),
)
@settings(max_examples=60)
def test_moments_of_few_rows_are_followed_through_the_rows(
    seed: int, rows: int, inputs: int, block: int, mean: int
) -> None:
    """Block by block the same as one factor of the whole, of more or fewer rows than inputs; nearly so where
    inputs are of single precision, and far from centred."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=source, dtype=torch.float64) + mean
    weight = torch.randn(3, inputs, generator=source, dtype=torch.float64)
    scale = torch.rand(3, 1, generator=source, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "BLOCK", block)
        found = missed_by_input(x, weight, scale)
        single = missed_by_input(x.float(), weight, scale)
    moments = x.T @ x / rows
    moments.diagonal().add_(RIDGE * moments.diagonal().mean())
    expected = (weight * scale @ torch.linalg.cholesky(moments)).square().sum(0)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert single is not None
    torch.testing.assert_close(single, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
