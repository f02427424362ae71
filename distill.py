"""Makes reasoning demonstrations for Stage I: teachers solve text questions, and three criteria
select the chains (paper §3.2).

    demo(q) = the first chain, teachers in round-robin order, that is  (i) right in its answer,
              (ii) well structured and organised, (iii) plausible and coherent

The reasoning that a teacher shows is used as it is. If a teacher gives only a summary, another
engine expands it, and the result must meet the criteria too. Stage I is text-only by design (images
work as well, to compare). A demonstration is in the paper's message format (Appendix A).

    python distill.py run --questions out/curate/text.jsonl --out out/distill \\
        --teachers clinic:thorough clinic:hasty
    python distill.py run ... --expand TEACHER EXPANDER    expand a teacher's summaries
    python distill.py import chains.json --format huatuo --out out/distill   existing chains
    ... --checker SPEC                                     an engine for (ii) and (iii)
    ... --review filled-in.csv                             a human overrules rules and checker

reads questions.jsonl, or chains; writes OUT/demos.jsonl, OUT/rejected.jsonl (with the faults),
OUT/stage.json, OUT/review.csv (every chain that a human may keep; yes or no, in a copy)

Where we depart from the paper, or it is silent:
  1. check_chain checks all three criteria by rule. The checker, if there is one, decides on (ii)
     and (iii) after that; without its readable verdict a chain is rejected. The prompts of checker
     and expander are ours.
  2. One chain a question (the paper's 5,000 samples are 3K + 2K questions), but imported chains
     are all kept if they differ.
  3. The answer is written as "B. text", as in the paper's figures, or with --answer-form text as
     "text".
  4. Only right answers are expanded, and must stay. The expander gets no image: gpt-oss reads none.
  5. A human's no drops a chain. A yes keeps one that rules or checker rejected, unless its answer
     is wrong or it is not one think block and one answer block.
  6. Importing is ours. HuatuoGPT-o1's chains answer open questions, and often do not end at the
     option given as their answer. A chain is kept if the first sentence of its Response that names
     an option names the answer alone, without a word such as "not" (37 of 198 chains). This
     compares words, not meaning: a human's yes or no overrules it too.
"""

import argparse
import re
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import answers
import benchmarks
import data
from command import flags, schema, stage
from command.sheets import read_sheet, write_sheet
from engines import bill, check_remote, inference, open_engine
from engines.inference import Request, checkpoint, image_paths, prompt_request


@dataclass
class Chain:
    """A response that may become a demonstration. faults: {criterion: why it is rejected}, empty if
    it is kept. notes: more for its row, such as who expanded or checked it. number: its record, if
    it was imported."""

    question: data.Question
    sample: int
    teacher: str
    response: str
    faults: dict[str, str]
    notes: dict = field(default_factory=dict)
    number: int = 0

    def key(self) -> str:
        """The chain's name in review.csv. A spreadsheet may read a bare hash as a number."""
        return "chain-" + data.content_hash([self.question.id, self.response])[:16]

    def can_be_kept(self) -> bool:
        """Whether a human may keep it: a right answer, one think and one answer block."""
        return "correct" not in self.faults and data.split_response(self.response) is not None

    def rejection(self) -> dict:
        """Its row of rejected.jsonl."""
        q, row = self.question, {"number": self.number} if self.number else {}
        row |= {"id": q.id, "sample": self.sample, "teacher": self.teacher}
        row |= {"question": q.question, "options": q.options, "answer": q.answer}
        row |= {"faults": self.faults, "response": self.response}
        return row | self.notes.get("meta", {})


# --------------------------------------------------------------------------------------------------
# The method: teachers in turn, expansion, three criteria


