"""Names by content: SHA-256 of files and of tensors."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfprune_cli.errors import GfpruneError

if TYPE_CHECKING:
    import torch


def sha256_of(path: Path) -> str:
    """SHA-256 of what a file holds.

    Raises:
        GfpruneError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise GfpruneError(f"{path} cannot be read: {error}") from error


def sha256_of_document(document: Mapping[str, Any]) -> str:
    """SHA-256 of JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(dict(document), sort_keys=True).encode()).hexdigest()


def fingerprint(images: "torch.Tensor") -> str:
    """Name a set of images by its content, for recipes and caches.

    Args:
        images: a tensor of any shape, on any device.

    Returns:
        The SHA-256 of its shape and bytes, 64 hexadecimal digits.
    """
    import torch

    digest = hashlib.sha256(f"{tuple(images.shape)}\n".encode())
    digest.update(images.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
