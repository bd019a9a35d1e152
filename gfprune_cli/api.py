"""The commands as Python functions. Nothing is printed; progress goes to a callback."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfprune_cli.analysis import analyze
from gfprune_cli.carrying import CarryResult
from gfprune_cli.carrying import carry as run_carry
from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.single_file import SUFFIX, load_single_file
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.deploy import ExportResult
from gfprune_cli.deploy import export as run_export
from gfprune_cli.evaluation import EvalResult
from gfprune_cli.evaluation import evaluate as run_evaluation
from gfprune_cli.progress import Report, silent
from gfprune_cli.pruning import PruneResult
from gfprune_cli.pruning import prune as run_recipe
from gfprune_cli.recipes.carry import CarryRecipe
from gfprune_cli.recipes.evaluate import EvalRecipe
from gfprune_cli.recipes.export import ExportRecipe
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recipes.options import resolve_recipe
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recovery import FinetuneResult
from gfprune_cli.recovery import finetune as run_finetune

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["analyze", "carry", "evaluate", "export", "finetune", "load", "prune"]


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
    offload_teacher: bool = False,
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
        offload_teacher: keep the dense model in main memory while another device trains.
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
        offload_teacher=offload_teacher,
        report=report,
    )


def finetune(
    model: str | PathLike[str] | None = None,
    *,
    out: str | PathLike[str] | None = None,
    config: str | PathLike[str] | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    save_every: int = 100,
    sample_every: int = 100,
    logs: str | PathLike[str] | None = None,
    logger: str | None = None,
    offline: bool = False,
    device: str | None = None,
    offload_teacher: bool = False,
    report: Report = silent,
    **settings: Any,
) -> FinetuneResult:
    """Train a pruned checkpoint with the dense model as teacher, as `gfprune finetune` does.

    Args:
        model: a folder that `prune` wrote, or a Hub id (unless `config` names one).
        out: destination folder; by default named after the model.
        save_every, sample_every: steps between saved states, and between sample grids; 0 for none.
        logs: folder of metrics and samples; by default `OUT-logs`.
        logger: "tensorboard" or "trackio", if installed.
        **settings: any field of `gfprune_cli.recipes.finetune.FinetuneRecipe`, such as `steps=500`.
            The other arguments are those of `prune`.

    Returns:
        The numbers before and after; `.output` is the folder, `.document()` the command's JSON.

    Raises:
        UsageError: wrong settings. GfpruneError: anything else, in one line.

    Example:
        >>> finetune("demo-pruned", steps=500, out="demo-finetuned").loss
        {'before': ..., 'after': ..., 'teacher': ...}
    """
    given = {"model": None if model is None else str(model), **settings}
    recipe = resolve_recipe(FinetuneRecipe, Path(config) if config is not None else None, given)
    return run_finetune(
        recipe,
        out=Path(out) if out is not None else None,
        force=force,
        resume=resume,
        dry_run=dry_run,
        save_every=save_every,
        sample_every=sample_every,
        logs=Path(logs) if logs is not None else None,
        logger=logger,
        offline=offline,
        device=device,
        offload_teacher=offload_teacher,
        report=report,
    )


def evaluate(
    model: str | None = None,
    *,
    out: str | PathLike[str] | None = None,
    save_stats: str | PathLike[str] | None = None,
    config: str | PathLike[str] | None = None,
    force: bool = False,
    resume: bool = False,
    offline: bool = False,
    device: str | None = None,
    report: Report = silent,
    **settings: Any,
) -> EvalResult | None:
    """Measure a model, against its dense original if there is one, as `gfprune eval` does.

    Args:
        model: "demo" (the default, unless `config` names one), a local diffusers folder, or a Hub id.
        out: also write the samples as PNG files in this folder.
        save_stats: also write the statistics of the images in `data` to this .npz file.
        config: a YAML recipe; `settings` override it.
        force: replace what exists at `out`, and discard the samples of an interrupted run.
        resume: go on from the samples of an interrupted run, if there are any.
        offline: never use the network.
        device: torch device; by default CUDA if there is one.
        report: called with every `gfprune_cli.progress.Event`; what it raises stops the run.
        **settings: any field of `gfprune_cli.recipes.evaluate.EvalRecipe`, such as `samples=64`.

    Returns:
        The numbers; `.document()` is the command's JSON, `.missed` the gates that were not passed. None in
        every process but the first of those that `accelerate launch` started.

    Raises:
        UsageError: wrong settings. GfpruneError: anything else, in one line.

    Example:
        >>> evaluate("demo-pruned", samples=64, steps=20).metrics["ssim"]["value"]
        0...
    """
    recipe = resolve_recipe(
        EvalRecipe, Path(config) if config is not None else None, {"model": model, **settings}
    )
    return run_evaluation(
        recipe,
        out=Path(out) if out is not None else None,
        save_stats=Path(save_stats) if save_stats is not None else None,
        force=force,
        resume=resume,
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


def carry(
    adapter: str | PathLike[str] | None = None,
    model: str | PathLike[str] | None = None,
    *,
    out: str | PathLike[str] | None = None,
    config: str | PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    report: Report = silent,
    **settings: Any,
) -> CarryResult:
    """Make an adapter of the dense model fit the pruned one, as `gfprune carry` does.

    Args:
        adapter: a .safetensors file, or the folder that holds one (unless `config` names it).
        model: the pruned model: a folder that `prune` or `finetune` wrote, or a Hub id.
        out: destination folder; by default named after adapter and model.
        config: a YAML recipe; `settings` override it.
        force: replace a destination that gfprune wrote.
        dry_run: count only.
        offline: never use the network.
        report: called with every `gfprune_cli.progress.Event`; what it raises stops the run.
        **settings: any field of `gfprune_cli.recipes.carry.CarryRecipe`, such as `dense="sd"`.

    Returns:
        What became of the adapter's layers; `.output` is the folder, `.document()` the command's JSON.

    Raises:
        UsageError: wrong settings, or the model was not pruned. GfpruneError: anything else, in one line.

    Example:
        >>> carry("style.safetensors", "sd-half", out="style-half").layers
        {'total': 128, 'narrowed': 96, 'moved': 0, 'dropped': 0}
    """
    given = {
        name: None if value is None else str(value)
        for name, value in (("adapter", adapter), ("model", model))
    }
    recipe = resolve_recipe(CarryRecipe, Path(config) if config is not None else None, {**given, **settings})
    return run_carry(
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
