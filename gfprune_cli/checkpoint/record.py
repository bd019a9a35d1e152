"""The record that travels in a checkpoint, `gfprune.json`: what it was pruned from, and what was kept."""

import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Lt
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from gfprune_cli.checkpoint.files import quoted, read_json, trusted_roots
from gfprune_cli.checkpoint.source import Source, resolve
from gfprune_cli.errors import GfpruneError
from gfprune_cli.progress import Progress

RECORD = "gfprune.json"
RECORD_BYTES = 64 << 20
OTHERS = "others"  # records of further components, by name
SCHEMA_VERSION = 1
TOOLS = ("gfprune", "torch", "diffusers", "safetensors", "torch-pruning")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Origin:
    """The dense checkpoint: how it was named, its Hub commit, and the SHA-256 of its weight files."""

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
        found = self.document["recipe"].get("variant")
        return found if isinstance(found, str) else None

    @property
    def config_from(self) -> str | None:
        """Whose configuration a dense model in one file was read with."""
        found = self.document["recipe"].get("config_from")
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

    def dense_source(self, *, offline: bool, progress: Progress) -> Source:
        """The dense model, at the commit that was pruned.

        Raises:
            GfpruneError: it is not there, or cannot be read.
        """
        return resolve(
            self.dense_label(),
            revision=self.source.commit,
            variant=self.variant,
            config_from=self.config_from,
            offline=offline,
            progress=progress,
        )


# What a model card says of a record, or a later command reads; it holds more.
class _Change(TypedDict):
    before: int
    after: int


class _Steps(TypedDict):
    steps: Annotated[int, Ge(0)]


class _Losses(TypedDict):
    before: float
    after: float
    teacher: float


class _Finetuned(TypedDict):
    recipe: _Steps
    loss: _Losses


class _Sparsity(TypedDict):
    achieved: float
    of: str


class _Loss(TypedDict):
    before: float
    removed: float


class _Predicted(TypedDict):
    speedup: float
    ms: float


class _Recipe(TypedDict):
    criterion: str
    layout: str
    recover: NotRequired[Annotated[int, Ge(0)]]


class _Folded(TypedDict):
    tolerance: float
    layers: list[dict[str, Any]]
    params: _Change
    layer_error: float
    output_error: float


class _Measured(TypedDict):
    speedup: float
    low: float
    high: float
    ms: float
    ms_dense: float
    steady: bool


class _Time(TypedDict):
    runtime: str
    device: str
    precision: str
    batch: int
    asked: dict[str, float]
    predicted: _Predicted
    measured: _Measured | None


class _Document(TypedDict):
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
    fold: NotRequired[_Folded | None]
    time: NotRequired[_Time | None]
    finetune: NotRequired[list[_Finetuned]]


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


def read_document(root: Path) -> dict[str, Any] | None:
    """What the record of a folder holds, unchecked; None where there is none."""
    path = root / RECORD
    return read_json(path, trusted_roots(root), limit=RECORD_BYTES) if path.exists() else None


def records_of(root: Path) -> dict[str, dict[str, Any]]:
    """Component -> what a checkpoint folder has on record of it; nothing if it was never pruned."""
    document = read_document(root) or {}
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
    path, document = root / RECORD, read_document(root)
    if document is None:
        return None
    document = about(document, component)
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
    for group, channels in known["kept"].items():
        if any(a >= b for a, b in itertools.pairwise(channels)):
            raise GfpruneError(f"{path} is damaged: the channels of {group[:80]!r} do not ascend; restore it")
    for name, digest in known["source"].weights.items():
        if not _DIGEST.fullmatch(digest):
            raise GfpruneError(f"{path} is damaged: the hash of {name[:80]!r} is no SHA-256; restore it")
    steps = known["recipe"].get("recover", 0) + sum(
        run["recipe"]["steps"] for run in known.get("finetune", [])
    )
    return Record(document, known["source"], known["kept"], known["component"], steps)


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
