"""Reasoning demonstrations for Stage I: teachers solve the text questions, three criteria choose
(paper §3.2).

    demo(q) = the first chain, teachers in round-robin order, that is  (i) right in its answer,
              (ii) well structured and organised, (iii) plausible and coherent

A teacher that shows its reasoning is taken at its word; of one that tells a summary only, another
engine writes the summary out, and the result must meet the criteria too. Stage I is text-only by
design: demonstrations show *how* to reason with knowledge the model has (images work as well, to
compare). What passes is put in the paper's message format (Appendix A).

    python distill.py run --questions out/curate/text.jsonl --out out/distill \\
        --teachers clinic:thorough clinic:hasty
    python distill.py run ... --expand TEACHER EXPANDER    summaries written out
    python distill.py import chains.json --format huatuo --out out/distill
                                                           chains that exist already
    ... --checker SPEC                                     of both: an engine for (ii) and (iii)
    ... --review filled-in.csv                             a human overrules rules and checker

reads questions.jsonl, or chains; writes OUT/demos.jsonl, OUT/rejected.jsonl (every refused response
and why), OUT/stage.json, and OUT/review.csv: every chain with a right answer, for a human's yes or
no in a copy of it

Where we depart from the paper, or it is silent:
  1. Criterion (i) is exact, by rule: the <answer> block, or without one the last "answer is (X)".
     (ii) and (iii) are rules first (one think and one answer block, length, loops, another script,
     talk of a given answer), then the checker's, if there is one: without a readable verdict of it
     nothing is kept. Its prompt and the expander's are ours.
  2. One chain a question by default (its 5,000 samples are 3K + 2K questions); a teacher that fails
     is replaced by the next. With --chains k each teacher is asked up to k times, and no chain is
     kept twice.
  3. The answer is written as "B. text" by default (its figures end so); --answer-form text leaves
     the letter out.
  4. Only right answers are expanded, and must stay; without images, which gpt-oss cannot see.
  5. A human's yes keeps a chain that rules or checker refused, a no drops it; neither makes a wrong
     answer right.
  6. Importing is not in the paper. HuatuoGPT-o1's chains were written for open questions, and often
     end elsewhere than the option they are filed under: kept where the first option that their
     Response names is the answer, and is not set aside there ("not X", "rather than X", "while X").
     This reads words, not meaning: a human's yes or no overrules it too.
"""

import argparse
import re
import textwrap
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import answers
import benchmarks
import bill
import data
import flags
import stage
from asking import (
    SPEED, Ask, Engine, Sampling, add_flags, ask_all, ask_yes_no, checkpoint, identity, image_paths,
    label_cost, prompt_ask, question_asks, read_verdict, replies_file, reply_row, setup_of,
)  # fmt: skip
from descriptions import read_sheet, write_sheet
from engines import open_engine

# ours: measured. A loop is runs of 8 words that come 5 times or more and are more than a fifth of
# the text. Of HuatuoGPT-o1's 198 published chains, 243 to 625 words long, 9 have such a run twice
# and none three times; of GPT-4o's 1,444 direct answers on MMMU-Pro, 11 have one three times or
# more and one five times, in 12 % of its words. A sentence of 13 words said ten times after a chain
# of 373 is 26 % of the whole, said fifty times 64 %.
LOOP, TIMES, LOOPED = 8, 5, 0.2
# paper 3.2: criteria (ii) and (iii)
CHECKS = {"Logical_Structure": "structure", "Plausibility_Coherence": "coherence"}
SHEET = (  # a human fills in the last
    "id", "sample", "teacher", "chain", "question", "images", "reasoning", "answer", "checks",
    "verdict",
)  # fmt: skip

# ours: paper silent
EXPAND_PROMPT = """A clinical question was solved by an expert, who left a summary of the reasoning and an answer.
Write the complete reasoning process behind the summary, step by step, as the thoughts of whoever solves the question: the findings that matter, what they suggest, which alternatives there are and what speaks against each, and a check of the conclusion.
Keep to the facts of the question and the summary, and to established medical knowledge. Never mention that there is a summary or an expert.
Reply with the reasoning as plain text, and after it the answer, unchanged, as <answer> answer here </answer>.
<Question> %s </Question>
<Summary> %s </Summary>
<Answer> %s </Answer>"""

