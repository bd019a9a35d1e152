"""What a network takes, from the names of its arguments and its configuration, where no family says it.

    inputs = inputs_by_name(model)

Arguments that have no default are filled by name; for the sample the layouts that published networks have are
tried in turn, and the first with which the network answers in the form of its sample is taken.
"""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.diffusion.conditions import first_tensor
from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.family import Inputs, Request, Sizes
from gfprune_cli.runtime.device import out_of_memory

EDGE, FRAMES, TEXT = 16, 4, 8  # latent height and width, latent frames, text tokens
SAMPLES = ("hidden_states", "sample", "x")
TIMES = ("timestep", "timesteps", "t", "r_timestep", "timestep_r", "guidance")
STATES = ("encoder_hidden_states", "context", "cap_feats")
POOLED = ("pooled_projections", "pooled_text_embeds", "y")
# keys of configurations: of the width of text states, and of pooled ones
TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "cross_attention_dim", "text_embed_dim", "text_dim",
               "cap_feat_dim", "context_in_dim", "text_states_dim", "encoder_hidden_states_dim",
               "caption_projection_dim")  # fmt: skip
POOLED_WIDTHS = ("pooled_projection_dim", "pooled_text_dim", "pooled_dim")
AXES = ("axes_dims_rope", "axes_dim", "axes_dims", "rope_axes_dim")
SIZES = ("original_size", "target_size", "crop_coords")
Shape = tuple[int, ...]


def inputs_by_name(model: nn.Module, sizes: Sizes) -> Inputs:
    """Keyword arguments of `forward` for one sample of zeros, on the model's device.

    Raises:
        GfpruneError: an argument that the configuration does not tell, or no layout that the network takes.
    """
    name, request = type(model).__name__, Request(model, sizes)
    errors: list[Exception] = []
    for shape in sample_layouts(request):
        inputs = arguments_for(request, shape)
        try:
            with torch.no_grad():
                found = first_tensor(model(**inputs, **in_tuples(model)))
        except GfpruneError:  # a signal may arrive in here
            raise
        except Exception as raised:  # a layout that the network's own code does not expect can fail anywhere
            if out_of_memory(raised):
                raise
            errors.append(raised)
            continue
        if (
            found.ndim == len(shape)
            and found.shape[0] == 1
            and math.prod(found.shape) % math.prod(shape) == 0
        ):
            return inputs
        errors.append(ValueError(f"it answers {list(found.shape)} to {list(shape)}"))
    why = first_line(errors[0]) if errors else "its configuration has no in_channels"
    raise GfpruneError(f"the inputs of {name} are not known ({why}): its pipeline is needed")


def in_tuples(model: Any) -> dict[str, bool]:
    return {"return_dict": False} if "return_dict" in inspect.signature(model.forward).parameters else {}


def sample_layouts(request: Request) -> Iterator[Shape]:
    """Shapes of the sample: pictures, videos with channels or frames first, tokens; likely ones first."""
    channels = request.config.get("in_channels")
    if not isinstance(channels, int):
        return
    edge = request.config.get("sample_size")
    height, width = request.area(edge if isinstance(edge, int) else EDGE)
    frames = request.sizes.frames or FRAMES
    by_kind: dict[Any, Shape] = {
        nn.Conv2d: (1, channels, height, width),
        nn.Conv3d: (1, channels, frames, height, width),
        nn.Linear: (1, height * width, channels),
    }
    readers = [type(layer) for layer in request.model.modules() if reads(layer, channels)]
    first = [by_kind[kind] for kind in dict.fromkeys(readers)]
    yield from dict.fromkeys((*first, *by_kind.values(), (1, frames, channels, height, width)))


def reads(layer: Any, channels: int) -> bool:
    """Whether a layer may be the one that reads the sample."""
    kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
    return (
        type(layer) in kinds and getattr(layer, "in_channels", getattr(layer, "in_features", 0)) == channels
    )


def arguments_for(request: Request, shape: Shape) -> Inputs:
    """The arguments that have no default, and those that the configuration asks for."""
    parameters = inspect.signature(request.model.forward).parameters
    wanted = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and (parameter.default is parameter.empty or is_asked(name, request.config))
    ]
    wanted.sort(key=lambda name: name not in SAMPLES)
    return {name: value_of(name, request, shape) for name in wanted}


def is_asked(name: str, config: Any) -> bool:
    """Whether an argument with a default is one that a configuration has a width or a switch for."""
    if name == "guidance":
        return bool(config.get("guidance_embeds"))
    if name in STATES or name in ("timestep", "img_ids", "txt_ids"):
        return True
    return name in POOLED and config_width(config, POOLED_WIDTHS) is not None


def config_width(config: Any, keys: tuple[str, ...]) -> int | None:
    found = [config[key] for key in keys if isinstance(config.get(key), int)]
    return found[0] if found else None


def value_of(name: str, request: Request, shape: Shape) -> torch.Tensor:
    """One argument.

    Raises:
        GfpruneError: nothing says what it is.
    """
    config = request.config
    text, pooled = config_width(config, TEXT_WIDTHS), config_width(config, POOLED_WIDTHS)
    tokens = request.sizes.text or TEXT
    axes = next((len(config[key]) for key in AXES if isinstance(config.get(key), list | tuple)), 3)
    if name in SAMPLES:
        return request.zeros(*shape)
    if name in TIMES:
        return request.time()
    if name in STATES and text is not None:
        return request.zeros(1, tokens, text)
    if name in POOLED and pooled is not None:
        return request.zeros(1, pooled)
    if name.endswith("mask"):
        return request.index(1, tokens) + 1
    if name in SIZES:
        return request.zeros(1, 2) + EDGE
    if name in ("img_ids", "txt_ids"):
        return request.zeros(shape[1] if name == "img_ids" else tokens, axes)
    raise GfpruneError(
        f"what {type(request.model).__name__} is given as {name}, its configuration does not say: "
        "its pipeline is needed"
    )
