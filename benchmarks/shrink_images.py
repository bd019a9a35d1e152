"""Make a small set of images for a benchmark's network out of a larger one.

    python benchmarks/shrink_images.py --data noto-emoji-32.npz --out benchmarks/data/noto-people-16.npz \
        --categories "People & Body" Activities --size 16 --grey

Both files hold `x` [N, H, W, C] uint8 and `c` [N] category names. C is 1 with `--grey`, else 3. Images that
are equal once they are small are kept once: one of them might be held out.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def shrink(images: np.ndarray, size: int, *, grey: bool) -> np.ndarray:
    """uint8 [N, H, W, 3] -> uint8 [N, size, size, 1 or 3], by Lanczos."""
    mode = "L" if grey else "RGB"
    small = [
        np.asarray(Image.fromarray(image).convert(mode).resize((size, size), Image.Resampling.LANCZOS))
        for image in images
    ]
    return np.stack(small).reshape(len(images), size, size, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--grey", action="store_true")
    options = parser.parse_args()
    with np.load(options.data) as data:
        chosen = np.isin(data["c"], options.categories)
        images, categories = data["x"][chosen], data["c"][chosen]
    small = shrink(images, options.size, grey=options.grey)
    kept = np.sort(np.unique(small, axis=0, return_index=True)[1])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out, x=small[kept], c=categories[kept])


if __name__ == "__main__":
    main()
