"""What a network is given beside noisy samples and noise levels, and the one way in which it is called.

    output = call(network, x, timesteps, condition)

`condition` is None (unconditional), a tensor [N] of class labels (`UNet2DModel`), or `Conditions`: text
states and whatever else a pipeline passes to its denoiser. With classifier-free guidance (arXiv 2207.12598)
a sample has two branches, unconditional first; the network sees both and the output is [N, 2, ...].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

NESTED = "."  # between the name of a keyword whose value is a dictionary or a list, and of its entries
BEFORE, AFTER = "before the sample", "after the sample"  # conditions that are joined to the noisy sample
LEVELS = "share of the noise level"  # of each token, where tokens have noise levels of their own


@dataclass(frozen=True)
class Conditions:
    """Side inputs of K samples of one network.

    Args:
        tensors: keyword -> [rows, branches, ...]; `added_cond_kwargs.time_ids` is entry `time_ids` of the
            dictionary `added_cond_kwargs`.
        shared: keyword -> the same for every sample: numbers, flags, rotary embeddings (also in tuples).
        sample, timestep: names of the network's own arguments; None for one that it does not have.
        branches: 2 with classifier-free guidance, unconditional first; else 1.
        guidance: its scale; 1.0 without.
        time_factor, time_offset: the network is told factor * timestep + offset.
        sign: of the output: -1 for networks whose pipeline turns it round.
        rows: [K] which row of `tensors` belongs to which sample; None: row i to sample i.
        axis: of the network's input along which tensors `BEFORE` and `AFTER` are joined to the noisy sample:
            channels (masks, images) or tokens (references).
        lists: arguments that are lists with one tensor for each sample, and `shared` ones with one entry.
        twins: arguments that are told the same as `timestep`.
        time_floats: whether whole timesteps are passed in the type of the samples.
        plain: the network has no `return_dict`.
        receiver: of a network that predicts nothing itself.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    sample: str | None = "sample"
    timestep: str | None = "timestep"
    branches: int = 1
    guidance: float = 1.0
    time_factor: float = 1.0
    time_offset: float = 0.0
    sign: float = 1.0
    rows: tuple[int, ...] | None = None
    axis: int = 1
    lists: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()
    time_floats: bool = False
    plain: bool = False
    receiver: "Receiver | None" = None

    def __len__(self) -> int:
        if self.rows is not None:
            return len(self.rows)
        return len(next(iter(self.tensors.values()))) if self.tensors else 0

    def likewise(self, change: Callable[["Conditions"], "Conditions"]) -> "Receiver | None":
        """The receiver, its own conditions changed as these are; the network stays where it is."""
        found = self.receiver
        return None if found is None else replace(found, conditions=change(found.conditions))

    def __getitem__(self, chosen: Sequence[int] | slice) -> "Conditions":
        """Those of some of the samples; no tensor is copied."""
        rows = tuple(range(len(self))) if self.rows is None else self.rows
        picked = rows[chosen] if isinstance(chosen, slice) else tuple(rows[number] for number in chosen)
        return replace(self, rows=tuple(picked), receiver=self.likewise(lambda one: one[chosen]))

    def of_rows(self, rows: Sequence[int]) -> "Conditions":
        """Those of samples that have these rows, of what the network and its receiver are given."""
        return replace(self, rows=tuple(rows), receiver=self.likewise(lambda one: one.of_rows(rows)))

    def to(self, device: torch.device | str) -> "Conditions":
        """On a device; only the rows in use go there."""
        rows = self.rows
        tensors = {
            name: (tensor if rows is None else tensor[list(rows)]).to(device)
            for name, tensor in self.tensors.items()
        }
        shared = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), dict(self.shared))
        receiver = self.likewise(lambda one: one.to(device))
        rows = rows if not tensors else None
        return replace(self, tensors=tensors, shared=shared, rows=rows, receiver=receiver)


