"""Stage II's rows: the pairs of a question that a step has, as one tree; and the plan of all steps.

    root = prompt and images        branches = the chains that are compared        edges = pairs

Pairs of one question share its prompt and its images, and a chain stands in several of them. One
forward of the tree computes each of these once; Eq. 1 is then summed over the edges, which is the
loss and the gradient of the same pairs one by one (InstructGPT trained all comparisons of a prompt
as one batch element, too). A question whose chains A and B meet all criteria and whose C does not:

    pairs         (A, C)  (B, C)
    one by one    prompt A | prompt C        prompt B | prompt C        four rows
    tree          prompt A C B               each chain sees the prompt and itself: one row
    edges         (0, 1)  (2, 1)             two terms of Eq. 1 from three values of log p

Chains are numbered as they appear in the pairs, from 0.

The plan is made before the first step. It is a function of the pairs that are trained on, --order,
--batch, --epochs, --seed and, where trees are cut, --max-length; the number of ranks does not
matter. It fixes the number of steps, and so the cosine.

    order pair        pairs shuffled, as the paper's trainer has them; those of a step that are of
                      one question are one tree
    order question    questions shuffled, each whole in one step

Where we depart from the paper, or it is silent: its trainer shuffles pairs and computes each alone.
"""

import argparse
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
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


Place = tuple[int, Edge]  # where a pair is: number of its tree, and its two chains there


@dataclass
class Tree:
    """A question's prompt, images and chains. Its id is that of its first pair."""

    id: str
    prompt: list[dict]
    images: list[str]
    chains: list[Chain] = field(default_factory=list)

    def add(self, chain: Chain) -> int:
        """The chain's number in `chains`; one with the same tokens is not added again."""
        for index, other in enumerate(self.chains):
            if other.ids == chain.ids:
                return index
        self.chains.append(chain)
        return len(self.chains) - 1


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


def group(
    pairs: list[dict], processor: model.Processor, image_root: Path
) -> tuple[list[Tree], list[Place]]:
    """(trees, place of each pair). Pairs of the same prompt and images are of one tree."""
    trees: list[Tree] = []
    places: list[Place] = []
    numbers: dict[str, int] = {}  # question_key -> tree
    for pair in pairs:
        number = numbers.setdefault(question_key(pair, image_root), len(trees))
        if number == len(trees):
            trees.append(Tree(pair["id"], pair["prompt"], pair["images"]))
        chosen, rejected = (chain_of(pair, side, processor) for side in SIDES)
        places.append((number, (trees[number].add(chosen), trees[number].add(rejected))))
    return trees, places


def edges_of(places: Sequence[Place], count: int) -> list[list[Edge]]:
    """The edges of each of `count` trees."""
    edges: list[list[Edge]] = [[] for _ in range(count)]
    for tree, edge in places:
        edges[tree].append(edge)
    return edges


HELD_PAIRS = 16  # ours: fewer pairs that are held out say nothing
HELD_SHARE = 0.2  # ours: most of all pairs that are held out, unless more are asked for


def held_out(trees: Sequence[Tree], places: Sequence[Place], share: float) -> set[int]:
    """Numbers of the trees that are kept out of training, drawn by a hash of their ids: `share` of
    those that have pairs, and more until they have HELD_PAIRS pairs. A tree with which they would
    have too many is passed over. None where HELD_PAIRS are not reached."""
    counts = Counter(tree for tree, _ in places)
    most, pairs = max(HELD_SHARE, share) * len(places), 0
    held: set[int] = set()
    for tree in sorted(counts, key=lambda tree: (data.content_hash(trees[tree].id), tree)):
        if len(held) >= share * len(counts) and pairs >= HELD_PAIRS:
            break
        if pairs + counts[tree] <= most:
            held.add(tree)
            pairs += counts[tree]
    return held if share and pairs >= HELD_PAIRS else set()


@dataclass(frozen=True)
class Subtree:
    """A part of a tree that one forward computes: some of its chains and the edges between them.
    Edges index into `chains`, not into the tree's."""

    tree: int
    chains: tuple[int, ...]
    edges: tuple[Edge, ...]
    tokens: int


def cut(sizes: Sequence[int], edges: Sequence[Edge], limit: int) -> list[list[Edge]]:
    """Edges in parts of at most `limit` tokens, the prompt counted in each. sizes: tokens of the
    prompt, then of each chain. Greedy: a part begins with the cheapest edge, and takes the one that
    adds the fewest tokens while it fits. A chain may stand in several parts, an edge in one."""
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


