"""Single cases: a question, its images and each run's chain side by side (paper 4.4, Figs. 7-9).

The paper's Figure 9 shows a question that Stage I gets wrong and Stage II right:

    python -m report cases runs/stage1 runs/stage2 --only stage1-wrong,stage2-right -n 20 \\
        --questions test.jsonl --images . --out cases.html

Without conditions every question is taken; of several conditions all must hold. A condition is
NAME-OUTCOME, with the name of a run, which may hold dashes and blanks, but no comma. It is about
the first sample, whose chain is unfolded on the page:

    right, wrong                  every answer is one of them; wrong includes the next three
    unreadable, cut, unanswered   wrong because no choice can be read, because of the token limit,
                                  or because there is no answer

Only questions put to every run count, in their order. Each answer names the values that identify
its row in predictions.jsonl. The page is one file, made from cases.html: it contains its images,
loads nothing, runs nothing, and shows what a model wrote as text.

reads results.json, predictions.jsonl and, if judged, verdicts.jsonl of each run; writes the page

Where we depart from the paper, or it is silent: it marks hallucinations by hand (Figure 9, in
blue). Ours shows the whole chain with the judge's verdict beside it, and the first cases that meet
the conditions instead of picked ones.
"""

import base64
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path

import jinja2

import data
from command import schema, stage
from engines.inference import image_paths
from report import score, tables

# ours: pixels of an image's longer side: larger ones are reduced, small ones enlarged exactly
LONGEST, SMALL = 900, 256
# ours: the outcomes of an answer, in the words of the page
OUTCOMES = {
    "right": "✓ right",
    "wrong": "✗ wrong",
    "unreadable": "? unreadable (wrong)",
    "cut": "✂ cut off (wrong)",
    "unanswered": "– no answer (wrong)",
}


@dataclass
class Run:
    """One evaluation. entries: by question id, as score.entry makes them."""

    name: str
    folder: Path
    entries: dict[str, dict]
    open_ended: bool = False  # asked without options


def read_run(folder: str | Path) -> Run:
    results = score.read_results(folder)
    entries = {entry["id"]: entry for entry in results["entries"]}
    return Run(results["name"], Path(folder), entries, bool(results.get("open_ended")))


def read_samples(run: Run, wanted: dict[str, data.Question]) -> dict[str, list[dict]]:
    """The rows of predictions.jsonl of each wanted question, in the order of the samples, each with
    its "verdict" or None. Raises RowError where results, predictions and verdicts are not of the
    same answers."""
    verdicts, path = {}, run.folder / "predictions.jsonl"
    if (judged := run.folder / "verdicts.jsonl").exists():
        verdicts = {(row["id"], row["sample"]): row for row in schema.read_rows(judged, "verdicts")}
    found: dict[str, list[dict]] = {id: [] for id in wanted}
    for row in schema.checked_rows(path, "rollouts"):  # one by one: token ids are gigabytes
        id, sample = row["id"], row["sample"]
        if id not in wanted:
            continue
        where = f"{path}: sample {sample} of question {id}"
        data.need(row, where, engine=str, seed=int, correct=bool)
        verdict = verdicts.get((id, sample))
        if verdict and verdict["response_sha"] != row["response_sha"]:
            raise data.RowError(f"{where}: its verdict is on another text; judge this run again")
        del row["token_ids"]  # large, and not shown
        found[id].append({**row, "verdict": verdict})
    for id, question in wanted.items():
        found[id].sort(key=lambda row: row["sample"])
        entry, fault = run.entries[id], ""
        choices = {*entry["choices"]} - {None}
        if [row["correct"] for row in found[id]] != entry["right"]:
            fault = "not the answers that results.json counts; evaluate this run again"
        elif entry["answer"] != question.answer or (
            question.options and not choices <= question.options.keys()
        ):
            put = "was put with another reference or other options"
            fault = f"{put}; give the --questions that the run was evaluated on"
        if fault:
            raise data.RowError(f"{path}: question {id}: {fault}")
    return found


# --------------------------------------------------------------------------------------------------
# Which cases


