"""The options of `gfprune export`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt

from gfprune_cli.recipes.options import Help, Names, Recipe

FORMATS = ("safetensors", "onnx", "torch-export", "openvino", "comfyui")
FormatName = Annotated[str, Names(FORMATS, "gfprune_cli.deploy.formats:FORMATS")]
DtypeName = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ExportRecipe(Recipe):
    """Everything that decides the bytes of an export."""

    model: Annotated[str, Help("demo, a local diffusers folder, or a Hub id owner/name.")] = "demo"
    revision: Annotated[str | None, Help("Hub branch, tag or commit.")] = None
    variant: Annotated[str | None, Help("Weights variant to read, such as fp16.")] = None
    component: Annotated[str | None, Help("Network of the pipeline to export alone (docs/export.md).")] = None
    format: Annotated[FormatName, Help("What to write (docs/export.md).")] = "safetensors"
    dtype: Annotated[DtypeName, Help("Type of the weights and of the arithmetic.")] = "fp32"
    max_shard_size: Annotated[
        str | None, Help("safetensors: split the weights into files of at most this size, such as 2GB.")
    ] = None
    as_variant: Annotated[
        bool, Help("safetensors: name fp16 or bf16 weights as a variant, to be loaded with variant=.")
    ] = False
    single_file: Annotated[
        bool, Help("safetensors: the component alone, in one file with its architecture.")
    ] = False
    opset: Annotated[int | None, Ge(18), Le(25), Help("onnx: operator set (default: 20).")] = None
    tolerance: Annotated[
        float | None,
        Ge(0),
        Help("Largest error, relative to the source's largest output (default: by --dtype, docs/export.md)."),
    ] = None
    seed: Annotated[int, Ge(0), Lt(2**63), Help("Of the inputs that the export is verified on.")] = 0
