"""The page of several networks shows what both commands found of each, and does without what they did not."""

import re
import struct
import zlib
from typing import Any

import pytest

from gfprune_cli.pages.networks_page import render


def pruned(sparsity: float, recovered: float | None) -> dict[str, Any]:
    pair = {"before": 1000, "after": round(1000 * (1 - sparsity))}
    return {
        "model": "<demo>", "class_name": "PrunedUNet2DModel", "component": "unet", "criterion": "taylor",
        "layout": "adaptive", "output": f"out-{sparsity:g}", "params": pair, "macs": pair, "bytes": pair,
        "sparsity": {"target": sparsity, "achieved": sparsity + 0.004},
        "loss": {"before": 0.0201, "removed": 0.0407, "recovered": recovered},
    }  # fmt: skip


def evaluated(*, whole: bool) -> dict[str, Any]:
    row = {"mode": "eager", "batch": 64, "ms": 50.25, "ms_reference": 100.5, "speedup": 2.0}
    return {
        "metrics": {"ssim": {"value": 0.6543}} if whole else {},
        "latency": [row, {**row, "batch": 1, "ms": 7.0}] if whole else [],
        "samples": {},
    }


def png() -> bytes:
    """One black pixel."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0\0")),
        (b"IEND", b""),
    ):
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows if "<td>" in row]


@pytest.mark.parametrize("whole", [True, False])
def test_every_network_has_a_row_and_its_samples(whole: bool) -> None:
    documents = [pruned(0.3, 0.0256 if whole else None), pruned(0.5, None)]
    grid = [(png(), png())] * 3 if whole else []
    page = render(documents, [evaluated(whole=whole)] * 2, [grid, grid])
    rows = cells(page)
    assert [row[0] for row in rows] == ["dense", "30 %", "50 %"]
    assert [row[4] for row in rows] == ["0.0201", "0.0256" if whole else "0.0407", "0.0407"]
    assert rows[1][5:8] == (["0.654", "50.2 ms", "50.0 %"] if whole else ["", "", ""])
    assert rows[2][8] == "out-0.5"
    assert page.count("<img") == (9 if whole else 0)
    assert ("SSIM over the sparsity" in page) == whole
    assert "&lt;demo&gt;" in page
    assert "<demo>" not in page
