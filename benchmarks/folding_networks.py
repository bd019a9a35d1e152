"""The networks that `folding.py` folds alone: how they are made, trained for a while, folded and sampled.

Transformers have the widths of DiT-XL/2, Stable Diffusion 3 medium and FLUX.1 dev, but two blocks, and
work on 16 x 16 images. Each image has a class of its own (DiT), or one of the built-in prompts, for which
random vectors stand in: a token is that of its word, the pooled vector their mean.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from gpu_networks import CIFAR10
from safetensors.torch import load_file, save_file
from study import once
from torch import nn

import gfprune_cli as gfprune
from gfprune_cli.checkpoint.reader import inspect
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.source import DEMO, resolve
from gfprune_cli.data.images import to_model_range
from gfprune_cli.diffusion.conditions import Condition, Conditions, call
from gfprune_cli.diffusion.draws import Draws, generator
from gfprune_cli.diffusion.loss import denoising_loss
from gfprune_cli.diffusion.schedulers import NoisingProcess, noising_process
from gfprune_cli.evaluation.consistency import ssim, unit_range
from gfprune_cli.inputs.prompts import read_prompts
from gfprune_cli.progress import silent
from gfprune_cli.pruning.fold import Folder
from gfprune_cli.pruning.probes import Probes

SAMPLE_STEPS = 8
RATE = 1e-2  # of Adafactor, relative to the size of the weights
TOKENS = 8  # of a prompt
HELD_OUT = 48  # images
LOSS_DRAWS = 512
TIGHT, WIDE = (0.003, 0.01, 0.03, 0.1), (0.01, 0.03, 0.1, 0.2)
LOOSE, LOOSER = (0.1, 0.2), (0.2, 0.3)  # where pooled vectors are random, nothing less is of use


@dataclass(frozen=True)
class Family:
    """One network: how to build it, its noise, what it is given, and how long it is trained.

    Args:
        size: of its images; 32 or 16.
        condition: number of images -> what they are given.
        packed: images become tokens of two by two pixels.
        samples: images that SSIM is taken of.
    """

    build: Callable[[], Any]
    scheduler: Callable[[], Any]
    size: int = 16
    condition: Callable[[int], Condition] = lambda count: None
    packed: bool = False
    steps: int = 20
    batch: int = 2
    samples: int = 4
    tolerances: tuple[float, ...] = WIDE


def word(name: str, width: int) -> torch.Tensor:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big")
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def prompted(count: int, width: int, pooled: int, **named: Any) -> Conditions:
    """Words as vectors, a prompt by image in turn."""
    prompts = read_prompts(None)
    words = [(prompt.split() + [""] * TOKENS)[:TOKENS] for prompt in prompts]
    tokens = torch.stack([torch.stack([word(one, width) for one in row]) for row in words]).unsqueeze(1)
    mean = [torch.stack([word(one, pooled) for one in prompt.split()]).mean(0) for prompt in prompts]
    tensors = {"encoder_hidden_states": tokens, "pooled_projections": torch.stack(mean).unsqueeze(1)}
    given = named.pop("tensors", {})
    tensors |= {key: torch.full((len(prompts), 1), value) for key, value in given.items()}
    rows = tuple(number % len(prompts) for number in range(count))
    return Conditions(tensors, sample="hidden_states", rows=rows, **named)


def classes(count: int) -> Conditions:
    labels = torch.arange(count).view(-1, 1)
    return Conditions({"class_labels": labels}, sample="hidden_states", rows=tuple(range(count)))


def positions() -> dict[str, torch.Tensor]:
    side = torch.arange(8).float()
    grid = torch.stack([torch.zeros(8, 8), side[:, None].expand(8, 8), side[None].expand(8, 8)], -1)
    return {"img_ids": grid.reshape(64, 3), "txt_ids": torch.zeros(TOKENS, 3)}


def dit(heads: int = 16, width: int = 72, blocks: int = 2, classes: int = 1000) -> Any:
    """Heads of a width each. Tables of classes are as DiT starts with: standard deviation 0.02 (arXiv
    2212.09748, published code)."""
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width, in_channels=3, out_channels=3, num_layers=blocks,
        sample_size=16, num_embeds_ada_norm=classes,
    )  # fmt: skip
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    return network


SD3: dict[str, Any] = dict(
    sample_size=16, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=64,
    num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=8,
)  # fmt: skip
FLUX: dict[str, Any] = dict(
    in_channels=12, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
)  # fmt: skip


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


FAMILIES: dict[str, Family] = {
    "DDPM CIFAR-10 U-Net": Family(partial(diffusers.UNet2DModel, **CIFAR10), diffusers.DDPMScheduler, 32),
    "DiT-XL/2, 2 blocks": Family(
        dit, diffusers.DDPMScheduler, condition=classes, steps=50, batch=4, tolerances=TIGHT
    ),
    "SD3, 2 blocks": Family(
        partial(diffusers.SD3Transformer2DModel, **SD3),
        flow,
        condition=lambda n: prompted(n, 4096, 2048),
        tolerances=LOOSE,
    ),
    "FLUX.1, 1 + 1 blocks": Family(
        partial(diffusers.FluxTransformer2DModel, **FLUX),
        flow,
        condition=lambda n: prompted(
            n, 4096, 768, tensors={"guidance": 3.5}, shared=positions(), time_factor=1e-3
        ),
        packed=True,
        steps=6,
        samples=2,
        tolerances=LOOSER,
    ),
}


def one_class(count: int) -> Conditions:
    labels = torch.zeros(1, 1, dtype=torch.long)
    return Conditions({"class_labels": labels}, sample="hidden_states", rows=(0,) * count)


DEMO_FAMILY = Family(
    lambda: gfprune.load("demo"), lambda: load_scheduler(inspect(resolve("demo"))), 32, tolerances=TIGHT
)
# the network that is pruned at equal budgets
SMALL_DIT = Family(
    partial(dit, 6, 32, 6, 1), diffusers.DDPMScheduler, condition=one_class, steps=300, batch=16
)


def images_of(family: Family) -> torch.Tensor:
    """[N, ...] as the network sees them."""
    with np.load(DEMO / "images.npz") as arrays:
        pixels = torch.from_numpy(np.concatenate([arrays["x"], arrays["held_out"]]))
    images = to_model_range(pixels.permute(0, 3, 1, 2))
    images = nn.functional.avg_pool2d(images, 32 // family.size)
    if family.packed:
        images = nn.functional.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2).contiguous()
    return images


def unpacked(family: Family, images: torch.Tensor) -> torch.Tensor:
    if not family.packed:
        return images
    return nn.functional.pixel_shuffle(images.transpose(1, 2).unflatten(2, (8, 8)), 2)


def trained(name: str, family: Family, process: NoisingProcess, draws: Draws, work: Path) -> Any:
    """The network, from `work` if it was trained before."""
    torch.manual_seed(0)
    network = family.build()
    path = work / f"{name.split(',')[0].replace(' ', '-').replace('/', '-')}.safetensors"
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.requires_grad_(False).eval()
    optimizer = torch.optim.Adafactor(network.parameters(), lr=RATE)
    for step in range(family.steps):
        batch = draws.batch("train", step, family.batch)
        condition: Any = batch.condition
        if isinstance(condition, Conditions) and "guidance" in condition.tensors:
            drawn = 1 + 6 * torch.rand(condition.tensors["guidance"].shape, generator=generator(step))
            condition.tensors["guidance"].copy_(drawn)
        noisy = process.add_noise(batch.images, batch.noise, batch.index)
        output = call(network, noisy, process.timesteps(batch.index), condition)
        loss = process.losses(output, batch.images, batch.noise, batch.index).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(name, step, f"{loss.item():.4f}", flush=True)
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, path)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def sampled(network: Any, process: NoisingProcess, family: Family, draws: Draws) -> torch.Tensor:
    """[samples, C, H, W] images, from the same noise for every network, for conditions that were held out."""
    source = generator(7, "folding samples")
    noise = torch.randn((family.samples, *draws.images.shape[1:]), generator=source)
    condition: Any = None if draws.conditions is None else draws.conditions[slice(0, family.samples)]
    found = process.sample(lambda x, times: call(network, x, times, condition), noise, SAMPLE_STEPS)
    return unit_range(unpacked(family, found), low=-1.0, high=1.0)


def small_dit_folder(work: Path) -> Path:
    """The small transformer as a checkpoint, trained if it is not there."""
    folder = work / "small-dit"
    if not (folder / "config.json").exists():
        process, images = noising_process(diffusers.DDPMScheduler()), images_of(SMALL_DIT)
        known = images[: len(images) - HELD_OUT]
        draws = Draws(known, process.steps, 0, one_class(len(known)))
        network = trained("small DiT", SMALL_DIT, process, draws, work)
        diffusers.DDPMScheduler().save_pretrained(folder)
        network.save_pretrained(folder)
    return folder


def small_dit_numbers(network: Any, work: Path) -> dict[str, float]:
    """Held-out loss of the small transformer, pruned or not, and SSIM of its samples with the dense one's."""
    process, images = noising_process(diffusers.DDPMScheduler()), images_of(SMALL_DIT)[-HELD_OUT:]
    draws = Draws(images, process.steps, 1, one_class(len(images)))
    dense = gfprune.load(small_dit_folder(work))
    measured = partial(call, network)
    pictures = [sampled(one, process, SMALL_DIT, draws) for one in (dense, network)]
    return {
        "loss": denoising_loss(measured, process, draws, LOSS_DRAWS, silent),
        "ssim": float(ssim(*pictures).mean()),
    }


