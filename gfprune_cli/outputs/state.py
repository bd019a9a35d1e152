"""The resumable state of one run, hidden beside its output, and how a finished output is known again."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs.digests import sha256_of, sha256_of_document
from gfprune_cli.outputs.durable import not_written, write_json, write_tensors
from gfprune_cli.outputs.filesystem import sync, sync_tree
from gfprune_cli.outputs.locks import discard, state_folder
from gfprune_cli.outputs.tensor_files import load_tensors

KEPT_STATES = 2
TENSORS, DOCUMENT = "state.safetensors", "state.json"
T = TypeVar("T")
run_digest = sha256_of_document  # of what decides the bytes of an output; its record holds it


class StateFolder:
    """The resumable state of one run: safetensors and JSON, two good states kept.

    Args:
        destination: the output of the run; the state lies hidden beside it.
        identity: what must be equal for a resumed run to end in the same bytes.
        writes: whether this process writes; the others of a run only read.
    """

    def __init__(self, destination: Path, identity: Mapping[str, Any], *, writes: bool = True) -> None:
        self.writes = writes
        self.folder = state_folder(destination)
        self.identity = json.loads(json.dumps(identity, sort_keys=True))
        self.facts: Callable[[], Mapping[str, Any]] = dict  # what the run has found out once, for every state

    @property
    def parts(self) -> Path:
        """Where the networks of a run that makes several for one output lie, until all are there."""
        return self.folder / "parts"

    def exists(self) -> bool:
        """Whether there is a state to continue from."""
        return bool(self.states()) or self.parts.is_dir()

    def begun(self) -> bool:
        """Whether a run began, even if it was killed before its first state."""
        return self.folder.is_dir()

    def begin(self) -> None:
        """Say that a run has begun: what it writes beside its state from now on is its own.

        Raises:
            GfpruneError: the folder cannot be made.
        """
        if not self.writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.unwritable(error, 0) from error

    def states(self) -> list[Path]:
        """Published states, oldest first."""
        return sorted(self.folder.glob("state-" + "[0-9]" * 6)) if self.folder.is_dir() else []

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest state whose checksum holds.

        Raises:
            UsageError: the state belongs to a run with other settings.
            GfpruneError: states exist and none is intact.
        """
        return self.newest(whole_state)

    def newest(self, read: Callable[[Path, Any], T | None]) -> tuple[T, dict[str, Any]] | None:
        """(what is read from the newest state that is intact, its numbers); None at the start.

        Args:
            read: (folder of a state, the checksums that it was saved with) -> what is in it; None if they
                do not hold.

        Raises:
            UsageError, GfpruneError: as `load`.
        """
        states = self.states()
        for state in reversed(states):
            try:
                document = json.loads((state / DOCUMENT).read_text(encoding="utf-8"))
                identity, numbers = dict(document["identity"]), dict(document["numbers"])
                changed = [key for key, value in self.identity.items() if identity.get(key) != value]
                content = None if changed else read(state, document["sha256"])
            except (GfpruneError, OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError):
                continue  # RuntimeError: PyTorch's own when a file cannot be mapped
            if changed:
                raise UsageError(
                    f"--resume: the state in {self.folder} is of a run with other {', '.join(changed)}: "
                    "repeat the settings of that run, or start over with --force"
                )
            if content is not None:
                return content, numbers
        if states:
            raise GfpruneError(f"--resume: no state in {self.folder} is intact: start over with --force")
        return None

    def found(self) -> Mapping[str, Any]:
        """The facts of the newest state that can be read; none where there is no state."""
        for state in reversed(self.states()):
            with suppress(OSError, ValueError, AttributeError):
                facts = json.loads((state / DOCUMENT).read_text(encoding="utf-8")).get("facts")
                return facts if isinstance(facts, dict) else {}
        return {}

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Publish a state; the one before the last is removed."""
        if not self.writes:
            return
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        staging = self.stage(f"new-{os.getpid()}", needed)
        try:
            write_tensors(staging / TENSORS, tensors)
            self.publish(staging, numbers, sha256_of(staging / TENSORS))
        except OSError as error:
            raise self.unwritable(error, needed) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def stage(self, name: str, needed: int) -> Path:
        """An empty folder for a state of `needed` bytes; what killed runs left unfinished is removed."""
        staging = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for orphan in self.folder.glob("new-*"):
                shutil.rmtree(orphan, ignore_errors=True)
            staging.mkdir()
        except OSError as error:
            raise self.unwritable(error, needed) from error
        return staging

    def publish(self, staging: Path, numbers: Mapping[str, Any], digests: Any) -> None:
        """Make what was staged, with its checksums, the newest state; the one before the last is removed."""
        states = self.states()
        number = int(states[-1].name.rpartition("-")[2]) + 1 if states else 0
        write_json(
            staging / DOCUMENT,
            {
                "identity": self.identity,
                "numbers": dict(numbers),
                "facts": dict(self.facts()),
                "sha256": digests,
            },
        )
        sync_tree(staging)
        staging.rename(self.folder / f"state-{number:06d}")
        sync(self.folder)
        doomed = self.folder / f"new-{os.getpid()}-old"  # a kill leaves nothing that could pass for a state
        for old in self.states()[:-KEPT_STATES]:
            with suppress(OSError):  # it stays until the next save
                old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def unwritable(self, error: OSError, needed: int) -> GfpruneError:
        """What to raise when the system refuses a write of `needed` bytes."""
        return not_written(error, f"the state in {self.folder}", self.folder.parent, needed)

    def end(self) -> None:
        """Forget the run: its output stands, so a state that cannot be removed is no failure."""
        if not self.writes:
            return
        try:
            discard(self.folder)
        except GfpruneError:
            shutil.rmtree(self.folder, ignore_errors=True)

    def foreign(self) -> bool:
        """Whether a state is there that another run left."""
        try:
            numbers = json.loads((self.states()[-1] / DOCUMENT).read_text(encoding="utf-8"))
            return any(numbers["identity"].get(key) != value for key, value in self.identity.items())
        except (IndexError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def clear(self) -> None:
        """Forget the run.

        Raises:
            GfpruneError: the folder cannot be removed.
        """
        if self.writes:
            discard(self.folder)


def whole_state(state: Path, digest: Any) -> dict[str, torch.Tensor] | None:
    """The tensors of a state; None if its checksum does not hold."""
    return load_tensors(state / TENSORS) if digest == sha256_of(state / TENSORS) else None


def by_family(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a state, saved as "family/name": family -> name -> tensor."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        family, _, name = key.partition("/")
        found.setdefault(family, {})[name] = tensor
    return found


def as_families(**families: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The other way round."""
    return {f"{family}/{name}": one for family, members in families.items() for name, one in members.items()}


def not_finished(destination: Path) -> UsageError:
    """What to raise where `--resume` meets the output of another run."""
    return UsageError(
        f"--out {destination} exists and is the output of another run, so --resume has nothing to continue: "
        "use --force to replace it, or another --out"
    )
