"""Writes: whole or not at all, nothing of the user's lost, the same bytes every time."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs import durable
from gfprune_cli.outputs.cache import cached
from gfprune_cli.outputs.durable import staged, write_file, write_tensors
from gfprune_cli.outputs.filesystem import WeakerWrites
from gfprune_cli.outputs.locks import own_folder, restore_output, sweep
from gfprune_cli.outputs.state import StateFolder
from gfprune_cli.progress import silent


def fill(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gfprune.json").write_text(text)


@pytest.mark.parametrize("name", ["out", "out[1]*?"])
def test_an_output_moved_aside_by_a_killed_run_comes_back(tmp_path: Path, name: str) -> None:
    """Killed between the two renames: the old output is the good one; staging folders of the dead go.

    The names hold no process id that could come back in another container.
    """
    out = tmp_path / name
    fill(tmp_path / f".{name}.gfprune-old-1", "old")
    fill(tmp_path / f".{name}.gfprune-staging-{os.getpid()}", "half-written")
    fill(tmp_path / f".{name}.gfprune-staging-1", "half-written")
    with own_folder(out) as alive:
        restore_output(out)
        assert (out / "gfprune.json").read_text() == "old"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, alive.name])


def test_what_a_killed_run_left_of_a_file_goes_when_it_is_written_again(tmp_path: Path) -> None:
    orphan = tmp_path / ".page.html.gfprune-staging-1"
    fill(orphan, "half")
    write_file(tmp_path / "page.html", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_what_is_abandoned_is_removed_under_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has just made a folder waits for the lock, then sees that the folder is gone."""
    orphan = tmp_path / ".page.html.gfprune-staging-1"
    fill(orphan, "half")
    remove, seen = shutil.rmtree, []

    def locked_out(folder: Path, ignore_errors: bool = False) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        seen.append(folder)
        remove(folder, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", locked_out)
    sweep(tmp_path / "page.html")
    assert seen == [orphan]
    assert not orphan.exists()


def test_what_a_killed_run_left_in_the_cache_goes_though_its_entry_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after the rename: later runs find the entry and write nothing. Live runs keep theirs."""
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path))
    cached({"seed": 0}, lambda: ({"images": torch.zeros(2)}, None), silent)
    (entry,) = (tmp_path / "calibration").iterdir()
    fill(entry.with_name(f".{entry.name}.gfprune-staging-1"), "")
    with own_folder(entry) as alive:
        tensors, _ = cached({"seed": 0}, lambda: ({"images": torch.ones(2)}, None), silent)
        assert tensors["images"].tolist() == [0, 0]
        assert {path.name for path in entry.parent.iterdir()} == {entry.name, alive.name}


@pytest.mark.parametrize("exchanges", [True, False])
def test_replacing_an_output_works_with_and_without_an_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    """Not every file system can swap two folders at once."""
    if not exchanges:
        monkeypatch.setattr(durable, "exchange", lambda first, second: False)
    out = tmp_path / "out"
    fill(out, "old")
    with staged(out, force=True) as staging:
        fill(staging, "new")
    assert (out / "gfprune.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_leaves_the_old_output_and_no_traces(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    with pytest.raises(ZeroDivisionError), staged(out, force=True) as staging:
        fill(staging, str(1 / 0))
    assert (out / "gfprune.json").read_text() == "old"
    with staged(out, force=True) as staging:
        fill(staging, "new")
    assert (out / "gfprune.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "link", "current folder", "root"])
def test_destinations_that_cannot_be_written_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    out = {"current folder": Path(), "root": Path("/")}.get(kind, tmp_path / kind)
    with pytest.raises(UsageError, match="--out"), staged(out, force=True):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENOSPC, errno.EIO])
def test_what_a_file_system_does_not_know_is_a_warning_and_what_fails_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Modes and durability, that is; a full disk is a full disk also when it shows at the end."""

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refused)
    monkeypatch.setattr(Path, "chmod", refused)
    if number in (errno.ENOSPC, errno.EIO):
        with pytest.raises(GfpruneError, match=r"no space left|cannot write"):
            write_file(tmp_path / "page.html", b"whole")
        assert list(tmp_path.iterdir()) == []
        return
    with pytest.warns(WeakerWrites, match="power cut"):
        write_file(tmp_path / "page.html", b"whole")
    with pytest.warns(WeakerWrites, match="file modes"):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    assert (tmp_path / "page.html").read_bytes() == b"whole"


def test_states_two_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "out", {"seed": 0})
    for step in range(4):
        state.save({"weight": torch.full((3,), float(step))}, {"step": step})
    assert [path.name for path in state.states()] == ["state-000002", "state-000003"]
    newest = state.states()[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    loaded = state.load()
    assert loaded is not None
    assert loaded[1] == {"step": 2}
    with pytest.raises(UsageError, match="other seed"):
        StateFolder(tmp_path / "out", {"seed": 1}).load()


@pytest.mark.parametrize("damage", ["not json", "[]", "{}", '{"sha256": 0}', "null"])
def test_a_foreign_state_is_one_line(tmp_path: Path, damage: str) -> None:
    state = StateFolder(tmp_path / "out", {})
    state.save({"weight": torch.zeros(1)}, {})
    (state.states()[0] / "state.json").write_text(damage)
    (state.folder / "state-old").mkdir()
    with pytest.raises(GfpruneError, match="start over"):
        state.load()


@settings(max_examples=20)
@given(names=st.lists(st.text("abc.", min_size=1, max_size=6), min_size=1, max_size=5, unique=True))
def test_the_same_tensors_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    tensors = {name: torch.arange(4.0) for name in names}
    write_tensors(folder / "a", tensors)
    write_tensors(folder / "b", dict(reversed(tensors.items())))
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    header = (folder / "a").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {
        "format": "pt"
    }


def test_a_state_is_out_of_sight_before_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill within the removal must leave no part of it that looks like a state."""
    removed: list[str] = []

    def killed(folder: Path, ignore_errors: bool) -> None:
        if any(folder.glob("*")):
            removed.append(folder.name)

    states = StateFolder(tmp_path / "out", {})
    monkeypatch.setattr(shutil, "rmtree", killed)
    for number in range(3):
        states.save({"x": torch.tensor([number])}, {})
    assert len(removed) == 1
    assert not removed[0].startswith("state-")
    assert [path.name for path in states.states()] == ["state-000001", "state-000002"]
