"""Stage I (paper §3.2): a few thousand text-only demonstrations elicit reasoning that then also works on images.

    L = - (1 / sum w_t) * sum over response tokens t of  w_t log p(y_t | x, y_<t)          (the prompt is not learnt)

Supervised are the response's tokens and <|im_end|>, which teaches the model to stop. Tokens carry the label of their
span (THINK, ANSWER, TAG), so the loss on the reasoning and on the answer are seen apart and can be weighed apart.

reads demos.jsonl, a Hugging Face folder; writes OUT/adapter (PEFT's format), OUT/merged (what Stage II starts from),
OUT/metrics.jsonl, OUT/stage.json

    torchrun --nproc_per_node 8 sft.py --model Qwen2.5-VL-7B-Instruct --demos demos.jsonl --out out/sft

Where we depart from the paper, or it is silent:
  1. lr 1e-4, LoRA and the cosine are the paper's (App. C). Epochs 3, batch 64, rank 8, warm-up 10 % are
     LLaMA-Factory's, its trainer; span weights of 1 are plain cross-entropy.
  2. The loss is a mean over all tokens of the global batch; LLaMA-Factory's is a mean over micro-batches of means.
  3. The newline after <|im_end|> is not supervised: generation ends at <|im_end|>.
  4. --pack puts several demonstrations in one row, each blind to the others, with the system turn computed once. Same
     loss, fewer tokens.
  5. A demonstration that is too long is dropped and counted, never cut: a chain without its answer teaches endless thinking.
  6. OUT/merged has the dtype of the base's weight files. Weights are trained in fp32, so a small
     change may be rounded away: stage.json has the share of weights that changed and what rounding
     took of the change. --save-dtype float32 keeps all of it, in twice the room of bf16.
"""

import argparse
import math
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import flags
import lora
import model
import stage
import train


def sft_loss(logp: Tensor, batch: model.Batch, weights: dict[int, float]) -> tuple[Tensor, float, dict]:
    """Weighted sum of -log p over supervised tokens; logp (B, T). Returns (sum, sum of weights, {span: (sum, count)})."""
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
    """One row of several demonstrations. Where all prompts begin with the same turn (the system prompt), that turn
    becomes the root and each demonstration a child of it; the loss is the same as that of the rows apart."""
    cut = rows[0][0].ids.index(stop_id) + 1 if stop_id in rows[0][0].ids else 0
    prefix = rows[0][0].ids[:cut]
    if len(rows) == 1 or not cut or any(row[0].ids[:cut] != prefix for row in rows):
        cut = 0
    packed = [model.Segment(prefix, [data.PROMPT] * cut)] if cut else []
    for prompt, response in rows:
        packed.append(model.Segment(prompt.ids[cut:], prompt.labels[cut:], 0 if cut else None, images=prompt.images))
        packed.append(model.Segment(response.ids, response.labels, len(packed) - 1))
    return packed


def pack_plan(lengths: list[int], limit: int, seed: int) -> list[list[int]]:
    """Which demonstrations share a row: in a shuffled order, as many as fit below `limit` tokens (0: one each)."""
    plan, room = [], -1
    for index in train.order(len(lengths), seed, -1):
        if lengths[index] > room:
            plan.append([])
            room = limit
        plan[-1].append(index)
        room -= lengths[index]
    return plan


# ---------------------------------------------------------------------------------------------------------------
# The gate, before the first step of either stage: what is trained wrong looks like training


def check(claim: str, holds: bool, otherwise: str) -> None:
    """One line of the gate: a claim that must hold on every rank. Raises train.Refused, on all of
    them, where it does not. A collective."""
    against = train.gather_rows([] if holds else [otherwise])
    train.print0(f"  gate: {'NOT' if against else 'ok '} {claim}")
    if against:
        train.refuse(train.Refused(f"gate: {claim}: not so; {against[0]}"))


