"""One training step, and everything that a step changes."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from gfprune_cli.diffusion.draws import Batch, Draws
from gfprune_cli.diffusion.finite import lost_at
from gfprune_cli.diffusion.levels import RANGES, LevelDensity
from gfprune_cli.errors import GfpruneError
from gfprune_cli.outputs.state import by_family
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.losses import RecoveryLoss
from gfprune_cli.recovery.optimizers import make_optimizer
from gfprune_cli.recovery.pieces import first_not_finite
from gfprune_cli.runtime.memory import parameter_count
from gfprune_cli.runtime.processes import Processes

FINAL_RATE = 0.1  # of the peak learning rate, at the end of the cosine
OUTPUTS = ("denoise", "distill")  # terms that are losses of the network's output
LEVELS = "levels"  # among the sums of a batch: its losses by noise level
SMALLEST_SCALE = 1e-4  # of float16 gradients; below it they are not finite for another reason
Tensors = Mapping[str, torch.Tensor]


class Stopped(Exception):
    """Some process was told to stop; nothing of the step was applied."""


@dataclass(frozen=True)
class Remedies:
    """What to do about a failure, in the flags of the command that trains; by default those of `finetune`."""

    not_finite: str = "lower --learning-rate, or use --precision fp32"
    memory: str = "use --checkpointing, --lora, a half --precision, or a larger device"


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine (arXiv 1608.03983) down to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (FINAL_RATE + (1 - FINAL_RATE) * (0.5 + 0.5 * math.cos(math.pi * done)))


@dataclass
class Trainer:
    """Trains a network, and keeps the moving average of its weights.

    Args:
        network: what is trained; those of its parameters that want gradients are updated in place.
        loss: of a batch; calls the network.
        draws: where batches come from.
        recipe: sizes, rates and seeds.
        processes: that share each batch.
        remedies: what errors advise.
    """

    network: nn.Module
    loss: RecoveryLoss
    draws: Draws
    recipe: FinetuneRecipe
    processes: Processes
    remedies: Remedies = Remedies()
    micro_batch: int = 0
    optimizer: torch.optim.Optimizer = field(init=False)
    ema: EMAModel | None = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    density: LevelDensity | None = field(init=False)

    def __post_init__(self) -> None:
        named = self.network.named_parameters()
        self.parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        count = sum(parameter.numel() for parameter in self.parameters.values())
        left = parameter_count(self.network) / max(1, parameter_count(self.loss.teacher))
        self.recipe = recipe = self.recipe.settled(count, left=left, sharded=self.processes.sharded)
        assert recipe.optimizer is not None
        self.optimizer = make_optimizer(
            recipe.optimizer,
            self.network,
            lr=self.peak_rate,
            weight_decay=recipe.weight_decay,
            batch=recipe.batch,
        )
        # its decay is min(decay, (1 + s) / (10 + s)) at step s
        average = recipe.ema > 0
        self.ema = EMAModel(self.averages_of(), decay=recipe.ema, foreach=True) if average else None
        device = self.processes.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=self.loss.precision == "fp16")
        self.micro_batch = self.micro_batch or recipe.micro_batch or recipe.batch
        self.density = LevelDensity(self.draws.steps) if recipe.timesteps == "adaptive" else None

    def step(self, step: int, stopping: Callable[[], bool]) -> dict[str, float]:
        """One update; on lack of memory its gradients again in halves.

        Args:
            stopping: asked before every pass; whether this process was told to stop.

        Returns:
            Means over the batch of the loss and its terms, the learning rate, the gradient's norm.

        Raises:
            Stopped: some process was told to stop; the weights are those before the step.
            GfpruneError: the loss or the gradient is not finite (before the update), or a single sample
                does not fit in memory.
        """
        found = None
        while found is None:
            with suppress(torch.OutOfMemoryError):
                found = self.accumulate(step, stopping)
            if found is None:
                self.halve(step)  # outside of any handler: the failed pass's memory is free by now
        sums, levels = found
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self.reduce_and_clip(step, sums)
        if self.density is not None:
            self.density.learn(levels)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.averages_of())
        return {**sums, "lr": rate, "grad_norm": norm}

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.recipe.steps, self.peak_rate, self.recipe.warmup)

    @property
    def peak_rate(self) -> float:
        assert self.recipe.learning_rate is not None
        return self.recipe.learning_rate

    def accumulate(self, step: int, stopping: Callable[[], bool]) -> tuple[dict[str, float], list[float]]:
        """Add up the gradients of this process's share of the batch.

        Returns:
            Means of the terms over all shares, and what `LevelDensity.seen` says of them.
        """
        share = self.processes.share(self.recipe.batch)
        sums: dict[str, torch.Tensor] = {}
        stop = False
        for first in range(share.start, share.stop, self.micro_batch):
            stop = stop or stopping()
            if stop:
                break
            for name, value in self.backward(step, first, min(self.micro_batch, share.stop - first)).items():
                sums[name] = sums.get(name, 0) + value
        names = self.term_names()
        device = self.processes.device  # waited for once, for all numbers together
        packed = [sums[name] if name in sums else torch.zeros((), device=device) for name in names]
        stopped = torch.full((), float(stop), device=device)
        levels = sums.get(LEVELS, torch.zeros(2 * RANGES, device=device))
        found = self.processes.total(torch.cat([torch.stack([*packed, stopped]), levels])).tolist()
        if found[len(names)]:
            self.optimizer.zero_grad(set_to_none=True)
            raise Stopped
        return dict(zip(names, found, strict=False)), found[len(names) + 1 :]

    def term_names(self) -> list[str]:
        recipe = self.loss.recipe
        chosen = {"distill": recipe.distill, "features": recipe.feature_weight, "jacobian": recipe.jacobian}
        return ["loss", "denoise", *(name for name, weight in chosen.items() if weight)]

    def backward(self, step: int, first: int, count: int) -> dict[str, torch.Tensor]:
        """Gradients of `count` draws of the batch; their share in the mean of each term, and in `LEVELS`."""
        recipe, of = self.recipe, self.recipe.batch
        batch = self.batch(step, first, count)
        probe = self.draws.directions("probe", step, count, first=first) if recipe.jacobian else None
        terms = self.loss.terms(batch, probe, min(1.0, step / recipe.feature_steps))
        seen = {}
        if self.density is not None and batch.weight is not None:
            outputs = [
                weight * values.detach() for name, (weight, values) in terms.items() if name in OUTPUTS
            ]
            seen[LEVELS] = self.density.seen(batch.index, torch.stack(outputs).sum(0))
            terms = {name: (weight, values * batch.weight) for name, (weight, values) in terms.items()}
        loss = torch.stack([weight * values.sum() / of for weight, values in terms.values()]).sum()
        self.scaler.scale(loss).backward()
        shares = {name: (values.detach().sum() / of) for name, (_, values) in terms.items()}
        return {"loss": loss.detach(), **shares, **seen}

    def batch(self, step: int, first: int, count: int) -> Batch:
        """`count` draws of a step."""
        recipe = self.recipe
        return self.draws.batch(
            *("train", step, count),
            first=first,
            of=recipe.batch,
            levels=recipe.timesteps,
            density=self.density,
        )

    def reduce_and_clip(self, step: int, sums: Mapping[str, float]) -> float:
        """Sum the gradients over the processes, undo their scale, clip them; returns their norm.

        Raises:
            GfpruneError: the loss or a gradient is not finite.
        """
        self.sum_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = self.clip()
        bad = not math.isfinite(sums["loss"])
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE
        if bad or not (math.isfinite(norm) or overflow):
            gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
            culprit = first_not_finite(gradients, self.processes) or "none"
            self.optimizer.zero_grad(set_to_none=True)
            self.look_for_timesteps(step)
            raise GfpruneError(
                f"the training loss at step {step} is not finite (first bad gradient: {culprit}): "
                f"{self.remedies.not_finite}"
            )
        return norm if math.isfinite(norm) else 0.0  # an overflow in float16: the scaler skips this step

    def sum_gradients(self) -> None:
        """Over the processes."""
        if self.processes.count == 1:
            return
        given = {name: one.grad for name, one in self.parameters.items() if one.grad is not None}
        for name, summed in self.processes.totals(given).items():
            given[name].copy_(summed)  # which keeps its memory format

    def clip(self) -> float:
        """Clip the gradients; their norm before."""
        return float(nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip))

    def look_for_timesteps(self, step: int) -> None:
        """The share of this process in a batch whose loss is not finite, looked at once more.

        Raises:
            GfpruneError: the dense network's outputs are not finite, or the student's at some timesteps and
                not at others: the learning rate is not to blame.
        """
        share, bad, levels = self.processes.share(self.recipe.batch), [], []
        with torch.no_grad():
            for first in range(share.start, share.stop, self.micro_batch):
                batch = self.batch(step, first, min(self.micro_batch, share.stop - first))
                levels.append(self.loss.process.timesteps(batch.index))
                bad.append(self.loss.not_finite(batch))
        student, teacher = torch.cat(bad, dim=1)
        remedy = "check the checkpoint and its dense model"
        if bool(teacher.any()):
            raise lost_at("the dense model's output", teacher, torch.cat(levels), remedy)
        if bool(student.any()) and not bool(student.all()):
            raise lost_at("the network's output", student, torch.cat(levels), remedy)

    def halve(self, step: int) -> None:
        """Halve the micro-batch and forget the gradients so far."""
        self.optimizer.zero_grad(set_to_none=True)
        size = min(self.micro_batch, len(self.processes.share(self.recipe.batch)))
        if size <= 1:
            raise GfpruneError(
                f"out of memory with one sample per pass at training step {step}: {self.remedies.memory}"
            )
        self.micro_batch = (size + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with the moving average, if there is one, in place of its weights."""
        if self.ema is None:
            yield self.network
            return
        self.ema.store(self.averages_of())
        self.ema.copy_to(self.averages_of())
        try:
            yield self.network
        finally:
            self.ema.restore(self.averages_of())

    def finish(self) -> None:
        """Leave the moving average, if there is one, in the network."""
        if self.ema is not None:
            self.ema.copy_to(self.averages_of())

    def averages_of(self) -> list[torch.Tensor]:
        """The tensors that the moving average follows."""
        return list(self.parameters.values())

    def averages(self) -> dict[str, torch.Tensor]:
        """Weight -> its moving average, if there is one."""
        shadows = self.ema.shadow_params if self.ema else ()
        return dict(zip(self.parameters, shadows, strict=False))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that the next steps depend on: (tensors, numbers)."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight/{name}"] = parameter.detach()
            moments = self.optimizer.state.get(parameter, {})
            for moment, value in moments.items():
                if isinstance(value, torch.Tensor) and moment != "step":
                    own = value.shape == parameter.shape  # tables may be shared, which no file can hold
                    tensors[f"{moment}/{name}"] = value if own else value.clone()
        tensors |= {f"ema/{name}": shadow for name, shadow in self.averages().items()}
        updates = max((int(entry.get("step", 0)) for entry in self.optimizer.state.values()), default=0)
        numbers = {
            "updates": updates,
            "averaged": self.ema.optimization_step if self.ema else 0,
            "micro_batch": self.micro_batch,
            "scaler": self.scaler.state_dict(),
            "levels": None if self.density is None else [self.density.squares, self.density.counts],
        }
        return tensors, numbers

    @torch.no_grad()
    def restore(self, tensors: Tensors, numbers: Mapping[str, Any]) -> None:
        """Continue from `state()`.

        Raises:
            GfpruneError: a weight or its average is missing, or has another shape.
        """
        families = by_family(tensors)
        shadows = []
        for name, parameter in self.parameters.items():
            found = {kind: members[name] for kind, members in families.items() if name in members}
            for kind in ("weight", "ema") if self.ema else ("weight",):
                if kind not in found or found[kind].shape != parameter.shape:
                    raise GfpruneError(f"the saved state does not fit: {kind} of {name}; use --force")
            # memory formats decide which kernels run, so they are those of the parameters
            copies = {
                kind: torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
                if tensor.shape == parameter.shape
                else tensor.to(parameter.device, copy=True)
                for kind, tensor in found.items()
            }
            parameter.copy_(copies.pop("weight"))
            if self.ema:
                shadows.append(copies.pop("ema"))
            if copies:
                self.optimizer.state[parameter] = {"step": self.step_count(parameter, numbers), **copies}
        if self.ema:
            self.ema.shadow_params = shadows
            self.ema.optimization_step = numbers["averaged"]
        self.micro_batch = numbers["micro_batch"]
        self.scaler.load_state_dict(numbers["scaler"])
        if self.density is not None:
            self.density = LevelDensity(self.draws.steps, *map(list, numbers["levels"]))

    def step_count(self, parameter: nn.Parameter, numbers: Mapping[str, Any]) -> Any:
        """How often a parameter was updated, as its optimiser counts: fused ones do on its device."""
        if self.recipe.optimizer == "adamw8bit":
            return numbers["updates"]
        return torch.tensor(float(numbers["updates"]), device=parameter.device)
