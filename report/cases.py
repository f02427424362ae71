"""Single cases: a question, its images and each run's chain side by side (paper 4.4, Figs. 7-9).

The paper's Figure 9 shows a question that Stage I gets wrong and Stage II right:

    python -m report cases runs/stage1 runs/stage2 --only stage1-wrong,stage2-right -n 20 \\
        --questions test.jsonl --images . --out cases.html

Without conditions every question is taken; of several conditions all must hold. A condition is
NAME-OUTCOME, with the name of a run, which may hold dashes and blanks, but no comma. It is about
the first sample, whose chain is unfolded on the page:

    right, wrong                      every answer is one of them; wrong includes the next three
    unreadable, cut, unanswered       wrong because no choice can be read, because of the token
                                      limit, or because there is no answer
    right-majority, wrong-majority    the majority of all samples, by score.vote

Only questions put to every run count, in their order. Each answer names the values that identify
its row in predictions.jsonl. The page is one file: it contains its images, loads nothing, runs
nothing, and shows what a model wrote as text.

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
from html import escape
from io import BytesIO
from itertools import accumulate
from pathlib import Path

import data
from command import schema, stage
from engines.inference import image_paths
from report import score

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
CONDITION = re.compile(rf"(.+)-(?:(right|wrong)-majority|({'|'.join(OUTCOMES)}))", re.S)


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


def read_samples(
    run: Run, wanted: dict[str, data.Question]
) -> dict[str, list[tuple[dict, dict | None]]]:
    """(prediction, verdict or None) of each sample of the wanted questions, in the order of the
    samples. Raises RowError where results, predictions and verdicts are not of the same answers."""
    verdicts, path = {}, run.folder / "predictions.jsonl"
    if (judged := run.folder / "verdicts.jsonl").exists():
        verdicts = {(row["id"], row["sample"]): row for row in schema.read_rows(judged, "verdicts")}
    found: dict[str, list[tuple[dict, dict | None]]] = {id: [] for id in wanted}
    for row in schema.checked_rows(path, "rollouts"):  # one by one: token ids are gigabytes
        if row["id"] not in wanted:
            continue
        key, fault = (row["id"], row["sample"]), ""
        verdict = verdicts.get(key)
        if lacking := [name for name in ("engine", "seed", "correct") if name not in row]:
            fault = f"missing '{lacking[0]}'; evaluate this run again"
        elif verdict and verdict["response_sha"] != row["response_sha"]:
            on = f"the verdict on sample {key[1]} of question {key[0]} is on another text"
            fault = f"{on}; judge this run again"
        if fault:
            lines = ((where, (one["id"], one["sample"])) for where, one in data.read_jsonl(path))
            raise data.RowError(f"{next(where for where, one in lines if one == key)}: {fault}")
        row.pop("token_ids")  # large, and not shown
        found[row["id"]].append((row, verdict))
    for id, question in wanted.items():
        found[id].sort(key=lambda pair: pair[0]["sample"])
        entry, fault = run.entries[id], ""
        if [row["correct"] for row, _ in found[id]] != entry["right"]:
            fault = "not the answers that results.json counts; evaluate this run again"
        elif entry["answer"] != question.answer or (
            question.options and not {*entry["choices"]} <= {None, *question.options}
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


def tally(entries: list[dict], samples: Iterable[int]) -> str:
    """How many of these samples of these questions have each outcome, in words."""
    counts = Counter(outcome(entry, k) for entry in entries for k in samples)
    return ", ".join(f"{counts[key]} {words}" for key, words in OUTCOMES.items() if counts[key])


def parse_only(only: str, runs: list[Run]) -> list[tuple[str, str, bool]]:
    """(run's name, outcome, whether the majority's) of each condition. Raises RowError for a text
    that is not a condition on these runs."""
    found, names = [], [run.name for run in runs]
    for text in filter(None, map(str.strip, only.split(","))):
        match = CONDITION.fullmatch(text)
        if not match or match[1] not in names:
            outcomes = f"an outcome of {[*OUTCOMES, 'right-majority', 'wrong-majority']}"
            wanted = f"NAME-OUTCOME with a name of {names} and {outcomes}"
            raise data.RowError(f"--only: {text!r} is not {wanted}")
        found.append((match[1], match[2] or match[3], bool(match[2])))
    return found


def meets(entry: dict, wanted: str, by_majority: bool) -> bool:
    if by_majority:
        return score.vote(entry["choices"], entry["right"]) == (wanted == "right")
    found = outcome(entry, 0)
    return found == wanted or (wanted == "wrong" and found != "right")


# --------------------------------------------------------------------------------------------------
# The page. Every text that is not ours goes through escape.


def chain_html(response: str) -> str:
    """A response as HTML, every character kept, its spans marked: think, answer, tags, and text
    outside any block."""
    parts, html_parts = re.split(rf"({data.TAGS.pattern})", response), ""
    ends = [0, *accumulate(map(len, parts))]
    labels = data.label_spans(response, list(zip(ends, ends[1:])))
    for part, label in zip(parts, labels):
        kind = data.SPAN_NAMES[label]
        if kind == "tag" and part.strip() and not data.TAGS.fullmatch(part):
            kind = "outside"
        html_parts += f'<span class="{kind}">{escape(part)}</span>' if part else ""
    return f'<div class="chain" dir="auto">{html_parts or "<em>(empty)</em>"}</div>'


def image_html(path: Path, name: str, alt: str) -> str:
    """One image inside the page, at most LONGEST pixels a side. Raises RowError naming the file if
    it cannot be read."""
    from command.images import load_image

    image, buffer = load_image(path), BytesIO()
    image.thumbnail((LONGEST, LONGEST))
    times = SMALL // max(image.size)  # 0 if it is not small
    kind = "png" if times else "jpeg"
    image.save(buffer, kind, quality=85)  # ours
    width, height = (side * max(1, times) for side in image.size)
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    size = f'width="{width}" height="{height}"'
    image_tag = f'<img class="{kind}" {size} alt="{escape(alt)}" src="{source}">'
    return f"<figure>{image_tag}<figcaption>{escape(name)}</figcaption></figure>"


def verdict_html(verdict: dict | None) -> str:
    if verdict is None:
        return ""
    if verdict["criteria"] is None:
        return f'<p class="facts">no verdict: {escape(str(verdict["error"]))}</p>'
    items = ""
    for key in score.CRITERIA:
        name, met = key.replace("_", " "), verdict["criteria"][key]
        kind, mark, word = ("right", "✓", "yes") if met else ("wrong", "✗", "no")
        items += f'<li class="{kind}">{mark} {name}: {word}</li>'
    return f'<ul class="criteria" aria-label="the judge\'s four criteria">{items}</ul>'


def sample_html(entry: dict, k: int, row: dict, verdict: dict | None, options: dict) -> str:
    """One answer: its outcome, the choice read, the chain, the judge's criteria, its row."""
    found, choice, rule = outcome(entry, k), entry["choices"][k], entry["official"]
    read = "nothing" if choice is None else f"({choice}) {options[choice]}" if options else choice
    if rule:
        read += f"; by the benchmark's own rule {rule['choices'][k] or 'nothing'}, "
        read += "right" if rule["right"][k] else "wrong"
    facts = f"sample {row['sample']} · seed {row['seed']} · ended: {row['finish_reason']} · "
    facts += f"response {row['response_sha']} · {row['engine']}"
    result = f'<strong class="{found}">{OUTCOMES[found]}</strong>, read: {escape(read)}'
    chain = chain_html(row["response"]) + verdict_html(verdict)
    return f'<p class="outcome">{result}</p>{chain}<p class="facts">{escape(facts)}</p>'


