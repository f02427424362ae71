"""A question's pairs as one tree: the loss and gradient of its pairs one by one; the plan of all
steps."""

import argparse
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_worker import collate_pairs, draw_images, encode_pair, gradients, in_numbers, pair
from test_dpo import assert_close, run

import data
import dpo
import hub
import model
import train
import trees
from command import schema, stage

BATCH = 8


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    draw_images(folder)
    return folder


def question(number: int, ends: list[tuple[int, int]], image: str | None, processor) -> list[dict]:
    """Pairs of one question between chains of unequal lengths: (chosen, rejected) by number."""
    texts = [
        f"<think> {'step ' * (2 + 3 * k)}{number} </think> <answer> {'AB'[k % 2]} </answer>"
        for k in range(8)
    ]
    base = pair(number, image, processor)
    rows = []
    for chosen, rejected in ends:
        row = {**base, "chosen": texts[chosen], "rejected": texts[rejected]}
        for side in trees.SIDES:
            row[f"{side}_token_ids"] = processor.encode_response(row[side]).ids
        rows.append(row)
    return rows


def grown(pairs: list[dict], processor, films) -> tuple[list[trees.Tree], list[list[trees.Edge]]]:
    """The trees of some pairs, and the edges of each."""
    found, places = trees.group(pairs, processor, films)
    return found, trees.edges_of(places, len(found))


# --------------------------------------------------------------------------------------------------
# The tree


def test_pairs_are_grouped_by_prompt_and_images_and_chains_by_their_tokens(folders, films):
    processor = model.Processor(folders["qwen"], 56 * 56, 1)
    first = question(0, [(0, 1), (0, 2), (3, 1)], "film0.png", processor)
    second = question(0, [(0, 1)], "film1.png", processor)  # the same words on another film
    renamed = [{**row, "id": "other"} for row in question(0, [(2, 1)], "film0.png", processor)]
    (films / "copy.png").write_bytes((films / "film0.png").read_bytes())
    copied = [
        {**row, "images": ["copy.png"]} for row in question(0, [(3, 2)], "film0.png", processor)
    ]
    pairs = [*first, *second, *renamed, *copied]
    found, edges = grown(pairs, processor, films)
    assert edges == [[(0, 1), (0, 2), (3, 1), (2, 1), (3, 2)], [(0, 1)]]
    assert [len(tree.chains) for tree in found] == [4, 2] and found[0].id == "p0"
    _, places = trees.group(pairs, processor, films)
    assert [tree for tree, _ in places] == [0, 0, 0, 1, 0, 0]
    assert [edge for tree, edge in places if tree == 0] == edges[0]


EDGES = [
    (0, 2),
    (0, 3),
    (1, 2),
    (1, 4),
    (2, 4),
]  # chain 2 is chosen over 4, and rejected for 0 and 1


@pytest.mark.parametrize("image", [None, "film0.png"])
def test_a_tree_has_the_loss_the_gradient_and_the_figures_of_its_pairs_one_by_one(
    folder, films, image
):
    processor = model.Processor(folder, 56 * 56, 1)
    policy = hub.load_policy(folder)
    policy.freeze_vision()
    other = question(1, [(0, 1)], "film1.png", processor)  # beside it, with fewer chains
    pairs = question(0, EDGES, image, processor) + other
    (tree, single), edges = grown(pairs, processor, films)
    reference = {chain.ids: -40.0 - 3 * k for k, chain in enumerate((*tree.chains, *single.chains))}

    alone = []
    for row in pairs:
        encoded = encode_pair(row, processor, films)
        alone.append((encoded, [reference[tuple(segment.ids)] for segment in encoded[1:]]))
    rows = [
        (
            trees.encode_tree(one, range(len(one.chains)), processor, films),
            [reference[chain.ids] for chain in one.chains],
            own,
        )
        for one, own in zip((tree, single), edges)
    ]
    found = []
    for batch in (
        collate_pairs(alone, [1.0] * 6, processor),
        trees.collate_trees(rows, [1.0] * 2, processor),
    ):
        policy.zero_grad()
        loss, count, figures = in_numbers(*dpo.pair_loss(policy(batch), batch, 0.1))
        loss.backward()
        found.append((loss.item() / count, count, figures, gradients(policy)))
    (loss, count, figures, slopes), (tree_loss, tree_count, tree_figures, tree_slopes) = found
    assert count == tree_count == 6 and tree_loss == pytest.approx(loss, abs=1e-5)
    for name, (total, over) in figures.items():
        assert tree_figures[name] == pytest.approx((total, over), abs=1e-3), name
    largest = max(slope.abs().max().item() for slope in slopes.values())
    assert_close(tree_slopes, slopes, 2e-5 * largest)


def test_a_tree_of_weight_zero_adds_no_pair(folders, films):
    processor = model.Processor(folders["qwen"], 56 * 56, 1)
    policy = hub.load_policy(folders["qwen"])
    pairs = question(0, EDGES, None, processor) + question(1, [(0, 1)], None, processor)
    found, edges = grown(pairs, processor, films)
    rows = [
        (
            trees.encode_tree(one, range(len(one.chains)), processor, films),
            [-40.0] * len(one.chains),
            own,
        )
        for one, own in zip(found, edges)
    ]
    both = trees.collate_trees(rows, [1.0, 0.0], processor)
    one = trees.collate_trees(rows[:1], [1.0], processor)
    with torch.no_grad():
        losses = [in_numbers(*dpo.pair_loss(policy(batch), batch, 0.1)) for batch in (both, one)]
    assert losses[0][1] == losses[1][1] == 5
    assert losses[0][0].item() == pytest.approx(losses[1][0].item(), abs=1e-5)


# --------------------------------------------------------------------------------------------------
# Cutting


@given(
    sizes=st.lists(st.integers(1, 40), min_size=3, max_size=9),
    draws=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=16),
    limit=st.integers(0, 150),
)
@settings(max_examples=150, deadline=None)
def test_a_tree_is_cut_into_rows_that_fit_and_have_every_edge_once(sizes, draws, limit):
    chains = len(sizes) - 1
    edges = [(a % chains, b % chains) for a, b in draws if a % chains != b % chains]
    own = [sizes[0] + sizes[1 + a] + sizes[1 + b] for a, b in edges]
    limit = max([limit, *own])  # a single edge over the limit is dropped before
    rows = trees.subtrees_of(3, sizes, edges, limit)
    back = [(row.chains[w], row.chains[l]) for row in rows for w, l in row.edges]
    assert Counter(back) == Counter(edges)
    for row in rows:
        assert row.tokens == sizes[0] + sum(sizes[1 + chain] for chain in row.chains) <= limit
        assert sorted({end for edge in row.edges for end in edge}) == list(range(len(row.chains)))
    assert len(trees.subtrees_of(3, sizes, edges, sum(sizes))) == bool(edges)  # one where all fits


def test_a_cut_opens_with_the_cheapest_pair_and_adds_what_costs_least():
    sizes = [10, 5, 6, 20, 7]
    edges = [(0, 2), (0, 1), (3, 1), (0, 3)]  # pairs of 25, 11, 13 and 12 tokens beside the prompt
    # 10 + 11 = 21, then 7 more for chain 3, then nothing for (0, 3); chain 2 would make it 48
    assert trees.cut(sizes, edges, 35) == [[(0, 1), (3, 1), (0, 3)], [(0, 2)]]


# --------------------------------------------------------------------------------------------------
# The plan

COUNTS = [9, 1, 4, 6, 2, 2, 3, 5, 1, 7]  # pairs of each question
FOREST = [[(0, 1 + k) for k in range(n)] for n in COUNTS]
PLACES = [(t, edge) for t, own in enumerate(FOREST) for edge in own]
SIZES = [[50, *range(10, 11 + n)] for n in COUNTS]


def planned(order, batch=BATCH, epochs=1, seed=0, limit=10**6, places=PLACES):
    named = {"order": order, "batch": batch, "epochs": epochs, "seed": seed, "max_length": limit}
    return trees.plan(places, SIZES, argparse.Namespace(**named))


def edges_of(rows: list[trees.Subtree], step: list[int]) -> list[tuple[int, int, int]]:
    found = [
        (rows[i].tree, rows[i].chains[w], rows[i].chains[l]) for i in step for w, l in rows[i].edges
    ]
    return sorted(found)


@pytest.mark.parametrize("order", trees.ORDERS)
@pytest.mark.parametrize("limit", [10**6, 90])
def test_every_epoch_has_every_pair_once_in_another_order(order, limit):
    rows, steps = planned(order, epochs=2, limit=limit)
    half = len(steps) // 2
    wanted = sorted((t, *edge) for t, own in enumerate(FOREST) for edge in own)
    for part in (steps[:half], steps[half:]):
        assert sorted(edge for step in part for edge in edges_of(rows, step)) == wanted
    assert [edges_of(rows, step) for step in steps[:half]] != [
        edges_of(rows, step) for step in steps[half:]
    ]
    assert planned(order, epochs=2, limit=limit) == (rows, steps)
    assert planned(order, epochs=2, limit=limit, seed=1) != (rows, steps)
    assert all(row.tokens <= limit for row in rows)


def test_shuffled_pairs_come_as_the_shuffle_of_rows_has_them_and_share_a_tree_where_they_meet():
    rows, steps = planned("pair")
    order = train.order(sum(COUNTS), 0, 0)
    for number, step in enumerate(steps):
        own = [PLACES[index] for index in order[BATCH * number : BATCH * (number + 1)]]
        assert edges_of(rows, step) == sorted((t, *edge) for t, edge in own)
        assert len({rows[index].tree for index in step}) == len(step)  # one row a question
    assert [len(edges_of(rows, step)) for step in steps] == [8, 8, 8, 8, 8]


def test_whole_questions_fill_steps_of_about_the_batch():
    rows, steps = planned("question")
    for step in steps:
        for tree in {rows[index].tree for index in step}:
            own = [edge for edge in edges_of(rows, step) if edge[0] == tree]
            assert len(own) == COUNTS[tree]  # never split over steps
    sizes = [len(edges_of(rows, step)) for step in steps]
    assert sum(sizes) == 40 and all(1 <= size < BATCH + max(COUNTS) for size in sizes)
    one, alone = planned("question", batch=2, places=PLACES[:9])
    assert len(one) == len(alone) == 1  # nine pairs in steps of two: no step is empty


def test_a_part_of_an_epoch_has_as_many_steps_as_in_stage_1():
    for epochs in (1.6, 2.2, 3.2):  # in floating point 2.2 - 2 is more than a fifth of five steps
        _, steps = planned("pair", epochs=epochs)
        assert len(steps) == len(train.shuffled(sum(COUNTS), BATCH, epochs, 0))


def test_a_part_of_an_epoch_is_a_part_of_its_steps():
    _, steps = planned("pair", epochs=1.5)
    assert len(steps) == 5 + 3
    assert planned("pair", epochs=1)[1] == steps[:5]


def test_a_step_tells_how_many_comparisons_its_pairs_are_worth():
    full = [(w, l) for w in range(3) for l in range(3, 5)]  # 3 x 2 chains, 6 pairs: 2.4 comparisons
    rows = trees.subtrees_of(0, [10] * 6, full, 100) + trees.subtrees_of(1, [10] * 3, [(0, 1)], 100)
    told = {"pairs": 7, "questions": 2, "worth": 3.4, "largest": 0.857}
    assert trees.step_facts(rows, [0, 1]) == told
    assert trees.step_facts(rows, [1]) == {"pairs": 1, "questions": 1, "worth": 1.0, "largest": 1.0}


