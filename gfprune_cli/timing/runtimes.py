"""What runs a network where it will serve: a row for each runtime."""

import copy
import gc
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gfprune_cli.deploy import onnx, openvino
from gfprune_cli.deploy.format import require_packages
from gfprune_cli.deploy.network import Denoiser, trace
from gfprune_cli.deploy.parity import Runner
from gfprune_cli.deploy.signature import Signature, signature_of
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.families.family import Sizes
from gfprune_cli.inputs.signature import in_tuples
from gfprune_cli.outputs.durable import check_space
from gfprune_cli.runtime.device import HALF, Precision, as_compiled
from gfprune_cli.runtime.memory import available, parameter_count
from gfprune_cli.timing import graphs
from gfprune_cli.timing.kinds import ATTENTION, Kind
from gfprune_cli.timing.stopwatch import Call, layer_seconds

FLOAT, GIB = 4, 1 << 30
# measured at 38 M and 860 M parameters in ONNX Runtime: 4.3 copies, one of them of the run
EXPORTED: dict[str, Any] = dict(cpu_only=True, copies=3.3, files=1.0)
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Bench:
    """Where and on what networks are timed.

    Args:
        runtime: a name in `RUNTIMES`.
        batch: samples of one evaluation.
        sizes: of a sample; the network's own where they are not said.
    """

    runtime: str
    device: torch.device
    precision: Precision
    batch: int
    sizes: Sizes

    @property
    def dtype(self) -> torch.dtype:
        return HALF.get(self.precision, torch.float32)

    def signature(self, network: nn.Module) -> Signature:
        return signature_of(network, None, self.sizes)

    def tensors(self, network: nn.Module) -> dict[str, torch.Tensor]:
        """One batch of what a network takes, by the names of its signature; noise in the place of zeros."""
        signature = self.signature(network)
        found = {}
        for name, tensor in signature.inputs.items():
            if name not in signature.shared:
                tensor = tensor.expand(self.batch, *tensor.shape[1:]).contiguous()
            found[name] = torch.randn_like(tensor) if name == signature.sample else tensor
        return found

    def inputs(self, network: nn.Module) -> dict[str, Any]:
        """Keyword arguments of one evaluation, in the type of the network as it is."""
        signature = self.signature(network)
        dtype = next(network.parameters()).dtype
        return signature.keywords(signature.cast(self.tensors(network), dtype))

    def layer_seconds(self, kind: Kind, out: int, into: int) -> float:
        """Of one layer of random weights at these widths, alone."""
        runtime = RUNTIMES[self.runtime]
        replayed = runtime.replayed and self.device.type == "cuda"
        return layer_seconds(runtime.layer(self, kind, out, into), self.device, replayed=replayed)

    def network(self, network: nn.Module) -> Call:
        """One evaluation of a network."""
        return RUNTIMES[self.runtime].network(self, network)

    def end(self) -> None:
        """Give back what the runtime keeps of networks."""
        RUNTIMES[self.runtime].end()


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One runtime.

    Args:
        layer: (bench, kind, outputs, inputs) -> a call of one such layer.
        network: (bench, network) -> a call of the whole.
        packages: that it needs beside gfprune.
        replayed: on CUDA it replays what it launched once.
        copies: of the dense network's weights, in float32, that it holds at most.
        files: of these, on a disk.
        cpu_only: it is timed on the CPU in float32.
        end: gives back what it keeps.
    """

    layer: Callable[[Bench, Kind, int, int], Call]
    network: Callable[[Bench, nn.Module], Call]
    packages: tuple[str, ...] = ()
    replayed: bool = False
    copies: float = 2.0
    files: float = 0.0
    cpu_only: bool = False
    end: Callable[[], object] = lambda: None

    def require(self, bench: Bench) -> None:
        """Refuse what cannot be timed here.

        Raises:
            UsageError: with what to do.
        """
        require_packages("--runtime", bench.runtime, self.packages)
        if self.cpu_only and (bench.device.type != "cpu" or bench.precision != "fp32"):
            raise UsageError(
                f"--runtime {bench.runtime} is timed on the CPU in fp32: add --device cpu --precision fp32, "
                "or time it where it serves with gfprune analyze --times-out"
            )

    def require_room(self, bench: Bench, network: nn.Module) -> None:
        """Refuse networks that are too large to be timed here, beside the weights of the run.

        Raises:
            GfpruneError: with what is needed, and what there is.
        """
        weights = FLOAT * parameter_count(network)
        need, free = (self.copies + 1) * weights, available(bench.device)
        if need > free:
            raise GfpruneError(
                f"timing networks of this size in {bench.runtime} needs about {need / GIB:.1f} GiB on"
                f" {bench.device.type}, and {free / GIB:.1f} GiB are free: measure the times on a larger"
                " machine with gfprune analyze --times-out, and give them with --times"
            )
        if self.files:
            check_space(Path(tempfile.gettempdir()) / "network", int(self.files * weights))


def eager_layer(bench: Bench, kind: Kind, out: int, into: int) -> Call:
    random = partial(torch.randn, device=bench.device, dtype=bench.dtype)
    shape = kind.weight_shape(out, into)
    given = random(kind.shape[0], out if kind.operator == "depthwise" else into, *kind.shape[1:])
    if kind.operator == ATTENTION:
        batch, queries = kind.shape
        heads = kind.heads(out)
        query = random(batch, heads, queries, out // heads)
        key, value = (random(batch, heads, kind.keys, out // heads) for _ in range(2))
        return partial(F.scaled_dot_product_attention, query, key, value)
    weight, bias = random(*shape), random(out)
    if kind.operator == "linear":
        return partial(F.linear, random(*kind.shape, into), weight, bias)
    if bench.device.type == "cuda" and len(kind.kernel) == 2:
        given, weight = (x.contiguous(memory_format=torch.channels_last) for x in (given, weight))
    groups = out if kind.operator == "depthwise" else kind.groups
    convolve = CONVOLVE[len(kind.kernel)]
    return partial(convolve, given, weight, bias, kind.stride, kind.padding, kind.dilation, groups)


def placed(bench: Bench, network: nn.Module) -> Any:
    """The network as it would be deployed: on the device, in its type, NHWC where convolutions want it."""
    found: Any = nn.Module.to(network.eval().requires_grad_(False), bench.device, bench.dtype)
    return found.to(memory_format=torch.channels_last) if bench.device.type == "cuda" else found


def torch_network(bench: Bench, network: nn.Module, *, compiled: bool = False) -> Call:
    found = placed(bench, network)
    called = as_compiled(found, bench.device) if compiled else found
    return partial(called, **bench.inputs(found), **in_tuples(found))


def exported_network(load: Callable[[Path, int], Runner], bench: Bench, network: nn.Module) -> Call:
    """Export to ONNX and load the file, for so many threads; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="gfprune-") as folder:
        write_network(Path(folder), bench, network)
        gc.collect()  # traced programs hold weights in cycles
        run = load(Path(folder) / onnx.FILE, torch.get_num_threads())
    return partial(run, bench.tensors(network))


