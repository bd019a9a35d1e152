"""One file in the naming of a model's authors (Civitai, ComfyUI) -> a diffusers folder in the cache.

The file is read by diffusers' own single-file loaders, after its header was checked; what it does not hold
(schedule, tokenizers, sometimes text encoders and autoencoder) comes from a diffusers folder of its family.
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import diffusers
import torch
from diffusers import pipelines
from diffusers.loaders.single_file import load_single_file_sub_model
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors.torch import load_file

from gfprune_cli.checkpoint.advice import instead_of_file
from gfprune_cli.checkpoint.components import check_entries
from gfprune_cli.checkpoint.files import checked_file, first_line, quoted, trusted_roots
from gfprune_cli.checkpoint.layout import Location, locate, pipeline_components
from gfprune_cli.checkpoint.safetensors_header import FLOAT_TYPES, TensorInfo, read_header
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs.cache import cache_room
from gfprune_cli.outputs.digests import sha256_of, sha256_of_document
from gfprune_cli.outputs.durable import staging_folder
from gfprune_cli.outputs.filesystem import sync_tree
from gfprune_cli.progress import Event, Progress

SUFFIX = ".safetensors"
CONFIGURED = (".json", ".txt", ".model", ".jinja", SUFFIX)
# names in the file that tell whether it holds a component of the pipeline
HOLDS = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
# before its names in a file, often, and always in one with other components
DENOISER = "model.diffusion_model."
# whose authors have diffusers' names: its converters of them leave everything as it is, that prefix too
ALIKE = ("QwenImageTransformer2DModel", "MotifVideoTransformer3DModel")
QUANTIZED = (".weight_scale", ".scale_weight", ".input_scale", ".absmax", ".quant_state")


def check_kind(path: Path) -> dict[str, TensorInfo]:
    """The header of a file that can be a network.

    Raises:
        UsageError: it is none, and what to do instead.
        GfpruneError: it is damaged.
    """
    if instead := instead_of_file(path):
        raise UsageError(f"--model {path} {instead}")
    real = path.resolve()
    header = read_header(checked_file(real, (real.parent,)))
    for name, info in header.items():
        if name.endswith(QUANTIZED) or (
            info.dtype not in FLOAT_TYPES and len(info.shape) > 1 and "position_ids" not in name
        ):
            raise GfpruneError(
                f"{path} is quantized (tensor {quoted(name)}): prune it before it is quantized"
            )
    return header


def converted(path: Path, config_from: Path, progress: Progress) -> Path:
    """The diffusers folder of a file, made once and kept in the cache.

    Args:
        path: the file.
        config_from: a diffusers folder of its family.

    Raises:
        UsageError: the file is no network, or `config_from` is none of its family.
        GfpruneError: the file is damaged, or a component is in neither.
    """
    header = check_kind(path)
    place = family(config_from)
    key = {"file": sha256_of(path), "configs": digests(config_from), "diffusers": diffusers.__version__}
    folder = cache_room("single-file") / sha256_of_document(key)
    if (folder / "model_index.json").is_file():
        return folder
    progress(Event("load", text=f"converting {path.name} with the configuration of {config_from}"))
    parts = pipeline_components(place.pipeline or {})
    held = {part for part in parts if any(name.startswith(HOLDS.get(part, ("-",))) for name in header)}
    held.add(place.name)
    lacking = [name for name in parts if name not in held and not has_weights(config_from / name)]
    if lacking:
        raise GfpruneError(
            f"{path} does not hold {lacking[0]}, and neither does {config_from}: name a folder that has its "
            "weights with --config-from"
        )
    size = sum(file.stat().st_size for file in (path, *config_from.rglob(f"*{SUFFIX}")))
    with staging_folder(folder, size) as staging:
        made = staging / "model"
        copy_configuration(config_from, made, parts, without_weights=held)
        convert(path, header, config_from, made, {name: parts[name] for name in parts if name in held})
        sync_tree(staging)
        if not folder.exists():
            made.rename(folder)
    return folder


def family(folder: Path) -> Location:
    """The denoiser of the pipeline that a folder configures.

    Raises:
        UsageError: it is no pipeline, or a bare network.
    """
    place = locate(folder)
    if place.pipeline is None:
        raise UsageError(
            f"--config-from {folder} is a network alone: name a pipeline, with its model_index.json"
        )
    check_entries(place.pipeline, folder / "model_index.json")
    return place


def digests(folder: Path) -> dict[str, str]:
    """What the folder says, by hash; weights by name and size."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in CONFIGURED:
            heavy = file.suffix == SUFFIX
            found[str(file.relative_to(folder))] = str(file.stat().st_size) if heavy else sha256_of(file)
    return found


