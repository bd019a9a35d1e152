"""Networks of `gpu.py`: the dense one, trained on the spot, and what peers make of it, as checkpoints."""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from peers import at_rate, importance_of, prune_uniformly
from torch import nn

from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import pruned_class
from gfprune_cli.checkpoint.source import DEMO
from gfprune_cli.data.images import to_model_range
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.schedulers import NoisingProcess, noising_process
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.losses import RecoveryLoss
from gfprune_cli.recovery.trainer import Trainer
from gfprune_cli.runtime.device import autocast, default_precision, deterministic
from gfprune_cli.runtime.processes import Processes

OBJECTS = Path(__file__).parent / "data" / "noto-objects-32.npz"
HELD_OUT_EVERY = 10  # of the objects; the demo's images are split already
RATE, WEIGHT_DECAY, WARMUP_STEPS = 5e-4, 1e-4, 100
EMA_DECAY = 0.995  # a run of some minutes: 0.9999 would still remember the first steps
SYNC_EVERY = 8  # steps: the clock that ends the training must not run ahead of the device

# google/ddpm-cifar10-32, unet/config.json: 35,746,307 parameters
CIFAR10 = dict(
    sample_size=32,
    in_channels=3,
    out_channels=3,
    layers_per_block=2,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    flip_sin_to_cos=False,
    freq_shift=1,
    downsample_padding=0,
    norm_eps=1e-6,
    norm_num_groups=32,
)


@dataclass(frozen=True)
class Emoji:
    """Files of images, as every command takes them: uint8 [N, H, W, 3]."""

    training: Path
    held_out: Path


def write_emoji(folder: Path, size: int, most: int) -> Emoji:
    """The demo's images and the objects, with what both hold out in a file of its own.

    Args:
        size: pixels; 32 divided by a whole number.
        most: of each file.
    """
    with np.load(DEMO / "images.npz") as demo, np.load(OBJECTS) as objects:
        apart = np.arange(len(objects["x"])) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
        training = np.concatenate([demo["x"], objects["x"][~apart]])
        held_out = np.concatenate([demo["held_out"], objects["x"][apart]])
    step = training.shape[1] // size
    found = Emoji(folder / "training.npz", folder / "held-out.npz")
    for path, images in ((found.training, training), (found.held_out, held_out)):
        np.savez_compressed(path, x=images[:most, ::step, ::step])
    return found


