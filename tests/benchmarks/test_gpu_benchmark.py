"""The GPU benchmark, at toy size on the CPU: what its page promises, and what a run that stops leaves."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gfprune_cli

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_networks  # noqa: E402
from own_process import in_a_process  # noqa: E402
from report_gpu import DENSE, METHODS, NO_FIGURE, NOT_MEASURED, PARTS, UNIFORM, Board, row  # noqa: E402

CPU = torch.device("cpu")
SECTIONS = [table.title for table in gpu.TOY.tables()]
COMMITTED = ROOT / "docs" / "benchmarks" / "gpu.md"


def sections(page: str) -> dict[str, list[list[str]]]:
    """Title -> rows of its table, the heading first."""
    found = {}
    for part in page.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|") and not line.startswith("|---")]
        found[part.splitlines()[0]] = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines
        ]
    return found


def figures(page: str) -> list[str]:
    """Every cell that is no heading and no name of a row."""
    return [cell for table in sections(page).values() for line in table[1:] for cell in line[1:]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit code and folder of a run of the first part."""
    folder = tmp_path_factory.mktemp("gpu") / "out"
    return gpu.main(["--toy", "--parts", "quality", "--out", str(folder)]), folder


@pytest.mark.thorough  # minutes on a card; its parts have tests
@pytest.mark.slow
def test_every_section_of_a_run_is_filled(toy: tuple[int, Path]) -> None:
    code, folder = toy
    others = gpu.main(["--toy", "--parts", *PARTS[1:], "--out", str(folder)])
    page = (folder / "gpu.md").read_text()
    assert code == others == 0, page
    found = sections(page)
    assert list(found) == SECTIONS
    label = next(iter(gpu.TOY.ratios))
    assert [line[0] for line in found["Quality"][1:]] == [DENSE, *(row(name, label) for name in METHODS)]
    for title, (heads, *lines) in found.items():
        assert lines, title
        for name, *cells in lines:
            assert len(cells) == len(heads) - 1
            assert NOT_MEASURED not in cells, (title, name)
    assert "failed" not in page


@pytest.mark.slow
def test_methods_are_compared_at_one_size_and_one_cost(toy: tuple[int, Path]) -> None:
    """No more than the peers' parameters and MACs, and the same gradients within a batch and a scoring."""
    cells = json.loads((toy[1] / "gpu.json").read_text())["tables"]
    label = next(iter(gpu.TOY.ratios))
    ours, theirs = (cells["latency"][row(name, label)]["macs share"] for name in ("gfprune", UNIFORM))
    assert ours <= theirs
    rows = [cells["quality"][row(name, label)] for name in METHODS]
    params = [found["params share"] for found in rows]
    assert params[0] <= max(params) < 0.5
    assert max(theirs - ours, max(params[1:]) - params[0]) > 0
    assert min(theirs - ours, max(params[1:]) - params[0]) <= 0.02  # one of the two is spent
    for found in rows:
        assert abs(found["gradients"] - gpu.TOY.gradients) < 2 * gpu.TOY.batch
        assert -1 <= found["ssim"] < 1
        assert found["fd_teacher"] > 0
    scoring = cells["scoring"]
    assert scoring["one gradient"]["gradients"] == 1
    assert scoring["Hessian product alone, finite differences"]["error"] < 0.05
    weights = cells["memory"][DENSE]
    assert weights["weights fp32"] == 2 * weights["weights bf16"]
    assert weights["pass 1"] > weights["weights fp32"]


def test_without_a_device_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_committed_page_has_the_rows_of_the_benchmark() -> None:
    """Measured or not; and what is not measured is not made up: figures on the page are those of the JSON."""
    tables = gpu.FULL.tables()
    cells = json.loads(COMMITTED.with_suffix(".json").read_text())["tables"]
    found = sections(COMMITTED.read_text())
    for table in tables:
        assert [line[0] for line in found[table.title][1:]] == list(table.rows)
        lines = [line for line in table.lines(cells.get(table.key, {})) if line.startswith("| ")]
        assert found[table.title] == [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@given(st.data())
def test_a_killed_run_leaves_what_it_had(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """After any numbers, in any order, the page holds them and only them."""
    tables = gpu.TOY.tables()
    places = [(table, name, column) for table in tables for name in table.rows for column in table.columns]
    chosen = data.draw(st.lists(st.sampled_from(places), max_size=8, unique_by=lambda place: id(place)))
    board = Board(tmp_path_factory.mktemp("board"), tables, ["head"])
    board.write()
    for table, name, column in chosen:
        board.put_all(table.key, name, {column.key: data.draw(st.sampled_from([None, 1.0]))})
    written = figures(board.page.read_text())
    assert sum(cell != NOT_MEASURED for cell in written) == len(chosen)
    known = [value for rows in board.cells.values() for found in rows.values() for value in found.values()]
    assert written.count(NO_FIGURE) == known.count(None)
    assert json.loads(board.page.with_suffix(".json").read_text())["tables"] == board.cells
    assert {path.suffix for path in board.folder.iterdir()} == {".md", ".json"}


def test_parts_that_are_not_run_stay_on_the_page(tmp_path: Path) -> None:
    """Numbers, where they are from and what was noted; the part that is run again begins empty."""
    tables = gpu.TOY.tables()
    first = Board(tmp_path, tables, ["- commit: first"], ["quality", "speed"])
    asked = next(table for table in tables if table.part == "speed").rows[0]
    first.put("quality", DENSE, loss=0.25)
    first.put("speed", asked, written=1.5)
    first.note("quality", "a note about quality")
    first.note("speed", "a note about speed")
    second = Board(tmp_path, tables, ["- commit: second"], ["speed"])
    second.put("speed", asked, measured=1.75)
    page = second.page.read_text()
    for kept in ("- commit: first", "- commit: second", "| 0.2500 |", "a note about quality", "| 1.75 |"):
        assert page.count(kept) == 1, kept
    assert "1.50" not in page
    assert "a note about speed" not in page


def test_the_dense_network_is_the_one_it_is_named_after() -> None:
    from diffusers import UNet2DModel

    with torch.device("meta"):
        network = UNet2DModel(**gpu_networks.CIFAR10)
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307


def test_networks_of_peers_survive_as_checkpoints(tmp_path: Path) -> None:
    """What is evaluated and timed is what the peer left: the same outputs, bit for bit."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    dense = UNet2DModel(**gpu.TOY.network)
    draws = gpu_networks.Draws(torch.randn(4, 3, 16, 16), 1000, 0)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    narrow, taken = gpu_networks.pruned_by("taylor", dense, 0.5, draws, 4)
    assert taken == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    gpu_networks.save(gpu_networks.as_pruned_class(narrow, dense), tmp_path / "peer")
    loaded: Any = gfprune_cli.load(tmp_path / "peer")
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(loaded(*inputs).sample, narrow.eval()(*inputs).sample)


def test_a_process_that_fails_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    """A large network that does not fit takes its own numbers along, not those of the run."""
    with pytest.raises(ChildProcessError, match="code 3"):
        in_a_process("sys.exit(3)", cache=tmp_path)
    assert in_a_process("print(json.dumps([sys.argv[1]]))", "given", cache=tmp_path) == ["given"]
