"""Inception features as clean-fid computes them, from weights whose SHA-256 is known before they are read.

clean-fid (arXiv 2104.11222) loads its weights from fixed places and unhashed; here they come from a file that
is hashed first, and no byte of a file that does not match is ever given to a loader. The two official files
are a TorchScript archive and a state dict, so this is the one place that reads such formats.
"""

import hashlib
import http.client
import io
import re
import stat
import sys
import tempfile
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.evaluation.statistics import Features
from gfprune_cli.outputs.cache import cache_room
from gfprune_cli.outputs.durable import write_file
from gfprune_cli.progress import Event, Progress
from gfprune_cli.recipes.evaluate import FidMode

BATCH = 32
SIZE = 299
TIMEOUT_S = 30
INCEPTION_DIMENSIONS = 2048
LARGEST_WEIGHTS = 1 << 30  # bytes
Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """An official file of Inception weights."""

    name: str
    url: str
    sha256: str
    bytes: int


OFFICIAL: dict[FidMode, Weights] = {
    "clean": Weights(
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        95_607_719,
    ),
    "legacy_pytorch": Weights(
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        95_628_359,
    ),
}


class Unavailable(Exception):
    """There is no extractor here; the message says why and what to do."""


@dataclass(frozen=True)
class Extractor:
    """Images to features.

    Args:
        identity: what made the features; statistics of two extractors are never compared.
        mode: how clean-fid resizes.
        fid, kid: what distances between these features are called: "fid" and "kid" for Inception only.
        network: [N, 3, 299, 299] in [0, 255] -> [N, D].
        dimensions: D.
    """

    identity: str
    mode: FidMode
    fid: str
    kid: str
    network: Network
    device: torch.device
    dimensions: int

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Features:
        """[N, D] features of 8-bit images [N, C, H, W], C = 1 or 3.

        Raises:
            GfpruneError: the network gives something else, or values that are not finite.
        """
        from cleanfid.resize import build_resizer

        with quiet_library():
            resize = build_resizer(self.mode)
            found = []
            for part in images.split(BATCH):
                pixels = part.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
                resized = np.stack([resize(image) for image in pixels]).transpose(0, 3, 1, 2)
                batch = torch.from_numpy(np.ascontiguousarray(resized, dtype=np.float32))
                found.append(self.checked(self.network(batch.to(self.device)), len(part)))
        return torch.cat(found).numpy()

    def checked(self, given: Any, count: int) -> torch.Tensor:
        """[count, D] finite float64 features on the CPU, or an error."""
        if features_shape(given) != [count, self.dimensions]:
            raise GfpruneError(
                f"{self.identity} gives {described(given)} for {count} images, not "
                f"[{count}, {self.dimensions}] features: name another network with --inception"
            )
        found: torch.Tensor = given.double().cpu()
        if not found.isfinite().all():
            raise GfpruneError(
                f"the features of {self.identity} are not finite: name another network with --inception"
            )
        return found


def features_shape(given: object) -> list[int] | None:
    """[N, D] if a network gave features, else None."""
    if isinstance(given, torch.Tensor) and given.is_floating_point() and given.ndim == 2 and given.shape[1]:
        return list(given.shape)
    return None


def described(given: object) -> str:
    """What a network gave, in words."""
    if isinstance(given, torch.Tensor):
        return f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
    return f"a {type(given).__name__}"


def find_extractor(
    path: str | None,
    expected: str | None,
    mode: FidMode,
    *,
    offline: bool,
    device: torch.device,
    progress: Progress,
) -> Extractor:
    """The extractor of `--inception`, or the official one from the cache or the network.

    Args:
        path: what the user gave, or None.
        expected: SHA-256 that the user vouches for, or None for the official files.
        mode: of clean-fid.
        offline: do not fetch.

    Raises:
        UsageError: the file that the user gave cannot be used.
        Unavailable: no file was given, and the official one cannot be had.
    """
    if expected is not None and path is None:
        raise UsageError("--inception-sha256 says what --inception FILE must be: give both")
    try:
        import cleanfid.resize  # noqa: F401
    except ImportError as error:
        missing = "clean-fid is not installed: pip install 'gfprune[fid]'"
        if path is not None:
            raise UsageError(f"--inception: {missing}") from error
        raise Unavailable(missing) from error
    if path is None:
        return official(fetch_weights(OFFICIAL[mode], offline=offline, progress=progress), mode, device)
    content, digest = read_network(path, expected, mode)
    try:
        if digest == OFFICIAL[mode].sha256:
            return official(content, mode, device)
        return custom(content, digest, Path(path).stem, mode, device)
    except (Unavailable, RuntimeError) as error:
        raise UsageError(f"--inception {path}: {' '.join(str(error).split())}") from error


