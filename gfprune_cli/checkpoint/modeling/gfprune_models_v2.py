"""A diffusers model whose layers may each have their own width: the output of `gfprune prune`.

This one file travels inside the checkpoint and needs only torch and diffusers:

    DiffusionPipeline.from_pretrained(path, trust_remote_code=True)

`Pruned<Class>` exists for every model class of diffusers and is made when it is asked for. The stock network
is built from the stock configuration, then the modules named in the configuration key `gfprune` are narrowed
to the shapes written there:

    {"out": 48, "in": 40}              a convolution or linear layer; "conv_groups" for a grouped convolution
    {"out": 40}                        an embedding
    {"groups": [5, 5, 5, 4]}           a group norm: channels in each of its groups
    {"norm": 40}                       a layer norm or RMS norm: features
    {"heads": 3, "kv_heads": 1}        an attention layer: heads left
    {"rotary_heads": [0, 2, 3]}        beside "heads", where rotary angles differ by head: which ones are left
    {"channels": [0, 3], "of": 4}      a patch embedding: channels of its position table that are left
    {"parameter": [1, 40]}             a parameter or buffer of its own, named by its full name
    {"attributes": {"inner_dim": 40}}  numbers that a module's forward reads
    {"identity": true}                 a residual block that is skipped; or the names of what it hands on
    {"rank": 16}                       a linear layer as two thin ones, `name.0` and `name.1`, which may have
                                       shapes of their own

Beside "modules" it may hold "dense" (numbers of blocks that the dense network had) and, of what adds to the
streams of a pruned network, "samples" and "features" (see `arranged`).
"""

from __future__ import annotations  # Triton reads some that mean nothing until it is imported

import functools
import importlib
import inspect
import itertools
import json
import os
import re
import shutil
import sys
from contextlib import nullcontext
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from diffusers.loaders.transformer_flux import FluxTransformer2DLoadersMixin
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.utils import BaseOutput, convert_unet_state_dict_to_peft
from torch import nn

STEM = "gfprune_models_v2"

# What this process has defined so far: diffusers runs the file anew with each model that it loads.
DEFINED = dict(vars(sys.modules[STEM])) if STEM in sys.modules else {}
MADE: list[Any] = []  # classes

# Read by the stock classes alone, which would load the weights that fit and make up the others: with this
# key they stop before any weight is read, and say this.
STOP = (
    "gfprune (the network is not quantized but pruned, and its stock class cannot hold it: call "
    "AutoModel.from_pretrained or DiffusionPipeline.from_pretrained, both with trust_remote_code=True)"
)

ORDER = ("identity", "attributes", "heads")  # what is applied after the weights, last first
BESIDE = "beside"  # what a LoRA of a layer that is two thin ones now attaches to
FIRST = "rank"  # what is applied before them: the factors may be narrowed in their turn

ADAPTED = re.compile(r"(?P<layer>.+?)\.(?:lora|lokr|hada)_(?P<side>\w+)")  # a tensor of a LoRA and its kin
KERNEL_BLOCK = 4096  # numbers that a program of the group norm's kernel has at once
SIDES = ("B", "A")  # of a low-rank product, by the dimension that is the layer's own
PLACES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
PLACED = "places"  # of an IP-Adapter's layer: see `PlacedPrompts`
SAMPLERS = ("Downsample1D", "Downsample2D", "Upsample1D", "Upsample2D")

# What ControlNets add to transformers, as forwards name it -> the blocks it is added after, and their number.
SAMPLES = {
    "controlnet_block_samples": ("transformer_blocks", "num_layers"),
    "controlnet_single_block_samples": ("single_transformer_blocks", "num_single_layers"),
    "block_controlnet_hidden_states": ("transformer_blocks", "num_layers"),
}
# The same for U-Nets: ControlNets, and T2I adapters last.
DOWN, MIDDLE, WITHIN = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
ADDED = (*SAMPLES, DOWN, MIDDLE, WITHIN)

# What blocks with two streams return. Every other block returns its first argument.
PAIRS = {
    "FluxTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "FluxSingleTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "JointTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "CogVideoXBlock": ("hidden_states", "encoder_hidden_states"),
}


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
        mean = flat.mean(2) @ averaging
        variance = (flat.square().mean(2) @ averaging - mean.square()).clamp_min(0)
        scale = (torch.rsqrt(variance + eps) @ membership.T) * weight
        return _scaled(x, scale, bias - (mean @ membership.T) * scale)


