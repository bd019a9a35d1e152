"""Hostile inputs by name: files and folders made to crash, hang, exhaust, mislead or take over a reader.

Every `Case` is made on the spot from a good checkpoint and must be refused in one line. The word "evil" marks
whatever must never run: names of modules, files and commands; the guard looks for it.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PAYLOAD = b"cos\nsystem\n(S'touch evil'\ntR."  # a pickle that runs a command

Kind = Literal["model", "config", "data", "text", "file", "record"]


@dataclass(frozen=True)
class Good:
    """What hostile inputs are made from.

    Args:
        pipeline: an unconditional pipeline, sound in every way.
        shards: its network alone, in several files.
        text: a pipeline with a text encoder.
        pruned: the output of a prune run of `pipeline`.
    """

    pipeline: Path
    shards: Path
    text: Path
    pruned: Path


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Args:
        name: what is wrong with it.
        kind: what it is given as: `--model` ("text": one with a text encoder), `--config`, `--data`, one file
            for the Python API, or the record beside a pruned checkpoint.
        make: puts it into an empty folder and returns what the flag names.
        says: a part of the error.
        code: the exit code.
        analyze: the exit code of `analyze`, which reads neither weights nor other components.
    """

    name: str
    kind: Kind
    make: Callable[[Path, Good], Path]
    says: str
    code: int = 1
    analyze: int = 1


def cases() -> list[Case]:
    """The whole corpus; names are unique."""
    from corpus_data import data_cases, recipe_cases
    from corpus_json import config_cases, index_cases, pipeline_cases, record_cases, text_cases

    found = [*weights_cases(), *header_cases(), *shard_cases(), *file_cases()]
    found += [*config_cases(), *index_cases(), *pipeline_cases(), *record_cases(), *text_cases()]
    return [*found, *data_cases(), *recipe_cases()]


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def copied(folder: Path, source: Path) -> Path:
    return Path(shutil.copytree(source, folder / "model"))


def outside(folder: Path) -> Path:
    """A folder beside the case's own, which nothing may be read from."""
    place = folder.parent / f"{folder.name}-outside"
    place.mkdir(exist_ok=True)
    return place


def safetensors(header: bytes | str | dict[str, Any], data: bytes = b"") -> bytes:
    """A file of that header and data."""
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def on_weights(change: Callable[[Path], None]) -> Callable[[Path, Good], Path]:
    """A pipeline whose weights file was changed."""

    def make(folder: Path, good: Good) -> Path:
        model = copied(folder, good.pipeline)
        change(model / "unet" / WEIGHTS)
        return model

    return make


def of_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, Good], Path]:
    return on_weights(lambda path: path.write_bytes(change(path.read_bytes())) and None)


def of_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Good], Path]:
    """A pipeline whose weights have another header and the same data."""

    def rewrite(data: bytes) -> bytes:
        header, rest = parts(data)
        change(header)
        return safetensors(header, rest)

    return of_bytes(rewrite)


def of_tensor(name: str, **fields: Any) -> Callable[[Path, Good], Path]:
    """A header with other fields for one tensor."""
    return of_header(lambda header: header[name].update(fields))


