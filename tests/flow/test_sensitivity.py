"""How the loss rises when part of one group is masked, as `analyze` reports it."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flow import evidence, masked_model
from test_structure import toy_group

from gfprune_cli.errors import GfpruneError, Interrupted
from gfprune_cli.flow.criteria import score
from gfprune_cli.flow.mask import MaskedModel, Masks
from gfprune_cli.flow.sensitivity import WORST, least_units, measured_rises
from gfprune_cli.progress import Event, silent
from gfprune_cli.structure.blocks import block_groups
from gfprune_cli.structure.groups import select

SHARE = 0.5


@settings(max_examples=50, derandomize=True)
@given(cells=st.integers(1, 4), per_cell=st.integers(2, 6), share=st.floats(0.01, 0.99))
def test_a_part_of_a_group_is_at_least_a_step_and_never_all(cells: int, per_cell: int, share: float) -> None:
    group = toy_group(cells, per_cell, 1)
    steps = least_units(group, share)
    assert 1 <= steps < per_cell
    assert abs(steps - per_cell * share) <= 0.5 or steps in (1, per_cell - 1)


def test_a_block_goes_as_a_whole() -> None:
    block = block_groups(masked_model().model)[0]
    assert block.stack
    assert least_units(block, 0.1) == 1


@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_counts_as_the_highest(strange: float) -> None:
    masked = masked_model()
    scores = score("taylor", evidence(masked))
    losses = iter([1.0, strange, *[1.5] * len(masked.groups)])
    rises = measured_rises(masked, scores, SHARE, lambda: next(losses), silent)
    assert json.loads(json.dumps(rises, allow_nan=False)) == rises  # what is reported is JSON
    assert list(rises.values()) == [WORST, *[0.5] * (len(masked.groups) - 1)]


def test_a_dense_network_without_a_finite_loss_is_an_error() -> None:
    masked = masked_model()
    with pytest.raises(GfpruneError, match="not finite"):
        measured_rises(masked, score("taylor", evidence(masked)), SHARE, lambda: math.nan, silent)


def weights_norm(masked: MaskedModel) -> Callable[[], float]:
    """A loss that every masked weight raises by its size."""
    return lambda: -float(sum(tensor.detach().abs().double().sum() for tensor in masked.passing().values()))


@pytest.mark.parametrize("share", [0.25, SHARE])
def test_rises_are_those_of_masking_the_weakest_units_of_one_group(share: float) -> None:
    masked = masked_model()
    scores: Masks = score("taylor", evidence(masked))
    loss, seen = weights_norm(masked), list[Event]()
    before, whole = loss(), dict(masked.masks)
    found = measured_rises(masked, scores, share, loss, seen.append)
    assert all(torch.equal(masked.masks[name], mask) for name, mask in whole.items())
    assert [event.step for event in seen if event.phase == "probe"] == list(range(len(masked.groups) + 1))
    for group in masked.groups:
        support = select(group, scores[group.name], group.channels - least_units(group, share) * group.step)
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
