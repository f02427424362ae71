"""Turns a question bank into training questions (paper §3.1: 54K -> 5K).

    a question is kept iff                                         step        requests
      it is no benchmark question                                  leak        none
      and no baseline solves it directly                           difficulty  1 a baseline
      and recognising a pattern in its image does not answer it    type        1
      (descriptions of its image are removed; paper §3.3)          describe    1, and a human
      and every expert solves it in at least one of 4 attempts     solvable    up to 4 an expert

Each step is a command; `all` runs them in this order, the cheapest first. Text questions become
demonstrations for Stage I, image questions preference pairs for Stage II. A rejected question is
kept with its filter, the reason and the evidence. No request is made twice.

    python curate.py add medqa-train train.jsonl --images images --out bank.jsonl
    python curate.py all --questions bank.jsonl --images images --against test.jsonl \\
        --baselines hf:base --classifier clinic:classifier \\
        --experts clinic:expert-a clinic:expert-b --editor clinic:editor --out out/curate
    ... --dry-run                                      what may it cost?

reads questions.jsonl files; writes OUT/text.jsonl and OUT/image.jsonl (a single step:
OUT/questions.jsonl), OUT/rejected.jsonl, OUT/funnel.json and .png, OUT/review.csv, OUT/stage.json

Where we depart from the paper, or it is silent:
  1. A question is dropped if *any* baseline is right in one greedy attempt. (If every one must be,
     `difficulty --drop-if all`, the paper's remaining 8 to 12 % are hard to reach.)
  2. benchmarks/decontaminate.py defines a leak, benchmarks/descriptions.py a description.
  3. The prompt for the type is ours. Three attempts without a readable type drop a question too.
  4. The paper removes descriptions after the experts have solved a question; we do it before, so
     that they solve the text that is trained on.
  5. Its experts differ for text and image questions: --experts gemini:... text=https:...
     image=https:...
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import answers
import data
from benchmarks import decontaminate, descriptions
from command import flags, schema, stage
from engines import Replicas, bill, inference, open_engine
from engines.inference import Request, Sampling, checkpoint, image_paths, question_requests

ATTEMPTS = 4  # paper 3.1: attempts of an expert
DIRECT = 1  # ours: paper silent; attempts of a baseline
PAPER = {"bank": (37_000, 17_000), "solvable": (3_000, 2_000)}  # paper 3.1: text, image questions
Bank = list[data.Question]


# --------------------------------------------------------------------------------------------------
# The steps: (questions left, args) -> {id: rejection}. `type` and `describe` also change questions.


def leak(questions: Bank, args: argparse.Namespace) -> dict[str, dict]:
    """Rejects benchmark questions, and repeats within the bank."""
    benchmarks = [question for path in args.against for question in schema.read_questions(path)]
    ngram, jaccard, distance = args.limits
    root = Path(args.images)
    return decontaminate.find(questions, benchmarks, root, int(ngram), jaccard, int(distance))[0]


def difficulty(questions: Bank, args: argparse.Namespace) -> dict[str, dict]:
    """Rejects what any baseline (--drop-if all: every one) answers right. A baseline is asked only
    about questions still undecided."""
    undecided = {question.id: question for question in questions}
    evidence: dict[str, list] = {question.id: [] for question in questions}
    wanted = demands("difficulty", questions, args)
    for demand in wanted:
        asked = completions(demand, undecided, answers.is_correct, args)
        solved = {key: rows for key, rows, is_right in asked if is_right}
        for key, rows in solved.items():
            evidence[key].append(demand.evidence(rows, args))
        keep = solved.keys() if args.drop_if == "all" else undecided.keys() - solved.keys()
        undecided = {key: question for key, question in undecided.items() if key in keep}
    rejected = {}
    for key, found in evidence.items():
        if found and (args.drop_if == "any" or len(found) == len(wanted)):
            reason = "solved directly by " + " and ".join(one["engine"] for one in found)
            rejected[key] = rejection("difficulty", reason, found)
    return rejected


def question_type(questions: Bank, args: argparse.Namespace) -> dict[str, dict]:
    """Rejects image questions that pattern recognition answers, and those without a readable type.
    Adds the type to meta, and the modality if there was none."""
    by_id, rejected = {question.id: question for question in questions}, {}
    for demand in demands("type", questions, args):
        for key, rows, label in completions(demand, by_id, lambda text, _: read_type(text), args):
            evidence = demand.evidence(rows, args)
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


def solvable(questions: Bank, args: argparse.Namespace) -> dict[str, dict]:
    """Rejects a question unless every expert answers it right in at least one attempt."""
    left, rejected = {question.id: question for question in questions}, {}
    for demand in demands("solvable", questions, args):
        for key, rows, is_right in completions(demand, left, answers.is_correct, args):
            if not is_right:
                del left[key]
                ended = [ENDED.get(row["finish_reason"], row["finish_reason"]) for row in rows]
                failed = f"{demand.spec} failed all {demand.attempts} attempts"
                evidence = demand.evidence(rows, args)
                rejected[key] = rejection("solvable", f"{failed}: {counted(ended)}", evidence)
    return rejected


def describe(questions: Bank, args: argparse.Namespace) -> dict[str, dict]:
    """Replaces a text by a human's if there is one, else by the editor's if it breaks no rule, else
    marks the question for review. Rejects what waits for review, unless --keep-unreviewed."""
    by_id = {question.id: question for question in questions}
    sheet = descriptions.read_reviewed(args.reviewed) if args.reviewed else {}
    reviewed = descriptions.reviewed_texts(sheet, by_id)
    if untouched := len(sheet) - len(reviewed):
        advice = "correct the question, or empty the fault where it may stay"
        print(f"{args.reviewed}: {untouched} rows are as they were, and go on waiting; {advice}")
    if lost := sorted(reviewed.keys() - by_id.keys()):
        said = f"{len(lost)} of its questions are not here, or were rejected"
        print(f"{args.reviewed}: {said}: {', '.join(lost[:5])}")
    for key in reviewed.keys() & by_id.keys():
        rewrite(by_id[key], reviewed[key], {"reviewed": True})
    others = {key: question for key, question in by_id.items() if key not in reviewed}
    for demand in demands("describe", questions, args):
        edits = completions(demand, others, lambda text, _: descriptions.read_edit(text), args)
        for key, _, edit in edits:
            question, (text, removed) = by_id[key], edit or ("", [])
            fault = f"no readable reply in {demand.attempts} attempts"
            if edit:
                fault = descriptions.edit_fault(question.question, text, removed)
            if fault:
                rewrite(question, question.question, {"needs_review": fault, "suggestion": text})
            elif text != question.question:
                rewrite(question, text, {})
    waiting = [q for q in questions if "needs_review" in q.meta and not args.keep_unreviewed]
    reason = "waits for a human"
    return {q.id: rejection("review", reason, {"fault": q.meta["needs_review"]}) for q in waiting}


# in the order in which `all` runs them
STEPS = {
    "leak": leak, "difficulty": difficulty, "type": question_type, "describe": describe,
    "solvable": solvable,
}  # fmt: skip
ENDED = {"stop": "wrong", "length": "cut off"}  # finish reason of a failed attempt: how it is told


def rejection(step: str, reason: str, evidence: dict | list) -> dict:
    return {"filter": step, "reason": reason, "evidence": evidence}


def rewrite(question: data.Question, text: str, marks: dict) -> None:
    """Changes a question's text in place; meta keeps the first text, and the marks."""
    changed = descriptions.edited(question, text, marks)
    question.question, question.meta = changed.question, changed.meta


