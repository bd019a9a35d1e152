"""What comes with a user's images, as Hugging Face's image folders have it: captions and classes.

photos/metadata.jsonl    {"file_name": "1.png", "text": "a red fox"}, one line an image; or metadata.csv
photos/cat/1.png         is of class cat
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gfprune_cli.errors import GfpruneError, UsageError

Kind = Literal["captions", "classes"]
TABLES = ("metadata.jsonl", "metadata.csv")
COLUMNS: Mapping[Kind, tuple[str, ...]] = {
    "captions": ("text", "caption", "captions", "prompt"),
    "classes": ("label", "labels", "class"),
}
TABLE_BYTES = 1 << 30
CAPTION_CHARACTERS = 4096
SHOWN = 5  # classes that a notice names
SOURCES: Mapping[Kind, str] = {
    "captions": "no metadata.jsonl or metadata.csv with file_name and text, or column text or caption",
    "classes": "no class folders, and no column label",
}


def annotations(folder: Path, files: Sequence[Path], kind: Kind) -> dict[Path, str]:
    """Caption or class of the image files of a folder that have one.

    A table speaks of the files of its own folder and of those below. Without one the name of the folder that
    a file lies in is its class.

    Raises:
        GfpruneError: a table is damaged; names the line.
    """
    holders = {folder}
    for parent in {file.parent for file in files}:
        while parent not in holders:
            holders.add(parent)
            parent = parent.parent
    found: dict[Path, str] = {}
    for table in sorted(holder / name for holder in holders for name in TABLES):
        if table.is_file():
            found |= {
                Path(os.path.normpath(table.parent / name)): text for name, text in _entries(table, kind)
            }
    if found or kind == "captions":
        return {file: found[key] for file in files if (key := Path(os.path.normpath(file))) in found}
    return {file: file.parent.name for file in files if file.parent != folder}


def _entries(table: Path, kind: Kind) -> Iterator[tuple[str, str]]:
    """(file name, what is said of it) of the entries of a table that say something."""
    read = 0
    try:
        if table.stat().st_size > TABLE_BYTES:
            raise GfpruneError(f"{table}: larger than {TABLE_BYTES} bytes; split it, one for each folder")
        with table.open(encoding="utf-8-sig", newline="") as stream:
            lines = (line for line in stream if line.strip())
            for row in csv.DictReader(stream) if table.suffix == ".csv" else map(json.loads, lines):
                name = row.get("file_name")
                if not isinstance(name, str):
                    raise ValueError("no file_name")
                if text := annotation(row, kind):
                    yield name, text
                read += 1
    except OSError as error:
        raise GfpruneError(f"{table} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise GfpruneError(f"{table} is damaged at entry {read + 1}: {reason}; mend it") from error


def annotation(row: Mapping[str, Any], kind: Kind) -> str | None:
    """What a row says of its image; None for nothing. The first of several captions.

    Raises:
        ValueError: the column holds something else.
    """
    value = next((row[name] for name in COLUMNS[kind] if row.get(name) is not None), None)
    if isinstance(value, list) and value and kind == "captions":
        value = value[0]
    if value is None or str(value).strip() == "-1":  # as data sets say that a row has no label
        return None
    if not isinstance(value, str) and (kind == "captions" or not isinstance(value, int)):
        raise ValueError(f"{kind} that are {type(value).__name__}")
    text = str(value).strip()
    if len(text) > CAPTION_CHARACTERS:
        raise ValueError(f"a text of more than {CAPTION_CHARACTERS} characters")
    return text or None


def class_labels(
    said: Sequence[str], names: Sequence[str] | None, classes: int, known: Mapping[str, int]
) -> tuple[list[int], str]:
    """Label of each image, and a sentence on how they follow from the names of their classes.

    Names that are numbers are the labels; names that the pipeline knows have its labels; others count in
    their order. All of them decide, those of images that were left out as well: else a part of the images
    would have other labels than the whole.

    Args:
        said: class of each image.
        names: of all classes, in the source's order; None where it does not say.
        classes: of the network.
        known: name -> label, of the pipeline.

    Raises:
        UsageError: more classes than the network has, or names of several sorts.
    """
    every = sorted(set(said)) if names is None else list(names)
    numeric = [name for name in every if name.isascii() and name.isdecimal() and len(name) < 10]
    ours = [name for name in every if name in known]
    for some, what in ((numeric, "numbers"), (ours, "names that the pipeline knows")):
        if some and len(some) < len(every) and len(ours) < len(every):
            strangers = ", ".join(repr(name) for name in every if name not in some)
            raise UsageError(
                f"--data: some classes are {what}, and others are not: {strangers[:200]}; rename them"
            )
    if len(numeric) == len(every):
        numbers, how = {name: int(name) for name in every}, "by their numbers"
    elif len(ours) == len(every):
        numbers, how = {name: known[name] for name in every}, "by the pipeline's own names"
    elif names is None:
        raise UsageError(
            "--data: classes of a dataset have to be numbers, ClassLabel, or names of the pipeline's"
        )
    else:
        numbers, how = {name: number for number, name in enumerate(every)}, "in their order"
    if max(numbers.values()) >= classes:
        raise UsageError(
            f"--data has class {max(numbers, key=numbers.__getitem__)!r}, label {max(numbers.values())}, and"
            f" the network {classes} classes, from 0: name class folders by the network's own numbers"
        )
    first = ", ".join(f"{name!r} is {numbers[name]}" for name in every[:SHOWN])
    rest = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return [numbers[name] for name in said], f"labels of --data {how}: {first}{rest}"
