"""Reasoning demonstrations for Stage I: teachers solve the text questions, three criteria choose (paper §3.2).

    demo(q) = the first chain, teachers in round-robin order, that is  (i) right in its answer,
              (ii) well structured and organised, (iii) plausible and coherent

A teacher that shows its reasoning is taken at its word; of one that tells a summary only, another engine writes the summary
out, and the result must meet the criteria too. Stage I is text-only by design: demonstrations show *how* to reason with
knowledge the model has (images work as well, to compare). What passes is put in the paper's message format (Appendix A).

    python distill.py run --questions out/curate/text.jsonl --teachers clinic:thorough clinic:hasty --out out/distill
    python distill.py run ... --expand TEACHER EXPANDER --checker SPEC       summaries written out; an engine for (ii) and (iii)
    python distill.py run ... --review filled-in.csv                        a human overrules rules and checker
    python distill.py import chains.json --format huatuo --out out/distill  chains that exist already, after the same rules

reads questions.jsonl; writes OUT/demos.jsonl, OUT/rejected.jsonl (every refused response and why), OUT/stage.json, and
OUT/review.csv: every chain with a right answer, for a human's yes or no in a copy of it

Where we depart from the paper, or it is silent:
  1. Criterion (i) is exact, by rule: the <answer> block, or without one the last "answer is (X)". (ii) and (iii) are rules
     first (one think and one answer block, length, loops, another script, talk of a given answer), then the checker's, if
     there is one: without a readable verdict of it nothing is kept. Its prompt and the expander's are ours.
  2. One chain a question by default (its 5,000 samples are 3K + 2K questions); a teacher that fails is replaced by the next.
     With --chains k each teacher is asked up to k times, and no chain is kept twice.
  3. The answer is written as "B. text" by default (its figures end so); --answer-form text leaves the letter out.
  4. Only right answers are expanded, and must stay; without images, which gpt-oss cannot see.
  5. A human's yes keeps a chain that rules or checker refused, a no drops it; neither makes a wrong answer right.
  6. Importing is not in the paper. HuatuoGPT-o1's chains were written for open questions, and often end elsewhere than the
     option they are filed under: kept where the first option that their Response names is the answer.
"""

import argparse
import re
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import benchmarks
import data
import flags
import stage
from asking import SPEED, Ask, Engine, Sampling, add_flags, ask_all, ask_yes_no, checkpoint, identity, image_paths, prompt_ask, question_asks, read_verdict, replies_file, reply_row, setup_of
from descriptions import read_sheet, write_sheet
from engines import open_engine

LOOP = 8  # ours: words in a row that may not come three times
CHECKS = {"Logical_Structure": "structure", "Plausibility_Coherence": "coherence"}  # paper 3.2: criteria (ii) and (iii)
SHEET = ("id", "sample", "teacher", "chain", "question", "images", "reasoning", "answer", "checks", "verdict")  # a human fills in the last

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
        return {"id": self.question.id, "sample": self.sample, "teacher": self.teacher, "faults": self.faults, "response": self.response}


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


