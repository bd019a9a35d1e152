"""From what a pipeline did to what it does: its guidance and its timesteps, solved for."""

from dataclasses import dataclass

import torch

from gfprune_cli.diffusion.process import mean_part
from gfprune_cli.errors import GfpruneError

TOLERANCE = 0.05  # of the norm: bfloat16 rounds several times on the way
NEAR = 0.02  # a scale that close to the one asked for is that one


@dataclass(frozen=True)
class Guidance:
    """What a pipeline makes of its branches: sign * (u + scale (c - u)).

    Args:
        order: positions of the unconditional and the conditional branch; (0,) without guidance.
    """

    scale: float
    order: tuple[int, ...]
    sign: float
    remarks: tuple[str, ...] = ()


def fit_guidance(
    outputs: torch.Tensor, combined: torch.Tensor, sample: torch.Tensor, nominal: float | None, name: str
) -> Guidance:
    """Guidance from the network's outputs [branches, ...] and what the scheduler was given.

    The outputs were noise, so that the coefficients of the combination can be told apart.

    Args:
        sample: the network's input; tells which channels of the outputs are a learned variance.
        nominal: the scale that the pipeline was asked for.
        name: of the pipeline.
    """
    branches = len(outputs)
    parts = mean_part(outputs, sample).double().cpu().flatten(1)
    target = combined[: len(combined) // branches if combined.numel() > parts[0].numel() else None]
    target = target.double().cpu().flatten()
    scale, order = (1.0, (0,)) if branches == 1 else (nominal or 1.0, (0, 1))
    if target.numel() != parts[0].numel() and branches > 2:
        return Guidance(1.0, (branches - 1,), 1.0, one_of(name, branches))
    if target.numel() != parts[0].numel():
        return Guidance(scale, order, 1.0, own_way(name, scale))
    found = torch.linalg.lstsq(parts.T, target[:, None]).solution.flatten()
    if branches > 2:
        main = int(found.abs().argmax())
        return Guidance(1.0, (main,), 1.0 if found[main] >= 0 else -1.0, one_of(name, branches))
    total = float(found.sum())
    residual = float((parts.T @ found - target).norm() / target.norm().clamp_min(1e-12))
    if residual > TOLERANCE or abs(abs(total) - 1) > TOLERANCE:
        return nearest(parts, target, scale, name)
    sign = 1.0 if total > 0 else -1.0
    if branches == 1:
        return Guidance(1.0, (0,), sign)
    weights = sign * found
    order = (0, 1) if weights[1] >= weights[0] else (1, 0)
    scale = float(weights[order[1]])
    if nominal is not None and abs(scale / nominal - 1) < NEAR:
        scale = nominal
    return Guidance(round(scale, 4), order, sign)


def nearest(parts: torch.Tensor, target: torch.Tensor, scale: float, name: str) -> Guidance:
    """Plain guidance in the order and with the sign that come closest to what the scheduler was given.

    Pipelines that renormalise the guided output, per token or over time, are of this kind.

    Args:
        parts: [branches, D] outputs; target: [D].
    """
    orders: list[tuple[int, ...]] = [(0,)] if len(parts) == 1 else [(0, 1), (1, 0)]
    along = {}
    for order in orders:
        first, last = parts[order[0]], parts[order[-1]]
        along[order] = float(torch.cosine_similarity(first + scale * (last - first), target, dim=0))
    order = max(along, key=lambda order: abs(along[order]))
    return Guidance(scale, order, 1.0 if along[order] >= 0 else -1.0, own_way(name, scale))


def own_way(name: str, scale: float) -> tuple[str, ...]:
    return (
        f"{name} combines the outputs of its network in a way of its own: the loss counts plain guidance"
        f" of scale {scale:g}",
    )


def one_of(name: str, branches: int) -> tuple[str, ...]:
    return (f"{name} guides with {branches} branches: the loss counts the one with all conditions",)


def one_branch(guidance: Guidance) -> Guidance:
    """The conditional branch alone, where the other one's text is of another length."""
    remark = "the texts of the two branches of guidance differ in length: the loss counts the conditional one"
    return Guidance(1.0, guidance.order[-1:], guidance.sign, (*guidance.remarks, remark))


def fit_time(pairs: list[tuple[float, float]], total: int) -> tuple[float, float]:
    """(factor, offset) of what the network is told, from (scheduler's timestep, what was passed).

    Raises:
        GfpruneError: it is no multiple, and only one noise level was seen.
    """
    for factor, offset in ((1.0, 0.0), (1 / total, 0.0), (-1.0, float(total)), (-1 / total, 1.0)):
        size = max(abs(factor * timestep) for timestep, _ in pairs) or 1.0
        if all(abs(factor * timestep + offset - passed) < 5e-3 * size for timestep, passed in pairs):
            return factor, offset
    (one, first), *others = pairs
    other = next((pair for pair in others if pair[0] != one), None)
    if other is None:
        raise GfpruneError("the pipeline's timesteps cannot be told from one noise level")
    factor = (other[1] - first) / (other[0] - one)
    return factor, first - factor * one
