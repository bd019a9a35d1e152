"""`--checkpointing` recomputes activations in every family, pruned unevenly too."""

from typing import Any

import pytest
import torch
import transformers_zoo as zoo
from conftest import TINY
from diffusers import UNet2DModel
from pipelines import conditional_unet
from torch import nn

from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.removal import remove


def network(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny dense network, and what it is given."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 16, 16)
    if name == "unet":
        return UNet2DModel(**TINY).eval(), dict(sample=x, timestep=5)
    if name == "conditional unet":
        model = conditional_unet()
        states = torch.randn(1, 5, model.config.cross_attention_dim)
        shape = (1, model.config.in_channels, 8, 8)
        return model.eval(), dict(sample=torch.randn(shape), timestep=5, encoder_hidden_states=states)
    model = zoo.build(name, dtype=torch.float32)
    return model, zoo.inputs(model)


@pytest.mark.matrix(3)
@pytest.mark.parametrize("name", ["unet", "conditional unet", *zoo.ZOO])
def test_checkpointing_runs_layers_again_and_changes_no_gradient(name: str) -> None:
    dense, given = network(name)
    groups, _ = discover(dense)
    kept = {}
    for group in groups:
        units = torch.ones(group.units, dtype=torch.bool)
        units[group.cells[:, 0].flatten()] = group.cells.shape[1] == 1
        kept[group.name] = units
    student: Any = remove(dense, groups, kept).requires_grad_(True)
    assert type(student).__name__.startswith("Pruned")
    layers = [m for n, m in student.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and "blocks" in n]
    gradients, passes = [], []
    for recompute in (False, True):
        if recompute:
            student.enable_gradient_checkpointing()
        student.zero_grad()
        seen: list[int] = []
        hooks = [layer.register_forward_hook(lambda *_, seen=seen: seen.append(1)) for layer in layers]
        student(**given, return_dict=False)[0].square().sum().backward()
        for hook in hooks:
            hook.remove()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
        passes.append(len(seen))
    assert passes[1] > 1.2 * passes[0]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-5, msg=key)
