"""A checkpoint folder -> a model in memory.

`inspect` reads JSON and safetensors headers only, so it is safe on a file from anywhere and costs no memory;
`load_model` reads the weights, after every tensor's name and shape was checked against the class.
"""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfprune_cli.checkpoint.files import first_line, quoted, read_config, trusted_roots
from gfprune_cli.checkpoint.layout import ANALYZE_ONLY, DENOISERS, PRUNED_CLASS, locate
from gfprune_cli.checkpoint.safetensors_header import FLOAT_TYPES, TensorInfo
from gfprune_cli.checkpoint.scheduler import load_scheduler, scheduler_config_path
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.checkpoint.weights import NoWeights, read_weights
from gfprune_cli.errors import GfpruneError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "Component", "TensorInfo", "build_meta", "inspect", "load_model", "load_scheduler",
    "scheduler_config_path", "sha256_of_weights",
]  # fmt: skip


@dataclass(frozen=True)
class Component:
    """A denoiser on disk, described without its weights.

    Args:
        folder: where its config.json and weights lie.
        name: its name in the pipeline ("unet"), or "" for a bare model folder.
        class_name: one of `layout.DENOISERS` (or `layout.ANALYZE_ONLY`).
        config: the parsed config.json.
        weights: the safetensors files; empty if they were not required and are not there.
        tensors: what the files' headers say, by tensor name as stored.
        pipeline: the parsed model_index.json, None for a bare model folder.
        root: the checkpoint's folder.
    """

    folder: Path
    name: str
    class_name: str
    config: dict[str, Any]
    weights: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    pipeline: dict[str, Any] | None
    root: Path

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum(path.stat().st_size for path in self.weights)

    @property
    def is_pruned(self) -> bool:
        """Whether this is a network of non-uniform widths that gfprune wrote."""
        return self.class_name == PRUNED_CLASS


def inspect(
    source: Source, *, component: str | None = None, variant: str | None = None, weights_required: bool = True
) -> Component:
    """Describe the denoiser of a checkpoint from its JSON files and safetensors headers.

    Args:
        source: from `source.resolve`.
        component: the denoiser's name in the pipeline; None takes "unet", or the only one there is.
        variant: which weights ("fp16"); None for the plain files.
        weights_required: False also accepts a checkpoint without readable weights, and classes that can only
            be analyzed; headers are read if they are there.

    Raises:
        GfpruneError: something is missing, malformed, too large, or leads out of the folder.
        UsageError: the component or variant does not exist.
    """
    place = locate(source.folder, component, weights_required=weights_required)
    roots = trusted_roots(place.root)
    config_path = place.folder / "config.json"
    config = read_config(config_path, roots)
    if config.get("_class_name", place.class_name) != place.class_name:
        raise GfpruneError(
            f"{config_path} is for {quoted(config['_class_name'])}, "
            f"but model_index.json says {place.class_name}"
        )
    try:
        weights, tensors = read_weights(place.folder, variant, roots)
    except NoWeights:
        if weights_required:
            raise
        weights, tensors = (), {}
    return Component(
        place.folder, place.name, place.class_name, config, weights, tensors, place.pipeline, place.root
    )


def build_meta(component: Component) -> "nn.Module":
    """The component's class, instantiated from its config on the meta device: shapes and no memory.

    Raises:
        GfpruneError: the config does not describe a network of that class.
    """
    return _build(component, "meta")


def _build(component: Component, device: str) -> "nn.Module":
    import torch

    model_class = _model_class(component.class_name)
    # Initial values are overwritten, so drawing them must not move the caller's random state.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            model: nn.Module = model_class.from_config(copy.deepcopy(component.config))
        except GfpruneError:
            raise
        except Exception as error:  # a hostile or broken config can fail anywhere in the constructor
            raise GfpruneError(
                f"{component.folder / 'config.json'} does not describe a valid {component.class_name}: "
                f"{first_line(error)}"
            ) from error
    return model.eval()


def _model_class(class_name: str) -> Any:
    if class_name not in DENOISERS | ANALYZE_ONLY:
        raise GfpruneError(f"{quoted(class_name)} is not a class that gfprune loads")
    if class_name == PRUNED_CLASS:
        from gfprune_cli.checkpoint.modeling.gfprune_unet2d_v1 import PrunedUNet2DModel

        return PrunedUNet2DModel
    import diffusers

    return getattr(diffusers, class_name)


