"""Fuzzing: whatever bytes a reader meets, it reads them or refuses them in one line, and it ends."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fuzz
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

QUICK, LONG = 100, 22_000  # mutants of each target, by hypothesis
BATCH = 20  # mutants in one example
COSTLY = {"network": 20}  # so many times fewer: each mutant is a network, built
GUIDED_QUICK, GUIDED_LONG = 1500, 5000  # by atheris: of all targets together, and of each
PATIENCE = 60  # seconds of processor time for one input, far beyond what any takes
SCRIPT = Path(fuzz.__file__)


@contextmanager
def no_hang() -> Iterator[None]:
    """An input that takes for ever fails its test."""

    def fail(number: int, frame: object) -> None:
        raise AssertionError(f"no end after {PATIENCE} seconds")

    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_sound_seeds_are_read(name: str, tmp_path: Path) -> None:
    """The mutants are of inputs that a reader takes, so that they get past its first check."""
    for seed in fuzz.seeds(name):
        fuzz.TARGETS[name](tmp_path, seed)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_mutants_are_read_or_refused(
    name: str, tmp_path: Path, thorough: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = fuzz.seeds(name)
    wanted = (LONG if thorough else QUICK) // COSTLY.get(name, 1)
    batch = BATCH // COSTLY.get(name, 1)
    count = 0

    @settings(
        max_examples=-(-wanted // batch),
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),  # the numbers are the input: there is nothing to shrink
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sound), st.integers(0, 2**64 - 1))
    def run(seed: bytes, first: int) -> None:
        nonlocal count
        for number in range(first, first + batch):
            note(f"mutant {number}")
            with no_hang():
                fuzz.attempt(name, tmp_path, fuzz.mutant(seed, number))
            count += 1

    run()
    assert count >= wanted
    if thorough:
        with capsys.disabled():
            print(f"\nhypothesis, {name}: {count:,} mutants")


def guided(name: str, runs: int, folder: Path) -> int:
    """How many inputs atheris tried; it ends at the first that is neither read nor refused."""
    pytest.importorskip("atheris", reason="atheris has wheels for Linux alone: pip install 'gfprune[fuzz]'")
    done = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            name,
            folder,
            f"-runs={runs}",
            "-timeout=120",
            "-rss_limit_mb=3000",
            "-seed=1",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = re.search(r"Done (\d+) runs", done.stderr)
    assert found, done.stderr[-2000:]
    return int(found[1])


def test_guided_mutants_are_read_or_refused(
    tmp_path: Path, thorough: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in fuzz.TARGETS if thorough else ["any"]:
        runs = GUIDED_LONG if thorough else GUIDED_QUICK
        count = guided(name, runs, tmp_path)
        assert count >= runs
        if thorough:
            with capsys.disabled():
                print(f"\natheris, {name}: {count:,} mutants")


def test_the_fuzzer_stops_at_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is no GfpruneError, and a message of two lines, are found."""
    from gfprune_cli.errors import GfpruneError

    def broken(folder: Path, data: bytes) -> None:
        raise GfpruneError("two\nlines") if data else KeyError("evil")

    monkeypatch.setitem(fuzz.TARGETS, "header", broken)
    with pytest.raises(KeyError):
        fuzz.attempt("header", tmp_path, b"")
    with pytest.raises(AssertionError, match="two"):
        fuzz.attempt("header", tmp_path, b"x")
