"""Reading an answer: a letter, an option's text, or None; an answer that cannot be read is wrong.

    extract_choice(response, options)    the letter that a response chose, or None
    is_correct(response, question)       right by rule

Everything up to the last </think> is cut, then the last <answer> block counts, or without one what
was said there. Three things make an answer, and where two of them differ there is none:

    stated     "the answer is B", "Correct option: (B)", "\\boxed{B}"; the last one counts
    named      a line that is an option and nothing else: "**B. MRI**", or "B" at either end
    opened     the text begins with an option, letter and text, and goes through no other

What is never a choice: a second letter beside it ("B or C", "(A) CT (B) MRI"); a letter that is
denied ("B is not correct"), doubted ("If the answer is B") or taken back ("Wait, no"); a letter
with another option's text ("B. CT"); a word that begins like one ("A fracture", "B cells", "E.
coli"); a small letter; a list of the options. Rather None than a wrong letter.

Where we depart from the paper, or it is silent: it gives no rule. Of 1,444 published replies
without tags (GPT-4o on MMMU-Pro) ours leave 11 unread, of which a person reads two; none is wrong.
"""

import re
import unicodedata
from collections import Counter
from itertools import islice

import data
from data import LETTERS, WORDS, Question, answer_block, answer_region, normalise


def plain(text: str) -> str:
    """A text without its dress, LaTeX and Markdown; \\boxed{B} becomes an answer that is stated."""
    text = re.sub(r"\\boxed\b", " answer: ", unicodedata.normalize("NFKC", text))
    text = re.sub(r"\\(?:(?:text|math)[a-z]*|left|right|[dt]?frac|quad|[^a-zA-Z])", " ", text)
    return re.sub(r"[*$`_#\\]", "", re.sub(r"[{}]", " ", text)).strip()


# --------------------------------------------------------------------------------------------------
# The words that the rules know

START = r"[^\w~❌✗✘☐]*"  # what may stand before an option, but for what crosses it out
# A letter that stands for itself: "B", "(B", "Option B", "Answer: option B"; not "B-cell", "I.V."
LETTER = rf"(?:(?i:option|choice|answer)\b\W*)*\(?([{LETTERS}])(?!\w|[-'’.]\w)"
CORRECT = r"is (?:the )?(?:correct|right|best|true|most likely)\b"
REASON = r"\b(?:because|since|as(?! well))\b"
# Said of a letter in its clause, these make it no choice ...
DENIED = re.compile(
    r"(?i)\b(?:not|cannot|never|no|wrong|incorrect|false|less|unlikely|inappropriate|excluded|"
    r"eliminated|ruled out|contraindicated|but|although|though|however|unless|if)\b|n['’]t\b"
)
# ... in the sentence before "the answer is", these
DOUBTED = re.compile(
    r"(?i)\b(?:not|never|cannot|if|whether|unless|without|had|might|may|could|doubt|unlikely|wrong|"
    r"incorrect|worst|least|second|each|every|other|another|alternative|initial|previous|many|"
    r"some|student\w*|tempting|rul\w+ out|exclud\w+|eliminat\w+)\b|n['’]t\b"
)
# ... and behind it, these
TAKEN_BACK = re.compile(
    r"(?i)(?:[.!?;,\n]|\bbut)\s*(?:wait|actually|on second thought|correction|sorry|i meant?|no,)"
)
# A later statement replaces an earlier one where one of these stands between
AGAIN = re.compile(r"(?i)\b(?:no|now|instead|final\w*|wait|actually|correction|sorry)\b")
# Where an answer is stated: "the answer is", "Correct option:", "is option", a heading "Answer"
STATED = re.compile(
    r"(?im)^\s*(?:(?:the|my|final|correct|best)\s+)*answer\s*\n[\s:]*"
    r"|\b(?:(?:answer|option|choice)(?:\s*:|\s+(?:is|(?:should|must) be)\b"
    r"(?:\s+(?:most likely|likely|probably|thus|therefore|indeed)\b)?)"
    r"|(?:is|be|match\w*|correspond\w* to|closest to)\s+(?=(?:option|choice)\b))[\s:]*"
)
# A line that may name an option: "B. MRI", "So, (B) MRI is the correct answer."
LINE = re.compile(
    rf"(?:(?i:so|thus|therefore|hence)\b)?{START}{LETTER}(?!,)(.*?)"
    rf"(?:\b{CORRECT}(?: (?:answer|option|choice))?\W*)?",
    re.S,
)
# data.WORDS with letters apart from digits: what two spellings of one text have in common
PIECES = re.compile(r"\d+|[^\W\d]+|[↑↓→←<>=≤≥≠±+]|(?<!\w)[-−](?=\d)")
# What may lead to a line with a letter alone
LEADS = re.compile(r"(?i)\b(?:answers?|options?|choices?|correct|so|thus|therefore|hence)\b")