def read_network(path: str, expected: str | None, mode: FidMode) -> tuple[bytes, str]:
    """The bytes of a file whose hash is known, and the hash.

    Raises:
        UsageError: it cannot be read, or is not what it should be.
    """
    try:
        content = read_file(Path(path).expanduser())
    except OSError as error:
        raise UsageError(f"--inception {path}: {error.strerror}; check the path") from error
    if content is None:
        raise UsageError(
            f"--inception {path} is no regular file of at most {LARGEST_WEIGHTS} bytes; check the path"
        )
    digest = hashlib.sha256(content).hexdigest()
    if expected is not None and digest != expected.lower():
        raise UsageError(f"--inception {path} has SHA-256 {digest}, not {expected}: fetch it again")
    if expected is None and digest != OFFICIAL[mode].sha256:
        other = next((name for name, weights in OFFICIAL.items() if weights.sha256 == digest), None)
        if other is not None:
            raise UsageError(f"--inception {path} belongs to --fid-mode {other}, not {mode}")
        raise UsageError(
            f"--inception {path} has SHA-256 {digest} and is not {OFFICIAL[mode].name} "
            f"({OFFICIAL[mode].sha256}): fetch that, or vouch for the file with --inception-sha256"
        )
    return content, digest


def read_file(path: Path) -> bytes | None:
    """The bytes of a file; None if it is a pipe or device, or larger than any extractor."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_WEIGHTS:
        return None
    return path.read_bytes()


def fetch_weights(weights: Weights, *, offline: bool, progress: Progress) -> bytes:
    """An official file from the cache, or from its place on the network.

    Raises:
        Unavailable: neither has it.
    """
    from huggingface_hub import is_offline_mode

    path = cache_room("inception") / weights.name
    try:
        cached = read_file(path)
    except OSError:  # absent or not readable: fetched anew
        cached = None
    if cached is not None and hashlib.sha256(cached).hexdigest() == weights.sha256:
        return cached
    remedy = f"fetch {weights.url} elsewhere and name it with --inception"
    if offline or is_offline_mode():
        raise Unavailable(f"{weights.name} is not here and the network may not be used: {remedy}")
    progress(Event("load", text=f"fetching {weights.url} ({weights.bytes:,} bytes)"))
    try:
        with urllib.request.urlopen(weights.url, timeout=TIMEOUT_S) as stream:  # noqa: S310 - one of two constants
            content = stream.read(weights.bytes + 1)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unavailable(f"{weights.name} cannot be fetched ({reason}): {remedy}") from error
    if hashlib.sha256(content).hexdigest() != weights.sha256:
        raise Unavailable(f"what {weights.url} sent is not the file with SHA-256 {weights.sha256}: {remedy}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except (OSError, GfpruneError) as error:
        progress(Event("notice", text=f"{weights.name} was not kept in {path.parent}: {error}"))
    return content


def official(content: bytes, mode: FidMode, device: torch.device) -> Extractor:
    """The network that clean-fid uses in a mode, with verified weights."""
    network = torchscript_inception(content) if mode == "clean" else pytorch_inception(content)
    network.to(device).eval()

    def legacy(images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = network(images / 255)[0].squeeze(-1).squeeze(-1)
        return features

    call: Network = network if mode == "clean" else legacy
    return Extractor(OFFICIAL[mode].name, mode, "fid", "kid", call, device, INCEPTION_DIMENSIONS)


def torchscript_inception(content: bytes) -> torch.nn.Module:
    """clean-fid's wrapper reads a folder by name, so the verified bytes get a private one."""
    from cleanfid.inception_torchscript import InceptionV3W

    with tempfile.TemporaryDirectory() as folder, quiet_library():
        (Path(folder) / OFFICIAL["clean"].name).write_bytes(content)
        network: torch.nn.Module = InceptionV3W(folder, download=False, resize_inside=False)
    return network


def pytorch_inception(content: bytes) -> torch.nn.Module:
    """pytorch-fid's network, which would otherwise fetch its weights itself.

    Raises:
        Unavailable: torchvision is missing or does not fit the installed torch.
    """
    try:
        from cleanfid import inception_pytorch
    except (ImportError, RuntimeError, AttributeError) as error:
        raise Unavailable(
            f"--fid-mode legacy_pytorch needs a torchvision that fits the installed torch ({error})"
        ) from error
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    with quiet_library(), patch.object(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: state):
        network: torch.nn.Module = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
    return network


def custom(content: bytes, digest: str, stem: str, mode: FidMode, device: torch.device) -> Extractor:
    """A TorchScript network of the user's: [N, 3, 299, 299] in [0, 255] -> [N, D].

    Raises:
        UsageError: it is no such network.
    """
    name = re.sub(r"\W+", "_", stem.lower())
    # `fd_teacher` is a distance of its own, and `..._reference` is how the reference's are told apart
    if name == "teacher" or name.endswith("_reference"):
        raise UsageError(f"--inception: fd_{name} is the name of another distance; rename the file {stem!r}")
    with quiet_library():
        network: Any = torch.jit.load(io.BytesIO(content), map_location=device).eval()
        with torch.no_grad():
            given = network(torch.zeros(2, 3, SIZE, SIZE, device=device))
    shape = features_shape(given)
    if shape is None or shape[0] != 2:
        raise UsageError(f"--inception: {stem} gives {described(given)} for 2 images, not [2, D] features")
    return Extractor(f"{stem} {digest}", mode, f"fd_{name}", f"kd_{name}", network, device, shape[1])


@contextmanager
def quiet_library() -> Iterator[None]:
    """stdout is for results, and clean-fid prints; it also silences every warning for good."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
