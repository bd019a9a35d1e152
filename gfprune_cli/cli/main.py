"""The command line: parse, call, render. Nothing heavy is imported before a command runs."""

from typing import Annotated

import typer

from gfprune_cli import __version__
from gfprune_cli.cli.commands import COMMANDS

app = typer.Typer(
    name="gfprune",
    help="Compress diffusion checkpoints by structured gradient-flow pruning.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, command in COMMANDS.items():
    app.command(name)(command)


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


def run() -> None:
    """Entry point of the `gfprune` script."""
    app(prog_name="gfprune")


if __name__ == "__main__":
    run()
