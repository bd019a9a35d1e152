"""Run gfprune on hostile input in processes that watch themselves.

A server process imports everything once, then forks for each job. The fork limits its own memory and
processor time, arms an audit hook and runs one command; what the hook saw, how the command ended and how much
memory it took come back as an `Outcome`. Files that native code opens (safetensors, tokenizers) do not pass
Python's audit hooks; nothing else is unseen.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 2 << 30  # bytes that a job may map beyond the server's own
PROCESSOR_SECONDS = 30  # of one job: what takes longer hangs
WALL_SECONDS = 120  # of one job that waits for something
CRASHED = 99  # exit code of a job whose exception nobody caught

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = (
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("os.chown", "os.setxattr", "shutil.", "tempfile."),
)
PROCESSES = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
NETWORK = ("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.")
FORBIDDEN = (*CHANGES, *PROCESSES, *NETWORK, "pickle.find_class", "cpython.run_")


@dataclass(frozen=True)
class Outcome:
    """How one job ended.

    Args:
        code: exit code; negative for a signal, as when the processor time is used up.
        stdout, stderr: what it printed.
        seen: forbidden things that it tried, as the audit hook words them.
        growth: bytes of memory beyond what the server held.
    """

    code: int
    stdout: str
    stderr: str
    seen: list[str]
    growth: int


class Guard:
    """The server's client.

    Args:
        world: the folder of everything hostile; commands may open files of their own case alone in it.
        shared: a folder outside the world that commands may read; the server puts sound checkpoints there.
        log: a folder for what jobs print.
    """

    def __init__(self, world: Path, shared: Path, log: Path) -> None:
        self.world, self.log = world.resolve(), log
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(self.world), str(shared.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"GFPRUNE_CACHE": str(self.world / "cache"), "OMP_NUM_THREADS": "1"},
        )
        assert self.answer() == "ready"

    def answer(self) -> Any:
        assert self.server.stdout is not None
        return json.loads(self.server.stdout.readline() or '"the server died"')

    def ask(self, **job: Any) -> Outcome:
        assert self.server.stdin is not None
        files = {name: str(self.log / name) for name in ("stdout", "stderr", "seen")}
        print(json.dumps(job | files), file=self.server.stdin, flush=True)
        ended = self.answer()
        texts = {name: Path(path).read_text(encoding="utf-8") for name, path in files.items()}
        return Outcome(
            ended["code"], texts["stdout"], texts["stderr"], texts["seen"].splitlines(), ended["growth"]
        )

    def run(self, *arguments: object, case: Path) -> Outcome:
        """A gfprune command; the files of `case` are the only ones of the world that it may open."""
        return self.ask(arguments=[str(argument) for argument in arguments], case=str(case.resolve()))

    def python(self, code: str, *, case: Path) -> Outcome:
        """A piece of Python under the same watch."""
        return self.ask(code=code, case=str(case.resolve()))

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(60)


@contextlib.contextmanager
def guard(world: Path, shared: Path, log: Path) -> Iterator[Guard]:
    client = Guard(world, shared, log)
    try:
        yield client
    finally:
        client.close()


def tree(world: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder: path -> mode, size and time of the last change."""
    found = {}
    for parent, folders, files in os.walk(world):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            state = os.lstat(path)
            # a lock that came and went changes the time of its folder
            folder = stat.S_ISDIR(state.st_mode)
            found[path] = (
                (state.st_mode, 0, 0) if folder else (state.st_mode, state.st_size, state.st_mtime_ns)
            )
    return found