def distill(
    questions: list[data.Question], verdicts: dict[str, bool], args: argparse.Namespace
) -> tuple[dict[str, list[Chain]], list[Chain]]:
    """({question id: its kept chains}, all chains). Teacher i mod n is first asked about question
    i; after a failure the next teacher is."""
    kept, made = {question.id: [] for question in questions}, []
    count, expanders = len(args.teachers), dict(args.expand)
    for attempt in range(count):
        chains = []  # of all teachers, for the checker at once
        for number, teacher in enumerate(args.teachers):
            first = (number - attempt) % count  # of the questions whose turn it is
            turn = [question for question in questions[first::count] if not kept[question.id]]
            taught = teach(teacher, turn, args)
            if teacher in expanders:
                expand(expanders[teacher], taught, args)
            chains += taught
        select(chains, kept, verdicts, args)
        made += chains
    return kept, made


def teach(spec: str, questions: list[data.Question], args: argparse.Namespace) -> list[Chain]:
    """A teacher's chains for the paper's own prompt, in the questions' order."""
    requests, chains = inference.question_requests(questions, Path(args.images), 1), []
    for question, row in zip(questions, ask(spec, "teacher", requests, args)):
        response = read_completion(row["response"], row["reasoning"], question.options)
        faults = check_chain(response, row["finish_reason"], question, *args.words)
        chains.append(Chain(question, 0, spec, response, faults))
    return chains


def expand(spec: str, chains: list[Chain], args: argparse.Namespace) -> None:
    """Replaces each summary with a right answer by the expander's chain, and checks that. The
    expander's own reasoning, about how to write, is ignored."""
    right = [chain for chain in chains if "correct" not in chain.faults]
    summaries, requests = [], []
    for chain in right:
        summaries.append((data.split_response(chain.response) or (chain.response,))[0])
        parts = data.question_text(chain.question), summaries[-1], chain.question.written_answer()
        requests.append(prompt_request(chain.question.id, EXPAND_PROMPT % parts, []))
    for chain, summary, row in zip(right, summaries, ask(spec, "expander", requests, args)):
        match = EXPANSION.fullmatch(row["response"])
        chain.response = in_form(*match.groups()) if match else row["response"]
        chain.faults = check_chain(
            chain.response, row["finish_reason"], chain.question, *args.words
        )
        chain.notes["expander"] = spec
        parts = data.split_response(chain.response)
        if parts and len(parts[0].split()) <= len(summary.split()):
            chain.faults["expansion"] = "its reasoning is no longer than the summary"


def select(
    chains: list[Chain],
    kept: dict[str, list[Chain]],
    verdicts: dict[str, bool],
    args: argparse.Namespace,
) -> None:
    """Adds to `kept`, {question id: its chains}, the chains in which neither the rules nor a human
    nor the checker find a fault."""
    apply_verdicts(chains, verdicts)
    if args.checker:
        check_by_engine(args.checker, chains, args)
    for chain in chains:
        others = kept[chain.question.id]
        if chain.response in [other.response for other in others]:
            chain.faults["duplicate"] = "the same chain is kept already"
        if not chain.faults:
            others.append(chain)


def apply_verdicts(chains: list[Chain], verdicts: dict[str, bool]) -> None:
    """A human's verdict on a chain, if there is one, overrules the rules."""
    for chain in chains:
        verdict = verdicts.get(chain.key())
        if verdict is False:
            chain.faults["review"] = "a human says no"
        elif verdict and chain.can_be_kept():
            met = {name: name not in chain.faults for name in CHECKS.values()}
            known = chain.notes.get("checks", {"correct": True})
            chain.notes |= {"review": "yes", "checks": known | met}
            chain.faults = {}