def run_html(run: Run, question: data.Question, samples: list[tuple[dict, dict | None]]) -> str:
    """A run's answers to one question: the first unfolded, the others folded."""
    entry, parts = run.entries[question.id], []
    for k, (row, verdict) in enumerate(samples):
        parts.append(sample_html(entry, k, row, verdict, question.options))
    majority = "right" if score.vote(entry["choices"], entry["right"]) else "wrong"
    counts = tally([entry], range(len(samples)))
    summary = f"all {len(samples)} samples: {counts}; majority {majority}"
    first, others = parts[0], "<hr>".join(parts[1:])
    folded = f"<details><summary>{summary}</summary>{others}</details>" if others else ""
    return f"<section><h3>{escape(run.name)}</h3>{first}{folded}</section>"


def choices_html(question: data.Question, runs: list[Run]) -> str:
    """The options, or an open question's reference, and which runs' first samples chose each."""
    items = ""
    for choice, text in (question.options or {question.answer: ""}).items():
        chosen = [run.name for run in runs if run.entries[question.id]["choices"][0] == choice]
        is_reference = choice == question.answer
        marks = ["✓ reference answer"] * is_reference
        marks += [f"chosen by {', '.join(chosen)}"] if chosen else []
        shown = escape(f"({choice}) {text}" if text else choice)
        items += f'<li class="option{" reference" * is_reference}">{shown} '
        items += f"<small>{escape(' · '.join(marks))}</small></li>"
    return f"<ul>{items}</ul>"