# --------------------------------------------------------------------------------------------------
# Text against options


def after_words(text: str, wanted: str) -> str | None:
    """What follows `wanted` at the beginning of a text, however both are spaced; None if it is not
    there. "117.1 kips" is "117.1kips", and "1.5" is not "15"."""
    words = PIECES.findall(plain(wanted).casefold())
    said = list(islice(PIECES.finditer(text), len(words)))
    if not words or [piece[0].casefold() for piece in said] != words:
        return None
    rest = text[said[-1].end() :]
    return None if re.match(r"\w", rest) else rest  # "CTA" does not begin with "CT"


def opening(text: str, options: dict[str, str]) -> tuple[list[str], str]:
    """(letters, rest): the options whose whole text a text begins with, and what follows. Only the
    longest counts, "normal pressure" before "normal"; two may differ in their spaces alone."""
    rests = {letter: after_words(text, option) for letter, option in options.items()}
    rest = min((rest for rest in rests.values() if rest is not None), key=len, default=text)
    return [letter for letter, after in rests.items() if after == rest], rest


def others_in(clause: str, letter: str, options: dict[str, str]) -> bool:
    """Whether a clause names another option, by its letter or by its whole text."""
    said, own = f" {normalise(plain(clause))} ", f" {normalise(plain(options[letter]))} "
    letters = re.findall(rf"(?<![\w'’-])([{LETTERS}])(?![\w'’-])", clause)
    texts = [f" {normalise(plain(text))} " for key, text in options.items() if key != letter]
    return bool({*letters} & options.keys() - {letter}) or any(
        text in said and text not in own and text.strip() not in map(str.casefold, LETTERS)
        for text in texts
    )


def is_text(text: str, option: str) -> bool:
    """Whether words that begin like a letter are an option's: "E. coli", but not "C" where that is
    a letter, too."""
    own = normalise(plain(option))
    return len(own) > 1 and f"{normalise(text)} ".startswith(f"{own} ")


def choice_at(
    text: str, options: dict[str, str], stated: bool = False, opened: bool = False
) -> str | None:
    """The option that a plain text begins with: its letter, or its whole text up to the end of the
    sentence. None for a letter that what follows makes another thing.

    stated: behind "the answer is", where the next sentence may be about others. opened: at the
    beginning of an explanation, where "A. CT is fast" only begins to weigh it."""
    if letter := named_by(text, options, alone=False):  # "I. II only" is not "I, II only"
        return letter
    letters, rest = opening(text, options)
    match = re.match(rf"{START}{LETTER}", text)
    if len(letters) == 1 and (not match or is_text(text, options[letters[0]])):
        more = rf"[.!]\s|\s*\n|\W*{REASON}" if stated else r"\W*\bbecause\b"
        end = rf"(?:\W*(?i:option )?{letters[0]}\b)?\)?(?:\W*$|{more})"
        if re.match(end, rest):
            return letters[0]
    if not match or match[1] not in options:
        return None
    letter, rest = match[1], text[match.end() :]
    letters, follows = opening(rest, options)
    if letters and letter not in letters:
        return None
    ends = rf"\W*$|\s*[^\w\s]|\s*\n|\s*(?:[A-Z]|because\b|{CORRECT})"
    if letters and opened and not re.match(ends, follows):
        return None
    if not stated:  # "B. It shows the lesion": said of B; behind its text a new sentence is not
        follows = re.sub(r"^\W*[.:)]\s*" + "(?=[a-z])" * bool(letters), "", follows)
    clause = re.split(rf"[.!?](?:\s|$)|\n|{REASON}", follows)[0]
    if DENIED.search(clause) or others_in(clause, letter, options):
        return None
    if letters or not WORDS.search(rest) or re.match(rf"\W*\b(?:because\b|{CORRECT})", rest):
        return letter
    said, texts = normalise(rest), [normalise(plain(option)) for option in options.values()]
    begun = [option for option in texts if option.startswith(said)]
    if begun:
        return letter if begun == [normalise(plain(options[letter]))] else None
    term = f"{letter} {said.split()[0]}".casefold()  # "E. coli", "C - reactive protein"
    species = (
        re.match(r"\.\s*[a-z]", rest) and said.split()[0] != normalise(options[letter]).split()[0]
    )
    numeral = letter == "I" and re.search(r"\b(?:II|III|IV)\b", rest)
    if species or numeral or any(f" {term} " in f" {option} " for option in texts):
        return None
    return letter if re.match(r"\s*[).:;\]\n]", rest) else None