def check_by_engine(spec: str, chains: list[Chain], args: argparse.Namespace) -> None:
    """Asks the checker about (ii) and (iii), with the images, for chains on which neither a rule
    nor a human has decided."""
    open_chains = [chain for chain in chains if not chain.faults and "review" not in chain.notes]
    if not open_chains:
        return  # no model is loaded to be asked nothing
    requests = []
    for chain in open_chains:
        prompt = CHECK_PROMPT % (data.question_text(chain.question), chain.response)
        images = image_paths(chain.question, Path(args.images))
        requests.append(prompt_request(chain.question.id, prompt, images))
    engine = open_engine(spec, inference.setup_of(args))
    completions = inference.ask_yes_no(engine, requests, list(CHECKS), "checker", args)
    engine.close()
    for chain, request in zip(open_chains, requests):
        chain.notes["checker"] = spec
        met, error = inference.read_verdict(completions[request.id], list(CHECKS))
        if error:
            chain.faults["unchecked"] = f"{spec}: {error}"
            continue
        for key, name in CHECKS.items():
            if not met[key]:
                chain.faults[name] = f"{spec} says No to {key}"


# --------------------------------------------------------------------------------------------------
# The three criteria, by rule

SCRIPTS = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC"}
GIVEN = re.compile(
    r"\b(reference|provided|given|expert's) answer (is|says|states)\b"
    r"|\b(the|this|provided|given) summary (is|says|states|mentions)\b",
    re.I,
)


def check_chain(
    response: str, finish_reason: str, question: data.Question, shortest: int, longest: int
) -> dict[str, str]:
    """{criterion: fault} by rule; empty if all three are met. shortest, longest: words of the
    reasoning."""
    faults = {}
    # (i) the final answer is right
    if finish_reason != "stop":
        faults["correct"] = f"the response is not finished: {finish_reason}"
    elif not answers.is_correct(response, question):
        letter = answers.extract_choice(response, question.options)
        wrong = f"the answer is {letter}, not {question.answer}"
        faults["correct"] = wrong if letter else "the answer is wrong, or cannot be read"
    # (ii) one block of reasoning of sound length, then one answer
    parts = data.split_response(response)
    if parts is None:
        faults["structure"] = "not one <think> block followed by one <answer> block"
    elif not shortest <= (words := len(parts[0].split())) <= longest:
        faults["structure"] = f"the reasoning has {words} words, not {shortest} to {longest}"
    elif not parts[1]:
        faults["structure"] = "the answer is empty"
    # (iii) no loop, no script that the question does not have, no talk of a given answer
    new = (scripts_of(response) - scripts_of(data.question_text(question))) & SCRIPTS
    if run := answers.loop(response):
        faults["coherence"] = f"a loop: '{run}' over and over"
    elif new:
        faults["coherence"] = f"drifts into {', '.join(sorted(new)).lower()} script"
    elif GIVEN.search(response):
        faults["coherence"] = "speaks of an answer it was given"
    return faults


def scripts_of(text: str) -> set[str]:
    return {unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()}


# --------------------------------------------------------------------------------------------------
# Requests and completions

# ours: paper silent
EXPAND_PROMPT = (
    "A clinical question was solved by an expert, who left a summary of the reasoning and an "
    "answer.\nWrite the complete reasoning process behind the summary, step by step, as the "
    "thoughts of whoever solves the question: the findings that matter, what they suggest, which "
    "alternatives there are and what speaks against each, and a check of the conclusion.\n"
    "Keep to the facts of the question and the summary, and to established medical knowledge. "
    "Never mention that there is a summary or an expert.\n"
    "Reply with the reasoning as plain text, and after it the answer, unchanged, as <answer> "
    "answer here </answer>.\n"
    "<Question> %s </Question>\n<Summary> %s </Summary>\n<Answer> %s </Answer>"
)
# paper 3.2: criteria (ii) and (iii)
CHECKS = {"Logical_Structure": "structure", "Plausibility_Coherence": "coherence"}
# ours: paper silent
CHECK_PROMPT = (
    "You check reasoning that others are to learn from. Judge the response to the question, "
    "whose final answer is correct, by two criteria:\n"
    "1. **Logical Structure**: Is the reasoning well organised, each step following from "
    "those before it, and the answer from the last?\n"
    "2. **Plausibility and Coherence**: Is it medically plausible, true to the facts of the "
    "question, and free of contradictions?\n"
    "Return your judgement as JSON and nothing else:\n"
    '{"Logical_Structure": "Yes/No", "Plausibility_Coherence": "Yes/No"}\n'
    "<Question> %s </Question>\n<Response> %s </Response>"
)

THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.S)
EXPANSION = re.compile(r"\s*(?:<think>)?(.*?)(?:</think>)?\s*<answer>(.*?)</answer>\s*", re.S)


def ask(spec: str, role: str, requests: list[Request], args: argparse.Namespace) -> list[dict]:
    """The completions as rows, in the order of the requests."""
    if not requests:
        return []  # no model is loaded to be asked nothing
    engine = open_engine(spec, inference.setup_of(args))
    sampling = inference.Sampling(args.temperature, 1.0, args.max_tokens, args.seed)
    row = lambda one: inference.completion_row(one, spec) | {"reasoning": one.reasoning}
    rows = inference.complete_all(engine, requests, sampling, role, row, args)
    engine.close()
    return [rows[request.id, k] for request in requests for k in request.samples]


def in_form(thinking: str, answer: str) -> str:
    """data.join_response for parts that may hold a tag, which the rules then find."""
    return f"<think> {thinking.strip()} </think> <answer> {answer.strip()} </answer>"


def read_completion(text: str, reasoning: str, options: dict[str, str]) -> str:
    """A teacher's completion in the paper's form, or its text as it is if that cannot be read. The
    chain is `reasoning`, if the server gave it separately, else the <think> block at the start. The
    answer is the one <answer> block after it, or without one the last "answer is (X)" there."""
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


# --------------------------------------------------------------------------------------------------
# review.csv


def read_review(path: str) -> dict[str, bool]:
    """{chain's key: kept} of a filled-in sheet, {} without one; an empty verdict is ignored. Raises
    RowError."""
    verdicts: dict[str, bool] = {}
    for number, row in read_sheet(path, ["chain", "verdict"]) if path else []:
        word, where = row["verdict"].strip().casefold(), f"{path}: row {number}: verdict"
        if word not in ("", "yes", "y", "no", "n"):
            raise data.RowError(f"{where}: {row['verdict']!r} is neither yes nor no")
        if word and verdicts.setdefault(row["chain"], word[0] == "y") != (word[0] == "y"):
            raise data.RowError(f"{where}: another row says the opposite of the same chain")
    return verdicts


def write_review(args: argparse.Namespace, chains: list[Chain], verdicts: dict[str, bool]) -> None:
    """Writes review.csv: the chains that a human may keep, with the known verdicts. A human fills
    in the last column."""
    columns = "id sample teacher chain question images reasoning answer checks verdict".split()
    words, unknown, rows = {True: "yes", False: "no", None: ""}, set(verdicts), []
    for chain in filter(Chain.can_be_kept, chains):
        question, key = chain.question, chain.key()
        checks = "; ".join(f"{name}: {fault}" for name, fault in chain.faults.items()) or "passed"
        row = [question.id, chain.sample, chain.teacher, key, data.question_text(question)]
        row += [" ".join(question.images), *data.split_response(chain.response), checks]
        rows.append([*row, words[verdicts.get(key)]])
        unknown.discard(key)
    write_sheet(Path(args.out) / "review.csv", columns, rows)
    if unknown:
        what = "chains that this run did not make, or that no verdict can keep"
        print(f"{args.review}: {len(unknown)} verdicts are on {what}; they count for nothing")


# --------------------------------------------------------------------------------------------------
# python distill.py run


