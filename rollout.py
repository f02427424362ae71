"""y_1 ... y_8 ~ M_1(y | q, I): the Stage-I model's own attempts at each question (paper §3.3).

Stage II learns from the difference between this model's good and bad chains, not from the chains of
others. So each multimodal question is answered eight times. The token ids are kept, because DPO
trains on exactly what was sampled. Log-probabilities are kept if the engine gives them: "logp", the
sum over a chain, and for the first chains "token_logps", token by token. By these Stage II checks
that it trains the model that sampled (engines/drift.py).

reads questions.jsonl; writes OUT/rollouts.jsonl, one row a sample, and OUT/stage.json

    python rollout.py --engine hf:out/sft/merged --questions questions.jsonl --images images \\
        --out out/rollout

Where we depart from the paper, or it is silent:
  1. n = 8 is the paper's. Temperature 0.95, top-p 0.95 and 8,192 new tokens are ours
     (LLaMA-Factory's 0.95; its 1,024 tokens would cut reasoning off).
  2. An answer cut off by the token limit is kept and marked "length": it counts as wrong, and is
     never a negative.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import data
from command import flags, schema, stage
from engines import bill, open_engine
from engines.inference import (
    SPEED,
    Completion,
    Request,
    Sampling,
    add_flags,
    checkpoint,
    complete_all,
    completion_row,
    completions_file,
    identity,
    question_requests,
    setup_of,
)

# ours: so many chains, in the order of the questions, keep each token's log-probability. One in ten
# comes into a pair (paper 3.3: 5K questions, eight samples), and Stage II looks at 64.
BY_TOKEN = 512
# ours: from this share of answers cut off by the token limit on, a warning is printed
CUT_OFF = 0.05


def too_short(engine: str, max_tokens: int) -> str | None:
    """A warning if answers have less room than the demonstrations that the engine's checkpoint
    learnt from. Stage I records their lengths in the stage.json beside the checkpoint."""
    folder = checkpoint(engine)
    path = Path(folder, "..", "stage.json") if folder else None
    if path is None or not path.exists():
        return None
    taken = stage.read_record(path)["figures"].get("response_tokens")
    if not taken or max_tokens >= taken["p99"]:
        return None
    return (
        f"warning: --max-tokens {max_tokens} is below what {engine} learnt from: 99 % of its "
        f"demonstrations have up to {taken['p99']} tokens, the longest {taken['longest']}"
    )


def cut_off(rows: list[dict]) -> str | None:
    """A warning if many rollouts were cut off."""
    share = sum(row["finish_reason"] == "length" for row in rows) / max(1, len(rows))
    if share <= CUT_OFF:
        return None
    return (
        f"warning: {share:.0%} of the answers were cut off; they count as wrong and make no pairs: "
        "sample again with a larger --max-tokens, into another --out"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    said = "Sample n answers of every question; resumes where it was stopped."
    parser = argparse.ArgumentParser(description=said)
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
    add_flags(parser)
    return parser.parse_args(argv)


def costs(requests: list[Request], args: argparse.Namespace) -> list[bill.Cost]:
    """What the engine may be asked at most."""
    sizes = bill.sizes(requests)
    return [bill.cost("rollout", args.engine, sizes, 1, args.max_tokens, args.pixels)]


def main(argv: list[str] | None = None) -> None:
    args, started = parse(argv), time.time()
    path = Path(args.out) / "rollouts.jsonl"
    requests = question_requests(schema.read_questions(args.questions), Path(args.images), args.n)
    inputs = [args.questions, *filter(None, [checkpoint(args.engine)])]
    images = [image for request in requests for image in request.images]
    if not stage.open_folder(args, inputs, SPEED, images):
        return
    bill.announce(costs(requests, args), args.images_may_leave)
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
    completions = completions_file(args, "rollout", args.engine, sampling)
    if said := too_short(args.engine, args.max_tokens):
        print(said, flush=True)
    answered_by = identity(args.engine)  # before it is asked: its folder may be trained anew
    engine = open_engine(args.engine, setup_of(args))

    first = set([(request.id, k) for request in requests for k in request.samples][:BY_TOKEN])

    def row_of(completion: Completion) -> dict:
        row = completion_row(completion, args.engine)
        if completion.token_logps is not None and (completion.id, completion.sample) in first:
            row["token_logps"] = completion.token_logps
        return row

    rows = list(complete_all(engine, requests, sampling, completions, row_of, "rollouts").values())
    data.write_jsonl(path, rows)
    ends = Counter(row["finish_reason"] for row in rows)
    cut = ends.pop("length", 0)
    none = {reason: count for reason, count in sorted(ends.items()) if reason != "stop"}
    others = "".join(f", {count} {reason}" for reason, count in none.items())
    limit = f"--max-tokens {args.max_tokens}"
    print(f"{len(rows)} answers to {len(requests)} questions, {cut} cut off by {limit}{others}")
    if said := cut_off(rows):
        print(said)
    figures = {"answers": len(rows), "cut_off": cut, "unanswered": sum(none.values())}
    stage.finish(args, [path], started, figures, {args.engine: answered_by})


if __name__ == "__main__":
    flags.run_script(main)