def read_images(path: Path, device: torch.device) -> torch.Tensor:
    """float [N, 3, H, W] in [-1, 1]."""
    with np.load(path) as data:
        images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).contiguous()
    return to_model_range(images).to(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def process_of() -> NoisingProcess:
    """The noise of google/ddpm-cifar10-32: DDPM's own, linear, 1000 steps."""
    return noising_process(DDPMScheduler())


def train_dense(
    model: UNet2DModel, images: torch.Tensor, *, seconds: float, steps: float, batch: int, seed: int
) -> int:
    """Train with the plain denoising loss; the moving average of the weights is what is left.

    Args:
        images: [N, 3, H, W] on the device to train on.
        seconds, steps: whichever ends first; the learning rate anneals over it.
        batch: even.

    Returns:
        Steps that were made.
    """
    device, process = images.device, process_of()
    nn.Module.to(model, device, memory_format=torch.channels_last).train()
    ema = EMAModel(model.parameters(), decay=EMA_DECAY, foreach=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY, fused=True)
    source = torch.Generator(device).manual_seed(seed)
    step, progress, start = 0, 0.0, time.perf_counter()
    while progress < 1:
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = RATE * warm * (0.5 + 0.5 * math.cos(math.pi * progress))
        loss = dense_loss(model, process, images, batch, source)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        step += 1
        if step % SYNC_EVERY == 0:
            synchronize(device)
        progress = max(step / steps, (time.perf_counter() - start) / seconds)
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the loss of the dense network is not finite after {step} steps")
    ema.copy_to(model.parameters())
    nn.Module.to(model, "cpu", memory_format=torch.contiguous_format).eval()
    return step


def dense_loss(
    model: UNet2DModel, process: NoisingProcess, images: torch.Tensor, batch: int, source: torch.Generator
) -> torch.Tensor:
    """Mean denoising loss of one batch of flipped images, noise levels in antithetic pairs."""
    device = images.device
    chosen = images[torch.randint(len(images), (batch,), generator=source, device=device)]
    flip = torch.rand(batch, 1, 1, 1, generator=source, device=device) < 0.5
    chosen = torch.where(flip, chosen.flip(-1), chosen)
    noise = torch.randn(chosen.shape, generator=source, device=device)
    half = torch.randint(process.steps, (batch // 2,), generator=source, device=device)
    index = torch.cat([half, process.steps - 1 - half])
    noisy = process.add_noise(chosen, noise, index).contiguous(memory_format=torch.channels_last)
    with autocast(device, default_precision(device)):
        output = model(noisy, index).sample
    return process.losses(output.float(), chosen, noise, index).mean()


def save(model: nn.Module, folder: Path) -> None:
    """As a pipeline folder."""
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(folder)


def pruned_by(
    peer: str, dense: UNet2DModel, ratio: float, draws: Draws, count: int
) -> tuple[UNet2DModel, int]:
    """What a peer leaves of `dense`, on the CPU, and the gradients it took.

    Scoring runs on the device of the draws, in float32; the graph surgery on the CPU.

    Args:
        ratio: of the channels of every layer that go.
        count: gradients that scoring may take.
    """
    importance, score = importance_of(peer)
    model = nn.Module.to(copy.deepcopy(dense), draws.images.device).requires_grad_(True)
    taken = 0
    if score is not None:

        def network(x: torch.Tensor, timesteps: torch.Tensor) -> Any:
            return model(x, timesteps.to(x.device))  # some peers keep their timesteps on the CPU

        with deterministic():
            taken = score(network, process_of(), draws, count)
    nn.Module.to(model, "cpu")
    prune_uniformly(model, importance, ratio)
    model.zero_grad(set_to_none=True)
    return model, taken


def trainer_of(model: nn.Module, dense: nn.Module, draws: Draws, steps: int, batch: int) -> Trainer:
    """The trainer of `gfprune finetune`, with its defaults."""
    device = draws.images.device
    recipe = FinetuneRecipe(model="benchmark", steps=steps, batch=batch, seed=draws.seed)
    teacher = nn.Module.to(copy.deepcopy(dense), device).requires_grad_(False)
    format = torch.channels_last if device.type == "cuda" else torch.preserve_format
    nn.Module.to(model, device, memory_format=format).requires_grad_(True)
    recipe = at_rate(recipe, model, teacher, process_of(), draws)
    loss = RecoveryLoss(model, teacher, process_of(), recipe, None, default_precision(device))
    return Trainer(model, loss, draws, recipe, Processes(None, device))


def finetune(model: nn.Module, dense: nn.Module, draws: Draws, steps: int, batch: int) -> nn.Module:
    """As `gfprune finetune` does with its defaults; on the CPU, its averaged weights in place."""
    trainer = trainer_of(model, dense, draws, steps, batch)
    with deterministic():
        for step in range(steps):
            trainer.step(step, lambda: False)
    trainer.ema.copy_to(model.parameters())
    return nn.Module.to(model, "cpu", memory_format=torch.contiguous_format).requires_grad_(False).eval()


def seconds_per_sample(dense: UNet2DModel, draws: Draws, steps: int, batch: int) -> float:
    """Of a step of `gfprune finetune` on the dense network; narrower ones are faster."""
    device = draws.images.device
    trainer = trainer_of(copy.deepcopy(dense), dense, draws, 2 * steps, batch)
    with deterministic():
        for step in range(2 * steps):
            if step == steps:  # the first half warms up
                synchronize(device)
                start = time.perf_counter()
            trainer.step(step, lambda: False)
        synchronize(device)
    return (time.perf_counter() - start) / (steps * batch)


def as_pruned_class(narrow: nn.Module, dense: UNet2DModel) -> nn.Module:
    """A narrow network as the class that gfprune writes and reads; the stock one cannot hold its widths."""
    modules: dict[str, dict[str, int | Sequence[int]]] = {}
    for name, module in narrow.named_modules():
        before: Any = dense.get_submodule(name)
        if isinstance(module, nn.GroupNorm) and module.num_channels != before.num_channels:
            modules[name] = {"groups": [module.num_channels // module.num_groups] * module.num_groups}
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape != before.weight.shape:
            modules[name] = {"out": module.weight.shape[0], "in": module.weight.shape[1]}
    config = {key: value for key, value in dense.config.items() if not key.startswith("_")}
    built: nn.Module = pruned_class("UNet2DModel")(gfprune={"modules": modules}, **config)
    built.load_state_dict(narrow.state_dict())
    return built.eval()
