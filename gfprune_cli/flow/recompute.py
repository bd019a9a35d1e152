"""Activations that are computed again on the way back, block by block, behind masks.

    recompute = Recompute.of(model)                                  # None where a network cannot
    with recompute.at(passing): ...                                  # forward; backward at any time after it

A block keeps its inputs alone (arXiv 1604.06174). When its turn comes on the way back, it runs again with
the masked weights that it ran with, which are made anew as well.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Self

from torch import nn
from torch.utils.checkpoint import checkpoint

from gfprune_cli.flow.passing import PassingWeights, given_weights, reading_weights


class Recompute:
    """What the blocks of a network are called through where gradients are taken.

    Args:
        model: a network of diffusers, which knows its blocks.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.passing: PassingWeights | None = None
        model.enable_gradient_checkpointing(self)

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        return cls(model) if can_recompute(model) else None

    @contextmanager
    def at(self, passing: PassingWeights, *, again: bool = False) -> Iterator[None]:
        """Run the network with these weights; what blocks compute within is let go.

        Args:
            again: on the way back, when what autograd keeps is kept for one block.
        """
        before, self.passing = self.passing, passing
        try:
            with (reading_weights if again else given_weights)(self.model, passing):
                yield
        finally:
            self.passing = before

    def __call__(self, block: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        passing = self.passing
        if passing is None:
            return block(*inputs, **named)
        # nothing random happens in eval mode
        return checkpoint(
            block,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), self.at(passing, again=True)),
            **named,
        )


def can_recompute(model: nn.Module) -> bool:
    return bool(getattr(model, "_supports_gradient_checkpointing", False))
