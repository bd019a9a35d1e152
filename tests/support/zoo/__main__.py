# ruff: noqa: E402
"""Run gfprune over the tiny pipelines of diffusers' tests, and write what was seen to docs/support.md.

    python tests/support/zoo CHECKOUT [NAME ...]       # CHECKOUT: of the diffusers that is installed

Each component runs in a process of its own that is forked from this one. Rows are kept in WORK/rows.json:
what passed is not run again, unless `--again` is given. One pipeline of each class goes the whole way, the
others are pruned. `--bare` runs each network class alone in their place, with rows in WORK/bare.json.
"""

import argparse
import fcntl
import json
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import bare
import cases
import diffusers
import journey
import page
import stand_ins
import torch
import transformers

DENOISER = re.compile(r"Transformer|UNet|DiT|Prior|Unet")
NO_DENOISER = re.compile(r"^Auto|^VQ|ControlNet|Adapter|VAE|Vae|Decoder$")


def main() -> None:
    """Build what is missing, run what has not passed, say how many did."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of diffusers, for its tests")
    parser.add_argument("names", nargs="*", help="patterns of pipelines, or of classes; all by default")
    parser.add_argument("--bare", action="store_true", help="folders of one network, without a pipeline")
    parser.add_argument("--work", type=Path, default=Path("build/zoo"), help="checkpoints and rows")
    parser.add_argument("--limit", type=int, default=120, help="seconds of a processor for each component")
    parser.add_argument("--again", action="store_true", help="also what passed before")
    parser.add_argument("--count", action="store_true", help="run nothing")
    parser.add_argument("--brief", action="store_true", help="prune alone")
    parser.add_argument("--write", action="store_true", help="write the table to docs/support.md")
    asked = parser.parse_intermixed_args()
    work = asked.work.resolve()
    os.environ["GFPRUNE_CACHE"] = str(work / "cache")
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    rows = Rows(work / ("bare.json" if asked.bare else "rows.json"))
    if not asked.count:
        work.mkdir(parents=True, exist_ok=True)
        stand_ins.provide_packages()
        stand_ins.provide(work / "hub")
        import gfprune_cli.api  # noqa: F401, before the forks

        (run_bare if asked.bare else run)(asked, work, rows)
    print((page.bare_counts if asked.bare else page.counts)(rows.found))
    if asked.write:
        page.write(rows.found, asked.checkout, bare=asked.bare)


class Rows:
    """What was seen, by "pipeline/component"; on disk after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = self.read()

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep one row, beside those that another process has written since."""
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.found = self.read() | {name: row}
            self.path.write_text(json.dumps(self.found, indent=1))

    def read(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}


def run(asked: argparse.Namespace, work: Path, rows: Rows) -> None:
    for name in chosen(asked, build_all(asked.checkout, work / "models", rows)):
        for component, class_name in networks_of(work / "models" / name).items():
            key = f"{name}/{component}"
            passed = rows.found.get(key, {}).get("status") == "passed"
            first = class_name not in {
                row.get("class") for other, row in rows.found.items() if row.get("whole") and other != key
            }
            whole = first and not asked.brief
            known = rows.found.get(key, {})
            if passed and not asked.again and not (whole and not known.get("whole") and "broke" not in known):
                continue
            start = time.monotonic()
            row = forked(asked.limit, visit, work, name, component, whole)
            row = {"class": class_name, "whole": whole and row["status"] == "passed", **row}
            row["seconds"] = round(time.monotonic() - start, 1)
            if passed and row["status"] != "passed":  # it prunes, and what follows does not
                row = rows.found[key] | {
                    "broke": f"{row.get('stage', '')}: {row['error']}".removeprefix(": ")
                }
            rows.add(key, row)
            say(key, row, class_name)


def run_bare(asked: argparse.Namespace, work: Path, rows: Rows) -> None:
    """Those first that no other table has."""
    names, folder = page.unseen_first(chosen(asked, bare.class_names())), work / "bare"
    missing = [name for name in names if not (folder / name / bare.CONFIG).exists()]
    built = forked(600, bare.build_all, asked.checkout, missing, work / "models", folder) if missing else {}
    if built.get("error"):
        sys.exit(f"the networks could not be built: {built['error']}")
    for name in names:
        if rows.found.get(name, {}).get("status") == "passed" and not asked.again:
            continue
        start = time.monotonic()
        if name in built.get("unbuilt", {}):
            row = {"status": "unbuilt", "error": built["unbuilt"][name]}
        else:
            row = forked(asked.limit, bare.walk, folder / name, work / "runs" / name)
        row["seconds"] = round(time.monotonic() - start, 1)
        rows.add(name, row)
        say(name, row)


def chosen(asked: argparse.Namespace, names: list[str]) -> list[str]:
    """The names that one of the patterns fits, by pattern."""
    fitting = (name for pattern in asked.names or [""] for name in names if re.search(pattern, name))
    return list(dict.fromkeys(fitting))


def say(name: str, row: dict[str, Any], class_name: str = "") -> None:
    told = (row["status"], row.get("prune", ""), row["seconds"], row.get("error", "")[:300])
    print(name, *filter(None, [class_name]), *told, flush=True)


def visit(work: Path, name: str, component: str, whole: bool) -> dict[str, Any]:
    model = work / "models" / name
    options = cases.use_settings(model)
    return journey.walk(model, component, options, work / "runs" / f"{name}-{component}", whole=whole)


def networks_of(folder: Path) -> dict[str, str]:
    """Component -> class of the denoisers of a pipeline."""
    index = json.loads((folder / "model_index.json").read_text())
    entries = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[0]}
    return {
        name: kind for name, kind in entries.items() if DENOISER.search(kind) and not NO_DENOISER.search(kind)
    }


def build_all(checkout: Path, folder: Path, rows: Rows) -> list[str]:
    """Names of the pipelines that could be built; the others are rows, with the reason."""
    index = folder / "names.json"
    classes: dict[str, Any] = {}
    if not index.exists():
        classes, closed = cases.test_classes(checkout)
        for name, reason in closed.items():
            rows.add(name, {"status": "unbuilt", "error": reason})
        folder.mkdir(parents=True, exist_ok=True)
        index.write_text(json.dumps(sorted(classes)))
    names = json.loads(index.read_text())
    for name in names:
        known = rows.found.get(name, {})
        if (folder / name / cases.DESCRIPTION).exists() or known.get("error"):
            continue
        classes = classes or cases.test_classes(checkout)[0]
        row = forked(120, built, name, classes[name], folder / name)
        if row["status"] != "passed":
            rows.add(name, {"status": "unbuilt", "error": row["error"]})
    return [name for name in names if (folder / name / cases.DESCRIPTION).exists()]


def built(name: str, test_class: Any, folder: Path) -> dict[str, Any]:
    cases.build(name, test_class, folder)
    return {"status": "passed"}


def forked(limit: int, function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The result of a function in a child process that may take `limit` seconds of a processor, and ten times
    that where it shares or waits for one."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        try:
            found = function(*args)
        except BaseException as error:
            found = {"status": "error", "error": f"{type(error).__name__}: {error}"[:300]}
        with os.fdopen(writer, "w") as stream:
            json.dump(found, stream)
        os._exit(0)
    os.close(writer)
    end, text, ended = time.monotonic() + 10 * limit, b"", False
    with os.fdopen(reader, "rb", buffering=0) as stream:
        while not ended and select.select([stream], [], [], max(0.0, end - time.monotonic()))[0]:
            piece = stream.read(1 << 16)
            text, ended = text + piece, not piece
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return json.loads(text) if ended and text else {"status": "error", "error": f"took more than {limit} s"}


if __name__ == "__main__":
    main()
