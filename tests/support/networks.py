"""Tiny `UNet2DModel`s that cover the family, and the dense facts that structure tests share.

Every parameter is randomised, norms included, so that zero-initialised layers cannot hide an error.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.flow.masked_norms import MaskedGroupNorm
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.trace import Trace
from gfprune_cli.structure.tracing import outputs_of

PLAIN: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}

NETWORKS: dict[str, dict[str, Any]] = {
    "ddpm": {**PLAIN, "block_out_channels": (16, 24), "layers_per_block": 2},
    # 28 + 20 and 20 + 12 channels under four groups: the groups straddle the seams of the skips
    "seams": {
        **PLAIN,
        "block_out_channels": (12, 20, 28),
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "single-head": {**PLAIN, "attention_head_dim": None, "block_out_channels": (8, 24)},
    "ncsnpp": {
        **PLAIN,
        "block_out_channels": (32, 64),
        "norm_num_groups": None,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "time_embedding_type": "fourier",
        "freq_shift": 0,
        "flip_sin_to_cos": False,
        "mid_block_scale_factor": 2**0.5,
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
    "scale-shift": {
        **PLAIN,
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "resnet-classes": {
        **PLAIN,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "num_class_embeds": 5,
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    },
    "class-timestep": {**PLAIN, "class_embed_type": "timestep"},
    "class-identity": {**PLAIN, "class_embed_type": "identity"},
    "learned-time": {**PLAIN, "time_embedding_type": "learned", "num_train_timesteps": 20},
    "no-middle-attention": {
        **PLAIN,
        "add_attention": False,
        "mid_block_type": "UNetMidBlock2D",
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    },
}


def randomise(model: UNet2DModel, seed: int) -> UNet2DModel:
    """Draw every parameter: activations near one, norm weights near one, biases near zero."""
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        if parameter.ndim > 1:
            value = noise / max(1, parameter[0].numel()) ** 0.5
        else:
            value = 0.3 * noise
        parameter.data.copy_(value)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.add_(1)
    return model


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """One of `NETWORKS`, with random parameters."""
    model = randomise(UNet2DModel(**{**NETWORKS[name], **changes}), seed)
    nn.Module.to(model, dtype)
    return class_labels_in_its_dtype(model.eval().requires_grad_(False))


def class_labels_in_its_dtype(model: Any) -> Any:
    """diffusers projects class "timesteps" in float32 and forgets to cast them to the network's dtype."""
    if model.config.class_embed_type == "timestep":
        model.class_embedding.register_forward_pre_hook(
            lambda module, args: (args[0].to(module.linear_1.weight.dtype),)
        )
    return model


def inputs(model: Any, seed: int = 0, count: int = 2) -> dict[str, torch.Tensor]:
    """Keyword arguments of `forward`: `count` random samples, timesteps and what the classes need."""
    source = torch.Generator().manual_seed(seed)
    template = example_inputs(model)
    made = {}
    for name, tensor in template.items():
        shape = (count, *tensor.shape[1:])
        if not tensor.is_floating_point():
            top = model.config.num_class_embeds if name == "class_labels" else 20
            made[name] = torch.randint(top, shape, generator=source)
        elif name == "timestep" or (name == "class_labels" and model.config.class_embed_type == "timestep"):
            made[name] = (1 + 10 * torch.rand(shape, generator=source)).to(tensor.dtype)
        else:
            made[name] = torch.randn(shape, generator=source, dtype=torch.float64).to(tensor.dtype)
    return made


@contextmanager
def plain_norms(masked: MaskedModel) -> Iterator[None]:
    """Ignore the masks in the norms' statistics, as every other soft pruner does."""
    for module in masked.model.modules():
        if isinstance(module, MaskedGroupNorm):
            module.set_mask(torch.ones(len(module.membership)))
    yield
    masked.set_masks(masked.masks)


def first_output(network: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The tensor that a network predicts, whether or not its class can wrap it."""
    return outputs_of(network, inputs)[0]


@functools.cache
def structure(name: str) -> tuple[tuple[ChannelGroup, ...], Trace, CostModel]:
    """Channel groups, trace and cost of one of `NETWORKS`; they depend on shapes alone."""
    with torch.device("meta"):
        model = UNet2DModel(**NETWORKS[name])
    groups, trace = discover(model)
    return groups, trace, CostModel(model, groups, trace)


def random_scores(groups: tuple[ChannelGroup, ...], seed: int) -> dict[str, torch.Tensor]:
    """Group name -> [units] uniform numbers."""
    source = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.rand(group.units, generator=source, dtype=torch.float64) + 1e-3 for group in groups
    }
