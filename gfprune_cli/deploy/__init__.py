"""`export`: from a checkpoint to an artefact that runs without gfprune, verified before it is published."""

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from gfprune_cli.checkpoint.durable import check_destination, check_space, refuse_overlaps
from gfprune_cli.checkpoint.locks import claimed
from gfprune_cli.checkpoint.single_file import check_file_destination
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.deploy.parity import Parity
from gfprune_cli.deploy.plan import check_settings, default_output
from gfprune_cli.deploy.result import ExportResult
from gfprune_cli.deploy.run import ExportRun
from gfprune_cli.device import deterministic
from gfprune_cli.launch import check_alone
from gfprune_cli.progress import Report, silent
from gfprune_cli.recipes.export import ExportRecipe

__all__ = ["ExportResult", "Parity", "export"]


def export(
    recipe: ExportRecipe,
    *,
    out: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    report: Report = silent,
) -> ExportResult:
    """Export the denoiser of a checkpoint, dense or pruned.

    Args:
        recipe: what to do; decides the bytes of the output.
        out: destination folder (with `single_file`: file); by default named after model and settings.
        force: replace a destination that gfprune wrote.
        dry_run: say what would be written; nothing is written and no weights are read.
        offline: never use the network.

    Returns:
        Files, sizes and the error against the source.

    Raises:
        UsageError: wrong settings, or an optional library is missing. GateMissed: the error is above the
        tolerance; nothing was written. GfpruneError: anything else that went wrong at run time.
    """
    start = time.monotonic()
    check_alone("export")
    check_settings(recipe)
    destination = Path(out).expanduser() if out is not None else default_output(recipe)
    check = partial(check_out, recipe, destination, force=force)
    with nullcontext() if dry_run else claimed(destination, check):
        source = resolve(
            recipe.model,
            revision=recipe.revision,
            variant=recipe.variant,
            offline=offline,
            config_only=dry_run,
            report=report,
        )
        run = ExportRun(
            recipe, source, destination, report, weights_required=not dry_run or source.kind != "hub"
        )
        if dry_run:
            return run.planned(time.monotonic() - start)
        refuse_overlaps(destination, {"--model": source.folder})
        check_space(destination, run.needed)
        with deterministic():
            artefact, files, parity = run.single_file(force) if recipe.single_file else run.folder(force)
    return run.result(artefact, files, parity, time.monotonic() - start)


def check_out(recipe: ExportRecipe, destination: Path, *, force: bool) -> None:
    """Refuse, before any work, a destination that cannot be written or is not ours to replace."""
    if recipe.single_file:
        check_file_destination(destination, force=force)
    else:
        check_destination(destination, force=force)
