"""What to do, as data: one place for every option's name, default, range and help.

A recipe is a frozen dataclass whose fields carry their range and help; its YAML has the same keys; flags
override them. The resolved recipe travels in the output's `gfprune.json`, and running it again reproduces
the output.
"""

import stat
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from annotated_types import Ge, Le

from gfprune_cli.errors import UsageError

RECIPE_BYTES = 1 << 16
VALUE_CHARACTERS = 4096  # of one value
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

    from gfprune_cli.recipes.strict_yaml import load_mapping

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe or a device would hang
            raise UsageError(f"--config {path} is not a regular file: write the recipe into one")
        with path.open("rb") as stream:
            data = stream.read(RECIPE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path}: {getattr(error, 'strerror', error)}; check the path") from error
    if len(data) > RECIPE_BYTES:
        raise UsageError(f"--config {path}: larger than {RECIPE_BYTES} bytes; this is no recipe")
    try:
        document = load_mapping(data)
    # PyYAML's constructors raise what int(), chr() and datetime raise
    except (yaml.YAMLError, ValueError, ArithmeticError, RecursionError) as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise UsageError(f"--config {path}: a recipe is a mapping of option names to values")
    for key, value in document.items():
        if not isinstance(value, (str, int, float, type(None))):
            kind = type(value).__name__
            raise UsageError(f"--config {path}: {shown(key)} is a {kind}; give one value, text or a number")
        if isinstance(value, str) and not is_plain(value):
            raise UsageError(
                f"--config {path}: {shown(key)} is longer than {VALUE_CHARACTERS} characters, or holds some "
                "that no name has"
            )
    return document


def is_plain(text: str) -> bool:
    """Whether a path or name can be of that text: not endless, no null bytes, no halves of characters."""
    halves = any("\ud800" <= character <= "\udfff" for character in text)
    return len(text) <= VALUE_CHARACTERS and "\0" not in text and not halves


def shown(value: object) -> str:
    """A value from a recipe or flag as it may stand in a message: not endless."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python prints no more than 4300 digits
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."


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
                f"{where} {shown(name)}; known keys: {', '.join(sorted(option_names(recipe)))}"
            ) from error
        where = flag(name) if name in given else f"--config {config}: {name}"
        raise UsageError(
            f"{where} {shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from error


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
