"""A denoiser in one safetensors file: its weights, and its architecture in one metadata key.

    model = load_single_file(Path("unet-fp16.safetensors"))

The key `gfprune` holds JSON: `format` (1), `class_name`, `config` (as in config.json) and `record` (as in
gfprune.json). It is one key because safetensors writes several in random order.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.files import check_config, checked_file, parse_json
from gfprune_cli.checkpoint.layout import is_known
from gfprune_cli.checkpoint.reader import load_model
from gfprune_cli.checkpoint.safetensors_header import read_header, read_metadata
from gfprune_cli.checkpoint.shards import saved_tensors
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs.durable import check_name, check_writable, staging_folder, write_tensors
from gfprune_cli.outputs.filesystem import sync, sync_tree

KEY = "gfprune"
SUFFIX = ".safetensors"


def write_single_file(path: Path, model: nn.Module, record: Mapping[str, Any]) -> None:
    """Write a network and how to build it; equal inputs give equal bytes."""
    network: Any = model
    architecture = {
        "format": 1,
        "class_name": type(model).__name__,
        "config": json.loads(network.to_json_string()),
        "record": dict(record),
    }
    text = json.dumps(architecture, sort_keys=True, allow_nan=False)
    write_tensors(path, saved_tensors(model), metadata=(KEY, text))


def inspect_single_file(path: Path) -> Component:
    """Describe the network in a file that `write_single_file` wrote; no weight is read.

    Raises:
        GfpruneError: it is no such file, or it is damaged.
    """
    checked_file(path, (path.resolve().parent,))
    text = read_metadata(path).get(KEY)
    if text is None:
        raise GfpruneError(
            f"{path} does not say what network its weights belong to: pass a diffusers folder, or a file "
            "that gfprune export --single-file wrote"
        )
    architecture = parse_json(text.encode(errors="backslashreplace"), f"the metadata key {KEY!r} of {path}")
    class_name, config = architecture.get("class_name"), architecture.get("config")
    if architecture.get("format") != 1 or not is_known(class_name) or not isinstance(config, dict):
        raise GfpruneError(f"the metadata key {KEY!r} of {path} describes no network that gfprune knows")
    check_config(config, path)
    return Component(path.parent, path, "", str(class_name), None, config, (path,), read_header(path))


def load_single_file(path: Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a network from one file.

    Args:
        path: what `gfprune export --single-file` wrote.
        dtype: None means float32.

    Returns:
        The network on the CPU, in eval mode.

    Raises:
        GfpruneError: it cannot be read, in one line.
    """
    return load_model(inspect_single_file(path), dtype=dtype)


def check_file_destination(destination: Path, *, force: bool) -> None:
    """Refuse, before any work, a file that cannot be written or that is not ours to replace.

    Raises:
        UsageError: the name does not end in .safetensors, or something is there and stays.
        GfpruneError: the folder is not writable.
    """
    check_name(destination)
    if destination.suffix != SUFFIX:
        raise UsageError(f"--out {destination}: one file is written: give it a name that ends in {SUFFIX}")
    if destination.is_symlink() or (destination.exists() and not destination.is_file()):
        raise UsageError(f"--out {destination} is no regular file: name another --out")
    if destination.exists() and not force:
        raise UsageError(f"--out {destination} exists: use --force to replace it, or another --out")
    if destination.exists() and not is_ours(destination):
        raise UsageError(
            f"--out {destination}: --force replaces only what gfprune wrote, and this file has no metadata "
            f"key {KEY!r}; name another --out"
        )
    check_writable(destination)


def is_ours(path: Path) -> bool:
    """Whether gfprune wrote a file.

    Raises:
        GfpruneError: it is one of tensors that cannot be read.
    """
    try:
        return KEY in read_metadata(path)
    except GfpruneError as error:
        if isinstance(error.__context__, OSError):
            raise
        return False


@contextmanager
def staged_file(destination: Path, *, force: bool, needed: int = 0) -> Iterator[Path]:
    """A path whose file becomes `destination` when the block ends, and vanishes when it fails.

    Raises:
        UsageError: the destination is in use.
        GfpruneError: the disk is full or not writable; the destination is as it was.
    """
    check_file_destination(destination, force=force)
    with staging_folder(destination, needed) as staging:
        path = staging / destination.name
        yield path
        sync_tree(staging)
        check_file_destination(destination, force=force)
        path.replace(destination)
        sync(destination.parent)
