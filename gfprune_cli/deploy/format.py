"""What a format of `export` is: how it is written, run, planned and loaded."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import load_model
from gfprune_cli.deploy.graph import Graph
from gfprune_cli.deploy.network import Denoiser, Exported, deployed, traced
from gfprune_cli.deploy.parity import Runner
from gfprune_cli.deploy.signature import Signature
from gfprune_cli.errors import UsageError
from gfprune_cli.inputs.unknown_classes import with_inputs
from gfprune_cli.progress import Progress
from gfprune_cli.recipes.export import ExportRecipe

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What one format wrote.

    Args:
        run: the files as written, loaded again into the target runtime.
        files: without configuration, scheduler and card.
        inputs: name -> dtype and shape of a graph's inputs; None where a model class loads the artefact.
        signature: what to compare it on.
        free: the sizes (fields of `Sizes`) that may differ from those of the signature.
    """

    run: Runner
    files: tuple[Path, ...]
    inputs: Mapping[str, Any] | None
    signature: Signature
    free: frozenset[str]

    @classmethod
    def of_class(cls, signature: Signature, run: Runner, *files: Path) -> "Artefact":
        """Weights that the model's class loads: what sizes it takes is the class's affair."""
        free = frozenset({"width"}) if "sample" in signature.inputs else frozenset[str]()
        return cls(run=run, files=files, inputs=None, signature=signature, free=free & signature.labels)


@dataclass(frozen=True)
class Job:
    """What is exported, and how."""

    recipe: ExportRecipe
    component: Component
    scheduler: Any
    progress: Progress

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.recipe.dtype]

    def network(self) -> nn.Module:
        """The network in the export's dtype, a copy of its own."""
        return load_model(self.component, dtype=self.dtype)

    def known(self, model: nn.Module) -> nn.Module:
        """A network whose inputs are known."""
        return with_inputs(model, self.component, self.scheduler, self.progress)

    def traced(self, dtype: torch.dtype) -> Exported:
        """Its graph in any dtype."""
        network = deployed(self.known(load_model(self.component, dtype=dtype)))
        return traced(Denoiser(network, dtype), self.scheduler)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Args:
        write: into a folder; comes back with what runs the files. None where a format is one file or a graph.
        file: into one file, with the record; comes back with the network that it holds.
        check: refuses, by its structure, a network that the format cannot hold.
        files: bytes of the weights -> the artefact's files and their bytes; None where `plan` asks the writer
            of checkpoints.
        loading: (job, folder's name) -> the Python that loads the artefact, for the model card.
        packages: what has to be installed beside gfprune; an extra of its name installs them.
        library: as the Hub calls it; "" for none.
        refuses: dtype -> why there is none in this format.
        graph: writes any graph into a folder, and loads it again.
        narrows: whether it makes half precision of float32 graphs itself.
        optimum: module and class of optimum that load a whole pipeline.
        copies: of the artefact that the disk holds at once while it is written.
    """

    loading: Callable[[Job, str], str]
    write: Callable[[Job, Path], Artefact] | None = None
    file: Callable[[Job, Path, Mapping[str, Any]], nn.Module] | None = None
    check: Callable[[Component, nn.Module], None] | None = None
    files: Callable[[int], dict[str, int]] | None = None
    packages: tuple[str, ...] = ()
    library: str = ""
    refuses: Mapping[str, str] = field(default_factory=dict)
    graph: Callable[[Path, Graph, ExportRecipe], Runner] | None = None
    narrows: bool = False
    optimum: tuple[str, str] | None = None
    copies: int = 1

    @property
    def is_one_file(self) -> bool:
        """Whether it is never a folder."""
        return self.write is None and self.graph is None

    @property
    def is_graph(self) -> bool:
        """Whether a traced graph is written, and no weights for the model's class."""
        return self.files is not None

    def traced_type(self, dtype: torch.dtype) -> torch.dtype:
        """What a network is traced in, for an export of that type."""
        return torch.float32 if self.narrows else dtype

    def artefact(self, job: Job, folder: Path) -> Artefact:
        """Write into an empty folder, and load what was written; a graph is traced for it."""
        if self.write is not None:
            return self.write(job, folder)
        assert self.graph is not None
        found = job.traced(self.traced_type(job.dtype))
        run = self.graph(folder, found.graph, job.recipe)
        return Artefact(
            run=run,
            files=tuple(sorted(folder.iterdir())),
            inputs=found.graph.described(found.signature.inputs.values()),
            signature=found.signature,
            free=found.labels,
        )

    def require(self, recipe: ExportRecipe) -> None:
        """Refuse, before any work, what the target runtime does not have.

        Raises:
            UsageError: with the line that installs what is missing.
        """
        require_packages("--format", recipe.format, self.packages)
        if recipe.dtype in self.refuses:
            raise UsageError(
                f"--dtype {recipe.dtype} with --format {recipe.format}: {self.refuses[recipe.dtype]}; "
                "use fp16 or fp32"
            )


def require_packages(flag: str, name: str, packages: Iterable[str]) -> None:
    """Refuse, as a UsageError, packages that are not installed; the extra of this name installs them."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UsageError(
            f"{flag} {name} needs {', '.join(missing)}: install it with pip install 'gfprune[{name}]'"
        )
