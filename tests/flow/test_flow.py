"""What to remove, and how gradually: energy, criteria, masks, schedule and the resumable loop.

pytest tests/flow/test_flow.py
"""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import build, plain_norms, structure
from torch import nn

from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import UnevenGroupNorm
from gfprune_cli.diffusion.draws import Draws, generator
from gfprune_cli.diffusion.loss import one_sample
from gfprune_cli.diffusion.schedulers import VariancePreserving
from gfprune_cli.errors import GfpruneError, Interrupted
from gfprune_cli.flow import loop as flow_loop
from gfprune_cli.flow.comparison import comparable
from gfprune_cli.flow.criteria import CRITERIA, Evidence, score
from gfprune_cli.flow.energy import (
    Loss,
    Weights,
    choose_way,
    exact_product,
    finite_difference_product,
    gradient,
    norm,
    take_gradient,
)
from gfprune_cli.flow.loop import (
    PruningLoop,
    RefitResult,
    scoring_losses,
)
from gfprune_cli.flow.mask import MaskedModel, full_masks, move, settled
from gfprune_cli.flow.masked_norms import MaskedGroupNorm
from gfprune_cli.flow.passing import Remake
from gfprune_cli.flow.refit import Refit
from gfprune_cli.flow.residuals import find_residuals
from gfprune_cli.flow.schedule import Schedule
from gfprune_cli.flow.unit_sums import unit_sums
from gfprune_cli.outputs.state import StateFolder
from gfprune_cli.progress import Event, silent
from gfprune_cli.pruning.state import Outcome, RecoveryState
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.groups import ChannelGroup, Member, select

TINY = "no-middle-attention"
many = settings(max_examples=60, derandomize=True)


def process(steps: int = 20) -> VariancePreserving:
    return VariancePreserving(torch.linspace(0.99, 0.02, steps), "epsilon")


def toy_images(count: int = 6) -> torch.Tensor:
    return torch.rand((count, 3, 8, 8), generator=torch.Generator().manual_seed(1)) * 2 - 1


def masked_model(dtype: torch.dtype = torch.float32) -> MaskedModel:
    return MaskedModel(build(TINY, 3, dtype).requires_grad_(True), structure(TINY)[0])