def _scaled(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """scale * x + shift, channel by channel: [N, C] each."""
    view = (*scale.shape, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.view(view), x, scale.view(view))


def _normed(
    x: torch.Tensor,
    averaging: torch.Tensor,
    membership: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """`group_norm_from_moments` without derivatives: fewer passes over memory, and fewer operators.

    Returns:
        what it returns, the scale [N, C], and (mean, 1 / deviation) [N, G] of the groups.
    """
    flat = x.flatten(2)
    mean = flat.mean(2) @ averaging
    square = torch.linalg.vector_norm(flat, dim=2).square_() @ averaging
    variance = square.div_(flat.shape[2]).addcmul_(mean, mean, value=-1).clamp_min_(0)
    inverse = variance.add_(eps).rsqrt_()
    scale = (inverse @ membership.T).mul_(weight)
    shift = torch.addcmul(bias, mean @ membership.T, scale, value=-1)
    view = (*scale.shape, *[1] * (x.ndim - 2))
    return x.mul(scale.view(view)).add_(shift.view(view)), scale, mean, inverse


class _GroupNorm(torch.autograd.Function):
    """`group_norm_from_moments` with its derivative in closed form: half of the passes over memory."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        normed, *found = _normed(*given)
        *tensors, ctx.eps = given
        ctx.save_for_backward(*tensors, *found)
        return normed

    @staticmethod
    def backward(ctx: Any, along: torch.Tensor) -> Any:
        x, averaging, membership, weight, bias, scale, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, of everything
            again = group_norm_from_moments(x, averaging, membership, weight, bias, ctx.eps)
            wanted = [tensor if tensor.requires_grad else None for tensor in (x, weight, bias)]
            inputs = [tensor for tensor in wanted if tensor is not None]
            found = iter(torch.autograd.grad(again, inputs, along, create_graph=True))
            return _spread([None if tensor is None else next(found) for tensor in wanted])
        sums = along.flatten(2).sum(2)
        products = (along * x).flatten(2).sum(2)
        towards = products - (mean @ membership.T) * sums
        to_variance = -0.5 * inverse**3 * ((weight * towards) @ membership)
        to_mean = -(scale * sums) @ membership - 2 * mean * to_variance
        count = x[0, 0].numel()
        constant, linear = (to_mean @ averaging.T) / count, (to_variance @ averaging.T) * (2 / count)
        by_x = _scaled(x, linear, constant)
        by_x.addcmul_(along, scale.view(*scale.shape, *[1] * (x.ndim - 2)))
        return _spread((by_x, ((inverse @ membership.T) * towards).sum(0), sums.sum(0)))


def _spread(found: Any) -> Any:
    """Derivatives by x, weight and bias, in the places of the arguments of `_GroupNorm`."""
    by_x, by_weight, by_bias = found
    return by_x, None, None, by_weight, by_bias, None


tl: Any = None  # triton.language, once the kernel below is wanted


def _group_norm_kernel(  # type: ignore[no-untyped-def]  # Triton takes annotations for its own
    x,
    y,
    weight,
    bias,
    starts,
    positions,
    eps,
    by_sample,
    by_channel,
    by_position,
    channels: tl.constexpr,
    block: tl.constexpr,
):
    """A Triton program for one group of one sample: mean, variance, and what is written; sums in float32."""
    sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(starts + group)
    size = tl.load(starts + group + 1) - start
    channel = tl.arange(0, channels)
    own = channel < size
    rows = sample * by_sample + (start + channel) * by_channel
    count = (size * positions).to(tl.float32)
    total = tl.zeros((channels, block), tl.float32)
    for first in range(0, positions, block):
        position = first + tl.arange(0, block)
        inside = own[:, None] & (position < positions)[None, :]
        at = rows[:, None] + (position * by_position)[None, :]
        total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(total, 1), 0) / count
    total = tl.zeros((channels, block), tl.float32)
    for first in range(0, positions, block):
        position = first + tl.arange(0, block)
        inside = own[:, None] & (position < positions)[None, :]
        at = rows[:, None] + (position * by_position)[None, :]
        away = tl.where(inside, tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
        total += away * away
    inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(total, 1), 0) / count + eps)
    scale = tl.load(weight + start + channel, mask=own, other=0.0).to(tl.float32) * inverse
    shift = tl.load(bias + start + channel, mask=own, other=0.0).to(tl.float32) - mean * scale
    for first in range(0, positions, block):
        position = first + tl.arange(0, block)
        inside = own[:, None] & (position < positions)[None, :]
        at = rows[:, None] + (position * by_position)[None, :]
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale[:, None] + shift[:, None]
        tl.store(y + at, normed.to(y.dtype.element_ty), mask=inside)


@functools.cache
def _compiled_kernel() -> Any:
    """`_group_norm_kernel` for Triton, which comes with PyTorch for CUDA."""
    global tl
    tl = importlib.import_module("triton.language")
    return importlib.import_module("triton").jit(_group_norm_kernel)


@functools.cache
def _runs_kernel(device: torch.device) -> bool:
    """Whether Triton is there, and works: it needs a C compiler, and a card that is not too old."""
    try:
        weight, starts = torch.ones(2, device=device), torch.tensor([0, 2], dtype=torch.int32, device=device)
        fused_group_norm(torch.ones(1, 2, 1, device=device), starts, 2, weight, weight, 1.0)
    except Exception:
        return False
    return True


def fused_group_norm(
    x: torch.Tensor, starts: torch.Tensor, widest: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Group norm with free group sizes in one kernel, in the memory format of what it is given.

    Args:
        x: [N, C, ...].
        starts: [G + 1] int32, the first channel of each group, and C.
        widest: channels of the largest group.
        weight, bias: [C].
    """
    apart = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    x = x if apart else x.contiguous()
    y, positions = torch.empty_like(x), x[0, 0].numel()
    channels = 1 << (widest - 1).bit_length()
    block = max(1, min(1 << (positions - 1).bit_length(), KERNEL_BLOCK // channels))
    # not x.stride(): that of a side of length 1 means nothing
    steps = (1, x.shape[1]) if apart else (positions, 1)
    grid = (len(x), len(starts) - 1)
    given = x, y, weight, bias, starts, positions, eps, x[0].numel(), *steps, channels, block
    with torch.cuda.device_of(x):
        _compiled_kernel()[grid](*given)
    return y


def _autocasts(x: torch.Tensor) -> bool:
    """Whether products would be taken in half precision; to ask is cheaper than to forbid."""
    return torch.is_autocast_enabled(x.device.type)


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
        self._starts: dict[torch.device, torch.Tensor] = {}
        self._prepare()

    def _apply(self, *given: Any, **named: Any) -> Any:
        """What compiled graphs take goes where the weights go."""
        moved = super()._apply(*given, **named)
        self._prepare()
        return moved

    def _prepare(self) -> None:
        """What is made in a graph is copied from the host at every call, and no CUDA graph may hold that."""
        self._matrices.clear()
        if not self.weight.is_meta:
            self.matrices(self.weight.device, torch.float32)

    def matrices(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(averaging, membership), [C, G] each; not a buffer, so that meta-device loading cannot miss it."""
        key = device, dtype
        if key in self._matrices:
            return self._matrices[key]
        if torch.compiler.is_compiling():
            return self._made_matrices(device, dtype)
        with torch.inference_mode(False):  # who is called so first may be trained later
            self._matrices[key] = self._made_matrices(device, dtype)
        return self._matrices[key]

    def _made_matrices(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`matrices` by operators whose shapes depend on no tensor: others would break a compiled graph."""
        sizes = torch.tensor(self.group_sizes, device=device)
        ends = torch.tensor(list(itertools.accumulate(self.group_sizes)), device=device)
        channel = torch.arange(self.num_channels, device=device).unsqueeze(1)
        membership = ((channel < ends) & (channel >= ends - sizes)).to(dtype)
        return membership / sizes, membership

    def starts(self, device: torch.device) -> torch.Tensor:
        """[G + 1] the first channel of each group, and their number."""
        if device not in self._starts:
            ends = [0, *itertools.accumulate(self.group_sizes)]
            self._starts[device] = torch.tensor(ends, dtype=torch.int32, device=device)
        return self._starts[device]

    def is_fused(self, x: torch.Tensor) -> bool:
        """Whether one kernel does it all."""
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]
        return plain and x.is_cuda and x.dtype != torch.float64 and x.numel() > 0 and _runs_kernel(x.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_fused(x):
            starts = self.starts(x.device)
            return fused_group_norm(x, starts, max(self.group_sizes), self.weight, self.bias, self.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        averaging, membership = self.matrices(x.device, dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        given = (x.to(dtype), averaging, membership, weight, bias, self.eps)
        if torch.compiler.is_compiling():  # compilers fuse it better
            return group_norm_from_moments(*given).to(x.dtype)
        if not torch.is_grad_enabled():
            with torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext():
                return _normed(*given)[0].to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            normed: torch.Tensor = _GroupNorm.apply(*given)
        return normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_channels} channels in {len(self.group_sizes)} groups, eps={self.eps}"


def _narrow(tensor: torch.Tensor | None, *sizes: int) -> Any:
    if tensor is None:
        return None
    narrow = tensor.detach()[tuple(slice(size) for size in sizes)].clone()
    return nn.Parameter(narrow) if isinstance(tensor, nn.Parameter) else narrow


class SkippedBlock(nn.Module):
    """Stands where a residual block was, and hands on what it was given.

    Args:
        arguments: names of the block's arguments, in order.
        returned: those it hands on; a single one is returned by itself.
    """

    def __init__(self, arguments: list[str], returned: tuple[str, ...]) -> None:
        super().__init__()
        self.arguments, self.returned = arguments, returned

    def forward(self, *inputs: Any, **named: Any) -> Any:
        given = dict(zip(self.arguments, inputs, strict=False)) | named
        found = tuple(given.get(name) for name in self.returned)
        return found if len(found) > 1 else found[0]


def skipped(block: nn.Module, returned: Any) -> SkippedBlock:
    """What takes the place of a block; `returned` is True or a list of argument names."""
    arguments = list(inspect.signature(block.forward).parameters)
    if returned is True:
        returned = PAIRS.get(type(block).__name__, arguments[:1])
    return SkippedBlock(arguments, tuple(returned))


def resize_norm(model: nn.Module, name: str, module: Any, sizes: list[int]) -> None:
    """A group norm whose groups have these sizes, even or not."""
    weight, bias = _narrow(module.weight, sum(sizes)), _narrow(module.bias, sum(sizes))
    norm: Any
    if len(set(sizes)) > 1:
        norm = UnevenGroupNorm(sizes, module.eps, weight, bias)
    else:
        norm = nn.GroupNorm(len(sizes), sum(sizes), module.eps, device="meta")
        norm.weight, norm.bias = weight, bias
    model.set_submodule(name, norm)


def resize_features(module: Any, features: int) -> None:
    """A layer norm or RMS norm over this many features."""
    for leaf in ("weight", "bias"):
        if getattr(module, leaf, None) is not None:
            setattr(module, leaf, _narrow(getattr(module, leaf), features))
    shape = "normalized_shape" if hasattr(module, "normalized_shape") else "dim"
    setattr(module, shape, torch.Size((features,)))


def resize_weight(module: Any, out: int, into: int, groups: int) -> None:
    """A convolution (transposed ones too) or linear layer from `into` to `out` channels."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.weight = _narrow(module.weight, into, out // groups)
    else:
        module.weight = _narrow(module.weight, out, into // groups)
    module.bias = _narrow(module.bias, out)
    sizes = {"out_channels": out, "out_features": out, "in_channels": into, "in_features": into}
    for attribute, size in {**sizes, "groups": groups}.items():
        if hasattr(module, attribute):
            setattr(module, attribute, size)


def resize_heads(module: Any, heads: int, kv_heads: int | None) -> None:
    """An attention layer with fewer heads; its projections have been narrowed before."""
    module.heads = heads
    if hasattr(module, "sliceable_head_dim"):
        module.sliceable_head_dim = heads
    for attribute, projection in (("inner_dim", "to_q"), ("inner_kv_dim", "to_k"), ("kv_inner_dim", "to_k")):
        layer = getattr(module, projection, None)
        if hasattr(module, attribute) and layer is not None:
            setattr(module, attribute, layer.out_features)
    if kv_heads is not None:
        for attribute in ("kv_heads", "num_kv_heads"):
            if hasattr(module, attribute):
                setattr(module, attribute, kv_heads)


class NarrowPatchEmbed(PatchEmbed):
    """A patch embedding that keeps some channels of its position table, for pictures of every size."""

    channels: list[int]
    dense_width: int

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        size = latent.shape[-2] // self.patch_size, latent.shape[-1] // self.patch_size
        if size == (self.height, self.width):
            return super().forward(latent)
        table = get_2d_sincos_pos_embed(
            embed_dim=self.dense_width,
            grid_size=size,
            base_size=self.base_size,
            interpolation_scale=self.interpolation_scale,
            device=latent.device,
            output_type="pt",
        )
        latent = self.proj(latent).flatten(2).transpose(1, 2)
        return (latent + table.float()[:, self.channels].unsqueeze(0)).to(latent.dtype)


class PlacedPrompts(FluxIPAdapterAttnProcessor):
    """Image prompts of Flux, which go from heads to the stream with no layer in between.

    Head h of the dense network writes the h-th part of the stream; with fewer heads, or a narrower stream,
    `places` [channels of the stream] says which output of the heads each channel gets: their number for none.
    """

    places: torch.Tensor

    @functools.wraps(FluxIPAdapterAttnProcessor.__call__)
    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        prompts = kwargs.pop("ip_hidden_states")
        states, text, added = super().__call__(attn, hidden_states, *args, ip_hidden_states=[], **kwargs)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))).transpose(1, 2)
        for prompt, scale, keys, values in zip(prompts, self.scale, self.to_k_ip, self.to_v_ip, strict=True):
            key, value = (
                layer(prompt.flatten(1, -2)).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for layer in (keys, values)
            )
            found = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            added = added + scale * nn.functional.pad(found, (0, 1))[..., self.places]
        return states, text, added


def angles_of_heads(module: Any, args: Any, kwargs: Any) -> Any:
    """Before an attention layer: the rotary embedding [..., heads x head] of the heads that are left."""
    head = module.to_q.out_features // module.heads

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (-1, head))[..., module.rotary_heads, :].flatten(-2)

    for name, value in kwargs.items():
        if "rotary" in name and value is not None:
            kwargs[name] = tuple(map(kept, value)) if isinstance(value, tuple | list) else kept(value)
    return args, kwargs


def resize_parameter(model: nn.Module, name: str, sizes: list[int]) -> None:
    """A parameter of its own; a buffer that used to be computed is now saved with the weights."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    narrow = _narrow(getattr(owner, leaf), *sizes)
    if leaf in owner._buffers:
        owner.register_buffer(leaf, narrow, persistent=True)
    else:
        setattr(owner, leaf, narrow)


class FactoredLinear(nn.Sequential):
    """A linear layer as the product of two thin ones, [in -> rank] and [rank -> out]; the second is biased.

    Args:
        layer: the linear layer whose place it takes; gives shapes, type and device.
        rank: of its weight from now on.
    """

    def __init__(self, layer: Any, rank: int) -> None:
        first = nn.Linear(layer.in_features, rank, bias=False, device="meta")
        second = nn.Linear(rank, layer.out_features, device="meta")
        bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_features)
        first.weight = nn.Parameter(layer.weight.detach()[:rank].clone())
        second.weight = nn.Parameter(layer.weight.detach()[:, :rank].clone())
        second.bias = nn.Parameter(bias.detach().clone())
        super().__init__(first, second)

    def forward(self, x: Any) -> Any:
        found = self[1](self[0](x))
        return found + self.get_submodule(BESIDE)(x) if BESIDE in self._modules else found

    # What code around a linear layer looks at: its type, device and sizes.
    @property
    def weight(self) -> Any:
        return self[1].weight

    @property
    def bias(self) -> Any:
        return self[1].bias

    @property
    def in_features(self) -> Any:
        return self[0].in_features

    @property
    def out_features(self) -> Any:
        return self[1].out_features


class Beside(nn.Linear):
    """A linear layer of zeros, without a weight, around the two factors of a layer.

    A LoRA of the layer, B (A x), is none of its factors, whose rank is too low; here it finds the inputs and
    outputs of the whole, and is exact.
    """

    bias: Any = None
    like: Any  # the first factor

    def __init__(self, factors: FactoredLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = factors.in_features, factors.out_features
        self.like = (factors[0],)  # in a tuple it is no part of this module

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """[out, in] zeros, of the type and on the device of the factors, in the place of one number."""
        return self.like[0].weight.new_zeros(()).expand(self.out_features, self.in_features)

    def forward(self, x: Any) -> Any:
        return x.new_zeros(())


def make_room(model: nn.Module, names: Any) -> None:
    """Give layers that are two factors what a LoRA attaches to, where these names are of a LoRA of them."""
    factored = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, FactoredLinear)]
    for name, layer in factored:
        if BESIDE not in layer._modules and any(f"{name}.{BESIDE}." in key for key in names):
            layer.add_module(BESIDE, Beside(layer))


def resize_module(model: nn.Module, name: str, shape: dict[str, Any]) -> None:
    """Give one module of a stock network the shape that the configuration asks for."""
    if FIRST in shape:
        return model.set_submodule(name, FactoredLinear(model.get_submodule(name), shape[FIRST]))
    if "parameter" in shape:
        return resize_parameter(model, name, shape["parameter"])
    module: Any = model.get_submodule(name)
    if shape.get("identity"):
        model.set_submodule(name, skipped(module, shape["identity"]))
    elif "groups" in shape:
        resize_norm(model, name, module, shape["groups"])
    elif "norm" in shape:
        resize_features(module, shape["norm"])
    elif isinstance(module, nn.Embedding):
        module.weight = _narrow(module.weight, module.num_embeddings, shape["out"])
        module.embedding_dim = shape["out"]
    elif "out" in shape:
        resize_weight(module, shape["out"], shape["in"], shape.get("conv_groups", 1))
    if "heads" in shape:
        resize_heads(module, shape["heads"], shape.get("kv_heads"))
    if "channels" in shape:
        module.__class__ = NarrowPatchEmbed
        module.channels, module.dense_width = shape["channels"], shape["of"]
    if "rotary_heads" in shape:
        module.rotary_heads = shape["rotary_heads"]
        module.register_forward_pre_hook(angles_of_heads, with_kwargs=True)
    for attribute, value in shape.get("attributes", {}).items():
        setattr(module, attribute, value)
    return None


def refresh_attributes(model: nn.Module) -> None:
    """Update the widths that diffusers keeps beside its weights."""
    module: Any
    for module in model.modules():
        kind = type(module).__name__
        if kind in SAMPLERS and isinstance(getattr(module, "conv", None), (nn.Conv1d, nn.Conv2d)):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        elif kind == "ResnetBlock2D":
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
            for sampler in (module.upsample, module.downsample):
                if hasattr(sampler, "channels"):  # resampling without weights of its own
                    sampler.channels = sampler.out_channels = module.in_channels
        elif kind == "Attention" and module.to_q is not None:
            module.query_dim, module.cross_attention_dim = module.to_q.in_features, module.to_k.in_features
            if isinstance(getattr(module, "to_out", None), nn.ModuleList):
                module.out_dim = module.to_out[0].out_features
            if module.scale_qk:  # read by unfused processors
                module.scale = (module.to_q.out_features // module.heads) ** -0.5


def turn(shape: dict[str, Any]) -> list[bool]:
    """When a shape is applied: what sorts first comes first."""
    return [FIRST not in shape, *(key in shape for key in ORDER)]


class PrunedModel(ModelMixin, ConfigMixin):
    """A stock class plus one configuration key, `gfprune`: module name -> shape. See `pruned_class`."""

    stock_class: Any = None

    def __init__(self, gfprune: dict[str, Any] | None = None, **stock: Any) -> None:
        self.stock_class.__init__(self, **stock)
        modules = (gfprune or {}).get("modules", {})
        # heads follow from the linears they sit on, and what lies in a skipped block goes with it
        for name, shape in sorted(modules.items(), key=lambda item: turn(item[1])):
            resize_module(self, name, shape)
        refresh_attributes(self)
        self.register_to_config(gfprune=gfprune)

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:
        keys = set(inspect.signature(input_class.__init__).parameters)
        stock = getattr(input_class, "stock_class", None)
        return keys | set(inspect.signature(stock.__init__).parameters) if stock else keys

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[Any, Any, Any]:
        # `auto_map` and `STOP` are for loaders, not for the constructor
        config_dict = {key: value for key, value in config_dict.items() if key != "auto_map"}
        without_stop(config_dict)
        init, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        init.pop("stock", None)
        return init, unused, hidden

    # Transformer2DModel looks up its successor by its own name, and would not find ours.
    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        return ConfigMixin.from_config.__func__(cls, config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        # AutoModel takes the class from model_index.json, which names one for all components
        places = {key: kwargs[key] for key in PLACES if key in kwargs}
        named = cls.load_config(pretrained_model_name_or_path, **places).get("_class_name", cls.__name__)
        if named != cls.__name__ and named.startswith("Pruned"):
            cls = pruned_class(named.removeprefix("Pruned"))
        elif named not in (cls.__name__, cls.stock_class.__name__):
            return getattr(diffusers, named).from_pretrained(pretrained_model_name_or_path, **kwargs)
        return ModelMixin.from_pretrained.__func__(cls, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        found = super().load_config(*args, **kwargs)
        without_stop(found[0] if isinstance(found, tuple) else found)
        return found

    def to_json_string(self) -> str:
        document = json.loads(super().to_json_string())
        document.setdefault("quantization_config", {"quant_method": STOP})
        return json.dumps(document, indent=2, sort_keys=True) + "\n"

    def load_lora_adapter(self, given: Any, prefix: Any = "transformer", **kwargs: Any) -> None:
        """As the stock class does; a LoRA that does not fit is refused and not spread over what does."""
        if isinstance(given, dict):
            refuse_misfits(self, given, prefix)
            make_room(self, given)
        super().load_lora_adapter(given, prefix=prefix, **kwargs)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As the stock class does; what lies beside factors cannot be fused into them."""
        factored = [layer for layer in self.modules() if isinstance(layer, FactoredLinear)]
        if any(type(layer._modules.get(BESIDE)) not in (Beside, type(None)) for layer in factored):
            raise ValueError(
                "a LoRA cannot be fused into layers that are two factors: use it unfused, or fuse it into "
                "the dense model and prune that"
            )
        super().fuse_lora(*args, **kwargs)

    def _convert_ip_adapter_attn_to_diffusers(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        states = [part.get("ip_adapter", part) for part in (given if isinstance(given, list) else [given])]
        for state in states:
            refuse_image_prompts(self, state)
        padded = [padded_prompts(self, adapter) for adapter in given] if isinstance(given, list) else given
        found = super()._convert_ip_adapter_attn_to_diffusers(padded, *args, **kwargs)
        for number, name in receivers(self):
            width: Any = self.get_submodule(name).to_k
            processor = found[f"{name}.processor"]
            for layer in processor.modules():
                if isinstance(layer, nn.Linear):
                    resize_weight(layer, width.out_features, layer.in_features, 1)
            if f"{number}.{PLACED}" in states[0]:
                processor.__class__ = PlacedPrompts
                places = states[0][f"{number}.{PLACED}"].to(self.device)
                processor.register_buffer("places", places, persistent=False)
        return found

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration, and beside it this file, so that the copy loads like the original."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        target = os.path.join(save_directory, f"{STEM}.py")
        if not (os.path.exists(target) and os.path.samefile(__file__, target)):
            shutil.copyfile(__file__, target)


def refuse(misfits: list[str]) -> None:
    """Raise if an adapter has parts that do not fit, and say what makes one that does."""
    if misfits:
        raise ValueError(
            f"this adapter was not made for this pruned network: {len(misfits)} of its layers do not fit, as "
            f"{misfits[0]}; carry it over with `gfprune carry --adapter FILE --model PRUNED --out DIR`"
        )


def refuse_misfits(model: Any, state: dict[str, Any], prefix: str | None) -> None:
    """Refuse a LoRA with layers that went, or of other sizes than those that were narrowed.

    Args:
        state: its tensors, in any of the spellings that diffusers takes from a model of its own.
        prefix: of the names that are meant for this network; None for all.
    """
    if prefix is not None:
        begin = f"{prefix}."
        state = {key.removeprefix(begin): value for key, value in state.items() if key.startswith(begin)}
    narrowed = (model.config.get("gfprune") or {}).get("modules", {})
    modules = dict(model.named_modules())
    misfits = {}
    for key, tensor in convert_unet_state_dict_to_peft(state).items():
        found = ADAPTED.match(key)
        if found is None:
            continue
        layer, side = found["layer"], found["side"]
        name = layer.removesuffix(f".{BESIDE}")
        if name not in modules:
            misfits[name] = name
        elif isinstance(modules[name], FactoredLinear) != (layer != name):
            misfits[name] = f"{name}: two factors"
        elif name in narrowed and side in SIDES and tensor.ndim > 1:
            given, has = tensor.shape[SIDES.index(side)], width_of(modules[name], side)
            if has not in (given, None):
                misfits[name] = f"{name}: {given} channels instead of {has}"
    refuse(list(misfits.values()))


def width_of(layer: Any, side: str) -> int | None:
    """What a layer puts out ("B") or reads ("A"); None where it does not say."""
    names = ("out_features", "out_channels") if side == "B" else ("in_features", "in_channels")
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


def refuse_image_prompts(model: Any, state: dict[str, Any]) -> None:
    """Refuse an IP-Adapter for other heads or other layers: diffusers would read its channels as tokens.

    Args:
        state: its tensors, named by the number of a layer: "1.to_k_ip.weight".
    """
    found = {int(key.split(".")[0]): value.shape[0] for key, value in state.items() if "to_k_ip.w" in key}
    wanted = {number: model.get_submodule(name).to_k.out_features for number, name in receivers(model)}
    misfits = [
        f"layer {number}: {found.get(number, 0)} channels instead of {wanted.get(number, 0)}"
        for number in sorted(found.keys() | wanted.keys())
        if found.get(number) != wanted.get(number)
    ]
    if isinstance(model, FluxTransformer2DLoadersMixin):
        misfits += [
            f"layer {number}: nothing says which channels its heads write to"
            for number, name in receivers(model)
            if model.get_submodule(name).to_out[0].out_features != wanted[number]
            and f"{number}.{PLACED}" not in state
        ]
    refuse(misfits)


def refuse_residuals(model: Any, given: dict[str, Any]) -> None:
    """Refuse what a ControlNet or T2I adapter of another network adds, before any of it lands elsewhere.

    Args:
        given: tensors by the names of the forward's arguments.
    """
    misfits: list[str] = []

    def check(what: str, tensors: Any, widths: list[int | None], dimension: int) -> None:
        for index, (tensor, width) in enumerate(zip(tensors, widths, strict=False)):
            if width is not None and tensor.shape[dimension] != width:
                misfits.append(f"{what} {index}: {tensor.shape[dimension]} channels instead of {width}")

    if hasattr(model, "down_blocks"):
        streams, ends, middle = streams_of_unet(model)
        down, within = given.get(DOWN), given.get(WITHIN)
        if within is None and MIDDLE not in given:  # an older way to give what T2I adapters add
            down, within = None, down
        if down is not None and len(down) != len(streams):
            misfits.append(f"{DOWN}: {len(down)} tensors instead of {len(streams)}")
        check(DOWN, down or (), streams, 1)
        check(WITHIN, within or (), [*ends, middle], 1)
        check(MIDDLE, [given[MIDDLE]] if MIDDLE in given else (), [middle], 1)
    else:
        dense = (model.config.get("gfprune") or {}).get("dense", {})
        width = getattr(getattr(model, "proj_out", None), "in_features", None)
        for name in given.keys() & SAMPLES.keys():
            samples, (stack, number) = given[name], SAMPLES[name]
            if isinstance(samples, list | tuple):
                check(name, samples, [width] * len(samples), -1)
                blocks = len(getattr(model, stack, samples))
                if dense.get(number, blocks) != blocks != len(samples) or len(samples) > blocks:
                    misfits.append(f"{name}: {len(samples)} tensors for {blocks} blocks")
    refuse(misfits)


def streams_of_unet(model: Any) -> tuple[list[int | None], list[int | None], int | None]:
    """Channels of the streams of a U-Net; None where they are not known.

    Returns:
        those that it hands from encoder to decoder, those that T2I adapters add to, by block, the middle's.
    """
    width = getattr(model.conv_in, "out_channels", None)
    streams, ends = [width], []
    for block in model.down_blocks:
        for layer in getattr(block, "resnets", ()):
            width = getattr(layer, "out_channels", width)  # one that is skipped has none
            streams.append(width)
        before = width
        for layer in getattr(block, "downsamplers", None) or ():
            width = getattr(layer, "out_channels", width)
            streams.append(width)
        ends.append(before if getattr(block, "has_cross_attention", False) else width)
    for layer in getattr(model.mid_block, "resnets", ()):
        width = getattr(layer, "out_channels", width)
    return streams, ends, width


def guarded(stock: Any) -> Any:
    """The forward of a stock class, which refuses what was made for other streams than the network has."""
    names = [*inspect.signature(stock.forward).parameters][1:]

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        given = {name: named[name] for name in ADDED if named.get(name) is not None}
        if given:
            refuse_residuals(self, given)
        return stock.forward(self, *args, **kwargs)

    return forward


def arranging(stock: Any) -> Any:
    """The forward of a ControlNet or T2I adapter, whose outputs fit the streams of a pruned network."""

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return arranged(stock.forward(self, *args, **kwargs), self.config.get("gfprune") or {})

    return forward


def own_forward(name: str, stock: Any) -> dict[str, Any]:
    """The forward of a pruned class, where it does more than that of the stock class."""
    if "ControlNet" in name or name == "T2IAdapter":
        return {"forward": arranging(stock)}
    added = set(ADDED) & inspect.signature(stock.forward).parameters.keys()
    return {"forward": guarded(stock)} if added else {}


def arranged(found: Any, how: dict[str, Any]) -> Any:
    """Outputs for a pruned network.

    Args:
        how: "samples", name -> for each block of that network, the samples whose sum it gets; or "features",
            for each output the channels that are left, null for all.
    """
    if "features" in how:
        return [
            feature if stays is None else feature[:, stays]
            for feature, stays in zip(found, how["features"], strict=True)
        ]
    if "samples" not in how:
        return found
    sums = how["samples"]
    if isinstance(found, BaseOutput):
        return type(found)(**{name: summed(found[name], sums.get(name)) for name in found})
    if isinstance(found, tuple):  # of stacks, in the order of SAMPLES
        return tuple(summed(part, sums.get(name)) for name, part in zip(SAMPLES, found, strict=False))
    return summed(found, sums.get(next(iter(SAMPLES))))


def summed(samples: Any, sums: list[list[int]] | None) -> Any:
    """For each block the sum of some samples."""
    if samples is None or sums is None:
        return samples
    return [functools.reduce(torch.add, [samples[index] for index in chosen]) for chosen in sums]


def padded_prompts(model: Any, adapter: dict[str, Any]) -> dict[str, Any]:
    """An IP-Adapter with rows at the end for the heads that went: diffusers loads no other width."""
    found = dict(adapter["ip_adapter"])
    for number, name in receivers(model):
        for key in [key for key in found if key.startswith((f"{number}.to_k_ip.", f"{number}.to_v_ip."))]:
            missing = dense_width(model, name) - found[key].shape[0]
            found[key] = nn.functional.pad(found[key], (*[0, 0] * (found[key].ndim - 1), 0, missing))
    return {**adapter, "ip_adapter": found}


def dense_width(model: Any, name: str) -> int:
    """Channels of an attention layer in the dense network, where diffusers does not look at the layer."""
    if not hasattr(model, "down_blocks"):
        return int(model.inner_dim)
    widths = model.config.block_out_channels
    part, index = name.split(".")[:2]
    if part == "mid_block":
        return int(widths[-1])
    return int(widths[int(index)] if part == "down_blocks" else widths[::-1][int(index)])


def receivers(model: Any) -> list[tuple[int, str]]:
    """The attention layers that read image prompts, under the numbers that IP-Adapters give them."""
    names = [name.removesuffix(".processor") for name in model.attn_processors]
    if hasattr(model, "down_blocks"):  # U-Nets: every other layer reads the prompt
        crossing = [name for name in names if name.endswith("attn2") and "motion_modules" not in name]
        return [(2 * index + 1, name) for index, name in enumerate(crossing)]
    return list(enumerate(name for name in names if not name.startswith("single_transformer_blocks")))


def without_stop(config: dict[str, Any]) -> None:
    """Take `STOP` out of a configuration."""
    given = config.get("quantization_config")
    if isinstance(given, dict) and str(given.get("quant_method")).startswith("gfprune"):
        del config["quantization_config"]


@functools.cache
def pruned_class(name: str) -> Any:
    """The class of a pruned network.

    Args:
        name: a model class of diffusers, such as "UNet2DModel".

    Returns:
        `Pruned<name>`, a subclass of it.

    Raises:
        AttributeError: diffusers has no such model.
    """
    stock = getattr(diffusers, name, None) if name.isidentifier() and name[0].isupper() else None
    if not (
        isinstance(stock, type)
        and issubclass(stock, ModelMixin)
        and issubclass(stock, ConfigMixin)
        and stock.__module__.startswith("diffusers.")
    ):
        raise AttributeError(f"diffusers has no model {name!r}")
    # diffusers names the module in model_index.json by `__module__`: it must be the stem of this file.
    body = {"__module__": STEM, "__doc__": f"`{name}` with widths of its own.", "stock_class": stock}
    cls: Any = type(f"Pruned{name}", (PrunedModel, stock), {**body, **own_forward(name, stock)})
    cls.register_for_auto_class("AutoModel")
    introduce(cls)
    return cls


def introduce(cls: Any) -> None:
    """Enter a class in what diffusers looks up by the name of a class, or by the class itself.

    Scales of a LoRA by block (`set_adapters`), and components that one pipeline takes over from another
    (`from_pipe`). The first table is private: where it is not found, nothing happens.
    """
    MADE.append(cls)
    scales = getattr(sys.modules.get("diffusers.loaders.peft"), "_SET_ADAPTER_SCALE_FN_MAPPING", {})
    if cls.stock_class.__name__ in scales:
        scales[cls.__name__] = scales[cls.stock_class.__name__]


def __getattr__(name: str) -> Any:
    if name.startswith("Pruned"):
        return pruned_class(name.removeprefix("Pruned"))
    raise AttributeError(f"module {STEM!r} has no attribute {name!r}")


def widen_signatures() -> None:
    """Let `from_pipe` take over a pruned network: it asks for the very class that a pipeline names."""
    stock = DiffusionPipeline._get_signature_types.__func__

    @functools.wraps(stock)
    def signature_types(cls: Any) -> dict[str, tuple[Any, ...]]:
        return {
            name: (*types, *(made for made in MADE if made.stock_class in types))
            for name, types in stock(cls).items()
        }

    DiffusionPipeline._get_signature_types = classmethod(signature_types)


def guard_expansion() -> None:
    """Keep the pipelines of Flux from widening narrow layers to the size of a LoRA of the dense network."""
    stock = FluxLoraLoaderMixin._maybe_expand_transformer_param_shape_or_error_.__func__
    stock_of_lora = FluxLoraLoaderMixin._maybe_expand_lora_state_dict.__func__

    @functools.wraps(stock)
    def expand(cls: Any, transformer: Any, lora_state_dict: Any = None, *rest: Any, **named: Any) -> Any:
        if isinstance(transformer, PrunedModel):
            refuse_misfits(transformer, lora_state_dict or {}, named.get("prefix") or cls.transformer_name)
        return stock(cls, transformer, lora_state_dict, *rest, **named)

    @functools.wraps(stock_of_lora)
    def expand_lora(cls: Any, transformer: Any, lora_state_dict: Any) -> Any:
        beside = {key: value for key, value in lora_state_dict.items() if f".{BESIDE}." in key}
        others = {key: value for key, value in lora_state_dict.items() if key not in beside}
        return {**stock_of_lora(cls, transformer, others), **beside}

    FluxLoraLoaderMixin._maybe_expand_lora_state_dict = classmethod(expand_lora)
    FluxLoraLoaderMixin._maybe_expand_transformer_param_shape_or_error_ = classmethod(expand)


def settle() -> None:
    """Make the definitions of this file those of the process, importable under its name.

    Pickles, processes that are spawned, and pipelines that are given a network name the module by its stem.
    A second run of the file, from this folder or another, keeps the definitions of the first.
    """
    sys.modules.setdefault(STEM, sys.modules[__name__])
    own, first = globals(), not DEFINED
    own.update({name: value for name, value in DEFINED.items() if not name.startswith("__")})
    for value in list(own.values()):
        if getattr(value, "__module__", None) == __name__:
            value.__module__ = STEM
    folder = os.path.dirname(os.path.abspath(__file__))
    if folder not in sys.path:
        sys.path.append(folder)  # for processes that begin anew
    if first:
        widen_signatures()
        guard_expansion()


settle()
