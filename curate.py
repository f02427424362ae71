"""A question bank becomes training questions: no leak, not too easy, not by looking alone, not unsolvable (paper §3.1: 54K -> 5K).

    keep q  iff  q is no benchmark question                                     leak         free
            and  no baseline model solves it directly                           difficulty   one request a baseline
            and  it is not answered by recognising a pattern (image questions)  type         one request
                 whatever tells what the image shows is taken out (paper §3.3)  describe     one request, and a human
            and  each of two experts solves it in at least one of 4 attempts    solvable     up to 4 requests an expert

Each step is a command of its own that reads and writes questions.jsonl; `all` runs them in this order, the cheapest first,
and parts what is left: text questions become Stage I's demonstrations, image questions Stage II's preference pairs. Every
rejected question is kept with the filter that rejected it, why, and on what evidence. Every reply is kept and nothing is asked twice.

    python curate.py add medqa-train train.jsonl --images images --out bank.jsonl
    python curate.py all --questions bank.jsonl --images images --against test.jsonl --baselines hf:base --classifier clinic:classifier \\
        --experts clinic:expert-a clinic:expert-b --editor clinic:editor --out out/curate           --dry-run: what may it cost?

reads questions.jsonl files; writes OUT/text.jsonl and OUT/image.jsonl (a single filter: OUT/questions.jsonl), OUT/rejected.jsonl,
OUT/funnel.json and .png, OUT/review.csv, OUT/stage.json

Where we depart from the paper, or it is silent:
  1. "Eliminate samples that could be solved directly" by two baselines: dropped if *any* of them is right in one greedy
     attempt. (Its 8 to 12 % that remain are hard to reach if both must solve a question to drop it: `difficulty --drop-if all`;
     --drop-if and --attempts are flags of `difficulty` and `solvable` alone.)
  2. What a leak is stands in leaks.py, what an image description is in descriptions.py.
  3. The prompt that asks for a question's type is ours. Only pattern recognition is dropped; a label that cannot be read in
     three attempts drops the question too, under a reason of its own.
  4. The paper takes image descriptions out after the experts have solved a question; here before, so that they solve the
     text that is trained on.
  5. Its experts differ for text and image questions: write --experts gemini:... text=https:... image=https:...
"""

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import answers
import bill
import data
import flags
import leaks
import stage
from asking import (
    LABELLING, SPEED, Ask, Sampling, add_flags, ask_until, attempts_of, checkpoint, identity,
    image_paths, question_asks, read_object, replies_file, reply_row, setup_of,
)  # fmt: skip
from descriptions import EDIT_PROMPT, edit_fault, edited, read_edit, read_reviewed, settled, write_review
from engines import Replicas, open_engine

ATTEMPTS = 4  # paper 3.1: of an expert
DIRECT = 1  # ours: paper silent; attempts of a baseline
PAPER = {"bank": (37_000, 17_000), "solvable": (3_000, 2_000)}  # paper 3.1: text and image questions
TYPES = ("pattern_recognition", "knowledge_recall", "clinical_reasoning")  # ours: paper silent but for the first

TYPE_PROMPT = """You are given a medical exam question with its images. Which of these does answering it take?

- pattern_recognition: looking is enough. Whoever recognises the finding, structure or disease in the image knows the answer.
- knowledge_recall: a fact from memory is enough. Neither the image nor the patient's story has to be worked through.
- clinical_reasoning: several pieces of information (history, examination, tests, image) must be put together, or a conclusion must be drawn from a finding or diagnosis that has to be worked out first.

Name also the modality of the image, one of: MODALITIES.

Reply with one JSON object and nothing else:
{"type": "one of the three", "modality": "...", "why": "one sentence"}

<Question> %s </Question>""".replace("MODALITIES", ", ".join([*data.MODALITIES[0], *data.MODALITIES[1], "other"]))

Rejection = dict  # {"filter", "reason", "evidence"}


# ---------------------------------------------------------------------------------------------------------------
# The bank


