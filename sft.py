"""Stage I (paper 3.2): a few thousand text-only demonstrations elicit reasoning, on images too.

    L = -(1 / sum w_t) * sum over response tokens t of w_t log p(y_t | x, y_<t)

The loss is on the response's tokens and on <|im_end|>, which teaches the model to stop; the prompt
has none. Each token has the label of its span (THINK, ANSWER, TAG), so that the loss on the
reasoning and on the answer are reported apart and can be weighted.

reads demos.jsonl, a Hugging Face folder; writes OUT/merged (what Stage II starts from),
OUT/adapter (with LoRA; PEFT's format), OUT/metrics.jsonl, OUT/stage.json

    torchrun --nproc_per_node 8 sft.py --model Qwen2.5-VL-7B-Instruct --demos demos.jsonl \\
        --out out/sft

Where we depart from the paper, or it is silent:
  1. lr 1e-4, LoRA and the cosine are the paper's (App. C). Epochs 3, batch 64, rank 8 and warm-up
     10 % are LLaMA-Factory's, its trainer. All span weights are 1: plain cross-entropy.
  2. The loss is a mean over all tokens of the global batch; LLaMA-Factory's is a mean over
     micro-batches of means.
  3. The newline after <|im_end|> is not supervised: generation ends at <|im_end|>.
  4. --pack puts several demonstrations in one row, which do not see each other; the system turn is
     computed once. A row has the loss of its demonstrations, in fewer tokens; --batch counts rows.
  5. A demonstration that is too long is dropped and counted, never cut: from a chain without its
     answer the model would learn to think without end.
  6. OUT/merged has the dtype of the base's weight files. Weights are trained in fp32, and a small
     change may be rounded away: stage.json says how much. --save-dtype float32 keeps all of it.
"""

import argparse
import math
import time
from collections import Counter
from pathlib import Path

from torch import Tensor

import data
import gate
import model
import train
from command import flags, schema, stage


def sft_loss(
    logp: Tensor, batch: model.Batch, span_weights: dict[int, float]
) -> tuple[Tensor, Tensor, dict]:
    """Weighted sum of -log p over supervised tokens; logp (B, T). Returns (sum, sum of weights,
    {span: (sum, count)})."""
    row = batch.row_weights[:, None]  # (B, 1), 0 for a row that only keeps a rank in step
    loss, count, spans = 0.0, 0.0, {}
    for label, name in data.SPAN_NAMES.items():
        own = (batch.labels == label) * row  # (B, T)
        total, tokens = -(logp * own).sum(), own.sum()
        loss = loss + span_weights[label] * total
        count = count + span_weights[label] * tokens
        spans[name] = (total.detach(), tokens)
    return loss, count, spans


def encode_demo(row: dict, processor: model.Processor, image_root: Path) -> model.Row:
    """prompt -> response"""
    images = [processor.encode_file(data.image_file(image_root, image)) for image in row["images"]]
    prompt = processor.encode_prompt(row["messages"][:-1], images)
    return [prompt, processor.encode_response(row["messages"][-1]["content"])]


def read_demos(
    args: argparse.Namespace, rows: list[dict], processor: model.Processor
) -> list[tuple[dict, Counter]]:
    """Checks all demonstrations. Returns (demonstration, its tokens by label) of those within
    --max-length, and prints how many these are. A collective."""
    tokens = gate.gate_rows(
        " ".join(args.demos),
        "demonstrations",
        [(row["id"], row, [row["messages"][-1]["content"]]) for row in rows],
        lambda row: encode_demo(row, processor, Path(args.images)),
        lambda encoded: Counter(label for segment in encoded for label in segment.labels),
        processor,
    )
    kept = [(row, n) for row, n in zip(rows, tokens) if n.total() <= args.max_length]
    over = f"{len(rows) - len(kept)} over {args.max_length} tokens: --max-length"
    train.print0(f"demonstrations: kept {len(kept)} of {len(rows)} ({over})")
    if not kept:
        message = f"{' '.join(args.demos)}: every demonstration is over {args.max_length} tokens"
        train.refuse(data.RowError(f"{message}; raise --max-length"))
    return kept


def pack(rows: list[model.Row], stop_id: int) -> model.Row:
    """One row of several demonstrations, with the same loss. If all prompts begin with the same
    turn (the system prompt), that turn is the root and each demonstration a child of it."""
    cut = rows[0][0].ids.index(stop_id) + 1
    first = rows[0][0].ids[:cut]
    if len(rows) == 1 or any(row[0].ids[:cut] != first for row in rows):
        cut = 0
    packed = [model.Segment(first, [data.PROMPT] * cut)] if cut else []
    for prompt, response in rows:
        ids, labels, parent = prompt.ids[cut:], prompt.labels[cut:], 0 if cut else None
        packed.append(model.Segment(ids, labels, parent, images=prompt.images))
        packed.append(model.Segment(response.ids, response.labels, len(packed) - 1))
    return packed


def pack_plan(lengths: list[int], limit: int, seed: int) -> list[list[int]]:
    """Which demonstrations share a row: in a shuffled order, as many as fit into `limit` tokens (0:
    one each)."""
    plan, room = [], -1
    for index in train.order(len(lengths), seed, -1):  # -1: before the first epoch
        if lengths[index] > room:
            plan.append([])
            room = limit
        plan[-1].append(index)
        room -= lengths[index]
    return plan


