"""The network as it is exported: tensors in, one tensor out, no class of ours or of diffusers left in it.

    network = Denoiser(model, torch.float16)
    program = trace(network, signature_of(model, scheduler))

Inputs and outputs are float32 in every dtype: a sampling loop keeps its state in float32 anyway, and the
same loop then runs every export.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.checkpoint.modeling.gfprune_models_v1 import UnevenGroupNorm
from gfprune_cli.errors import GfpruneError
from gfprune_cli.structure.examples import example_inputs

OUTPUT = "output"


class ConstantGroupNorm(nn.Module):
    """`UnevenGroupNorm` with its matrices as buffers, so that a graph holds them instead of making them.

    Args:
        norm: the norm to replace; its groups may differ in size.
    """

    def __init__(self, norm: UnevenGroupNorm) -> None:
        super().__init__()
        averaging, membership = norm.matrices(norm.weight.device, torch.float32)
        self.register_buffer("averaging", averaging)  # [C, G]
        self.register_buffer("scaling", (membership.T * norm.weight.float()).contiguous())  # [G, C]
        self.register_buffer("bias", norm.bias.detach().float())  # [C]
        self.eps = norm.eps

    averaging: torch.Tensor
    scaling: torch.Tensor
    bias: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, ...] -> the same shape and type; statistics in float32."""
        values = x.to(torch.float32)
        flat = values.flatten(2)
        mean = flat.mean(2) @ self.averaging
        variance = (flat * flat).mean(2) @ self.averaging - mean * mean
        spread = torch.rsqrt(variance.clamp_min(0) + self.eps)
        scale, shift = spread @ self.scaling, self.bias - (mean * spread) @ self.scaling
        view = (*scale.shape, *[1] * (x.ndim - 2))
        return (values * scale.view(view) + shift.view(view)).to(x.dtype)


class AnyBatchUpsample(nn.Module):
    """`Upsample2D` without its second path for batches of 64 and more, as a trace follows one path.

    That path only makes the tensor contiguous, for a kernel that PyTorch has mended since.
    """

    def __init__(self, upsample: Any) -> None:
        super().__init__()
        self.doubles = upsample.interpolate and not upsample.use_conv_transpose
        self.conv = upsample.conv if upsample.name == "conv" else upsample.Conv2d_0

    def forward(self, x: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """[N, C, H, W] -> [N, C', 2H, 2W]; `UNet2DModel` never asks for another size."""
        if self.doubles:
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


def replace_modules(model: nn.Module) -> None:
    """Put modules that trace well in the place of those that do not; the function stays the same."""
    for name, module in list(model.named_modules()):
        if isinstance(module, UnevenGroupNorm):
            model.set_submodule(name, ConstantGroupNorm(module))
        elif isinstance(module, Upsample2D) and module.norm is None:
            model.set_submodule(name, AnyBatchUpsample(module))
    for block in model.modules():
        if isinstance(block, ResnetBlock2D) and block.upsample is not None:
            # the block resamples input and state alike in either direction, but counts the batch in one
            block.upsample, block.downsample = None, block.upsample


class Denoiser(nn.Module):
    """A denoiser with float32 inputs and outputs around a network in any dtype.

    Args:
        model: of the dtype that the export computes in; some of its modules are replaced.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        replace_modules(model)
        self.network, self.dtype = model, dtype
        self.eval().requires_grad_(False)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """sample [N, C, H, W] float32, timestep [N], class_labels [N] -> [N, C, H, W] float32."""
        extra = () if class_labels is None else (class_labels,)
        output: torch.Tensor = self.network(sample.to(self.dtype), timestep, *extra, return_dict=False)[0]
        return output.to(torch.float32)


@dataclass(frozen=True)
class Signature:
    """What the exported network takes.

    Args:
        inputs: name -> a tensor for one sample, of the right shape and type.
        factor: heights and widths are multiples of it, where they are free.
    """

    inputs: dict[str, torch.Tensor]
    factor: int

    def describe(self, *, free_size: bool) -> dict[str, dict[str, Any]]:
        """Name -> type and shape, as the record and the model card say them."""
        described = {}
        for name, tensor in self.inputs.items():
            shape: list[int | str] = ["batch", *tensor.shape[1:]]
            if name == "sample" and free_size:
                shape[2:] = [f"{self.factor}*h", f"{self.factor}*w"]
            described[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}
        return described


def signature_of(model: nn.Module, scheduler: Any) -> Signature:
    """The inputs of a network.

    Timesteps are integers, as most schedulers count them; they are float32 where the network is told a
    noise level, or where the scheduler steps through fractions.

    Args:
        scheduler: of the pipeline, or None.
    """
    network: Any = model
    config = network.config
    inputs = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in example_inputs(model).items()
    }
    steps = getattr(scheduler, "timesteps", None)
    fractional = isinstance(steps, torch.Tensor) and steps.is_floating_point()
    discrete = config.time_embedding_type == "learned" or not fractional
    if config.time_embedding_type != "fourier" and discrete:
        inputs["timestep"] = inputs["timestep"].long()
    return Signature(inputs, 2 ** (len(config.block_out_channels) - 1))


def dynamic_shapes(signature: Signature, *, free_size: bool) -> dict[str, dict[int, Any]]:
    """Every input's free dimensions: the batch, and multiples of the factor for height and width."""
    batch = torch.export.Dim("batch")
    shapes: dict[str, dict[int, Any]] = {name: {0: batch} for name in signature.inputs}
    if free_size:
        factor = signature.factor
        shapes["sample"] |= {2: factor * torch.export.Dim("h"), 3: factor * torch.export.Dim("w")}
    return shapes


def trace(denoiser: Denoiser, signature: Signature) -> tuple[torch.export.ExportedProgram, bool]:
    """The network as a graph of PyTorch operators, batch free, height and width too if they can be.

    Returns:
        (program, whether height and width are free).

    Raises:
        GfpruneError: the network cannot be traced.
    """
    # two samples: a dimension of size one would be taken for a constant
    example = {name: torch.cat([tensor, tensor]) for name, tensor in signature.inputs.items()}
    refused: Exception | None = None
    for free_size in (True, False):
        shapes = dynamic_shapes(signature, free_size=free_size)
        try:
            with torch.no_grad():
                program = torch.export.export(denoiser, (), example, dynamic_shapes=shapes)
        except Exception as error:  # the tracer raises whatever the network's own code raises
            refused = error
            continue
        strip(program)
        return program, free_size
    assert refused is not None
    name = type(denoiser.network).__name__
    raise GfpruneError(f"{name} cannot be traced by torch.export: {first_line(refused)}") from refused


def strip(program: torch.export.ExportedProgram) -> None:
    """Drop what would carry this machine's paths, or Python objects, into a file."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    program.example_inputs = None