# ours: paper silent; the two keys are its criteria (ii) and (iii)
CHECK_PROMPT = """You check reasoning that others are to learn from. Judge the response to the question, whose final answer is correct, by two criteria:
1. **Logical Structure**: Is the reasoning well organised, each step following from those before it, and the answer from the last?
2. **Plausibility and Coherence**: Is it medically plausible, true to the facts of the question, and free of contradictions?
Return your judgement as JSON and nothing else:
{"Logical_Structure": "Yes/No", "Plausibility_Coherence": "Yes/No"}
<Question> %s </Question>
<Response> %s </Response>"""


@dataclass
class Chain:
    """A response on its way to a demonstration. faults: {criterion: why it is refused}, empty for one that is kept."""

    question: data.Question
    sample: int
    teacher: str
    response: str
    faults: dict[str, str]
    notes: dict = field(default_factory=dict)  # more for its row: who expanded, who checked, what a human said

    def key(self) -> str:
        """A name in words: a spreadsheet may take a bare hash for a number."""
        return "chain-" + data.content_hash([self.question.id, self.response])[:16]

    def rejection(self) -> dict:
        question = self.question
        return {
            "id": question.id, "sample": self.sample, "teacher": self.teacher,
            "question": question.question, "options": question.options, "answer": question.answer,
            "faults": self.faults, "response": self.response,
        }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The criteria, by rule


def structure_fault(response: str, shortest: int, longest: int) -> str | None:
    """Criterion (ii): what is wrong with the form, or None."""
    parts = data.split_response(response)
    if parts is None:
        return "not one <think> block followed by one <answer> block"
    words = len(parts[0].split())
    if not shortest <= words <= longest:
        return f"the reasoning has {words} words, not {shortest} to {longest}"
    return None if parts[1] else "the answer is empty"


def loop(text: str) -> str | None:
    """The run of LOOP words that a text says over and over, or None where it is no loop."""
    words = data.normalise(text).split()
    runs = [" ".join(words[i : i + LOOP]) for i in range(len(words) - LOOP + 1)]
    counts = Counter(runs)
    often = [i for i, run in enumerate(runs) if counts[run] >= TIMES]
    inside = {at for i in often for at in range(i, i + LOOP)}
    return counts.most_common(1)[0][0] if len(inside) > LOOPED * len(words) else None


SCRIPTS = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC"}
TOLD = re.compile(
    r"\b(reference|provided|given|expert's) answer (is|says|states)\b"
    r"|\b(the|this|provided|given) summary (is|says|states|mentions)\b",
    re.I,
)


def scripts_of(text: str) -> set[str]:
    return {unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()}


def coherence_fault(response: str, question: str) -> str | None:
    """Criterion (iii), as far as rules go: loops, script drift, talk of a given answer. None if
    there is none."""
    if run := loop(response):
        return f"a loop: '{run}' over and over"
    if strange := (scripts_of(response) - scripts_of(question)) & SCRIPTS:
        return f"drifts into {', '.join(sorted(strange)).lower()} script"
    return "speaks of an answer it was given" if TOLD.search(response) else None


def check(response: str, finish_reason: str, question: data.Question, shortest: int, longest: int) -> dict[str, str]:
    """{criterion: fault} by rule; empty if all three are met."""
    found = {"correct": None, "structure": structure_fault(response, shortest, longest), "coherence": coherence_fault(response, data.question_text(question))}
    if finish_reason != "stop":
        found["correct"] = f"the response is not finished: {finish_reason}"
    elif not answers.is_correct(response, question):
        letter = answers.extract_choice(response, question.options)
        found["correct"] = f"the answer is {letter}, not {question.answer}" if letter else "the answer is wrong, or cannot be read"
    return {name: fault for name, fault in found.items() if fault}


# ---------------------------------------------------------------------------------------------------------------
# What engines say

THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.S)
EXPANSION = re.compile(r"\s*(?:<think>)?(.*?)(?:</think>)?\s*<answer>(.*?)</answer>\s*", re.S)


def in_form(thinking: str, answer: str) -> str:
    """As data.join_response, for parts yet to be checked: a tag of their own is a fault, not an error."""
    return f"<think> {thinking.strip()} </think> <answer> {answer.strip()} </answer>"


