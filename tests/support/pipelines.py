"""A tiny pipeline of every supported family, through the classes of diffusers and transformers.

Nothing is downloaded: weights are random, tokenizers know single characters. No parameter is zero or
constant, so that a zero-initialised projection or a plain norm cannot hide an error.
"""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    AutoencoderOobleck,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from text_encoders import clip, gemma, t5
from transformers import UMT5EncoderModel

LATENT = 4
SIZE = 8
BETAS: dict[str, Any] = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
STABLE: dict[str, Any] = BETAS | dict(steps_offset=1, clip_sample=False, set_alpha_to_one=False)
HEADS: dict[str, Any] = dict(num_attention_heads=4, attention_head_dim=8)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Make constant parameters (zero biases and projections, plain norms) vary; `module`, ready to use."""
    for parameter in module.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def saved(folder: Path, pipeline: type, **components: Any) -> Path:
    """Save a pipeline made of `components`."""
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            filled(component)
    pipeline(**components).save_pretrained(folder, safe_serialization=True)
    return folder


def image_vae(**changes: Any) -> Any:
    """Images of 16 x 16 pixels to latents of [4, 8, 8]."""
    config: dict[str, Any] = dict(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT,
        norm_num_groups=4,
        sample_size=2 * SIZE,
    )
    return AutoencoderKL(**config | changes)


def flux2_vae() -> Any:
    """With a norm of its own, over squares of latents, that has seen something."""
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def conditional_unet(**changes: Any) -> Any:
    config: dict[str, Any] = dict(
        sample_size=SIZE,
        block_out_channels=(24, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(3, 4),
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return UNet2DConditionModel(**config | changes)


def stable_diffusion(folder: Path, unet: Any, scheduler: Any) -> Path:
    encoder, tokenizer = clip(32)
    return saved(
        folder,
        StableDiffusionPipeline,
        unet=unet,
        vae=image_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_1(folder: Path) -> Path:
    return stable_diffusion(
        folder, conditional_unet(), PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    )


def stable_diffusion_2(folder: Path) -> Path:
    scheduler = DDIMScheduler(**STABLE, prediction_type="v_prediction")
    return stable_diffusion(folder, conditional_unet(use_linear_projection=True), scheduler)


def sdxl(folder: Path) -> Path:
    first, first_tokenizer = clip(16)
    second, second_tokenizer = clip(24, projection=24)
    unet = conditional_unet(
        block_out_channels=(16, 32),
        attention_head_dim=(2, 4),
        cross_attention_dim=40,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    return saved(
        folder,
        StableDiffusionXLPipeline,
        unet=unet,
        vae=image_vae(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=first_tokenizer,
        tokenizer_2=second_tokenizer,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def dit(folder: Path) -> Path:
    transformer = DiTTransformer2DModel(
        **HEADS, in_channels=LATENT, out_channels=2 * LATENT, num_layers=2, sample_size=SIZE
    )
    return saved(
        folder,
        DiTPipeline,
        transformer=transformer,
        vae=image_vae(),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def pixart(folder: Path) -> Path:
    encoder, tokenizer = t5(32)
    transformer = PixArtTransformer2DModel(
        **HEADS,
        in_channels=LATENT,
        out_channels=2 * LATENT,
        num_layers=2,
        sample_size=SIZE,
        cross_attention_dim=32,
        caption_channels=32,
        use_additional_conditions=False,
    )
    return saved(
        folder,
        PixArtAlphaPipeline,
        transformer=transformer,
        vae=image_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def sd3(folder: Path) -> Path:
    first, first_tokenizer = clip(8, projection=8)
    second, second_tokenizer = clip(16, projection=16)
    third, third_tokenizer = t5(32)
    transformer = SD3Transformer2DModel(
        **HEADS,
        sample_size=SIZE,
        in_channels=LATENT,
        out_channels=LATENT,
        num_layers=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=SIZE,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return saved(
        folder,
        StableDiffusion3Pipeline,
        transformer=transformer,
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609),
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=third,
        tokenizer=first_tokenizer,
        tokenizer_2=second_tokenizer,
        tokenizer_3=third_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(folder: Path, pipeline: type = FluxPipeline, **more: Any) -> Path:
    """Args: more: of the network."""
    first, first_tokenizer = clip(16)
    second, second_tokenizer = t5(32)
    transformer = FluxTransformer2DModel(
        **{
            **HEADS,
            "in_channels": 4 * LATENT,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
            **more,
        }
    )
    return saved(
        folder,
        pipeline,
        transformer=transformer,
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=first_tokenizer,
        tokenizer_2=second_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def sana(folder: Path) -> Path:
    encoder, tokenizer = gemma(16)
    vae = AutoencoderDC(
        latent_channels=LATENT,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        **HEADS,
        in_channels=LATENT,
        out_channels=LATENT,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=SIZE,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return saved(
        folder,
        SanaPipeline,
        transformer=transformer,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
    )


def ldm(folder: Path) -> Path:
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    vqvae = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
        sample_size=2 * SIZE,
    )
    scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    return saved(folder, LDMPipeline, unet=unet, vqvae=vqvae, scheduler=scheduler)


def cogvideox(folder: Path) -> Path:
    encoder, tokenizer = t5(32)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=LATENT,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=32,
        sample_width=32,
    )
    # rotary embeddings over three axes want a head of sixteen
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=LATENT,
        out_channels=LATENT,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    scheduler = CogVideoXDDIMScheduler(
        **STABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return saved(
        folder,
        CogVideoXPipeline,
        transformer=transformer,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
    )


def wan_transformer() -> Any:
    return WanTransformer3DModel(
        **HEADS,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan(folder: Path, **others: Any) -> Path:
    encoder, tokenizer = t5(32, UMT5EncoderModel)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return saved(
        folder,
        WanPipeline,
        transformer=wan_transformer(),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        **others,
    )


def wan_22(folder: Path) -> Path:
    """With an expert for low noise beside the one for high noise."""
    torch.manual_seed(1)
    return wan(folder, transformer_2=wan_transformer(), boundary_ratio=0.875)


def ltx(folder: Path) -> Path:
    encoder, tokenizer = t5(32)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    transformer = LTXVideoTransformer3DModel(
        **HEADS,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=32,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
    )
    return saved(
        folder,
        LTXPipeline,
        transformer=transformer,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
    )


def stable_audio(folder: Path) -> Path:
    encoder, tokenizer = t5(16)
    vae = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=LATENT,
        sampling_rate=16,
    )
    transformer = StableAudioDiTModel(
        **HEADS,
        sample_size=32,
        in_channels=LATENT,
        out_channels=LATENT,
        num_layers=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        time_proj_dim=16,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    )
    # the scheduler of the published checkpoint (stochastic, of torchsde) with the noise left out
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.3,
        sigma_max=500,
        sigma_data=1.0,
        sigma_schedule="exponential",
        prediction_type="v_prediction",
    )
    return saved(
        folder,
        StableAudioPipeline,
        transformer=transformer,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        projection_model=StableAudioProjectionModel(16, 16, 0, 32),
        scheduler=scheduler,
    )


def seeded(factory: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """`factory` with the same weights at every call, the caller's random state untouched."""

    def build(folder: Path) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return factory(folder)

    return build


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "stable-diffusion": seeded(stable_diffusion_1),
    "stable-diffusion-2": seeded(stable_diffusion_2),
    "sdxl": seeded(sdxl),
    "dit": seeded(dit),
    "pixart": seeded(pixart),
    "sd3": seeded(sd3),
    "flux": seeded(flux),
    "sana": seeded(sana),
    "ldm": seeded(ldm),
    "cogvideox": seeded(cogvideox),
    "wan": seeded(wan),
    "ltx": seeded(ltx),
    "stable-audio": seeded(stable_audio),
}