def case_html(
    number: int, question: data.Question, image_root: Path, runs: list[Run], samples: list[dict]
) -> str:
    """One case: the question and the runs' answers. samples: of each run, by question id."""
    paths, images, chains = image_paths(question, image_root), "", ""
    for i, (path, name) in enumerate(zip(paths, question.images), 1):
        images += image_html(path, name, f"image {i} of {len(paths)} of case {number}")
    for run, found in zip(runs, samples):
        chains += run_html(run, question, found[question.id])
    meta = [f"{key}: {value}" for key, value in question.meta.items()]
    about = " · ".join(filter(None, [f"id {question.id}", question.source, *meta]))
    return (
        f'<article id="case-{number}"><h2>Case {number}</h2>'
        f'<p class="facts">{escape(about)}</p>'
        f'<div class="asked"><div class="images">{images}</div>'
        f'<div class="question"><p class="stem" dir="auto">{escape(question.question)}</p>'
        f"{choices_html(question, runs)}</div></div>"
        f'<div class="runs">{chains}</div></article>'
    )


LEGEND = "Something outside. <think> The reasoning. </think> <answer> The answer. </answer>"


def header_html(
    runs: list[Run], common: list[data.Question], found: int, shown: int, asked: str
) -> str:
    """The selection, each run's outcomes on all common questions, and how a chain is shown."""
    fares = ""
    for run in runs:
        counts = tally([run.entries[question.id] for question in common], [0])
        fares += f"<li>{escape(f'{run.name}: {counts} · {run.folder}')}</li>"
    links = " ".join(f'<a href="#case-{number}">{number}</a>' for number in range(1, shown + 1))
    return (
        f"<h1>Cases</h1><p><strong>{escape(asked)}</strong>: {found} of the {len(common)} "
        "questions put to every run. "
        f"{'All' if shown == found else f'The first {shown}'} of them, "
        f'in the order of the questions:</p><nav aria-label="cases">{links}</nav>'
        f"<p>First samples of the runs, on all {len(common)} questions:</p><ul>{fares}</ul>"
        f"<p>How a chain is shown:</p>{chain_html(LEGEND)}"
        '<p class="facts">The other samples are folded below the first, '
        "and print only where opened.</p>"
    )


