"""One process or several: what the environment says, and what batch systems leave in it."""

import os
import signal
import subprocess
import sys

import pytest

from gfprune_cli.errors import UsageError
from gfprune_cli.runtime.launch import announced, check_launcher, launched, main_process


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
