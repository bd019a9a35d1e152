"""The benchmark of speed-ups at toy size, on a machine whose times are made up."""

import sys
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