def run(args: argparse.Namespace) -> None:
    started, verdicts = time.time(), read_review(args.review)
    questions = schema.read_questions(args.questions)
    for question in questions:
        image_paths(question, Path(args.images))  # before anything is asked
    if strangers := [teacher for teacher, _ in args.expand if teacher not in args.teachers]:
        raise data.RowError(f"--expand: {strangers[0]} is not among the --teachers")
    specs = [*args.teachers, *(spec for _, spec in args.expand), args.checker]
    inputs = filter(None, [args.questions, args.review, *map(checkpoint, specs)])
    images = data.image_files(args.images, map(vars, questions))
    if not stage.open_folder(args, inputs, inference.FREE, images):
        return
    bill.announce(costs(questions, args), args.images_may_leave)
    check_remote(filter(None, specs), inference.setup_of(args))
    kept, made = distill(questions, verdicts, args)
    demos = [chain for chains in kept.values() for chain in chains]
    write_out(args, started, made, demos, verdicts, specs)
    if without := sum(not chains for chains in kept.values()):
        print(f"{without} of {len(questions)} questions have no demonstration")


def costs(questions: list[data.Question], args: argparse.Namespace) -> list[bill.Cost]:
    """The most that teachers, expanders and checker may be asked: as if every teacher answered
    every question."""
    longest = bill.CHARACTERS * args.max_tokens  # characters of a chain
    sizes = [(len(data.question_text(q)), len(q.images)) for q in questions]
    asked = [(len(data.SYSTEM_PROMPT) + characters, images) for characters, images in sizes]
    expanded = [(len(EXPAND_PROMPT) + characters + longest, 0) for characters, _ in sizes]
    wanted = [("teacher", spec, asked) for spec in args.teachers]
    wanted += [("expander", spec, expanded) for _, spec in args.expand]
    found = [bill.cost(*one, 1, args.max_tokens, args.pixels) for one in wanted]
    if args.checker:
        read = [(characters + longest, images) for characters, images in sizes]
        found.append(checker_cost(read * len(args.teachers), args))
    return found


def checker_cost(sizes: list[tuple[int, int]], args: argparse.Namespace) -> bill.Cost:
    """sizes: (characters of question and chain, images) of each chain that may be checked."""
    sizes = [(len(CHECK_PROMPT) + characters, images) for characters, images in sizes]
    return inference.label_cost("checker", args.checker, sizes, args)


def make_demo(chain: Chain, form: str) -> dict:
    """A row of demos.jsonl."""
    question, (thinking, _) = chain.question, data.split_response(chain.response)
    answer = question.answer_text() if form == "text" else question.written_answer()
    response = data.join_response(thinking, answer)
    turns = [*data.prompt_messages(question), {"role": "assistant", "content": response}]
    row = {"id": question.id, "sample": chain.sample, "messages": turns}
    row |= {"images": question.images, "teacher": chain.teacher}
    return row | {"checks": {"correct": True, "structure": True, "coherence": True}} | chain.notes


def write_out(
    args: argparse.Namespace,
    started: float,
    made: list[Chain],
    kept: list[Chain],
    verdicts: dict[str, bool],
    specs: list[str],
) -> None:
    """Writes review.csv, demos.jsonl, rejected.jsonl and stage.json; prints the counts. kept: the
    demonstrations among the chains that were made."""
    write_review(args, made, verdicts)
    demos, rejected = Path(args.out) / "demos.jsonl", Path(args.out) / "rejected.jsonl"
    refused = [chain for chain in made if chain.faults]
    data.write_jsonl(demos, (make_demo(chain, args.answer_form) for chain in kept))
    data.write_jsonl(rejected, map(Chain.rejection, refused))
    teachers = Counter(chain.teacher for chain in kept)
    faults = Counter(name for chain in refused for name in chain.faults)
    shown = ", ".join(f"{teacher} {count}" for teacher, count in sorted(teachers.items()))
    print(f"{len(kept)} demonstrations: {shown}")
    shown = ", ".join(f"{name} {count}" for name, count in faults.items())
    print(f"{len(refused)} responses refused: {shown}")
    figures = {"demos": len(kept), "refused": len(refused)}
    figures |= {"teachers": dict(teachers), "faults": dict(faults)}
    engines = {spec: inference.identity(spec) for spec in specs if spec}
    stage.finish(args, [demos, rejected], started, figures, engines)


