"""Pictures of latents, through the autoencoder of their pipeline, which is in memory only meanwhile."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.data.latents import as_encoded, as_image, decoder_name, is_moving
from gfprune_cli.errors import GfpruneError, Interrupted
from gfprune_cli.inputs.pipeline import load_component
from gfprune_cli.runtime.memory import Alive, available

LARGEST = 256  # longer side of a picture, in pixels
ROOM = 0.5  # of what is free: kernels take space of their own
FLOAT = 4  # bytes


class NotShown(Exception):
    """Why there are no pictures of samples."""


@contextmanager
def as_reason() -> Iterator[None]:
    """Whatever fails within is a reason to show nothing, and none to end a run; a signal is."""
    try:
        yield
    except (Interrupted, NotShown):
        raise
    except GfpruneError as error:
        raise NotShown(str(error)) from error
    except Exception as error:  # another library's autoencoder: anything
        raise NotShown(f"the autoencoder cannot decode: {first_line(error)}") from error


@dataclass(frozen=True)
class LatentDecoder:
    """Makes pictures of latents as a network draws them.

    Args:
        component: of the pipeline that the latents belong to.
        scheduler: of it.
        pixels: (height, width, frames) that the pipeline works at; 0 for what it does not have.
        device: to decode on.
    """

    component: Component
    scheduler: Any
    pixels: tuple[int, int, int]
    device: torch.device

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, poll: Callable[[], None]) -> torch.Tensor:
        """[N, 3, h, w] pictures in [-1, 1], no side longer than `LARGEST`, decoded one by one in float32.

        Args:
            latents: [N, ...] in the layout of the network.
            poll: called before each; may raise.

        Raises:
            NotShown: the latents are of no image, or the autoencoder cannot be had.
        """
        found = []
        try:
            self.check(latents[:1])
            with as_reason():
                vae = nn.Module.to(self.autoencoder(self.device), torch.float32)
            for one in latents.split(1):
                poll()
                with as_reason():
                    found.append(reduced(self.decoded(vae, one.to(self.device, torch.float32)).cpu()))
        finally:
            vae = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return torch.cat(found)

    def autoencoder(self, device: torch.device, *, weights: bool = True) -> Any:
        name = decoder_name(self.component)
        if name is None:
            raise NotShown("there is no autoencoder beside this network")
        return load_component(self.component, name, device, weights=weights)

    @as_reason()
    def check(self, one: torch.Tensor) -> None:
        """Refuse what is no image, or has no room, before a weight is read.

        Raises:
            NotShown: the reason.
        """
        meta = torch.device("meta")
        described = self.autoencoder(meta, weights=False)
        weights = list(described.parameters())
        with Alive(weights) as alive:
            self.decoded(described, one.to(meta, torch.float32))
        needed = FLOAT * sum(weight.numel() for weight in weights) + alive.most
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if needed > ROOM * available(self.device):
            raise NotShown(f"there is no memory for the autoencoder, which decodes in {needed / 1e9:.1f} GB")

    def decoded(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """[1, 3, H, W] in [-1, 1]."""
        config = vae.config
        channels = config.get("latent_channels") or config.get("z_dim")
        of_norm = 4 if "batch_norm_eps" in config else 1
        one_frame = isinstance(channels, int) and self.pixels[2] <= 1
        found = as_image(latents, self.pixels[:2], channels * of_norm) if one_frame else None
        if found is None:
            raise NotShown("what this network draws is no image")
        given = as_encoded(vae, found, self.scheduler)
        image: torch.Tensor = vae.decode(given[:, :, None] if is_moving(vae) else given, return_dict=False)[0]
        image = image[:, :, 0] if image.ndim == 5 and image.shape[2] == 1 else image
        if image.ndim != 4 or image.shape[1] != 3:
            raise NotShown("what this network draws is no image")
        return image


def reduced(image: torch.Tensor) -> torch.Tensor:
    """[1, 3, h, w] of the largest size that a picture has here."""
    factor = LARGEST / max(image.shape[2:])
    if factor >= 1:
        return image
    size = [max(1, round(side * factor)) for side in image.shape[2:]]
    return nn.functional.interpolate(image, size, mode="bilinear", antialias=True)
