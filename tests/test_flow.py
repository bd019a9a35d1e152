"""What to remove, and how gradually: energy, criteria, masks, schedule, training and the resumable loop.

pytest tests/test_flow.py
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import build, structure
from torch import nn

from gfprune_cli.checkpoint.modeling.gfprune_models_v1 import UnevenGroupNorm
from gfprune_cli.data.diffusion import VariancePreserving
from gfprune_cli.data.draws import Draws, generator
from gfprune_cli.errors import GfpruneError, Interrupted
from gfprune_cli.flow.criteria import FUNCTIONS, Evidence, score
from gfprune_cli.flow.energy import (
    Loss,
    Weights,
    choose_way,
    exact_product,
    finite_difference_product,
    gradient,
    hessian_gradient_product,
    norm,
)
from gfprune_cli.flow.loop import PruningLoop, leaving_rank, scoring_losses
from gfprune_cli.flow.mask import (
    MaskedGroupNorm,
    MaskedModel,
    full_masks,
    move,
    plain_norms,
    settled,
)
from gfprune_cli.flow.schedule import Schedule
from gfprune_cli.flow.training import Adam, Trainer
from gfprune_cli.progress import Event, silent
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.groups import ChannelGroup

TINY = "no-middle-attention"
many = settings(max_examples=60, deadline=None, derandomize=True)


def process(steps: int = 20) -> VariancePreserving:
    return VariancePreserving(torch.linspace(0.99, 0.02, steps), "epsilon", False)


def toy_images(count: int = 6) -> torch.Tensor:
    return torch.rand((count, 3, 8, 8), generator=torch.Generator().manual_seed(1)) * 2 - 1


def masked_model(dtype: torch.dtype = torch.float32) -> MaskedModel:
    return MaskedModel(build(TINY, 3, dtype).requires_grad_(True), structure(TINY)[0])


def double_losses(masked: MaskedModel, chunks: int = 2) -> list[Loss]:
    """Denoising losses in float64, without the product's own loss code, which rounds to float32."""
    noising, draws = process(), Draws(toy_images().double(), 20, 5)

    def chunk(number: int) -> Loss:
        batch = draws.batch("score", 1, 2, first=2 * number, of=2 * chunks)

        def loss(weights: Weights) -> torch.Tensor:
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
        def loss(w: Weights) -> torch.Tensor:
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
    weights = {name: tensor.detach() for name, tensor in masked.effective().items()}
    _, first = gradient(losses, weights)
    exact = flatten(exact_product(losses, weights, first))
    assert relative_error(flatten(finite_difference_product(losses, weights, first)), exact) < 2e-3


def test_hessian_meets_the_mean_gradient() -> None:
    """g over all chunks first, then H g: the mean of H_j g_j is something else."""
    losses, weights = small_losses(torch.float64)
    expected_gradient, hessian = reference(losses, weights)
    _, first = gradient(losses, weights)
    found = flatten(hessian_gradient_product(losses, weights, first, "exact"))
    assert relative_error(found, hessian @ expected_gradient) < 1e-9
    parts = [reference([loss], weights) for loss in losses]
    per_chunk = torch.stack([h @ g for g, h in parts]).mean(0)
    assert relative_error(found, per_chunk) > 0.05


def test_evidence_applies_the_hessian_to_the_mean_gradient() -> None:
    """The order holds in what the criteria see, too."""
    masked = masked_model(torch.float64)
    losses = double_losses(masked)
    flow = Evidence(masked, losses, 0, way="exact").energy_flow()
    weights = {name: tensor.detach() for name, tensor in masked.effective().items()}
    _, first = gradient(losses, weights)
    expected = exact_product(losses, weights, first)
    assert all(torch.allclose(flow[n], masked.weights[n] * expected[n], rtol=1e-9, atol=0) for n in flow)


def test_a_zero_gradient_gives_a_zero_product() -> None:
    """At a stationary point the difference quotient has no direction; the answer is 0, not 0 / 0."""
    weights = {"w": torch.ones(3)}
    product = finite_difference_product([lambda w: w["w"].sum()], weights, {"w": torch.zeros(3)})
    assert torch.equal(product["w"], torch.zeros(3))


