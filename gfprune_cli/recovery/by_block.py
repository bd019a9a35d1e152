"""One block of a network after the other is trained: gradients and moments of one are held at a time.

Nothing is propagated through the whole network, so a block is taught by its own layers: their outputs come
close to the dense network's at the channels that are kept, relative to their power (arXiv 1412.6550; block
by block as in arXiv 1911.12877). Its inputs are those that the pruned network gives it, whose earlier blocks
have been trained by then: so it makes up for what they lack. A pass ends where its block does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gfprune_cli.diffusion.conditions import call
from gfprune_cli.diffusion.draws import Batch
from gfprune_cli.errors import UsageError
from gfprune_cli.outputs.state import by_family
from gfprune_cli.recovery.losses import FeaturePair, RecoveryLoss
from gfprune_cli.recovery.teacher import Correspondence
from gfprune_cli.recovery.trainer import Tensors, Trainer, learning_rate
from gfprune_cli.runtime.device import autocast

DONE = "done"  # in a state: the weights of blocks that have been trained


class Ended(Exception):
    """A pass has come to the end of its block."""


def trained_parts(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> the blocks of a network, and what stands beside them, as far as it has weights."""
    parts: dict[str, nn.Module] = {}
    for name, child in network.named_children():
        several = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        parts |= (
            {f"{name}.{key}": block for key, block in child.named_children()} if several else {name: child}
        )
    return {name: part for name, part in parts.items() if any(True for _ in part.parameters())}


def largest_part(network: nn.Module) -> int:
    """Parameters of the block that has most."""
    return max(sum(one.numel() for one in part.parameters()) for part in trained_parts(network).values())


