"""Reasoning demonstrations for Stage I: teachers solve the text questions, three criteria choose (paper §3.2).

    demo(q) = the first teacher's response, in round-robin order, that is  (i) right in its answer,
              (ii) well structured and organised, (iii) plausible and coherent

Stage I is text-only by design: demonstrations show *how* to reason with knowledge the model has. Whatever passes is put
in the paper's message format, with its system prompt (Appendix A).

    python distill.py --questions out/curate/text.jsonl --teachers clinic:thorough clinic:hasty --out out/distill

reads questions.jsonl; writes OUT/demos.jsonl, OUT/rejected.jsonl (every refused response and why), OUT/stage.json

Where we depart from the paper, or it is silent:
  1. Criterion (i) is exact, by rule. (ii) and (iii) are rules here: one think block and one answer block, length within
     bounds, no loop, no drift into another script, no talk of a reference answer. The paper adds human validation.
  2. One chain a question (its 5,000 samples are 3K + 2K questions), teachers in turn; a teacher that fails is replaced by
     the next. The paper's three teachers "produce diverse solutions"; how many are kept is not said.
  3. The answer is written as "B. text" by default (its figures end so); --answer-form text leaves the letter out.
"""

import argparse
import re
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import data
from asking import Sampling, add_flags, ask_all, question_asks, reply_row, setup_of
from engines import open_engine

LOOP = 8  # ours: words in a row that may not come three times


def structure_fault(response: str, shortest: int, longest: int) -> str | None:
    """Criterion (ii): what is wrong with the form, or None."""
    parts = data.split_response(response)
    if parts is None:
        return "not one <think> block followed by one <answer> block"
    words = len(parts[0].split())
    if words < shortest:
        return f"the reasoning has {words} words, fewer than {shortest}"
    if words > longest:
        return f"the reasoning has {words} words, more than {longest}"
    return None if parts[1] else "the answer is empty"


def coherence_fault(response: str, question: str) -> str | None:
    """Criterion (iii), as far as rules go: loops, script drift, talk of a given answer. None if there is none."""
    words = data.normalise(response).split()
    runs = Counter(" ".join(words[i : i + LOOP]) for i in range(len(words) - LOOP + 1))
    if runs and runs.most_common(1)[0][1] >= 3:
        return f"a loop: '{runs.most_common(1)[0][0]}' {runs.most_common(1)[0][1]} times"
    scripts = {unicodedata.name(c, "?").split()[0] for c in response if c.isalpha()} - {unicodedata.name(c, "?").split()[0] for c in question if c.isalpha()}
    strange = scripts & {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC"}
    if strange:
        return f"drifts into {', '.join(sorted(strange)).lower()} script"
    if re.search(r"\b(reference|provided|given|correct) answer (is|says|states)\b", response, re.I):
        return "speaks of an answer it was given"
    return None


def check(response: str, finish_reason: str, question: data.Question, shortest: int, longest: int) -> dict[str, str | None]:
    """The three criteria: {name: fault or None}."""
    right = finish_reason == "stop" and data.is_correct(response, question)
    return {
        "correct": None if right else "the answer is wrong, or cannot be read",
        "structure": structure_fault(response, shortest, longest),
        "coherence": coherence_fault(response, data.question_text(question)),
    }


def make_demo(question: data.Question, row: dict, teacher: str, form: str) -> dict:
    thinking, _ = data.split_response(row["response"])
    said = question.answer_text() if form == "text" or not question.options else f"{question.answer}. {question.answer_text()}"
    turn = {"role": "assistant", "content": data.join_response(thinking, said)}
    return {
        "id": question.id, "sample": row["sample"], "messages": [*data.prompt_messages(question), turn], "images": question.images,
        "teacher": teacher, "checks": {"correct": True, "structure": True, "coherence": True},
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    questions = data.read_questions(args.questions)
    engines = [open_engine(spec, setup_of(args)) for spec in args.teachers]
    sampling = Sampling(args.temperature, 1.0, args.max_tokens, args.seed)
    pending, demos, rejected = list(enumerate(questions)), {}, []
    for turn in range(len(engines)):  # whoever's turn it is first; a question that failed goes to the next teacher
        for number, engine in enumerate(engines):
            mine = {q.id: q for i, q in pending if (i + turn) % len(engines) == number}
            if not mine:
                continue
            path = out / ("replies-" + "".join(c if c.isalnum() else "-" for c in engine.spec) + ".jsonl")
            data.settle(path, {"engine": engine.spec, **vars(sampling)})
            for row in ask_all(engine, question_asks(list(mine.values()), Path(args.images), 1), sampling, path, lambda r, s=engine.spec: reply_row(r, s), engine.spec):
                faults = {name: fault for name, fault in check(row["response"], row["finish_reason"], mine[row["id"]], args.min_words, args.max_words).items() if fault}
                if faults:
                    rejected.append({"id": row["id"], "teacher": engine.spec, "faults": faults, "response": row["response"]})
                else:
                    demos[row["id"]] = make_demo(mine[row["id"]], row, engine.spec, args.answer_form)
        pending = [(i, q) for i, q in pending if q.id not in demos]
    data.write_jsonl(out / "demos.jsonl", (demos[q.id] for q in questions if q.id in demos))
    data.write_jsonl(out / "rejected.jsonl", rejected)
    by_teacher = Counter(demo["teacher"] for demo in demos.values())
    by_fault = Counter(name for row in rejected for name in row["faults"])
    print(f"{len(demos)} demonstrations of {len(questions)} questions: " + ", ".join(f"{teacher} {count}" for teacher, count in sorted(by_teacher.items())))
    print(f"{len(rejected)} responses refused: " + ", ".join(f"{name} {count}" for name, count in by_fault.items()))
    data.write_stage(out, args, [args.questions], [out / "demos.jsonl"], started, demos=len(demos), refused=len(rejected), teachers=dict(by_teacher), faults=dict(by_fault))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask teachers for reasoning chains and keep what meets three criteria.")
    parser.add_argument("--questions", required=True, help="questions.jsonl")
    parser.add_argument("--images", default=".", help="image root, where demonstrations are to have images")
    parser.add_argument("--teachers", nargs="+", required=True, help="engine specs, asked in turn")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--answer-form", choices=["letter-text", "text"], default="letter-text")
    parser.add_argument("--min-words", type=int, default=5, help="shortest reasoning")  # ours: paper silent
    parser.add_argument("--max-words", type=int, default=4000, help="longest reasoning")  # ours: paper silent
    parser.add_argument("--temperature", type=float, default=1.0)  # ours: paper silent
    parser.add_argument("--max-tokens", type=int, default=8192)  # ours: paper silent
    add_flags(parser)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    run(parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
