"""What an export will write, and whether its settings go together."""

from pathlib import Path

import torch

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import build_meta
from gfprune_cli.checkpoint.writer import check_pipeline
from gfprune_cli.deploy import onnx as onnx_model
from gfprune_cli.deploy import openvino as openvino_model
from gfprune_cli.deploy import torch_export as torch_program
from gfprune_cli.deploy.network import deployed
from gfprune_cli.deploy.safetensors import parse_size, split
from gfprune_cli.errors import UsageError
from gfprune_cli.recipes.export import ExportRecipe

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BINARY = Path(openvino_model.FILE).with_suffix(".bin").name


def check_settings(recipe: ExportRecipe) -> None:
    """Refuse flags that do not go together, and formats whose libraries are missing.

    Raises:
        UsageError: with the flag to drop, or the line that installs what is missing.
    """
    if recipe.format != "safetensors":
        for flag, given in (
            ("--max-shard-size", recipe.max_shard_size is not None),
            ("--as-variant", recipe.as_variant),
            ("--single-file", recipe.single_file),
        ):
            if given:
                raise UsageError(f"{flag} is for --format safetensors, not {recipe.format}: drop the flag")
    if recipe.opset is not None and recipe.format != "onnx":
        raise UsageError(f"--opset is for --format onnx, not {recipe.format}: drop the flag")
    if recipe.single_file and (recipe.as_variant or recipe.max_shard_size is not None):
        raise UsageError("--single-file is one file of any name: drop --as-variant and --max-shard-size")
    if recipe.as_variant and recipe.dtype == "fp32":
        raise UsageError("--as-variant is for --dtype fp16 or bf16: float32 weights are the plain ones")
    if recipe.max_shard_size is not None:
        parse_size(recipe.max_shard_size)
    check_runtime(recipe)


def check_runtime(recipe: ExportRecipe) -> None:
    """Refuse what the target runtime does not have, before any work."""
    if recipe.format not in ("onnx", "openvino"):
        return
    onnx_model.require(recipe.format)
    if recipe.dtype == "bf16":
        reason = (
            "ONNX Runtime has no bfloat16 convolution on the CPU, so that the export could not be verified"
            if recipe.format == "onnx"
            else "OpenVINO files hold float32 or float16, and the arithmetic is chosen when they are loaded"
        )
        raise UsageError(f"--dtype bf16 with --format {recipe.format}: {reason}; use fp16 or fp32")


def check_component(component: Component, recipe: ExportRecipe) -> None:
    """Refuse pipelines that cannot travel along."""
    if recipe.format == "safetensors" and not recipe.single_file and component.weights:
        check_pipeline(component)


def default_output(recipe: ExportRecipe) -> Path:
    """A name derived from the model and the settings."""
    stem = Path(recipe.model).name or "model"
    if recipe.single_file:
        return Path(f"{stem}-{recipe.dtype}.safetensors")
    return Path(f"{stem}-{recipe.format}-{recipe.dtype}")


def variant_of(recipe: ExportRecipe) -> str | None:
    """The variant in the names of the weight files."""
    return recipe.dtype if recipe.as_variant else None


def shard_limit(recipe: ExportRecipe) -> int | None:
    return None if recipe.max_shard_size is None else parse_size(recipe.max_shard_size)


def opset_of(recipe: ExportRecipe) -> int | None:
    if recipe.format != "onnx":
        return None
    return onnx_model.DEFAULT_OPSET if recipe.opset is None else recipe.opset


def planned_files(recipe: ExportRecipe, component: Component, destination: Path) -> dict[str, int]:
    """The artefact's files -> bytes of the weights in them, from shapes alone."""
    model = build_meta(component)
    network = model if recipe.format == "safetensors" else deployed(model)
    tensors = {name: tensor.to(DTYPES[recipe.dtype]) for name, tensor in network.state_dict().items()}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if recipe.format == "onnx":
        apart = total > onnx_model.EXTERNAL_BYTES
        return {onnx_model.FILE: 0, onnx_model.DATA: total} if apart else {onnx_model.FILE: total}
    if recipe.format == "torch-export":
        return {torch_program.FILE: total}
    if recipe.format == "openvino":
        return {openvino_model.FILE: 0, BINARY: total}
    if recipe.single_file:
        return {destination.name: total}
    parts = split(tensors, variant_of(recipe), shard_limit(recipe))
    prefix = f"{component.name}/" if component.pipeline is not None else ""
    return {
        prefix + name: sum(tensors[member].numel() * tensors[member].element_size() for member in members)
        for name, members in sorted(parts.filename_to_tensors.items())
    }
