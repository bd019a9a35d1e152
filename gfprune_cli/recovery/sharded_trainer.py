"""Training steps of a network in pieces: optimiser, average and state of a process are those of its share.

Every process makes the same passes, or one would wait for the pieces of another: they stop together, before a
pass, and lack of memory ends the run instead of repeating a part of it in halves.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gfprune_cli.errors import GfpruneError
from gfprune_cli.recovery.pieces import piece, whole
from gfprune_cli.recovery.trainer import Tensors, Trainer


class ShardedTrainer(Trainer):
    """A `Trainer` of what `load_sharded` returns."""

    def averages_of(self) -> list[torch.Tensor]:
        """This process's pieces: they share memory with the weights."""
        return [piece(parameter.detach()).requires_grad_() for parameter in self.parameters.values()]

    def averages(self) -> dict[str, torch.Tensor]:
        return {name: as_piece_of(self.parameters[name], own) for name, own in super().averages().items()}

    def restore(self, tensors: Tensors, numbers: Mapping[str, Any]) -> None:
        super().restore(tensors, numbers)
        if self.ema is not None:
            self.ema.shadow_params = [piece(average) for average in self.ema.shadow_params]

    def step(self, step: int, stopping: Callable[[], bool]) -> dict[str, float]:
        """One update, see `Trainer.step`.

        Raises:
            Stopped: some process was told to stop; the weights are those before the step.
            GfpruneError: the loss or the gradient is not finite, or memory ran out.
        """
        return super().step(step, lambda: self.processes.any(stopping()))

    def halve(self, step: int) -> None:
        size = min(self.micro_batch, len(self.processes.share(self.recipe.batch)))
        raise GfpruneError(
            f"out of memory with {size} samples per pass at training step {step}: use a smaller "
            "--micro-batch, --checkpointing, or more processes"
        )

    def sum_gradients(self) -> None:
        """They were summed on their way back, piece by piece."""

    def clip(self) -> float:
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip)
        return float(whole(norm))

    def room(self, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        """Where a saved state is to be read into: tensors in pieces, those that are here already themselves.

        Raises:
            GfpruneError: the state is of another network.
        """
        shadows = self.averages()
        tensors: dict[str, torch.Tensor] = {}
        for key, shape in shapes.items():
            family, _, name = key.partition("/")
            parameter = self.parameters.get(name)
            if parameter is None or parameter.shape != shape or (family == "ema" and name not in shadows):
                raise GfpruneError(f"the saved state does not fit: {family} of {name}; use --force")
            known = {"weight": parameter, "ema": shadows.get(name)}.get(family)
            tensors[key] = torch.zeros_like(parameter) if known is None else known
            tensors[key] = tensors[key].detach()
        return tensors


def as_piece_of(weight: Any, own: torch.Tensor) -> torch.Tensor:
    """A tensor of a weight's shape, whose piece in this process is `own`."""
    return DTensor.from_local(
        own, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )
