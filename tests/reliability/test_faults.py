"""Any disk call may fail, any moment may be the last: what stands is whole, resuming gives the same bytes.

Each trial is a real command in a process of its own, in which the N-th write, fsync, rename, creation,
removal or read of a file fails with a real errno, or kills the process. By default a few of them are tried,
in chains where each run goes on from what the one before left; with --thorough all of them, and whatever they
leave is followed by a run that nothing disturbs. The long form says how many.
"""

import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALLEST
from faults import KINDS, Ended, Fault, Machine, lost_in_a_power_cut

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="faults.c knows the calls of Linux, and a C compiler has to build it",
)

PRUNE = "--sparsity 0.5 --images 4 --sample-steps 1 --draws 4 --iterations 2 --recover 2"
BRIEF = "--sparsity 0.5 --images 4 --sample-steps 1 --draws 4 --one-shot --no-refit --recover 0"
FINETUNE = "--steps 3 --batch 2 --images 4 --sample-steps 1 --save-every 1 --sample-every 2"
EVAL = "--samples 4 --batch 2 --steps 2 --no-latency"

KILLS = Fault("change", 0)
FAULTS = (
    KILLS,
    Fault("write", 0, errno.ENOSPC, lasting=True),
    Fault("make", 0, errno.ENOSPC, lasting=True),
    Fault("write", 0, errno.EIO),
    Fault("make", 0, errno.EIO),
    Fault("sync", 0, errno.EIO),
    Fault("mode", 0, errno.EIO),
    Fault("rename", 0, errno.EIO),
    Fault("remove", 0, errno.EIO),
    Fault("read", 0, errno.EIO),
)


@dataclass(frozen=True)
class Scene:
    """A command that writes below a folder.

    Args:
        command: with PLACE for the folder and BASE for the one that holds the inputs.
        resume: flags for a run after one that was cut short.
        old: an output to be replaced lies there already.
    """

    command: str
    resume: str
    old: bool = False

    def arguments(self, base: Path, place: Path, *, again: bool) -> list[str]:
        words = f"{self.command} {self.resume if again else ''}".split()
        return [word.replace("BASE", str(base)).replace("PLACE", str(place)) for word in words]


SCENES = {
    "prune": Scene(f"prune --model BASE/dense --out PLACE/out {PRUNE}", "--resume"),
    "replace": Scene(f"prune --model BASE/dense --out PLACE/out --force {BRIEF}", "--resume", old=True),
    "finetune": Scene(f"finetune --model BASE/pruned --out PLACE/out {FINETUNE}", "--resume"),
    "eval": Scene(
        f"eval --model BASE/pruned --out PLACE/out --html PLACE/page.html {EVAL}",
        "--resume",
    ),
    "export": Scene("export --model BASE/pruned --dtype fp16 --out PLACE/out", "--force"),
    "single-file": Scene("export --model BASE/pruned --single-file --out PLACE/out.safetensors", "--force"),
}


