"""The pipelines and networks of diffusers' own tests, which `make support` writes to docs/support.md."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ZOO = Path(__file__).parents[1] / "support" / "zoo"
CHECKOUT = os.environ.get("DIFFUSERS")


@pytest.mark.slow
@pytest.mark.skipif(not CHECKOUT, reason="DIFFUSERS names no checkout of diffusers")
@pytest.mark.parametrize("flags", [[], ["--bare"]], ids=["pipelines", "bare folders"])
def test_nothing_of_diffusers_ends_in_an_error(thorough: bool, tmp_path: Path, flags: list[str]) -> None:
    """Each is pruned, or refused in one line; a refusal says why, so it is no failure."""
    if not thorough:
        pytest.skip("takes hours: --thorough")
    command = [sys.executable, str(ZOO), str(CHECKOUT), "--work", str(tmp_path), "--limit", "1200"]
    done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, text=True)
    *rows, counts = done.stdout.splitlines()
    assert done.returncode == 0
    assert " pass;" in counts
    assert not [row for row in rows if row.split()[1 if flags else 2] == "error"]
