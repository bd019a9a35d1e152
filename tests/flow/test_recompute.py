"""Activations that are computed again on the way back, behind masks: the same numbers from less memory.

pytest tests/flow/test_recompute.py
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers_zoo
from networks import first_output
from torch import nn

from gfprune_cli.flow.comparison import Curves, weakest_first
from gfprune_cli.flow.criteria import Evidence, score
from gfprune_cli.flow.energy import Loss, Sum, gradient, take_gradient
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.flow.masked_norms import MaskedGroupNorm
from gfprune_cli.flow.passing import given_weights
from gfprune_cli.flow.unit_sums import UnitSums, shares
from gfprune_cli.runtime.memory import Alive
from gfprune_cli.structure.graph import discover

Made = tuple[MaskedModel, Loss, dict[str, Any]]


def made(name: str, *, recomputes: bool) -> Made:
    """A network behind soft masks, and a loss of its output."""
    model, given = transformers_zoo.network_and_inputs(name)
    groups, _ = discover(model, given)
    masks = {group.name: torch.linspace(0.3, 1, group.units, dtype=torch.float64) for group in groups}
    masked = MaskedModel(model, groups, masks, recomputes)

    def loss(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        assert masked.recompute is not None or not recomputes
        at: Any = masked.recompute.at if masked.recompute else lambda given: given_weights(model, given)
        with at(weights):
            return first_output(model, given).square().mean()

    return masked, loss, given


@pytest.mark.parametrize("name", ["seams", "scale-shift", "sd3", "flux"])
def test_gradients_are_the_same_and_so_are_those_that_come_in_turns(name: str) -> None:
    (plain, plain_loss, _), (again, loss, _) = (made(name, recomputes=it) for it in (False, True))
    value, expected = gradient([plain_loss], plain.passing())
    found = gradient([loss], again.passing())
    assert found[0] == value
    torch.testing.assert_close(found[1], expected, rtol=0, atol=0)
    parts = list(shares(list(again.weights), again.weights, 3))
    assert len(parts) == 3
    assert sum(map(len, parts)) == len(again.weights)
    for names in parts:
        taken = Sum()
        take_gradient([loss], again.passing(), taken.add, names=names)
        assert taken.parts.keys() <= names.keys()
        for key, part in taken.parts.items():
            torch.testing.assert_close(part, expected[key], rtol=0, atol=0)


def held(name: str, *, recomputes: bool) -> int:
    """Bytes that are there between the way there and the way back, beside the weights."""
    masked, loss, _ = made(name, recomputes=recomputes)
    with torch.enable_grad(), Alive([*masked.model.parameters(), *masked.model.buffers()]) as alive:
        value = loss(masked.passing().watched(lambda *_: None))
    assert value.requires_grad
    return alive.now


@pytest.mark.parametrize("name", ["seams", "flux"])
def test_less_is_held(name: str) -> None:
    assert held(name, recomputes=True) < 0.6 * held(name, recomputes=False)


@pytest.mark.slow
def test_taylor_scores_do_not_depend_on_it() -> None:
    (plain, plain_loss, _), (again, loss, _) = (made("seams", recomputes=it) for it in (False, True))
    expected, once = Evidence(plain, [plain_loss], 0), Evidence(again, [loss], 0, turns=4)
    for name, values in score("taylor", expected).items():
        torch.testing.assert_close(score("taylor", once)[name], values, rtol=1e-9, atol=0)
    assert expected.gradients == 1
    assert once.gradients % 4 == 0  # every turn is paid for


def test_only_weights_that_produce_units_have_gradients() -> None:
    masked, _, _ = made("flux", recomputes=False)
    names = UnitSums(masked, lambda _, part: part).names()
    assert 0 < len(names) < len(masked.weights)
    assert not any(name.startswith("proj_out") for name in names)


@pytest.mark.parametrize("name", ["seams", "sd3"])
def test_slopes_that_groups_are_compared_by_are_the_same(name: str) -> None:
    found = []
    for recomputes in (False, True):
        masked, _, given = made(name, recomputes=recomputes)
        order = {group.name: weakest_first(group, torch.arange(group.units)) for group in masked.groups}
        curves = Curves(masked, order, 0)
        with curves.hooked(curves.follow_layer, curves.follow_block), torch.enable_grad():
            watched = masked.passing().watched(lambda *_: None)
            at: Any = (
                masked.recompute.at if masked.recompute else lambda w, m=masked.model: given_weights(m, w)
            )
            with at(watched):
                output = first_output(masked.model, given)
            curves.go_back((output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum())
        found.append(curves.powers)
    assert any(bool(powers.any()) for powers in found[0].values())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)


def test_a_norm_whose_input_wants_no_gradient_goes_back() -> None:
    """channels last, as networks are laid out here: torch 2.13 alone crashes."""
    norm = MaskedGroupNorm(nn.GroupNorm(4, 32))
    x = torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last)
    norm(x).square().sum().backward()
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    plain = nn.GroupNorm(4, 32)
    plain(x.contiguous()).square().sum().backward()
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad)
