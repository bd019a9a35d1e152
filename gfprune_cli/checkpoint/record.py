"""The record that travels in a checkpoint, `gfprune.json`: what it was pruned from, and what was kept."""

import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Lt

from gfprune_cli.checkpoint.files import quoted, read_json, trusted_roots
from gfprune_cli.errors import GfpruneError

RECORD = "gfprune.json"
RECORD_BYTES = 64 << 20
OTHERS = "others"  # records of further components, by name
SCHEMA_VERSION = 1
TOOLS = ("gfprune", "torch", "diffusers", "safetensors", "torch-pruning")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Origin:
    """The dense checkpoint: how it was named, its Hub commit, and the SHA-256 of its weight files."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore"}

    label: str
    kind: Literal["demo", "local", "hub"]
    commit: str | None
    weights: dict[str, str]


@dataclass(frozen=True)
class Record:
    """What later commands read of a record.

    Args:
        document: the whole file.
        source: what the checkpoint was pruned from.
        kept: channel group -> channels of the dense model that are left, ascending; none of a block that
            is gone, [0] of one that is not.
        component: name in the pipeline.
        steps: that its weights have been trained since removal.
    """

    document: dict[str, Any]
    source: Origin
    kept: dict[str, list[int]]
    component: str
    steps: int = 0

    @property
    def variant(self) -> str | None:
        """Which weights of the dense model were pruned."""
        settings = self.document.get("recipe")
        variant = settings.get("variant") if isinstance(settings, dict) else None
        return variant if isinstance(variant, str) else None

    @property
    def config_from(self) -> str | None:
        """Whose configuration a dense model in one file was read with."""
        settings = self.document.get("recipe")
        found = settings.get("config_from") if isinstance(settings, dict) else None
        return found if isinstance(found, str) else None

    def dense_label(self) -> str:
        """Where the dense model is. A folder that is gone is never looked for on the Hub.

        Raises:
            GfpruneError: it is not there.
        """
        label = self.source.label
        # os.path and not pathlib: a name too long, or of no user, is answered, not raised
        if self.source.kind == "local" and not os.path.exists(os.path.expanduser(label)):
            raise GfpruneError(
                f"the dense model this checkpoint was pruned from, {quoted(label)}, is not there: "
                "name it with --teacher"
            )
        return "demo" if self.source.kind == "demo" else label


@dataclass(frozen=True)
class _Recipe:
    """The settings that a model card names."""

    criterion: str
    layout: str
    recover: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True)
class _Sparsity:
    achieved: float
    of: str


@dataclass(frozen=True)
class _Change:
    before: int
    after: int


@dataclass(frozen=True)
class _Loss:
    before: float
    removed: float


@dataclass(frozen=True)
class _Steps:
    steps: Annotated[int, Ge(0)]


@dataclass(frozen=True)
class _Recovery:
    before: float
    after: float
    teacher: float


@dataclass(frozen=True)
class _Finetuned:
    recipe: _Steps
    loss: _Recovery


@dataclass(frozen=True)
class _Folded:
    """What a model card says of factored layers."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore"}

    tolerance: float
    layers: list[dict[str, Any]]
    params: _Change
    layer_error: float
    output_error: float


@dataclass(frozen=True)
class _Predicted:
    speedup: float
    ms: float


@dataclass(frozen=True)
class _Measured:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore"}

    speedup: float
    low: float
    high: float
    ms: float
    ms_dense: float
    steady: bool


@dataclass(frozen=True)
class _Time:
    """What a model card says of speed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore"}

    runtime: str
    device: str
    precision: str
    batch: int
    asked: dict[str, float]
    predicted: _Predicted
    measured: _Measured | None


@dataclass(frozen=True)
class _Document:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore"}

    source: Origin
    kept: dict[str, list[Annotated[int, Ge(0), Lt(1 << 24)]]]
    component: str
    class_name: str
    recipe: _Recipe
    sparsity: _Sparsity
    params: _Change
    macs: _Change
    bytes: _Change
    loss: _Loss
    fold: _Folded | None = None
    time: _Time | None = None
    finetune: list[_Finetuned] = field(default_factory=list)


def joined(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One document of the records of several components of a pipeline."""
    first, *others = records
    return {**first, OTHERS: {record["component"]: record for record in others}} if others else first


def about(document: dict[str, Any], component: str | None) -> dict[str, Any]:
    """The same document as the record of another of its components, if it has one of that."""
    others = document.get(OTHERS)
    if not isinstance(others, dict) or not isinstance(others.get(component), dict):
        return document
    first = {key: value for key, value in document.items() if key != OTHERS}
    return joined([others[component], first, *(other for name, other in others.items() if name != component)])


def records_of(root: Path) -> dict[str, dict[str, Any]]:
    """Component -> what a checkpoint folder has on record of it; nothing if it was never pruned."""
    path = root / RECORD
    if not path.exists():
        return {}
    document = read_json(path, trusted_roots(root), limit=RECORD_BYTES)
    others = document.pop(OTHERS, {})
    found = [document, *(others.values() if isinstance(others, dict) else ())]
    return {str(one.get("component")): one for one in found if isinstance(one, dict) and "kept" in one}


def read_record(root: Path, component: str | None = None) -> Record | None:
    """The record of a checkpoint folder; None if it was never pruned.

    Args:
        component: which is meant, where several were pruned.

    Raises:
        GfpruneError: it is there and damaged.
    """
    from pydantic import TypeAdapter, ValidationError

    path = root / RECORD
    if not path.exists():
        return None
    document = about(read_json(path, trusted_roots(root), limit=RECORD_BYTES), component)
    if document.get("command") == "export" and "recipe" not in document:
        return None  # of a dense model: nothing was pruned
    try:
        known = TypeAdapter(_Document).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        raise GfpruneError(
            f"{path} is damaged: {where}: {first['msg']}; prune again, or restore it"
        ) from None
    for group, channels in known.kept.items():
        if any(a >= b for a, b in itertools.pairwise(channels)):
            raise GfpruneError(f"{path} is damaged: the channels of {group[:80]!r} do not ascend; restore it")
    for name, digest in known.source.weights.items():
        if not _DIGEST.fullmatch(digest):
            raise GfpruneError(f"{path} is damaged: the hash of {name[:80]!r} is no SHA-256; restore it")
    steps = known.recipe.recover + sum(run.recipe.steps for run in known.finetune)
    return Record(document, known.source, known.kept, known.component, steps)


def finished_record(destination: Path, digest: str, component: str) -> dict[str, Any] | None:
    """The record of an output, if the run with that digest wrote it: the last one in its record.

    Raises:
        GfpruneError: the record cannot be read.
    """
    document = read_json(destination / RECORD, trusted_roots(destination), limit=RECORD_BYTES)
    record = about(document, component)
    runs = [entry for entry in record.get("finetune") or [] if isinstance(entry, dict)]
    last = runs[-1] if runs else record
    return record if last.get("run") == digest else None


def as_json(value: Any) -> Any:
    """A configuration as JSON keeps it: tuples as lists, and what is no JSON as text (-Infinity, too)."""
    return json.loads(json.dumps(value, default=str), parse_constant=str)


def installed_tools() -> dict[str, str | None]:
    """Versions of what decides the bytes of an output."""
    return {tool: installed_version(tool) for tool in TOOLS}


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
