"""One sample of what a denoiser takes, from its configuration alone.

    model(**example_inputs(model))          # any device, the meta device included

Sizes are those at which the family's published checkpoints are run; a configuration seldom says them.
"""

from typing import Any

from gfprune_cli.families.family import Inputs, Request, Sizes
from gfprune_cli.families.table import family_of
from gfprune_cli.inputs.signature import inputs_by_name

__all__ = ["Sizes", "example_inputs"]


def example_inputs(model: Any, sizes: Sizes | None = None) -> Inputs:
    """Keyword arguments of `forward` for one sample of zeros, on the model's device.

    Raises:
        GfpruneError: the class is not known here, and its configuration does not tell.
    """
    family = family_of(model)
    if family is None or family.inputs is None:
        return inputs_by_name(model, sizes or Sizes())
    return family.inputs(Request(model, sizes or Sizes()))