def gate_rows(
    path: str,
    rows: Sequence,
    ids: Sequence[str],
    encode: Callable[[object], model.Row],
    responses: Callable[[object], list[str]],
    processor: model.Processor,
) -> list[list[int]]:
    """Encodes every row once, and reads its supervised tokens back. Returns the tokens of each
    row's segments."""
    lengths, invalid, different = [], [], []
    for row, name in zip(train.bar(rows, "checking rows", "row"), ids):
        try:
            encoded = encode(row)
        except data.RowError as error:
            invalid.append(f"{name}: {error}")
            continue
        lengths.append([len(segment.ids) for segment in encoded])
        for segment, text in zip(encoded[1:], responses(row), strict=True):
            both = (processor.decode(segment.ids), text)
            found, wanted = (unicodedata.normalize("NFC", t) for t in both)  # as the tokenizers do
            if found != wanted:
                different.append(f"{name}: {found[:60]!r} instead of {wanted[:60]!r}")
    said = f"{path}: {len(invalid)} are not: {'; '.join(invalid[:3])}"
    check(f"all {len(rows)} rows are valid", not invalid, said)
    said = f"{path}: {len(different)} do not: {'; '.join(different[:3])}"
    check("supervised tokens decode to the responses", not different, said)
    return lengths


def gate_policy(
    policy: model.Policy,
    row: model.Row | None,
    shortest: model.Row,
    processor: model.Processor,
    with_lora: bool,
    device: torch.device,
) -> None:
    """row: one that has images, if there is any; shortest: the row that is run forward and
    backward. The policy is where it will be trained. A collective."""
    if row:
        images = row[0].images
        pixels = torch.cat([image.pixels for image in images]).to(device)
        grids = torch.tensor([image.grid for image in images], device=device)
        with torch.no_grad():
            features = len(policy.image_features(pixels, grids))
        tokens = row[0].ids.count(policy.image_id)
        said = f"{tokens} tokens, {features} features"
        said += "; use the pixel settings and the processor of this checkpoint"
        check("image tokens equal image features", tokens == features, said)
    if with_lora:
        text = policy.language_model
        language = next(name for name, module in policy.named_modules() if module is text)
        linears = [name for name, module in text.named_modules() if isinstance(module, nn.Linear)]
        linears = {f"{language}.{name.removesuffix('.base')}" for name in linears}
        learnt = {name.rpartition(".")[0] for name in train.trained(policy)}
        claim = f"LoRA trains the {len(linears)} linear maps of the language model and nothing else"
        check(claim, learnt == linears, f"these differ: {sorted(learnt ^ linears)[:3]}")
    gate_step(policy, shortest, processor, device)


def gate_step(
    policy: model.Policy, row: model.Row, processor: model.Processor, device: torch.device
) -> None:
    """Every rank runs the same row forward and backward. No gradient stays, and no random number is
    drawn: the run goes on as if this had not been. A collective."""
    batch = model.collate([row], processor).to(device)
    loss = -policy(batch).sum()
    loss.backward()
    surprise = loss.item()
    slopes = [p.grad for p in train.trained(policy).values() if p.grad is not None]
    slopes = [bool(train.local(slope).isfinite().all()) for slope in slopes]
    policy.zero_grad(set_to_none=True)
    claim = f"the shortest row, {batch.ids.numel()} tokens, goes forward and backward"
    said = f"its -log p is {surprise}, and {slopes.count(False)} gradients are not finite"
    check(claim, math.isfinite(surprise) and any(slopes) and all(slopes), said)


# ---------------------------------------------------------------------------------------------------------------
# What a run closes with


