"""Stage II's rows: all pairs of a question as one tree, and the plan of all steps.

    root = prompt and images        branches = the chains that are compared        edges = pairs

Pairs of one question share its prompt and its images, and a chain stands in several of them. One
forward of the tree computes each of these once; Eq. 1 is then summed over the edges, which is the
loss and the gradient of the same pairs one by one (InstructGPT trained all comparisons of a prompt
as one batch element, too). A question whose chains A and B meet all criteria and whose C does not:

    pairs         (A, C)  (B, C)
    one by one    prompt A | prompt C        prompt B | prompt C        four rows
    tree          prompt A B C               each chain sees the prompt and itself: one row
    edges         (0, 2)  (1, 2)             two terms of Eq. 1 from three values of log p

The plan is made before the first step: which pairs a step has is a function of seed, batch, order
and the trees, and does not depend on the number of ranks. It fixes the number of steps, and so the
cosine.

    order pair        pairs shuffled, as the paper's trainer has them; those of a step that are of
                      one question are one tree
    order question    questions shuffled, each whole in one step

Where we depart from the paper, or it is silent: its trainer shuffles pairs and computes each alone.
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import data
import gate
import model
import train
from command import stage

ORDERS = ("pair", "question")
SIDES = ("chosen", "rejected")  # in the order of a pair's row
Edge = tuple[int, int]  # chosen, rejected


@dataclass(frozen=True)
class Chain:
    """A response: its text, and the tokens that were sampled or that its text has."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A question's prompt, images and chains, and its pairs as edges between chains. Its id is that
    of its first pair."""

    id: str
    prompt: list[dict]
    images: list[str]
    chains: tuple[Chain, ...]
    edges: tuple[Edge, ...]


def group(
    pairs: list[dict], chain_of: Callable[[dict, str], Chain], key_of: Callable[[dict], str]
) -> tuple[list[Tree], list[tuple[int, int]]]:
    """(trees, (tree, edge) of each pair). Pairs are of one question if `key_of` is the same, a hash
    of prompt and images; two chains are one if their tokens are. chain_of(pair, side) is one's."""
    keys: dict[str, int] = {}
    rows: list[dict] = []
    chains: list[dict[tuple[int, ...], tuple[int, Chain]]] = []
    edges: list[list[Edge]] = []
    places = []
    for pair in pairs:
        tree = keys.setdefault(key_of(pair), len(keys))
        if tree == len(rows):
            rows.append(pair)
            chains.append({})
            edges.append([])
        both = [chain_of(pair, side) for side in SIDES]
        ends = [chains[tree].setdefault(one.ids, (len(chains[tree]), one))[0] for one in both]
        places.append((tree, len(edges[tree])))
        edges[tree].append(tuple(ends))
    trees = [
        Tree(row["id"], row["prompt"], row["images"], tuple(chain for _, chain in held), tuple(own))
        for row, held, own in zip(rows, (own.values() for own in chains), edges)
    ]
    return trees, places


LEAST = 16  # ours: pairs that are held out at least, for figures that say something
MOST = 0.2  # ours: of the pairs; where LEAST are more than that, none are held out


def held_out(trees: Sequence[Tree], counts: Sequence[int], share: float) -> set[int]:
    """The questions that are kept out of training, by a hash of their ids: a share of those that
    have pairs, and as many more as it takes to LEAST pairs. counts: the pairs of each."""
    having = [tree for tree, count in enumerate(counts) if count]
    order = sorted(having, key=lambda tree: data.content_hash(trees[tree].id))
    held: set[int] = set()
    pairs = 0
    for tree in order if share else ():
        if len(held) >= share * len(having) and pairs >= LEAST:
            break
        held.add(tree)
        pairs += counts[tree]
    return held if pairs <= MOST * sum(counts) else set()


@dataclass(frozen=True)
class Subtree:
    """A part of a tree that one forward computes: some of its chains and the edges between them.
    Edges index into `chains`, not into the tree's."""

    tree: int
    chains: tuple[int, ...]
    edges: tuple[Edge, ...]
    tokens: int


