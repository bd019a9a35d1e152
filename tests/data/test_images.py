"""Reading images: what each kind of source gives, and the one line for everything that cannot be read."""

import os
import struct
import sys
import tracemalloc
import types
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gfprune_cli.data import images as images_module
from gfprune_cli.data.images import load_images, to_model_range
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs.digests import fingerprint
from gfprune_cli.progress import Event

SIZE = (8, 6)  # height, width


def save(path: Path, colour: Any = "red", size: tuple[int, int] = (6, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def load(source: Any, **options: Any) -> torch.Tensor:
    return load_images(str(source), **{"size": SIZE, "channels": 3, "limit": 100, **options})


def refused(source: Any, kind: type[GfpruneError] = GfpruneError, **options: Any) -> str:
    """The message of the error, which is exactly of this kind and one line long."""
    with pytest.raises(GfpruneError) as caught:
        load(source, **options)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert "\n" not in message
    return message


def outcome(source: Any) -> str:
    """The one line of whatever error there is; nothing where the images were read."""
    message = ""
    try:
        assert load(source).shape[1:] == (3, *SIZE)
    except GfpruneError as error:
        message = str(error)
    assert "\n" not in message
    return message


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if event.phase == "notice"]


# --- folders ---------------------------------------------------------------------------------------------


def test_folder_is_read_recursively_in_the_order_of_relative_paths(tmp_path: Path) -> None:
    save(tmp_path / "b.PNG", (2, 0, 0))
    save(tmp_path / "a" / "z.bmp", (0, 0, 0))
    save(tmp_path / "a.png", (1, 0, 0))  # "a.png" < "a/z.bmp", as "." < "/"
    save(tmp_path / "c" / "d" / "e.webp", "white")
    save(tmp_path / "f.jpeg", "white")
    save(tmp_path / "g.jpg", "white")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._a.png").write_text("a resource fork")
    save(tmp_path / ".cache" / "x.png")
    images = load(tmp_path)
    assert images.shape == (6, 3, 8, 6)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert images[:3, 0, 0, 0].tolist() == [1, 0, 2]
    assert images[3:].min() >= 250


def test_no_notice_when_sizes_agree_and_one_event_per_image(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png")
    events: list[Event] = []
    load(tmp_path, progress=events.append)
    assert [(event.phase, event.step, event.total) for event in events] == [("load", i, 3) for i in (1, 2, 3)]


def test_one_notice_for_all_resized_images(tmp_path: Path) -> None:
    save(tmp_path / "same.png")
    for i, width in enumerate((20, 20, 21, 22, 23, 24)):
        save(tmp_path / f"{i}.png", size=(width, 10))
    events: list[Event] = []
    load(tmp_path, progress=events.append)
    (text,) = notices(events)
    assert "6 of 7 images resized to 6x8" in text
    assert text.endswith("from 20x10, 21x10, 22x10, 2 other sizes")


def test_resizing_crops_about_the_centre_first(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 8), "red")
    picture.paste("blue", (17, 0, 23, 8))  # the central 6x8
    picture.save(tmp_path / "wide.png")
    expected = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 8, 6)
    assert torch.equal(load(tmp_path)[0], expected)


@settings(max_examples=40)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
    channels=st.sampled_from([1, 3]),
)
def test_any_size_and_mode_gives_the_shape_asked_for_and_keeps_white_white(
    tmp_path_factory: pytest.TempPathFactory,
    width: int,
    height: int,
    size: tuple[int, int],
    mode: str,
    channels: int,
) -> None:
    path = tmp_path_factory.mktemp("any") / "x.png"
    if mode == "I;16":
        Image.fromarray(np.full((height, width), 65535, np.uint16)).save(path)
    else:
        Image.new("RGB", (width, height), "white").convert(mode).save(path)
    images = load(path.parent, size=size, channels=channels)
    assert images.shape == (1, channels, *size)
    assert (images == 255).all()


