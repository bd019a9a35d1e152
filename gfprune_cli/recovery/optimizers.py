"""Which optimiser moves which weights.

adamw      AdamW (arXiv 1711.05101) for everything
muon       Muon (kellerjordan.github.io/posts/muon) for the matrices of the hidden layers, AdamW for the rest.
           Its steps have the size of AdamW's (arXiv 2502.16982, eq. 4), so that both take one learning rate
soap       SOAP (arXiv 2409.11321) for the weights of linear layers and convolutions that are not too wide,
           first and last ones too; Muon for wider ones of the hidden layers, AdamW for the rest: see soap.py
adamw8bit  AdamW of bitsandbytes, whose moments take a byte each (arXiv 2110.02861)
adafactor  Adafactor (arXiv 1804.04235): of a matrix only sums over rows and columns are kept. Its rate is
           relative to the size of a weight
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.errors import UsageError
from gfprune_cli.recipes.finetune import MUON_RATE, RATE, SOAP_RATE
from gfprune_cli.recovery import soap
from gfprune_cli.recovery.pieces import piece

OptimizerName = Literal["soap", "muon", "adamw", "adamw8bit", "adafactor"]
MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Adafactor = partial(torch.optim.Adafactor, foreach=False)  # one weight after the other: less at once
FusedAdamW = partial(torch.optim.AdamW, fused=True)  # one pass over memory: the loop takes 7 times as long


def make_optimizer(
    name: OptimizerName, network: nn.Module, *, lr: float, weight_decay: float, batch: int = 8
) -> torch.optim.Optimizer:
    """The optimiser of a recipe, over all parameters of a network that want gradients.

    Args:
        batch: samples of a step.

    Raises:
        UsageError: its library is not installed.
    """
    training = {key: parameter for key, parameter in network.named_parameters() if parameter.requires_grad}
    if name in ("adafactor", "adamw8bit"):
        kind = Adafactor if name == "adafactor" else eight_bit_optimizers().AdamW8bit
        return OfMatrices(kind, list(training.values()), lr=lr, weight_decay=weight_decay)
    chosen = soap_weights(network) if name == "soap" else hidden_matrices(network)
    matrices = {key: training[key] for key in chosen if key in training}
    if name == "adamw" or not matrices:
        return FusedAdamW(training.values(), lr=lr, weight_decay=weight_decay)
    groups = [{"params": list(matrices.values())}]
    groups.append({"params": [parameter for key, parameter in training.items() if key not in matrices]})
    if name == "muon":
        return MuonWithAdamW(groups, lr=lr, weight_decay=weight_decay)
    made = SoapWithAdamW(groups, lr=lr, weight_decay=weight_decay)
    made.every = soap.basis_steps(batch)
    return made


def eight_bit_optimizers() -> Any:
    """`bitsandbytes.optim`.

    Raises:
        UsageError: it is not installed, or not for this machine.
    """
    try:
        return import_module("bitsandbytes.optim")
    except (ImportError, OSError) as error:
        raise UsageError(
            f"--optimizer adamw8bit needs bitsandbytes ({first_line(error)}): pip install 'gfprune[8bit]', or"
            " use adafactor"
        ) from error


def matrices(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of linear layers and convolutions but those in groups, which are several matrices."""
    layers = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, MATRIX_LAYERS) and getattr(module, "groups", 1) == 1
    }
    return {name: parameter for name, parameter in network.named_parameters() if name in layers}


