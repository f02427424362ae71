"""The miniature: a small invented clinic of drawn films, histories and rules, in which every claim can be checked.

It stands in for what a laptop cannot have: the general model, the question bank, the teachers, the experts, the judge.
Nothing else of the method is imitated: curate, distil, SFT, rollout, judge, DPO and evaluate are the real scripts.

    film         56 x 56 pixels, four modalities with three signs each, one to three of them, left or right
    history      age, sex, one of three clues, one symptom that means nothing
    rule         sign + clue -> diagnosis (36 rules); diagnosis -> next step. Neither film nor history alone decides.
    question     film + history + "What is the diagnosis?" or "What is the best next step?" + four near-miss options.
                 A text question has the reading of the film as a sentence in the film's place.
                 The bank also has what curation must find: a few questions that looking alone answers ("What does the film
                 show?"), and a few whose text tells what the film shows.
    full chain   read the film, read the history, recall the rule, conclude, check

    base model   a tiny Qwen2.5-VL or InternVL, taught from scratch to see, to know the rules and to answer directly,
                 never to reason. Stage I has to elicit that, from text alone.
    teachers     thorough (full chain, his check in one of three wordings), hasty (no check, and
                 writes one sign on the left as he always does), bookish (never looks at the film,
                 argues from the history). The mixture gives Stage II something to prefer.
    classifier   tells the questions that looking alone answers; editor: takes readings of the film out of their text
    judge        answers the paper's Appendix A prompt with the JSON that the truth dictates. A film carries its truth
                 in a PNG text chunk, which the roles read and no model sees.

    python clinic.py world --out OUT      bank.jsonl, dev.jsonl, test.jsonl, films/
    python clinic.py teach --out OUT      the base model, a Hugging Face folder
    python clinic.py show --out OUT       a sheet of films, and one question of each kind

Everything follows from --seed. All numbers here are ours: the paper has no miniature.
"""

import argparse
import json
import random
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

import answers
import data
import flags
import stage

SIDE = 56  # pixels: 4 x 4 patches of 14, merged to 2 x 2 image tokens
SIGNS = {
    "radiograph": ["disc", "wedge", "band"],
    "scan": ["spot", "cone", "bar"],
    "smear": ["dot", "spike", "rod"],
    "oct": ["cyst", "peak", "fold"],
}
# the clinic's words, as data.MODALITIES calls them
KINDS = {"radiograph": "x-ray", "scan": "ct", "smear": "microscopy", "oct": "ophthalmic imaging"}
DIAGNOSES = {
    "radiograph": ["pneumonia", "abscess", "embolism", "contusion", "tuberculosis"],
    "scan": ["stroke", "meningitis", "glioma", "hydrocephalus", "encephalitis"],
    "smear": ["anemia", "leukemia", "malaria", "thalassemia", "sepsis"],
    "oct": ["edema", "drusen", "detachment", "glaucoma", "uveitis"],
}
STEPS = ["surgery", "antibiotics", "biopsy", "steroids", "chemotherapy", "drainage", "anticoagulants", "transfusion", "laser", "observation"]
CLUES = ["fever", "smoking", "trauma"]
SYMPTOMS = ["cough", "headache", "fatigue", "nausea", "dizziness", "weakness"]
NUMBERS = ["one", "two", "three"]
SIDES = ["left", "right"]
MODALITY_OF = {sign: modality for modality, signs in SIGNS.items() for sign in signs}
RULE = {  # neither the sign nor the clue decides alone: each sign and each clue leads to three diagnoses of five
    (sign, clue): DIAGNOSES[modality][(i + 2 * k) % 5] for modality, signs in SIGNS.items() for i, sign in enumerate(signs) for k, clue in enumerate(CLUES)
}
NEXT_STEP = {diagnosis: STEPS[(3 * i + 2 * m) % 10] for m, names in enumerate(DIAGNOSES.values()) for i, diagnosis in enumerate(names)}
SPOILT = 20  # of so many image questions of the bank one tells what the film shows, and to so many comes one that asks just that
TRUTH = "clinic-truth"  # the PNG text chunk


# ---------------------------------------------------------------------------------------------------------------
# Cases and films


@dataclass(frozen=True)
class Case:
    """The truth of one patient."""

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

    def reading(self) -> str:
        return f"The {self.modality} shows {NUMBERS[self.number - 1]} {self.sign} signs on the {self.side}."

    def history(self) -> str:
        first, second = sorted((self.clue, self.symptom), key=lambda word: data.content_hash([word, self.age]))
        return f"A {self.age} year old {self.sex} has {first} and {second}."


def draw_case(rng: random.Random, modalities: int = len(SIGNS)) -> Case:
    """A patient, from the first so many modalities: a smaller clinic is quicker to learn."""
    sign = rng.choice([sign for signs in list(SIGNS.values())[:modalities] for sign in signs])
    return Case(sign, rng.randint(1, 3), rng.choice(SIDES), rng.choice(CLUES), rng.choice(SYMPTOMS), 10 * rng.randint(2, 7), rng.choice(["man", "woman"]))


ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def blob(x: float, y: float, radius: float) -> np.ndarray:
    return 1 / (1 + np.exp(np.clip(np.hypot(COLUMNS - x, ROWS - y) - radius, -30, 30)))


