"""`gfprune analyze`."""

from pathlib import Path
from typing import Annotated

import typer

from gfprune_cli.cli.options import Debug, Device, Json, Offline, Quiet
from gfprune_cli.cli.pages import check_page, write_page
from gfprune_cli.cli.session import Session
from gfprune_cli.recipes.options import option_help
from gfprune_cli.recipes.prune import PruneRecipe


def analyze(
    model: Annotated[str, typer.Option("--model", help=option_help(PruneRecipe, "model"))] = "demo",
    sparsity: Annotated[
        list[float] | None, typer.Option("--sparsity", help="Plan for this sparsity; may be repeated.")
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", help=option_help(PruneRecipe, "budget"), metavar="[both|params|macs]")
    ] = PruneRecipe.budget,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity", help="Measure how the loss rises as each group shrinks (loads weights)."
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a self-contained page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the --html file if it exists.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help=option_help(PruneRecipe, "revision"))
    ] = None,
    variant: Annotated[
        str | None, typer.Option("--variant", help=option_help(PruneRecipe, "variant"))
    ] = None,
    component: Annotated[
        str | None, typer.Option("--component", help="Pipeline component to analyze (default: the denoiser).")
    ] = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Count whole residual blocks as groups too.")
    ] = False,
    prune_width: Annotated[
        bool, typer.Option("--prune-width", help="And the residual width of transformers.")
    ] = False,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help=option_help(PruneRecipe, "prompts"))
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help=option_help(PruneRecipe, "size"))] = None,
    frames: Annotated[int | None, typer.Option("--frames", help=option_help(PruneRecipe, "frames"))] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help=option_help(PruneRecipe, "guidance"))
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
        from gfprune_cli.cli.tables import analysis_text
        from gfprune_cli.errors import UsageError
        from gfprune_cli.pruning.analyze import analyze as run

        if budget not in ("both", "params", "macs"):
            raise UsageError(f"--budget {budget!r}: use both, params or macs")
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
            blocks=blocks,
            prune_width=prune_width,
            prompts=prompts,
            size=size,
            frames=frames,
            guidance=guidance,
            offline=offline,
            device=device,
            report=session.report,
        )
        if html is not None:
            from gfprune_cli.pages.analysis_page import render

            write_page(html, render(found.document()))
            session.note(f"wrote {html}")
        session.result(found.document(), analysis_text(found))
