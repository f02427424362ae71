"""The benchmarks' own prompts and rules to read a completion: for comparison, never for the
headline (paper §4).

    medxpertqa   two turns: reason step by step; then "Therefore, among A through E, the answer is".
                 The first letter counts
    mmmu         the option's letter at once, or a single word; the last mention counts
    mmmu-pro     reason, then a last line "Answer: X"; otherwise as MMMU

The rules are written anew from their descriptions, with their faults, which tests pin: the article
"A" is read as A, "not A but C" as A, an option quoted in the reasoning as the answer. What they
cannot read is None, and counts as wrong.

Where we depart from the paper, or it is silent: it names neither prompt nor rule. Where we depart
from these benchmarks:
  1. Where MMMU's rule draws a letter at random, ours says None.
  2. MedQA and Medbullets have no prompt or rule of their own; they take those of MedXpertQA's
     evaluation.
"""

import re

import data

# Zero-shot prompts: the form of an option, and the text. {images} stands for the images that the
# text itself does not place.
MEDXPERTQA = (
    "({}) {} ",
    "Q: {question}\nAnswer Choices: {choices}\nA: Let's think step by step.{images}",
)
MMMU = (
    "({}) {}\n",
    "{images}{question}\n\n{choices}\n\n"
    "Answer with the option's letter from the given choices directly.",
)
SHORT = "", "{images}{question}\n\nAnswer the question using a single word or phrase."
LAST_LINE = (
    "The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of options. "
    "Think step by step before answering."
)
ASKED = "Answer the preceding multiple choice question. "
PRO = "{}. {}\n", "{images}{question}\n{choices}" + ASKED + LAST_LINE
WRITE_OUT = "Write out the multiple-choice question in the image and then solve it. "
VISION = "", WRITE_OUT + LAST_LINE + "{images}"
PROMPTS = {  # by the name of a set, as questions carry it in `source`
    "medxpertqa-mm": MEDXPERTQA, "medxpertqa-text": MEDXPERTQA, "medqa": MEDXPERTQA,
    "medbullets-op4": MEDXPERTQA, "medbullets-op5": MEDXPERTQA,
    "mmmu": MMMU, "mmmu-test": MMMU, "mmmu-general": MMMU, "mmmu-test-general": MMMU,
    "mmmu-pro": PRO, "mmmu-pro-vision": VISION,
}  # fmt: skip


def trigger(question: data.Question) -> str:
    """The text of MedXpertQA's second turn, which its rule looks for."""
    return f"Therefore, among A through {list(question.options)[-1]}, the answer is"


def first_letter(response: str, question: data.Question) -> str | None:
    """MedXpertQA: the first option letter that is a whole word, after the trigger of the second
    turn, else after the first " answer is ", else anywhere. The article "A" or a letter that is
    ruled out counts too."""
    cut = next((mark for mark in (trigger(question), " answer is ") if mark in response), None)
    rest = response.split(cut)[1] if cut else response
    found = re.search(rf"\b({'|'.join(question.options)})\b", rest)
    return found[1] if found else None


def last_mention(response: str, question: data.Question) -> str | None:
    """MMMU and MMMU-Pro: the only option letter among all characters after the last "Answer:"; else
    the last "(B)", else the last "B ", else the last "B."; else, in more than five words, the last
    option text; else None, where the benchmark draws a letter. For a short answer see
    short_answer."""
    options = question.options
    if not options:
        return short_answer(response, question)
    if "Answer:" in response:
        rest = response.rsplit("Answer:", 1)[1]
        named = [letter for letter in options if letter in rest]
        if len(named) == 1:
            return named[0]
    for mark in ",.!?;:'":
        response = response.strip(mark)
    text = f" {response} "
    for written, placed in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [letter for letter in options if written.format(letter) in text]
        if named:
            return max(named, key=lambda letter: text.rfind(placed.format(letter)))
    places = {letter: text.lower().rfind(said.lower()) for letter, said in options.items()}
    last = max(places, key=places.get)
    return last if places[last] >= 0 and len(text.split()) > 5 else None


NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+)(?:e[+-]?\d+)?\b"
CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def short_answer(response: str, question: data.Question) -> str | None:
    """MMMU, no options: question.answer if an accepted answer is inside a key phrase, or equals a
    number in one to 2 decimals. A line's key phrase is the shortest rest after words like "is" or
    "so"; if there is none, the whole response."""
    lines, phrases = response.strip().strip(".").lower().split("\n"), []
    for n, line in enumerate(lines, 1):
        cues = (*CUES, "=") if n == len(lines) else CUES
        rest = ""
        for after in (line.split(cue)[-1].strip() for cue in cues if cue in line):
            rest = after if not rest or len(after) < len(rest) else rest
        phrases += [rest] if rest and rest not in ":,.!?;'" else []
    phrases = phrases or ["\n".join(lines).strip()]
    found = re.findall(NUMBER, "\n".join(phrases))
    numbers = {round(float(number.replace(",", "")), 2) for number in found}
    for accepted in question.meta.get("answers", [question.answer]):
        said = accepted.strip().lower()
        if re.fullmatch(NUMBER, said):
            right = round(float(said.replace(",", "")), 2) in numbers
        elif len(said) == 1:  # one letter must begin or end a word
            padded = [f" {phrase} " if len(phrase) == 1 else phrase for phrase in phrases]
            right = any(f" {said}" in phrase or f"{said} " in phrase for phrase in padded)
        else:
            right = any(said in phrase for phrase in phrases)
        if right:
            return question.answer
    return None


def has_rule(question: data.Question) -> bool:
    return question.source in PROMPTS


def prompt_of(question: data.Question) -> tuple[str, str]:
    """The prompt of a question's benchmark. Raises RowError for any other source."""
    if question.source not in PROMPTS:
        said = f"source {question.source!r} has no prompt or rule of its own"
        raise data.RowError(f"question {question.id}: {said}; known are {', '.join(PROMPTS)}")
    return PROMPTS[question.source]


def choice(response: str, question: data.Question) -> str | None:
    """The letter that the benchmark's script would read; for a short answer the reference, if it
    counts as right; or None."""
    rule = first_letter if prompt_of(question) is MEDXPERTQA else last_mention
    return rule(response, question)


def messages(question: data.Question) -> tuple[list[dict], list[str]]:
    """The benchmark's own prompt, and the question's images in the order in which it shows them.
    The user turn's content is a list of text and image parts, as in OpenAI's protocol: these
    benchmarks place images inside the text."""
    prompt, count = prompt_of(question), len(question.images)
    form, text = prompt if question.options else SHORT
    marked = question.meta.get("image_marks", [])
    unmarked = "".join(f"<image {n}>" for n in range(1, count + 1) if n not in marked)
    choices = "".join(form.format(letter, said) for letter, said in question.options.items())
    text = text.format(question=question.question, choices=choices.rstrip(" "), images=unmarked)
    parts, shown = [], []
    for at, piece in enumerate(data.IMAGE_MARK.split(text)):  # text, number, text, ...
        if at % 2 == 0:
            parts += [{"type": "text", "text": piece}] if piece else []
        elif int(piece) not in shown and 0 < int(piece) <= count:
            parts.append({"type": "image"})
            shown.append(int(piece))
        else:  # a repeated mark, or one without an image, stays as text
            parts.append({"type": "text", "text": f"<image {piece}>"})
    turns = [{"role": "user", "content": parts}]
    if prompt is MEDXPERTQA:
        turns.insert(0, {"role": "system", "content": "You are a helpful medical assistant."})
    return turns, [question.images[n - 1] for n in shown]


def second_turn(question: data.Question, completion: str) -> list[dict] | None:
    """The turns that ask for the letter after a first completion, or None if the benchmark asks
    once."""
    if prompt_of(question) is not MEDXPERTQA:
        return None
    return [
        {"role": "assistant", "content": completion},
        {"role": "user", "content": trigger(question)},
    ]
