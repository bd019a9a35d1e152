"""A pruned model in memory -> a checkpoint folder that plain diffusers loads."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.card import PICTURE, Picture, write_card
from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.components import check_entries
from gfprune_cli.checkpoint.files import CONVERSION, INDEX_BYTES, checked_file, read_json
from gfprune_cli.checkpoint.layout import OPTIONAL, PRUNED, pipeline_components, weights_variant
from gfprune_cli.checkpoint.modeling import gfprune_models_v2 as modeling
from gfprune_cli.checkpoint.reader import model_class
from gfprune_cli.checkpoint.record import RECORD, joined, records_of
from gfprune_cli.checkpoint.safetensors_header import FLOAT_TYPES
from gfprune_cli.checkpoint.scheduler import scheduler_config_path
from gfprune_cli.checkpoint.shards import SHARD_BYTES, copy_module, write_weights
from gfprune_cli.errors import GfpruneError
from gfprune_cli.outputs.durable import staged, write_json
from gfprune_cli.outputs.filesystem import give_default_mode

COPIED = (".json", ".safetensors", ".txt", ".model", ".jinja")  # of the components that stay as they are
WEIGHTLESS = re.compile(r"Tokenizer|Processor|Extractor|Scheduler")  # classes that have no weights
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def write_checkpoint(
    destination: Path,
    model: nn.Module,
    component: Component,
    record: Mapping[str, Any],
    *,
    force: bool,
    picture: Picture | None = None,
) -> dict[str, Any]:
    """Write a pipeline folder (or a bare model folder, if the source was one).

    Args:
        model: the pruned network, of the stock class or `Pruned<class>`.
        component: what it was made from; the other components are copied.
        record: goes to `gfprune.json`; `bytes.after` is filled in.
        picture: for the model card, if there is one.

    Returns:
        The record as written.
    """
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with staged(destination, force=force, needed=needed) as staging:
        bare = component.pipeline is None
        name = component.name or "unet"
        folder = staging if bare else staging / name
        folder.mkdir(exist_ok=True)
        files = write_weights(folder, model, None, SHARD_BYTES)
        if not bare:
            copy_pipeline(staging, component, {name: library_entry(type(model).__name__)})
        else:
            copy_scheduler(staging, component)
        size = sum(path.stat().st_size for path in files)
        own = {**record, "bytes": {**record["bytes"], "after": size}}
        earlier = {} if bare else records_of(component.root)  # of what was pruned before, and comes along
        beside = component.entries.keys() - {name}
        complete = joined([own, *(one for other, one in earlier.items() if other in beside)])
        loading = loading_line(destination.name, type(model).__name__, bare=bare)
        write_description(staging, complete, component, loading, picture)
    return complete


def write_joined(
    destination: Path,
    parts: Mapping[str, Path],
    component: Component,
    record: Mapping[str, Any],
    *,
    force: bool,
) -> None:
    """Write the pipeline folder of several pruned components.

    Args:
        parts: component name -> the bare folder that `write_checkpoint` made of it.
        component: any of those that they were made from; what is no part is copied from its pipeline.
        record: of all of them, see `record.joined`.
    """
    files = {name: [path for path in folder.iterdir() if path.name not in ("README.md", RECORD, PICTURE)]
             for name, folder in parts.items()}  # fmt: skip
    needed = sum(path.stat().st_size for found in files.values() for path in found)
    with staged(destination, force=force, needed=needed) as staging:
        entries = {}
        for name, found in files.items():
            (staging / name).mkdir()
            for path in found:
                if path.is_file():
                    shutil.copyfile(path, staging / name / path.name)
            class_name = read_json(staging / name / "config.json", (staging.resolve(),))["_class_name"]
            entries[name] = library_entry(class_name)
        copy_pipeline(staging, component, entries)
        classes = sorted(
            (class_name for _, class_name in entries.values()), key=lambda name: not name.startswith(PRUNED)
        )
        write_description(staging, record, component, loading_line(destination.name, classes[0], bare=False))


def write_description(
    staging: Path,
    record: Mapping[str, Any],
    component: Component,
    loading: str,
    picture: Picture | None = None,
) -> None:
    """The record and the model card of an output; all of its files get the mode of any other new file."""
    write_json(staging / RECORD, record)
    if picture is not None:
        (staging / PICTURE).write_bytes(picture.png)
    source = record["source"]
    write_card(
        staging / "README.md",
        root=component.root,
        base_model=source["label"] if source["kind"] == "hub" else None,
        loading=loading,
        record=record,
        picture=picture,
    )
    for path in staging.rglob("*"):
        if path.is_file():
            give_default_mode(path)


def stored_dtype(component: Component) -> torch.dtype:
    """The type that all weights are stored in, if it is a half one; else float32.

    Layers that diffusers keeps in float32 (`reader.cast_model`) and integers have no say.
    """
    kept = set(getattr(model_class(component.class_name), "_keep_in_fp32_modules", None) or [])
    stored = {
        info.dtype
        for name, info in component.tensors.items()
        if info.dtype in FLOAT_TYPES and not kept & set(name.split("."))
    }
    return DTYPES.get(stored.pop(), torch.float32) if len(stored) == 1 else torch.float32


def stored_share(component: Component) -> float:
    """Bytes of the weights where matrices that are stored in half precision are held so, of those in float32.

    1 where the network is not stored in half precision.
    """
    if stored_dtype(component) == torch.float32:
        return 1.0
    held = full = 0
    for info in component.tensors.values():
        count = math.prod(info.shape)
        full += 4 * count
        held += (2 if info.dtype in DTYPES and len(info.shape) > 1 else 4) * count
    return held / full


def check_pipeline(component: Component) -> None:
    """Refuse a pipeline whose other components could not travel along.

    Raises:
        GfpruneError: a component has no safetensors weights, or is code of the pipeline's own.
    """
    check_entries(component.pipeline or {}, component.root / "model_index.json")
    for name, (_, class_name) in component.entries.items():
        folder = component.root / name
        if name == component.name or WEIGHTLESS.search(class_name) or not (folder / "config.json").exists():
            continue
        if not list(folder.glob("*.safetensors")):
            raise GfpruneError(
                f"{folder} has no safetensors weights, and pickles cannot travel along: {CONVERSION}"
            )


def absent_parts(component: Component) -> list[str]:
    """Parts that model_index.json names, that are not there, and that pipelines do without."""
    named = component.entries
    return [name for name in OPTIONAL if name in named and not (component.root / name).is_dir()]


def library_entry(class_name: str) -> list[str]:
    """What model_index.json says of a network: library or module file, and class."""
    return [modeling.STEM if class_name.startswith(PRUNED) else "diffusers", class_name]


def copy_pipeline(staging: Path, component: Component, entries: Mapping[str, list[str]]) -> None:
    """Everything of the pipeline but the pruned components: JSON and safetensors only, no pickles.

    Args:
        entries: what model_index.json says of those.
    """
    assert component.pipeline is not None
    roots = component.roots
    adaptive = any(library == modeling.STEM for library, _ in entries.values())
    index = index_without_absent(component, entries)
    for other, (library, class_name) in component.entries.items():
        if other not in entries and (component.root / other).is_dir():
            copy_component(component.root / other, staging / other, variant_of(component), roots)
            if class_name.startswith(PRUNED):
                index[other] = [modeling.STEM, class_name]
                renew_component(staging / other)
            elif library == "diffusers" and adaptive and not WEIGHTLESS.search(class_name):
                copy_module(staging / other)
    (staging / "model_index.json").write_text(json.dumps(automatic(index), indent=2) + "\n", encoding="utf-8")
    schedule = scheduler_config_path(component)
    if schedule is not None and (where := component.scheduler_name) in component.pipeline:
        (staging / where).mkdir(exist_ok=True)
        shutil.copyfile(schedule, staging / where / "scheduler_config.json")


def index_without_absent(component: Component, entries: Mapping[str, list[str]]) -> dict[str, Any]:
    """model_index.json with other entries, and with parts that are not there as diffusers writes them."""
    index = {**(component.pipeline or {}), **entries}
    index |= {absent: [None, None] for absent in absent_parts(component)}
    if index.get("safety_checker") == [None, None] and "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    return index


def automatic(index: Mapping[str, Any]) -> dict[str, Any]:
    """A model_index.json that says where AutoModel finds the class of a pruned component.

    It looks for it there, and not in the component's own configuration, when it is given a `subfolder`.
    """
    plain = {key: value for key, value in index.items() if key != "auto_map"}
    pruned = [entry for entry in pipeline_components(plain).values() if entry[0] == modeling.STEM]
    return {**plain, "auto_map": {"AutoModel": ".".join(pruned[0])}} if pruned else plain


def renew_component(folder: Path) -> None:
    """Give another pruned component of the pipeline the module file of this version."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModel": f"{modeling.STEM}.{config['_class_name']}"}
    config.setdefault("quantization_config", {"quant_method": modeling.STOP})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_module(folder)


