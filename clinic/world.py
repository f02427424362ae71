"""The miniature's truth: patients, films, rules and questions, all drawn from a seed.

A film carries its truth in a PNG text chunk, which the roles read and no model sees. All numbers
are ours: the paper has no miniature.
"""

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

import data

SIDE = 56  # pixels: 4 x 4 patches of 14, merged to 2 x 2 image tokens
SIGNS = {
    "radiograph": ["disc", "wedge", "band"],
    "scan": ["spot", "cone", "bar"],
    "smear": ["dot", "spike", "rod"],
    "oct": ["cyst", "peak", "fold"],
}
# benchmarks.modalities' names for the clinic's modalities
KINDS = {"radiograph": "x-ray", "scan": "ct", "smear": "microscopy", "oct": "ophthalmic imaging"}
DIAGNOSES = {
    "radiograph": ["pneumonia", "abscess", "embolism", "contusion", "tuberculosis"],
    "scan": ["stroke", "meningitis", "glioma", "hydrocephalus", "encephalitis"],
    "smear": ["anemia", "leukemia", "malaria", "thalassemia", "sepsis"],
    "oct": ["edema", "drusen", "detachment", "glaucoma", "uveitis"],
}
STEPS = [
    "surgery", "antibiotics", "biopsy", "steroids", "chemotherapy", "drainage", "anticoagulants",
    "transfusion", "laser", "observation",
]  # fmt: skip
CLUES = ["fever", "smoking", "trauma"]
SYMPTOMS = ["cough", "headache", "fatigue", "nausea", "dizziness", "weakness"]
NUMBERS = ["one", "two", "three"]
SIDES = ["left", "right"]
MODALITY_OF = {sign: modality for modality, signs in SIGNS.items() for sign in signs}
RULE = {  # neither sign nor clue decides alone: each leads to three of five diagnoses
    (sign, clue): DIAGNOSES[modality][(i + 2 * k) % 5]
    for modality, signs in SIGNS.items()
    for i, sign in enumerate(signs)
    for k, clue in enumerate(CLUES)
}
NEXT_STEP = {
    diagnosis: STEPS[(3 * i + 2 * m) % 10]
    for m, names in enumerate(DIAGNOSES.values())
    for i, diagnosis in enumerate(names)
}
# What the base model has seen often enough to answer directly, one clue of each sign; and what
# --withhold keeps from it, another one.
FAMILIAR, WITHHELD = (
    {
        (sign, CLUES[(first + i + m) % 3])
        for m, signs in enumerate(SIGNS.values())
        for i, sign in enumerate(signs)
    }
    for first in (1, 2)
)
# of so many image questions in the bank, one tells what its film shows, and one more is added that
# only asks this
SPOILT = 20
TRUTH = "clinic-truth"  # the PNG text chunk


# --------------------------------------------------------------------------------------------------
# Cases and films


# Case.reading: modality, number, sign, side; of a normal film the modality alone
MENTION = re.compile(r"The (\w+) shows (?:no signs|(\w+) (\w+) signs on the (\w+))\.")


@dataclass(frozen=True)
class Case:
    """The truth of one patient. number: of signs; 0 for a normal film."""

    sign: str
    number: int
    side: str
    clue: str
    symptom: str
    age: int
    sex: str

    @property
    def modality(self) -> str:
        return MODALITY_OF[self.sign]

    @property
    def diagnosis(self) -> str:
        return RULE[self.sign, self.clue]

    def answer(self, kind: str) -> str:
        """What the answer to a question of this kind says."""
        words = {"diagnosis": self.diagnosis, "step": NEXT_STEP[self.diagnosis], "look": self.sign}
        return words[kind]

    def reading(self) -> str:
        if not self.number:
            return f"The {self.modality} shows no signs."
        signs = f"{NUMBERS[self.number - 1]} {self.sign} signs"
        return f"The {self.modality} shows {signs} on the {self.side}."

    def history(self) -> str:
        words = (self.clue, self.symptom)
        first, second = sorted(words, key=lambda word: data.content_hash([word, self.age]))
        return f"A {self.age} year old {self.sex} has {first} and {second}."