COMPONENTS: dict[str, str] = {
    family: "unet" if family in ("stable-diffusion", "stable-diffusion-2", "sdxl", "ldm") else "transformer"
    for family in FAMILIES
}

VIDEO: dict[str, Any] = dict(height=32, width=32, num_frames=9, max_sequence_length=16)
# What a call needs beside the prompt to stay tiny, where the defaults of the class are large.
CALLS: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES} | {
    "dit": dict(class_labels=[3]),
    "pixart": dict(use_resolution_binning=False, max_sequence_length=16),
    "sd3": dict(max_sequence_length=16),
    "flux": dict(height=16, width=16, max_sequence_length=16),
    "sana": dict(
        height=32,
        width=32,
        max_sequence_length=16,
        use_resolution_binning=False,
        complex_human_instruction=None,
    ),
    "cogvideox": VIDEO,
    "wan": VIDEO,
    "ltx": VIDEO,
}

# Which dimensions of the sample a graph leaves free; the others are those that the network is made for.
FREE: dict[str, list[Any]] = {
    "stable-diffusion": ["batch", 4, "2*h", "2*w"],
    "stable-diffusion-2": ["batch", 4, "2*h", "2*w"],
    "sdxl": ["batch", 4, "2*h", "2*w"],
    "dit": ["batch", 4, 8, 8],  # takes squares only
    "pixart": ["batch", 4, 8, 8],  # another path for every size but its own
    "sd3": ["batch", 4, "2*h", "2*w"],
    "flux": ["batch", "tokens", 16],
    "sana": ["batch", 4, "h", "w"],
    "ldm": ["batch", 3, "2*h", "2*w"],
    "cogvideox": ["batch", "f", 4, "2*h", "2*w"],
    "wan": ["batch", 16, "f", "2*h", "2*w"],
    "ltx": ["batch", 7392, 8],  # frames, height and width are numbers, not tensors
    "stable-audio": ["batch", 4, "w"],
}


def sample(
    family: str,
    folder: Path,
    steps: int = 2,
    output_type: str = "latent",
    loading: dict[str, Any] | None = None,
    components: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Run the saved pipeline with plain diffusers: what it returns first (latents, images, frames, audio).

    Args:
        loading: for `DiffusionPipeline.from_pretrained`.
        components: to put in the place of those of the folder.
        changes: for the call of the pipeline.
    """
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **loading or {})
    pipeline.register_modules(**components or {})
    for module in pipeline.components.values():
        for parameter in module.parameters() if isinstance(module, torch.nn.Module) else ():
            # mapped from a file it lies anywhere in memory, and kernels round by alignment
            parameter.data = parameter.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = dict(num_inference_steps=steps, output_type=output_type)
    if "prompt" in inspect.signature(type(pipeline).__call__).parameters:
        arguments["prompt"] = "a red cube on a table"
    arguments |= dict(generator=torch.Generator().manual_seed(0))
    return pipeline(**arguments | CALLS[family] | changes)[0]


def digest(made: Any) -> str:
    """Hash of what a pipeline returned; it has to be finite."""
    arrays = [np.asarray(one) for one in ([made] if isinstance(made, torch.Tensor) else made)]
    assert all(np.isfinite(array).all() for array in arrays)
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()