def read_reply(text: str, reasoning: str, options: dict[str, str]) -> str:
    """A teacher's reply in the paper's form, or its text as it is where that cannot be read.

    The chain is `reasoning`, which the server told apart, else the <think> block that the text begins with. The answer is the
    one <answer> block after the thinking; where there is none, what answers.extract_choice reads there: the last "answer is (X)".
    """
    if reasoning:
        rest = data.answer_region(text) or ""
    elif match := THOUGHT.fullmatch(text):
        reasoning, rest = match.groups()
    else:
        return text
    blocks = re.findall(r"<answer>(.*?)</answer>", rest, re.S)
    if len(blocks) == 1 and len(data.TAGS.findall(rest)) == 2:
        return in_form(reasoning, blocks[0])
    letter = None if data.TAGS.search(rest) else answers.extract_choice(rest, options)
    return in_form(reasoning, f"{letter}. {options[letter]}") if letter else text


def written_answer(question: data.Question, form: str = "letter-text") -> str:
    return question.answer_text() if form == "text" or not question.options else f"{question.answer}. {question.answer_text()}"


def ask_texts(engine: Engine, role: str, asks: list[Ask], args: argparse.Namespace) -> list[dict]:
    """The replies as rows, in the order of the asks."""
    sampling = Sampling(args.temperature, 1.0, args.max_tokens, args.seed)
    path = replies_file(args, role, engine.spec, sampling)
    rows = ask_all(engine, asks, sampling, path, lambda reply: {**reply_row(reply, engine.spec), "reasoning": reply.reasoning}, f"{role}, {engine.spec}")
    return [rows[ask.id, k] for ask in asks for k in ask.samples]


def teach(engine: Engine, questions: list[data.Question], sample: int, args: argparse.Namespace) -> list[Chain]:
    """What a teacher says to the paper's own prompt, in the questions' order."""
    asks = [replace(ask, samples=(sample,)) for ask in question_asks(questions, Path(args.images), 1)]
    chains = []
    for question, row in zip(questions, ask_texts(engine, "teacher", asks, args)):
        response = read_reply(row["response"], row["reasoning"], question.options)
        chains.append(Chain(question, sample, engine.spec, response, check(response, row["finish_reason"], question, *args.words)))
    return chains


def expand(engine: Engine, chains: list[Chain], args: argparse.Namespace) -> None:
    """Puts the expander's chain in place of each summary with a right answer, and checks it anew. The expander's own
    reasoning, about how to write, is not looked at."""
    right = [chain for chain in chains if "correct" not in chain.faults]
    summaries = [(data.split_response(chain.response) or (chain.response,))[0] for chain in right]
    prompts = [EXPAND_PROMPT % (data.question_text(c.question), summary, written_answer(c.question)) for c, summary in zip(right, summaries)]
    asks = [prompt_ask(chain.question.id, prompt, []) for chain, prompt in zip(right, prompts)]
    for chain, summary, row in zip(right, summaries, ask_texts(engine, "expander", asks, args)):
        match = EXPANSION.fullmatch(row["response"])
        chain.response = in_form(*match.groups()) if match else row["response"]
        chain.faults = check(chain.response, row["finish_reason"], chain.question, *args.words)
        chain.notes["expander"] = engine.spec
        if row["finish_reason"] != "stop":
            chain.faults["expansion"] = f"is not finished: {row['finish_reason']}"
        elif "correct" in chain.faults:
            chain.faults["expansion"] = f"does not keep the teacher's answer, {chain.question.answer}"
        elif len(chain.response.split()) <= len(in_form(summary, written_answer(chain.question)).split()):
            chain.faults["expansion"] = f"is no longer than the summary of {len(summary.split())} words"


