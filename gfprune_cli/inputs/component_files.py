"""The files of a pipeline's other components, checked before diffusers or transformers read them."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gfprune_cli.checkpoint.files import INDEX_BYTES, checked_file, quoted, read_json
from gfprune_cli.checkpoint.layout import weights_variant
from gfprune_cli.checkpoint.safetensors_header import read_header
from gfprune_cli.errors import GfpruneError

CONSTANTS = ("NaN", "Infinity", "-Infinity")  # that configurations of text models may hold
LAYERS, LARGEST = 512, 1 << 24  # of a text model: layers, and any other whole number in its configuration
SIZE_SHARE, SIZE_FREE = 2, 1 << 24  # parameters by a configuration: so many times those stored, and these


def check_folder(folder: Path, roots: tuple[Path, ...]) -> None:
    """Refuse a component that would make its library read pickles, other folders or remote code.

    Raises:
        GfpruneError: links that lead out, shards that are no safetensors files beside their index, an adapter
            of another model, kernels that the Hub would be asked for, absurd sizes, files named elsewhere.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            checked_file(path, roots)
    for path in sorted(folder.glob("*.safetensors.index*.json")):
        shards = read_json(path, roots, limit=INDEX_BYTES).get("weight_map")
        for name in set(map(str, shards.values())) if isinstance(shards, dict) else ():
            if weights_variant(name) is None:
                raise GfpruneError(f"{path} names {quoted(name)}, which is no shard beside it")
    if (folder / "adapter_config.json").exists():
        raise GfpruneError(f"{folder} holds an adapter of another model: merge the two first")
    if (path := folder / "config.json").exists():
        for key, value in _entries(read_json(path, roots, limit=INDEX_BYTES, constants=CONSTANTS)):
            if key.endswith("_implementation") and "/" in str(value):
                raise GfpruneError(f"{path}: {quoted(key)} asks for code from the Hub: remove that key")
            limit = LAYERS if key.endswith(("layers", "n_layer", "depth")) else LARGEST
            if type(value) is int and value > limit and "theta" not in key:
                raise GfpruneError(f"{path}: {quoted(key)} is {quoted(value)}, more than {limit}")
    for path in sorted(folder.glob("*_config.json")):
        for key, value in _entries(read_json(path, roots, limit=INDEX_BYTES, constants=CONSTANTS)):
            # transformers ignores special_tokens_map_file, which often says where the map once lay
            named = key.endswith("_file") and key != "special_tokens_map_file" and value is not None
            if named and not _beside(value):
                raise GfpruneError(f"{path}: {quoted(key)} names a file elsewhere: remove that key")


def check_size(found: Any, folder: Path) -> None:
    """Refuse a text model far larger than its weights: transformers makes up what they lack.

    Args:
        found: its class; `folder`: its files.

    Raises:
        GfpruneError: with both numbers of parameters.
    """
    with torch.device("meta"):
        wanted = sum(p.numel() for p in found(found.config_class.from_pretrained(folder)).parameters())
    headers = (read_header(path) for path in folder.glob("*.safetensors"))
    stored = sum(math.prod(info.shape) for header in headers for info in header.values())
    if wanted > SIZE_SHARE * stored + SIZE_FREE:
        raise GfpruneError(
            f"{folder / 'config.json'} describes {wanted:,} parameters, but {stored:,} are stored: "
            "one of the two belongs to another model"
        )


def _entries(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested objects."""
    for key, value in document.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)


def _beside(value: object) -> bool:
    """Whether a file name leads nowhere but to the folder of the file that holds it."""
    name = value.removeprefix("./") if isinstance(value, str) else ""
    return Path(name).name == name and name not in ("", ".", "..")
