"""The command line in processes of their own, without a second import of torch.

Run as a program, this is a server: it imports everything once, never computes, and forks for each command
that it is told on stdin (one JSON document a line); the child plays its part of a `Trial` and runs the
command.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WORK = 2**31 - 1  # rounds of a key derivation: many minutes, in one call that no signal interrupts


@dataclass(frozen=True)
class Trial:
    """One command, and what happens to it.

    Args:
        arguments: of gfprune.
        environment: variables on top of those of the tests' own process.
        folder: where it runs; by default where the server does.
        signals: signal numbers that the process gets, one after the other.
        phase, nth: at which event they come, counted from 0; without a phase they do not.
        after: seconds after which they come instead, from the server.
        block: from that event on, be in one long call into a library.
        hold: at that event, open this FIFO for reading: wait until somebody writes to it.
        constants: "module:NAME" -> value, set in the child; a text is a path.
        script: Python that runs instead of the command.
        ignore: signals that the parent had chosen to ignore.
        broken: file descriptors whose reader is gone; `full`: those that lie on a full disk.
    """

    arguments: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    signals: list[int] = field(default_factory=list)
    phase: str = ""
    nth: int = 0
    after: float = 0.0
    block: bool = False
    hold: str = ""
    constants: Mapping[str, float | str] = field(default_factory=dict)
    script: str = ""
    ignore: list[int] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Args:
        code: exit status; minus the signal if one killed it.
        phases: of its events, in order.
        seconds: from the first signal to the end; None if there was none.
        signalled: whether the signal came before the end.
    """

    code: int
    stdout: str
    stderr: str
    phases: list[str]
    seconds: float | None
    signalled: bool

    @property
    def error(self) -> str:
        """What comes after `error: ` in the last line of stderr."""
        last = self.stderr.rstrip("\n").rpartition("\n")[2]
        return last.removeprefix("error: ") if last.startswith("error: ") else ""