def common_questions(runs: list[Run], questions: list[data.Question]) -> list[data.Question]:
    """The questions that were put to every run, as they were. Raises RowError for none, and for
    two runs of one name."""
    names = [run.name for run in runs]
    if len({*names}) < len(runs):
        raise data.RowError(f"runs of one name: {names}; evaluate one under another --name")
    if runs[0].open_ended:
        questions = [question.opened() for question in questions]
    common = [question for question in questions if all(question.id in run.entries for run in runs)]
    if not common:
        held = ", ".join(f"{run.name} has {len(run.entries)}" for run in runs)
        none = f"none of the {len(questions)} questions was put to every run ({held})"
        raise data.RowError(f"{none}; give the --questions that the runs were evaluated on")
    return common


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
    at all, a missing image, or anything else that `out` holds."""
    conditions, entries = parse_only(only, runs), {run.name: run.entries for run in runs}
    common, root = common_questions(runs, questions), Path(image_root)
    chosen, alone = common, {}  # alone: how many questions meet each condition
    for name, wanted, by_majority in conditions:
        met = {q.id for q in common if meets(entries[name][q.id], wanted, by_majority)}
        alone[f"{name}-{wanted}{'-majority' * by_majority}"] = len(met)
        chosen = [question for question in chosen if question.id in met]
    if not chosen:
        counts = ", ".join(f"{text} {number}" for text, number in alone.items())
        none = f"no question meets all conditions; of {len(common)} questions, each alone"
        raise data.RowError(f"--only: {none}: {counts}")
    shown = chosen[:count]
    samples = [read_samples(run, {question.id: question for question in shown}) for run in runs]
    articles = [case_html(n, question, root, runs, samples) for n, question in enumerate(shown, 1)]
    asked = " and ".join(alone) or "every question"
    header = header_html(runs, common, len(chosen), len(shown), asked)
    texts = {"title": escape(asked), "style": STYLE, "header": header}
    page = PAGE.format(**texts, cases="\n".join(articles))
    # a folder's name may hold half a surrogate pair, which UTF-8 cannot; browsers drop a raw "\r"
    page = page.encode("utf-8", "xmlcharrefreplace").decode().replace("\r", "&#13;")
    stage.new_file(out, page)
    return len(shown)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, \
initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<title>Cases: {title}</title><style>{style}</style></head>
<body><header>{header}</header><main>
{cases}
</main></body></html>
"""

# one rule a line; light-dark(): the first colour in a light browser, the second in a dark one
STYLE = """
:root { color-scheme: light dark; --dim: light-dark(#63676e, #a1a5ac);
  --line: light-dark(#dedad0, #363a40); --right: light-dark(#1c6a3a, #7fcf9a);
  --wrong: light-dark(#a3281d, #f2968b); --outside: light-dark(#8a5a00, #d9ab4e); }
body { margin: 0 auto; padding: 1.5rem; max-width: 100rem; overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, sans-serif; background: light-dark(#fbfaf7, #15171a); }
h1, h2, h3 { line-height: 1.25; margin: 0 0 .5rem; }
p, ul { margin: .5rem 0; padding: 0; list-style: none; }
hr { border: 0; border-top: 1px solid var(--line); margin: 1.25rem 0; }
a { color: inherit; padding: .1rem .4rem; }
summary { cursor: pointer; }
article { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 2px solid var(--line); }
.facts, small, figcaption { color: var(--dim); font-size: .85rem; }
.asked, .images { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; max-width: 100%; }
.images:empty { display: none; }
.question { flex: 1 1 24rem; min-width: 0; }
figure { margin: 0; max-width: 28rem; }
img { max-width: 100%; height: auto; }
.png { image-rendering: pixelated; }
.stem, .chain, .option { white-space: pre-wrap; max-width: 52rem; }
.option { padding: .2rem .6rem; border-left: 3px solid transparent; }
.reference { border-color: var(--right); font-weight: 600; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; margin-top: 1rem; align-items: start; }
section { min-width: 0; padding: 1rem; border: 1px solid var(--line); border-radius: 8px;
  background: light-dark(#fff, #1c1f23); }
.right { color: var(--right); }
.wrong, .unreadable, .cut, .unanswered { color: var(--wrong); }
.criteria { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; }
.tag { color: var(--dim); font: .8rem ui-monospace, monospace; }
.think, .answer, .outside { display: block; margin: .15rem 0; padding: .1rem .8rem; }
.think { border-left: 3px solid #4f9d69; }
.answer { border-left: 6px double #2493a8; font-weight: 600; }
.outside { border-left: 3px dotted var(--outside); color: var(--outside); }
.outside::before { content: "outside any block"; display: block; font-size: .75rem; }
@media print { nav { display: none; } .runs { display: block; } }
"""
