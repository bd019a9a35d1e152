"""Run gfprune commands under failing disks and kills: one warm process that forks for every trial.

    with Machine(scratch, folder) as machine:
        ended = machine.run(["prune", ...], Fault("write", at=3, error=errno.ENOSPC), cache=folder)

`faults.c` is loaded before libc's own calls, so that what fails is the call itself, whoever makes it: Python,
the safetensors library or PyTorch. Nothing in gfprune knows that it is being tested.
"""

import ctypes
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

KINDS = ("read", "write", "sync", "rename", "make", "remove", "change", "mode")  # as in faults.c
LIMIT = 120  # seconds: a trial that takes longer hangs


@dataclass(frozen=True)
class Fault:
    """Which call fails, and how.

    Args:
        kind: one of `KINDS`; "change" counts all calls that change what is on disk.
        at: the number of the call, from 1.
        error: an errno value; 0 kills the process (a write is torn in half first).
        lasting: all later calls of this kind fail too.
    """

    kind: str
    at: int
    error: int = 0
    lasting: bool = False


@dataclass(frozen=True)
class Ended:
    """How a trial ended.

    Args:
        code: exit code, or minus the signal's number.
        seen: calls by kind, until the end or the kill.
        hits: calls that were made to fail.
    """

    code: int
    out: str
    err: str
    seen: dict[str, int]
    hits: int

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def build(folder: Path) -> Path:
    """Compile faults.c."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    return library


class Machine:
    """A process with everything imported and the faults loaded; every trial is a fork of it.

    Args:
        scratch: where the library and the trials' output go; outside of `root`.
        root: only files below it fail.
    """

    def __init__(self, scratch: Path, root: Path) -> None:
        self.scratch, self.root = scratch, root
        environment = os.environ | {
            "LD_PRELOAD": str(build(scratch)),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self,
        arguments: list[str],
        fault: Fault | None = None,
        *,
        cache: Path,
        log: Path | None = None,
        kill_after: float | None = None,
    ) -> Ended:
        """One command in a process of its own, killed from outside after `kill_after` seconds."""
        request = {
            "arguments": arguments,
            "fault": asdict(fault) if fault else None,
            "root": str(self.root),
            "cache": str(cache),
            "log": str(log or ""),
            "scratch": str(self.scratch),
            "kill_after": kill_after,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that forks has died"
        out, err = ((self.scratch / name).read_text(errors="replace") for name in ("out", "err"))
        return Ended(out=out, err=err, **json.loads(answer))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=LIMIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lost_in_a_power_cut(log: Path, published: Path) -> list[str]:
    """What a folder or file could lose if power went right after it was published.

    Args:
        log: of a run that ended well: every change in order.
        published: a path that the run renamed something to.

    Returns:
        Files whose last bytes, and folders whose entries, were not synced before the rename; the folder
        that holds `published`, if its new entry was never synced.
    """
    dirty: dict[str, str] = {}  # inode -> path
    lost: set[str] = set()
    awaited = ""
    for line in log.read_text().splitlines():
        word, path, other, inode, parent, other_parent = line.split("\t")
        if word == "sync":
            dirty.pop(inode, None)
            awaited = "" if inode == awaited else awaited
            continue
        if word in ("write", "make"):
            dirty[inode] = path
        if word != "write":
            dirty[parent] = str(Path(path).parent)
        if word in ("rename", "exchange"):
            moved = {number: name for number, name in dirty.items() if Path(name).is_relative_to(path)}
            if other == str(published):
                lost |= set(moved.values())
                awaited = other_parent
            dirty |= {number: other + name[len(path) :] for number, name in moved.items()}
            dirty[other_parent] = str(Path(other).parent)
    return sorted(lost | ({str(published.parent)} if awaited else set()))


def serve() -> None:
    """Import everything once, then fork for each request on stdin."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    warm_up()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        request = json.loads(line)
        library.fault_reset()
        child = os.fork()
        if not child:
            trial(library, request)
        code = waited(child, request["kill_after"])
        seen = {kind: library.fault_seen(number) for number, kind in enumerate(KINDS)}
        print(json.dumps({"code": code, "seen": seen, "hits": library.fault_hits()}), flush=True)


def warm_up() -> None:
    """Import what trials import. Nothing here may start autograd: its threads do not survive a fork."""
    import gc
    import importlib

    import diffusers
    import matplotlib.figure
    import torch
    import torch_pruning  # noqa: F401
    from PIL import Image

    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).parents[1] / "support"))
    importlib.import_module("draws").few_draws()
    importlib.import_module("gfprune_cli.pruning.job").SAVE_EVERY = 1  # recovery leaves states, too
    for name in ("UNet2DModel", "DDPMPipeline", "DDIMScheduler", "DDPMScheduler"):
        getattr(diffusers, name)
    assert diffusers.DDPMScheduler().compatibles  # diffusers imports these when it makes a scheduler
    Image.preinit()
    matplotlib.figure.Figure().savefig(io.BytesIO(), format="svg")
    for name in (
        "cli.main", "pruning.command", "recovery.command", "evaluation.command", "evaluation.latency",
        "deploy.command", "checkpoint.modeling.gfprune_models_v2", "pages.evaluation_page", "cli.tables",
    ):  # fmt: skip
        importlib.import_module(f"gfprune_cli.{name}")
    for name in ("rich.console", "rich.markup", "pydantic.dataclasses"):
        importlib.import_module(name)
    gc.freeze()  # collections in the forks leave the pages shared


def waited(child: int, kill_after: float | None) -> int:
    """The exit code of a child, which is killed after a time, and for certain after `LIMIT`."""
    watched = os.pidfd_open(child)
    ended, _, _ = select.select([watched], [], [], kill_after if kill_after is not None else LIMIT)
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(watched)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if ended or kill_after is not None else -signal.SIGALRM  # it hung


def trial(library: Any, request: dict[str, Any]) -> None:
    """Become the command; never returns."""
    code = 70
    try:
        os.setsid()
        scratch = Path(request["scratch"])
        for descriptor, name in ((1, "out"), (2, "err")):
            target = os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(target, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
        os.environ["GFPRUNE_CACHE"] = request["cache"]
        from gfprune_cli.cli.main import run

        fault = request["fault"] or {"kind": KINDS[0], "at": 0, "error": 0, "lasting": False}
        library.fault_arm(
            request["root"].encode(),
            request["log"].encode(),
            KINDS.index(fault["kind"]),
            ctypes.c_long(fault["at"]),
            fault["error"],
            int(fault["lasting"]),
        )
        sys.argv = ["gfprune", *request["arguments"]]
        code = 0
        try:
            run()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
