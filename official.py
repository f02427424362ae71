"""How the benchmarks themselves ask, and how their own scripts read an answer: for comparison, never for the headline (paper §4).

    medxpertqa   two turns: reason step by step; then "Therefore, among A through E, the answer is". The first letter counts
    mmmu         the option's letter at once, or a single word; what is mentioned last counts
    mmmu-pro     reason, then a last line "Answer: X"; otherwise as MMMU

The rules are written anew from their descriptions, with their faults, which tests pin: the article "A" is option A, "not A
but C" is A, an option quoted in the reasoning is the answer. What they cannot read is None, and wrong.

Where we depart from the paper, or it is silent: it names neither prompt nor rule. And where these benchmarks do:
  1. Where MMMU's rule draws a letter at random, ours says None.
  2. MedQA and Medbullets have no prompt or rule of their own; here they take those of MedXpertQA's evaluation.
"""

import re

import data

# Zero-shot prompts: the form of an option, and the text. {images} stands for the images that the text itself does not place.
MEDXPERTQA = "({}) {} ", "Q: {question}\nAnswer Choices: {choices}\nA: Let's think step by step.{images}"
MMMU = "({}) {}\n", "{images}{question}\n\n{choices}\n\nAnswer with the option's letter from the given choices directly."
SHORT = "", "{images}{question}\n\nAnswer the question using a single word or phrase."
LAST_LINE = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of options. "
    "Think step by step before answering."
)
PRO = "{}. {}\n", "{images}{question}\n{choices}Answer the preceding multiple choice question. " + LAST_LINE
VISION = "", "Write out the multiple-choice question in the image and then solve it. " + LAST_LINE + "{images}"


def trigger(question: data.Question) -> str:
    """The text of MedXpertQA's second turn, which its rule looks for."""
    return f"Therefore, among A through {list(question.options)[-1]}, the answer is"


def first_letter(response: str, question: data.Question) -> str | None:
    """MedXpertQA: the first option letter that is a word of its own, after the trigger of the second turn or else after the
    first " answer is ", or else anywhere: also the article "A", or a letter that is ruled out."""
    cut = next((mark for mark in (trigger(question), " answer is ") if mark in response), None)
    found = re.search(rf"\b({'|'.join(question.options)})\b", response.split(cut)[1] if cut else response)
    return found[1] if found else None


def last_mention(response: str, question: data.Question) -> str | None:
    """MMMU and MMMU-Pro: after the last "Answer:" the only option letter among all characters; else the "(B)", else the "B ",
    else the "B." that comes last; else, in more than five words, the option text that comes last; else None, where the
    benchmark draws a letter. For a short answer see short_answer."""
    if not question.options:
        return short_answer(response, question)
    if "Answer:" in response:
        named = [letter for letter in question.options if letter in response.rsplit("Answer:", 1)[1]]
        if len(named) == 1:
            return named[0]
    for mark in ",.!?;:'":
        response = response.strip(mark)
    text = f" {response} "
    for written, placed in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [letter for letter in question.options if written.format(letter) in text]
        if named:
            return max(named, key=lambda letter: text.rfind(placed.format(letter)))
    lowered = text.lower()
    named = [letter for letter, said in question.options.items() if said.lower() in lowered] if len(text.split()) > 5 else []
    return max(named, key=lambda letter: lowered.rfind(question.options[letter].lower())) if named else None


NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+)(?:e[+-]?\d+)?\b"


def short_answer(response: str, question: data.Question) -> str | None:
    """MMMU, no options: question.answer if one of the accepted answers is inside a key phrase (of each line, the shortest
    rest after words like "is" or "so"; if there is none, the whole response), or equals a number in one, to 2 decimals."""
    lines, phrases = response.strip().strip(".").lower().split("\n"), []
    for n, line in enumerate(lines):
        cues, rest = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", *(["="] if n == len(lines) - 1 else [])], ""
        for after in (line.split(cue)[-1].strip() for cue in cues if cue in line):
            rest = after if not rest or len(after) < len(rest) else rest
        phrases += [rest] if rest and rest not in ":,.!?;'" else []
    phrases = phrases or ["\n".join(lines).strip()]
    numbers = {float(number.replace(",", "")) for number in re.findall(NUMBER, "\n".join(phrases))}
    for accepted in question.meta.get("answers", [question.answer]):
        said = accepted.strip().lower()
        inside = [f" {said}", f"{said} "] if len(said) == 1 else [said]  # one letter must begin or end a word
        if re.fullmatch(NUMBER, said):
            right = round(float(said.replace(",", "")), 2) in {round(number, 2) for number in numbers}
        else:
            right = any(form in (f" {phrase} " if len(phrase) == 1 else phrase) for form in inside for phrase in phrases)
        if right:
            return question.answer
    return None

# ---------------------------------------------------------------------------------------------------------------
# By the name of a set, as questions carry it in `source`

PROMPTS = {
    **dict.fromkeys(("medxpertqa-mm", "medxpertqa-text", "medqa", "medbullets-op4", "medbullets-op5"), MEDXPERTQA),
    "mmmu": MMMU, "mmmu-pro": PRO, "mmmu-pro-vision": VISION,
}  # fmt: skip
RULES = {name: first_letter if prompt is MEDXPERTQA else last_mention for name, prompt in PROMPTS.items()}


def has_rule(question: data.Question) -> bool:
    return question.source in RULES


def choice(response: str, question: data.Question) -> str | None:
    """What the benchmark's script would read: a letter; for a short answer the reference, where it counts as right; or None.
    Raises RowError for a source that is none of these benchmarks."""
    return of_source(RULES, question)(response, question)


def messages(question: data.Question) -> tuple[list[dict], list[str]]:
    """The benchmark's own prompt, and the question's images in the order in which it shows them. The user turn's content is
    a list of parts, text and images, as OpenAI's protocol has them: these benchmarks place images inside the text.
    Raises RowError for a source that is none of these benchmarks."""
    prompt = of_source(PROMPTS, question)
    form, text = prompt if question.options else SHORT
    marked = question.meta.get("image_marks", [])
    unmarked = "".join(f"<image {n}>" for n in range(1, len(question.images) + 1) if n not in marked)
    choices = "".join(form.format(letter, said) for letter, said in question.options.items()).rstrip(" ")
    pieces = data.IMAGE_MARK.split(text.format(question=question.question, choices=choices, images=unmarked))  # text, number, text, ...
    parts, shown = [], []
    for at, piece in enumerate(pieces):
        if at % 2 == 0:
            parts += [{"type": "text", "text": piece}] if piece else []
        elif int(piece) not in shown and 0 < int(piece) <= len(question.images):
            parts.append({"type": "image"})
            shown.append(int(piece))
        else:  # named again, or a mark that stands for nothing: it stays as text
            parts.append({"type": "text", "text": f"<image {piece}>"})
    system = [{"role": "system", "content": "You are a helpful medical assistant."}] if prompt is MEDXPERTQA else []
    return [*system, {"role": "user", "content": parts}], [question.images[n - 1] for n in shown]


def second_turn(question: data.Question, reply: str) -> list[dict] | None:
    """The turns that ask for the letter after a first reply, or None where the benchmark asks once."""
    if of_source(PROMPTS, question) is not MEDXPERTQA:
        return None
    return [{"role": "assistant", "content": reply}, {"role": "user", "content": trigger(question)}]


def of_source(table: dict, question: data.Question):
    if question.source not in table:
        raise data.RowError(f"question {question.id}: source {question.source!r} has no prompt or rule of its own; those that do are {', '.join(table)}")
    return table[question.source]
