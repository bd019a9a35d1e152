"""One process or several: what the environment says, and what batch systems leave in it."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import Gfprune

import gfprune_cli
from gfprune_cli.errors import UsageError
from gfprune_cli.runtime.launch import (
    SHARDING,
    UNUSED,
    announced,
    check_launcher,
    launched,
    main_process,
    sharding,
    unused_settings,
)


def announce(monkeypatch: pytest.MonkeyPatch, **given: str) -> None:
    for name in ("MASTER_ADDR", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("given", "several"),
    [
        ({}, False),
        ({"MASTER_ADDR": "here", "WORLD_SIZE": "1", "RANK": "0"}, False),
        ({"WORLD_SIZE": "4", "RANK": "2"}, False),
        ({"MASTER_ADDR": "here", "WORLD_SIZE": ""}, False),
        ({"MASTER_ADDR": "here", "WORLD_SIZE": "many", "RANK": "1"}, False),
        ({"MASTER_ADDR": "here", "WORLD_SIZE": "4", "RANK": "2"}, True),
    ],
)
def test_several_processes_need_an_address_a_number_of_them_and_one_of_this(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], several: bool
) -> None:
    announce(monkeypatch, **given)
    assert launched() is several
    assert main_process() is not several
    check_launcher()


def test_what_a_batch_script_left_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for processes that nobody started would take hours."""
    announce(monkeypatch, MASTER_ADDR="here", WORLD_SIZE="4")
    assert announced() == 4
    assert not launched()
    with pytest.raises(UsageError, match=r"WORLD_SIZE=4 .*RANK.*accelerate launch.*unset WORLD_SIZE"):
        check_launcher()


@pytest.mark.parametrize("variable", SHARDING)
@pytest.mark.parametrize("value", ["true", "1", "False"])
def test_networks_in_pieces_are_refused_and_not_ignored(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """accelerate says so in the environment alone; gfprune would run as if it had not."""
    announce(monkeypatch)
    monkeypatch.setenv(variable, value)
    refused = pytest.raises(UsageError, match=r"accelerate is configured for .*--multi_gpu")
    with nullcontext() if value == "False" else refused:
        check_launcher()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"FSDP_VERSION": "2"}, None),
        ({}, r"FSDP 1: start it with --use_fsdp --fsdp_version 2"),
        ({"FSDP_VERSION": "1"}, r"FSDP 1: start it with --use_fsdp --fsdp_version 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params .*: leave it out"),
        ({"FSDP_VERSION": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed.*--fsdp_version 2"),
    ],
)
def test_commands_that_work_with_pieces_take_the_second_fsdp_alone(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], words: str | None
) -> None:
    announce(monkeypatch, MASTER_ADDR="here", WORLD_SIZE="2", RANK="1")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    for name, value in {"ACCELERATE_USE_FSDP": "true", **given}.items():
        monkeypatch.setenv(name, value)
    assert sharding()
    with pytest.raises(UsageError, match=words) if words else nullcontext():
        check_launcher(shards=True)
    announce(monkeypatch)
    assert not sharding(), "one process has the whole network"


def test_other_settings_of_accelerate_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, _, _, _ in UNUSED:
        monkeypatch.delenv(variable, raising=False)
    assert unused_settings() == []
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    (said,) = unused_settings()
    assert said.startswith("mixed_precision fp16 of accelerate's configuration is not used")


@pytest.mark.parametrize(
    ("command", "environment", "words"),
    [
        (
            "prune --speedup 2",
            {},
            "prune --speedup or --latency works in one process, and a launcher started 2",
        ),
        ("prune --component all", {}, "prune --component all works in one process"),
        ("prune --html page.html", {}, "prune --html works in one process"),
        ("export", {}, "export works in one process, and a launcher started 2"),
        ("finetune", {"ACCELERATE_USE_FSDP": "true"}, "accelerate is configured for FSDP 1: start it with"),
        ("eval", {"ACCELERATE_USE_FSDP": "true"}, "accelerate is configured for FSDP, but every process"),
        ("eval", {"ACCELERATE_USE_DEEPSPEED": "true"}, "accelerate is configured for DeepSpeed"),
    ],
)
def test_the_first_process_refuses_and_the_others_end_quietly(
    gfprune: Gfprune, tmp_path: Path, command: str, environment: dict[str, str], words: str
) -> None:
    """A launcher that saw another one fail would stop the first before it has spoken."""
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2", **environment}
    arguments = [*command.split(), "--model", "demo"]
    first = gfprune(*arguments, cwd=tmp_path, **several, RANK="0")
    assert (first.returncode, first.stdout, first.stderr.count("\n")) == (2, "", 1)
    assert words in first.stderr
    other = gfprune(*arguments, cwd=tmp_path, **several, RANK="1")
    assert (other.returncode, other.stdout, other.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_from_python_every_process_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    announce(monkeypatch, MASTER_ADDR="here", WORLD_SIZE="2", RANK="1")
    for command, settings in ((gfprune_cli.prune, {"speedup": 2.0}), (gfprune_cli.export, {})):
        with pytest.raises(UsageError, match="works in one process"):
            command("demo", out=tmp_path / "out", **settings)


@pytest.mark.parametrize(("there", "code"), [(False, 128 + signal.SIGTERM), (True, 0)])
def test_a_signal_ends_what_waits_for_the_others_and_is_shared_once_they_are_there(
    there: bool, code: int
) -> None:
    """A process that waits in a library hears of no signal; together, processes stop at their next step."""
    script = (
        "import sys, threading\n"
        "from gfprune_cli.cli import signals\n"
        "from gfprune_cli.runtime.launch import joined\n"
        "signals.PATIENCE = signals.LAST_CALL = 0.1\n"
        f"{'joined.set()' if there else ''}\n"
        "heard = signals.Signals()\n"
        "heard.listen()\n"
        "print('ready', flush=True)\n"
        "ended = threading.Event().wait(3 if joined.is_set() else 60)\n"
        "sys.exit(0 if heard.number else 1)\n"
    )
    environment = os.environ | {"MASTER_ADDR": "here", "WORLD_SIZE": "2", "RANK": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code, said
    assert ("stopped by SIGTERM" in said) is not there
