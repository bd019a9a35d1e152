"""What model_index.json may name beside the network: classes that diffusers and transformers have themselves.

An output is loaded with `trust_remote_code=True`, for the sake of gfprune's own file. Whatever else a
pipeline could make diffusers run must not travel into it.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.files import quoted
from gfprune_cli.checkpoint.layout import PRUNED_MODULES, pipeline_components
from gfprune_cli.errors import GfpruneError

LIBRARIES = ("diffusers", "transformers", *PRUNED_MODULES)
# AutoModel and the like load the class, or the code, a config names
_CHOOSES = re.compile(r"Auto(?!encoder)")


def check_entries(pipeline: dict[str, Any], path: Path) -> None:
    """Refuse a pipeline that names code of its own.

    Args:
        pipeline: the parsed model_index.json, `path`.

    Raises:
        GfpruneError: a component's library is none of these, or its class chooses others.
    """
    if not isinstance(pipeline.get("_class_name", ""), str):
        raise GfpruneError(
            f"{path}: '_class_name' is no text: pipelines with code of their own are not pruned"
        )
    known = pipeline_components(pipeline)
    for name, value in pipeline.items():
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str) for part in value):
            continue
        library, class_name = known.get(name, (value[0], ""))
        if not class_name or not is_library(library):
            raise GfpruneError(
                f"{path}: {quoted(name)} comes from {quoted(value[0])}, which is neither diffusers nor "
                "transformers: pipelines with code of their own are not pruned"
            )
        if library in ("diffusers", "transformers") and _CHOOSES.match(class_name):
            raise GfpruneError(
                f"{path}: {quoted(name)} is {quoted(class_name)}, which loads other classes: name the class"
            )


def is_library(name: str) -> bool:
    """Whether it is one of the libraries, or the folder of a pipeline inside diffusers; imports nothing."""
    if name in LIBRARIES:
        return True
    spec = importlib.util.find_spec("diffusers")
    places = (spec.submodule_search_locations or []) if spec else []
    parents = [Path(place, "pipelines", *inner) for place in places for inner in ((), ("deprecated",))]
    return name.isidentifier() and any((parent / name / "__init__.py").is_file() for parent in parents)
