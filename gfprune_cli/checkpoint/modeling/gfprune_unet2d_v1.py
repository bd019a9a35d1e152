"""A `UNet2DModel` whose layers may each have their own width: the output of `gfprune prune`.

This one file travels inside the checkpoint and needs only torch and diffusers:

    DiffusionPipeline.from_pretrained(path, trust_remote_code=True)

The stock network is built from the stock configuration, then the modules named in the configuration
key `gfprune` are narrowed to the shapes written there:

    {"out": 48, "in": 40}      a convolution or linear layer
    {"out": 40}                an embedding
    {"groups": [5, 5, 5, 4]}   a group norm: channels in each of its groups
    {"heads": 3}               an attention layer: heads left
"""

import inspect
import os
import shutil
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn


def group_norm_from_moments(
    x: torch.Tensor,
    averaging: torch.Tensor,
    membership: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Group norm with free group sizes and channel weights, from per-channel moments.

    Args:
        x: [N, C, ...].
        averaging: [C, G], the share of each channel in the statistics of each group; columns sum to 1.
        membership: [C, G], 1 where the channel belongs to the group.
        weight, bias: [C].
    """
    # autocast would take the products in half precision, where mean(x^2) - mean(x)^2 cancels
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        flat = x.flatten(2)
        mean = flat.mean(2)
        square = flat.square().mean(2)
        group_mean = mean @ averaging
        group_variance = (square @ averaging - group_mean.square()).clamp_min(0)
        scale = (torch.rsqrt(group_variance + eps) @ membership.T) * weight
        shift = bias - (group_mean @ membership.T) * scale
        view = (*scale.shape, *[1] * (x.ndim - 2))
        return torch.addcmul(shift.view(view), x, scale.view(view))


class UnevenGroupNorm(nn.Module):
    """Group norm whose groups differ in size. Statistics are taken in float32 or better.

    A skip connection puts two tensors under one norm, and its groups may straddle the seam. When the
    two sides lose different numbers of channels, no `nn.GroupNorm` computes the same function.
    """

    def __init__(self, group_sizes: list[int], eps: float, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.group_sizes = list(group_sizes)
        self.num_channels = sum(group_sizes)
        self.eps = eps
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self._matrices: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def matrices(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(averaging, membership), [C, G] each; not a buffer, so that meta-device loading cannot miss it."""
        if (device, dtype) not in self._matrices:
            sizes = torch.tensor(self.group_sizes, device=device)
            groups = torch.repeat_interleave(torch.arange(len(self.group_sizes), device=device), sizes)
            membership = nn.functional.one_hot(groups, len(self.group_sizes)).to(dtype)
            self._matrices[device, dtype] = membership / sizes, membership
        return self._matrices[device, dtype]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        averaging, membership = self.matrices(x.device, dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return group_norm_from_moments(x.to(dtype), averaging, membership, weight, bias, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_channels} channels in {len(self.group_sizes)} groups, eps={self.eps}"


def _narrow(parameter: torch.Tensor | None, *sizes: int) -> Any:
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach()[tuple(slice(size) for size in sizes)].clone())


def resize_module(model: nn.Module, name: str, shape: dict[str, Any]) -> None:
    """Give one module of a stock network the shape that the configuration asks for."""
    module: Any = model.get_submodule(name)
    if "heads" in shape:
        module.heads = module.sliceable_head_dim = shape["heads"]
        module.inner_dim, module.inner_kv_dim = module.to_q.out_features, module.to_k.out_features
    elif "groups" in shape:
        sizes = shape["groups"]
        weight, bias = _narrow(module.weight, sum(sizes)), _narrow(module.bias, sum(sizes))
        if len(set(sizes)) > 1:
            norm: Any = UnevenGroupNorm(sizes, module.eps, weight, bias)
        else:
            norm = nn.GroupNorm(len(sizes), sum(sizes), module.eps, device="meta")
            norm.weight, norm.bias = weight, bias
        model.set_submodule(name, norm)
    elif isinstance(module, nn.Embedding):
        module.weight = _narrow(module.weight, module.num_embeddings, shape["out"])
        module.embedding_dim = shape["out"]
    else:
        module.weight = _narrow(module.weight, shape["out"], shape["in"])
        module.bias = _narrow(module.bias, shape["out"])
        for attribute, size in (("out_channels", shape["out"]), ("out_features", shape["out"])):
            if hasattr(module, attribute):
                setattr(module, attribute, size)
        for attribute, size in (("in_channels", shape["in"]), ("in_features", shape["in"])):
            if hasattr(module, attribute):
                setattr(module, attribute, size)


def refresh_attributes(model: nn.Module) -> None:
    """Update the widths that diffusers keeps beside its weights."""
    module: Any
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("Downsample2D", "Upsample2D") and isinstance(getattr(module, "conv", None), nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        elif kind == "ResnetBlock2D":
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
            for sampler in (module.upsample, module.downsample):
                if hasattr(sampler, "channels"):  # resampling without weights of its own
                    sampler.channels = sampler.out_channels = module.in_channels
        elif kind == "Attention" and module.to_q is not None:
            module.query_dim = module.cross_attention_dim = module.to_q.in_features
            module.out_dim = module.to_out[0].out_features
            module.scale = (module.to_q.out_features // module.heads) ** -0.5  # read by unfused processors


class PrunedUNet2DModel(UNet2DModel):
    """`UNet2DModel` plus one configuration key, `gfprune`: module name -> shape."""

    def __init__(self, gfprune: dict[str, Any] | None = None, **stock: Any) -> None:
        super().__init__(**stock)
        modules = (gfprune or {}).get("modules", {})
        # attention shapes last: heads follow from the linears they sit on
        for name, shape in sorted(modules.items(), key=lambda item: "heads" in item[1]):
            resize_module(self, name, shape)
        refresh_attributes(self)
        self.register_to_config(gfprune=gfprune)

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:
        keys = set(inspect.signature(input_class.__init__).parameters)
        return keys | set(inspect.signature(UNet2DModel.__init__).parameters) if "stock" in keys else keys

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[Any, Any, Any]:
        # `auto_map` is for the loader, not for the constructor
        config_dict = {key: value for key, value in config_dict.items() if key != "auto_map"}
        init, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        init.pop("stock", None)
        return init, unused, hidden

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration, and beside it this file, so that the copy loads like the original."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        target = os.path.join(save_directory, f"{PrunedUNet2DModel.__module__}.py")
        if not (os.path.exists(target) and os.path.samefile(__file__, target)):
            shutil.copyfile(__file__, target)


# diffusers names the module in model_index.json by `__module__`; it must be the stem of this file.
PrunedUNet2DModel.__module__ = "gfprune_unet2d_v1"
PrunedUNet2DModel.register_for_auto_class("AutoModel")
