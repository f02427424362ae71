"""Stage II (paper §3.3, Eq. 1): prefer the chain that meets every criterion over one that fails any.

    h = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]        L = -log sigmoid(beta h)

pi_ref is the policy before its first update. Its log-probabilities never change, so they are computed once, before
training, by the very code that trains, and kept in OUT/reference.jsonl. Then h = 0 at the first
step and the loss must be ln 2 = 0.6931: a gate refuses to go on where it is not.

    reference.jsonl   {"key", "logp", "tokens"}, a row for each chain, appended as they are computed

The key is a hash of the weights, the prompt, its images and the response, so a chain that stands
in several pairs is stored once, with the value from the first of them. A run that was killed
computes the rest.

All pairs of a question in a step are one tree row: its prompt and images, and every chain that they
compare, are computed once, and Eq. 1 is summed over the pairs (trees.py, which also makes the plan
of all steps). A tree over --max-length is cut; only a pair that alone is longer is dropped.

The pairs of a few questions are held out: their loss, margin and accuracy stand in the log and in
metrics.jsonl (held_...). Every chain's log-probability after training is in OUT/after.jsonl.

reads pairs.jsonl, the merged Stage-I checkpoint; writes OUT/merged, OUT/metrics.jsonl,
OUT/reference.jsonl, OUT/after.jsonl, OUT/stage.json

    torchrun --nproc_per_node 8 dpo.py --model out/sft/merged --pairs out/pairs/pairs.jsonl --images images --out out/dpo

Where we depart from the paper, or it is silent:
  1. lr 1e-6, full parameters and the cosine are the paper's (App. C), as is LoRA for 32B and 72B (its lr, 5e-6, is
     ours). Beta 0.1, one epoch, batch 64, warm-up 10 % are ours.
  2. LoRA gets a fresh adapter on the *merged* Stage-I weights. Resuming Stage I's adapter and switching it off for the
     reference, as its trainer would, makes the reference the raw base model.
  3. Token ids from the rollout are trained on as they are. Where a pair has none, its text is tokenised, and counted.
  4. Log-probabilities are sums over the response, <|im_end|> included, never means: Eq. 1 has sums.
  5. --order pair shuffles pairs, as the paper's trainer does; --order question keeps a question's
     pairs in one step. It is the same objective and another training: pairs of a question are alike,
     so that a step of 64 of them is worth about 23 (each step's line tells what its are worth).
     Measured in the miniature at the same lr, two base models, five seeds each, on development
     questions: questions train in half the time, and reach .427 and .529 of chains that meet all
     criteria where pairs reach .448 and .544 (accuracy .691, .666 and .697, .659; held-out loss
     .212, .232 and .207, .191). Pairs are the default, since questions lose more than .02 on one
     base: the margin that was set before.
"""

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import drift
import flags
import lora
import model
import stage
import train
import trees
from sft import change, check, cost, gate_policy, gate_rows, save, summary

Encoded = tuple[model.Row, list[float], Sequence[trees.Edge]]  # row, reference values, edges

