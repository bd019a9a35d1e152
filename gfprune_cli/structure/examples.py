"""One sample of what a denoiser takes, from its configuration alone.

    model(**example_inputs(model))          # any device, the meta device included

Sizes are those at which the family's published checkpoints are run; a configuration seldom says them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gfprune_cli.errors import GfpruneError

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes that replace the family's own: latent frames, latent height and width, and text tokens."""

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    text: int | None = None


@dataclass(frozen=True)
class Request:
    """A model whose inputs are wanted, and the tensors to make them of."""

    model: Any
    sizes: Sizes

    @property
    def config(self) -> Any:
        return self.model.config

    def zeros(self, *shape: int) -> torch.Tensor:
        parameter = next(self.model.parameters())
        return torch.zeros(*shape, device=parameter.device, dtype=parameter.dtype)

    def time(self) -> torch.Tensor:
        return self.zeros(1) + 1

    def index(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device=next(self.model.parameters()).device, dtype=torch.long)

    def text(self, tokens: int, width: int) -> torch.Tensor:
        return self.zeros(1, self.sizes.text or tokens, width)

    def area(self, height: int, width: int | None = None) -> tuple[int, int]:
        return self.sizes.height or height, self.sizes.width or width or height


def example_inputs(model: Any, sizes: Sizes | None = None) -> Inputs:
    """Keyword arguments of `forward` for one sample of zeros, on the model's device.

    Raises:
        GfpruneError: the class is not known here.
    """
    request = Request(model, sizes or Sizes())
    for cls in type(model).__mro__:
        if cls.__name__ in EXAMPLES:
            return EXAMPLES[cls.__name__](request)
    raise GfpruneError(f"the inputs of {type(model).__name__} are not known: its pipeline is needed")


def unet(request: Request) -> Inputs:
    model, config = request.model, request.config
    size = config.sample_size or 8 * 2 ** len(config.block_out_channels)
    height, width = request.area(*((size, size) if isinstance(size, int) else size))
    if not hasattr(config, "cross_attention_dim") and request.sizes == Sizes():
        check_halvings(config, height, width)
    inputs = {"sample": request.zeros(1, config.in_channels, height, width), "timestep": request.time()}
    if config.time_embedding_type == "learned":
        inputs["timestep"] = inputs["timestep"].long()
    if getattr(config, "num_class_embeds", None) is not None and config.class_embed_type is None:
        inputs["class_labels"] = request.index(1)
    elif config.class_embed_type == "timestep":
        inputs["class_labels"] = request.time()
    elif config.class_embed_type == "identity":
        inputs["class_labels"] = request.zeros(1, model.time_embedding.linear_2.out_features)
    if hasattr(config, "cross_attention_dim"):
        inputs |= conditioning_inputs(request)
    return inputs


def check_halvings(config: Any, height: int, width: int) -> None:
    """Refuse a size that `UNet2DModel`, whose upsampling only doubles, does not come back to.

    Raises:
        GfpruneError: the network cannot be run at the size that its configuration says.
    """
    times = len(config.block_out_channels) - 1
    if height % 2**times or width % 2**times:
        raise GfpruneError(
            f"'sample_size' {config.sample_size} in the network's config.json is no multiple of {2**times}, "
            f"and its {times + 1} stages halve what they get: set the size that it was trained at"
        )


def conditioning_inputs(request: Request) -> Inputs:
    """Text states, and the added conditioning of the SDXL family, as zeros."""
    config = request.config
    width = config.cross_attention_dim
    inputs: Inputs = {
        "encoder_hidden_states": request.text(77, width if isinstance(width, int) else width[0])
    }
    if config.addition_embed_type == "text_time":
        time_width = config.addition_time_embed_dim * 6
        text = request.zeros(1, config.projection_class_embeddings_input_dim - time_width)
        inputs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": request.zeros(1, 6)}
    return inputs


def autoencoder(request: Request) -> Inputs:
    height, width = request.area(request.config.sample_size)
    return {"sample": request.zeros(1, request.config.in_channels, height, width)}


def picture(request: Request) -> torch.Tensor:
    """Latents of one picture, [1, C, H, W]."""
    height, width = request.area(request.config.sample_size)
    return request.zeros(1, request.config.in_channels, height, width)


def dit(request: Request) -> Inputs:
    return {
        "hidden_states": picture(request),
        "timestep": request.index(1) + 1,
        "class_labels": request.index(1),
    }


def pixart(request: Request) -> Inputs:
    model, config = request.model, request.config
    tokens = 300 if config.sample_size >= 128 and not model.use_additional_conditions else 120
    sized = model.use_additional_conditions
    added = {
        "resolution": request.zeros(1, 2) if sized else None,
        "aspect_ratio": request.zeros(1, 1) if sized else None,
    }
    return {
        "hidden_states": picture(request),
        "encoder_hidden_states": request.text(tokens, config.caption_channels or config.cross_attention_dim),
        "timestep": request.time(),
        "added_cond_kwargs": added,
    }


