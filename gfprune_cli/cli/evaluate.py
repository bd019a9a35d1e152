"""`gfprune eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gfprune_cli.cli.options import (
    Config,
    Debug,
    Device,
    Force,
    Json,
    Offline,
    Quiet,
    Resume,
    with_recipe_options,
)
from gfprune_cli.cli.pages import check_page, write_page
from gfprune_cli.cli.session import Session
from gfprune_cli.launch import check_launcher, main_process
from gfprune_cli.recipes.evaluate import EvalRecipe


@with_recipe_options(EvalRecipe)
def evaluate(
    html: Annotated[Path | None, typer.Option("--html", help="Also write a self-contained page.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Also write Markdown.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the samples as PNG files in this folder.")
    ] = None,
    save_stats: Annotated[
        Path | None, typer.Option("--save-stats", help="Also write the statistics of --data to this .npz.")
    ] = None,
    config: Config = None,
    resume: Resume = False,
    force: Force = False,
    offline: Offline = False,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Evaluate a checkpoint: quality, consistency with its dense original, speed and size.

    Prints a Markdown report, or one JSON document with --json. Exits with 3 if a gate is missed.
    """
    with Session(quiet=quiet, debug=debug, json=json, offline=offline, check=check_launcher) as session:
        from gfprune_cli.cli.tables import eval_table
        from gfprune_cli.errors import GateMissed, UsageError
        from gfprune_cli.evaluation import EvalResult, continues
        from gfprune_cli.evaluation import evaluate as run
        from gfprune_cli.recipes.options import resolve_recipe
        from gfprune_cli.report.evaluation_page import markdown as as_markdown
        from gfprune_cli.report.evaluation_page import render

        recipe = resolve_recipe(EvalRecipe, config, flags)
        beside = html or markdown or save_stats
        own = resume and continues(recipe, out=out, beside=beside)
        for name, path in (("--html", html), ("--markdown", markdown), ("--save-stats", save_stats)):
            if path is not None and main_process():
                check_page(path, force=force or own, flag=name)
        files = [path.resolve() for path in (html, markdown, save_stats) if path is not None]
        if len(set(files)) < len(files):
            raise UsageError("--html, --markdown and --save-stats name the same file: name different ones")

        def publish(result: EvalResult) -> None:
            if html is not None:
                write_page(html, render(result.document(), list(result.grid)))
                session.note(f"wrote {html}")
            if markdown is not None:
                write_page(markdown, as_markdown(result.document()))
                session.note(f"wrote {markdown}")
            document = result.document()
            if json:
                session.show(eval_table(document))
            session.result(document, as_markdown(document).rstrip("\n"))

        result = run(
            recipe,
            out=out,
            save_stats=save_stats,
            beside=beside,
            force=force,
            resume=resume,
            publish=publish,
            offline=offline,
            device=device,
            report=session.report,
        )
        if result is not None and result.missed:
            raise GateMissed(
                "; ".join(f"--{g.name} {g.limit:g} was missed with {g.value}" for g in result.missed)
            )