def load_model(component: Component, *, dtype: "torch.dtype | None" = None) -> "nn.Module":
    """Load the denoiser's weights.

    Args:
        component: from `inspect`.
        dtype: the type to cast to; None means float32.

    Returns:
        The model on the CPU, in `eval()` mode, sharing no memory with the files.

    Raises:
        GfpruneError: a tensor is missing, unknown, of the wrong shape, not floating point, or not finite.
    """
    import torch
    from torch import nn

    dtype = dtype or torch.float32
    if not component.weights:
        raise GfpruneError(f"{component.folder} has no weights that gfprune can read")
    model = build_meta(component)
    stored = _stored_names(model, component)
    _check_tensors(model, component, stored)
    if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in stored):
        model = _build(component, "cpu")  # buffers that are computed and never saved need real values
    model.load_state_dict(_read_tensors(component, stored, dtype), assign=True)
    # Not diffusers' own `to`: it logs a warning that is about models with float32-only layers.
    return nn.Module.to(model, dtype).eval()


def _stored_names(model: "nn.Module", component: Component) -> dict[str, str]:
    """The model's tensor name -> the name in the files, which old checkpoints spell differently."""
    names: dict[str, Any] = {name: name for name in component.tensors}
    # Attention used to be query, key, value, proj_attn; diffusers knows which blocks may still be spelled so.
    model._fix_state_dict_keys_on_load(names)  # type: ignore[operator]
    # The Fourier features used to be saved under two names, and removing duplicates kept the wrong one.
    if "time_proj.W" in names and "time_proj.W" not in model.state_dict():
        old = names.pop("time_proj.W")
        names.setdefault("time_proj.weight", old)
    return names


def _check_tensors(model: "nn.Module", component: Component, stored: dict[str, str]) -> None:
    config = component.folder / "config.json"
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in stored:
            raise GfpruneError(
                f"tensor {quoted(name)} is missing from {_files(component)}, but {config} needs it"
            )
        info = component.tensors[stored[name]]
        if info.shape != shape:
            raise GfpruneError(
                f"tensor {quoted(stored[name])} is {list(info.shape)} in {info.file}, "
                f"but {list(shape)} by {config}: one of the two belongs to another model"
            )
        if info.dtype not in FLOAT_TYPES:
            raise GfpruneError(
                f"tensor {quoted(stored[name])} in {info.file} is {info.dtype}: gfprune prunes "
                "floating-point weights, so start from the checkpoint before it was quantized"
            )
    for name in stored:
        if name not in expected:
            info = component.tensors[stored[name]]
            raise GfpruneError(
                f"tensor {quoted(stored[name])} in {info.file} has no place in {component.class_name}"
            )


def _files(component: Component) -> str:
    return str(component.weights[0] if len(component.weights) == 1 else component.folder)


def _read_tensors(
    component: Component, stored: dict[str, str], dtype: "torch.dtype"
) -> dict[str, "torch.Tensor"]:
    """Model's tensor name -> a finite tensor of `dtype`, file by file."""
    import torch
    from safetensors import SafetensorError, safe_open

    result = {}
    for path in component.weights:
        try:
            with safe_open(path, framework="pt", device="cpu") as reader:
                for name, old in stored.items():
                    if component.tensors[old].file != path:
                        continue
                    # A copy: tensors that map the file would change, or crash, with it.
                    tensor = reader.get_tensor(old).to(dtype, copy=True)
                    if not torch.isfinite(tensor).all():
                        raise GfpruneError(
                            f"tensor {quoted(old)} in {path} is not finite in {dtype}: "
                            "the checkpoint is damaged, or needs a wider type"
                        )
                    result[name] = tensor
        except (SafetensorError, OSError) as error:
            raise GfpruneError(f"{path} cannot be read: {error}") from None
    return result


def sha256_of_weights(component: Component) -> dict[str, str]:
    """SHA-256 of each weight file, by file name."""
    return {path.name: _sha256(path) for path in component.weights}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