def check_by_engine(engine: Engine, chains: list[Chain], args: argparse.Namespace) -> None:
    """Asks the checker about (ii) and (iii), with the images, where rules and humans have not settled them."""
    unsettled = [chain for chain in chains if not chain.faults and "review" not in chain.notes]
    asks = []
    for chain in unsettled:
        prompt = CHECK_PROMPT % (data.question_text(chain.question), chain.response)
        asks.append(prompt_ask(chain.question.id, prompt, image_paths(chain.question, Path(args.images))))
    said = ask_yes_no(engine, asks, list(CHECKS), "checker", args)
    for chain, ask in zip(unsettled, asks):
        chain.notes["checker"] = engine.spec
        met, error = read_verdict(said[ask.id], list(CHECKS))
        refused = {name: f"{engine.spec} says No to {key}" for key, name in CHECKS.items() if met and not met[key]}
        chain.faults |= refused if met else {"unchecked": f"{engine.spec}: {error}"}


# ---------------------------------------------------------------------------------------------------------------
# What humans say


def can_be_kept(chain: Chain) -> bool:
    """Whether a human may keep it: a right answer, one think and one answer block."""
    return "correct" not in chain.faults and data.split_response(chain.response) is not None


def review(chain: Chain, told: dict[str, bool]) -> None:
    """What a human said of it, if anything."""
    verdict = told.get(chain.key())
    if verdict is False:
        chain.faults["review"] = "a human says no"
    elif verdict and can_be_kept(chain):
        met = {name: name not in chain.faults for name in CHECKS.values()}
        known = chain.notes.get("checks", {"correct": True})
        chain.notes |= {"review": "yes", "checks": known | met}
        chain.faults = {}


def read_review(path: str | Path) -> dict[str, bool]:
    """{chain's key: kept} of a filled-in sheet; an empty verdict says nothing. Raises RowError."""
    told: dict[str, bool] = {}
    for number, row in read_sheet(path, ["chain", "verdict"]):
        word = row["verdict"].strip().casefold()
        if word not in ("", "yes", "y", "no", "n"):
            raise data.RowError(f"{path}: row {number}: verdict: {row['verdict']!r} is neither yes nor no")
        if word and told.setdefault(row["chain"], word[0] == "y") != (word[0] == "y"):
            raise data.RowError(f"{path}: row {number}: verdict: another row says the opposite of the same chain")
    return told


def write_review(args: argparse.Namespace, chains: list[Chain], told: dict[str, bool]) -> None:
    """review.csv: the chains that a human may keep, with the verdicts that are known."""
    rows, able = [], [chain for chain in chains if can_be_kept(chain)]
    for c in able:
        verdict = {True: "yes", False: "no", None: ""}[told.get(c.key())]
        checks = "; ".join(f"{name}: {fault}" for name, fault in c.faults.items()) or "passed"
        text, images = data.question_text(c.question), " ".join(c.question.images)
        parts = data.split_response(c.response)
        rows.append(
            [c.question.id, c.sample, c.teacher, c.key(), text, images, *parts, checks, verdict]
        )
    write_sheet(Path(args.out) / "review.csv", list(SHEET), rows)
    if unknown := told.keys() - {chain.key() for chain in able}:
        what = "chains that this run did not make, or whose answer is wrong"
        print(f"{args.review}: {len(unknown)} verdicts are on {what}; they count for nothing")


def settle(
    chains: list[Chain], kept: dict[str, list[Chain]], told: dict[str, bool],
    checker: Engine | None, args: argparse.Namespace,
) -> None:  # fmt: skip
    """Adds to the faults of chains what a human and the checker say, and to `kept`, {question's id:
    its chains}, those that have no fault."""
    for chain in chains:
        review(chain, told)
    if checker:
        check_by_engine(checker, chains, args)
    for chain in chains:
        others = kept[chain.question.id]
        if chain.response in [other.response for other in others]:
            chain.faults["duplicate"] = "the same chain is kept already"
        if not chain.faults:
            others.append(chain)


# ---------------------------------------------------------------------------------------------------------------
# python distill.py run


def make_demo(chain: Chain, form: str) -> dict:
    turn = {"role": "assistant", "content": data.join_response(data.split_response(chain.response)[0], written_answer(chain.question, form))}
    return {
        "id": chain.question.id, "sample": chain.sample, "messages": [*data.prompt_messages(chain.question), turn], "images": chain.question.images,
        "teacher": chain.teacher, "checks": {"correct": True, "structure": True, "coherence": True}, **chain.notes,
    }  # fmt: skip


