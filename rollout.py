"""y_1 ... y_8 ~ M_1(y | q, I): the Stage-I model's own attempts at each question (paper 3.3).

Stage II learns from the difference between this model's good and bad chains. So each question (the
paper's 2,000 are image questions) is answered eight times. DPO trains on the sampled token ids,
where the engine gives them. If it gives log-probabilities, every chain has "logp", their sum: Stage
II refuses to train where its own differ (engines/drift.py). The first chains also have
"token_logps", for figures token by token.

reads questions.jsonl; writes OUT/rollouts.jsonl, one row a sample, and OUT/stage.json

    python rollout.py --engine hf:out/sft/merged --questions questions.jsonl --images images \\
        --out out/rollout

Where we depart from the paper, or it is silent:
  1. n = 8 is the paper's. Temperature 0.95, top-p 0.95 and 8,192 new tokens are ours
     (LLaMA-Factory's 0.95; its 1,024 tokens would cut reasoning off).
  2. An answer cut off by the token limit is kept and marked "length": it counts as wrong.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import data
from command import flags, schema, stage
from engines import bill, inference, open_engine
from engines.inference import Completion, Sampling

# ours: so many chains keep each token's log-probability. Stage II compares up to 64 of them that
# stand in pairs (reference.TOKEN_WISE)
BY_TOKEN = 512
CUT_OFF = 0.05  # ours: a warning is printed above this share of answers cut off


def warn_short(engine: str, max_tokens: int) -> str | None:
    """A warning if answers have less room than the demonstrations that the engine's checkpoint
    learnt from. Stage I records their lengths in the stage.json beside the checkpoint."""
    folder = inference.checkpoint(engine)
    if folder is None or not (path := Path(folder, "..", "stage.json")).exists():
        return None
    taken = stage.read_record(path)["figures"].get("response_tokens")
    if not taken or max_tokens >= taken["p99"]:
        return None
    have = f"99 % of its demonstrations have up to {taken['p99']} tokens"
    return f"warning: --max-tokens {max_tokens} is below what {engine} learnt from: {have}"


def warn_cut_off(rows: list[dict]) -> str | None:
    """A warning if many rollouts were cut off."""
    share = sum(row["finish_reason"] == "length" for row in rows) / max(1, len(rows))
    if share <= CUT_OFF:
        return None
    again = "sample again with a larger --max-tokens, into another --out"
    return f"warning: {share:.0%} of the answers were cut off and make no pairs: {again}"


def read_rollouts(path: str, questions: dict[str, data.Question]) -> list[dict]:
    """Every row of rollouts.jsonl. Raises RowError for one whose question is unknown."""
    rows = schema.read_rows(path, "rollouts")
    for number, row in enumerate(rows, 1):
        if row["id"] not in questions:
            known = "is not in the questions; give the file the rollouts were made from"
            raise data.RowError(f"{path}: row {number}: id: {row['id']!r} {known}")
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample n answers of every question.")
    add = parser.add_argument
    add("--engine", required=True, help="what answers: hf:PATH or another engine spec")
    add("--questions", required=True, help="questions.jsonl")
    add("--images", default=".", help="image root")
    add("--out", required=True, help="folder to write")
    add("-n", type=flags.SAMPLES, default=8, help="samples a question")  # paper 3.3
    add("--temperature", type=flags.temperature, default=0.95)  # ours: paper silent
    add("--top-p", type=flags.number(above=0, high=1), default=0.95)  # ours: paper silent
    add("--max-tokens", type=flags.TOKENS, default=8192)  # ours: paper silent
    add("--seed", type=flags.SEED, default=0)
    inference.add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, started = parse(argv), time.time()
    path, questions = Path(args.out) / "rollouts.jsonl", schema.read_questions(args.questions)
    requests = inference.question_requests(questions, Path(args.images), args.n)
    inputs = [args.questions, *filter(None, [inference.checkpoint(args.engine)])]
    images = [image for request in requests for image in request.images]
    if not stage.open_folder(args, inputs, inference.FREE, images):
        return
    sizes = bill.sizes(requests)
    most = bill.cost("rollout", args.engine, sizes, 1, args.max_tokens, args.pixels)
    bill.announce([most], args.images_may_leave)
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
    if warning := warn_short(args.engine, args.max_tokens):
        print(warning, flush=True)
    # before the engine is asked: its folder may be trained anew
    answered_by = inference.identity(args.engine)
    engine = open_engine(args.engine, inference.setup_of(args))
    samples = [(request.id, k) for request in requests for k in request.samples]
    first = set(samples[:BY_TOKEN])

    def row_of(completion: Completion) -> dict:
        row = inference.completion_row(completion, args.engine)
        if completion.token_logps is not None and (completion.id, completion.sample) in first:
            row["token_logps"] = completion.token_logps
        return row

    found = inference.complete_all(engine, requests, sampling, "rollout", row_of, args)
    rows = list(found.values())
    data.write_jsonl(path, rows)
    ends = Counter(row["finish_reason"] for row in rows)
    cut = ends["length"]
    others = {reason: ends[reason] for reason in sorted(ends) if reason not in ("stop", "length")}
    shown = [f"{cut} cut off by --max-tokens {args.max_tokens}"]
    shown += [f"{count} {reason}" for reason, count in others.items()]
    print(f"{len(rows)} answers to {len(requests)} questions, {', '.join(shown)}")
    if warning := warn_cut_off(rows):
        print(warning)
    figures = {"answers": len(rows), "cut_off": cut, "unanswered": sum(others.values())}
    stage.finish(args, [path], started, figures, {args.engine: answered_by})


if __name__ == "__main__":
    flags.run_script(main)
