"""The options of `gfprune carry`."""

from dataclasses import dataclass
from typing import Annotated

from gfprune_cli.recipes.options import Help, Recipe


@dataclass(frozen=True, kw_only=True)
class CarryRecipe(Recipe):
    """Everything that decides the bytes of a carried adapter."""

    adapter: Annotated[
        str,
        Help(
            "LoRA, IP-Adapter, ControlNet or T2I adapter of the dense model: a .safetensors file, or its "
            "folder."
        ),
    ]
    model: Annotated[str, Help("The pruned model: a folder that gfprune wrote, or a Hub id owner/name.")]
    revision: Annotated[str | None, Help("Hub branch, tag or commit of the pruned model.")] = None
    variant: Annotated[str | None, Help("Weights variant of the pruned model, such as fp16.")] = None
    component: Annotated[
        str | None, Help("Pipeline component that the adapter is for (default: the one that was pruned).")
    ] = None
    dense: Annotated[
        str | None,
        Help("The dense model, read for DoRA and for records without a map (default: the one it names)."),
    ] = None