@dataclass
class Bench:
    """The machine, the inputs, and what undisturbed runs wrote: {file: content} by scene.

    Args:
        finished: what faults left and undisturbed runs then mended: the disk is all that a run starts from,
            so that there is nothing to learn from the same again.
    """

    machine: Machine
    base: Path
    finished: set[tuple[str, bool, str]] = field(default_factory=set)
    references: dict[str, dict[str, str]] = field(default_factory=dict)
    calls: dict[str, dict[str, int]] = field(default_factory=dict)

    def place(self, scene: Scene) -> Path:
        """An empty folder to work in, or one with an old output."""
        place = self.base / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if scene.old:
            shutil.copytree(self.base / "old", place / "out")
        return place

    def run(self, scene: Scene, *, again: bool, **options: Any) -> Ended:
        place = self.base / "place"
        arguments = scene.arguments(self.base, place, again=again)
        return self.machine.run(arguments, cache=place / "cache", **options)

    def log(self, name: str) -> Path:
        return self.machine.scratch / f"{name}.log"

    def reference(self, name: str) -> dict[str, str]:
        """What an undisturbed run of a scene leaves; also counts and logs its calls."""
        if name not in self.references:
            place = self.place(SCENES[name])
            ended = self.run(SCENES[name], again=False, log=self.log(name))
            assert ended.code == 0, ended.err
            self.references[name], self.calls[name] = contents(place), ended.seen
        return self.references[name]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    base, scratch = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("scratch")
    torch.manual_seed(0)
    DDPMPipeline(UNet2DModel(**SMALLEST), DDPMScheduler()).save_pretrained(base / "dense")
    with Machine(scratch, base) as machine:
        for name, extra in (("pruned", []), ("old", ["--seed", "1"])):
            command = f"prune --model {base}/dense --out {base}/{name} --one-shot --sparsity 0.3".split()
            quick = ["--images", "8", "--sample-steps", "1", "--draws", "4", "--recover", "0"]
            ended = machine.run([*command, *quick, *extra], cache=base / "cache")
            assert ended.code == 0, ended.err
        yield Bench(machine, base)


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below one, hidden ones included; without the seconds that runs took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = "folder" if path.is_dir() else hashlib.sha256(timeless(path)).hexdigest()
    return found


def timeless(path: Path) -> bytes:
    """What a file holds but for the seconds, which differ in equal runs."""
    content = path.read_bytes()
    if path.name in ("metrics.jsonl", "gfprune.json"):
        content = re.sub(rb'"seconds": [0-9.e-]+', b'"seconds": 0', content)
    if path.suffix == ".html":
        content = re.sub(rb"[0-9.]+ (s|seconds|minutes)\b", b"0 s", content)
    return content


def digest_of(found: dict[str, str]) -> str:
    """Equal for what differs only in the random part of hidden names."""
    pairs = [
        (re.sub(r"(gfprune-(?:staging|old)|/new)-[0-9a-f]+", r"\1", key), value)
        for key, value in found.items()
    ]
    return hashlib.sha256(repr(sorted(pairs)).encode()).hexdigest()


def below(found: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in found.items() if key == name or key.startswith(f"{name}/")}


def check_what_stands(bench: Bench, name: str) -> None:
    """Whatever can be seen is whole, new or old; every state that was published is intact."""
    place, reference = bench.base / "place", bench.reference(name)
    found = contents(place)
    old = contents(bench.base / "old")
    for path in place.iterdir():
        if path.name.startswith(".") or path.name in ("cache", "out-logs"):
            continue
        here = below(found, path.name)
        whole = [below(reference, path.name)]
        if SCENES[name].old:
            whole.append({"out": "folder"} | {f"out/{key}": value for key, value in old.items()})
        assert here in whole, f"{path.name} is neither the new output nor the old one"
    for state in place.glob(".*.gfprune-state/state-" + "[0-9]" * 6):
        numbers = json.loads((state / "state.json").read_text())
        assert numbers["sha256"] == hashlib.sha256((state / "state.safetensors").read_bytes()).hexdigest()


def hidden(place: Path) -> set[str]:
    return {path.name for path in place.iterdir() if path.name.startswith(".")}


def check_failure(ended: Ended, fault: Fault, place: Path, scene: Scene, earlier: set[str]) -> None:
    """An error is one line that says what; nothing is left but what a resumed run can use.

    Args:
        earlier: hidden names that were there before: a run that fails in its first look at the output has not
            come to what a killed one left.
    """
    assert ended.code in (0, 1), f"{fault}: {ended.code}: {ended.err}"
    assert len(ended.errors) == ended.code, ended.err
    assert "Traceback" not in ended.err
    assert "unexpected" not in ended.err, ended.err
    if ended.code and fault.error == errno.ENOSPC:
        assert "space left" in ended.err
    if fault.kind == "remove":  # what cannot be removed stays until the next run
        return
    left = hidden(place)
    if ended.seen["make"] == 0:
        left -= {name for name in earlier if "-staging-" in name}
    states = {name for name in left if re.fullmatch(r"\.[\w.]+\.gfprune-state", name)}
    assert left == states, f"{fault}: {left}"
    orphans = [path.name for state in states for path in (place / state).iterdir() if path.name[0] in ".n"]
    orphans += [path.name for path in place.glob("cache/*/*") if path.suffix != ".safetensors"]
    assert orphans == [], f"{fault}: {ended.err}"
    if not ended.code:
        assert states == set(), "a state of a run that is done"