class Watch:
    """The audit hook of the server: silent until a job arms it.

    Args:
        world, shared: see `Guard`.
    """

    def __init__(self, world: str, shared: str) -> None:
        import gfprune_cli

        self.world, self.case, self.output = world, "", -1
        package = os.path.dirname(os.path.abspath(gfprune_cli.__file__))
        self.readable = (
            shared,
            package,
            sys.prefix,
            sys.base_prefix,
            "/proc",
            "/sys",
            "/usr",
            "/dev/urandom",
            "/etc/mime.types",
        )

    def arm(self, case: str, output: int) -> None:
        self.case, self.output = case, output

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.output < 0:
            return
        what = self.judge(event, arguments)
        if what:
            self.say(f"{event}: {what}")
            raise PermissionError(f"the guard forbids {event}")

    def say(self, text: str) -> None:
        os.write(self.output, " ".join(text.split())[:500].encode(errors="backslashreplace") + b"\n")

    def judge(self, event: str, arguments: tuple[Any, ...]) -> str:
        """What is wrong with an event, or an empty string."""
        if event in ("open", "os.remove") and self.is_lock(arguments[0]):
            return ""
        if event == "open":
            return self.judge_open(*arguments)
        if event.startswith(FORBIDDEN):
            return repr(arguments[:2])
        if event in ("exec", "compile", "import", "ctypes.dlopen"):
            parts = arguments[1:2] if event == "compile" else arguments[:2]  # parsing text runs nothing
            names = [getattr(part, "co_filename", part) for part in parts]
            texts = [part.decode(errors="replace") if isinstance(part, bytes) else part for part in names]
            if any(self.foreign(text) for text in texts if isinstance(text, str)):
                return repr(texts)
        return ""

    def is_lock(self, path: Any) -> bool:
        """Whether this is the lock beside the output, which a command holds while it runs."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)) == os.path.join(self.case, ".out.gfprune-state.lock")

    def foreign(self, name: str) -> bool:
        """Whether code comes from the world, or carries its mark."""
        return self.world in name or "evil" in name

    def judge_open(self, path: Any, mode: Any, flags: Any) -> str:
        if not isinstance(path, str | bytes | os.PathLike):
            return ""  # a descriptor: whoever opened it was judged
        real = os.path.realpath(os.fsdecode(path))
        if real == os.devnull:
            return ""
        if (isinstance(flags, int) and flags & WRITES) or (isinstance(mode, str) and set(mode) & set("wax+")):
            return f"writes {real}"
        if not _below(real, (self.case, *self.readable)):
            return f"reads {real}"
        return ""


def _below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)


def serve(world: str, shared: str) -> None:
    """Answer jobs, one JSON document per line."""
    from gfprune_cli.cli.session import quiet_libraries

    quiet_libraries()
    import gfprune_cli.api
    import gfprune_cli.cli.tables  # noqa: F401

    watch = Watch(world, shared)
    warm(Path(shared))
    gc.collect()
    gc.freeze()  # or every collection in a fork would copy all of the server's memory
    sys.addaudithook(watch)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(run_job(watch, json.loads(line))), flush=True)


def warm(shared: Path) -> None:
    """Make the sound checkpoints. What libraries load on first use belongs to no case, and is loaded by then.

    Without a backward pass: the threads that it starts do not survive a fork.
    """
    tests = Path(__file__).parent.parent
    sys.path[:0] = [str(tests), str(tests / "support")]
    import torch
    from conftest import TINY
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from pipelines import FAMILIES

    from gfprune_cli.api import analyze, prune
    from gfprune_cli.inputs.pipeline import pipeline_class  # noqa: F401

    torch.manual_seed(0)
    network = UNet2DModel(**TINY)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(shared / "pipeline")
    network.save_pretrained(shared / "shards", max_shard_size="100KB")
    FAMILIES["stable-diffusion"](shared / "text")
    settings: dict[str, Any] = dict(
        images=2, sample_steps=1, draws=2, criterion="magnitude", one_shot=True, refit=False, recover=0
    )
    prune(str(shared / "pipeline"), out=shared / "pruned", **settings)
    analyze(str(shared / "text"))


def run_job(watch: Watch, job: dict[str, Any]) -> dict[str, int]:
    before = _memory("VmRSS")
    child = os.fork()
    if child == 0:
        _work(watch, job)
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(child, signal.SIGKILL))
    signal.alarm(WALL_SECONDS)
    _, status, usage = os.wait4(child, 0)
    signal.alarm(0)
    growth = usage.ru_maxrss * 1024 - before
    return {"code": os.waitstatus_to_exitcode(status), "growth": growth}


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _work(watch: Watch, job: dict[str, Any]) -> None:
    """The forked child: never returns."""
    code = CRASHED
    try:
        limit = _memory("VmSize") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        seen = os.open(job["seen"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.chdir(job["case"])
        if "code" in job:
            job["code"] = compile(job["code"], "job", "exec")
        watch.arm(job["case"], seen)
        code = _command(job)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _command(job: dict[str, Any]) -> int:
    from gfprune_cli.cli.main import app

    try:
        if "code" in job:
            exec(job["code"], {})
        else:
            app(job["arguments"], prog_name="gfprune")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="backslashreplace"))
        return CRASHED
    return 0


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