def sd3(request: Request) -> Inputs:
    return {
        "hidden_states": picture(request),
        "encoder_hidden_states": request.text(77 + 256, request.config.joint_attention_dim),
        "pooled_projections": request.zeros(1, request.config.pooled_projection_dim),
        "timestep": request.time(),
    }


def flux(request: Request) -> Inputs:
    """128 x 128 latents, packed two by two."""
    config = request.config
    height, width = request.area(128)
    tokens = (height // 2) * (width // 2)
    text = request.text(512, config.joint_attention_dim)
    inputs = {
        "hidden_states": request.zeros(1, tokens, config.in_channels),
        "encoder_hidden_states": text,
        "pooled_projections": request.zeros(1, config.pooled_projection_dim),
        "timestep": request.time(),
        "img_ids": request.zeros(tokens, 3),
        "txt_ids": request.zeros(text.shape[1], 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = request.time()
    return inputs


def sana(request: Request) -> Inputs:
    inputs = {
        "hidden_states": picture(request),
        "encoder_hidden_states": request.text(300, request.config.caption_channels),
        "timestep": request.time(),
    }
    if request.config.guidance_embeds:
        inputs["guidance"] = request.time()
    return inputs


def cogvideox(request: Request) -> Inputs:
    config = request.config
    frames = request.sizes.frames or (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    depth = config.patch_size_t or 1
    frames = depth * math.ceil(frames / depth)
    height, width = request.area(config.sample_height, config.sample_width)
    inputs: Inputs = {
        "hidden_states": request.zeros(1, frames, config.in_channels, height, width),
        "encoder_hidden_states": request.text(config.max_text_seq_length, config.text_embed_dim),
        "timestep": request.index(1) + 1,
    }
    if config.use_rotary_positional_embeddings:
        tokens = (frames // depth) * (height // config.patch_size) * (width // config.patch_size)
        angles = request.zeros(tokens, config.attention_head_dim)
        inputs["image_rotary_emb"] = (angles + 1, angles)
    if config.ofs_embed_dim:
        inputs["ofs"] = request.time()
    return inputs


def wan(request: Request) -> Inputs:
    """81 frames of 480 x 832 pixels; an image condition where the configuration has one."""
    config = request.config
    longest = config.rope_max_seq_len
    sizes = (request.sizes.frames or 21, *request.area(60, 104))
    sizes = tuple(min(size, longest * patch) for size, patch in zip(sizes, config.patch_size, strict=True))
    # with an image the class itself takes the last 512 tokens for the text
    text = (
        request.text(512, config.text_dim)
        if config.image_dim is None
        else request.zeros(1, 512, config.text_dim)
    )
    inputs = {
        "hidden_states": request.zeros(1, config.in_channels, *sizes),
        "encoder_hidden_states": text,
        "timestep": request.index(1) + 1,
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = request.zeros(1, 257, config.image_dim)
    return inputs


def ltx(request: Request) -> Inputs:
    """161 frames of 512 x 704 pixels."""
    config = request.config
    height, width = request.area(16, 22)
    frames = request.sizes.frames or 21
    text = request.text(128, config.caption_channels)
    return {
        "hidden_states": request.zeros(1, frames * height * width, config.in_channels),
        "encoder_hidden_states": text,
        "timestep": request.time(),
        "encoder_attention_mask": request.zeros(1, text.shape[1]) + 1,
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def stable_audio(request: Request) -> Inputs:
    """Text tokens, and one for each end of the clip."""
    config = request.config
    length = request.sizes.width or config.sample_size
    angles = request.zeros(length + 1, config.attention_head_dim // 2)
    return {
        "hidden_states": request.zeros(1, config.in_channels, length),
        "timestep": request.time(),
        "encoder_hidden_states": request.text(130, config.cross_attention_input_dim),
        "global_hidden_states": request.zeros(1, 1, config.global_states_input_dim),
        "rotary_embedding": (angles + 1, angles),
    }


EXAMPLES: dict[str, Callable[[Request], Inputs]] = {
    "UNet2DModel": unet,
    "UNet2DConditionModel": unet,
    "AutoencoderKL": autoencoder,
    "VQModel": autoencoder,
    "DiTTransformer2DModel": dit,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
    "SanaTransformer2DModel": sana,
    "CogVideoXTransformer3DModel": cogvideox,
    "WanTransformer3DModel": wan,
    "LTXVideoTransformer3DModel": ltx,
    "StableAudioDiTModel": stable_audio,
}
