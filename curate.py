"""Turns a question bank into training questions (paper §3.1: 54K -> 5K).

    a question is kept iff                                         step        requests
      it is no benchmark question                                  leak        none
      and no baseline solves it directly                           difficulty  1 a baseline
      and recognising a pattern in its image does not answer it    type        1, up to 3
      (descriptions of its image are removed; paper §3.3)          describe    up to 3, and a human
      and every expert solves it in at least one of 4 attempts     solvable    up to 4 an expert

The steps run in this order, the cheapest first; a step without an engine drops nothing. Text
questions become demonstrations for Stage I, image questions preference pairs for Stage II. No
request is made twice.

    python curate.py --questions bank.jsonl --images images --against test.jsonl \\
        --baselines hf:base --classifier clinic:classifier \\
        --experts clinic:expert-a clinic:expert-b --editor clinic:editor --out out/curate
    ... --dry-run                                      what may it cost?

reads questions.jsonl files; writes OUT/text.jsonl and OUT/image.jsonl, OUT/rejected.jsonl (with
filter, reason and evidence), OUT/funnel.json, OUT/review.csv, OUT/stage.json

Where we depart from the paper, or it is silent:
  1. A question is dropped if *any* baseline is right in one greedy attempt. (If every one must be,
     `--drop-if all`, the paper's remaining 8 to 12 % are hard to reach.)
  2. benchmarks/decontaminate.py defines a leak, benchmarks/descriptions.py a description.
  3. The prompt for the type is ours. A question without a readable type in all attempts (three; one
     of a local engine) is dropped too.
  4. The paper removes descriptions after the experts have solved a question; we do it before, so
     that they solve the text that is trained on.
  5. The experts differ for text and image questions: --experts gemini:... text=https:... image=...
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import answers
import data
from benchmarks import decontaminate, descriptions, modalities
from command import flags, schema, stage
from engines import bill, check_remote, inference, open_engine
from engines.inference import Request, Sampling, checkpoint, image_paths, question_requests

ATTEMPTS = 4  # paper 3.1: attempts of an expert
PAPER = {"bank": (37_000, 17_000), "solvable": (3_000, 2_000)}  # paper 3.1: text, image questions
Bank = list[data.Question]


# --------------------------------------------------------------------------------------------------
# The steps: (questions left, args) -> {id: rejection}. `type` and `describe` also change questions.


def leak(questions: Bank, args: argparse.Namespace) -> dict[str, dict]:
    """Rejects benchmark questions, and repeats within the bank."""
    tests = [question for path in args.against for question in schema.read_questions(path)]
    limits = (0, 0, 0) if args.exact_leaks else ()  # (): those of decontaminate.py
    return decontaminate.find(questions, tests, Path(args.images), *limits)[0]


def difficulty(questions: Bank, args: argparse.Namespace) -> dict[str, dict]:
    """Rejects what any baseline (--drop-if all: every one) answers right."""
    rejected = {}
    for key, asked in in_turn("difficulty", questions, args.drop_if == "any", args).items():
        if asked[-1][0]:
            found = [evidence for is_right, evidence in asked if is_right]
            reason = "solved directly by " + " and ".join(one["engine"] for one in found)
            rejected[key] = rejection("difficulty", reason, found)
    return rejected


def question_type(questions: Bank, args: argparse.Namespace) -> dict[str, dict]:
    """Rejects image questions that pattern recognition answers, and those without a readable type.
    Adds the type to meta, and the modality if there was none."""
    by_id, rejected = {question.id: question for question in questions}, {}
    for demand in demands("type", questions, args):
        for key, label, evidence in ask(demand, by_id, lambda text, _: read_type(text), args):
            if not label:
                reason = f"no readable type in {demand.attempts} attempts"
                rejected[key] = rejection("type", reason, evidence)
                continue
            meta = by_id[key].meta | {"type": label["type"]}
            if modality := meta.get("modality") or label["modality"]:
                meta["modality"] = modality
            by_id[key].meta = meta
            if label["type"] == "pattern_recognition":
                evidence["why"] = label["why"]
                rejected[key] = rejection("type", "pattern recognition", evidence)
    return rejected


def describe(questions: Bank, args: argparse.Namespace) -> dict[str, dict]:
    """Replaces a text by a human's if there is one, else by the editor's if it breaks no rule, else
    marks the question for review. Rejects what waits for review, unless --keep-unreviewed."""
    by_id = {question.id: question for question in questions}
    sheet = descriptions.read_reviewed(args.reviewed) if args.reviewed else {}
    if lost := sheet.keys() - by_id.keys():
        print(f"{args.reviewed}: {len(lost)} of its questions are not here, or were rejected")
    reviewed = descriptions.reviewed_texts(sheet, by_id)
    edits = {key: (text, {"reviewed": True}) for key, text in reviewed.items()}
    others = {key: question for key, question in by_id.items() if key not in reviewed}
    if not args.editor:  # what is undecided in the sheet goes on waiting
        for key in sheet.keys() & others.keys():
            others[key].meta.setdefault("needs_review", sheet[key][1])
    for demand in demands("describe", questions, args):
        read = lambda text, _: descriptions.read_edit(text)
        for key, edit, _ in ask(demand, others, read, args):
            old, (text, removed) = by_id[key].question, edit or ("", [])
            fault = f"no readable reply in {demand.attempts} attempts"
            if edit:
                fault = descriptions.edit_fault(old, text, removed)
            if fault:
                edits[key] = old, {"needs_review": fault, "suggestion": text}
            elif text != old:
                edits[key] = text, {}
    for key, (text, marks) in edits.items():
        descriptions.rewrite(by_id[key], text, marks)
    waiting = [q for q in questions if "needs_review" in q.meta and not args.keep_unreviewed]
    reason = "waits for a human"
    return {q.id: rejection("review", reason, {"fault": q.meta["needs_review"]}) for q in waiting}


def solvable(questions: Bank, args: argparse.Namespace) -> dict[str, dict]:
    """Rejects a question unless every expert answers it right in at least one attempt."""
    named, rejected = {"stop": "wrong", "length": "cut off"}, {}
    for key, asked in in_turn("solvable", questions, False, args).items():
        is_right, evidence = asked[-1]
        if not is_right:
            ended = counted([named.get(reason, reason) for reason in evidence["ended"]])
            failed = f"{evidence['engine']} failed all {ATTEMPTS} attempts: {ended}"
            rejected[key] = rejection("solvable", failed, evidence)
    return rejected


def in_turn(
    step: str, questions: Bank, stop: bool, args: argparse.Namespace
) -> dict[str, list[tuple[bool, dict]]]:
    """{id: (whether it was right, evidence) of each engine that answered}. A right answer (stop:
    True) or a wrong one (False) decides: no other engine is asked about the question."""
    left, found = {question.id: question for question in questions}, {}
    for demand in demands(step, questions, args):
        for key, value, evidence in ask(demand, left, answers.is_correct, args):
            is_right = bool(value)  # None: the last attempt was not finished
            found.setdefault(key, []).append((is_right, evidence))
            if is_right == stop:
                del left[key]
    return found


STEPS = {  # in the order in which they run
    "leak": leak, "difficulty": difficulty, "type": question_type, "describe": describe,
    "solvable": solvable,
}  # fmt: skip


def rejection(step: str, reason: str, evidence: dict | list) -> dict:
    return {"filter": step, "reason": reason, "evidence": evidence}


def counted(words: list[str]) -> str:
    """How often each word occurs: "1 cut off, 3 wrong"."""
    return ", ".join(f"{number} {word}" for word, number in sorted(Counter(words).items()))


# --------------------------------------------------------------------------------------------------
# Requests and completions


@dataclass(frozen=True)
class Demand:
    """What a step asks of one engine: at most `attempts` completions of each request."""

    role: str
    spec: str
    requests: list[Request]
    attempts: int
    sampling: Sampling


def demands(step: str, questions: Bank, args: argparse.Namespace) -> list[Demand]:
    """What a step may ask about these questions; [] if it has no engine. Raises RowError for an
    image that is not there, or a question that no expert is for."""
    if step == "difficulty":
        role, asked = "baseline", [(spec, questions) for spec in args.baselines]
        attempts, temperature = 1, 0.0  # ours: paper silent
    elif step == "solvable":
        role, asked = "expert", experts(questions, args)
        attempts, temperature = ATTEMPTS, 1.0
    else:
        return labelling(step, questions, args)
    sampling = Sampling(temperature, 1.0, args.max_tokens, args.seed)
    requests = [(spec, question_requests(mine, Path(args.images), 1)) for spec, mine in asked]
    return [Demand(role, *one, attempts, sampling) for one in requests]


def experts(questions: Bank, args: argparse.Namespace) -> list[tuple[str, Bank]]:
    """(spec, its questions) of each expert: all of them, or only text or image questions. Raises
    RowError for a question without an expert."""
    found = []
    for word in args.experts:
        kind, _, spec = word.partition("=")
        mine = [q for q in questions if kind == ("image" if q.images else "text")]
        found.append((spec, mine) if kind in ("text", "image") else (word, questions))
    known = {question.id for _, mine in found for question in mine}
    lost = [question for question in questions if question.id not in known]
    if found and lost:
        kind = "image" if lost[0].images else "text"
        message = f"none of {' '.join(args.experts)} is for {kind} questions"
        raise data.RowError(f"--experts: {message}, such as {lost[0].id}")
    return found


def labelling(step: str, questions: Bank, args: argparse.Namespace) -> list[Demand]:
    """What `type` or `describe` asks: a label for each image question."""
    spec = {"type": args.classifier, "describe": args.editor}.get(step)
    if not spec:
        return []
    requests = []
    for question in questions:
        if question.images:
            prompt = TYPE_PROMPT % data.question_text(question)
            if step == "describe":
                prompt = descriptions.EDIT_PROMPT % question.question
            turn, images = {"role": "user", "content": prompt}, Path(args.images)
            requests.append(Request(question.id, [turn], image_paths(question, images), (0,)))
    sampling = replace(inference.LABELLING, seed=args.seed)
    return [Demand(step, spec, requests, inference.attempts_of(spec), sampling)]


def ask(
    demand: Demand, questions: dict[str, data.Question], read: Callable, args: argparse.Namespace
) -> list[tuple[str, object, dict]]:
    """(id, what `read` gives for its last completion, evidence) of each of these questions.
    read(text, question) is falsy, or raises ValueError, if there must be another attempt; so does
    an unfinished completion. The evidence says where to find the completions that decided."""

    def read_row(row: dict) -> object:
        try:
            finished = row["finish_reason"] == "stop"
            return read(row["response"], questions[row["id"]]) if finished else None
        except ValueError:
            return None

    spec, sampling = demand.spec, demand.sampling
    requests = [request for request in demand.requests if request.id in questions]
    if not requests:
        return []
    engine, role = open_engine(spec, inference.setup_of(args)), demand.role
    file = inference.completions_file(args, role, spec, sampling)
    to_row = lambda completion: inference.completion_row(completion, spec)
    rows_of = inference.retry_until_read(
        engine, requests, demand.attempts, read_row, sampling, role, to_row, args
    )
    engine.close()
    found, ends = [], []
    for key, rows in rows_of.items():
        evidence = {"engine": spec, "replies": file.name}
        evidence["samples"] = [row["sample"] for row in rows]
        evidence["ended"] = [row["finish_reason"] for row in rows]
        found.append((key, read_row(rows[-1]), evidence))
        ends += evidence["ended"]
    print(f"{role} {spec}: {len(ends)} replies, {counted(ends)}")
    return found


# ours: paper silent but for the first
TYPES = ("pattern_recognition", "knowledge_recall", "clinical_reasoning")
TYPE_PROMPT = (
    "You are given a medical exam question with its images. Which of these does answering it "
    "take?\n\n"
    "- pattern_recognition: looking is enough. Whoever recognises the finding, structure or "
    "disease in the image knows the answer.\n"
    "- knowledge_recall: a fact from memory is enough. Neither the image nor the patient's story "
    "has to be worked through.\n"
    "- clinical_reasoning: several pieces of information (history, examination, tests, image) must "
    "be put together, or a conclusion must be drawn from a finding or diagnosis that has to be "
    "worked out first.\n\n"
    "Name also the modality of the image, one of: MODALITIES.\n\n"
    "Reply with one JSON object and nothing else:\n"
    '{"type": "one of the three", "modality": "...", "why": "one sentence"}\n\n'
    "<Question> %s </Question>"
).replace("MODALITIES", ", ".join([*modalities.MODALITIES[0], *modalities.MODALITIES[1], "other"]))


def read_type(completion: str) -> dict[str, str]:
    """{"type", "modality", "why"} of a completion; the last two may be "". Raises ValueError if it
    names none of the three types."""
    found = inference.read_object(completion, ["type"])
    label = re.sub(r"[\s-]+", "_", str(found["type"]).strip().casefold())
    if label not in TYPES:
        raise ValueError(f"type is {found['type']!r}, none of {', '.join(TYPES)}")
    texts = [found.get(key) for key in ("modality", "why")]
    modality, why = (" ".join(text.split()) if isinstance(text, str) else "" for text in texts)
    return {"type": label, "modality": modality and modalities.modality(modality), "why": why}


# --------------------------------------------------------------------------------------------------
# Commands


def bank_of(args: argparse.Namespace) -> Bank:
    return data.draw(decontaminate.read_bank(args.questions), args.limit)


def run(args: argparse.Namespace) -> None:
    """Runs the steps, each on the questions that the one before has left."""
    started, bank = time.time(), bank_of(args)
    specs = list(dict.fromkeys(demand.spec for demand in all_demands(bank, args)))
    if args.reviewed:
        descriptions.read_reviewed(args.reviewed)  # its faults stop the command at once
    if args.dry_run:
        leaked = leak(bank, args)
        rest = [question for question in bank if question.id not in leaked]
        return bill.announce(costs(rest, args), may_leave=True)
    if not (Path(args.out) / "stage.json").exists():  # a finished folder asks nothing
        bill.announce(costs(bank, args), args.images_may_leave)
        check_remote(specs, inference.setup_of(args))
    inputs = [*args.questions, *args.against, args.reviewed, *map(checkpoint, specs)]
    images = data.image_files(args.images, map(vars, bank))
    if not stage.open_folder(args, filter(None, inputs), inference.FREE, images):
        return
    left, rejected, after = bank, {}, {"bank": bank}
    for step, run_step in STEPS.items():
        rejected |= run_step(left, args)
        left = after[step] = [question for question in left if question.id not in rejected]
    outputs, figures = write_out(args, bank, after, rejected)
    engines = {spec: inference.identity(spec) for spec in specs}
    stage.finish(args, outputs, started, figures, engines)


def all_demands(bank: Bank, args: argparse.Namespace) -> list[Demand]:
    return [demand for step in STEPS for demand in demands(step, bank, args)]


def costs(bank: Bank, args: argparse.Namespace) -> list[bill.Cost]:
    """The most that the steps may ask: if no question is dropped and all attempts are needed."""
    found = []
    for one in all_demands(bank, args):
        sizes, longest = bill.sizes(one.requests), one.sampling.max_tokens
        found.append(bill.cost(one.role, one.spec, sizes, one.attempts, longest, args.pixels))
    return found


def write_out(
    args: argparse.Namespace, bank: Bank, after: dict[str, Bank], rejected: dict[str, dict]
) -> tuple[list[Path], dict[str, int]]:
    """Writes what was kept and rejected, the funnel, and the sheet to review. Returns the outputs,
    without the sheet that a human may change, and the counts."""
    out, left = Path(args.out), after["solvable"]
    parts = {"text.jsonl": [q.to_row() for q in left if not q.images]}
    parts["image.jsonl"] = [q.to_row() for q in left if q.images]
    dropped = [question for question in bank if question.id in rejected]
    parts["rejected.jsonl"] = [q.to_row() | rejected[q.id] for q in dropped]
    for name, rows in parts.items():
        data.write_jsonl(out / name, rows)
    held = [q for q in dropped if rejected[q.id]["filter"] == "review"]
    described = after["describe"] + held
    waiting = [question for question in described if "needs_review" in question.meta]
    funnel = make_funnel(args, after, bool(waiting))
    data.write_json(out / "funnel.json", funnel)
    print_funnel(funnel)
    reasons = [(row["filter"], row["reason"].partition(": ")[0]) for row in rejected.values()]
    names = [step if step == "leak" else f"{step}: {reason}" for step, reason in reasons]
    figures = {"kept": len(left), **Counter(names)}
    figures["descriptions removed"] = sum("original" in q.meta for q in described)
    figures["to review"] = descriptions.write_review(out / "review.csv", waiting)
    print("\n".join(f"  {value:>7} {name}" for name, value in figures.items()))
    return [out / name for name in [*parts, "funnel.json"]], figures


# --------------------------------------------------------------------------------------------------
# The funnel


def make_funnel(args: argparse.Namespace, after: dict[str, Bank], waiting: bool) -> list[dict]:
    """A row for each step: how many questions it left, by modality, and whether it was not run."""
    given = {"leak": args.against, "difficulty": args.baselines, "type": args.classifier}
    given |= {"describe": args.editor or args.reviewed or waiting, "solvable": args.experts}
    funnel = []
    for name, questions in after.items():
        kinds = Counter(map(modality_of, questions))
        counts = {"text": kinds["text"], "image": kinds.total() - kinds["text"]}
        idle = {} if given.get(name, True) else {"not_run": True}
        funnel.append({"filter": name, **counts, "modality": dict(sorted(kinds.items())), **idle})
    return funnel


def modality_of(question: data.Question) -> str:
    if not question.images:
        return "text"
    named = question.meta.get("modality")
    return modalities.modality(str(named)) if named else "unknown"


def print_funnel(funnel: list[dict]) -> None:
    """Prints the questions left after each step, with the paper's, and the modalities. Without
    benchmarks `leak` still drops repeats."""
    print("questions left after    text   image    paper: text   image")
    for row in funnel:
        note = " (repeats only)" if row["filter"] == "leak" else " (not run)"
        name = row["filter"] + (note if "not_run" in row else "")
        text, image = [f"{number:,}" for number in PAPER.get(row["filter"], ())] or ["", ""]
        kinds = ", ".join(f"{kind} {n}" for kind, n in row["modality"].items() if kind != "text")
        left = f"{name:<18} {row['text']:>7} {row['image']:>7}"
        print(f"  {left} {text:>14} {image:>7}   {kinds}")


# --------------------------------------------------------------------------------------------------
# The command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Filter a question bank into training questions.")
    add = parser.add_argument
    add("--questions", nargs="+", required=True, help="questions.jsonl files")
    add("--images", default=".", help="image root")
    about = "so many text and so many image questions only; 0: all"
    add("--limit", type=flags.whole(0), default=0, help=about)
    add("--out", required=True, help="folder to write")
    add("--against", nargs="+", default=[], help="benchmark questions that must not leak")
    about = "drop only what is the same question or image, not what is similar"
    add("--exact-leaks", action="store_true", help=about)
    about = "engines that must not solve a question directly"
    add("--baselines", nargs="+", default=[], help=about)
    about = "whether one baseline that solves a question drops it, or only all together"
    add("--drop-if", choices=["any", "all"], default="any", help=about)
    add("--classifier", default="", help="engine that tells the type of image questions")
    add("--editor", default="", help="engine that takes image descriptions out of questions")
    about = "CSV with columns id and question: a human's texts, which go before the engine's"
    add("--reviewed", default="", help=about)
    about = "let in the questions whose description nobody removed; else they wait in review.csv"
    add("--keep-unreviewed", action="store_true", help=about)
    about = "engines that must each solve a question once; text=SPEC, image=SPEC: only those"
    add("--experts", nargs="+", default=[], help=about)
    about = "of a baseline's or an expert's answer"
    add("--max-tokens", type=flags.TOKENS, default=8192, help=about)  # ours: paper silent
    about = "only tell what may be asked at most: all attempts needed, nothing dropped but leaks"
    add("--dry-run", action="store_true", help=about)
    add("--seed", type=flags.SEED, default=0)
    inference.add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    run(parse(argv))


if __name__ == "__main__":
    flags.run_script(main)