def write_out(
    args: argparse.Namespace, started: float, asked: int, kept: list[Chain], rejected: list[dict],
    engines: dict[str, str],
) -> None:  # fmt: skip
    """demos.jsonl, rejected.jsonl, stage.json, and the counts; `asked`: how many questions there
    were."""
    out = Path(args.out)
    data.write_jsonl(out / "demos.jsonl", (make_demo(chain, args.answer_form) for chain in kept))
    data.write_jsonl(out / "rejected.jsonl", rejected)
    by_teacher = Counter(chain.teacher for chain in kept)
    by_fault = Counter(name for row in rejected for name in row["faults"])
    counts = ", ".join(f"{teacher} {count}" for teacher, count in sorted(by_teacher.items()))
    print(f"{len(kept)} demonstrations: {counts}")
    if asked > (having := len({chain.question.id for chain in kept})):
        print(f"{asked - having} of {asked} questions have no demonstration")
    counts = ", ".join(f"{name} {count}" for name, count in by_fault.items())
    print(f"{len(rejected)} responses refused: {counts}")
    figures = {
        "demos": len(kept), "refused": len(rejected),
        "teachers": dict(by_teacher), "faults": dict(by_fault),
    }  # fmt: skip
    outputs = [out / "demos.jsonl", out / "rejected.jsonl"]
    stage.finish(args, outputs, started, figures, engines)


def costs(questions: list[data.Question], args: argparse.Namespace) -> list[bill.Cost]:
    """What teachers, expanders and checker may be asked at most: as if every teacher had its turn
    at every question, for each chain."""
    longest = bill.LETTERS * args.max_tokens  # characters of a chain
    once = [(len(data.question_text(q)), len(q.images)) for q in questions for _ in range(args.chains)]
    prompt = len(data.SYSTEM_PROMPT)
    asked = [(prompt + letters, images) for letters, images in once]
    written = [(len(EXPAND_PROMPT) + letters + longest, 0) for letters, _ in once]
    found = [
        bill.cost(role, spec, sizes, 1, args.max_tokens, args.pixels)
        for role, specs, sizes in (
            ("teacher", args.teachers, asked), ("expander", [spec for _, spec in args.expand], written),
        )
        for spec in specs
    ]  # fmt: skip
    if args.checker:
        read = [(len(CHECK_PROMPT) + letters + longest, images) for letters, images in once]
        found.append(label_cost("checker", args.checker, read * len(args.teachers), args))
    return found


