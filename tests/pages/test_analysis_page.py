"""The page of an analysis: self-contained, safe with hostile names, the same for the same input."""

import copy
import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gfprune_cli.pages.analysis_page import render, section, shorten

HOSTILE = "</title></svg><script>alert(1)</script>\"'><img src=x onerror=alert(1)>$\\frac$&amp;\x00\ud800é"
VOID = {"meta", "rect", "br", "img", "link"}
NAMES = [
    "conv_in",
    "time_embedding.linear_1",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.1.attentions.0.transformer_blocks.3.ff.net.0.proj",
    "up_blocks.0.resnets.0.conv_shortcut",
    "mid_block.resnets.0.conv1",
]


def make(
    names: list[str], sparsities: tuple[float, ...] = (0.5, 0.25), measured: bool = True
) -> dict[str, Any]:
    groups = [
        {
            "name": name,
            "channels": 64 + 8 * number,
            "unit_size": 1,
            "params": 10_000 + number,
            "macs": 2_000_000 + number,
            "members": [{"module": f"{name}.member", "side": "in", "kind": "conv"}],
            "sensitivity": 0.01 * (number - 2) if measured else None,
        }
        for number, name in enumerate(names)
    ]
    plan = [
        {
            "sparsity": sparsity,
            "achieved": sparsity + 0.001,
            "params": int(1_234_567 * (1 - sparsity)),
            "macs": int(9_876_543_210 * (1 - sparsity)),
            "bytes": int(4_938_268 * (1 - sparsity)),
            "kept": {group["name"]: int(group["channels"] * (1 - sparsity)) for group in groups},
        }
        for sparsity in sparsities
    ]
    return {
        "schema_version": 1,
        "command": "analyze",
        "model": "org/model",
        "component": "unet",
        "class_name": "UNet2DModel",
        "params": 1_234_567,
        "macs": 9_876_543_210,
        "bytes": 4_938_268,
        "budget": "params",
        "groups": groups,
        "plan": plan,
    }


class Outline(HTMLParser):
    """Tags with their attributes, ids, and whether every tag is closed in turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
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

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def assert_self_contained(page: str) -> Outline:
    outline = Outline(page)
    assert outline.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "image"} & {
        t for t, _ in outline.tags
    }
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in outline.tags:
        assert not any(name.startswith("on") or name in ("src", "srcset", "xmlns") for name in attributes)
        for name in ("href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.removeprefix("#") in ids
    for target in re.findall(r"url\(([^)]*)\)", page):
        assert target.removeprefix("#") in ids
    assert "@import" not in page
    return outline


def test_shows_everything_in_one_file() -> None:
    page = render(make(NAMES))
    outline = assert_self_contained(page)
    assert not re.search(r"https?:|//[a-z]", page)
    assert outline.count("svg") == 4
    assert all(attributes.get("aria-label") for tag, attributes in outline.tags if tag == "svg")
    for name in NAMES:
        assert f"<summary>{name}</summary>" in page
        assert f"<li>{name}.member (conv, in)</li>" in page
    for number in ("1,234,567", "9,876,543,210", "1.23 M", "9.88 G", "4.94 MB", "2,000,005"):
        assert number in page
    assert "currentColor" in page
    assert "#010203" not in page


def test_order_is_that_of_the_data() -> None:
    page = render(make(NAMES))
    at = [page.index(f"<summary>{name}<") for name in (NAMES[0], NAMES[2], NAMES[5], NAMES[4])]
    assert at == sorted(at)


def test_hostile_names_are_text() -> None:
    document = make([HOSTILE, "a.$x_$.b", "fill: #010203"])
    document |= {"model": HOSTILE, "class_name": HOSTILE, "component": HOSTILE}
    page = render(document)
    assert_self_contained(page)
    page.encode("utf-8")
    assert "alert(1)</script>" not in page
    assert "<img" not in page
    assert html.escape("<script>alert(1)</script>") in page


def test_input_is_left_alone_and_output_is_the_same_anywhere(tmp_path: Path) -> None:
    import matplotlib

    document = make(NAMES)
    before = copy.deepcopy(document)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        settings = dict(matplotlib.rcParams)
        first = render(document)
        assert dict(matplotlib.rcParams) == settings
    assert document == before
    assert render(document) == first
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_analysis_page as t; "
    code += "t.Path(sys.argv[2]).write_text(t.render(t.make(t.NAMES)), encoding='utf-8')"
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    out = tmp_path / "page.html"
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(out)], env=environment, check=True
    )
    assert out.read_text(encoding="utf-8") == first


def test_without_plan_and_sensitivity() -> None:
    document = make(NAMES, sparsities=(), measured=False)
    page = render(document)
    outline = assert_self_contained(page)
    assert outline.count("svg") == 1
    assert "Planned widths" not in page
    assert "ensitivity" not in page
    del document["plan"]
    for group in document["groups"]:
        del group["sensitivity"]
    assert render(document) == page


def test_partly_measured() -> None:
    document = make(NAMES)
    document["groups"][1]["sensitivity"] = None
    document["groups"][2]["sensitivity"] = float("nan")
    page = render(document)
    assert_self_contained(page)
    assert page.count("<td>–</td>") == 2
    assert "-2.00 %" in page


def test_without_groups() -> None:
    page = render(make([]))
    assert_self_contained(page)
    assert "No channel of this network can be removed" in page


@pytest.mark.parametrize("count", [1, 300])
def test_any_number_of_groups(count: int) -> None:
    names = [f"transformer_blocks.{number // 4}.part_{number}" for number in range(count)]
    page = render(make(names, sparsities=(0.2, 0.3, 0.5)))
    assert_self_contained(page)
    assert all(f"<summary>{name}</summary>" in page for name in names)
    assert ("260 more, see the table" in page) == (count == 300)
    assert len(page) < 1_500_000


def test_an_empty_network_divides_by_nothing() -> None:
    document = make(NAMES[:1])
    document |= {"params": 0, "macs": 0, "bytes": 0}
    document["groups"][0] |= {"channels": 0, "params": 0, "macs": 0, "sensitivity": 0.0}
    assert_self_contained(render(document))


def test_short_names() -> None:
    assert shorten("down_blocks.2.resnets.0.conv1") == "down 2 · res 0 · conv1"
    assert len(shorten("layer." * 30)) <= 46
    assert section("mid_block.attentions.0.to_v") == "mid"
    assert section("transformer_blocks.11.attn1.to_v") == "block 11"


def test_matplotlib_waits_until_something_is_drawn() -> None:
    code = "import sys, gfprune_cli.pages.analysis_page; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
