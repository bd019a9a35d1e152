"""Training of the weights between mask steps, with distillation from the dense model."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gfprune_cli.data.diffusion import NoisingProcess
from gfprune_cli.data.draws import Batch, Draws
from gfprune_cli.data.measure import Network
from gfprune_cli.device import Precision
from gfprune_cli.errors import GfpruneError
from gfprune_cli.flow.mask import MaskedModel

WARMUP_STEPS = 10
FINAL_RATE = 0.1  # of the learning rate, at the end of the cosine
CLIP = 1.0  # gradient norm


@dataclass
class Adam:
    """AdamW's moments by parameter name: plain tensors, so that they save and resume exactly."""

    first: dict[str, torch.Tensor] = field(default_factory=dict)
    second: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0

    @torch.no_grad()
    def update(self, weights: dict[str, nn.Parameter], rate: float) -> None:
        """One step of Adam without weight decay (arXiv 1412.6980), from the gradients in `weights`."""
        self.steps += 1
        names = [name for name, weight in weights.items() if weight.grad is not None]
        for name in names:
            if name not in self.first:
                self.first[name] = torch.zeros_like(weights[name])
                self.second[name] = torch.zeros_like(weights[name])
        gradients: list[torch.Tensor] = [weights[name].grad for name in names]  # type: ignore[misc]
        first, second = [self.first[name] for name in names], [self.second[name] for name in names]
        torch._foreach_lerp_(first, gradients, 0.1)
        torch._foreach_mul_(second, 0.999)
        torch._foreach_addcmul_(second, gradients, gradients, 0.001)
        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, (1 - 0.999**self.steps) ** 0.5)
        torch._foreach_add_(root, 1e-8)
        torch._foreach_addcdiv_([weights[name] for name in names], first, root, -rate / (1 - 0.9**self.steps))


@dataclass
class Trainer:
    """Trains effective weights theta(m) = m * theta through the masks.

    Args:
        masked: the student.
        teacher: dense network, weights frozen; None if nothing is distilled.
        process: noising process of both.
        draws: where batches come from.
        batch: samples per step.
        rate: peak learning rate.
        total: steps of the whole run, for the schedule.
        distill: share of output distillation in the loss; the rest is denoising.
        precision: of the forward passes.
    """

    masked: MaskedModel
    teacher: Network | None
    process: NoisingProcess
    draws: Draws
    batch: int
    rate: float
    total: int
    distill: float
    precision: Precision
    adam: Adam = field(default_factory=Adam)
    micro_batch: int = 0

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to a tenth."""
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        cosine = 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / max(1, self.total))))
        return self.rate * warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)

    def step(self, step: int) -> float:
        """One update; on lack of memory its gradients again in halves.

        Raises:
            GfpruneError: the loss or the gradient is not finite (before the update), or a single sample
                does not fit in memory.
        """
        while True:
            try:
                value = self.gradients(step)
                break
            except torch.OutOfMemoryError:
                self.halve(step)
        self.adam.update(self.masked.weights, self.learning_rate(step))
        self.clear()
        return value

    def halve(self, step: int) -> None:
        """Halve the micro-batch and forget the gradients so far."""
        size = self.micro_batch or self.batch
        if size == 1:
            raise GfpruneError(
                f"out of memory with one sample per pass at training step {step}: use a larger device"
            ) from None
        self.micro_batch = (size + 1) // 2
        self.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def clear(self) -> None:
        for weight in self.masked.weights.values():
            weight.grad = None

    def gradients(self, step: int) -> float:
        """Accumulate and clip the gradients of one batch; returns its loss."""
        size = self.micro_batch or self.batch
        device = self.draws.images.device
        total = torch.zeros((), device=device)
        # the fused kernels' backward passes are not deterministic on CUDA
        kernels = sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()
        for first in range(0, self.batch, size):
            count = min(size, self.batch - first)
            batch = self.draws.batch("train", step, count, first=first, of=self.batch)
            with kernels:
                loss = self.loss(batch) * (count / self.batch)
                loss.backward()
            total += loss.detach()
        weights = self.masked.weights
        length = nn.utils.clip_grad_norm_(weights.values(), CLIP)
        value, norm = torch.stack([total, length.to(total)]).tolist()  # one wait for the device
        if not (math.isfinite(value) and math.isfinite(norm)):
            culprit = next(
                (n for n, w in weights.items() if w.grad is not None and not bool(w.grad.isfinite().all())),
                "none",
            )
            raise GfpruneError(
                f"the training loss at step {step} is not finite (first bad gradient: {culprit}): "
                "lower --learning-rate"
            )
        return float(value)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean of distill * |student - teacher|^2 + (1 - distill) * denoising loss."""
        noisy = self.process.add_noise(batch.images, batch.noise, batch.index)
        timesteps = self.process.timesteps(batch.index)
        device = noisy.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.masked.forward(self.masked.effective(), noisy, timesteps, batch.condition)
            with torch.no_grad():
                reference = self.teacher(noisy, timesteps, batch.condition) if self.teacher else output
        losses = (1 - self.distill) * self.process.losses(
            output.float(), batch.images, batch.noise, batch.index
        )
        if self.teacher:
            losses = losses + self.distill * self.process.distance(
                output.float(), reference.float(), batch.index
            )
        return losses.mean()
