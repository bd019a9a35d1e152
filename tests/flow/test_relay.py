"""Two passes that run in turns.

pytest tests/flow/test_relay.py
"""

import threading

import pytest
import torch

from gfprune_cli.flow.relay import Hand, relayed

NAMES = [f"layer {number}" for number in range(6)]


def test_the_first_pass_goes_as_far_as_it_is_asked_to() -> None:
    """What nobody has asked for is not made; what was passed over on the way is kept."""
    made: list[str] = []

    def first(hand: Hand) -> None:
        for name in NAMES:
            assert not torch.is_grad_enabled()
            made.append(name)
            hand(name, name.upper())

    with relayed(first) as ask:
        assert made == []
        assert ask(NAMES[0]) == "LAYER 0"
        assert made == NAMES[:1]
        assert ask(NAMES[3]) == "LAYER 3"
        assert made == NAMES[:4]
        assert ask(NAMES[1]) == "LAYER 1"
        assert made == NAMES[:4]
        assert ask("no such layer") is None
        assert made == NAMES
        assert ask(NAMES[3]) is None  # taken


def test_an_error_of_the_first_pass_is_raised_where_its_results_are_asked_for() -> None:
    def first(hand: Hand) -> None:
        hand("one", 1)
        raise ValueError("the dense network fails")

    def run() -> None:
        with relayed(first) as ask:
            assert ask("one") == 1
            ask("two")

    with pytest.raises(ValueError, match="the dense network fails"):
        run()


def test_a_second_pass_that_ends_early_ends_the_first() -> None:
    before = threading.active_count()

    def first(hand: Hand) -> None:
        for name in NAMES:
            hand(name, None)

    def run() -> None:
        with relayed(first) as ask:
            ask(NAMES[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert threading.active_count() == before
