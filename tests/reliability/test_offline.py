"""Offline means no socket; online means files that are what the Hub declares, byte for byte."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PRUNE
from hub_server import Hub, hub_server

REPO = "someone/tiny"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# Runs command lines one after the other in one fresh process; prints their exit codes and the socket events.
WATCHED = """
import contextlib, io, json, sys
events = []


def watch(name, arguments):
    if name.startswith("socket."):
        frame = sys._getframe()
        while frame and frame.f_code.co_name != "_has_ipv6":
            frame = frame.f_back
        if not frame:  # urllib3, when imported, binds ::1 to see whether there is IPv6; it sends nothing
            events.append(name)


sys.addaudithook(watch)
from gfprune_cli.cli.main import app
codes, errors = [], []
for arguments in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            app(arguments, prog_name="gfprune")
            codes.append(0)
        except SystemExit as end:
            codes.append(end.code or 0)
    errors.append(err.getvalue()[-300:])
print(json.dumps({"codes": codes, "errors": errors, "sockets": sorted(set(events))}))
"""
RESOLVE = """
import json, sys
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.errors import GfpruneError
try:
    print(json.dumps({"folder": str(resolve(sys.argv[1], offline=len(sys.argv) > 2).folder), "error": ""}))
except GfpruneError as error:
    print(json.dumps({"error": str(error), "code": error.exit_code}))
"""


def python(script: str, *arguments: str, hub: Hub, home: Path, **environment: str) -> dict:
    """Run a script in a fresh process: huggingface_hub reads its variables once, at import."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env = clean | {
        "HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1",
        "GFPRUNE_CACHE": str(home / "gfprune"),
    } | environment  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def hub(smallest_folder: Path) -> Iterator[Hub]:
    with hub_server({REPO: smallest_folder}) as served:
        yield served


def commands(out: Path) -> list[list[str]]:
    prune = ["prune", "--model", REPO, "--sparsity", "0.5", "--out", str(out), *map(str, PRUNE)]
    finetune = ["finetune", "--model", str(out), "--out", f"{out}-tuned", "--images", "8", "--steps", "2",
                "--sample-steps", "2", "--batch", "4"]  # fmt: skip
    evaluate = ["eval", "--model", str(out), "--reference", REPO, "--samples", "4", "--steps", "1",
                "--no-latency"]  # fmt: skip
    export = ["export", "--model", str(out), "--format", "safetensors", "--out", f"{out}-exported"]
    return [["analyze", "--model", REPO, "--sensitivity"], prune, finetune, evaluate, export]


def check_no_socket(hub: Hub, home: Path, given: list[list[str]], **environment: str) -> None:
    """Commands on a Hub model that is in the cache, under watch: none opens a socket."""
    assert python(RESOLVE, REPO, hub=hub, home=home)["error"] == ""
    asked = len(hub.requests)
    assert asked > 0
    found = python(WATCHED, json.dumps(given), hub=hub, home=home, **environment)
    assert found["codes"] == [0] * len(given), found["errors"]
    assert found["sockets"] == []
    assert len(hub.requests) == asked


def test_offline_opens_no_socket(hub: Hub, tmp_path: Path) -> None:
    """All five commands with --offline."""
    check_no_socket(hub, tmp_path / "home", [[*given, "--offline"] for given in commands(tmp_path / "out")])


@pytest.mark.thorough  # --offline sets that variable
def test_hf_hub_offline_opens_no_socket(hub: Hub, tmp_path: Path, thorough: bool) -> None:
    """The variable is what --offline sets, too: one command shows that ours is read before the libraries'."""
    given = commands(tmp_path / "out") if thorough else [["analyze", "--model", REPO]]
    check_no_socket(hub, tmp_path / "home", given, HF_HUB_OFFLINE="1")


def test_the_watch_sees_a_socket(hub: Hub, tmp_path: Path) -> None:
    """The same look at a run that may use the network: it finds some."""
    commands = json.dumps([["analyze", "--model", REPO]])
    found = python(WATCHED, commands, hub=hub, home=tmp_path / "home")
    assert found["codes"] == [0]
    assert "socket.connect" in found["sockets"]


class TestDigests:
    @pytest.mark.parametrize("name", [WEIGHTS, "unet/config.json", "model_index.json"])
    def test_a_bit_that_flips_on_the_way_is_caught(self, hub: Hub, tmp_path: Path, name: str) -> None:
        """The size is right, and huggingface_hub is content; the digest that the server declares is not."""
        home = tmp_path / "home"
        hub.corrupt.add(name)
        found = python(RESOLVE, REPO, hub=hub, home=home)
        assert found["code"] == 1
        assert found["error"].startswith(f"{name} of {REPO} is damaged: its digest is ")
        assert found["error"].endswith("it was removed from the cache, try again")
        hub.corrupt.clear()
        again = python(RESOLVE, REPO, hub=hub, home=home)
        assert again["error"] == "", "the damaged copy is gone and the next run fetches a good one"

    def test_a_bit_that_flips_in_the_cache_is_caught_offline(self, hub: Hub, tmp_path: Path) -> None:
        """The cache names its files by the digest that the server declared."""
        home = tmp_path / "home"
        folder = Path(python(RESOLVE, REPO, hub=hub, home=home)["folder"])
        blob = (folder / WEIGHTS).resolve()
        content = bytearray(blob.read_bytes())
        content[len(content) // 2] ^= 1
        blob.write_bytes(content)
        found = python(RESOLVE, REPO, "offline", hub=hub, home=home)
        assert "is damaged" in found["error"]
        assert found["error"].endswith("run once with network access")
        assert "only a part of" in python(RESOLVE, REPO, "offline", hub=hub, home=home)["error"]
        assert python(RESOLVE, REPO, hub=hub, home=home)["error"] == ""
