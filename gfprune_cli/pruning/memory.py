"""How much memory a run will need, from the meta device, before a weight is read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import build_meta
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.loss import one_sample
from gfprune_cli.diffusion.schedulers import NoisingProcess
from gfprune_cli.errors import GfpruneError
from gfprune_cli.structure.norms import plain_stand_ins

GIB = 1 << 30
FLOAT = 4  # bytes; weights, gradients and moments are float32
MARGIN = 0.95  # of what is free
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Bytes on the device that does the work.

    Args:
        weights: of every copy of the weights, gradients and moments included.
        sample: for one sample on its way through the network and back.
    """

    weights: int
    sample: int

    @property
    def total(self) -> int:
        return self.weights + self.sample


class AttentionMaps(TorchFunctionMode):
    """Counts the numbers in the attention weights of a pass: the kernel without fusion, which scoring needs,
    keeps them for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.scaled_dot_product_attention:
            query, key = (*args, *(kwargs or {}).values())[:2]
            self.counted += query.shape[:-1].numel() * key.shape[-2]
        return function(*args, **(kwargs or {}))


def kept_for_backward(model: nn.Module, call: Callable[[nn.Module], Any]) -> int:
    """Numbers that autograd keeps of one pass, nearly; runs on the meta device too.

    Args:
        call: runs the model.
    """
    counted = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal counted
        counted += output.numel() if isinstance(output, torch.Tensor) else 0

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    try:
        with plain_stand_ins(model), torch.no_grad(), AttentionMaps() as maps:
            call(model)
    finally:
        for hook in hooks:
            hook.remove()
    return counted + maps.counted


def activations(component: Component, process: NoisingProcess, draws: Draws) -> int:
    """Numbers that autograd keeps for one sample of a run; 0 where a network's shapes depend on values."""
    given = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), one_sample(process, draws))
    try:
        return kept_for_backward(build_meta(component), lambda network: network(**given, return_dict=False))
    except (RuntimeError, NotImplementedError):
        return 0


def available(device: torch.device) -> int:
    """Bytes that are free on a device; for the CPU those that no other process holds."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return min(int(psutil.virtual_memory().available), limit_of_group())


def limit_of_group() -> int:
    """What the container's memory limit leaves, if there is one."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        return limit - int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return 1 << 62


def check_memory(need: Need, device: torch.device, remedy: str) -> None:
    """Refuse a run that cannot fit, before it has cost anything.

    Args:
        remedy: what would need less, for the message.

    Raises:
        GfpruneError: with both numbers.
    """
    free = available(device)
    if need.total > MARGIN * free:
        raise GfpruneError(
            f"this run needs about {need.total / GIB:.1f} GiB on {device.type}, and {free / GIB:.1f} GiB "
            f"are free: {remedy}"
        )
