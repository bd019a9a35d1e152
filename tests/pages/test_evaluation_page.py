"""The page and the Markdown of an evaluation: self-contained, escaped, complete, nothing made up."""

import base64
import copy
import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gfprune_cli.pages.evaluation_page import markdown, render
from gfprune_cli.pages.evaluation_tables import literal, number

HOSTILE = (
    "</title></svg><script>alert(1)</script>\"'><img src=x onerror=alert(1)>$x$&amp;\x00\ud800é|`a`\n\n# b"
)
VOID = {"meta", "img"}
PARTS = {
    "metrics": "Metrics",
    "loss_by_timestep": "Loss by timestep",
    "latency": "Latency",
    "gates": "Gates",
    "fold": "Modulation folding",
}


def png(colour: int, width: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 8), (colour, 10, 20)).save(file, "PNG")
    return file.getvalue()


GRID = [(png(1), png(2)), (png(3), png(4))]


def make() -> dict[str, Any]:
    bins = [
        {"from": 100 * k, "to": 100 * k + 99, "loss": 0.5 / 3**k, "loss_reference": 0.4 / 3**k, "n": 51 + k}
        for k in range(4)
    ]
    rows = [
        ("eager", 1, 11.25, 15.75, 1.4, 2.75),
        ("eager", 64, 212.5, 531.5, 2.501, 2.75),
        ("compile", 64, 181.5, 401.5, 2.212, 2.75),
        ("deepcache", 64, 91.5, 531.75, 5.811, 6.25),
    ]
    return {
        "schema_version": 1,
        "command": "eval",
        "model": "runs/pruned",
        "reference": "org/dense",
        "component": "unet",
        "class_name": "PrunedUNet2DModel",
        "samples": {
            "count": 256, "steps": 20, "sampler": "ddim", "timestep_spacing": "quad", "eta": 0.25,
            "seed": 12345, "protocol": "ddpm-cifar10", "fid_mode": "clean",
        },
        "metrics": {
            "ssim": {"value": 0.8125, "ci95": [0.7812, 0.8438], "n": 256},
            "fid": {"value": 5.125, "ci95": None, "n": 255, "weights_of": "legacy_pytorch"},
            "loss": {"value": 0.03442, "ci95": None, "n": 512},
            "loss_reference": {"value": 0.02894, "ci95": None, "n": 511},
        },
        "loss_by_timestep": bins,
        "latency": [
            {
                "mode": mode, "batch": batch, "ms": ms, "ms_reference": before, "spread": [ms - 1, ms + 1],
                "spread_reference": [before - 1, before + 1], "speedup": speedup, "mac_ratio": ratio,
            }
            for mode, batch, ms, before, speedup, ratio in rows
        ],
        "params": {"model": 869_251, "reference": 1_740_323},
        "macs": {"model": 80_160_209, "reference": 220_440_576},
        "bytes": {"model": 3_499_764, "reference": 6_984_148},
        "memory": {"model": 28_744_524, "reference": 32_229_580, "what": "bytes of one forward pass"},
        "gates": [
            {"name": "max-fid", "limit": 4.5, "value": 5.125, "passed": False},
            {"name": "min-speedup", "limit": 1.5, "value": 2.501, "passed": True},
        ],
        "warnings": ["fewer samples than features"],
        "fold": {
            "layers": 15, "tolerance": 0.01, "layer_error": 0.0088, "output_error": 0.0021,
            "params": {"before": 1_740_323, "after": 1_669_659},
        },
        "device": "cpu (2 threads)",
        "tools": {"gfprune": "0.1.0", "torch": "2.13.0", "clean-fid": None},
        "seconds": 141.7,
    }  # fmt: skip


def without_reference() -> dict[str, Any]:
    document = make()
    document["reference"] = None
    for key in ("params", "macs", "bytes", "memory"):
        document[key]["reference"] = None
    for row in document["latency"]:
        row |= {"ms_reference": None, "spread_reference": None, "speedup": None, "mac_ratio": None}
    for row in document["loss_by_timestep"]:
        row["loss_reference"] = None
    del document["metrics"]["ssim"], document["metrics"]["loss_reference"]
    return document


