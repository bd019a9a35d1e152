"""Hostile images, arrays and recipes. See `corpus`."""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from corpus import PAYLOAD, Case, Good


def data_cases() -> Iterator[Case]:
    for name, content, says in images():
        yield Case(f"image: {name}", "data", folder_of(content), says)
    for name, change, says in (
        ("a named pipe", os.mkfifo, "not a regular file"),
        ("a link to /dev/zero", lambda path: os.symlink("/dev/zero", path), "not a regular file"),
        ("a link to nothing", lambda path: os.symlink("evil", path), "not a regular file"),
        ("a folder", os.mkdir, "no image in it"),
    ):
        code = 2 if name == "a folder" else 1
        yield Case(f"image: {name}", "data", entry_of(change), says, code)
    for name, members, says, code in archives():
        yield Case(f"npz: {name}", "data", npz(members), says, code)
    for name, content in (
        ("a pickle", PAYLOAD),
        ("nothing", b""),
        ("a lone array", b"\x93NUMPY\x01\0"),
        ("an archive cut short", archive({"x.npy": array_bytes((2, 16, 16, 3))})[:-30]),
        ("an archive without its first bytes", archive({"x.npy": array_bytes((2, 16, 16, 3))})[40:]),
    ):
        yield Case(f"npz: {name}", "data", written("images.npz", content), "not a readable .npz")


def folder_of(content: Callable[[], bytes]) -> Callable[[Path, Good], Path]:
    def make(folder: Path, good: Good) -> Path:
        place = folder / "images"
        place.mkdir()
        (place / "a.png").write_bytes(content())
        return place

    return make


def entry_of(change: Callable[[Path], Any]) -> Callable[[Path, Good], Path]:
    """A folder of images with something that is no file."""

    def make(folder: Path, good: Good) -> Path:
        place = folder / "images"
        place.mkdir()
        change(place / "a.png")
        return place

    return make


def written(name: str, content: bytes) -> Callable[[Path, Good], Path]:
    def make(folder: Path, good: Good) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG, its checksum right."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks)


