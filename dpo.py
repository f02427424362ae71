"""Stage II (paper 3.3, Eq. 1): prefer the chain that meets every criterion over one that fails any.

    h = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]
    L = -log sigmoid(beta h)

y_w is the chosen chain, y_l the rejected one. pi_ref is the policy before its first update: its
log-probabilities are computed once, before training (reference.py). So h = 0 at the first step and
the loss is ln 2 = 0.6931; the gate refuses to train if it is off by more than rounding.

All pairs of a question in a step are one tree: the prompt, its images and each chain are computed
once, and Eq. 1 is summed over the pairs (trees.py, which also makes the plan of all steps). A tree
over --max-length is cut; only a pair that alone is longer is dropped, and counted.

The pairs of a few questions are held out: their loss, margin and accuracy stand in the log and in
metrics.jsonl (held_...). Every chain's log-probability after training is in OUT/after.jsonl.

reads pairs.jsonl, the merged Stage-I checkpoint; writes OUT/merged, OUT/metrics.jsonl,
OUT/reference.jsonl, OUT/after.jsonl, OUT/stage.json

    torchrun --nproc_per_node 8 dpo.py --model out/sft/merged --pairs out/pairs/pairs.jsonl \\
        --images images --out out/dpo

Where we depart from the paper, or it is silent:
  1. lr 1e-6, full parameters and the cosine are the paper's (App. C), as is LoRA for 32B and 72B;
     LoRA's lr, 5e-6, is ours. "Full" is the language model: vision tower and projector are frozen.
     Beta 0.1, one epoch, batch 64, warm-up 10 % are ours.
  2. LoRA trains a fresh adapter on the *merged* Stage-I weights. The paper's trainer,
     LLaMA-Factory, would go on training Stage I's adapter; its reference, the model with that
     adapter switched off, would be the base model before Stage I.
  3. A rollout's own token ids are trained on; a pair without them is tokenised, and counted.
  4. Log-probabilities are sums over the response, <|im_end|> included, as in Eq. 1, never means.
  5. --order pair shuffles pairs, as the paper's trainer does; --order question keeps a question's
     pairs in one step, which takes half the time in the miniature. Pairs of a question are alike:
     64 pairs of whole questions are worth about 23 independent ones (`worth` in each step's line).
     We had set beforehand that `question` may cost at most .02 of all-criteria chains; what it
     costs there, .015 and .017, is not surely less, so `pair` is the default (docs/running.md).
  6. Some questions' pairs are held out; the paper trains on all (--held-out 0).
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import gate
import model
import reference
import train
import trees
from command import flags, schema, stage
from engines import drift

BETA = 0.1  # ours: paper silent (LLaMA-Factory default; the DPO paper uses 0.1 to 0.5)
FIRST = 4  # ours: subtrees of a rank that are compared with the reference before training
HELD_TIMES = 10  # ours: held-out pairs are evaluated at most so often, the last time at the end


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 1, unreduced. All (E,), a value for each pair: log-probabilities of whole responses by
    the policy, then by the reference. Returns (losses, rewards of the chosen, of the rejected).

    A reward is beta (log pi - log pi_ref). d loss / d chosen = -beta sigmoid(-beta h).
    """
    reward_chosen = beta * (chosen - ref_chosen)
    reward_rejected = beta * (rejected - ref_rejected)
    return -F.logsigmoid(reward_chosen - reward_rejected), reward_chosen, reward_rejected


def response_tokens(batch: model.Batch) -> Tensor:
    """The tokens of each row's chains. (B, K)"""
    return reference.response_sums((batch.labels > 0).float(), batch)


def pair_loss(logp: Tensor, batch: model.Batch, beta: float) -> tuple[Tensor, Tensor, dict]:
    """Eq. 1 over the edges of a batch of trees. logp: (B, T), of each token. Returns the sum of the
    losses, the number of pairs, and figures as (sum, count)."""
    row, w, l = batch.edges  # (E,) each: of each pair its row, y_w and y_l
    sums, refs = reference.response_sums(logp, batch), batch.reference  # (B, K) each
    tokens = response_tokens(batch)
    losses, *rewards = dpo_loss(sums[row, w], sums[row, l], refs[row, w], refs[row, l], beta)
    weights = batch.row_weights[row]
    figures = {
        "margin": rewards[0] - rewards[1],
        "accuracy": (rewards[0] > rewards[1]).float(),
        "chosen": rewards[0] / beta,  # nats that the response has gained since the reference
        "rejected": rewards[1] / beta,
        "chosen_tokens": tokens[row, w],
        "rejected_tokens": tokens[row, l],
    }
    count = weights.sum()
    summed = {name: ((value.detach() * weights).sum(), count) for name, value in figures.items()}
    return (losses * weights).sum(), count, summed


