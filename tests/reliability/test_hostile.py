"""Hostile input gets one line and an exit code: nothing runs, nothing is written, nothing takes for ever."""

import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import quick_flags
from corpus import WEIGHTS, Case, Good, bad_files, cases, parts, safetensors
from guard import Guard, Outcome, guard, tree

from gfprune_cli.checkpoint.safetensors_header import read_header
from gfprune_cli.errors import GfpruneError

CORPUS = {case.name: case for case in cases()}
GROWTH = 768 << 20  # bytes that any refusal may take
LINE = 1000  # characters of a message, names of files left out
API = """
from gfprune_cli import load
from gfprune_cli.errors import GfpruneError
try:
    load({path!r})
except GfpruneError as error:
    import sys
    print("error:", error, file=sys.stderr)
    raise SystemExit(error.exit_code)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def guarded(world: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with guard(world, shared, tmp_path_factory.mktemp("log")) as client:
        yield client


@pytest.fixture
def good(guarded: Guard, shared: Path) -> Good:
    return Good(*(shared / name for name in ("pipeline", "shards", "text", "pruned")))


@pytest.fixture
def case_folder(world: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A new folder in the world; it and what lies beside it are gone afterwards."""
    folder = world / "case"
    folder.mkdir()
    yield folder
    for path in world.iterdir():
        shutil.rmtree(path)


def commands(case: Case, good: Good, place: Path, *, thorough: bool) -> list[tuple[list[object], int]]:
    """The commands that meet a case, and the exit code that each has to end with."""
    out = ["--quiet", "--out", "out"]
    prune = ["prune", *out, *quick_flags()]
    if case.kind == "data":
        found = [([*prune, "--model", good.pipeline, "--data", place], case.code)]
        flags = ["--steps", 2, "--model", good.pruned, "--data", place]
        return found + ([(["finetune", *out, *flags], case.code)] if thorough else [])
    if case.kind == "config":
        found = [(["prune", *out, "--config", place], case.code)]
        return found + ([(["finetune", *out, "--config", place], case.code)] if thorough else [])
    if case.kind == "record":
        return [(["finetune", *out, "--steps", 2, "--model", place], case.code)]
    found = [([*prune, "--model", place], case.code)]
    if case.kind == "model" and thorough:
        found.append((["analyze", "--quiet", "--json", "--model", place], case.analyze))
        found.append((["export", *out, "--model", place], case.code))
        found.append((["eval", "--quiet", "--model", place, "--reference", good.pipeline], case.code))
    return found


def check_refusal(outcome: Outcome, code: int) -> None:
    assert outcome.seen == []
    assert outcome.code == code, outcome.stderr
    if code:
        assert outcome.stdout == ""
        assert outcome.stderr.startswith("error: ")
        assert outcome.stderr.count("\n") == 1
        assert len(outcome.stderr) < LINE
        assert outcome.stderr[:-1].isprintable()
        assert "unexpected" not in outcome.stderr
    assert outcome.growth < GROWTH


@pytest.mark.matrix(4)
@pytest.mark.parametrize("name", CORPUS)
def test_refused(
    name: str, guarded: Guard, good: Good, world: Path, case_folder: Path, thorough: bool
) -> None:
    case = CORPUS[name]
    place = case.make(case_folder, good)
    before = tree(world)
    if case.kind == "file":
        outcomes = [(guarded.python(API.format(path=str(place)), case=case_folder), case.code)]
    else:
        wanted = commands(case, good, place, thorough=thorough)
        outcomes = [(guarded.run(*flags, case=case_folder), code) for flags, code in wanted]
    for outcome, code in outcomes:
        check_refusal(outcome, code)
        assert tree(world) == before
    assert re.search(case.says, outcomes[0][0].stderr)


def test_cut_anywhere(tmp_path: Path) -> None:
    """Every proper beginning of a file is refused, whichever part of the structure it ends in."""
    entry = {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}
    entries = {"a": entry, "b": entry | {"data_offsets": [3, 6]}, "__metadata__": {"format": "pt"}}
    whole = safetensors(entries, b"abcdef")
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    assert list(read_header(path)) == ["a", "b"]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(GfpruneError, match="cut short"):
            read_header(path)


