"""Names of tensors: the model's own, and those in files of other times, tools and wrappers."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gfprune_cli.checkpoint.safetensors_header import read_metadata

# What wrappers put between the parts of a name: torch.compile, DistributedDataParallel, FSDP, checkpointing.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def stored_names(model: nn.Module, stored: Iterable[str], files: Iterable[Path]) -> dict[str, str]:
    """The model's tensor name -> the name in the files, which may spell it differently.

    Args:
        model: on the meta device.
        stored: names in the files' headers.
        files: the files, whose metadata may say that one tensor stands for another.

    Returns:
        With what nothing in the model has that name, under its own.
    """
    expected = model.state_dict()
    names: dict[str, Any] = {name: name for name in stored}
    for name in names.keys() - expected.keys():
        names.setdefault(unwrapped(name), names[name])
        if names[unwrapped(name)] == name != unwrapped(name):  # nobody else has that name
            del names[name]
    # Attention used to be query, key, value, proj_attn; diffusers knows which blocks may still be spelled so.
    model._fix_state_dict_keys_on_load(names)  # type: ignore[operator]
    # The Fourier features used to be saved under two names, and removing duplicates kept the wrong one.
    if "time_proj.W" in names and "time_proj.W" not in expected:
        old = names.pop("time_proj.W")
        names.setdefault("time_proj.weight", old)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    for name in names.keys() - expected.keys():
        if any(re.search(pattern, name) for pattern in ignored):
            del names[name]
    for same in tied(model):  # saved under one of its names
        known = [name for name in same if name in names]
        names.update({name: names[known[0]] for name in same if known})
    if absent := expected.keys() - names.keys():
        names |= _aliases(absent, names, files)
    return names


def unwrapped(name: str) -> str:
    """A name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def tied(model: nn.Module) -> list[list[str]]:
    """Names of tensors that are one and the same, together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _aliases(absent: Iterable[str], names: Mapping[str, str], files: Iterable[Path]) -> dict[str, str]:
    """Of equal tensors, safetensors writes one, and in the metadata which others it stands for."""
    metadata: dict[str, str] = {}
    for path in files:
        metadata |= read_metadata(path)
    kept = {name: metadata.get(name) for name in absent}
    return {name: names[other] for name, other in kept.items() if other is not None and other in names}
