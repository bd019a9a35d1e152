"""A checkpoint's pipeline around the network in memory, for the sake of its conditioning.

Only classes of diffusers and transformers are made, from local safetensors and JSON files; no remote code.
Autoencoders come without weights where the pipeline takes no images: it reads their configuration alone.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.files import first_line, quoted, read_config
from gfprune_cli.checkpoint.layout import OPTIONAL, is_autoencoder, weights_variant
from gfprune_cli.checkpoint.reader import inspect as inspect_component
from gfprune_cli.checkpoint.reader import load_model
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.errors import GfpruneError
from gfprune_cli.inputs.component_files import check_folder, check_size
from gfprune_cli.inputs.pictures import takes_pictures
from gfprune_cli.outputs.tensor_files import cannot_map

NONE: Mapping[str, nn.Module] = {}
LEFT_OUT = OPTIONAL  # they judge images, or read them
JUDGES = ("safety_checker",)
DECODERS = ("Autoencoder", "AsymmetricAutoencoder", "VQModel", "PaellaVQModel", "ConsistencyDecoder")
PRIOR = "Prior"  # what it draws of a text is the condition of the next network
CHANGES_IMAGES = re.compile(r"Img2Img|Inpaint")
EDITS_INVERTED = re.compile(r"^LEditsPPPipeline(.+)")  # and wants a picture inverted beforehand


def is_decoder(class_name: str) -> bool:
    """Whether a pipeline makes its images of latents with a component of that class."""
    return class_name.removeprefix("Pruned").startswith(DECODERS)


@contextmanager
def quiet() -> Iterator[None]:
    """What diffusers and transformers say of themselves is not for the user, nor are their bars."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = [(library, library.get_verbosity()) for library in (of_diffusers, of_transformers)]
    bars = of_transformers.is_progress_bar_enabled()
    of_transformers.disable_progress_bar()
    for library, _ in levels:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        if bars:
            of_transformers.enable_progress_bar()


def open_pipeline(
    component: Component,
    network: nn.Module,
    scheduler: Any,
    *,
    decode: bool = False,
    beside: Mapping[str, nn.Module] = NONE,
) -> Any:
    """The pipeline that `component` belongs to, with `network` in its place.

    Args:
        component: of the folder; its `pipeline` is the parsed model_index.json.
        network: of any device; the pipeline's other components go to the same one.
        scheduler: the pipeline gets a copy.
        decode: whether other networks than `network` need their weights, autoencoders and denoisers.
        beside: other components that are there already.

    Raises:
        GfpruneError: no pipeline of diffusers, or a component of it that cannot be loaded.
    """
    with quiet():
        return _open(component, {component.name: network, **beside}, scheduler, decode=decode)


