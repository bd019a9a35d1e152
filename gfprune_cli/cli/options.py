"""Flags: made from the fields of a command's recipe and of `RunOptions`, which are the one place for them."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from gfprune_cli.recipes.options import choices_of, flag, option_help, option_names
from gfprune_cli.recipes.run_options import RunOptions

Config = Annotated[Path | None, typer.Option("--config", help="YAML recipe; flags override it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, tables or notices; errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def option_of(options: type, name: str, command: str) -> Any:
    """The Typer option of one field: its name, type, help and default are the field's."""
    kind = get_type_hints(options)[name]
    parts = [kind]
    if get_origin(kind) not in (Literal, tuple) and get_args(kind):
        parts = [part for part in get_args(kind) if part is not type(None)]
    bare, metavar, choices = parts[0], None, choices_of(options, name)
    several = next((part for part in parts if get_origin(part) is tuple), None)
    if several is not None:
        single = get_args(several)[0]
        metavar, bare = f"<{single.__name__}>", list[single]  # type: ignore[valid-type]
    elif choices or len(parts) > 1:  # a number or a word: the recipe tells them apart
        bare = str
        metavar = "[" + "|".join(choices) + "]" if choices and len(parts) == 1 else None
    default = getattr(options, name, None)
    silent = default is None or isinstance(default, bool | tuple)
    names = flag(name)
    if bare is bool and not issubclass(options, RunOptions):  # a recipe file may have set it
        names = f"{names}/--{names[5:]}" if name.startswith("no_") else f"{names}/--no-{names[2:]}"
    text = option_help(options, name, command) + ("" if silent else f" [default: {default}]")
    option = typer.Option(
        names,
        help=text,
        metavar=metavar,
        show_default=False,
        autocompletion=(lambda: list(choices)) if choices else None,
    )
    return Annotated[bare | None, option]


def with_options(
    recipe: type, run_options: type[RunOptions] = RunOptions
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of its recipe, of how it runs, and of what it prints."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        name = command.__name__.removeprefix("run_")
        fields = [(recipe, field) for field in option_names(recipe)]
        fields += [(run_options, field) for field in run_options.names(name)]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter(field, keyword, default=None, annotation=option_of(options, field, name))
            for options, field in fields
        ]
        if name != "analyze":
            parameters.append(inspect.Parameter("config", keyword, default=None, annotation=Config))
        for flag_name, kind in (("json", Json), ("quiet", Quiet), ("debug", Debug)):
            parameters.append(inspect.Parameter(flag_name, keyword, default=False, annotation=kind))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return command

    return decorate