def named_by(line: str, options: dict[str, str], alone: bool) -> str | None:
    """The letter of a line that names an option and says nothing else: the letter and the option's
    whole text, or where `alone` allows it the letter alone."""
    match = LINE.fullmatch(line)
    if not match or match[1] not in options:
        return None
    rest = after_words(match[2], options[match[1]])
    rest = (match[2] if alone else "x") if rest is None else rest
    return match[1] if not WORDS.search(rest) else None


def discussed(sentence: str, options: dict[str, str]) -> str | None:
    """The letter of the option that a sentence begins with: letter and text, "(B)", "B:", "B."."""
    match = re.match(rf"{START}{LETTER}", sentence)
    if not match or match[1] not in options:
        return None
    rest = sentence[match.end() :]
    return match[1] if match[1] in opening(rest, options)[0] or re.match(r"[).:]", rest) else None


def discussed_in(text: str, options: dict[str, str]) -> set[str]:
    """The letters of the options that a text goes through, sentence by sentence."""
    sentences = re.split(r"\n+|(?<=[.;!?])\s+", text)
    return {discussed(sentence, options) for sentence in sentences} - {None}


# --------------------------------------------------------------------------------------------------
# The three things that make an answer


def stated_in(text: str, options: dict[str, str]) -> list[tuple[int, str | None]]:
    """(place, letter) of every "the answer is ..."; None for a letter that is no choice."""
    found = []
    for cue in STATED.finditer(text):
        sentence, rest = re.split(r"[.!?;]\s|\n", text[: cue.start()])[-1], text[cue.end() :]
        letter = choice_at(rest, options, stated=True)
        aside = re.match("(?i)is", cue[0]) and re.search(r"(?i)\b(?:which|that)\s*$", sentence)
        if DOUBTED.search(sentence) or aside:  # "..., which is option A"
            continue
        if letter or re.match(rf"{START}{LETTER}", rest):
            found.append((cue.start(), letter))
    return found


def named_in(text: str, options: dict[str, str]) -> list[tuple[int, str]]:
    """(place, letter) of every line that names an option: the first and the last one, and one to
    which a colon leads."""
    lines = [(m.start(), m[0].strip()) for m in re.finditer(r"[^\n]+", text) if WORDS.search(m[0])]
    if len({named_by(line, options, alone=False) for _, line in lines} - {None}) > 1:
        return []  # the options, one after the other
    found = []
    for at, (place, line) in enumerate(lines):
        before = re.split(r"[.!?;]\s", lines[at - 1][1])[-1] if at else ""
        led = before.endswith(":")
        if (led and DOUBTED.search(before)) or not (led or at in (0, len(lines) - 1)):
            continue
        if letter := named_by(line, options, alone=bool(LEADS.search(before)) if led else True):
            found.append((place, letter))
    return found