def plan(
    places: Sequence[Place], sizes: Sequence[Sequence[int]], args: argparse.Namespace
) -> tuple[list[Subtree], list[list[int]]]:
    """(subtrees, those of each step), for all epochs. sizes: of each tree, its prompt's tokens and
    its chains'."""
    if args.order == "pair":
        order = train.shuffled(len(places), args.batch, args.epochs, args.seed)
        pairs_of_steps = [[places[pair] for pair in step] for step in order]
    else:
        pairs_of_steps = by_question(edges_of(places, len(sizes)), args)
    subtrees: list[Subtree] = []
    steps: list[list[int]] = []
    for pairs in pairs_of_steps:
        edges: dict[int, list[Edge]] = {}
        for tree, edge in pairs:
            edges.setdefault(tree, []).append(edge)
        begin = len(subtrees)
        for tree, own in edges.items():
            subtrees += subtrees_of(tree, sizes[tree], own, args.max_length)
        steps.append(list(range(begin, len(subtrees))))
    return subtrees, steps


def by_question(edges: Sequence[Sequence[Edge]], args: argparse.Namespace) -> list[list[Place]]:
    """Steps of about `batch` pairs: each question goes whole into the step in which its middle pair
    would be. Where a question has more than `batch` pairs, steps without any are left out."""
    found: list[list[Place]] = []
    for epoch in range(math.ceil(args.epochs)):
        steps: dict[int, list[Place]] = {}
        count = 0
        for tree in train.order(len(edges), args.seed, epoch):
            number = (count + len(edges[tree]) // 2) // args.batch
            for edge in edges[tree]:
                steps.setdefault(number, []).append((tree, edge))
            count += len(edges[tree])
        share = round(args.epochs - epoch, 6)  # of the epoch: the last may be a part of one
        found += list(steps.values())[: math.ceil(share * len(steps))]
    return found


def step_facts(subtrees: Sequence[Subtree], step: Sequence[int]) -> dict[str, float]:
    """What a step has: pairs; questions; worth, about how many independent pairs these are: p
    chosen and n rejected chains of a question count as their harmonic mean, 2pn / (p + n), a lone
    pair as 1; and the largest question's share of the pairs."""
    pairs: dict[int, int] = {}
    sides: dict[int, tuple[set[int], set[int]]] = {}
    for one in (subtrees[index] for index in step):
        pairs[one.tree] = pairs.get(one.tree, 0) + len(one.edges)
        chosen, rejected = sides.setdefault(one.tree, (set(), set()))
        chosen |= {one.chains[w] for w, _ in one.edges}
        rejected |= {one.chains[l] for _, l in one.edges}
    worth = sum(2 * len(p) * len(n) / (len(p) + len(n)) for p, n in sides.values())
    total = sum(pairs.values())
    return {
        "pairs": total,
        "questions": len(pairs),
        "worth": round(worth, 2),
        "largest": round(max(pairs.values()) / total, 3),
    }


# --------------------------------------------------------------------------------------------------
# Trees to batches


def encode_tree(
    tree: Tree, chains: Sequence[int], processor: model.Processor, image_root: Path
) -> model.Row:
    """prompt -> each of the chains, branches 1, 2, ..."""
    images = [processor.encode_file(data.image_file(image_root, image)) for image in tree.images]
    encoded = [processor.encode_prompt(tree.prompt, images)]
    for branch, chain in enumerate(chains, 1):
        encoded.append(processor.encode_tokens(tree.chains[chain].ids, branch))
    return encoded


def chain_keys(row: model.Row, checkpoint: str) -> list[str]:
    """Of each chain, what its reference value depends on: the checkpoint's files, the tokens and
    pixels of the prompt, and its own tokens."""
    pixels = [hashlib.sha256(image.pixels.numpy().tobytes()).hexdigest() for image in row[0].images]
    return [data.content_hash([checkpoint, row[0].ids, pixels, segment.ids]) for segment in row[1:]]


@dataclass
class Forest:
    """The questions of a file as trees, with all their chains. `places` has the pairs that are
    kept: not those that alone are too long."""

    trees: list[Tree]
    sizes: list[list[int]]  # of each tree: tokens of its prompt, then of each chain
    keys: list[list[str]]  # of each tree: chain_keys
    processor: model.Processor
    image_root: Path
    places: list[Place] = field(default_factory=list)  # of each kept pair
    kept: list[int] = field(default_factory=list)  # its row in the file
    dropped: int = 0  # pairs that are left out
    reference: dict[str, float] = field(default_factory=dict)  # log pi_ref of each chain, by key

    def subtrees(self, limit: int) -> list[Subtree]:
        """The chains of all kept pairs, a subtree for each tree; one over `limit` tokens is cut."""
        return [
            one
            for tree, own in enumerate(edges_of(self.places, len(self.trees)))
            for one in subtrees_of(tree, self.sizes[tree], own, limit)
        ]

    def keys_of(self, one: Subtree) -> list[str]:
        return [self.keys[one.tree][chain] for chain in one.chains]

    def encode(self, one: Subtree) -> model.Row:
        return encode_tree(self.trees[one.tree], one.chains, self.processor, self.image_root)

    def collate(self, subtrees: Sequence[Subtree], weights: Sequence[float]) -> model.Batch:
        """Subtrees as a batch with edges and log pi_ref."""
        rows = []
        for one in subtrees:
            values = [self.reference[key] for key in self.keys_of(one)]
            rows.append((self.encode(one), values, one.edges))
        return collate_trees(rows, weights, self.processor)


def make_forest(args: argparse.Namespace, pairs: list[dict]) -> Forest:
    """Makes trees of the pairs, checks them, and prints how many are dropped for their length. A
    collective."""
    root, processor = Path(args.images), model.Processor(args.model, args.pixels, args.tiles)
    textual = sum(not all(row.get(f"{side}_token_ids") for side in SIDES) for row in pairs)
    if textual and args.require_token_ids:
        message = f"{args.pairs}: {textual} pairs have no token ids; sample with hf: or vllm:"
        train.refuse(data.RowError(f"{message}, or drop --require-token-ids"))
    trees, places = group(pairs, processor, root)
    # a 72B takes minutes to hash: once, not on every rank
    checkpoint = train.from_first(lambda: stage.fingerprint(args.model))

    def keep(row: model.Row) -> tuple[list[int], list[str]]:
        return [len(segment.ids) for segment in row], chain_keys(row, checkpoint)

    checked = gate.gate_rows(
        args.pairs,
        "questions",
        [(tree.id, tree, [chain.text for chain in tree.chains]) for tree in trees],
        lambda tree: encode_tree(tree, range(len(tree.chains)), processor, root),
        keep,
        processor,
    )
    sizes, keys = [tokens for tokens, _ in checked], [own for _, own in checked]
    lengths = [
        sizes[tree][0] + sizes[tree][1 + chosen] + sizes[tree][1 + rejected]
        for tree, (chosen, rejected) in places
    ]
    fitting = [pair for pair, length in enumerate(lengths) if length <= args.max_length]
    dropped = [length for length in lengths if length > args.max_length]
    message = f"pairs: kept {len(fitting)} of {len(pairs)}"
    message += f" ({len(dropped)} over {args.max_length} tokens: --max-length)"
    train.print0(f"{message}; without token ids, tokenised from text: {textual}")
    if not fitting:
        message = f"every pair is over {args.max_length} tokens"
        train.refuse(data.RowError(f"{args.pairs}: {message}; raise --max-length"))
    if dropped:
        longest = max(lengths[pair] for pair in fitting)
        tokens = f"{min(dropped):,} to {max(dropped):,} tokens, those kept up to {longest:,}"
        train.print0(f"warning: long chains are lost: the pairs that are dropped have {tokens}")
    fit = [places[pair] for pair in fitting]
    return Forest(trees, sizes, keys, processor, root, fit, fitting, len(dropped))


def make_plan(
    args: argparse.Namespace, forest: Forest, held: set[int]
) -> tuple[list[Subtree], list[list[int]]]:
    """Plans the steps over the trees that are not held out, and prints the plan. Returns
    (subtrees, those of each step)."""
    places = [place for place in forest.places if place[0] not in held]
    subtrees, steps = plan(places, forest.sizes, args)
    tokens, questions = sum(one.tokens for one in subtrees), {tree for tree, _ in places}
    message = f"plan: {len(steps)} steps; {len(subtrees)} rows (trees or parts of them) of "
    train.print0(f"{message}{tokens:,} tokens, of {len(questions)} questions")
    train.print0(f"held out: {len(forest.places) - len(places)} pairs of {len(held)} questions")
    return subtrees, steps


Encoded = tuple[model.Row, list[float], Sequence[Edge]]  # row, reference values, edges


def collate_trees(
    rows: list[Encoded], weights: Sequence[float], processor: model.Processor
) -> model.Batch:
    """Rows with their reference values and edges to one batch."""
    batch = model.collate([row for row, _, _ in rows], processor, weights)
    values_of = torch.zeros(len(rows), max(len(values) for _, values, _ in rows))
    for b, (_, values, _) in enumerate(rows):
        values_of[b, : len(values)] = torch.tensor(values)
    edges = [(b, *edge) for b, (_, _, own) in enumerate(rows) for edge in own]
    return replace(batch, reference=values_of, edges=torch.tensor(edges).T)