def add(args: argparse.Namespace) -> None:
    """Adds files of a known format to a bank. A question that the bank holds already, whatever its source, is told and left out.
    Whatever else is there under the bank's name is an error, and stays."""
    import benchmarks

    if args.name not in benchmarks.READERS:
        raise data.RowError(f"{args.name}: no such reader; known are {', '.join(sorted(benchmarks.READERS))}")
    if Path(args.out).resolve() in [Path(path).resolve() for path in args.paths]:
        raise data.RowError(f"--out {args.out}: is read here; name another file")
    args.out = os.path.realpath(args.out)  # a link to the bank stays one
    lock = stage.hold(Path(f"{args.out}.lock"), f"--out {args.out}")
    bank = {question.id: question for question in data.read_questions(args.out)} if Path(args.out).exists() else {}
    for path in args.paths:
        count, repeats = len(bank), []
        for question in benchmarks.read(args.name, path, Path(args.images)):
            image_paths(question, Path(args.images))
            held = bank.setdefault(question.id, question)
            if held is not question:
                repeats.append(f"{question.id} (from {held.source or 'an unnamed source'})")
            if (held.question, held.options, held.answer, held.images) != (question.question, question.options, question.answer, question.images):
                raise data.RowError(f"{path}: id {question.id!r} stands for another question in {args.out}; give one of them another id")
        print(f"{path}: {len(bank) - count} questions added" + (f", {len(repeats)} left out, being there already: {', '.join(repeats[:5])}{' ...' * (len(repeats) > 5)}" if repeats else ""))
    data.write_jsonl(args.out, (question.to_row() for question in bank.values()))
    images = sum(bool(question.images) for question in bank.values())
    print(f"{args.out}: {len(bank) - images} text questions, {images} image questions")
    lock.close()


def leak(questions: list[data.Question], args: argparse.Namespace) -> dict[str, Rejection]:
    benchmarks = [question for path in args.against for question in data.read_questions(path)]
    ngram, jaccard, distance = args.limits
    return leaks.find(questions, benchmarks, Path(args.images), int(ngram), jaccard, int(distance))


# ---------------------------------------------------------------------------------------------------------------
# What a step asks of its engines


@dataclass(frozen=True)
class Demand:
    """What a step wants of one engine, at most: so many replies to each ask. They are kept in `file`."""

    role: str
    spec: str
    asks: list[Ask]
    attempts: int
    sampling: Sampling

    def file(self, args: argparse.Namespace) -> Path:
        return replies_file(args, self.role, self.spec, self.sampling)

    def evidence(self, rows: list[dict], args: argparse.Namespace) -> dict:
        """Where an auditor finds the replies that decided, and how each of them ended."""
        return {"engine": self.spec, "replies": self.file(args).name, "samples": [row["sample"] for row in rows], "ended": [row["finish_reason"] for row in rows]}


def demands(step: str, questions: list[data.Question], args: argparse.Namespace) -> list[Demand]:
    """What a step may ask of these questions; [] where it has no engine."""
    root = Path(args.images)
    if step == "difficulty":  # the same greedy answer need not be asked for twice
        sampling = Sampling(0.0 if args.direct_attempts == 1 else 1.0, 1.0, args.max_tokens, args.seed)
        return [Demand("baseline", spec, question_asks(questions, root, 1), args.direct_attempts, sampling) for spec in args.baselines]
    if step == "solvable":
        found = []
        for spec in args.experts:
            kind, name = re.match(r"(?:(text|image)=)?(.*)", spec, re.S).groups()
            mine = [question for question in questions if kind in (None, "image" if question.images else "text")]
            found.append(Demand("expert", name, question_asks(mine, root, 1), args.expert_attempts, Sampling(1.0, 1.0, args.max_tokens, args.seed)))
        covered = {ask.id for demand in found for ask in demand.asks}
        if found and (alone := next((question for question in questions if question.id not in covered), None)):
            raise data.RowError(f"--experts: none of {' '.join(args.experts)} is for {'image' if alone.images else 'text'} questions, such as {alone.id}")
        return found
    spec, prompt = {"type": (args.classifier, TYPE_PROMPT), "describe": (args.editor, EDIT_PROMPT)}.get(step, ("", ""))
    if not spec:
        return []
    text_of = data.question_text if step == "type" else lambda question: question.question
    asks = [Ask(q.id, [{"role": "user", "content": prompt % text_of(q)}], image_paths(q, root), (0,)) for q in questions if q.images]
    sampling = replace(LABELLING, seed=args.seed)
    return [Demand(step, spec, asks, attempts_of(spec, sampling), sampling)]


