"""Told to stop: in every phase of every command, twice, in the middle of a library, with nobody listening."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PRUNE
from forked import Outcome, Server

import gfprune_cli
from gfprune_cli.cli import signals
from gfprune_cli.errors import Interrupted
from gfprune_cli.flow.mask import MaskedModel, Masks

TERM, INT, HUP = int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGHUP)
LIMIT = 10.0  # seconds that a command may take to end
FINETUNE = (
    "--images", 8, "--sample-steps", 2, "--steps", 6, "--batch", 4, "--save-every", 2, "--sample-every", 3,
)  # fmt: skip
EVAL = ("--samples", 6, "--steps", 2, "--batch", 4, "--latency-batches", "1")
Arguments = tuple[object, ...]


def tree(folder: Path) -> str:
    """One digest of every file's name and bytes."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def commands(pipeline: Path, pruned: Path) -> dict[str, Arguments]:
    """Command line -> arguments without --out; every one leaves an output."""
    return {
        "prune": ("prune", "--model", pipeline, "--sparsity", 0.5, *PRUNE),
        "finetune": ("finetune", "--model", pruned, *FINETUNE),
        "eval": ("eval", "--model", pruned, "--reference", pipeline, *EVAL),
        "export": ("export", "--model", pruned, "--format", "safetensors"),
        "export onnx": ("export", "--model", pruned, "--format", "onnx"),
        "analyze": ("analyze", "--model", pipeline, "--sensitivity", "--sparsity", 0.5),
    }


def arguments(name: str, given: Arguments, folder: Path, *, resume: bool = False) -> list[object]:
    """A command whose only output lies in `folder`."""
    out = () if name == "analyze" else ("--out", folder / "out")
    logs = ("--logs", folder / "logs") if name == "finetune" else ()
    return [*given, *out, *logs, *(["--resume"] if resume and name in RESUMABLE else [])]


RESUMABLE = ("prune", "finetune", "eval")


def same(name: str, folder: Path, other: Path) -> bool:
    """Whether two runs left the same; only eval's record holds times."""
    if name == "analyze":
        return True
    if name == "eval":
        metrics = [
            json.loads((f / "out" / "gfprune.json").read_text())["result"]["metrics"] for f in (folder, other)
        ]
        images = [sorted((f / "out").rglob("*.png")) for f in (folder, other)]
        pixels = [[path.read_bytes() for path in paths] for paths in images]
        return bool(images[0]) and metrics[0] == metrics[1] and pixels[0] == pixels[1]
    if name == "export onnx":  # onnxscript numbers its nodes by process
        return (folder / "out" / "gfprune.json").exists()
    return tree(folder / "out") == tree(other / "out")


def check_stopped(outcome: Outcome, folder: Path, number: int = TERM) -> None:
    assert outcome.code == 128 + number, outcome.stderr
    assert outcome.error.startswith(f"stopped by {signal.Signals(number).name}")
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    assert not (folder / "out").exists()
    leftovers = [path.name for path in folder.iterdir() if "staging" in path.name or "lock" in path.name]
    assert leftovers == []
    assert outcome.seconds is not None
    assert outcome.seconds < LIMIT


@pytest.mark.parametrize(
    "name",
    [
        *["prune", "finetune", "eval", "export", "export onnx"],
        pytest.param("analyze", marks=pytest.mark.thorough),  # has nothing to save
    ],
)
def test_sigterm_in_every_phase_saves_and_exits_143(
    name: str, thorough: bool, server: Server, cache: dict[str, str], smallest_folder: Path, pruned: Path,
    tmp_path: Path, record: Callable[[str], None],
) -> None:  # fmt: skip
    """One run, told to stop in each of its phases in turn and resumed each time, ends in the bytes of a run
    that was left alone."""
    if name == "export onnx" and not thorough:
        pytest.skip("the long form only: the exporter takes its time")
    given = commands(smallest_folder, pruned)[name]
    alone, often = tmp_path / "alone", tmp_path / "often"
    for folder in (alone, often):
        folder.mkdir()
    whole = server.run(*arguments(name, given, alone), environment=cache)
    assert whole.code == 0, whole.stderr
    phases = list(dict.fromkeys(phase for phase in whole.phases if phase != "notice"))
    worst, stops = 0.0, 0
    for phase in phases:
        # half of a loop's events were passed by the runs before: those of its end are what is left
        outcome = server.run(
            *arguments(name, given, often, resume=True), environment=cache, phase=phase, signals=[TERM]
        )
        if outcome.signalled:  # a phase that was finished and saved does not come again
            check_stopped(outcome, often)
            worst, stops = max(worst, outcome.seconds or 0.0), stops + 1
    last = server.run(*arguments(name, given, often, resume=True), environment=cache)
    assert last.code == 0, last.stderr
    assert same(name, often, alone)
    assert stops >= len(phases) - 1, "analyze does not draw again what is cached"
    record(f"SIGTERM in every phase, {name}: {stops} of {len(phases)} phases, slowest end {worst:.2f} s")


