"""Where a benchmark's numbers come from: command, seed, machine, versions and date, as Markdown."""

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gfprune_cli.checkpoint.record import installed_tools
from gfprune_cli.runtime.device import device_name

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = REPOSITORY / "docs" / "benchmarks"


def header(command: str, seed: int | str) -> str:
    """The first lines of a benchmark's page.

    Args:
        command: what repeats the run, from the root of the repository.
        seed: of the run, or the range of seeds.
    """
    versions = {name: found for name, found in installed_tools().items() if found}
    lines = [
        f"- command: `{command}`",
        f"- seed: {seed}",
        f"- machine: {device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        f"PyTorch threads, load {load()}, {accelerator()}",
        f"- versions: Python {platform.python_version()}, "
        + ", ".join(f"{name} {found}" for name, found in versions.items()),
        f"- commit: {commit()}",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    ]
    return "\n".join(lines) + "\n"


def accelerator() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def load() -> str:
    """Processes that wanted to run over the last minute: what else kept the machine busy."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def commit() -> str:
    """The commit that ran, marked where the working tree differs from it in more than documents.

    New files count where they could take part: in the package and in the benchmarks.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs") or git(
        "status", "--porcelain", "--", "gfprune_cli", "benchmarks"
    )
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown, line by line."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return [first, "|---" * len(head) + "|", *others]


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as flags of a command."""
    texts = {
        name: "" if value is True else f" {value}" if isinstance(value, str) else f" {value:g}"
        for name, value in settings.items()
    }
    return " ".join(f"--{name.replace('_', '-')}{text}" for name, text in texts.items())


def write_page(path: Path, title: str, command: str, seed: int | str, body: str) -> Path:
    """A page of results: title, where they come from, and the rest in Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {title}\n\n{header(command, seed)}\n{body.strip()}\n", encoding="utf-8")
    return path