@settings(max_examples=25)
@given(
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    alpha=st.integers(0, 255),
)
def test_alpha_is_composited_on_white(
    tmp_path_factory: pytest.TempPathFactory, colour: tuple[int, int, int], alpha: int
) -> None:
    folder = tmp_path_factory.mktemp("alpha")
    save(folder / "x.png", (*colour, alpha), mode="RGBA")
    expected = [(value * alpha + 255 * (255 - alpha)) / 255 for value in colour]
    assert load(folder)[0, :, 0, 0].tolist() == pytest.approx(expected, abs=1.01)


def test_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    picture = Image.new("P", (6, 8), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.paste(0, (0, 0, 3, 8))
    picture.save(tmp_path / "x.png", transparency=0)
    images = load(tmp_path)
    assert images[0, :, 0, 0].tolist() == [255, 255, 255]
    assert images[0, :, 0, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_turned_photos_are_set_upright(tmp_path: Path, suffix: str) -> None:
    picture = Image.new("RGB", (8, 6), "black")
    picture.paste("white", (0, 0, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the upper half is the right one
    picture.save(tmp_path / f"x.{suffix}", exif=exif, quality=100)
    upright = load(tmp_path, channels=1)[0, 0].float()
    assert upright[:, 5].mean() > 240 > 15 > upright[:, 0].mean()


def test_grey_to_rgb_and_back(tmp_path: Path) -> None:
    save(tmp_path / "x.png", 77, mode="L")
    assert (load(tmp_path) == 77).all()
    assert (load(tmp_path, channels=1) == 77).all()


def test_sixteen_bit_grey_keeps_its_shades(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 6), 128 * 257, np.uint16)).save(tmp_path / "x.png")
    assert (load(tmp_path, channels=1) == 128).all()


# --- subsets ---------------------------------------------------------------------------------------------


def test_subset_is_the_same_for_the_same_seed_and_keeps_the_order(tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / f"{i:02}.png", (i, 0, 0))
    first = load(tmp_path, limit=6, seed=3)[:, 0, 0, 0].tolist()
    assert first == load(tmp_path, limit=6, seed=3)[:, 0, 0, 0].tolist()
    assert first == sorted(set(first))
    assert len(first) == 6
    assert first != load(tmp_path, limit=6, seed=4)[:, 0, 0, 0].tolist()
    assert load(tmp_path, limit=20)[:, 0, 0, 0].tolist() == list(range(20))


def test_folder_and_npz_of_the_same_images_give_the_same_subset(tmp_path: Path) -> None:
    pixels = np.zeros((12, 8, 6, 3), np.uint8) + np.arange(12, dtype=np.uint8)[:, None, None, None]
    for i, picture in enumerate(pixels):
        (tmp_path / "folder").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "folder" / f"{i:02}.png")
    np.savez(tmp_path / "x.npz", pixels)
    options = {"limit": 5, "seed": 9}
    assert torch.equal(load(tmp_path / "folder", **options), load(tmp_path / "x.npz", **options))


def test_files_outside_the_subset_are_not_opened(tmp_path: Path) -> None:
    for i in range(8):
        save(tmp_path / f"{i}.png", (i, 0, 0))
    kept = load(tmp_path, limit=3)[:, 0, 0, 0].tolist()
    for i in set(range(8)) - set(kept):
        (tmp_path / f"{i}.png").write_bytes(b"damaged")
    assert load(tmp_path, limit=3)[:, 0, 0, 0].tolist() == kept


# --- folders that cannot be used -------------------------------------------------------------------------


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    assert "no image" in refused(tmp_path, UsageError)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_truncated_image_is_named(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / "good.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    broken = tmp_path / "sub" / f"broken.{suffix}"
    broken.parent.mkdir()
    Image.fromarray(noise).save(broken)
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    assert f"broken.{suffix}" in refused(tmp_path)


@settings(max_examples=60)
@given(data=st.data(), suffix=st.sampled_from(["png", "jpg", "webp", "bmp"]))
def test_damaged_bytes_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    path = save(tmp_path_factory.mktemp("damage") / f"x.{suffix}", "teal")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    message = outcome(path.parent)
    assert not message or path.name in message


def test_a_text_called_png_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("hello")
    assert "x.png" in refused(tmp_path)


def test_postscript_never_reaches_an_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", reached)
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 8\n%%EndComments\n")
    assert "x.png" in refused(tmp_path)


def test_broken_link_is_named_and_not_skipped(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    assert "b.png" in refused(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert "not a regular file" in refused(tmp_path)
    os.mkfifo(tmp_path / "b.npz")
    assert "neither" in refused(tmp_path / "b.npz", UsageError)


def test_loop_of_links_ends(tmp_path: Path) -> None:
    save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(load(tmp_path)) == 1


def test_linked_folders_are_entered(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "x.png")
    save(tmp_path / "set" / "y.png")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(load(tmp_path / "set")) == 2


@pytest.mark.parametrize("suffix", ["tif", "TIFF", "gif", "jfif", "ppm", "bmp"])
def test_every_usual_format_is_read(tmp_path: Path, suffix: str) -> None:
    kind = {"tif": "TIFF", "jfif": "JPEG"}.get(suffix, suffix.upper())
    image = Image.new("RGB", (8, 8), (250, 10, 10))
    image.save(tmp_path / f"x.{suffix}", format=kind)
    found = load(tmp_path)
    assert len(found) == 1
    assert int(found[0, 0].min()) > 240 > 30 > int(found[0, 1:].max())


def test_files_that_are_left_out_are_said(tmp_path: Path) -> None:
    save(tmp_path / "x.png")
    for name in ("x.txt", "y.txt", "LICENSE", ".hidden.txt"):
        (tmp_path / name).write_text("no image")
    said: list[str] = []
    load_images(
        str(tmp_path), size=(8, 8), channels=3, limit=9, progress=lambda event: said.append(event.text)
    )
    assert any("2 of .txt, 1 of no suffix" in text for text in said)


def test_unreadable_subfolder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "x.png")
    save(tmp_path / "locked" / "y.png")
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if Path(path).name == "locked":  # a folder of mode 0 is open to root, who runs many a container
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    message = refused(tmp_path)
    assert "locked" in message
    assert "Permission denied" in message


@pytest.mark.parametrize("excess", [1.5, 3.0])
def test_pixel_limit_holds_for_warnings_and_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excess: float
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save(tmp_path / "bomb.png", size=(10, int(10 * excess)))
    message = refused(tmp_path)
    assert "bomb.png" in message
    assert "over 100 pixels" in message


def test_png_that_declares_a_huge_canvas_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2**20, 2**20, 8, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "huge.png").write_bytes(content)
    assert "huge.png" in refused(tmp_path)


def test_png_chunk_is_not_allocated_beyond_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "long.png")
    content = path.read_bytes()
    start = content.index(b"IDAT") - 4
    path.write_bytes(content[:start] + struct.pack(">I", 0x7FFFFFFF) + content[start + 4 :])
    tracemalloc.start()
    try:
        outcome(tmp_path)  # the pixels are all there: read or refused, as Pillow likes
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024**2
    finally:
        tracemalloc.stop()


def test_odd_file_names_stay_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "two\nlines.png").write_text("hello")
    assert "two\\nlines.png" in refused(tmp_path)


