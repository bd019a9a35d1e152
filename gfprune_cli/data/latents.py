"""Images as the latents of a pipeline's own autoencoder, and as its pictures."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.data.stored import StoredImages
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.inputs.pipeline import load_component, quiet
from gfprune_cli.inputs.pipeline_run import PipelineOptions, call_arguments
from gfprune_cli.progress import Event, Progress

DECODERS = ("vae", "vqvae")


def decoder_name(component: Component) -> str | None:
    """The component that a pipeline's latents belong to; None for pixels."""
    entries = component.entries
    return next((name for name in DECODERS if name in entries), None)


@torch.no_grad()
def encode_images(
    images: StoredImages,
    component: Component,
    scheduler: Any,
    shape: tuple[int, ...],
    device: torch.device,
    progress: Progress,
) -> Iterator[torch.Tensor]:
    """Latents [1, *shape] of each image, as the pipeline's denoiser sees them.

    Images are encoded one by one, without sampling the posterior.

    Args:
        images: [N, 3, H, W] in [-1, 1].
        shape: of one sample of the denoiser, with or without packing.

    Raises:
        UsageError: the denoiser works on something that no image becomes.
    """
    vae = load_component(component, str(decoder_name(component)), device)
    dtype = next(vae.parameters()).dtype
    for number in range(len(images)):
        progress(Event("calibrate", number, len(images)))
        pixels = images[torch.tensor([number])].to(device, dtype)
        latents = normalised(vae, encoded(vae, pixels).float(), scheduler)
        yield laid_out(latents, shape, images.shape[2:]).cpu()
    progress(Event("calibrate", len(images), len(images)))


def is_moving(vae: nn.Module) -> bool:
    """Whether an autoencoder is one of videos, of which an image is a frame."""
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


