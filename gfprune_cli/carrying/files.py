"""The tensors of an adapter on disk, checked like those of any other file from elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gfprune_cli.checkpoint.advice import PICKLES
from gfprune_cli.checkpoint.files import checked_file, parse_json, quoted, read_json, trusted_roots
from gfprune_cli.checkpoint.safetensors_header import FLOAT_TYPES, read_header, read_metadata
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs.tensor_files import load_tensors

SUFFIX = ".safetensors"
NAMES = ("pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model")  # that libraries give
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers': the configuration of a LoRA as JSON


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Args:
        path: its file.
        tensors: by name.
        settings: what it says of itself: ranks, alphas and the like, by PEFT's names, each perhaps behind the
            name of a component ("unet.lora_alpha").
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    settings: Mapping[str, Any]


def find_file(name: str) -> Path:
    """The one safetensors file of an adapter.

    Args:
        name: the file, or its folder.

    Raises:
        UsageError: there is none, or there are several.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() in PICKLES:
        raise UsageError(f"--adapter {name} is a pickle, and gfprune reads no pickle: save it as {SUFFIX}")
    if path.is_file():
        if path.suffix != SUFFIX:
            raise UsageError(f"--adapter {name} is no {SUFFIX} file: name one, or its folder")
        return path
    if not path.is_dir():
        raise UsageError(
            f"--adapter {quoted(name)}: no such file or folder; fetch one from the Hub with hf download"
        )
    files = sorted(path.glob(f"*{SUFFIX}"))
    for stem in NAMES:
        if path / f"{stem}{SUFFIX}" in files:
            return path / f"{stem}{SUFFIX}"
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:4]) or "none"
        raise UsageError(
            f"--adapter {name} is a folder with several {SUFFIX} files, or none ({found}): name one"
        )
    return files[0]


def read_adapter(path: Path) -> Adapter:
    """An adapter's tensors.

    Raises:
        GfpruneError: the file is damaged, or a tensor is not finite.
    """
    real = path.resolve()  # the user named it: where it lies is no matter
    header = read_header(checked_file(real, (real.parent,)))
    for name, info in header.items():
        if info.dtype not in FLOAT_TYPES and info.dtype not in ("I64", "I32"):
            raise GfpruneError(
                f"{path}: tensor {quoted(name)} is {info.dtype}: take the adapter before it was quantized"
            )
    tensors: dict[str, torch.Tensor] = load_tensors(real)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise GfpruneError(f"{path}: tensor {quoted(name)} is not finite: the file is damaged")
    beside = path.parent / PEFT_CONFIG
    if beside.is_file() and path.stem == "adapter_model":
        settings = read_json(beside, trusted_roots(path.parent))
    else:
        text = read_metadata(real).get(METADATA)
        settings = (
            {} if text is None else parse_json(text.encode(), f"the metadata key {METADATA!r} of {path}")
        )
    return Adapter(path, tensors, settings)