@dataclass(frozen=True)
class Receiver:
    """The denoiser that takes what a ControlNet or T2I adapter returns: its output is what counts.

    Args:
        network: frozen, on the device of the run.
        arguments: of it that take what is returned, in turn.
        conditions: what it is given beside that, for the same samples.
        fingerprint: of its weights.
    """

    network: Any
    arguments: tuple[str, ...]
    conditions: Conditions
    fingerprint: str = ""

    def __call__(self, returned: Any, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser makes of noisy samples with that; see `call_with`.

        Args:
            returned: a tuple with something for each argument, or what the only one takes.
        """
        dtype = next(self.network.parameters()).dtype
        parts = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(dtype), returned)
        parts = parts if isinstance(parts, tuple) else (parts,)
        added = dict(zip(self.arguments, parts, strict=True))
        return call_with(
            lambda _, given: self.network(**given | added), x.to(dtype), timesteps, self.conditions
        )


Condition = torch.Tensor | Conditions | None


def some_of(condition: Condition, chosen: list[int] | slice) -> Condition:
    """Those of some of the samples."""
    return None if condition is None else condition[chosen]


def call_with(
    function: Callable[[tuple[Any, ...], dict[str, Any]], Any],
    x: torch.Tensor,
    timesteps: torch.Tensor,
    condition: Condition,
) -> torch.Tensor:
    """The output tensor of `function(args, kwargs)`, a network in whatever way it is run.

    Args:
        x: [N, ...] noisy samples.
        timesteps: [N] as the scheduler counts them.

    Returns:
        [N, ...]; with two branches [N, 2, ...], unconditional first.
    """
    if not isinstance(condition, Conditions):
        arguments = (x, timesteps) if condition is None else (x, timesteps, condition)
        return first_tensor(function(arguments, {"return_dict": False}))
    if condition.receiver is not None:
        returned = function((), keywords(x, timesteps, condition))
        return condition.receiver(returned, x, timesteps)
    output = own_part(first_tensor(function((), keywords(x, timesteps, condition))), x, condition)
    if condition.sign != 1:
        output = condition.sign * output
    return output if condition.branches == 1 else output.unflatten(0, (len(x), condition.branches))


def first_tensor(output: Any) -> torch.Tensor:
    """What a network predicts, of whatever it returns: [N, ...], also where it returns a list of N."""
    first = output if isinstance(output, torch.Tensor) else output[0]
    return torch.stack(tuple(first)) if isinstance(first, list | tuple) else first


def own_part(output: torch.Tensor, x: torch.Tensor, condition: Conditions) -> torch.Tensor:
    """The outputs for the noisy sample, without those for tokens that were joined to it."""
    axis, given = condition.axis, {BEFORE, AFTER} & condition.tensors.keys()
    parts = {name: condition.tensors[name].shape[axis + 1] for name in given}
    if not given or output.shape[axis] != x.shape[axis] + sum(parts.values()):
        return output
    return output.narrow(axis, parts.get(BEFORE, 0), x.shape[axis])


def keywords(x: torch.Tensor, timesteps: torch.Tensor, condition: Conditions) -> dict[str, Any]:
    """Keyword arguments of the network for [N * branches] samples, the branches of a sample side by side."""
    here, branches = condition.to(x.device), condition.branches
    flat: dict[str, Any] = {
        name: list(value) * len(x) if name in here.lists else value for name, value in here.shared.items()
    }
    for name, tensor in here.tensors.items():
        rows = tensor.flatten(0, 1)
        flat[name] = rows.to(x.dtype) if rows.is_floating_point() else rows
    joined = [flat.pop(BEFORE, None), x.repeat_interleave(branches, 0), flat.pop(AFTER, None)]
    whole = torch.cat([part for part in joined if part is not None], condition.axis)
    own = {} if condition.sample is None else {condition.sample: whole}
    shares = flat.pop(LEVELS, None)
    if condition.timestep is not None:
        if (condition.time_factor, condition.time_offset) != (1, 0):
            timesteps = timesteps * condition.time_factor + condition.time_offset
        if condition.time_floats and not timesteps.is_floating_point():
            timesteps = timesteps.to(x.dtype)
        times = timesteps.repeat_interleave(branches, 0)
        if shares is not None:
            times = times.view(-1, *[1] * (shares.ndim - 1)) * shares
        own |= dict.fromkeys((condition.timestep, *condition.twins), times)
    made: dict[str, Any] = {} if condition.plain else {"return_dict": False}
    for name, value in {**own, **flat}.items():
        outer, _, inner = name.partition(NESTED)
        entry = list(value.unbind(0)) if name in here.lists and isinstance(value, torch.Tensor) else value
        if inner:
            made.setdefault(outer, {})[inner] = entry
        else:
            made[outer] = entry
    return {name: as_list(value) for name, value in made.items()}


def as_list(value: Any) -> Any:
    """Dictionaries whose keys are positions were lists."""
    if isinstance(value, dict) and value and all(isinstance(key, str) and key.isdigit() for key in value):
        return [value[key] for key in sorted(value, key=int)]
    return value


def inputs_of(x: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> dict[str, Any]:
    """What `call` passes to a network, all of it by keyword."""
    if isinstance(condition, Conditions):
        return keywords(x, timesteps, condition)
    given = {"sample": x, "timestep": timesteps, "return_dict": False}
    return given if condition is None else given | {"class_labels": condition}


def call(
    network: Callable[..., Any], x: torch.Tensor, timesteps: torch.Tensor, condition: Condition
) -> torch.Tensor:
    """The network's output tensor: [N, ...], or [N, 2, ...] with two branches."""
    return call_with(lambda args, kwargs: network(*args, **kwargs), x, timesteps, condition)