def encoded(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Latents [1, C, h, w] (or [1, C, 1, h, w]) of pixels [1, 3, H, W]: the mode where there is a posterior.

    Raises:
        UsageError: it is no autoencoder of images.
    """
    try:
        output = vae.encode(pixels[:, :, None] if is_moving(vae) else pixels)
    except RuntimeError as error:
        raise UsageError(
            f"--data: {type(vae).__name__} cannot encode these images ({first_line(error)}); "
            "drop --data to calibrate on latents drawn from the model"
        ) from error
    posterior = getattr(output, "latent_dist", None)
    if posterior is not None:
        found: torch.Tensor = posterior.mode()
        return found
    latents: torch.Tensor = output.latents if hasattr(output, "latents") else output.latent
    return latents


def normalised(vae: Any, latents: torch.Tensor, scheduler: Any) -> torch.Tensor:
    """Shifted and scaled as the configurations of the autoencoder and the scheduler say."""
    if "batch_norm_eps" in vae.config:  # FLUX.2: squares of 2 x 2 are channels, and are normalised as such
        latents = nn.functional.pixel_unshuffle(latents, 2)
    mean, spread, scale = statistics(vae, latents, scheduler)
    return (latents - mean) / spread * scale


def as_encoded(vae: Any, latents: torch.Tensor, scheduler: Any) -> torch.Tensor:
    """What `normalised` was given."""
    mean, spread, scale = statistics(vae, latents, scheduler)
    found = latents / scale * spread + mean
    return nn.functional.pixel_shuffle(found, 2) if "batch_norm_eps" in vae.config else found


def statistics(vae: Any, like: torch.Tensor, scheduler: Any) -> tuple[Any, Any, float]:
    """Mean and spread that latents are normalised by, of all or by channel, and the scale of the result."""
    config = vae.config
    view = (1, -1) + (1,) * (like.ndim - 2)
    if "batch_norm_eps" in config:
        norm = vae.bn
        spread = (norm.running_var + config["batch_norm_eps"]).sqrt()
        return norm.running_mean.to(like).view(view), spread.to(like).view(view), 1.0
    scale = float(config.get("scaling_factor") or 1.0)
    if hasattr(scheduler, "precondition_noise"):
        scale /= scheduler.config.sigma_data  # networks of the EDM family see samples of unit variance
    buffers = dict(vae.named_buffers())  # some autoencoders keep them there
    mean, spread = (buffers.get(name, config.get(name)) for name in ("latents_mean", "latents_std"))
    if mean is not None and spread is not None:
        return torch.as_tensor(mean).to(like).view(view), torch.as_tensor(spread).to(like).view(view), scale
    return config.get("shift_factor") or 0.0, 1.0, scale


def laid_out(latents: torch.Tensor, shape: tuple[int, ...], pixels: tuple[int, ...]) -> torch.Tensor:
    """[1, *shape]: latents in the layout of the denoiser.

    Raises:
        UsageError: the denoiser sees something else.
    """
    candidates = [latents]
    if latents.ndim == 5:
        candidates.append(latents.transpose(1, 2))  # frames before channels
    flat = latents[:, :, 0] if latents.ndim == 5 else latents
    if len(shape) == 2 and flat.ndim == 4:
        candidates.append(flat.flatten(2).transpose(1, 2))
        if not flat.shape[2] % 2 and not flat.shape[3] % 2:  # squares of 2 x 2 as one token
            squares = flat.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # [1, C, h, 2, w, 2]
            candidates.append(squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
    for candidate in candidates:
        if tuple(candidate.shape[1:]) == shape:
            return candidate.contiguous()
    raise UsageError(
        f"--data: images of {pixels[0]}x{pixels[1]} become latents of {list(latents.shape[1:])}, and the"
        f" network works on {list(shape)}; for video give --frames 1, or drop --data"
    )


def as_image(latents: torch.Tensor, pixels: tuple[int, int], channels: int) -> torch.Tensor | None:
    """[N, channels, h, w]: the latents that `laid_out` was given; None where they are of no image.

    Args:
        pixels: (height, width) of the images; zeros for squares.
        channels: of the latents of the autoencoder, normalised.
    """
    if latents.ndim == 4:
        return latents if latents.shape[1] == channels else None
    if latents.ndim != 3 or latents.shape[2] not in (channels, 4 * channels):
        return None
    tokens = latents.shape[1]
    height = round((tokens * pixels[0] / pixels[1] if all(pixels) else tokens) ** 0.5)
    if not height or tokens % height:
        return None
    grid = latents.transpose(1, 2).unflatten(2, (height, -1))
    # a token is one position, or a square of 2 x 2
    return grid if grid.shape[1] == channels else nn.functional.pixel_shuffle(grid, 2)


@torch.no_grad()
def pictures(
    pipeline: Any,
    asked: list[Any],
    options: PipelineOptions,
    *,
    count: int,
    steps: int,
    seed: int,
    progress: Progress,
) -> torch.Tensor:
    """[count, C, H, W] images in [-1, 1] that a pipeline draws and its autoencoder decodes, one by one.

    Raises:
        GfpruneError: the pipeline draws no images, or fails.
    """
    arguments = call_arguments(pipeline, options, steps=steps, output="np")
    name = type(pipeline).__name__
    found = []
    for number in range(count):
        progress(Event("calibrate", number, count))
        made = {**arguments, "generator": generator(seed, "image", number)}
        if asked:
            made["class_labels" if isinstance(asked[0], int) else "prompt"] = [asked[number % len(asked)]]
        try:
            with quiet():
                image = torch.as_tensor(pipeline(**made)[0])
        except GfpruneError:  # a signal may arrive in there
            raise
        except Exception as error:  # another library's pipeline: anything
            raise GfpruneError(f"{name} cannot be run: {first_line(error)}") from error
        if image.ndim != 4:
            raise GfpruneError(f"{name} draws no images: pass --data")
        found.append(image.permute(0, 3, 1, 2).float() * 2 - 1)
    progress(Event("calibrate", count, count))
    return torch.cat(found)
