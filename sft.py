"""Stage I (paper 3.2): a few thousand text-only demonstrations elicit reasoning, on images too.

    L = -(1 / sum w_t) * sum over response tokens t of w_t log p(y_t | x, y_<t)

The prompt is not supervised. Supervised are the response's tokens and <|im_end|>, which teaches the
model to stop. Each token has the label of its span (THINK, ANSWER, TAG), so that the loss on the
reasoning and on the answer are reported apart and can be weighted.

reads demos.jsonl, a Hugging Face folder; writes OUT/adapter (PEFT's format), OUT/merged (what Stage
II starts from), OUT/metrics.jsonl, OUT/stage.json

    torchrun --nproc_per_node 8 sft.py --model Qwen2.5-VL-7B-Instruct --demos demos.jsonl \\
        --out out/sft

Where we depart from the paper, or it is silent:
  1. lr 1e-4, LoRA and the cosine are the paper's (App. C). Epochs 3, batch 64, rank 8 and warm-up
     10 % are LLaMA-Factory's, its trainer. All span weights are 1: plain cross-entropy.
  2. The loss is a mean over all tokens of the global batch; LLaMA-Factory's is a mean over
     micro-batches of means.
  3. The newline after <|im_end|> is not supervised: generation ends at <|im_end|>.
  4. --pack puts several demonstrations in one row, each blind to the others; the system turn is
     computed once. The loss is the same, with fewer tokens.
  5. A demonstration that is too long is dropped and counted, never cut: a chain without its answer
     teaches endless thinking.
  6. OUT/merged has the dtype of the base's weight files. Weights are trained in fp32, so a small
     change may be rounded away: stage.json has the share of weights that changed and what rounding
     took of the change. --save-dtype float32 keeps all of it, in twice the space of bf16.
"""

import argparse
import math
import time
from pathlib import Path

from torch import Tensor

import data
import gate
import model
import train
from command import flags, schema, stage


def sft_loss(
    logp: Tensor, batch: model.Batch, weights: dict[int, float]
) -> tuple[Tensor, float, dict]:
    """Weighted sum of -log p over supervised tokens; logp (B, T). Returns (sum, sum of weights,
    {span: (sum, count)})."""
    row = batch.weights[:, None]  # (B, 1), 0 for a row that only keeps a rank in step
    loss, count, spans = 0.0 * logp.sum(), 0.0, {}
    for label, name in data.SPAN_NAMES.items():
        chosen = (batch.labels == label) * row  # (B, T)
        total, tokens = -(logp * chosen).sum(), float(chosen.sum())
        loss = loss + weights[label] * total
        count += weights[label] * tokens
        spans[name] = (total.item(), tokens)
    return loss, count, spans


def encode_demo(row: dict, processor: model.Processor, image_root: Path) -> model.Row:
    """prompt -> response"""
    images = [processor.encode_file(data.image_file(image_root, image)) for image in row["images"]]
    prompt = processor.encode_prompt(row["messages"][:-1], images)
    return [prompt, processor.encode_response(row["messages"][-1]["content"])]


def pack(rows: list[model.Row], stop_id: int) -> model.Row:
    """One row of several demonstrations, with the same loss. If all prompts begin with the same
    turn (the system prompt), that turn is the root and each demonstration a child of it."""
    cut = rows[0][0].ids.index(stop_id) + 1 if stop_id in rows[0][0].ids else 0
    prefix = rows[0][0].ids[:cut]
    if len(rows) == 1 or not cut or any(row[0].ids[:cut] != prefix for row in rows):
        cut = 0
    packed = [model.Segment(prefix, [data.PROMPT] * cut)] if cut else []
    for prompt, response in rows:
        ids, labels, parent = prompt.ids[cut:], prompt.labels[cut:], 0 if cut else None
        packed.append(model.Segment(ids, labels, parent, images=prompt.images))
        packed.append(model.Segment(response.ids, response.labels, len(packed) - 1))
    return packed


def pack_plan(lengths: list[int], limit: int, seed: int) -> list[list[int]]:
    """Which demonstrations share a row: in a shuffled order, as many as fit into `limit` tokens (0:
    one each)."""
    plan, room = [], -1
    for index in train.order(len(lengths), seed, -1):
        if lengths[index] > room:
            plan.append([])
            room = limit
        plan[-1].append(index)
        room -= lengths[index]
    return plan


def parse(argv: list[str] | None) -> argparse.Namespace:
    said = "Stage I: supervised fine-tuning on think/answer spans."
    parser = argparse.ArgumentParser(description=said)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder of the base model")
    said = "demos.jsonl files: text-only (the paper's choice), multimodal, or both (its ablation)"
    add("--demos", nargs="+", required=True, help=said)
    add("--images", default=".", help="image root")
    add("--out", required=True, help="folder to write")
    add("--method", choices=["lora", "full"], default="lora")  # paper App. C
    add("--lr", type=flags.RATE, default=1e-4)  # paper App. C
    # ours: paper silent (LLaMA-Factory example)
    add("--epochs", type=flags.EPOCHS, default=3)
    said = "pack demonstrations into rows of up to this many tokens; 0: one each"
    add("--pack", type=flags.whole(0), default=0, help=said)
    weight = flags.number(0, 1e6)  # ours: weighted sums must be finite in fp32
    spans, said = ("THINK", "ANSWER", "TAG"), "of the spans' tokens in the loss"
    add("--weights", type=weight, nargs=3, default=[1.0] * 3, metavar=spans, help=said)
    train.add_flags(parser, "rows")
    args = parser.parse_args(argv)
    if not any(args.weights):
        parser.error("argument --weights: at least one of them must be above 0")
    return args


