"""Images of a source, one after the other, in the size and colours that a network works with."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from gfprune_cli.data.decoding import Frames, decoding
from gfprune_cli.errors import UsageError
from gfprune_cli.progress import Event, Progress, notice

MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ImageSource:
    """The user's images, in their order.

    Args:
        name: what the user gave.
        frames: (name, image as it is stored) of each, read anew at every call.
        total: how many there are, at most.
        said: caption or class of each; None where that was not asked for, or comes with none of them.
        classes: every class of the source, those of images that were not chosen included, in its order; None
            where it does not say.
    """

    name: str
    frames: Callable[[], Frames]
    total: int
    said: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None

    def batches(
        self, *, size: tuple[int, int], channels: int, batch: int, progress: Progress
    ) -> Iterator[torch.Tensor]:
        """uint8 images [N, channels, *size], at most `batch` at once; raises as `load_images`."""
        check_request(size, channels, self.total)
        images: list[npt.NDArray[np.uint8]] = []
        resized: Counter[tuple[int, int]] = Counter()
        count = 0
        for name, frame in self.frames():
            with decoding(name):
                image = _flatten(frame, MODES[channels])
                if image.size != (size[1], size[0]):
                    resized[image.size] += 1
                    image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
                pixels = np.asarray(image).reshape(*size, channels)
                images.append(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
            count += 1
            progress(Event("load", count, self.total, "images"))
            if len(images) == batch:
                yield torch.from_numpy(np.stack(images))
                images = []
        if not count:
            raise UsageError(f"--data {self.name!r}: no image in this dataset's train split")
        if images:
            yield torch.from_numpy(np.stack(images))
        if resized:
            sizes = [f"{width}x{height}" for (width, height), _ in resized.most_common()]
            sizes[3:] = sizes[3:4] if len(sizes) <= 4 else [f"{len(sizes) - 3} other sizes"]
            what = f"{resized.total()} of {count} images resized to {size[1]}x{size[0]} (width x height)"
            notice(progress, f"{what}, cropped about the centre, from {', '.join(sizes)}")


def check_request(size: tuple[int, int], channels: int, limit: int) -> None:
    if channels not in MODES:
        needs = "needs its pipeline's VAE, or images it draws itself (leave out --data)"
        raise UsageError(f"--data: images have 1 or 3 channels; a latent model with {channels} {needs}")
    if min(size) < 1 or limit < 1:
        raise UsageError(f"--data: size {size[0]}x{size[1]} and limit {limit} must be at least 1")


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """Upright, opaque, 8 bits per channel."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("pixels are floats of unknown range")
    if image.mode.startswith("I"):
        # 16-bit greyscale: Pillow's own conversion clips at 255, which turns nearly every image white.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