@pytest.mark.parametrize(
    ("name", "phase", "nth", "total"),
    [
        ("prune", "refitted", 1, 3),
        ("prune", "finetune", 2, 4),
        ("finetune", "finetune", 2, 6),
        ("eval", "sample", 2, 12),
    ],
)
def test_a_signal_in_the_middle_of_a_loop_is_resumed_from_there(
    name: str, phase: str, nth: int, total: int, server: Server, cache: dict[str, str], smallest_folder: Path,
    pruned: Path, tmp_path: Path,
) -> None:  # fmt: skip
    given = commands(smallest_folder, pruned)[name]
    outcome = server.run(
        *arguments(name, given, tmp_path), environment=cache, phase=phase, nth=nth, signals=[INT]
    )
    check_stopped(outcome, tmp_path, INT)
    if name != "eval":
        assert "the state is saved, continue with --resume" in outcome.error
    again = server.run(*arguments(name, given, tmp_path), environment=cache)
    assert again.code == 2, "left-over state is not thrown away unasked"
    assert "--resume" in again.error
    resumed = server.run(*arguments(name, given, tmp_path, resume=True), environment=cache)
    assert resumed.code == 0, resumed.stderr
    assert 0 < resumed.phases.count(phase) < total, "what was done is not done again"
    if name == "prune":
        assert resumed.phases.count(phase) == total - nth - 1
        assert tree(tmp_path / "out") == tree(pruned)


def test_a_second_signal_ends_the_process_at_once(
    server: Server, smallest_folder: Path, tmp_path: Path
) -> None:
    """Even within a call into a library that never comes back. Of two that wait, the kernel hands out the
    lower number first."""
    given = commands(smallest_folder, tmp_path)["prune"]
    outcome = server.run(*arguments("prune", given, tmp_path), phase="score", signals=[TERM, INT], block=True)
    second = signal.Signals(outcome.code - 128)
    assert second in (TERM, INT)
    assert outcome.error.startswith(f"stopped by {second.name}, the second signal, without saving")
    assert not (tmp_path / "out").exists()


def test_a_signal_that_is_sent_twice_is_one_signal(
    server: Server, smallest_folder: Path, cache: dict[str, str], tmp_path: Path
) -> None:
    """`timeout` sends it to the process and to its group; the state is saved all the same."""
    given = commands(smallest_folder, tmp_path)["prune"]
    outcome = server.run(
        *arguments("prune", given, tmp_path), environment=cache, phase="refit", nth=2, signals=[TERM, TERM]
    )
    check_stopped(outcome, tmp_path)
    assert "the state is saved" in outcome.error


def test_the_same_signal_later_is_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the watching thread makes of the bytes that the system's handler writes, by a clock of its own."""
    clock = iter([0.0, 0.1, 5.0, 5.0])
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    ended: list[int] = []
    monkeypatch.setattr(signals, "end", lambda number, why: ended.append(number))
    reader, writer = os.pipe()
    os.write(writer, bytes([TERM, TERM, TERM]))
    os.close(writer)
    watching = signals.Signals()
    watching.taken.set()
    watching.watch(reader)
    assert ended == [TERM]


def test_a_call_that_never_comes_back_does_not_outlast_the_patience(
    server: Server, smallest_folder: Path, cache: dict[str, str], tmp_path: Path
) -> None:
    """Python runs no handler within it; the process ends all the same, and the next run cleans up."""
    patience = {"gfprune_cli.cli.signals:PATIENCE": 0.05, "gfprune_cli.cli.signals:LAST_CALL": 0.05}
    given = commands(smallest_folder, tmp_path)["prune"]
    outcome = server.run(
        *arguments("prune", given, tmp_path),
        environment=cache, phase="refit", nth=60, signals=[TERM], block=True, constants=patience,
    )  # fmt: skip
    assert outcome.code == 143
    assert outcome.error.startswith("stopped by SIGTERM, nothing could be saved within a long operation")
    resumed = server.run(*arguments("prune", given, tmp_path, resume=True), environment=cache)
    assert resumed.code == 0, resumed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_default_patience_is_within_the_promise() -> None:
    from gfprune_cli.cli import signals

    assert signals.PATIENCE + signals.LAST_CALL < LIMIT