def outcome(entry: dict, k: int) -> str:
    """The outcome of sample k, a key of OUTCOMES."""
    if entry["right"][k]:
        return "right"
    if entry["ended"][k] != "stop":
        return "cut" if entry["ended"][k] == "length" else "unanswered"
    return "unreadable" if entry["choices"][k] is None else "wrong"


def tally(outcomes: Iterable[str]) -> str:
    """How many there are of each outcome, in words."""
    counts = Counter(outcomes)
    return ", ".join(f"{counts[key]} {words}" for key, words in OUTCOMES.items() if counts[key])


def parse_only(only: str, runs: list[Run]) -> list[tuple[str, str]]:
    """(run's name, outcome) of each condition. Raises RowError for a text that is not a condition
    on these runs."""
    found, names = [], [run.name for run in runs]
    for text in filter(None, map(str.strip, only.split(","))):
        name, _, wanted = text.rpartition("-")
        if name not in names or wanted not in OUTCOMES:
            form = f"NAME-OUTCOME with a name of {names} and an outcome of {[*OUTCOMES]}"
            raise data.RowError(f"--only: {text!r} is not {form}")
        found.append((name, wanted))
    return found


def meets(entry: dict, wanted: str) -> bool:
    found = outcome(entry, 0)
    return found == wanted or (wanted == "wrong" and found != "right")


def common_questions(runs: list[Run], questions: list[data.Question]) -> list[data.Question]:
    """The questions that were put to every run, as they were. Raises RowError for none, and for
    two runs of one name."""
    tables.distinct([run.name for run in runs])
    if runs[0].open_ended:
        questions = [question.opened() for question in questions]
    common = [question for question in questions if all(question.id in run.entries for run in runs)]
    if not common:
        held = ", ".join(f"{run.name} has {len(run.entries)}" for run in runs)
        none = f"none of the {len(questions)} questions was put to every run ({held})"
        raise data.RowError(f"{none}; give the --questions that the runs were evaluated on")
    return common


def select(
    runs: list[Run], common: list[data.Question], conditions: list[tuple[str, str]]
) -> list[data.Question]:
    """The questions that meet all conditions. Raises RowError where none does."""
    entries = {run.name: run.entries for run in runs}
    chosen, alone = common, []  # alone: how many questions meet each condition
    for name, wanted in conditions:
        met = {question.id for question in common if meets(entries[name][question.id], wanted)}
        alone.append(f"{name}-{wanted} {len(met)}")
        chosen = [question for question in chosen if question.id in met]
    if not chosen:
        none = f"no question meets all conditions; of {len(common)} questions, each alone"
        raise data.RowError(f"--only: {none}: {', '.join(alone)}")
    return chosen


# --------------------------------------------------------------------------------------------------
# The page: what cases.html shows


def spans_of(response: str) -> list[tuple[str, str]]:
    """(kind, text) of a response's spans, every character kept: think, answer, tag, and outside,
    which is text outside any block."""
    parts = re.split(rf"({data.TAGS.pattern})", response)
    ends = [0, *accumulate(map(len, parts))]
    found = []
    for part, label in zip(parts, data.label_spans(response, ends)):
        kind = data.SPAN_NAMES[label]
        if kind == "tag" and part.strip() and not data.TAGS.fullmatch(part):
            kind = "outside"
        found.append((kind, part))
    return [(kind, part) for kind, part in found if part]


def image_of(path: Path, name: str) -> dict:
    """An image as the page holds it, at most LONGEST pixels a side. Raises RowError naming the file
    if it cannot be read."""
    from command.images import load_image

    image, buffer = load_image(path), BytesIO()
    image.thumbnail((LONGEST, LONGEST))
    times = SMALL // max(image.size)  # 0 if it is not small
    kind = "png" if times else "jpeg"
    image.save(buffer, kind, quality=85)  # ours
    width, height = (side * max(1, times) for side in image.size)
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"name": name, "kind": kind, "width": width, "height": height, "source": source}


