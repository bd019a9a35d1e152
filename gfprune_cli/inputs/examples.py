"""One sample of what a denoiser takes, from its configuration alone.

    model(**example_inputs(model))          # any device, the meta device included

Sizes are those at which the family's published checkpoints are run; a configuration seldom says them.
"""

from typing import Any

from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.family import Inputs, Request, Sizes
from gfprune_cli.families.table import family_of

__all__ = ["Sizes", "example_inputs"]


def example_inputs(model: Any, sizes: Sizes | None = None) -> Inputs:
    """Keyword arguments of `forward` for one sample of zeros, on the model's device.

    Raises:
        GfpruneError: the class is not known here.
    """
    family = family_of(model)
    if family is None:
        raise GfpruneError(f"the inputs of {type(model).__name__} are not known: its pipeline is needed")
    return family.inputs(Request(model, sizes or Sizes()))