def replies(demand: Demand, ids: Collection[str], enough: Callable[[dict], bool], args: argparse.Namespace) -> dict[str, list[dict]]:
    """{id: its replies, the last of them enough, or not even after all attempts} for those ids that the demand asks about. A
    question whose text has changed since, by an editor or a human, is asked anew."""
    asks = [ask for ask in demand.asks if ask.id in ids]
    if not asks:
        return {}
    engine = open_engine(demand.spec, setup_of(args))
    title = f"{demand.role} {demand.spec}"
    said = ask_until(engine, asks, demand.attempts, enough, demand.sampling, demand.file(args), lambda reply: reply_row(reply, demand.spec), title)
    if isinstance(engine, Replicas):
        engine.close()  # the next engine needs the GPUs
    ended = Counter(row["finish_reason"] for rows in said.values() for row in rows)
    print(f"{title}: {ended.total()} replies" + "".join(f", {number} {how}" for how, number in sorted(ended.items())))
    return said


def readable(read: Callable[[str], object]) -> Callable[[dict], bool]:
    """Whether a reply was finished and `read` makes sense of it."""
    def check(row: dict) -> bool:
        try:
            return row["finish_reason"] == "stop" and read(row["response"]) is not None
        except ValueError:
            return False

    return check


def right(questions: list[data.Question]) -> Callable[[dict], bool]:
    """Whether a reply was finished and answers its question right, by rule."""
    by_id = {question.id: question for question in questions}
    return lambda row: row["finish_reason"] == "stop" and answers.is_correct(row["response"], by_id[row["id"]])


# ---------------------------------------------------------------------------------------------------------------
# The filters: (questions left, args) -> {id: rejection}


def difficulty(questions: list[data.Question], args: argparse.Namespace) -> dict[str, Rejection]:
    """Questions that any baseline (--drop-if all: every one) answers right at once. Each is asked only what is still open."""
    is_right, open_ids, solvers = right(questions), {question.id for question in questions}, {question.id: [] for question in questions}
    wanted = demands("difficulty", questions, args)
    for demand in wanted:
        solved = {key: rows for key, rows in replies(demand, open_ids, is_right, args).items() if is_right(rows[-1])}
        for key, rows in solved.items():
            solvers[key].append(demand.evidence(rows, args))
        open_ids = open_ids & solved.keys() if args.drop_if == "all" else open_ids - solved.keys()
    dropped = {key: found for key, found in solvers.items() if found and (args.drop_if == "any" or len(found) == len(wanted))}
    return {key: {"filter": "difficulty", "reason": "solved directly by " + " and ".join(one["engine"] for one in found), "evidence": found} for key, found in dropped.items()}


def read_type(reply: str) -> dict[str, str]:
    """{"type", "modality", "why"} of a reply. Raises ValueError if it names none of the three types; the others may be ""."""
    found = read_object(reply, ["type"])
    label = re.sub(r"[\s-]+", "_", str(found.get("type", "")).strip().casefold())
    if label not in TYPES:
        raise ValueError(f"type is {found.get('type')!r}, none of {', '.join(TYPES)}")
    modality, why = (" ".join(said.split()) if isinstance(said := found.get(key), str) else "" for key in ("modality", "why"))
    return {"type": label, "modality": modality and data.modality(modality), "why": why}