def parse(argv: list[str] | None) -> argparse.Namespace:
    about = "Stage I: supervised fine-tuning on think/answer spans."
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder of the base model")
    about = "demos.jsonl files: text-only (the paper's choice), multimodal, or both (its ablation)"
    add("--demos", nargs="+", required=True, help=about)
    add("--images", default=".", help="image root")
    add("--out", required=True, help="folder to write")
    add("--method", choices=["lora", "full"], default="lora")  # paper App. C
    add("--lr", type=flags.RATE, default=1e-4)  # paper App. C
    # ours: paper silent (LLaMA-Factory example)
    add("--epochs", type=flags.EPOCHS, default=3)
    about = "demonstrations share rows of up to so many tokens; 0: one each"
    add("--pack", type=flags.whole(0), default=0, help=about)
    weight = flags.number(0, 1e6)  # ours: weighted sums must be finite in fp32
    spans, about = ("THINK", "ANSWER", "TAG"), "of the spans' tokens in the loss"
    add("--weights", type=weight, nargs=3, default=[1.0] * 3, metavar=spans, help=about)
    train.add_flags(parser, "rows")
    args = parser.parse_args(argv)
    args.micro_tokens = args.micro_tokens or args.max_length
    if not any(args.weights):
        parser.error("argument --weights: at least one of them must be above 0")
    return args


def main(argv: list[str] | None = None) -> None:
    args, started = parse(argv), time.time()
    out, root, device = Path(args.out), Path(args.images), train.init_ranks()
    rows = [row for path in args.demos for row in schema.read_rows(path, "demos")]
    if not train.begin(args, [args.model, *args.demos], data.image_files(root, rows)):
        return
    processor = model.Processor(args.model, args.pixels, args.tiles)
    demos = read_demos(args, rows, processor)
    lengths = [tokens.total() for _, tokens in demos]
    packs = pack_plan(lengths, args.pack, args.seed)
    # at most: the system turn is counted in each demonstration, and pack keeps it once
    sizes = [sum(lengths[index] for index in part) for part in packs]
    steps = train.shuffled(len(packs), args.batch, args.epochs, args.seed)
    train.print0(f"plan: {len(steps)} steps; an epoch is {len(packs)} rows, {sum(sizes):,} tokens")

    def encode(index: int) -> model.Row:
        return encode_demo(demos[index][0], processor, root)

    images = max(sum(len(demos[index][0]["images"]) for index in part) for part in packs)
    policy = train.build(args, device, steps, sizes, images)
    pictured = next((encode(index) for index, (row, _) in enumerate(demos) if row["images"]), None)
    shortest = encode(lengths.index(min(lengths)))
    gate.gate_policy(policy, pictured, shortest, processor, args.method == "lora", device)

    def make_batch(indices: list[int], weights: list[float]) -> model.Batch:
        packed = [pack([encode(j) for j in packs[i]], processor.stop_id) for i in indices]
        return model.collate(packed, processor, weights).to(device)

    span_weights = dict(zip((data.THINK, data.ANSWER, data.TAG), args.weights))
    how = {"peak": args.lr, "budget": args.micro_tokens, "save_every": args.save_every}
    run = train.Run(policy, steps, make_batch, out=out, device=device, lengths=sizes, **how)
    for _ in run:
        for batch in run.micro_batches():
            run.backward(*sft_loss(policy(batch), batch, span_weights))
        run.update()
    saved = train.save(args, policy, processor)
    if train.rank() == 0:
        finish(args, started, [tokens for _, tokens in demos], len(rows) - len(demos), saved)
    train.end(out)


def finish(
    args: argparse.Namespace,
    started: float,
    tokens: list[Counter],
    dropped: int,
    saved: dict[str, float],
) -> None:
    """stage.json and the summary. tokens: of each demonstration, by label."""
    merged, history = Path(args.out) / "merged", schema.read_metrics(args.out)
    spans = {name: sum(n[label] for n in tokens) for label, name in data.SPAN_NAMES.items()}
    lengths = sorted(n.total() - n[data.PROMPT] for n in tokens)  # of the responses
    p99 = lengths[math.ceil(0.99 * len(lengths)) - 1]  # ours: the longest hundredth may be outliers
    median, longest = lengths[len(lengths) // 2], lengths[-1]
    figures = {"rows": len(tokens), "dropped": dropped, "steps": len(history)}
    figures |= {"first_loss": history[0]["loss"], "last_loss": history[-1]["loss"]}
    figures |= saved | {"span_tokens": spans}
    figures |= {"response_tokens": {"median": median, "p99": p99, "longest": longest}}
    stage.finish(args, [merged], started, figures)
    lines = {
        "examples": f"{len(tokens):,} trained on, {dropped:,} too long",
        "tokens": ", ".join(f"{name} {count:,}" for name, count in spans.items()),
        "responses": f"median {median:,} tokens, 99 % up to {p99:,}, longest {longest:,}: "
        "rollouts and evaluation need such a --max-tokens",
        "next": f"python rollout.py --engine hf:{merged} --questions image.jsonl --images IMAGES "
        "--max-tokens N --out OUT",
    }
    train.summary(f"Stage I is finished: {merged}", history, ["loss", *spans], lines)


if __name__ == "__main__":
    flags.run_script(main)