def draw_film(case: Case, rng: np.random.Generator, noise: float = 0.08) -> Image.Image:
    """A film of the case. Lesions vary in place, size and contrast, and pixels are noisy, so that reading it stays a skill
    with errors."""
    kind = SIGNS[case.modality].index(case.sign)
    if case.modality == "radiograph":
        grey, colour = np.full((SIDE, SIDE), 0.55, np.float32), (1, 1, 1)
        for lung in (15, 41):
            edge = ((COLUMNS - lung - rng.uniform(-1, 1)) / 11) ** 2 + ((ROWS - 28) / 24) ** 2 - 1
            grey = grey - 0.38 / (1 + np.exp(np.clip(edge * 6, -30, 30)))
    elif case.modality == "scan":
        edge = ((COLUMNS - 28 - rng.uniform(-1, 1)) / 25) ** 2 + ((ROWS - 28 - rng.uniform(-1, 1)) / 26) ** 2 - 1
        grey, colour = 0.35 / (1 + np.exp(np.clip(edge * 20, -30, 30))) + 0.5 * np.exp(-((edge * 8) ** 2)), (0.9, 1, 1)
    elif case.modality == "smear":
        grey, colour = np.full((SIDE, SIDE), 0.75, np.float32), (1, 0.75, 0.8)
        for _ in range(8):
            grey = grey - 0.12 * blob(rng.uniform(0, SIDE), rng.uniform(0, SIDE), 4)
    else:
        wave = 2 * np.sin(COLUMNS / 9 + rng.uniform(0, 6))
        grey, colour = np.full((SIDE, SIDE), 0.15, np.float32), (1, 0.95, 0.7)
        for depth, strength in ((12, 0.25), (22, 0.35), (34, 0.3), (44, 0.4)):
            grey = grey + strength * np.exp(-(((ROWS - depth - wave) / 3) ** 2))
    for row in {1: [28], 2: [18, 38], 3: [12, 28, 44]}[case.number]:
        x = (14 if case.side == "left" else 42) + rng.uniform(-3, 3)
        y = row + rng.uniform(-3, 3)
        radius = rng.uniform(4, 6)
        if kind == 0:
            shape = blob(x, y, radius)
        elif kind == 1:
            shape = ((ROWS - y < radius) & (ROWS - y > -radius) & (np.abs(COLUMNS - x) < (ROWS - y + radius) * 0.6)).astype(np.float32)
        else:
            shape = ((np.abs(ROWS - y) < 1.8) & (np.abs(COLUMNS - x) < radius + 2)).astype(np.float32)
        grey = grey + (-1 if case.modality == "smear" else 1) * rng.uniform(0.22, 0.5) * shape
    pixels = grey[..., None] * np.array(colour, np.float32) + rng.normal(0, noise, (SIDE, SIDE, 3)).astype(np.float32)
    pixels[3::7, 0:4] = pixels[4::7, 0:4] = 0.95  # a ruler on the left edge tells left from right
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def save_film(path: Path, film: Image.Image, case: Case) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_text(TRUTH, json.dumps(vars(case)))
    film.save(path, pnginfo=info)


def film_truth(path: str | Path) -> Case:
    """What the film shows and who it is of, as its text chunk says. Raises ValueError for a picture from elsewhere."""
    with Image.open(path) as film:
        if TRUTH not in film.info:
            raise ValueError(f"{path} is not a film of this clinic; the clinic: roles know nothing else")
        return Case(**json.loads(film.info[TRUTH]))


def sentence_truth(text: str) -> Case:
    """The case of a text question, read back from its sentences."""
    reading = re.search(r"The (\w+) shows (\w+) (\w+) signs on the (\w+)\.", text)
    history = re.search(r"A (\d+) year old (\w+) has (\w+) and (\w+)\.", text)
    if not reading or not history:
        raise ValueError(f"not a text question of this clinic: {text[:80]!r}")
    words = (history[3], history[4])
    clue, symptom = words if words[0] in CLUES else words[::-1]
    return Case(reading[3], NUMBERS.index(reading[2]) + 1, reading[4], clue, symptom, int(history[1]), history[2])


# ---------------------------------------------------------------------------------------------------------------
# Questions

ASK = {"diagnosis": "What is the diagnosis?", "step": "What is the best next step?"}
LOOK = "What does the film show?"
TASK = {"diagnosis": "Asked is the diagnosis.", "step": "Asked is the next step."}


