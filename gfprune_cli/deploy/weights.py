"""safetensors: the checkpoint in diffusers' layout, in the type and the files that were asked for."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import nn

from gfprune_cli.checkpoint.durable import write_json, write_tensors
from gfprune_cli.checkpoint.layout import STEM
from gfprune_cli.checkpoint.modeling import gfprune_unet2d_v1 as modeling
from gfprune_cli.checkpoint.reader import Component, inspect, load_model
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.checkpoint.writer import copy_pipeline, library_entry
from gfprune_cli.deploy.parity import Inputs, Runner
from gfprune_cli.errors import UsageError

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


def split(tensors: Mapping[str, torch.Tensor], variant: str | None, limit: int | None) -> StateDictSplit:
    """Which tensor goes into which file, named as diffusers names them.

    Args:
        limit: most bytes in one file; None for one file whatever its size.
    """
    ordered = {name: tensors[name] for name in sorted(tensors)}
    total = sum(tensor.numel() * tensor.element_size() for tensor in ordered.values())
    middle = f".{variant}" if variant else ""
    return split_torch_state_dict_into_shards(
        ordered, filename_pattern=f"{STEM}{middle}{{suffix}}.safetensors", max_shard_size=limit or total + 1
    )


def index_name(variant: str | None) -> str:
    middle = f".{variant}" if variant else ""
    return f"{STEM}.safetensors.index{middle}.json"


def write_weights(folder: Path, model: nn.Module, variant: str | None, limit: int | None) -> list[Path]:
    """Configuration, weights and index, and the file that defines the class of a non-uniform network.

    Returns:
        The weight files.
    """
    network: Any = model
    (folder / "config.json").write_text(network.to_json_string(), encoding="utf-8")
    tensors = model.state_dict()
    parts = split(tensors, variant, limit)
    for name, members in parts.filename_to_tensors.items():
        write_tensors(folder / name, {member: tensors[member] for member in members})
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        write_json(folder / index_name(variant), index)
    if isinstance(model, modeling.PrunedUNet2DModel):
        shutil.copyfile(modeling.__file__, folder / Path(modeling.__file__).name)
    return [folder / name for name in sorted(parts.filename_to_tensors)]


def write_pipeline(
    staging: Path, model: nn.Module, component: Component, variant: str | None, limit: int | None
) -> list[Path]:
    """A pipeline folder (or a bare model folder, if the source was one); other components are copied.

    Returns:
        The weight files of the denoiser.
    """
    if component.pipeline is None:
        return write_weights(staging, model, variant, limit)
    folder = staging / component.name
    folder.mkdir()
    files = write_weights(folder, model, variant, limit)
    copy_pipeline(staging, component, component.name, library_entry(model))
    return files


def run_model(model: nn.Module) -> Runner:
    """A network in PyTorch: float32 in and out, arithmetic in its own type."""
    dtype = next(model.parameters()).dtype

    def run(inputs: Inputs) -> torch.Tensor:
        extra = [inputs["class_labels"]] if "class_labels" in inputs else []
        sample = inputs["sample"].to(dtype)
        output: torch.Tensor = model(sample, inputs["timestep"], *extra, return_dict=False)[0]
        return output.float()

    return run


def run_folder(folder: Path, component: Component, variant: str | None, dtype: torch.dtype) -> Runner:
    """What was written, read back as any command reads it."""
    written = inspect(
        Source(str(folder), folder, "local", None), component=component.name or None, variant=variant
    )
    return run_model(load_model(written, dtype=dtype))