def draw_case(rng: random.Random, modalities: int = len(SIGNS), withhold: bool = False) -> Case:
    """A patient, from the first `modalities` modalities: a smaller clinic is quicker to learn.
    withhold: none whose rule is WITHHELD."""
    sign = rng.choice([sign for signs in list(SIGNS.values())[:modalities] for sign in signs])
    clues = [clue for clue in CLUES if not (withhold and (sign, clue) in WITHHELD)]
    number, side, clue = rng.randint(1, 3), rng.choice(SIDES), rng.choice(clues)
    symptom, age = rng.choice(SYMPTOMS), 10 * rng.randint(2, 7)
    return Case(sign, number, side, clue, symptom, age, rng.choice(["man", "woman"]))


ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def inside(distance: np.ndarray, height: float = 1) -> np.ndarray:
    """`height` where the distance from an edge is negative, 0 beyond it, soft between."""
    return height / (1 + np.exp(np.clip(distance, -30, 30)))


def blob(x: float, y: float, radius: float) -> np.ndarray:
    return inside(np.hypot(COLUMNS - x, ROWS - y) - radius)


def background(modality: str, rng: np.random.Generator) -> tuple[np.ndarray, tuple]:
    """(greys (SIDE, SIDE), colour) of a film without lesions."""
    if modality == "radiograph":  # two lungs
        grey = np.full((SIDE, SIDE), 0.55, np.float32)
        for lung in (15, 41):
            edge = ((COLUMNS - lung - rng.uniform(-1, 1)) / 11) ** 2 + ((ROWS - 28) / 24) ** 2 - 1
            grey = grey - inside(edge * 6, 0.38)
        return grey, (1, 1, 1)
    if modality == "scan":  # a skull
        across = (COLUMNS - 28 - rng.uniform(-1, 1)) / 25
        edge = across**2 + ((ROWS - 28 - rng.uniform(-1, 1)) / 26) ** 2 - 1
        return inside(edge * 20, 0.35) + 0.5 * np.exp(-((edge * 8) ** 2)), (0.9, 1, 1)
    if modality == "smear":  # cells
        grey = np.full((SIDE, SIDE), 0.75, np.float32)
        for _ in range(8):
            grey = grey - 0.12 * blob(rng.uniform(0, SIDE), rng.uniform(0, SIDE), 4)
        return grey, (1, 0.75, 0.8)
    wave = 2 * np.sin(COLUMNS / 9 + rng.uniform(0, 6))  # layers of a retina
    grey = np.full((SIDE, SIDE), 0.15, np.float32)
    for depth, strength in ((12, 0.25), (22, 0.35), (34, 0.3), (44, 0.4)):
        grey = grey + strength * np.exp(-(((ROWS - depth - wave) / 3) ** 2))
    return grey, (1, 0.95, 0.7)


def lesion(kind: int, x: float, y: float, radius: float) -> np.ndarray:
    """(SIDE, SIDE) from 0 to 1: a disc, a wedge or a band."""
    if kind == 0:
        return blob(x, y, radius)
    high, wide = ROWS - y, np.abs(COLUMNS - x)
    if kind == 1:
        shape = (high < radius) & (high > -radius) & (wide < (high + radius) * 0.6)
    else:
        shape = (np.abs(high) < 1.8) & (wide < radius + 2)
    return shape.astype(np.float32)


