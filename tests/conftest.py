"""Fixtures: tiny checkpoints made on the spot, caches in a temporary folder, no network."""

import gc
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no failure.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")

# Before torch is imported anywhere: small tensors are slower with several threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

TINY = dict(
    sample_size=16,
    in_channels=3,
    out_channels=3,
    layers_per_block=1,
    block_out_channels=(16, 32),
    norm_num_groups=4,
    attention_head_dim=8,
    # attention is in the middle, too; runs on blocks with some take a third longer
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
)
SMALLEST = TINY | dict(sample_size=8, block_out_channels=(8, 16))
QUICK = dict(images=8, sample_steps=2, draws=4, iterations=2, recover=2)
ONE_SHOT = {name: value for name, value in QUICK.items() if name != "iterations"} | {"one_shot": True}
WHOLE_COMMANDS = ("commands", "reliability", "benchmarks")
END_TO_END = "test_stdout_is_the_output_path_and_nothing_else"
Gfprune = Callable[..., subprocess.CompletedProcess[str]]
Shell = Callable[[list[str]], str]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case of each test of the rooms, one command")
    parser.addoption(
        "--thorough", action="store_true", help="every case, and the long form of reliability tests"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --thorough no test so marked and a sample of every matrix; with --quick still less."""
    if config.getoption("quick"):
        quick_ones(config, items)
    elif not config.getoption("thorough"):
        samples(config, items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    # long files first: at the end no process waits long for the other
    items.sort(key=lambda item: (room_of(item) not in WHOLE_COMMANDS, item.path not in slow))


def room_of(item: pytest.Item) -> str:
    """The folder of a test, as in gfprune_cli."""
    return item.path.relative_to(Path(__file__).parent).parts[0]


def samples(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every n-th case of what is marked `matrix(n)`, none of `thorough`; what the command line names runs."""
    seen: dict[tuple[Path, str], int] = {}
    kept, left = [], []
    for item in items:
        mark = item.get_closest_marker("matrix")
        key = item.path, getattr(item, "originalname", item.name)
        number = seen[key] = seen.get(key, -1) + 1
        sampled = mark is None or number % mark.args[0] == 0
        (kept if sampled and not only_thorough(config, item) else left).append(item)
    if any("[" in argument for argument in config.args):
        return
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def only_thorough(config: pytest.Config, item: pytest.Item) -> bool:
    """Whether a test is left to the long form: its lines have a shorter test, and nobody asked for it."""
    name = getattr(item, "originalname", item.name)
    asked = any(name in argument.split("::") for argument in config.args)
    return item.get_closest_marker("thorough") is not None and not asked


def quick_ones(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One case of each test of the rooms, and one command from end to end."""
    chosen, left = {}, []
    for item in items:
        name = getattr(item, "originalname", item.name)
        long = any(item.get_closest_marker(mark) for mark in ("slow", "thorough"))
        alone = room_of(item) not in WHOLE_COMMANDS and not long
        if (alone or name == END_TO_END) and (item.path, name) not in chosen:
            chosen[item.path, name] = item
        else:
            left.append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = chosen.values()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """With --durations also those of whole files, which processes share the tests by."""
    if not terminalreporter.config.getoption("durations"):
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            seconds[str(getattr(report, "nodeid", "")).partition("::")[0]] += getattr(report, "duration", 0)
    terminalreporter.section(f"seconds by file, {seconds.total():.0f} in all")
    for path, taken in seconds.most_common(12):
        terminalreporter.write_line(f"{taken:6.0f}  {path}")


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether the long form was asked for: more faults, more kills, more mutants, longer runs."""
    return bool(pytestconfig.getoption("thorough"))


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for the whole session: what modules prune once and what tests prune come from the same cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GFPRUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True, scope="module")
def imports_are_looked_through_no_more() -> None:
    """Half a million objects of diffusers and torch, at every collection: a seventh of what a prune takes."""
    import diffusers  # noqa: F401

    import gfprune_cli.api  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """The command line sets variables for the libraries: a test must not set them for the next."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def words_of_the_command_line() -> Iterator[None]:
    """Messages are tested as the command line shows them; `test_errors.py` has those of Python."""
    from gfprune_cli.errors import flags

    with flags():
        yield


@pytest.fixture(autouse=True, scope="session")
def fewer_draws(thorough: bool) -> Iterator[None]:
    """In this process, and in those that `server` forks; as many as users get with --thorough."""
    from draws import few_draws

    with pytest.MonkeyPatch.context() as patch:
        if not thorough:
            few_draws(patch.setattr)
        yield


@pytest.fixture
def all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests whose numbers a process from the start must agree with."""
    from draws import ALL

    for name, value in ALL.items():
        monkeypatch.setattr(name.replace(":", "."), value)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDPM pipeline of 165 k parameters, as diffusers saves it; trained just enough that a refit helps."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    network, scheduler = UNet2DModel(**TINY), DDPMScheduler()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(60):
        images = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, 16)
        noise, steps = torch.randn_like(images), torch.randint(0, 1000, (8,))
        optimizer.zero_grad()
        found = network(scheduler.add_noise(images, noise, steps), steps).sample
        (found - noise).square().mean().backward()
        optimizer.step()
    DDPMPipeline(network, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smallest_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDPM pipeline with the layers of `pipeline_folder`, half as wide and untrained."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("smallest") / "tiny"
    DDPMPipeline(UNet2DModel(**SMALLEST), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gfprune(server: Any) -> Gfprune:
    """Run the command line in a process of its own, which is forked: the imports are paid for once.

    With variables, which libraries may read when they are imported, it is a process from the start, but for
    those of huggingface_hub, which are read anew.
    """

    def run(
        *arguments: object, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        if not all(name.startswith("HF_") for name in environment):
            return fresh(*arguments, cwd=cwd, **environment)
        done = server.run(*arguments, folder=str(cwd or ""), environment=environment)
        return subprocess.CompletedProcess(list(arguments), done.code, done.stdout, done.stderr)

    return run


def fresh(
    *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a shell would."""
    return subprocess.run(
        [sys.executable, "-m", "gfprune_cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        timeout=600,
        check=False,
    )


SMALLER_DEMO = "gfprune_cli.checkpoint.source:DEMO"


@pytest.fixture
def smaller_demo(smallest_folder: Path, thorough: bool) -> dict[str, str]:
    """Constants with which `demo` is a fortieth of the one that ships; none with --thorough."""
    return {} if thorough else {SMALLER_DEMO: str(smallest_folder)}


@pytest.fixture
def shell(smaller_demo: dict[str, str], server: Any, thorough: bool, tmp_path: Path) -> Iterator[Shell]:
    """Run a command of the documentation in `tmp_path`, as its reader would; stdout.

    Where a shell looks for gfprune it finds the one of `server`, with the smaller demo.
    """
    from forked import Door

    (tmp_path / "bin").mkdir()
    door = None if thorough else Door(server, tmp_path / "bin" / "gfprune", constants=smaller_demo)
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    # remote code as free as in the reader's shell
    environment = {key: value for key, value in os.environ.items() if key != "DIFFUSERS_DISABLE_REMOTE_CODE"}

    def run(command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment | {"PATH": path}, capture_output=True, text=True,
            timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run
    if door is not None:
        door.close()


def examples(page: Path, language: str) -> list[str]:
    """The blocks of a page that are written in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def quick_flags() -> list[str]:
    """`QUICK` as command-line flags."""
    return [part for name, value in QUICK.items() for part in ("--" + name.replace("_", "-"), str(value))]


# --- processes


@pytest.fixture(scope="session")
def server(thorough: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Commands in forked processes: the imports are paid for once."""
    from forked import Server

    served = Server(tmp_path_factory.mktemp("forked"), thorough=thorough)
    yield served
    served.close()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variable of a cache that the commands share."""
    return {"GFPRUNE_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="session")
def pruned(
    server: Any, cache: dict[str, str], smallest_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`smallest_folder`, pruned."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    done = server.run(
        "prune", "--model", smallest_folder, "--sparsity", 0.5, "--out", out, *PRUNE, environment=cache
    )
    assert done.code == 0, done.stderr
    return out


PRUNE = ("--images", 8, "--sample-steps", 2, "--draws", 8, "--iterations", 2, "--recover", 4)


@pytest.fixture
def record(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a figure for docs/reliability.md past pytest's capture."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return show