def zipped() -> bytes:
    """What torch.save writes, holding a pickle that runs a command."""
    import io
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", PAYLOAD)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def other_formats() -> dict[str, tuple[bytes, str]]:
    """Files of other formats under a safetensors name, and what is said of them."""
    return {
        "a pickle of protocol 0": (PAYLOAD, "not a safetensors file"),
        "a pickle of protocol 4": (b"\x80\x04\x95" + bytes(5) + PAYLOAD, "pickled PyTorch file"),
        "a torch zip": (zipped(), "pickled PyTorch file"),
        "a Python script": (b"import os; os.system('touch evil')\n", "not a safetensors file"),
        "a shell script": (b"#!/bin/sh\ntouch evil\n", "not a safetensors file"),
        "an HTML page": (b"<!DOCTYPE html><html>Not found</html>", "not a safetensors file"),
        "a GGUF file": (b"GGUF\x03\0\0\0" + bytes(64), "cut short|not a safetensors"),
        "a gzip file": (b"\x1f\x8b\x08\0" + bytes(64), "cut short|not a safetensors"),
        "a numpy file": (b"\x93NUMPY\x01\0v\0{'descr': '|O'}", "not a safetensors file"),
        "an HDF5 file": (b"\x89HDF\r\n\x1a\n" + bytes(64), "not a safetensors file"),
        "an ELF program": (b"\x7fELF\x02\x01\x01" + bytes(64), "cut short|not a safetensors"),
        "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "a file of zeros": (bytes(4096), "not a safetensors file"),
        "an empty file": (b"", "cut short"),
        "seven bytes": (bytes(7), "cut short"),
        "eight bytes": (struct.pack("<Q", 2), "cut short"),
    }


def weights_cases() -> Iterator[Case]:
    for name, (content, says) in other_formats().items():
        yield Case(f"weights: {name}", "model", of_bytes(lambda data, content=content: content), says)
    yield Case(
        "weights: a zip behind the last tensor", "model", of_bytes(lambda data: data + zipped()), "belong to"
    )
    yield Case("weights: a zip before the header", "model", of_bytes(lambda data: zipped() + data), "pickled")
    yield Case(
        "weights: a byte too many", "model", of_bytes(lambda data: data + b"\0"), "1 bytes that belong"
    )
    yield Case("weights: a byte too few", "model", of_bytes(lambda data: data[:-1]), "cut short")
    for name, change, says in bad_files():
        yield Case(f"weights: {name}", "model", on_weights(change), says)
    for name, value, says in (
        ("NaN in the last place", struct.pack("<f", float("nan")), "not finite"),
        ("infinity in the last place", struct.pack("<f", float("inf")), "not finite"),
        ("minus infinity in the last place", struct.pack("<f", float("-inf")), "not finite"),
    ):
        spoilt = of_bytes(lambda data, value=value: data[:-4] + value)
        yield Case(f"weights: {name}", "model", spoilt, says, analyze=0)
    yield Case("weights: all bits set", "model", of_bytes(all_ones), "not finite", analyze=0)
    yield Case(
        "weights: only a pickle", "model", on_weights(only_pickle), "gfprune reads no pickle", analyze=0
    )


def all_ones(data: bytes) -> bytes:
    header, rest = parts(data)
    return safetensors(header, b"\xff" * len(rest))


def only_pickle(path: Path) -> None:
    path.unlink()
    path.with_name("diffusion_pytorch_model.bin").write_bytes(zipped())


def bad_files() -> Iterator[tuple[str, Callable[[Path], None], str]]:
    """What may stand in the place of a file: (name, change, message)."""
    import os
    import socket

    def replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            path.unlink()
            make(path)

        return change

    def link_out(path: Path) -> None:
        place = outside(path.parents[2]) / path.name
        shutil.move(path, place)
        path.symlink_to(place)

    def plug(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)

    yield "a named pipe", replaced(os.mkfifo), "not a regular file"
    yield "a folder", replaced(Path.mkdir), "not a regular file"
    yield "a socket", replaced(plug), "not a regular file"
    yield "a link out of the folder", link_out, "leads out of the checkpoint's folder"
    yield "a link to /dev/zero", replaced(lambda path: path.symlink_to("/dev/zero")), "leads out"
    yield "a link to itself", replaced(lambda path: path.symlink_to(path.name)), "cannot be read|missing"
    yield "a link to nothing", replaced(lambda path: path.symlink_to("evil")), "missing"