def run(args: argparse.Namespace) -> None:
    started, setup = time.time(), setup_of(args)
    told = read_review(args.review) if args.review else {}
    questions = data.read_questions(args.questions)
    question_asks(questions, Path(args.images), 1)  # images must be there before anything is asked
    if twice := [spec for spec, count in Counter(args.teachers).items() if count > 1]:
        raise data.RowError(f"--teachers: {twice[0]} is there twice; its replies would be the same")
    if strangers := [teacher for teacher, _ in args.expand if teacher not in args.teachers]:
        raise data.RowError(f"--expand: {strangers[0]} is not among the --teachers")
    writers = [spec for _, spec in args.expand]
    specs = dict.fromkeys([*args.teachers, *writers, *filter(None, [args.checker])])
    inputs = [args.questions, *filter(None, [args.review, *map(checkpoint, specs)])]
    images = data.image_files(args.images, map(vars, questions))
    if not stage.open_folder(args, inputs, SPEED, images):
        return
    bill.announce(costs(questions, args), args.images_may_leave)
    engines = [open_engine(spec, setup) for spec in args.teachers]
    expanders = {teacher: open_engine(spec, setup) for teacher, spec in args.expand}
    checker = open_engine(args.checker, setup) if args.checker else None
    kept, made = {question.id: [] for question in questions}, []
    for attempt in range(len(engines) * args.chains):  # after a failure it is the next one's turn
        for number, engine in enumerate(engines):
            mine = [
                q for i, q in enumerate(questions)
                if (i + attempt) % len(engines) == number and len(kept[q.id]) < args.chains
            ]  # fmt: skip
            chains = teach(engine, mine, attempt // len(engines), args) if mine else []
            if engine.spec in expanders:
                expand(expanders[engine.spec], chains, args)
            settle(chains, kept, told, checker, args)
            made += chains
    write_review(args, made, told)
    chosen = [chain for question in questions for chain in kept[question.id]]
    rejected = [chain.rejection() for chain in made if chain.faults]
    answering = {spec: identity(spec) for spec in specs}
    write_out(args, started, len(questions), chosen, rejected, answering)


# ---------------------------------------------------------------------------------------------------------------
# python distill.py import: chains that exist already


END = r"(?<!\b[A-Z])[.!?][\"”’)]*\s+|\n"  # of a sentence: not after the E of "E. coli"
CLAUSE = re.compile(rf"({END})|[,;:]\s+|—")  # where one ends, and whether its sentence does
# a number with its parts ("0.5", "1:06", "20%") is one word: "5" does not stand in "0.5"
WORD = re.compile(
    r"\d+(?:[.,:/]\d+)*%?|[^\W\d_]\w*|[↑↓→←<>=≤≥≠±+]|(?<!\w)[-−](?=\d)",
)
ARTICLE = re.compile(r"(?:\b(?:a|[Aa]n|[Tt]he)|^A)\s+(?=[a-z0-9])(?!and\b|or\b)")
FOLDS = [  # ours, after reading HuatuoGPT-o1's file: one spelling for what differs there
    (re.compile(r"rt"), ""),  # 24 of its 198 questions have lost every "rt": "hea", "hypeension"
    (re.compile(r"ae|oe"), "e"),  # oedema
    (re.compile(r"(?<=\w\w\w)our(?=s?$)"), "or"),  # labour
    (re.compile(r"(?<=[bt])re(?=s?$)"), "er"),  # fibre
    (re.compile(r"(?<=\w\w)is(?=e[ds]?$|ing$|ation)"), "iz"),  # immunisation
    (re.compile(r"(?<=\w\w)ies$"), "y"),
    (re.compile(r"(?<=ss|sh|ch)es$"), ""),
    (re.compile(r"(?<=\w\w[^sui])s$"), ""),
]
DENIALS = set(
    "not no non nor never cannot without than instead unlike while although though despite".split()
)
VERBS = {"is", "are", "was", "were", "be"}  # "what is not needed is X" names X
ROMAN = {numeral: str(i) for i, numeral in enumerate("I II III IV V VI VII VIII IX X".split(), 1)}
NAMELESS = (["all"], ["none"], ["both"])  # options that such a word of a text does not mean


def folded(text: str) -> list[str]:
    """The words of a text as options are looked for: without articles, possessives and plurals,
    type III as type 3. A word in capitals stays as it is: ALL is not "all"."""
    words = WORD.findall(ARTICLE.sub("", re.sub(r"['’]s\b", "", text.strip())))
    for i, word in enumerate(words):
        if word in ROMAN:
            words[i] = ROMAN[word]
        elif len(word) < 2 or not word.isupper():
            words[i] = word.casefold()
            for pattern, plain in FOLDS:
                words[i] = pattern.sub(plain, words[i])
    return words


def is_named(name: list[str], before: list[str]) -> bool:
    """Whether an option's words, found after these, name it. One sign does not, nor do two unless
    they are capitals (TB): "be" is named by "option be" and "the answer is be" only."""
    text = "".join(name)
    stated = before[-1:] in (["option"], ["answer"]) or before[-2:] == ["answer", "is"]
    return stated or len(text) > 2 or (len(text) == 2 and text.isupper())


def first_named(text: str, options: dict[str, str]) -> tuple[str | None, bool]:
    """(the letter of the option that a text names first, whether it is set aside there). Of two
    options at one place it is the longer one. None where there is none, or the two read alike."""
    said, begins = [], []  # words, and where the clause of each begins
    parts = CLAUSE.split(unicodedata.normalize("NFKC", text))
    for clause, end in zip(parts[::2], [*parts[1::2], None]):
        words = folded(clause) + ["."] * bool(end)  # which no option has: none spans two sentences
        begins += [len(said)] * len(words)
        said += words
    names = {key: folded(unicodedata.normalize("NFKC", option)) for key, option in options.items()}
    names = {key: name for key, name in names.items() if name and name not in NAMELESS}
    for i, begin in enumerate(begins):
        before = said[begin:i]
        here = [key for key, name in names.items() if said[i : i + len(name)] == name]
        here = [key for key in here if is_named(names[key], before)]
        if here:
            longest = max(len(names[key]) for key in here)
            here = [key for key in here if len(names[key]) == longest]
            marks = [word in DENIALS for word in before if word in DENIALS | VERBS]
            return here[0] if len(here) == 1 else None, bool(marks) and marks[-1]
    return None, False


def from_huatuo(record: dict, where: str) -> Chain:
    """HuatuoGPT-o1's demo_data.json: the chain is Complex_CoT, the answer the option; Response, its
    own conclusion, must agree."""
    data.need(
        record, where, question=str, options=dict, answer_idx=str, Complex_CoT=str, Response=str
    )
    item = replace(benchmarks.exam(record, where), meta={})
    question = benchmarks.question_of(item, [], "huatuo", where)
    letter, denied = first_named(record["Response"], question.options)
    fault = ""
    if letter != question.answer:
        named = f"first names {letter}, not {question.answer}" if letter else "names no option"
        fault = f"its Response {named}"
    elif denied:
        fault = f"its Response sets {letter} aside where it first names it"
    response = in_form(record["Complex_CoT"], written_answer(question))
    faults = {"conclusion": fault} if fault else {}
    notes = {"meta": {"Response": record["Response"]}}
    return Chain(question, 0, "huatuo", response, faults, notes)


def from_sharegpt(record: dict, where: str) -> Chain:
    """ShareGPT's "conversations" or OpenAI's "messages": one question, one response with <think> ... </think>. The answer is its
    <answer> block, or all that follows the thinking. Nothing says whether it is right. Another system prompt is replaced."""
    asked, response = benchmarks.exchange(record, where)
    images = benchmarks.image_list(record, where)
    text = re.sub(r"^(\s*<image>)+\s*", "", asked)
    if asked.count("<image>") != len(images) or "<image>" in text:
        raise data.RowError(f"{where}: {asked.count('<image>')} marks <image> for {len(images)} images; each must have one, in front of the text")
    match = THOUGHT.fullmatch(response)
    response = in_form(*match.groups()) if match and not data.TAGS.search(match[2]) else read_reply(response, "", {})
    said = data.answer_block(response) or response
    question = benchmarks.question_of(benchmarks.Item(text, {}, said), images, "sharegpt", where)
    return Chain(question, 0, "sharegpt", response, {}, {"checks": {"correct": None, "structure": True, "coherence": True}})


FORMATS = {  # how a record is read, and the keys it has
    "huatuo": (from_huatuo, "question, options, answer_idx, Complex_CoT, Response"),
    "sharegpt": (from_sharegpt, "conversations or messages"),
}


def read_records(path: str) -> list[tuple[str, dict]]:
    """(where, record) of a JSON array, or of JSONL."""
    benchmarks.check_file(Path(path))
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
    if not first.lstrip().startswith(b"["):
        return list(data.read_jsonl(path))
    records = benchmarks.load_rows(Path(path), "record", 1)
    return [(f"{path}: record {number}", record) for number, record in enumerate(records, 1)]


def read_chains(records: list[tuple[str, dict]], form: str) -> tuple[dict[int, Chain], dict]:
    """({number of the record, from 1: its chain}, {number: what is wrong with a record that is no
    chain of this format})."""
    chains, unread = {}, {}
    for number, (where, record) in enumerate(records, 1):
        try:
            data.need({"record": record}, where, record=dict)
            chains[number] = FORMATS[form][0](record, where)
        except data.RowError as error:
            unread[number] = str(error)
    return chains, unread


def no_chain(args: argparse.Namespace, records: list[tuple[str, dict]], said: str) -> data.RowError:
    """What to say of a file with no record that can be read; `said`: what ails the first."""
    first = records[0][1]
    has = ", ".join(first) if isinstance(first, dict) else type(first).__name__
    fit = [form for form in FORMATS if read_chains(records, form)[0]]
    advice = " or ".join(f"--format {form}" for form in fit) or "no other format"
    return data.RowError(
        f"--format {args.format}: none of the {len(records)} records of {args.file} can be read; "
        f"wanted are the keys {FORMATS[args.format][1]}, the first record has {has}; {advice} "
        f"would fit. The first: {said}"
    )


def print_refusals(rejected: list[dict]) -> None:
    """The most frequent reasons, and the first records that were refused."""
    reasons = Counter(fault for row in rejected for fault in row["faults"].values())
    for reason, count in reasons.most_common(5):
        print(f"  {count} x {reason}")
    for row in rejected[:3]:
        said = row.get("Response", row["response"])
        print(f"  record {row['number']}: {'; '.join(row['faults'].values())}")
        if said:
            print(f"    the answer is {row['answer']}; {textwrap.shorten(said, 200)}")


def import_chains(args: argparse.Namespace) -> None:
    started, setup = time.time(), setup_of(args)
    told = read_review(args.review) if args.review else {}
    records = read_records(args.file)
    if not records:
        raise data.RowError(f"{args.file}: no record in it")
    chains, unread = read_chains(records, args.format)
    specs = list(filter(None, [args.checker]))
    inputs = [args.file, *filter(None, [args.review, *map(checkpoint, specs)])]
    asked = [vars(chain.question) for chain in chains.values()] if args.checker else []
    if not stage.open_folder(args, inputs, SPEED, data.image_files(args.images, asked)):
        return
    if not chains:
        raise no_chain(args, records, unread[1])
    checker = open_engine(args.checker, setup) if args.checker else None
    for chain in chains.values():
        chain.faults |= check(chain.response, "stop", chain.question, *args.words)
    made, kept = list(chains.values()), defaultdict(list)
    settle(made, kept, told, checker, args)
    for same in kept.values():
        for sample, chain in enumerate(same):
            chain.sample = sample
    write_review(args, made, told)
    bare = {"sample": 0, "teacher": args.format, "response": ""}
    rows = {n: {"id": str(n), **bare, "faults": {"record": said}} for n, said in unread.items()}
    for number, chain in chains.items():
        if chain.faults:
            rows[number] = chain.rejection() | chain.notes.get("meta", {})
    rejected = [{"number": number} | rows[number] for number in sorted(rows)]
    good = [chain for chain in made if not chain.faults]
    write_out(args, started, 0, good, rejected, {spec: identity(spec) for spec in specs})
    print_refusals(rejected)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reasoning demonstrations: asked of teachers, or imported, and kept where they "
        "meet three criteria."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser("run", help="ask teachers for chains")
    ask.add_argument("--questions", required=True, help="questions.jsonl")
    ask.add_argument("--teachers", nargs="+", required=True, help="engine specs, asked in turn")
    ask.add_argument(
        "--expand", nargs=2, action="append", default=[], metavar=("TEACHER", "EXPANDER"),
        help="a teacher that tells a summary, and the engine that writes it out",
    )  # fmt: skip
    ask.add_argument(
        "--chains", type=flags.SAMPLES, default=1, help="chains of a question"
    )  # ours: paper silent
    ask.add_argument("--temperature", type=flags.temperature, default=1.0)  # ours: paper silent
    ask.add_argument("--max-tokens", type=flags.TOKENS, default=8192)  # ours: paper silent
    ask.set_defaults(act=run)
    ready = commands.add_parser("import", help="turn existing chains into demonstrations")
    ready.add_argument("file", help="JSON array or JSONL")
    ready.add_argument("--format", choices=list(FORMATS), required=True)
    ready.set_defaults(act=import_chains)
    for command in (ask, ready):
        command.add_argument("--out", required=True, help="folder to write")
        command.add_argument("--images", default=".", help="image root, if there are images")
        command.add_argument(
            "--checker", default="", help="engine that checks structure and plausibility"
        )
        command.add_argument("--review", default="", help="a filled-in copy of review.csv")
        command.add_argument("--seed", type=flags.SEED, default=0)
        command.add_argument(
            "--answer-form", choices=["letter-text", "text"], default="letter-text"
        )
        command.add_argument(
            "--words", type=flags.whole(0), nargs=2, default=[5, 4000],  # ours: paper silent
            metavar=("MIN", "MAX"), help="words of the shortest and the longest reasoning",
        )  # fmt: skip
        add_flags(command)
    args = parser.parse_args(argv)
    if args.words[0] > args.words[1]:
        parser.error(f"argument --words: MIN {args.words[0]} is above MAX {args.words[1]}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.act(args)


if __name__ == "__main__":
    flags.run_script(main)
