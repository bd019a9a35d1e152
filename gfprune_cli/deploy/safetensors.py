"""safetensors: the checkpoint in diffusers' layout, in the type and the files that were asked for."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.shards import split, write_weights
from gfprune_cli.checkpoint.single_file import load_single_file, write_single_file
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.checkpoint.writer import copy_pipeline, library_entry, loading_line
from gfprune_cli.deploy.format import Artefact, Format, Job
from gfprune_cli.deploy.parity import Inputs, Outputs, Runner
from gfprune_cli.deploy.signature import Signature, workable
from gfprune_cli.errors import UsageError
from gfprune_cli.recipes.export import ExportRecipe
from gfprune_cli.structure.tracing import outputs_of

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB or 2GB (decimal units, as diffusers counts).

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*([KMGT]B)", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise UsageError(f"--max-shard-size {text!r}: write a number and a unit, such as 500MB or 2GB")
    return size


def run_model(model: nn.Module, signature: Signature, dtype: torch.dtype = torch.float32) -> Runner:
    """A network in PyTorch: float32 in and out, arithmetic in `dtype`, the network's own."""

    def run(inputs: Inputs) -> Outputs:
        arguments = signature.keywords(signature.cast(inputs, dtype))
        return tuple(output.float() for output in outputs_of(model, arguments))

    return run


def variant_name(recipe: ExportRecipe) -> str | None:
    """The variant in the names of the weight files."""
    return recipe.dtype if recipe.as_variant else None


def shard_limit(recipe: ExportRecipe) -> int | None:
    return None if recipe.max_shard_size is None else parse_size(recipe.max_shard_size)


def write(job: Job, folder: Path) -> Artefact:
    """Write the pipeline or bare model, and read the network back; other components are copied."""
    component, variant, network = job.component, variant_name(job.recipe), job.network()
    signature = workable(job.known(network), job.scheduler, job.dtype)
    target = folder / component.name if component.pipeline is not None else folder
    target.mkdir(exist_ok=True)
    files = write_weights(target, network, variant, shard_limit(job.recipe))
    if component.pipeline is not None:
        copy_pipeline(folder, component, {component.name: library_entry(type(network).__name__)})
    source = Source(str(folder), folder, "local", None)
    written = load_model(inspect(source, component=component.name or None, variant=variant), dtype=job.dtype)
    return Artefact.of_class(signature, run_model(written, signature, job.dtype), *files)


def shard_sizes(
    recipe: ExportRecipe, component: Component, tensors: dict[str, torch.Tensor]
) -> dict[str, int]:
    """The weight files -> their bytes, from shapes alone."""
    parts = split(tensors, variant_name(recipe), shard_limit(recipe))
    prefix = f"{component.name}/" if component.pipeline is not None else ""
    return {
        prefix + name: sum(tensors[member].nbytes for member in members)
        for name, members in sorted(parts.filename_to_tensors.items())
    }


def loading(job: Job, name: str) -> str:
    """The loading line of diffusers, for the type and the variant that were written."""
    half = job.recipe.dtype != "fp32"
    options = [f"torch_dtype={job.dtype}"] if half else []
    options += [f'variant="{job.recipe.dtype}"'] if job.recipe.as_variant else []
    line = loading_line(name, job.component.class_name, *options, bare=job.component.pipeline is None)
    return f"import torch\n{line}" if half else line


def write_alone(job: Job, path: Path, record: Mapping[str, Any]) -> nn.Module:
    """Write the component alone, with its architecture, and read it back."""
    write_single_file(path, job.network(), record)
    return load_single_file(path, dtype=job.dtype)


FORMAT = Format(write=write, file=write_alone, loading=loading, library="diffusers")
