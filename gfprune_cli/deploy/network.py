"""The network as it is exported: tensors in, one tensor out, no class of ours or of diffusers left in it.

    exported = traced(Denoiser(model, torch.float16), scheduler)
    exported.program                # a graph of PyTorch operators

Autoencoders are exported as what a deployed pipeline runs: their decoder.

Inputs and outputs are float32 in every dtype: a sampling loop keeps its state in float32 anyway, and the
same loop then runs every export.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.checkpoint.layout import is_autoencoder
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import UnevenGroupNorm
from gfprune_cli.deploy.graph import Graph
from gfprune_cli.deploy.halves import LatentDecoder
from gfprune_cli.deploy.signature import AREA, Signature, compact, larger, signature_of
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.table import added_arguments
from gfprune_cli.inputs.examples import Sizes

OUTPUT = "output"
FLOOR = 1e-15
HALF_MAX = 65504  # the largest float16
CLOSE = 1e-2  # of the largest output: two runs of the same arithmetic


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


class FloorLinearAttention:
    """Sana's linear attention (arXiv 2410.10629, section 2.2) with a floor under its denominator.

    diffusers adds 1e-15 to it instead. ONNX optimizers take that for an addition of zero and drop it, and a
    query of which ReLU leaves nothing is then zero over zero.
    """

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *context: Any, **more: Any) -> torch.Tensor:
        """[N, L, C] -> [N, L, C]; the sums are in float32."""
        query, key, value = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        query, key, value = (
            states.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2) for states in (query, key, value)
        )
        query, key = query.relu(), key.relu()
        weight = (query @ key.sum(2).unsqueeze(-1)).clamp_min(FLOOR)  # [N, heads, L, 1]
        mixed = (query @ (key.transpose(2, 3) @ value)) / weight
        output: torch.Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2).to(hidden_states.dtype))
        return output.clip(-HALF_MAX, HALF_MAX) if output.dtype == torch.float16 else output


def replace_modules(model: nn.Module) -> None:
    """Put modules that trace well in the place of those that do not; the function stays the same."""
    for name, module in list(model.named_modules()):
        if isinstance(module, UnevenGroupNorm):
            model.set_submodule(name, ConstantGroupNorm(module))
        elif isinstance(module, Upsample2D) and module.norm is None:
            model.set_submodule(name, AnyBatchUpsample(module))
        elif type(getattr(module, "processor", None)).__name__ == "SanaLinearAttnProcessor2_0":
            module.processor = FloorLinearAttention()
    for block in model.modules():
        if isinstance(block, ResnetBlock2D) and block.upsample is not None:
            # the block resamples input and state alike in either direction, but counts the batch in one
            block.upsample, block.downsample = None, block.upsample


class Denoiser(nn.Module):
    """A network with named inputs and one output, in float32, around a network in any dtype.

    Args:
        model: of the dtype that the export computes in; some of its modules are replaced.
        signature: of its inputs, or None for those of `signature_of`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, signature: Signature | None = None) -> None:
        super().__init__()
        check_outputs(model)
        replace_modules(model)
        self.network, self.dtype = model, dtype
        self.signature = signature or signature_of(model, None)
        self.eval().requires_grad_(False)

    @property
    def signature(self) -> Signature:
        """What `forward` takes."""
        return self._signature

    @signature.setter
    def signature(self, signature: Signature) -> None:
        def forward(**tensors: torch.Tensor) -> torch.Tensor:
            arguments = signature.keywords(signature.cast(tensors, self.dtype))
            output: torch.Tensor = self.network(**arguments, return_dict=False)[0]
            return output.to(torch.float32)

        # the tracer reads the names of the inputs here
        names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in signature.inputs]
        forward.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
        self._signature, self.forward = signature, forward


def check_outputs(model: nn.Module) -> None:
    """Refuse networks that have more than one output.

    Raises:
        GfpruneError: it adds to the states of another.
    """
    if added_arguments(model):
        raise GfpruneError(
            f"{type(model).__name__} returns a tensor for each state that it adds to, and the graphs written "
            "here have one output: use --format safetensors, or a runtime of PyTorch"
        )


def deployed(model: nn.Module) -> nn.Module:
    """The part of a model that a graph holds: all of a denoiser, the decoder of an autoencoder.

    Raises:
        GfpruneError: see `check_outputs`.
    """
    check_outputs(model)
    return LatentDecoder(model) if is_autoencoder(type(model).__name__) else model


@dataclass(frozen=True)
class Exported:
    """A traced network.

    Args:
        signature: at the sizes at which it was traced.
        free: input -> dimensions that are free.
    """

    program: torch.export.ExportedProgram
    signature: Signature
    free: Mapping[str, frozenset[int]]

    @property
    def labels(self) -> frozenset[str]:
        """The sizes that are free."""
        fixed = [
            labels
            for name, axes in self.signature.growth.items()
            for axis, labels in axes.items()
            if axis not in self.free[name]
        ]
        return self.signature.labels.difference(*fixed)

    @property
    def graph(self) -> Graph:
        """The network with the names that its class and `Signature.axis_name` give."""
        name = self.signature.axis_name
        axes = {key: {axis: name(key, axis) for axis in sorted(free)} for key, free in self.free.items()}
        return Graph(self.program, axes, {OUTPUT: {}})


