"""Studies of settings: a row for every setting with every seed behind it, and the command on the page."""

import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import chain
import equal_time
import folding
import ode
import series
import study
import training


class Pool:
    """Runs what is submitted at once, in this process."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, call: Callable[..., Any], *given: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*given))
        return done


def found(*given: Any) -> study.Run:
    """The numbers of a run, whose loss is its seed, the last argument."""
    shares = {"params": 0.5, "macs": 0.25, "gradients": 48.0, "dense": 0.1, "seconds": 3.0}
    return {"loss": float(given[-1]), "ssim": 0.9, "fd_teacher": 7.0, **shares}


def beside(place: Any, seed: int) -> study.Run:
    three = [float(seed)] * 3
    return {"series": three, "single": three, "gradients": (1.0, 2.0), "seconds": (3.0, 4.0)}


def settings(place: Any, lengths: list[int], work: Path, seed: int) -> list[list[study.Run]]:
    return [[found(seed) for _ in training.SETTINGS] for _ in lengths]


def folded(name: str, work: Path) -> list[study.Run]:
    return [{"tolerance": 0.01}]


MEAN = "0.5000 (0.0000 to 1.0000)"
STUDIES: dict[str, tuple[ModuleType, str, dict[str, Any], list[str]]] = {
    "chain": (chain, "measure", {}, [f"| `fisher` | 50.0% | 25.0% | 48 | {MEAN} |", "| `--align 16` |"]),
    "ode": (ode, "measure", {}, [f"| r = 16 | 50.0% | 25.0% | 48 | {MEAN} |"]),
    "training": (
        training,
        "measure",
        {"measure": settings},
        [f"| defaults | {MEAN} | 0.900", "| `--by-block` | ", "| 3 (3 to 3) |"],
    ),
    "series": (series, "measure", {"measure": beside}, [f"| one flow | {MEAN} | {MEAN} | {MEAN} |"]),
    "folding": (
        folding,
        "budget_run",
        {"transformer_run": found, "folded_numbers": folded, "small_dit_folder": lambda work: work},
        [f"| params, 0.75 | 0.01 | 50.0% | 25.0% | {MEAN} |", "| demo | | 0.01 | none |"],
    ),
}


@pytest.mark.parametrize("name", STUDIES)
def test_every_setting_has_a_row_of_all_seeds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, measured, replaced, rows = STUDIES[name]
    replaced = {measured: found} | replaced
    if module in (chain, ode):
        monkeypatch.setattr(chain, "dense_numbers", lambda place, cache: 0.1)
    for key, value in replaced.items():
        monkeypatch.setattr(module, key, value)
    monkeypatch.setattr(study, "ProcessPoolExecutor", Pool)
    given = ["--subjects", "demo", "--seeds", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
    options = {"chain": dict(sparsity=0.75), "ode": dict(sparsity=0.75), "series": {}}
    options["training"] = dict(gradients=training.GRADIENTS)
    options["folding"] = dict(parts=list(folding.PARTS))
    study.write_study(str(module.__file__), str(module.__doc__), "A study", module.lines, **options[name])
    page = (tmp_path / f"{name}.md").read_text()
    assert f"`python benchmarks/{name}.py --subjects demo --seeds 2" in page
    for row in rows:
        assert row in page
    widths: set[int] = set()
    for line in page.splitlines():
        widths = widths | {line.count("|")} if line.startswith("|") else set()
        assert len(widths) <= 1, line


def test_networks_of_equal_time_have_a_row_for_each_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*given: Any) -> list[study.Run]:
        return [found(seed) | {"way": way, "speedup": 1.5} for way in equal_time.WAYS for seed in (0, 1)]

    monkeypatch.setattr(equal_time, "rows", made)
    monkeypatch.setattr(sys, "argv", ["equal_time.py", "--seeds", "1", "--out", str(tmp_path)])
    study.write_study(
        str(equal_time.__file__), "Toy", "Equal time", equal_time.lines,
        subjects=("demo",), work=tmp_path / "work", speedups=[1.5], batch=16,
    )  # fmt: skip
    page = (tmp_path / "equal_time.md").read_text()
    for way in equal_time.WAYS:
        assert f"| {way} | 50.0% | 25.0% | 1.50 (1.50 to 1.50) | {MEAN} |" in page