def test_choose_way_trusts_differences_that_agree() -> None:
    """A smooth loss is differenced; one whose gradient jumps within the step is differentiated twice."""
    losses, weights = small_losses(torch.float32)
    assert choose_way(losses, weights, gradient(losses, weights)[1]) == "finite-difference"

    def jumping(w: Weights) -> torch.Tensor:  # the gradient jumps at 1: quotients grow as the step shrinks
        return 0.5 * w["w"].square().sum() + (w["w"] - 1).abs().sum()

    at_the_jump = {"w": torch.ones(4)}
    assert choose_way([jumping], at_the_jump, {"w": torch.ones(4)}) == "exact"

    def broken(w: Weights) -> torch.Tensor:
        return w["w"].square().sum() * float("nan")

    assert choose_way([broken], at_the_jump, {"w": torch.ones(4)}) == "exact"


@pytest.mark.parametrize("level", [1.0, 0.5])
def test_energy_derivative(level: float) -> None:
    """dE/dm_i = -sum over p in unit i of theta_p (H g)_p, for E(m) = -1/2 |grad L(m * theta)|^2.

    Statistics of the norms are held fixed: the energy is a function of the effective weights.
    """
    masked = masked_model(torch.float64)
    losses = double_losses(masked)
    base = {name: mask * level for name, mask in full_masks(masked.groups, torch.device("cpu")).items()}

    def at(masks: dict[str, torch.Tensor]) -> Weights:
        masked.set_masks(masks)
        return {name: tensor.detach() for name, tensor in masked.effective().items()}

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
    mask, speed = torch.tensor(data.draw(numbers)), torch.tensor(data.draw(numbers)).double()
    inside = torch.tensor(data.draw(st.lists(st.booleans(), min_size=units, max_size=units)))
    moved = move({"g": mask}, {"g": inside}, {"g": speed}, bound)["g"]
    change = moved - mask
    assert moved.dtype == mask.dtype
    assert bool(((moved >= 0) & (moved <= 1)).all())
    assert float(change.abs().max()) <= bound + 1e-6
    assert torch.allclose(moved[inside], (mask[inside] + bound).clamp(max=1))
    assert bool((moved[~inside] <= (mask[~inside] - bound / 2).clamp(min=0) + 1e-6).all())


@many
@given(data=st.data(), bound=st.floats(0.02, 1))
def test_masks_settle_in_the_promised_iterations(data: st.DataObject, bound: float) -> None:
    """Whatever the supports were before, a support that stays is reached in the promised iterations."""
    group = 3
    flags = st.lists(st.booleans(), min_size=group, max_size=group)
    masks = {"g": torch.ones(group)}
    speed = {"g": torch.linspace(0, 1, group).double()}
    for inside in data.draw(st.lists(flags, max_size=12)):
        masks = move(masks, {"g": torch.tensor(inside)}, speed, bound)
    last = torch.tensor(data.draw(flags))
    for _ in range(math.ceil(2 / bound)):
        masks = move(masks, {"g": last}, speed, bound)
    assert torch.allclose(masks["g"], last.float(), atol=1e-4)  # the loop snaps what is nearer than that
    masks = move(masks, {"g": last}, speed, bound)
    assert settled(masks)
    assert torch.equal(masks["g"] == 1, last)


def test_full_masks_change_no_weight() -> None:
    """At mask 1 effective weights equal the weights; at mask 0 a unit's producers are exactly zero."""
    masked = masked_model()
    assert all(torch.equal(tensor, masked.weights[name]) for name, tensor in masked.effective().items())
    group = masked.groups[2]
    masks = full_masks(masked.groups, torch.device("cpu"))
    masks[group.name][1] = 0
    masked.set_masks(masks)
    effective = masked.effective()
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
    """Targets rise, gently at the end, and reach the sparsity when selection ends."""
    schedule = Schedule(sparsity=0.6, iterations=12, steps_per_iteration=3, bound=0.5, score_every=4)
    targets = [schedule.target(iteration) for iteration in range(1, 13)]
    assert targets == sorted(targets)
    assert targets[schedule.selecting - 1] == pytest.approx(0.6)
    assert [schedule.scores(i) for i in range(1, 13)] == [i in (1, 5, 9) for i in range(1, 13)]
    assert schedule.training_steps == 36


