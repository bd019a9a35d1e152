"""Units of feed-forward blocks are found by the names of their layers, whatever their class is called."""

import pytest
import torch
from torch import nn

from gfprune_cli.structure.feedforward import feedforward_groups


class Gated(nn.Module):
    def __init__(self, gate: str, up: str, down: str) -> None:
        super().__init__()
        self.names = gate, up, down
        for name, sizes in zip(self.names, ((4, 6), (4, 6), (6, 4)), strict=True):
            self.add_module(name, nn.Linear(*sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        found: torch.Tensor = down(nn.functional.silu(gate(x)) * up(x))
        return found


@pytest.mark.parametrize(
    "names",
    [("w1", "w3", "w2"), ("gate", "up", "down"), ("gate_proj", "up_proj", "down_proj")],
    ids="-".join,
)
def test_a_gated_unit_is_two_rows_and_a_column(names: tuple[str, str, str]) -> None:
    (group,) = feedforward_groups(nn.ModuleDict({"ff": Gated(*names)}))
    assert (group.channels, group.unit_size) == (6, 1)
    assert [(member.module, member.side) for member in group.members] == [
        (f"ff.{names[0]}", "out"),
        (f"ff.{names[1]}", "out"),
        (f"ff.{names[2]}", "in"),
    ]


def test_a_block_with_more_layers_is_not_guessed() -> None:
    block = Gated("gate", "up", "down")
    block.add_module("norm", nn.LayerNorm(6))
    assert not list(feedforward_groups(nn.ModuleDict({"ff": block})))
