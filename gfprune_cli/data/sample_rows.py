"""Samples of the dense and the pruned network from the same noise, one row above the other.

What the model card of an output shows, and what people see of a finetuning while it goes on.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn

from gfprune_cli.checkpoint.card import Picture
from gfprune_cli.checkpoint.component import Component
from gfprune_cli.data.calibration import ImageRequest, Images
from gfprune_cli.data.drawing import image_noise
from gfprune_cli.data.latents import decoder_name
from gfprune_cli.diffusion.conditions import Condition, call
from gfprune_cli.diffusion.finite import zero_levels
from gfprune_cli.diffusion.schedulers import NoisingProcess

SHOWN = 8  # samples in a row
SHOWN_OF_BOTH = 4  # where the upper row costs passes as well
MARGIN = 44  # pixels for the names of the rows
SCALE = 64  # smallest side of a sample, in pixels


@dataclass(frozen=True)
class Samples:
    """The dense network's samples, and what they came from.

    Args:
        noise: [N, C, H, W].
        condition: of the samples.
        dense: uint8 [N, C, H, W].
        process: the sampler.
        steps: of it.
    """

    noise: torch.Tensor
    condition: Condition
    dense: torch.Tensor
    process: NoisingProcess
    steps: int

    def drawn_by(self, network: nn.Module, poll: Callable[[], None], at_once: int = SHOWN) -> torch.Tensor:
        """uint8 [N, C, H, W] samples of another network.

        Args:
            poll: called before every pass; may raise.
            at_once: samples that go through the network together.
        """
        device = next(network.parameters()).device
        rows = []
        for first in range(0, len(self.noise), at_once):
            part = slice(first, first + at_once)
            chosen = None if self.condition is None else self.condition[part].to(device)

            def denoise(x: torch.Tensor, timesteps: torch.Tensor, given: Condition = chosen) -> torch.Tensor:
                poll()
                return call(network, x, timesteps, given)

            with torch.no_grad():
                images = self.process.sample(denoise, self.noise[part].to(device), self.steps)
            rows.append(to_bytes(images, self.process))
        return torch.cat(rows)


def is_picture(component: Component, config: Any) -> bool:
    """Whether samples of a network are pictures as they are: pixels, in grey or colour."""
    pixels = component.class_name.removeprefix("Pruned") == "UNet2DModel"
    return pixels and config.in_channels in (1, 3) and decoder_name(component) is None


def has_start(process: NoisingProcess) -> bool:
    """Whether a sampler has something to go by where there is noise alone."""
    return process.steps - 1 not in zero_levels(process)


def dense_samples(
    dense: nn.Module,
    request: ImageRequest,
    found: Images,
    unseen: range,
    poll: Callable[[], None],
    at_once: int = SHOWN,
) -> Samples:
    """Samples of the dense network: the first that training does not see, as they lie among those that were
    drawn; where the images are the user's, new ones, with the conditions of those.

    Args:
        request, found: the images of the run.
        unseen: the numbers of those that are kept aside.
        poll, at_once: see `Samples.drawn_by`.
    """
    members = unseen[: SHOWN if request.data is None else SHOWN_OF_BOTH]
    images = found.images
    condition = None if found.conditions is None else found.conditions[list(members)]
    noise = image_noise(tuple(images.shape[1:]), request.seed, members)
    row = Samples(noise, condition, torch.empty(0), found.process, request.sample_steps)
    if request.data is None:
        known = to_bytes(images[torch.tensor(members)], found.process)
        return replace(row, dense=known)
    return replace(row, dense=row.drawn_by(dense, poll, at_once))


def to_bytes(images: torch.Tensor, process: NoisingProcess) -> torch.Tensor:
    """uint8 [N, C, H, W] of images as a network sees them; what is not a number is black."""
    low, high = process.value_range
    scaled = (images.cpu() - low) / (high - low) * 255
    return scaled.nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)


def make_picture(samples: Samples, pruned: torch.Tensor, *, of_teacher: bool = False) -> Picture:
    """The picture of a model card.

    Args:
        pruned: uint8 [N, C, H, W].
        of_teacher: whether `samples` are of a teacher that is not the dense network.
    """
    stream = io.BytesIO()
    grid(samples.dense, pruned, "teacher" if of_teacher else "dense").save(stream, format="PNG")
    return Picture(stream.getvalue(), len(pruned), samples.steps, of_teacher)


def grid(dense: torch.Tensor, pruned: torch.Tensor, above: str = "dense") -> Image.Image:
    """Two rows of samples: uint8 [N, C, H, W] each, column by column from the same noise.

    Args:
        above: name of the first row.
    """
    rows = [tile(images) for images in (dense, pruned)]
    height, width = rows[0].height, rows[0].width
    factor = max(1, SCALE // dense.shape[2])
    page = Image.new("RGB", (MARGIN + width * factor, 2 * height * factor), "white")
    draw = ImageDraw.Draw(page)
    for number, (name, row) in enumerate(zip((above, "pruned"), rows, strict=True)):
        scaled = row.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        page.paste(scaled, (MARGIN, number * height * factor))
        draw.text((4, (number + 0.5) * height * factor), name, fill="black", anchor="lm")
    return page


def tile(images: torch.Tensor) -> Image.Image:
    """uint8 [N, C, H, W] side by side, C = 1 or 3."""
    pixels = images.expand(-1, 3, -1, -1).permute(2, 0, 3, 1)
    return Image.fromarray(pixels.reshape(pixels.shape[0], -1, 3).contiguous().cpu().numpy())