def header_cases() -> Iterator[Case]:
    """Headers that lie."""
    weight, whole = "conv_in.weight", [0, 16 * 3 * 9 * 4]
    wrong = {
        "of an unknown type": dict(dtype="F4"),
        "of a type that is a list": dict(dtype=["F32"]),
        "of a type nested deeply": dict(dtype=nested(40)),
        "of a narrower type": dict(dtype="F16"),
        "with a negative dimension": dict(shape=[-16, -3, 3, 3]),
        "with a fractional dimension": dict(shape=[16.0, 3, 3, 3]),
        "with a dimension that is true": dict(shape=[True, 432]),
        "with a dimension in quotes": dict(shape=["16", 3, 3, 3]),
        "with a shape that is a number": dict(shape=432),
        "with a shape of 2^80": dict(shape=[2**40, 2**40]),
        "with dimensions of 4000 digits": dict(shape=[10**4000] * 4),
        "with 17 dimensions": dict(shape=[1] * 13 + [16, 3, 3, 3]),
        "with a product that wraps to its size": dict(shape=[2**62, 4, 432]),
        "with one offset": dict(data_offsets=[0]),
        "with three offsets": dict(data_offsets=[*whole, 0]),
        "with offsets in quotes": dict(data_offsets=["0", "1"]),
        "with negative offsets": dict(data_offsets=[-4, 4]),
        "with offsets that run backwards": dict(data_offsets=whole[::-1]),
        "with offsets beyond 2^64": dict(data_offsets=[2**64, 2**64 + whole[1]]),
        "with offsets of 4000 digits": dict(data_offsets=[10**4000, 10**4000 + whole[1]]),
        "with an extra key": dict(evil=1),
    }
    for name, fields in wrong.items():
        yield Case(f"header: a tensor {name}", "model", of_tensor(weight, **fields), "'conv_in.weight'")
    yield Case("header: tensors that overlap", "model", of_header(overlap), "overlaps another tensor")
    yield Case("header: a hole between tensors", "model", of_header(hole), "leaves a gap")
    yield Case("header: a tensor that is a list", "model", of_header(lambda h: h.update(a=[])), "malformed")
    yield Case("header: no tensors", "model", of_bytes(lambda data: safetensors("{}")), "missing", analyze=0)
    yield Case(
        "header: metadata that is a tensor",
        "model",
        of_header(lambda header: header.update(__metadata__=header.pop(weight))),
        "leaves a gap",
    )
    yield Case(
        "header: metadata that is not text",
        "model",
        of_header(lambda header: header.update(__metadata__={"format": {"evil": 1}})),
        "cannot be read",
    )
    for name, text, says in header_texts():
        yield Case(f"header: {name}", "model", of_bytes(lambda data, t=text: safetensors(t())), says)
    for name, length in (("0", 0), ("2^63", 2**63), ("2^64 - 1", 2**64 - 1)):
        make = of_bytes(lambda data, n=length: struct.pack("<Q", n) + data[8:])
        yield Case(f"header: a length of {name}", "model", make, "not a safetensors file")
    over = of_bytes(lambda data: struct.pack("<Q", len(data) - 7) + data[8:])
    yield Case("header: a length one byte beyond the file", "model", over, "cut short")
    for name, change, says in tensor_changes():
        yield Case(f"tensors: {name}", "model", of_header(change), says, analyze=0)