def draw_film(case: Case, rng: np.random.Generator, noise: float = 0.08) -> Image.Image:
    """A film of the case. Lesions vary in place, size and contrast, and pixels are noisy, so that a
    model that has learnt to read still errs."""
    kind, sign = SIGNS[case.modality].index(case.sign), -1 if case.modality == "smear" else 1
    grey, colour = background(case.modality, rng)
    for row in {0: [], 1: [28], 2: [18, 38], 3: [12, 28, 44]}[case.number]:
        x = (14 if case.side == "left" else 42) + rng.uniform(-3, 3)
        shape = lesion(kind, x, row + rng.uniform(-3, 3), rng.uniform(4, 6))
        grey = grey + sign * rng.uniform(0.22, 0.5) * shape
    grain = rng.normal(0, noise, (SIDE, SIDE, 3)).astype(np.float32)
    pixels = grey[..., None] * np.array(colour, np.float32) + grain
    pixels[3::7, 0:4] = pixels[4::7, 0:4] = 0.95  # a ruler on the left edge tells left from right
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def save_film(path: Path, film: Image.Image, case: Case) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_text(TRUTH, json.dumps(vars(case)))
    film.save(path, pnginfo=info)


def film_truth(path: str | Path) -> Case:
    """The film's case, from its text chunk. Raises ValueError for any other picture."""
    with Image.open(path) as film:
        if TRUTH not in film.info:
            raise ValueError(f"{path}: not a film of this clinic, and its roles know no other")
        return Case(**json.loads(film.info[TRUTH]))


def sentence_truth(text: str) -> Case:
    """The case of a text question, read back from its sentences."""
    reading = MENTION.search(text)
    if not reading:
        raise ValueError(f"not a text question of this clinic: {text[:80]!r}")
    _, number, sign, side = reading.groups()
    return Case(sign, NUMBERS.index(number) + 1, side, **history_of(text))


def history_of(text: str) -> dict:
    """A patient's clue, symptom, age and sex, read back from a question."""
    history = re.search(r"A (\d+) year old (\w+) has (\w+) and (\w+)\.", text)
    if not history:
        raise ValueError(f"not a question of this clinic: {text[:80]!r}")
    age, sex, *words = history.groups()
    clue, symptom = sorted(words, key=SYMPTOMS.__contains__)  # they stand in any order
    return {"clue": clue, "symptom": symptom, "age": int(age), "sex": sex}


# --------------------------------------------------------------------------------------------------
# Questions

ASK = {"diagnosis": "What is the diagnosis?", "step": "What is the best next step?"}
LOOK = "What does the film show?"
TASK = {"diagnosis": "Asked is the diagnosis.", "step": "Asked is the next step."}


def facts(case: Case, kind: str | None) -> dict[str, str]:
    """What can be told of a case, as the sentences of a chain. kind: None if nothing was asked."""
    told = {"findings": case.reading(), "history": f"The history gives {case.clue}."}
    if case.number:
        told["rule"] = f"A {case.sign} with {case.clue} means {case.diagnosis}."
        told["plan"] = f"So {case.diagnosis} needs {NEXT_STEP[case.diagnosis]}."
    return told | {"question": TASK[kind]} if kind else told


def options_of(case: Case, kind: str, rng: random.Random) -> list[str]:
    """What is right by each sign of the modality, and one other: without the film, one who knows
    all rules is right in a third."""
    answers = [replace(case, sign=sign).answer(kind) for sign in SIGNS[case.modality]]
    names = DIAGNOSES[case.modality]
    pool = {"diagnosis": names, "step": [NEXT_STEP[name] for name in names], "look": MODALITY_OF}
    return [*answers, rng.choice(sorted({*pool[kind]} - {*answers}))]


def make_question(case: Case, kind: str, rng: random.Random, film: str | None) -> data.Question:
    """A question about a case, with its film or with the reading as a sentence."""
    texts, right = options_of(case, kind, rng), case.answer(kind)
    rng.shuffle(texts)
    stem = f"{case.history()} {LOOK if kind == 'look' else ASK[kind]}"
    if not film:
        stem = f"{case.reading()} {stem}"
    options = dict(zip(data.LETTERS, texts))
    answer, images = data.LETTERS[texts.index(right)], [film] if film else []
    meta = {"modality": KINDS[case.modality], "kind": kind}
    return data.Question(stem, options, answer, images, "clinic", meta)