def said_in(text: str, options: dict[str, str]) -> str | None:
    """The choice in a plain text of several sentences, or None."""
    stated, named = stated_in(text, options), named_in(text, options)
    if len({letter for _, letter in stated} - {None}) > 1:  # the last counts if it replaces others
        if not AGAIN.search(text[stated[-2][0] : stated[-1][0]]):
            return None
    if len(discussed_in(text, options)) == 1 and discussed(text, options):
        opened = choice_at(text, options, opened=True)
        named += [(0, opened)] if opened else []
    if len({letter for _, letter in named}) > 1:
        named = []
    found = {letter for _, letter in stated[-1:] + named} - {None}
    behind = text[max((place for place, _ in stated + named), default=0) :]
    for option in options.values():  # "Wait a few years" may be one
        behind = behind.replace(plain(option), "")
    if len(found) > 1 or (found and TAKEN_BACK.search(behind)):
        return None
    lines = [line for line in text.split("\n") if WORDS.search(line)]
    if not found and len(lines) > 1 and lines[-2].strip().endswith(":"):
        led = LEADS.search(lines[-2]) and not DOUBTED.search(lines[-2])
        return choice_at(lines[-1], options) if led else None
    return found.pop() if found else None


def extract_choice(response: str, options: dict[str, str]) -> str | None:
    """The letter a response chose, or None where it cannot be read: wrong, counted, never guessed.

    An <answer> block, or without one a response of one line, is read as a whole: "B", "MRI",
    "Option B: MRI", "B. MRI, because ...", "B is correct". If it says more, or in a longer
    response, that counts which is stated, named or opened (see above)."""
    block = answer_block(response)
    region = answer_region(response) if block is None else block
    if region is None:
        return None
    text = plain(region)
    # "A:" as in "Q: ... A: ..."; a base model may go on with questions of its own
    if block is None:
        text = re.split(r"\n\s*(?:Question|Q)\s*\d*\s*[:.]", text)[0]
        if text.startswith("A:") and "A" not in opening(text[2:], options)[0]:
            text = text[2:].strip()
    if letter := named_by(text, options, alone=True):
        return letter
    wholes = [key for key, option in options.items() if normalise(plain(option)) == normalise(text)]
    if len(wholes) == 1:
        return wholes[0]
    if (block is not None or "\n" not in text) and len(discussed_in(text, options)) < 2:
        if letter := choice_at(text, options, opened=block is None):
            return letter
    return said_in(text, options)


def free_answer(response: str) -> str | None:
    """What an open-ended response answers: its <answer> block; or all of it, where it has no tag at
    all. None if it has tags but no block."""
    return plain(response) or None if not data.TAGS.search(response) else answer_block(response)


def is_correct(response: str, question: Question) -> bool:
    """Right by rule: the chosen letter is the answer's or, open-ended, the answer has the very
    words of the reference, or of another answer that the benchmark accepts (meta.answers)."""
    if question.options:
        return extract_choice(response, question.options) == question.answer
    said = normalise(free_answer(response) or "")
    accepted = [question.answer, *question.meta.get("answers", [])]
    return bool(said) and said in {normalise(answer) for answer in accepted}


def is_right(row: dict, question: Question) -> bool:
    """Whether a completion's row is finished, and right by rule."""
    return row["finish_reason"] == "stop" and is_correct(row["response"], question)


# --------------------------------------------------------------------------------------------------
# Endless thinking

# ours: measured. A text loops if runs of 8 words that occur 5 times or more are more than a fifth
# of it. None of HuatuoGPT-o1's 198 chains has such a run three times; one of GPT-4o's 1,444 direct
# answers on MMMU-Pro has one five times, in 12 % of its words. A sentence of 13 words after a chain
# of 373 words is 26 % of the whole if said ten times.
LOOP, TIMES, LOOPED = 8, 5, 0.2


def loop(text: str) -> str | None:
    """The run of LOOP words that a text repeats, or None if the text does not loop."""
    words = normalise(text).split()
    runs = [" ".join(words[i : i + LOOP]) for i in range(len(words) - LOOP + 1)]
    counts = Counter(runs)
    often = [i for i, run in enumerate(runs) if counts[run] >= TIMES]
    inside = {at for i in often for at in range(i, i + LOOP)}
    return counts.most_common(1)[0][0] if len(inside) > LOOPED * len(words) else None
