"""What damaged images raise, as one line that names the image."""

import lzma
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from gfprune_cli.errors import GfpruneError

Errors = tuple[type[Exception], ...]
Frames = Iterator[tuple[str, Image.Image]]  # (name for messages, image as it is stored)
# What Pillow, zipfile and numpy raise on damaged bytes. MemoryError is not damage and passes through.
DAMAGE: Errors = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, RuntimeError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tokenize.TokenError),
)


# Chosen by content, not by name: left open, Pillow hands a PostScript file called `a.png` to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def reason_of(error: BaseException) -> str:
    """One line on a foreign error, without the query strings of URLs: those of storage hosts are signed."""
    if isinstance(error, UnidentifiedImageError):  # Pillow names the object that it read from
        return f"empty, or no {', '.join(FORMATS)} file"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", lines[0])


@contextmanager
def decoding(name: str, damage: Errors = DAMAGE, remedy: str = "repair or remove it") -> Iterator[None]:
    """Turn what damaged or oversized image bytes raise into one line that names the image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise GfpruneError(f"{name}: over {Image.MAX_IMAGE_PIXELS} pixels; shrink or remove it") from error
    except GfpruneError:
        raise
    except damage as error:
        raise GfpruneError(f"{name}: cannot be read ({reason_of(error)}); {remedy}") from error