def question_type(questions: list[data.Question], args: argparse.Namespace) -> dict[str, Rejection]:
    """Image questions that looking alone answers, and those whose type nobody can read. The others' meta learns its type,
    and its modality where it had none."""
    by_id, rejected, is_readable = {question.id: question for question in questions}, {}, readable(read_type)
    for demand in demands("type", questions, args):
        for key, rows in replies(demand, by_id, is_readable, args).items():
            if not is_readable(rows[-1]):
                rejected[key] = {"filter": "type", "reason": f"no readable type in {demand.attempts} attempts", "evidence": demand.evidence(rows, args)}
                continue
            label, question = read_type(rows[-1]["response"]), by_id[key]
            known = question.meta.get("modality") or label["modality"]
            question.meta = {**question.meta, "type": label["type"], **({"modality": known} if known else {})}
            if label["type"] == "pattern_recognition":
                rejected[key] = {"filter": "type", "reason": "pattern recognition", "evidence": {**demand.evidence(rows, args), "why": label["why"]}}
    return rejected


def solvable(questions: list[data.Question], args: argparse.Namespace) -> dict[str, Rejection]:
    """Questions that some expert never gets right: AND over experts of OR over attempts."""
    is_right, rejected, ids = right(questions), {}, {question.id for question in questions}
    for demand in demands("solvable", questions, args):
        failed = {key: rows for key, rows in replies(demand, ids - rejected.keys(), is_right, args).items() if not is_right(rows[-1])}
        for key, rows in failed.items():
            ended = Counter({"stop": "wrong", "length": "cut off"}.get(row["finish_reason"], row["finish_reason"]) for row in rows)
            reason = f"{demand.spec} failed all {demand.attempts} attempts: " + ", ".join(f"{number} {how}" for how, number in sorted(ended.items()))
            rejected[key] = {"filter": "solvable", "reason": reason, "evidence": demand.evidence(rows, args)}
    return rejected


FILTERS = {"leak": leak, "difficulty": difficulty, "type": question_type, "solvable": solvable}
STEPS = ["leak", "difficulty", "type", "describe", "solvable"]  # the cheapest first


# ---------------------------------------------------------------------------------------------------------------
# Image descriptions: a map, not a filter

def describe(questions: list[data.Question], args: argparse.Namespace) -> list[data.Question]:
    """The questions without what their text tells of the image: a human's text where there is one, else the engine's if it
    breaks no rule, else the text as it was, marked for review."""
    by_id, is_readable = {question.id: question for question in questions}, readable(read_edit)
    sheet = read_reviewed(args.reviewed) if args.reviewed else {}
    reviewed = settled(sheet, by_id)
    if untouched := len(sheet) - len(reviewed):
        print(f"{args.reviewed}: {untouched} rows are as they were, and go on waiting; correct the question, or empty the fault where it may stay")
    if elsewhere := sorted(reviewed.keys() - by_id.keys()):
        print(f"{args.reviewed}: {len(elsewhere)} of its questions are not here, or were rejected: {', '.join(elsewhere[:5])}")
    for key in reviewed.keys() & by_id.keys():
        by_id[key] = edited(by_id[key], reviewed[key], {"reviewed": True})
    for demand in demands("describe", questions, args):
        for key, rows in replies(demand, by_id.keys() - reviewed.keys(), is_readable, args).items():
            question, (text, removed) = by_id[key], read_edit(rows[-1]["response"]) if is_readable(rows[-1]) else ("", [])
            fault = edit_fault(question.question, text, removed) if is_readable(rows[-1]) else f"no readable reply in {demand.attempts} attempts"
            if fault:
                by_id[key] = edited(question, question.question, {"needs_review": fault, "suggestion": text})
            elif text != question.question:
                by_id[key] = edited(question, text, {})
    return list(by_id.values())


# ---------------------------------------------------------------------------------------------------------------
# Commands


def bank_of(args: argparse.Namespace) -> list[data.Question]:
    return data.some(leaks.read_bank(args.questions), args.limit)


