"""Where things lie in a diffusers checkpoint: which component is the denoiser, which files its weights."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.advice import (
    instead_of_folder,
    other_weights_hint,
    pickle_hint,
    refuse_export,
    why_not,
)
from gfprune_cli.checkpoint.files import quoted, read_config, read_json, trusted_roots
from gfprune_cli.errors import GfpruneError, UsageError

PRUNED_MODULE = "gfprune_models_v2"
PRUNED = "Pruned"  # before the name of the stock class
PRUNED_MODULES = (PRUNED_MODULE, "gfprune_models_v1")  # and the file of earlier checkpoints

AUTOENCODERS = ("AutoencoderKL", "VQModel", "AutoencoderKLFlux2")
# to the states of a denoiser, whose output tells what is lost
ADDING = (
    *("ControlNetModel", "T2IAdapter"),
    *("FluxControlNetModel", "QwenImageControlNetModel", "SD3ControlNetModel"),
)
FAMILIES = (
    "U-Nets and diffusion transformers of diffusers, its autoencoders of images (AutoencoderKL, VQModel), "
    "ControlNets and T2I adapters beside them, and what it pruned itself"
)
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # pipelines do without
PREFERRED = ("unet", "transformer")

STEM = "diffusion_pytorch_model"

_COMPONENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")  # names a folder
# By name alone: whether it is a model class of diffusers shows when the class is looked up.
_DENOISER_NAME = re.compile(
    r"(?=[A-Za-z0-9]*(?:UNet|UVit|Transformer|DiT))[A-Z][A-Za-z0-9]*(?:Model|UNet|Transformer)"
)
_NO_DENOISER = re.compile(
    r"^Pruned|ControlNet|Adapter|Encoder|Checker|Vocoder|Pipeline|Scheduler|Tokenizer|Processor"
)
_VARIANT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_WEIGHTS_NAME = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(?:\.(?P<before>[A-Za-z0-9_-]+?))?"
    r"(?:-\d{5}-of-\d{5})?(?:\.(?P<after>[A-Za-z0-9_-]+))?\.safetensors"
)


@dataclass(frozen=True)
class Location:
    """A denoiser inside a checkpoint folder.

    Args:
        root: the checkpoint's folder.
        folder: where config.json and the weights lie: a subfolder, or `root` itself.
        name: the component's name in the pipeline ("unet"), or "" for a bare model folder.
        class_name: see `is_denoiser`.
        pipeline: the parsed model_index.json, or None for a bare model folder.
    """

    root: Path
    folder: Path
    name: str
    class_name: str
    pipeline: dict[str, Any] | None


def stock_name(class_name: str) -> str:
    """The class of diffusers that a class is, or was pruned from."""
    return class_name.removeprefix(PRUNED)


def is_autoencoder(class_name: str) -> bool:
    """Whether a class encodes images; such a component is worked on only where it is asked for by name."""
    return stock_name(class_name) in AUTOENCODERS


def is_adding(class_name: str) -> bool:
    """Whether a class adds to the states of a denoiser; such a component has to be asked for by name, too."""
    return stock_name(class_name) in ADDING


def predicts(class_name: str) -> bool:
    """Whether a class that gfprune works on is a denoiser."""
    return not is_autoencoder(class_name) and not is_adding(class_name)


def is_denoiser(library: str, class_name: str) -> bool:
    """Whether model_index.json names a class that gfprune works on; nothing is imported to find out."""
    if class_name.startswith(PRUNED) != (library in PRUNED_MODULES):
        return False
    name = stock_name(class_name)
    known = name in (*AUTOENCODERS, *ADDING) or (
        _DENOISER_NAME.fullmatch(name) and not _NO_DENOISER.search(name)
    )
    return bool(known) and library in ("diffusers", *PRUNED_MODULES)


def is_known(class_name: object) -> bool:
    """Whether a config.json names a class that gfprune works on."""
    name = str(class_name)
    return is_denoiser(PRUNED_MODULE if name.startswith(PRUNED) else "diffusers", name)


def locate_all(root: Path) -> list[Location]:
    """Find every network that gfprune works on in a checkpoint folder.

    Args:
        root: a pipeline folder (subfolders or flat) or a bare model folder.

    Returns:
        At least one location.

    Raises:
        GfpruneError: no diffusers folder, a broken JSON file, or no supported network in it.
    """
    roots = trusted_roots(root)
    if (root / "model_index.json").exists():
        refuse_export(root, roots)
        return _locate_in_pipeline(root, read_json(root / "model_index.json", roots))
    if not (root / "config.json").exists():
        hint = instead_of_folder(root, _networks_in(root, roots), roots)
        raise GfpruneError(
            f"{root} has neither model_index.json nor config.json: it is no diffusers folder{hint}"
        )
    refuse_export(root, roots)
    class_name = read_config(root / "config.json", roots).get("_class_name")
    if not is_known(class_name):
        why = why_not(str(class_name))
        told = f", which {why}" if why else f": gfprune supports {FAMILIES}"
        raise GfpruneError(f"{root / 'config.json'} is for {quoted(class_name)}{told}")
    if is_adding(str(class_name)):
        raise GfpruneError(
            f"{root} is a {class_name} alone, and its denoiser tells what it is worth: give their pipeline"
        )
    return [Location(root, root, "", str(class_name), None)]


def _networks_in(root: Path, roots: tuple[Path, ...]) -> list[str]:
    """The folders in a folder that hold a pipeline or a network: one of them is meant."""
    pipelines = [path.parent.name for path in sorted(root.glob("*/model_index.json"))]
    networks = [path.parent.name for path in sorted(root.glob("*/config.json")) if _describes(path, roots)]
    return list(dict.fromkeys(pipelines + networks))


def _describes(path: Path, roots: tuple[Path, ...]) -> bool:
    """Whether a config.json is one of a network that gfprune works on."""
    try:
        return is_known(read_config(path, roots).get("_class_name"))
    except GfpruneError:  # it is not the one that was given
        return False


def _locate_in_pipeline(root: Path, pipeline: dict[str, Any]) -> list[Location]:
    entries = pipeline_components(pipeline)
    found = [name for name, entry in entries.items() if is_denoiser(*entry)]
    if not found:
        raise _no_denoiser(root, entries)
    locations = []
    for name in found:
        # Early diffusers repositories keep the files of their one model beside model_index.json.
        flat = not (root / name).is_dir() and (root / "config.json").exists()
        locations.append(Location(root, root if flat else root / name, name, entries[name][1], pipeline))
    return locations


def _no_denoiser(root: Path, entries: dict[str, tuple[str, str]]) -> GfpruneError:
    parts = ", ".join(f"{name}: {class_name}" for name, (_, class_name) in list(entries.items())[:16])
    return GfpruneError(
        f"{root / 'model_index.json'} names no denoiser that gfprune supports ({FAMILIES}): "
        f"it has {parts or 'no components'}"
    )


def default_locations(locations: list[Location]) -> list[Location]:
    """What `--component` need not name: the denoiser, or those there are to choose from."""
    denoisers = [place for place in locations if place.pipeline is None or predicts(place.class_name)]
    preferred = [place for name in PREFERRED for place in denoisers if place.name == name]
    return preferred[:1] or denoisers


def denoiser_names(root: Path) -> list[str]:
    """The components that `--component all` stands for.

    Raises:
        GfpruneError: see `locate_all`; UsageError: a bare model folder.
    """
    locations = locate_all(root)
    if locations[0].pipeline is None:
        raise UsageError(f"--component needs a pipeline, but {root} is a bare model folder: drop the flag")
    found = [place.name for place in locations if predicts(place.class_name)]
    if not found:
        raise _no_denoiser(root, pipeline_components(locations[0].pipeline))
    return found


def pipeline_components(pipeline: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Component name -> (library, class name) of the components that a model_index.json holds."""
    return {
        name: (value[0], value[1])
        for name, value in pipeline.items()
        if _COMPONENT_NAME.fullmatch(name)
        and isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, str) and _COMPONENT_NAME.fullmatch(part.split(".")[-1]) for part in value)
    }