class Outline(HTMLParser):
    """Tags with their attributes, and the text outside style and plots; every tag must close in turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def checked(page: str) -> Outline:
    """The page's outline, once it is known to be whole and to ask for nothing outside itself."""
    outline = Outline(page)
    assert outline.open == []
    names = {tag for tag, _ in outline.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "image", "form"}
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in outline.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert not {"srcset", "xmlns", "xlink:href"} & set(attributes)
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert (attributes.get("href") or "#").removeprefix("#") in ["", *ids]
    for target in re.findall(r"url\(([^)]*)\)", page):
        assert target.removeprefix("#") in ids
    assert "@import" not in page
    page.encode("utf-8")
    return outline


def numbers_of(document: dict[str, Any]) -> list[str]:
    """Every measured figure, as the tables write it."""
    found = []
    for metric in document["metrics"].values():
        found += [metric["value"], *(metric["ci95"] or []), metric["n"]]
    for row in document["latency"]:
        found += [row["batch"], row["ms"], *row["spread"]]
        if row["ms_reference"] is not None:
            found += [row["ms_reference"], *row["spread_reference"]]
    for row in document["loss_by_timestep"]:
        found += [row["from"], row["to"], row["loss"], row["n"]]
        found += [row["loss_reference"]] if row["loss_reference"] is not None else []
    for gate in document["gates"]:
        found += [gate["limit"], gate["value"]]
    for key in ("params", "macs", "bytes", "memory"):
        found += [value for value in document[key].values() if isinstance(value, int)]
    return [number(value) for value in found]


# --- the page --------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [make(), without_reference()], ids=["compared", "alone"])
def test_every_number_is_on_the_page_and_in_the_markdown(document: dict[str, Any]) -> None:
    page, text = checked(render(document, GRID)).text, markdown(document)
    plain = text.replace("\\", "")
    for figure in numbers_of(document):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", page), figure
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", plain), figure
    for words in (
        "runs/pruned", "PrunedUNet2DModel", "fewer samples than features", "quad", "12345", "cpu (2 threads)",
        "ddpm-cifar10", "0.25", "142 s", "2.13.0", "weights of legacy_pytorch", "fid mode",
        "bytes of one forward pass",
    ):  # fmt: skip
        assert words in page
        assert words in plain


def test_comparison_is_spelled_out() -> None:
    page = checked(render(make())).text
    for words in (
        "compared with org/dense", "49.9 % of 1.74 M", "1 of 2 missed", "FID missed 5.125 at most 4.5",
        "speed-up passed 2.501 at least 1.5", "2.50× eager, batch 64; MACs promise 2.75×", "5.81× 6.25×",
        "latency, DeepCache, batch 64 17.2 % 91.5 of 532 ms", "+25.0 %", "torch.compile",
    ):  # fmt: skip
        assert words in page


def test_what_folding_cost_is_on_the_page_and_in_the_markdown() -> None:
    page, text = checked(render(make())).text, markdown(make())
    for name, value in (
        ("layers folded", "15"), ("parameters", "1.74 M to 1.67 M"), ("tolerance of each layer", "1.00 %"),
        ("error of the worst layer", "0.88 %"), ("error of the network's output", "0.21 %"),
    ):  # fmt: skip
        assert f"{name} {value}" in page
        assert f"| {name} | {value} |" in text
    assert "Modulation folding" not in checked(render(make() | {"fold": None})).text


def test_pictures_are_inside_and_in_order() -> None:
    images = checked(render(make(), GRID)).all("img")
    found = [base64.b64decode((image["src"] or "").partition(",")[2]) for image in images]
    assert found == [image for images in GRID for image in images]
    assert [image["alt"] for image in images] == [
        f"image {index}, {side}" for index in range(2) for side in ("reference", "model")
    ]


@pytest.mark.parametrize(("width", "small"), [(32, True), (128, True), (256, False)])
def test_only_small_pictures_keep_their_pixels_square(width: int, small: bool) -> None:
    page = render(make(), [(png(1, width), png(2, width))])
    assert ('class="gallery small"' in page) == small


def test_pictures_of_the_model_alone() -> None:
    outline = checked(render(without_reference(), [(b"", png(1)), (b"", png(2))]))
    assert [image["alt"] for image in outline.all("img")] == ["image 0, model", "image 1, model"]
    assert "reference on the left" not in outline.text


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["empty", "absent"])
def test_missing_parts_are_absent(part: str, how: str) -> None:
    whole, document = make(), make()
    if how == "absent":
        del document[part]
    else:
        document[part] = type(document[part])()
    before, after = (checked(render(made, GRID)) for made in (whole, document))
    heading = PARTS[part]
    assert f"{heading} " in before.text
    assert len(after.all("h2")) == len(before.all("h2")) - 1
    assert f"## {heading}\n" in markdown(whole)
    assert f"## {heading}\n" not in markdown(document)