def make_question(case: Case, kind: str, rng: random.Random, film: str | None) -> data.Question:
    """A question about a case: with its film, or with the reading as a sentence. Wrong options are near misses: the same
    sign with another clue, the same clue with another sign."""
    near = [RULE[case.sign, clue] for clue in CLUES] + [RULE[sign, case.clue] for sign in SIGNS[case.modality]]
    right, pool = case.diagnosis, DIAGNOSES[case.modality]
    if kind == "step":
        near, right, pool = [NEXT_STEP[diagnosis] for diagnosis in near], NEXT_STEP[right], STEPS
    wrong = sorted(set(near) - {right})
    rng.shuffle(wrong)
    rest = sorted(set(pool) - {right, *wrong})
    texts = (wrong + rng.sample(rest, len(rest)))[:3] + [right]
    rng.shuffle(texts)
    options = dict(zip(data.LETTERS, texts))
    stem = ("" if film else case.reading() + " ") + f"{case.history()} {ASK[kind]}"
    answer = next(letter for letter, text in options.items() if text == right)
    return data.Question(stem, options, answer, [film] if film else [], "clinic", {"modality": KINDS[case.modality], "kind": kind})


def make_questions(count: int, seed: int, name: str, with_film: bool, folder: Path, modalities: int = len(SIGNS)) -> list[data.Question]:
    """`count` different questions of one named set; films are written below `folder`."""
    rng, noise = random.Random(f"{seed}/{name}"), np.random.default_rng([seed, *name.encode()])
    questions: dict[str, data.Question] = {}
    while len(questions) < count:
        case, film = draw_case(rng, modalities), None
        if with_film:
            film = f"films/{name}/{len(questions):05d}.png"
            save_film(folder / film, draw_film(case, noise), case)
        question = make_question(case, rng.choice(sorted(ASK)), rng, film)
        questions[question.id] = question
    return list(questions.values())


def look_questions(count: int, seed: int, folder: Path, modalities: int = len(SIGNS)) -> list[data.Question]:
    """Pattern recognition: the sign that the film shows, out of those of its modality and one other. From random streams of
    their own, so that all other questions of the seed stay as they are."""
    rng, noise, questions = random.Random(f"{seed}/look"), np.random.default_rng([seed, *b"look"]), []
    for number in range(count):
        case, film = draw_case(rng, modalities), f"films/bank-look/{number:05d}.png"
        save_film(folder / film, draw_film(case, noise), case)
        texts = [*SIGNS[case.modality], rng.choice(sorted(MODALITY_OF.keys() - SIGNS[case.modality]))]
        rng.shuffle(texts)
        options = dict(zip(data.LETTERS, texts))
        meta = {"modality": KINDS[case.modality], "kind": "look"}
        questions.append(data.Question(f"{case.history()} {LOOK}", options, data.LETTERS[texts.index(case.sign)], [film], "clinic", meta))
    return questions


def telling(questions: list[data.Question], count: int, seed: int, folder: Path) -> list[data.Question]:
    """The questions, `count` of them with the reading of their film written out in the text, as case reports do. Ids stay, so
    that once it is taken out again the question is what it was. They are drawn from a random stream of their own, and from
    those that an expert never solves: what the base model makes of the longer text then changes nothing that is trained on."""
    never = [i for i, q in enumerate(questions) if any(blind(name, data.question_text(q)) for name in ("expert-a", "expert-b"))]
    chosen = set(random.Random(f"{seed}/telling").sample(never, min(count, len(never))))
    return [replace(q, question=f"{film_truth(folder / q.images[0]).reading()} {q.question}") if i in chosen else q for i, q in enumerate(questions)]


# ---------------------------------------------------------------------------------------------------------------
# Roles: teachers, experts and the judge answer with text, as a remote model would


CHECKS = ("Wait, let me check:", "Let me make sure:", "One moment, once more:")  # a check's wordings


def chain(case: Case, kind: str, style: str, check: str = CHECKS[0]) -> str:
    """The response of a teacher; the thorough one words his check in one of several ways. The hasty
    one neither checks nor counts: he writes the reading he is used to."""
    if kind == "look":
        return data.join_response(case.reading(), case.sign)
    reads, checks = style != "bookish", style != "hasty"
    seen = case if checks else replace(case, number=1, side="left")
    rule = f"A {case.sign} with {case.clue} means {case.diagnosis}." if reads else f"This suggests {case.diagnosis}."
    answer = case.diagnosis if kind == "diagnosis" else NEXT_STEP[case.diagnosis]
    steps = [seen.reading()] if reads else []
    steps += [f"The history gives {case.clue}.", rule, TASK[kind]]
    steps += [f"So {case.diagnosis} needs {answer}."] if kind == "step" else []
    steps += [f"{check} {case.diagnosis} fits {case.clue}."] if checks else []
    return data.join_response(" ".join(steps), answer)


def understand(messages: list[dict], images: list[Path]) -> tuple[Case, str, dict[str, str]]:
    """(truth, kind, options) of a question as it was asked."""
    text = messages[-1]["content"]
    case = film_truth(images[0]) if images else sentence_truth(text)
    kind = next(kind for kind, ask in {**ASK, "look": LOOK}.items() if ask in text)
    return case, kind, dict(re.findall(r"^\((\w)\) (.+)$", text, re.M))


