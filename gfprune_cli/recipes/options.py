"""What to do, as data: one place for every option's name, default, range and help.

A recipe is a frozen dataclass whose fields carry their range and help; its YAML has the same keys; flags
override them. The resolved recipe travels in the output's `gfprune.json`, and running it again reproduces
the output.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from annotated_types import Ge, Le

from gfprune_cli.errors import UsageError

RECIPE_BYTES = 1 << 20
RecipeT = TypeVar("RecipeT")


@dataclass(frozen=True)
class Help:
    """What `--help` says of an option."""

    text: str


PromptsFile = Annotated[
    str | None, Help("Text file of prompts for drawn images, one per line (default: a built-in list).")
]
Size = Annotated[
    str | None, Help("Pixels of drawn images, 512 or height x width 512x768 (default: the pipeline's).")
]
Frames = Annotated[int | None, Ge(1), Le(4096), Help("Frames of drawn videos (default: the pipeline's).")]
GuidanceScale = Annotated[
    float | None,
    Ge(0),
    Le(1000),
    Help("Guidance scale of drawn images and of the loss; 1 switches it off (default: the pipeline's)."),
]


def option_help(recipe: type, name: str) -> str:
    """What `--help` says of a recipe key."""
    hints = get_type_hints(recipe, include_extras=True)
    return next(part.text for part in hints[name].__metadata__ if isinstance(part, Help))


def option_names(recipe: Any) -> list[str]:
    return [field.name for field in fields(recipe)]


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a YAML recipe.

    Raises:
        UsageError: not a readable YAML mapping.
    """
    import yaml

    try:
        if path.stat().st_size > RECIPE_BYTES:
            raise UsageError(f"--config {path}: larger than {RECIPE_BYTES} bytes; this is no recipe")
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise UsageError(f"--config {path}: a recipe is a mapping of option names to values")
    return document


def resolve_recipe(recipe: type[RecipeT], config: Path | None, flags: dict[str, Any]) -> RecipeT:
    """Defaults, then the recipe file, then the flags that were given (those that are not None).

    Raises:
        UsageError: an unknown key or a value out of range, named as the flag that sets it.
    """
    from pydantic import TypeAdapter, ValidationError

    given = {name: value for name, value in flags.items() if value is not None}
    values = (read_recipe(config) if config else {}) | given
    try:
        return TypeAdapter(recipe).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "recipe"
        if first["type"] in ("missing", "missing_argument"):
            raise UsageError(f"{flag(name)} is missing: {option_help(recipe, name)}") from error
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            where = "unknown setting" if name in given else f"--config {config}: unknown recipe key"
            raise UsageError(
                f"{where} {name!r}; known keys: {', '.join(sorted(option_names(recipe)))}"
            ) from error
        where = flag(name) if name in given else f"--config {config}: {name}"
        raise UsageError(
            f"{where} {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from error


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