def sample_of(entry: dict, k: int, row: dict, options: dict) -> dict:
    """One answer: its outcome, the choice that was read, its row with the chain and the verdict."""
    choice, rule = entry["choices"][k], entry["official"]
    read = "nothing" if choice is None else f"({choice}) {options[choice]}" if options else choice
    if rule:
        read += f"; by the benchmark's own rule {rule['choices'][k] or 'nothing'}, "
        read += "right" if rule["right"][k] else "wrong"
    return {"outcome": outcome(entry, k), "read": read, "row": row, "verdict": row["verdict"]}


def run_of(run: Run, question: data.Question, rows: list[dict]) -> dict:
    """A run's answers to one question, and how many there are of each outcome."""
    entry = run.entries[question.id]
    samples = [sample_of(entry, k, row, question.options) for k, row in enumerate(rows)]
    counts = tally(sample["outcome"] for sample in samples)
    majority = "right" if score.vote(entry["choices"], entry["right"]) else "wrong"
    summary = f"all {len(samples)} samples: {counts}; majority {majority}"
    return {"name": run.name, "samples": samples, "summary": summary}


def options_of(question: data.Question, runs: list[Run]) -> list[dict]:
    """The options, or an open question's reference, and which runs' first samples chose each."""
    found = []
    for choice, text in (question.options or {question.answer: ""}).items():
        chosen = [run.name for run in runs if run.entries[question.id]["choices"][0] == choice]
        is_reference = choice == question.answer
        marks = ["✓ reference answer"] if is_reference else []
        marks += [f"chosen by {', '.join(chosen)}"] if chosen else []
        shown = f"({choice}) {text}" if text else choice
        found.append({"text": shown, "is_reference": is_reference, "marks": " · ".join(marks)})
    return found


def case_of(
    question: data.Question, image_root: Path, runs: list[Run], samples: list[dict]
) -> dict:
    """One case: the question and the runs' answers. samples: of each run, by question id."""
    # shown: what looking.py shows instead of the images
    meta = [f"{key}: {value}" for key, value in question.meta.items() if key != "shown"]
    paths = image_paths(question, image_root)
    return {
        "about": " · ".join(filter(None, [f"id {question.id}", question.source, *meta])),
        "images": [image_of(path, name) for path, name in zip(paths, question.images)],
        "question": question.question,
        "options": options_of(question, runs),
        "runs": [run_of(run, question, rows[question.id]) for run, rows in zip(runs, samples)],
    }


def render(values: dict) -> str:
    """cases.html with these values, all escaped."""
    source = Path(__file__).with_name("cases.html").read_text(encoding="utf-8")
    rules = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **rules)
    names = {"spans_of": spans_of, "outcomes": OUTCOMES, "criteria": score.CRITERIA}
    page = environment.from_string(source, globals=names).render(values)
    # a folder's name may hold half a surrogate pair, which UTF-8 cannot; browsers drop a raw "\r"
    return page.encode("utf-8", "xmlcharrefreplace").decode().replace("\r", "&#13;")


def write_page(
    runs: list[Run],
    questions: list[data.Question],
    image_root: str | Path,
    only: str,
    count: int,
    out: str | Path,
) -> int:
    """Writes the page of the first `count` cases that meet `only`; returns how many it has.

    Raises RowError for an unknown condition, runs of one name or without a common question, no case
    at all, a missing image, or where `out` holds another page."""
    conditions, root = parse_only(only, runs), Path(image_root)
    common = common_questions(runs, questions)
    chosen = select(runs, common, conditions)
    shown = chosen[:count]
    samples = [read_samples(run, {question.id: question for question in shown}) for run in runs]
    fares = []
    for run in runs:
        counts = tally(outcome(run.entries[question.id], 0) for question in common)
        fares.append({"name": run.name, "counts": counts, "folder": run.folder})
    values = {
        "asked": " and ".join("-".join(one) for one in conditions) or "every question",
        "found": len(chosen),
        "shown": len(shown),
        "common": len(common),
        "runs": fares,
        "cases": [case_of(question, root, runs, samples) for question in shown],
    }
    stage.new_file(out, render(values))
    return len(shown)
