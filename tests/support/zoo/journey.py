"""What one component of one pipeline goes through, in a process of its own."""

import contextlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

SPARSITY, LEAST, ATTEMPTS = 0.2, 0.001, 6
EXACT, ROUNDING = 1e-6, 1e-4  # relative difference of masked and narrow network: float64, float32
SMALL: dict[str, Any] = dict(images=4, sample_steps=1)
NEAREST = re.compile(r"nearest is ([0-9.]+)")

Row = dict[str, Any]


def walk(model: Path, component: str, options: dict[str, Any], folder: Path, *, whole: bool) -> Row:
    """Analyze, prune and what follows; what was seen, with `status` passed, refused or error.

    Args:
        options: size and frames that the pipeline is asked for.
        whole: also another size, finetuning, loading without gfprune, and export.
    """
    return walk_through(lambda row: steps(row, str(model), component, options, folder, whole=whole), folder)


def walk_through(taken: Callable[[Row], Iterator[str]], folder: Path) -> Row:
    """The row of steps that fill it in, in a folder of their own."""
    from gfprune_cli.errors import GfpruneError

    few_draws()
    row: Row = {"stage": "analyze"}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with suppressed(GfpruneError) as refused:
            for stage in taken(row):
                row["stage"] = stage
        row["status"] = "passed" if refused.error is None else "refused"
        if refused.error is not None:
            row["error"] = str(refused.error)
    except BaseException as error:  # whatever is no error of gfprune's own
        row |= {"status": "error", "error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if "unexpected" in row.get("error", "") or "\n" in row.get("error", ""):
        row["status"] = "error"
    return row


class Refusal:
    error: Exception | None = None


@contextlib.contextmanager
def suppressed(kind: type[Exception]) -> Iterator[Refusal]:
    refusal = Refusal()
    try:
        yield refusal
    except kind as error:
        refusal.error = error


def steps(
    row: Row, model: str, component: str, options: dict[str, Any], folder: Path, *, whole: bool
) -> Iterator[str]:
    """Each step, named before it is taken."""
    import gfprune_cli

    others = {
        kind: partial(inputs_at, model=model, component=component, asked=asked)
        for kind, asked in (elsewhere(options, folder).items() if whole else ())
    }
    gaps, unseen = watch_removal(others)
    if whole:
        from gfprune_cli.families.table import is_known_class

        name = component_class(Path(model), component)
        drawn = {} if is_known_class(name) else options
        yield "analyze"
        row["groups"] = len(gfprune_cli.analyze(model, component=component, **drawn).groups)
    yield "prune"
    found, row["prune"] = prune_nearest(model, component, options, folder / "pruned", whole=whole)
    row["class"] = found.class_name.removeprefix("Pruned")
    row["unseen"] = unseen
    check_gaps(row, gaps)
    if not whole:
        return
    yield "finetune"
    once = dict(images=4, sample_steps=1, batch=1, sample_every=0, steps=1)
    gfprune_cli.finetune(str(folder / "pruned"), component=component, out=folder / "tuned", **once, **options)
    row["finetune"] = "yes"
    yield "diffusers"
    count = sum(parameter.numel() for parameter in loaded_plainly(folder / "pruned" / component).parameters())
    assert count == found.params["after"], "plain diffusers loads another network"
    row["diffusers"] = "yes"
    yield "export"
    row["export"] = exported(folder, component)


def check_gaps(row: Row, gaps: dict[str, float]) -> None:
    """Keep how exact removal was, of each kind of inputs."""
    row["gap"], row["exact"] = max(gaps.values(), default=0.0), sorted(gaps)
    if row["gap"] > EXACT:
        raise AssertionError(f"removal is exact to {row['gap']:.1g} only, of {gaps}")


def prune_nearest(
    model: str, component: str | None, options: dict[str, Any], out: Path, *, whole: bool
) -> tuple[Any, float]:
    """Prune to a fifth, or to the nearest that the refusal names."""
    import gfprune_cli
    from gfprune_cli.errors import UsageError

    cheap: dict[str, Any] = {} if whole else dict(criterion="magnitude", fold=0.0)
    sparsity = SPARSITY
    for attempt in range(ATTEMPTS):
        try:
            found = gfprune_cli.prune(
                model,
                component=component,
                sparsity=sparsity,
                out=out,
                draws=2,
                recover=0,
                **SMALL,
                **cheap,
                **options,
            )
            return found, sparsity
        except UsageError as error:
            near = NEAREST.search(str(error))
            if near is None or float(near[1]) < LEAST or attempt == ATTEMPTS - 1:
                raise
            sparsity = float(near[1]) - 0.0005
    raise AssertionError("the last attempt returns or raises")


def watch_removal(
    others: dict[str, Callable[[Any], dict[str, Any]]],
) -> tuple[dict[str, float], dict[str, str]]:
    """Where a run checks that removal is exact, check it for three samples and for other inputs too.

    Args:
        others: kind of inputs -> those of a network.

    Returns:
        Kind of inputs -> relative difference, in float64 or as 0 where only float32 runs and it is within
        rounding; and why the pipeline gives its network none of a kind. Both are filled in by the run.
    """
    from gfprune_cli.diffusion.conditions import inputs_of
    from gfprune_cli.errors import GfpruneError
    from gfprune_cli.pruning import networks, verify

    gaps: dict[str, float] = {}
    unseen: dict[str, str] = {}
    sample, seen = networks.one_sample, []

    def three_samples(process: Any, draws: Any) -> dict[str, Any]:
        batch = draws.batch("three samples", 0, 3)
        noisy = process.add_noise(batch.images, batch.noise, batch.index)
        inputs = inputs_of(noisy, process.timesteps(batch.index), batch.condition)
        return {name: value for name, value in inputs.items() if name != "return_dict"}

    def one_sample(process: Any, draws: Any) -> dict[str, Any]:
        seen.append(three_samples(process, draws))
        return sample(process, draws)

    def gap_of(model: Any, groups: Any, inputs: Any) -> float:
        try:
            return verify.removal_gap(model, groups, inputs, doubles=True)
        except Exception as error:
            if "dtype" not in str(error):
                raise
        gap = verify.removal_gap(model, groups, inputs, doubles=False)
        return 0.0 if gap < ROUNDING else gap

    def check_removal(model: Any, groups: Any, inputs: Any, **_precision: bool) -> float:
        given = {"one": inputs, "three": seen.pop()}
        for kind, made in others.items():
            try:
                given[kind] = made(model)
            except GfpruneError as error:  # what the pipeline itself refuses
                unseen[kind] = str(error)
                continue
            if shapes_of(given[kind]) == shapes_of(inputs):  # padded, or cut to what it was
                unseen[kind] = "the network is given the same shapes"
                del given[kind]
        gaps.update({kind: gap_of(model, groups, inputs) for kind, inputs in given.items()})
        return gaps["one"]

    networks.check_removal, networks.one_sample = check_removal, one_sample  # type: ignore[attr-defined]
    return gaps, unseen


def shapes_of(inputs: dict[str, Any]) -> list[list[int]]:
    tensors = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    return sorted(list(tensor.shape) for tensor in tensors)


def inputs_at(network: Any, model: str, component: str, asked: Any) -> dict[str, Any]:
    """What the pipeline gives a network where it is asked for something else."""
    from gfprune_cli.checkpoint.reader import inspect
    from gfprune_cli.checkpoint.scheduler import load_scheduler
    from gfprune_cli.checkpoint.source import resolve
    from gfprune_cli.diffusion.conditions import keywords
    from gfprune_cli.inputs.conditioning import asked_of, recorded
    from gfprune_cli.inputs.unknown_classes import conditional
    from gfprune_cli.progress import silent

    place = inspect(resolve(model), component=component)
    prompts = asked_of(place, network.config, asked, 1, 0)
    found = recorded(network, place, load_scheduler(place), prompts, asked, silent)
    inputs = keywords(torch.zeros(1, *found.shape), torch.ones(1), conditional(found.conditions))
    return {name: value for name, value in inputs.items() if name != "return_dict"}


def elsewhere(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Kind of inputs -> what the pipeline is asked for, beside what the run asks for."""
    from gfprune_cli.inputs.pipeline_run import PipelineOptions

    asked = PipelineOptions(size=options.get("size"), frames=options.get("frames"))
    text = folder / "prompts.txt"
    text.write_text("a fox\n")
    kinds = {"text": replace(asked, prompts=str(text))}
    if asked.size is not None:
        height, width = map(int, asked.size.split("x"))
        kinds["size"] = replace(asked, size=f"{height}x{2 * width}")  # another aspect too
    if asked.frames is not None and asked.frames > 1:
        kinds["frames"] = replace(asked, frames=2 * asked.frames - 1)
    return kinds


def component_class(model: Path, component: str) -> str:
    import json

    return str(json.loads((model / "model_index.json").read_text())[component][1])


def loaded_plainly(folder: Path) -> Any:
    """The network as plain diffusers loads it, with gfprune out of reach."""
    import os

    from diffusers import AutoModel

    hidden = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "gfprune_cli"}
    os.environ.pop("DIFFUSERS_DISABLE_REMOTE_CODE", None)
    sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type]
    try:
        return AutoModel.from_pretrained(str(folder), trust_remote_code=True)
    finally:
        sys.modules |= hidden


def exported(folder: Path, component: str) -> str:
    """The format that can be made of the pruned network, or why none can."""
    import gfprune_cli
    from gfprune_cli.errors import GfpruneError

    try:
        gfprune_cli.export(str(folder / "pruned"), component=component, out=folder / "graph", format="onnx")
        return "onnx"
    except GfpruneError as error:
        return str(error).splitlines()[0]


def few_draws() -> None:
    """The arithmetic is the same with fewer draws."""
    from gfprune_cli.flow import loop
    from gfprune_cli.pruning import flows, fold, job
    from gfprune_cli.recovery import job as recovery

    loop.COMPARED_SAMPLES = 4
    loop.REFIT_SAMPLES, flows.JUDGE_DRAWS, recovery.REPORT_DRAWS = 8, 8, 8
    fold.FIT, fold.CHOOSE, fold.CHECKED = 96, 32, {"check": 32}
    job.PruneJob.loss.__defaults__ = (8,)