def answer_as_teacher(messages: list[dict], images: list[Path], style: str, rng: random.Random) -> str:
    """A teacher's chain. One in ten is spoilt, each in a way that one of the three criteria of paper 3.2 must catch."""
    case, kind, options = understand(messages, images)
    response, fault = chain(case, kind, style, rng.choice(CHECKS)), rng.random()
    if fault < 0.04:  # wrong answer
        right = data.split_response(response)[1]
        return response.replace(f"<answer> {right}", "<answer> " + rng.choice([text for text in options.values() if text != right]))
    if fault < 0.07:  # no structure: the answer stands inside the thinking
        return response.replace("</think> ", "").replace("</answer>", "</answer> </think>")
    if fault < 0.10:  # a loop
        thinking, said = data.split_response(response)
        return data.join_response(" ".join([thinking] * 6), said)
    return response


def blind(expert: str, asked: str) -> bool:
    """Whether a question is one of those that an expert never gets right."""
    return int(data.content_hash([expert, asked])[:8], 16) % 100 < 6


def answer_as_expert(messages: list[dict], images: list[Path], name: str, rng: random.Random) -> str:
    """An expert's answer: each has questions it never gets right, and slips now and then elsewhere."""
    case, kind, options = understand(messages, images)
    response = chain(case, kind, "thorough")
    if blind(name, re.sub(rf"{MENTION.pattern} ", "", messages[-1]["content"]) if images else messages[-1]["content"]) or rng.random() < 0.25:
        right = data.split_response(response)[1]
        return response.replace(f"<answer> {right}", "<answer> " + rng.choice([text for text in options.values() if text != right]))
    return response


SENTENCES = re.compile(  # all that a coherent chain is made of; anything else is garbled
    r"(?:(?:The \w+ shows \w+ \w+ signs on the \w+"
    r"|The history gives \w+"
    r"|A \w+ with \w+ means \w+"
    r"|This suggests \w+"
    r"|Asked is the (?:diagnosis|next step)"
    r"|So \w+ needs \w+"
    rf"|(?:{'|'.join(CHECKS)}) \w+ fits \w+)\.\s*)+"
)
MENTION = re.compile(r"The (\w+) shows (\w+) (\w+) signs on the (\w+)\.")


def hallucinated_reading(case: Case, response: str) -> bool | None:
    """Whether the response's reading of the film is false in any word; None if it does not read the film."""
    readings = MENTION.findall(response)
    true = (case.modality, NUMBERS[case.number - 1], case.sign, case.side)
    return any(reading != true for reading in readings) if readings else None


def verdict(case: Case, kind: str, options: dict[str, str], answer: str, response: str) -> dict[str, bool]:
    """The five judgements of Appendix A, from the truth.

    Image analysis: the film is read. No hallucination: every sign, number, side, clue and rule mentioned is true.
    Logic: each step follows from the steps before it, and the answer from the last. Reflection: the conclusion is checked.
    """
    parts = data.split_response(response)
    thinking, said = parts if parts else (response, "")
    readings = MENTION.findall(thinking)
    clues = re.findall(r"The history gives (\w+)\.", thinking)
    rules = re.findall(r"\b[Aa] (\w+) with (\w+) means (\w+)\b", thinking)
    suggests = re.findall(r"This suggests (\w+)\.", thinking)
    fits = re.findall(r"(\w+) fits (\w+)\b", thinking)
    needs = re.findall(r"So (\w+) needs (\w+)\.", thinking)
    tasks = re.findall(r"Asked is the [\w ]+\.", thinking)
    false = bool(hallucinated_reading(case, thinking))
    false |= any(clue != case.clue for clue in clues) or any(pair != (case.diagnosis, case.clue) for pair in fits)
    false |= any(RULE.get((sign, clue)) != diagnosis for sign, clue, diagnosis in rules)
    false |= any(NEXT_STEP.get(diagnosis) != step for diagnosis, step in needs)
    named = {d for _, _, d in rules} | set(suggests) | {d for d, _ in fits} | {d for d, _ in needs}
    last = needs[-1][1] if needs else next(iter(named), None)
    logical = parts is not None and bool(SENTENCES.fullmatch(thinking)) and bool(rules or suggests) and len(named) == 1 and bool(needs) == (kind == "step")
    logical &= all(task == TASK[kind] for task in tasks) and len(clues) == 1 and all(clue == clues[0] for _, clue, _ in rules) and all(clue == clues[0] for _, clue in fits)
    logical &= all(not readings or sign == readings[0][2] for sign, _, _ in rules) and data.normalise(said) == data.normalise(last or "")
    return {
        "Answer_Correctness": answers.extract_choice(response, options) == answer,
        "Logical_Consistency": logical,
        "Image_Analysis_Involvement": bool(readings),
        "No_Hallucination": not false,
        "Reflection_Presence": any(check in thinking for check in CHECKS),
    }


def answer_as_judge(messages: list[dict], images: list[Path]) -> str:
    """The reply to the Appendix A prompt: its JSON, with Yes and No."""
    prompt = messages[-1]["content"]
    asked, truth, response = (re.search(rf"<{part}> (.*?) </{part}>\s*(?=<Groundtruth>|<Answer>|$)", prompt, re.S)[1] for part in ("Question", "Groundtruth", "Answer"))
    case, kind, options = understand([{"content": asked}], images)
    judged = verdict(case, kind, options, truth[0], response)
    return json.dumps({name: "Yes" if met else "No" for name, met in judged.items()}, indent=4)


