"""The methods that gfprune is measured against, each as its own source describes it.

Torch-Pruning (arXiv 2301.12900) prunes with its own pruner, importances and selection: one ratio for all
layers, importance averaged over the groups of a group norm, the same index removed from each of them.
Diff-Pruning (arXiv 2305.10924) is that pruner with a Taylor importance whose gradients stop at the timestep
where the loss falls below a share of the largest.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gfprune_cli.diffusion.conditions import call
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.loss import REPORT_DRAWS, denoising_loss
from gfprune_cli.diffusion.schedulers import NoisingProcess
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.progress import silent
from gfprune_cli.recipes.finetune import FinetuneRecipe

CHUNK = 16
THRESHOLD = 0.05  # of the largest loss: Diff-Pruning's default
DIFF_PRUNING_IMAGES = 4  # that every timestep sees, one batch for all of them
BISECTIONS = 10  # of the ratio, to a thousandth: a channel of any layer here is more


def taylor_gradients(model: nn.Module, process: NoisingProcess, draws: Draws, count: int) -> int:
    """Leave the gradient of the denoising loss over `count` draws in the parameters; returns the count."""
    for first in range(0, count, CHUNK):
        batch = draws.batch("score", 1, min(CHUNK, count - first), first=first, of=count)
        noisy = process.add_noise(batch.images, batch.noise, batch.index)
        output = model(noisy, process.timesteps(batch.index)).sample
        (process.losses(output, batch.images, batch.noise, batch.index).sum() / count).backward()
    return count


def diff_pruning_gradients(model: nn.Module, process: NoisingProcess, draws: Draws, count: int) -> int:
    """One gradient per timestep of the same few images, from low noise up, until the loss gets small.

    Args:
        count: the most gradients to take; timesteps are visited at even distances so that they suffice.
    """
    batch = draws.batch("score", 1, DIFF_PRUNING_IMAGES)
    visited = max(1, count // DIFF_PRUNING_IMAGES)
    largest, taken = 0.0, 0
    for index in torch.linspace(0, process.steps - 1, visited, device=batch.index.device).long():
        levels = index.expand(DIFF_PRUNING_IMAGES)
        noisy = process.add_noise(batch.images, batch.noise, levels)
        loss = process.losses(
            model(noisy, process.timesteps(levels)).sample, batch.images, batch.noise, levels
        ).mean()
        taken += DIFF_PRUNING_IMAGES
        value = loss.item()
        largest = max(largest, value)
        if value < THRESHOLD * largest:
            break
        loss.backward()
    return taken


Scoring = Callable[[nn.Module, NoisingProcess, Draws, int], int]


def importance_of(peer: str) -> tuple[Any, Scoring | None]:
    """Torch-Pruning's importance, and the gradients that it needs."""
    if peer == "magnitude":
        return tp.importance.GroupMagnitudeImportance(p=2), None
    if peer == "random":
        return tp.importance.RandomImportance(), None
    if peer == "taylor":
        return tp.importance.GroupTaylorImportance(), taylor_gradients
    if peer == "diff-pruning":
        return tp.importance.GroupTaylorImportance(multivariable=True), diff_pruning_gradients
    raise ValueError(f"no peer {peer!r}")


def prune_uniformly(model: UNet2DModel, importance: Any, ratio: float) -> None:
    """Torch-Pruning's pruner, in place: `ratio` of the channels of every layer."""
    heads = {}
    for module in model.modules():
        if isinstance(module, Attention):
            heads |= dict.fromkeys((module.to_q, module.to_k, module.to_v), module.heads)
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs(model),
        importance=importance,
        pruning_ratio=ratio,
        ignored_layers=[model.conv_out],
        num_heads=heads,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for module in model.modules():
        if isinstance(module, Upsample2D | Downsample2D):
            module.channels = module.conv.in_channels
            module.out_channels = module.conv.out_channels


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs_of(model: nn.Module) -> int:
    """Multiply-accumulates of one sample, counted by PyTorch, which does not see those of fused attention on
    some processors."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**example_inputs(model))
    return counter.get_total_flops() // 2


def at_rate(
    recipe: FinetuneRecipe, model: nn.Module, dense: nn.Module, process: NoisingProcess, draws: Draws
) -> FinetuneRecipe:
    """The recipe with the rate that finetune gives it, which in a long run asks for the network's loss."""
    if recipe.learning_rate is not None or recipe.length_factor == 1:
        return recipe
    before, reached = (
        denoising_loss(partial(call, network), process, draws, REPORT_DRAWS, silent)
        for network in (model, dense)
    )
    left = parameters(model) / parameters(dense)
    return recipe.settled(parameters(model), left=left, excess=before / reached - 1)


def pruned_by(
    peer: str,
    dense: Callable[[], UNet2DModel],
    sparsity: float,
    process: NoisingProcess,
    draws: Draws,
    count: int,
) -> tuple[UNet2DModel, int]:
    """The network that a peer leaves, nearest to a share of removed parameters, and the gradients it took.

    Args:
        dense: makes a copy of the dense network.
        count: gradients that scoring may take.
    """
    importance, score = importance_of(peer)
    scored, taken = dense().requires_grad_(True), 0
    if score is not None:
        taken = score(scored, process, draws, count)
    gradients = {name: parameter.grad for name, parameter in scored.named_parameters()}
    total, best, low, high = parameters(scored), scored, 0.0, 1.0
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        model = dense().requires_grad_(True)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        torch.manual_seed(draws.seed)  # of the random importance
        prune_uniformly(model, importance, ratio)
        gone = 1 - parameters(model) / total
        if abs(gone - sparsity) < abs(1 - parameters(best) / total - sparsity):
            best = model
        low, high = (ratio, high) if gone < sparsity else (low, ratio)
    best.zero_grad(set_to_none=True)
    return best, taken
