"""Groups are compared by what masking a part of them does to the loss."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import structure
from test_flow import TINY, MemoryStore, evidence, masked_model, toy_loop
from test_structure import toy_group

import gfprune_cli
from gfprune_cli.errors import GfpruneError, Interrupted
from gfprune_cli.flow.criteria import score
from gfprune_cli.flow.mask import MaskedModel, Masks
from gfprune_cli.flow.sensitivity import POWER, SHARE, comparable, measured_rises, spared
from gfprune_cli.progress import Event, silent
from gfprune_cli.pruning.run import default_allocation
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.structure.budget import allocate, step_scores
from gfprune_cli.structure.groups import ChannelGroup, select


def scored(group: ChannelGroup, seed: int, low: float = 0.1) -> torch.Tensor:
    numbers = torch.rand(group.units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return low + numbers


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    cells=st.integers(1, 4),
    per_cell=st.integers(2, 6),
    seed=st.integers(0, 1000),
    low=st.sampled_from([0.1, -0.5]),
    rise=st.floats(1e-6, 10),
)
def test_prices_add_up_to_the_measured_rise(
    cells: int, per_cell: int, seed: int, low: float, rise: float
) -> None:
    """At the share that was masked the price list says what was measured; it grows, in the scores' order."""
    group = toy_group(cells, per_cell, 1)
    scores = scored(group, seed, low)
    found = comparable((group,), {"toy": scores}, {"toy": rise})["toy"]
    prices = step_scores(group, found)
    measured = spared(group, SHARE)
    assert sum(prices[:measured]) == pytest.approx(rise)
    assert all(price > 0 for price in prices)
    lost = torch.tensor(step_scores(group, scores))
    lost = torch.ones_like(lost) if bool((lost < 0).any()) else lost
    share = float(lost.sum() / lost[:measured].sum())
    assert sum(prices) == pytest.approx(rise * share**POWER)
    for keep in range(group.step, group.channels, group.step):
        assert torch.equal(select(group, found, keep), select(group, scores, keep))