def locate(root: Path, component: str | None = None) -> Location:
    """Find the network to work on.

    Args:
        root: a pipeline folder (subfolders or flat) or a bare model folder.
        component: its name in the pipeline; None takes "unet", "transformer", or the only denoiser there is.

    Raises:
        GfpruneError: see `locate_all`.
        UsageError: no such component, or several to choose from.
    """
    locations = locate_all(root)
    names = [location.name for location in locations]
    if component is not None:
        if locations[0].pipeline is None:
            raise UsageError(
                f"--component needs a pipeline, but {root} is a bare model folder: drop the flag"
            )
        if component not in names:
            _, class_name = pipeline_components(locations[0].pipeline).get(component, ("", ""))
            if why := why_not(class_name):
                raise UsageError(f"--component {component}: {class_name} {why}")
            raise UsageError(
                f"{root} has no component {quoted(component)} that can be pruned: choose {_list(names)}"
            )
        return locations[names.index(component)]
    chosen = default_locations(locations)
    if not chosen:  # only what has to be asked for
        raise _no_denoiser(root, pipeline_components(locations[0].pipeline or {}))
    if len(chosen) > 1:
        names = [location.name for location in chosen]
        raise UsageError(f"{root} has several denoisers: choose one with --component {_list(names)}")
    return chosen[0]


