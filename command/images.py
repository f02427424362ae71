"""One function opens every picture: for training, engines, leak check, pages and plots.

    load_image(path) -> an RGB image of 8 bits a colour, upright

    rotated       as the camera's EXIF tag says
    transparent   placed on white
    deep greys    16 or 32 bits or floats: the picture's own darkest value becomes 0, its
                  brightest 255, and a constant picture is black

A film of 10 to 15 bits uses a small part of the range of a 16-bit file. Divided by 257 it would be
nearly black, and the file does not say how many bits it uses. So the picture's own range decides.

reads any file that Pillow reads; writes nothing.

Where we depart from the paper, or it is silent: it names no image formats and no windows. All of
this is ours.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import data


def stretched(image: Image.Image) -> Image.Image:
    """A picture of deep greys as 8 bits over its own range. ValueError unless all are finite."""
    grey = np.asarray(image, np.float64)
    low, high = grey.min(), grey.max()
    if not np.isfinite(high - low):
        raise ValueError("its greys are not all finite numbers")
    if high == low:
        return Image.new("L", image.size, 0)
    return Image.fromarray(np.rint((grey - low) * (255 / (high - low))).astype(np.uint8))


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image, without reading its pixels."""
    with Image.open(path) as image:
        return image.size


def load_image(path: str | Path, least: tuple[int, int] | None = None) -> Image.Image:
    """An upright RGB image. least: a (width, height) that is enough; a large JPEG may then be
    decoded smaller and in grey, which is much faster. Raises RowError naming the file."""
    try:
        with Image.open(path) as opened:
            if least:
                opened.draft("L", least)
            image = ImageOps.exif_transpose(opened)
            if image.mode[0] in "IF":
                image = stretched(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # each of Pillow's decoders has its own exceptions
        fault = f"not a readable image ({error}); replace or remove it"
        raise data.RowError(f"{path}: {fault}") from None
