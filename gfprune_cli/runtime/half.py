"""Weights that are kept in half precision and read in float32.

    keep_in_half(network, torch.bfloat16)     # half the memory
    network(x)                                # the numbers of a float32 network with these weights

What half precision can hold it holds exactly, so nothing is rounded but what is written into such weights.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

# what leaves the numbers as they are, or asks about their memory; all else is computed in float32
AS_STORED = {
    *("detach", "clone", "contiguous", "index_select", "cpu", "cuda", "requires_grad_", "__hash__"),
    *("size", "stride", "dim", "ndimension", "numel", "nelement", "__len__", "element_size", "get_device"),
    *("storage_offset", "untyped_storage", "data_ptr", "is_contiguous", "is_floating_point", "is_complex"),
}
COMPUTED = {"T", "mT", "H", "mH", "real", "imag"}  # attributes that are new tensors
HALVES = (torch.bfloat16, torch.float16)
CHANGES = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "and", "or", "xor"))}


class Half(torch.Tensor):
    """A tensor that says it is float32, and is in every computation, but is held in half precision.

    `copy_` rounds what it is given. Nothing else changes such a tensor.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        name = func.__name__
        if name in ("__get__", "__set__", "__delete__"):
            attribute = func.__self__.__name__
            if attribute == "dtype":
                return torch.promote_types(as_stored(first).dtype, torch.float32)
            if attribute not in COMPUTED:
                return super().__torch_function__(func, types, args, kwargs)
        if isinstance(first, Half):
            if name in AS_STORED:
                return super().__torch_function__(func, types, args, kwargs)
            if name == "to" and (place := move_asked(first, *args[1:], **kwargs)) is not None:
                return super().__torch_function__(func, types, (first,), place)
            if name == "copy_":
                as_stored(first).copy_(*map(wide, args[1:]), **kwargs)
                return first
            if name in CHANGES or (name.endswith("_") and not name.endswith("__")):
                raise TypeError(f"weights that are kept in half precision change by copy_ alone, not {name}")
        args, kwargs = tree_map_only(Half, wide, (tuple(args), kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Half":
        if id(self) not in memo:
            copied = self.detach().clone()
            if isinstance(self, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=self.requires_grad)
            memo[id(self)] = copied
        found: Half = memo[id(self)]
        return found


def move_asked(tensor: Half, *args: Any, copy: bool = False, **kwargs: Any) -> dict[str, Any] | None:
    """What `to` is asked for beside the type that the tensor says it has; None if that is another one."""
    found: Any = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype, non_blocking, memory_format = found
    if dtype not in (None, tensor.dtype):
        return None
    place = dict(device=device or tensor.device, non_blocking=non_blocking, copy=copy)
    return place if memory_format is None else {**place, "memory_format": memory_format}


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a plain tensor, in half precision where it is kept so."""
    if not isinstance(tensor, Half):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def wide(tensor: Any) -> Any:
    """A plain tensor in float32 of what is kept in half precision; all else as it is."""
    if not isinstance(tensor, Half):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.as_subclass(torch.Tensor)
    return plain.to(torch.promote_types(plain.dtype, torch.float32))


def as_half(tensor: torch.Tensor) -> Half:
    """What is in half precision, to be read in float32."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Half)


def is_half(parameter: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether weights that are stored so are kept in half precision: matrices alone, which are nearly all."""
    return isinstance(parameter, nn.Parameter) and parameter.ndim > 1 and stored.dtype in HALVES


def keep_in_half(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep the matrices of a network in half precision, in place, as far as that loses nothing."""

    def narrowed(parameter: nn.Parameter) -> torch.Tensor:
        short = parameter.detach().to(dtype)
        if isinstance(parameter, Half) or not is_half(parameter, short):
            return parameter
        return as_half(short) if torch.equal(short.float(), parameter.detach()) else parameter

    return with_parameters(network, narrowed)


def kept_in(network: nn.Module, half: str | None) -> nn.Module:
    """The network, its matrices in a half precision by its name in torch; in float32 where there is none."""
    return widen(network) if half is None else keep_in_half(network, getattr(torch, half))


def half_of(network: nn.Module) -> str | None:
    """The half precision that matrices of a network are kept in, by its name in torch; None: in none."""
    found = (as_stored(weight).dtype for weight in network.parameters() if isinstance(weight, Half))
    return next((half_name(dtype) for dtype in found if dtype in HALVES), None)


def half_name(dtype: torch.dtype) -> str:
    """The name of a type in torch."""
    return str(dtype).removeprefix("torch.")


def widen(network: nn.Module) -> nn.Module:
    """Hold all weights of a network in float32, in place."""
    return with_parameters(network, wide)


def without_reading(network: nn.Module) -> nn.Module:
    """The weights of a network as plain tensors of the type that they are held in, in place."""
    return with_parameters(network, as_stored)


def with_parameters(network: nn.Module, change: Callable[[nn.Parameter], torch.Tensor]) -> nn.Module:
    """Replace parameters, one at a time; those that modules share stay shared."""
    known: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in known:
                changed = change(parameter)
                if changed is not parameter:
                    changed = nn.Parameter(changed.detach(), requires_grad=parameter.requires_grad)
                known[id(parameter)] = known[id(changed)] = changed
            module._parameters[name] = known[id(parameter)]
    return network


class Widened(Mapping[str, torch.Tensor]):
    """Weights that are read in float32 when they are asked for.

    Args:
        stored: name -> weights, some in half precision.
        halves: names of those.
    """

    def __init__(self, stored: Mapping[str, torch.Tensor], halves: frozenset[str]) -> None:
        self.stored, self.halves = stored, halves

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self.stored[name]
        return found.float() if name in self.halves else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)