def has_weights(folder: Path) -> bool:
    """Whether a component has weights, or needs none."""
    return not (folder / "config.json").is_file() or any(folder.glob(f"*{SUFFIX}"))


def copy_configuration(
    source: Path, target: Path, parts: Iterable[str], *, without_weights: set[str]
) -> None:
    """Everything but code, pickles, and the weights of components that the file holds."""
    roots = trusted_roots(source)
    target.mkdir()
    shutil.copyfile(source / "model_index.json", target / "model_index.json")
    for name in parts:
        for file in sorted((source / name).rglob("*")) if (source / name).is_dir() else ():
            heavy = file.suffix == SUFFIX or file.name.endswith(".index.json")
            if file.is_file() and file.suffix in CONFIGURED and not (heavy and name in without_weights):
                checked_file(file, roots)
                copy = target / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


def convert(
    path: Path,
    header: Mapping[str, TensorInfo],
    config_from: Path,
    target: Path,
    held: Mapping[str, tuple[str, str]],
) -> None:
    """Write the components that the file holds, as diffusers reads them.

    Args:
        held: name -> (library, class name).

    Raises:
        GfpruneError: diffusers cannot read one with this configuration.
    """
    dtype = stored_type(header)
    for name, (library, class_name) in held.items():
        try:
            part = load_single_file_sub_model(
                library_name=library,
                class_name=class_name,
                name=name,
                checkpoint=checkpoint_for(class_name, load_file(path)),  # converters take it apart
                pipelines=pipelines,
                is_pipeline_module=hasattr(pipelines, library),
                cached_model_config_path=str(config_from),
                local_files_only=True,
                torch_dtype=dtype,
            )
        except Exception as error:  # converters raise what comes to hand
            raise GfpruneError(
                f"{path}: diffusers cannot read {name} as {class_name} with the configuration of "
                f"{config_from} ({first_line(error)}): name a folder of its family with --config-from"
            ) from error
        part.to(dtype).save_pretrained(target / name, safe_serialization=True)


def checkpoint_for(class_name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a file under names that diffusers' converter of a class takes."""
    if class_name not in ALIKE:
        return tensors
    own = {name.removeprefix(DENOISER): value for name, value in tensors.items() if name.startswith(DENOISER)}
    return own or tensors


def stored_type(header: Mapping[str, TensorInfo]) -> torch.dtype:
    """The type that most numbers of the file have; bfloat16 for eight bits."""
    sizes = Counter[str]()
    for info in header.values():
        sizes[info.dtype] += math.prod(info.shape)
    known = {"F16": torch.float16, "F32": torch.float32, "F64": torch.float32}
    return known.get(sizes.most_common(1)[0][0], torch.bfloat16)


def default_configuration(path: Path) -> str:
    """The Hub id of the pipeline whose configuration diffusers takes for a file.

    Raises:
        UsageError: it does not know the file.
    """
    with torch.device("meta"):
        shapes = {name: torch.empty(info.shape) for name, info in check_kind(path).items()}
    try:
        found = fetch_diffusers_config(shapes)
    except Exception as error:
        raise UsageError(
            f"--model {path}: diffusers does not know its family ({first_line(error)}): name a diffusers "
            "folder of it with --config-from"
        ) from error
    return str(found["pretrained_model_name_or_path"])