def pair_batches(
    forest: trees.Forest, subtrees: Sequence[trees.Subtree], budget: int, device: torch.device
) -> Iterator[model.Batch]:
    """This rank's micro-batches of these subtrees, each of them once."""
    waves = reference.waves_of([one.tokens for one in subtrees], budget)

    def make_batch(parts: reference.Wave) -> model.Batch:
        indices, weights = zip(*parts[train.rank()])
        return forest.collate([subtrees[index] for index in indices], weights).to(device)

    return train.ahead(waves, make_batch)


def held_figures(
    policy: model.Policy, batches: Iterator[model.Batch], beta: float
) -> dict[str, float]:
    """Loss, margin and accuracy of the pairs that are held out. A collective."""
    found = []
    for batch in batches:
        with train.forward_only(policy):
            loss, count, figures = pair_loss(policy(batch), batch, beta)
        found.append(torch.stack([count, loss, figures["margin"][0], figures["accuracy"][0]]))
    count, *sums = train.all_reduce(torch.stack(found).double().sum(0)).tolist()
    names = ("held_loss", "held_margin", "held_accuracy")
    return {name: round(value / count, 6) for name, value in zip(names, sums)}


def gate_reference(
    policy: model.Policy, batches: Iterator[model.Batch], beta: float, device: torch.device
) -> None:
    """The plan's first subtrees must have the reference's log-probabilities and a loss of ln 2.
    Near h = 0 the loss moves by beta / 2 times h, and h by the rounding errors of two chains. A
    collective."""
    found, chains = [], []
    for batch in batches:
        with train.forward_only(policy):
            logp = policy(batch)
            loss, count, _ = pair_loss(logp, batch, beta)
        found.append(torch.stack([loss, count]))
        off = (reference.response_sums(logp, batch) - batch.reference).abs()
        chains += zip(response_tokens(batch).flatten().tolist(), off.flatten().tolist())
    loss, count = train.all_reduce(torch.stack(found).double().sum(0)).tolist()
    chains = train.all_gather(chains)  # (tokens, distance from the reference)
    wrong = [off for tokens, off in chains if not off <= gate.tolerance(tokens, device)]
    message = f"log-probabilities differ by up to {max(wrong, default=0):.4f}; if other code or "
    message += "another kind of GPU wrote reference.jsonl, remove it"
    gate.check_claim("policy equals reference", not wrong, message)
    mean, longest = loss / count, max(tokens for tokens, _ in chains)
    least = gate.tolerance(gate.SHORT, device) / 10  # ours: 1e-4 in fp32, whatever beta is
    limit = max(least, beta / 2 * gate.tolerance(2 * longest, device))
    claim = f"first loss {mean:.6f} is ln 2 = {math.log(2):.6f}"
    message = "policy and reference differ before any update"
    gate.check_claim(claim, abs(mean - math.log(2)) <= limit, message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage II: direct preference optimisation.")
    add = parser.add_argument
    add("--model", required=True, help="the merged Stage-I checkpoint: policy and reference")
    add("--pairs", required=True, help="pairs.jsonl")
    add("--images", default=".", help="image root")
    add("--out", required=True, help="folder to write")
    add("--method", choices=["full", "lora"], default="full")  # paper App. C
    # ours: beta times a difference of log-probabilities must be finite in fp32
    add("--beta", type=flags.number(above=0, high=1000), default=BETA)
    add("--lr", type=flags.RATE, default=1e-6)  # paper App. C
    add("--epochs", type=flags.EPOCHS, default=1)  # ours: paper silent
    about = "of training: pairs shuffled, or whole questions"
    add("--order", choices=trees.ORDERS, default="pair", help=about)
    # ours: paper silent
    about = "share of the questions whose pairs are evaluated, not trained on; 16 pairs or none"
    add("--held-out", type=flags.number(0, 0.5), default=0.05, help=about)
    about = "most nats a token, on average, between trainer and sampler; 0: "
    about += f"{drift.LIMIT_BF16} in bf16, {drift.LIMIT_FP32} in fp32"
    add("--max-drift", type=flags.number(0), default=0.0, help=about)
    about = "refuse pairs without the rollout's token ids"
    add("--require-token-ids", action="store_true", help=about)
    train.add_flags(parser, "pairs")
    args = parser.parse_args(argv)
    args.micro_tokens = args.micro_tokens or args.max_length
    return args


def main(argv: list[str] | None = None) -> None:
    args, started = parse(argv), time.time()
    out, device, budget = Path(args.out), train.init_ranks(), args.micro_tokens
    pairs = schema.read_rows(args.pairs, "pairs")
    if not train.begin(args, [args.model, args.pairs], data.image_files(args.images, pairs)):
        return
    forest = trees.make_forest(args, pairs)
    held = trees.held_out(forest.trees, forest.places, args.held_out)
    subtrees, steps = trees.make_plan(args, forest, held)
    policy = build(args, forest, subtrees, steps, device)

    wholes = forest.subtrees(args.max_length)  # each tree whole, unless it is over --max-length
    waves = reference.waves_of([one.tokens for one in wholes], budget)
    path = out / "reference.jsonl"
    forest.reference = reference.compute(path, policy, forest, wholes, waves, device)
    reference.gate_drift(args, pairs, forest, policy, budget, device)
    first = pair_batches(forest, subtrees[: FIRST * train.world_size()], budget, device)
    gate_reference(policy, first, args.beta, device)

    def make_batch(indices: list[int], weights: list[float]) -> model.Batch:
        return forest.collate([subtrees[index] for index in indices], weights).to(device)

    unseen = [one for one in wholes if one.tree in held]
    every, lengths = math.ceil(len(steps) / HELD_TIMES), [one.tokens for one in subtrees]
    how = {"peak": args.lr, "budget": budget, "save_every": args.save_every}
    run = train.Run(policy, steps, make_batch, out=out, device=device, lengths=lengths, **how)
    for step in run:
        for batch in run.micro_batches():
            run.backward(*pair_loss(policy(batch), batch, args.beta))
        run.update()
        run.figures |= trees.step_facts(subtrees, steps[step])
        if unseen and ((step + 1) % every == 0 or step + 1 == len(steps)):
            batches = pair_batches(forest, unseen, budget, device)
            run.figures |= held_figures(policy, batches, args.beta)
    after = out / "after.jsonl"
    if train.rank() == 0:
        after.unlink(missing_ok=True)  # a run that was killed here began it
    reference.compute(after, policy, forest, wholes, waves, device)
    saved = train.save(args, policy, forest.processor)
    if train.rank() == 0:
        finish(args, started, forest, held, saved)
    train.end(out)


def build(
    args: argparse.Namespace,
    forest: trees.Forest,
    subtrees: Sequence[trees.Subtree],
    steps: Sequence[Sequence[int]],
    device: torch.device,
) -> model.Policy:
    """The policy, sharded and checked. A collective."""
    lengths = [one.tokens for one in subtrees]
    images = max(len(tree.images) for tree in forest.trees)
    policy = train.build(args, device, steps, lengths, images)
    pictured = (one for one in subtrees if forest.trees[one.tree].images)
    pictured = next(map(forest.encode, pictured), None)
    shortest = forest.encode(min(subtrees, key=lambda one: one.tokens))
    gate.gate_policy(policy, pictured, shortest, forest.processor, args.method == "lora", device)
    return policy


def finish(
    args: argparse.Namespace,
    started: float,
    forest: trees.Forest,
    held: set[int],
    saved: dict[str, float],
) -> None:
    """stage.json and the summary."""
    merged, history = Path(args.out) / "merged", schema.read_metrics(args.out)
    first, last = history[0], history[-1]
    unseen = sum(tree in held for tree, _ in forest.places)
    trained, dropped = len(forest.places) - unseen, forest.dropped
    figures = {"pairs": trained, "held_out": unseen, "dropped": dropped, "steps": len(history)}
    figures |= {"first_loss": first["loss"], "last_loss": last["loss"]}
    figures |= {name: value for name, value in last.items() if name.startswith("held_")}
    stage.finish(args, [merged], started, figures | saved)
    lines = {
        "pairs": f"{trained:,} trained on, {unseen:,} held out, {dropped:,} too long",
        "next": f"python evaluate.py --engine hf:{merged} --questions test.jsonl "
        "--images IMAGES --max-tokens N --out OUT",
    }
    shown = ["loss", "margin", "accuracy"]
    train.summary(f"Stage II is finished: {merged}", history, shown, lines)


if __name__ == "__main__":
    flags.run_script(main)