def test_without_a_reference_nothing_is_compared() -> None:
    outline = checked(render(without_reference()))
    for words in ("compared", "reference", "speed-up 2", "MAC ratio", "in percent"):
        assert words not in outline.text
    assert outline.all("ul") == [{"class": "warnings"}]
    assert "Samples" not in [word.strip() for word in outline.words]
    assert "ompared with" not in markdown(without_reference())


def test_almost_nothing_is_still_a_page() -> None:
    document = {"model": "m", "samples": {}, "memory": {"model": None, "reference": None, "what": "x"}}
    outline = checked(render(document))
    assert "m" in outline.text
    assert outline.all("svg") == []
    assert "None" not in outline.text
    assert "None" not in markdown(document)
    assert "Size and work" not in markdown(document)


def test_sizes_of_the_model_only_beside_sizes_of_both() -> None:
    document = make()
    document["memory"]["reference"] = None
    assert "| peak memory | – | 28.7 MB | – | – | 28,744,524 |" in markdown(document)
    assert "peak memory" in checked(render(document)).text


def test_a_gate_that_could_not_be_measured_is_missed() -> None:
    document = make()
    document["gates"] = [{"name": "max-fid", "limit": 4.5, "value": None, "passed": False}]
    assert "1 of 1 missed" in checked(render(document)).text
    assert "| FID | missed | – | at most 4.5 |" in markdown(document)


def test_hostile_strings_are_text() -> None:
    document = make()
    for key in ("model", "reference", "class_name", "component", "device"):
        document[key] = HOSTILE
    document["samples"] |= {"sampler": HOSTILE, "protocol": HOSTILE, "timestep_spacing": HOSTILE}
    document["tools"] = {HOSTILE: HOSTILE}
    document["warnings"] = [HOSTILE]
    document["metrics"][HOSTILE] = {"value": 1.0, "ci95": None, "n": 3, HOSTILE: HOSTILE}
    document["memory"]["what"] = HOSTILE
    document["gates"].append({"name": HOSTILE, "limit": 1.0, "value": 2.0, "passed": False})
    document["latency"][0]["mode"] = HOSTILE
    outline = checked(render(document, GRID))
    assert len(outline.all("img")) == 2 * len(GRID)
    assert "<script>alert(1)</script>" in outline.text
    text = markdown(document)
    text.encode("utf-8")
    assert "<" not in text
    assert "\x00" not in text


@given(st.text())
@settings(max_examples=200)
def test_markdown_text_stays_in_its_cell(text: str) -> None:
    found = literal(text)
    assert "\n" not in found
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*_\[\]<>]", found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0123456, "0.01235"), (1234567, "1,234,567"), (12345.6, "12346"), (float("inf"), "∞"),
        (float("nan"), "not a number"), (1.0, "1"), (True, "True"), (-0.5, "-0.5"), (1e-7, "1e-07"),
    ],
)  # fmt: skip
def test_numbers_are_short_and_true(value: Any, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("loss", [0.0, -0.5, float("nan"), float("inf"), 1e9])
def test_odd_losses_are_drawn_or_left_out(loss: float) -> None:
    document = make()
    document["loss_by_timestep"][1]["loss"] = loss
    document["loss_by_timestep"][2]["loss_reference"] = 0.0
    assert number(loss) in checked(render(document)).text
    document["loss_by_timestep"] = [document["loss_by_timestep"][1] | {"loss_reference": loss}]
    checked(render(document))


def test_a_model_that_costs_more_is_shown_so() -> None:
    document = make()
    document["latency"][0] |= {"ms": 63.0, "speedup": 0.25}
    page = render(document)
    assert "400.0 %" in checked(page).text
    assert 'class="more" style="width: 100.00%"' in page
    assert 'style="left: 25.00%"' in page


def test_input_is_left_alone_and_output_repeats() -> None:
    document = make()
    before = copy.deepcopy(document)
    assert render(document, GRID) == render(document, GRID)
    assert markdown(document) == markdown(document)
    assert document == before


def test_markdown_tables_have_equal_rows() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", markdown(make()), flags=re.MULTILINE)
    assert len(tables) == 7
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
