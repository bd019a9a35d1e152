"""Tiny pipelines that want more than a prompt, or pass what they have in a form of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ControlNetModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxPipeline,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    T2IAdapter,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from pipelines import BETAS, HEADS, LATENT, conditional_unet, flux, image_vae, saved, seeded
from text_encoders import clip, qwen2_tokenizer, qwen3, qwen25_vl, t5
from transformers import UMT5EncoderModel

FLUX_KEYS = (
    *("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads"),
    *("joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope"),
)


def stable(folder: Path, pipeline: type, channels: int = LATENT, **more: Any) -> Path:
    """A Stable Diffusion pipeline whose network may read more channels than it writes."""
    encoder, tokenizer = clip(32)
    if pipeline is StableDiffusionInstructPix2PixPipeline:
        more["image_encoder"] = None
    return saved(
        folder,
        pipeline,
        unet=conditional_unet(in_channels=channels, out_channels=LATENT),
        vae=image_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )


def inpaint(folder: Path) -> Path:
    return stable(folder, StableDiffusionInpaintPipeline, 2 * LATENT + 1)


def pix2pix(folder: Path) -> Path:
    return stable(folder, StableDiffusionInstructPix2PixPipeline, 2 * LATENT)


def controlnet(folder: Path) -> Path:
    """Pictures of 16 x 16 pixels; their latents are half as large."""
    network = ControlNetModel.from_unet(conditional_unet(), conditioning_embedding_out_channels=(8, 16))
    return stable(folder, StableDiffusionControlNetPipeline, controlnet=network)


def t2i_adapter(folder: Path) -> Path:
    network = T2IAdapter(3, [24, 32], num_res_blocks=1, downscale_factor=2)
    return stable(folder, StableDiffusionAdapterPipeline, adapter=network)


def flux_controlnet(folder: Path) -> Path:
    """Of one block of each kind."""
    flux(folder, num_layers=1, num_single_layers=1)
    parts = FluxPipeline.from_pretrained(folder, local_files_only=True).components
    config = {key: value for key, value in parts["transformer"].config.items() if key in FLUX_KEYS}
    return saved(folder, FluxControlNetPipeline, controlnet=FluxControlNetModel(**config), **parts)


def fill(folder: Path) -> Path:
    """Tokens of four noisy latents, four latents of the image, and the mask of their pixels."""
    channels = dict(in_channels=2 * 4 * LATENT + 4 * 2 * 2, out_channels=4 * LATENT)
    return flux(folder, FluxFillPipeline, num_layers=1, num_single_layers=1, **channels)


def two_experts(folder: Path) -> Path:
    encoder, tokenizer = t5(32, UMT5EncoderModel)
    expert: dict[str, Any] = dict(
        **HEADS, in_channels=16, out_channels=16, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=1
    )
    return saved(
        folder,
        WanPipeline,
        transformer=WanTransformer3DModel(**expert, rope_max_seq_len=32),
        transformer_2=WanTransformer3DModel(**expert, rope_max_seq_len=32),
        boundary_ratio=0.875,
        vae=AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def z_image(folder: Path) -> Path:
    tokenizer = qwen2_tokenizer()
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=LATENT,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return saved(
        folder,
        ZImagePipeline,
        transformer=transformer,
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=qwen3(16, len(tokenizer)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def qwen_image(folder: Path) -> Path:
    tokenizer = qwen2_tokenizer()
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT,
        out_channels=LATENT,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * LATENT,
        latents_std=[1.0] * LATENT,
    )
    return saved(
        folder,
        QwenImagePipeline,
        transformer=transformer,
        vae=vae,
        text_encoder=qwen25_vl(16, len(tokenizer)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


PIPELINES: dict[str, Callable[[Path], Path]] = {
    "controlnet": seeded(controlnet),
    "t2i-adapter": seeded(t2i_adapter),
    "flux-controlnet": seeded(flux_controlnet),
    "inpaint": seeded(inpaint),
    "pix2pix": seeded(pix2pix),
    "fill": seeded(fill),
    "two experts": seeded(two_experts),
    "z-image": seeded(z_image),
    "qwen-image": seeded(qwen_image),
}