def main(argv: list[str] | None = None) -> None:
    args, started = parse(argv), time.time()
    out, image_root, demos = Path(args.out), Path(args.images), " ".join(args.demos)
    device = train.init_ranks()
    rows = [row for path in args.demos for row in schema.read_rows(path, "demos")]
    images = data.image_files(image_root, rows)
    if not train.begin(args, [args.model, *args.demos], images):
        return
    processor = model.Processor(args.model, args.pixels, args.tiles)

    def encode(row: dict) -> model.Row:
        return encode_demo(row, processor, image_root)

    def response(row: dict) -> list[str]:
        return [row["messages"][-1]["content"]]

    ids = [row["id"] for row in rows]
    lengths = [
        sum(parts) for parts in gate.gate_rows(demos, rows, ids, encode, response, processor)
    ]
    kept = [row for row, length in zip(rows, lengths) if length <= args.max_length]
    lengths = [length for length in lengths if length <= args.max_length]
    dropped = len(rows) - len(kept)
    over = f"({dropped} over {args.max_length} tokens: --max-length)"
    train.print0(f"demonstrations: kept {len(kept)} of {len(rows)} {over}")
    if not kept:
        said = f"every demonstration is over {args.max_length} tokens"
        train.refuse(data.RowError(f"{demos}: {said}; raise --max-length"))
    plan = pack_plan(lengths, args.pack, args.seed)

    policy = train.build(args, device)
    seen = next((encode(row) for row in kept if row["images"]), None)
    shortest = encode(kept[lengths.index(min(lengths))])
    gate.gate_policy(policy, seen, shortest, processor, args.method == "lora", device)

    weights = dict(zip((data.THINK, data.ANSWER, data.TAG), args.weights))
    packed = [sum(lengths[j] for j in part) for part in plan]
    run = train.Run(
        policy,
        train.shuffled(len(plan), args.batch, args.epochs, args.seed),
        out=out,
        device=device,
        peak=args.lr,
        budget=args.micro_tokens or args.max_length,
        save_every=args.save_every,
        lengths=packed,
    )
    for _ in run:
        for indices, w in run.micro_batches():
            examples = [[encode(kept[j]) for j in plan[i]] for i in indices]
            rows = [pack(part, processor.stop_id) for part in examples]
            batch = model.collate(rows, processor, w).to(device)
            run.backward(*sft_loss(policy(batch), batch, weights))
        run.update()
    saved = train.save(args, policy, processor)
    if train.rank() == 0:
        finish(args, started, kept, dropped, processor, saved, run)
    train.end(out)


def finish(
    args: argparse.Namespace,
    started: float,
    kept: list[dict],
    dropped: int,
    processor: model.Processor,
    saved: dict[str, float],
    run: train.Run,
) -> None:
    """stage.json and the summary."""
    merged, history = Path(args.out) / "merged", schema.read_metrics(args.out)
    tokens = response_tokens(kept, processor)
    spans, lengths = tokens["span_tokens"], tokens["response_tokens"]
    figures = {"rows": len(kept), "dropped": dropped, "steps": len(history)}
    figures |= {"first_loss": history[0]["loss"], "last_loss": history[-1]["loss"]}
    stage.finish(args, [merged], started, figures | saved | tokens)
    lines = {
        "examples": f"{len(kept):,} trained on, {dropped:,} too long",
        "tokens": ", ".join(f"{name} {count:,}" for name, count in spans.items()),
        "loss": train.change(history, ["loss", *spans]),
        "responses": f"median {lengths['median']:,} tokens, 99 % up to {lengths['p99']:,}, longest "
        f"{lengths['longest']:,}: rollouts and evaluation need such a --max-tokens",
        "training": train.cost(history, run.lengths, run.plan),
        "next": f"python rollout.py --engine hf:{merged} --questions image.jsonl --images IMAGES "
        "--max-tokens N --out OUT",
    }
    train.summary(f"Stage I is finished: {merged}", lines)


def response_tokens(rows: list[dict], processor: model.Processor) -> dict[str, dict[str, int]]:
    """Tokens of the responses, <|im_end|> included: of each span in all of them, and of one
    response. A model that answers like them needs such a --max-tokens."""
    labels = [processor.encode_response(row["messages"][-1]["content"]).labels for row in rows]
    lengths = sorted(map(len, labels))
    p99 = lengths[math.ceil(0.99 * len(lengths)) - 1]  # ours: the longest hundredth may be outliers
    median, longest = lengths[len(lengths) // 2], lengths[-1]
    spans = data.SPAN_NAMES.items()
    return {
        "span_tokens": {name: sum(r.count(label) for r in labels) for label, name in spans},
        "response_tokens": {"median": median, "p99": p99, "longest": longest},
    }


if __name__ == "__main__":
    flags.run_script(main)