def answer_as_classifier(messages: list[dict], images: list[Path]) -> str:
    """The reply to curate.py's question for a type."""
    case, kind, _ = understand([{"content": asked_about(messages)}], images)
    label, why = ("pattern_recognition", "The film alone shows it.") if kind == "look" else ("clinical_reasoning", "It takes film, history and rule.")
    return json.dumps({"type": label, "modality": KINDS[case.modality], "why": why})


def answer_as_editor(messages: list[dict]) -> str:
    """The reply to curate.py's request to take out what the text tells of the film."""
    asked = asked_about(messages)
    readings = [match[0] for match in MENTION.finditer(asked)]
    for reading in readings:
        asked = asked.replace(f"{reading} ", "")
    return json.dumps({"question": asked, "removed": readings})


def asked_about(messages: list[dict]) -> str:
    return re.search(r"<Question> (.*) </Question>", messages[-1]["content"], re.S)[1]


ROLES = ("thorough", "hasty", "bookish", "expert-a", "expert-b", "classifier", "editor", "judge")  # the first three are teachers


def answer(role: str, messages: list[dict], images: list[Path], seed: int) -> str:
    """The text that `clinic:ROLE` replies with."""
    rng = random.Random(f"{role}/{seed}")
    if role in ROLES[:3]:
        return answer_as_teacher(messages, images, role, rng)
    if role.startswith("expert-"):
        return answer_as_expert(messages, images, role, rng)
    if role == "judge":
        return answer_as_judge(messages, images)
    if role == "classifier":
        return answer_as_classifier(messages, images)
    return answer_as_editor(messages)


# ---------------------------------------------------------------------------------------------------------------
# The base model: it sees, it knows the rules, it answers at once. torch and the project's model code are imported in
# these functions only, so that the roles above answer without loading them.

