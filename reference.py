"""log pi_ref: the policy's log-probabilities before its first update, computed once.

    log pi(y | x) = sum over the tokens of y of log p(y_t | x, y_<t)

The reference never changes, so each chain's value is computed before training, by the code that
trains, and stored. A chain that stands in several pairs is stored once.

    reference.jsonl   {"key", "logp", "tokens"}, a row for each chain, appended as it is computed
    after.jsonl       the same after training, under the same keys, for whoever compares the two

The key is a hash of the Stage-I weights, the prompt, its images and the response. A run that was
killed computes the rest. With as many ranks and the same --micro-tokens it has the same batches,
and the values are the same to the bit.

gate_drift compares the values with the log-probabilities that the sampler recorded
(engines/drift.py).

Where we depart from the paper, or it is silent: its trainer computes the reference at every step,
by a second model or with the adapter switched off.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import model
import train
import trees
from engines import drift

TOKEN_WISE = 64  # ours: chains whose drift is measured token by token


def response_sums(logp: Tensor, batch: model.Batch) -> Tensor:
    """log pi(y|x) of each row's K responses from per-token log-probabilities (B, T). (B, K), 0
    where a row has fewer. Chain i of a subtree is branch i + 1; branch 0 is the prompt's."""
    sums = logp.new_zeros(len(logp), batch.branches + 1)
    return sums.scatter_add(1, batch.branch, logp)[:, 1:]


Wave = tuple[train.MicroBatch, ...]  # what the ranks compute at one time, a micro-batch each


def waves_of(lengths: Sequence[int], budget: int) -> list[Wave]:
    """Waves that have every row once."""
    rows, ranks = list(range(len(lengths))), train.world_size()
    return list(zip(*train.deal_rows(rows, budget, ranks, lengths)))


def log_probs(
    policy: model.Policy,
    forest: trees.Forest,
    subtrees: Sequence[trees.Subtree],
    waves: list[Wave],
    device: torch.device,
    title: str,
) -> Iterator[list[tuple[int, list[float]]]]:
    """(index, log pi of its chains) of each subtree, a wave at a time. A collective: every rank
    computes its own micro-batch, and all get all values."""

    def make_batch(parts: Wave) -> model.Batch:
        own = [forest.encode(subtrees[index]) for index, _ in parts[train.rank()]]
        return model.collate(own, forest.processor).to(device)

    batches = train.ahead(waves, make_batch)
    shown = tqdm(waves, title, unit="batch", disable=train.rank() > 0)
    for parts, batch in zip(shown, batches):
        with train.forward_only(policy):
            sums = response_sums(policy(batch), batch).tolist()
        part = parts[train.rank()]
        mine = [(index, values) for (index, weight), values in zip(part, sums) if weight]
        yield sorted(train.all_gather(mine))


def compute(
    path: Path,
    policy: model.Policy,
    forest: trees.Forest,
    subtrees: Sequence[trees.Subtree],
    waves: list[Wave],
    device: torch.device,
) -> dict[str, float]:
    """log pi of each chain by the policy as it is now, by the chain's key; `path` has what was
    computed before. A wave with any chain that it does not have is computed whole, as in a run that
    was not killed."""
    found = train.from_first(lambda: data.resume_jsonl(path))  # a torn line is cut by one rank
    stored = {row["key"]: row["logp"] for row in found}
    keys = [forest.keys_of(one) for one in subtrees]
    missing, read = [], 0
    for parts in waves:
        indices = [index for part in parts for index, weight in part if weight]
        if all(key in stored for index in indices for key in keys[index]):
            read += len(indices)
        else:
            missing.append(parts)
    with open(path, "a", encoding="utf-8") if train.rank() == 0 else nullcontext() as log:
        for done in log_probs(policy, forest, subtrees, missing, device, path.stem):
            rows = []
            for index, values in done:
                one = subtrees[index]
                for chain, key, value in zip(one.chains, keys[index], values):
                    if key not in stored:
                        stored[key] = value
                        tokens = forest.sizes[one.tree][1 + chain]
                        rows.append({"key": key, "logp": value, "tokens": tokens})
            if train.rank() == 0:
                data.append_jsonl(log, rows)
    train.print0(f"{path.stem}: {len(keys) - read} trees computed, {read} from {path.name}")
    return stored


def token_log_probs(
    policy: model.Policy,
    rows: list[model.Row],
    processor: model.Processor,
    budget: int,
    device: torch.device,
) -> list[list[float]]:
    """log pi of each supervised token of each row. A collective."""
    found = []
    for parts in waves_of([sum(len(segment.ids) for segment in row) for row in rows], budget):
        part = parts[train.rank()]
        batch = model.collate([rows[index] for index, _ in part], processor).to(device)
        with train.forward_only(policy):
            logp = policy(batch)
        for (index, weight), values, labels in zip(part, logp, batch.labels):
            if weight:
                found.append((index, values[labels > 0].tolist()))
    return [logp for _, logp in sorted(train.all_gather(found))]


def gate_drift(
    args: argparse.Namespace,
    pairs: list[dict],
    forest: trees.Forest,
    policy: model.Policy,
    budget: int,
    device: torch.device,
) -> None:
    """Refuses to train if the reference and what the sampler recorded differ by more than
    --max-drift a token, with its sign, on average over all chains: then weights, images or
    positions were not the same. Up to TOKEN_WISE chains are computed once more, each as a row of
    its own: the trainer's difference from itself shows how much is only rounding. A collective."""
    logp = forest.reference
    values = [[logp[forest.keys[tree][chain]] for chain in edge] for tree, edge in forest.places]
    chains = drift.chains_of([pairs[index] for index in forest.kept], values)
    if not chains:
        train.print0("drift: not measured, since no pair has its sampler's log-probabilities")
        return
    token_wise = [key for key, chain in chains.items() if chain.sampler_tokens][:TOKEN_WISE]
    rows = []
    for pair, side in token_wise:
        tree, edge = forest.places[pair]
        rows.append(forest.encode(trees.Subtree(tree, (edge[side],), (), 0)))
    again = token_log_probs(policy, rows, forest.processor, budget, device)
    for key, logps in zip(token_wise, again):
        chains[key] = replace(chains[key], trainer_tokens=logps)
    limit = args.max_drift or (drift.LIMIT_BF16 if device.type == "cuda" else drift.LIMIT_FP32)
    found = drift.compare(list(chains.values()))
    train.print0(f"drift: {drift.describe(found)}; the limit is {limit:g} (--max-drift)")
    if token_wise:
        floor = drift.floor([chains[key] for key in token_wise])
        train.print0(f"drift: of the trainer against itself, {drift.describe(floor)}")
    try:
        drift.check_drift(found, limit, args.pairs)
    except data.RowError as error:
        train.refuse(error)
