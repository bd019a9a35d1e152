"""How a run computes on its device: the same bytes for a seed, and few waits for the device."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gfprune_cli.flow.energy import Loss, Weights, gradient, norm
from gfprune_cli.runtime.device import deterministic


class Looks(TorchDispatchMode):
    """Counts how often the value of a tensor is asked for: on a GPU, each time waits for all of its work."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **(kwargs or {}))


def settings() -> tuple[Any, ...]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    debugging: Any = torch.utils.deterministic
    return (
        *(cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        debugging.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("filled", [True, False])
def test_deterministic_runs_give_the_settings_back(filled: bool) -> None:
    debugging: Any = torch.utils.deterministic
    before = settings()
    debugging.fill_uninitialized_memory = filled
    try:
        given_to_us = settings()
        inside = None
        with suppress(KeyError), deterministic():
            inside = settings()
            raise KeyError
        assert inside == (False, True, False, False, True, True, False)
        assert settings() == given_to_us
    finally:
        debugging.fill_uninitialized_memory = before[-1]


def chunk(number: int) -> Loss:
    return lambda weights: (weights["a"] * number).square().sum() + weights["b"].sum()


@given(chunks=st.integers(1, 9), size=st.integers(1, 5))
def test_a_gradient_over_many_chunks_looks_at_the_loss_once(chunks: int, size: int) -> None:
    weights: Weights = {"a": torch.ones(size), "b": torch.arange(3.0)}
    with Looks() as looks:
        loss, found = gradient([chunk(number) for number in range(chunks)], weights)
    assert looks.count == 1
    squares = sum(number**2 for number in range(chunks)) / chunks
    assert loss == pytest.approx(squares * size + 3)
    assert torch.allclose(found["a"], torch.full((size,), 2 * squares))


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_a_norm_looks_at_no_tensor_by_itself(sizes: list[int]) -> None:
    tensors = {str(number): torch.full((size,), 2.0) for number, size in enumerate(sizes)}
    with Looks() as looks:
        assert norm(tensors) == pytest.approx(2 * sum(sizes) ** 0.5)
    assert looks.count == 0
