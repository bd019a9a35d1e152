"""safetensors: the checkpoint in diffusers' layout, in the type and the files that were asked for."""

import re
from pathlib import Path

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.shards import split, write_weights
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.checkpoint.writer import copy_pipeline, library_entry
from gfprune_cli.deploy.parity import Inputs, Runner
from gfprune_cli.deploy.signature import Signature
from gfprune_cli.errors import UsageError

__all__ = ["parse_size", "run_folder", "run_model", "split", "write_pipeline"]

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


def run_model(model: nn.Module, signature: Signature, dtype: torch.dtype = torch.float32) -> Runner:
    """A network in PyTorch: float32 in and out, arithmetic in `dtype`, the network's own."""

    def run(inputs: Inputs) -> torch.Tensor:
        arguments = signature.keywords(signature.cast(inputs, dtype))
        output: torch.Tensor = model(**arguments, return_dict=False)[0]
        return output.float()

    return run


def run_folder(
    folder: Path, component: Component, variant: str | None, dtype: torch.dtype, signature: Signature
) -> Runner:
    """What was written, read back as any command reads it."""
    written = inspect(
        Source(str(folder), folder, "local", None), component=component.name or None, variant=variant
    )
    return run_model(load_model(written, dtype=dtype), signature, dtype)