def run(args: argparse.Namespace) -> None:
    """The steps of a command, one after the other, on what the one before has left."""
    started, out = time.time(), Path(args.out)
    bank = bank_of(args)
    check_early(bank, args)
    if args.dry_run:
        leaks_found = leak(bank, args) if "leak" in args.steps else {}
        left = [question for question in bank if question.id not in leaks_found]
        return bill.announce(costs(left, args), may_leave=True)
    specs = dict.fromkeys(demand.spec for step in args.steps for demand in demands(step, bank, args))
    inputs = [*args.questions, *args.against, *filter(None, [args.reviewed, *map(checkpoint, specs)])]
    if not stage.open_folder(args, inputs, SPEED, data.image_files(args.images, map(vars, bank))):
        return
    left, rejected, after = bank, {}, {"bank" if len(args.steps) > 1 else "given": bank}
    waiting: list[data.Question] = []
    for step in args.steps:
        if step == "describe":
            left = describe(left, args)
            removed = sum("original" in question.meta for question in left)
            bank = list({**{question.id: question for question in bank}, **{question.id: question for question in left}}.values())
            waiting = [question for question in left if "needs_review" in question.meta]
            if not args.keep_unreviewed:
                rejected |= {q.id: {"filter": "review", "reason": "waits for a human", "evidence": {"fault": q.meta["needs_review"]}} for q in waiting}
            left = after[step] = [question for question in left if question.id not in rejected]
            continue
        rejected |= (found := FILTERS[step](left, args))
        left = after[step] = [question for question in left if question.id not in found]
    if len(args.steps) == 1:
        parts = {"questions.jsonl": left}
    else:
        parts = {"text.jsonl": [q for q in left if not q.images], "image.jsonl": [q for q in left if q.images]}
    for name, questions in parts.items():
        data.write_jsonl(out / name, (question.to_row() for question in questions))
    data.write_jsonl(out / "rejected.jsonl", ({**q.to_row(), **rejected[q.id]} for q in bank if q.id in rejected))
    outputs = [*parts, "rejected.jsonl", "funnel.json", "funnel.png"]
    idle = {"leak": not args.against, "difficulty": not args.baselines, "type": not args.classifier, "describe": not (args.editor or args.reviewed or waiting), "solvable": not args.experts}
    funnel = [{"filter": name, **count(questions), **({"not_run": True} if idle.get(name) else {})} for name, questions in after.items()]
    data.write_json(out / "funnel.json", funnel)
    print_funnel(funnel)
    plot_funnel(funnel, out / "funnel.png")
    figures = {"kept": len(left), **Counter("leak" if row["filter"] == "leak" else f"{row['filter']}: " + re.sub("(?<= attempts): .*", "", row["reason"]) for row in rejected.values())}
    if "describe" in args.steps:
        figures |= {"descriptions removed": removed, "to review": write_review(out / "review.csv", waiting)}
    print("\n".join(f"  {value:>7} {name}" for name, value in figures.items()))
    stage.finish(args, [out / name for name in outputs], started, figures, {spec: identity(spec) for spec in specs})


def check_early(bank: list[data.Question], args: argparse.Namespace) -> None:
    """What would stop a later step is found before the first asks anything. Raises RowError, or Unavailable for an engine
    without a key; what a model's folder lacks is found only when it is loaded."""
    question_asks(bank, Path(args.images), 1)  # every image must be there
    if args.reviewed:
        read_reviewed(args.reviewed)
    for flag, specs in (("--baselines", args.baselines), ("--experts", args.experts)):
        if twice := [spec for spec, count in Counter(specs).items() if count > 1]:
            raise data.RowError(f"{flag}: {twice[0]} is there twice; its replies would be the same")
    specs = {demand.spec for step in args.steps for demand in demands(step, bank, args)}
    idle = args.dry_run or (Path(args.out) / "stage.json").exists()  # a finished folder asks nothing
    if not idle:
        bill.announce(costs(bank, args), args.images_may_leave)
    for spec in sorted(() if idle else specs):
        if not (folder := checkpoint(spec)):  # a model is loaded when it is its turn
            open_engine(spec, setup_of(args))
        elif not (Path(folder) / "config.json").is_file():
            raise data.RowError(f"{spec}: {folder} is no model's folder: it has no config.json")


