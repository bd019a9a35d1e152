"""Images, masks and videos for pipelines that want some beside the prompt.

They come from `--data`, else from the pipeline's own autoencoder, which decodes drawn latents; without one
they are smooth noise. Masks are random rectangles. Nothing asks the user.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from gfprune_cli.diffusion.draws import ImageStack, generator

# of pipelines that are about images, whatever their signature calls optional
ABOUT_IMAGES = re.compile(
    r"Img2Img|Inpaint|Pix2Pix|Upscale|SuperResolution|Depth2Img|ImageVariation|ImageToVideo|VideoToVideo|Control"
    r"|Fill|Kontext|Edit|Adapter|Video2World|VideoToWorld|Emb2Emb|Marigold"
)
SMALL = re.compile(r"Upscale|SuperResolution")  # what they are given has the size of their latents
IMAGES = ("image", "images", "control_image", "original_image", "reference_image", "condtioning_image",
          "example_image", "cond_image", "input_image")  # fmt: skip
MASKS = ("mask_image", "mask", "control_mask")
VIDEOS = ("video", "control_video", "pose_video", "face_video", "conditioning_frames")
MASK_VIDEOS = ("mask_video",)
VECTORS = ("image_embeds", "negative_image_embeds")
TENSORS = ("hint",)
FEATURES = ("image_embeddings",)
KNOWN = (*IMAGES, *MASKS, *VIDEOS, *MASK_VIDEOS, *VECTORS, *TENSORS, *FEATURES)
ONE_EACH = (*VECTORS, *TENSORS, *FEATURES)  # tensors with one row for each prompt
FEATURE_EDGE = 24  # of what a prior makes of an image of 1024 pixels
EDGE, FRAMES = 512, 9  # of images and videos where nothing says their size


@dataclass(frozen=True)
class Pictures:
    """Where the images come from.

    Args:
        data: uint8 [N, 3, H, W] of `--data`, in memory or on disk; None to draw them.
        seed: of the run.
        order: which of them belongs to each entry of what is recorded; empty: they in turn.
        fingerprint: of the images.
    """

    data: ImageStack | None = None
    seed: int = 0
    order: tuple[int, ...] = ()
    fingerprint: str = ""

    def image(self, pipeline: Any, number: int, size: tuple[int, int]) -> Image.Image:
        """One RGB image of (height, width)."""
        if self.data is not None:
            row = self.order[number % len(self.order)] if self.order else number % len(self.data)
            pixels = self.data[torch.tensor([row])][0].permute(1, 2, 0).numpy()
        else:
            pixels = drawn(pipeline, size, generator(self.seed, "picture", number))
        return Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)

    def mask(self, number: int, size: tuple[int, int]) -> Image.Image:
        """White where something is to be drawn: a rectangle of a quarter to all of each edge."""
        source = generator(self.seed, "mask", number)
        pixels = np.zeros(size, np.uint8)
        spans = []
        for edge in size:
            length = int(edge * (0.25 + 0.75 * float(torch.rand((), generator=source))))
            start = int((edge - length) * float(torch.rand((), generator=source)))
            spans.append(slice(start, start + max(1, length)))
        pixels[spans[0], spans[1]] = 255
        return Image.fromarray(pixels)


def drawn(pipeline: Any, size: tuple[int, int], source: torch.Generator) -> Any:
    """uint8 [H, W, 3] of what the pipeline's autoencoder decodes of noise; smooth noise without one."""
    vae = next((part for part in pipeline.components.values() if isinstance(part, nn.Module)
                and hasattr(part, "decode") and hasattr(part, "encode")), None)  # fmt: skip
    found = None if vae is None or any(p.is_meta for p in vae.parameters()) else decoded(vae, size, source)
    if found is None:
        coarse = torch.randn(1, 3, 8, 8, generator=source)
        found = nn.functional.interpolate(coarse, size=size, mode="bicubic")[0]
    return ((found.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(1, 2, 0).numpy()


@torch.no_grad()
def decoded(vae: Any, size: tuple[int, int], source: torch.Generator) -> torch.Tensor | None:
    """[3, H, W] in [-1, 1]; None of an autoencoder of something else than images."""
    like = next(vae.parameters())
    channels = vae.config.get("latent_channels") or vae.config.get("z_dim")
    factor = 8 if max(size) >= 64 else 2
    shape = (1, channels, -(-size[0] // factor), -(-size[1] // factor))
    latents = torch.randn(shape, generator=source).to(like) if isinstance(channels, int) else None
    if latents is None:
        return None
    for given in (latents, latents[:, :, None]):
        image = torch.empty(0)
        with suppress(Exception):  # of videos, of sounds, of latents in a layout of their own
            image = vae.decode(given, return_dict=False)[0].float().cpu()
        image = image[:, :, 0] if image.ndim == 5 else image
        if image.ndim == 4 and image.shape[1] == 3 and bool(image.isfinite().all()):
            return image[0] / image.abs().max().clamp_min(1e-6)
    return None


def takes_pictures(found: type) -> bool:
    """Whether pipelines of a class can be given images."""
    return any(name in KNOWN for name in inspect.signature(found.__call__).parameters)


def fillings(found: type) -> Iterator[tuple[str, ...]]:
    """Arguments to fill, in the order in which to try: what the signature requires, then what it knows.

    Args:
        found: class of a pipeline.
    """
    parameters = inspect.signature(found.__call__).parameters
    required = tuple(name for name in KNOWN if name in parameters and is_required(parameters[name]))
    known = tuple(name for name in (*IMAGES, *MASKS, *VIDEOS) if name in parameters)
    every = tuple(dict.fromkeys((*required, *known)))
    singles = [tuple(dict.fromkeys((*required, name))) for name in known]
    tried = (
        [every, required, *singles] if ABOUT_IMAGES.search(found.__name__) else [required, every, *singles]
    )
    yield from dict.fromkeys(tried)


def is_required(parameter: inspect.Parameter) -> bool:
    """Whether a pipeline cannot be called without an argument."""
    return parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def picture_arguments(
    pipeline: Any,
    network: Any,
    names: Iterable[str],
    pictures: Pictures,
    numbers: Sequence[int],
    size: tuple[int, int] | None,
    frames: int | None,
) -> dict[str, Any]:
    """Values of some arguments, for the pictures with these numbers.

    Args:
        size: (height, width) that the user asked for; None for the pipeline's own.
        frames: likewise.
    """
    names = tuple(names)
    if not names:
        return {}
    parameters = inspect.signature(type(pipeline).__call__).parameters
    size = size or own_size(pipeline, network)
    length = frames or next(
        (parameters[key].default for key in ("num_frames", "video_length") if key in parameters), None
    )
    length = length if isinstance(length, int) else FRAMES
    made: dict[str, Any] = {}
    for name in names:
        values = [_value(name, pipeline, network, pictures, number, size, length) for number in numbers]
        if isinstance(values[0], torch.Tensor):
            made[name] = torch.cat(values)
        else:
            made[name] = values[0] if len(values) == 1 else values
    return made


def _value(
    name: str,
    pipeline: Any,
    network: Any,
    pictures: Pictures,
    number: int,
    size: tuple[int, int],
    length: int,
) -> Any:
    if name in MASKS:
        return pictures.mask(number, size)
    if name in VIDEOS:
        return [pictures.image(pipeline, number + frame, size) for frame in range(length)]
    if name in MASK_VIDEOS:
        return [pictures.mask(number, size)] * length
    like = next(network.parameters())
    if name in VECTORS:
        config = network.config
        width = next(
            (config[key] for key in ("encoder_hid_dim", "cross_attention_dim") if config.get(key)), 1
        )
        return torch.randn(1, width, generator=generator(pictures.seed, name, number)).to(like)
    if name in FEATURES:
        shape = (1, network.config.get("effnet_in_channels") or 16, FEATURE_EDGE, FEATURE_EDGE)
        return torch.randn(shape, generator=generator(pictures.seed, name, number)).to(like)
    if name in TENSORS:
        pixels = np.asarray(pictures.image(pipeline, number, size))
        return (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1).to(like)
    image = pictures.image(pipeline, number, size)
    return [image] if name == "images" else image


def own_size(pipeline: Any, network: Any) -> tuple[int, int]:
    """(height, width) at which a pipeline works where nothing else was asked for."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    given = [parameters[key].default for key in ("height", "width") if key in parameters]
    config = network.config
    sample = config.get("sample_size") or (config.get("sample_height"), config.get("sample_width"))
    height, width = (sample, sample) if isinstance(sample, int) else (*sample, None)[:2]
    if SMALL.search(type(pipeline).__name__) and height and width:
        return height, width
    if len(given) == 2 and all(isinstance(edge, int) for edge in given):
        return given[0], given[1]
    factor = getattr(pipeline, "vae_scale_factor", None) or getattr(
        pipeline, "vae_scale_factor_spatial", None
    )
    factor = factor or (8 if hasattr(pipeline, "vae") else 1)
    return (int(height * factor), int(width * factor)) if height and width else (EDGE, EDGE)
