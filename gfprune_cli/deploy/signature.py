"""What an exported network takes: its keyword arguments as named tensors, and the sizes that may be free.

    signature = signature_of(model, scheduler)
    output = model(**signature.keywords(tensors))     # tensors: name -> tensor, names as in signature.inputs

Nested arguments are taken apart: the entries of a dictionary keep their own names (`time_ids`), those of a
tuple are numbered (`image_rotary_emb_0`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import SequenceKey, tree_flatten_with_path, tree_unflatten

from gfprune_cli.deploy.halves import LatentDecoder, LatentEncoder
from gfprune_cli.diffusion.conditions import NESTED
from gfprune_cli.families.table import family_of
from gfprune_cli.inputs.examples import Sizes, example_inputs
from gfprune_cli.inputs.signature import in_tuples
from gfprune_cli.inputs.unknown_classes import RecordedNetwork

TIMESTEP = "timestep"
MASK = "encoder_attention_mask"  # of pipelines that mask the padding of a text
TEXT = "encoder_hidden_states"
AREA = ("frames", "height", "width")
LETTERS = {"frames": "f", "height": "h", "width": "w", "text": "text"}


@dataclass(frozen=True)
class Signature:
    """What a network takes.

    Args:
        inputs: name -> a tensor for one sample, of the right shape and type.
        keywords: named tensors -> keyword arguments of the network.
        growth: name -> dimension -> the sizes (fields of `Sizes`) that it grows with.
        shared: the inputs that are the same for every sample, without a batch dimension.
        factor: heights and widths are multiples of it, where they are free.
        sizes: what the inputs were made for.
        one_time: whether one timestep is given for the whole batch, a number without dimensions.
    """

    inputs: dict[str, torch.Tensor]
    keywords: Callable[[Mapping[str, Any]], dict[str, Any]]
    growth: Mapping[str, Mapping[int, frozenset[str]]]
    shared: frozenset[str]
    factor: int
    sizes: Sizes
    one_time: bool = False

    @property
    def sample(self) -> str:
        """The name of the noisy sample: the first of the network's arguments."""
        return next(iter(self.inputs))

    @property
    def tables(self) -> frozenset[str]:
        """The names of what has no row for a sample: ids, angles."""
        return frozenset(name for name, tensor in self.inputs.items() if tensor.shape[:1] != (1,))

    @property
    def labels(self) -> frozenset[str]:
        """The sizes that an input grows with."""
        return frozenset().union(*(names for axes in self.growth.values() for names in axes.values()))

    def cast(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What a network in `dtype` computes on: states and samples; timesteps, ids and angles stay."""
        return {
            name: tensor.to(dtype)
            if tensor.is_floating_point() and name != TIMESTEP and name not in self.tables
            else tensor
            for name, tensor in tensors.items()
        }

    def axis_name(self, name: str, axis: int) -> str:
        """A free dimension in words: batch, 8*h, text, or tokens where it grows with several sizes."""
        labels = self.growth[name].get(axis, frozenset())
        if not labels:
            return "batch"
        if len(labels) > 1:
            return "tokens"
        (label,) = labels
        factor = self.factor if label in ("height", "width") else 1
        more = self.inputs[name].shape[axis] - (getattr(self.sizes, label) or self.inputs[name].shape[axis])
        return (f"{factor}*" if factor > 1 else "") + LETTERS[label] + (f"+{more}" if more else "")


def taken_apart(name: str, value: Any) -> tuple[Callable[[Mapping[str, Any]], Any], dict[str, torch.Tensor]]:
    """What puts an argument together again from named tensors, and its tensors by name."""
    leaves, spec = tree_flatten_with_path(value)
    named = [(name_of(name, path), leaf) for path, leaf in leaves]

    def together(tensors: Mapping[str, Any]) -> Any:
        parts = [tensors[key] if isinstance(leaf, torch.Tensor) else leaf for key, leaf in named]
        return tree_unflatten(parts, spec)

    return together, {key: leaf for key, leaf in named if isinstance(leaf, torch.Tensor)}


def name_of(name: str, path: Iterable[Any]) -> str:
    """Of what lies within an argument: its own key, or the number of its place."""
    for key in path:
        name = f"{name}_{key.idx}" if isinstance(key, SequenceKey) else str(key.key)
    return name


def common_slots(network: RecordedNetwork) -> frozenset[str]:
    """The tensors that a pipeline passes once for the whole batch, also where they look like those of one."""
    found: set[str] = set()
    for keyword in network.shared:
        outer, _, inner = keyword.partition(NESTED)
        value = network.inputs[outer]
        name = f"{outer}_{inner}" if isinstance(value, list) and inner else inner or outer
        entry = value[int(inner)] if isinstance(value, list) and inner else value[inner] if inner else value
        found |= taken_apart(name, entry)[1].keys()
    return frozenset(found)


def example(network: nn.Module, sizes: Sizes) -> dict[str, Any]:
    """Keyword arguments for one sample: those of `example_inputs`, and what pipelines give beside them."""
    if isinstance(network, LatentDecoder | LatentEncoder):
        return network.example(sizes)
    if isinstance(network, RecordedNetwork):
        return network.inputs
    found = example_inputs(network, sizes)
    family = family_of(network)
    if family is not None and family.masked:
        found[MASK] = torch.ones_like(found[TEXT][..., 0])
    return found


def factor_of(network: Any) -> int:
    """What heights and widths of samples are multiples of."""
    if isinstance(network, LatentDecoder):
        return 1
    config = network.config
    if "block_out_channels" in config:
        return int(2 ** (len(config.block_out_channels) - 1))
    patch = config.get("patch_size", 1)
    return int(patch[-1] if isinstance(patch, tuple | list) else patch)


def signature_of(
    network: nn.Module, scheduler: Any, sizes: Sizes | None = None, *, one_time: bool = False
) -> Signature:
    """The inputs of a network.

    Timesteps are integers, as most schedulers count them; they are float32 where the network is told a
    noise level, or where the scheduler steps through fractions.

    Args:
        scheduler: of the pipeline, or None.
        sizes: other than those that the network is made for.
        one_time: take a single timestep, in float32, so that any scheduler can step through fractions.

    Raises:
        GfpruneError: the inputs of this class are not known.
    """
    sizes = sizes or Sizes()
    keywords, tensors = taken_apart("", example(network, sizes))
    inputs = {name: one.float() if one.is_floating_point() else one for name, one in tensors.items()}
    if TIMESTEP in inputs:
        time = inputs[TIMESTEP].squeeze() if one_time else inputs[TIMESTEP]
        inputs[TIMESTEP] = time.long() if counts_steps(network, scheduler) and not one_time else time.float()
    common = common_slots(network) if isinstance(network, RecordedNetwork) else frozenset[str]()
    shared = common | {name for name, tensor in inputs.items() if tensor.shape[:1] != (1,)}
    return Signature(inputs, keywords, growth_of(network), shared, factor_of(network), sizes, one_time)


@torch.no_grad()
def workable(network: nn.Module, scheduler: Any, dtype: torch.dtype = torch.float32) -> Signature:
    """The inputs at small sizes, if the network, which is in `dtype`, takes them; else at its own."""
    small = signature_of(network, scheduler, compact(network, own=True))
    try:
        network(**small.keywords(small.cast(small.inputs, dtype)), **in_tuples(network))
    except (RuntimeError, ValueError, IndexError):
        return signature_of(network, scheduler)
    return small


def counts_steps(network: Any, scheduler: Any) -> bool:
    """Whether the network is told whole numbers."""
    family, kind = family_of(network), network.config.get("time_embedding_type")
    if kind == "learned":
        return True
    if kind == "fourier" or (family is not None and family.time_factor != 1):
        return False
    steps = getattr(scheduler, "timesteps", None)
    return not (isinstance(steps, torch.Tensor) and steps.is_floating_point())


def growth_of(network: nn.Module) -> dict[str, dict[int, frozenset[str]]]:
    """Name -> dimension -> the sizes that it grows with, found by asking for inputs of other sizes."""
    base = compact(network, own=False)
    shapes = {
        label: {name: one.shape for name, one in taken_apart("", example(network, sizes))[1].items()}
        for label, sizes in ((label, larger(base, label)) for label in LETTERS)
    }
    found: dict[str, dict[int, frozenset[str]]] = {}
    for name, tensor in taken_apart("", example(network, base))[1].items():
        grown = [
            (axis, frozenset(label for label in LETTERS if shapes[label][name][axis] != size))
            for axis, size in enumerate(tensor.shape)
        ]
        found[name] = {axis: labels for axis, labels in grown if labels}
    return found


def compact(network: nn.Module, *, own: bool) -> Sizes:
    """Small sizes, at which a network whose sizes are free is traced and checked.

    Args:
        own: convolutional networks keep the height and width that their configuration names.
    """
    config: Any = network.config
    factor = factor_of(network)
    height = width = 4 * factor
    size = config.get("sample_size")
    if isinstance(network, LatentEncoder):  # made for images, whose detail would only cost time
        own = False
    if own and "block_out_channels" in config and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        if isinstance(network, LatentDecoder):
            height, width = network.example(Sizes())["latent"].shape[2:]
    return Sizes(frames=3, height=height, width=width, text=16)


def larger(sizes: Sizes, *labels: str, factor: int = 8) -> Sizes:
    """Sizes of which some are larger by `factor`, which must be a multiple of the network's own."""
    known = {label: getattr(sizes, label) for label in labels}
    return replace(sizes, **{label: size + factor for label, size in known.items() if size is not None})