def images() -> Iterator[tuple[str, Callable[[], bytes], str]]:
    from PIL import Image

    def encoded(kind: str) -> bytes:
        stream = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(stream, kind)
        return stream.getvalue()

    def rows(count: int, width: int) -> bytes:
        return zlib.compress(bytes((width + 1) * count), 9)

    end = chunk(b"IEND", b"")
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        yield f"half a {kind}", partial(half, encoded(kind)), "cannot be read"
    yield "a PNG of 65535 x 65535", lambda: png(65535, 65535, end), "pixels; shrink"
    yield "a PNG of 2^31 - 1 pixels a side", lambda: png(2**31 - 1, 2**31 - 1, end), "pixels|cannot be read"
    bomb = chunk(b"IDAT", rows(30000, 30000 // 8))
    yield "a PNG bomb", lambda: png(30000, 30000, bomb, end, depth=1, colour=0), "pixels; shrink"
    yield "a PNG of no pixels", lambda: png(0, 0, end), "cannot be read"
    yield "a PNG without pixels", lambda: png(16, 16, end), "cannot be read"
    text = chunk(b"zTXt", b"evil\0\0" + zlib.compress(bytes(1 << 28), 9))
    pixels = chunk(b"IDAT", rows(16, 48))
    yield "a PNG with 256 MB of text", lambda: png(16, 16, text, pixels, end), "cannot be read"
    wrong = struct.pack(">I", 0x7FFFFFFF) + b"IDAT" + bytes(16)
    yield "a PNG chunk of 2 GB", lambda: png(16, 16, wrong), "cannot be read"
    yield "a BMP of 2^31 rows", lambda: bmp(16, -(2**31)), "pixels|cannot be read"
    yield "a BMP of 60000 x 60000", lambda: bmp(60000, 60000), "pixels"
    yield (
        "PostScript",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(evil) run\n",
        "cannot be read",
    )
    yield "SVG", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>evil</script></svg>', "cannot be"
    yield "a pickle", lambda: PAYLOAD, "cannot be read"
    yield "a TIFF", lambda: b"II*\0" + bytes(64), "cannot be read"


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def bmp(width: int, height: int) -> bytes:
    return struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0
    )


def array_bytes(shape: tuple[int, ...], dtype: str = "|u1", fill: bytes | None = None) -> bytes:
    """An .npy file that announces a shape; its data is what `fill` says, else as long as announced."""
    head = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    return npy(head, bytes(int(np.prod(shape))) if fill is None else fill)


def npy(head: str, data: bytes = b"") -> bytes:
    text = head.encode("latin1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + data


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return stream.getvalue()


def npz(make: Callable[[], bytes]) -> Callable[[Path, Good], Path]:
    return lambda folder, good: written("images.npz", make())(folder, good)


def archives() -> Iterator[tuple[str, Callable[[], bytes], str, int]]:
    """(name, content, message, exit code)."""

    def one(content: bytes, name: str = "x.npy", method: int = zipfile.ZIP_STORED) -> Callable[[], bytes]:
        return lambda: archive({name: content}, method)

    def objects() -> bytes:
        stream = io.BytesIO()
        np.savez(stream, x=np.array([{"evil": 1}] * 4, dtype=object))
        return stream.getvalue()

    def bomb(method: int) -> bytes:
        size = 256 << 20
        return archive({"x.npy": array_bytes((size // 768, 16, 16, 3), fill=bytes(size))}, method)

    yield "Python objects", objects, "never unpickled", 2
    yield (
        "Python objects with a pickle",
        one(array_bytes((4, 16, 16, 3), "|O", PAYLOAD)),
        "never unpickled",
        2,
    )
    yield "a header that is code", one(npy("__import__('os').system('touch evil')")), "not a readable", 1
    yield "a header of 60 kB", one(npy("{'descr': " + " " * 60000)), "not a readable", 1
    yield "a header of nested brackets", one(npy("(" * 900)), "not a readable|not a plain", 1
    yield "a shape of 10^15", one(array_bytes((10**15, 16, 16, 3), fill=b"")), "damaged", 1
    yield "a shape of 4000 digits", one(npy(shaped("(1" + "0" * 700 + ", 1, 1, 3)"))), "damaged|not a read", 1
    yield "a negative shape", one(npy(shaped("(-1, 16, 16, 3)"))), "shape", 2
    yield "a shape in quotes", one(npy(shaped("'evil'"))), "not a readable", 1
    yield "a shape of floats", one(npy(shaped("(1.0, 16, 16, 3)"))), "not a readable", 1
    yield "floats", one(array_bytes((1, 16, 16, 3), "<f4", bytes(3072))), "uint8", 2
    yield (
        "fields",
        one(npy("{'descr': [('evil', '|u1')], 'fortran_order': False, 'shape': (1,)}")),
        "uint8",
        2,
    )
    yield "an array of no images", one(array_bytes((0, 16, 16, 3))), "shape", 2
    yield "a flat array", one(array_bytes((768,))), "shape", 2
    yield "other names", one(array_bytes((1, 16, 16, 3)), "../evil.npy"), "no array called", 2
    yield "a pickle for an array", one(PAYLOAD), "not a readable", 1
    yield "a bomb", lambda: bomb(zipfile.ZIP_DEFLATED), "times its size", 1
    yield "a bomb in bzip2", lambda: bomb(zipfile.ZIP_BZIP2), "compressed", 1
    yield "a bomb in LZMA", lambda: bomb(zipfile.ZIP_LZMA), "compressed", 1
    yield "an encrypted array", encrypted, "not a readable", 1
    yield "a size that lies", lying, "times its size", 1


def shaped(shape: str) -> str:
    return f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"


def encrypted() -> bytes:
    data = bytearray(archive({"x.npy": array_bytes((1, 16, 16, 3))}))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    data[6] |= 1
    return bytes(data)


def lying() -> bytes:
    """The zip's directory says that the array is larger than what is stored."""
    data = bytearray(archive({"x.npy": array_bytes((1, 16, 16, 3))}))
    place = data.index(b"PK\x01\x02") + 24
    data[place : place + 4] = struct.pack("<I", 1 << 31)
    return bytes(data)


def recipe_cases() -> Iterator[Case]:
    for name, content, says in recipes():
        yield Case(f"recipe: {name}", "config", written("recipe.yaml", content), says, 2)

    def piped(folder: Path, good: Good) -> Path:
        os.mkfifo(folder / "recipe.yaml")
        return folder / "recipe.yaml"

    def directory(folder: Path, good: Good) -> Path:
        (folder / "recipe.yaml").mkdir()
        return folder / "recipe.yaml"

    def endless(folder: Path, good: Good) -> Path:
        (folder / "recipe.yaml").symlink_to("/dev/zero")
        return folder / "recipe.yaml"

    yield Case("recipe: a named pipe", "config", piped, "not a regular file", 2)
    yield Case("recipe: a folder", "config", directory, "not a regular file", 2)
    yield Case("recipe: a link to /dev/zero", "config", endless, "not a regular file", 2)


def recipes() -> Iterator[tuple[str, bytes, str]]:
    laughs = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
    )
    merges = "a0: &a0 {sparsity: 0.5}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
    )
    yield (
        "a tag that runs a command",
        b"model: !!python/object/apply:os.system ['touch evil']",
        "not valid YAML",
    )
    yield "a tag that makes an object", b"model: !!python/object/new:evil.Evil {}", "not valid YAML"
    yield "a tag that names a module", b"model: !!python/module:evil", "not valid YAML"
    yield "a tag of its own", b"model: !evil demo", "not valid YAML"
    yield "aliases that multiply", f"{laughs}model: *a11\n".encode(), "alias"
    yield "merges that multiply", f"{merges}<<: *a11\n".encode(), "alias"
    yield "an alias to itself", b"model: &a [*a]", "alias"
    yield "an alias that is harmless", b"model: &a demo\ndata: *a", "alias"
    yield "a key given twice", b"sparsity: 0.5\nsparsity: 0.9", "twice"
    yield "two documents", b"sparsity: 0.5\n---\nsparsity: 0.9", "not valid YAML"
    yield "a list", b"[1, 2]", "mapping"
    yield "a key that is a list", b"? [a]\n: 1", "not valid YAML|mapping"
    yield "a key that is a number", b"1: 2", "mapping"
    yield "an unknown key", b"evil: 1", "unknown recipe key"
    yield "a key with escape codes", b'"\\e[2Jevil": 1', "unknown recipe key"
    yield "a date that is none", b"seed: 2024-13-45", "not valid YAML|seed"
    yield "a date", b"seed: 2024-01-01", "seed"
    yield "a number of 5000 digits", b"seed: " + b"9" * 5000, "not valid YAML|seed"
    yield "a hexadecimal number of 20 kB", b"seed: 0x" + b"f" * 20000, "seed"
    yield "a sexagesimal number of 50 kB", b"seed: 1" + b":59" * 16000, "seed|not valid YAML"
    yield "infinity", b"sparsity: .inf", "sparsity"
    yield "NaN", b"sparsity: .nan", "sparsity"
    yield "binary data", b"model: !!binary R0lGODlhDAAMAIQAAP", "not valid YAML|model"
    yield "a set", b"model: !!set {a, b}", "model"
    yield "a value that is an object", b"model: {evil: 1}", "model"
    yield "a value nested 90 deep", b"model: " + b"[" * 90 + b"]" * 90, "model"
    yield "50,000 brackets", b"model: " + b"[" * 50_000, "not valid YAML"
    yield "a character beyond Unicode", b'model: "\\U7FFFFFFF"', "not valid YAML"
    yield "half a character", b'data: "\\ud800"', "data"
    yield "a value with a null byte", b'data: "a\\0b"', "data"
    yield "a model of 60 kB", b"model: " + b"x" * 60_000, "model"
    yield "a range that is text", b"sparsity: evil", "sparsity"
    yield "a yes for a number", b"sparsity: yes", "sparsity"
    yield "no UTF-8", b"model: \xff\xfe", "not valid YAML"
    yield "null bytes", b"model: a\0b", "not valid YAML"
    yield "a pickle", PAYLOAD, "not valid YAML|mapping"
    yield "2 MB", b"# " + b"x" * (2 << 20), "larger than"
    yield "1 MB of brackets", b"model: [" + b"[]," * 340_000 + b"]", "larger than|model"