def finish(bench: Bench, name: str, *faults: Fault) -> None:
    """An undisturbed run after ones that were cut short leaves exactly what one alone does.

    Only a grid of samples and what was to be cached are given up if they cannot be written, with a notice;
    a run that ended well without them is not run again for their sake.
    """
    scene, place = SCENES[name], bench.base / "place"
    failed = any(fault.error for fault in faults)
    left = (name, failed, digest_of(contents(place)))
    if left in bench.finished:
        return
    ended = bench.run(scene, again=True)
    assert ended.code == 0, f"after {faults}: {ended.err}"
    found, reference = contents(place), bench.reference(name)
    given_up = {
        key for key in reference.keys() - found.keys() if key.startswith(("out-logs/samples", "cache"))
    }
    if not failed:
        given_up = set()
    assert found == {key: value for key, value in reference.items() if key not in given_up}, faults
    bench.finished.add(left)


def disturb(bench: Bench, name: str, fault: Fault, *, again: bool) -> Ended:
    """One run with one fault, and what has to hold after it."""
    scene, place = SCENES[name], bench.base / "place"
    earlier = hidden(place) if again else set()
    ended = bench.run(scene, again=again, fault=fault)
    if not fault.error and ended.hits:
        assert ended.code == -9, ended.err
    elif ended.hits:
        check_failure(ended, fault, place, scene, earlier)
    else:
        assert ended.code == 0, ended.err
    check_what_stands(bench, name)
    return ended


def label(fault: Fault) -> str:
    return f"{fault.kind} {errno.errorcode[fault.error] if fault.error else 'SIGKILL'}"


def tried_all(bench: Bench, name: str, kind: Fault) -> int:
    """A fault at every call, from 1 until the run is not hit any more."""
    for at in itertools.count(1):
        fault = Fault(kind.kind, at, kind.error, kind.lasting)
        bench.place(SCENES[name])
        if not disturb(bench, name, fault, again=False).hits:
            return at - 1
        finish(bench, name, fault)
    raise AssertionError("counting ends by a return")


def tried_some(bench: Bench, name: str) -> Counter[str]:
    """Some faults of every kind, in chains: what one run leaves, the next one starts from."""
    tried: Counter[str] = Counter()
    choice = random.Random(name)
    bench.reference(name)
    for chain in (FAULTS[:5], (KILLS, *FAULTS[5:])):
        bench.place(SCENES[name])
        faults: list[Fault] = []
        for number, kind in enumerate(chain):
            calls = bench.calls[name][kind.kind] // (2 if number else 1)  # a resumed run makes fewer
            fault = Fault(kind.kind, choice.randint(1, max(1, calls)), kind.error, kind.lasting)
            tried[label(fault)] += disturb(bench, name, fault, again=number > 0).hits > 0
            faults.append(fault)
        finish(bench, name, *faults)
    return tried


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.thorough] if name == "prune" else []) for name in SCENES],
)  # "replace" prunes, too
def test_failing_calls_leave_what_stands_whole_and_resuming_gives_the_same_bytes(
    bench: Bench, name: str
) -> None:
    bench.reference(name)
    start = time.monotonic()
    tried = tried_some(bench, name)
    print(f"faults: {name}: {sum(tried.values())} in {time.monotonic() - start:.0f} s: {dict(tried)}")
    assert 2 * sum(tried.values()) > len(FAULTS), "most runs ended before the call that was to fail"


