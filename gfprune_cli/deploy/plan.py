"""What an export will write, and whether its settings go together."""

from pathlib import Path

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import build_meta
from gfprune_cli.checkpoint.writer import check_pipeline
from gfprune_cli.deploy import onnx, safetensors
from gfprune_cli.deploy.format import DTYPES
from gfprune_cli.deploy.formats import FORMATS
from gfprune_cli.deploy.network import deployed
from gfprune_cli.deploy.parts import sizes_of_parts
from gfprune_cli.errors import UsageError
from gfprune_cli.recipes.export import ExportRecipe


def is_file(recipe: ExportRecipe) -> bool:
    """Whether one file is written, and no folder."""
    return recipe.single_file or FORMATS[recipe.format].is_one_file


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
        safetensors.parse_size(recipe.max_shard_size)
    FORMATS[recipe.format].require(recipe)


def check_component(component: Component, recipe: ExportRecipe) -> None:
    """Refuse pipelines that cannot travel along, and networks that the format cannot hold."""
    if recipe.format == "safetensors" and not recipe.single_file and component.weights:
        check_pipeline(component)
    check = FORMATS[recipe.format].check
    if check is not None:
        check(component, build_meta(component))


def default_output(recipe: ExportRecipe) -> Path:
    """A name derived from the model and the settings."""
    stem = Path(recipe.model).name or "model"
    if recipe.single_file:
        return Path(f"{stem}-{recipe.dtype}.safetensors")
    if is_file(recipe):
        return Path(f"{stem}-{recipe.format}-{recipe.dtype}.safetensors")
    return Path(f"{stem}-{recipe.format}-{recipe.dtype}")


def opset_of(recipe: ExportRecipe) -> int | None:
    return (recipe.opset or onnx.DEFAULT_OPSET) if recipe.format == "onnx" else None


def planned_files(recipe: ExportRecipe, component: Component, destination: Path) -> dict[str, int]:
    """The artefact's files -> bytes of the weights in them, from shapes alone."""
    model, form = build_meta(component), FORMATS[recipe.format]
    network = deployed(model) if form.is_graph else model
    tensors = {name: tensor.to(DTYPES[recipe.dtype]) for name, tensor in network.state_dict().items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    if form.files is not None:
        return form.files(total)
    if is_file(recipe):
        return {destination.name: total}
    return safetensors.shard_sizes(recipe, component, tensors)


def planned_pipeline(recipe: ExportRecipe, component: Component, destination: Path) -> dict[str, int]:
    """Likewise of a whole pipeline."""
    files = FORMATS[recipe.format].files
    assert files is not None
    return {
        f"{part}/{name}": size
        for part, weights in sizes_of_parts(component, recipe).items()
        for name, size in files(weights).items()
    }
