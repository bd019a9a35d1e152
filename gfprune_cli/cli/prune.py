"""`gfprune prune`."""

from functools import partial
from typing import Any

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
)
from gfprune_cli.cli.session import Session
from gfprune_cli.launch import check_alone
from gfprune_cli.recipes.prune import PruneRecipe


@with_recipe_options(PruneRecipe)
def prune(
    out: Out = None,
    config: Config = None,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    device: Device = None,
    offload_teacher: OffloadTeacher = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Prune a checkpoint: score, mask softly, refit, remove channels, recover, write safetensors.

    Prints the path of the result, or one JSON document with --json.
    """
    check = partial(check_alone, "prune")
    with Session(quiet=quiet, debug=debug, json=json, offline=offline, check=check) as session:
        from gfprune_cli.cli.tables import prune_table
        from gfprune_cli.pruning import prune as run
        from gfprune_cli.recipes.options import resolve_recipe

        recipe = resolve_recipe(PruneRecipe, config, flags)
        result = run(
            recipe,
            out=out,
            force=force,
            resume=resume,
            dry_run=dry_run,
            offline=offline,
            device=device,
            offload_teacher=offload_teacher,
            report=session.report,
        )
        session.show(prune_table(result))
        session.result(result.document(), result.output or "")