def double_losses(masked: MaskedModel, chunks: int = 2) -> list[Loss]:
    """Denoising losses in float64, without the product's own loss code, which rounds to float32."""
    noising, draws = process(), Draws(toy_images().double(), 20, 5)

    def chunk(number: int) -> Loss:
        batch = draws.batch("score", 1, 2, first=2 * number, of=2 * chunks)

        def loss(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
            noisy = noising.add_noise(batch.images, batch.noise, batch.index)
            return (masked.forward(weights, noisy, batch.index, None) - batch.noise).square().mean()

        return loss

    return [chunk(number) for number in range(chunks)]


# --- energy --------------------------------------------------------------------------------------


def small_losses(dtype: torch.dtype, chunks: int = 3) -> tuple[list[Loss], Weights]:
    """A network of 26 parameters, with curvature, and one loss per chunk."""
    source = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

    weights = {"a": draw(4, 3), "b": draw(4), "c": draw(2, 4), "unused": draw(2)}
    data = [(draw(5, 3), draw(5, 2)) for _ in range(chunks)]

    def chunk(x: torch.Tensor, y: torch.Tensor) -> Loss:
        def loss(w: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return (torch.tanh(x @ w["a"].T + w["b"]) @ w["c"].T - y).square().mean()

        return loss

    return [chunk(x, y) for x, y in data], weights


def flatten(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in weights.values()])


def reference(losses: list[Loss], weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient [P], Hessian [P, P]) of the mean loss, taken whole by torch.func."""

    def mean_loss(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([tensor.numel() for tensor in weights.values()])
        named = {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}
        return torch.stack([loss(named) for loss in losses]).mean()

    point = flatten(weights)
    return torch.func.grad(mean_loss)(point), torch.func.hessian(mean_loss)(point)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_gradient_is_the_mean_over_chunks() -> None:
    """Loss and gradient are the means over the chunks; the weights passed in are left alone."""
    losses, weights = small_losses(torch.float64)
    before = flatten(weights).clone()
    value, found = gradient(losses, weights)
    expected, _ = reference(losses, weights)
    assert value == pytest.approx(float(sum(loss(weights) for loss in losses)) / 3)
    assert relative_error(flatten(found), expected) < 1e-12
    assert torch.equal(flatten(weights), before)
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in weights.values())


def test_gradients_of_two_parameters_may_share_memory() -> None:
    """autograd may hand out one tensor for both sides of a sum: each must be averaged once."""
    weights = {"a": torch.ones(3), "b": torch.ones(3)}
    losses: list[Loss] = [
        lambda w: (w["a"] + w["b"]).square().sum() / 2,
        lambda w: (w["a"] + w["b"]).square().sum(),
    ]
    _, found = gradient(losses, weights)
    for name in weights:
        torch.testing.assert_close(found[name], torch.full((3,), 3.0))
    _, found = gradient([lambda w: (w["a"] + w["b"]).sum()] * 2, weights)  # expanded from one number
    for name in weights:
        torch.testing.assert_close(found[name], torch.ones(3))


def test_a_turn_whose_weights_a_pass_never_reads_has_no_gradient() -> None:
    """Experts that no sample is routed to, for one."""
    losses: list[Loss] = [lambda w: w["a"].square().sum()]
    taken: list[str] = []
    weights = {"a": torch.ones(2), "b": torch.ones(2)}
    value = take_gradient(losses, weights, lambda name, _: taken.append(name), names=["b"])
    assert (value, taken) == (2.0, [])


def test_exact_product_is_exact() -> None:
    """H v by double backward agrees with the full Hessian to 1e-9, unused parameters included."""
    losses, weights = small_losses(torch.float64)
    _, hessian = reference(losses, weights)
    vector = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    found = flatten(exact_product(losses, weights, vector))
    assert relative_error(found, hessian @ flatten(vector)) < 1e-9


def test_finite_difference_product_is_close_in_float32() -> None:
    """H g by differences in float32 is within 2e-3 of the float64 Hessian."""
    losses, weights = small_losses(torch.float64)
    expected_gradient, hessian = reference(losses, weights)
    single, single_weights = small_losses(torch.float32)
    _, first = gradient(single, single_weights)
    found = flatten(finite_difference_product(single, single_weights, first))
    assert relative_error(found, hessian @ expected_gradient) < 2e-3


def test_products_agree_on_a_network() -> None:
    """On a U-Net, differences of gradients and the double backward give the same H g."""
    masked = masked_model(torch.float64)
    losses = double_losses(masked)
    weights = {name: tensor.detach() for name, tensor in masked.passing().items()}
    _, first = gradient(losses, weights)
    exact = flatten(exact_product(losses, weights, first))
    assert relative_error(flatten(finite_difference_product(losses, weights, first)), exact) < 2e-3


def test_hessian_meets_the_mean_gradient() -> None:
    """g over all chunks first, then H g: the mean of H_j g_j is something else."""
    losses, weights = small_losses(torch.float64)
    expected_gradient, hessian = reference(losses, weights)
    _, first = gradient(losses, weights)
    found = flatten(exact_product(losses, weights, first))
    assert relative_error(found, hessian @ expected_gradient) < 1e-9
    parts = [reference([loss], weights) for loss in losses]
    per_chunk = torch.stack([h @ g for g, h in parts]).mean(0)
    assert relative_error(found, per_chunk) > 0.05


def test_evidence_applies_the_hessian_to_the_mean_gradient() -> None:
    """The order holds in what the criteria see, too."""
    masked = masked_model(torch.float64)
    losses = double_losses(masked)
    flow = Evidence(masked, losses, 0, way="exact").energy_flow()
    weights = {name: tensor.detach() for name, tensor in masked.passing().items()}
    _, first = gradient(losses, weights)
    product = exact_product(losses, weights, first)
    expected = unit_sums(masked, product, lambda name, part: masked.weights[name].detach() * part)
    assert all(torch.allclose(flow[n], expected[n], rtol=1e-9, atol=0) for n in flow)


def test_weights_made_as_they_are_needed_give_what_all_at_once_give() -> None:
    """Outputs and gradients, behind soft masks and moved along a direction; the network is as it was."""
    masked = masked_model(torch.float64)
    masked.set_masks({name: torch.linspace(0.1, 1, len(mask)) for name, mask in masked.masks.items()})
    losses = double_losses(masked)
    before = {name: weight.detach().clone() for name, weight in masked.weights.items()}
    vector = {name: torch.randn_like(weight) for name, weight in before.items()}
    whole = {name: w.detach() + 1e-3 * vector[name] for name, w in masked.passing().items()}
    value, found = gradient(losses, masked.passing().moved(vector, 1e-3))
    leaves = {name: tensor.requires_grad_() for name, tensor in whole.items()}
    expected = torch.stack([loss(leaves) for loss in losses]).mean()
    slopes = torch.autograd.grad(expected, list(leaves.values()))
    assert value == pytest.approx(expected.item(), rel=1e-12)
    for name, slope in zip(leaves, slopes, strict=True):
        torch.testing.assert_close(found[name], slope, rtol=1e-9, atol=1e-12)
    assert dict(masked.model.named_parameters()) == masked.weights
    assert all(torch.equal(masked.weights[name], weight) for name, weight in before.items())


def test_autograd_keeps_how_weights_are_made_and_not_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of every layer behind masks are made again on the way back."""
    masked = masked_model(torch.float64)
    masked.set_masks({name: torch.full((len(mask),), 0.5) for name, mask in masked.masks.items()})
    again, made = Remake.again, []
    monkeypatch.setattr(Remake, "again", lambda kept: made.append(kept.name) or again(kept))
    gradient(double_losses(masked)[:1], masked.passing())
    layers = dict(masked.model.named_modules())
    matrices = {
        name
        for name in masked.factors
        if isinstance(layers.get(name.removesuffix(".weight")), torch.nn.Conv2d | torch.nn.Linear)
    }
    first = {"conv_in.weight", "time_embedding.linear_1.weight"}  # nobody asks for the slopes of their inputs
    assert len(matrices - first) > 5
    assert matrices - first <= set(made)


class Borrowing(torch.nn.Module):
    """Reads the weights of a layer that it never calls, and one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lent, self.twice = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> Any:
        lent = torch.nn.functional.linear(x, self.lent.weight, self.lent.bias)
        return (self.twice(torch.tanh(self.twice(lent))),)


def test_weights_that_others_read_and_layers_that_run_twice_have_their_gradients() -> None:
    masked = MaskedModel(Borrowing().double(), ())
    x = torch.randn(4, 3, dtype=torch.float64)

    def loss(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return masked.forward(weights, x, torch.zeros(4)).square().sum()

    _, found = gradient([loss], masked.passing())
    loss(masked.weights).backward()
    for name, weight in masked.weights.items():
        torch.testing.assert_close(found[name], weight.grad)


def test_a_zero_gradient_gives_a_zero_product() -> None:
    """At a stationary point the difference quotient has no direction; the answer is 0, not 0 / 0."""
    weights = {"w": torch.ones(3)}
    product = finite_difference_product([lambda w: w["w"].sum()], weights, {"w": torch.zeros(3)})
    assert torch.equal(product["w"], torch.zeros(3))


def test_choose_way_trusts_differences_that_agree() -> None:
    """A smooth loss is differenced; one whose gradient jumps within the step is differentiated twice."""
    losses, weights = small_losses(torch.float32)
    assert choose_way(losses, weights, gradient(losses, weights)[1]) == "finite-difference"

    def jumping(
        w: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:  # the gradient jumps at 1: quotients grow as the step shrinks
        return 0.5 * w["w"].square().sum() + (w["w"] - 1).abs().sum()

    at_the_jump = {"w": torch.ones(4)}
    assert choose_way([jumping], at_the_jump, {"w": torch.ones(4)}) == "exact"

    def broken(w: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return w["w"].square().sum() * float("nan")

    assert choose_way([broken], at_the_jump, {"w": torch.ones(4)}) == "exact"


@pytest.mark.parametrize("level", [1.0, 0.5])
def test_energy_derivative(level: float) -> None:
    """dE/dm_i = -sum over p in unit i of theta_p (H g)_p, for E(m) = -1/2 |grad L(m * theta)|^2.

    Statistics of the norms are held fixed: the energy is a function of the effective weights.
    """
    masked = masked_model(torch.float64)
    losses = double_losses(masked)
    base = {name: mask * level for name, mask in full_masks(masked.groups).items()}

    def at(masks: dict[str, torch.Tensor]) -> Weights:
        masked.set_masks(masks)
        return {name: tensor.detach() for name, tensor in masked.passing().items()}

    def energy(masks: dict[str, torch.Tensor]) -> float:
        weights = at(masks)
        with plain_norms(masked):
            return -0.5 * norm(gradient(losses, weights)[1]) ** 2

    at(base)
    with plain_norms(masked):
        scores = score("gradient-flow", Evidence(masked, losses, 0, way="exact"))
    step = 2.0**-12  # a power of two: masks are float32
    for group in masked.groups[::4]:
        for unit in (0, group.units - 1):
            up, down = ({n: m.clone() for n, m in base.items()} for _ in range(2))
            up[group.name][unit] += step
            down[group.name][unit] -= step
            slope = (energy(up) - energy(down)) / (2 * step)
            scale = float(scores[group.name].abs().max())
            assert slope == pytest.approx(-float(scores[group.name][unit]), rel=1e-4, abs=1e-5 * scale)


# --- masks ---------------------------------------------------------------------------------------

fractions = st.floats(0, 1, width=32)
bounds = st.floats(0.01, 1)


@many
@given(data=st.data(), units=st.integers(1, 8), bound=bounds)
def test_masks_move_by_bounded_steps(data: st.DataObject, units: int, bound: float) -> None:
    """No jumps, and never outside [0, 1]; inside the support a mask rises, outside it falls."""
    numbers = st.lists(fractions, min_size=units, max_size=units)
    mask = torch.tensor(data.draw(numbers))
    inside = torch.tensor(data.draw(st.lists(st.booleans(), min_size=units, max_size=units)))
    moved = move({"g": mask}, {"g": inside}, bound)["g"]
    change = moved - mask
    assert moved.dtype == mask.dtype
    assert bool(((moved >= 0) & (moved <= 1)).all())
    assert float(change.abs().max()) <= bound + 1e-6
    assert torch.allclose(moved[inside], (mask[inside] + bound).clamp(max=1))
    assert torch.allclose(moved[~inside], (mask[~inside] - bound).clamp(min=0))


@many
@given(data=st.data(), bound=st.floats(0.02, 1))
def test_masks_settle_in_the_promised_iterations(data: st.DataObject, bound: float) -> None:
    """Whatever the supports were before, a support that stays is reached in the promised iterations."""
    group = 3
    flags = st.lists(st.booleans(), min_size=group, max_size=group)
    masks = {"g": torch.ones(group, dtype=torch.float64)}
    for inside in data.draw(st.lists(flags, max_size=12)):
        masks = move(masks, {"g": torch.tensor(inside)}, bound)
    last = torch.tensor(data.draw(flags))
    closing = Schedule(scorings=1, bound=bound).closing
    for _ in range(1 + closing):  # the last selection moves them, too
        masks = move(masks, {"g": last}, bound)
    assert torch.allclose(masks["g"], last.double(), atol=1e-6)  # the loop rounds what is left
    masks = move(masks, {"g": last}, bound)
    assert settled(masks)
    assert torch.equal(masks["g"] == 1, last)


def test_full_masks_change_no_weight() -> None:
    """At mask 1 effective weights equal the weights; at mask 0 a unit's producers are exactly zero."""
    masked = masked_model()
    assert all(torch.equal(tensor, masked.weights[name]) for name, tensor in masked.passing().items())
    group = masked.groups[2]
    masks = full_masks(masked.groups)
    masks[group.name][1] = 0
    masked.set_masks(masks)
    effective = dict(masked.passing())
    for member in group.producers:
        rows = member.positions[member.channels == 1]
        assert not bool(effective[f"{member.module}.weight"][rows].any())
        assert not bool(effective[f"{member.module}.bias"][rows].any())
    assert masked.weights[f"{group.name}.weight"][1].any()


# --- mask-aware norm -----------------------------------------------------------------------------


def norm_case(
    mask: list[float], groups: int, dtype: torch.dtype = torch.float64
) -> tuple[nn.GroupNorm, MaskedGroupNorm, torch.Tensor]:
    source = torch.Generator().manual_seed(4)
    plain = nn.GroupNorm(groups, len(mask), dtype=dtype)
    for parameter in plain.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=source))
    x = torch.randn((2, len(mask), 3, 3), generator=source, dtype=torch.float64).to(dtype) + 0.5
    aware = MaskedGroupNorm(plain)
    aware.set_mask(torch.tensor(mask))
    return plain, aware, x


