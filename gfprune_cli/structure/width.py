"""The width of the residual stream as one more channel group.

Every block reads and writes the stream, so that one channel of it is a row or column of nearly every layer:
patch embedding and position table, modulation, norms, attention, feed-forward and output projection. What
each building block of diffusers does with the stream is written down here; the way into the stream and out
of it is a matter of the model's class.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import FactoredLinear
from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.family import APART, Ends
from gfprune_cli.families.table import family_of
from gfprune_cli.structure.feedforward import kind_of, units_of
from gfprune_cli.structure.groups import ChannelGroup, Kind, Member, Side
from gfprune_cli.structure.norms import feature_count, is_feature_norm
from gfprune_cli.structure.trace import is_attention


@dataclass
class Stream:
    """The members found so far. A channel is a position modulo `period`, in every chunk of a layer."""

    model: nn.Module
    ends: Ends
    width: int
    period: int
    members: list[Member] = field(default_factory=list)

    def add(self, name: str, side: Side, kind: Kind, size: int) -> None:
        if size % self.width:
            raise in_the_way(name, self.model.get_submodule(name))
        positions = torch.arange(size)
        self.members.append(Member(name, side, kind, positions, positions % self.period))

    def layer(self, name: str, role: str) -> None:
        """A linear layer or convolution, or the last one of a sequence, that reads or writes the stream."""
        layer: Any = self.model.get_submodule(name)
        if isinstance(layer, FactoredLinear) and role == "both":
            self.layer(f"{name}.0", "in")
            role = "out"
        if isinstance(layer, FactoredLinear) and role == "in":
            name, layer = f"{name}.0", layer[0]
        elif isinstance(layer, nn.Sequential):
            name, layer = f"{name}.{len(layer) - 1}", layer[-1]
        weight = getattr(layer, "weight", None)
        if weight is None or weight.ndim < 2:
            raise in_the_way(name, layer)
        if role in ("in", "both"):
            self.add(name, "in", kind_of(layer), weight.shape[1])
        if role in ("out", "both"):
            self.add(name, "out", kind_of(layer), weight.shape[0])


def in_the_way(name: str, module: Any) -> GfpruneError:
    return GfpruneError(
        f"the width of the residual stream cannot be pruned: {name} ({type(module).__name__}) stands in the "
        "way. Leave out --prune-width"
    )


def width_group(model: Any) -> ChannelGroup:
    """The residual stream of a transformer as a channel group.

    Raises:
        GfpruneError: names the first module of which it is not known what it does with the stream.
    """
    family = family_of(model)
    if family is None or family.ends is None:
        raise in_the_way("the model", model)
    ends = family.ends
    if ends.text == "read" and getattr(model, "caption_projection", model) is None:
        ends = Ends(ends.roles)
    width = next(first_norm for first_norm in map(block_width, model.modules()) if first_norm)
    sized = any(getattr(module, "use_additional_conditions", False) for module in model.modules())
    # PixArt adds embeddings of height, width and aspect ratio, each a third as wide as the stream
    stream = Stream(model, ends, width, width // 3 if sized else width)
    for name, child in model.named_children():
        read_child(stream, name, child)
    own_tables(stream, "", model)
    channels = torch.arange(stream.period)
    return ChannelGroup(
        stream.members[0].module, stream.period, 1, channels.view(1, -1), tuple(stream.members)
    )


def block_width(module: Any) -> int:
    """Width of the stream, if this is a block: its attention's output projection or query input."""
    for child in module.children():
        if is_attention(child):
            return int(child.to_q.in_features)
    return 0


def read_child(stream: Stream, name: str, module: nn.Module) -> None:
    """What one part of the network does with the stream."""
    role = stream.ends.roles.get(name)
    rule = RULES.get(type(module).__name__)
    if role == APART or not holds_weights(module):
        return
    if role is not None:
        stream.layer(name, role)
    elif rule is not None:
        rule(stream, name, module)
    elif is_feature_norm(module):
        stream.add(name, "out", "norm", feature_count(module))
    elif is_attention(module):
        attention_streams(stream, name, module)
    elif isinstance(module, nn.ModuleList) or type(module).__name__.endswith("Block"):
        block(stream, name, module)
    elif units_of(module) is not None:
        feedforward(stream, name, module)
    else:
        raise in_the_way(name, module)


def holds_weights(module: nn.Module) -> bool:
    """Whether a module, or one in it, has weights or a norm."""
    return any(is_feature_norm(inner) or list(inner.parameters(recurse=False)) for inner in module.modules())


def block(stream: Stream, name: str, module: nn.Module) -> None:
    """A residual block, or a list of them; text that has channels of its own runs beside the stream."""
    for leaf, child in module.named_children():
        if leaf.endswith("_context") and stream.ends.text != "joined":
            continue
        if units_of(module) is not None and leaf in ("proj_mlp", "proj_out"):
            stream.layer(f"{name}.{leaf}", "in" if leaf == "proj_mlp" else "out")
        else:
            read_child(stream, f"{name}.{leaf}", child)
    own_tables(stream, name, module)


