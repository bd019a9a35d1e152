"""The files of one network: configuration, weights in one file or in shards, and the file of its class."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import nn

from gfprune_cli.checkpoint.layout import STEM
from gfprune_cli.checkpoint.modeling import gfprune_models_v2 as modeling
from gfprune_cli.outputs.durable import write_json, write_tensors

SHARD_BYTES = 10 * 10**9  # diffusers' own default


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


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a network under every name they have: diffusers looks for each of them."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors[name] = tensor.detach().clone() if id(tensor) in seen else tensor.detach()
        seen.add(id(tensor))
    return tensors


def write_weights(folder: Path, model: nn.Module, variant: str | None, limit: int | None) -> list[Path]:
    """Configuration, weights and index, and the file that defines the class of a non-uniform network.

    Returns:
        The weight files.
    """
    network: Any = model
    (folder / "config.json").write_text(network.to_json_string(), encoding="utf-8")
    tensors = saved_tensors(model)
    parts = split(tensors, variant, limit)
    for name, members in parts.filename_to_tensors.items():
        write_tensors(folder / name, {member: tensors[member] for member in members})
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        middle = f".{variant}" if variant else ""
        write_json(folder / f"{STEM}.safetensors.index{middle}.json", index)
    if isinstance(model, modeling.PrunedModel):
        copy_module(folder)
    return [folder / name for name in sorted(parts.filename_to_tensors)]


def copy_module(folder: Path) -> None:
    """The file of the pruned classes, which also loads a component of another class in its own."""
    shutil.copyfile(modeling.__file__, folder / Path(modeling.__file__).name)
