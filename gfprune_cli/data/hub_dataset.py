"""Images of a Hugging Face dataset, streamed."""

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

from PIL import Image

from gfprune_cli.data.annotations import COLUMNS, Kind, annotation
from gfprune_cli.data.dataset_names import check_dataset, missing_offline
from gfprune_cli.data.decoding import Frames, decoding, reason_of
from gfprune_cli.data.image_source import ImageSource
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.progress import Event, Progress, notice

PEEKED = 1000  # rows without any caption or class, after which none is expected
RETRY = "try again, or download the dataset and give its images"


def open_dataset(source: str, limit: int, about: Kind | None, progress: Progress) -> ImageSource:
    """The first `limit` rows of the split train: its first image column, and what is wanted beside it.

    Raises:
        UsageError: no such dataset, or no images in it; GfpruneError: it cannot be read.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        hint = "no such folder or file; for a Hugging Face dataset, pip install gfprune[data]"
        raise UsageError(f"--data {source!r}: {hint}") from error
    check_dataset(source)
    # Builders, HTTP clients and Arrow readers raise types of their own: every Exception is translated.
    try:
        stream = datasets.load_dataset(source, split="train", streaming=True)
    except GfpruneError:  # a signal may arrive in here
        raise
    except Exception as error:
        if (absent := missing_offline(source)) is not None:
            raise absent from error
        what = "no such folder or file, and no Hugging Face dataset with a train split could be opened"
        raise GfpruneError(f"--data {source!r}: {what} ({reason_of(error)})") from error
    features = stream.features or {}
    column = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise UsageError(f"--data {source!r}: no image column in it (columns: {', '.join(features)})")
    beside = next((name for name in COLUMNS[about] if name in features), None) if about else None
    names = tuple(getattr(features.get(beside), "names", None) or ()) if about == "classes" else ()
    said = _said(source, stream.select_columns([beside]), limit, about, progress) if about and beside else ()
    if not said or about is None:
        plain = stream.select_columns([column]).take(limit)
        return ImageSource(source, lambda: _dataset_frames(_dataset_rows(source, plain), column), limit)

    def annotated(kind: Kind = about) -> Iterator[tuple[str, dict[str, Any]]]:
        found = _dataset_rows(source, stream.select_columns([column, beside]))
        return itertools.islice((row for row in found if annotation(row[1], kind)), len(said))

    if names:  # a ClassLabel, whose rows hold numbers
        said = tuple(names[int(text)] for text in said)
    return ImageSource(source, lambda: _dataset_frames(annotated(), column), len(said), said, names or None)


def _said(source: str, stream: Any, limit: int, about: Kind, progress: Progress) -> tuple[str, ...]:
    """The first `limit` captions or classes of a stream of nothing else; none if it starts with none."""
    found: list[str] = []
    without = 0
    for name, row in _dataset_rows(source, stream):
        with decoding(name, (ValueError,), "mend it"):
            text = annotation(row, about)
        found += [text] if text else []
        without += not text
        progress(Event("load", len(found), limit, f"{about} of rows"))
        if len(found) == limit or (not found and without == PEEKED):
            break
    if found and without:
        notice(progress, f"{without} rows of {source!r} have no {about} and are left out")
    return tuple(found)


def _dataset_rows(source: str, stream: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, row) of each row of a stream."""
    rows = iter(stream)
    for index in itertools.count():
        name = f"row {index} of dataset {source!r}"
        with decoding(name, (Exception,), RETRY):
            row = next(rows, None)
        if row is None:
            return
        yield name, row


def _dataset_frames(rows: Iterator[tuple[str, dict[str, Any]]], column: str) -> Frames:
    for name, row in rows:
        if not isinstance(row[column], Image.Image):
            raise GfpruneError(f"{name}: column {column!r} holds no image")
        yield name, row[column]