# --------------------------------------------------------------------------------------------------
# python distill.py import: chains that exist already


def import_chains(args: argparse.Namespace) -> None:
    started, verdicts = time.time(), read_review(args.review)
    made = read_chains(args.file, args.format)
    chains = [chain for chain in made if "record" not in chain.faults]
    sent = [vars(chain.question) for chain in chains] if args.checker else []
    inputs = filter(None, [args.file, args.review, checkpoint(args.checker)])
    images = data.image_files(args.images, sent)
    if not stage.open_folder(args, inputs, inference.FREE, images):
        return
    for chain in chains:
        chain.faults |= check_chain(chain.response, "stop", chain.question, *args.words)
    if args.checker:
        texts = [(data.question_text(chain.question) + chain.response, chain) for chain in chains]
        sizes = [(len(text), len(chain.question.images)) for text, chain in texts]
        bill.announce([checker_cost(sizes, args)], args.images_may_leave)
    kept: dict[str, list[Chain]] = {chain.question.id: [] for chain in chains}
    select(chains, kept, verdicts, args)
    for same in kept.values():
        for sample, chain in enumerate(same):
            chain.sample = sample
    demos = [chain for chain in chains if not chain.faults]
    write_out(args, started, made, demos, verdicts, [args.checker])


def from_huatuo(record: dict, where: str) -> Chain:
    """HuatuoGPT-o1's demo_data.json: the chain is Complex_CoT, the answer the option. Response, its
    own conclusion, must agree."""
    data.need(record, where, options=dict, answer_idx=str, Complex_CoT=str, Response=str)
    item = replace(benchmarks.READERS["huatuo"].item(record, where), meta={})
    question = benchmarks.question_of(item, [], "huatuo", where)
    fault = conclusion_fault(record["Response"], question)
    faults = {"conclusion": f"its Response {fault}"} if fault else {}
    response = in_form(record["Complex_CoT"], question.written_answer())
    notes = {"meta": {"Response": record["Response"]}}
    return Chain(question, 0, "huatuo", response, faults, notes)


def from_sharegpt(record: dict, where: str) -> Chain:
    """ShareGPT's "conversations" or OpenAI's "messages": one question, one response with <think>
    ... </think>. The answer is its <answer> block, or all after the thinking. Whether it is right
    is unknown. Another system prompt is replaced."""
    asked, response = benchmarks.exchange(record, where)
    images = benchmarks.image_list(record, where)
    text, marks = re.sub(r"^(\s*<image>)+\s*", "", asked), asked.count("<image>")
    if marks != len(images) or "<image>" in text:
        message = f"{marks} marks <image> for {len(images)} images"
        raise data.RowError(f"{where}: {message}; each must have one, in front of the text")
    match = THOUGHT.fullmatch(response)
    if match and not data.TAGS.search(match[2]):
        response = in_form(*match.groups())
    else:
        response = read_completion(response, "", {})
    answer = data.answer_block(response) or response
    question = benchmarks.question_of(benchmarks.Item(text, {}, answer), images, "sharegpt", where)
    notes = {"checks": {"correct": None, "structure": True, "coherence": True}}
    return Chain(question, 0, "sharegpt", response, {}, notes)


DENIALS = set(
    "not no non nor never cannot without than instead unlike while although though despite".split()
)


