"""command/images.py: every kind of file by hand, a film of 12 bits against the same film in 8,
broken files."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from benchmarks import decontaminate
from command import images
from engines import apis

ROOT = Path(__file__).resolve().parent.parent


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def film(bits: int) -> np.ndarray:
    """Smooth shades over the whole range of so many bits, (120, 160)"""
    coarse = Image.fromarray(np.random.default_rng(1).random((6, 8), np.float32))
    shades = np.asarray(coarse.resize((160, 120), Image.Resampling.BICUBIC), np.float64)
    return np.rint((shades - shades.min()) / np.ptp(shades) * (2**bits - 1))


def test_load_image_makes_every_kind_of_file_upright_rgb(tmp_path):
    colours = picture(40, 30)

    def load(image: Image.Image, name: str, **options) -> np.ndarray:
        image.save(tmp_path / name, **options)
        loaded = images.load_image(tmp_path / name)
        assert loaded.mode == "RGB"
        return np.asarray(loaded).astype(int)

    half = colours.copy()
    half.putalpha(
        Image.fromarray(np.repeat([[0, 128, 255]], 30, 0).repeat([20, 10, 10], 1).astype(np.uint8))
    )
    shown = load(half, "alpha.png")
    assert (shown[:, :20] == 255).all()  # nothing but the white it lies on
    assert (shown[:, 30:] == np.asarray(colours)[:, 30:]).all()
    assert (
        np.abs(shown[:, 20:30] - (np.asarray(colours)[:, 20:30] * 128.0 + 255 * 127) / 255).max()
        <= 1
    )

    deep = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    assert np.abs(load(Image.fromarray(deep), "deep.png")[..., 0] - deep / 257).max() <= 1

    flat = Image.new("RGB", (40, 30), (200, 40, 90))
    assert np.abs(load(flat.convert("CMYK"), "print.jpg", quality=100) - [200, 40, 90]).max() <= 4

    indexed = colours.quantize(16)
    assert (load(indexed, "palette.png") == np.asarray(indexed.convert("RGB"))).all()
    hole = load(indexed, "hole.png", transparency=3)
    assert (hole[np.asarray(indexed) == 3] == 255).all()
    assert (
        hole[np.asarray(indexed) != 3]
        == np.asarray(indexed.convert("RGB"))[np.asarray(indexed) != 3]
    ).all()

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn a quarter clockwise
    assert (load(colours, "turned.png", exif=exif) == np.rot90(np.asarray(colours), -1)).all()

    assert load(colours.convert("L"), "grey.png").shape == (30, 40, 3)
    assert load(colours.crop((0, 0, 40, 1)), "line.png").shape == (1, 40, 3)


def test_unreadable_images_are_refused_by_name(tmp_path):
    picture(40, 30).save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:500])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name in ("torn.jpg", "text.png", "empty.png", "absent.png"):
        with pytest.raises(data.RowError, match=name):
            images.load_image(tmp_path / name)


def test_an_image_too_large_to_open_is_refused_by_name(tmp_path, monkeypatch):
    picture(40, 30).save(tmp_path / "huge.png")
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 100
    )  # Pillow's guard against files that unpack to gigabytes
    with pytest.raises(data.RowError, match="huge.png"):
        images.load_image(tmp_path / "huge.png")


@pytest.mark.parametrize("name", ["film.png", "film.tiff"])
@pytest.mark.parametrize("bits", [10, 12, 15, 16])
def test_a_film_of_more_bits_looks_like_the_same_film_in_8(tmp_path, bits, name):
    Image.fromarray(film(8).astype(np.uint8)).save(tmp_path / "plain.png")
    Image.fromarray(film(bits).astype(np.uint16)).save(tmp_path / name)
    plain = np.asarray(images.load_image(tmp_path / "plain.png")).astype(int)
    assert 60 < plain.mean() < 200
    sent = Image.open(io.BytesIO(apis.picture_bytes(tmp_path / name, None)))
    for shown in (images.load_image(tmp_path / name), sent):
        assert np.abs(np.asarray(shown).astype(int) - plain).max() <= 1
    one, other = decontaminate.dhash(tmp_path / "plain.png"), decontaminate.dhash(tmp_path / name)
    assert decontaminate.distances(one[None], other[None]).item() <= decontaminate.DISTANCE


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_deep_greys_span_the_pictures_own_range_whatever_their_type(tmp_path):
    # by hand: (-1000 .. 3000) onto 0 .. 255 is (grey + 1000) * 255 / 4000
    greys = np.array([[-1000, -200, 600], [1400, 2200, 3000]])
    for name, kind in (("whole.tiff", np.int32), ("float.tiff", np.float32)):
        Image.fromarray(greys.astype(kind)).save(tmp_path / name)
        shown = np.asarray(images.load_image(tmp_path / name))[..., 0]
        assert shown.tolist() == [[0, 51, 102], [153, 204, 255]]
    for name, kind in (("flat.png", np.uint16), ("flat.tiff", np.float32)):
        Image.fromarray(np.full((4, 5), 700, kind)).save(tmp_path / name)
        assert not np.asarray(images.load_image(tmp_path / name)).any()
    Image.fromarray(np.array([[0, np.nan], [1, 2]], np.float32)).save(tmp_path / "hole.tiff")
    with pytest.raises(data.RowError, match="hole.tiff: not a readable image .its greys are not"):
        images.load_image(tmp_path / "hole.tiff")


@pytest.mark.parametrize("suffix", ["png", "jpeg", "tiff", "webp", "gif", "bmp"])
def test_a_file_cut_off_anywhere_is_refused_by_name(tmp_path, suffix):
    picture(40, 30).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    images.load_image(tmp_path / f"whole.{suffix}")
    for kept in range(0, 9 * len(whole) // 10, max(1, len(whole) // 40)):
        (tmp_path / f"torn.{suffix}").write_bytes(whole[:kept])
        for action in (images.load_image, decontaminate.dhash):
            with pytest.raises(data.RowError, match=f"torn.{suffix}: not a readable image"):
                action(tmp_path / f"torn.{suffix}")


def test_no_other_file_opens_pictures():
    # benchmarks asks whether downloaded bytes are a picture, the clinic reads its films' text chunk
    opens = re.compile(r"\bImage\.open\(")
    ours = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
    own = [path for path in ours if path.parent.name not in ("tests", "bench")]
    opening = {str(path.relative_to(ROOT)) for path in own if opens.search(path.read_text())}
    assert opening == {"command/images.py", "benchmarks/__init__.py", "clinic/world.py"}


REAL = sorted(Path(os.environ.get("MEDEE_REAL_DATA", "/nowhere"), "images").glob("*"))


@pytest.mark.skipif(not REAL, reason="MEDEE_REAL_DATA names no folder with images")
def test_real_medical_images_open_and_are_neither_black_nor_white():
    for path in REAL:
        greys = np.asarray(images.load_image(path).convert("L"))
        assert 2 < greys.mean() < 253 and np.ptp(greys) > 50, path.name
        decontaminate.dhash(path)
