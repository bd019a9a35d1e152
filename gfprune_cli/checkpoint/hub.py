"""Fetching a checkpoint from the Hugging Face Hub, at one commit, and only the files that will be read.

HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are honoured by huggingface_hub itself.
"""

import re
import threading
from collections.abc import Mapping
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from gfprune_cli.checkpoint.files import quoted
from gfprune_cli.checkpoint.hub_digests import verify
from gfprune_cli.checkpoint.hub_errors import check_token, explained, host
from gfprune_cli.checkpoint.layout import (
    default_locations,
    locate_all,
    pick_weights,
    pipeline_components,
    weights_variant,
)
from gfprune_cli.errors import GfpruneError
from gfprune_cli.progress import Event, Progress

_COMMIT = re.compile(r"[0-9a-f]{40}")
Listing = tuple[str, dict[str, int], dict[str, str]]  # commit; size and declared digest of files by name


def fetch(
    repo_id: str,
    *,
    revision: str | None,
    variant: str | None,
    offline: bool,
    config_only: bool,
    progress: Progress,
) -> tuple[Path, str]:
    """Download what gfprune reads of a Hub model, or find it in the cache.

    The JSON files come first: a pipeline without a supported denoiser, or without safetensors, is refused
    before its weights are downloaded.

    Returns:
        The snapshot's folder and its commit.

    Raises:
        UsageError: the variant does not exist.
        GfpruneError: the repository, revision, files or network are not there.
    """
    offline = offline or huggingface_hub.is_offline_mode()
    commit, sizes, declared = _listing(repo_id, revision, offline)
    progress(Event("load", text=f"{repo_id} at {commit[:12]}{' from the cache' if offline else ''}"))
    wanted = [name for name in sizes if _is_description(name)]
    fetched = partial(
        _download, repo_id, revision, commit, declared=declared, offline=offline, progress=progress
    )
    folder = fetched(wanted)
    locations = locate_all(folder)
    # A cache may lack the listing; whether the weights are there then shows when they are read.
    if config_only or not sizes:
        return folder, commit
    for location in default_locations(locations):
        prefix = f"{location.name}/" if location.folder != location.root else ""
        names = {name.removeprefix(prefix) for name in sizes if name.startswith(prefix)}
        pick_weights(names, variant, f"{repo_id}{'/' if prefix else ''}{prefix}".rstrip("/"))
    components = [""] + [f"{name}/" for name in pipeline_components(locations[0].pipeline or {})]
    wanted = [name for prefix in components for name in _weights_in(prefix, sizes, variant)]
    megabytes = sum(sizes[name] for name in wanted) / 1e6
    progress(Event("load", text=f"{repo_id}: {len(wanted)} weight files, {megabytes:.1f} MB"))
    return fetched(wanted), commit


def fetch_file(
    repo_id: str, name: str, *, revision: str | None, offline: bool, progress: Progress
) -> tuple[Path, str]:
    """One file of a repository, verified, and the commit that it is read at.

    Raises:
        GfpruneError: the repository, revision, file or network are not there.
    """
    offline = offline or huggingface_hub.is_offline_mode()
    commit, sizes, declared = _listing(repo_id, revision, offline)
    if sizes and name not in sizes:
        raise GfpruneError(f"{repo_id} has no file {quoted(name)} at {commit[:12]}: check its name")
    progress(Event("load", text=f"{repo_id}/{name} at {commit[:12]}{' from the cache' if offline else ''}"))
    folder = _download(
        repo_id, revision, commit, [name], declared=declared, offline=offline, progress=progress
    )
    if not (folder / name).is_file():
        raise GfpruneError(f"{repo_id}/{name} is not in the cache: run once without --offline")
    return folder / name, commit


def _is_description(name: str) -> bool:
    # The model card comes along for the licence that a pruned model inherits.
    vocabulary = name.endswith((".txt", ".model")) and name.count("/") == 1
    return name == "README.md" or vocabulary or (name.endswith(".json") and name.count("/") <= 1)


def _weights_in(prefix: str, names: dict[str, int], variant: str | None) -> list[str]:
    """The weight files of one component folder: the variant's, or the plain ones if it has none."""
    parsed = {}
    for name in names:
        if name.startswith(prefix) and (found := weights_variant(name.removeprefix(prefix))):
            parsed[name] = found
    stems = {stem for stem, _ in parsed.values()}
    if not prefix:
        stems -= {"model"}  # at the root that is somebody's single-file export, not a component
    chosen = {stem: variant if (stem, variant) in parsed.values() else None for stem in stems}
    return [name for name, (stem, kind) in parsed.items() if stem in chosen and kind == chosen[stem]]


def _listing(repo_id: str, revision: str | None, offline: bool) -> Listing:
    """What the server says of a revision, or the cache."""
    with explained(repo_id, revision):
        check_token(huggingface_hub.get_token())
        return (_cached_listing if offline else _served_listing)(repo_id, revision)


def _served_listing(repo_id: str, revision: str | None) -> Listing:
    api = HfApi(library_name="gfprune")
    # Also records the branch or tag in the cache, which is what makes a later offline run find it.
    commit = api.resolve_revision(repo_id, revision=revision).resolved
    _check_commit(commit)
    info = api.model_info(repo_id, revision=commit, files_metadata=True)
    entries = info.siblings or []
    digests = {entry.rfilename: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in entries}
    declared = {name: digest for name, digest in digests.items() if digest}
    return commit, {entry.rfilename: entry.size or 0 for entry in entries}, declared


def _cached_listing(repo_id: str, revision: str | None) -> Listing:
    """The same from the cache alone; no names if the cache was filled by something that kept no listing."""
    commit = HfApi().resolve_revision(repo_id, revision=revision, local_files_only=True).resolved
    _check_commit(commit)
    try:
        entries = get_cached_repo_tree(repo_id, revision=commit)
    except CachedRepoTreeNotFoundError:
        return commit, {}, {}
    return commit, {entry.path: entry.size for entry in entries}, {}


def _check_commit(commit: str) -> None:
    if not _COMMIT.fullmatch(commit):  # it becomes a folder's name in the cache
        raise GfpruneError(f"{host()} answered with {quoted(commit)} instead of a commit: check HF_ENDPOINT")


def _download(
    repo_id: str,
    revision: str | None,
    commit: str,
    names: list[str],
    *,
    declared: Mapping[str, str],
    offline: bool,
    progress: Progress,
) -> Path:
    """The snapshot's folder, with these files in it and verified."""
    with explained(repo_id, revision):
        folder = Path(
            snapshot_download(
                repo_id,
                revision=commit,
                allow_patterns=[escape(name) for name in names],
                local_files_only=offline,
                library_name="gfprune",
                tqdm_class=_reporting_bar(progress),
            )
        )
    verify(folder, names, declared, repo_id, progress, offline=offline)
    return folder


def _reporting_bar(progress: Progress) -> type[Any]:
    """A tqdm that draws nothing and reports the downloaded bytes: only the command line prints."""
    lock = threading.Lock()

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            counted = kwargs.get("desc", "").startswith("Reconstructing")
            super().__init__(*args, **{**kwargs, "disable": True})
            self.total = kwargs.get("total")
            self.counted = counted

        def update(self, n: float | None = 1) -> None:
            if self.counted:
                with lock:
                    self.n += int(n or 0)
                    progress(Event("load", step=self.n, total=int(self.total or 0), text="bytes downloaded"))

    return ReportingBar
