"""The command line: parse, call, render. Nothing heavy is imported before a command runs."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from gfprune_cli import __version__
from gfprune_cli.cli.session import Session
from gfprune_cli.recipe import PruneRecipe, flag, option_help, option_names

app = typer.Typer(
    name="gfprune",
    help="Compress diffusion checkpoints by structured gradient-flow pruning.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, tables or notices; errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Device = Annotated[str | None, typer.Option("--device", help="Torch device (default: CUDA if there is one).")]


def show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress diffusion checkpoints by structured gradient-flow pruning."""


def recipe_option(name: str) -> Any:
    """The Typer option of one recipe field: its name, type, help and default come from the recipe."""
    kind = get_type_hints(PruneRecipe)[name]
    parts = (
        [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) is not Literal else []
    )
    bare = parts[0] if parts else kind
    metavar = None
    if get_origin(bare) is Literal:
        metavar, bare = "[" + "|".join(get_args(bare)) + "]", str
    default = getattr(PruneRecipe, name)
    shown = "" if default is None or isinstance(default, bool) else f" [default: {default}]"
    option = typer.Option(flag(name), help=option_help(name) + shown, metavar=metavar, show_default=False)
    return Annotated[bare | None, option]


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Put the recipe's fields in front of a command's own options."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=recipe_option(name))
        for name in option_names()
    ]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    parameters = [*options, *own]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return command


@app.command()
@with_recipe_options
def prune(
    out: Annotated[
        Path | None, typer.Option("--out", help="Output folder (default: named after model and settings).")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML recipe; flags override it.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run, if there is one.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output that exists, and discard saved state.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    offline: Offline = False,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Prune a checkpoint: score, mask softly, train, remove channels, write safetensors.

    Prints the path of the result, or one JSON document with --json.
    """
    with Session(quiet=quiet, debug=debug, json=json, offline=offline) as session:
        from gfprune_cli.cli.tables import prune_table
        from gfprune_cli.pruning import prune as run
        from gfprune_cli.recipe import resolve_recipe

        recipe = resolve_recipe(config, flags)
        result = run(
            recipe,
            out=out,
            force=force,
            resume=resume,
            dry_run=dry_run,
            offline=offline,
            device=device,
            report=session.report,
        )
        session.show(prune_table(result))
        session.result(result.document(), result.output or "")


@app.command()
def analyze(
    model: Annotated[str, typer.Option("--model", help=option_help("model"))] = "demo",
    sparsity: Annotated[
        list[float] | None, typer.Option("--sparsity", help="Plan for this sparsity; may be repeated.")
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", help=option_help("budget"), metavar="[params|macs]")
    ] = PruneRecipe.budget,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity", help="Measure how the loss rises as each group shrinks (loads weights)."
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a self-contained page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the --html file if it exists.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help=option_help("revision"))] = None,
    variant: Annotated[str | None, typer.Option("--variant", help=option_help("variant"))] = None,
    component: Annotated[
        str | None, typer.Option("--component", help="Pipeline component to analyze (default: the denoiser).")
    ] = None,
    offline: Offline = False,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show channel groups, their cost, and what each sparsity would leave.

    Reads only configuration and safetensors headers, unless --sensitivity is given.
    """
    with Session(quiet=quiet, debug=debug, json=json, offline=offline) as session:
        from gfprune_cli.analysis import analyze as run
        from gfprune_cli.cli.tables import analysis_text
        from gfprune_cli.errors import UsageError

        if budget not in ("params", "macs"):
            raise UsageError(f"--budget {budget!r}: use params or macs")
        if html is not None:
            check_page(html, force=force)
        found = run(
            model,
            sparsity=sparsity or (),
            budget=budget,  # type: ignore[arg-type]
            sensitivity=sensitivity,
            revision=revision,
            variant=variant,
            component=component,
            offline=offline,
            device=device,
            report=session.report,
        )
        if html is not None:
            write_page(html, found.document())
            session.note(f"wrote {html}")
        session.result(found.document(), analysis_text(found))


def check_page(path: Path, *, force: bool) -> None:
    """Refuse before the work, not after it."""
    from gfprune_cli.errors import UsageError

    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--html {path}: name a file in a folder that exists")
    if path.exists() and not force:
        raise UsageError(f"--html {path} exists: use --force to replace it, or another name")


def write_page(path: Path, document: dict[str, Any]) -> None:
    """The page appears whole or not at all."""
    from gfprune_cli.checkpoint.durable import write_file
    from gfprune_cli.report.analysis_page import render

    write_file(path, render(document).encode())


def run() -> None:
    """Entry point of the `gfprune` script."""
    app(prog_name="gfprune")


if __name__ == "__main__":
    run()