def counted(words: Iterable[str]) -> str:
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

    def file(self, args: argparse.Namespace) -> Path:
        """Where its completions are kept."""
        return inference.completions_file(args, self.role, self.spec, self.sampling)

    def evidence(self, rows: list[dict], args: argparse.Namespace) -> dict:
        """Where to find the completions that decided, and how each of them ended."""
        return {
            "engine": self.spec,
            "replies": self.file(args).name,
            "samples": [row["sample"] for row in rows],
            "ended": [row["finish_reason"] for row in rows],
        }


def demands(step: str, questions: Bank, args: argparse.Namespace) -> list[Demand]:
    """What a step may ask about these questions; [] if it has no engine. Raises RowError for an
    image that is not there, or a question that no expert is for."""
    root, found = Path(args.images), []
    if step == "difficulty":
        # one attempt is greedy; several must be sampled, to differ
        temperature = 0.0 if args.direct_attempts == 1 else 1.0
        sampling = Sampling(temperature, 1.0, args.max_tokens, args.seed)
        for spec in args.baselines:
            requests = question_requests(questions, root, 1)
            found.append(Demand("baseline", spec, requests, args.direct_attempts, sampling))
    elif step == "solvable":
        sampling = Sampling(1.0, 1.0, args.max_tokens, args.seed)
        for spec, mine in experts(questions, args):
            requests = question_requests(mine, root, 1)
            found.append(Demand("expert", spec, requests, args.expert_attempts, sampling))
    elif step == "type" and args.classifier:
        prompts = [(q, TYPE_PROMPT % data.question_text(q)) for q in questions if q.images]
        found.append(labelling("type", args.classifier, prompts, args))
    elif step == "describe" and args.editor:
        prompts = [(q, descriptions.EDIT_PROMPT % q.question) for q in questions if q.images]
        found.append(labelling("describe", args.editor, prompts, args))
    return found


