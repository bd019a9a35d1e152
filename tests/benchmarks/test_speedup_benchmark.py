"""The benchmark of speed-ups at toy size, on a machine whose times are made up."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from clocks import Machine

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import speedup


def test_every_speed_up_has_a_row_and_those_out_of_reach_say_why(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speedup, "ONE_SHOT", dict(one_shot=True, refit=False, recover=0, images=4, draws=4))
    Machine().install(monkeypatch)
    rows = speedup.asked_rows(str(pipeline_folder), "tiny", "eager", 2, [1.4, 90.0], tmp_path)
    assert rows[0].written is not None
    assert rows[0].written.value == pytest.approx(rows[0].time["measured"]["speedup"])
    assert abs(rows[0].missed or 1) <= speedup.CLOSE
    lines = speedup.rows_table(rows).splitlines()
    assert {line.count("|") for line in lines} == {11}
    assert "--speedup 90 cannot be reached" in lines[-1]
    assert "1 of 1 networks are within 3%" in speedup.verdict(rows)


def test_parts_add_up_on_the_page(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of an earlier run stay; those that are run again are replaced, and each says where it was made."""
    found = speedup.Row("demo", "eager", 4, 1.5, why="cannot be reached: try")
    asked = []

    def asked_rows(
        _model: str, name: str, runtime: str, batch: int, *_given: object, **_place: object
    ) -> list:
        asked.append((name, runtime))
        return [replace(found, network=name, runtime=runtime, why=f"{runtime} {len(asked)}")]

    monkeypatch.setattr(speedup, "asked_rows", asked_rows)
    monkeypatch.setattr(speedup, "network_folder", lambda name, *_: name)
    where = ["--out", str(tmp_path)]
    speedup.main([*where, "--networks", "demo", "--speedups", "1.5"])
    monkeypatch.setattr(speedup, "commit", lambda: "later")
    written = speedup.main(
        [*where, "--networks", "random", "demo", "--runtimes", "onnx", "--speedups", "1.5"]
    )
    text = written.read_text()
    assert asked == [("demo", "eager"), ("demo", "onnx"), ("random", "onnx"), ("demo", "onnx")]
    assert [words in text for words in ("eager 1", "onnx 2", "onnx 3", "onnx 4")] == [True, False, True, True]
    assert "later on" in text