BETA = 0.1  # ours: paper silent (LLaMA-Factory default; the DPO paper uses 0.1 to 0.5)
CHOSEN, REJECTED = 1, 2  # Segment.answer of a pair's two responses
SIDES = ("chosen", "rejected")  # in the order of a pair's row
CHECKED = 8  # ours: about so many stored rounds are computed again when a run goes on
TOKEN_WISE = 64  # ours: chains whose drift is measured token by token
HELD_TIMES = 10  # ours: how often in a run the pairs that are held out are looked at
SHORT = 100  # ours: tokens up to which two values of a chain may differ by 1e-3 in fp32


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 1, unreduced. All (B,): log-probabilities of whole responses -> (losses, chosen rewards, rejected rewards).

    A reward is beta (log pi - log pi_ref). d loss / d policy_chosen = -beta sigmoid(-beta h).
    """
    reward_chosen = beta * (policy_chosen - ref_chosen)
    reward_rejected = beta * (policy_rejected - ref_rejected)
    return -F.logsigmoid(reward_chosen - reward_rejected), reward_chosen, reward_rejected


def response_sums(logp: Tensor, batch: model.Batch) -> tuple[Tensor, ...]:
    """log pi(y_k|x) of each row's answers k = 1, 2, ..., (B,) each and 0 where a row has fewer, from
    per-token log-probabilities (B, T). Of a single pair: y_w and y_l."""
    answers = max(CHOSEN, REJECTED, int(batch.answer.max()))
    sums = logp.new_zeros(len(logp), answers + 1).scatter_add(1, batch.answer, logp)
    return sums[:, 1:].unbind(1)


def pair_loss(logp: Tensor, batch: model.Batch, beta: float) -> tuple[Tensor, float, dict]:
    """(sum of losses over the pairs, number of pairs, figures as (sum, count)) for train.fit."""
    row, *ends = batch.edges  # (E,) each
    sums, reference = torch.stack(response_sums(logp, batch), 1), batch.reference  # (B, K)
    (chosen, rejected), (ref_chosen, ref_rejected) = (
        [values[row, end] for end in ends] for values in (sums, reference)
    )
    losses, reward_chosen, reward_rejected = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    w = batch.weights[row]
    count = float(w.sum())
    supervised = (batch.labels > 0).to(sums.dtype)
    tokens = torch.zeros_like(sums).scatter_add(1, (batch.answer - 1).clamp_min(0), supervised)
    figures = {
        "margin": reward_chosen - reward_rejected,
        "accuracy": (reward_chosen > reward_rejected).float(),
        "chosen": chosen, "rejected": rejected,
        "chosen_tokens": tokens[row, ends[0]], "rejected_tokens": tokens[row, ends[1]],
    }  # fmt: skip
    told = {name: (float((value.detach() * w).sum()), count) for name, value in figures.items()}
    return (losses * w).sum(), count, told


# ---------------------------------------------------------------------------------------------------------------
# Pairs to trees to rows


def chain_of(row: dict, side: str, processor: model.Processor) -> trees.Chain:
    """A side of a pair: the tokens that were sampled, or where there are none its text's."""
    ids = row.get(f"{side}_token_ids") or processor.encode_response(row[side]).ids
    return trees.Chain(row[side], tuple(ids))


def question_key(row: dict, image_root: Path) -> str:
    """Pairs with the same are of one question: a hash of prompt and images. An image that is not
    there stands for itself; the gate refuses it."""
    paths = [data.image_file(image_root, image) for image in row["images"]]
    images = [data.file_hash(path) if path.is_file() else str(path) for path in paths]
    return data.content_hash([row["prompt"], images])


def encode_tree(
    tree: trees.Tree, chains: Sequence[int], processor: model.Processor, image_root: Path
) -> model.Row:
    """prompt -> each of the chains; their answers are numbered from 1."""
    images = [processor.encode_file(data.image_file(image_root, image)) for image in tree.images]
    encoded = [processor.encode_prompt(tree.prompt, images)]
    for answer, chain in enumerate(chains, 1):
        encoded.append(processor.encode_tokens(tree.chains[chain].ids, 0, answer))
    return encoded


def encode_side(
    row: dict, side: str, processor: model.Processor, image_root: Path
) -> model.Row:
    """prompt -> one response of a pair: a plain row"""
    tree = trees.Tree(row["id"], row["prompt"], row["images"], (chain_of(row, side, processor),), ())
    return encode_tree(tree, (0,), processor, image_root)


# ---------------------------------------------------------------------------------------------------------------
# The reference


def chain_keys(row: model.Row, checkpoint: str) -> list[str]:
    """Of each response, what its reference value depends on: the checkpoint's files, the tokens and
    pixels of the prompt, and its own tokens."""
    pixels = [hashlib.sha256(image.pixels.numpy().tobytes()).hexdigest() for image in row[0].images]
    return [data.content_hash([checkpoint, row[0].ids, pixels, segment.ids]) for segment in row[1:]]


Round = tuple[train.MicroBatch, ...]  # a micro-batch of every rank