@many
@given(
    iterations=st.integers(1, 60),
    steps=st.integers(0, 40),
    bound=st.floats(0.01, 1),
    seed=st.integers(0, 10**6),
)
def test_schedule_closes_every_mask(iterations: int, steps: int, bound: float, seed: int) -> None:
    """At the end of any schedule every mask is 0 or 1, and equals the last support."""
    schedule = Schedule(
        sparsity=0.5, iterations=iterations, steps_per_iteration=steps, bound=bound, score_every=1
    )
    close(schedule, seed)


@pytest.mark.parametrize(("iterations", "steps"), [(12, 1000), (1, 30_000)])
def test_long_schedules_close_too(iterations: int, steps: int) -> None:
    """The rounding of many small mask steps does not keep a long run from closing."""
    close(
        Schedule(sparsity=0.5, iterations=iterations, steps_per_iteration=steps, bound=0.3, score_every=1), 0
    )


class NoTraining:
    """A trainer that costs nothing."""

    adam, micro_batch = Adam(), 0

    def step(self, step: int) -> float:
        return 0.0


def close(schedule: Schedule, seed: int) -> None:
    """Run the loop's own mask flow over random selections, without a network."""
    group = ChannelGroup("g", 12, 1, torch.arange(12).view(3, 4), ())
    masked: Any = MaskHolder((group,))
    trainer: Any = NoTraining()
    no_draws: Any = None
    loop = PruningLoop(
        masked, trainer, process(), schedule, "random", lambda scores, progress: {"g": 6}, no_draws, 0, 1,
        MemoryStore(), silent,
    )  # fmt: skip
    loop.rescore = lambda: fresh_scores(loop, seed)  # type: ignore[method-assign]
    widest = 0.0
    flow = loop.masked.set_masks

    def watch(masks: dict[str, torch.Tensor]) -> None:
        nonlocal widest
        widest = max(widest, float((masks["g"] - loop.masked.masks["g"]).abs().max()))
        flow(masks)

    loop.masked.set_masks = watch  # type: ignore[method-assign]
    kept = loop.run()
    assert settled(loop.masked.masks)
    assert torch.equal(kept["g"], loop.flow.support["g"])
    assert int(kept["g"].sum()) == 6
    assert widest <= schedule.pace / max(1, schedule.steps_per_iteration) + 1e-4


def fresh_scores(loop: PruningLoop, seed: int) -> None:
    source = generator(seed, loop.flow.iteration)
    loop.flow.scores = {"g": torch.rand(12, generator=source, dtype=torch.float64)}


class MaskHolder:
    """Masks without a network."""

    def __init__(self, groups: tuple[ChannelGroup, ...]) -> None:
        self.groups = groups
        self.weights: dict[str, torch.Tensor] = {}
        self.masks = full_masks(groups, torch.device("cpu"))

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
        self.state = copied, {**numbers, "history": [dict(entry) for entry in numbers.get("history", [])]}


