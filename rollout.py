"""y_1 ... y_8 ~ M_1(y | q, I): the Stage-I model's own attempts at each question (paper §3.3).

Stage II does not learn from someone else's chains but from the difference between this model's good and bad ones. So
each multimodal question is answered eight times, and token ids are kept: what was sampled is what DPO will train on.
Their log-probabilities are kept where the engine tells them, so that Stage II can see whether it
trains the model that sampled (drift.py): "logp", the sum over a chain, and of the first chains
"token_logps", token by token.

reads questions.jsonl; writes OUT/rollouts.jsonl, one row a sample, and OUT/stage.json

    python rollout.py --engine hf:out/sft/merged --questions questions.jsonl --images images --out out/rollout

Where we depart from the paper, or it is silent:
  1. n = 8 is the paper's. Temperature 0.95, top-p 0.95 and 8,192 new tokens are ours (LLaMA-Factory's 0.95; its 1,024
     tokens would cut reasoning off).
  2. An answer cut off by the token limit is kept and marked "length": it counts as wrong, and is never a negative.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import bill
import data
import flags
import stage
from asking import (
    SPEED, Ask, Reply, Sampling, add_flags, ask_all, checkpoint, identity, question_asks,
    replies_file, reply_row, setup_of,
)  # fmt: skip
from engines import open_engine


TOLD = 512  # ours: chains, in the order of the questions, that keep every token's log-probability:
# one in ten comes into a pair (paper 3.3: 5K questions, eight samples), and Stage II looks at 64
CUT_OFF = 0.05  # ours: share of answers cut off by the token limit from which a warning says so


def too_short(engine: str, max_tokens: int) -> str | None:
    """A warning where the answers have less room than the demonstrations took that the engine's
    checkpoint learnt from. Stage I keeps their lengths in the stage.json beside it."""
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
    """A warning where many rollouts were cut off."""
    share = sum(row["finish_reason"] == "length" for row in rows) / max(1, len(rows))
    if share <= CUT_OFF:
        return None
    return (
        f"warning: {share:.0%} of the answers were cut off; they count as wrong and make no pairs: "
        "sample again with a larger --max-tokens, into another --out"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample n answers of every question; resumes where it was stopped.")
    parser.add_argument("--engine", required=True, help="what answers: hf:PATH or another engine spec")
    parser.add_argument("--questions", required=True, help="questions.jsonl")
    parser.add_argument("--images", default=".", help="image root")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("-n", type=flags.SAMPLES, default=8, help="samples a question")  # paper 3.3
    parser.add_argument("--temperature", type=flags.temperature, default=0.95)  # ours: paper silent
    parser.add_argument(
        "--top-p", type=flags.number(above=0, high=1), default=0.95
    )  # ours: paper silent
    parser.add_argument("--max-tokens", type=flags.TOKENS, default=8192)  # ours: paper silent
    parser.add_argument("--seed", type=flags.SEED, default=0)
    add_flags(parser)
    return parser.parse_args(argv)


def costs(asks: list[Ask], args: argparse.Namespace) -> list[bill.Cost]:
    """What the engine may be asked at most."""
    return [bill.cost("rollout", args.engine, bill.sizes(asks), 1, args.max_tokens, args.pixels)]


def main(argv: list[str] | None = None) -> None:
    args, started = parse(argv), time.time()
    path = Path(args.out) / "rollouts.jsonl"
    asks = question_asks(data.read_questions(args.questions), Path(args.images), args.n)
    inputs = [args.questions, *filter(None, [checkpoint(args.engine)])]
    if not stage.open_folder(args, inputs, SPEED, (image for ask in asks for image in ask.images)):
        return
    bill.announce(costs(asks, args), args.images_may_leave)
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
    replies = replies_file(args, "rollout", args.engine, sampling)
    if said := too_short(args.engine, args.max_tokens):
        print(said, flush=True)
    answered_by = identity(args.engine)  # before it is asked: its folder may be trained anew
    engine = open_engine(args.engine, setup_of(args))

    first = set([(ask.id, k) for ask in asks for k in ask.samples][:TOLD])

    def row_of(reply: Reply) -> dict:
        row = reply_row(reply, args.engine)
        if reply.token_logps is not None and (reply.id, reply.sample) in first:
            row["token_logps"] = reply.token_logps
        return row

    rows = list(ask_all(engine, asks, sampling, replies, row_of, "rollouts").values())
    data.write_jsonl(path, rows)
    ends = Counter(row["finish_reason"] for row in rows)
    cut = ends.pop("length", 0)
    none = {reason: count for reason, count in sorted(ends.items()) if reason != "stop"}
    others = "".join(f", {count} {reason}" for reason, count in none.items())
    limit = f"--max-tokens {args.max_tokens}"
    print(f"{len(rows)} answers to {len(asks)} questions, {cut} cut off by {limit}{others}")
    if said := cut_off(rows):
        print(said)
    figures = {"answers": len(rows), "cut_off": cut, "unanswered": sum(none.values())}
    stage.finish(args, [path], started, figures, {args.engine: answered_by})


if __name__ == "__main__":
    flags.run_script(main)