def write_network(folder: Path, bench: Bench, network: nn.Module) -> None:
    """Export to ONNX. What is traced is a copy, but for the weights."""
    own: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    denoiser = Denoiser(copy.deepcopy(network, own), torch.float32, bench.signature(network))
    onnx.write_onnx(folder, trace(denoiser, frozenset()).graph, onnx.DEFAULT_OPSET)


def exported_layer(load: Callable[..., Call], _bench: Bench, kind: Kind, out: int, into: int) -> Call:
    """The same of one layer as a graph."""
    return load(*graphs.layer_graph(kind, out, into), torch.get_num_threads())


RUNTIMES: Mapping[str, Runtime] = {
    "eager": Runtime(layer=eager_layer, network=torch_network),
    # the products of a compiled network are those of an eager one; what it fuses lies between them
    "compile": Runtime(
        layer=eager_layer,
        network=partial(torch_network, compiled=True),
        replayed=True,
        end=torch.compiler.reset,
    ),
    "onnx": Runtime(
        layer=partial(exported_layer, graphs.in_onnx_runtime),
        network=partial(exported_network, onnx.run_onnx),
        packages=onnx.PACKAGES,
        **EXPORTED,
    ),
    "openvino": Runtime(
        layer=partial(exported_layer, graphs.in_openvino),
        network=partial(exported_network, openvino.run_openvino),
        packages=openvino.FORMAT.packages,
        **EXPORTED,
    ),
}