def hidden_matrices(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of the linear layers and convolutions that lie in lists of blocks.

    What lies outside of them, first and last layers and the embeddings of time and condition, is left to
    AdamW, as in Muon's publications.
    """
    blocks = tuple(
        f"{name}." for name, module in network.named_modules() if isinstance(module, nn.ModuleList)
    )
    return {name: weight for name, weight in matrices(network).items() if name.startswith(blocks)}


def soap_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of what SOAP moves, or Muon in its place; what is wide and outside of blocks is left.

    First and last layers are among them: left to AdamW, they train more slowly than all others.
    """
    hidden = hidden_matrices(network)
    return {key: one for key, one in matrices(network).items() if soap.fits(one) or key in hidden}


def soap_numbers(network: nn.Module) -> int:
    """How many numbers SOAP, and Muon and AdamW beside it, keep of a network that trains as a whole."""
    chosen = soap_weights(network)
    kept = sum(
        soap.numbers_kept(as_modes(one, one)) if soap.fits(one) else one.numel() for one in chosen.values()
    )
    others = sum(one.numel() for one in network.parameters()) - sum(one.numel() for one in chosen.values())
    return kept + 2 * others


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for matrices and torch.optim.AdamW for all else: one step, one state.

    Matrices are views [out, in * kernel] of weights. Where a convolution is stored channels last, the view's
    columns are in that order, which means nothing to either: orthogonalisation and eigenbases commute with
    permutations. State lies in `state`, by parameter, as any optimiser's does.

    Args:
        groups: weights of linear layers and convolutions, whose storage must not be replaced; the others.
    """

    share = share_of_others = 1.0  # of the learning rate, that Muon and AdamW have

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        matrices, others = (group["params"] for group in groups)
        self.views = {weight: nn.Parameter(as_matrix(weight.detach(), weight)) for weight in matrices}
        assert all(piece(view).data_ptr() == piece(weight).data_ptr() for weight, view in self.views.items())
        self.muon = torch.optim.Muon(
            self.views.values(), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = FusedAdamW([{"params": others}], lr=lr, weight_decay=weight_decay)
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        assert closure is None
        self.move({weight: view for weight, view in self.views.items() if weight.grad is not None})
        self.adamw.param_groups[0]["lr"] = self.share_of_others * self.param_groups[1]["lr"]
        self.adamw.step()

    def move(self, views: dict[nn.Parameter, nn.Parameter]) -> None:
        """One step of the matrices that have gradients."""
        self.muon.param_groups[0]["lr"] = self.share * self.param_groups[0]["lr"]
        for weight, view in views.items():
            view.grad = as_matrix(weight.grad, weight)  # type: ignore[arg-type]
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            self.muon.state[view] = {"momentum_buffer": as_matrix(state["momentum_buffer"], weight)}
        self.muon.step()
        for view in views.values():
            view.grad = None


class SoapWithAdamW(MuonWithAdamW):
    """SOAP for the weights that are not too wide; Muon for those that are, and AdamW for all else.

    Each has the rate that is its best: with AdamW at SOAP's samples drift, and their Frechet distance grows.
    """

    share, share_of_others = MUON_RATE / SOAP_RATE, RATE / SOAP_RATE
    every = soap.BASIS_STEPS  # steps from one iteration of the bases to the next
    steps: int | None = None  # where all states know it, none of them is asked: that waits for a device

    def move(self, views: dict[nn.Parameter, nn.Parameter]) -> None:
        narrow = [weight for weight in views if soap.fits(weight)]
        super().move({weight: view for weight, view in views.items() if not soap.fits(weight)})
        if self.steps is None:
            self.steps = max((int(self.state[weight].get("step", 0)) for weight in narrow), default=0)
        self.steps += 1
        group = self.param_groups[0]
        for weight in narrow:
            modes = as_modes(weight.detach(), weight)
            state = self.state[weight]
            if not state:
                state |= soap.empty_state(modes)
            state["step"] = torch.tensor(float(self.steps))
            gradient = as_modes(weight.grad, weight)  # type: ignore[arg-type]
            rates = {"lr": group["lr"], "decay": group["weight_decay"]}
            soap.precondition(modes, gradient, state, self.steps, every=self.every, **rates)


class OfMatrices(torch.optim.Optimizer):
    """Another optimiser, on a view [out, in * kernel] of every convolution; its state is kept by weight.

    On a weight [out, in, 3, 3] itself Adafactor would keep sums over the rows and columns of each kernel,
    two thirds of what is to be saved, and bitsandbytes would put weights that are stored channels last
    elsewhere: it works on memory as it lies.

    Args:
        kind: of the optimiser; takes parameters, lr and weight_decay.
        parameters: whose storage must not be replaced.
    """

    def __init__(
        self,
        kind: Callable[..., torch.optim.Optimizer],
        parameters: list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.views = {
            weight: nn.Parameter(as_matrix(weight.detach(), weight)) if weight.ndim > 2 else weight
            for weight in parameters
        }
        self.worker = kind(self.views.values(), lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step."""
        assert closure is None
        self.worker.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        for weight, view in self.views.items():
            if view is not weight and weight.grad is not None:
                view.grad = as_matrix(weight.grad, weight)
            self.worker.state[view] = self.state[weight]
        self.worker.step()
        for weight, view in self.views.items():
            if view is not weight:
                view.grad = None


def as_matrix(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[out, in * kernel] of a tensor of a weight's shape, columns in the order in which the weight is stored.

    A view if the tensor is stored like the weight.
    """
    order = sorted(range(1, weight.ndim), key=weight.stride, reverse=True)
    return tensor.permute(0, *order).flatten(1)


def as_modes(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A tensor of a weight's shape as [out, in], or [out, in, kernel] or [out, kernel, in] as the weight is
    stored. A view if the tensor is stored like the weight.
    """
    matrix, inputs = as_matrix(tensor, weight), weight.shape[1]
    kernel = matrix.shape[1] // inputs
    if kernel == 1:
        return matrix
    last = weight.stride(1) < min(weight.stride()[2:])  # channels last
    return matrix.unflatten(1, (kernel, inputs) if last else (inputs, kernel))
