"""One process or several: what the environment says, and what batch systems leave in it."""

import pytest

from gfprune_cli.errors import UsageError
from gfprune_cli.launch import announced, check_launcher, launched, main_process


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
