"""Fixtures of the reliability tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Commands in forked processes: the imports are paid for once per file of tests."""
    served = Server(tmp_path_factory.mktemp("forked"))
    yield served
    served.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variable of a cache that the commands of one file of tests share."""
    return {"GFPRUNE_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def pruned(
    server: Server, cache: dict[str, str], pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small pruned checkpoint."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    done = server.run(
        "prune", "--model", pipeline_folder, "--sparsity", 0.5, "--out", out, *PRUNE, environment=cache
    )
    assert done.code == 0, done.stderr
    return out


PRUNE = (
    "--images", 8, "--sample-steps", 2, "--draws", 8, "--batch", 4, "--iterations", 3,
    "--steps-per-iteration", 2,
)  # fmt: skip


@pytest.fixture
def record(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a figure for docs/reliability.md past pytest's capture."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return show
