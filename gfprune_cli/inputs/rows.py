"""From the arguments of network calls to one row of conditions per prompt."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gfprune_cli.diffusion.conditions import NESTED
from gfprune_cli.errors import GfpruneError


def flattened(call: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
    """Arguments by name, the entries of dictionaries as names of their own."""
    found: dict[str, Any] = {}
    for name, value in call.items():
        if name in left_out:
            continue
        if isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
            found |= {f"{name}{NESTED}{key}": entry for key, entry in value.items()}
        else:
            found[name] = value
    return found


def own_row(calls: list[dict[str, Any]], own: set[str]) -> dict[str, torch.Tensor]:
    """[branches, ...] of one prompt, by name; branches that come in calls of their own are put together."""
    found = {}
    for name in sorted(own):
        parts = [call[name].cpu() for call in calls]
        if len({part.shape for part in parts}) > 1:
            parts = same_length(parts, name, calls[0])
        found[name] = torch.cat(parts)
    return found


def padded(tensor: torch.Tensor, dimension: int, length: int) -> torch.Tensor:
    """Zeros behind the end of a dimension."""
    missing = length - tensor.shape[dimension]
    if not missing:
        return tensor
    shape = [*tensor.shape]
    shape[dimension] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension)


def same_length(parts: list[torch.Tensor], name: str, names: Iterable[str]) -> list[torch.Tensor]:
    """Texts [branches, length, ...] padded at their end, where there is a mask among `names` to say so.

    Raises:
        GfpruneError: there is none, or something else than the length differs.
    """
    alike = {(part.ndim, part.shape[:1], part.shape[2:]) for part in parts}
    if not any("mask" in other for other in names) or len(alike) > 1 or parts[0].ndim < 2:
        raise GfpruneError(
            f"the pipeline passes {name} in a shape that depends on the prompt:"
            " give --prompts of equal length"
        )
    longest = max(part.shape[1] for part in parts)
    return [padded(part, 1, longest) for part in parts]


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """[prompts, branches, ...] by name."""
    found = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if len({part.shape for part in parts}) > 1:
            parts = same_length(parts, name, rows[0])
        found[name] = torch.stack(parts)
    return found


def shared_values(calls: list[dict[str, Any]], own: set[str]) -> dict[str, Any]:
    """What every sample gets, on the CPU."""
    return {
        name: pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), value)
        for name, value in calls[0].items()
        if name not in own
    }


def check_shared(pipeline: Any, first: dict[str, Any], other: dict[str, Any]) -> None:
    """Refuse what changes from prompt to prompt without growing with the batch."""
    for name, value in first.items():
        one, two = pytree.tree_flatten(value), pytree.tree_flatten(other.get(name))
        same = one[1] == two[1] and all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
            for a, b in zip(one[0], two[0], strict=True)
        )
        if not same:
            raise GfpruneError(
                f"{type(pipeline).__name__} passes {name} in a way that depends on the prompt: "
                "give --prompts of equal length"
            )