def experts(questions: Bank, args: argparse.Namespace) -> list[tuple[str, list]]:
    """(spec, its questions) of each expert: all of them, or only text or image questions. Raises
    RowError for a question without an expert."""
    texts, images = [q for q in questions if not q.images], [q for q in questions if q.images]
    of_kind = {None: questions, "text": texts, "image": images}
    named = [re.fullmatch(r"(?:(text|image)=)?(.*)", one, re.S).groups() for one in args.experts]
    for kind in ("text", "image"):
        if named and of_kind[kind] and not {kind, None} & {wanted for wanted, _ in named}:
            said = f"none of {' '.join(args.experts)} is for {kind} questions"
            raise data.RowError(f"--experts: {said}, such as {of_kind[kind][0].id}")
    return [(spec, of_kind[kind]) for kind, spec in named]


def labelling(role: str, spec: str, prompts: list, args: argparse.Namespace) -> Demand:
    """prompts: (question, prompt about it) of each request; its images are sent too."""
    requests = []
    for question, prompt in prompts:
        images, turn = image_paths(question, Path(args.images)), {"role": "user", "content": prompt}
        requests.append(Request(question.id, [turn], images, (0,)))
    sampling = replace(inference.LABELLING, seed=args.seed)
    return Demand(role, spec, requests, inference.attempts_of(spec), sampling)


def completions(
    demand: Demand, questions: dict[str, data.Question], read: Callable, args: argparse.Namespace
) -> list[tuple[str, list[dict], object]]:
    """(id, its completions as rows, what `read` gives for the last one) of each of these questions.
    read(text, question) is falsy, or raises ValueError, if there must be another attempt; so does
    an unfinished completion."""

    def read_row(row: dict) -> object:
        try:
            finished = row["finish_reason"] == "stop"
            return read(row["response"], questions[row["id"]]) if finished else None
        except ValueError:
            return None

    requests = [request for request in demand.requests if request.id in questions]
    if not requests:
        return []
    engine = open_engine(demand.spec, inference.setup_of(args))
    title = f"{demand.role} {demand.spec}"
    to_row = lambda completion: inference.completion_row(completion, demand.spec)
    sampling, file, attempts = demand.sampling, demand.file(args), demand.attempts
    found = inference.retry_until_read(
        engine, requests, attempts, read_row, sampling, file, to_row, title
    )
    if isinstance(engine, Replicas):
        engine.close()  # the next engine needs the GPUs
    ended = [row["finish_reason"] for rows in found.values() for row in rows]
    print(f"{title}: {len(ended)} replies, {counted(ended)}")
    return [(key, rows, read_row(rows[-1])) for key, rows in found.items()]


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
).replace("MODALITIES", ", ".join([*data.MODALITIES[0], *data.MODALITIES[1], "other"]))