def costs(bank: list[data.Question], args: argparse.Namespace) -> list[bill.Cost]:
    """What the steps may ask at most: as if no question were dropped, and no attempt were spared."""
    wanted = [demand for step in args.steps for demand in demands(step, bank, args)]
    return [
        bill.cost(d.role, d.spec, bill.sizes(d.asks), d.attempts, d.sampling.max_tokens, args.pixels)
        for d in wanted
    ]  # fmt: skip


def count(left: list[data.Question]) -> dict:
    """Text and image questions, and how many of each modality; "unknown" where nobody told it."""
    told = [str(question.meta.get("modality") or "") for question in left if question.images]
    modality = Counter(data.modality(text) if text else "unknown" for text in told)
    modality.update(["text"] * (len(left) - len(told)))
    return {"text": sum(not q.images for q in left), "image": sum(bool(q.images) for q in left), "modality": dict(sorted(modality.items()))}


def not_run(row: dict) -> str:
    """What is said of a filter that had no engine, or no benchmarks: it dropped nothing but, of leaks, the bank's own repeats."""
    return "" if not row.get("not_run") else " (repeats only)" if row["filter"] == "leak" else " (not run)"


def print_funnel(funnel: list[dict]) -> None:
    """Questions left after each filter, with the paper's beside, and by modality."""
    print("questions left after    text   image    paper: text   image")
    for row in funnel:
        paper = "{:>14,} {:>7,}".format(*PAPER[row["filter"]]) if row["filter"] in PAPER else " " * 22
        print(f"  {row['filter'] + not_run(row):<18} {row['text']:>7} {row['image']:>7} {paper}   " + ", ".join(f"{name} {n}" for name, n in row["modality"].items() if name != "text"))


