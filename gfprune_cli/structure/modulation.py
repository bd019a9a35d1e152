"""Linear layers whose input depends on timestep and pooled conditions alone, never on a sample or a token.

    found = modulation_layers(network, run, rows)

The network runs with its samples and token states *hidden*: fake tensors stand in for them, which have a
shape and no values (`torch._subclasses.fake_tensor`). Whatever is computed from a fake tensor is fake, and
costs nothing; everything else is computed as usual. So a layer that receives numbers after all depends on
nothing that was hidden, whatever its name, and its inputs for a thousand timesteps cost no more than its own
path.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import FactoredLinear
from gfprune_cli.errors import GfpruneError
from gfprune_cli.structure.trace import gradients_as_before, hooked, is_attention, layer_hook

Hide = Callable[[torch.Tensor], torch.Tensor]
Run = Callable[[Hide], Any]  # calls a network, hiding what it is not to depend on
Visit = Callable[[str, Any, torch.Tensor, torch.Tensor], torch.Tensor | None]

OPERATIONS = 100_000  # of a pass: a minute or two


@dataclass(frozen=True)
class Table:
    """An embedding that was looked up with numbers: how many entries it has, and the [rows] it was given."""

    entries: int
    given: torch.Tensor


@dataclass
class Modulation:
    """What one pass with hidden samples showed.

    Args:
        inputs: layer -> [rows, in] what it received, in the order in which the layers ran.
        tables: embeddings looked up with what was not hidden.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)


def modulation_layers(network: nn.Module, run: Run, rows: int) -> Modulation:
    """Find every linear layer that is called with one row per sample, none of it from what `run` hides.

    Layers that are called several times count if they receive the same each time. Attention projections are
    left out, and so are layers that are factors already.

    Args:
        network: with its weights.
        run: calls it once.
        rows: samples of the call, those of both branches of guidance.
    """
    found = Modulation()
    seen: dict[str, list[torch.Tensor | None]] = {}

    def note(name: str, _layer: Any, x: torch.Tensor, _output: torch.Tensor) -> None:
        visible = not isinstance(x, FakeTensor) and x.shape[:-1].numel() == rows
        seen.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]) if visible else None)

    def look_up(module: Any, args: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and not isinstance(args[0], FakeTensor):
            found.tables.append(Table(module.num_embeddings, args[0].detach().flatten()))

    tables = (module for module in network.modules() if isinstance(module, nn.Embedding))
    looking = hooked(module.register_forward_pre_hook(look_up) for module in tables)
    with looking, visited(network, candidates(network), note):
        hidden_run(run)
    for name, calls in seen.items():
        first, *others = calls
        if first is not None and all(other is not None and torch.equal(first, other) for other in others):
            found.inputs[name] = first
    return found


def candidates(network: nn.Module) -> list[str]:
    """Plain linear layers, in the order of definition."""
    apart = {
        id(part)
        for module in network.modules()
        if is_attention(module) or isinstance(module, FactoredLinear)
        for part in module.modules()
    }
    return [
        name
        for name, module in network.named_modules()
        if type(module) is nn.Linear and id(module) not in apart
    ]


def hidden_run(run: Run, *, taped: bool = False) -> None:
    """Call a network with what it hides as fake tensors; `taped` for derivatives.

    Raises:
        GfpruneError: the network looks at values that are hidden, or fails in some other way.
    """
    try:
        with torch.set_grad_enabled(taped), Limited():
            run(FakeTensorMode(allow_non_fake_inputs=True).from_tensor)
    except GfpruneError:
        raise
    except Exception as error:  # networks of other people's making fail in any way
        raise GfpruneError(
            f"cannot tell which layers see timestep and conditions alone: {first_line(error)}; use --fold 0"
        ) from error


class Limited(TorchDispatchMode):
    """Ends a pass that takes its batch apart in Python: what runs for thousands of probes at once would take
    hours."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.operations > OPERATIONS:
            raise GfpruneError("the network takes batches apart, which is too slow to fold; use --fold 0")
        return func(*args, **(kwargs or {}))


def visited(network: nn.Module, names: Sequence[str], visit: Visit) -> AbstractContextManager[None]:
    """Call `visit(name, layer, input, output)` after each of these layers; what it returns is the output."""
    return hooked(layer_hook(name, network.get_submodule(name), visit, after=True) for name in names)


def feeders(network: nn.Module, run: Run, names: Sequence[str]) -> set[str]:
    """Those of some layers whose outputs others of them read, directly or through anything between.

    Read off autograd's tape: the weights in which the input of a layer has a derivative. It is never wound
    back, so it keeps no tensors: of weights held in half precision they would be copies in float32.
    """
    weights = {id(network.get_submodule(name).weight): name for name in names}
    found: set[str] = set()
    forgetting = torch.autograd.graph.saved_tensors_hooks(forget, forget)

    def trace(name: str, _layer: Any, x: torch.Tensor, _output: torch.Tensor) -> None:
        found.update(weights[key] for key in leaves_of(x.grad_fn) & weights.keys())

    with gradients_as_before(network), visited(network, names, trace), forgetting:
        network.requires_grad_(False)
        for name in names:
            network.get_submodule(name).weight.requires_grad_(True)
        hidden_run(run, taped=True)
    return found


def forget(_tensor: Any) -> Any:
    """Nothing, in the place of what a tape would keep."""


def leaves_of(node: Any) -> set[int]:
    """Ids of the tensors at which the tape behind a node begins."""
    waiting, seen, leaves = [node], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    return leaves


def mismatched(seen: Mapping[str, torch.Tensor], real: Mapping[str, torch.Tensor]) -> list[str]:
    """Layers whose inputs in a real pass are not those of the hidden one: they do depend on a sample.

    A network that writes what was hidden into a tensor of its own making can look so.
    """
    wrong = []
    for name, x in seen.items():
        other = real.get(name)
        if other is None or other.shape != x.shape or not torch.allclose(other, x, rtol=1e-3, atol=1e-5):
            wrong.append(name)
    return wrong
