"""Levels that are drawn most often are those with large losses, and count less in return."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.levels import RANGES, LevelDensity


@settings(max_examples=20)
@given(
    squares=st.lists(st.floats(0, 1e6), min_size=RANGES, max_size=RANGES),
    counts=st.lists(st.sampled_from((0.0, 9.0)), min_size=RANGES, max_size=RANGES),
    steps=st.sampled_from((1, 4, 50, 1000)),
)
def test_weights_undo_the_density(squares: list[float], counts: list[float], steps: int) -> None:
    """The mean of anything over the draws, times their weights, is its mean over the schedule."""
    density = LevelDensity(steps, squares, counts)
    shares = 1 / (steps * density.weights(range(steps)).double())
    assert float(shares.sum()) == pytest.approx(1, rel=1e-5)
    count = 4000
    places = [min(steps - 1, int(density.place((draw + 0.5) / count) * steps)) for draw in range(count)]
    drawn = torch.bincount(torch.tensor(places), minlength=steps) / count
    assert float((drawn - shares).abs().max()) < 2 / count


def test_what_is_lost_most_is_drawn_most_and_nothing_is_forgotten() -> None:
    density = LevelDensity(1000)
    draws = Draws(torch.zeros(4, 1, 2, 2), 1000, 0)
    for step in range(30):
        batch = draws.batch("train", step, 8, levels="adaptive", density=density)
        losses = 1 + 99 * (batch.index < 100)
        density.learn(density.seen(batch.index, losses.float()).tolist())
    index = torch.cat(
        [draws.batch("train", step, 8, levels="adaptive", density=density).index for step in range(50)]
    )
    low = float((index < 100).float().mean())
    assert 0.5 < low < 0.8
    assert (index > 900).any()


def test_before_the_first_batch_levels_are_those_of_strata() -> None:
    draws = Draws(torch.zeros(4, 1, 2, 2), 1000, 0)
    batch = draws.batch("train", 0, 8, levels="adaptive", density=LevelDensity(1000))
    even = draws.batch("train", 0, 8)
    assert torch.equal(batch.index, even.index)
    assert batch.weight is not None
    assert torch.allclose(batch.weight, torch.ones(8))


def test_losses_of_nothing_leave_the_schedule_even() -> None:
    density = LevelDensity(10)
    density.learn([0.0] * RANGES + [1.0] * RANGES)
    assert density.heights() == [1.0] * RANGES
