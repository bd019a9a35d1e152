"""`export`: from a checkpoint to an artefact that runs without gfprune, verified before it is published."""

import time

from gfprune_cli.checkpoint.single_file import check_file_destination
from gfprune_cli.checkpoint.source import source_of
from gfprune_cli.deploy.job import ExportJob
from gfprune_cli.deploy.plan import check_settings, default_output, is_file
from gfprune_cli.deploy.result import ExportResult
from gfprune_cli.outputs.claim import claim
from gfprune_cli.outputs.durable import check_destination, check_space
from gfprune_cli.progress import Progress, silent
from gfprune_cli.recipes.export import ExportRecipe
from gfprune_cli.recipes.run_options import RunOptions
from gfprune_cli.runtime.device import deterministic
from gfprune_cli.runtime.launch import check_alone


def export(recipe: ExportRecipe, options: RunOptions, progress: Progress = silent) -> ExportResult:
    """Export the denoiser of a checkpoint, dense or pruned, or its pipeline.

    Raises:
        UsageError: wrong settings, or an optional library is missing. GateMissed: the error is above the
        tolerance; nothing was written. GfpruneError: anything else that went wrong at run time.
    """
    start = time.monotonic()
    check_alone("export")
    check_settings(recipe)
    destination = options.out or default_output(recipe)
    check = check_file_destination if is_file(recipe) else check_destination
    with claim(destination, options, check=check) as output:
        source = source_of(recipe, options, progress, config_only=options.dry_run)
        required = not options.dry_run or source.kind != "hub"
        job = ExportJob(recipe, source, destination, progress, weights_required=required)
        if options.dry_run:
            return job.result(None, time.monotonic() - start)
        output.refuse_inputs({"--model": source.folder})
        check_space(destination, job.needed)
        with deterministic():
            made = job.export(options.force)
    return job.result(made, time.monotonic() - start)
