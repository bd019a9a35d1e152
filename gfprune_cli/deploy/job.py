"""One export run, step by step: write into a staging folder, run what was written, publish."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from gfprune_cli.checkpoint.reader import inspect, load_model, sha256_of_weights
from gfprune_cli.checkpoint.record import RECORD
from gfprune_cli.checkpoint.scheduler import load_scheduler, scheduler_config_path
from gfprune_cli.checkpoint.single_file import staged_file
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.deploy.format import Artefact, Job
from gfprune_cli.deploy.formats import FORMATS
from gfprune_cli.deploy.network import deployed
from gfprune_cli.deploy.parity import TOLERANCES, Parity, compare, draw_inputs
from gfprune_cli.deploy.parts import is_whole
from gfprune_cli.deploy.pipeline import pipeline_loading, write_whole
from gfprune_cli.deploy.plan import check_component, is_file, opset_of, planned_files, planned_pipeline
from gfprune_cli.deploy.record import export_record, write_export_card
from gfprune_cli.deploy.result import ExportResult, Made
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
        self.format = FORMATS[recipe.format]
        self.component = inspect(
            source, component=recipe.component, variant=recipe.variant, weights_required=weights_required
        )
        check_component(self.component, recipe)
        self.whole = recipe.component is None and is_whole(self.component, self.format)
        self.plan = (planned_pipeline if self.whole else planned_files)(recipe, self.component, destination)
        given = recipe.tolerance
        self.tolerance = TOLERANCES[recipe.dtype] if given is None else given

    @property
    def needed(self) -> int:
        """Bytes of disk that the export takes at its peak."""
        return self.format.copies * sum(self.plan.values())

    def result(self, made: Made | None, seconds: float) -> ExportResult:
        """What was done; what is planned, where nothing was made."""
        inputs, files, parity = made or (None, self.plan, Parity(None, None, self.tolerance, 0, ()))
        return ExportResult(
            model=self.recipe.model,
            output=None if made is None else str(self.destination),
            component=self.component.name,
            class_name=self.component.class_name,
            format=self.recipe.format,
            dtype=self.recipe.dtype,
            opset=opset_of(self.recipe),
            shards=None if self.format.is_graph else len(files),
            bytes=sum(files.values()),
            files=files,
            inputs=inputs,
            parity=parity,
            seconds=round(seconds, 3),
        )

    def export(self, force: bool) -> Made:
        """Write, run what was written, and publish it if it computes what the source computes."""
        job = Job(self.recipe, self.component, load_scheduler(self.component), self.progress)
        if is_file(self.recipe):
            with staged_file(self.destination, force=force, needed=self.needed) as path:
                return self.single_file(job, path)
        with staged(self.destination, force=force, needed=self.needed) as staging:
            if self.whole:
                made = write_whole(job, self.format, staging, self.tolerance)
                loading = pipeline_loading(self.format, self.destination.name)
            else:
                made = self.folder(job, staging)
                loading = self.format.loading(job, self.destination.name)
            self.describe(staging, loading, made)
            return made

    def folder(self, job: Job, staging: Path) -> Made:
        """The network in a folder."""
        model = load_model(self.component)
        self.progress(Event("export", text=f"writing {self.recipe.format}, {self.recipe.dtype}"))
        artefact = self.format.artefact(job, staging)
        known = job.known(model)
        parity = self.verify(deployed(known) if self.format.is_graph else known, job.scheduler, artefact)
        if self.format.is_graph:
            self.add_sampling(staging, model)
        files = {str(path.relative_to(staging)): path.stat().st_size for path in artefact.files}
        return artefact.inputs, files, parity

    def single_file(self, job: Job, path: Path) -> Made:
        """The network in one file."""
        model = load_model(self.component)
        self.progress(Event("export", text=f"writing {path.name}"))
        assert self.format.file is not None
        network = self.format.file(job, path, self.record({}))
        known = job.known(model)
        signature = workable(known, job.scheduler)
        artefact = Artefact.of_class(signature, run_model(network, signature, job.dtype), path)
        parity = self.verify(known, job.scheduler, artefact)
        return None, {path.name: path.stat().st_size}, parity

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

    def add_sampling(self, staging: Path, network: Any) -> None:
        """What a sampling loop needs beside a graph."""
        (staging / "config.json").write_text(network.to_json_string(), encoding="utf-8")
        schedule = scheduler_config_path(self.component)
        if schedule is not None:
            (staging / "scheduler").mkdir()
            shutil.copyfile(schedule, staging / "scheduler" / "scheduler_config.json")

    def describe(self, staging: Path, loading: str, made: Made) -> None:
        """Record and model card, which every folder holds; then its files are as they will be published."""
        inputs, files, parity = made
        details = {"files": files, "inputs": inputs, "parity": asdict(parity), "opset": opset_of(self.recipe)}
        record = self.record(details)
        write_json(staging / RECORD, record)
        write_export_card(staging / "README.md", root=self.component.root, loading=loading, record=record)
        for path in staging.rglob("*"):
            if path.is_file():
                give_default_mode(path)
        self.progress(Event("write", text=f"writing {self.destination}"))