def cut(sizes: Sequence[int], edges: Sequence[Edge], limit: int) -> list[list[Edge]]:
    """Edges in as few rows as a simple rule makes, none over `limit` tokens. sizes: tokens of the
    prompt, then of each chain. A row opens with the cheapest edge and takes the one that adds the
    fewest tokens while it fits: a chain may stand in several rows, an edge never."""
    left, parts = list(edges), []

    def added(edge: Edge, held: set[int]) -> int:
        return sum(sizes[1 + chain] for chain in {*edge} - held)

    while left:
        part, held, tokens = [], set(), sizes[0]
        while left:
            edge = min(left, key=lambda edge: added(edge, held))  # of equal ones the first
            if part and tokens + added(edge, held) > limit:
                break
            tokens += added(edge, held)
            held |= {*edge}
            part.append(edge)
            left.remove(edge)
        parts.append(part)
    return parts


def subtrees_of(
    tree: int, sizes: Sequence[int], edges: Sequence[Edge], limit: int
) -> list[Subtree]:
    """Some of a tree's edges as subtrees. Every single edge must fit."""
    found = []
    for part in cut(sizes, edges, limit):
        chains = tuple(sorted({chain for edge in part for chain in edge}))
        local = tuple((chains.index(chosen), chains.index(rejected)) for chosen, rejected in part)
        tokens = sizes[0] + sum(sizes[1 + chain] for chain in chains)
        found.append(Subtree(tree, chains, local, tokens))
    return found


Step = list[tuple[int, list[Edge]]]  # (tree, its edges in this step)


def plan(
    edges: Sequence[Sequence[Edge]],
    places: Sequence[tuple[int, int]],
    sizes: Sequence[Sequence[int]],
    order: str,
    batch: int,
    epochs: float,
    seed: int,
    limit: int,
) -> tuple[list[Subtree], list[list[int]]]:
    """(subtrees, those of each step), for all epochs. edges: of each tree; places: (tree, edge) of
    each pair; sizes: of each tree, its prompt's tokens and its chains'."""
    subtrees: list[Subtree] = []
    steps: list[list[int]] = []
    epoch = 0
    while epoch < epochs:
        found = by_pair if order == "pair" else by_question
        chosen = found(edges, places, batch, seed, epoch)
        for step in chosen[: math.ceil((epochs - epoch) * len(chosen))]:
            steps.append([])
            for tree, own in step:
                new = subtrees_of(tree, sizes[tree], own, limit)
                steps[-1] += range(len(subtrees), len(subtrees) + len(new))
                subtrees += new
        epoch += 1
    return subtrees, steps


def by_pair(
    edges: Sequence[Sequence[Edge]],
    places: Sequence[tuple[int, int]],
    batch: int,
    seed: int,
    epoch: int,
) -> list[Step]:
    """Steps of `batch` pairs."""
    order, steps = train.order(len(places), seed, epoch), []
    for at in range(0, len(order), batch):
        own: dict[int, list[Edge]] = {}
        for tree, edge in (places[pair] for pair in order[at : at + batch]):
            own.setdefault(tree, []).append(edges[tree][edge])
        steps.append(list(own.items()))
    return steps


