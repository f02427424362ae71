"""One function opens a picture for everybody: training, engines, leak check, pages and plots.

    load_image(path) -> an RGB image of 8 bits a colour, upright

    turned        as the camera's EXIF note says
    transparent   laid on white
    deep greys    16 or 32 bits or floats: the picture's own darkest value becomes 0, its
                  brightest 255, and a constant picture is black

A film of 10 to 15 bits uses a small part of a 16-bit file. Divided by 257 it would come out nearly
black, and no note in the file says how many bits it has; so the picture's own range decides.

reads any file that Pillow reads; writes nothing.

Where we depart from the paper, or it is silent: it names no image formats and no windows. All of
this is ours.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import data


def stretched(image: Image.Image) -> Image.Image:
    """A picture of deep greys as 8 bits over its own range. Raises ValueError unless all are finite."""
    grey = np.asarray(image, np.float64)
    low, high = grey.min(), grey.max()
    if not np.isfinite(high - low):
        raise ValueError("its greys are not all finite numbers")
    if high == low:
        return Image.new("L", image.size, 0)
    return Image.fromarray(np.rint((grey - low) * (255 / (high - low))).astype(np.uint8))


def load_image(path: str | Path, least: tuple[int, int] | None = None) -> Image.Image:
    """An upright RGB image: transparency is laid on white, greys of more than 8 bits are stretched
    over the picture's own range. least: (width, height) that is enough; a large JPEG may then be
    shrunk and made grey while it is decoded, which is much faster. Raises RowError naming the file.
    """
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
    except Exception as error:  # each of Pillow's decoders has its own exceptions for a broken file
        said = f"{path}: not a readable image ({error}); replace or remove it"
        raise data.RowError(said) from None