# --- npz -------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    count=st.integers(1, 4),
    stored=st.sampled_from([1, 3]),
    channels=st.sampled_from([1, 3]),
    first=st.booleans(),
    key=st.sampled_from(["x", "images", "arr_0"]),
    packed=st.booleans(),
    fortran=st.booleans(),
    seed=st.integers(0, 99),
)
def test_npz_of_every_layout(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    stored: int,
    channels: int,
    first: bool,
    key: str,
    packed: bool,
    fortran: bool,
    seed: int,
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 6, stored), dtype=np.uint8)
    array = pixels.transpose(0, 3, 1, 2) if first else pixels
    path = tmp_path_factory.mktemp("npz") / "x.NPZ"
    arrays: dict[str, Any] = {key: np.asfortranarray(array) if fortran else np.ascontiguousarray(array)}
    with path.open("wb") as file:
        (np.savez_compressed if packed else np.savez)(file, **arrays)
    images = load(path, channels=channels)
    assert images.shape == (count, channels, 8, 6)
    expected = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
    if stored == channels:
        assert torch.equal(images, expected)
    elif stored == 1:
        assert torch.equal(images, expected.expand(-1, 3, -1, -1))


def test_npz_keys_are_tried_in_order_and_other_members_left_alone(tmp_path: Path) -> None:
    one, two = (np.full((1, 8, 6, 3), value, np.uint8) for value in (1, 2))
    np.savez(tmp_path / "x.npz", images=two, x=one, labels=np.array([object()]))
    assert (load(tmp_path / "x.npz") == 1).all()


