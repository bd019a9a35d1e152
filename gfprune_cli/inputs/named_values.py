"""What an argument of `forward` is, from its name: states, positions, masks, times, sizes.

    value = value_of("encoder_hidden_states", filling)

Zeros stand for what a run draws at random; what is not zero is a fact about the sample, and stays as it is.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.family import Request
from gfprune_cli.inputs.widths import MARKS, SMALL_MARK

TEXT = 8  # tokens
PIXELS, FRAME_RATE = 16.0, 16.0  # of images and videos, where a network is told
# keys of configurations: how long a text is, where it may not have any other length
TOKENS, SECOND_TOKENS = ("text_len", "num_embeddings", "max_text_seq_length"), ("text_len_t5",)
# and the layers that are given a text each: a list, or how many there are
LAYERS = {"text_encoder_layers": ("num_layers", "num_single_layers"), "encoder_hidden_states_llama3": ()}


@dataclass(frozen=True)
class Sample:
    """A layout of the noisy sample.

    Args:
        shape: [1, ...].
        axis: that of its channels.
        grid: frames, height and width in tokens.
        times: shape of the noise levels: one, or one for each frame.
        texts: one, or one for each frame.
    """

    shape: tuple[int, ...]
    axis: int
    grid: tuple[int, int, int]
    times: tuple[int, ...] = (1,)
    texts: int = 1

    def of_width(self, width: int) -> tuple[int, ...]:
        """The shape with other channels."""
        return (*self.shape[: self.axis], width, *self.shape[self.axis + 1 :])


@dataclass
class Filling:
    """The arguments of one call, while it is found out what they are.

    Args:
        request: for the network.
        sample: the layout that is tried.
        widths: of arguments, where a layer has said them.
        asked: marks of arguments whose widths are asked for.
        reached: layers that the last call came to.
    """

    request: Request
    sample: Sample
    widths: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    reached: list[nn.Module] = field(default_factory=list)

    @property
    def config(self) -> Any:
        return self.request.config

    def width(self, name: str, *, small: bool = False) -> int:
        """How wide an argument is: a mark as long as no layer has said."""
        if name in self.widths:
            return self.widths[name]
        free = (mark for mark in ((SMALL_MARK,) if small else MARKS) if mark not in self.asked.values())
        if name not in self.asked and (mark := next(free, None)) is not None:
            self.asked[name] = mark
        return self.asked.get(name, 1)  # its turn comes when others are known

    def tokens(self, name: str = "") -> int:
        """How long a text is."""
        keys = SECOND_TOKENS if name.endswith("_t5") else TOKENS
        fixed = [self.config[key] for key in keys if isinstance(self.config.get(key), int)]
        return self.request.sizes.text or (fixed[0] if fixed else TEXT)

    @property
    def axes(self) -> int:
        """Of a position: as many as a key about rotary embeddings has numbers, beside three."""
        rotary = (value for key, value in self.config.items() if "axes_dim" in key or "rope" in key)
        return next((len(value) for value in rotary if isinstance(value, list | tuple)), 3)

    def ids(self, *sizes: int) -> torch.Tensor:
        """[tokens, axes] positions in a grid, which are counted on the last axes."""
        grid = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes))
        grid = torch.nn.functional.pad(grid, (self.axes - len(sizes), 0))
        return grid.to(self.request.zeros(1))

    def image_ids(self) -> torch.Tensor:
        """The same of the sample."""
        return self.ids(*self.sample.grid[1:])

    def text_ids(self) -> torch.Tensor:
        """The same of the text, all of it at the origin."""
        return self.ids(1).expand(self.tokens(), -1)

    def counted(self, length: int) -> torch.Tensor:
        """[length] positions on one axis."""
        return torch.arange(length, device=self.request.zeros(1).device)


def states(filling: Filling, name: str) -> torch.Tensor:
    return filling.request.zeros(filling.sample.texts, filling.tokens(name), filling.width(name))


def like_sample(filling: Filling, name: str) -> torch.Tensor:
    return filling.request.zeros(*filling.sample.of_width(filling.width(name, small=True)))


def layer_states(filling: Filling, name: str) -> list[torch.Tensor]:
    """States of several layers of a text encoder."""
    layers = filling.config.get("llama_layers")
    count = max(layers) + 1 if layers else sum(filling.config[key] for key in LAYERS[name])
    return [states(filling, name) for _ in range(count)]


def stacked_states(filling: Filling, name: str) -> torch.Tensor:
    """States of several layers side by side, [1, tokens, layers, width]."""
    layers = filling.config["num_text_layers"]
    return filling.request.zeros(1, filling.tokens(name), layers, filling.width(name))


def rotary(filling: Filling, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [tokens, width of a head] each: half of it for the row, half for the column."""
    if "attention_head_dim" not in filling.config:
        raise unknown(name, filling)
    ids, quarter = filling.image_ids(), filling.config["attention_head_dim"] // 4
    speeds = 1e4 ** -torch.linspace(0, 1, quarter).to(ids)
    angles = (ids[:, -2:, None] * speeds).flatten(1).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


