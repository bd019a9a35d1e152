"""Several runs at once: into one output never, over one cache always."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from conftest import PRUNE
from forked import Server
from test_signals import FINETUNE, tree

from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs.locks import claimed, exclusive


def held(server: Server, out: Path, pipeline: Path, cache: dict[str, str]) -> tuple[tuple[int, Path], Path]:
    """A prune run that waits in its scoring until somebody writes to the FIFO."""
    gate = out.parent / "gate"
    os.mkfifo(gate)
    started = server.start(
        ["prune", "--model", pipeline, "--sparsity", 0.5, "--out", out, *PRUNE],
        environment=cache, phase="score", hold=str(gate),
    )  # fmt: skip
    return started, gate


def test_one_output_takes_one_run(
    server: Server, cache: dict[str, str], smallest_folder: Path, pruned: Path, tmp_path: Path
) -> None:
    """Whatever the second command is, it fails with one line; the first is not disturbed."""
    out = tmp_path / "out"
    first, gate = held(server, out, smallest_folder, cache)
    writer = os.open(gate, os.O_WRONLY)  # returns when the run has come to its scoring
    others = [
        ("prune", "--model", smallest_folder, "--sparsity", 0.5, *PRUNE),
        ("prune", "--model", smallest_folder, "--sparsity", 0.5, "--resume", *PRUNE),
        ("prune", "--model", smallest_folder, "--sparsity", 0.4, "--force", *PRUNE),
        ("finetune", "--model", pruned, "--logs", tmp_path / "logs", *FINETUNE),
        ("eval", "--model", pruned, "--reference", smallest_folder, "--samples", 4, "--steps", 1, "--force"),
        ("export", "--model", pruned, "--format", "safetensors", "--force"),
    ]
    for arguments in others:
        second = server.run(*arguments, "--out", out, environment=cache)
        assert second.code == 2, (arguments, second.stderr)
        assert second.error == (f"another run is working in --out {out}: wait for it, or name another output")
    os.write(writer, b"go on")
    os.close(writer)
    done = server.wait(first)
    assert done.code == 0, done.stderr
    assert tree(out) == tree(pruned)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate", "out"]


def test_a_killed_run_keeps_nobody_out(
    server: Server, cache: dict[str, str], smallest_folder: Path, pruned: Path, tmp_path: Path
) -> None:
    """Its lock dies with it, and what it left is cleaned up by the next."""
    out = tmp_path / "out"
    first, gate = held(server, out, smallest_folder, cache)
    writer = os.open(gate, os.O_WRONLY)
    os.kill(first[0], signal.SIGKILL)
    assert server.wait(first).code == -signal.SIGKILL
    os.close(writer)
    gate.unlink()
    done = server.run(
        "prune", "--model", smallest_folder, "--sparsity", 0.5, "--out", out, *PRUNE, environment=cache
    )
    assert done.code == 0, done.stderr
    assert tree(out) == tree(pruned)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_runs_share_the_caches(
    thorough: bool, server: Server, smallest_folder: Path, pruned: Path, tmp_path: Path
) -> None:
    """All start at once with an empty cache; each result is the one of a run on its own."""
    runs, fresh = (16 if thorough else 3), {"GFPRUNE_CACHE": str(tmp_path / "cache")}
    started = [
        server.start(
            [
                "prune",
                "--model",
                smallest_folder,
                "--sparsity",
                0.5,
                "--out",
                tmp_path / f"{n}" / "out",
                *PRUNE,
            ],
            environment=fresh,
        )
        for n in range(runs)
    ]
    outcomes = [server.wait(one) for one in started]
    assert [outcome.code for outcome in outcomes] == [0] * runs
    for n in range(runs):
        assert tree(tmp_path / f"{n}" / "out") == tree(pruned)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.suffix for path in left] == [".safetensors"], "one entry, and no unfinished ones"


def test_a_lock_that_fails_leaves_no_folders_behind(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with contextlib.suppress(ZeroDivisionError), claimed(out, lambda: None):
        assert (tmp_path / "a" / "b").is_dir()
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_no_mans_after_its_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with exclusive(out), pytest.raises(UsageError, match="another run"), exclusive(out):
        pytest.fail("two hold the lock")
    with exclusive(out):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(GfpruneError, match="a file system that has locks"), exclusive(tmp_path / "out"):
        pytest.fail("there is no lock")
