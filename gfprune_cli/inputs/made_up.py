"""Conditions of a network without its pipeline: noise in place of what a text encoder would say."""

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gfprune_cli.diffusion.conditions import AFTER, LEVELS, Conditions, first_tensor
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.family import Inputs
from gfprune_cli.families.table import family_of
from gfprune_cli.inputs.arguments import TIMESTEP_NAMES
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.inputs.recording import Recording
from gfprune_cli.inputs.rows import as_entries, flattened
from gfprune_cli.progress import Progress, notice

ONE_FOR_ALL = ("padding_mask",)  # that the network itself repeats for the batch
TWINS = ("r_timestep", "timestep_r")  # that are told the noise level once more
STEPS = 1000  # of the schedules that networks count their embeddings in


def made_up(model: nn.Module, count: int, seed: int, progress: Progress) -> Recording:
    """Standard normal values in place of text states, for a network without its pipeline.

    Raises:
        GfpruneError: what the network takes is not known.
    """
    inputs: dict[str, Any] = dict(example_inputs(model))
    sample = next(iter(inputs))
    timestep = next((name for name in TIMESTEP_NAMES if name in inputs), None)
    if timestep is None:
        raise GfpruneError(f"{type(model).__name__} is told no noise level: its pipeline is needed")
    notice(progress, "there is no pipeline around this network: normal noise stands in for text states")
    answer, told = observed(model, inputs)
    given, levels = inputs.pop(sample), inputs.pop(timestep)
    twins = tuple(name for name in TWINS if inputs.pop(name, None) is not None)
    lists = tuple(name for name, value in inputs.items() if is_list_of_samples(value))
    layers = [name for name, value in inputs.items() if isinstance(value, list) and is_of_samples(value[0])]
    axis, joined = joined_part(tuple(given.shape), answer)
    own = given.narrow(axis, 0, given.shape[axis] - joined)
    if joined:
        inputs[AFTER] = given.narrow(axis, 0, joined)
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, Any] = {}
    for name, value in as_entries(flattened(inputs, set()), layers).items():
        if name in ONE_FOR_ALL or not is_of_samples(value):
            shared[name] = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), value)
        elif value.is_floating_point() and not value.any():  # what is not zero is a fact about the sample
            drawn = [
                torch.randn(value.shape, generator=generator(seed, "condition", name, number))
                for number in range(count)
            ]
            tensors[name] = torch.stack(drawn)
        else:
            tensors[name] = value.cpu().expand(count, *value.shape)
    if levels.ndim > 1:
        tensors[LEVELS] = torch.ones(count, *levels.shape)
    rows = None if tensors else tuple(range(count))
    conditions = Conditions(
        tensors,
        shared,
        sample,
        timestep,
        time_factor=told_factor(model, timestep, told),
        rows=rows,
        axis=axis,
        lists=lists,
        twins=twins,
        time_floats=levels.is_floating_point(),
    )
    return Recording(conditions, tuple(own.shape[1:]))


def is_of_samples(value: Any) -> bool:
    """Whether a tensor has rows of a sample: one, or, of states, one for each of its frames."""
    return isinstance(value, torch.Tensor) and (value.shape[:1] == (1,) or value.ndim > 2)


def is_list_of_samples(value: Any) -> bool:
    """Whether a value is a list with something for each sample."""
    return isinstance(value, list) and len(value) == 1 and isinstance(value[0], list)


def observed(model: nn.Module, inputs: Inputs) -> tuple[tuple[int, ...], float]:
    """The shape that a network answers with, and what it makes of the noise level where it embeds that."""
    seen: list[float] = []

    def look(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(float(given[0].max()) * getattr(module, "scale", 1))

    embeddings = [module for module in model.modules() if type(module).__name__ == "Timesteps"]
    hooks = [module.register_forward_pre_hook(look) for module in embeddings]
    try:
        with torch.no_grad():
            answer = first_tensor(model(**inputs))
    finally:
        for hook in hooks:
            hook.remove()
    config: Any = model.config
    return tuple(answer.shape), seen[0] if seen else float(config.get("t_scale") or 1)


def joined_part(given: tuple[int, ...], answer: tuple[int, ...]) -> tuple[int, int]:
    """The axis of the channels of a sample, and how many of them are no noise.

    A network that answers with less than it is given reads images or masks behind the noise.
    """
    more = [axis for axis in range(1, len(given)) if len(answer) == len(given) and answer[axis] < given[axis]]
    return (more[0], given[more[0]] - answer[more[0]]) if more else (1, 0)


def told_factor(model: nn.Module, timestep: str, told: float) -> float:
    """What timesteps are multiplied by before a network is told: the inverse, where it does so itself.

    Args:
        told: what it makes of a noise level of one.
    """
    family = family_of(model)
    if family is not None and family.inputs is not None:
        return family.time_factor
    return 1 / STEPS if timestep == "timestep_ratio" or told >= STEPS else 1.0