VALUES: tuple[tuple[str, Callable[[Filling, str], Any]], ...] = (
    (r"timesteps?|t|timestep_ratio|r_timestep|timestep_r",
     lambda filling, _: filling.request.zeros(*filling.sample.times) + 1),
    (r"guidance", lambda filling, _: filling.request.zeros(1) + 1),
    (r"(audio_)?encoder_hidden_states(_(1|2|t5|image))?|context|cap_feats|text_bth|clip_text", states),
    (r"audio_hidden_states|image_embeds", states),
    (r"clip_text_pooled", lambda filling, name: filling.request.zeros(1, 1, filling.width(name))),
    (r"\w*pooled\w*|y|global_hidden_states|proj_embedding|clip_img|image_embeddings",
     lambda filling, name: filling.request.zeros(1, filling.width(name))),
    ("|".join(LAYERS), layer_states),
    (r"(control_hidden_states|context_latents|image_latents)", like_sample),
    (r"padding_mask", lambda filling, _: filling.request.index(1, 1, *filling.sample.shape[-2:]).float() + 1),
    (r"(\w+_)?mask(_2|_t5)?", lambda filling, name: filling.request.index(1, filling.tokens(name)) + 1),
    (r"original_size|target_size|crop_coords", lambda filling, _: filling.request.zeros(1, 2) + PIXELS),
    (r"image_rotary_emb", rotary),
    # original height and width, those that are wanted, and where the crop begins
    (r"image_meta_size", lambda filling, _: filling.request.zeros(1, 6) + PIXELS),
    (r"added_time_ids", lambda filling, name: filling.request.zeros(1, filling.width(name)) + 1),
    (r"fps", lambda filling, _: filling.request.zeros(1) + FRAME_RATE),
    (r"style", lambda filling, _: filling.request.index(1)),
    (r"text_lens", lambda filling, _: filling.request.index(1) + filling.tokens()),
    (r"img_ids", lambda filling, _: filling.image_ids()),
    (r"txt_ids", lambda filling, _: filling.text_ids()),
    (r"position_ids", lambda filling, _: torch.cat((filling.text_ids(), filling.image_ids()))),
    (r"img_shapes", lambda filling, _: [[filling.sample.grid]]),  # of the images of each sample, in tokens
    (r"visual_rope_pos", lambda filling, _: [filling.counted(size) for size in filling.sample.grid]),
    (r"text_rope_pos", lambda filling, _: filling.counted(filling.tokens())),
    (r"indices_latents", lambda filling, _: filling.counted(filling.sample.grid[0])),
    (r"prior_token_id", lambda filling, _: filling.request.index(1, math.prod(filling.sample.grid))),
    (r"prior_token_drop", lambda filling, _: filling.request.index(1) > 0),  # nothing is dropped
    (r"num_frames", lambda filling, _: filling.sample.grid[0]),
    (r"height", lambda filling, _: filling.sample.grid[1]),
    (r"width", lambda filling, _: filling.sample.grid[2]),
    (r"audio_num_frames", lambda filling, name: filling.tokens(name)),
)  # fmt: skip


def is_named(name: str) -> bool:
    """Whether an argument of this name is known."""
    return maker_of(name) is not None


def maker_of(name: str) -> Callable[[Filling, str], Any] | None:
    return next((maker for pattern, maker in VALUES if re.fullmatch(pattern, name)), None)


def value_of(name: str, filling: Filling) -> Any:
    """One argument.

    Raises:
        GfpruneError: nothing says what it is.
    """
    maker = maker_of(name)
    if maker is None and name in filling.config:
        return filling.config[name]
    if maker is None:
        raise unknown(name, filling)
    if maker is states and "num_text_layers" in filling.config:
        maker = stacked_states
    return maker(filling, name)


def unknown(name: str, filling: Filling) -> GfpruneError:
    """The refusal of an argument that nothing is known of."""
    kind = type(filling.request.model).__name__
    return GfpruneError(
        f"what {kind} is given as {name}, its configuration does not say: its pipeline is needed"
    )