@pytest.mark.parametrize("name", ["replace", "single-file"])
def test_a_file_system_that_knows_neither_modes_nor_durability_ends_no_run(bench: Bench, name: str) -> None:
    """As SMB, FUSE and some NFS do: the same bytes are written, and a notice for each says so once."""
    reference, scene, place = bench.reference(name), SCENES[name], bench.base / "place"
    for fault in (
        Fault("sync", 1, errno.EINVAL, lasting=True),
        Fault("mode", 1, errno.EPERM, lasting=True),
        Fault("mode", 1, errno.ENOTSUP, lasting=True),
    ):
        bench.place(scene)
        ended = bench.run(scene, again=False, fault=fault)
        assert ended.code == 0, ended.err
        assert ended.hits > 0
        notes = [line for line in ended.err.splitlines() if "file system of the output" in line]
        assert len(notes) == 1, ended.err
        assert contents(place) == reference
    bench.place(scene)
    ended = bench.run(scene, again=False, fault=Fault("sync", 1, errno.EIO, lasting=True))
    assert ended.code == 1
    assert len(ended.errors) == 1


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("kind", FAULTS, ids=label)
def test_every_call_may_fail(
    bench: Bench, name: str, kind: Fault, thorough: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same at every single call of a run."""
    if not thorough:
        pytest.skip("the long form: --thorough")
    bench.reference(name)
    start, before = time.monotonic(), len(bench.finished)
    tried = tried_all(bench, name, kind)
    with capsys.disabled():
        print(
            f"\nfaults: {name}, {label(kind)}: {tried} in {time.monotonic() - start:.0f} s, "
            f"{len(bench.finished) - before} new outcomes resumed"
        )
    assert tried > 0


@pytest.mark.parametrize("name", ["prune", "finetune", "eval"])
def test_killed_at_random_moments_a_run_still_ends_in_the_same_bytes(
    bench: Bench, name: str, thorough: bool
) -> None:
    """SIGKILL from outside, at any time; each run goes on from what the killed one left."""
    scene, wanted = SCENES[name], 150 if thorough else 2
    reference, choice = bench.reference(name), random.Random(f"kills of {name}")
    kills = runs = 0
    begin = time.monotonic()
    bench.place(scene)
    bench.run(scene, again=False)
    usual = time.monotonic() - begin
    while kills < wanted:
        bench.place(scene)
        again, ended = False, None
        while ended is None or ended.code != 0:
            after = choice.uniform(0, usual) if kills < wanted else None
            ended = bench.run(scene, again=again, kill_after=after)
            assert ended.code in (0, -9), ended.err
            kills, again = kills + (ended.code == -9), True
            check_what_stands(bench, name)
        runs += 1
        assert contents(bench.base / "place") == reference
    print(f"kills: {name}: {kills} in {runs} runs, {time.monotonic() - begin:.0f} s")


@pytest.mark.parametrize("name", SCENES)
def test_what_is_published_survives_a_power_cut(bench: Bench, name: str) -> None:
    """Contents and entries are synced before the rename that shows them, the rename itself after it."""
    bench.reference(name)
    place, log = bench.base / "place", bench.log(name)
    renamed = {
        Path(line.split("\t")[2])
        for line in log.read_text().splitlines()
        if line.startswith(("rename", "exchange"))
    }
    shown = {path for path in renamed if not path.is_relative_to(place / "cache")}
    shown = {
        path
        for path in shown
        if not re.search("gfprune-(old|staging)|^new-", path.name) and "out-logs" not in str(path)
    }
    assert any(path.parent == place for path in shown), "no output was published"
    for path in shown:
        assert lost_in_a_power_cut(log, path) == [], path


def test_the_faults_are_real(bench: Bench) -> None:
    """Each kind hits a call that a run really makes, and says so: else all of the above shows nothing."""
    scene = SCENES["finetune"]
    bench.reference("finetune")
    assert all(bench.calls["finetune"][kind] > 0 for kind in KINDS)
    bench.place(scene)
    ended = bench.run(scene, again=False, fault=Fault("write", 3, errno.ENOSPC, lasting=True))
    assert (ended.code, ended.hits > 0) == (1, True)
    assert os.strerror(errno.ENOSPC) in ended.err