def weights_variant(file_name: str) -> tuple[str, str | None] | None:
    """(stem, variant) of a safetensors weights file or shard, or None for any other file."""
    match = _WEIGHTS_NAME.fullmatch(file_name)
    return (match["stem"], match["before"] or match["after"]) if match else None


def pick_weights(names: Collection[str], variant: str | None, where: str) -> str:
    """Choose the file that leads to a denoiser's weights: the shard index or the single file.

    Args:
        names: the files in the component's folder (or its listing on the Hub).
        variant: "fp16" and the like; None for the plain files.
        where: names the folder in messages.

    Raises:
        NoWeights: there are none, or only pickled ones.
        UsageError: there are weights, but not this variant.
    """
    check_variant(variant)
    middle = f".{variant}" if variant else ""
    wanted = (
        f"{STEM}.safetensors.index{middle}.json",
        f"{STEM}{middle}.safetensors.index.json",
        f"{STEM}.safetensors{middle}.index.json",  # of early diffusers with shards
        f"{STEM}{middle}.safetensors",
    )
    for name in wanted:
        if name in names:
            return name
    parsed = [found for found in map(weights_variant, sorted(names)) if found and found[0] == STEM]
    variants = list(dict.fromkeys(found[1] for found in parsed))
    if variant and None in variants and variant not in variants:
        choice = "".join(f", or pass --variant {name}" for name in variants if name)
        raise UsageError(f"{where} has no {variant!r} weights: drop --variant{choice}")
    if variants and variant not in variants:
        raise UsageError(f"{where} has no {wanted[-1]}: pass --variant {_list(variants)}")
    if parsed:
        raise NoWeights(
            f"{where} has shards but no {wanted[0]}: the checkpoint is incomplete, fetch it again"
        )
    hint = other_weights_hint(sorted(names), wanted[-1]) or pickle_hint(sorted(names))
    raise NoWeights(f"{where} has no {wanted[-1]}{hint}")


class NoWeights(GfpruneError):
    """There is no weights file to read (as opposed to a bad one)."""


def check_variant(variant: str | None) -> None:
    """Raise `UsageError` for a variant that cannot be part of a file name."""
    if variant is not None and not _VARIANT_NAME.fullmatch(variant):
        raise UsageError(f"--variant {quoted(variant)} is not a variant's name (fp16, bf16, ...)")


def _list(names: Iterable[str | None]) -> str:
    return " or ".join(str(name) for name in names if name)