def by_question(
    edges: Sequence[Sequence[Edge]],
    places: Sequence[tuple[int, int]],
    batch: int,
    seed: int,
    epoch: int,
) -> list[Step]:
    """Steps of about `batch` pairs: each question goes whole into the step in which its middle pair
    would be. A step that none falls into, beside a question of many pairs, is no step."""
    steps: dict[int, Step] = {}
    count = 0
    for tree in train.order(len(edges), seed, epoch):
        n = len(edges[tree])
        if n:
            steps.setdefault((count + n // 2) // batch, []).append((tree, list(edges[tree])))
        count += n
    return [steps[number] for number in sorted(steps)]


def step_facts(subtrees: Sequence[Subtree], step: Sequence[int]) -> dict[str, float]:
    """What a step has: pairs; questions; worth, how many independent comparisons the pairs are:
    2pn / (p + n) of a question with p chosen and n rejected chains, since pairs of the same chains
    say less than pairs of different ones; and the largest question's share of the pairs."""
    pairs: dict[int, int] = {}
    ends: dict[int, tuple[set[int], set[int]]] = {}
    for one in (subtrees[index] for index in step):
        pairs[one.tree] = pairs.get(one.tree, 0) + len(one.edges)
        chosen, rejected = ends.setdefault(one.tree, (set(), set()))
        chosen |= {one.chains[w] for w, _ in one.edges}
        rejected |= {one.chains[l] for _, l in one.edges}
    worth = sum(2 * len(p) * len(n) / (len(p) + len(n)) for p, n in ends.values())
    total = sum(pairs.values())
    return {
        "pairs": total,
        "questions": len(pairs),
        "worth": round(worth, 2),
        "largest": round(max(pairs.values()) / total, 3),
    }


# --------------------------------------------------------------------------------------------------
# Pairs to trees to batches


def chain_of(row: dict, side: str, processor: model.Processor) -> Chain:
    """A side of a pair: the tokens that were sampled, or where there are none its text's."""
    ids = row.get(f"{side}_token_ids") or processor.encode_response(row[side]).ids
    return Chain(row[side], tuple(ids))


def question_key(row: dict, image_root: Path) -> str:
    """Pairs with the same are of one question: a hash of prompt and images. An image that is not
    there stands for itself; the gate refuses it."""
    paths = [data.image_file(image_root, image) for image in row["images"]]
    images = [data.file_hash(path) if path.is_file() else str(path) for path in paths]
    return data.content_hash([row["prompt"], images])


def encode_tree(
    tree: Tree, chains: Sequence[int], processor: model.Processor, image_root: Path
) -> model.Row:
    """prompt -> each of the chains, branches 1, 2, ..."""
    images = [processor.encode_file(data.image_file(image_root, image)) for image in tree.images]
    encoded = [processor.encode_prompt(tree.prompt, images)]
    for branch, chain in enumerate(chains, 1):
        encoded.append(processor.encode_tokens(tree.chains[chain].ids, 0, branch))
    return encoded


def chain_keys(row: model.Row, checkpoint: str) -> list[str]:
    """Of each chain, what its reference value depends on: the checkpoint's files, the tokens and
    pixels of the prompt, and its own tokens."""
    pixels = [hashlib.sha256(image.pixels.numpy().tobytes()).hexdigest() for image in row[0].images]
    return [data.content_hash([checkpoint, row[0].ids, pixels, segment.ids]) for segment in row[1:]]


def pair_tokens(sizes: Sequence[int], edge: Edge) -> int:
    """Of a single pair: its prompt and its two chains."""
    return sizes[0] + sum(sizes[1 + chain] for chain in edge)


@dataclass
class Forest:
    """All pairs of a file as trees, without those that alone are too long."""

    trees: list[Tree]
    sizes: list[list[int]]  # of each tree: tokens of its prompt, then of each chain
    keys: list[list[str]]  # of each tree: chain_keys
    processor: model.Processor
    image_root: Path
    edges: list[list[Edge]] = field(default_factory=list)  # of each tree: its pairs
    places: list[tuple[int, int]] = field(default_factory=list)  # of each pair: (tree, edge)
    pairs: list[int] = field(default_factory=list)  # which rows of the file they are
    dropped: list[int] = field(default_factory=list)  # tokens of the pairs that are left out

    def add(self, places: list[tuple[int, int]], limit: int) -> None:
        """The pairs that alone are of at most `limit` tokens."""
        self.edges.extend([] for _ in self.trees)
        for pair, (tree, number) in enumerate(places):
            edge = self.trees[tree].edges[number]
            if (tokens := pair_tokens(self.sizes[tree], edge)) > limit:
                self.dropped.append(tokens)
                continue
            self.pairs.append(pair)
            self.places.append((tree, len(self.edges[tree])))
            self.edges[tree].append(edge)

    def subtrees(self, limit: int) -> list[Subtree]:
        """All of each tree's chains at once, or in as few subtrees as `limit` allows."""
        return [
            one
            for tree, own in enumerate(self.edges)
            for one in subtrees_of(tree, self.sizes[tree], own, limit)
        ]

    def keys_of(self, one: Subtree) -> list[str]:
        return [self.keys[one.tree][chain] for chain in one.chains]

    def encode(self, one: Subtree) -> model.Row:
        return encode_tree(self.trees[one.tree], one.chains, self.processor, self.image_root)

    def collate(
        self, subtrees: Sequence[Subtree], weights: list[float], logp: dict[str, float]
    ) -> model.Batch:
        """Subtrees as a batch with edges and log pi_ref. logp: of each chain, by its key."""
        rows = [
            (self.encode(one), [logp[key] for key in self.keys_of(one)], one.edges)
            for one in subtrees
        ]
        return collate_trees(rows, weights, self.processor)


def read_forest(args: argparse.Namespace, pairs: list[dict]) -> Forest:
    """The pairs as trees, checked, less those that are too long. Prints what is dropped. A
    collective."""
    root, processor = Path(args.images), model.Processor(args.model, args.pixels, args.tiles)
    ids = ("chosen_token_ids", "rejected_token_ids")
    textual = sum(not all(row.get(name) for name in ids) for row in pairs)
    if textual and args.require_token_ids:
        said = f"{args.pairs}: {textual} pairs have no token ids; sample with an engine"
        train.refuse(data.RowError(f"{said} that tells them, or drop --require-token-ids"))
    grown, places = group(
        pairs, lambda row, side: chain_of(row, side, processor), lambda row: question_key(row, root)
    )
    # a 72B takes minutes to hash: once, not on every rank
    checkpoint = train.from_first(lambda: stage.fingerprint(args.model))

    def keep(row: model.Row) -> tuple[list[int], list[str]]:
        return [len(segment.ids) for segment in row], chain_keys(row, checkpoint)

    kept = gate.gate_rows(
        args.pairs,
        [(tree.id, tree, [chain.text for chain in tree.chains]) for tree in grown],
        lambda tree: encode_tree(tree, range(len(tree.chains)), processor, root),
        keep,
        processor,
    )
    forest = Forest(grown, [one for one, _ in kept], [one for _, one in kept], processor, root)
    forest.add(places, args.max_length)
    over = f"({len(forest.dropped)} over {args.max_length} tokens: --max-length)"
    kept = f"pairs: kept {len(forest.places)} of {len(pairs)}"
    train.print0(f"{kept} {over}, {textual} tokenised from text")
    if not forest.places:
        said = f"every pair is over {args.max_length} tokens"
        train.refuse(data.RowError(f"{args.pairs}: {said}; raise --max-length"))
    if dropped := forest.dropped:
        longest = max(pair_tokens(forest.sizes[t], forest.edges[t][e]) for t, e in forest.places)
        tokens = f"{min(dropped):,} to {max(dropped):,} tokens, those kept up to {longest:,}"
        train.print0(f"warning: the pairs that are dropped have {tokens}: long chains go first")
    return forest


def make_plan(
    args: argparse.Namespace, forest: Forest, held: set[int]
) -> tuple[list[Subtree], list[list[int]]]:
    """(subtrees, those of each step) of the trees that are not held out. Prints what they are."""
    trained_on = [[] if tree in held else own for tree, own in enumerate(forest.edges)]
    places = [place for place in forest.places if place[0] not in held]
    subtrees, steps = plan(
        trained_on,
        places,
        forest.sizes,
        args.order,
        args.batch,
        args.epochs,
        args.seed,
        args.max_length,
    )
    train.print0(
        f"plan: {len(steps)} steps of {len(subtrees)} trees, "
        f"{sum(one.tokens for one in subtrees):,} tokens, of {sum(map(bool, trained_on))} questions"
    )
    pairs_held = len(forest.places) - len(places)
    train.print0(f"held out: {pairs_held} pairs of {len(held)} questions")
    return subtrees, steps


Encoded = tuple[model.Row, list[float], Sequence[Edge]]  # row, reference values, edges


def collate_trees(
    rows: list[Encoded], weights: list[float], processor: model.Processor
) -> model.Batch:
    """Rows with their reference values and edges to one batch."""
    batch = model.collate([row for row, _, _ in rows], processor, weights)
    values_of = torch.zeros(len(rows), max(len(values) for _, values, _ in rows))
    for b, (_, values, _) in enumerate(rows):
        values_of[b, : len(values)] = torch.tensor(values)
    edges = [(b, *edge) for b, (_, _, own) in enumerate(rows) for edge in own]
    return replace(batch, reference=values_of, edges=torch.tensor(edges).T)
