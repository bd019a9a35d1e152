"""Conditions of networks that a pipeline conditions: text-to-image, class labels, video, audio."""

import gc
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.files import sha256_of_files
from gfprune_cli.diffusion.conditions import Conditions
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.inputs.pictures import Pictures, takes_pictures
from gfprune_cli.inputs.pipeline import open_pipeline, pipeline_class
from gfprune_cli.inputs.pipeline_run import PipelineOptions
from gfprune_cli.inputs.prompts import read_prompts
from gfprune_cli.inputs.receiver import adding, load_receiver, received
from gfprune_cli.inputs.recording import Recording, record
from gfprune_cli.outputs.cache import Tensors, cached
from gfprune_cli.outputs.digests import fingerprint
from gfprune_cli.progress import Progress

FIELDS = (
    "sample", "timestep", "branches", "guidance", "time_factor", "time_offset", "sign", "rows", "axis",
    "lists", "twins", "time_floats",
)  # fmt: skip
CLASS_COUNTS = ("num_embeds_ada_norm", "num_class_embeds")


PICTURES = 16  # that a pipeline without prompts is given, at most
POOL = 1024  # prompts that images without captions are paired with, at most


@dataclass(frozen=True)
class Asked:
    """What the pipeline is asked for: distinct prompts or class labels, and which one by sample."""

    distinct: list[Any]
    rows: list[int]

    @classmethod
    def each(cls, wanted: Sequence[Any]) -> "Asked":
        """One prompt or label for each sample."""
        distinct = list(dict.fromkeys(wanted))
        numbers = {one: number for number, one in enumerate(distinct)}
        return cls(distinct, [numbers[one] for one in wanted])

    def each_of(self, rows: Sequence[int]) -> tuple[Any, ...]:
        """The prompts or labels of samples with these rows; none without a pipeline to ask."""
        return tuple(self.distinct[row] for row in rows) if self.distinct else ()

    def firsts(self) -> tuple[int, ...]:
        """The first sample of each."""
        found: dict[int, int] = {}
        for sample, row in enumerate(self.rows):
            found.setdefault(row, sample)
        return tuple(found[row] for row in range(len(self.distinct)))

    def at_random(self, count: int, seed: int) -> list[int]:
        """Rows for `count` samples that come from elsewhere."""
        chosen = torch.randint(len(self.rows), (count,), generator=generator(seed, "captions"))
        return [self.rows[number] for number in chosen.tolist()]


def asked_of(
    component: Component,
    config: Any,
    options: PipelineOptions,
    count: int,
    seed: int,
    *,
    shuffled: bool = False,
) -> Asked:
    """Prompts for `count` samples in turn; or class labels, uniform.

    Args:
        shuffled: the samples come from elsewhere: a pool for `Asked.at_random`, however many there are.

    Raises:
        UsageError: prompts for a pipeline that takes none.
    """
    if shuffled:
        count = min(count, POOL)
    parameters = inspect.signature(pipeline_class(component).__call__).parameters
    if "prompt" in parameters:
        prompts = read_prompts(options.prompts)
        distinct = prompts[:count]
        return Asked(distinct, [number % len(distinct) for number in range(count)])
    if options.prompts is not None:
        raise UsageError(f"--prompts: {pipeline_class(component).__name__} takes no text; drop the flag")
    if "class_labels" not in parameters:
        pictures = min(count, PICTURES) if takes_pictures(pipeline_class(component)) else 1
        return Asked([None] * pictures, [number % pictures for number in range(count)])
    classes = class_count(component, config)
    labels = torch.randint(classes, (count,), generator=generator(seed, "labels")).tolist()
    distinct = sorted(set(labels))
    return Asked(distinct, [distinct.index(label) for label in labels])


def annotated_by(component: Component) -> Literal["captions", "classes"] | None:
    """What the pipeline around a network wants to know of each image."""
    if component.pipeline is None:
        return None
    parameters = inspect.signature(pipeline_class(component).__call__).parameters
    return "captions" if "prompt" in parameters else "classes" if "class_labels" in parameters else None


def class_count(component: Component, config: Any) -> int:
    """Classes of a network that is given labels.

    Raises:
        GfpruneError: its configuration does not say.
    """
    classes = next((config[name] for name in CLASS_COUNTS if config.get(name)), None)
    if classes is None:
        raise GfpruneError(f"{component.folder}/config.json does not say how many classes there are")
    return int(classes)


def labels_of_pipeline(component: Component) -> dict[str, int]:
    """Name of a class -> its label, where `model_index.json` says (as DiT's does: synonyms with commas)."""
    names = (component.pipeline or {}).get("id2label")
    if not isinstance(names, Mapping):
        return {}
    return {
        name.strip(): int(label)
        for label, text in names.items()
        if str(label).isdecimal()
        for name in str(text).split(",")
    }


def in_words(component: Component, asked: Sequence[Any]) -> tuple[str, ...]:
    """Prompts as they are, class labels by the names that the pipeline has for them."""
    names = {label: name for name, label in reversed(labels_of_pipeline(component).items())}
    return tuple(
        f"class {one}" + (f" ({names[one]})" if one in names else "") if isinstance(one, int) else one
        for one in asked
        if one is not None
    )


