"""Which optimiser moves which weights.

adamw    AdamW (arXiv 1711.05101) for everything
muon     Muon (kellerjordan.github.io/posts/muon) for the matrices of the hidden layers, AdamW for the rest.
         Its steps are scaled to the size of AdamW's (arXiv 2502.16982, eq. 4), so both take one learning rate
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

OptimizerName = Literal["adamw", "muon"]
MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FusedAdamW = partial(torch.optim.AdamW, fused=True)  # one pass over memory: the loop takes 7 times as long
MUON_MOMENTS = ("momentum_buffer",)
ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(
    name: OptimizerName, network: nn.Module, *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser of a recipe, over all parameters of a network.

    Each of its parameter groups names, as `moments`, the tensors that it keeps in the state of a parameter.
    """
    matrices = hidden_matrices(network) if name == "muon" else {}
    others = [parameter for key, parameter in network.named_parameters() if key not in matrices]
    groups = [{"params": list(matrices.values()), "moments": MUON_MOMENTS}] if matrices else []
    groups.append({"params": others, "moments": ADAMW_MOMENTS})
    kind = MuonWithAdamW if matrices else FusedAdamW
    return kind(groups, lr=lr, weight_decay=weight_decay)


def hidden_matrices(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of the linear layers and convolutions that lie in lists of blocks.

    What lies outside of them, first and last layers and the embeddings of time and condition, is left to
    AdamW, as in Muon's publications; so are convolutions in groups, which are several matrices.
    """
    blocks = tuple(
        f"{name}." for name, module in network.named_modules() if isinstance(module, nn.ModuleList)
    )
    layers = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, MATRIX_LAYERS) and getattr(module, "groups", 1) == 1 and name.startswith(blocks)
    }
    return {name: parameter for name, parameter in network.named_parameters() if name in layers}


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW as one optimiser: one step, one state, one learning rate.

    Muon takes matrices only, so it is given a view [out, in * kernel] of every weight. Where a convolution is
    stored channels last, the view's columns are in that order, which means nothing to Muon: orthogonalisation
    commutes with permutations. State lies in `state`, by parameter and in its shape, as any optimiser's does.

    Args:
        groups: weights of linear layers and convolutions, whose storage must not be replaced; the others.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        matrices, others = (group["params"] for group in groups)
        self.views = {weight: nn.Parameter(as_matrix(weight.detach(), weight)) for weight in matrices}
        assert all(view.data_ptr() == weight.data_ptr() for weight, view in self.views.items())
        self.muon = torch.optim.Muon(
            self.views.values(), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = FusedAdamW([{"params": others}], lr=lr, weight_decay=weight_decay)
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        assert closure is None
        for worker, group in zip((self.muon, self.adamw), self.param_groups, strict=True):
            worker.param_groups[0]["lr"] = group["lr"]
        for weight, view in self.views.items():
            if weight.grad is None:
                continue
            view.grad = as_matrix(weight.grad, weight)
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            self.muon.state[view] = {"momentum_buffer": as_matrix(state["momentum_buffer"], weight)}
        self.muon.step()
        self.adamw.step()
        for view in self.views.values():
            view.grad = None


def as_matrix(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[out, in * kernel] of a tensor of a weight's shape, columns in the order in which the weight is stored.

    A view if the tensor is stored like the weight.
    """
    order = sorted(range(1, weight.ndim), key=weight.stride, reverse=True)
    return tensor.permute(0, *order).flatten(1)