def variant_of(component: Component) -> str | None:
    """Which weights of the pipeline were read."""
    found = weights_variant(component.weights[0].name) if component.weights else None
    return found[1] if found else None


def copy_component(source: Path, target: Path, variant: str | None, roots: tuple[Path, ...]) -> None:
    """Copy what is no code and no pickle.

    The result's own weights are plain ones. A component that has only the variant gets plain names too, so
    that the whole pipeline loads without a variant.
    """
    paths = [path for path in sorted(source.rglob("*")) if path.suffix in COPIED and path.is_file()]
    found = {weights_variant(path.name) for path in paths} - {None}
    rename = variant is not None and bool(found) and all(entry and entry[1] == variant for entry in found)
    for path in paths:
        checked_file(path, roots)
        name = path.name.replace(f".{variant}", "", 1) if rename else path.name
        copy = target / path.relative_to(source).with_name(name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if name != path.name and path.suffix == ".json":  # the index of shards, which have new names too
            index = read_json(path, roots, limit=INDEX_BYTES)
            places = index.get("weight_map", {}).items()
            index["weight_map"] = {key: str(file).replace(f".{variant}", "", 1) for key, file in places}
            copy.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, copy)


def copy_scheduler(staging: Path, component: Component) -> None:
    """The schedule that lies in a bare model's own folder: without it the model's noise is not known."""
    schedule = scheduler_config_path(component)
    if schedule is not None and schedule.is_relative_to(component.root):
        target = staging / schedule.relative_to(component.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(schedule, target)


def loading_line(name: str, class_name: str, *options: str, bare: bool) -> str:
    """The two lines of Python that load a folder with nothing but diffusers."""
    pruned = class_name.startswith(PRUNED)
    cls = ("AutoModel" if pruned else class_name) if bare else "DiffusionPipeline"
    given = ", ".join([f'"{name}"', *options, *(["trust_remote_code=True"] if pruned else [])])
    return f"from diffusers import {cls}\n{'model' if bare else 'pipeline'} = {cls}.from_pretrained({given})"
