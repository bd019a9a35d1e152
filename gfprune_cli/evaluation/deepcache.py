"""DeepCache for U-Nets: compute the deep part of the network only every N-th step.

Ma et al., "DeepCache: Accelerating Diffusion Models for Free" (arXiv 2312.00858), section 3.2: neighbouring
denoising steps have nearly equal deep features, so most steps keep those of an earlier one and run only the
outermost down and up blocks. Here the cut is before the last up block, on its input.
"""

import copy
from typing import Any

import torch
from torch import nn

INTERVAL = 5  # N in the paper, which reports N = 2 to 10 and shows most results at 5


class Features(nn.Module):
    """Stands in for the deep part of a network: gives back what the last full step left."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: torch.Tensor | None = None

    def forward(self, sample: torch.Tensor, emb: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        assert self.kept is not None, "a full step comes first"
        return self.kept


class DeepCache(nn.Module):
    """One cycle of a cached sampler: a full step, then `interval - 1` shallow ones.

    Args:
        model: a `UNet2DModel`, pruned or not; its weights are shared, not copied.
        interval: steps per cycle.

    Raises:
        ValueError: no U-Net, or the network adds up images beside its blocks (the NCSN++ family), which no
            cache of one block's input can replace.
    """

    def __init__(self, model: nn.Module, interval: int = INTERVAL) -> None:
        super().__init__()
        self.model, self.interval, self.features = model, interval, Features()
        self.shallow = outer_blocks(model, self.features)

    def full_step(self, **inputs: Any) -> torch.Tensor:
        """The network's output; the input of its last up block is kept for the steps that follow."""

        def keep(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.features.kept = args[0] if args else named["hidden_states"]

        model: Any = self.model
        with model.up_blocks[-1].register_forward_pre_hook(keep, with_kwargs=True):
            return model(**inputs | {"return_dict": False})[0]

    def shallow_step(self, **inputs: Any) -> torch.Tensor:
        """The output with the kept deep features; equals `full_step` where the inputs have not changed."""
        return self.shallow(**inputs | {"return_dict": False})[0]

    def forward(self, **inputs: Any) -> torch.Tensor:
        """The last output of one cycle on the same inputs: what a cycle costs depends on shapes alone."""
        output = self.full_step(**inputs)
        for _ in range(self.interval - 1):
            output = self.shallow_step(**inputs)
        return output


def outer_blocks(model: Any, features: nn.Module) -> Any:
    """The same network with nothing but its first down block and its last up block around `features`.

    The stock forward pass runs it unchanged: skip connections are taken from the end of the list, and the
    first down block leaves as many as the last up block takes.
    """
    if not hasattr(model, "up_blocks"):
        raise ValueError(f"{type(model).__name__} is no U-Net, and the cache is for those")
    first, last = model.down_blocks[0], model.up_blocks[-1]
    if hasattr(first, "skip_conv") or hasattr(last, "skip_conv"):
        raise ValueError(f"{type(first).__name__} and {type(last).__name__} pass images beside the features")
    first = shallow_copy(first)
    first.downsamplers = None  # what it would compute is the deep part's input
    outer = shallow_copy(model)
    outer.down_blocks, outer.up_blocks = nn.ModuleList([first]), nn.ModuleList([last])
    outer.mid_block = features
    return outer


def shallow_copy(module: nn.Module) -> Any:
    """A module with children of its own choice, and the same weights."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