# --------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_have_rows_of_like_length_at_the_same_time(world):
    lengths = [100, 400, 90, 380, 120, 60, 70]
    dealt = train.deal_rows(list(range(7)), 1, world, lengths)
    rounds = list(zip(*dealt))
    longest = sorted(lengths, reverse=True)
    assert [max(lengths[part[0][0]] for part in one) for one in rounds] == longest[::world]
    own = [part[0] for one in rounds for part in one]
    assert sorted(index for index, weight in own if weight) == list(range(7))
    assert all(index == lengths.index(60) for index, weight in own if not weight)  # the shortest
    spent = world * sum(longest[::world])
    found, *_ = train.micro_batch_shape([list(range(7))], 1, world, lengths)
    assert found == pytest.approx(sum(lengths) / spent)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30),
    budget=st.integers(1, 900),
    world=st.integers(1, 8),
)
@settings(max_examples=150, deadline=None)
def test_a_micro_batch_is_as_many_rows_as_its_tokens_hold_padding_included(lengths, budget, world):
    dealt = train.deal_rows(list(range(len(lengths))), budget, world, lengths)
    rows = [row for own in dealt for part in own for row, weight in part if weight]
    assert sorted(rows) == list(range(len(lengths)))
    assert len({tuple(map(len, own)) for own in dealt}) == 1  # all ranks work at the same shapes
    padded = [
        [len(part) * max(lengths[row] for rank in parts for row, _ in rank) for part in parts]
        for parts in zip(*dealt)
    ]
    for parts, costs in zip(zip(*dealt), padded):
        assert len(parts[0]) == 1 or max(costs) <= budget
    rounds = [sorted(lengths, reverse=True)[at] for at in range(0, len(lengths), world)]
    for parts in zip(*dealt):
        own, rounds = rounds[: len(parts[0])], rounds[len(parts[0]) :]
        assert sum(own) >= train.FILLED * len(own) * own[0]
        more = [*own, *rounds[:1]]  # one more would not fit, or be padded for the most part
        fits = len(more) * own[0] <= budget and sum(more) >= train.FILLED * len(more) * own[0]
        assert not rounds or not fits
    spent = world * sum(costs[0] for costs in padded)
    found, *_ = train.micro_batch_shape([list(range(len(lengths)))], budget, world, lengths)
    assert found == pytest.approx(sum(lengths) / spent)


# --------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("order", trees.ORDERS)
def test_a_run_tells_its_plan_and_trains_every_pair_in_either_order(
    folders, films, tmp_path, capsys, order
):
    processor = model.Processor(folders["qwen"], 56 * 56, 1)
    pairs = [
        row
        for n in range(4)
        for row in question(n, EDGES[: 2 + n], ["film0.png", None][n % 2], processor)
    ]
    flags = ["--order", order, "--batch", "5", "--epochs", "1", "--micro-tokens", "1"]
    run(folders["qwen"], films, tmp_path, pairs, *flags)
    said, history = capsys.readouterr().out, schema.read_metrics(tmp_path / "out")
    assert (
        "first loss 0.693147 is ln 2" in said
        and "of 4 questions\n" in said
        and "efficiency on 1 ranks 1.00" in said
    )
    assert sum(row["pairs"] for row in history) == 14 == len(pairs)
    if order == "question":
        assert sum(row["questions"] for row in history) == 4
    chains = sum(1 for _ in data.read_jsonl(tmp_path / "out" / "reference.jsonl"))
    assert chains == sum(
        len({row[f"{side}"] for row in pairs if row["id"] == f"p{n}" for side in trees.SIDES})
        for n in range(4)
    )