def conclusion_fault(text: str, question: data.Question) -> str | None:
    """Why a conclusion is not clearly the answer, or None: the first sentence that names an option
    must name the answer alone, and hold no word of DENIALS, nor one like "isn't"."""
    names = {letter: f" {data.normalise(option)} " for letter, option in question.options.items()}
    # ours: an option of one or two characters may stand anywhere by chance
    names = {letter: name for letter, name in names.items() if len(name) > len(" xx ")}
    for sentence in re.split(r"(?<=[.!?])\s+|\n", text):
        said, named = f" {data.normalise(sentence)} ", []
        for letter in sorted(names, key=lambda letter: -len(names[letter])):
            if names[letter] in said:
                named.append(letter)
                # so that "MRI" within "MRI of the knee" is not found
                said = said.replace(names[letter], " ... ")
        if named and named != [question.answer]:
            return f"first names {' and '.join(sorted(named))}, not {question.answer}"
        if named:
            denied = DENIALS & set(said.split())
            denied |= set(re.findall(r"\w+n['’]t\b", sentence.casefold()))
            return f"names {named[0]} beside '{min(denied)}'" if denied else None
    return "names no option"


FORMATS = {"huatuo": from_huatuo, "sharegpt": from_sharegpt}


def read_records(path: str) -> list[tuple[str, dict]]:
    """(where, record) of a JSONL file, or of a JSON array. Raises RowError."""
    if path.endswith(".jsonl"):
        return list(data.read_jsonl(path))
    records = data.read_json(path)
    data.need({"content": records}, path, content=list)
    return [(f"{path}: record {number}", record) for number, record in enumerate(records, 1)]


def read_chains(path: str, form: str) -> list[Chain]:
    """A chain for each record; one that cannot be read has the fault "record". Raises RowError if
    none can be read."""
    chains = []
    for number, (where, record) in enumerate(read_records(path), 1):
        try:
            data.need({"record": record}, where, record=dict)
            chain = FORMATS[form](record, where)
        except data.RowError as error:
            unknown = data.Question("", {}, "", id=str(number))
            chain = Chain(unknown, 0, form, "", {"record": str(error)})
        chains.append(replace(chain, number=number))
    if all("record" in chain.faults for chain in chains):
        first = f"; the first: {chains[0].faults['record']}" if chains else ""
        none = f"none of the {len(chains)} records of {path} can be read"
        raise data.RowError(f"--format {form}: {none}{first}")
    return chains


# --------------------------------------------------------------------------------------------------
# The command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    about = (
        "Reasoning demonstrations: asked of teachers, or imported; kept if they meet 3 criteria."
    )
    parser = argparse.ArgumentParser(description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("run", help="ask teachers for chains")
    asked.set_defaults(act=run)
    add = asked.add_argument
    add("--questions", required=True, help="questions.jsonl")
    add("--teachers", nargs="+", required=True, help="engine specs, asked in turn")
    pair, about = ("TEACHER", "EXPANDER"), "a teacher that gives a summary, and who expands it"
    add("--expand", nargs=2, action="append", default=[], metavar=pair, help=about)
    add("--temperature", type=flags.temperature, default=1.0)  # ours: paper silent
    add("--max-tokens", type=flags.TOKENS, default=8192)  # ours: paper silent
    ready = commands.add_parser("import", help="turn existing chains into demonstrations")
    ready.set_defaults(act=import_chains)
    ready.add_argument("file", help="JSON array or JSONL")
    ready.add_argument("--format", choices=list(FORMATS), required=True)
    for command in (asked, ready):
        add = command.add_argument
        add("--out", required=True, help="folder to write")
        add("--images", default=".", help="image root, if there are images")
        add("--checker", default="", help="engine that checks structure and plausibility")
        add("--review", default="", help="a filled-in copy of review.csv")
        add("--seed", type=flags.SEED, default=0)
        add("--answer-form", choices=["letter-text", "text"], default="letter-text")
        pair, about = ("MIN", "MAX"), "words of the shortest and the longest reasoning"
        limits = [5, 4000]  # ours: paper silent
        add("--words", type=flags.whole(0), nargs=2, default=limits, metavar=pair, help=about)
        inference.add_flags(command)
    args = parser.parse_args(argv)
    if args.words[0] > args.words[1]:
        parser.error(f"argument --words: MIN {args.words[0]} is above MAX {args.words[1]}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.act(args)


if __name__ == "__main__":
    flags.run_script(main)