def test_masked_norm_is_the_plain_one_at_full_mask() -> None:
    """Nothing is masked, nothing changes, bit for bit."""
    plain, aware, x = norm_case([1.0] * 6, 2)
    assert torch.equal(aware(x), plain(x))


def test_the_derivatives_of_an_uneven_group_norm_are_right() -> None:
    """Written in closed form, the first; scoring takes second ones, by way of the plain formula."""
    torch.manual_seed(0)
    norm = UnevenGroupNorm([2, 3, 1], 1e-5, torch.randn(6), torch.randn(6)).double()
    inputs = (torch.randn(2, 6, 3, 2).double().requires_grad_(), norm.weight, norm.bias)

    def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))
        return found

    assert torch.autograd.gradcheck(normed, inputs)
    assert torch.autograd.gradgradcheck(normed, inputs)
    frozen = norm.weight.detach(), norm.bias.detach()
    assert torch.autograd.gradgradcheck(lambda x: normed(x, *frozen), inputs[:1])
    with torch.no_grad():
        expected = norm(inputs[0])
    assert torch.equal(norm(inputs[0]), expected)


def test_masked_norm_at_binary_masks_is_the_norm_that_removal_leaves() -> None:
    """With zeros, the surviving channels are normalised as if the others had never been there."""
    mask = [1.0, 0, 1, 0, 1, 1]
    plain, aware, x = norm_case(mask, 2)
    alive = torch.tensor(mask).bool()
    narrow = nn.GroupNorm(2, 4, dtype=torch.float64)
    uneven = UnevenGroupNorm([2, 2], plain.eps, plain.weight[alive], plain.bias[alive])
    narrow.weight, narrow.bias = nn.Parameter(plain.weight[alive]), nn.Parameter(plain.bias[alive])
    aware.weight = nn.Parameter(plain.weight * alive)
    aware.bias = nn.Parameter(plain.bias * alive)
    hidden = x * alive.view(1, -1, 1, 1)
    mistaken = aware(x)  # what a masked channel holds does not matter, either
    for found in (aware(hidden), mistaken):
        torch.testing.assert_close(found[:, alive], narrow(x[:, alive]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[:, alive], uneven(x[:, alive]), rtol=1e-10, atol=1e-10)
        assert not bool(found[:, ~alive].any())


@many
@given(mask=st.lists(st.floats(0.0625, 1, width=32), min_size=6, max_size=6))
def test_masked_norm_weighs_channels_by_their_mask(mask: list[float]) -> None:
    """mean = sum m_c x_c / sum m_c and variance = sum m_c (x_c - mean)^2 / sum m_c, in each group."""
    plain, aware, x = norm_case(mask, 2)
    m = torch.tensor(mask).double()
    expected = torch.empty_like(x)
    for part in (slice(0, 3), slice(3, 6)):
        weights = (m[part] / m[part].sum() / 9).view(1, -1, 1, 1)
        mean = (weights * x[:, part]).sum((1, 2, 3), keepdim=True)
        variance = (weights * (x[:, part] - mean).square()).sum((1, 2, 3), keepdim=True)
        expected[:, part] = (x[:, part] - mean) / (variance + plain.eps).sqrt()
    expected = expected * plain.weight.view(1, -1, 1, 1) + plain.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(aware(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", [[1.0] * 6, [1.0, 0.5, 0.25, 0, 1, 0.75], [0.0, 0, 0, 1, 1, 1]])
def test_gradient_through_the_masked_norm(mask: list[float]) -> None:
    """First and second derivatives agree with differences, a norm group without survivors included."""
    _, aware, x = norm_case(mask, 2)
    x = x[:1, :, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(aware, (x,))
    assert torch.autograd.gradgradcheck(aware, (x,))


def test_an_empty_norm_group_stays_finite() -> None:
    """A norm group that lost every channel gives 0, not 0 / 0."""
    _, aware, x = norm_case([0.0, 0, 0, 1, 1, 1], 2)
    assert bool(aware(x * torch.tensor([0.0, 0, 0, 1, 1, 1]).view(1, -1, 1, 1)).isfinite().all())


# --- schedule ------------------------------------------------------------------------------------


def test_budget_tightens_towards_the_target() -> None:
    """The share rises, gently at the end, and is whole when selection ends."""
    schedule = Schedule(scorings=9, bound=0.5)
    assert (schedule.closing, schedule.iterations) == (1, 10)
    shares = [schedule.share(iteration) for iteration in range(1, 11)]
    steps = [after - before for before, after in itertools.pairwise(shares)]
    assert 0 < shares[0] < 0.5
    assert steps == sorted(steps, reverse=True)
    assert min(steps) >= 0
    assert shares[7] < shares[8] == shares[9] == 1
    assert [schedule.selects(i) for i in range(1, 11)] == [True] * 9 + [False]


@pytest.mark.parametrize(("bound", "closing"), [(1, 0), (0.5, 1), (0.4, 2), (1 / 3, 2), (0.1, 9), (0.01, 99)])
def test_closing_iterations_are_as_few_as_the_bound_allows(bound: float, closing: int) -> None:
    """The last selection moves the masks once; the others go the rest of the way."""
    assert Schedule(scorings=3, bound=bound).closing == closing


@many
@given(scorings=st.integers(1, 60), bound=st.floats(0.01, 1), seed=st.integers(0, 10**6))
def test_schedule_closes_every_mask(scorings: int, bound: float, seed: int) -> None:
    """At the end of any schedule every mask is 0 or 1, and equals the last support."""
    close(Schedule(scorings=scorings, bound=bound), seed)


@pytest.mark.parametrize(("scorings", "bound"), [(12, 0.0003), (1, 1 / 30_000)])
def test_long_schedules_close_too(scorings: int, bound: float) -> None:
    """The rounding of many small mask steps does not keep a long run from closing."""
    close(Schedule(scorings=scorings, bound=bound), 0)


def close(schedule: Schedule, seed: int) -> None:
    """Run the loop's own mask flow over random selections, without a network."""
    group = ChannelGroup("g", 12, 1, torch.arange(12).view(3, 4), ())
    masked: Any = MaskHolder((group,))
    no_draws: Any = None
    loop = PruningLoop(
        masked, None, lambda of_dense: 0.0, 0, process(), schedule, "random", lambda *scored: {},
        no_draws, 0, 1, NoStore(), silent,
    )  # fmt: skip
    selections = 0

    def fresh() -> dict[str, torch.Tensor]:
        nonlocal selections
        selections += 1
        source = generator(seed, loop.state.iteration)
        return {"g": select(group, torch.rand(12, generator=source, dtype=torch.float64), 6)}

    loop.rescore = fresh  # type: ignore[method-assign]
    widest = 0.0
    flow = loop.masked.set_masks

    def watch(masks: dict[str, torch.Tensor]) -> None:
        nonlocal widest
        widest = max(widest, float((masks["g"] - loop.masked.masks["g"]).abs().max()))
        flow(masks)

    loop.masked.set_masks = watch  # type: ignore[method-assign]
    kept = loop.run()
    assert settled(loop.masked.masks)
    assert torch.equal(kept["g"], loop.state.support["g"])
    assert int(kept["g"].sum()) == 6
    assert selections == schedule.scorings
    assert widest <= schedule.bound + 1e-6


class NoStore:
    """A store that keeps nothing."""

    def load(self) -> None:
        return None

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        pass


class MaskHolder:
    """Masks without a network."""

    def __init__(self, groups: tuple[ChannelGroup, ...]) -> None:
        self.groups = groups
        self.weights: dict[str, torch.Tensor] = {}
        self.half = None
        self.masks = full_masks(groups)
        self.recompute = None

    def set_masks(self, masks: dict[str, torch.Tensor]) -> None:
        self.masks = masks


class MemoryStore:
    """A store that survives in memory, with copies of everything."""

    def __init__(self) -> None:
        self.state: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        return self.state

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        copied = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.state = copied, json.loads(json.dumps(dict(numbers), allow_nan=False))


# --- criteria ------------------------------------------------------------------------------------


def evidence(masked: MaskedModel, seed: int = 0, iteration: int = 1) -> Evidence:
    draws = Draws(toy_images(), 20, seed)
    return Evidence(masked, scoring_losses(masked, process(), draws, iteration, 4, 2, silent), seed)


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_scores_are_one_finite_number_per_unit(criterion: Any) -> None:
    """Every criterion scores every unit of every group, the same way twice, in float64 on the CPU."""
    masked = masked_model()
    first, second = score(criterion, evidence(masked)), score(criterion, evidence(masked))
    assert list(first) == [group.name for group in masked.groups]
    for group in masked.groups:
        values = first[group.name]
        assert (values.shape, values.dtype, values.device.type) == ((group.units,), torch.float64, "cpu")
        assert bool(values.isfinite().all())
        assert len(values.unique()) > 1
        assert torch.equal(values, second[group.name])
        if criterion != "gradient-flow":
            assert bool((values >= 0).all())


def test_absolute_gradient_flow_is_the_size_of_the_signed() -> None:
    """The two variants differ in the sign alone, and the sign does occur."""
    masked = masked_model()
    signed, size = (score(name, evidence(masked)) for name in ("gradient-flow", "gradient-flow-abs"))
    assert all(torch.equal(signed[name].abs(), size[name]) for name in signed)
    assert any(bool((values < 0).any()) for values in signed.values())
    assert any(bool((values > 0).any()) for values in signed.values())


def test_random_scores_depend_on_the_seed_alone() -> None:
    """The same at every iteration and at any mask, so that the random control selects once."""
    masked = masked_model()
    first = score("random", evidence(masked, 3, iteration=1))
    masked.set_masks({name: mask * 0.5 for name, mask in masked.masks.items()})
    later, other = score("random", evidence(masked, 3, iteration=7)), score("random", evidence(masked, 4))
    assert all(torch.equal(first[name], later[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_magnitude_by_hand() -> None:
    """The Euclidean norm over everything that produces a unit, relative to the mean of its group."""
    masked = masked_model()
    found = score("magnitude", evidence(masked))
    group = next(group for group in masked.groups if len(group.producers) > 2)
    weights = {name: weight.detach() for name, weight in masked.weights.items()}
    by_hand = []
    for unit in range(group.units):
        total = 0.0
        for member in group.producers:
            for position in member.positions[member.channels // group.unit_size == unit].tolist():
                for leaf in ("weight", "bias"):
                    total += float(weights[f"{member.module}.{leaf}"][position].double().square().sum())
        by_hand.append(total**0.5)
    expected = torch.tensor(by_hand, dtype=torch.float64)
    torch.testing.assert_close(found[group.name], expected / expected.mean())


def test_taylor_by_hand() -> None:
    """Sum of |theta * g| over what produces a unit."""
    masked = masked_model()
    seen = evidence(masked)
    found = score("taylor", seen)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in masked.weights.items()}
    torch.stack([loss(leaves) for loss in seen.losses]).mean().backward()
    group = masked.groups[-1]
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in group.producers:
        for leaf in ("weight", "bias"):
            tensor = leaves[f"{member.module}.{leaf}"]
            assert tensor.grad is not None
            rows = (tensor.detach() * tensor.grad).abs().double().flatten(1 if tensor.ndim > 1 else 0)
            rows = rows.sum(1) if tensor.ndim > 1 else rows
            total.index_add_(0, member.channels, rows[member.positions])
    torch.testing.assert_close(found[group.name], total, rtol=1e-4, atol=1e-9)


def test_fisher_by_hand() -> None:
    """Squares of what each chunk says of a unit, added up: signs within a unit cancel, between chunks not."""
    masked = masked_model()
    seen = evidence(masked)
    found = score("fisher", seen)
    group = masked.groups[-1]
    expected = torch.zeros(group.units, dtype=torch.float64)
    for loss in seen.losses:
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in masked.weights.items()}
        loss(leaves).backward()
        products = {name: leaf.detach() * leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        expected += unit_sums(masked, products, lambda _, product: product)[group.name].square()
    torch.testing.assert_close(found[group.name], expected, rtol=1e-4, atol=1e-12)
    assert len(seen.losses) > 1
    assert seen.gradients == pytest.approx(1)


@pytest.mark.parametrize(
    ("criterion", "gradients"),
    [("taylor", 1), ("fisher", 1), ("gradient-flow", 3), ("magnitude", 0), ("random", 0)],
)
def test_criteria_say_what_they_cost(criterion: Any, gradients: float) -> None:
    """In passes forward and back over all draws."""
    seen = evidence(masked_model())
    seen.way = "finite-difference"
    score(criterion, seen)
    assert seen.gradients == pytest.approx(gradients)


def test_diff_pruning_leaves_high_noise_out() -> None:
    """Chunks from the first whose loss falls below 0.05 of the largest on do not contribute."""
    masked = masked_model()
    parameter = "conv_in.weight"

    def chunk(value: float, slope: float) -> Loss:
        def loss(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
            tensor = weights[parameter]
            return value + (torch.full_like(tensor, slope) * (tensor - tensor.detach())).sum()

        return loss

    kept_chunks = [chunk(1.0, 1.0), chunk(0.06, 2.0)]
    ignored = [chunk(0.04, 100.0), chunk(0.9, 1000.0)]
    found = score("diff-pruning", Evidence(masked, kept_chunks + ignored, 0))
    expected = score("taylor", Evidence(masked, kept_chunks, 0))
    everything = score("taylor", Evidence(masked, kept_chunks + ignored, 0))
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(found["conv_in"], everything["conv_in"])


def test_scores_that_are_not_finite_stop_the_run() -> None:
    """A score of NaN names the criterion and the group before anything is selected."""
    masked = masked_model()
    with torch.no_grad():
        masked.weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(GfpruneError, match="magnitude scores of channel group conv_in"):
        score("magnitude", evidence(masked))


def test_scoring_chunks_make_no_difference() -> None:
    """How many samples are in memory at once does not change what is scored."""
    masked = masked_model(torch.float64)
    draws = Draws(toy_images().double(), 20, 1)
    gradients = []
    for chunk in (1, 2, 4):
        losses = scoring_losses(masked, process(), draws, 1, 4, chunk, silent)
        weights = {name: tensor.detach() for name, tensor in masked.weights.items()}
        gradients.append(flatten(gradient(losses, weights)[1]))
    assert relative_error(gradients[0], gradients[2]) < 1e-6
    assert relative_error(gradients[1], gradients[2]) < 1e-6


def test_unequal_scoring_chunks_weigh_samples_equally() -> None:
    """A last chunk that is smaller must not count as much as a full one: every draw has the same weight."""
    masked = masked_model(torch.float64)
    draws = Draws(toy_images().double(), 20, 1)
    weights = {name: tensor.detach() for name, tensor in masked.weights.items()}
    whole, split = (
        gradient(scoring_losses(masked, process(), draws, 1, 5, chunk, silent), weights) for chunk in (5, 4)
    )
    assert split[0] == pytest.approx(whole[0], rel=1e-6)
    assert relative_error(flatten(split[1]), flatten(whole[1])) < 1e-6


# --- draws ---------------------------------------------------------------------------------------


@many
@given(data=st.data(), of=st.integers(1, 9), step=st.integers(0, 5))
def test_draws_do_not_depend_on_how_a_batch_is_split(data: st.DataObject, of: int, step: int) -> None:
    """Any split of a batch into micro-batches gives the same samples, noise, levels and labels."""
    draws = Draws(toy_images(4), 50, 7, torch.arange(4))
    whole = draws.batch("train", step, of)
    cut = data.draw(st.integers(1, of))
    parts = [draws.batch("train", step, cut, first=0, of=of)]
    if cut < of:
        parts.append(draws.batch("train", step, of - cut, first=cut, of=of))
    for name in ("images", "noise", "index", "condition"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert bool(((whole.index >= 0) & (whole.index < 50)).all())
    assert torch.equal(whole.index, whole.index.sort().values)  # stratified: one level in each share
    assert torch.equal((whole.index * of) // 50, torch.arange(of)) or of > 50 or 50 % of


def test_draws_differ_by_purpose_step_and_seed() -> None:
    """No two purposes, steps or seeds share their noise."""
    draws = Draws(toy_images(), 50, 7)
    batches = [
        draws.batch("train", 0, 2),
        draws.batch("train", 1, 2),
        draws.batch("score", 0, 2),
        replace(draws, seed=8).batch("train", 0, 2),
    ]
    flat = torch.cat([batch.noise.flatten(1) for batch in batches])
    assert len(flat.unique(dim=0)) == 8


# --- the loop ------------------------------------------------------------------------------------


def snapshot(masked: MaskedModel) -> torch.Tensor:
    return flatten({name: weight.detach().clone() for name, weight in masked.weights.items()})


class Stop:
    """A report that interrupts at its n-th event, and remembers all."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.phases: list[str] = []

    def __call__(self, event: Event) -> None:
        self.phases.append(event.phase)
        if len(self.phases) == self.at:
            raise Interrupted("stopped", 15)


def toy_loop(
    store: Any,
    progress: Callable[[Event], None],
    criterion: Any = "taylor",
    *,
    refit: bool = True,
    judge: Callable[[bool], float] | None = None,
    fixed: bool = False,
) -> PruningLoop:
    """Two scorings and one closing iteration; refits are judged by the distance to the dense network."""
    masked, dense = masked_model(), build(TINY, 3)
    _, _, cost = structure(TINY)
    draws = Draws(toy_images(), 20, 1)

    def allocation(scores: Mapping[str, torch.Tensor], share: float, _order: Any) -> Mapping[str, int]:
        return allocate(cost, scores, 0.4 * share, strict=False).kept

    def distance(of_dense: bool) -> float:
        progress(Event("evaluate"))
        if of_dense:
            return 0.0
        batch = draws.batch("judge", 0, 4)
        with torch.no_grad():
            x, effective = batch.images + batch.noise, dict(masked.passing())
            gap = masked.forward(effective, x, batch.index) - dense(x, batch.index).sample
        return float(gap.square().mean())

    sample = {**one_sample(process(), draws), "return_dict": False}
    fitting = Refit(masked, dense, find_residuals(dense, sample), 1) if refit else None
    return PruningLoop(
        masked, fitting, judge or distance, 4, process(), Schedule(scorings=2, bound=0.5),
        criterion, allocation, draws, 2, 1, store, progress, fixed,
    )  # fmt: skip


def outcome(loop: PruningLoop) -> dict[str, torch.Tensor]:
    """Everything that a run decides, as tensors."""
    kept = loop.run()
    families: dict[str, Mapping[str, torch.Tensor]] = {
        "kept": kept,
        "weight": loop.masked.weights,
        "mask": loop.masked.masks,
        "support": loop.state.support,
    }
    found = {
        f"{family}/{name}": tensor.detach().clone()
        for family, named in families.items()
        for name, tensor in named.items()
    }
    history = [value for refit in loop.state.refits for value in asdict(refit).values()]
    return {**found, "history": torch.tensor([*history, loop.state.gradients], dtype=torch.float64)}


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], when: str) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), f"{name} differs after {when}"


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refits of a few samples: what they find does not matter, only that it is found again."""
    monkeypatch.setattr("gfprune_cli.flow.loop.REFIT_SAMPLES", 8)


def test_a_resumed_run_does_without_the_memory_that_it_began_without() -> None:
    """Turns, positions and recomputed blocks are as they were, whatever is free when it goes on."""
    kept: dict[str, Any] = {}

    class Memory:
        def load(self) -> Any:
            return kept.get("state")

        def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
            kept["state"] = dict(tensors), json.loads(json.dumps(numbers))

    began = toy_loop(Memory(), silent)
    assert began.refit is not None
    began.piece, began.turns, began.looks, began.refit.per_input = 1, 4, 0, 0
    began.masked.recompute_blocks()
    began.save()
    resumed = toy_loop(Memory(), silent)
    resumed.restore()
    assert resumed.refit is not None
    assert (resumed.piece, resumed.turns, resumed.looks, resumed.refit.per_input) == (1, 4, 0, 0)
    assert resumed.masked.recompute is not None


@pytest.mark.slow
@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize(("criterion", "refit"), [("gradient-flow", False), ("taylor", True)])
def test_a_run_interrupted_anywhere_ends_in_the_same_bytes(
    criterion: Any, refit: bool, thorough: bool
) -> None:
    """Stop at an event, resume in a new network: weights, masks and history are bit-identical.

    Of the events before each layer of a refit, one in 29: they are all alike. By default one in five of all.
    """
    counter = Stop()
    expected = outcome(toy_loop(MemoryStore(), counter, criterion, refit=refit))
    assert set(counter.phases) == {"score", "mask"} | ({"evaluate", "refit", "refitted"} if refit else set())
    polls = 0
    for at, phase in enumerate(counter.phases, 1):
        polls += phase == "refit"
        if (phase == "refit" and polls % 29 != 1) or (not thorough and at % 5 != 1):
            continue
        store = MemoryStore()
        with pytest.raises(Interrupted):
            toy_loop(store, Stop(at), criterion, refit=refit).run()
        found = outcome(toy_loop(store, silent, criterion, refit=refit))
        assert_same(found, expected, f"a stop at event {at}, {phase}")


@pytest.mark.usefixtures("few_samples")
def test_a_run_interrupted_again_and_again_ends_in_the_same_bytes() -> None:
    """A run that gets no further than one refit at a time still arrives, at the same place."""
    counter = Stop()
    expected = outcome(toy_loop(MemoryStore(), counter))
    store, most = MemoryStore(), counter.phases.index("refitted") + 1
    for _ in range(30):
        try:
            found = outcome(toy_loop(store, Stop(most)))
            break
        except Interrupted:
            continue
    else:
        pytest.fail("the run makes no progress between interruptions")
    assert_same(found, expected, "many stops")


@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize("phase", ["mask", "refit", "refitted"])
def test_a_killed_run_resumes_from_the_last_iteration(phase: str) -> None:
    """Without a chance to save, the run repeats the iteration it was in, to the same bytes."""
    expected = outcome(toy_loop(MemoryStore(), silent))

    class Killed(BaseException):
        pass

    def kill(event: Event) -> None:
        if event.phase == phase and event.step == 2:
            raise Killed

    store = MemoryStore()
    with pytest.raises(Killed):
        toy_loop(store, kill).run()
    assert store.state is not None
    assert store.state[1]["iteration"] == 2
    assert_same(outcome(toy_loop(store, silent)), expected, f"a kill at {phase}")


def test_the_loop_without_refit_leaves_the_weights() -> None:
    """Only masks move, and no layer is ever fitted."""
    loop = toy_loop(MemoryStore(), silent, "magnitude", refit=False)
    before = snapshot(loop.masked)
    kept = loop.run()
    assert torch.equal(snapshot(loop.masked), before)
    assert any(not bool(alive.all()) for alive in kept.values())
    assert loop.state.refits == []


def test_refits_lower_what_judges_them(all_draws: None) -> None:
    """Each follows its mask step, and the last network is nearer to the dense one than without any."""
    loop = toy_loop(MemoryStore(), silent)
    loop.run()
    refits = loop.state.refits
    assert [refit.iteration for refit in refits] == [1, 2, 3]
    assert all(refit.layers > 10 and refit.after < refit.before for refit in refits)
    plain = toy_loop(MemoryStore(), silent, refit=False)
    plain.run()
    assert refits[-1].after < 0.7 * plain.judge(False)


@pytest.mark.parametrize("verdict", [1.0, 2.0, float("nan")])
def test_a_refit_that_does_not_lower_the_loss_is_taken_back(verdict: float) -> None:
    """Bit by bit, and the record says that no layer was fitted."""
    verdicts = iter([0.5, 1.0, verdict, 1.0, verdict, 1.0, verdict])
    loop = toy_loop(MemoryStore(), silent, judge=lambda of_dense: next(verdicts))
    before = snapshot(loop.masked)
    loop.run()
    assert torch.equal(snapshot(loop.masked), before)
    assert loop.state.refits == [RefitResult(number, 0.5, 1.0, 1.0, 0) for number in (1, 2, 3)]


def test_a_judge_that_fails_leaves_the_weights() -> None:
    """A loss that is not finite ends a run; what a resumed one finds is the network before the refit."""
    calls = 0

    def judge(of_dense: bool) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise GfpruneError("not finite")
        return 1.0

    loop = toy_loop(MemoryStore(), silent, judge=judge)
    before = snapshot(loop.masked)
    with pytest.raises(GfpruneError):
        loop.run()
    assert torch.equal(snapshot(loop.masked), before)


def test_groups_are_compared_by_noise_level_as_recovery_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(*given: Any) -> dict[str, torch.Tensor]:
        seen.append((given[3], given[-1]))
        return comparable(*given)

    monkeypatch.setattr(flow_loop, "comparable", spy)
    loop = toy_loop(MemoryStore(), silent)
    loop.chunk = 6
    loop.run()
    assert len(seen) == 2
    for timesteps, importance in seen:
        levels = loop.process.timesteps(torch.arange(20)).tolist()
        index = torch.tensor([levels.index(time) for time in timesteps.tolist()])
        assert torch.equal(importance, loop.process.image_weight(index, 20.0))
        assert float(importance.max()) > 2 * float(importance.min())


@pytest.mark.parametrize(("fixed", "refit"), [(False, True), (True, True), (False, False)])
def test_the_cost_of_a_run_is_counted_in_gradients_of_one_sample(fixed: bool, refit: bool) -> None:
    """Scorings, comparisons of groups, and the passes forward of refits and of what judges them."""
    loop = toy_loop(MemoryStore(), silent, fixed=fixed, refit=refit)
    loop.run()
    scored = 2 * (2 + (not fixed) * 4 / 3 * min(flow_loop.COMPARED_SAMPLES, loop.chunk))
    fitted = 1 / 3 * (3 * 2 * flow_loop.REFIT_SAMPLES + 7 * loop.judging) if refit else 0
    assert loop.state.gradients == pytest.approx(scored + fitted)


@pytest.mark.parametrize("fixed", [False, True])
def test_widths_follow_compared_scores_and_units_the_criterion(fixed: bool) -> None:
    """Groups are compared by what a refit leaves; where widths are fixed they need not be."""
    loop = toy_loop(MemoryStore(), silent, "random", refit=False, fixed=fixed)
    given: list[Mapping[str, torch.Tensor]] = []
    plain = loop.allocate

    def watched(
        scores: Mapping[str, torch.Tensor], share: float, before: Mapping[str, str]
    ) -> Mapping[str, int]:
        given.append(scores)
        return plain(scores, share, before)

    loop.allocate = watched
    support = loop.rescore()
    scores = score("random", evidence(loop.masked, 1))
    kept = plain(given[0], loop.schedule.share(1), {})
    for group in loop.masked.groups:
        assert torch.equal(given[0][group.name], scores[group.name]) is fixed
        assert torch.equal(support[group.name], select(group, scores[group.name], kept[group.name]))


# --- the state of recovery -----------------------------------------------------------------------


def found_outcome() -> Outcome:
    kept = {"a.b": torch.tensor([True, False]), "c": torch.tensor([False, True, True])}
    refits = [RefitResult(1, 0.5, 0.75, 0.625, 9), RefitResult(2, 0.5, 0.8, 0.8, 0)]
    return Outcome(kept, {"before": 0.5, "masked": 0.6, "removed": 0.6}, refits, 123.25)


def test_recovery_keeps_what_the_run_had_found(tmp_path: Path) -> None:
    """In one state with its own tensors and numbers; a new process finds both again."""
    before, found = RecoveryState(StateFolder(tmp_path / "out", {"seed": 1})), found_outcome()
    before.of(found).begin()
    assert not before.begun()
    assert before.load() is None
    before.save({"weight/a": torch.ones(2), "moment": torch.arange(3)}, {"done": 7, "rate": 0.5})

    after = RecoveryState(StateFolder(tmp_path / "out", {"seed": 1}))
    assert after.begun()
    read = after.outcome()
    assert_same(read.kept, found.kept, "reading it back")
    assert replace(read, kept={}) == replace(found, kept={})
    loaded = after.of(read).load()
    assert loaded is not None
    assert loaded[0].keys() == {"weight/a", "moment"}
    assert torch.equal(loaded[0]["moment"], torch.arange(3))
    assert loaded[1] == {"done": 7, "rate": 0.5}
    after.save({}, {"done": 8})
    again = RecoveryState(after.state)
    assert_same(again.outcome().kept, found.kept, "a second save")
    assert again.load() == ({}, {"done": 8})


def test_the_state_of_the_flow_is_not_taken_for_one_of_recovery(tmp_path: Path) -> None:
    """A run that stopped while masks moved goes on there, and its recovery starts anew."""
    folder = StateFolder(tmp_path / "out", {})
    with pytest.raises(Interrupted):
        toy_loop(folder, Stop(3), refit=False).run()
    assert folder.exists()
    recovery = RecoveryState(folder)
    assert not recovery.begun()
    assert recovery.load() is None
    found = outcome(toy_loop(folder, silent, refit=False))
    assert_same(found, outcome(toy_loop(MemoryStore(), silent, refit=False)), "a stop on disk")


# --- norms under autocast, derivatives at zero ---------------------------------------------------


@pytest.mark.parametrize("uneven", [False, True])
def test_norms_survive_half_precision_autocast(uneven: bool) -> None:
    """Under bf16 autocast the statistics stay in float32: a large mean must not swallow the variance."""
    generator = torch.Generator().manual_seed(0)
    x = 20 + torch.randn(2, 8, 16, 16, generator=generator)
    plain = nn.GroupNorm(2, 8)
    if uneven:
        norm: nn.Module = UnevenGroupNorm([4, 4], plain.eps, plain.weight.data, plain.bias.data)
    else:
        norm = MaskedGroupNorm(plain)
        norm.set_mask(torch.tensor([1.0] * 7 + [0.999]))  # not full: the weighted formula is used
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(x)
    assert float((output - plain(x)).detach().abs().max()) < 0.05


def test_the_exact_product_is_finite_behind_masks_of_zero() -> None:
    """A channel that is exactly zero has a second derivative: masks reach 0 while units are still scored."""
    norm = MaskedGroupNorm(nn.GroupNorm(2, 4).double())
    norm.set_mask(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64).view(1, 4, 1, 1)
    loss = [lambda weights: norm(x * weights["w"] * mask).pow(4).mean()]
    weights = {"w": torch.ones(1, 4, 1, 1, dtype=torch.float64)}
    product = exact_product(loss, weights, {"w": torch.ones(1, 4, 1, 1, dtype=torch.float64)})
    assert bool(product["w"].isfinite().all())


def test_the_norm_of_text_states_stays_torch_s_own() -> None:
    """Attention of DeepFloyd's networks asks for the class of the norm that its text states go through."""
    network = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 1), "norm": nn.GroupNorm(2, 8), "attn": nn.ModuleDict()})
    network["attn"]["norm_cross"] = nn.GroupNorm(2, 8)
    channels = torch.arange(8)
    members = (
        Member("conv", "out", "conv", channels, channels),
        Member("norm", "out", "norm", channels, channels),
    )
    MaskedModel(network, (ChannelGroup("conv", 8, 1, channels.view(2, 4), members),))
    assert isinstance(network["norm"], MaskedGroupNorm)
    assert isinstance(network["attn"]["norm_cross"], nn.GroupNorm)