def _open(component: Component, there: Mapping[str, nn.Module], scheduler: Any, *, decode: bool) -> Any:
    from diffusers import DiffusionPipeline

    assert component.pipeline is not None
    found = pipeline_class(component)
    device = next(there[component.name].parameters()).device
    accepted = inspect.signature(found.__init__).parameters
    pictures = takes_pictures(found)
    left_out = JUDGES if pictures else LEFT_OUT
    made: dict[str, Any] = {
        name: value
        for name, value in component.pipeline.items()
        if name in accepted and (isinstance(value, bool | int | float | str) or is_numbers(value))
    }
    entries = component.entries
    for name in component.pipeline:
        if name not in accepted or name in made:
            continue
        if name in there:
            made[name] = there[name]
        elif name == component.scheduler_name:
            made[name] = copy.deepcopy(scheduler)
        elif name not in entries or name in left_out:
            made[name] = None
        else:
            weighted = decode or (pictures and is_decoder(entries[name][1])) or PRIOR in entries[name][1]
            made[name] = load_component(component, name, device, weights=weighted)
    for name in LEFT_OUT:
        if name in accepted:
            made.setdefault(name, None)
    if "cosmos" in found.__module__:  # without a judge they ask for a package that fetches one
        made["safety_checker"] = NoJudge()
    if "requires_safety_checker" in accepted:
        made["requires_safety_checker"] = False
    try:
        pipeline = _on_device(found, device)(**made)
    except GfpruneError:  # a signal may arrive in there
        raise
    except Exception as error:
        raise GfpruneError(
            f"{component.root}: its {found.__name__} cannot be made: {first_line(error)}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for part in vars(pipeline).values():  # combined pipelines hold others
        if isinstance(part, DiffusionPipeline):
            part.__class__ = _on_device(type(part), device)
            part.set_progress_bar_config(disable=True)
    return pipeline


def is_numbers(value: object) -> bool:
    """Whether a setting is a list of whole numbers, such as the layers of a text model that are read."""
    return isinstance(value, list) and bool(value) and all(type(entry) is int for entry in value)


class NoJudge(nn.Module):
    """In the place of a safety checker: what is recorded is shown to nobody."""

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def pipeline_class(component: Component) -> Any:
    """The diffusers class that model_index.json names.

    Where that one changes images and its network is one that draws from noise alone, the class that does.

    Raises:
        GfpruneError: it is no pipeline of diffusers.
    """
    name = (component.pipeline or {}).get("_class_name")
    found = _pipeline_named(name) if isinstance(name, str) else None
    if found is None:
        raise GfpruneError(
            f"{component.root / 'model_index.json'} names {quoted(name)}, which is no pipeline of diffusers"
        )
    from_noise = EDITS_INVERTED.sub(r"\1Pipeline", CHANGES_IMAGES.sub("", found.__name__))
    channels = component.config.get("in_channels")
    whole = (component.config.get("out_channels") or channels) == channels  # no mask or image comes along
    if from_noise == found.__name__ or not whole or is_autoencoder(component.class_name):
        return found
    plain = _pipeline_named(from_noise)
    if plain is None:
        return found
    known = inspect.signature(plain.__init__).parameters  # of the SDXL refiner not all
    asked = {key for key, value in (component.pipeline or {}).items() if value is True}
    needed = {key for key, parameter in known.items() if parameter.default is parameter.empty} - {"self"}
    return plain if asked <= known.keys() and needed <= (component.pipeline or {}).keys() else found


def _pipeline_named(name: str) -> Any:
    """A pipeline of diffusers; None for anything else."""
    import diffusers

    with quiet():  # importing a pipeline imports what it may use of transformers
        found = getattr(diffusers, name, None) if "Pipeline" in name else None
    known = (
        isinstance(found, type)
        and found.__module__.startswith("diffusers.pipelines.")
        and issubclass(found, diffusers.DiffusionPipeline)
    )
    return found if known else None


def _on_device(found: type, device: torch.device) -> Any:
    """A subclass that says where it runs: autoencoders without weights would say "meta"."""
    where = property(lambda self: device)
    return type(found.__name__, (found,), {"device": where, "_execution_device": where})


@quiet()
def load_component(component: Component, name: str, device: torch.device, *, weights: bool = True) -> Any:
    """Another component of the pipeline.

    Args:
        weights: False for an autoencoder or denoiser on the meta device, as its configuration has it; what
            is something else comes with its weights.

    Raises:
        GfpruneError: it cannot be loaded.
    """
    library, class_name = component.entries[name]
    folder = component.root / name
    if class_name.startswith("Pruned"):
        if weights or not _only_described(class_name):
            own = inspect_component(local_source(component.root), component=name)
            return _usable(load_model(own), device)
        library, class_name = "diffusers", class_name.removeprefix("Pruned")
    found: Any = _component_class(library, class_name)
    if found is None:
        raise GfpruneError(
            f"{component.root / 'model_index.json'}: its {name} is {quoted(class_name)} of"
            f" {quoted(library)}, which is no class of diffusers or transformers"
        )
    textual = found.__module__.startswith("transformers.")
    if not folder.is_dir():
        raise GfpruneError(f"{folder} is missing, and the pipeline needs it: fetch the checkpoint again")
    check_folder(folder, component.roots)
    try:
        if not issubclass(found, nn.Module):
            remote = {"trust_remote_code": False} if textual else {}
            return found.from_pretrained(folder, local_files_only=True, **remote)
        if not textual and not weights and _only_described(class_name):
            config = read_config(folder / "config.json", component.roots)
            with torch.device("meta"):
                return found.from_config(config).eval()
        if textual:
            check_size(found, folder)
        else:
            read_config(folder / "config.json", component.roots)
        loaded, names = found.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **stored_form(folder, textual=textual),
        )
        if names["missing_keys"]:  # they would be random
            raise GfpruneError(
                f"{folder} has no tensor {quoted(min(names['missing_keys']))}, but its config.json needs it"
            )
    except GfpruneError:
        raise
    except Exception as error:
        remedy = "; copy the checkpoint to a disk that can map files into memory" * cannot_map(error)
        raise GfpruneError(
            f"{folder}: the pipeline's {name} ({class_name}) cannot be loaded: {first_line(error)}{remedy}"
        ) from error
    return _usable(loaded, device)


def local_source(root: Path) -> Source:
    return Source(str(root), root, "local", None)


def _only_described(class_name: str) -> bool:
    """Networks that no conditioning comes from: autoencoders, and other denoisers than the one in memory."""
    return is_decoder(class_name) or "Transformer" in class_name or "UNet" in class_name


def _component_class(library: str, class_name: str) -> Any:
    """A class of diffusers or transformers by the names in a model_index.json; None for anything else.

    Networks, schedulers and what prepares their inputs: other classes (pipelines, retrievers, `Auto...`) have
    loaders that choose further classes, or read pickles.
    """
    import diffusers
    import transformers

    kinds: tuple[type, ...] = (
        *(diffusers.ModelMixin, diffusers.SchedulerMixin, transformers.PreTrainedModel),
        *(transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin),
        *(transformers.FeatureExtractionMixin, transformers.ImageProcessingMixin),
        diffusers.guiders.BaseGuidance,
    )

    if library == "transformers":
        found = getattr(transformers, class_name, None)
    elif library == "diffusers":
        found = getattr(diffusers, class_name, None)
    else:  # what belongs to one pipeline alone is named by that pipeline's folder
        old = getattr(diffusers.pipelines.deprecated, library, None)
        found = getattr(getattr(diffusers.pipelines, library, old), class_name, None)
    if not isinstance(found, type) or not found.__module__.startswith(("diffusers.", "transformers.")):
        return None
    missing = type(found).__name__ == "DummyObject"  # says which package it needs when it is loaded
    return found if missing or issubclass(found, kinds) else None


def stored_form(folder: Path, *, textual: bool) -> dict[str, Any]:
    """Read weights as they are stored: their type, and a variant where there are no plain files."""
    options: dict[str, Any] = {"dtype": "auto"} if textual else {}
    parsed = [weights_variant(path.name) for path in folder.iterdir()]
    variants = sorted({found[1] or "" for found in parsed if found})
    if variants and variants[0]:
        options["variant"] = variants[0]
    return options


def _usable(module: nn.Module, device: torch.device) -> nn.Module:
    """On the device, frozen; half precision of CPUs is bfloat16 or nothing."""
    dtype = next(iter(module.parameters()), torch.empty(0)).dtype
    if device.type == "cpu" and dtype == torch.float16:
        nn.Module.to(module, torch.float32)
    return nn.Module.to(module, device).requires_grad_(False).eval()