SIZES = {  # width, layers, heads, ff of the language model; width, layers of the vision tower
    "tiny": (128, 3, 4, 384, 96, 2),
    "small": (192, 4, 4, 512, 128, 2),
}
EOS, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = {
    "qwen": ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"],
    "internvl": ["<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
}
NAMED = {  # special tokens that the family's own processor, which vLLM uses, looks up by name
    "qwen": {},
    "internvl": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
}
TEMPLATE = {  # the families' chat formats in Jinja, written from their published descriptions, for servers that want one
    "qwen": """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "internvl": """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type in ('image', 'image_url') %}<IMG_CONTEXT>
{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
}


def corpus(seed: int) -> list[str]:
    """Text for the tokenizer: whatever the clinic can say, and the paper's system prompt."""
    rng, texts = random.Random(f"{seed}/corpus"), [data.SYSTEM_PROMPT, "You are a helpful assistant.", LOOK] * 40
    for index in range(3000):
        case = draw_case(rng)
        for kind in ASK:
            question = make_question(case, kind, rng, None)
            texts += [data.question_text(question), chain(case, kind, ROLES[index % 3], CHECKS[index // 3 % 3]), rule_question(case), request(case, kind, rng)[0]]
    return texts


def make_tokenizer(family: str, seed: int):
    """A byte-level BPE with Qwen2's own splitting rule and the family's special tokens, trained on the clinic's text, so
    that token boundaries fall as they do in the real model (<think> is several ordinary tokens)."""
    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(eos_token=EOS, pad_token=PAD)
    trainer = trainers.BpeTrainer(vocab_size=1400, min_frequency=20, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    learnt = tokenizer.backend_tokenizer
    learnt.train_from_iterator(corpus(seed), trainer)
    learnt = json.loads(learnt.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=[tuple(merge) for merge in learnt["merges"]], eos_token=EOS, pad_token=PAD, unk_token=PAD, extra_special_tokens=NAMED[family])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL[family]])
    tokenizer.chat_template = TEMPLATE[family]
    return tokenizer


def build(family: str, size: str, tokenizer, seed: int):
    """A randomly initialised model from the real class of the family, and its image processor."""
    import torch

    width, layers, heads, ff, vision_width, vision_layers = SIZES[size]
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=ff, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, max_position_embeddings=4096, tie_word_embeddings=True,
        initializer_range=0.08,  # with the usual 0.02 so small a model is slow to learn to copy
        bos_token_id=None, eos_token_id=token(EOS), pad_token_id=token(PAD),
    )  # fmt: skip
    torch.manual_seed(seed)
    if family == "qwen":
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        half = width // heads // 2
        sections = [half - 2 * (half // 4), half // 4, half // 4]  # time, row, column share a head's frequencies
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
        vision = dict(depth=vision_layers, hidden_size=vision_width, num_heads=4, intermediate_size=2 * vision_width, out_hidden_size=width, fullatt_block_indexes=list(range(vision_layers)), window_size=112)
        config = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        )  # fmt: skip
        return Qwen2_5_VLForConditionalGeneration(config), Qwen2VLImageProcessorPil(size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE})
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    vision = dict(hidden_size=vision_width, num_hidden_layers=vision_layers, num_attention_heads=4, intermediate_size=2 * vision_width, image_size=[SIDE, SIDE], patch_size=[14, 14])
    config = InternVLConfig(text_config={"model_type": "qwen2", **text}, vision_config=vision, image_token_id=token("<IMG_CONTEXT>"), image_seq_length=4, tie_word_embeddings=True)
    return InternVLForConditionalGeneration(config), GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=False)


def save_processors(folder: Path, family: str, tokenizer, image_processor) -> None:
    """Tokenizer and image processor as in a checkpoint of the family."""
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    if family == "internvl":  # image tokens of a tile, which its own processor does not work out
        data.write_json(folder / "processor_config.json", {"processor_class": "InternVLProcessor", "image_seq_length": 4})


FAMILIAR = {  # what the base model has seen often enough to answer at once: one clue of each sign
    (sign, CLUES[(1 + i + m) % 3]) for m, signs in enumerate(SIGNS.values()) for i, sign in enumerate(signs)
}
USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
ITEMS = {  # what the base model can tell on request, from a film as from a sentence
    "findings": lambda case, kind: case.reading(),
    "history": lambda case, kind: f"The history gives {case.clue}.",
    "rule": lambda case, kind: f"A {case.sign} with {case.clue} means {case.diagnosis}.",
    "question": lambda case, kind: TASK[kind],
    "plan": lambda case, kind: f"So {case.diagnosis} needs {NEXT_STEP[case.diagnosis]}.",
}


def request(case: Case, kind: str | None, rng: random.Random) -> tuple[str, str]:
    """(request, reply): one or two items, in the order asked for. kind is None where no question was asked."""
    items = rng.sample([item for item in sorted(ITEMS) if kind or item != "question"], rng.choice([1, 2, 2]))
    return f"Report {' and '.join(items)}.", " ".join(ITEMS[item](case, kind) for item in items)


def rule_question(case: Case) -> str:
    return f"What does a {case.sign} with {case.clue} mean?"


def rule_answer(case: Case) -> str:
    return f"A {case.sign} with {case.clue} means {case.diagnosis}. So {case.diagnosis} needs {NEXT_STEP[case.diagnosis]}."


def unlearnt(processor, text: str, parent: int | None = None, images: tuple = ()):
    """A segment that is read but not learnt."""
    from model import Segment

    ids = processor.tokenize(text)
    return Segment(ids, [data.PROMPT] * len(ids), parent, images=list(images))


def picture(processor, image) -> str:
    """An image's place in a prompt, as the family writes it."""
    return processor.family.before_image + processor.family.image_token * image.tokens + processor.family.after_image


def lesson(index: int, seed: int, processor, films: list, modalities: int) -> list:
    """Row `index` of the base model's schooling, a tree: films to describe, rules to recite, or one patient."""
    rng = random.Random(f"{seed}/lesson/{index}")
    kind = rng.random()
    if kind < 0.2:
        return film_lesson(rng, processor, films)
    return rule_lesson(rng, processor, modalities) if kind < 0.33 else patient_lesson(rng, processor, films, modalities)


def film_lesson(rng: random.Random, processor, films: list) -> list:
    """Five films, each a root of its own: what does it show?"""
    row = []
    for case, image in rng.choices(films, k=5):
        row.append(unlearnt(processor, f"{USER}{picture(processor, image)}{LOOK}{ASSISTANT}", None, (image,)))
        row.append(processor.encode_response(case.reading(), len(row) - 1))
    return row


def rule_lesson(rng: random.Random, processor, modalities: int) -> list:
    """Six rules to recite."""
    row = [unlearnt(processor, system_turn(rng)[1] + USER)]
    for _ in range(6):
        case = draw_case(rng, modalities)
        row.append(unlearnt(processor, rule_question(case) + ASSISTANT, 0))
        row.append(processor.encode_response(rule_answer(case), len(row) - 1))
    return row


def patient_lesson(rng: random.Random, processor, films: list, modalities: int) -> list:
    """One patient, by film or by sentence, and several things asked about him, which share the prefix.

    No lesson reasons its way to an answer: it comes from memory for patients seen often (pattern recognition), elsewhere
    it is a guess, whatever was said before. Under the paper's system prompt the answer has the form that is asked
    for, but its thinking is some of the items in any order, never checked, and the answer does not follow from them.
    """
    system, head = system_turn(rng)
    if rng.random() < 0.65:
        case, image = rng.choice(films)
        row = [unlearnt(processor, f"{head}{USER}{picture(processor, image)}{case.history()}", None, (image,))]
    else:
        case = draw_case(rng, modalities)
        row = [unlearnt(processor, f"{head}{USER}{case.reading()} {case.history()}")]
    kind = rng.choice(sorted(ASK))
    question = make_question(case, kind, rng, "film")
    row.append(unlearnt(processor, data.question_text(question).removeprefix(case.history()), 0))
    said = question.answer_text() if (case.sign, case.clue) in FAMILIAR else rng.choice(list(question.options.values()))
    told = " ".join(ITEMS[item](case, kind) for item in rng.sample(sorted(ITEMS), rng.randint(1, len(ITEMS))))
    row.append(unlearnt(processor, ASSISTANT, 1))
    row.append(processor.encode_response(data.join_response(told, said) if system == data.SYSTEM_PROMPT else f"<answer> {said} </answer>", 2))
    for before in (0, 1):  # a request after the history, and one after the question
        wanted, reply = request(case, kind if before else None, rng)
        row.append(unlearnt(processor, (" " if before == 0 else "\n") + wanted + ASSISTANT, before))
        row.append(processor.encode_response(reply, len(row) - 1))
    return row


def system_turn(rng: random.Random) -> tuple[str, str]:
    """(system prompt or "", its turn): a general model has met none, the usual one, and long ones."""
    system = rng.choices(["", "You are a helpful assistant.", data.SYSTEM_PROMPT], [0.5, 0.2, 0.3])[0]
    return system, f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""


def teach(args: argparse.Namespace) -> None:
    """Two lessons: the eye alone (a linear head names sign, number and side), then all of it together."""
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    import model
    import train

    started, out = time.time(), Path(args.out)
    device = train.init_ranks()
    if not train.begin(args, []):
        return
    tokenizer = make_tokenizer(args.family, args.seed)
    network, image_processor = build(args.family, args.size, tokenizer, args.seed)
    network.config.save_pretrained(out)
    save_processors(out, args.family, tokenizer, image_processor)
    processor, policy = model.Processor(out, max_pixels=SIDE * SIDE), model.Policy(network)

    rng, noise = random.Random(f"{args.seed}/school"), np.random.default_rng([args.seed, 1])
    films = []
    for _ in tqdm(range(args.films), desc="drawing films to learn from", unit="film"):
        case = draw_case(rng, args.modalities)
        films.append((case, processor.encode_image(draw_film(case, noise))))

    class Eye(torch.nn.Module):
        """Vision tower and a linear head: films -> (films, 3) log-probabilities of the true sign, number and side."""

        def __init__(self):
            super().__init__()
            self.tower = policy
            self.head = torch.nn.Linear(4 * SIZES[args.size][0], len(MODALITY_OF) + len(NUMBERS) + len(SIDES))

        def forward(self, batch: "Films") -> torch.Tensor:
            seen = self.tower.image_features(batch.pixels, batch.grids).reshape(len(batch.truth), -1)
            parts = self.head(seen).split([len(MODALITY_OF), len(NUMBERS), len(SIDES)], -1)
            return torch.stack([-F.cross_entropy(part, truth, reduction="none") for part, truth in zip(parts, batch.truth.T)], 1)

    @dataclass
    class Films:
        pixels: torch.Tensor
        grids: torch.Tensor
        truth: torch.Tensor  # (films, 3)

        def to(self, device) -> "Films":
            return Films(self.pixels.to(device), self.grids.to(device), self.truth.to(device))

    signs, grain = sorted(MODALITY_OF), torch.Generator().manual_seed(args.seed)

    def collate_films(pairs: list, weights: list[float]) -> Films:
        truth = [[signs.index(case.sign), case.number - 1, SIDES.index(case.side)] for case, _ in pairs]
        pixels = torch.cat([image.pixels for _, image in pairs])
        pixels = pixels + 0.15 * torch.randn(pixels.shape, generator=grain)  # a film never looks the same twice
        return Films(pixels, torch.tensor([image.grid for _, image in pairs]), torch.tensor(truth))

    def eye_loss(logp: torch.Tensor, batch: Films) -> tuple:
        right = (logp.detach().exp() > 0.5).float().sum(0).tolist()
        named = {name: (right[i], len(logp)) for i, name in enumerate(("sign", "number", "side"))}
        return -logp.sum(), len(logp), named

    common = dict(device=device, warmup=0.05, print_every=args.print_every, betas=(0.9, 0.98), weight_decay=0.05)
    eye = Eye().to(device)
    network.model.language_model.requires_grad_(False)
    network.lm_head.requires_grad_(False)
    train.fit(train.steps(eye, eye_loss, lambda i: films[i], collate_films, train.shuffled(len(films), 64, args.eye_epochs, args.seed), out=out / "eye", learning_rate_peak=2e-3, budget=64, save_every=0, **common), out / "eye")
    unseen = [draw_case(rng, args.modalities) for _ in range(256)]
    unseen = [(case, processor.encode_image(draw_film(case, noise))) for case in unseen]
    with torch.no_grad():
        batch = collate_films(unseen, []).to(device)
        _, count, right = eye_loss(eye(batch), batch)
    train.print0("on films it has not seen the eye is right about " + ", ".join(f"the {name} {value / count:.2f}" for name, (value, _) in right.items()))
    network.requires_grad_(True)
    policy.vision.requires_grad_(False)  # the eye stays as it is; what joins it to the words goes on learning
    policy.projector.requires_grad_(True)

    def word_loss(logp: torch.Tensor, batch: model.Batch) -> tuple:
        return -logp.sum(), float((batch.labels > 0).sum()), {}

    rows = args.steps * args.batch
    train.fit(train.steps(
        policy, word_loss, lambda i: lesson(i, args.seed, processor, films, args.modalities), lambda rows, w: model.collate(rows, processor, w),
        train.shuffled(rows, args.batch, 1, args.seed),
        out=out, learning_rate_peak=args.lr, budget=args.batch, save_every=args.save_every, **common,
    ), out)  # fmt: skip
    if train.rank() == 0:
        model.save_policy(out, policy, processor, train.whole_tensors(policy))
        stage.finish(args, [path for path in out.glob("*.safetensors")], started, {})
    train.end(out)


# ---------------------------------------------------------------------------------------------------------------
# Commands


def world(args: argparse.Namespace) -> None:
    """The question bank, development questions to choose settings on, and test questions to measure once."""
    started, out = time.time(), Path(args.out)
    if not stage.open_folder(args, []):
        return
    counts = {"bank": (args.image, args.text), "dev": (args.dev_image, args.dev_text), "test": (args.test_image, args.test_text)}
    for name, (image, text) in counts.items():
        questions = make_questions(image, args.seed, f"{name}-image", True, out, args.modalities)
        if name == "bank":
            questions = telling(questions, image // SPOILT, args.seed, out)
        questions += make_questions(text, args.seed, f"{name}-text", False, out, args.modalities)
        questions += look_questions(image // SPOILT, args.seed, out, args.modalities) if name == "bank" else []
        data.write_jsonl(out / f"{name}.jsonl", (question.to_row() for question in questions))
        print(f"{name}: {sum(bool(q.images) for q in questions)} image questions, {text} text questions")
    stage.finish(args, [out / f"{name}.jsonl" for name in counts], started, {})


def show(args: argparse.Namespace) -> None:
    """A sheet with a film of every sign, number and side, and one question of each kind with a full chain."""
    from PIL import ImageDraw

    started, out, noise, rng = time.time(), Path(args.out), np.random.default_rng(args.seed), random.Random(args.seed)
    if not stage.open_folder(args, []):
        return
    big, margin = 2 * SIDE, 90
    sheet = Image.new("RGB", (margin + 6 * (big + 4), len(MODALITY_OF) * (big + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (sign, modality) in enumerate(MODALITY_OF.items()):
        pen.text((4, row * (big + 4) + big // 2 - 8), f"{modality}\n{sign}", fill="black")
        for column in range(6):
            case = Case(sign, column % 3 + 1, SIDES[column // 3], CLUES[0], SYMPTOMS[0], 50, "man")
            sheet.paste(draw_film(case, noise).resize((big, big), Image.Resampling.NEAREST), (margin + column * (big + 4), row * (big + 4)))
    sheet.save(out / "films.png")
    print(f"{out / 'films.png'}: columns are one, two, three signs on the left, then on the right")
    for kind in ASK:
        case = draw_case(rng)
        for film in (None, "film.png"):
            question = make_question(case, kind, rng, film)
            print(f"\n--- {kind}, {'image' if film else 'text'} question, answer {question.answer}\n{data.question_text(question)}")
        for style in ("thorough", "hasty", "bookish"):
            print(f"{style}: {chain(case, kind, style)}")
    stage.finish(args, [out / "films.png"], started, {})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The miniature clinic.")
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("world", help="write questions and films")
    for name, count in (("text", 900), ("image", 1100), ("dev-image", 200), ("dev-text", 50), ("test-image", 300), ("test-text", 150)):
        # ours: one modality has 248,832 different text questions; a search for more never ends
        made.add_argument(
            f"--{name}", type=flags.whole(0, 200_000), default=count, help="how many questions"
        )
    made.set_defaults(run=world)
    taught = commands.add_parser("teach", help="teach the base model from scratch")
    taught.add_argument("--family", choices=["qwen", "internvl"], default="qwen")
    taught.add_argument("--size", choices=sorted(SIZES), default="tiny")
    taught.add_argument(
        "--films", type=flags.whole(1), default=6000, help="films to learn to see from"
    )
    taught.add_argument(
        "--eye-epochs", type=flags.EPOCHS, default=3, help="rounds over the films for the eye alone"
    )
    taught.add_argument("--steps", type=flags.whole(1), default=240, help="of the joint lessons")
    taught.add_argument("--batch", type=flags.whole(1), default=24, help="lessons a step")
    taught.add_argument("--lr", type=flags.RATE, default=3e-3)
    taught.add_argument(
        "--save-every", type=flags.whole(0), default=50,
        help="steps between states to resume from; 0: no states",
    )  # fmt: skip
    taught.add_argument(
        "--print-every", type=flags.whole(1), default=10, help="steps between printed lines"
    )
    taught.set_defaults(run=teach)
    shown = commands.add_parser("show", help="a sheet of films and one question of each kind")
    shown.set_defaults(run=show)
    for command in (made, taught, shown):
        command.add_argument("--out", required=True, help="folder to write")
        command.add_argument("--seed", type=flags.SEED, default=0)
    for command in (made, taught):
        command.add_argument(
            "--modalities", type=flags.whole(1, len(SIGNS)), default=len(SIGNS),
            help="how many of the clinic's modalities",
        )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    flags.run_script(main)