def response_tokens(rows: list[dict], processor: model.Processor) -> dict[str, dict[str, int]]:
    """Tokens of the demonstrations' responses, <|im_end|> included: how many in each span, and how
    long a response is. A model that answers like them needs such a --max-tokens."""
    labels = [processor.encode_response(row["messages"][-1]["content"]).labels for row in rows]
    lengths = sorted(len(response) for response in labels)
    p99 = lengths[math.ceil(0.99 * len(lengths)) - 1]  # ours: the longest hundredth may be outliers
    return {
        "span_tokens": {
            name: sum(response.count(label) for response in labels)
            for label, name in data.SPAN_NAMES.items()
        },
        "response_tokens": {
            "median": lengths[len(lengths) // 2],
            "p99": p99,
            "longest": lengths[-1],
        },
    }


def summary(title: str, lines: dict[str, str]) -> None:
    """What a stage closes with, a figure a line."""
    train.print0(f"\n{title}")
    for name, text in lines.items():
        train.print0(f"  {name:<12}{text}")


def change(history: list[dict], names: Sequence[str]) -> str:
    """Figures of the first step and of the last: loss 1.204 -> 0.611, think 1.310 -> 0.702"""
    first, last = history[0], history[-1]
    return ", ".join(f"{name} {first[name]:.3f} -> {last[name]:.3f}" for name in names)


def cost(history: list[dict], lengths: Sequence[int], plan: Sequence[Sequence[int]]) -> str:
    """The steps' time, what went through them, and on a GPU the most memory that was held."""
    seconds = sum(row["seconds"] for row in history)
    tokens = sum(lengths[index] for row in history for index in plan[row["step"]])
    rate = tokens / max(seconds, 1e-3)  # a step is told in thousandths of a second
    said = f"{len(history):,} steps in {train.clock(seconds)}, {rate:,.0f} tokens/s"
    if torch.cuda.is_available():
        said += f", at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GB on the first GPU"
    return said


# ---------------------------------------------------------------------------------------------------------------


def save(
    out: Path,
    policy: model.Policy,
    processor: model.Processor,
    adapter: tuple[int, float, str] | None,
    save_dtype: str,
) -> dict[str, float]:
    """OUT/adapter and OUT/merged, or OUT/merged alone after full training. adapter: (rank, alpha,
    base). A collective. Returns model.Rounding's figures on the first rank, and prints them."""
    # they stream: gathered, merged in fp32 and written one by one, never the whole model
    tensors = train.whole_tensors(policy)
    if adapter:
        rank, alpha, base = adapter
        matrices = dict(train.whole_tensors(policy, lambda name: name.endswith((".lora_A", ".lora_B"))))
        if train.rank() == 0:
            lora.save_adapter(out / "adapter", matrices, rank, alpha, base)
        tensors = lora.merge_state(tensors, alpha / rank)
    if train.rank() > 0:
        for _ in tensors:  # the other ranks give their shards
            pass
        return {}
    dtype = policy.checkpoint.dtype if save_dtype == "auto" else torch.float32
    figures = model.save_policy(out / "merged", policy, processor, tensors, dtype=dtype)
    train.print0(
        f"saved in {dtype}: {figures['weights_changed']:.2%} of the trained weights differ from "
        f"the start's; rounding lost {figures['rounding_lost']:.2%} of the change (ratio of norms)"
    )
    return figures


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage I: supervised fine-tuning on think/answer spans.")
    parser.add_argument("--model", required=True, help="Hugging Face folder of the base model")
    parser.add_argument("--demos", nargs="+", required=True, help="demos.jsonl files: text-only (the paper's choice), multimodal, or both (its ablation)")
    parser.add_argument("--images", default=".", help="image root")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--method", choices=["lora", "full"], default="lora")  # paper App. C
    parser.add_argument("--lr", type=flags.RATE, default=1e-4)  # paper App. C
    # ours: paper silent (LLaMA-Factory example)
    parser.add_argument("--epochs", type=flags.EPOCHS, default=3)
    parser.add_argument(
        "--pack", type=flags.whole(0), default=0,
        help="pack demonstrations into rows of up to this many tokens; 0: one each",
    )  # fmt: skip
    parser.add_argument(
        # ours: weighted sums must be finite in fp32
        "--weights", type=flags.number(0, 1e6), nargs=3, default=[1.0, 1.0, 1.0],
        metavar=("THINK", "ANSWER", "TAG"), help="of the spans' tokens in the loss",
    )  # fmt: skip
    train.add_flags(parser, "rows")
    args = parser.parse_args(argv)
    if not any(args.weights):
        parser.error("argument --weights: at least one of them must be above 0")
    return args


def main(argv: list[str] | None = None) -> None:
    args, started = parse(argv), time.time()
    out, image_root, demos = Path(args.out), Path(args.images), " ".join(args.demos)
    device = train.init_ranks()
    rows = [row for path in args.demos for row in data.read_rows(path, "demos")]
    images = data.image_files(image_root, rows)
    if not train.begin(args, [args.model, *args.demos], images):
        return
    processor = model.Processor(args.model, args.pixels, args.tiles)

    def encode(row: dict) -> model.Row:
        return encode_demo(row, processor, image_root)

    def response(row: dict) -> list[str]:
        return [row["messages"][-1]["content"]]

    ids = [row["id"] for row in rows]
    lengths = [sum(parts) for parts in gate_rows(demos, rows, ids, encode, response, processor)]
    kept = [row for row, length in zip(rows, lengths) if length <= args.max_length]
    lengths = [length for length in lengths if length <= args.max_length]
    dropped = len(rows) - len(kept)
    over = f"({dropped} over {args.max_length} tokens: --max-length)"
    train.print0(f"demonstrations: kept {len(kept)} of {len(rows)} {over}")
    if not kept:
        said = f"every demonstration is over {args.max_length} tokens"
        train.refuse(data.RowError(f"{demos}: {said}; raise --max-length"))
    plan = pack_plan(lengths, args.pack, args.seed)

    policy = model.meta_policy(args.model)
    policy.freeze_vision()
    if args.method == "lora":
        lora.inject(policy.model, policy.language_model, args.rank, args.alpha, args.seed)
    count = sum(p.numel() for p in train.trained(policy).values())
    every = sum(p.numel() for p in policy.parameters())
    train.print0(f"training {count:,} of {every:,} parameters ({args.method})")
    train.shard(policy, device, args.checkpointing, args.replicas)
    seen = next((encode(row) for row in kept if row["images"]), None)
    shortest = encode(kept[lengths.index(min(lengths))])
    gate_policy(policy, seen, shortest, processor, args.method == "lora", device)

    weights = dict(zip((data.THINK, data.ANSWER, data.TAG), args.weights))
    packed = [sum(lengths[j] for j in part) for part in plan]
    steps = train.shuffled(len(plan), args.batch, args.epochs, args.seed)
    history = train.fit(train.steps(
        policy,
        lambda logp, batch: sft_loss(logp, batch, weights),
        lambda i: pack([encode(kept[j]) for j in plan[i]], processor.stop_id),
        lambda rows, w: model.collate(rows, processor, w),
        steps,
        out=out, device=device, learning_rate_peak=args.lr,
        budget=args.micro_tokens or args.max_length,
        save_every=args.save_every, lengths=packed,
    ), out)  # fmt: skip
    adapter = (args.rank, args.alpha, args.model) if args.method == "lora" else None
    saved = save(out, policy, processor, adapter, args.save_dtype)
    if train.rank() == 0:
        losses = {"first_loss": history[0]["loss"], "last_loss": history[-1]["loss"]}
        figures = {"rows": len(kept), "dropped": dropped, "steps": len(history), **losses}
        figures |= saved | response_tokens(kept, processor)
        stage.finish(args, [out / "merged"], started, figures)
        close(args, figures, history, cost(history, packed, steps))
    train.end(out)


def close(args: argparse.Namespace, figures: dict, history: list[dict], spent: str) -> None:
    """The summary of Stage I."""
    merged, spans = Path(args.out) / "merged", figures["span_tokens"]
    tokens = figures["response_tokens"]
    lines = {
        "examples": f"{figures['rows']:,} trained on, {figures['dropped']:,} too long",
        "tokens": ", ".join(f"{name} {count:,}" for name, count in spans.items()),
        "loss": change(history, ["loss", *spans]),
        "responses": f"median {tokens['median']:,} tokens, 99 % up to {tokens['p99']:,}, longest "
        f"{tokens['longest']:,}: rollouts and evaluation need such a --max-tokens",
        "training": spent,
        "next": f"python rollout.py --engine hf:{merged} --questions image.jsonl --images IMAGES "
        f"--max-tokens N --out OUT",
    }
    summary(f"Stage I is finished: {merged}", lines)


if __name__ == "__main__":
    flags.run_script(main)
