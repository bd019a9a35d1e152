"""Why a pipeline cannot be run: for want of images, of a size, or for reasons of its own."""

import inspect
import re
from collections.abc import Iterable
from typing import Any

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.errors import GfpruneError, UsageError

# what pipelines that change images are called with; often optional by the signature alone
ON_IMAGES = re.compile(r"Img2Img|Inpaint|Pix2Pix|Upscale|Depth2Img|ImageVariation|ImageToVideo")
IMAGES = ("image", "images", "mask_image", "control_image", "video", "mask", "conditioning")


def check_pipeline_class(found: Any, config: Any, size: str | None) -> None:
    """Refuse a pipeline that cannot be run, as far as its class and its network's configuration tell.

    Args:
        found: its class.
        config: of its network.
        size: that the user asked for.

    Raises:
        GfpruneError: it changes images; UsageError: nobody says what size to draw.
    """
    name, parameters = found.__name__, inspect.signature(found.__call__).parameters
    if ON_IMAGES.search(name) and any(key in parameters for key in IMAGES):
        raise GfpruneError(_for_want_of_images(name, parameters))
    unsaid = size is None and config.get("sample_size", 0) is None
    if unsaid and "height" in parameters and "cross_attention_dim" in config and "layers_per_block" in config:
        raise UsageError(_for_want_of_a_size(name))


def _for_want_of_images(name: str, parameters: Iterable[str]) -> str:
    lacking = " and ".join(key for key in IMAGES if key in parameters)
    return f"{name} cannot be run with a prompt alone: it takes {lacking}, which gfprune does not have"


def _for_want_of_a_size(name: str) -> str:
    return f"the network's config.json has no sample_size ({name}): add it, or give --size"


def not_run(pipeline: Any, network: Any, made: dict[str, Any], error: Exception) -> GfpruneError:
    """Why a pipeline failed: for want of images, for the size asked for, or for reasons of its own."""
    name, parameters = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    if any(key in parameters for key in IMAGES):
        return GfpruneError(f"{_for_want_of_images(name, parameters)} ({first_line(error)})")
    if "height" in parameters and "height" not in made and network.config.get("sample_size", 0) is None:
        return UsageError(_for_want_of_a_size(name))
    if "height" in made and "divisible" in str(error):
        return UsageError(f"--size: {first_line(error)}")
    return GfpruneError(f"{name} cannot be run: {first_line(error)}")