@many
@given(units=st.integers(1, 9), seed=st.integers(0, 100))
def test_the_least_important_leaves_fastest(units: int, seed: int) -> None:
    """Speeds are ranks in [0, 1]: 1 for the lowest score, 0 for the highest."""
    group = ChannelGroup("g", units, 1, torch.arange(units).view(1, -1), ())
    scores = torch.rand(units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rank = leaving_rank(group, scores)
    assert float(rank[scores.argmin()]) == 1
    assert torch.equal(rank.argsort(), scores.argsort(descending=True))
    assert bool(((rank >= 0) & (rank <= 1)).all())


# --- criteria ------------------------------------------------------------------------------------


def evidence(masked: MaskedModel, seed: int = 0, iteration: int = 1) -> Evidence:
    draws = Draws(toy_images(), 20, seed)
    return Evidence(masked, scoring_losses(masked, process(), draws, iteration, 4, 2, silent), seed)


@pytest.mark.parametrize("criterion", list(FUNCTIONS))
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


def test_diff_pruning_leaves_high_noise_out() -> None:
    """Chunks from the first whose loss falls below 0.05 of the largest on do not contribute."""
    masked = masked_model()
    parameter = "conv_in.weight"

    def chunk(value: float, slope: float) -> Loss:
        def loss(weights: Weights) -> torch.Tensor:
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


# --- training ------------------------------------------------------------------------------------


def trainer(masked: MaskedModel, batch: int = 4, distill: float = 0.5, total: int = 8) -> Trainer:
    teacher = build(TINY, 3)
    return Trainer(
        masked,
        lambda x, t, labels: teacher(x, t, return_dict=False)[0],
        process(),
        Draws(toy_images(), 20, 1),
        batch,
        1e-3,
        total,
        distill,
        "fp32",
    )


def snapshot(masked: MaskedModel) -> torch.Tensor:
    return flatten({name: weight.detach().clone() for name, weight in masked.weights.items()})


def test_distillation_alone_starts_at_zero() -> None:
    """At full masks the student is the teacher."""
    masked = masked_model()
    assert trainer(masked, distill=1.0).step(0) == pytest.approx(0, abs=1e-10)


def test_micro_batches_give_the_gradient_of_the_batch() -> None:
    """Loss and update do not depend on the micro-batch, uneven remainders included."""
    results = []
    for micro_batch in (0, 3, 1):
        masked = masked_model()
        found = trainer(masked)
        found.micro_batch = micro_batch
        loss = found.step(0)
        moments = torch.cat([moment.flatten() for moment in found.adam.first.values()])
        results.append((loss, moments))
    for loss, moments in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert relative_error(moments, results[0][1]) < 1e-4


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments stay as they were, and the message names the step and the remedy."""
    masked = masked_model()
    found = trainer(masked)
    found.step(0)
    before, moments = snapshot(masked), flatten(found.adam.first).clone()
    original = found.loss

    def broken(batch: Any) -> torch.Tensor:
        if where == "loss":
            return original(batch) * float("inf")
        weight = masked.weights["conv_out.weight"]
        endless_slope = (weight - weight.detach()).abs().sqrt().sum()  # 0, and not differentiable there
        return original(batch) + endless_slope

    monkeypatch.setattr(found, "loss", broken)
    with pytest.raises(GfpruneError, match=r"step 1 is not finite .*lower --learning-rate"):
        found.step(1)
    assert torch.equal(snapshot(masked), before)
    assert torch.equal(flatten(found.adam.first), moments)
    assert found.adam.steps == 1


def test_lack_of_memory_halves_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is repeated in halves until it fits, from clean gradients, and later steps stay small."""
    plain_masked, short_masked = masked_model(), masked_model()
    plain, short = trainer(plain_masked), trainer(short_masked)
    plain.micro_batch = 1
    sizes: list[int] = []
    original = short.loss

    def limited(batch: Any) -> torch.Tensor:
        sizes.append(len(batch))
        if len(batch) > 1:
            if len(sizes) > 1:  # fail late, with a gradient already there
                original(batch).backward()
            raise torch.OutOfMemoryError("simulated")
        return original(batch)

    monkeypatch.setattr(short, "loss", limited)
    assert short.step(0) == plain.step(0)
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert short.micro_batch == 1
    assert torch.equal(snapshot(short_masked), snapshot(plain_masked))
    assert short.adam.steps == 1


def test_lack_of_memory_for_one_sample_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to halve: one line that says so."""
    found = trainer(masked_model())

    def never(batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(found, "loss", never)
    with pytest.raises(GfpruneError, match="out of memory with one sample"):
        found.step(3)


def test_learning_rate_warms_up_and_decays() -> None:
    """From near zero to the peak, down to a tenth of it."""
    found = trainer(masked_model(), total=1000)
    rates = [found.learning_rate(step) for step in range(1001)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) <= 1e-3
    assert rates[-1] == pytest.approx(1e-4)
    assert rates[10:] == sorted(rates[10:], reverse=True)


# --- the loop ------------------------------------------------------------------------------------


class Stop:
    """A report that interrupts at its n-th event."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.seen = at, 0

    def __call__(self, event: Event) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise Interrupted("stopped", 15)


def toy_loop(
    store: MemoryStore,
    report: Callable[[Event], None],
    criterion: Any = "gradient-flow",
    steps: int = 2,
    *,
    measured: bool = False,
) -> PruningLoop:
    masked = masked_model()
    _, _, cost = structure(TINY)
    schedule = Schedule(sparsity=0.4, iterations=3, steps_per_iteration=steps, bound=1, score_every=1)

    def allocation(scores: Mapping[str, torch.Tensor], progress: float) -> Mapping[str, int]:
        return allocate(cost, scores, 0.4 * progress, strict=False).kept

    return PruningLoop(
        masked, trainer(masked), process(), schedule, criterion, allocation, Draws(toy_images(), 20, 1), 2, 1,
        store, report, measured,
    )  # fmt: skip


def outcome(loop: PruningLoop) -> dict[str, torch.Tensor]:
    """Everything that a run decides, as tensors."""
    kept = loop.run()
    families: dict[str, Mapping[str, torch.Tensor]] = {
        "kept": kept,
        "weight": loop.masked.weights,
        "mask": loop.masked.masks,
        "score": loop.flow.scores,
        "first": loop.trainer.adam.first,
        "second": loop.trainer.adam.second,
    }
    found = {
        f"{family}/{name}": tensor.detach().clone()
        for family, named in families.items()
        for name, tensor in named.items()
    }
    history = [entry[key] for entry in loop.flow.history for key in sorted(entry)]
    return {**found, "history": torch.tensor([*history, loop.flow.gradients], dtype=torch.float64)}


@pytest.mark.parametrize(("measured", "every"), [(False, 1), (True, 7)])  # one event for each group measured
def test_a_run_interrupted_anywhere_ends_in_the_same_bytes(measured: bool, every: int) -> None:
    """Stop at an event, resume in a new network: weights, masks and history are bit-identical."""
    counter = Stop()
    expected = outcome(toy_loop(MemoryStore(), counter, measured=measured))
    assert counter.seen > 10
    for at in range(1, counter.seen + 1, every):
        store = MemoryStore()
        with pytest.raises(Interrupted):
            toy_loop(store, Stop(at), measured=measured).run()
        found = outcome(toy_loop(store, silent, measured=measured))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), f"{name} differs after a stop at event {at}"