def test_what_is_stopped_within_a_step_is_not_saved(
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal whose patience ran out between the masks and the count of iterations must not leave that."""
    settings: dict[str, Any] = dict(
        sparsity=0.5, images=8, sample_steps=2, draws=8, iterations=2, recover=0, refit=False
    )
    gfprune_cli.prune(str(smallest_folder), out=tmp_path / "alone", **settings)
    set_masks, calls = MaskedModel.set_masks, itertools.count()

    def half_an_iteration(masked: MaskedModel, masks: Masks) -> None:
        set_masks(masked, masks)
        if next(calls) == 2:  # full ones, the first iteration, the second
            raise Interrupted("stopped by SIGTERM within a long operation", TERM, within_step=True)

    monkeypatch.setattr(MaskedModel, "set_masks", half_an_iteration)
    with pytest.raises(Interrupted):
        gfprune_cli.prune(str(smallest_folder), out=tmp_path / "out", **settings)
    monkeypatch.undo()
    gfprune_cli.prune(str(smallest_folder), out=tmp_path / "out", resume=True, **settings)
    assert tree(tmp_path / "out" / "unet") == tree(tmp_path / "alone" / "unet")


def test_a_terminal_that_closes_stops_a_run_and_nohup_does_not(
    server: Server, smallest_folder: Path, tmp_path: Path
) -> None:
    given = commands(smallest_folder, tmp_path)["analyze"]
    hung_up = server.run(*given, phase="probe", signals=[HUP])
    assert hung_up.code == 128 + HUP
    ignored = server.run(*given, phase="probe", signals=[HUP, INT], ignore=[HUP, INT])
    assert ignored.code == 0, ignored.stderr
    assert ignored.signalled


class TestNobodyListens:
    def test_head(self, smallest_folder: Path) -> None:
        command = f"{sys.executable} -m gfprune_cli analyze --model {smallest_folder} | head -1"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=300
        )
        assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
        assert "Traceback" not in done.stderr
        assert "BrokenPipe" not in done.stderr

    @pytest.mark.parametrize("flag", [(), ("--json",)])
    def test_a_reader_that_left_ends_it_quietly(
        self, server: Server, smallest_folder: Path, flag: tuple[str, ...]
    ) -> None:
        done = server.run("analyze", "--model", smallest_folder, *flag, broken=[1])
        assert done.code == 0
        assert "rror" not in done.stderr

    @pytest.mark.parametrize("how", ["broken", "full"])
    def test_a_log_that_ends_does_not_end_the_run(
        self, server: Server, cache: dict[str, str], smallest_folder: Path, tmp_path: Path, how: str
    ) -> None:
        given = commands(smallest_folder, tmp_path)["prune"]
        done = server.run(*arguments("prune", given, tmp_path), environment=cache, **{how: [2]})
        assert done.code == 0
        assert done.stdout == f"{tmp_path / 'out'}\n"

    def test_a_result_that_cannot_be_written_is_an_error(self, server: Server, smallest_folder: Path) -> None:
        done = server.run("analyze", "--model", smallest_folder, full=[1])
        assert done.code == 1
        assert "the result cannot be written to standard output: No space left on device" in done.error


@pytest.mark.parametrize("name", ["prune", "finetune", "eval", "export", "export onnx"])
def test_signals_at_any_time(
    name: str, thorough: bool, server: Server, cache: dict[str, str], smallest_folder: Path, pruned: Path,
    tmp_path: Path, record: Callable[[str], None],
) -> None:  # fmt: skip
    """Not at an event but at a random moment: a run that is hit again and again ends in the same bytes."""
    if not thorough:
        pytest.skip("the long form only: the moments of one short form prove little")
    given = commands(smallest_folder, pruned)[name]
    (tmp_path / "alone").mkdir()
    whole = server.run(*arguments(name, given, tmp_path / "alone"), environment=cache)
    assert whole.code == 0, whole.stderr
    chance, hits, worst = random.Random(name), 0, 0.0
    for number in range(RUNS):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for _ in range(HITS):
            outcome = server.run(
                *arguments(name, given, folder, resume=True),
                environment=cache, signals=[TERM], after=chance.uniform(0.01, SPAN),
            )  # fmt: skip
            if not outcome.signalled or outcome.code == 0:
                break
            if outcome.code != -TERM:  # before the command's first line
                check_stopped(outcome, folder)
            hits, worst = hits + 1, max(worst, outcome.seconds or 0.0)
        else:
            outcome = server.run(*arguments(name, given, folder, resume=True), environment=cache)
        assert outcome.code == 0, outcome.stderr
        assert same(name, folder, tmp_path / "alone")
    record(f"signals at random moments, {name}: {hits} stops in {RUNS} runs, slowest end {worst:.2f} s")


RUNS, HITS, SPAN = 10, 5, 4.0
