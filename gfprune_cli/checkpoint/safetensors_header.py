"""The header of a safetensors file, read and checked without touching a single weight.

Format: the header's length (8 bytes, little-endian), the header in JSON (name -> dtype, shape, data_offsets),
then the data.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.files import CONVERSION, parse_json, quoted
from gfprune_cli.errors import GfpruneError

HEADER_BYTES = 16 << 20  # of 100,000 tensors; safetensors takes 100 MB, which would parse into gigabytes
MAX_DIMS = 16
MAX_SIZE = 2**53  # of a dimension or offset: no file is larger

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
FLOAT_TYPES = frozenset({"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor.

    Args:
        dtype: safetensors' name ("F32", "BF16", ...).
        shape: its dimensions.
        file: the file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the tensors' names, types and shapes from a safetensors file.

    Args:
        path: a regular file (`files.checked_file`).

    Returns:
        Name -> `TensorInfo`, in the order of the data.

    Raises:
        GfpruneError: not a safetensors file, cut short, or a header that does not describe its data exactly.
    """
    entries, length, size = _entries(path)
    entries.pop("__metadata__", None)
    spans = {name: _span(path, name, entry) for name, entry in entries.items()}
    _check_layout(path, spans, data_start=8 + length, size=size)
    ordered = sorted(spans.items(), key=lambda item: item[1][1])
    return {name: info for name, (info, _, _) in ordered}


def read_metadata(path: Path) -> dict[str, str]:
    """The free text that a safetensors file carries beside its tensors.

    Raises:
        GfpruneError: not a safetensors file, or metadata that is not text by name.
    """
    metadata = _entries(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise GfpruneError(f"{path}: the metadata in its header is malformed")
    return metadata


def _entries(path: Path) -> tuple[dict[str, Any], int, int]:
    """(the parsed header, its length, the size of the file)."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = _header_length(path, prefix + stream.read(24), size)
            stream.seek(8)
            header = stream.read(length)
    except OSError as error:
        raise GfpruneError(f"{path} cannot be read: {error}") from None
    if not header.startswith(b"{"):
        raise GfpruneError(f"{path} is not a safetensors file: its header is not JSON")
    return parse_json(header, f"the header of {path}"), length, size


def _header_length(path: Path, start: bytes, size: int) -> int:
    pickled = start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    if pickled and start[8:9] != b"{":  # a header of 640 bytes begins like a pickle of protocol 2
        raise GfpruneError(
            f"{path} is a pickled PyTorch file under a safetensors name, and gfprune reads no pickle: "
            f"convert it with {CONVERSION}"
        )
    if start.startswith(b"version https://git-lfs"):
        raise GfpruneError(
            f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in that repository"
        )
    if len(start) < 8:
        raise GfpruneError(
            f"{path} is cut short: {size} bytes, but a safetensors file has at least 10: fetch it again"
        )
    (length,) = struct.unpack("<Q", start[:8])
    if length > HEADER_BYTES:
        raise GfpruneError(
            f"{path} is not a safetensors file: its header would be {length} bytes, more than {HEADER_BYTES}"
        )
    if 8 + length > size:
        raise GfpruneError(
            f"{path} is cut short: {size} bytes, but its header alone needs {8 + length}: fetch it again"
        )
    return int(length)


def _span(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """One header entry -> the tensor, and where its data begins and ends in the data part."""
    bad = GfpruneError(f"{path}: the header entry of tensor {quoted(name)} is malformed")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_naturals(shape) and _naturals(offsets) and len(shape) <= MAX_DIMS and len(offsets) == 2):
        raise bad
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise GfpruneError(f"{path}: tensor {quoted(name)} has the unknown type {quoted(dtype)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise GfpruneError(
            f"{path}: tensor {quoted(name)} is {dtype} {shape}, "
            f"{math.prod(shape) * ITEM_BYTES[dtype]} bytes, but the header gives it {end - begin}"
        )
    return TensorInfo(dtype, tuple(shape), path), begin, end


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_SIZE for value in values)


def _check_layout(
    path: Path, spans: dict[str, tuple[TensorInfo, int, int]], *, data_start: int, size: int
) -> None:
    """The tensors fill the data part exactly: no gap, no overlap, nothing after the last one."""
    position = 0
    for name, (_, begin, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if begin != position:
            what = "overlaps another tensor" if begin < position else "leaves a gap before it"
            raise GfpruneError(f"{path}: the data of tensor {quoted(name)} {what}")
        position = end
    if data_start + position > size:
        raise GfpruneError(
            f"{path} is cut short: {size} bytes instead of {data_start + position}: fetch it again"
        )
    if data_start + position < size:
        raise GfpruneError(f"{path} has {size - data_start - position} bytes that belong to no tensor")
