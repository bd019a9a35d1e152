"""Of a network without rules of its own, the channel groups that do not leave exactly stay."""

from typing import Any

import pytest
import torch
from torch import nn

from gfprune_cli.errors import GfpruneError
from gfprune_cli.progress import Event
from gfprune_cli.pruning import units
from gfprune_cli.structure.groups import ChannelGroup


def group(name: str) -> ChannelGroup:
    return ChannelGroup(name, 4, 1, torch.arange(4).view(1, -1), ())


GROUPS = tuple(group(f"blocks.{number}.{leaf}") for number in range(3) for leaf in ("attn.to_q", "ff.net.0"))


def refuse(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Let the check fail wherever a group's name holds a word."""

    def check(_network: Any, groups: tuple[ChannelGroup, ...], _inputs: Any) -> float:
        if any(word in one.name for one in groups):
            raise GfpruneError("outputs differ")
        return 0.0

    monkeypatch.setattr(units, "check_removal", check)


def test_a_sort_of_layer_is_left_out_in_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "attn")
    said: list[Event] = []
    kept = units.exact_groups(nn.Identity(), GROUPS, {}, said.append)
    assert [one.name for one in kept] == [f"blocks.{number}.ff.net.0" for number in range(3)]
    assert [event.text for event in said] == [
        "blocks.N.attn.to_q stays as it is: its removal would not be exact"
    ]


def test_a_network_of_which_nothing_leaves_exactly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "blocks")
    with pytest.raises(GfpruneError, match="outputs differ"):
        units.exact_groups(nn.Identity(), GROUPS, {}, lambda event: None)
