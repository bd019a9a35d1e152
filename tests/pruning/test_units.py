"""Of a network without rules of its own, the channel groups that do not leave exactly stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE_SHOT
from diffusers import UNet2DConditionModel
from image_pipelines import PIPELINES
from torch import nn

import gfprune_cli
from gfprune_cli.errors import GfpruneError
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.progress import Event
from gfprune_cli.pruning import units
from gfprune_cli.pruning.verify import check_removal
from gfprune_cli.structure import graph
from gfprune_cli.structure.graph import discover
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


def kandinsky_like() -> UNet2DConditionModel:
    """Its attention takes the width of the stream for that of its heads."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=8,
        cross_attention_dim=16,
    )
    return network.eval()


def test_heads_that_are_counted_by_the_stream_stay_and_the_rest_leaves_exactly() -> None:
    network = kandinsky_like()
    groups, _ = discover(network)
    members = {member.module for one in groups for member in one.members}
    assert not any(name.endswith(("to_q", "add_k_proj", "to_out.0")) for name in members)
    assert check_removal(network, groups, example_inputs(network)) < 1e-6


def test_the_check_sees_two_widths_that_a_network_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one size would hide that they have to be equal."""
    network = kandinsky_like()
    monkeypatch.setattr(graph, "is_joined_attention", lambda module: False)
    groups, _ = discover(network)
    with pytest.raises(GfpruneError, match="attentions"):
        check_removal(network, groups, example_inputs(network))


def test_a_network_of_lists_whose_helpers_keep_tables_is_pruned(tmp_path: Path) -> None:
    """Z-Image takes and gives lists, and computes its angles once, wherever the first pass runs."""
    folder = PIPELINES["z-image"](tmp_path / "model")
    settings: dict[str, Any] = {**ONE_SHOT, "size": "16", "fold": 0, "budget": "macs", "recover": 1}
    result = gfprune_cli.prune(str(folder), sparsity=0.2, out=tmp_path / "out", **settings)
    assert 0.2 <= result.sparsity["macs"] <= 0.21
    assert result.loss["removed"] == pytest.approx(result.loss["masked"], rel=1e-4)
