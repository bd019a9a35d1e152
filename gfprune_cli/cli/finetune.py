"""`gfprune finetune`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gfprune_cli.cli.options import (
    Config,
    Debug,
    Device,
    DryRun,
    Force,
    Json,
    Offline,
    OffloadTeacher,
    Out,
    Quiet,
    Resume,
    with_recipe_options,
)  # fmt: skip
from gfprune_cli.cli.session import Session
from gfprune_cli.launch import check_launcher
from gfprune_cli.recipes.finetune import FinetuneRecipe


@with_recipe_options(FinetuneRecipe)
def finetune(
    out: Out = None,
    config: Config = None,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
    save_every: Annotated[
        int, typer.Option("--save-every", min=0, help="Steps between saved states; 0: only when stopped.")
    ] = 100,
    sample_every: Annotated[
        int, typer.Option("--sample-every", min=0, help="Steps between grids of samples; 0: none.")
    ] = 100,
    logs: Annotated[
        Path | None, typer.Option("--logs", help="Folder of metrics and samples (default: OUT-logs).")
    ] = None,
    logger: Annotated[
        str | None,
        typer.Option("--logger", help="Also log to this, if installed.", metavar="[tensorboard|trackio]"),
    ] = None,
    offline: Offline = False,
    device: Device = None,
    offload_teacher: OffloadTeacher = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Bring the quality of a pruned checkpoint back, with the dense model as teacher.

    Prints the path of the result, or one JSON document with --json.
    """
    with Session(quiet=quiet, debug=debug, json=json, offline=offline, check=check_launcher) as session:
        from gfprune_cli.cli.tables import finetune_table
        from gfprune_cli.recipes.options import resolve_recipe
        from gfprune_cli.recovery import finetune as run

        recipe = resolve_recipe(FinetuneRecipe, config, flags)
        result = run(
            recipe,
            out=out,
            force=force,
            resume=resume,
            dry_run=dry_run,
            save_every=save_every,
            sample_every=sample_every,
            logs=logs,
            logger=logger,
            offline=offline,
            device=device,
            offload_teacher=offload_teacher,
            report=session.report,
        )
        session.show(finetune_table(result))
        session.result(result.document(), result.output or "")