def header_texts() -> Iterator[tuple[str, Callable[[], bytes | str], str]]:
    entry = '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    yield "a name given twice", lambda: f"{{{entry},{entry}}}", "given twice"
    yield "a field given twice", lambda: entry.join("{}").replace("[0]", '[0],"shape":[1]'), "given twice"
    yield "a list", lambda: "[]", "not JSON"
    yield "blanks", lambda: " " * 64, "not JSON"
    yield "a byte order mark", lambda: b"\xef\xbb\xbf{}", "not JSON"
    yield "no UTF-8", lambda: b'{"\xff\xfe":1}', "not valid JSON"
    yield "NaN", lambda: '{"a":NaN}', "NaN is not a JSON number"
    yield "a number of 5000 digits", lambda: '{"a":' + "9" * 5000 + "}", "not valid JSON"
    yield "an unfinished object", lambda: "{" + entry, "not valid JSON"
    yield "two objects", lambda: "{}{}", "not valid JSON"
    yield "900 nested lists", lambda: '{"a":' + "[" * 900 + "]" * 900 + "}", "nested too deeply"
    yield "a million nested lists", lambda: '{"a":' + "[" * 10**6, "too many"
    yield "100 MB of empty lists", lambda: b'{"a":[' + b"[]," * 33_333_330 + b"0]}", "too large|not a safe"
    yield "15 MB of empty lists", lambda: b'{"a":[' + b"[]," * 5_000_000 + b"0]}", "too many"
    yield "15 MB of empty objects", lambda: b'{"a":[' + b"{}," * 5_000_000 + b"0]}", "too many"
    yield "15 MB of numbers", lambda: b'{"a":[' + b"9999," * 3_000_000 + b"0]}", "malformed"
    yield "a name of 1 MB", lambda: '{"' + "\\u001b[2J" * 10**5 + '":1}', "malformed"
    yield "a name with half a character", lambda: '{"\\ud800":1}', "malformed"


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def overlap(header: dict[str, Any]) -> None:
    """Two tensors of one size over the same bytes, which leaves a third uncovered."""
    first, second = header["conv_in.bias"], header["conv_norm_out.bias"]
    second["data_offsets"] = first["data_offsets"]


def hole(header: dict[str, Any]) -> None:
    del header["conv_in.weight"]


def tensor_changes() -> Iterator[tuple[str, Callable[[dict[str, Any]], Any], str]]:
    """Headers in order that belong to another network."""

    def rename(new: str) -> Callable[[dict[str, Any]], Any]:
        return lambda header: header.update({new: header.pop("conv_in.bias")})

    yield (
        "another shape of the same size",
        lambda h: h["conv_in.weight"].update(shape=[3, 16, 3, 3]),
        "conv_in",
    )
    yield "a flat shape of the same size", lambda h: h["conv_in.weight"].update(shape=[432]), "conv_in"
    yield "integers", lambda h: h["conv_in.weight"].update(dtype="I32"), "I32"
    yield "a name that climbs", rename("../../evil"), "missing"
    yield "a name that is code", rename("__class__.__init__.__globals__"), "missing"
    yield "a name with escape codes", rename("\x1b[2J\x07evil"), "missing"
    yield "an empty name", rename(""), "missing"
    empty = {"dtype": "F32", "shape": [0, 2**52], "data_offsets": [0, 0]}
    yield "an empty tensor of 2^52 columns", lambda h: h.update(evil=empty), "no place in UNet2DModel"


def on_shards(change: Callable[[Path], Any]) -> Callable[[Path, Good], Path]:
    """A bare network in shards, changed by its index."""

    def make(folder: Path, good: Good) -> Path:
        model = copied(folder, good.shards)
        change(model / INDEX)
        return model

    return make


def shard_cases() -> Iterator[Case]:
    names = ("../evil", "/etc/evil", "a\\evil", "sub/evil", "\x1b[2Jevil", "evil\0", "\u202eevil", "CON:evil")
    for name in names[:7]:
        change = renamed_shard(name + ".safetensors")
        yield Case(
            f"index: a shard called {name!r}", "model", on_shards(change), "no plain safetensors file name"
        )
    for name in ("evil.bin", "..", "", "model.safetensors.index.json"):
        says = "no plain safetensors file name"
        yield Case(f"index: a shard called {name!r}", "model", on_shards(renamed_shard(name)), says)
    endless = renamed_shard("9" * 5000 + ".safetensors")
    yield Case(
        "index: a shard with an endless name", "model", on_shards(endless), "no plain safetensors file name"
    )
    for value in (None, [], {}, "evil", 7, {"conv_in.weight": 1}, {"a": ["b"]}):
        change = set_map(value)
        yield Case(f"index: a weight_map that is {value!r}", "model", on_shards(change), "no weight_map")
    ghost = {f"t{i}": f"x-{i}.safetensors" for i in range(2000)}
    yield Case("index: 2000 shards", "model", on_shards(set_map(ghost)), "more than 1024")
    yield Case(
        "index: a tensor that no shard holds",
        "model",
        on_shards(lambda path: edit(path, lambda index: index["weight_map"].update(evil=first_shard(index)))),
        "places tensor 'evil'",
    )
    yield Case("index: a tensor in the wrong shard", "model", on_shards(swap_shards), "does not place there")
    yield Case("index: a shard that links out", "model", on_shards(link_shard), "leads out")
    yield Case("index: a shard that is a pipe", "model", on_shards(pipe_shard), "not a regular file")
    yield Case("index: a shard that is missing", "model", on_shards(drop_shard), "missing")
    yield Case(
        "index: 17 MB",
        "model",
        on_shards(lambda path: path.write_bytes(b'{"a":"' + b"x" * (17 << 20) + b'"}')),
        "larger than",
    )
    lists = b'{"a":[' + b"[]," * 5_000_000 + b"0]}"
    yield Case("index: 15 MB of empty lists", "model", on_shards(lambda p: p.write_bytes(lists)), "too many")


