"""Leaks: a truth table of each rule by hand, pictures in every dress, and everything against a
brute force over all pairs."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clinic.__main__
import data
import medee
from benchmarks import decontaminate
from command import images, pipeline

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"A": "biopsy", "B": "surgery", "C": "rest", "D": "steroids"}
ELSE = {"A": "laser", "B": "drainage", "C": "none", "D": "all"}


def q(
    stem: str, key: str = "bank", options: dict | None = None, images: tuple = (), source: str = ""
) -> data.Question:
    return data.Question(
        stem, OPTIONS if options is None else options, "B", list(images), source, {}, key
    )


def words(count: int, letter: str = "w") -> str:
    return " ".join(f"{letter}{i}" for i in range(count))


def rule(
    question: data.Question, benchmarks: list[data.Question], root: Path = Path("."), **limits
) -> str | None:
    """The rule by which a question is a leak, or None."""
    found = decontaminate.find([question], benchmarks, root, **limits)[0]
    assert set(found) <= {question.id} and all(
        row["filter"] == "leak" and row["reason"] for row in found.values()
    )
    return found[question.id]["evidence"]["rule"] if found else None


# --------------------------------------------------------------------------------------------------
# The whole question

SAME = {  # name: (stem, options, whether it is "Naïve T-cells (CD4+) ﬁrst?" with OPTIONS)
    "itself": ("Naïve T-cells (CD4+) ﬁrst?", OPTIONS, True),
    "case and punctuation": ("NAÏVE t cells, cd4+: FIRST", OPTIONS, True),
    "spaces and line ends": ("  Naïve\tT-cells\n(CD4+)  ﬁrst ?", OPTIONS, True),
    "accent composed of two characters": ("Nai\u0308ve T-cells (CD4+) first?", OPTIONS, True),
    "full-width letters": ("Naïve Ｔ-cells (ＣＤ４+) first?", OPTIONS, True),
    "options shuffled": (
        "Naïve T-cells (CD4+) first?",
        dict(zip("ABCD", reversed(OPTIONS.values()))),
        True,
    ),
    "options in another case": (
        "Naïve T-cells (CD4+) first?",
        {k: f" {v.upper()}. " for k, v in OPTIONS.items()},
        True,
    ),
    "accent left out": ("Naive T-cells (CD4+) first?", OPTIONS, False),
    "another sign": ("Naïve T-cells (CD4-) first?", OPTIONS, False),
    "one option more": ("Naïve T-cells (CD4+) first?", {**OPTIONS, "E": "none"}, False),
    "one option other": ("Naïve T-cells (CD4+) first?", {**OPTIONS, "D": "↓ steroids"}, False),
    "no options": ("Naïve T-cells (CD4+) first?", {}, False),
    "options that only together have the same words": (
        "Naïve T-cells (CD4+) first?",
        {"A": "biopsy surgery", "B": "rest", "C": "steroids"},
        False,
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_exact_is_the_same_stem_and_options_however_they_are_written(name):
    stem, options, same = SAME[name]
    question = data.Question(stem, options, "B" if options else "biopsy", [], "", {}, "bank")
    assert rule(question, [q("Naïve T-cells (CD4+) ﬁrst?", "bench")]) == ("exact" if same else None)


def test_exact_leak_says_whose_question_it_is():
    row = decontaminate.find(
        [q("What now?")],
        [q("What else?", "other", source="MMMU"), q("What now?", "bench", source="MedXpertQA")],
        Path("."),
    )[0]["bank"]
    assert row == {
        "filter": "leak",
        "reason": "same as benchmark question bench",
        "evidence": {"rule": "exact", "benchmark": "bench", "source": "MedXpertQA"},
    }


def test_repeats_within_the_bank_name_the_first():
    bank = [
        q("What now?", "1"),
        q("What now?", "2", ELSE),
        q("what NOW", "3"),
        q("What now?", "4", ELSE),
        q("Who?", "5"),
    ]
    found = decontaminate.find(bank, [], Path("."))[0]
    assert {key: row["evidence"] for key, row in found.items()} == {
        "3": {"rule": "repeat", "question": "1"},
        "4": {"rule": "repeat", "question": "2"},
    }
    assert set(decontaminate.find(bank, [q("What now?", "bench")], Path("."))[0]) == {
        "1",
        "3",
        "4",
    }  # a repeat of a leak is a leak


# --------------------------------------------------------------------------------------------------
# Shared runs

LONG = f"{words(40, 'a')} {words(13)} {words(40, 'b')}"
RUNS = {  # name: (stem, whether it shares 13 words in a row with LONG)
    "13 words": (f"{words(30, 'x')} {words(13)} {words(30, 'y')}", True),
    "12 words": (f"{words(30, 'x')} {words(12)} {words(30, 'y')}", False),
    "13 words at the start": (f"{words(13)} {words(30, 'y')}", True),
    "13 words at the end": (f"{words(30, 'x')} {words(13)}", True),
    "13 words alone": (words(13), True),
    "12 words alone": (words(12), False),
    "in another dress": (
        f"{words(30, 'x')} - {words(13).upper().replace(' ', ', ')}! {words(30, 'y')}",
        True,
    ),
    "interrupted": (f"{words(30, 'x')} {words(13).replace('w6', 'w6 z')} {words(30, 'y')}", False),
    "twelve and twelve": (f"{words(12)} x {words(13).removeprefix('w0 ')} y", False),
    "13 words in another order": (
        f"{words(30, 'x')} {' '.join(reversed(words(13).split()))} {words(30, 'y')}",
        False,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_run_is_13_words_in_a_row(name):
    stem, shared = RUNS[name]
    assert rule(q(stem, options=ELSE), [q(LONG, "bench")]) == ("run" if shared else None)
    assert rule(q(LONG, options=ELSE), [q(stem, "bench")]) == ("run" if shared else None)
    assert rule(q(stem, options=ELSE), [q(LONG, "bench")], ngram=0) is None


@pytest.mark.parametrize(
    ("length", "ngram", "expected"),
    [(3, 3, "run"), (3, 4, None), (4, 4, "run"), (20, 20, "run"), (19, 20, None), (1, 1, "run")],
)
def test_run_has_the_length_that_is_asked_for(length, ngram, expected):
    assert (
        rule(
            q(f"{words(30, 'x')} {words(length)}"),
            [q(f"{words(length)} {words(30, 'a')}", "bench")],
            ngram=ngram,
        )
        == expected
    )


def test_run_is_shown_whole_with_the_benchmark_that_shares_most():
    benchmarks = [
        q(f"{words(13)} {words(50, 'a')}", "little"),
        q(f"{words(15)} {words(5, 'b')}", "much", source="MMMU"),
    ]
    evidence = decontaminate.find([q(f"{words(20)} c")], benchmarks, Path("."))[0]["bank"][
        "evidence"
    ]
    # 21 words have 17 5-grams, 20 have 16; 15 words shared are 11: 11 / (17 + 16 - 11)
    assert evidence == {
        "rule": "run",
        "benchmark": "much",
        "source": "MMMU",
        "run": words(15),
        "words": 15,
        "jaccard": 0.5,
    }


# --------------------------------------------------------------------------------------------------
# Jaccard similarity


@pytest.mark.parametrize(
    ("stem", "other", "expected"),
    [
        (words(20), words(24), 0.8),  # 16 5-grams of 20
        (words(19), words(23), 15 / 19),  # 0.789
        (words(20), words(25), 16 / 21),  # 0.762
        (f"x {words(40)} y", f"a {words(40)} b", 0.9),  # 38 5-grams each, 36 the same: 36 / 40
        (
            words(17),
            f"{words(17)} {words(17)}",
            13 / 17,
        ),  # 4 more where the repeat begins; a 5-gram counts once
        (words(30), words(30, "x"), 0.0),
    ],
)
def test_jaccard_is_shared_5_grams_over_all_5_grams(stem, other, expected):
    for one, two in ((stem, other), (other, stem)):
        found, likeness = decontaminate.find(
            [q(one, options=ELSE)],
            [q(words(30, "z"), "far"), q(two, "bench")],
            Path("."),
            0,
            0.8,
            0,
        )
        evidence = {"rule": "jaccard", "benchmark": "bench", "source": "", "jaccard": expected}
        assert likeness == {"bank": expected} and [row["evidence"] for row in found.values()] == (
            [evidence] if expected >= 0.8 else []
        )


def test_jaccard_limit_is_the_one_asked_for_and_0_is_off():
    bank, benchmark = q(words(19), options=ELSE), [q(words(23), "bench")]
    assert [rule(bank, benchmark, ngram=0, jaccard=limit) for limit in (0.78, 0.79, 0.0)] == [
        "jaccard",
        None,
        None,
    ]


@pytest.mark.parametrize(("length", "expected"), [(12, None), (13, "jaccard")])
def test_short_stem_is_no_leak_by_its_words(length, expected):
    assert rule(q(words(length), options=ELSE), [q(words(length), "bench")], ngram=0) == expected


def test_generic_stem_leaks_only_with_its_options_or_its_image(pictures):
    stem, benchmarks = (
        "What is the most likely diagnosis?",
        [
            q("What is the most likely diagnosis?", "bench", images=("film.png",)),
            q("What is the most likely diagnosis?", "text"),
        ],
    )
    assert rule(q(stem, options=ELSE), benchmarks, pictures) is None
    assert rule(q(stem, images=("other.png",)), benchmarks, pictures) is None
    assert rule(q(stem, options=ELSE, images=("other.png",)), benchmarks, pictures) is None
    assert rule(q(stem, options=ELSE, images=("small.png",)), benchmarks, pictures) == "image"
    assert rule(q(stem, images=("film.png",)), benchmarks, pictures) == "exact"
    assert rule(q(stem), benchmarks, pictures) == "exact"
    assert rule(q(stem), benchmarks[:1], pictures) is None  # the benchmark asks about an image


# --------------------------------------------------------------------------------------------------
# Images


def draw(seed: int) -> Image.Image:
    """A grey picture of 600 x 400 with soft shapes, grain and a black border, unlike any of another
    seed."""
    noise = np.random.default_rng(seed)
    soft = Image.fromarray(noise.integers(30, 256, (8, 11), np.uint8)).resize(
        (600, 400), Image.Resampling.BICUBIC
    )
    grain = np.asarray(soft, float) + noise.normal(0, 4, (400, 600))
    grain[:20] = grain[-20:] = 0
    return Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8))


def rotated_by_exif(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def see_through(image: Image.Image) -> Image.Image:
    """Its left third transparent, and black underneath."""
    alpha, colours = np.full((400, 600), 255, np.uint8), np.asarray(image.convert("RGB")).copy()
    alpha[:, :200] = colours[:, :200] = 0
    return Image.fromarray(np.dstack([colours, alpha]))


def on_white(image: Image.Image) -> Image.Image:
    greys = np.asarray(image).copy()
    greys[:, :200] = 255
    return Image.fromarray(greys)


FILM, OTHER = draw(1), draw(2)
DRESSES = {  # file: how it is made of FILM; all are the same picture
    "small.png": lambda path: FILM.resize((150, 100), Image.Resampling.LANCZOS).save(path),
    "square.png": lambda path: FILM.resize((224, 224), Image.Resampling.BICUBIC).save(path),
    "large.jpeg": lambda path: FILM.resize((2400, 1600)).save(path, quality=85),
    "jpeg90.jpeg": lambda path: FILM.save(path, quality=90),
    "jpeg30.jpeg": lambda path: FILM.save(path, quality=30),
    "small-jpeg.jpeg": lambda path: FILM.resize((120, 80)).save(path, quality=50),
    "colour.jpeg": lambda path: FILM.convert("RGB").save(path, quality=60),
    "cmyk.jpeg": lambda path: FILM.convert("RGB").convert("CMYK").save(path, quality=90),
    "film.webp": lambda path: FILM.save(path, quality=60),
    "palette.gif": lambda path: FILM.save(path),
    "16-bit.png": lambda path: Image.fromarray(np.asarray(FILM).astype(np.uint16) * 257).save(path),
    "12-of-16-bit.png": lambda path: Image.fromarray(np.asarray(FILM).astype(np.uint16) * 16).save(
        path
    ),
    "32-bit.tiff": lambda path: Image.fromarray(
        np.asarray(FILM).astype(np.int32) * 100 - 1024
    ).save(path),
    "float.tiff": lambda path: Image.fromarray(np.asarray(FILM).astype(np.float32) / 255).save(
        path
    ),
    "opaque.png": lambda path: FILM.convert("RGBA").save(path),
    "grey-alpha.png": lambda path: FILM.convert("LA").save(path),
    "brighter.png": lambda path: FILM.point(lambda value: value * 0.8 + 40).save(path),
    "turned-by-exif.jpeg": lambda path: rotated_by_exif(FILM, path),
}
STRANGERS = {
    "other.png": lambda path: OTHER.save(path),
    "mirrored.png": lambda path: FILM.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path),
    "upside-down.png": lambda path: FILM.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path),
    "turned.png": lambda path: FILM.transpose(Image.Transpose.ROTATE_90).save(path),
    "negative.png": lambda path: FILM.point(lambda value: 255 - value).save(path),
    "half.png": lambda path: FILM.crop((300, 0, 600, 400)).save(path),
    "white.png": lambda path: Image.new("L", (600, 400), 255).save(path),
    "black.jpeg": lambda path: Image.new("RGB", (300, 200)).save(path),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    FILM.save(root / "film.png")
    for name, save in {**DRESSES, **STRANGERS}.items():
        save(root / name)
    return root


def film_rule(name: str, root: Path, **limits) -> str | None:
    return rule(
        q("Which side?", options=ELSE, images=(name,)),
        [q("What is it?", "bench", images=("film.png",))],
        root,
        **limits,
    )


@pytest.mark.parametrize("name", DRESSES)
def test_picture_is_known_in_every_dress(pictures, name):
    assert film_rule(name, pictures) == "image"
    assert film_rule(name, pictures, distance=0) is None  # not the same file


@pytest.mark.parametrize("name", STRANGERS)
def test_other_pictures_are_strangers(pictures, name):
    assert film_rule(name, pictures) is None


def test_transparency_is_laid_on_white(tmp_path):
    see_through(FILM).save(tmp_path / "see-through.png")
    on_white(FILM).save(tmp_path / "white.png")
    one, other = (
        decontaminate.dhash(tmp_path / f"{name}.png") for name in ("see-through", "white")
    )
    assert one.tolist() == other.tolist()


# -------------------------------------------------------------------------------------------------
# Images in the changes that bench/leaks.py measures


spec = importlib.util.spec_from_file_location("bench_leaks", ROOT / "bench" / "leaks.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def film(seed: int, size: tuple[int, int] = (200, 160), strength: float = 12) -> Image.Image:
    """One chest and two lungs, the same in every film, under soft shadows of its own."""
    width, height = size
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    lungs = np.exp(-20 * (abs(x) - 0.4) ** 2 - 4 * y**2)
    small = np.random.default_rng(seed).normal(0, 1, (24, 24)).astype(np.float32)
    shadows = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(190 - 110 * lungs + strength * shadows, 0, 255).astype(np.uint8))


def slice_of_ct(seed: int) -> Image.Image:
    """An ellipse of soft shapes on black, with black on all sides."""
    y, x = np.mgrid[-1:1:240j, -1:1:300j]
    greys = np.asarray(film(seed, (300, 240))) * (x**2 / 0.6 + y**2 / 0.4 < 1)
    return Image.fromarray(greys.astype(np.uint8))


def echo(seed: int) -> Image.Image:
    """A fan of texture that fills a quarter of a black screen."""
    y, x = np.mgrid[0:1:240j, -1:1:320j]
    greys = np.asarray(film(seed, (320, 240), 30)) * ((abs(x) < 0.6 * y) & (x**2 + y**2 < 0.8))
    return Image.fromarray(greys.astype(np.uint8))


KINDS = {"film": film, "slice of CT": slice_of_ct, "echo": echo}


def hashed(pictures: list[Image.Image], folder: Path) -> np.ndarray:
    """(pictures, 2, words); none may be flat."""
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png", compress_level=1)
    return np.stack([decontaminate.dhash(folder / f"{i}.png") for i in range(len(pictures))])


@pytest.mark.parametrize("kind", KINDS)
def test_picture_is_the_same_after_each_change(tmp_path, kind):
    pictures = [KINDS[kind](seed).convert("RGB") for seed in range(6)]
    (tmp_path / "made").mkdir()
    own = hashed(pictures, tmp_path)
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for change in [*bench.CHANGES, "black border"]:
        made = bench.changed(paths, change, tmp_path / "made")
        differ = decontaminate.distances(
            own, np.stack([decontaminate.dhash(path) for path in made])
        )
        same = differ <= decontaminate.DISTANCE
        assert same.tolist() == np.eye(6, dtype=bool).tolist(), (change, differ.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_one_layout_are_not_the_same(tmp_path, kind):
    pictures = [KINDS[kind](seed) for seed in range(60)]
    borders = {
        "none": lambda picture: picture,
        "white": lambda picture: bench.bordered(picture, "white"),
        "paper": lambda picture: bench.bordered(bench.padded(picture, "black"), "white"),
    }
    pairs = np.triu_indices(60, 1)
    for name, border in borders.items():  # one that all have makes no two alike
        all_hashes = hashed([border(picture) for picture in pictures], tmp_path)
        assert (
            decontaminate.distances(all_hashes, all_hashes)[pairs].min() > decontaminate.DISTANCE
        ), name


def test_border_is_peeled_off_and_what_is_inside_stays():
    inside = np.random.default_rng(0).integers(60, 200, (40, 50)).astype(np.uint8)
    for colours in ((0,), (255,), (255, 0), (0, 255, 0), (30, 230)):
        greys = inside
        for colour in reversed(colours):
            greys = np.pad(greys, ((3, 5), (0, 7)), constant_values=colour)
        assert np.array_equal(decontaminate.content(greys), inside)
    greyish = np.pad(inside, 4, constant_values=128)
    assert decontaminate.content(greyish).shape == (48, 58)  # only black and white are borders
    halves = np.tri(2000, dtype=np.uint8) * 255
    assert (
        min(decontaminate.content(halves).shape) > 1990
    )  # each line is plain once those before are gone
    speck = np.zeros((100, 100), np.uint8)
    speck[50:55, 40:45] = inside[:5, :5]
    assert decontaminate.content(speck).shape == (100, 100)  # less than a hash needs


def real_images(folder: Path) -> list[Path]:
    """The real images, the large ones shrunk to be quick."""
    root = os.environ.get("MEDEE_REAL_DATA")
    if not root:
        pytest.skip("MEDEE_REAL_DATA is not set: the folder with real images")
    paths = []
    for path in sorted((Path(root) / "images").iterdir()):
        image = images.load_image(path)
        image.thumbnail((640, 640))
        paths.append(folder / f"{path.stem}.png")
        image.save(paths[-1], compress_level=1)
    return paths


def test_real_images_are_known_again_after_each_change(tmp_path):
    paths = real_images(tmp_path)
    (tmp_path / "made").mkdir()
    takes = [bench.TAKES.get(path.stem, path.stem) for path in paths]
    own = np.stack([decontaminate.dhash(path) for path in paths])
    for change in bench.CHANGES:
        made = bench.changed(paths, change, tmp_path / "made")
        differ = decontaminate.distances(
            own, np.stack([decontaminate.dhash(path) for path in made])
        )
        assert (differ.diagonal() <= decontaminate.DISTANCE).mean() >= 0.95, change
        for i, j in zip(*np.nonzero(differ <= decontaminate.DISTANCE)):
            assert takes[i] == takes[j], (change, paths[i].name, paths[j].name)


def test_next_to_no_two_real_chest_films_are_the_same(tmp_path):
    root = os.environ.get("MEDEE_REAL_DATA")
    if not root:
        pytest.skip("MEDEE_REAL_DATA is not set: the folder with real films")
    films = [Image.fromarray(film) for film in np.load(Path(root) / "chest_films_64.npz")["films"]]
    for border in (lambda film: film, lambda film: bench.bordered(film, "white")):
        all_hashes = hashed([border(film) for film in films], tmp_path)
        differ = decontaminate.distances(all_hashes, all_hashes)[np.triu_indices(500, 1)]
        assert len(differ) == 124_750 and (differ <= decontaminate.DISTANCE).sum() <= 1


# -------------------------------------------------------------------------------------------------
# Bits of the hash


def of_edges(edges: int, path: Path) -> str:
    """A picture of 17 x 17 greys whose hash follows 32 bits: the first 16 say in which rows it is
    brighter at the right edge, the others in which columns at the lower one. No other bit of the
    hash depends on these two lines; none of the greys is near black or white."""
    greys = np.random.default_rng(0).choice([100, 150], (17, 17))
    for place in range(16):
        greys[place, 16] = greys[place, 15] + (50 if edges >> place & 1 else -50)
        greys[16, place] = greys[15, place] + (50 if edges >> (16 + place) & 1 else -50)
    Image.fromarray(greys.astype(np.uint8)).save(path)
    return path.name


def spots(count: int, shade: int = 180) -> Image.Image:
    """A grey picture with single pixels that are brighter than the left and the upper one: two bits
    of the hash each."""
    greys = np.full((17, 17), 128, np.uint8)
    for i in range(count):
        greys[1 + 2 * (i // 7), 2 + 2 * (i % 7)] = shade
    return Image.fromarray(greys)


def bits(path: Path) -> np.ndarray:
    """The hash of the picture without its border, 0 or 1 each."""
    return np.unpackbits(decontaminate.dhash(path)[0].view(np.uint8))


def test_hash_says_where_it_is_brighter_to_the_right_and_below(tmp_path):
    # 17 x 17 greys need no shrinking; none is near black or white
    rng = np.random.default_rng(1)
    for _ in range(20):
        greys = rng.integers(60, 200, (17, 17))
        Image.fromarray(greys.astype(np.uint8)).save(tmp_path / "p.png")
        steps = [
            *(greys[r, c + 1] - greys[r, c] for r in range(16) for c in range(16)),
            *(greys[r + 1, c] - greys[r, c] for r in range(16) for c in range(16)),
        ]
        least = 0.2 * sum(map(abs, steps)) / 512
        assert bits(tmp_path / "p.png").tolist() == [int(step > least) for step in steps]


@pytest.mark.parametrize(
    ("limit", "differ", "expected"),
    [
        (4, 4, "image"),
        (4, 5, None),
        (1, 1, "image"),
        (1, 2, None),
        (14, 14, "image"),
        (14, 15, None),
        (0, 1, None),
    ],
)
def test_images_are_the_same_up_to_so_many_bits(tmp_path, limit, differ, expected):
    rng = random.Random(differ)
    edges = flipped = rng.getrandbits(32)
    for place in rng.sample(range(32), differ):
        flipped ^= 1 << place
    far = of_edges(edges ^ (2**32 - 1), tmp_path / "far.png")
    theirs = of_edges(edges, tmp_path / "theirs.png")
    benchmarks = [
        q("What?", "far", images=(far,)),
        q("What is it?", "bench", images=(theirs,), source="PMC-VQA"),
    ]
    draw(3).save(tmp_path / "no.png")
    images = "no.png", of_edges(flipped, tmp_path / "own.png")
    found = decontaminate.find([q("Who?", images=images)], benchmarks, tmp_path, distance=limit)[0]
    evidence = {
        "rule": "image",
        "benchmark": "bench",
        "source": "PMC-VQA",
        "image": "own.png",
        "benchmark_image": "theirs.png",
        "distance": differ,
        "same_file": False,
    }
    assert [row["evidence"] for row in found.values()] == ([evidence] if expected else [])


@pytest.mark.parametrize(("count", "flat"), [(0, True), (24, True), (25, False)])
def test_image_as_near_to_a_plain_one_as_to_itself_counts_as_flat(tmp_path, count, flat):
    spots(count).save(tmp_path / "p.png")
    assert 2 * 24 == decontaminate.DISTANCE  # so many bits from a plain picture
    assert (decontaminate.dhash(tmp_path / "p.png") is None) == flat


def test_a_ramp_and_faint_noise_are_flat(tmp_path):
    row = np.arange(300)
    Image.fromarray((row[:, None] + row).astype(np.uint16) * 100).save(tmp_path / "ramp.png")
    noise = np.random.default_rng(0).integers(120, 124, (300, 300), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for name in ("ramp.png", "noise.png"):
        assert decontaminate.dhash(tmp_path / name) is None


def test_flat_image_leaks_only_as_the_same_file(tmp_path):
    for name, shade in (("white.png", 255), ("grey.png", 128), ("copy-of-white.png", 255)):
        Image.new("L", (60, 40), shade).save(tmp_path / name)
    spots(1).save(tmp_path / "nearly.png")
    for name in ("white.png", "copy-of-white.png", "grey.png", "nearly.png"):
        bank, bench = q("Who?", images=(name,)), q("What?", "bench", images=("white.png",))
        found = decontaminate.find([bank], [bench], tmp_path, distance=10)[0]
        told = [(row["evidence"]["rule"], row["evidence"]["same_file"]) for row in found.values()]
        assert told == ([("image", True)] if "white" in name else [])


def test_nearest_image_is_named_where_several_are_near(tmp_path):
    edges = 0x0F0F0F0F
    for name, flipped in (("own", 0), ("two", 3), ("one", 1), ("three", 7)):
        of_edges(edges ^ flipped, tmp_path / f"{name}.png")
    benchmarks = [q("What?", name, images=(f"{name}.png",)) for name in ("two", "one", "three")]
    found = decontaminate.find([q("Who?", images=("own.png",))], benchmarks, tmp_path)[0]
    assert found["bank"]["evidence"]["benchmark"] == "one"


def test_nearest_of_a_questions_own_images_is_the_evidence(tmp_path):
    edges = 0x0F0F0F0F
    for name, other in (("a", edges ^ 7), ("b", edges ^ 1), ("theirs", edges)):
        of_edges(other, tmp_path / f"{name}.png")
    bank = q("Who?", images=("a.png", "b.png"))
    bench = q("What?", "bench", images=("theirs.png",))
    evidence = decontaminate.find([bank], [bench], tmp_path)[0]["bank"]["evidence"]
    assert (evidence["image"], evidence["distance"], evidence["same_file"]) == ("b.png", 1, False)


def test_same_file_under_another_name_leaks_whatever_the_distance(tmp_path):
    for name in ("theirs.png", "own.png"):
        FILM.save(tmp_path / name)
    for distance in (0, 4):
        found = decontaminate.find(
            [q("Who?", images=("own.png",))],
            [q("What?", "bench", images=("theirs.png",))],
            tmp_path,
            distance=distance,
        )[0]
        assert found["bank"]["evidence"]["same_file"] and found["bank"]["evidence"]["distance"] == 0


def test_plain_areas_are_not_brighter_to_the_right(tmp_path):
    Image.fromarray(
        np.where(np.arange(90) < 45, 200, 20).astype(np.uint8)[None].repeat(80, 0)
    ).save(tmp_path / "step.png")
    assert (
        decontaminate.dhash(tmp_path / "step.png") is None
    )  # one step down in each row, plain elsewhere: no bit is set


def test_image_order_and_images_make_a_repeat(pictures):
    bank = [
        q("Who?", "1", images=("film.png", "other.png")),
        q("Who?", "2", images=("other.png", "film.png")),
        q("Who?", "3", images=("film.png",)),
        q("Who?", "4"),
    ]
    assert set(decontaminate.find(bank, [], pictures)[0]) == {"2"}


def test_missing_and_broken_images_are_named(tmp_path):
    FILM.save(tmp_path / "film.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "film.png").read_bytes()[:5000])
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(
        data.RowError, match=r"question bank: image away.png is not below .*check --images"
    ):
        decontaminate.find([q("Who?", images=("away.png",))], [], tmp_path)[0]
    with pytest.raises(data.RowError, match=r"question bench: image away.png"):
        decontaminate.find([q("Who?")], [q("Who?", "bench", images=("away.png",))], tmp_path)[0]
    for name in ("broken.png", "text.png"):
        with pytest.raises(
            data.RowError, match=rf"{name}: not a readable image .*replace or remove it"
        ):
            decontaminate.find(
                [q("Who?", images=(name,))], [q("What?", "bench", images=("film.png",))], tmp_path
            )[0]


# --------------------------------------------------------------------------------------------------
# Against a brute force over all pairs

stems = st.lists(st.sampled_from("abc"), min_size=1, max_size=22)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(stems, max_size=6),
    st.lists(stems, max_size=6),
    st.integers(0, 7),
    st.sampled_from([0, 0.1, 0.25, 0.5, 0.8, 1.0]),
)
def test_text_rules_are_those_of_all_pairs(bank, benchmarks, ngram, jaccard):
    def pieces(text, n):
        return {tuple(text[i : i + n]) for i in range(len(text)) if i + n <= len(text)}

    expected, nearest = {}, {}
    for i, own in enumerate(bank):
        hits = {
            "exact": own in benchmarks,
            "run": bool(ngram)
            and any(pieces(own, ngram) & pieces(other, ngram) for other in benchmarks),
        }
        if len(own) >= 13:
            alike = [
                len(pieces(own, 5) & pieces(other, 5)) / len(pieces(own, 5) | pieces(other, 5))
                for other in benchmarks
                if len(other) >= 13
            ]
            nearest[str(i)] = max(alike, default=0)
            hits["jaccard"] = jaccard > 0 and nearest[str(i)] >= jaccard
        hits["repeat"] = own in bank[:i]
        if any(hits.values()):
            expected[str(i)] = next(name for name, hit in hits.items() if hit)
    found, likeness = decontaminate.find(
        [q(" ".join(own), str(i)) for i, own in enumerate(bank)],
        [q(" ".join(own), f"b{i}") for i, own in enumerate(benchmarks)],
        Path("."),
        ngram,
        jaccard,
        4,
    )
    assert {
        key: row["evidence"]["rule"] for key, row in found.items()
    } == expected and likeness == nearest
    for key, row in found.items():  # the evidence is true of the benchmark it names
        if row["evidence"]["rule"] == "run":
            run = row["evidence"]["run"].split()
            assert len(run) >= ngram and all(
                tuple(run) in pieces(text, len(run))
                for text in (bank[int(key)], benchmarks[int(row["evidence"]["benchmark"][1:])])
            )


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_nearest_images_are_those_of_all_pairs(monkeypatch, block):
    monkeypatch.setattr(decontaminate, "BLOCK", block)
    rng = random.Random(block)

    def words(pair):  # (without its border, whole), 512 bits each
        cut = [[number >> 64 * i & 2**64 - 1 for i in range(8)] for number in pair]
        return np.array(cut, np.uint64)

    def near(number):
        return number ^ sum(1 << place for place in rng.sample(range(512), rng.randint(0, 9)))

    def apart(one, other):  # never the two wholes
        pairs = (one[0], other[0]), (one[0], other[1]), (one[1], other[0])
        return min((a ^ b).bit_count() for a, b in pairs)

    def some(of=None):
        first, second = (near(rng.choice(of)[i]) if of else rng.getrandbits(512) for i in (0, 1))
        return rng.choice([(first, first), (first, second), (second, second)])

    theirs = [some() for _ in range(40)]
    own = [some(theirs) for _ in range(100)]
    expected = {}
    for i, one in enumerate(own):
        bits, k = min((apart(one, other), k) for k, other in enumerate(theirs))
        if bits <= 4:
            expected[f"o{i}"] = bits, f"t{k}"
    one = {f"o{i}": words(pair) for i, pair in enumerate(own)}
    other = {f"t{i}": words(pair) for i, pair in enumerate(theirs)}
    assert expected and decontaminate.nearest_images(one, other, 4) == expected
    assert (
        decontaminate.nearest_images(one, {}, 4) == decontaminate.nearest_images({}, other, 4) == {}
    )


# --------------------------------------------------------------------------------------------------
# The command


def test_audit_writes_and_prints_every_leak(tmp_path, pictures):
    bank = [
        q("What now?", "exact"),
        q(f"{words(13)} x", "run", ELSE),
        q(f"{words(13)} y", "run too", ELSE),
        q(f"{words(12, 'j')} x", "jaccard", ELSE),
        q("Who?", "image", images=("small.png",)),
        q("Why?", "kept"),
        q(words(30, "k"), "kept long"),
        q("why", "repeat"),
    ]
    benchmarks = {
        "one": [
            q("What now?", "b1", source="MMMU"),
            q(f"{words(13)} {words(40, 'a')}", "b2", source="MMMU"),
        ],
        "two": [
            q(f"{words(12, 'j')} y", "b3", source="PMC-VQA"),
            q("What?", "b4", images=("film.png",), source="PMC-VQA"),
        ],
    }
    data.write_jsonl(tmp_path / "bank.jsonl", (question.to_row() for question in bank))
    for name, questions in benchmarks.items():
        data.write_jsonl(tmp_path / f"{name}.jsonl", (question.to_row() for question in questions))
    command = [
        sys.executable,
        "-m",
        "benchmarks.decontaminate",
        "--questions",
        "bank.jsonl",
        "--against",
        "one.jsonl",
        "two.jsonl",
        "--images",
        str(pictures),
        "--ngram",
        "13",
        "--out",
        "out",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [row for _, row in data.read_jsonl(tmp_path / "out" / "leaks.jsonl")]
    assert [
        (row["id"], row["evidence"]["rule"], row["evidence"].get("benchmark")) for row in rows
    ] == [
        ("exact", "exact", "b1"),
        ("run", "run", "b2"),
        ("run too", "run", "b2"),
        ("jaccard", "jaccard", "b3"),
        ("image", "image", "b4"),
        ("repeat", "repeat", None),
    ]
    stage = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert (
        set(stage["inputs"]) == {"bank.jsonl", "one.jsonl", "two.jsonl"}
        and set(stage["outputs"]) == {"leaks.jsonl"}
        and stage["settings"]["ngram"] == 13
    )
    assert stage["figures"]["leaks"] == {
        "exact, MMMU": 1,
        "image, PMC-VQA": 1,
        "repeat, the bank itself": 1,
        "jaccard, PMC-VQA": 1,
        "run, MMMU": 2,
    }
    assert (
        stage["figures"]["questions"] == 8 and sum(stage["figures"]["nearest_jaccard_of_kept"]) == 1
    )  # of "kept long" alone
    printed = [line.split() for line in done.stdout.splitlines()]
    assert (
        ["run", "MMMU", "2"] in printed
        and ["image", "PMC-VQA", "1"] in printed
        and printed[0] == "6 leaks and repeats among 8 questions".split()
    )
    assert f"2 questions share '{words(13)}'" in done.stdout


def test_id_that_means_two_questions_is_refused(tmp_path):
    for name, stem in (("one", "What?"), ("two", "Who?"), ("three", "What?")):
        data.write_jsonl(tmp_path / f"{name}.jsonl", [q(stem).to_row()])
    common = [
        "--against",
        str(tmp_path / "one.jsonl"),
        "--out",
        str(tmp_path / "out"),
        "--questions",
    ]
    with pytest.raises(
        data.RowError, match="two.jsonl: id: 'bank' is another question in an earlier file"
    ):
        decontaminate.main([*common, str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")])
    decontaminate.main([*common, str(tmp_path / "one.jsonl"), str(tmp_path / "three.jsonl")])
    assert len(list(data.read_jsonl(tmp_path / "out" / "leaks.jsonl"))) == 1


def test_recipe_of_the_miniature_drops_no_question_that_only_looks_alike(tmp_path):
    world = tmp_path / "world"
    sizes = {
        "text": 100,
        "image": 100,
        "dev-image": 20,
        "dev-text": 20,
        "test-image": 60,
        "test-text": 60,
    }
    clinic.__main__.main(["world", "--out", str(world), *pipeline.words_of(sizes)])
    against = [str(world / "test.jsonl"), str(world / "dev.jsonl")]
    common = ["--questions", str(world / "bank.jsonl"), "--against", *against]
    assert medee.MINI["curate"]["exact-leaks"]
    own = [decontaminate.NGRAM, decontaminate.JACCARD, decontaminate.DISTANCE]
    limits = {
        "own": own,
        "recipe": [0, 0, 0],
        "ngram": [own[0], 0, 0],
        "jaccard": [0, own[1], 0],
        "distance": [0, 0, own[2]],
    }
    rules = {}
    for name, three in limits.items():
        out = ["--images", str(world), "--out", str(tmp_path / name)]
        words = pipeline.words_of(dict(zip(("ngram", "jaccard", "distance"), three)))
        decontaminate.main([*common, *out, *words])
        rejected = data.read_jsonl(tmp_path / name / "leaks.jsonl")
        rules[name] = {row["evidence"]["rule"] for _, row in rejected}
    assert rules["recipe"] <= {"exact", "repeat"} and "run" in rules["own"]
    assert "run" in rules["ngram"] and "jaccard" in rules["jaccard"]  # either alone would drop some
    assert rules["distance"] <= {"exact", "repeat"}  # films of the same kind are not the same film


# --------------------------------------------------------------------------------------------------
# Real questions


def test_real_questions_are_known_when_edited_and_no_two_are_taken_for_one():
    folder = os.environ.get("MEDEE_REAL_DATA")
    if not folder:
        pytest.skip("MEDEE_REAL_DATA is not set: the folder with real records")
    found = {}
    for name in ("medqa_input_200.jsonl", "medxpertqa_sampled_mm_input.jsonl"):
        found[name] = [
            q(row["question"].split("\nAnswer Choices")[0], row["id"], ELSE)
            for _, row in data.read_jsonl(Path(folder) / name)
        ]
    medqa, medxpertqa = found.values()
    assert decontaminate.find(medqa, medxpertqa, Path("."), ngram=20, jaccard=0.25)[0] == {}
    rng = random.Random(0)
    edited = [
        q(
            " ".join(
                "edited" if rng.random() < 0.1 else word for word in question.question.split()
            ),
            question.id,
        )
        for question in medqa
    ]
    assert len(
        decontaminate.find(edited, medqa, Path("."), ngram=20, jaccard=0.25)[0]
    ) > 0.95 * len(edited)


def test_a_repeat_with_another_answer_has_a_reason_of_its_own(tmp_path):
    other = dict(zip("ABCD", ["two", "one", "three", "four"]))
    options = dict(zip("ABCD", ["one", "two", "three", "four"]))
    bank = [
        data.Question("What is it?", options, "A", id="first"),
        data.Question("what IS it", other, "B", id="same"),
        data.Question("What is it", other, "A", id="another"),
    ]
    found = decontaminate.find(bank, [], tmp_path)[0]
    assert {key: row["reason"] for key, row in found.items()} == {
        "same": "same as bank question first",
        "another": "same as bank question first, with another answer",
    }
    assert found["another"]["evidence"] == {
        "rule": "repeat",
        "question": "first",
        "answers": ["one", "two"],
    }
