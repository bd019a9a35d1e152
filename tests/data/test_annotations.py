"""Captions and classes that come with a user's images: which image they go with, and what is said else."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gfprune_cli.data.annotations import class_labels
from gfprune_cli.data.hub_dataset import PEEKED
from gfprune_cli.data.image_source import ImageSource
from gfprune_cli.data.images import open_images
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.progress import Event, silent


def pictures(folder: Path, *names: str) -> Path:
    """Images whose red value is their number."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / name)
    return folder


def table(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def paired(source: ImageSource) -> dict[int, str]:
    """Number of an image -> what is said of it, of the images that are really read."""
    images = torch.cat(list(source.batches(size=(4, 4), channels=3, batch=2, progress=silent)))
    assert source.said is not None
    return dict(zip(images[:, 0, 0, 0].tolist(), source.said, strict=True))


def test_captions_go_with_the_image_that_their_table_names(tmp_path: Path) -> None:
    """Tables of both kinds, in any order of lines, in subfolders and for files there; in a subset, too."""
    pictures(tmp_path, "a.png", "b/c.png", "b/d.png", "e.png")
    table(
        tmp_path / "metadata.jsonl", dict(file_name="e.png", text=" e "), dict(file_name="./a.png", text="a")
    )
    (tmp_path / "b" / "metadata.csv").write_text('file_name,caption\nd.png,"d, d"\nc.png,c\n', "utf-8")
    told: list[Event] = []
    whole = open_images(str(tmp_path), limit=9, about="captions", progress=told.append)
    assert paired(whole) == {0: "a", 1: "c", 2: "d, d", 3: "e"}
    assert told == [], "the tables are no unknown files"
    for seed in range(3):
        part = paired(open_images(str(tmp_path), limit=2, seed=seed, about="captions"))
        assert len(part) == 2
        assert part.items() <= paired(whole).items()


def test_images_without_a_caption_are_left_out_and_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    several = [dict(file_name="a.png", captions=["first", "second"]), dict(file_name="b.png", captions=None)]
    table(tmp_path / "metadata.jsonl", *several, dict(file_name="not there.png", captions=["x"]))
    told: list[Event] = []
    found = open_images(str(tmp_path), limit=9, about="captions", progress=told.append)
    assert paired(found) == {0: "first"}
    assert [event.text for event in told] == ["2 of 3 images have no captions and are left out"]


def test_classes_are_the_folders_that_images_lie_in_unless_a_table_says(tmp_path: Path) -> None:
    pictures(tmp_path, "train/cat/1.png", "train/dog/1.png", "train/cat/2.png")
    assert paired(open_images(str(tmp_path), limit=9, about="classes")) == {0: "cat", 1: "dog", 2: "cat"}
    rows = [
        dict(file_name=f"train/{name}.png", label=n) for n, name in enumerate(("cat/1", "dog/1", "cat/2"))
    ]
    table(tmp_path / "metadata.jsonl", *rows)
    assert paired(open_images(str(tmp_path), limit=9, about="classes")) == {0: "0", 1: "1", 2: "2"}
    assert open_images(str(tmp_path), limit=9, about="captions").said is None
    assert open_images(str(tmp_path), limit=9).said is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"file_name": "a.png", "text": "a"}\n{"text": "b"}\n', "entry 2: no file_name"),
        ('{"file_name": "a.png", "text": 3}\n', "entry 1: captions that are int"),
        ('{"file_name": "a.png", "text": "a"\n', "entry 1: "),
        ("[1]\n", "entry 1: "),
        ("\xff\n", "entry 1: "),
        (json.dumps({"file_name": "a.png", "text": "a" * 5000}), "entry 1: a text of more than"),
    ],
)
def test_a_damaged_table_is_named_with_the_entry(tmp_path: Path, content: str, said: str) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(GfpruneError, match=r"metadata\.jsonl is damaged at") as caught:
        open_images(str(tmp_path), limit=9, about="captions")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_follow_from_the_names_of_classes() -> None:
    """Numbers are taken as such, so that folders 10 and 9 are not turned round; then the pipeline's names."""
    assert class_labels(["10", "9", "10"], ["10", "9"], 11, {})[0] == [10, 9, 10]
    assert class_labels(["dog", "cat"], None, 1000, {"cat": 281, "dog": 207})[0] == [207, 281]
    labels, how = class_labels(["dog", "cat", "dog"], ["cat", "dog"], 2, {"cow": 281})
    assert labels == [1, 0, 1]
    assert "in their order: 'cat' is 0, 'dog' is 1" in how
    for names in (["2"], ["a", "b", "c"]):
        with pytest.raises(UsageError, match="2 classes"):
            class_labels(names, names, 2, {})


