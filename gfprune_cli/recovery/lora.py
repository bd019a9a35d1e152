"""Low-rank adapters (arXiv 2106.09685) on a pruned network: trained alone, then merged into its weights."""

import math
import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.correspondence import read_correspondence
from gfprune_cli.checkpoint.record import RECORD, Record
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.errors import UsageError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def load_peft() -> Any:
    """The library of adapters.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("peft")
    except ImportError as error:
        raise UsageError("--lora needs peft: pip install 'gfprune[lora]'") from error


def takes_adapter(layer: nn.Module) -> bool:
    """Whether an adapter can be put on a layer and merged into it later."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


def adapted_layers(student: nn.Module, record: Record) -> list[str]:
    """Linear layers and convolutions that lost rows or columns; all of them where the record does not say."""
    layers = [name for name, module in student.named_modules() if takes_adapter(module)]
    found = read_correspondence(record.document, RECORD)
    touched = [name for name in layers if found is not None and name in found.layers]
    return touched or layers


def adapter_size(student: nn.Module, layers: Iterable[str], rank: int) -> int:
    """Numbers in adapters of a rank on layers of a network, on any device."""
    weights = [student.get_submodule(name).get_parameter("weight") for name in layers]
    return sum(rank * (weight[0].numel() + len(weight)) for weight in weights)


def add_adapters(student: nn.Module, layers: Iterable[str], rank: int, seed: int) -> Any:
    """Put adapters of value zero on layers of a network, in place; all else is frozen.

    Returns:
        What `merge_adapters` takes.
    """
    peft = load_peft()
    names = "|".join(map(re.escape, layers))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, bias="none")
    tuner = peft.LoraModel(student, config, "default")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter[0].numel())  # as peft draws them, from our own seed
            drawn = torch.rand(parameter.shape, generator=generator(seed, "lora", name))
            with torch.no_grad():
                parameter.copy_((2 * drawn - 1) * bound)
    return tuner


def merge_adapters(tuner: Any) -> nn.Module:
    """The network that it was, with what its adapters have learnt in its weights."""
    merged: nn.Module = tuner.merge_and_unload()
    return merged