def own_tables(stream: Stream, name: str, module: nn.Module) -> None:
    """Parameters of a block itself: tables of scale and shift."""
    for leaf, parameter in module.named_parameters(recurse=False):
        path = f"{name}.{leaf}" if name else leaf
        if parameter.shape[-1] != stream.width:
            raise in_the_way(path, parameter)
        stream.add(path, "out", "parameter", stream.width)


def attention_streams(stream: Stream, name: str, module: Any) -> None:
    text = stream.ends.text
    reads = ["to_q"]
    if text == "read" or not getattr(module, "is_cross_attention", False):
        reads += ["to_k", "to_v"]
    if text == "joined":
        reads += ["add_q_proj", "add_k_proj", "add_v_proj"]
    for leaf in reads:
        if getattr(module, leaf, None) is not None:
            stream.layer(f"{name}.{leaf}", "in")
    if getattr(module, "to_out", None) is not None:
        stream.layer(f"{name}.to_out.0", "out")
    if text == "joined" and getattr(module, "to_add_out", None) is not None:
        stream.layer(f"{name}.to_add_out", "out")
    if getattr(module, "group_norm", None) is not None:
        raise in_the_way(f"{name}.group_norm", module.group_norm)


def feedforward(stream: Stream, name: str, module: nn.Module) -> None:
    units = units_of(module)
    assert units is not None
    first: Any = module.get_submodule(units.producers[0])
    fed = units.producers[:1] if type(module).__name__ in SINGLE_INPUT else units.producers
    for leaf in fed:
        stream.layer(f"{name}.{leaf}", "in")
    stream.layer(f"{name}.{units.reader}", "out")
    if is_feature_norm(getattr(module, "norm", first)):
        stream.add(f"{name}.norm", "out", "norm", stream.width)


def modulated_norm(stream: Stream, name: str, module: Any) -> None:
    """A norm whose scale and shift (and gates) a projection of the time makes, chunk by chunk."""
    if getattr(module, "linear", None) is not None:
        stream.layer(f"{name}.linear", "out")
    stream.add(f"{name}.norm", "out", "norm", stream.width)


def shared_modulation(stream: Stream, name: str, module: Any) -> None:
    """One modulation for all blocks, and the embedding of the time that the output modulation adds to."""
    for leaf in ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder"):
        embedder = getattr(module.emb, leaf, None)
        if embedder is not None:
            path = f"{name}.emb.{leaf}.linear_2"
            path += ".1" if isinstance(embedder.linear_2, FactoredLinear) else ""
            size = embedder.linear_2.out_features
            positions = torch.arange(size)
            stream.members.append(Member(path, "out", "linear", positions, positions % stream.period))
    stream.layer(f"{name}.linear", "both")


def guided_modulation(stream: Stream, name: str, module: Any) -> None:
    """Sana's modulation with the guidance scale as a second time."""
    for leaf in ("timestep_embedder", "guidance_embedder"):
        stream.layer(f"{name}.{leaf}.linear_2", "out")
    stream.layer(f"{name}.linear", "both")


def patches(stream: Stream, name: str, module: Any) -> None:
    stream.layer(f"{name}.proj", "out")
    if getattr(module, "text_proj", None) is not None:
        stream.layer(f"{name}.text_proj", "out")
    if getattr(module, "norm", None) is not None:
        stream.add(f"{name}.norm", "out", "norm", stream.width)
    for leaf in ("pos_embed", "pos_embedding"):
        if getattr(module, leaf, None) is not None:
            stream.add(f"{name}.{leaf}", "out", "parameter", stream.width)


def captions(stream: Stream, name: str, _module: Any) -> None:
    if stream.ends.text == "read":
        stream.layer(f"{name}.linear_2", "out")


def wan_conditions(stream: Stream, name: str, _module: Any) -> None:
    """Text and image states have channels of their own."""
    stream.layer(f"{name}.time_embedder.linear_2", "out")
    stream.layer(f"{name}.time_proj", "both")


SINGLE_INPUT = {"GLUMBConv"}  # its second producer filters the first one's channels
RULES: dict[str, Callable[[Stream, str, Any], None]] = {
    "AdaLayerNorm": modulated_norm,
    "AdaLayerNormZero": modulated_norm,
    "AdaLayerNormZeroSingle": modulated_norm,
    "AdaLayerNormContinuous": modulated_norm,
    "SD35AdaLayerNormZeroX": modulated_norm,
    "CogVideoXLayerNormZero": modulated_norm,
    "SanaModulatedNorm": modulated_norm,
    "AdaLayerNormSingle": shared_modulation,
    "SanaCombinedTimestepGuidanceEmbeddings": guided_modulation,
    "PatchEmbed": patches,
    "NarrowPatchEmbed": patches,
    "CogVideoXPatchEmbed": patches,
    "PixArtAlphaTextProjection": captions,
    "WanTimeTextImageEmbedding": wan_conditions,
}