@pytest.mark.parametrize("names", [["tench", "goldfish", "goldfsh"], ["0", "1", "goldfsh"]])
def test_one_misspelt_class_is_named_and_does_not_relabel_the_others(names: list[str]) -> None:
    known = {"tench": 0, "goldfish": 1}
    with pytest.raises(UsageError, match="others are not: 'goldfsh'"):
        class_labels(names, names, 1000, known)


def test_classes_of_a_part_have_the_labels_that_they_have_in_the_whole(tmp_path: Path) -> None:
    """However many images are taken, and whichever."""
    pictures(tmp_path, *(f"n{number:02}/{image}.png" for number in range(12) for image in range(2)))
    for limit, seed in ((24, 0), (5, 1), (3, 2)):
        source = open_images(str(tmp_path), limit=limit, seed=seed, about="classes")
        assert source.said is not None
        labels, _ = class_labels(source.said, source.classes, 12, {})
        assert labels == [int(name.removeprefix("n")) for name in source.said]


def test_the_order_of_lines_and_kinds_of_tables_do_not_change_labels(tmp_path: Path) -> None:
    """Those of a CSV file are texts; -1 says that there is none."""
    pictures(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\nc.png,10\nb.png,-1\na.png,2\n", "utf-8")
    source = open_images(str(tmp_path), limit=9, about="classes")
    assert paired(source) == {0: "2", 2: "10"}
    assert class_labels(source.said or (), source.classes, 11, {})[0] == [2, 10]


class Stream(list[dict[str, Any]]):
    """The part of `datasets.IterableDataset` that is used."""

    features: dict[str, object]

    def select_columns(self, names: list[str]) -> "Stream":
        found = Stream({name: row[name] for name in names} for row in self)
        found.features = self.features
        return found

    def take(self, count: int) -> Iterator[dict[str, Any]]:
        return iter(self[:count])


def dataset(monkeypatch: pytest.MonkeyPatch, entries: list[dict[str, Any]]) -> Stream:
    """What `datasets` loads: images with these entries beside them."""
    kind = type("Image", (), {})
    rows = Stream(dict(img=Image.new("RGB", (4, 4), (0, 0, 0))) | entry for entry in entries)
    rows.features = {"img": kind(), **dict.fromkeys(entries[0], object())}
    module = types.ModuleType("datasets")
    module.Image, module.load_dataset = kind, lambda *names, **options: rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return rows


def test_a_dataset_gives_the_column_beside_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("Image", (), {})
    module = types.ModuleType("datasets")
    rows = Stream(
        dict(img=Image.new("RGB", (4, 4), (number, 0, 0)), caption=text, label=number - 1)
        for number, text in enumerate(("a", None, "c", "d"))
    )
    rows.features = {"label": object(), "img": kind(), "caption": object()}
    module.Image, module.load_dataset = kind, lambda *names, **options: rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    told: list[Event] = []
    found = open_images("owner/data", limit=2, about="captions", progress=told.append)
    assert paired(found) == {0: "a", 2: "c"}
    said = [event.text for event in told if event.phase == "notice"]
    assert said == ["1 rows of 'owner/data' have no captions and are left out"]
    assert paired(open_images("owner/data", limit=9, about="classes")) == {1: "0", 2: "1", 3: "2"}
    del rows.features["label"]
    assert open_images("owner/data", limit=9, about="classes").said is None


def test_classes_of_a_dataset_have_their_names_and_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's labels where it knows them all, else the dataset's numbers; texts alone say neither."""
    rows = dataset(monkeypatch, [dict(label=number) for number in (1, 0, 1)])
    rows.features["label"] = types.SimpleNamespace(names=["dog", "cat"])
    source = open_images("owner/data", limit=2, about="classes")
    assert source.said == ("cat", "dog")
    assert class_labels(source.said, source.classes, 1000, {"cat": 281, "dog": 207})[0] == [281, 207]
    assert class_labels(source.said, source.classes, 2, {})[0] == [1, 0]
    dataset(monkeypatch, [dict(label=name) for name in ("dog", "cat")])
    source = open_images("owner/data", limit=2, about="classes")
    with pytest.raises(UsageError, match="have to be numbers, ClassLabel, or names"):
        class_labels(source.said or (), source.classes, 2, {})


def test_a_dataset_that_starts_without_classes_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset(monkeypatch, [dict(label=-1)] * (PEEKED + 10))
    told: list[Event] = []
    assert open_images("owner/data", limit=2, about="classes", progress=told.append).said is None
    assert sum(event.phase == "load" for event in told) == PEEKED