def coherence_fault(response: str, question: str) -> str | None:
    """Criterion (iii), as far as rules go: loops, script drift, talk of a given answer. None if there is none."""
    words = data.normalise(response).split()
    runs = Counter(" ".join(words[i : i + LOOP]) for i in range(len(words) - LOOP + 1))
    if runs and runs.most_common(1)[0][1] >= 3:
        return f"a loop: '{runs.most_common(1)[0][0]}' {runs.most_common(1)[0][1]} times"
    scripts, known = ({unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()} for text in (response, question))
    if strange := (scripts - known) & {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC"}:
        return f"drifts into {', '.join(sorted(strange)).lower()} script"
    if re.search(r"\b(reference|provided|given|expert's) answer (is|says|states)\b|\b(the|this|provided|given) summary (is|says|states|mentions)\b", response, re.I):
        return "speaks of an answer it was given"
    return None


def check(response: str, finish_reason: str, question: data.Question, shortest: int, longest: int) -> dict[str, str]:
    """{criterion: fault} by rule; empty if all three are met."""
    found = {"correct": None, "structure": structure_fault(response, shortest, longest), "coherence": coherence_fault(response, data.question_text(question))}
    if finish_reason != "stop":
        found["correct"] = f"the response is not finished: {finish_reason}"
    elif not data.is_correct(response, question):
        letter = data.extract_choice(response, question.options)
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
    one <answer> block after the thinking; where there is none, what data.extract_choice reads there: the last "answer is (X)".
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
    letter = None if data.TAGS.search(rest) else data.extract_choice(rest, options)
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
        chain.notes |= {"review": "yes", "checks": {"correct": True, **{name: name not in chain.faults for name in CHECKS.values()}}}
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


def write_review(path: Path, chains: list[Chain], told: dict[str, bool]) -> None:
    """The sheet, with the verdicts that are known."""
    rows = []
    for c in chains:
        verdict = {True: "yes", False: "no", None: ""}[told.get(c.key())]
        checks = "; ".join(f"{name}: {fault}" for name, fault in c.faults.items()) or "passed"
        rows.append([c.question.id, c.sample, c.teacher, c.key(), data.question_text(c.question), " ".join(c.question.images), *data.split_response(c.response), checks, verdict])
    write_sheet(path, list(SHEET), rows)


# ---------------------------------------------------------------------------------------------------------------
# python distill.py run


def make_demo(chain: Chain, form: str) -> dict:
    turn = {"role": "assistant", "content": data.join_response(data.split_response(chain.response)[0], written_answer(chain.question, form))}
    return {
        "id": chain.question.id, "sample": chain.sample, "messages": [*data.prompt_messages(chain.question), turn], "images": chain.question.images,
        "teacher": chain.teacher, "checks": {"correct": True, "structure": True, "coherence": True}, **chain.notes,
    }  # fmt: skip


def write_out(args: argparse.Namespace, started: float, asked: int, kept: list[Chain], rejected: list[dict], engines: dict[str, str]) -> None:
    """demos.jsonl, rejected.jsonl, stage.json, and the counts; `asked` is how many questions there were."""
    out = Path(args.out)
    data.write_jsonl(out / "demos.jsonl", (make_demo(chain, args.answer_form) for chain in kept))
    data.write_jsonl(out / "rejected.jsonl", rejected)
    by_teacher, by_fault = Counter(chain.teacher for chain in kept), Counter(name for row in rejected for name in row["faults"])
    print(f"{len(kept)} demonstrations: " + ", ".join(f"{teacher} {count}" for teacher, count in sorted(by_teacher.items())))
    if asked > (having := len({chain.question.id for chain in kept})):
        print(f"{asked - having} of {asked} questions have no demonstration")
    print(f"{len(rejected)} responses refused: " + ", ".join(f"{name} {count}" for name, count in by_fault.items()))
    figures = {"demos": len(kept), "refused": len(rejected), "teachers": dict(by_teacher), "faults": dict(by_fault)}
    stage.finish(args, [out / "demos.jsonl", out / "rejected.jsonl"], started, figures, engines)


def run(args: argparse.Namespace) -> None:
    started, out, setup = time.time(), Path(args.out), setup_of(args)
    told = read_review(args.review) if args.review else {}
    questions = data.read_questions(args.questions)
    question_asks(questions, Path(args.images), 1)  # every image must be there before anything is asked
    if twice := [spec for spec, count in Counter(args.teachers).items() if count > 1]:
        raise data.RowError(f"--teachers: {twice[0]} is there twice; its replies would be the same")
    if strangers := [teacher for teacher, _ in args.expand if teacher not in args.teachers]:
        raise data.RowError(f"--expand: {strangers[0]} is not among the --teachers")
    specs = dict.fromkeys([*args.teachers, *(spec for _, spec in args.expand), *filter(None, [args.checker])])
    inputs = [args.questions, *filter(None, [args.review, *map(checkpoint, specs)])]
    if not stage.open_folder(args, inputs, SPEED, data.image_files(args.images, map(vars, questions))):
        return
    engines = [open_engine(spec, setup) for spec in args.teachers]
    expanders = {teacher: open_engine(spec, setup) for teacher, spec in args.expand}
    checker = open_engine(args.checker, setup) if args.checker else None
    kept, refused, to_review = {question.id: [] for question in questions}, [], []
    for attempt in range(len(engines) * args.chains):  # whoever's turn it is first; after a failure the next teacher
        for number, engine in enumerate(engines):
            mine = [q for i, q in enumerate(questions) if (i + attempt) % len(engines) == number and len(kept[q.id]) < args.chains]
            chains = teach(engine, mine, attempt // len(engines), args) if mine else []
            if engine.spec in expanders:
                expand(expanders[engine.spec], chains, args)
            to_review += [chain for chain in chains if can_be_kept(chain)]
            for chain in chains:
                review(chain, told)
            if checker:
                check_by_engine(checker, chains, args)
            for chain in chains:
                if chain.response in [other.response for other in kept[chain.question.id]]:
                    chain.faults["duplicate"] = "the same chain is kept already"
                (refused if chain.faults else kept[chain.question.id]).append(chain)
    write_review(out / "review.csv", to_review, told)
    if unknown := told.keys() - {chain.key() for chain in to_review}:
        print(f"{args.review}: {len(unknown)} verdicts are on chains that this run did not make, or whose answer is wrong; they count for nothing")
    chosen = [chain for question in questions for chain in kept[question.id]]
    write_out(args, started, len(questions), chosen, [chain.rejection() for chain in refused], {spec: identity(spec) for spec in specs})


# ---------------------------------------------------------------------------------------------------------------
# python distill.py import: chains that exist already


def from_huatuo(record: dict, where: str) -> Chain:
    """HuatuoGPT-o1's demo_data.json: the chain is Complex_CoT, the answer the option; Response, its own conclusion, must agree."""
    data.need(record, where, question=str, options=dict, answer_idx=str, Complex_CoT=str, Response=str)
    item = replace(benchmarks.exam(record, where), meta={})
    question = benchmarks.question_of(item, [], "huatuo", where)
    said = f" {data.normalise(record['Response'])} "
    places = [(said.find(f" {data.normalise(text)} "), -len(text), letter) for letter, text in question.options.items()]  # of two at one place the longer
    named = min((place for place in places if place[0] >= 0), default=(0, 0, None))[2]
    faults = {} if named == question.answer else {"correct": f"its Response first names {named}, not {question.answer}" if named else "its Response names no option"}
    return Chain(question, 0, "huatuo", in_form(record["Complex_CoT"], written_answer(question)), faults, {"meta": {"Response": record["Response"]}})


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


FORMATS = {"huatuo": from_huatuo, "sharegpt": from_sharegpt}


def read_records(path: str) -> list[tuple[str, dict]]:
    """(where, record) of a JSON array, or of JSONL."""
    benchmarks.check_file(Path(path))
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
    if not first.lstrip().startswith(b"["):
        return list(data.read_jsonl(path))
    records = benchmarks.load_rows(Path(path), "record", 1)
    return [(f"{path}: record {number}", record) for number, record in enumerate(records, 1)]


def import_chains(args: argparse.Namespace) -> None:
    started, kept, rejected = time.time(), {}, []
    if not stage.open_folder(args, [args.file]):
        return
    samples: Counter = Counter()
    for number, (where, record) in enumerate(read_records(args.file), 1):
        try:
            data.need({"record": record}, where, record=dict)
            chain = FORMATS[args.format](record, where)
        except data.RowError as error:
            rejected.append({"id": str(number), "sample": 0, "teacher": args.format, "faults": {"record": str(error)}, "response": ""})
            continue
        chain.faults |= {name: fault for name, fault in check(chain.response, "stop", chain.question, *args.words).items() if name not in chain.faults}
        if chain.key() in kept:
            chain.faults["duplicate"] = "the same chain is kept already"
        if chain.faults:
            rejected.append(chain.rejection())
            continue
        chain.sample = samples[chain.question.id]
        samples[chain.question.id] += 1
        kept[chain.key()] = chain
    write_out(args, started, 0, list(kept.values()), rejected, {})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Reasoning demonstrations: asked of teachers, or imported, and kept where they meet three criteria.")
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser("run", help="ask teachers for chains")
    ask.add_argument("--questions", required=True, help="questions.jsonl")
    ask.add_argument("--images", default=".", help="image root, where demonstrations are to have images")
    ask.add_argument("--teachers", nargs="+", required=True, help="engine specs, asked in turn")
    ask.add_argument("--expand", nargs=2, action="append", default=[], metavar=("TEACHER", "EXPANDER"), help="a teacher that tells a summary, and the engine that writes it out")
    ask.add_argument("--checker", default="", help="engine that checks structure and plausibility")
    ask.add_argument(
        "--chains", type=flags.SAMPLES, default=1, help="chains of a question"
    )  # ours: paper silent
    ask.add_argument("--review", default="", help="a filled-in copy of review.csv")
    ask.add_argument("--temperature", type=flags.temperature, default=1.0)  # ours: paper silent
    ask.add_argument("--max-tokens", type=flags.TOKENS, default=8192)  # ours: paper silent
    ask.add_argument("--seed", type=flags.SEED, default=0)
    add_flags(ask)
    ask.set_defaults(act=run)
    ready = commands.add_parser("import", help="turn existing chains into demonstrations")
    ready.add_argument("file", help="JSON array or JSONL")
    ready.add_argument("--format", choices=list(FORMATS), required=True)
    ready.set_defaults(act=import_chains)
    for command in (ask, ready):
        command.add_argument("--out", required=True, help="folder to write")
        command.add_argument("--answer-form", choices=["letter-text", "text"], default="letter-text")
        command.add_argument(
            "--words", type=flags.whole(0), nargs=2, default=[5, 4000],  # ours: paper silent
            metavar=("MIN", "MAX"), help="words of the shortest and the longest reasoning",
        )  # fmt: skip
    args = parser.parse_args(argv)
    if args.words[0] > args.words[1]:
        parser.error(f"argument --words: MIN {args.words[0]} is above MAX {args.words[1]}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.act(args)


if __name__ == "__main__":
    flags.run_script(main)