def test_only_a_pair_that_alone_is_too_long_is_dropped_and_its_length_is_told(
    folders, films, tmp_path, capsys
):
    processor = model.Processor(folders["qwen"], 56 * 56, 1)
    pairs = question(0, [(0, 1), (0, 2), (1, 3), (6, 7)], None, processor)
    lengths = [sum(len(part.ids) for part in encode_pair(row, processor, films)) for row in pairs]
    limit = max(lengths[:3])  # less than the tree of these three
    run(
        folders["qwen"],
        films,
        tmp_path,
        pairs,
        "--max-length",
        str(limit),
        "--batch",
        "4",
        "--epochs",
        "1",
    )
    said, history = capsys.readouterr().out, schema.read_metrics(tmp_path / "out")
    assert (
        f"kept 3 of 4 (1 over {limit} tokens" in said
        and f"have {lengths[3]:,} to {lengths[3]:,} tokens, those kept up to {limit:,}" in said
    )
    assert [row["pairs"] for row in history] == [3]
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert record["figures"]["dropped"] == 1


# --------------------------------------------------------------------------------------------------
# Held out


def held(counts: list[int], share: float) -> set[int]:
    """The questions that are held out of some with these counts of pairs."""
    found = [trees.Tree(f"q{n}", [], []) for n in range(len(counts))]
    places = [(tree, (0, 1)) for tree, count in enumerate(counts) for _ in range(count)]
    return trees.held_out(found, places, share)


def test_held_out_questions_are_drawn_by_their_ids_and_have_pairs_enough():
    counts = [3] * 400
    assert len(held(counts, 0.05)) == 20 and held(counts, 0.05) == held(counts, 0.05)
    assert len(held([1] * 100, 0.05)) == trees.HELD_PAIRS  # five questions would have five pairs
    assert held([2] * 20, 0.05) == set()  # 16 of 40 pairs are too many
    assert len(held(counts, 0.3)) == 120  # as many as were asked for
    assert held(counts, 0) == set()
    assert held([80], 0.05) == held([4, 96], 0.05) == set()  # else nothing is left to train on
    assert 0 not in held([96] + [1] * 50, 0.3) != set()
    empty = [0, 4] * 100
    assert all(empty[tree] for tree in held(empty, 0.05))


def test_held_out_pairs_are_looked_at_and_never_trained_on(folders, films, tmp_path, capsys):
    processor = model.Processor(folders["qwen"], 56 * 56, 1)
    pairs = [row for n in range(90) for row in question(n, EDGES[: 1 + n % 3], None, processor)]
    flags = ["--batch", "16", "--epochs", "1", "--lr", "1e-3"]
    run(folders["qwen"], films, tmp_path, pairs, *flags)
    said, history = capsys.readouterr().out, schema.read_metrics(tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "stage.json").read_text())["figures"]
    count = figures["held_out"]
    assert count >= trees.HELD_PAIRS and f"held out: {count} pairs of " in said
    assert sum(row["pairs"] for row in history) == figures["pairs"] == len(pairs) - count
    looked = [row for row in history if "held_loss" in row]
    assert looked and looked[-1] == history[-1]  # 11 steps: one more often than every tenth
    assert (
        looked[-1]["held_loss"] < looked[0]["held_loss"]
        and figures["held_loss"] == looked[-1]["held_loss"]
    )

    # by hand, from what the chains' log-probabilities were and are
    before, after = (
        {row["key"]: row["logp"] for _, row in data.read_jsonl(tmp_path / "out" / f"{name}.jsonl")}
        for name in ("reference", "after")
    )
    assert before.keys() == after.keys()
    found, places = trees.group(pairs, processor, films)
    edges = trees.edges_of(places, len(found))
    kept = trees.held_out(found, places, 0.05)
    checkpoint = stage.fingerprint(folders["qwen"])
    losses = []
    for number in kept:
        row = trees.encode_tree(found[number], range(len(found[number].chains)), processor, films)
        keys = trees.chain_keys(row, checkpoint)
        for chosen, rejected in edges[number]:
            ends = [after[keys[end]] - before[keys[end]] for end in (chosen, rejected)]
            losses.append(math.log1p(math.exp(-dpo.BETA * (ends[0] - ends[1]))))
    assert history[-1]["held_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
