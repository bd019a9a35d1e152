"""`gfprune export`."""

from functools import partial
from typing import Any

from gfprune_cli.cli.options import (
    Config,
    Debug,
    DryRun,
    Force,
    Json,
    Offline,
    Out,
    Quiet,
    with_recipe_options,
)
from gfprune_cli.cli.session import Session
from gfprune_cli.launch import check_alone
from gfprune_cli.recipes.export import ExportRecipe


@with_recipe_options(ExportRecipe)
def export(
    out: Out = None,
    config: Config = None,
    force: Force = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Write a checkpoint, dense or pruned, as a deployable artefact, verified against the source.

    Prints the path of the result, or one JSON document with --json. Exit code 3: the error is above
    --tolerance, and nothing was written.
    """
    check = partial(check_alone, "export")
    with Session(quiet=quiet, debug=debug, json=json, offline=offline, check=check) as session:
        from gfprune_cli.cli.tables import export_table
        from gfprune_cli.deploy import export as run
        from gfprune_cli.recipes.options import resolve_recipe

        recipe = resolve_recipe(ExportRecipe, config, flags)
        result = run(recipe, out=out, force=force, dry_run=dry_run, offline=offline, report=session.report)
        session.show(export_table(result))
        session.result(result.document(), result.output or "")
