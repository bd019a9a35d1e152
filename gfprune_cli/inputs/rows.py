"""From the arguments of network calls to one row of conditions per prompt."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

from gfprune_cli.diffusion.conditions import NESTED
from gfprune_cli.errors import GfpruneError

Pieces = list[torch.Tensor]  # one of each branch, [1 or more, ...]


class DifferentLengths(Exception):
    """The branches of guidance are given conditions of different shapes, and nothing says what is padding."""


def flattened(call: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
    """Arguments by name, the entries of dictionaries and of lists of batches as names of their own."""
    found: dict[str, Any] = {}
    for name, value in call.items():
        if name in left_out:
            continue
        if isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
            found |= {f"{name}{NESTED}{key}": entry for key, entry in value.items()}
        else:
            found[name] = value
    return found


def as_entries(call: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The same arguments, with the entries of these lists as names of their own."""
    lists = set(names)
    found: dict[str, Any] = {}
    for name, value in call.items():
        entries = (
            {f"{name}{NESTED}{number}": entry for number, entry in enumerate(value)} if name in lists else {}
        )
        found |= entries or {name: value}
    return found


def by_branch(value: Any, branches: int) -> Pieces:
    """Conditions of one prompt by branch; the rows of a branch stay together."""
    if isinstance(value, torch.Tensor):
        return list(value.cpu().chunk(branches))
    return [entry[None].cpu() for entry in value]


def own_row(
    calls: list[dict[str, Any]], own: Iterable[str], branches: Sequence[int], order: Sequence[int]
) -> dict[str, torch.Tensor]:
    """[branches, ...] of one prompt, by name; branches that come in calls of their own are put together.

    Args:
        branches: in each call.
        order: the branches wanted, by position among those of all calls.

    Raises:
        DifferentLengths: of the branches.
    """
    found = {}
    for name in sorted(own):
        pieces = [
            piece
            for call, count in zip(calls, branches, strict=True)
            for piece in by_branch(call[name], count)
        ]
        parts = [pieces[position] for position in order]
        if len({part.shape for part in parts}) > 1:
            if not (has_mask(calls[0]) and pads(parts)):
                raise DifferentLengths(name)
            parts = same_length(parts)
        found[name] = torch.cat(parts)
    return found


def has_mask(names: Iterable[str]) -> bool:
    """Whether an argument says what is text and what is padding."""
    return any("mask" in name for name in names)


def pads(parts: Pieces) -> bool:
    """Whether texts [branches, length, ...] differ in their length alone."""
    return parts[0].ndim > 1 and len({(part.ndim, part.shape[:1], part.shape[2:]) for part in parts}) == 1


def same_length(parts: Pieces) -> Pieces:
    """Texts [branches, length, ...] with zeros behind their end."""
    longest = max(part.shape[1] for part in parts)
    return [pad(part, (*(0, 0) * (part.ndim - 2), 0, longest - part.shape[1])) for part in parts]


def stacked(
    rows: list[dict[str, torch.Tensor]], shared: list[dict[str, Any]], name: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """[prompts, branches, ...] by name, and what every sample gets.

    Texts of different lengths are padded where a mask among the arguments says so and nothing else depends
    on the length; else all are cut to the shortest.

    Args:
        shared: of each row.
        name: of the pipeline.

    Raises:
        GfpruneError: something changes from prompt to prompt without growing with the batch.
    """
    uneven = [key for key in rows[0] if len({row[key].shape for row in rows}) > 1]
    alike = all(equal(shared[0], other) for other in shared)
    masked = has_mask((*rows[0], *shared[0]))
    if alike and masked and all(pads([row[key] for row in rows]) for key in uneven):
        parts = {key: [row[key] for row in rows] for key in rows[0]}
        return {key: torch.stack(same_length(p) if key in uneven else p) for key, p in parts.items()}, shared[
            0
        ]
    shortest = min(range(len(rows)), key=lambda number: sum(rows[number][key].numel() for key in uneven))
    model = rows[shortest]
    for row, other in zip(rows, shared, strict=True):
        same_shapes = all(row[key].shape == model[key].shape for key in uneven)
        if same_shapes and not equal(shared[shortest], other):
            raise GfpruneError(
                f"{name} passes its network for the whole batch something that depends on the prompt:"
                " give --prompts of equal length"
            )
    return {key: torch.stack([cut(row[key], model[key]) for row in rows]) for key in model}, shared[shortest]


def cut(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The beginning of a tensor, as long as another one.

    Raises:
        GfpruneError: it is shorter.
    """
    for dimension, (have, want) in enumerate(zip(tensor.shape, like.shape, strict=True)):
        if have < want:
            raise GfpruneError(
                "what the pipeline passes has a shape of its own for every prompt: give one prompt"
            )
        tensor = tensor.narrow(dimension, 0, want)
    return tensor


def shared_values(call: dict[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """What every sample gets, on the CPU."""
    names = set(own)
    return {
        name: pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), value)
        for name, value in call.items()
        if name not in names
    }


def equal(first: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two calls share the same values."""
    one, two = pytree.tree_flatten(dict(first)), pytree.tree_flatten(dict(other))
    return one[1] == two[1] and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b or a == b
        for a, b in zip(one[0], two[0], strict=True)
    )
