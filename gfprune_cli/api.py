"""The commands as Python functions. Nothing is printed; progress goes to a callback.

Their arguments are the fields of the command's recipe (`gfprune_cli.recipes`), and those of `RunOptions` that
the command has: `out`, `force`, `resume`, `dry_run`, `offline`, `device` and the like. `config` names a YAML
recipe, which the arguments override; `progress` is called with every `gfprune_cli.progress.Event`, and what
it raises stops the run. All raise `UsageError` for wrong settings and `GfpruneError` for anything else, in
one line.
"""

from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gfprune_cli.carrying import command as carrying
from gfprune_cli.carrying.result import CarryResult
from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.single_file import SUFFIX, load_single_file
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.deploy import command as deploy
from gfprune_cli.deploy.result import ExportResult
from gfprune_cli.evaluation import command as evaluation
from gfprune_cli.evaluation.result import EvalResult
from gfprune_cli.progress import Progress, silent
from gfprune_cli.pruning import analyze as analysis
from gfprune_cli.pruning import command as pruning
from gfprune_cli.pruning.result import PruneResult, PruneResults
from gfprune_cli.recipes.analyze import AnalyzeRecipe
from gfprune_cli.recipes.carry import CarryRecipe
from gfprune_cli.recipes.evaluate import EvalRecipe
from gfprune_cli.recipes.export import ExportRecipe
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recipes.options import resolve_recipe
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recipes.run_options import RunOptions
from gfprune_cli.recovery import command as recovery
from gfprune_cli.recovery.result import FinetuneResult

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["analyze", "carry", "evaluate", "export", "finetune", "load", "prune"]

Name = str | PathLike[str] | None
RecipeT = TypeVar("RecipeT")


def asked(
    command: str, recipe: type[RecipeT], model: Name, config: Name, settings: dict[str, Any]
) -> tuple[RecipeT, RunOptions]:
    """What the arguments of a function say: what to do, and how to run. Recipes have paths as text."""
    names = RunOptions.names(command, cli=False)
    given = {
        name: fspath(value) if isinstance(value, PathLike) else value
        for name, value in {"model": model, **settings}.items()
        if name not in names
    }
    chosen = resolve_recipe(recipe, Path(config) if config is not None else None, given)
    return chosen, RunOptions.resolve(**{name: settings[name] for name in names if name in settings})


def analyze(
    model: Name = None, *, progress: Progress = silent, **settings: Any
) -> analysis.Analysis | analysis.Analyses:
    """Describe a checkpoint, as `gfprune analyze` does.

    Args:
        model: "demo" (the default), a local diffusers folder (its weights may be absent), or a Hub id.
        **settings: such as `sparsity=[0.3, 0.5]`.

    Returns:
        The analysis; `.document()` is the command's JSON. With `component="all"` `.networks` holds one of
        each denoiser.
    """
    return analysis.analyze(*asked("analyze", AnalyzeRecipe, model, None, settings), progress)


def prune(
    model: Name = None, *, config: Name = None, progress: Progress = silent, **settings: Any
) -> PruneResult | PruneResults:
    """Prune a checkpoint and write the result, as `gfprune prune` does.

    Args:
        model: "demo" (the default, unless `config` names one), a local diffusers folder, or a Hub id.
        **settings: such as `sparsity=0.5` and `out="demo-pruned"`.

    Returns:
        The numbers before and after; `.output` is the folder, `.document()` the command's JSON. With several
        sparsities, or `component="all"`, `.networks` holds as many of them.

    Example:
        >>> prune("demo", sparsity=0.5, out="demo-pruned").params
        {'before': 1740323, 'after': ...}
    """
    return pruning.prune(*asked("prune", PruneRecipe, model, config, settings), progress)


def finetune(
    model: Name = None, *, config: Name = None, progress: Progress = silent, **settings: Any
) -> FinetuneResult:
    """Train a pruned checkpoint with the dense model as teacher, as `gfprune finetune` does.

    Args:
        model: a folder that `prune` wrote, or a Hub id (unless `config` names one).
        **settings: such as `steps=500` and `logs="logs"`.

    Returns:
        The numbers before and after; `.output` is the folder, `.document()` the command's JSON.

    Example:
        >>> finetune("demo-pruned", steps=500, out="demo-finetuned").loss
        {'before': ..., 'after': ..., 'teacher': ...}
    """
    return recovery.finetune(*asked("finetune", FinetuneRecipe, model, config, settings), progress)


def evaluate(
    model: Name = None, *, config: Name = None, progress: Progress = silent, **settings: Any
) -> EvalResult | None:
    """Measure a model, against its dense original if there is one, as `gfprune eval` does.

    Args:
        model: "demo" (the default, unless `config` names one), a local diffusers folder, or a Hub id.
        **settings: such as `samples=64`; `out` also writes the samples, `save_stats` the
            statistics of `data`.

    Returns:
        The numbers; `.document()` is the command's JSON, `.missed` the gates that were not passed. None in
        every process but the first of those that `accelerate launch` started.

    Example:
        >>> evaluate("demo-pruned", samples=64, steps=20).metrics["ssim"]["value"]
        0...
    """
    return evaluation.evaluate(*asked("eval", EvalRecipe, model, config, settings), progress)


def export(
    model: Name = None, *, config: Name = None, progress: Progress = silent, **settings: Any
) -> ExportResult:
    """Write a checkpoint, dense or pruned, as a deployable artefact, as `gfprune export` does.

    Args:
        model: "demo" (the default, unless `config` names one), a local diffusers folder, or a Hub id.
        **settings: such as `format="onnx"`; `out` is a file with `single_file`, else a folder.

    Returns:
        Files, sizes and the error against the source; `.document()` is the command's JSON.

    Raises:
        GateMissed: the error is above the tolerance, nothing was written.

    Example:
        >>> export("demo", format="onnx", out="demo-onnx").parity.inputs
        9
    """
    return deploy.export(*asked("export", ExportRecipe, model, config, settings), progress)


def carry(
    adapter: Name = None,
    model: Name = None,
    *,
    config: Name = None,
    progress: Progress = silent,
    **settings: Any,
) -> CarryResult:
    """Make an adapter of the dense model fit the pruned one, as `gfprune carry` does.

    Args:
        adapter: a .safetensors file, or the folder that holds one (unless `config` names it).
        model: the pruned model: a folder that `prune` or `finetune` wrote, or a Hub id.
        **settings: such as `dense="sd"`.

    Returns:
        What became of the adapter's layers; `.output` is the folder, `.document()` the command's JSON.

    Example:
        >>> carry("style.safetensors", "sd-half", out="style-half").layers
        {'total': 128, 'narrowed': 96, 'moved': 0, 'dropped': 0}
    """
    named = {} if adapter is None else {"adapter": adapter}
    return carrying.carry(*asked("carry", CarryRecipe, model, config, {**settings, **named}), progress)


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
