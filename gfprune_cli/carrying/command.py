"""`carry`: an adapter made for the dense network -> one for the pruned network."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gfprune_cli.carrying.carried import Carried
from gfprune_cli.carrying.controlnet import CLASSES, carry_controlnet, class_of
from gfprune_cli.carrying.files import Adapter, find_file, read_adapter
from gfprune_cli.carrying.image_prompts import carry_image_prompts, is_image_prompt
from gfprune_cli.carrying.lora import carry_lora
from gfprune_cli.carrying.result import CarryResult
from gfprune_cli.carrying.spelling import common_name
from gfprune_cli.carrying.t2i_adapter import CLASS, carry_t2i_adapter
from gfprune_cli.carrying.target import Target, find_target
from gfprune_cli.carrying.transformer_controlnet import NETWORKS, carry_transformer_controlnet
from gfprune_cli.checkpoint.reader import sha256_of_weights
from gfprune_cli.checkpoint.record import RECORD, installed_tools
from gfprune_cli.checkpoint.shards import SHARD_BYTES, write_weights
from gfprune_cli.errors import GfpruneError
from gfprune_cli.outputs.claim import claim
from gfprune_cli.outputs.digests import sha256_of
from gfprune_cli.outputs.durable import check_space, staged, write_json, write_tensors
from gfprune_cli.progress import Event, Progress, silent
from gfprune_cli.recipes.carry import CarryRecipe
from gfprune_cli.recipes.run_options import RunOptions


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Args:
        name: in documents.
        file: what its tensors are written to; of a LoRA, the name that diffusers looks for;
            of a network, none.
        loading: the Python that loads it; FOLDER stands for its place.
        carry: makes it fit.
    """

    name: str
    file: str
    loading: str
    carry: Callable[[Adapter, Target], Carried]


LORA = Kind(
    "lora",
    "pytorch_lora_weights.safetensors",
    'pipeline.load_lora_weights("FOLDER")',
    lambda adapter, target: carry_lora(common_name(adapter, target), target),
)
IMAGE_PROMPTS = Kind(
    "ip-adapter",
    "ip_adapter.safetensors",
    'pipeline.load_ip_adapter("FOLDER", subfolder="", weight_name="ip_adapter.safetensors")',
    lambda adapter, target: carry_image_prompts(adapter.tensors, target),
)
NETWORK = 'AutoModel.from_pretrained("FOLDER", trust_remote_code=True)'
CONTROLNET = Kind("controlnet", "", f"controlnet = {NETWORK}", carry_controlnet)
# by the class that a configuration names
NAMED = {
    **dict.fromkeys(CLASSES, CONTROLNET),
    **dict.fromkeys(NETWORKS, replace(CONTROLNET, carry=carry_transformer_controlnet)),
    CLASS: Kind("t2i-adapter", "", f"adapter = {NETWORK}", carry_t2i_adapter),
}


def adapter_kind(adapter: Adapter) -> Kind:
    """What an adapter is.

    Raises:
        GfpruneError: of a kind that cannot be carried over.
    """
    named = class_of(adapter)
    if named in NAMED:
        return NAMED[named]
    if "ControlNet" in named or named.endswith("Adapter"):
        raise GfpruneError(
            f"{adapter.path} cannot be carried over: {named} is none of {', '.join(NAMED)}; use it with the "
            "dense model, or with a U-Net that was pruned with --keep-interfaces"
        )
    if "control_model." in next(iter(adapter.tensors), ""):
        raise GfpruneError(
            f"{adapter.path} cannot be carried over: ControlNets are read in diffusers' layout "
            "(from_single_file, then save_pretrained)"
        )
    return IMAGE_PROMPTS if is_image_prompt(adapter.tensors) else LORA