class BlockLoss(RecoveryLoss):
    """The distance of one block's layers; `enter` says which block.

    Args:
        loss: of the whole network, whose networks, noise and precision this one takes.
        layers: how the student's layers lie in the teacher.
    """

    def __init__(self, loss: RecoveryLoss, layers: Correspondence) -> None:
        alone = replace(loss.recipe, denoise=0.0, distill=0.0, features=1.0, jacobian=0.0)
        super().__init__(loss.student, loss.teacher, loss.process, alone, None, loss.precision)
        self.layers = replace(layers, positions=layers.positions | layers.readers)
        self.hooks: list[Any] = []

    def blocks(self, batch: Batch) -> list[str]:
        """The blocks in the order in which they run, of those whose layers can be compared."""
        order: list[str] = []
        hooks = [
            part.register_forward_hook(lambda *_, name=name: order.append(name))
            for name, part in trained_parts(self.student).items()
        ]
        pair = FeaturePair(self.student, self.teacher, self.layers)
        try:
            self.run(batch, pair)
            compared = tuple(name for name, mine in pair.caught["student"].items() if mine.ndim > 2)
        finally:
            pair.close()
            for hook in hooks:
                hook.remove()
        return [name for name in dict.fromkeys(order) if any(lies_in(layer, name) for layer in compared)]

    def enter(self, block: str) -> None:
        """Compare the layers of this block from now on, and end passes behind it."""
        self.leave()
        inside = {name: index for name, index in self.layers.positions.items() if lies_in(name, block)}
        self.features = FeaturePair(self.student, self.teacher, replace(self.layers, positions=inside))
        layer = next(iter(self.features.positions))
        theirs = self.layers.names[layer].removesuffix(layer.removeprefix(block))
        mine = self.student.get_submodule(block)
        self.hooks.append(mine.register_forward_pre_hook(start, with_kwargs=True))
        for network, name in ((self.student, block), (self.teacher, theirs)):
            self.hooks.append(network.get_submodule(name).register_forward_hook(end_pass))

    def leave(self) -> None:
        """Leave both networks as they were."""
        if self.features is not None:
            self.features.close()
        for hook in self.hooks:
            hook.remove()
        self.features, self.hooks = None, []

    def run(self, batch: Batch, pair: FeaturePair) -> None:
        """A pass of each network, whose layers the pair catches."""
        noisy = self.process.add_noise(batch.images, batch.noise, batch.index)
        timesteps = self.process.timesteps(batch.index)
        with pair.catching(), autocast(noisy.device, self.precision):
            passed(self.student, noisy, timesteps, batch)
            with torch.no_grad():
                passed(self.teacher, noisy.to(self.teacher_type), timesteps, batch)

    def not_finite(self, batch: Batch) -> torch.Tensor:
        """See `RecoveryLoss`: of whole passes."""
        self.leave()
        return super().not_finite(batch)

    def terms(
        self, batch: Batch, probe: torch.Tensor | None, progress: float
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """ "features" -> (1, [N] distance of each sample)."""
        assert self.features is not None
        self.run(batch, self.features)
        return {"features": (1.0, self.features.distance(len(batch)))}


def lies_in(layer: str, block: str) -> bool:
    return f"{layer}.".startswith(f"{block}.")


def passed(network: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, batch: Batch) -> None:
    """A pass up to the end of its block."""
    with suppress(Ended):
        call(network, noisy, timesteps, batch.condition)


def start(block: nn.Module, args: Any, kwargs: Any) -> Any:
    """Let the inputs want gradients: torch 2.13 crashes in group norms whose inputs want none."""

    def wanting(value: Any) -> Any:
        fits = isinstance(value, torch.Tensor) and value.is_floating_point() and torch.is_grad_enabled()
        return value.detach().requires_grad_() if fits else value

    return tuple(map(wanting, args)), {name: wanting(value) for name, value in kwargs.items()}


def end_pass(*_: Any) -> None:
    raise Ended


@dataclass
class BlockTrainer(Trainer):
    """Trains one block after the other, each for its share of the steps, with its own warm-up and decay.

    Raises:
        UsageError: there are more blocks than steps.
    """

    blocks: list[str] = field(init=False)
    stage: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        pair = self.loss.features
        assert pair is not None
        pair.close()
        self.parts = trained_parts(self.network)
        # a block's distance is relative, alike at every level: nothing to draw levels by
        adaptive = self.recipe.timesteps == "adaptive"
        levels = "stratified" if adaptive else self.recipe.timesteps
        self.recipe = replace(self.recipe, timesteps=levels).settled(largest_part(self.network))
        self.loss = BlockLoss(self.loss, pair.layers)
        self.density = None
        with torch.no_grad():
            self.blocks = self.loss.blocks(self.batch(0, 0, 1))
        if len(self.blocks) > self.recipe.steps:
            raise UsageError(
                f"--by-block trains {len(self.blocks)} blocks, more than --steps {self.recipe.steps}: "
                "give each one"
            )
        self.enter(0)

    def enter(self, stage: int) -> None:
        """Train the blocks up to this one no more, but this one."""
        while self.stage < stage:
            if self.stage >= 0:
                super().finish()
            self.stage += 1
            self.network.requires_grad_(False)
            self.parts[self.blocks[self.stage]].requires_grad_(True)
            self.loss.enter(self.blocks[self.stage])  # type: ignore[attr-defined]
            super().__post_init__()

    def start_of(self, stage: int) -> int:
        """The first step of a block."""
        return -(-stage * self.recipe.steps // len(self.blocks))

    def step(self, step: int, stopping: Callable[[], bool]) -> dict[str, float]:
        """See `Trainer`."""
        self.enter(step * len(self.blocks) // self.recipe.steps)
        return super().step(step, stopping)

    def rate(self, step: int) -> float:
        first, last = self.start_of(self.stage), self.start_of(self.stage + 1)
        return learning_rate(step - first, last - first, self.peak_rate, self.recipe.warmup)

    def term_names(self) -> list[str]:
        return ["loss", "features"]

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """See `Trainer`: for passes through the whole network."""
        self.loss.leave()  # type: ignore[attr-defined]
        try:
            with super().averaged() as network:
                yield network
        finally:
            self.loss.enter(self.blocks[self.stage])  # type: ignore[attr-defined]

    def finish(self) -> None:
        super().finish()
        self.loss.leave()  # type: ignore[attr-defined]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors, numbers = super().state()
        done = {
            parameter for name in self.blocks[: self.stage] for parameter in self.parts[name].parameters()
        }
        for name, parameter in self.network.named_parameters():
            if parameter in done:
                tensors[f"{DONE}/{name}"] = parameter.detach()
        return tensors, {**numbers, "stage": self.stage}

    @torch.no_grad()
    def restore(self, tensors: Tensors, numbers: Mapping[str, Any]) -> None:
        self.enter(numbers["stage"])
        for name, tensor in by_family(tensors).get(DONE, {}).items():
            self.network.get_parameter(name).copy_(tensor)
        super().restore(
            {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{DONE}/")}, numbers
        )
