"""Why a pipeline cannot be run: for want of a size, or for reasons of its own."""

import inspect
from typing import Any

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.errors import GfpruneError, UsageError

# what diffusers does not import where it is not installed, and misses then
PACKAGES = {"ftfy": "ftfy", "bs4": "beautifulsoup4", "transforms": "torchvision"}


def check_pipeline_class(found: Any, config: Any, size: str | None) -> None:
    """Refuse a pipeline that cannot be run, as far as its class and its network's configuration tell.

    Args:
        found: its class.
        config: of its network.
        size: that the user asked for.

    Raises:
        UsageError: nobody says what size to draw.
    """
    unsaid = size is None and config.get("sample_size", 0) is None
    sized = "height" in inspect.signature(found.__call__).parameters
    if unsaid and sized and "cross_attention_dim" in config and "layers_per_block" in config:
        raise UsageError(_for_want_of_a_size(found.__name__))


def _for_want_of_a_size(name: str) -> str:
    return f"the network's config.json has no sample_size ({name}): add it, or give --size"


def not_run(pipeline: Any, network: Any, made: dict[str, Any], error: Exception) -> GfpruneError:
    """Why a pipeline failed: for the size asked for, or for reasons of its own."""
    name, parameters = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    if "height" in parameters and "height" not in made and network.config.get("sample_size", 0) is None:
        return UsageError(_for_want_of_a_size(name))
    if "height" in made and "divisible" in str(error):
        return UsageError(f"--size: {first_line(error)}")
    package = PACKAGES.get(str(getattr(error, "name", ""))) if isinstance(error, NameError) else None
    if package:
        return GfpruneError(f"{name} needs the package {package}: pip install {package}")
    return GfpruneError(f"{name} cannot be run: {first_line(error)}")