def carry(recipe: CarryRecipe, options: RunOptions, progress: Progress = silent) -> CarryResult:
    """Make an adapter of the dense model fit the pruned one.

    Raises:
        UsageError: wrong settings, or a model that was not pruned. GfpruneError: the adapter is damaged, of a
        kind that cannot be carried over, or of another network.
    """
    start = time.monotonic()
    path = find_file(recipe.adapter)
    destination = options.out or default_output(recipe, path)
    with claim(destination, options) as output:
        target = find_target(recipe, options, progress)
        output.refuse_inputs({"--model": target.source.folder, "--adapter": path})
        progress(Event("load", text=f"reading {path}"))
        adapter = read_adapter(path)
        kind = adapter_kind(adapter)
        carried = kind.carry(adapter, target)
        if not carried.layers or len(carried.dropped) == carried.layers:
            raise GfpruneError(
                f"{path} has {carried.layers} layers for {target.component.class_name}, of which "
                f"{len(carried.dropped)} are gone: there is nothing to carry over"
            )
        result = make_result(recipe, adapter, target, carried, kind)
        if not options.dry_run:
            check_space(destination, result.bytes["after"])
            result = replace(result, output=str(destination))
            progress(Event("write", text=f"writing {destination}"))
            with staged(destination, force=options.force, needed=result.bytes["after"]) as staging:
                write_adapter(staging, kind, carried)
                write_json(staging / RECORD, make_record(recipe, adapter, target, result))
                (staging / "README.md").write_text(card(recipe, result, kind), encoding="utf-8")
    return replace(result, seconds=round(time.monotonic() - start, 3))


def write_adapter(staging: Path, kind: Kind, carried: Carried) -> None:
    """The files of an adapter."""
    if carried.network is not None:
        write_weights(staging, carried.network, None, SHARD_BYTES)
        return
    # converters give several layers one tensor, which a file may not hold twice
    write_tensors(staging / kind.file, {name: part.clone() for name, part in carried.tensors.items()})


def default_output(recipe: CarryRecipe, path: Path) -> Path:
    """A name derived from adapter and model."""
    return Path(f"{path.stem}-for-{Path(recipe.model).name or 'model'}")


def make_result(
    recipe: CarryRecipe, adapter: Adapter, target: Target, carried: Carried, kind: Kind
) -> CarryResult:
    layers = {
        "total": carried.layers,
        "narrowed": carried.narrowed,
        "moved": carried.moved,
        "dropped": len(carried.dropped),
    }
    sizes = {
        name: sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        for name, tensors in (("before", adapter.tensors), ("after", carried.tensors))
    }
    return CarryResult(
        adapter=recipe.adapter,
        model=recipe.model,
        output=None,
        kind=kind.name,
        component=target.prefix,
        layers=layers,
        dropped=tuple(carried.dropped),
        bytes=sizes,
        seconds=0.0,
    )


def make_record(recipe: CarryRecipe, adapter: Adapter, target: Target, result: CarryResult) -> dict[str, Any]:
    """The document of `gfprune.json` beside a carried adapter."""
    said = result.document()
    kept = ("schema_version", "command", "kind", "component", "layers", "dropped", "bytes")
    return {
        **{key: said[key] for key in kept},
        "recipe": recipe.document(),
        "adapter": {"file": adapter.path.name, "sha256": sha256_of(adapter.path)},
        "model": target.source.origin(sha256_of_weights(target.component)),
        "tools": installed_tools(),
    }


def card(recipe: CarryRecipe, result: CarryResult, kind: Kind) -> str:
    """README.md of a carried adapter."""
    layers = result.layers
    return f"""---
library_name: diffusers
tags: [gfprune, {kind.name}]
---

# {Path(recipe.adapter).stem}, for {Path(recipe.model).name}

Made by gfprune from an adapter of the dense model. Of its {layers["total"]} layers, {layers["narrowed"]} were
narrowed, {layers["moved"]} moved to another block, and {layers["dropped"]} dropped: their block is gone,
or they are DoRA of a layer that was folded.

```python
{kind.loading.replace("FOLDER", Path(result.output or "").name)}
```
"""
