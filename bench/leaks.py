"""The leak check at the paper's size: seconds, peak memory, and whether it finds what was planted and nothing else.

    python bench/leaks.py            54,000 bank questions against 5,000 benchmark questions with 3,000 images; 60 MB of small
                                     images in a temporary folder, a few minutes

Stems are about 130 words, drawn at random from 20,000, with stock phrases of exam questions in between, so that most questions
share 5-grams with thousands of benchmark questions, but runs of 13 words with none. Planted are copies in another dress, stems
with one word in ten replaced (at random, and exactly every tenth), and benchmark images scaled and compressed. The check
runs twice: with its own limits, and with longer runs and a lower similarity.
"""

import argparse
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import leaks  # noqa: E402

WORDS = [f"w{i}" for i in range(20_000)]
STOCK = [  # (phrase, share of the questions that have it)
    ("which of the following is the most likely diagnosis", 0.4), ("which of the following is the most appropriate", 0.3),
    ("presents to the emergency department because of", 0.3), ("min and blood pressure is", 0.5),
    ("physical examination shows no abnormalities", 0.2), ("the remainder of the examination", 0.2),
]  # fmt: skip
PLANTED = 200  # of each kind


def draw_stem(rng: random.Random) -> list[str]:
    """The phrases stand apart: two in a row would be a run of 13 words."""
    words: list[str] = []
    for phrase, share in rng.sample(STOCK, len(STOCK)):
        words += rng.choices(WORDS, k=rng.randint(8, 25)) + (phrase.split() if rng.random() < share else [])
    return words + rng.choices(WORDS, k=rng.randint(8, 25))


def draw_question(rng: random.Random, key: str, images: list[str]) -> data.Question:
    options = {letter: " ".join(rng.choices(WORDS, k=3)) for letter in "ABCDE"}
    return data.Question(" ".join(draw_stem(rng)), options, "A", images, key.split("-")[0], {}, key)


def draw_image(path: Path, noise: np.random.Generator) -> str:
    """72 x 64 greys that vary smoothly between 9 x 8 drawn ones."""
    Image.fromarray(noise.integers(0, 256, (8, 9), np.uint8)).resize((72, 64), Image.Resampling.BICUBIC).save(path, compress_level=1)
    return path.name


def planted(benchmarks: list[data.Question], rng: random.Random, root: Path) -> list[data.Question]:
    """PLANTED questions of each kind, their ids beginning with its name."""
    made = []
    films = [question for question in benchmarks if question.images]
    for i in range(PLANTED):
        copy, film = rng.choice([question for question in benchmarks if not question.images]), rng.choice(films)
        turned = dict(zip("ABCDE", reversed(copy.options.values())))
        made.append(data.Question(copy.question.upper().replace(" ", ",  ") + " ?", turned, "E", [], "", {}, f"copied-{i}"))
        for kind, edited in (("one in ten", lambda place: rng.random() < 0.1), ("every tenth", lambda place: place % 10 == 9)):
            words = [rng.choice(WORDS) if edited(place) else word for place, word in enumerate(rng.choice(benchmarks).question.split())]
            made.append(data.Question(" ".join(words), {}, "something", [], "", {}, f"{kind}-{i}"))
        with Image.open(root / film.images[0]) as image:
            scale = rng.uniform(0.7, 3)
            image.resize((int(72 * scale), int(64 * scale)), Image.Resampling.LANCZOS).save(root / f"leak-{i}.jpeg", quality=rng.randint(40, 95))
        made.append(draw_question(rng, f"image-{i}", [f"leak-{i}.jpeg"]))
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The leak check at the paper's size.")
    parser.add_argument("--text", type=int, default=37_000)  # paper 3.1
    parser.add_argument("--image", type=int, default=17_000)  # paper 3.1
    parser.add_argument("--benchmarks", type=int, default=5_000)
    parser.add_argument("--benchmark-images", type=int, default=3_000)
    args = parser.parse_args(argv)
    rng, noise = random.Random(0), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        benchmarks = [draw_question(rng, f"benchmark{i % 5}-{i}", [draw_image(root / f"b{i}.png", noise)] if i < args.benchmark_images else []) for i in range(args.benchmarks)]
        bank = [draw_question(rng, f"bank-{i}", [draw_image(root / f"q{i}.png", noise)] if i < args.image else []) for i in range(args.text + args.image)]
        bank += planted(benchmarks, rng, root)
        pieces = leaks.Grams([question.question.split() for question in benchmarks], leaks.GRAM)
        touched = [0 if (shared := pieces.shared(leaks.grams(question.question.split(), leaks.GRAM))) is None else int(shared.sum()) for question in bank[:500]]
        del pieces
        print(f"{len(bank):,} questions against {len(benchmarks):,}; a question shares {statistics.mean(touched):,.0f} 5-grams with them on average", flush=True)
        for ngram, jaccard in ((leaks.NGRAM, leaks.JACCARD), (20, leaks.JACCARD)):
            begin = time.perf_counter()
            found, likeness = leaks.check(bank, benchmarks, root, ngram, jaccard, leaks.DISTANCE)
            seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"--ngram {ngram} --jaccard {jaccard}: {seconds:.0f} s, peak {peak:.2f} GB, bank included   (targets: 120 s, 2 GB)")
            for kind in ("copied", "one in ten", "every tenth", "image"):
                rules = sorted({row["evidence"]["rule"] for key, row in found.items() if key.startswith(kind)})
                print(f"  {kind:<12} {sum(key.startswith(kind) for key in found):>4} of {PLANTED} found, by {', '.join(rules) or 'no rule'}")
            print(f"  {'the rest':<12} {sum(key.startswith('bank') for key in found):>4} of {args.text + args.image:,} dropped   (target: 0)", flush=True)
        print(f"nearest Jaccard similarity among the rest: {max(value for key, value in likeness.items() if key.startswith('bank')):.3f}")


if __name__ == "__main__":
    main()