def test_npz_is_resized_with_one_notice(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.full((3, 16, 16, 4), 255, np.uint8))
    events: list[Event] = []
    assert (load(tmp_path / "x.npz", progress=events.append) == 255).all()
    (text,) = notices(events)
    assert "3 of 3 images" in text
    assert "16x16" in text


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 8, 6, 3), np.float32), "uint8"),
        (np.zeros((2, 8, 6, 3), np.int64), "uint8"),
        (np.zeros((2, 8, 6, 3), bool), "uint8"),
        (np.zeros(2, [("a", np.uint8)]), "uint8"),
        (np.array([{"a": 1}], dtype=object), "never unpickled"),
        (np.zeros((8, 6, 3), np.uint8), "shape [8, 6, 3]"),
        (np.zeros((2, 8, 6, 5), np.uint8), "shape [2, 8, 6, 5]"),
        (np.zeros((0, 8, 6, 3), np.uint8), "shape [0, 8, 6, 3]"),
        (np.zeros((), np.uint8), "shape []"),
    ],
)
def test_npz_of_the_wrong_kind(tmp_path: Path, array: Any, says: str) -> None:
    np.savez(tmp_path / "x.npz", x=array)
    assert says in refused(tmp_path / "x.npz", UsageError)


def test_npz_without_a_known_key(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x_train=np.zeros((2, 8, 6, 3), np.uint8))
    assert "x or images or arr_0" in refused(tmp_path / "x.npz", UsageError)


def write_member(path: Path, header: str, body: bytes, version: bytes = b"\x01\x00") -> Path:
    line = header.encode() + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY" + version + struct.pack("<H", len(line)) + line + body)
    return path