def rounds_of(lengths: Sequence[int], budget: int) -> list[Round]:
    """Rounds that have every row once."""
    return list(zip(*train.micro_batches(list(range(len(lengths))), budget, train.world(), lengths)))


def rows_in(parts: Round) -> int:
    return sum(weight > 0 for part in parts for _, weight in part)


@torch.no_grad()
def log_probs(
    policy: model.Policy,
    encode: Callable[[int], model.Row],
    processor: model.Processor,
    rounds: list[Round],
    device: torch.device,
    title: str,
) -> Iterator[list[tuple[int, list[float]]]]:
    """(index, log pi of its chains) of each row, a round at a time. A collective: every rank
    computes its own micro-batch of a round, and all get all values."""
    for parts in train.bar(rounds, title, "batch"):
        part = parts[train.rank()]
        batch = model.collate([encode(index) for index, _ in part], processor).to(device)
        sums = torch.stack(response_sums(policy(batch), batch), 1).tolist()
        mine = [(index, values) for (index, weight), values in zip(part, sums) if weight]
        yield sorted(train.gather_rows(mine))


def references(
    path: Path,
    policy: model.Policy,
    rounds: list[Round],
    encode: Callable[[int], model.Row],
    processor: model.Processor,
    checkpoint: str,
    device: torch.device,
) -> tuple[list[list[float]], list[list[str]]]:
    """(reference values, keys) of all rows, one a chain. Rounds with a chain that is not stored are
    computed as they would have been, so that a run that was killed has the values of one that was
    not, to the bit. A few of the others are computed again. Raises train.Refused where a chain's
    new value is not the stored one: the file is of another policy."""
    keys, tokens = [], {}
    for index in train.bar(range(sum(map(rows_in, rounds))), "hashing rows", "row"):
        row = encode(index)
        keys.append(chain_keys(row, checkpoint))
        tokens |= {key: len(segment.ids) for key, segment in zip(keys[-1], row[1:])}
    found = data.resume_jsonl(path) if train.rank() == 0 else []  # a torn line is cut by one rank
    stored = {row["key"]: row["logp"] for row in train.gather_rows(found)}
    known, missing = [], []
    for parts in rounds:
        wanted = {key for part in parts for index, _ in part for key in keys[index]}
        (known if wanted <= stored.keys() else missing).append(parts)
    again = known[:: max(1, len(known) // CHECKED)]
    with open(path, "a", encoding="utf-8") if train.rank() == 0 else nullcontext() as log:
        for done in log_probs(policy, encode, processor, again + missing, device, "reference"):
            new = keep(path, done, keys, tokens, stored, device)
            if train.rank() == 0:
                data.append_jsonl(log, new)
    new, old, twice = (sum(map(rows_in, some)) for some in (missing, known, again))
    train.print0(f"reference: {new} rows computed, {old} from {path.name} ({twice} checked)")
    return [[stored[key] for key in row] for row in keys], keys


def keep(
    path: Path,
    done: list[tuple[int, list[float]]],
    keys: list[list[str]],
    tokens: dict[str, int],
    stored: dict[str, float],
    device: torch.device,
) -> list[dict]:
    """Adds the chains that are not stored yet to `stored`, and returns their rows. The others must
    have their stored value."""
    rows = []
    for index, values in done:
        for number, (key, value) in enumerate(zip(keys[index], values), 1):
            if key not in stored:
                stored[key] = value
                rows.append({"key": key, "logp": value, "tokens": tokens[key]})
            elif not (off := abs(value - stored[key])) <= tolerance(tokens[key], device):
                what = f"the stored reference of row {index} is off by {off:.4f} (chain {number})"
                train.refuse(train.Refused(f"{path}: {what}; remove the file to compute it anew"))
    return rows


def tolerance(tokens: int, device: torch.device) -> float:
    """How far two values of log pi(y|x), computed by the same weights, may differ.

    The rounding errors of the tokens are small and of either sign, so they add up like a random
    walk: with the square root of the length. This holds for any micro-batch: other rows beside a
    chain pad it to another length and change how its tokens round, not by how much. Chains of up
    to SHORT tokens have the limit of SHORT: in a few tokens one large error is not averaged out.
    """
    a_token = 1e-4 if device.type == "cpu" else 2e-2  # ours: rounding in fp32, and in bf16
    return a_token * math.sqrt(max(tokens, SHORT))


# ---------------------------------------------------------------------------------------------------------------


def gate_reference(
    policy: model.Policy,
    encode: Callable[[int], Encoded],
    processor: model.Processor,
    beta: float,
    lengths: Sequence[int],
    budget: int,
    device: torch.device,
) -> None:
    """The gate's last part (the others are in sft.py): the first rows, as they will be trained,
    must have the reference's log-probabilities and a loss of ln 2. A collective.

    Near h = 0 the loss moves by beta / 2 times h, and h by the errors of two chains.
    """
    loss, count, off = 0.0, 0.0, []
    for parts in rounds_of(lengths[: 4 * train.world()], budget):
        part = parts[train.rank()]
        rows = [encode(index) for index, _ in part]
        batch = collate_trees(rows, [weight for _, weight in part], processor).to(device)
        with torch.no_grad():
            logp = policy(batch)
            losses, weight, _ = pair_loss(logp, batch, beta)
        loss, count = loss + losses.item(), count + weight
        apart = (torch.stack(response_sums(logp, batch), 1) - batch.reference).abs().tolist()
        for (row, values, _), found in zip(rows, apart):
            off += zip([len(segment.ids) for segment in row[1:]], found[: len(values)])
    off, (loss, count) = train.gather_rows(off), train.total([loss, count], device)
    wrong = [apart for tokens, apart in off if not apart <= tolerance(tokens, device)]
    said = f"log-probabilities differ by up to {max(wrong, default=0):.4f}; remove reference.jsonl"
    check("policy equals reference", not wrong, said)
    first, longest = loss / count, max(tokens for tokens, _ in off)
    least = tolerance(SHORT, device) / 10  # ours: 1e-4 in fp32, whatever beta is
    limit = max(least, beta / 2 * tolerance(2 * longest, device))
    claim = f"first loss {first:.6f} is ln 2 = {math.log(2):.6f}"
    check(claim, abs(first - math.log(2)) <= limit, "policy and reference differ before any update")


@torch.no_grad()
def token_log_probs(
    policy: model.Policy,
    rows: list[model.Row],
    processor: model.Processor,
    budget: int,
    device: torch.device,
) -> list[list[float]]:
    """log pi of each supervised token of each row. A collective."""
    found = []
    for parts in rounds_of([sum(len(segment.ids) for segment in row) for row in rows], budget):
        part = parts[train.rank()]
        batch = model.collate([rows[index] for index, _ in part], processor).to(device)
        for (index, weight), logp, labels in zip(part, policy(batch), batch.labels):
            found += [(index, logp[labels > 0].tolist())] * bool(weight)
    return [logp for _, logp in sorted(train.gather_rows(found))]


def gate_drift(
    args: argparse.Namespace,
    pairs: list[dict],
    values: list[list[float]],
    policy: model.Policy,
    processor: model.Processor,
    budget: int,
    device: torch.device,
) -> None:
    """The reference's log-probabilities must be those that the sampler told: the same weights, the
    same images, the same positions. Chains whose tokens the sampler told are computed once more,
    each as a row of its own, the plain way: how far that is from the reference is the least that
    can be seen. A collective: all ranks have all values."""
    chains = drift.chains_of(pairs, values)
    if not chains:
        train.print0("drift: not measured, since no pair tells its sampler's log-probabilities")
        return
    token_wise = [place for place, chain in chains.items() if chain.sampler_tokens][:TOKEN_WISE]
    rows = [
        encode_side(pairs[pair], SIDES[side], processor, Path(args.images))
        for pair, side in token_wise
    ]
    again = token_log_probs(policy, rows, processor, budget, device)
    for place, logps in zip(token_wise, again):
        chains[place] = replace(chains[place], trainer_tokens=logps)
    limit = args.max_drift or (drift.LIMIT_BF16 if device.type == "cuda" else drift.LIMIT_FP32)
    found = drift.compare(list(chains.values()))
    train.print0(f"drift: {drift.told(found)}; the limit is {limit:g} (--max-drift)")
    if token_wise:
        own = drift.floor([chains[place] for place in token_wise])
        train.print0(f"drift: of the trainer against itself, {drift.told(own)}")
    try:
        drift.check(found, limit, args.pairs)
    except data.RowError as error:
        train.refuse(error)


@torch.no_grad()
def held_figures(
    policy: model.Policy,
    rows: list[trees.Row],
    encode: Callable[[trees.Row], Encoded],
    processor: model.Processor,
    beta: float,
    budget: int,
    device: torch.device,
) -> dict[str, float]:
    """Loss, margin and accuracy of the pairs that are held out. A collective."""
    sums = [0.0] * 4
    for parts in rounds_of([row.tokens for row in rows], budget):
        part = parts[train.rank()]
        weights = [weight for _, weight in part]
        batch = collate_trees([encode(rows[index]) for index, _ in part], weights, processor).to(device)
        loss, count, figures = pair_loss(policy(batch), batch, beta)
        found = [count, loss.item(), figures["margin"][0], figures["accuracy"][0]]
        sums = [total + value for total, value in zip(sums, found)]
    count, *totals = train.total(sums, device)
    names = ("held_loss", "held_margin", "held_accuracy")
    return {name: round(total / count, 6) for name, total in zip(names, totals)}


def collate_trees(
    rows: list[Encoded], weights: list[float], processor: model.Processor
) -> model.Batch:
    """Rows with their reference values and edges to one batch."""
    batch = model.collate([row for row, _, _ in rows], processor, weights)
    reference = torch.zeros(len(rows), max(len(values) for _, values, _ in rows))
    for b, (_, values, _) in enumerate(rows):
        reference[b, : len(values)] = torch.tensor(values)
    edges = [(b, *edge) for b, (_, _, own) in enumerate(rows) for edge in own]
    return replace(batch, reference=reference, edges=torch.tensor(edges).T)


def pair_tokens(sizes: Sequence[int], edge: trees.Edge) -> int:
    """Of a single pair: its prompt and its two chains."""
    return sizes[0] + sum(sizes[1 + chain] for chain in edge)


def within(
    grown: list[trees.Tree], places: list[tuple[int, int]], sizes: list[list[int]], limit: int
) -> tuple[list[list[trees.Edge]], list[tuple[int, int]], list[int], list[int]]:
    """(edges of each tree, (tree, edge) of each pair that fits, tokens of the pairs left out, which
    pairs fit): without the pairs that alone are over `limit` tokens."""
    edges: list[list[trees.Edge]] = [[] for _ in grown]
    kept, dropped, fitting = [], [], []
    for pair, (tree, number) in enumerate(places):
        tokens = pair_tokens(sizes[tree], grown[tree].edges[number])
        if tokens > limit:
            dropped.append(tokens)
            continue
        fitting.append(pair)
        kept.append((tree, len(edges[tree])))
        edges[tree].append(grown[tree].edges[number])
    return edges, kept, dropped, fitting


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage II: direct preference optimisation.")
    parser.add_argument("--model", required=True, help="the merged Stage-I checkpoint: policy and reference")
    parser.add_argument("--pairs", required=True, help="pairs.jsonl")
    parser.add_argument("--images", default=".", help="image root")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--method", choices=["full", "lora"], default="full")  # paper App. C
    # ours: beta times a difference of log-probabilities must be finite in fp32
    parser.add_argument("--beta", type=flags.number(above=0, high=1000), default=BETA)
    parser.add_argument("--lr", type=flags.RATE, default=1e-6)  # paper App. C
    parser.add_argument("--epochs", type=flags.EPOCHS, default=1)  # ours: paper silent
    parser.add_argument(
        "--order", choices=trees.ORDERS, default="pair",
        help="of training: pairs shuffled, or whole questions",
    )  # fmt: skip
    # ours: paper silent; a share of the questions
    said = "share of the questions whose pairs are not trained on, and are looked at on the way"
    parser.add_argument("--held-out", type=flags.number(0, 0.5), default=0.05, help=said)
    said = "most nats a token between trainer and sampler; 0: 0.005 in bf16, 0.0001 in fp32"
    parser.add_argument("--max-drift", type=flags.number(0), default=0.0, help=said)
    parser.add_argument("--require-token-ids", action="store_true", help="refuse pairs without the rollout's token ids")
    train.add_flags(parser, "pairs")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, started = parse(argv), time.time()
    out, image_root = Path(args.out), Path(args.images)
    device = train.init_ranks()
    pairs = data.read_rows(args.pairs, "pairs")
    if not train.begin(args, [args.model, args.pairs], data.image_files(image_root, pairs)):
        return
    whole = [row for row in pairs if row.get("chosen_token_ids") and row.get("rejected_token_ids")]
    textual = len(pairs) - len(whole)
    if textual and args.require_token_ids:
        said = f"{args.pairs}: {textual} pairs have no token ids; sample with an engine"
        train.refuse(data.RowError(f"{said} that tells them, or drop --require-token-ids"))
    processor = model.Processor(args.model, args.pixels, args.tiles)

    grown, places = trees.group(
        pairs,
        lambda row, side: chain_of(row, side, processor),
        lambda row: question_key(row, image_root),
    )

    def encode_row(row: trees.Row) -> model.Row:
        return encode_tree(grown[row.tree], row.chains, processor, image_root)

    def encode_whole(tree: trees.Tree) -> model.Row:
        return encode_tree(tree, range(len(tree.chains)), processor, image_root)

    def responses(tree: trees.Tree) -> list[str]:
        return [chain.text for chain in tree.chains]

    ids = [tree.id for tree in grown]
    sizes = gate_rows(args.pairs, grown, ids, encode_whole, responses, processor)
    edges, places, dropped, fitting = within(grown, places, sizes, args.max_length)
    over = f"({len(dropped)} over {args.max_length} tokens: --max-length)"
    train.print0(f"pairs: kept {len(places)} of {len(pairs)} {over}, {textual} tokenised from text")
    if not places:
        said = f"every pair is over {args.max_length} tokens"
        train.refuse(data.RowError(f"{args.pairs}: {said}; raise --max-length"))
    if dropped:
        kept = max(pair_tokens(sizes[tree], edges[tree][edge]) for tree, edge in places)
        tokens = f"{min(dropped):,} to {max(dropped):,} tokens, those kept up to {kept:,}"
        train.print0(f"warning: the pairs that are dropped have {tokens}: long chains go first")
    held = trees.held_out(grown, list(map(len, edges)), args.held_out)
    trained_on = [[] if tree in held else own for tree, own in enumerate(edges)]
    rows, steps = trees.plan(
        trained_on, [place for place in places if place[0] not in held], sizes,
        args.order, args.batch, args.epochs, args.seed, args.max_length,
    )  # fmt: skip
    lengths = [row.tokens for row in rows]
    budget = args.micro_tokens or args.max_length
    used = train.efficiency(steps, budget, train.world(), lengths)
    train.print0(
        f"plan: {len(steps)} steps of {len(rows)} trees, {sum(lengths):,} tokens, of "
        f"{sum(map(bool, trained_on))} questions; efficiency on {train.world()} ranks {used:.2f}"
    )
    pairs_held = sum(len(edges[tree]) for tree in held)
    train.print0(f"held out: {pairs_held} pairs of {len(held)} questions")

    policy = model.meta_policy(args.model)
    policy.freeze_vision()
    if args.method == "lora":
        lora.inject(policy.model, policy.language_model, args.rank, args.alpha, args.seed)
    count = sum(p.numel() for p in train.trained(policy).values())
    every = sum(p.numel() for p in policy.parameters())
    train.print0(f"training {count:,} of {every:,} parameters ({args.method})")
    train.shard(policy, device, args.checkpointing, args.replicas)
    seen = next((encode_row(row) for row in rows if grown[row.tree].images), None)
    shortest = encode_row(rows[lengths.index(min(lengths))])
    gate_policy(policy, seen, shortest, processor, args.method == "lora", device)

    # a 72B takes minutes: once, not on every rank
    own = [stage.fingerprint(args.model)] if train.rank() == 0 else []
    (checkpoint,) = train.gather_rows(own)
    # all of a question's chains at once, whatever the plan makes of its pairs
    wholes = [
        row for tree, own in enumerate(edges)
        for row in trees.rows_of(tree, sizes[tree], own, args.max_length)
    ]  # fmt: skip

    def encode_whole_row(index: int) -> model.Row:
        return encode_row(wholes[index])

    rounds = rounds_of([row.tokens for row in wholes], budget)
    values, keys = references(
        out / "reference.jsonl", policy, rounds, encode_whole_row, processor, checkpoint, device
    )
    logp = {
        (row.tree, chain): value
        for row, found in zip(wholes, values) for chain, value in zip(row.chains, found)
    }  # fmt: skip

    ends = [edges[tree][edge] for tree, edge in places]
    both = [[logp[tree, end] for end in pair] for (tree, _), pair in zip(places, ends)]
    gate_drift(args, [pairs[index] for index in fitting], both, policy, processor, budget, device)

    def with_reference(row: trees.Row) -> Encoded:
        return encode_row(row), [logp[row.tree, chain] for chain in row.chains], row.edges

    def encode(index: int) -> Encoded:
        return with_reference(rows[index])

    gate_reference(policy, encode, processor, args.beta, lengths, budget, device)
    unseen = [row for row in wholes if row.tree in held]
    every = math.ceil(len(steps) / HELD_TIMES)
    for row in train.steps(
        policy,
        lambda logp, batch: pair_loss(logp, batch, args.beta),
        encode,
        lambda rows, w: collate_trees(rows, w, processor),
        steps,
        out=out, device=device, learning_rate_peak=args.lr, budget=budget,
        save_every=args.save_every, lengths=lengths,
        told=[trees.told(rows, step) for step in steps],
    ):  # fmt: skip
        if unseen and ((row["step"] + 1) % every == 0 or row["step"] + 1 == len(steps)):
            row |= held_figures(
                policy, unseen, with_reference, processor, args.beta, budget, device
            )
    after = {}
    for done in log_probs(policy, encode_whole_row, processor, rounds, device, "after"):
        after |= dict(done)
    adapter = (args.rank, args.alpha, args.model) if args.method == "lora" else None
    saved = save(out, policy, processor, adapter, args.save_dtype)
    if train.rank() == 0:
        history = data.read_metrics(out)
        told = {key: value for index, found in after.items() for key, value in zip(keys[index], found)}
        data.write_jsonl(out / "after.jsonl", ({"key": key, "logp": told[key]} for key in told))
        losses = {"first_loss": history[0]["loss"], "last_loss": history[-1]["loss"]}
        losses |= {name: value for name, value in history[-1].items() if name.startswith("held_")}
        counts = {"pairs": len(places) - pairs_held, "held_out": pairs_held, "dropped": len(dropped)}
        figures = {**counts, "steps": len(history), **losses}
        stage.finish(args, [out / "merged"], started, figures | saved)
        close(args, figures, history, cost(history, lengths, steps))
    train.end(out)


def close(args: argparse.Namespace, figures: dict, history: list[dict], spent: str) -> None:
    """The summary of Stage II."""
    merged = Path(args.out) / "merged"
    lines = {
        "pairs": f"{figures['pairs']:,} trained on, {figures['held_out']:,} held out, "
        f"{figures['dropped']:,} too long",
        "loss": change(history, ["loss", "margin", "accuracy"]),
        "training": spent,
        "next": f"python evaluate.py run --engine hf:{merged} --questions test.jsonl "
        "--images IMAGES --max-tokens N --out OUT",
    }
    summary(f"Stage II is finished: {merged}", lines)


if __name__ == "__main__":
    flags.run_script(main)
