"""Two networks that are to be one: the same weights to the last bit, the same outputs to rounding.

Outputs are not compared bit by bit: a kernel may sum in another order where weights lie otherwise in
memory, as they do once they were read from a file, and whether it does depends on the processor.
"""

from typing import Any

import torch


def assert_same(first: Any, second: Any, *args: Any, **given: Any) -> None:
    """Both networks hold the same tensors, and answer the same to the given inputs."""
    held, expected = first.state_dict(), second.state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in expected)
    with torch.no_grad():
        answers = (network(*args, **given).sample for network in (first, second))
        torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-6)