def read_type(completion: str) -> dict[str, str]:
    """{"type", "modality", "why"} of a completion; the last two may be "". Raises ValueError if it
    names none of the three types."""
    found = inference.read_object(completion, ["type"])
    label = re.sub(r"[\s-]+", "_", str(found["type"]).strip().casefold())
    if label not in TYPES:
        raise ValueError(f"type is {found['type']!r}, none of {', '.join(TYPES)}")
    texts = [found.get(key) for key in ("modality", "why")]
    modality, why = (" ".join(text.split()) if isinstance(text, str) else "" for text in texts)
    return {"type": label, "modality": modality and data.modality(modality), "why": why}


# --------------------------------------------------------------------------------------------------
# Commands


def add(args: argparse.Namespace) -> None:
    """Adds files of a known format to a bank. A question that is there already is left out."""
    import benchmarks

    if args.name not in benchmarks.READERS:
        known = ", ".join(sorted(benchmarks.READERS))
        raise data.RowError(f"{args.name}: no such reader; known are {known}")
    if Path(args.out).resolve() in [Path(path).resolve() for path in args.paths]:
        raise data.RowError(f"--out {args.out}: is read here; name another file")
    args.out = Path(args.out).resolve()  # a link to the bank stays a link
    lock, root = stage.hold(Path(f"{args.out}.lock"), f"--out {args.out}"), Path(args.images)
    known = schema.read_questions(args.out) if args.out.exists() else []
    bank = {question.id: question for question in known}
    for path in args.paths:
        before, repeats = len(bank), []
        for question in benchmarks.read(args.name, path, root):
            image_paths(question, root)
            first = bank.setdefault(question.id, question)
            if replace(question, source=first.source, meta=first.meta) != first:
                said = f"id {question.id!r} stands for another question in {args.out}"
                raise data.RowError(f"{path}: {said}; give one of them another id")
            if first is not question:
                repeats.append(f"{question.id} (from {first.source or 'an unnamed source'})")
        shown = ", ".join(repeats[:5]) + " ..." * (len(repeats) > 5)
        left_out = f", {len(repeats)} left out, being there already: {shown}" if repeats else ""
        print(f"{path}: {len(bank) - before} questions added{left_out}")
    data.write_jsonl(args.out, (question.to_row() for question in bank.values()))
    images = sum(bool(question.images) for question in bank.values())
    print(f"{args.out}: {len(bank) - images} text questions, {images} image questions")
    lock.close()


def bank_of(args: argparse.Namespace) -> Bank:
    return data.some(decontaminate.read_bank(args.questions), args.limit)