def first_shard(index: dict[str, Any]) -> str:
    return str(min(index["weight_map"].values()))


def renamed_shard(name: str) -> Callable[[Path], None]:
    return lambda path: edit(path, lambda index: index["weight_map"].update({"conv_in.weight": name}))


def set_map(value: Any) -> Callable[[Path], None]:
    return lambda path: edit(path, lambda index: index.update(weight_map=value))


def swap_shards(path: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        last = max(index["weight_map"].values())
        index["weight_map"] = {
            name: last if shard == first_shard(index) else shard
            for name, shard in index["weight_map"].items()
        } | {"evil": first_shard(index)}

    edit(path, change)


def a_shard(path: Path) -> Path:
    return path.with_name(first_shard(json.loads(path.read_text())))


def link_shard(path: Path) -> None:
    shard = a_shard(path)
    place = outside(path.parents[1]) / shard.name
    shutil.move(shard, place)
    shard.symlink_to(place)


def pipe_shard(path: Path) -> None:
    import os

    a_shard(path).unlink()
    os.mkfifo(a_shard(path))


def drop_shard(path: Path) -> None:
    a_shard(path).unlink()


def file_cases() -> Iterator[Case]:
    """One file with the architecture in its metadata, for `gfprune_cli.load`."""

    def file(metadata: Any) -> Callable[[Path, Good], Path]:
        def make(folder: Path, good: Good) -> Path:
            place = folder / "network.safetensors"
            place.write_bytes(safetensors({"__metadata__": metadata}))
            return place

        return make

    def described(**changes: Any) -> dict[str, str]:
        document = {"format": 1, "class_name": "UNet2DModel", "config": {}} | changes
        return {"gfprune": json.dumps(document)}

    bad: dict[str, tuple[Any, str]] = {
        "no metadata": ({}, "does not say what network"),
        "metadata that is a list": ([], "malformed"),
        "metadata that is a number": ({"gfprune": 1}, "malformed"),
        "half a character": ({"gfprune": "\ud800"}, "not valid JSON"),
        "no JSON": ({"gfprune": "__import__('evil')"}, "not valid JSON"),
        "deep JSON": ({"gfprune": '{"config":' + "[" * 10**5}, "nested too deeply"),
        "900 nested lists": (described(record=nested(900)), "nested too deeply"),
        "a class that is code": (described(class_name="evil.UNet2DModel"), "no network that gfprune knows"),
        "a class that is a list": (described(class_name=["UNet2DModel"]), "no network that gfprune knows"),
        "format 2": (described(format=2), "no network that gfprune knows"),
        "a config that is a list": (described(config=[]), "no network that gfprune knows"),
        "10^9 channels": (described(config={"block_out_channels": [10**9]}), "block_out_channels"),
        "no tensors": (described(), "missing"),
    }
    for name, (metadata, says) in bad.items():
        yield Case(f"file: {name}", "file", file(metadata), says)
