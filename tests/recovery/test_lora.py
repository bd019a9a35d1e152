"""Adapters: what trains, what is kept of it, and what is left in the weights."""

import sys
from typing import Any

import pytest
import torch
from conftest import TINY
from diffusers import UNet2DModel
from torch import nn

from gfprune_cli.checkpoint.record import Origin, Record
from gfprune_cli.errors import UsageError
from gfprune_cli.recovery.lora import adapted_layers, add_adapters, load_peft, merge_adapters


def tiny() -> Any:
    torch.manual_seed(0)
    return UNet2DModel(**TINY).eval()


def record(**layers: dict[str, Any]) -> Record:
    document = {"map": {"blocks": {}, "gone": [], "config": {}, "layers": layers}} if layers else {}
    return Record(document, Origin("dense", "local", None, {}), {}, "unet")


def test_adapters_go_on_layers_that_lost_rows_or_columns() -> None:
    network, name = tiny(), "mid_block.attentions.0.to_q"
    lost = {name: {"out": "0-3 of 8"}, "conv_out": {"in": "0-3 of 8"}, "conv_norm_out": {"out": "0-3 of 8"}}
    assert adapted_layers(network, record(**lost)) == [name, "conv_out"]
    every = adapted_layers(network, record())
    assert {name, "conv_in", "time_embedding.linear_1"} < set(every)
    odd = nn.ModuleList([nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 1)])
    assert adapted_layers(odd, record()) == ["2"], "peft cannot merge the others"


def test_merged_adapters_give_the_output_that_they_gave_and_the_layers_that_were_there() -> None:
    network, plain = tiny(), tiny()
    names = [name for name, _ in network.named_modules()]
    x = torch.randn(2, 3, 16, 16)
    layers = ["conv_in", "mid_block.attentions.0.to_q", "up_blocks.1.resnets.0.conv1"]
    tuner = add_adapters(network, layers, 4, 0)
    training = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(training) == 2 * len(layers)
    with torch.no_grad():
        assert torch.equal(network(x, 5).sample, plain(x, 5).sample), "adapters begin with nothing"
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        adapted = network(x, 5).sample
        merged: Any = merge_adapters(tuner)
        torch.testing.assert_close(merged(x, 5).sample, adapted, rtol=1e-4, atol=1e-4)
        assert float((adapted - plain(x, 5).sample).abs().max()) > 1e-3
    assert [name for name, _ in merged.named_modules()] == names
    changed = [n for n, p in plain.named_parameters() if not torch.equal(p, merged.get_parameter(n))]
    assert set(changed) == {f"{name}.weight" for name in layers}


def test_adapters_are_drawn_from_the_seed_alone() -> None:
    drawn = []
    for seed in (0, 0, 1):
        network = tiny()
        torch.rand(seed + 3)
        add_adapters(network, ["conv_in"], 4, seed)
        drawn.append(network.get_parameter("conv_in.lora_A.default.weight").detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert float(drawn[0].abs().max()) <= 1 / 27**0.5 < float(drawn[0].abs().max()) * 1.5


def test_a_missing_peft_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"--lora needs peft: pip install 'gfprune\[lora\]'"):
        load_peft()
