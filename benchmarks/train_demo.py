"""Train the checkpoint that ships as `gfprune_cli/demo`: a small DDPM on 32 x 32 Noto emoji.

    python benchmarks/train_demo.py --data noto-emoji-32.npz --out first --minutes 72
    python benchmarks/train_demo.py --data noto-emoji-32.npz --out gfprune_cli/demo --minutes 27 \
        --init first --lr 6e-4 --faces 4 --noise-weight 20

The data file holds `x` [N, H, W, C] uint8 and `c` [N] category names. Every tenth image of the
chosen categories is held out: it is never trained on and ships beside the training images.
The learning rate anneals over the steps or over `--minutes`, whichever ends first. The second stage
draws faces more often and weighs high noise more: there the colours and the outline of a sample are decided,
and the plain loss hardly sees them.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
WARMUP_STEPS = 200
EMA_DECAY = 0.9993
HELD_OUT_EVERY = 10


def network(
    widths: Sequence[int], size: int = 32, channels: int = 3, groups: int = 8, attention: int = 8
) -> UNet2DModel:
    """A U-Net of one stage per width.

    Args:
        size: height and width of an image.
        groups: of every group norm.
        attention: the stage of this height and width has attention, as the middle has.
    """
    attends = [size >> stage == attention for stage in range(len(widths))]
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=tuple(widths),
        norm_num_groups=groups,
        attention_head_dim=16,
        down_block_types=tuple("AttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        up_block_types=tuple("AttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
    )


def load_split(path: Path, categories: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of the chosen categories as uint8 [N, H, W, C]: (training, held out, training is a face)."""
    with np.load(path) as data:
        chosen = np.isin(data["c"], categories)
        images, faces = data["x"][chosen], data["c"][chosen] == CATEGORIES[0]
    held_out = np.arange(len(images)) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    return images[~held_out], images[held_out], faces[~held_out]


def sample_weights(signal: torch.Tensor, cap: float) -> torch.Tensor:
    """[T] 1 + min(1 / SNR, cap): up to the cap, the loss of v-prediction (arXiv 2202.00512)."""
    return 1 + ((1 - signal) / signal).clamp_max(cap)


def target_of(
    scheduler: DDPMScheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network has to put out: the noise, or the velocity (arXiv 2202.00512)."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return scheduler.get_velocity(images, noise, timesteps)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, C] -> float [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for averaged, current in zip(ema.parameters(), model.parameters(), strict=True):
        averaged.lerp_(current, 1 - decay)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, scheduler: DDPMScheduler, images: torch.Tensor) -> float:
    """Denoising loss on the held-out images, the same draws at every call."""
    generator = torch.Generator().manual_seed(0)
    total, repeats = 0.0, 8
    for _ in range(repeats):
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (len(images),), generator=generator)
        noisy = scheduler.add_noise(images, noise, timesteps)
        target = target_of(scheduler, images, noise, timesteps)
        total += (model(noisy, timesteps).sample - target).square().mean().item()
    return total / repeats


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    training, held_out, faces = load_split(options.data, options.categories)
    chances = torch.tensor(np.where(faces, options.faces, 1.0)).to(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out / "images.npz", x=training, held_out=held_out)
    images, probes = to_tensor(training).to(options.device), to_tensor(held_out)
    scheduler = DDPMScheduler(beta_schedule=options.schedule, prediction_type=options.prediction)
    weights = sample_weights(scheduler.alphas_cumprod, options.noise_weight).to(options.device)
    size, channels = training.shape[-2:]
    model = network(options.widths, size, channels, options.groups, options.attention)
    if options.init:
        model.load_state_dict(UNet2DModel.from_pretrained(options.init, subfolder="unet").state_dict())
    model = model.train().to(options.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=1e-4)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(images)} images", flush=True)

    start, step, progress = time.time(), 0, 0.0
    while progress < 1:
        progress = max(step / options.steps, (time.time() - start) / 60 / options.minutes)
        warm, annealed = min(1, (step + 1) / WARMUP_STEPS), 0.5 + 0.5 * math.cos(math.pi * min(progress, 1))
        rate = options.lr * warm * annealed
        optimizer.param_groups[0]["lr"] = rate
        batch = images[torch.multinomial(chances, options.batch, replacement=True)]
        flip = torch.rand(options.batch, 1, 1, 1, device=batch.device) < 0.5
        batch = torch.where(flip, batch.flip(-1), batch).contiguous(memory_format=torch.channels_last)
        noise = torch.randn_like(batch)
        half = torch.randint(0, 1000, (options.batch // 2,), device=batch.device)
        timesteps = torch.cat([half, 999 - half])  # antithetic: lower variance at no cost
        target = target_of(scheduler, batch, noise, timesteps)
        errors = (model(scheduler.add_noise(batch, noise, timesteps), timesteps).sample - target).square()
        loss = (weights[timesteps] * errors.mean((1, 2, 3))).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, step)
        step += 1
        if step % 250 == 0:
            seconds = time.time() - start
            print(f"step {step} loss {loss.item():.4f} lr {rate:.2e} {seconds:.0f} s", flush=True)
        if step % 1000 == 0 or progress >= 1:
            ema.eval()
            loss_held_out = held_out_loss(copy.deepcopy(ema).cpu(), scheduler, probes)
            print(f"step {step} held-out loss of the averaged weights {loss_held_out:.4f}", flush=True)
            DDPMPipeline(copy.deepcopy(ema).cpu(), scheduler).save_pretrained(options.out)
    record = {
        "minutes": round((time.time() - start) / 60),
        "steps": step,
        "batch": options.batch,
        "seed": options.seed,
        "held_out_loss": loss_held_out,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--categories", nargs="+", default=CATEGORIES)
    parser.add_argument("--widths", type=int, nargs="+", default=(32, 48, 80, 72))
    parser.add_argument("--groups", type=int, default=8, help="of every group norm")
    parser.add_argument("--attention", type=int, default=8, help="height of the stage that has attention")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--schedule", choices=("linear", "squaredcos_cap_v2"), default="linear")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--init", type=Path, help="pipeline folder to start from")
    parser.add_argument("--faces", type=float, default=1, help="how much oftener faces are drawn")
    parser.add_argument("--noise-weight", type=float, default=0, help="cap of the extra weight of high noise")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    train(arguments().parse_args())
