"""The leak check at the paper's size: seconds, peak memory, planted leaks found, false alarms.

    python bench/leaks.py            54,000 bank questions against 5,000 benchmark questions with
                                     3,000 images; 60 MB of small images in a temporary folder, a
                                     few minutes

Stems are about 130 words, drawn at random from 20,000, with stock phrases of exam questions in
between. So most questions share 5-grams with thousands of benchmark questions, but a run of 13
words with none. Planted are copies with other case, commas and option order; stems with one word in
ten replaced (at random, and exactly every tenth); and benchmark images scaled and compressed. The
check runs twice: with its own limits, and with longer runs and a lower similarity.

Where MEDEE_REAL_DATA names a folder with real images, the image hash is measured first: how many
pairs of different chest films it takes for one image, and what share of real images it recognises
after each change. The usual difference hash (9 x 8 greys, 4 bits of 64) is measured beside it.
"""

import argparse
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
from benchmarks import decontaminate  # noqa: E402
from command.images import load_image  # noqa: E402

WORDS = [f"w{i}" for i in range(20_000)]
STOCK = [  # (phrase, share of the questions that have it)
    ("which of the following is the most likely diagnosis", 0.4),
    ("which of the following is the most appropriate", 0.3),
    ("presents to the emergency department because of", 0.3), ("min and blood pressure is", 0.5),
    ("physical examination shows no abnormalities", 0.2), ("the remainder of the examination", 0.2),
]  # fmt: skip
PLANTED = 200  # of each kind


# -------------------------------------------------------------------------------------------------
# The image hash on real images


def padded(image: Image.Image, colour: str) -> Image.Image:
    return ImageOps.pad(image, (max(image.size),) * 2, color=colour)


