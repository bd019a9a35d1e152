"""Weights that are kept in half precision are read as the float32 numbers that they are.

pytest tests/flow/test_half.py
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_zoo
from networks import NETWORKS, first_output
from torch import nn

from gfprune_cli.flow.criteria import Evidence, score
from gfprune_cli.flow.energy import Loss, gradient
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.flow.passing import given_weights
from gfprune_cli.flow.refit import Refit
from gfprune_cli.flow.residuals import find_residuals
from gfprune_cli.outputs.aside import Aside
from gfprune_cli.pruning.verify import check_removal
from gfprune_cli.runtime.device import offload, weights_of
from gfprune_cli.runtime.half import (
    Half,
    as_half,
    as_stored,
    half_of,
    keep_in_half,
    kept_in,
    wide,
    without_reading,
)
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.removal import remove

FAMILIES = [*NETWORKS, *transformers_zoo.ZOO]


def pair(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A network in float32 whose matrices bfloat16 holds exactly, the same kept in it, and inputs."""
    model, given = transformers_zoo.network_and_inputs(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model, keep_in_half(copy.deepcopy(model), torch.bfloat16), given


def loss_of(masked: MaskedModel, given: dict[str, Any]) -> Loss:
    def loss(weights: Any) -> torch.Tensor:
        at: Any = masked.recompute.at if masked.recompute else lambda it: given_weights(masked.model, it)
        with at(weights):
            return first_output(masked.model, given).square().mean()

    return loss


@pytest.mark.matrix(4)
@pytest.mark.parametrize("name", FAMILIES)
def test_passes_gradients_scores_and_removal_are_those_of_float32(name: str) -> None:
    model, half, given = pair(name)
    assert half_of(half) == "bfloat16"
    assert any(isinstance(weight, Half) for weight in half.parameters())
    with torch.no_grad():
        assert torch.equal(first_output(half, given), first_output(model, given))
    groups, _ = discover(model, given)
    kept = {group.name: torch.arange(group.units) % 2 == 0 for group in groups}
    with torch.no_grad():
        narrow = remove(half, groups, kept)
        assert half_of(narrow) == "bfloat16"
        assert torch.equal(first_output(narrow, given), first_output(remove(model, groups, kept), given))
    check_removal(half, groups, given, doubles=False)
    masks = {group.name: torch.linspace(0.3, 1, group.units, dtype=torch.float64) for group in groups}
    found = []
    for network in (model, half):
        masked = MaskedModel(network, groups, masks, recomputes=network is half)
        loss = loss_of(masked, given)
        found.append((gradient([loss], masked.passing()), score("taylor", Evidence(masked, [loss], 0))))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_tensor_kept_in_half_says_that_it_is_float32_and_changes_by_copies_alone() -> None:
    layer = nn.Linear(6, 4, bias=False)
    layer.weight.data.copy_(layer.weight.data.bfloat16())
    expected = layer.weight.detach().clone()
    weight = keep_in_half(layer, torch.bfloat16).weight
    assert isinstance(weight, nn.Parameter)
    assert weight.dtype == torch.float32
    assert weight.untyped_storage().nbytes() == 2 * weight.numel()
    assert torch.equal(wide(weight), expected)
    for tensor in (weight * 1, weight.T.T, torch.stack([weight])[0], wide(copy.deepcopy(layer).weight)):
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, expected)
    assert layer.to(torch.float32).weight.untyped_storage().nbytes() == 2 * weight.numel()
    assert torch.equal(nn.Module.to(copy.deepcopy(layer), torch.float64).weight, expected.double())
    for change in (lambda: weight.data.mul_(2), lambda: weight.data.__setitem__(0, 1.0)):
        with pytest.raises(TypeError, match="change by copy_ alone"):
            change()
    weight.data.copy_(expected * 1.001)
    assert torch.equal(wide(layer.weight), (expected * 1.001).bfloat16().float())
    assert without_reading(layer).weight.dtype == torch.bfloat16


def test_what_half_precision_would_round_stays_in_float32() -> None:
    layer = keep_in_half(nn.Linear(6, 4), torch.bfloat16)
    assert not isinstance(layer.weight, Half)
    assert half_of(layer) is None


@pytest.mark.parametrize("on_disk", [False, True])
def test_elsewhere_they_are_kept_in_half_as_well(tmp_path: Path, on_disk: bool) -> None:
    model, half, given = pair("dit")
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    offload(half.requires_grad_(False), torch.device("cpu"), tmp_path if on_disk else None)
    assert all(weight.is_meta for weight in half.parameters())
    with torch.no_grad():
        assert torch.equal(first_output(half, given), first_output(model, given))
    torch.testing.assert_close(weights_of(half), expected, rtol=0, atol=0)
    if on_disk:
        size = sum(path.stat().st_size for path in tmp_path.glob("*.dat"))
        assert size < 0.6 * sum(weight.nbytes for weight in expected.values())


def test_a_network_changes_between_half_and_float32_and_back() -> None:
    model, half, _ = pair("ddpm")
    masked = MaskedModel(half, ())
    expected = {name: weight.detach() for name, weight in MaskedModel(model, ()).weights.items()}
    for kept in (None, "bfloat16"):
        masked.keep_in(kept)
        assert masked.half == kept
        found = {name: wide(weight.detach()) for name, weight in masked.weights.items()}
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert kept_in(half, None) is half
    assert half_of(half) is None


def test_a_refit_rounds_what_it_writes_and_can_be_taken_back_from_a_disk(tmp_path: Path) -> None:
    model, half, given = pair("ddpm")
    groups, _ = discover(model, given)
    masks = {group.name: (torch.arange(group.units) % 2).double() for group in groups}
    torch.manual_seed(0)
    x, timesteps = torch.randn(8, *given["sample"].shape[1:]), torch.arange(8) * 100
    found = []
    for student in (copy.deepcopy(model), half):
        masked = MaskedModel(student, groups, masks)
        before = {name: as_stored(weight).clone() for name, weight in masked.weights.items()}
        refit = Refit(masked, model, find_residuals(model, given), 0, aside=partial(Aside, tmp_path))
        changed = refit.fit(x, timesteps, None, 1)
        found.append({name: as_stored(masked.weights[name]).clone() for name in changed})
        refit.restore(changed)
        after = {name: as_stored(weight).clone() for name, weight in masked.weights.items()}
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    first = next(name for name in found[0] if name.endswith(".weight"))
    assert found[1][first].dtype == torch.bfloat16
    torch.testing.assert_close(found[1][first], found[0][first].bfloat16(), rtol=0, atol=0)


def test_what_is_put_aside_comes_back(tmp_path: Path) -> None:
    aside = Aside(tmp_path)
    aside["a"], aside["b"] = torch.ones(3), as_half(torch.full((2, 2), 0.5, dtype=torch.bfloat16))
    aside["a"] = torch.zeros(3)
    assert list(aside) == ["a", "b"]
    assert torch.equal(aside["a"], torch.zeros(3))
    assert aside["b"].dtype == torch.bfloat16
    del aside["a"]
    assert len(aside) == len(list(tmp_path.iterdir())) == 1
