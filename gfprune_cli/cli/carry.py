"""`gfprune carry`."""

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
from gfprune_cli.recipes.carry import CarryRecipe


@with_recipe_options(CarryRecipe)
def carry(
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
    """Make an adapter of the dense model fit the pruned one: the rows, columns and blocks that are left.

    Prints the path of the result, or one JSON document with --json.
    """
    with Session(quiet=quiet, debug=debug, json=json, offline=offline) as session:
        from gfprune_cli.carrying import carry as run
        from gfprune_cli.cli.tables import carry_table
        from gfprune_cli.recipes.options import resolve_recipe

        recipe = resolve_recipe(CarryRecipe, config, flags)
        result = run(recipe, out=out, force=force, dry_run=dry_run, offline=offline, report=session.report)
        session.show(carry_table(result))
        session.result(result.document(), result.output or "")
