"""Images on disk: the same numbers as in memory, and nothing that stays behind."""

from pathlib import Path

import pytest
import torch

from gfprune_cli.data import stored
from gfprune_cli.data.images import to_model_range
from gfprune_cli.data.stored import in_memory, store_images
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.errors import GfpruneError
from gfprune_cli.outputs.cache import cache_folder
from gfprune_cli.outputs.digests import fingerprint

PIXELS = torch.randint(256, (7, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_batches_and_slices_are_those_of_the_tensor() -> None:
    images, tensor = store_images(PIXELS.split(3), to_model_range), to_model_range(PIXELS)
    assert (len(images), images.shape, images.dtype) == (7, tensor.shape, tensor.dtype)
    assert torch.equal(in_memory(images), tensor)
    assert torch.equal(in_memory(images[2:5]), tensor[2:5])
    assert torch.equal(in_memory(images[2:][1:3]), tensor[3:5])
    assert images.fingerprint() == images[:2].fingerprint() == fingerprint(PIXELS)
    latents = torch.randn(3, 2, 2)
    assert torch.equal(in_memory(store_images([latents])), latents)
    kept, read = (Draws(those, 1000, 5).batch("train", 2, 4) for those in (tensor, images))
    assert torch.equal(kept.images, read.images)
    assert torch.equal(kept.noise, read.noise)


def test_nothing_is_left_in_the_cache_and_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path))
    images = store_images([PIXELS])
    assert list(tmp_path.iterdir()) == [], "the file has no name even while it is read"
    (tmp_path / "file").touch()
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path / "file"))
    assert torch.equal(in_memory(store_images([PIXELS])), in_memory(images))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full_is_found_when_the_images_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when what was held back in a buffer is written, or read."""
    full = Path("/dev/full")
    monkeypatch.setattr(stored.tempfile, "TemporaryFile", lambda dir: full.open("w+b"))
    with pytest.raises(GfpruneError, match="has no room for the images"):
        store_images([torch.zeros(1, 3, 4, 4, dtype=torch.uint8)])


def test_a_full_disk_is_one_line_that_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, content: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored.tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(GfpruneError, match=r"no room .*No space left.*GFPRUNE_CACHE") as caught:
        store_images([PIXELS])
    assert str(cache_folder()) in str(caught.value)
