"""What a network takes, from the names of its arguments and its configuration, where no family says it.

    inputs = inputs_by_name(model)

Arguments that have no default are filled by name (`named_values.py`), as wide as the layers that read them
(`widths.py`). For the sample the layouts that published networks have are tried in turn, and the first with
which the network answers in the form of its sample is taken.
"""

import inspect
import linecache
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from traceback import extract_tb, walk_tb
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.diffusion.conditions import first_tensor
from gfprune_cli.errors import GfpruneError, Interrupted
from gfprune_cli.families.family import Inputs, Request, Sizes
from gfprune_cli.inputs.arguments import SAMPLE_NAMES
from gfprune_cli.inputs.named_values import TEXT, Filling, Sample, is_named, value_of
from gfprune_cli.inputs.widths import CONVOLUTIONS, SMALL_MARK, Wanted, marked_inputs, reading
from gfprune_cli.runtime.device import out_of_memory

EDGE, FRAMES, LENGTH = 16, 4, 64  # latent height and width, latent frames, length of sounds
LARGEST = 512  # height and width that a configuration may say
FRAME_KEYS = ("video_length", "sample_frames")
# with defaults, and filled nevertheless: what every network that takes them is given
USUAL = ("encoder_hidden_states", "context", "cap_feats", "timestep", "img_ids", "txt_ids")
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# with None for a default, and filled where the network answers then: what pipelines give
BESIDE = re.compile(r"(encoder_)?attention_mask|encoder_hidden_states_mask|image_rotary_emb")
# what PyTorch says of sizes that do not go together
MISMATCH = re.compile(r"Expected size (\d+) but got size (\d+)|tensor a \((\d+)\) .* tensor b \((\d+)\)")
ATTEMPTS = 32  # calls with one layout, each of which may say one thing more
KINDS: Mapping[type[nn.Module], str] = {
    nn.Conv1d: "sound", nn.Conv2d: "picture", nn.Conv3d: "video", nn.Linear: "tokens"
}  # fmt: skip


def inputs_by_name(model: nn.Module, sizes: Sizes) -> Inputs:
    """Keyword arguments of `forward` for one sample of zeros, on the model's device.

    Raises:
        GfpruneError: an argument that the configuration does not tell, or no layout that the network takes.
    """
    name, request = type(model).__name__, Request(model, sizes)
    sample = next((one for one in parameters_of(model) if one in SAMPLE_NAMES), None)
    if sample is None:
        raise GfpruneError(f"{name} takes its noisy sample by no name that is known: its pipeline is needed")
    failures: list[tuple[int, Exception]] = []
    for layout in sample_layouts(request):
        filling = Filling(request, layout)
        try:
            return answered(filling, sample)
        except GfpruneError:  # a signal may arrive in here
            raise
        except Exception as raised:  # a layout that the network's own code does not expect can fail anywhere
            if out_of_memory(raised):
                raise
            failures.append((len(filling.reached), raised))
    why = first_line(max(failures, key=lambda failure: failure[0])[1])  # of the layout that went furthest
    raise GfpruneError(f"the inputs of {name} are not known ({why}): its pipeline is needed")


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def sample_layouts(request: Request) -> Iterator[Sample]:
    """Of pictures, videos with channels or frames first or channels last, sounds, tokens; likely ones first.

    As wide as the configuration says; where it says nothing or something else, as the layers that read the
    sample, or as what the last layer writes.
    """
    channels = request.config.get("in_channels")
    told = channels if isinstance(channels, int) else SMALL_MARK
    for width in dict.fromkeys((told, last_width(request.model))):
        readers = [KINDS[type(layer)] for layer in request.model.modules() if reads(layer, width)]
        for kind in dict.fromkeys((*readers, *KINDS.values(), "frames", "last", "vector")):
            yield from layouts_of(request, kind, width)


def reads(layer: Any, channels: int) -> bool:
    """Whether a layer may be the one that reads the sample."""
    known = reading(layer) if type(layer) in KINDS else None
    return known is not None and channels in (SMALL_MARK, known[1])


def last_width(model: nn.Module) -> int:
    """How much the last of its layers writes."""
    layers = [
        layer for layer in model.modules() if isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))
    ]
    last: Any = layers[-1]
    return int(last.out_features if isinstance(last, nn.Linear) else last.out_channels)


def layouts_of(request: Request, kind: str, width: int) -> Iterator[Sample]:
    """The samples of one kind."""
    config = request.config
    edge = config.get("sample_size")
    frames = [config[key] for key in FRAME_KEYS if isinstance(config.get(key), int)]
    high, wide = request.area(edge if isinstance(edge, int) and edge <= LARGEST else EDGE)
    long = request.sizes.frames or (frames[0] if frames else FRAMES)
    area, grid = (high, wide), grid_of(config, (long, high, wide))
    if kind == "sound":
        for length in (edge if isinstance(edge, int) else LENGTH, request.sizes.text or TEXT):
            yield Sample((1, width, length), 1, (1, 1, length))
    elif kind == "tokens":
        long = long if "num_frames" in parameters_of(request.model) else 1
        yield Sample((1, long * high * wide, width), 2, (long, *area))
    elif kind == "vector":
        yield Sample((1, width), 1, (1, 1, 1))
    elif kind == "picture":
        yield Sample((1, width, *area), 1, (1, *grid[1:]))
    else:
        axis = {"video": 1, "frames": 2, "last": 4}[kind]
        shape = [1, long, *area]
        shape.insert(axis, width)
        for times, texts in (((1,), 1), ((1, long), 1), ((1,), long)):
            yield Sample(tuple(shape), axis, grid, times, texts)


