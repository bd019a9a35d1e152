"""A checkpoint folder -> a model in memory.

`inspect` reads JSON and safetensors headers only, so it is safe on a file from anywhere and costs no memory;
`load_model` reads the weights, after every tensor's name and shape was checked against the class.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from torch.utils._pytree import tree_leaves

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.files import first_line, quoted, read_config, trusted_roots
from gfprune_cli.checkpoint.layout import PRUNED, NoWeights, is_known, locate, stock_name
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import pruned_class
from gfprune_cli.checkpoint.safetensors_header import FLOAT_TYPES
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.checkpoint.tensor_names import stored_names, tied
from gfprune_cli.checkpoint.weights import read_weights
from gfprune_cli.errors import GfpruneError
from gfprune_cli.outputs.digests import sha256_of
from gfprune_cli.outputs.tensor_files import opened
from gfprune_cli.runtime.half import as_half, is_half

BUFFER_BYTES = 4 << 30  # position tables that a config may ask for beside its weights
BEFORE_QUANTIZATION = (
    "gfprune prunes floating-point weights, so start from the checkpoint before it was quantized"
)


def inspect(
    source: Source, *, component: str | None = None, variant: str | None = None, weights_required: bool = True
) -> Component:
    """Describe the denoiser of a checkpoint from its JSON files and safetensors headers.

    Args:
        source: from `source.resolve`.
        component: the denoiser's name in the pipeline; None takes "unet", "transformer", or the only one.
        variant: which weights ("fp16"); None for the plain files.
        weights_required: False also accepts a checkpoint without readable weights; headers are read if they
            are there.

    Raises:
        GfpruneError: something is missing, malformed, too large, or leads out of the folder.
        UsageError: the component or variant does not exist.
    """
    place = locate(source.folder, component)
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
    return Component(**vars(place), config=config, weights=weights, tensors=tensors)


def build_meta(component: Component) -> nn.Module:
    """The component's class, instantiated from its config on the meta device: shapes and no memory.

    Raises:
        GfpruneError: the config does not describe a network of that class.
    """
    return _build(component, torch.device("meta"))


@contextmanager
def empty_weights(dtype: torch.dtype) -> Iterator[None]:
    """Build networks without memory for their weights, but with the tables that are computed, never saved.

    Args:
        dtype: the default type meanwhile, as when diffusers loads a model in that type.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            yield
    finally:
        torch.set_default_dtype(before)


def _build(component: Component, context: AbstractContextManager[Any]) -> nn.Module:
    built = model_class(component.class_name)
    # Initial values are overwritten, so drawing them must not move the caller's random state.
    with torch.random.fork_rng(devices=[]), context:
        try:
            model: nn.Module = built.from_config(copy.deepcopy(component.config))
        except GfpruneError:
            raise
        except Exception as error:  # a hostile or broken config can fail anywhere in the constructor
            raise GfpruneError(
                f"{component.folder / 'config.json'} does not describe a valid {component.class_name}: "
                f"{first_line(error)}"
            ) from error
    return model.eval()


def model_class(class_name: str) -> Any:
    """The class of diffusers, or its pruned form, that a checkpoint names. Nothing else is ever instantiated.

    Raises:
        GfpruneError: it is none that gfprune loads.
    """
    if not is_known(class_name):
        raise GfpruneError(f"{quoted(class_name)} is not a class that gfprune loads")
    try:
        pruned = pruned_class(stock_name(class_name))
    except AttributeError:
        raise GfpruneError(
            f"{quoted(stock_name(class_name))} is no model of diffusers {diffusers.__version__}: "
            "is the installed version older than the checkpoint?"
        ) from None
    return pruned if class_name.startswith(PRUNED) else pruned.stock_class


def check_weights(component: Component, model: nn.Module) -> None:
    """Compare the headers of the weight files with the class, as `load_model` does before it reads any.

    Where there are no files, as for a Hub model of which only the configuration was fetched, there is nothing
    to compare.

    Args:
        model: from `build_meta`.

    Raises:
        GfpruneError: a tensor is missing, unknown, of the wrong shape or not floating point; or the files
            lie where safetensors cannot read them.
    """
    for path in component.weights:
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError as error:
            raise GfpruneError(
                f"{str(path)!a}: safetensors reads paths of UTF-8 text only: rename the folder"
            ) from error
    if component.weights:
        stored = stored_names(model, component.tensors, component.weights)
        _check_tensors(model, component, stored)
        size = sum(buffer.nbytes for buffer in _unsaved(model, stored))
        if size > BUFFER_BYTES:
            raise GfpruneError(
                f"{component.folder / 'config.json'} asks for {size:,} bytes of tables beside the weights: "
                "it is damaged, or belongs to no real network"
            )


def _unsaved(model: nn.Module, stored: dict[str, str]) -> list[torch.Tensor]:
    """Tables that are computed and not read."""
    return [buffer for name, buffer in model.named_buffers() if name not in stored]


