"""The process around a command: what else is printed, interpreters and packages that do not fit."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Gfprune

from gfprune_cli.checkpoint.files import first_line, shortened
from gfprune_cli.cli.environment import broken_import, importing
from gfprune_cli.cli.session import one_line

SPEAKING = """
import os
from gfprune_cli.cli.session import Session
try:
    with Session(quiet=False, debug=False, json=True, offline=False) as session:
        print("from a library")
        os.write(1, b"from native code\\n")
        if {fails}:
            raise ValueError("no result")
        session.result({{"schema_version": 1}}, "")
except SystemExit:
    print("mine again", flush=True)
    os.write(1, b"and mine\\n")
"""


@pytest.mark.parametrize(
    ("fails", "out"), [(False, '{\n  "schema_version": 1\n}\n'), (True, "mine again\nand mine\n")]
)
def test_stdout_holds_the_result_whatever_libraries_print(fails: bool, out: str) -> None:
    """Python code and native code alike find their way to stderr; after an error stdout is given back."""
    call = [sys.executable, "-c", SPEAKING.format(fails=fails)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == out
    assert "from a library" in done.stderr
    assert "from native code" in done.stderr
    assert ("unexpected ValueError: no result" in done.stderr) is fails


def test_an_interpreter_without_docstrings_is_refused(gfprune: Gfprune) -> None:
    """transformers builds classes from them: it printed hundreds of lines to stdout, and failed."""
    done = gfprune("analyze", "--model", "demo", PYTHONOPTIMIZE="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: PYTHONOPTIMIZE=2")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_torchvision_that_does_not_fit_torch_is_named(tmp_path: Path) -> None:
    """What the import of a real one built for another version does, through diffusers' own import."""
    for name, text in (
        ("torchvision/__init__.py", "raise RuntimeError('operator torchvision::nms does not exist')\n"),
        (
            "torchvision-0.15.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.15.0\n",
        ),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    call = [sys.executable, "-m", "gfprune_cli", "analyze", "--model", "demo"]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: the installed torchvision 0.15.0 does not fit torch ")
    assert "operator torchvision::nms does not exist" in said


def failed_import(module: str, error: str) -> BaseException:
    """What transformers raises where `module` raises `error` when it is imported."""
    importing = (
        "try:\n    exec(code, {'__name__': module})\n"
        "except Exception as cause:\n    raise RuntimeError('Failed to import transformers.x') from cause\n"
    )
    with pytest.raises(RuntimeError) as caught:
        exec(importing, {"__name__": "transformers.lazy", "module": module, "code": f"raise {error}"})
    return caught.value


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (failed_import("sentencepiece.lib", "OSError('libc too old')"), "sentencepiece .*libc too old"),
        (failed_import("transformers.utils", "ModuleNotFoundError('no', name='regex.a')"), "^regex .*cannot"),
        (failed_import("torchaudio.lib", "OSError('undefined symbol')"), "torchaudio .*does not fit torch"),
    ],
)
def test_the_package_that_cannot_be_imported_is_named(error: BaseException, words: str) -> None:
    assert re.search(words, one_line(error))


def test_other_errors_are_no_imports() -> None:
    assert broken_import(RuntimeError("shape mismatch")) is None


def test_a_long_message_is_cut_between_words() -> None:
    """Half an address is no address."""
    address = "https://huggingface.co/models/that/has/a/long/name"
    for start in range(150, 205):
        text = shortened(f"{'x' * start} {address} and more")
        assert text.endswith(" ...")
        assert address in text or "https" not in text
    assert shortened("short") == "short"
    assert shortened("y" * 300) == f"{'y' * 200} ..."
    assert first_line(ValueError("a\nb")) == "ValueError: a"


@pytest.mark.parametrize("enabled", [True, False])
def test_imports_are_looked_through_no_more_and_what_comes_later_is(enabled: bool) -> None:
    before, frozen = gc.isenabled(), gc.get_freeze_count()
    try:
        (gc.enable if enabled else gc.disable)()
        with importing():
            held: list[object] = [[]]
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() > frozen
        assert held
    finally:
        gc.unfreeze()
        gc.freeze()
        (gc.enable if before else gc.disable)()
