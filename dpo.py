"""Stage II (paper §3.3, Eq. 1): prefer the chain that meets every criterion over one that fails any.

    h = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]        L = -log sigmoid(beta h)

pi_ref is the policy before its first update. Its log-probabilities never change, so they are computed once, before
training, by the very code that trains, and kept in OUT/reference.jsonl under a hash of the weights, tokens and images.
Then h = 0 at the first step and the loss must be ln 2 = 0.6931: a gate refuses to go on where it is not.

A pair is one tree row: prompt -> chosen, prompt -> rejected. The prompt and its images are computed once.

reads pairs.jsonl, the merged Stage-I checkpoint; writes OUT/merged, OUT/metrics.jsonl, OUT/reference.jsonl, OUT/stage.json

    torchrun --nproc_per_node 8 dpo.py --model out/sft/merged --pairs out/pairs/pairs.jsonl --images images --out out/dpo

Where we depart from the paper, or it is silent:
  1. lr 1e-6, full parameters and the cosine are the paper's (App. C), as is LoRA for 32B and 72B (its lr, 5e-6, is
     ours). Beta 0.1, one epoch, batch 64, warm-up 10 % are ours.
  2. LoRA gets a fresh adapter on the *merged* Stage-I weights. Resuming Stage I's adapter and switching it off for the
     reference, as its trainer would, makes the reference the raw base model.
  3. Token ids from the rollout are trained on as they are. Where a pair has none, its text is tokenised, and counted.
  4. Log-probabilities are sums over the response, <|im_end|> included, never means: Eq. 1 has sums.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import flags
import lora
import model
import stage
import train
from sft import check, gate_policy, gate_rows, save

BETA = 0.1  # ours: paper silent (LLaMA-Factory default; the DPO paper uses 0.1 to 0.5)
CHOSEN, REJECTED = 1, 2  # Segment.answer of a pair's two responses
MAX_LENGTH = 8192  # ours: paper silent; prompt, chosen and rejected together


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 1, unreduced. All (B,): log-probabilities of whole responses -> (losses, chosen rewards, rejected rewards).

    A reward is beta (log pi - log pi_ref). d loss / d policy_chosen = -beta sigmoid(-beta h).
    """
    reward_chosen = beta * (policy_chosen - ref_chosen)
    reward_rejected = beta * (policy_rejected - ref_rejected)
    return -F.logsigmoid(reward_chosen - reward_rejected), reward_chosen, reward_rejected


def response_sums(logp: Tensor, batch: model.Batch) -> tuple[Tensor, Tensor]:
    """log pi(y_w|x) and log pi(y_l|x) of each row, (B,) each, from per-token log-probabilities (B, T)."""
    return tuple((logp * (batch.answer == which)).sum(1) for which in (CHOSEN, REJECTED))


def pair_loss(logp: Tensor, batch: model.Batch, beta: float) -> tuple[Tensor, float, dict]:
    """(sum of losses, number of pairs, figures as (sum, count)) for train.fit."""
    chosen, rejected = response_sums(logp, batch)
    losses, reward_chosen, reward_rejected = dpo_loss(chosen, rejected, batch.reference[:, 0], batch.reference[:, 1], beta)
    w = batch.weights
    count = float(w.sum())
    lengths = [((batch.answer == which) & (batch.labels > 0)).sum(1).float() for which in (CHOSEN, REJECTED)]
    figures = {
        "margin": reward_chosen - reward_rejected,
        "accuracy": (reward_chosen > reward_rejected).float(),
        "chosen": chosen, "rejected": rejected, "chosen_tokens": lengths[0], "rejected_tokens": lengths[1],
    }  # fmt: skip
    return (losses * w).sum(), count, {name: (float((value.detach() * w).sum()), count) for name, value in figures.items()}


# ---------------------------------------------------------------------------------------------------------------
# Pairs to rows


def encode_pair(row: dict, processor: model.Processor, image_root: Path) -> model.Row:
    """prompt -> chosen, prompt -> rejected"""
    images = [processor.encode_file(data.image_file(image_root, image)) for image in row["images"]]
    encoded = [processor.encode_prompt(row["prompt"], images)]
    for side, which in (("chosen", CHOSEN), ("rejected", REJECTED)):
        if row.get(f"{side}_token_ids"):
            encoded.append(processor.encode_tokens(row[f"{side}_token_ids"], 0, which))
        else:
            encoded.append(processor.encode_response(row[side], 0, which))
    return encoded


# ---------------------------------------------------------------------------------------------------------------
# The reference


def pair_key(row: model.Row, checkpoint: str) -> str:
    """What a reference value depends on: the checkpoint's files, the tokens, the pixels."""
    pixels = [hashlib.sha256(image.pixels.numpy().tobytes()).hexdigest() for image in row[0].images]
    return data.content_hash([checkpoint, [segment.ids for segment in row], pixels])


