"""Where a checkpoint comes from: the demo in the package, a local folder, or the Hugging Face Hub.

A Hub revision is resolved to a commit first; everything is then read at that commit, so that one run never
mixes two versions of a repository and the output can name what it was made from.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gfprune_cli.checkpoint.files import quoted
from gfprune_cli.checkpoint.layout import check_variant
from gfprune_cli.errors import GfpruneError, UsageError, named
from gfprune_cli.progress import Event, Progress, silent
from gfprune_cli.recipes.run_options import RunOptions

DEMO = Path(__file__).parent.parent / "demo"

# how no repository of a model is called: a file that is not there is no Hub id
NO_REPOSITORY = (
    *(".git", ".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".pkl", ".gguf", ".msgpack", ".h5", ".npz"),
    *(".json", ".yaml", ".yml", ".txt", ".onnx", ".pt2", ".xml", ".engine", ".zip", ".tar", ".gz"),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_FILE = re.compile(rf"({_HUB_ID.pattern})/((?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{{0,200}}\.safetensors)")


@dataclass(frozen=True)
class Source:
    """A checkpoint folder on this machine, and where it came from.

    Args:
        label: how the user named it ("demo", a path, a Hub id).
        folder: the folder to read.
        kind: "demo", "local" or "hub".
        commit: the Hub commit (40 hexadecimal digits), None otherwise.
    """

    label: str
    folder: Path
    kind: Literal["demo", "local", "hub"]
    commit: str | None

    def origin(self, weights: Mapping[str, str]) -> dict[str, Any]:
        """What a record says of it: `weights` is the SHA-256 of each weight file that was read."""
        return {"label": self.label, "kind": self.kind, "commit": self.commit, "weights": dict(weights)}


def resolve(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
    config_only: bool = False,
    config_from: str | None = None,
    progress: Progress = silent,
) -> Source:
    """Turn what the user wrote after `--model` into a folder, downloading it if need be.

    Args:
        model: "demo", a local diffusers folder, a file in the naming of the model's authors, a Hub id
            "owner/name", or such a file there, "owner/name/file.safetensors". What exists here wins.
        revision: branch, tag or commit; Hub only.
        variant: "fp16" and the like: download those weights, and the plain ones of components that lack them.
        offline: use only what the Hub cache holds, as HF_HUB_OFFLINE=1 does.
        config_only: download no weights.
        config_from: for a file: a diffusers folder or Hub id of its family; None takes the one that diffusers
            knows for it.
        progress: gets a "load" event before and during a download.

    Returns:
        The source. `commit` is set for Hub models.

    Raises:
        UsageError: `model` is neither an existing folder nor a Hub id, or a flag does not fit it.
        GfpruneError: the Hub model cannot be had, or holds nothing that gfprune can read.
    """
    check_variant(variant)
    file, commit = (None, None) if model == "demo" else (_original_file(model), None)
    if file is None and (match := _HUB_FILE.fullmatch(model)) is not None and not os.path.exists(model):
        from gfprune_cli.checkpoint.hub import fetch_file

        file, commit = fetch_file(match[1], match[2], revision=revision, offline=offline, progress=progress)
    if config_from is not None and file is None:
        raise UsageError(
            f"--config-from is for models in one file, and {quoted(model)} is none: drop the flag"
        )
    if model == "demo":
        if not DEMO.is_dir():
            raise GfpruneError(
                f"the demo checkpoint is missing from this installation ({DEMO}): reinstall gfprune"
            )
        source = Source(model, DEMO, "demo", None)
    elif file is not None:
        made = _converted(file, config_from, offline, progress)
        source = Source(model, made, "local" if commit is None else "hub", commit)
    elif (folder := _expanded(model)) is not None and os.path.exists(folder):  # false for a name too long
        if not folder.is_dir():
            raise UsageError(f"--model {folder} is neither a folder nor a regular file")
        source = Source(model, folder, "local", None)
    elif looks_like_hub_id(model):
        from gfprune_cli.checkpoint.hub import fetch

        folder, commit = fetch(
            model,
            revision=revision,
            variant=variant,
            offline=offline,
            config_only=config_only,
            progress=progress,
        )
        return Source(model, folder, "hub", commit)
    else:
        raise UsageError(
            f"--model {quoted(model)}: no such folder (a Hub id looks like owner/name; or use demo)"
        )
    if revision is not None and source.commit is None:
        raise UsageError(
            f"--revision is for Hub models, but {quoted(model)} is a folder on this machine: drop the flag"
        )
    progress(Event("load", text=f"reading {source.folder}"))
    return source


def source_of(recipe: Any, options: RunOptions, progress: Progress, *, config_only: bool = False) -> Source:
    """The checkpoint that a recipe names."""
    names = {name: getattr(recipe, name, None) for name in ("revision", "variant", "config_from")}
    return resolve(recipe.model, **names, offline=options.offline, config_only=config_only, progress=progress)


def looks_like_hub_id(model: str) -> bool:
    """Whether a string has the form owner/name of a Hub repository."""
    return (
        bool(_HUB_ID.fullmatch(model))
        and "--" not in model
        and ".." not in model
        and not model.lower().endswith(NO_REPOSITORY)
    )


def _expanded(model: str) -> Path | None:
    # An empty string would name the current folder, and a NUL raises in every system call.
    if not model.strip() or "\0" in model:
        return None
    try:
        return Path(model).expanduser()
    except RuntimeError:  # ~ of an unknown user
        return None


def _original_file(model: str) -> Path | None:
    """The file that a name stands for: itself, or the only one in a folder that is no diffusers folder."""
    path = _expanded(model)
    if path is None or not os.path.exists(path):
        return None
    if path.is_file():
        return path
    described = any((path / name).exists() for name in ("model_index.json", "config.json"))
    files = [] if described or not path.is_dir() else sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def _converted(file: Path, config_from: str | None, offline: bool, progress: Progress) -> Path:
    """The diffusers folder of a file."""
    from gfprune_cli.checkpoint.original_file import check_kind, converted, default_configuration

    check_kind(file)
    family = config_from or default_configuration(file)
    try:
        with named(model="config_from"):
            source = resolve(family, offline=offline, config_only=True, progress=progress)
    except GfpruneError as error:
        if config_from is not None:
            raise
        raise GfpruneError(
            f"{file} needs the configuration of {family}, which cannot be had ({error}): name a diffusers "
            "folder of its family with --config-from"
        ) from error
    return converted(file, source.folder, progress)
