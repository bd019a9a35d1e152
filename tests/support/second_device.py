"""A device that is not there: tensors on `CARD` stay in main memory, and refuse to meet others.

    with SecondDevice():
        gfprune_cli.prune(model, device=str(CARD), out=out)

On a machine without a GPU code that mixes devices runs as if nothing were wrong. Here functions of torch are
watched (`TorchFunctionMode`): what is made on `CARD`, or moved there, and what comes of it, is known to lie
there, what is made without a device to lie in main memory, and the two do not mix, but where CUDA lets them.
What autograd makes by itself is of neither, and mixes with both.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

CARD = torch.device("cpu", 1)
HOST = torch.device("cpu")
SIDES = WeakTensorKeyDictionary()  # tensor -> where it lies, as far as that is known
GETTER, DATA = torch.Tensor.device.__get__, torch.Tensor.data  # type: ignore[attr-defined]
ACROSS = {torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.type_as, torch._foreach_copy_}
INDEXED = {torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.index_put_}
ASKED = {torch.Tensor.__repr__, torch.Tensor.is_set_to, torch.device, torch._C._nn._parse_to}
ASKED |= {torch._has_compatible_shallow_copy_type}


def side_of(value: Any) -> torch.device | None:
    return SIDES.get(value) if isinstance(value, torch.Tensor) else None


def put(value: Any, side: torch.device | None) -> Any:
    if side is not None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                SIDES[tensor] = side
    return value


def on_host(value: Any) -> Any:
    """An argument as torch itself may see it."""
    is_card = (isinstance(value, torch.device) and value == CARD) or (
        isinstance(value, str) and value == str(CARD)
    )
    return HOST if is_card else value


class SecondDevice(TorchFunctionMode):
    """Within, `CARD` is a device of its own."""

    def __enter__(self) -> Any:
        make = self.make = torch.Tensor._make_subclass  # of parameters; it is not watched

        def made(kind: Any, data: torch.Tensor, *rest: Any) -> Any:
            return put(make(kind, data, *rest), side_of(data))

        torch.Tensor._make_subclass = staticmethod(made)  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.Tensor._make_subclass = self.make  # type: ignore[method-assign]
        super().__exit__(*raised)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function == GETTER:
            return side_of(args[0]) or function(*args)
        if function in ASKED:
            return function(*args, **kwargs)
        if function == torch.Tensor.to or function == torch.Tensor.cpu:
            return self.moved(function, args, kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if function == DATA.__set__:  # type: ignore[attr-defined]
            function(*args)
            return put(args[0], side_of(args[1]))
        wanted = self.device_in(args, kwargs)
        if not tensors or (wanted is not None and function != torch.Tensor.copy_):
            return self.made(function, args, kwargs, wanted or HOST)
        sides = {side_of(tensor) for tensor in tensors}
        if CARD in sides:
            self.check(function, args, kwargs, tensors)
        found = function(*args, **kwargs)
        if function == torch.Tensor.copy_:
            return found
        return put(found, CARD if CARD in sides else HOST if HOST in sides else None)

    @staticmethod
    def device_in(args: Any, kwargs: Any) -> torch.device | None:
        found = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.device)]
        if isinstance(kwargs.get("device"), str):
            found.append(torch.device(kwargs["device"]))
        return found[0] if found else None

    @staticmethod
    def made(function: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        """What is made on a device, in main memory."""
        if device == CARD and kwargs.get("generator") is not None:
            raise RuntimeError(f"{resolve_name(function)}: a generator of the CPU for a tensor on the card")
        plain = tree_map(on_host, (args, kwargs))
        found = function(*plain[0], **plain[1])
        meta = device.type == "meta"
        return found if meta else put(found, CARD if device == CARD else HOST)

    def moved(self, function: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        wanted = HOST if function == torch.Tensor.cpu else self.device_in(args[1:], kwargs)
        if wanted is None and len(args) > 1:
            if isinstance(args[1], torch.Tensor):
                wanted = side_of(args[1])
            elif isinstance(args[1], str):
                wanted = torch.device(args[1])
        plain = tree_map(on_host, (args[1:], kwargs))
        found = function(tensor, *plain[0], **plain[1])
        if found.is_meta or wanted is None:
            return put(found, side_of(tensor))
        side = CARD if wanted == CARD else HOST
        if found is tensor and side_of(tensor) != side:
            found = tensor.clone()
        return put(found, side)

    @staticmethod
    def check(function: Any, args: Any, kwargs: Any, tensors: Any) -> None:
        """Refuse what CUDA refuses."""
        if function == torch.Tensor.numpy:
            raise TypeError("numpy of a tensor on the card: copy it to main memory first")
        if function in ACROSS or (function in INDEXED and side_of(args[0]) == CARD):
            return
        strangers = [tensor for tensor in tensors if side_of(tensor) == HOST and tensor.ndim]
        if strangers:
            where = ", ".join(f"{tuple(tensor.shape)} on {side_of(tensor)}" for tensor in tensors)
            raise RuntimeError(f"{resolve_name(function)} of tensors in main memory and on the card: {where}")