def test_a_run_interrupted_again_and_again_ends_in_the_same_bytes() -> None:
    """A run that gets no further than a few events at a time still arrives, at the same place."""
    expected = outcome(toy_loop(MemoryStore(), silent, "taylor"))
    store = MemoryStore()
    for _ in range(30):
        try:
            found = outcome(toy_loop(store, Stop(4), "taylor"))
            break
        except Interrupted:
            continue
    else:
        pytest.fail("the run makes no progress between interruptions")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_killed_run_resumes_from_the_last_iteration() -> None:
    """Without a chance to save, the run repeats the iteration it was in, to the same bytes."""
    expected = outcome(toy_loop(MemoryStore(), silent, "taylor"))

    class Killed(BaseException):
        pass

    def kill(event: Event) -> None:
        if event.phase == "train" and event.step == 4:
            raise Killed

    store = MemoryStore()
    with pytest.raises(Killed):
        toy_loop(store, kill, "taylor").run()
    assert store.state is not None
    assert store.state[1]["iteration"] == 2
    found = outcome(toy_loop(store, silent, "taylor"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_the_loop_without_training_leaves_the_weights() -> None:
    """With no training steps only masks move."""
    loop = toy_loop(MemoryStore(), silent, "magnitude", steps=0)
    before = snapshot(loop.masked)
    kept = loop.run()
    assert torch.equal(snapshot(loop.masked), before)
    assert any(not bool(alive.all()) for alive in kept.values())


def test_scores_have_momentum() -> None:
    """The scores that select are the running mean of what the criterion says."""
    loop = toy_loop(MemoryStore(), silent, "magnitude", steps=0)
    loop.rescore()
    first = {name: values.clone() for name, values in loop.flow.scores.items()}
    with torch.no_grad():
        for weight in loop.masked.weights.values():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)))
    fresh = score("magnitude", evidence(loop.masked))
    loop.rescore()
    for name, values in loop.flow.scores.items():
        torch.testing.assert_close(values, 0.5 * first[name] + 0.5 * fresh[name])


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