class Server:
    """A warm process, and the commands that run as its children."""

    def __init__(self, folder: Path, *, thorough: bool = False) -> None:
        self.folder, self.count = folder, 0
        extra = ["onnx", "onnxruntime", "onnxscript", "torch.onnx"] if thorough else ["draws"]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *extra], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, arguments: list[Any], **how: Any) -> tuple[int, Path]:
        """Start a command; (process id, folder of what it says)."""
        self.count += 1
        folder = self.folder / f"{self.count:05d}"
        folder.mkdir(parents=True)
        how["environment"] = {**os.environ, **how.get("environment", {})}
        trial = Trial([str(argument) for argument in arguments], **how)
        return self.ask(start=asdict(trial), folder=str(folder)), folder

    def wait(self, started: tuple[int, Path]) -> Outcome:
        pid, folder = started
        code, end = self.ask(wait=pid)
        events = (folder / "events").read_text().splitlines()
        marks = [float(line.split()[1]) for line in events if line.startswith("signal ")]
        return Outcome(
            code,
            (folder / "stdout").read_text(),
            (folder / "stderr").read_text(),
            [line for line in events if not line.startswith("signal ")],
            end - marks[0] if marks else None,
            bool(marks),
        )

    def run(self, *arguments: Any, **how: Any) -> Outcome:
        return self.wait(self.start(list(arguments), **how))

    def together(
        self,
        count: int,
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        signals: Mapping[int, int] | None = None,
        phase: str = "",
        nth: int = 0,
        **how: Any,
    ) -> list[Outcome]:
        """One command in several processes over gloo, as a launcher would start them.

        Args:
            signals: rank -> what it gets at the nth event of a phase, counted from 0.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        several |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        started = []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            given = {**several, **own, **(environment or {})}
            sent = [signals[rank]] if signals and rank in signals else []
            when = {"signals": sent, "phase": phase, "nth": nth} if sent else {}
            started.append(self.start(list(arguments), environment=given, **when, **how))
        return [self.wait(one) for one in started]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


CALLER = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as door:
    door.connect({address!r})
    door.sendall(json.dumps([sys.argv[1:], os.getcwd()]).encode())
    door.shutdown(socket.SHUT_WR)
    code, out, err = json.load(door.makefile())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class Door:
    """A program for shells that has the commands run by a server.

    Args:
        program: where it is written.
        how: of every `Trial`.
    """

    def __init__(self, server: Server, program: Path, **how: Any) -> None:
        self.server, self.how = server, how
        self.folder = tempfile.TemporaryDirectory()  # the address of a socket must be short
        address = os.path.join(self.folder.name, "door")
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(address)
        self.socket.listen()
        program.write_text(CALLER.format(python=sys.executable, address=address))
        program.chmod(0o755)
        threading.Thread(target=self.answer, daemon=True).start()

    def answer(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                caller, _ = self.socket.accept()
                with caller, caller.makefile("rw") as asked:
                    arguments, folder = json.load(asked)
                    done = self.server.run(*arguments, folder=folder, **self.how)
                    json.dump([done.code, done.stdout, done.stderr], asked)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.folder.cleanup()


# --- the server's side


def warm() -> None:
    """Import what the commands import; compute nothing, as threads do not survive a fork."""
    import diffusers
    import torch

    for name in (
        "accelerate", "matplotlib.figure", "torch_pruning",
        "gfprune_cli.api", "gfprune_cli.cli.main", "gfprune_cli.cli.tables",
        "gfprune_cli.pages.evaluation_page", *sys.argv[1:],
    ):  # fmt: skip
        importlib.import_module(name)
    for name in ("DDIMScheduler", "DDPMPipeline", "DDPMScheduler", "UNet2DModel"):
        getattr(diffusers, name)  # diffusers imports a class when it is asked for
    torch.set_num_threads(1)
    if "draws" in sys.modules:
        sys.modules["draws"].few_draws()


def serve() -> None:
    # as the command line has it before diffusers is imported
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    warm()
    timers: dict[int, threading.Timer] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            trial, folder = Trial(**request["start"]), Path(request["folder"])
            (folder / "events").touch()
            pid = os.fork()
            if pid == 0:
                child(trial, folder)
            if trial.after:
                timers[pid] = threading.Timer(trial.after, shoot, (pid, trial, folder))
                timers[pid].start()
            answer: Any = pid
        else:
            pid = request["wait"]
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            end = time.monotonic()
            if pid in timers:  # before the process id is given back
                timers.pop(pid).cancel()
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), end]
        print(json.dumps(answer), flush=True)


def shoot(pid: int, trial: Trial, folder: Path) -> None:
    note(folder, f"signal {time.monotonic()}")
    for number in trial.signals:
        os.kill(pid, number)


def note(folder: Path, text: str) -> None:
    with (folder / "events").open("a") as file:
        file.write(text + "\n")


# --- the child's side


def child(trial: Trial, folder: Path) -> None:
    code = 70
    try:
        code = play(trial, folder)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def play(trial: Trial, folder: Path) -> int:
    import huggingface_hub.constants

    from gfprune_cli.cli.main import app
    from gfprune_cli.cli.session import Session

    os.environ.clear()
    os.environ.update(trial.environment)
    importlib.reload(huggingface_hub.constants)  # which reads them
    redirect(trial, folder)
    os.chdir(trial.folder or os.curdir)
    # whoever runs the tests in the background, or with nohup, has these ignored, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for number in trial.ignore:
        signal.signal(number, signal.SIG_IGN)
    for name, value in trial.constants.items():
        module, _, constant = name.partition(":")
        setattr(importlib.import_module(module), constant, Path(value) if isinstance(value, str) else value)
    if trial.script:
        exec(compile(trial.script, "script", "exec"), {"__name__": "__main__"})
        return 0
    original, seen = Session.progress, {"count": 0}

    def progress(session: Session, event: Any) -> None:
        if event.phase != "pass":
            note(folder, event.phase)
        if event.phase == trial.phase:
            seen["count"] += 1
            if seen["count"] == trial.nth + 1:
                happen(trial, folder)
        original(session, event)

    Session.progress = progress  # type: ignore[method-assign]
    try:
        app(trial.arguments, prog_name="gfprune")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def redirect(trial: Trial, folder: Path) -> None:
    for descriptor, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
        opened = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    for descriptor in trial.broken:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, descriptor)
    for descriptor in trial.full:
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


def happen(trial: Trial, folder: Path) -> None:
    """What the trial is about, at its event."""
    import hashlib

    if trial.hold:
        Path(trial.hold).read_bytes()
    if trial.signals and not trial.after:
        if trial.block:  # from another thread: this one is to be deep inside the library
            threading.Thread(target=shoot, args=(os.getpid(), trial, folder), daemon=True).start()
        else:
            shoot(os.getpid(), trial, folder)
    if trial.block:
        hashlib.pbkdf2_hmac("sha256", b"", b"", WORK)


if __name__ == "__main__":
    serve()