def recorded(
    model: nn.Module,
    component: Component,
    scheduler: Any,
    asked: Asked,
    options: PipelineOptions,
    progress: Progress,
    pictures: Pictures | None = None,
) -> Recording:
    """What the pipeline passes to `model`: from the cache, or from the pipeline, which is then let go.

    Args:
        pictures: for pipelines that take some; None to draw them.
    """
    device = next(model.parameters()).device
    denoiser = load_receiver(component, device)
    key = recording_key(model, component, scheduler, asked, options)
    if pictures is not None:
        key["pictures"] = f"{pictures.fingerprint} {pictures.order}"

    def make() -> tuple[Tensors, Any]:
        seen, added, beside = model, None, {}
        if denoiser is not None:
            seen, added, beside = denoiser.network, adding(model), {denoiser.name: denoiser.network}
        pipeline = open_pipeline(component, model, scheduler, beside=beside)
        name = component.scheduler_name
        made = record(pipeline, seen, asked.distinct, options, progress, pictures, name, added)
        del pipeline
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return as_tensors(made)

    found = as_recording(*cached(key, make, progress))
    return found if denoiser is None else received(found, model, denoiser)


def recording_key(
    model: Any, component: Component, scheduler: Any, asked: Asked, options: PipelineOptions
) -> dict[str, str]:
    """Everything that decides a recording."""
    import diffusers
    import transformers

    root = component.root
    decided = [
        path
        for name in component.entries
        if (root / name).is_dir() and name not in (component.name, "scheduler")
        for path in (root / name).iterdir()
        if path.is_file() and not (name.startswith("v") and path.suffix == ".safetensors")
    ]
    key = {
        "recording": 5,
        "pipeline": sorted((component.pipeline or {}).items()),
        "files": sha256_of_files(decided, root),
        "config": {name: value for name, value in dict(model.config).items() if not name.startswith("_")},
        "scheduler": dict(scheduler.config),
        "asked": asked.distinct,
        "options": (options.size, options.frames, options.guidance),
        "device": next(model.parameters()).device.type,
        "tools": (diffusers.__version__, transformers.__version__, torch.__version__),
    }
    return {name: repr(value) for name, value in key.items()}


def as_tensors(recording: Recording) -> tuple[Tensors, Any]:
    """A recording as named tensors and a JSON document.

    Raises:
        GfpruneError: the pipeline passes something that is neither tensor nor JSON.
    """
    conditions = recording.conditions
    tensors = {f"own/{name}": tensor for name, tensor in conditions.tensors.items()}
    shared = {}
    for name, value in conditions.shared.items():
        shared[name] = packed(value, f"shared/{name}", tensors)
    document = {
        "conditions": {name: getattr(conditions, name) for name in FIELDS},
        "shared": shared,
        "shape": recording.shape,
        "image": recording.image,
        "mu": recording.mu,
        "remarks": recording.remarks,
    }
    try:
        json.dumps(document)
    except TypeError as error:
        raise GfpruneError(f"the pipeline passes its network what gfprune cannot keep: {error}") from error
    return tensors, document


def recording_fingerprint(recording: Recording) -> str:
    """SHA-256 of what a network is given beside its samples, and of what takes what it returns."""
    tensors, document = as_tensors(recording)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    receiver = recording.conditions.receiver
    if receiver is not None:
        other = replace(recording, conditions=receiver.conditions)
        digest.update(f"{receiver.fingerprint} {recording_fingerprint(other)}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {fingerprint(tensor)}".encode())
    return digest.hexdigest()


def packed(value: Any, name: str, tensors: Tensors) -> Any:
    """JSON of nested tuples, lists, dictionaries and tensors; the tensors go to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.clone()  # several names may share their memory, which safetensors refuses
        return {"tensor": name}
    if isinstance(value, tuple | list):
        entries = [packed(entry, f"{name}/{number}", tensors) for number, entry in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": entries}
    if isinstance(value, dict):
        return {"dict": {key: packed(entry, f"{name}/{key}", tensors) for key, entry in value.items()}}
    return {"value": value}


def unpacked(value: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `packed` was given."""
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpacked(entry, tensors) for key, entry in content.items()}
    if kind == "value":
        return content
    entries = [unpacked(entry, tensors) for entry in content]
    return tuple(entries) if kind == "tuple" else entries


def as_recording(tensors: Tensors, document: Mapping[str, Any]) -> Recording:
    """What `as_tensors` was given."""
    fields = dict(document["conditions"])
    rows = fields.pop("rows")
    fields |= {name: tuple(fields[name]) for name in ("lists", "twins")}
    own = {name.removeprefix("own/"): t for name, t in tensors.items() if name.startswith("own/")}
    shared = {name: unpacked(value, tensors) for name, value in document["shared"].items()}
    conditions = Conditions(own, shared, **fields, rows=None if rows is None else tuple(rows))
    return Recording(
        conditions,
        tuple(document["shape"]),
        tuple(document["image"]),
        document["mu"],
        tuple(document["remarks"]),
    )


def batch_size(shape: Sequence[int]) -> int:
    """Samples drawn at once: 32 small ones, 8 of [4, 64, 64], one of a large video."""
    return max(1, min(32, 2**17 // int(torch.Size(shape).numel())))
