"""Options that commands share, and the one way in which a recipe's fields become flags."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from gfprune_cli.recipes.options import flag, option_help, option_names

Out = Annotated[
    Path | None, typer.Option("--out", help="Output folder (default: named after model and settings).")
]
Config = Annotated[Path | None, typer.Option("--config", help="YAML recipe; flags override it.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, if there is one.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace an output that exists, and discard saved state.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, tables or notices; errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Device = Annotated[str | None, typer.Option("--device", help="Torch device (default: CUDA if there is one).")]
OffloadTeacher = Annotated[
    bool,
    typer.Option("--offload-teacher", help="Keep the dense model in main memory while the device trains."),
]


def recipe_option(recipe: type, name: str) -> Any:
    """The Typer option of one recipe field: its name, type, help and default come from the recipe."""
    kind = get_type_hints(recipe)[name]
    parts = (
        [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) is not Literal else []
    )
    bare = parts[0] if parts else kind
    metavar = None
    if len(parts) > 1:  # a number or a word: the recipe tells them apart
        bare = str
    elif get_origin(bare) is Literal:
        metavar, bare = "[" + "|".join(get_args(bare)) + "]", str
    default = getattr(recipe, name, None)
    shown = "" if default is None or isinstance(default, bool) else f" [default: {default}]"
    names = f"{flag(name)}/--no-{flag(name)[2:]}" if bare is bool else flag(name)
    option = typer.Option(names, help=option_help(recipe, name) + shown, metavar=metavar, show_default=False)
    return Annotated[bare | None, option]


def with_recipe_options(recipe: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put the fields of a recipe in front of a command's own options."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        keyword = inspect.Parameter.KEYWORD_ONLY
        options = [
            inspect.Parameter(name, keyword, default=None, annotation=recipe_option(recipe, name))
            for name in option_names(recipe)
        ]
        parameters = [*options, *(parameter.replace(kind=keyword) for parameter in own)]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return command

    return decorate