def test_a_group_that_hurts_more_than_its_scores_say_keeps_more() -> None:
    groups, _, cost = structure(TINY)
    scores = {group.name: torch.ones(group.units) for group in groups}
    even = {group.name: 0.01 for group in groups}
    hurt = groups[len(groups) // 2].name
    kept = [
        allocate(cost, comparable(groups, scores, rises), 0.4, strict=False).kept
        for rises in (even, even | {hurt: 10.0})
    ]
    assert kept[0][hurt] < kept[1][hurt] == cost.groups[hurt].channels


@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_counts_as_the_highest(strange: float) -> None:
    masked = masked_model()
    scores = score("taylor", evidence(masked))
    losses = iter([1.0, strange, *[1.5] * len(masked.groups)])
    rises = measured_rises(masked, scores, SHARE, lambda: next(losses), silent)
    assert json.loads(json.dumps(rises, allow_nan=False)) == rises  # the state of a run is JSON
    first, second = masked.groups[:2]
    found = comparable(masked.groups, scores, rises)
    prices = [sum(step_scores(group, found[group.name])[: spared(group, SHARE)]) for group in (first, second)]
    assert prices == pytest.approx([0.5, 0.5])


def test_a_dense_network_without_a_finite_loss_is_an_error() -> None:
    masked = masked_model()
    with pytest.raises(GfpruneError, match="not finite"):
        measured_rises(masked, score("taylor", evidence(masked)), SHARE, lambda: math.nan, silent)


def test_rises_lost_in_noise_cost_little_and_not_nothing() -> None:
    first = toy_group(1, 4, 1)
    groups = (first, ChannelGroup("other", 4, 1, first.cells, ()))
    scores = {"toy": scored(first, 0), "other": scored(first, 0)}
    found = comparable(groups, scores, {"toy": -0.01, "other": 0.5})
    assert bool((found["toy"] > 0).all())
    assert float(found["toy"].sum()) < 0.01 * float(found["other"].sum())


def test_where_nothing_was_measured_scores_stand() -> None:
    group = toy_group(2, 3, 1)
    scores = {"toy": scored(group, 1)}
    assert torch.equal(comparable((group,), scores, {"toy": -0.1})["toy"], scores["toy"])


def weights_norm(masked: MaskedModel) -> Callable[[], float]:
    """A loss that every masked weight raises by its size."""
    return lambda: -float(sum(tensor.detach().abs().double().sum() for tensor in masked.effective().values()))


def test_rises_are_those_of_masking_the_weakest_units_of_one_group() -> None:
    masked = masked_model()
    scores: Masks = score("taylor", evidence(masked))
    loss = weights_norm(masked)
    before, whole = loss(), dict(masked.masks)
    found = measured_rises(masked, scores, SHARE, loss, silent)
    assert all(torch.equal(masked.masks[name], mask) for name, mask in whole.items())
    for group in masked.groups:
        support = select(group, scores[group.name], group.channels - spared(group, SHARE) * group.step)
        assert 0 < int((~support).sum()) < group.units
        masked.set_masks(whole | {group.name: support.double()})
        assert found[group.name] == pytest.approx(loss() - before)
        assert found[group.name] > 0


def test_a_stop_while_measuring_leaves_the_masks() -> None:
    masked = masked_model()
    scores = score("taylor", evidence(masked))

    def stop(event: Event) -> None:
        if event.step == 2:
            raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        measured_rises(masked, scores, SHARE, weights_norm(masked), stop)
    assert all(bool((mask == 1).all()) for mask in masked.masks.values())


def test_the_loop_measures_once_and_charges_for_it() -> None:
    seen: list[Event] = []
    plain = toy_loop(MemoryStore(), silent, "taylor")
    measuring = toy_loop(MemoryStore(), seen.append, "taylor", measured=True)
    plain.run()
    measuring.run()
    groups = len(measuring.masked.groups)
    probes = [event for event in seen if event.phase == "probe"]
    assert len(probes) == groups + 1
    assert set(measuring.flow.rises) == {group.name for group in measuring.masked.groups}
    # forward passes of 2 draws for each group and for the whole, a third of a gradient each, as in a scoring
    assert measuring.flow.gradients - plain.flow.gradients == pytest.approx((groups + 1) / 3)


@pytest.mark.parametrize(("criterion", "resolved"), [("taylor", "measured"), ("gradient-flow", "scores")])
def test_the_record_says_how_groups_were_compared(
    criterion: str, resolved: str, pipeline_folder: Path, tmp_path: Path
) -> None:
    """The published criterion stays as published unless asked otherwise."""
    given = dict(sparsity=0.3, images=4, sample_steps=1, draws=4, one_shot=True, criterion=criterion, align=1)
    records = []
    for name, more in (
        ("default", {}),
        ("other", {"allocation": {"measured": "scores"}.get(resolved, "measured")}),
    ):
        gfprune_cli.prune(str(pipeline_folder), out=tmp_path / name, **given, **more)
        records.append(json.loads((tmp_path / name / "gfprune.json").read_text()))
    assert records[0]["resolved"]["allocation"] == resolved != records[1]["resolved"]["allocation"]
    assert records[0]["recipe"]["allocation"] is None
    assert records[0]["kept"] != records[1]["kept"]


@pytest.mark.parametrize(
    ("criterion", "budget", "resolved"),
    [
        ("gradient-flow-abs", "params", "scores"),
        ("gradient-flow-abs", "macs", "measured"),
        ("magnitude", "params", "measured"),
        ("random", "macs", "scores"),
    ],
)
def test_the_default_comparison_follows_the_criterion(criterion: Any, budget: Any, resolved: str) -> None:
    assert default_allocation(PruneRecipe(criterion=criterion, budget=budget)) == resolved