def run(args: argparse.Namespace) -> None:
    """Runs the steps of a command, each on the questions that the one before has left."""
    started, bank = time.time(), bank_of(args)
    specs = check(bank, args)
    if args.dry_run:
        leaked = leak(bank, args) if "leak" in args.steps else {}
        rest = [question for question in bank if question.id not in leaked]
        return bill.announce(costs(rest, args), may_leave=True)
    if not (Path(args.out) / "stage.json").exists():  # a finished folder asks nothing
        bill.announce(costs(bank, args), args.images_may_leave)
        try_engines(specs, args)
    inputs = [*args.questions, *args.against, args.reviewed, *map(checkpoint, specs)]
    images = data.image_files(args.images, map(vars, bank))
    if not stage.open_folder(args, filter(None, inputs), inference.SPEED, images):
        return
    left, rejected, after = bank, {}, {"bank" if len(args.steps) > 1 else "given": bank}
    for step in args.steps:
        rejected |= STEPS[step](left, args)
        left = after[step] = [question for question in left if question.id not in rejected]
    outputs, figures = write_out(args, bank, after, rejected)
    engines = {spec: inference.identity(spec) for spec in specs}
    stage.finish(args, outputs, started, figures, engines)


def check(bank: Bank, args: argparse.Namespace) -> list[str]:
    """The specs of all engines. Raises RowError for what would stop a late step, before the first
    one asks anything."""
    for question in bank:
        image_paths(question, Path(args.images))
    if args.reviewed:
        descriptions.read_reviewed(args.reviewed)
    for flag, specs in (("--baselines", args.baselines), ("--experts", args.experts)):
        if twice := [spec for spec, count in Counter(specs).items() if count > 1]:
            raise data.RowError(f"{flag}: {twice[0]} is there twice; its replies would be the same")
    wanted = [demand.spec for step in args.steps for demand in demands(step, bank, args)]
    return list(dict.fromkeys(wanted))


def try_engines(specs: list[str], args: argparse.Namespace) -> None:
    """Raises RowError or Unavailable for an engine that cannot be opened, such as one without a
    key. A model is loaded only when its step begins."""
    for spec in sorted(specs):
        if not (folder := checkpoint(spec)):
            open_engine(spec, inference.setup_of(args))
        elif not (Path(folder) / "config.json").is_file():
            raise data.RowError(f"{spec}: {folder} is no model's folder: it has no config.json")


def costs(bank: Bank, args: argparse.Namespace) -> list[bill.Cost]:
    """The most that the steps may ask: if no question is dropped and all attempts are needed."""
    found = []
    for one in (demand for step in args.steps for demand in demands(step, bank, args)):
        sizes, longest = bill.sizes(one.requests), one.sampling.max_tokens
        found.append(bill.cost(one.role, one.spec, sizes, one.attempts, longest, args.pixels))
    return found


def write_out(
    args: argparse.Namespace, bank: Bank, after: dict[str, Bank], rejected: dict[str, dict]
) -> tuple[list[Path], dict[str, int]]:
    """Writes what was kept and rejected, the funnel, and the sheet to review. Returns the outputs,
    without the sheet that a human may change, and the counts."""
    out, left = Path(args.out), list(after.values())[-1]
    parts = {"questions.jsonl": left}
    if len(args.steps) > 1:
        parts = {"text.jsonl": [q for q in left if not q.images]}
        parts["image.jsonl"] = [q for q in left if q.images]
    for name, questions in parts.items():
        data.write_jsonl(out / name, (question.to_row() for question in questions))
    rows = [question.to_row() | rejected.get(question.id, {}) for question in bank]
    data.write_jsonl(out / "rejected.jsonl", (row for row in rows if row["id"] in rejected))
    held = [q for q in bank if rejected.get(q.id, {}).get("filter") == "review"]
    described = after.get("describe", []) + held
    waiting = [question for question in described if "needs_review" in question.meta]
    funnel = make_funnel(args, after, bool(waiting))
    data.write_json(out / "funnel.json", funnel)
    print_funnel(funnel)
    plot_funnel(funnel, out / "funnel.png")
    reasons = [(row["filter"], row["reason"].partition(": ")[0]) for row in rejected.values()]
    names = [step if step == "leak" else f"{step}: {reason}" for step, reason in reasons]
    figures = {"kept": len(left), **Counter(names)}
    if "describe" in args.steps:
        figures["descriptions removed"] = sum("original" in q.meta for q in described)
        figures["to review"] = descriptions.write_review(out / "review.csv", waiting)
    print("\n".join(f"  {value:>7} {name}" for name, value in figures.items()))
    names = [*parts, "rejected.jsonl", "funnel.json", "funnel.png"]
    return [out / name for name in names], figures


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
    return data.modality(str(named)) if named else "unknown"