def header_of(shape: str, descr: str = "'|u1'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


def test_npz_size_is_capped_by_the_zip_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", np.zeros((2, 8, 6, 3), np.uint8))
    monkeypatch.setattr(images_module, "NPZ_BYTES_LIMIT", 300)
    assert "more than 300 bytes" in refused(tmp_path / "x.npz", UsageError)


@pytest.mark.parametrize("shape", ["(1000000, 4096, 4096, 3)", "(1, 8, 6, 3)", "(3, 8, 6, 3)"])
def test_npz_header_has_to_agree_with_the_stored_size(tmp_path: Path, shape: str) -> None:
    assert "damaged" in refused(write_member(tmp_path / "x.npz", header_of(shape), bytes(2 * 8 * 6 * 3)))


@pytest.mark.parametrize(
    "header",
    [
        header_of("(-1, -8, 6, 3)"),
        header_of("(2, 8, 6, 3)", "'|O'"),
        header_of("(2, 8, 6, 3)", "[('a', '|u1')]"),
        header_of("(True, 'a', 6, 3)"),
        "{'descr': '|u1'}",
        "__import__('os').abort()",
        "[" * 500,
        "{'descr': '|u1', 'fortran_order': False, 'shape': " + "-" * 900 + "1}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': " + "-" * 60000 + "1}",
        "",
    ],
)
def test_hostile_npz_headers(tmp_path: Path, header: str) -> None:
    path = write_member(tmp_path / "x.npz", header, bytes(2 * 8 * 6 * 3))
    assert "x.npz" in outcome(path)


def test_npz_of_a_later_header_version(tmp_path: Path) -> None:
    path = write_member(tmp_path / "x.npz", header_of("(2, 8, 6, 3)"), bytes(288), version=b"\x02\x00")
    assert "numpy.savez" in refused(path)


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_npz_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "x.npz"
    np.savez_compressed(path, (np.arange(288) % 256).astype(np.uint8).reshape(2, 8, 6, 3))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    message = outcome(path)
    assert not message or "x.npz" in message


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04", b"\x80\x04."])
def test_npz_that_is_no_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    assert "x.npz" in refused(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_what_is_no_image_is_said_without_names_of_our_classes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    message = refused(tmp_path)
    assert f"image '{tmp_path}/x.png': cannot be read (empty, or no PNG, JPEG" in message
    assert "<" not in message


# --- Hugging Face datasets -------------------------------------------------------------------------------


class FakeImageFeature:
    pass


class FakeStream:
    """The part of `datasets.IterableDataset` that is used."""

    def __init__(self, rows: list[Any], features: dict[str, object] | None) -> None:
        self.rows, self.features = rows, features

    def select_columns(self, names: list[str]) -> "FakeStream":
        rows = [
            row if isinstance(row, Exception) else {name: row[name] for name in names} for row in self.rows
        ]
        return FakeStream(rows, self.features)

    def take(self, count: int) -> "FakeStream":
        return FakeStream(self.rows[:count], self.features)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            yield row


FEATURES: dict[str, object] = {"label": object(), "img": FakeImageFeature(), "thumbnail": FakeImageFeature()}


def fake_datasets(
    monkeypatch: pytest.MonkeyPatch, rows: list[Any], features: dict[str, object] | None = FEATURES
) -> list[Any]:
    """Install the stand-in; the list it returns receives the arguments of each call."""
    calls: list[Any] = []

    def load_dataset(name: str, **options: Any) -> FakeStream:
        calls.append((name, options))
        if rows and isinstance(rows[0], BaseException) and features is None:
            raise rows[0]
        return FakeStream(rows, features)

    module = types.ModuleType("datasets")
    module.Image, module.load_dataset = FakeImageFeature, load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def row(value: int, mode: str = "RGB") -> dict[str, Any]:
    colour = value if mode == "L" else (value, value, value)
    return {"label": value, "img": Image.new(mode, (6, 8), colour), "thumbnail": None}


@pytest.mark.parametrize("source", ["owner/some-data.v2", "cifar10"])
def test_dataset_gives_its_first_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    calls = fake_datasets(monkeypatch, [row(i, mode) for i, mode in enumerate(["RGB", "L", "RGB", "L"])])
    assert load(source, limit=3)[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert calls == [(source, {"split": "train", "streaming": True})]
    assert len(load(source, limit=50)) == 4


def test_what_is_on_disk_goes_before_a_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    calls = fake_datasets(monkeypatch, [])
    save(tmp_path / "owner" / "data" / "x.png")
    assert len(load("owner/data")) == 1
    assert calls == []


def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install gfprune[data]" in refused("owner/data", UsageError)


def test_dataset_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("403 for https://host/file.parquet?X-Signature=secret at host\nmore lines")
    fake_datasets(monkeypatch, [error], features=None)
    asked_of_the_hub(monkeypatch, None)
    message = refused("owner/data")
    assert "owner/data" in message
    assert "https://host/file.parquet at host" in message
    assert "secret" not in message


def asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, answer: Exception | None) -> list[str]:
    """The network is there, and the Hub answers like this; the names that it was asked for."""
    asked: list[str] = []

    def dataset_info(self: object, name: str, *, timeout: float) -> None:
        asked.append(name)
        if answer is not None:
            raise answer

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    return asked


NO_ANSWER: Any = HfHubHTTPError.__mro__[1]  # of the HTTP library that the Hub's client is built on


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (RepositoryNotFoundError("x", response=Mock()), UsageError, "no data set of that name"),
        (NO_ANSWER("refused"), UsageError, "the Hub cannot be asked"),
    ],
)
def test_a_mistyped_folder_costs_one_request(
    monkeypatch: pytest.MonkeyPatch, answer: Exception, kind: type[GfpruneError], words: str
) -> None:
    """The library of data sets would repeat its questions for half a minute, and blame the network."""
    calls, asked = fake_datasets(monkeypatch, []), asked_of_the_hub(monkeypatch, answer)
    assert words in refused("owner/data", kind)
    assert (asked, calls) == (["owner/data"], [])


@pytest.mark.parametrize(
    "answer",
    [None, GatedRepoError("x", response=Mock()), HfHubHTTPError("x", response=Mock())],
)
def test_a_dataset_that_is_there_is_opened(monkeypatch: pytest.MonkeyPatch, answer: Exception | None) -> None:
    """One that needs a token as well, and one on a mirror that knows no such question."""
    fake_datasets(monkeypatch, [row(7)])
    asked_of_the_hub(monkeypatch, answer)
    assert len(load("owner/data")) == 1