def traced(denoiser: Denoiser, scheduler: Any, *, one_time: bool = False) -> Exported:
    """The network as a graph of PyTorch operators: batch free, and every size that can be.

    Sizes that look free are tried out, as a network may take another path for others. Where height and
    width are not, they are those that the network is made for.

    Args:
        one_time: see `signature_of`.

    Raises:
        GfpruneError: the network cannot be traced.
    """
    network = denoiser.network
    refused: Exception | None = None
    for sizes, wanted in (
        (compact(network, own=True), frozenset((*AREA, "text"))),
        (Sizes(text=compact(network, own=True).text), frozenset({"text"})),
        (Sizes(), frozenset[str]()),
    ):
        denoiser.signature = signature_of(network, scheduler, sizes, one_time=one_time)
        try:
            found = trace(denoiser, wanted & denoiser.signature.labels)
            if found.labels.issuperset(denoiser.signature.labels & wanted & set(AREA)):
                try_other_sizes(found, denoiser, scheduler)
                return found
        except GfpruneError:  # a signal may arrive in here
            raise
        except Exception as error:  # the tracer raises whatever the network's own code raises
            refused = error
    name = type(network).__name__
    reason = first_line(refused) if refused is not None else "its sizes depend on its inputs"
    raise GfpruneError(f"{name} cannot be traced by torch.export: {reason}") from refused


def trace(denoiser: Denoiser, labels: frozenset[str]) -> Exported:
    """Trace at the sizes of the signature; the sizes in `labels` are free, where the network lets them."""
    signature = denoiser.signature
    # two samples: a dimension of size one would be taken for a constant
    pair = {
        name: tensor if name in signature.shared else torch.cat([tensor, tensor])
        for name, tensor in signature.inputs.items()
    }
    program = program_of(denoiser, pair, dynamic_shapes(signature, labels))
    return Exported(program, signature, free_dimensions(program, signature))


def program_of(
    module: nn.Module, inputs: dict[str, torch.Tensor], shapes: dict[str, dict[int, Any]]
) -> torch.export.ExportedProgram:
    """What the tracer makes of a module with named inputs, ready to be written.

    Args:
        shapes: input -> its free dimensions.
    """
    with torch.no_grad():
        program = torch.export.export(module, (), inputs, dynamic_shapes=shapes)
    drop_idle_squeezes(program)
    strip(program)
    return program


def dynamic_shapes(signature: Signature, labels: frozenset[str]) -> dict[str, dict[int, Any]]:
    """Every input's free dimensions: the batch, multiples of an image's factor, others as they turn out."""
    batch = torch.export.Dim("batch")
    image = {
        "height": signature.factor * torch.export.Dim("h"),
        "width": signature.factor * torch.export.Dim("w"),
    }
    shapes: dict[str, dict[int, Any]] = {}
    for name in signature.inputs:
        shapes[name] = {} if name in signature.shared else {0: batch}
        for axis, grown in signature.growth[name].items():
            if grown <= labels:
                (first, *rest) = sorted(grown)
                plain = name == "sample" and not rest
                shapes[name][axis] = image[first] if plain else torch.export.Dim.AUTO
    return shapes


def free_dimensions(program: torch.export.ExportedProgram, signature: Signature) -> dict[str, frozenset[int]]:
    """Input -> the dimensions that the graph leaves free."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [nodes[str(name)].meta["val"] for name in program.graph_signature.user_inputs]
    return {
        name: frozenset(axis for axis, size in enumerate(tensor.shape) if not isinstance(size, int))
        for name, tensor in zip(signature.inputs, tensors, strict=True)
    }


def try_other_sizes(found: Exported, denoiser: Denoiser, scheduler: Any) -> None:
    """Run the graph with every free size larger, beside the network.

    Raises:
        ValueError: the outputs are not the same; anything that the graph raises at such sizes.
    """
    if not found.labels:
        return
    module: Any = found.program.module()
    signature = found.signature
    for label in sorted(found.labels):
        sizes = larger(signature.sizes, label, factor=2 * signature.factor)
        denoiser.signature = signature_of(denoiser.network, scheduler, sizes, one_time=signature.one_time)
        inputs = {
            name: torch.rand(tensor.shape, generator=generator(0, "trace", name))
            if tensor.is_floating_point()
            else tensor
            for name, tensor in denoiser.signature.inputs.items()
        }
        with torch.no_grad():
            expected, output = denoiser(**inputs), module(**inputs)
        if not torch.allclose(output, expected, rtol=0, atol=CLOSE * float(expected.abs().max())):
            raise ValueError(f"the graph is wrong at another {label}")
    denoiser.signature = signature


def drop_idle_squeezes(program: torch.export.ExportedProgram) -> None:
    """Remove squeezes of dimensions that are not one, which PyTorch passes over and ONNX refuses."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim:
            source, axis = node.args
            size = source.meta["val"].shape[axis]
            if not isinstance(size, int) or size != 1:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
    program.graph_module.recompile()


def strip(program: torch.export.ExportedProgram) -> None:
    """Drop what would carry this machine's paths, or Python objects, into a file."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    program.example_inputs = None