def _has_tables(model: nn.Module) -> bool:
    """Whether modules keep tensors that are neither parameters nor buffers, such as rotary angles."""
    attributes = (item for module in model.modules() for item in vars(module).items())
    plain = [value for name, value in attributes if name not in ("_parameters", "_buffers", "_modules")]
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(plain))


def load_model(component: Component, *, dtype: torch.dtype | None = None, in_half: bool = False) -> nn.Module:
    """Load the denoiser's weights, one tensor at a time.

    Args:
        component: from `inspect`.
        dtype: the type to cast to; None means float32. Layers that diffusers keeps in float32 get no less.
        in_half: matrices that are stored in half precision stay so in memory, and are read as float32.

    Returns:
        The model on the CPU, in `eval()` mode, sharing no memory with the files.

    Raises:
        GfpruneError: a tensor is missing, unknown, of the wrong shape, not floating point, or not finite.
    """
    dtype = dtype or torch.float32
    if not component.weights:
        raise GfpruneError(f"{component.folder} has no weights that gfprune can read")
    model = build_meta(component)
    check_weights(component, model)
    stored = stored_names(model, component.tensors, component.weights)
    if _unsaved(model, stored) or _has_tables(model):
        model = _build(component, empty_weights(dtype))
    model.load_state_dict(_read_tensors(model, component, stored, dtype, in_half=in_half), assign=True)
    return model


def load_empty(component: Component, *, dtype: torch.dtype | None = None) -> nn.Module:
    """What `load_model` returns, its weights left on the meta device: tables that are computed are there."""
    dtype = dtype or torch.float32
    return cast_model(_build(component, empty_weights(dtype)), dtype)


def wanted_type(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of one floating-point tensor of a network of type `dtype`, as diffusers loads it."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    kept = [kept] if isinstance(kept, str) else kept
    return torch.promote_types(dtype, torch.float32) if set(kept) & set(name.split(".")) else dtype


def cast_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast what is saved of a network in place, as if it had been loaded in that type.

    Not diffusers' own `to`, which casts the layers that have to stay in float32, and tables too.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(wanted_type(model, name, dtype))
    return model


def _check_tensors(model: nn.Module, component: Component, stored: dict[str, str]) -> None:
    config = component.folder / "config.json"
    attached = next((name for name in stored if ".base_layer." in name or ".lora_A." in name), None)
    if attached is not None:
        raise GfpruneError(
            f"{_files(component)} was saved with a PEFT adapter attached ({quoted(attached)}): fuse it "
            "(pipeline.fuse_lora(), then pipeline.unload_lora_weights()) or delete it, and save again"
        )
    expected = model.state_dict()
    settings = component.config.get("quantization_config")
    if isinstance(settings, dict) and not component.is_pruned:  # where it tells diffusers what class to load
        method = quoted(settings.get("quant_method"))
        raise GfpruneError(f"{config} says that the weights are quantized ({method}): {BEFORE_QUANTIZATION}")
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
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
        if tensor.is_floating_point() and info.dtype not in FLOAT_TYPES:
            raise GfpruneError(
                f"tensor {quoted(stored[name])} in {info.file} is {info.dtype}: {BEFORE_QUANTIZATION}"
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
    model: nn.Module, component: Component, stored: dict[str, str], dtype: torch.dtype, *, in_half: bool
) -> dict[str, torch.Tensor]:
    """Model's tensor name -> a finite tensor of its type, file by file. Tied names share one parameter."""
    expected = model.state_dict(keep_vars=True)
    doubles = {name: same[0] for same in tied(model) for name in same[1:]}
    result: dict[str, torch.Tensor] = {}
    for path in component.weights:
        try:
            with opened(path) as read:
                for name, old in stored.items():
                    if component.tensors[old].file == path and name not in doubles:
                        tensor, target = read(old), expected[name].dtype
                        if target.is_floating_point:
                            target = wanted_type(model, name, dtype)
                        where = f"{quoted(old)} in {path}"
                        if in_half and is_half(expected[name], tensor):
                            result[name] = as_half(_finite(tensor, tensor.dtype, where))
                        else:
                            result[name] = _finite(tensor, target, where)
        # RuntimeError is PyTorch's own when a file cannot be mapped
        except (SafetensorError, OSError, RuntimeError) as error:
            raise GfpruneError(f"{path} cannot be read: {first_line(error)}") from None
    for name, first in doubles.items():
        if isinstance(expected[first], nn.Parameter) and not isinstance(result[first], nn.Parameter):
            result[first] = nn.Parameter(result[first])
        result[name] = result[first]
    return result


def _finite(tensor: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    """A copy in the wanted type: tensors that map the file would change, or crash, with it."""
    tensor = tensor.to(dtype, copy=True)
    # least and most in one pass; NaN is either
    if dtype.is_floating_point and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise GfpruneError(
            f"tensor {where} is not finite in {dtype}: the checkpoint is damaged, or needs a wider type"
        )
    return tensor


def sha256_of_weights(component: Component) -> dict[str, str]:
    """SHA-256 of each weight file, by file name.

    Raises:
        GfpruneError: a file cannot be read.
    """
    return {path.name: sha256_of(path) for path in component.weights}
