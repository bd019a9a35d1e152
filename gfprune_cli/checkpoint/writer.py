"""A pruned model in memory -> a checkpoint folder that plain diffusers loads."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.card import write_card
from gfprune_cli.checkpoint.durable import default_mode, staged, write_json, write_tensors
from gfprune_cli.checkpoint.files import CONVERSION, checked_file, trusted_roots
from gfprune_cli.checkpoint.layout import pipeline_components
from gfprune_cli.checkpoint.modeling import gfprune_unet2d_v1 as modeling
from gfprune_cli.checkpoint.reader import Component, scheduler_config_path
from gfprune_cli.errors import GfpruneError

WEIGHTS = "diffusion_pytorch_model.safetensors"
COPIED = (".json", ".safetensors", ".txt", ".model")  # of the components that stay as they are
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def write_checkpoint(
    destination: Path, model: nn.Module, component: Component, record: Mapping[str, Any], *, force: bool
) -> dict[str, Any]:
    """Write a pipeline folder (or a bare model folder, if the source was one).

    Args:
        model: the pruned network, of the stock class or `PrunedUNet2DModel`.
        component: what it was made from; the other components are copied.
        record: goes to `gfprune.json`; `bytes.after` is filled in.

    Returns:
        The record as written.
    """
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with staged(destination, force=force, needed=needed) as staging:
        bare = component.pipeline is None
        name = component.name or "unet"
        folder = staging if bare else staging / name
        folder.mkdir(exist_ok=True)
        write_model(folder, model)
        if not bare:
            copy_pipeline(staging, component, name, library_entry(model))
        else:
            copy_scheduler(staging, component)
        complete = {**record, "bytes": {**record["bytes"], "after": (folder / WEIGHTS).stat().st_size}}
        write_json(staging / "gfprune.json", complete)
        source = record["source"]
        write_card(
            staging / "README.md",
            root=component.root,
            base_model=source["label"] if source["kind"] == "hub" else None,
            loading=loading_line(destination, model, bare=bare),
            record=complete,
        )
        for path in staging.rglob("*"):
            if path.is_file():
                path.chmod(default_mode())
    return complete


def stored_dtype(component: Component) -> torch.dtype:
    """The type that all weights are stored in, if it is a half one; else float32."""
    stored = {info.dtype for info in component.tensors.values()}
    return DTYPES.get(stored.pop(), torch.float32) if len(stored) == 1 else torch.float32


def check_pipeline(component: Component) -> None:
    """Refuse a pipeline whose other components could not travel along.

    Raises:
        GfpruneError: a component has no safetensors weights.
    """
    for name in pipeline_components(component.pipeline or {}):
        folder = component.root / name
        if name == component.name or not (folder / "config.json").exists():
            continue  # schedulers and feature extractors have no weights
        if not list(folder.glob("*.safetensors")):
            raise GfpruneError(
                f"{folder} has no safetensors weights, and pickles cannot travel along: {CONVERSION}"
            )


def write_model(folder: Path, model: nn.Module) -> None:
    """Configuration, weights and, for a non-uniform network, the file that defines its class."""
    config: Any = model
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    write_tensors(folder / WEIGHTS, model.state_dict())
    if isinstance(model, modeling.PrunedUNet2DModel):
        shutil.copyfile(modeling.__file__, folder / Path(modeling.__file__).name)


def library_entry(model: nn.Module) -> list[str]:
    """What model_index.json says of the model: library or module file, and class."""
    if isinstance(model, modeling.PrunedUNet2DModel):
        return [Path(modeling.__file__).stem, type(model).__name__]
    return ["diffusers", type(model).__name__]


def copy_pipeline(staging: Path, component: Component, name: str, entry: list[str]) -> None:
    """Everything of the pipeline but the pruned component: JSON and safetensors only, no pickles."""
    assert component.pipeline is not None
    roots = trusted_roots(component.root)
    index = {**component.pipeline, name: entry}
    (staging / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for other in pipeline_components(component.pipeline):
        source = component.root / other
        if other == name or not source.is_dir():
            continue
        for path in sorted(source.rglob("*")):
            if path.suffix in COPIED and path.is_file():
                checked_file(path, roots)
                target = staging / other / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    schedule = scheduler_config_path(component)
    if schedule is not None and "scheduler" in component.pipeline:
        (staging / "scheduler").mkdir(exist_ok=True)
        shutil.copyfile(schedule, staging / "scheduler" / "scheduler_config.json")


def copy_scheduler(staging: Path, component: Component) -> None:
    """The schedule that lies in a bare model's own folder: without it the model's noise is not known."""
    schedule = scheduler_config_path(component)
    if schedule is not None and schedule.is_relative_to(component.root):
        target = staging / schedule.relative_to(component.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(schedule, target)


def loading_line(destination: Path, model: nn.Module, *, bare: bool) -> str:
    """The two lines of Python that load the result with nothing but diffusers."""
    pruned = isinstance(model, modeling.PrunedUNet2DModel)
    flag = ", trust_remote_code=True" if pruned else ""
    cls = ("AutoModel" if pruned else type(model).__name__) if bare else "DiffusionPipeline"
    variable = "model" if bare else "pipeline"
    return f'from diffusers import {cls}\n{variable} = {cls}.from_pretrained("{destination.name}"{flag})'
