"""One forward pass through any network, seen by Torch-Pruning's dependency graph and by hooks."""

import gc
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch_pruning
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from gfprune_cli.checkpoint.files import first_line, quoted
from gfprune_cli.diffusion.conditions import first_tensor
from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.table import added_arguments
from gfprune_cli.structure.trace import Trace, gradients_as_before, hooked, observe


def dependency_graph(model: nn.Module, inputs: Mapping[str, Any], trace: Trace) -> Any:
    """Trace one forward pass, which also fills `trace`.

    Raises:
        GfpruneError: the network, or the library that reads its graph, fails; the running module is named.
    """
    graph = torch_pruning.DependencyGraph()
    running: list[str] = []
    try:
        with (
            hooks_as_before(model),
            gradients_as_before(model),
            running_modules(model) as running,
            known_widths(),
            traceable_resampling(),
            sdpa_kernel(SDPBackend.MATH),
            torch.enable_grad(),
        ):
            for _ in observe(model, trace):
                pass
            model.requires_grad_(True)  # the graph is read off autograd's tape
            graph.build_dependency(
                model,
                example_inputs=dict(inputs),
                # products of their own: the last layers' channels are known to reach the outputs
                forward_fn=lambda network, given: [found * 1 for found in outputs_of(network, given)],
                verbose=False,
            )
    except Exception as error:  # networks of other people's making fail in any way
        where = f" at {quoted(running[-1])}" if running and running[-1] else ""
        raise GfpruneError(f"cannot trace {type(model).__name__}{where}: {first_line(error)}") from error
    return graph


@contextmanager
def hooks_as_before(model: nn.Module) -> Iterator[None]:
    """Remove the forward hooks that were added meanwhile; Torch-Pruning leaves its own when a pass fails."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, known in before.items():
            for key in module._forward_hooks.keys() - known:
                del module._forward_hooks[key]


@contextmanager
def tables_as_before(model: nn.Module) -> Iterator[None]:
    """Put back the attributes of helpers that are no modules: tables that they keep for the next pass lie on
    the device of this one."""
    helpers = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if type(value).__module__.startswith("diffusers.models") and not isinstance(value, nn.Module)
    ]
    before = [(vars(helper), dict(vars(helper))) for helper in helpers if hasattr(helper, "__dict__")]
    try:
        yield
    finally:
        for attributes, known in before:
            attributes.clear()
            attributes.update(known)


def outputs_of(network: nn.Module, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The one tensor that a network predicts, or all that it adds to the states of another."""
    flag = {"return_dict": False} if "return_dict" in inspect.signature(network.forward).parameters else {}
    # networks may empty the lists of features that they are given
    given = {name: list(value) if isinstance(value, list) else value for name, value in inputs.items()}
    returned = network(**given, **flag)
    if not added_arguments(network):
        return [first_tensor(returned)]
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor)]


@contextmanager
def running_modules(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose forward is under way, innermost last; after an error, where it happened."""
    running: list[str] = []

    def leave(_module: Any, _inputs: Any, _output: Any) -> None:
        running.pop()

    def hooks() -> Iterator[Any]:
        for name, module in model.named_modules():
            yield module.register_forward_pre_hook(lambda _m, _i, name=name: running.append(name))
            yield module.register_forward_hook(leave)

    with hooked(hooks()):
        yield running


@contextmanager
def known_widths() -> Iterator[None]:
    """Infer the width of each operation once.

    Torch-Pruning walks every path back to a layer, and gives up after a number of steps: long chains of sums
    of two, as residual blocks in space and in time make, have more paths than that.
    """
    shapes = torch_pruning.dependency.shape_infer
    infer, widths = shapes.infer_out_channels_recursively, dict[Any, int | None]()

    def width(graph: Any, node: Any, recursive_depth: list[int]) -> int | None:
        if node not in widths:
            widths[node] = infer(graph, node, [0])
        return widths[node]

    with patch.object(shapes, "infer_out_channels_recursively", width):
        yield


@contextmanager
def whole_groups() -> Iterator[None]:
    """Read groups with every pair of (position, root), without computing all index mappings anew for each.

    Merging keeps one root per position, and so loses that the two halves of a gated projection meet in one
    channel. The mappings depend on the graph alone, which does not change while it is read.
    """
    group = torch_pruning.dependency.group.Group
    collecting = gc.isenabled()
    gc.disable()  # millions of small tuples, all of them freed by their counts
    with (
        patch.object(group, "add_and_merge", group.add_dep),
        patch.object(torch_pruning.dependency.index_mapping, "update_index_mapping"),
    ):
        try:
            yield
        finally:
            if collecting:
                gc.enable()


@contextmanager
def traceable_resampling() -> Iterator[None]:
    """Let FIR resampling keep its channel axis while tracing.

    diffusers folds channels into the batch to filter them one by one, and the dependency graph loses them
    in the fold. Only shapes and channel order matter to a trace, so nearest-neighbour resampling serves.
    """

    def resample(
        tensor: torch.Tensor, kernel: torch.Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
    ) -> torch.Tensor:
        size = [(length * up + sum(pad) - kernel.shape[0]) // down + 1 for length in tensor.shape[-2:]]
        return nn.functional.interpolate(tensor, size=size)

    with (
        patch("diffusers.models.upsampling.upfirdn2d_native", resample),
        patch("diffusers.models.downsampling.upfirdn2d_native", resample),
    ):
        yield