def plot_funnel(funnel: list[dict], path: Path) -> None:
    """Left, text and image questions after each filter; right, image questions of each modality in the bank and at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["axes.titlesize"] = 10
    names = [name for name in funnel[0]["modality"] if name != "text"]
    figure, (ax, by) = plt.subplots(1, 2, figsize=(13, max(4.0, 1.5 + 0.35 * len(names))), constrained_layout=True, width_ratios=[3, 2])
    for offset, kind, shade, hatch in ((-0.2, "text", "#d0d0d0", "//"), (0.2, "image", "#505050", None)):
        bars = ax.bar([x + offset for x in range(len(funnel))], [row[kind] for row in funnel], 0.38, color=shade, hatch=hatch, edgecolor="black", lw=0.5)
        ax.bar_label(bars, [f"{row[kind]:,}\n{row[kind] / max(1, funnel[0][kind]):.0%}" for row in funnel], fontsize=8, padding=2)
    labels = [row["filter"] + not_run(row) + ("\npaper: {:,} text\n{:,} image".format(*PAPER[row["filter"]]) if row["filter"] in PAPER else "") for row in funnel]
    ax.set(title="questions left after each filter (hatched: text, dark: image)", ylabel="questions", xticks=range(len(funnel)), xticklabels=labels)
    ax.margins(y=0.15)
    for offset, row, shade in ((-0.2, funnel[0], "#d0d0d0"), (0.2, funnel[-1], "#505050")):
        values = [row["modality"].get(name, 0) for name in names]
        bars = by.barh([y + offset for y in range(len(names))], values, 0.38, color=shade, edgecolor="black", lw=0.5)
        by.bar_label(bars, [f"{value:,}" for value in values], fontsize=8, padding=2)
    by.set(title=f"by modality (light: {funnel[0]['filter']}, dark: after {funnel[-1]['filter']})", xlabel="image questions")
    by.set_yticks(range(len(names)), names, parse_math=False)  # a name that an engine gave may hold a dollar sign
    by.invert_yaxis()
    by.margins(x=0.12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Filter a question bank into training questions.")
    commands = parser.add_subparsers(dest="command", required=True)
    more = commands.add_parser("add", help="read files of a known format into a bank")
    more.add_argument("name", help="of the format, as benchmarks.py calls it")
    more.add_argument("paths", nargs="+", help="files or folders of that format")
    more.add_argument("--images", default=".", help="image root")
    more.add_argument("--out", required=True, help="the bank: a questions.jsonl, which is added to")
    more.set_defaults(run=add)
    helps = {
        "leak": "drop benchmark questions and repeats",
        "difficulty": "drop what baseline models solve directly",
        "type": "drop image questions that are pattern recognition",
        "solvable": "drop what an expert never solves",
        "describe": "take image descriptions out of image questions",
        "all": "all of them, in this order: " + ", ".join(STEPS),
    }
    for name, help in helps.items():
        command, one = commands.add_parser(name, help=help), name != "all"
        command.set_defaults(run=run, steps=[name] if one else STEPS, direct_attempts=DIRECT, expert_attempts=ATTEMPTS, drop_if="any")
        command.set_defaults(against=[], baselines=[], classifier="", experts=[], editor="", reviewed="", keep_unreviewed=False, dry_run=False, images_may_leave=False)
        command.add_argument("--questions", nargs="+", required=True, help="questions.jsonl files")
        command.add_argument("--images", default=".", help="image root")
        command.add_argument(
            "--limit", type=flags.whole(0), default=0,
            help="so many text and so many image questions only; 0: all",
        )  # fmt: skip
        command.add_argument("--out", required=True, help="folder to write")
        if name in ("leak", "all"):
            command.add_argument("--against", nargs="+", default=[], required=one, help="benchmark questions that must not leak")
            limits = [leaks.NGRAM, leaks.JACCARD, leaks.DISTANCE]
            command.add_argument(
                "--limits", type=flags.number(0), nargs=3, default=limits,
                metavar=("NGRAM", "JACCARD", "DISTANCE"),
                help="of a leak in words, share and bits, as in leaks.py; 0 0 0: exact ones only",
            )  # fmt: skip
        if name in ("difficulty", "all"):
            command.add_argument("--baselines", nargs="+", default=[], required=one, help="engines that must not solve a question directly")
        if name in ("type", "all"):
            command.add_argument("--classifier", default="", required=one, help="engine that tells the type of image questions")
        if name in ("solvable", "all"):
            command.add_argument("--experts", nargs="+", default=[], required=one, help="engines that must each solve a question once; text=SPEC, image=SPEC: only such questions")
        if name in ("describe", "all"):
            command.add_argument("--editor", default="", help="engine that takes image descriptions out of questions")
            command.add_argument("--keep-unreviewed", action="store_true", help="let questions in whose description nobody could remove; else they wait in review.csv")
            command.add_argument("--reviewed", default="", help="CSV with columns id and question: a human's texts, which go before the engine's")
        if name == "difficulty":
            command.add_argument("--drop-if", choices=["any", "all"], help="a baseline solves it, or every one")
            command.add_argument(
                "--attempts", type=flags.SAMPLES, dest="direct_attempts",
                help="of each baseline; 1 is greedy, more are sampled at temperature 1",
            )  # fmt: skip
        if name == "solvable":
            command.add_argument(
                "--attempts", type=flags.SAMPLES, dest="expert_attempts", help="of each expert"
            )
        if name in ("difficulty", "solvable", "all"):
            command.add_argument(
                "--max-tokens", type=flags.TOKENS, default=8192,  # ours: paper silent
                help="of a baseline's or an expert's answer",
            )  # fmt: skip
        if name != "leak":
            command.add_argument("--dry-run", action="store_true", help="only tell what may be asked at most: nothing dropped but leaks, every attempt needed, 3 characters "
                                 "a token, an image of --pixels in patches of 28 x 28, every reply as long as it may be")  # fmt: skip
            add_flags(command)
            command.add_argument("--seed", type=flags.SEED, default=0)
    args = parser.parse_args(argv)
    if "limits" in args:
        ngram, jaccard, distance = args.limits
        if ngram % 1 or jaccard > 1 or distance not in range(leaks.BITS + 1):
            parser.error(
                "argument --limits: NGRAM must be a whole number of words, JACCARD at most 1, "
                f"DISTANCE a whole number of bits, at most {leaks.BITS}"
            )
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    flags.run_script(main)
