"""One export run, step by step: write into a staging folder, run what was written, publish."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from gfprune_cli.checkpoint.reader import inspect, load_model, sha256_of_weights
from gfprune_cli.checkpoint.record import RECORD
from gfprune_cli.checkpoint.scheduler import load_scheduler, scheduler_config_path
from gfprune_cli.checkpoint.single_file import load_single_file, staged_file, write_single_file
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.deploy.format import Artefact, Format, Job
from gfprune_cli.deploy.formats import FORMATS
from gfprune_cli.deploy.network import deployed
from gfprune_cli.deploy.parity import TOLERANCES, Parity, compare, draw_inputs
from gfprune_cli.deploy.plan import check_component, opset_of, planned_files
from gfprune_cli.deploy.record import export_record, write_export_card
from gfprune_cli.deploy.result import ExportResult
from gfprune_cli.deploy.safetensors import run_model
from gfprune_cli.deploy.signature import AREA, workable
from gfprune_cli.outputs.durable import staged, write_json
from gfprune_cli.outputs.filesystem import give_default_mode
from gfprune_cli.progress import Event, Progress, notice
from gfprune_cli.recipes.export import ExportRecipe


class ExportJob:
    """One export: what it works on, and its steps.

    Args:
        weights_required: False plans from the configuration alone.
    """

    def __init__(
        self,
        recipe: ExportRecipe,
        source: Source,
        destination: Path,
        progress: Progress,
        *,
        weights_required: bool,
    ) -> None:
        self.recipe, self.source, self.destination, self.progress = recipe, source, destination, progress
        self.component = inspect(
            source, component=recipe.component, variant=recipe.variant, weights_required=weights_required
        )
        check_component(self.component, recipe)
        self.plan = planned_files(recipe, self.component, destination)
        given = recipe.tolerance
        self.tolerance = TOLERANCES[recipe.dtype] if given is None else given

    @property
    def format(self) -> Format:
        return FORMATS[self.recipe.format]

    @property
    def needed(self) -> int:
        """Bytes of disk that the export takes at its peak."""
        return self.format.copies * sum(self.plan.values())

    def planned(self, seconds: float) -> ExportResult:
        """The result of a dry run."""
        parity = Parity(None, None, self.tolerance, 0, ())
        return self.make_result(None, self.plan, None, parity, seconds)

    def result(
        self, artefact: Artefact, files: dict[str, int], parity: Parity, seconds: float
    ) -> ExportResult:
        return self.make_result(str(self.destination), files, artefact.inputs, parity, seconds)

    def make_result(
        self, output: str | None, files: dict[str, int], inputs: Any, parity: Parity, seconds: float
    ) -> ExportResult:
        shards = None if self.format.is_graph else len(files)
        return ExportResult(
            model=self.recipe.model,
            output=output,
            component=self.component.name,
            class_name=self.component.class_name,
            format=self.recipe.format,
            dtype=self.recipe.dtype,
            opset=opset_of(self.recipe),
            shards=shards,
            bytes=sum(files.values()),
            files=files,
            inputs=inputs,
            parity=parity,
            seconds=round(seconds, 3),
        )

    def folder(self, force: bool) -> tuple[Artefact, dict[str, int], Parity]:
        """Write a folder, run what stands in it, and publish it if it computes what the source computes."""
        model, scheduler = load_model(self.component), load_scheduler(self.component)
        job = Job(self.recipe, self.component, scheduler, self.progress)
        with staged(self.destination, force=force, needed=self.needed) as staging:
            self.progress(Event("export", text=f"writing {self.recipe.format}, {self.recipe.dtype}"))
            artefact = self.format.write(job, staging)
            known = job.known(model)
            source = deployed(known) if self.format.is_graph else known
            parity = self.verify(source, scheduler, artefact)
            files = {str(path.relative_to(staging)): path.stat().st_size for path in artefact.files}
            self.complete(staging, model, job, artefact, files, parity)
            self.progress(Event("write", text=f"writing {self.destination}"))
        return artefact, files, parity

    def single_file(self, force: bool) -> tuple[Artefact, dict[str, int], Parity]:
        """Likewise, one file."""
        model, scheduler = load_model(self.component), load_scheduler(self.component)
        job = Job(self.recipe, self.component, scheduler, self.progress)
        with staged_file(self.destination, force=force, needed=self.needed) as path:
            self.progress(Event("export", text=f"writing {path.name}"))
            write_single_file(path, job.network(), self.record({}))
            known = job.known(model)
            signature = workable(known, scheduler)
            run = run_model(load_single_file(path, dtype=job.dtype), signature, job.dtype)
            artefact = Artefact.of_class(signature, run, path)
            parity = self.verify(known, scheduler, artefact)
            files = {path.name: path.stat().st_size}
        return artefact, files, parity

    def verify(self, source: nn.Module, scheduler: Any, artefact: Artefact) -> Parity:
        """Compare what was written with the source, both on the same seeded inputs."""
        signature, free = artefact.signature, artefact.free
        if artefact.inputs is not None and not free.issuperset(signature.labels & set(AREA)):
            notice(
                self.progress, "height and width are fixed: this architecture does not trace with free ones"
            )
        batches = draw_inputs(source, scheduler, signature, free=free, seed=self.recipe.seed)
        return compare(run_model(source, signature), artefact.run, batches, self.tolerance, self.progress)

    def record(self, details: dict[str, Any]) -> dict[str, Any]:
        hashes = sha256_of_weights(self.component)
        return export_record(self.source, self.component, hashes, self.recipe, details)

    def complete(
        self,
        staging: Path,
        model: nn.Module,
        job: Job,
        artefact: Artefact,
        files: dict[str, int],
        parity: Parity,
    ) -> None:
        """What every folder holds beside the artefact: record, card, and what a sampling loop needs."""
        if self.format.is_graph:
            network: Any = model
            (staging / "config.json").write_text(network.to_json_string(), encoding="utf-8")
            schedule = scheduler_config_path(self.component)
            if schedule is not None:
                (staging / "scheduler").mkdir()
                shutil.copyfile(schedule, staging / "scheduler" / "scheduler_config.json")
        details: dict[str, Any] = {"files": files, "inputs": artefact.inputs, "parity": asdict(parity)}
        details["opset"] = opset_of(self.recipe)
        record = self.record(details)
        write_json(staging / RECORD, record)
        write_export_card(
            staging / "README.md",
            root=self.component.root,
            loading=self.format.loading(job, self.destination.name),
            record=record,
        )
        for path in staging.rglob("*"):
            if path.is_file():
                give_default_mode(path)
