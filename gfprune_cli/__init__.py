"""gfprune: compress diffusion checkpoints by structured gradient-flow pruning.

import gfprune_cli as gfprune

result = gfprune.prune(model="demo", sparsity=0.5, out="demo-pruned")
result = gfprune.finetune("demo-pruned", steps=500, out="demo-finetuned")
unet = gfprune.load("demo-finetuned")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gfprune_cli.api import analyze, carry, evaluate, export, finetune, load, prune

__version__ = "0.1.0"
__all__ = ["analyze", "carry", "evaluate", "export", "finetune", "load", "prune"]


def __getattr__(name: str) -> Any:
    """Import a verb when it is first used: torch and diffusers take seconds to load."""
    if name in __all__:
        from gfprune_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
