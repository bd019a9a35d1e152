"""Whether removal is exact: the masked network against the narrow one, before a run is started.

    gap = check_removal(model, groups, inputs)

Whatever found the groups may have misread a network that it has never seen. Here a random part of every group
goes, and the outputs are compared; if they differ, nothing is pruned.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.files import first_line, quoted
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.errors import GfpruneError
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.flow.passing import given_weights
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.removal import cuts_of, remove
from gfprune_cli.structure.trace import hooked
from gfprune_cli.structure.tracing import hooks_as_before, outputs_of, running_modules

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}
PART = (0.35, 0.75)  # of the units of a group that stay
SMALL_PART = (0.2, 0.4)  # the same where memory is short

Outputs = dict[str, torch.Tensor]


def check_removal(
    model: nn.Module, groups: tuple[ChannelGroup, ...], inputs: Mapping[str, Any], *, doubles: bool = True
) -> float:
    """Compare the masked network with the one whose masked units are gone, for a random part of the units.

    Args:
        inputs: keyword arguments of one forward pass; tensors of zeros are replaced by noise.
        doubles: compare in float64, on a copy; where there is no memory for one, in float32 as they are.

    Returns:
        The relative difference of the outputs, |removed - masked| / |masked|.

    Raises:
        GfpruneError: it exceeds 1e-3 (float32: 1e-2), or the narrow network does not run; the first module in
            which the two differ is named.
    """
    try:
        return removal_gap(model, groups, inputs, doubles=doubles)
    except GfpruneError as error:
        if "dtype" not in str(error):
            raise
    return removal_gap(model, groups, inputs, doubles=False)  # networks that make float32 of their own


def removal_gap(
    model: nn.Module, groups: tuple[ChannelGroup, ...], inputs: Mapping[str, Any], *, doubles: bool
) -> float:
    """As `check_removal`, in float64 or float32."""
    kept = random_part(groups, PART if doubles else SMALL_PART)
    network = model
    if doubles or next(model.parameters()).dtype not in TOLERANCE:  # where rounding looks like a difference
        wide = torch.float64 if doubles else torch.float32
        network = nn.Module.to(copy.deepcopy(model), wide).requires_grad_(False).eval()
    dtype = next(network.parameters()).dtype
    given = noisy(inputs, dtype)
    with as_removal(f"channels of {type(model).__name__} cannot be removed"):
        narrow = remove(network, groups, kept)
    found = outcome(narrow, given, type(model).__name__)
    with masked_by(network, groups, kept) as masked:
        with as_removal(f"{type(model).__name__} does not run behind masks"):
            expected = masked_outcome(masked, given)
        gap = relative_gap(found, expected)
        if gap <= TOLERANCE[dtype]:  # false for NaN
            return gap
        first = first_difference(masked, narrow, groups, kept, given)
    raise GfpruneError(
        f"channels of {type(model).__name__} cannot be removed exactly: outputs differ by {gap:.1g}, "
        f"first in {quoted(first)}"
    )


@contextmanager
def as_removal(what: str) -> Iterator[None]:
    """What a network's own code raises at widths or norms that it does not expect, in one line."""
    try:
        yield
    except GfpruneError:
        raise
    except Exception as error:
        raise GfpruneError(f"{what}: {first_line(error)}") from error


def random_part(
    groups: tuple[ChannelGroup, ...], part: tuple[float, float] = PART
) -> dict[str, torch.Tensor]:
    """Group name -> bool [units], true for a random part of them and at least one; always the same.

    Each group keeps another share: of equal ones a network would not show that it ties two widths.
    """
    source = generator(0, "check of removal")
    kept = {}
    for group in groups:
        share = part[0] + (part[1] - part[0]) * float(torch.rand((), generator=source))
        kept[group.name] = torch.zeros(group.units, dtype=torch.bool)
        count = max(1, round(share * group.units))
        kept[group.name][torch.randperm(group.units, generator=source)[:count]] = True
    return kept


def small_share(groups: tuple[ChannelGroup, ...], cost: CostModel) -> float:
    """The share of the parameters that stays in a check with little memory."""
    kept = random_part(groups, SMALL_PART)
    widths = {group.name: int(kept[group.name].sum()) * group.unit_size for group in groups}
    return cost.params(widths) / cost.params({})


def noisy(value: Any, dtype: torch.dtype) -> Any:
    """Inputs of a type, with noise in place of zeros, which would hide a difference."""
    if isinstance(value, Mapping):
        return {name: noisy(inner, dtype) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(noisy(inner, dtype) for inner in value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    if bool(value.any()):
        return value.to(dtype)
    source = generator(0, "check of removal")
    return torch.randn(value.shape, generator=source, dtype=dtype).to(value.device)


@contextmanager
def masked_by(
    model: nn.Module, groups: tuple[ChannelGroup, ...], kept: Mapping[str, torch.Tensor]
) -> Iterator[MaskedModel]:
    """The network under masks; its own norms are put back afterwards."""
    before = dict(model.named_modules())
    masks = {name: alive.double() for name, alive in kept.items()}
    try:
        with hooks_as_before(model):
            yield MaskedModel(model, groups, masks)
    finally:
        for name, module in before.items():
            if name and model.get_submodule(name) is not module:
                model.set_submodule(name, module)


def masked_outcome(masked: MaskedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad(), given_weights(masked.model, masked.passing()):
        return as_one(outputs_of(masked.model, inputs))


def as_one(outputs: list[torch.Tensor]) -> torch.Tensor:
    """One tensor as it is, several behind each other."""
    return outputs[0] if len(outputs) == 1 else torch.cat([output.flatten() for output in outputs])


def outcome(model: nn.Module, inputs: Mapping[str, Any], class_name: str) -> torch.Tensor:
    """Output of the narrow network; a failure names the module in which it happened."""
    with torch.no_grad(), running_modules(model) as running:
        try:
            return as_one(outputs_of(model, inputs))
        except Exception as error:  # a width that the network's own code does not expect can fail anywhere
            where = quoted(running[-1]) if running and running[-1] else "its forward"
            raise GfpruneError(
                f"channels of {class_name} cannot be removed: the narrow network fails in {where}: "
                f"{first_line(error)}"
            ) from error


def relative_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))


def first_difference(
    masked: MaskedModel,
    narrow: nn.Module,
    groups: tuple[ChannelGroup, ...],
    kept: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Any],
) -> str:
    """Name of the first layer, in the order of the forward pass, whose kept outputs differ."""
    with layer_outputs(masked.model) as dense:
        masked_outcome(masked, inputs)
    with layer_outputs(narrow) as left:
        outcome(narrow, inputs, type(narrow).__name__)
    cuts = cuts_of(masked.model, groups, kept)
    for name, expected in dense.items():
        found, cut = left.get(name), cuts.get(name)
        if found is None or found.ndim != expected.ndim:
            continue
        if cut is not None and cut.out is not None:
            for dim in (1, expected.ndim - 1):  # channels of images, features of tokens
                if expected.shape[dim] > len(cut.out) == found.shape[dim]:
                    expected = expected.index_select(dim, cut.out.to(expected.device))
                    break
        if found.shape == expected.shape and not relative_gap(found, expected) <= TOLERANCE[torch.float64]:
            return name
    return "its output"


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[Outputs]:
    """Module name -> its output, of modules without modules of their own, in the order in which they ran."""
    outputs: Outputs = {}

    def record(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs.setdefault(name, output.detach())

    with hooked(
        module.register_forward_hook(lambda _m, _i, output, name=name: record(name, output))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ):
        yield outputs