@torch.no_grad()
def reference_values(policy: model.Policy, encode: Callable[[int], model.Row], processor: model.Processor, indices: list[int], micro: int, device: torch.device) -> list[list[float]]:
    """log pi_ref of (chosen, rejected) for each index, in order. A collective: all ranks work through their shares."""
    mine = []
    for part in tqdm(train.micro_batches(indices, micro, train.rank(), train.world()), desc="reference", unit="batch", disable=train.rank() > 0):
        batch = model.collate([encode(index) for index, _ in part], processor).to(device)
        sums = torch.stack(response_sums(policy(batch), batch), 1).tolist()
        mine += [(index, values) for (index, weight), values in zip(part, sums) if weight]
    values = dict(train.gather_rows(mine))
    return [values[index] for index in indices]


def references(path: Path, policy: model.Policy, rows: int, encode: Callable[[int], model.Row], processor: model.Processor, checkpoint: str, micro: int, device: torch.device) -> list[list[float]]:
    """Reference values of all pairs: those stored under the same key, the others computed and stored. A few stored ones are
    computed again and compared. Raises RuntimeError if they differ: the file would then belong to another policy."""
    keys = [pair_key(encode(index), checkpoint) for index in range(rows)]
    stored = {row["key"]: [row["chosen"], row["rejected"]] for row in data.resume_jsonl(path)} if path.exists() else {}
    known = [index for index in range(rows) if keys[index] in stored]
    again = known[:: max(1, len(known) // 8)]
    for index, value in zip(again, reference_values(policy, encode, processor, again, micro, device) if again else []):
        worst = max(abs(a - b) for a, b in zip(value, stored[keys[index]]))
        if not worst <= tolerance(device) * 10:
            raise RuntimeError(f"{path}: the stored reference of pair {index} is off by {worst:.4f}; remove the file to compute it anew")
    missing = [index for index in range(rows) if keys[index] not in stored]
    for index, value in zip(missing, reference_values(policy, encode, processor, missing, micro, device) if missing else []):
        stored[keys[index]] = value
    if train.rank() == 0 and missing:
        data.write_jsonl(path, ({"key": key, "chosen": stored[key][0], "rejected": stored[key][1]} for key in dict.fromkeys(keys)))
    train.barrier()
    train.print0(f"reference: {len(missing)} pairs computed, {len(known)} from {path.name} ({len(again)} checked)")
    return [stored[key] for key in keys]


def tolerance(device: torch.device) -> float:
    """How far the first loss may be from ln 2: rounding in fp32, and in bf16, where batches of other shapes round differently."""
    return 1e-4 if device.type == "cpu" else 2e-2


# ---------------------------------------------------------------------------------------------------------------


def gate_reference(policy: model.Policy, encode: Callable[[int], tuple[model.Row, list[float]]], processor: model.Processor, beta: float, pairs: int, micro: int, device: torch.device) -> None:
    """The gate's last part (the others are in sft.py): the first pairs, as they will be trained, must have the reference's
    log-probabilities and a loss of ln 2. A collective."""
    loss, count, differences = 0.0, 0.0, []
    for part in train.micro_batches(list(range(min(pairs, 4 * train.world()))), micro, train.rank(), train.world()):
        batch = collate_pairs([encode(index) for index, _ in part], [weight for _, weight in part], processor).to(device)
        with torch.no_grad():
            logp = policy(batch)
            losses, weight, _ = pair_loss(logp, batch, beta)
        loss, count = loss + losses.item(), count + weight
        differences.append((torch.stack(response_sums(logp, batch), 1) - batch.reference).abs().max().item())
    differences, (loss, count) = train.gather_rows(differences), train.total([loss, count], device)
    limit, first = tolerance(device), loss / count
    check("policy equals reference", all(value <= 10 * limit for value in differences), f"log-probabilities differ by up to {max(differences):.4f}; remove reference.jsonl")
    check(f"first loss {first:.6f} is ln 2 = {math.log(2):.6f}", abs(first - math.log(2)) <= limit, "policy and reference differ before any update")


def collate_pairs(rows: list[tuple[model.Row, list[float]]], weights: list[float], processor: model.Processor) -> model.Batch:
    """Rows with their reference values to one batch."""
    batch = model.collate([row for row, _ in rows], processor, weights)
    return replace(batch, reference=torch.tensor([values for _, values in rows]))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage II: direct preference optimisation.")
    parser.add_argument("--model", required=True, help="the merged Stage-I checkpoint: policy and reference")
    parser.add_argument("--pairs", required=True, help="pairs.jsonl")
    parser.add_argument("--images", default=".", help="image root")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--method", choices=["full", "lora"], default="full")  # paper App. C
    parser.add_argument("--rank", type=flags.RANK, default=lora.RANK)
    parser.add_argument("--alpha", type=flags.ALPHA, default=lora.ALPHA)
    # ours: beta times a difference of log-probabilities must be finite in fp32
    parser.add_argument("--beta", type=flags.number(above=0, high=1000), default=BETA)
    parser.add_argument("--lr", type=flags.RATE, default=1e-6)  # paper App. C
    parser.add_argument("--epochs", type=flags.EPOCHS, default=1)  # ours: paper silent
    parser.add_argument(
        "--batch", type=flags.whole(1), default=64, help="pairs a step, over all ranks"
    )  # ours: paper silent
    parser.add_argument(
        "--micro-batch", type=flags.whole(1), default=1, help="pairs at once on one rank"
    )
    parser.add_argument(
        "--max-length", type=flags.whole(1), default=MAX_LENGTH,
        help="in tokens; longer pairs are dropped and counted",
    )  # fmt: skip
    parser.add_argument("--require-token-ids", action="store_true", help="refuse pairs without the rollout's token ids")
    parser.add_argument(
        "--pixels", type=flags.PIXELS, default=model.MAX_PIXELS,
        help="largest image in pixels, Qwen; as in the rollouts",
    )  # fmt: skip
    parser.add_argument(
        "--tiles", type=flags.TILES, default=model.TILES, help="most tiles of an image, InternVL"
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument(
        "--replicas", type=flags.whole(1), default=1,
        help="copies of the model, each sharded over its part of the ranks: "
        "the number of nodes, or 1",
    )  # fmt: skip
    parser.add_argument(
        "--save-every", type=flags.whole(0), default=50,
        help="steps between states to resume from; 0: no states",
    )  # fmt: skip
    parser.add_argument(
        "--save-dtype", choices=["auto", "float32"], default="auto",
        help="numbers of OUT/merged; auto: as the weight files of --model have them",
    )  # fmt: skip
    parser.add_argument("--seed", type=flags.SEED, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, started = parse(argv), time.time()
    out, image_root = Path(args.out), Path(args.images)
    device = train.init_ranks()
    if not train.begin(args, [args.model, args.pairs]):
        return
    pairs = data.read_rows(args.pairs, "pairs")
    textual = sum(not (row.get("chosen_token_ids") and row.get("rejected_token_ids")) for row in pairs)
    if textual and args.require_token_ids:
        raise data.RowError(f"{args.pairs}: {textual} pairs have no token ids; sample with an engine that tells them, or drop --require-token-ids")
    processor = model.Processor(args.model, args.pixels, args.tiles)
    lengths = gate_rows(args.pairs, pairs, lambda row: encode_pair(row, processor, image_root), lambda row: [row["chosen"], row["rejected"]], processor)
    kept = [row for row, length in zip(pairs, lengths) if length <= args.max_length]
    train.print0(f"pairs: kept {len(kept)} of {len(pairs)} ({len(pairs) - len(kept)} over {args.max_length} tokens: --max-length), {textual} tokenised from text")
    if not kept:
        raise data.RowError(f"{args.pairs}: every pair is over {args.max_length} tokens; raise --max-length")

    policy = model.meta_policy(args.model)
    policy.freeze_vision()
    if args.method == "lora":
        lora.inject(policy.model, policy.language_model, args.rank, args.alpha, args.seed)
    train.print0(f"training {sum(p.numel() for p in train.trained(policy).values()):,} of {sum(p.numel() for p in policy.parameters()):,} parameters ({args.method})")
    train.shard(policy, device, args.checkpointing, args.replicas)
    seen = next((encode_pair(row, processor, image_root) for row in kept if row["images"]), None)
    gate_policy(policy, seen, args.method == "lora", device)

    def encode_row(index: int) -> model.Row:
        return encode_pair(kept[index], processor, image_root)

    (checkpoint,) = train.gather_rows([stage.fingerprint(args.model)] if train.rank() == 0 else [])  # a 72B takes minutes: once, not on every rank
    values = references(out / "reference.jsonl", policy, len(kept), encode_row, processor, checkpoint, args.micro_batch, device)

    def encode(index: int) -> tuple[model.Row, list[float]]:
        return encode_row(index), values[index]

    gate_reference(policy, encode, processor, args.beta, len(kept), args.micro_batch, device)
    history = train.fit(
        policy,
        lambda logp, batch: pair_loss(logp, batch, args.beta),
        encode,
        lambda rows, w: collate_pairs(rows, w, processor),
        len(kept),
        out=out, device=device, learning_rate_peak=args.lr, batch=args.batch, micro=args.micro_batch, epochs=args.epochs,
        seed=args.seed, save_every=args.save_every,
    )  # fmt: skip
    adapter = (args.rank, args.alpha, args.model) if args.method == "lora" else None
    saved = save(out, policy, processor, adapter, args.save_dtype)
    if train.rank() == 0:
        figures = {"pairs": len(kept), "dropped": len(pairs) - len(kept), "steps": len(history), "first_loss": history[0]["loss"], "last_loss": history[-1]["loss"]}
        stage.finish(args, [out / "merged"], started, figures | saved)
        train.print0(json.dumps(figures))
    train.end(out)


if __name__ == "__main__":
    flags.run_script(main)
