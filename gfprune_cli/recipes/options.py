"""What to do, as data: one place for every option's name, default, range and help.

A recipe is a frozen dataclass whose fields carry their range and help; its YAML has the same keys; flags
override them. The resolved recipe travels in the output's `gfprune.json`, and running it again reproduces
the output.
"""

import difflib
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le

from gfprune_cli.errors import UsageError

RECIPE_BYTES = 1 << 16
VALUE_CHARACTERS = 4096  # of one value
ALL = "all"  # in place of a component: every denoiser of the pipeline
SCALARS = (str, int, float, type(None))
RecipeT = TypeVar("RecipeT")


@dataclass(frozen=True, eq=False)
class Help:
    """What `--help` says of an option; `of` holds what it says of it in single commands."""

    text: str
    of: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Names:
    """The words that an option takes, where each stands for a row of a table.

    Args:
        known: those that the help names: told without importing the table.
        table: "module:attribute"; whatever else has a row there serves, too.
    """

    known: tuple[str, ...]
    table: str

    def all(self) -> tuple[str, ...]:
        module, _, attribute = self.table.partition(":")
        return tuple(dict.fromkeys((*self.known, *getattr(import_module(module), attribute))))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of a command that decide what it makes."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    def document(self) -> dict[str, Any]:
        """The resolved recipe, as it is written and read."""
        return asdict(self)


ModelOrFile = Annotated[
    str, Help("demo, a local diffusers folder, one .safetensors file, or a Hub id owner/name.")
]
ConfigFrom = Annotated[
    str | None,
    Help("For a model in one file: a diffusers folder, or Hub id, of its family (docs/clients.md)."),
]
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


def option_help(options: type, name: str, command: str = "") -> str:
    """What `--help` says of an option."""
    hints = get_type_hints(options, include_extras=True)
    found = next(part for part in hints[name].__metadata__ if isinstance(part, Help))
    return found.of.get(command, found.text)


def option_names(recipe: Any) -> list[str]:
    return [field.name for field in fields(recipe)]


def read_recipe(path: Path, lists: Iterable[str] = ()) -> dict[str, Any]:
    """The keys of a YAML recipe.

    Args:
        lists: the keys that may hold a list of values.

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
    for key, held in document.items():
        values = held if isinstance(held, list) and key in lists else [held]
        if kind := next((type(one).__name__ for one in values if not isinstance(one, SCALARS)), None):
            raise UsageError(f"--config {path}: {shown(key)} is a {kind}; give one value, text or a number")
        if not all(is_plain_text(one) for one in values if isinstance(one, str)):
            raise UsageError(
                f"--config {path}: {shown(key)} is longer than {VALUE_CHARACTERS} characters, or holds some "
                "that no name has"
            )
    return document


def is_plain_text(text: str) -> bool:
    """Whether a path or name can be of that text: not endless, no null bytes, no halves of characters."""
    halves = any("\ud800" <= character <= "\udfff" for character in text)
    return len(text) <= VALUE_CHARACTERS and "\0" not in text and not halves


def shown(value: object) -> str:
    """A value from a recipe or flag as it may stand in a message: not endless."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python prints no more than 4300 digits
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."


def resolve_recipe(recipe: type[RecipeT], config: Path | None, flags: Mapping[str, Any]) -> RecipeT:
    """Defaults, then the recipe file, then the flags that were given (those that are not None).

    Raises:
        UsageError: an unknown key or a value out of range, named as the flag that sets it.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    values = (read_recipe(config, lists_of(recipe)) if config else {}) | given
    unknown = next((key for key in values if key not in option_names(recipe)), None)
    if unknown is not None:
        where = "unknown setting" if unknown in given else f"--config {config}: unknown recipe key"
        known = sorted(option_names(recipe))
        raise UsageError(f"{where} {shown(unknown)}{meant(unknown, known)}; known keys: {', '.join(known)}")
    return validated(
        recipe, values, lambda name: flag(name) if name in given else f"--config {config}: {name}"
    )


def validated(options: type[RecipeT], values: Mapping[str, Any], named: Callable[[str], str]) -> RecipeT:
    """The options with these values, each checked against its type and range.

    Args:
        named: how a message calls an option.

    Raises:
        UsageError: a value is missing or out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        found = TypeAdapter(options).validate_python(dict(values))
    except ValidationError as error:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a list, what is wrong in it
        name = str(first["loc"][0]) if first["loc"] else "recipe"
        if first["type"] in ("missing", "missing_argument"):
            raise UsageError(f"{flag(name)} is missing: {option_help(options, name)}") from error
        hint = meant(first["input"], choices_of(options, name))
        raise UsageError(
            f"{named(name)} {shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}{hint}"
        ) from error
    for name, names in tables_of(options).items():
        value = getattr(found, name)
        if value not in names.known and value not in names.all():
            one, last = names.known[:-1], names.known[-1]
            words = f"{', '.join(map(repr, one))} or {last!r}"
            hint = meant(value, names.known)
            raise UsageError(f"{named(name)} {shown(value)}: input should be {words}{hint}")
    return found


def lists_of(options: type) -> set[str]:
    """The options that take several values."""
    hints = get_type_hints(options)
    return {
        name
        for name, kind in hints.items()
        if any(get_origin(part) is tuple for part in (kind, *get_args(kind)))
    }


def tables_of(options: type) -> dict[str, Names]:
    """Option -> the words that it takes, where a table has them."""
    hints = get_type_hints(options, include_extras=True)
    parts = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: part for name, found in parts.items() for part in found if isinstance(part, Names)}


def choices_of(options: type, name: str) -> tuple[str, ...]:
    """The words that an option takes; none where it takes any, or numbers."""
    names = tables_of(options).get(name)
    kind = get_type_hints(options)[name]
    parts = [part for part in (kind, *get_args(kind)) if get_origin(part) is Literal]
    return names.known if names else tuple(word for part in parts for word in get_args(part))


def meant(given: object, choices: Iterable[str]) -> str:
    """The end of a message about a name that is not known: which one it resembles, if any."""
    close = difflib.get_close_matches(str(given)[:80], list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse_idle(recipe: Any, because: str, *names: str) -> None:
    """Refuse settings that another one leaves without effect.

    Args:
        because: the flag that does so.
        names: of settings that have to be at their defaults then.

    Raises:
        UsageError: one of them is not.
    """
    if found := changed(recipe, *names):
        raise UsageError(f"{flag(found[0])} has no effect with {because}: drop one of the two")


def changed(recipe: Any, *names: str) -> list[str]:
    """Those of some settings that are not at their defaults."""
    defaults = {field.name: field.default for field in fields(recipe)}
    return [name for name in names if getattr(recipe, name) != defaults[name]]


def parsed_size(flag_name: str, text: str) -> tuple[int, int]:
    """(height, width) of "512", or of "512x768" (height x width).

    Raises:
        UsageError: it is no size.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise UsageError(f"{flag_name} {text}: give pixels, such as 512, or height x width: 512x768")
    height, width = int(parts[0]), int(parts[-1])
    if min(height, width) < 1:
        raise UsageError(f"{flag_name} {text}: must be at least 1")
    return height, width


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
