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
from gfprune_cli.checkpoint.layout import is_autoencoder
from gfprune_cli.data.calibration import ImageRequest, Images
from gfprune_cli.data.drawing import image_noise
from gfprune_cli.data.latent_decoder import LatentDecoder, NotShown
from gfprune_cli.data.latents import decoder_name
from gfprune_cli.diffusion.conditions import Condition, call, some_of
from gfprune_cli.diffusion.finite import ZERO_SNR, zero_levels
from gfprune_cli.diffusion.schedulers import NoisingProcess
from gfprune_cli.inputs.conditioning import in_words
from gfprune_cli.progress import Progress, notice

SHOWN = 8  # samples in a row
SHOWN_OF_BOTH = 4  # where the upper row costs passes as well, or pictures have to be decoded
MARGIN = 44  # pixels for the names of the rows
SCALE = 64  # smallest side of a sample, in pixels


@dataclass(frozen=True)
class Samples:
    """The dense network's samples, and what they came from.

    Args:
        noise: [N, C, H, W]; latents have shapes of their own.
        condition: of the samples.
        dense: uint8 [N, C, H, W], as they are shown.
        process: the sampler.
        steps: of it.
        at_once: samples that go through a network together.
        decoder: of latents; None for pixels.
        asked: the prompt or class of each; empty where there is none.
    """

    noise: torch.Tensor
    condition: Condition
    dense: torch.Tensor
    process: NoisingProcess
    steps: int
    at_once: int = SHOWN
    decoder: LatentDecoder | None = None
    asked: tuple[str, ...] = ()

    def drawn_by(self, network: nn.Module, poll: Callable[[], None]) -> torch.Tensor:
        """uint8 [N, C, H, W] samples of another network.

        Args:
            poll: called before every pass; may raise.

        Raises:
            NotShown: latents cannot be decoded now.
        """
        device = next(network.parameters()).device
        rows = []
        for first in range(0, len(self.noise), self.at_once):
            part = slice(first, first + self.at_once)
            chosen = None if self.condition is None else self.condition[part].to(device)

            def denoise(x: torch.Tensor, timesteps: torch.Tensor, given: Condition = chosen) -> torch.Tensor:
                poll()
                return call(network, x, timesteps, given)

            with torch.no_grad():
                rows.append(self.process.sample(denoise, self.noise[part].to(device), self.steps).cpu())
        return self.shown(torch.cat(rows), poll)

    def shown(self, drawn: torch.Tensor, poll: Callable[[], None]) -> torch.Tensor:
        """uint8 [N, C, H, W] pictures of [N, ...] samples as a network sees them."""
        if self.decoder is not None:
            return to_bytes(self.decoder(drawn, poll), (-1.0, 1.0))
        return to_bytes(drawn, self.process.value_range)

    def beside(
        self, network: nn.Module, poll: Callable[[], None], progress: Progress, *, of_teacher: bool = False
    ) -> Picture | None:
        """The picture of a model card: these above another network's; None, and a notice, where it cannot be.

        Args:
            of_teacher: whether these are of a teacher that is not the dense network.
        """
        stream = io.BytesIO()
        try:
            drawn = self.drawn_by(network, poll)
        except NotShown as reason:
            notice(progress, f"no samples are shown: {reason}")
            return None
        grid(self.dense, drawn, "teacher" if of_teacher else "dense").save(stream, format="PNG")
        return Picture(stream.getvalue(), len(drawn), self.steps, of_teacher, self.asked)


def dense_samples(
    dense: nn.Module,
    component: Component,
    scheduler: Any,
    request: ImageRequest,
    found: Images,
    unseen: range,
    poll: Callable[[], None],
    progress: Progress,
    at_once: int | None = None,
) -> Samples | None:
    """Samples of the dense network: the first that training does not see, as they lie among those that were
    drawn; where the images are the user's, new ones, with the conditions of those.

    None, and a notice of why, where there are none to show.

    Args:
        component: of the pipeline, whose autoencoder decodes latents.
        request, found: the images of the run.
        unseen: the numbers of those that are kept aside.
        poll: see `Samples.drawn_by`.
        at_once: samples that go through a network together; latents one by one, else all.
    """
    if is_autoencoder(component.class_name):
        return None
    network: Any = dense
    # whether they are pictures as they are, in grey or colour
    plain = component.class_name.removeprefix("Pruned") == "UNet2DModel" and decoder_name(component) is None
    pixels = plain and network.config.in_channels in (1, 3)
    members = unseen[: SHOWN if request.data is None and pixels else SHOWN_OF_BOTH]
    images = found.images
    condition = some_of(found.conditions, list(members))
    noise = image_noise(tuple(images.shape[1:]), request.seed, members)
    device = next(dense.parameters()).device
    row = Samples(
        noise, condition, torch.empty(0), found.process, request.sample_steps,
        at_once or (SHOWN if pixels else 1),
        None if pixels else LatentDecoder(component, scheduler, found.pixels, device),
        in_words(component, [found.asked[number] for number in members] if found.asked else []),
    )  # fmt: skip
    try:
        if found.process.steps - 1 in zero_levels(found.process):
            raise NotShown(ZERO_SNR)
        if request.data is None:
            return replace(row, dense=row.shown(images[torch.tensor(members)], poll))
        if row.decoder is not None:
            row.decoder.check(noise[:1])  # before passes are spent
        return replace(row, dense=row.drawn_by(dense, poll))
    except NotShown as reason:
        notice(progress, f"no samples are shown: {reason}")
        return None


def to_bytes(images: torch.Tensor, value_range: tuple[float, float]) -> torch.Tensor:
    """uint8 [N, C, H, W] of images as a network sees them; what is not a number is black."""
    low, high = value_range
    scaled = (images.cpu() - low) / (high - low) * 255
    return scaled.nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)


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
