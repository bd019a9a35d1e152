"""The commands as Python functions. Nothing is printed; progress goes to a callback."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfprune_cli.analysis import analyze
from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.single_file import SUFFIX, load_single_file
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.deploy import ExportResult
from gfprune_cli.deploy import export as run_export
from gfprune_cli.progress import Report, silent
from gfprune_cli.pruning import PruneResult
from gfprune_cli.pruning import prune as run_recipe
from gfprune_cli.recipes.export import ExportRecipe
from gfprune_cli.recipes.options import resolve_recipe
from gfprune_cli.recipes.prune import PruneRecipe

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["analyze", "export", "load", "prune"]


def prune(
    model: str | None = None,
    *,
    out: str | PathLike[str] | None = None,
    config: str | PathLike[str] | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    device: str | None = None,
    report: Report = silent,
    **settings: Any,
) -> PruneResult:
    """Prune a checkpoint and write the result, as `gfprune prune` does.

    Args:
        model: "demo" (the default, unless `config` names one), a local diffusers folder, or a Hub id.
        out: destination folder; by default named after the model and the settings.
        config: a YAML recipe; `settings` override it.
        force: replace a destination that is not empty.
        resume: go on from the state of an interrupted run, if there is one.
        dry_run: plan only.
        offline: never use the network.
        device: torch device; by default CUDA if there is one.
        report: called with every `gfprune_cli.progress.Event`; what it raises stops the run.
        **settings: any field of `gfprune_cli.recipes.prune.PruneRecipe`, such as `sparsity=0.5`.

    Returns:
        The numbers before and after; `.output` is the folder, `.document()` the command's JSON.

    Raises:
        UsageError: wrong settings. GfpruneError: anything else, in one line.

    Example:
        >>> prune("demo", sparsity=0.5, out="demo-pruned").params
        {'before': 1740323, 'after': ...}
    """
    recipe = resolve_recipe(
        PruneRecipe, Path(config) if config is not None else None, {"model": model, **settings}
    )
    return run_recipe(
        recipe,
        out=Path(out) if out is not None else None,
        force=force,
        resume=resume,
        dry_run=dry_run,
        offline=offline,
        device=device,
        report=report,
    )


def export(
    model: str | None = None,
    *,
    out: str | PathLike[str] | None = None,
    config: str | PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    report: Report = silent,
    **settings: Any,
) -> ExportResult:
    """Write a checkpoint, dense or pruned, as a deployable artefact, as `gfprune export` does.

    Args:
        model: "demo" (the default, unless `config` names one), a local diffusers folder, or a Hub id.
        out: destination folder, or file with `single_file`; by default named after model and settings.
        config: a YAML recipe; `settings` override it.
        force: replace a destination that gfprune wrote.
        dry_run: say what would be written.
        offline: never use the network.
        report: called with every `gfprune_cli.progress.Event`; what it raises stops the run.
        **settings: any field of `gfprune_cli.recipes.export.ExportRecipe`, such as `format="onnx"`.

    Returns:
        Files, sizes and the error against the source; `.document()` is the command's JSON.

    Raises:
        UsageError: wrong settings. GateMissed: the error is above the tolerance, nothing was written.
        GfpruneError: anything else, in one line.

    Example:
        >>> export("demo", format="onnx", out="demo-onnx").parity.inputs
        9
    """
    recipe = resolve_recipe(
        ExportRecipe, Path(config) if config is not None else None, {"model": model, **settings}
    )
    return run_export(
        recipe,
        out=Path(out) if out is not None else None,
        force=force,
        dry_run=dry_run,
        offline=offline,
        report=report,
    )


def load(
    model: str | PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    component: str | None = None,
    dtype: "torch.dtype | None" = None,
    offline: bool = False,
) -> "nn.Module":
    """Load the denoiser of a checkpoint, dense or pruned, without remote code.

    Args:
        model: "demo", a local folder, a Hub id, or a file that `gfprune export --single-file` wrote.
        dtype: None means float32.

    Returns:
        The network on the CPU, in eval mode.

    Raises:
        GfpruneError: it cannot be read, in one line.
    """
    if Path(model).suffix == SUFFIX and Path(model).is_file():
        return load_single_file(Path(model), dtype=dtype)
    source = resolve(str(model), revision=revision, variant=variant, offline=offline)
    return load_model(inspect(source, component=component, variant=variant), dtype=dtype)
