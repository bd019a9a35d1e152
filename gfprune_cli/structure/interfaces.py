"""Where adapters enter a network: widths that have to stay for those of the dense model to fit unchanged.

ControlNets and T2I adapters add to the streams that a U-Net hands from its encoder to its decoder,
IP-Adapters bring keys and values for the heads that read the prompt.
"""

import re

from torch import nn

from gfprune_cli.structure.groups import ChannelGroup

# layers whose outputs adapters are added to, or stand beside
STREAMS = re.compile(
    r"conv_in|down_blocks\.\d+\.(?:resnets\.\d+\.conv2|attentions\.\d+\.proj_out|downsamplers\.\d+\.conv)"
    r"|mid_block\.(?:resnets\.\d+\.conv2|attentions\.\d+\.proj_out)"
)
PROMPTS = re.compile(r".*\.attn2\.to_[kv]|transformer_blocks\.\d+\.attn\.to_[kv]")


def beside_interfaces(model: nn.Module, groups: tuple[ChannelGroup, ...]) -> tuple[ChannelGroup, ...]:
    """The groups that may shrink without an adapter of the dense network noticing."""
    streams = hasattr(model, "down_blocks")

    def entered(name: str) -> bool:
        return bool(PROMPTS.fullmatch(name) or (streams and STREAMS.fullmatch(name)))

    return tuple(
        group
        for group in groups
        if not any(member.side == "out" and entered(member.module) for member in group.members)
    )
