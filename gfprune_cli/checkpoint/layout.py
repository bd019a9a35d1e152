"""Where things lie in a diffusers checkpoint: which component is the denoiser, which files its weights."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.files import CONVERSION, quoted, read_config, read_json, trusted_roots
from gfprune_cli.errors import GfpruneError, UsageError

PRUNED_MODULE = "gfprune_unet2d_v1"
PRUNED_CLASS = "PrunedUNet2DModel"

# Class name -> the library that model_index.json names for it. Nothing else is ever instantiated.
DENOISERS = {"UNet2DModel": "diffusers", PRUNED_CLASS: PRUNED_MODULE}
ANALYZE_ONLY = {"UNet2DConditionModel": "diffusers"}

STEM = "diffusion_pytorch_model"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

_COMPONENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
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
        class_name: one of `DENOISERS` or `ANALYZE_ONLY`.
        pipeline: the parsed model_index.json, or None for a bare model folder.
    """

    root: Path
    folder: Path
    name: str
    class_name: str
    pipeline: dict[str, Any] | None


def accepted_classes(*, weights_required: bool) -> dict[str, str]:
    """Class name -> library of the denoisers that can be loaded (or, without weights, at least analyzed)."""
    return dict(DENOISERS) if weights_required else DENOISERS | ANALYZE_ONLY


def locate_all(root: Path, *, weights_required: bool = True) -> list[Location]:
    """Find every supported denoiser in a checkpoint folder.

    Args:
        root: a pipeline folder (subfolders or flat) or a bare model folder.
        weights_required: False accepts also the classes that can only be analyzed.

    Returns:
        At least one location.

    Raises:
        GfpruneError: no diffusers folder, a broken JSON file, or no supported denoiser in it.
    """
    roots = trusted_roots(root)
    accepted = accepted_classes(weights_required=weights_required)
    if (root / "model_index.json").exists():
        pipeline = read_json(root / "model_index.json", roots)
        return _locate_in_pipeline(root, pipeline, accepted)
    if not (root / "config.json").exists():
        hint = _pickle_hint(entry.name for entry in root.iterdir())
        raise GfpruneError(
            f"{root} has neither model_index.json nor config.json: it is no diffusers folder{hint}"
        )
    class_name = read_config(root / "config.json", roots).get("_class_name")
    if class_name not in accepted:
        raise GfpruneError(
            f"{root / 'config.json'} is for {quoted(class_name)}: gfprune supports {_list(accepted)}"
        )
    return [Location(root, root, "", str(class_name), None)]


def _locate_in_pipeline(root: Path, pipeline: dict[str, Any], accepted: dict[str, str]) -> list[Location]:
    entries = pipeline_components(pipeline)
    found = [name for name, (library, class_name) in entries.items() if accepted.get(class_name) == library]
    if not found:
        parts = ", ".join(f"{name}: {class_name}" for name, (_, class_name) in list(entries.items())[:16])
        raise GfpruneError(
            f"{root / 'model_index.json'} names no denoiser that gfprune supports ({_list(accepted)}): "
            f"it has {parts or 'no components'}"
        )
    locations = []
    for name in found:
        # Early diffusers repositories keep the files of their one model beside model_index.json.
        flat = not (root / name).is_dir() and (root / "config.json").exists()
        locations.append(Location(root, root if flat else root / name, name, entries[name][1], pipeline))
    return locations


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


def locate(root: Path, component: str | None = None, *, weights_required: bool = True) -> Location:
    """Find the denoiser to work on.

    Args:
        root: a pipeline folder (subfolders or flat) or a bare model folder.
        component: its name in the pipeline; None takes "unet", or the only one there is.
        weights_required: False accepts also the classes that can only be analyzed.

    Raises:
        GfpruneError: see `locate_all`.
        UsageError: no such component, or several to choose from.
    """
    locations = locate_all(root, weights_required=weights_required)
    names = [location.name for location in locations]
    if component is not None:
        if locations[0].pipeline is None:
            raise UsageError(
                f"--component needs a pipeline, but {root} is a bare model folder: drop the flag"
            )
        if component not in names:
            raise UsageError(
                f"{root} has no component {quoted(component)} that can be pruned: choose {_list(names)}"
            )
        return locations[names.index(component)]
    if len(locations) > 1 and "unet" not in names:
        raise UsageError(f"{root} has several denoisers: choose one with --component {_list(names)}")
    return locations[names.index("unet")] if "unet" in names else locations[0]


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
        GfpruneError: there are no weights, or only pickled ones.
        UsageError: there are weights, but not this variant.
    """
    check_variant(variant)
    middle = f".{variant}" if variant else ""
    wanted = (
        f"{STEM}.safetensors.index{middle}.json",
        f"{STEM}{middle}.safetensors.index.json",
        f"{STEM}{middle}.safetensors",
    )
    for name in wanted:
        if name in names:
            return name
    parsed = [found for found in map(weights_variant, sorted(names)) if found and found[0] == STEM]
    variants = list(dict.fromkeys(found[1] for found in parsed))
    if variant and None in variants:
        choice = "".join(f", or pass --variant {name}" for name in variants if name)
        raise UsageError(f"{where} has no {variant!r} weights: drop --variant{choice}")
    if variants and variants != [variant]:
        raise UsageError(f"{where} has no {wanted[-1]}: pass --variant {_list(variants)}")
    if parsed:
        raise GfpruneError(
            f"{where} has shards but no {wanted[0]}: the checkpoint is incomplete, fetch it again"
        )
    raise GfpruneError(f"{where} has no {wanted[-1]}{_pickle_hint(names)}")


def check_variant(variant: str | None) -> None:
    """Raise `UsageError` for a variant that cannot be part of a file name."""
    if variant is not None and not _VARIANT_NAME.fullmatch(variant):
        raise UsageError(f"--variant {quoted(variant)} is not a variant's name (fp16, bf16, ...)")


def _pickle_hint(names: Iterable[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if not pickles:
        return ""
    return f", only {quoted(pickles[0])}, and gfprune reads no pickle: convert it with {CONVERSION}"


def _list(names: Iterable[str | None]) -> str:
    return " or ".join(str(name) for name in names if name)