def folded_numbers(name: str, work: Path) -> list[dict[str, Any]]:
    """What folding does to one network at each tolerance; kept in `work`."""
    torch.set_num_threads(1)
    family = DEMO_FAMILY if name == "demo" else FAMILIES[name]
    trial = cache(partial(Trial.of, name, family, work))  # where a number is missing
    kept = name.replace(" ", "-").replace("/", "-")
    return [
        once(work / f"{kept}-{tolerance:g}.json", lambda tolerance=tolerance: trial().row(tolerance))
        for tolerance in family.tolerances
    ]


@dataclass(frozen=True)
class Trial:
    """A network, what it is given, and pictures that it makes of images that were held out."""

    family: Family
    process: NoisingProcess
    network: Any
    conditions: Any
    held_out: Draws
    pictures: torch.Tensor

    @staticmethod
    def of(name: str, family: Family, work: Path) -> "Trial":
        process, images = noising_process(family.scheduler()), images_of(family)
        conditions: Any = family.condition(len(images))
        split = len(images) - HELD_OUT
        known, held_out = (
            Draws(images[part], process.steps, 0, None if conditions is None else conditions[part])
            for part in (slice(split), slice(split, None))
        )
        network = (
            family.build().requires_grad_(False)
            if name == "demo"
            else trained(name, family, process, known, work)
        )
        pictures = sampled(network, process, family, held_out)
        return Trial(family, process, network, conditions, held_out, pictures)

    def row(self, tolerance: float) -> dict[str, Any]:
        """The numbers of one tolerance; nothing but that where no layer is folded."""
        shape = tuple(self.held_out.images.shape[1:])
        probes = Probes(self.process, self.conditions, shape, torch.device("cpu"), 0)
        folder = Folder(self.network, probes, tolerance, torch.float32, silent)
        found = folder.fold(self.process, self.held_out)
        if found is None:
            return {"tolerance": tolerance}
        folded, numbers = found
        ranks = [layer.rank for layer in numbers.layers]
        names = [*(layer.name for layer in numbers.layers), *numbers.whole]
        unseeing = sum(self.network.get_submodule(name).weight.numel() for name in names)
        pictures = sampled(folded, self.process, self.family, self.held_out)
        return {
            "tolerance": tolerance,
            "folded": len(numbers.layers),
            "layers": len(names),
            "ranks": f"{min(ranks)} to {max(ranks)}",
            **numbers.params,
            "layer_error": numbers.layer_error,
            "output_error": numbers.output_error,
            "ssim": float(ssim(self.pictures, pictures).mean()),
            "share": unseeing / numbers.params["before"],
        }