def make_questions(
    count: int,
    seed: int,
    name: str,
    with_film: bool,
    folder: Path,
    modalities: int = len(SIGNS),
    withhold: bool = False,
) -> list[data.Question]:
    """`count` different questions of one named set; films are written below `folder`."""
    rng, noise = random.Random(f"{seed}/{name}"), np.random.default_rng([seed, *name.encode()])
    questions: dict[str, data.Question] = {}
    while len(questions) < count:
        case, film = draw_case(rng, modalities, withhold), None
        if with_film:
            film = f"films/{name}/{len(questions):05d}.png"
            save_film(folder / film, draw_film(case, noise), case)
        question = make_question(case, rng.choice(sorted(ASK)), rng, film)
        questions[question.id] = question
    return list(questions.values())


def look_questions(count: int, seed: int, folder: Path, modalities: int) -> list[data.Question]:
    """Pattern recognition: the sign that the film shows. The random streams are separate, so other
    questions of the seed do not change."""
    rng, noise = random.Random(f"{seed}/look"), np.random.default_rng([seed, *b"look"])
    questions = []
    for number in range(count):
        case, film = draw_case(rng, modalities), f"films/bank-look/{number:05d}.png"
        save_film(folder / film, draw_film(case, noise), case)
        questions.append(make_question(case, "look", rng, film))
    return questions


def telling(
    questions: list[data.Question], count: int, seed: int, folder: Path
) -> list[data.Question]:
    """The questions, with the reading of the film written into the text of `count` of them. Ids
    stay, so that without the reading the question is the old one. The choice has its own random
    stream, and falls on questions that an expert never solves: these never become training data."""
    experts = ("expert-a", "expert-b")
    asked = [data.question_text(question) for question in questions]
    never = [i for i, text in enumerate(asked) if any(never_solves(name, text) for name in experts)]
    questions = list(questions)
    for i in random.Random(f"{seed}/telling").sample(never, min(count, len(never))):
        reading = film_truth(folder / questions[i].images[0]).reading()
        questions[i] = replace(questions[i], question=f"{reading} {questions[i].question}")
    return questions


def with_other_films(
    questions: list[data.Question], seed: int, name: str, folder: Path
) -> list[data.Question]:
    """The questions with what looking.py shows instead of their film, in meta.shown: as `normal` a
    film without signs; as `counterfactual` a film of the same patient with another sign of the
    modality, by which another option is right. meta.blind is the best accuracy without a film, if
    all rules occur. The random streams are separate, so the questions and their films do not
    change."""
    rng = random.Random(f"{seed}/{name}/counterfactual")
    streams = [[seed, *f"{name}/{arm}".encode()] for arm in ("counterfactual", "normal")]
    noise, grain = map(np.random.default_rng, streams)
    found = []
    for number, one in enumerate(questions):
        case, kind = film_truth(folder / one.images[0]), one.meta["kind"]
        letters = {text: letter for letter, text in one.options.items()}
        normal, film = replace(case, number=0), f"films/{name}-normal/{number:05d}.png"
        save_film(folder / film, draw_film(normal, grain), normal)
        shown = {"normal": {"images": [film]}}
        signs = SIGNS[case.modality]
        other = replace(case, sign=rng.choice([sign for sign in signs if sign != case.sign]))
        film = f"films/{name}-counterfactual/{number:05d}.png"
        save_film(folder / film, draw_film(other, noise), other)
        shown["counterfactual"] = {"images": [film], "answer": letters[other.answer(kind)]}
        found.append(replace(one, meta={**one.meta, "blind": 1 / len(signs), "shown": shown}))
    return found


def captions(questions: list[data.Question], folder: Path) -> list[data.Question]:
    """What each film shows, as the base model was taught to be asked: no history, no options."""
    films = [one.images[0] for one in questions if one.images]
    readings = [film_truth(folder / film).reading() for film in films]
    return [data.Question(LOOK, {}, said, [film]) for film, said in zip(films, readings)]


def never_solves(expert: str, asked: str) -> bool:
    """Whether a question is one of those that an expert never gets right."""
    return int(data.content_hash([expert, asked])[:8], 16) % 100 < 6