def grid_of(config: Any, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, height and width in tokens."""
    patch = config.get("patch_size") or 1
    depth = config.get("patch_size_t") or 1
    by_axis = tuple(patch)[-3:] if isinstance(patch, list | tuple) else (depth, patch, patch)
    by_axis = (*(1,) * (3 - len(by_axis)), *by_axis)
    return tuple(size // part for size, part in zip(sizes, by_axis, strict=True))


def answered(filling: Filling, sample: str) -> Inputs:
    """The arguments with which the network answers in the form of its sample, and with most of its layers.

    Raises:
        GfpruneError: an argument is not known; any other: what the network's own code raises.
    """
    model, layout = filling.request.model, filling.sample
    if layout.shape[layout.axis] != SMALL_MARK:
        filling.widths[sample] = layout.shape[layout.axis]
    parameters = {name: one for name, one in parameters_of(model).items() if name != sample}
    given = [name for name, one in parameters.items() if is_given(name, one, filling.config)]
    inputs = asked_until_answered(filling, sample, given)
    layers = {layer for layer in model.modules() if reading(layer) is not None}
    for name, parameter in parameters.items():
        usual, reached = BESIDE.fullmatch(name) is not None, set(filling.reached)
        wanted = usual or bool(layers - reached)
        if not wanted or name in inputs or parameter.default is not None or not is_named(name):
            continue
        trial = replace(filling, widths=dict(filling.widths))
        try:
            more = asked_until_answered(trial, sample, [*(one for one in inputs if one != sample), name])
        except Interrupted:
            raise
        except Exception:  # the network does not go on with it
            more = {}
        if name in more and (usual or set(trial.reached) - reached):
            filling, inputs = trial, more
    return inputs


def asked_until_answered(filling: Filling, sample: str, given: list[str]) -> Inputs:
    """The arguments `given`, and those that turn out not to be as optional as their defaults.

    A call that fails may say what it lacks: a width, or an argument.
    """
    model, parameters = filling.request.model, parameters_of(filling.request.model)
    for _ in range(ATTEMPTS):
        filling.asked.clear()
        shape = filling.sample.of_width(filling.width(sample, small=True))
        inputs = {sample: filling.request.zeros(*shape)} | {name: value_of(name, filling) for name in given}
        try:
            with torch.no_grad(), marked_inputs(model, filling.asked) as filling.reached:
                found = first_tensor(model(**inputs, **in_tuples(model)))
        except Exception as raised:
            wanted = raised if isinstance(raised, Wanted) else joined_width(raised, filling.asked)
            if wanted is not None:
                filling.widths[wanted.name] = wanted.width
                continue
            lacking = [name for name in lacked(model, raised) if name in parameters and name not in given]
            if not lacking:
                raise
            given = given + ([name for name in lacking if is_named(name)] or lacking)
            continue
        unread = {name for name in filling.asked if name in given and has_default(parameters[name])}
        if not filling.asked and has_form(found.shape, shape):
            return inputs
        if not unread:
            raise ValueError(f"it answers {list(found.shape)} to {list(shape)}")
        given = [name for name in given if name not in unread]
    raise ValueError("it cannot be told what it takes")


def joined_width(raised: Exception, asked: Mapping[str, int]) -> Wanted | None:
    """The width of an argument that is joined to others before any layer has read it."""
    told = MISMATCH.search(str(raised))
    sizes = [int(size) for size in told.groups() if size] if told else []
    found = [(name, size) for name, mark in asked.items() for size in sizes if mark in sizes and size != mark]
    return Wanted(*found[0]) if found and found[0][1] not in asked.values() else None


def is_given(name: str, parameter: inspect.Parameter, config: Any) -> bool:
    """Whether an argument is filled from the start: it has no default, or is switched on."""
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        return False
    if name == "guidance":
        return bool(config.get("guidance_embeds"))
    return not has_default(parameter) or name in USUAL


def has_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is not parameter.empty


def has_form(found: torch.Size, shape: tuple[int, ...]) -> bool:
    """Whether an answer has the form of a sample of this shape, but for the width of one axis."""
    alike = [one == other for one, other in zip(found, shape, strict=False)]
    return len(found) == len(shape) and found[0] == 1 and sum(alike) >= len(shape) - 1


def lacked(model: nn.Module, raised: Exception) -> list[str]:
    """Names in the statement of `forward` that fails on a None."""
    if "None" not in str(raised):
        return []
    found: list[str] = []
    trace = raised.__traceback__
    for (frame, _), place in zip(walk_tb(trace), extract_tb(trace), strict=True):
        if frame.f_locals.get("self") is model and frame.f_code.co_name == "forward":
            lines = range(place.lineno or 0, (place.end_lineno or 0) + 1)
            statement = " ".join(linecache.getline(place.filename, number) for number in lines)
            found = [name for name in re.findall(r"\w+", statement) if frame.f_locals.get(name, 0) is None]
    return list(dict.fromkeys(found))


def in_tuples(model: Any) -> dict[str, bool]:
    return {"return_dict": False} if "return_dict" in parameters_of(model) else {}
