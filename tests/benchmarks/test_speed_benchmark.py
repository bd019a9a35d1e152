"""The benchmark of speed at toy size: tables have their rows, the page says where its numbers come from."""

import json
import sys
from pathlib import Path

import pytest
import torch

import gfprune_cli

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import provenance
import speed

LIMIT = speed.Limit(share=0.8, products=1.2, profiled=0.75)
TOY = dict(one_shot=True, refit=False, recover=0, images=4, sample_steps=2, draws=4)


def rows_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its two lines of head; every row is as wide as the head."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert {len(line) for line in lines} == {len(lines[0])}
    return lines[2:]


@pytest.fixture(scope="module")
def folders(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("speed")
    out = root / "macs-0.44"
    gfprune_cli.prune(str(pipeline_folder), out=out, budget="macs", sparsity=0.44, **TOY)
    return [out]


def test_the_share_is_the_latency_gain_over_the_mac_gain(pipeline_folder: Path, folders: list[Path]) -> None:
    rows = speed.latency_gains(str(pipeline_folder), folders, ["eager"], [1, 2], rounds=3)
    assert [(row.batch, row.budget, row.sparsity) for row in rows] == [(1, "macs", 0.44), (2, "macs", 0.44)]
    macs = json.loads((folders[0] / "gfprune.json").read_text())["macs"]
    for row in rows:
        assert row.mac_ratio == macs["before"] / macs["after"]
        assert row.low <= row.speedup <= row.high
        assert row.share == pytest.approx(row.speedup / row.mac_ratio)
    cells = rows_of(speed.gains_table(rows, [LIMIT] * 2))
    assert [row[1] for row in cells] == ["1", "2"]
    assert [float(row[-3]) for row in cells] == [round(row.share, 2) for row in rows]
    assert [row[-2:] for row in cells] == [["0.80", "1.20x"]] * 2


def test_calls_take_turns_in_both_orders() -> None:
    order: list[int] = []
    times = speed.interleaved([lambda: order.append(0), lambda: order.append(1)], rounds=2)
    assert order == [0, 1, 1, 0, 0, 1, 1, 0]
    assert [len(values) for values in times] == [2, 2]


def test_time_is_told_apart_by_what_operators_do() -> None:
    kinds = {
        "aten::mkldnn_convolution": "products",
        "aten::addmm": "products",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "products",
        "aten::native_group_norm": "elementwise",
        "aten::silu": "elementwise",
        "aten::copy_": "elementwise",
        "aten::view": "dispatch",
        "aten::t": "dispatch",
    }
    assert {name: speed.kind_of("eager", name) for name in kinds} == kinds
    kinds = {"conv": "products", "fusedgemm": "products", "transpose": "elementwise", "reshape": "dispatch"}
    assert {name: speed.kind_of("onnx", name) for name in kinds} == kinds


@pytest.mark.thorough  # shares and limits have tests
def test_where_the_time_goes_is_profiled_in_every_runtime(pipeline_folder: Path, folders: list[Path]) -> None:
    rows = speed.latency_gains(str(pipeline_folder), folders, ["eager", "onnx"], [1], rounds=2)
    table, limits = speed.profile_tables(str(pipeline_folder), folders, rows, 1)
    cells = rows_of(table)
    assert [row[:3] for row in cells] == [
        [runtime, "1", name] for runtime in ("eager", "onnx") for name in ("dense", "macs-0.44")
    ]
    assert all(float(cell) >= 0 for row in cells for cell in row[3:])
    assert all(float(row[3]) > 0 for row in cells)
    assert len(limits) == len(rows)
    assert all(limit.products > 0 for limit in limits)


def test_a_limit_is_what_is_left_when_products_follow_the_macs() -> None:
    dense, pruned = dict(products=8.0, elementwise=2.0), dict(products=6.0, elementwise=1.0)
    assert speed.limit_of(dense, pruned, 2.0) == speed.Limit(
        10 / (4 + 1) / 2, products=6 / 4, profiled=10 / 7 / 2
    )


def test_scoring_is_counted_in_gradients(pipeline_folder: Path) -> None:
    names = ["magnitude", "taylor", "gradient-flow-abs"]
    cells = rows_of(speed.scoring_table(str(pipeline_folder), names, draws=4, repeats=1, seed=0))
    counted = [float(row[1]) for row in cells]
    assert [row[0].strip("`") for row in cells] == names
    assert counted[0] == 0
    assert counted[0] < counted[1] < counted[2]


def test_a_run_in_its_own_process_reports_memory_and_phases(tmp_path: Path) -> None:
    model = speed.random_pipeline(tmp_path / "random", 8, seed=0)
    settings = dict(images=4, iterations=1, draws=4, recover=1)
    found = speed.footprint(str(model), tmp_path, seed=0, **settings)
    assert found.params == sum(p.numel() for p in gfprune_cli.load(model).parameters())
    assert (found.images, found.peak > 0) == (4, True)
    phases = {"loading", "calibration", "check", "scoring", "refit", "removal", "recovery", "writing"}
    assert phases <= set(found.phases)
    (cache,) = tmp_path.glob("cache-*")  # its own, so that images are drawn for each row
    assert list(cache.rglob("*.safetensors"))
    (row,) = rows_of(speed.footprint_table([found]))
    assert row[1] == "4"
    speed.plot_growth([found, found], tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_text().startswith("<?xml")


def test_plots_repeat_and_the_page_says_where_its_numbers_come_from(tmp_path: Path) -> None:
    gains = [speed.Gain("eager", batch, "macs", 0.5, 2.0, 10.0, 6.0, 1.7, 1.6, 1.8) for batch in (1, 16)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        speed.plot_gains(gains, tmp_path / name / "gains.svg")
    assert (tmp_path / "a" / "gains.svg").read_bytes() == (tmp_path / "b" / "gains.svg").read_bytes()
    text = speed.page(
        "python benchmarks/speed.py --quick", 7, {"Latency": speed.gains_table(gains, [LIMIT] * 2)}
    )
    head = provenance.header("python benchmarks/speed.py --quick", 7)
    assert head in text
    for part in ("`python benchmarks/speed.py --quick`", "seed: 7", torch.__version__, "cores", "date: 20"):
        assert part in head
    assert "## Latency" in text