def bordered(image: Image.Image, colour: str) -> Image.Image:
    return ImageOps.expand(image, max(2, max(image.size) // 20), colour)  # 5 % on each side


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Without this share of the width and the height, half of it on each side."""
    return ImageOps.crop(image, tuple(round(side * share / 2) for side in image.size * 2))


CHANGES = {  # name: (what is made of an image, JPEG quality or 0 for PNG)
    "half the size": (lambda image: ImageOps.scale(image, 0.5), 0),
    "1.7 times the size": (lambda image: ImageOps.scale(image, 1.7), 0),
    "stretched to 336 x 336": (lambda image: image.resize((336, 336)), 0),
    "JPEG of quality 50": (lambda image: image, 50),
    "JPEG of quality 20": (lambda image: image, 20),
    "grey": (lambda image: image.convert("L"), 0),
    "brightness x 0.8": (lambda image: ImageEnhance.Brightness(image).enhance(0.8), 0),
    "brightness x 1.2": (lambda image: ImageEnhance.Brightness(image).enhance(1.2), 0),
    "contrast x 0.8": (lambda image: ImageEnhance.Contrast(image).enhance(0.8), 0),
    "contrast x 1.2": (lambda image: ImageEnhance.Contrast(image).enhance(1.2), 0),
    "square, on black": (lambda image: padded(image, "black"), 0),
    "square, on white": (lambda image: padded(image, "white"), 0),
    "white border": (lambda image: bordered(image, "white"), 0),
}
HARDER = {  # measured, not promised
    "black border": (lambda image: bordered(image, "black"), 0),
    "white border, JPEG of 50": (lambda image: bordered(image, "white"), 50),
    "white border, JPEG of 20": (lambda image: bordered(image, "white"), 20),
    "white, half size, JPEG 50": (lambda image: ImageOps.scale(bordered(image, "white"), 0.5), 50),
    "contrast x 1.4": (lambda image: ImageEnhance.Contrast(image).enhance(1.4), 0),
    "2 % cropped off": (lambda image: cropped(image, 0.02), 0),
    "5 % cropped off": (lambda image: cropped(image, 0.05), 0),
    "10 % cropped off": (lambda image: cropped(image, 0.1), 0),
}
TAKES = {  # different files of one image: another size, more black around it, another screen crop
    "pd_examples_rgb_color": "pdd_US1_UNCI",
    "pd_examples_overlay": "pdd_MR-SIEMENS-DICOM-WithOverlays",
    "pd_examples_palette": "pdd_OBXXXX1A",
}


def usual(path: Path) -> np.ndarray:
    """(1, 2, 1) words: the usual difference hash, twice, in the form of decontaminate's."""
    small = np.asarray(load_image(path).convert("L").resize((9, 8), Image.Resampling.BILINEAR))
    word = np.packbits(small[:, 1:] > small[:, :-1]).view(np.uint64)
    return np.tile(word, (1, 2, 1))


def ours(path: Path) -> np.ndarray:
    """(1, 2, words); no real image here is flat."""
    return decontaminate.dhash(path)[None]


def changed(paths: list[Path], change: str, folder: Path) -> list[Path]:
    make, quality = {**CHANGES, **HARDER}[change]
    made = []
    for path in paths:
        image = make(load_image(path))
        made.append(folder / f"{path.stem}.{'jpeg' if quality else 'png'}")
        image.save(made[-1], quality=quality, compress_level=1)  # a format takes its own
    return made


def film_distances(data_root: Path, folder: Path, own_hash: Callable) -> np.ndarray:
    """Bits that differ, for every pair of the 500 chest films."""
    hashed = []
    for film in np.load(data_root / "chest_films_64.npz")["films"]:
        Image.fromarray(film).save(folder / "film.png")
        hashed.append(own_hash(folder / "film.png"))
    hashed = np.concatenate(hashed)
    return decontaminate.distances(hashed, hashed)[np.triu_indices(len(hashed), 1)]


def measure(data_root: Path) -> None:
    """Prints false pairs and recall of both hashes on the real images below a folder."""
    paths = sorted((data_root / "images").iterdir())
    takes = {path.stem: TAKES.get(path.stem, path.stem) for path in paths}
    other = np.array([[a != b for b in takes.values()] for a in takes.values()])
    hashes = {"usual": (usual, 4), "ours": (ours, decontaminate.DISTANCE)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, (own_hash, limit) in hashes.items():
            films = np.sort(film_distances(data_root, folder, own_hash))
            false = films <= limit
            print(f"{title}: {false.sum()} of {len(films):,} pairs of chest films are one image")
            print(f"  ({false.mean():.4%}); the nearest differ in {films[:5]} bits")
        whole = {t: np.concatenate([h(path) for path in paths]) for t, (h, _) in hashes.items()}
        print(f"of {len(paths)} images, the share known again, and pairs of others taken for one")
        print(f"  {'':<26}   {'usual':<24}ours")
        for change in [*CHANGES, *HARDER]:
            made, line = changed(paths, change, folder), f"  {change:<26}"
            for title, (own_hash, limit) in hashes.items():
                hashed = np.concatenate([own_hash(path) for path in made])
                differ = decontaminate.distances(whole[title], hashed)
                false, near = (differ[other] <= limit).sum(), differ[other].min()
                recall = (differ.diagonal() <= limit).mean()
                line += f"   {recall:.2f} {false:>3} (nearest {near:>3})"
            print(line, flush=True)


# -------------------------------------------------------------------------------------------------
# The check at the paper's size


def draw_stem(rng: random.Random) -> list[str]:
    """Two stock phrases are never adjacent: they would be a run of 13 words."""
    words: list[str] = []
    for phrase, share in rng.sample(STOCK, len(STOCK)):
        words += rng.choices(WORDS, k=rng.randint(8, 25))
        words += phrase.split() if rng.random() < share else []
    return words + rng.choices(WORDS, k=rng.randint(8, 25))


def draw_image(path: Path, noise: np.random.Generator) -> str:
    """72 x 64 greys, a smooth enlargement of 9 x 8 random ones."""
    small = Image.fromarray(noise.integers(0, 256, (8, 9), np.uint8))
    small.resize((72, 64), Image.Resampling.BICUBIC).save(path, compress_level=1)
    return path.name


def draw_question(rng: random.Random, key: str, images: list[str]) -> data.Question:
    options = {letter: " ".join(rng.choices(WORDS, k=3)) for letter in "ABCDE"}
    return data.Question(" ".join(draw_stem(rng)), options, "A", images, id=key)


def draw_set(
    kind: str,
    count: int,
    with_image: int,
    root: Path,
    rng: random.Random,
    noise: np.random.Generator,
) -> list[data.Question]:
    drawn = []
    for i in range(count):
        images = [draw_image(root / f"{kind}-{i}.png", noise)] if i < with_image else []
        drawn.append(draw_question(rng, f"{kind}-{i}", images))
    return drawn


def planted(benchmarks: list[data.Question], rng: random.Random, root: Path) -> list[data.Question]:
    """PLANTED questions of each kind; an id begins with the name of its kind."""
    made = []
    plain, films = ([q for q in benchmarks if bool(q.images) == kind] for kind in (False, True))
    replaced = {  # kind: whether the word at a place is another
        "one in ten": lambda place: rng.random() < 0.1,
        "every tenth": lambda place: place % 10 == 9,
    }
    for i in range(PLANTED):
        copy, film = rng.choice(plain), rng.choice(films)
        turned = dict(zip("ABCDE", reversed(copy.options.values())))
        stem = copy.question.upper().replace(" ", ",  ") + " ?"
        made.append(data.Question(stem, turned, "E", id=f"copied-{i}"))
        for kind, is_replaced in replaced.items():
            words = rng.choice(benchmarks).question.split()
            words = [rng.choice(WORDS) if is_replaced(n) else word for n, word in enumerate(words)]
            made.append(data.Question(" ".join(words), {}, "something", id=f"{kind}-{i}"))
        with Image.open(root / film.images[0]) as image:
            scale = rng.uniform(0.7, 3)
            scaled = image.resize((int(72 * scale), int(64 * scale)), Image.Resampling.LANCZOS)
            scaled.save(root / f"leak-{i}.jpeg", quality=rng.randint(40, 95))
        made.append(draw_question(rng, f"image-{i}", [f"leak-{i}.jpeg"]))
    return made


def print_shared(bank: list[data.Question], benchmarks: list[data.Question]) -> None:
    """Prints how many 5-grams one of the first 500 questions shares with the benchmarks."""
    index = decontaminate.Grams([q.question.split() for q in benchmarks], decontaminate.GRAM)
    found = []
    for one in bank[:500]:
        own = decontaminate.grams(one.question.split(), decontaminate.GRAM)
        found.append(int(index.shared(own).sum()))
    print(f"{len(bank):,} questions against {len(benchmarks):,}", flush=True)
    print(f"a question shares {statistics.mean(found):,.0f} 5-grams with them on average")


def check(bank: list[data.Question], benchmarks: list[data.Question], root: Path, ngram: int):
    """Runs the check and prints time, memory, and what was found of each kind."""
    begin, limits = time.perf_counter(), (decontaminate.JACCARD, decontaminate.DISTANCE)
    found, likeness = decontaminate.find(bank, benchmarks, root, ngram, *limits)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"--ngram {ngram} --jaccard {limits[0]}: {seconds:.0f} s, peak {peak:.2f} GB", end="")
    print(", bank included   (targets: 120 s, 2 GB)")
    for kind in ("copied", "one in ten", "every tenth", "image"):
        rules = [row["evidence"]["rule"] for key, row in found.items() if key.startswith(kind)]
        by = ", ".join(sorted(set(rules))) or "no rule"
        print(f"  {kind:<12} {len(rules):>4} of {PLANTED} found, by {by}")
    rest = [key for key in likeness if key.startswith("bank")]
    dropped = len(found.keys() & {*rest})
    print(f"  {'the rest':<12} {dropped:>4} of {len(rest):,} dropped   (target: 0)", flush=True)
    nearest = max(likeness[key] for key in rest)
    print(f"  nearest Jaccard similarity among the rest: {nearest:.3f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The leak check at the paper's size.")
    parser.add_argument("--text", type=int, default=37_000)  # paper 3.1
    parser.add_argument("--image", type=int, default=17_000)  # paper 3.1
    parser.add_argument("--benchmarks", type=int, default=5_000)
    parser.add_argument("--benchmark-images", type=int, default=3_000)
    args = parser.parse_args(argv)
    if os.environ.get("MEDEE_REAL_DATA"):
        measure(Path(os.environ["MEDEE_REAL_DATA"]))
    rng, noise = random.Random(0), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sizes = args.benchmarks, args.benchmark_images
        benchmarks = draw_set("benchmark", *sizes, root, rng, noise)
        bank = draw_set("bank", args.text + args.image, args.image, root, rng, noise)
        bank += planted(benchmarks, rng, root)
        print_shared(bank, benchmarks)
        for ngram in (decontaminate.NGRAM, 20):
            check(bank, benchmarks, root, ngram)


if __name__ == "__main__":
    main()