def label(row: dict) -> str:
    """A step's name. Without benchmarks `leak` still drops repeats."""
    note = " (repeats only)" if row["filter"] == "leak" else " (not run)"
    return row["filter"] + note * ("not_run" in row)


def print_funnel(funnel: list[dict]) -> None:
    """Prints the questions left after each step, with the paper's, and the modalities."""
    print("questions left after    text   image    paper: text   image")
    for row in funnel:
        paper = " " * 22
        if row["filter"] in PAPER:
            paper = "{:>14,} {:>7,}".format(*PAPER[row["filter"]])
        kinds = ", ".join(f"{name} {n}" for name, n in row["modality"].items() if name != "text")
        print(f"  {label(row):<18} {row['text']:>7} {row['image']:>7} {paper}   {kinds}")


def plot_funnel(funnel: list[dict], path: Path) -> None:
    """Left: text and image questions after each step. Right: image questions of each modality in
    the bank and at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["axes.titlesize"] = 10
    names = [name for name in funnel[0]["modality"] if name != "text"]
    size = (13, max(4.0, 1.5 + 0.35 * len(names)))
    layout = {"constrained_layout": True, "width_ratios": [3, 2]}
    figure, (ax, by) = plt.subplots(1, 2, figsize=size, **layout)
    light, dark, edge = "#d0d0d0", "#505050", {"edgecolor": "black", "lw": 0.5}
    for shift, kind, shade, hatch in ((-0.2, "text", light, "//"), (0.2, "image", dark, None)):
        counts = [row[kind] for row in funnel]
        places = [x + shift for x in range(len(funnel))]
        bars = ax.bar(places, counts, 0.38, color=shade, hatch=hatch, **edge)
        shares = [f"{count:,}\n{count / max(1, counts[0]):.0%}" for count in counts]
        ax.bar_label(bars, shares, fontsize=8, padding=2)
    paper = {name: "\npaper: {:,} text\n{:,} image".format(*pair) for name, pair in PAPER.items()}
    labels = [label(row) + paper.get(row["filter"], "") for row in funnel]
    title = "questions left after each filter (hatched: text, dark: image)"
    ax.set(title=title, ylabel="questions", xticks=range(len(funnel)), xticklabels=labels)
    ax.margins(y=0.15)
    for shift, row, shade in ((-0.2, funnel[0], light), (0.2, funnel[-1], dark)):
        counts = [row["modality"].get(name, 0) for name in names]
        places = [y + shift for y in range(len(names))]
        bars = by.barh(places, counts, 0.38, color=shade, **edge)
        by.bar_label(bars, [f"{count:,}" for count in counts], fontsize=8, padding=2)
    title = f"by modality (light: {funnel[0]['filter']}, dark: after {funnel[-1]['filter']})"
    by.set(title=title, xlabel="image questions")
    # an engine may give a name with a dollar sign
    by.set_yticks(range(len(names)), names, parse_math=False)
    by.invert_yaxis()
    by.margins(x=0.12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------
# The command line

HELPS = {
    "leak": "drop benchmark questions and repeats",
    "difficulty": "drop what baseline models solve directly",
    "type": "drop image questions that are pattern recognition",
    "solvable": "drop what an expert never solves",
    "describe": "take image descriptions out of image questions",
    "all": "all of them, in this order: " + ", ".join(STEPS),
}
SOURCES = (  # step, flag, number of values, help
    ("leak", "--against", "+", "benchmark questions that must not leak"),
    ("difficulty", "--baselines", "+", "engines that must not solve a question directly"),
    ("type", "--classifier", None, "engine that tells the type of image questions"),
    ("describe", "--editor", None, "engine that takes image descriptions out of questions"),
    ("solvable", "--experts", "+", "engines that must each solve a question once; "
     "text=SPEC, image=SPEC: only such questions"),
)  # fmt: skip
LIMITS = [decontaminate.NGRAM, decontaminate.JACCARD, decontaminate.DISTANCE]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Filter a question bank into training questions.")
    commands = parser.add_subparsers(dest="command", required=True)
    bank = commands.add_parser("add", help="read files of a known format into a bank")
    bank.add_argument("name", help="of the format, as `python -m benchmarks` calls it")
    bank.add_argument("paths", nargs="+", help="files or folders of that format")
    bank.add_argument("--images", default=".", help="image root")
    bank.add_argument("--out", required=True, help="the bank: a questions.jsonl, which is added to")
    bank.set_defaults(run=add)
    for name, said in HELPS.items():
        add_step(commands.add_parser(name, help=said), name)
    args = parser.parse_args(argv)
    if "limits" in args:
        ngram, jaccard, distance = args.limits
        if ngram % 1 or jaccard > 1 or distance not in range(decontaminate.BITS + 1):
            bits = f"DISTANCE a whole number of bits, at most {decontaminate.BITS}"
            said = f"NGRAM must be a whole number of words, JACCARD at most 1, {bits}"
            parser.error(f"argument --limits: {said}")
    return args


def add_step(parser: argparse.ArgumentParser, name: str) -> None:
    """The flags of a step, or of `all`. A step alone needs its engines."""
    add, one = parser.add_argument, name != "all"
    parser.set_defaults(run=run, steps=[name] if one else list(STEPS), drop_if="any")
    parser.set_defaults(direct_attempts=DIRECT, expert_attempts=ATTEMPTS)
    parser.set_defaults(against=[], baselines=[], classifier="", experts=[], editor="", reviewed="")
    parser.set_defaults(keep_unreviewed=False, dry_run=False, images_may_leave=False)
    add("--questions", nargs="+", required=True, help="questions.jsonl files")
    add("--images", default=".", help="image root")
    said = "so many text and so many image questions only; 0: all"
    add("--limit", type=flags.whole(0), default=0, help=said)
    add("--out", required=True, help="folder to write")
    for step, flag, number, said in SOURCES:
        if name in (step, "all"):
            add(flag, nargs=number, required=one and step != "describe", help=said)
    if name in ("leak", "all"):
        said = "of a leak in words, share and bits, as decontaminate has them; 0 0 0: exact only"
        three = ("NGRAM", "JACCARD", "DISTANCE")
        add("--limits", type=flags.number(0), nargs=3, default=LIMITS, metavar=three, help=said)
    if name in ("describe", "all"):
        said = "let in the questions whose description nobody removed; else they wait in review.csv"
        add("--keep-unreviewed", action="store_true", help=said)
        said = "CSV with columns id and question: a human's texts, which go before the engine's"
        add("--reviewed", help=said)
    if name == "difficulty":
        add("--drop-if", choices=["any", "all"], help="a baseline solves it, or every one")
        said = "of each baseline; 1 is greedy, more are sampled at temperature 1"
        add("--attempts", type=flags.SAMPLES, dest="direct_attempts", help=said)
    if name == "solvable":
        add("--attempts", type=flags.SAMPLES, dest="expert_attempts", help="of each expert")
    if name in ("difficulty", "solvable", "all"):  # ours: paper silent
        said = "of a baseline's or an expert's answer"
        add("--max-tokens", type=flags.TOKENS, default=8192, help=said)
    if name != "leak":
        said = "only tell what may be asked at most: all attempts needed, nothing dropped but leaks"
        add("--dry-run", action="store_true", help=said)
        inference.add_flags(parser)
        add("--seed", type=flags.SEED, default=0)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    flags.run_script(main)