def test_offline_a_dataset_that_is_not_in_the_cache_is_a_wrong_value(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [RuntimeError("offline")], features=None)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    assert "offline" in refused("owner/data", UsageError)


def test_an_entry_of_a_folder_that_is_there_is_no_dataset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    calls, asked = fake_datasets(monkeypatch, [row(0)]), asked_of_the_hub(monkeypatch, None)
    assert "no such folder" in refused("photos/train", UsageError)
    assert (asked, calls) == ([], [])


@pytest.mark.parametrize("features", [None, {}, {"label": object()}])
def test_dataset_without_an_image_column(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, object] | None
) -> None:
    fake_datasets(monkeypatch, [], features)
    assert "no image column" in refused("owner/data", UsageError)


def test_dataset_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [])
    assert "no image" in refused("owner/data", UsageError)


def test_dataset_row_without_an_image_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [row(0), {**row(1), "img": None}])
    assert "row 1 of dataset 'owner/data'" in refused("owner/data")


class ForeignError(Exception):
    """A type that only the dataset library knows."""


@pytest.mark.parametrize(
    "error",
    [ForeignError("connection reset"), OSError("image file is truncated"), Image.DecompressionBombError()],
)
def test_dataset_row_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fake_datasets(monkeypatch, [row(0), error])
    assert "row 1 of dataset 'owner/data'" in refused("owner/data")
    assert len(load("owner/data", limit=1)) == 1


def test_dataset_row_of_floats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [{**row(0), "img": Image.new("F", (6, 8), 0.5)}])
    assert "floats" in refused("owner/data")


# --- requests that cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "",
        "gone/",
        "/gone",
        "./gone",
        "../gone",
        "a/b/c",
        "gone.npz",
        "owner/gone.npz",
        "a b",
        "~nobody-x/y",
        "x" * 5000,
    ]
    + ["null\0byte", "two\nlines", "-flag", "https://host/data"],
)
def test_no_such_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    fake_datasets(monkeypatch, [row(0)])
    assert "no such folder" in refused(source, UsageError)


def test_single_image_is_not_a_source(tmp_path: Path) -> None:
    assert "give its folder" in refused(save(tmp_path / "x.png"), UsageError)


@pytest.mark.parametrize("channels", [0, 2, 4, 16])
def test_other_channel_counts_are_for_latent_models(tmp_path: Path, channels: int) -> None:
    save(tmp_path / "x.png")
    message = refused(tmp_path, UsageError, channels=channels)
    assert "latent" in message
    assert "VAE" in message
    assert str(channels) in message


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -1}, {"size": (0, 8)}, {"size": (8, -2)}])
def test_sizes_and_limits_start_at_one(tmp_path: Path, options: dict[str, Any]) -> None:
    save(tmp_path / "x.png")
    assert "at least 1" in refused(tmp_path, UsageError, **options)


# --- what is done with images ----------------------------------------------------------------------------


def test_model_range_is_exact_at_both_ends_and_invertible() -> None:
    scaled = to_model_range(torch.arange(256, dtype=torch.uint8))
    assert scaled.dtype == torch.float32
    assert (scaled[0].item(), scaled[255].item()) == (-1.0, 1.0)
    assert torch.equal(((scaled + 1) * 127.5).round().to(torch.uint8), torch.arange(256, dtype=torch.uint8))


def test_model_range_refuses_what_is_scaled_already() -> None:
    with pytest.raises(GfpruneError, match="uint8"):
        to_model_range(torch.zeros(2))


def test_fingerprint_depends_on_shape_and_bytes_only() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    name = fingerprint(images)
    assert len(name) == 64
    assert int(name, 16) >= 0
    assert name == fingerprint(images.contiguous(memory_format=torch.channels_last))
    assert name != fingerprint(images.view(3, 2, 4, 4))
    assert name != fingerprint(images.flip(0))
    assert fingerprint(images[:0]) != fingerprint(images[:0, :1])


def test_datasets_is_not_imported_for_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    save(tmp_path / "x.png")
    assert len(load(tmp_path)) == 1