def test_cut_between_the_tensors_of_a_network(pipeline_folder: Path, tmp_path: Path) -> None:
    whole = (pipeline_folder / "unet" / WEIGHTS).read_bytes()
    header, _ = parts(whole)
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    ends = {start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    path = tmp_path / "x.safetensors"
    lengths = {end + by for end in {start, *ends} for by in (-1, 0, 1)}
    for length in sorted(length for length in lengths if length < len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(GfpruneError, match="cut short"):
            read_header(path)


CARD = """
from pathlib import Path
from gfprune_cli.checkpoint.card import inherited
print(inherited(Path.cwd()))
"""
LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("front", "inherits"),
    [
        ("license: mit\ndatasets: [a, b]\nevil: 1", {"license": "mit", "datasets": ["a", "b"]}),
        ("license: {evil: 1}\nlanguage: [1]\npipeline_tag: x", {"pipeline_tag": "x"}),
        ("license: !!python/object/apply:os.system ['touch evil']", {}),
        (f"a0: &a0 [1]\n{LAUGHS}license: *a11", {}),
        ("license: &a mit\ndatasets: *a", {}),
        ("license: mit\nlicense: gpl", {}),
        ("license: 2024-13-45", {}),
        ("- license: mit", {}),
        ("license: " + "[" * 50_000, {}),
    ],
)
def test_a_card_lends_text_alone(
    front: str, inherits: dict[str, Any], guarded: Guard, case_folder: Path
) -> None:
    (case_folder / "README.md").write_text(f"---\n{front}\n---\n# Title\n")
    outcome = guarded.python(CARD, case=case_folder)
    assert (outcome.code, outcome.seen) == (0, [])
    assert outcome.stdout == f"{inherits}\n"


@pytest.mark.parametrize(("name", "change"), [(name, change) for name, change, _ in bad_files()])
def test_a_card_that_is_no_file_lends_nothing(
    name: str, change: Any, guarded: Guard, case_folder: Path
) -> None:
    folder = case_folder / "model" / "unet"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: evil\n---\n")
    change(folder / "README.md")
    outcome = guarded.python(CARD.replace("Path.cwd()", f"Path({str(folder)!r})"), case=case_folder)
    assert (outcome.code, outcome.seen, outcome.stdout) == (0, [], "{}\n")


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(cases()) == len(CORPUS) >= 80


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("open('new', 'w')", "open"),
        ("import os; os.open('new', os.O_CREAT | os.O_WRONLY)", "open"),
        ("open('/etc/passwd')", "open"),
        ("open('../case-outside')", "open"),
        ("import os; os.mkdir('new')", "os.mkdir"),
        ("import os; os.symlink('a', 'b')", "os.symlink"),
        ("import shutil; shutil.rmtree('.')", "shutil.rmtree"),
        ("import os; os.system('true')", "os.system"),
        ("import os; os.fork()", "os.fork"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("import socket; socket.socket()", "socket.__new__"),
        ("import socket; socket.getaddrinfo('localhost', 1)", "socket.getaddrinfo"),
        ("import pickle; pickle.loads(b'cos\\nsystem\\n.')", "pickle.find_class"),
        ("import sys; sys.path.insert(0, '.'); import evil", "import"),
        ("exec(compile('1', 'evil.py', 'exec'))", "compile"),
        ("import runpy; runpy.run_path('evil.py')", "compile"),
        ("import ctypes; ctypes.CDLL('./evil.so')", "ctypes.dlopen"),
    ],
)
def test_the_guard_sees(code: str, event: str, guarded: Guard, case_folder: Path) -> None:
    (case_folder / "evil.py").write_text("raise SystemExit('evil')\n")
    outcome = guarded.python(code, case=case_folder)
    assert [seen.partition(":")[0] for seen in outcome.seen][:1] == [event]
    assert outcome.code != 0


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("bytes(1 << 40)", 99),
        ("open('case.txt').read()", 99),
        ("print('fine')", 0),
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
    ],
)
def test_the_guard_tells_how_a_job_ended(code: str, ending: int, guarded: Guard, case_folder: Path) -> None:
    assert guarded.python(code, case=case_folder).code == ending
