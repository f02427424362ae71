"""drift.py against sums by hand, and the figures it compares against model.Policy: what an engine
tells of its tokens is what the trainer computes of them, and whatever is not the same is seen."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_engines import STOP_BOOST, tilt
from test_remote import Chat, all_replies, keys, open_at, request, serve  # noqa: F401

import data
import engines
import hub
import judge
import model
import rollout
from command import schema
from engines import drift, inference
from engines.inference import Completion, Request, Sampling

SIDE = 56  # of a film and of a tile, in pixels: four image tokens
SETUP = inference.Setup(pixels=SIDE * SIDE, batch=64)
WARM = Sampling(temperature=0.7, top_p=0.9, max_tokens=24, seed=3)
VLLM = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """In fp32, where sampler and trainer agree to rounding"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    base = tmp_path_factory.mktemp("films")
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(base / f"{seed}.png")
    return [base / f"{seed}.png" for seed in range(3)]


@pytest.fixture(scope="module")
def checkpoints(folders, tmp_path_factory):
    """They say different things to different films, and end their turn now and then"""
    base, boosts = tmp_path_factory.mktemp("checkpoints"), {"<|im_end|>": STOP_BOOST}
    return {family: tilt(folder, base / family, boosts) for family, folder in folders.items()}


def asks_of(films, samples: int) -> list[Request]:
    def turns(text: str) -> list[dict]:
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]

    return [
        Request(f"q{number}", turns("What is it? " * (1 + number)), shown, tuple(range(samples)))
        for number, shown in enumerate((films[:1], films[1:2], films[1:], []))
    ]


def sampled(folder, requests, sampling) -> dict[str, list[Completion]]:
    """{question: its replies by sample}"""
    engine = engines.open_engine(f"hf:{folder}", SETUP)
    completions = [completion for part in engine.answer(requests, sampling) for completion in part]
    found = {
        one.id: [completion for completion in completions if completion.id == one.id]
        for one in requests
    }
    return {
        id: sorted(some, key=lambda completion: completion.sample) for id, some in found.items()
    }


def trained(
    folder, requests, completions, films_of=None, positions=None, policy=None
) -> list[drift.Measured]:
    """Each chain as the trainer computes it: all chains of a question as one tree row. films_of:
    the files shown instead of an ask's own; positions: what the positions of a batch become."""
    processor = model.Processor(folder, SETUP.pixels, SETUP.tiles)
    policy, chains = policy or hub.load_policy(folder), []
    for one in requests:
        shown = (films_of or (lambda paths: paths))(one.images)
        row = [processor.encode_prompt(one.messages, list(map(processor.encode_file, shown)))]
        for which, completion in enumerate(completions[one.id], 1):
            row.append(processor.encode_tokens(completion.token_ids, which))
        batch = model.collate([row], processor)
        if positions:
            batch = replace(batch, positions=positions(batch))
        with torch.no_grad():
            logp = policy(batch)
        for which, completion in enumerate(completions[one.id], 1):
            ours = logp[(batch.branch == which) & (batch.labels > 0)].tolist()
            assert len(ours) == len(completion.token_ids)
            chains.append(
                drift.Measured(completion.logp, sum(ours), len(ours), completion.token_logps, ours)
            )
    return chains


# --- what hf: tells is what the trainer computes


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_hf_tells_the_trainers_log_probabilities_whatever_the_sampling(
    checkpoints, family, films, temperature, top_p
):
    requests = asks_of(films, 3)
    sampling = replace(WARM, temperature=temperature, top_p=top_p)
    completions = sampled(checkpoints[family], requests, sampling)
    chains = trained(checkpoints[family], requests, completions)
    for chain in chains:
        assert chain.sampler_tokens == pytest.approx(chain.trainer_tokens, abs=1e-4)
        assert abs(chain.trainer - chain.sampler) / chain.tokens < 1e-4
    ends = {completion.finish_reason for some in completions.values() for completion in some}
    assert "stop" in ends  # <|im_end|> is among the tokens
    found = drift.compare(chains)
    print(f"\n{family}, T {temperature}, top-p {top_p}: {drift.describe(found)}")
    assert abs(found.mean) < 1e-5 and found.absolute < 1e-5


def test_hf_tells_them_over_the_whole_vocabulary_though_likely_tokens_are_banned(
    folders, family, films, tmp_path
):
    names = [token for token in model.Processor(folders[family]).special if token != "<|im_end|>"]
    folder = tilt(folders[family], tmp_path / "tempted", dict.fromkeys(names, 2.0), extra_rows=16)
    requests = asks_of(films, 2)
    chains = trained(folder, requests, sampled(folder, requests, WARM))
    assert abs(drift.compare(chains).mean) < 1e-4
    assert drift.compare(chains).absolute < 1e-4
    assert max(chain.sampler for chain in chains) < -24  # the banned ones had nearly all the mass


# --- whatever is not the same is seen (the table of drift.py, in small)


def halved(tmp_path):
    def smaller(paths):
        for path in paths:
            Image.open(path).resize((SIDE // 2, SIDE // 2)).save(tmp_path / path.name)
        return [tmp_path / path.name for path in paths]

    return smaller


def flat(batch: model.Batch) -> torch.Tensor:
    """Qwen's three rows of positions as of a text alone: the depth in the tree, image or not"""
    depth = torch.zeros_like(batch.ids)
    before = torch.arange(-1, depth.shape[1] - 1).repeat(len(depth), 1)
    before[*batch.supervised] = batch.predecessor
    for row in range(len(depth)):
        for column in range(1, depth.shape[1]):
            depth[row, column] = depth[row, before[row, column]] + 1
    return depth.expand(3, -1, -1)


def moved(folder) -> model.Policy:
    """The checkpoint after a little training"""
    policy, generator = hub.load_policy(folder), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.language_model.parameters():
            weight += torch.randn(weight.shape, generator=generator) * 0.1 * weight.std()
    return policy


@pytest.mark.parametrize("fault", ["half the resolution", "flat positions", "weights", "film"])
def test_what_is_not_the_same_is_caught_and_the_honest_pair_passes(
    checkpoints, family, films, tmp_path, fault
):
    if fault == "flat positions" and family == "internvl":
        pytest.skip("its positions have one dimension")
    # all with a film; so many that the mean's standard error is below what each fault changes
    folder, requests = checkpoints[family], asks_of(films, 24)[:3]
    completions = sampled(folder, requests, replace(WARM, temperature=1.0, top_p=1.0))
    honest = drift.compare(trained(folder, requests, completions))
    drift.check_drift(honest, drift.LIMIT_FP32, "pairs.jsonl")
    changed = {
        "half the resolution": {"films_of": halved(tmp_path)},
        "flat positions": {"positions": flat},
        "weights": {"policy": moved(folder)},
        "film": {"films_of": lambda paths: [films[films.index(path) - 1] for path in paths]},
    }[fault]
    found = drift.compare(trained(folder, requests, completions, **changed))
    print(f"\n{family}, {fault}: {drift.describe(found)}; honest {drift.describe(honest)}")
    assert found.mean < 0  # what was sampled is less likely to any other model
    with pytest.raises(data.RowError, match="pairs.jsonl: trainer and sampler do not agree"):
        drift.check_drift(found, drift.LIMIT_FP32, "pairs.jsonl")


def test_the_trainers_own_floor_is_below_the_limit(checkpoints, family, films):
    requests = asks_of(films, 4)
    completions = sampled(checkpoints[family], requests, WARM)
    together = trained(checkpoints[family], requests, completions)
    alone = [
        chain
        for one in requests
        for completion in completions[one.id]
        for chain in trained(checkpoints[family], [one], {one.id: [completion]})
    ]
    both = zip(together, alone, strict=True)
    found = drift.floor([replace(one, trainer_tokens=again.trainer_tokens) for one, again in both])
    assert 0 < abs(found.mean) < drift.LIMIT_FP32 and found.chains == 16


# --- by hand


def test_the_drift_is_the_signed_mean_over_tokens_and_its_sd_is_over_chains():
    chains = [drift.Measured(-10.0, -12.0, 4), drift.Measured(-5.0, -4.0, 1, [-5.0], [-4.0])]
    chains.append(drift.Measured(-3.0, -3.0, 2, [-1.0, -2.0], [-1.5, -1.5]))
    found = drift.compare(chains)
    assert found == drift.Drift((-2 + 1 + 0) / 7, statistics.stdev([-0.5, 1, 0]), 2 / 3, 3, 7)
    assert (
        drift.describe(found) == "-1.4e-01 a token, SD 7.6e-01 over 3 chains, mean absolute 6.7e-01"
    )
    one = drift.compare(chains[:1])
    assert (one.mean, one.sd, one.absolute) == (-0.5, None, None)
    chains = [
        drift.Measured(0, -1.0, 1, None, [-1.5]),
        drift.Measured(0, -2.0, 4, None, [-0.25] * 4),
    ]
    assert drift.floor(chains).mean == pytest.approx(0.1)


@pytest.mark.parametrize(
    "off, passes",
    [(0.005, True), (-0.005, True), (0.0051, False), (-0.0051, False), (math.nan, False)],
)
def test_beyond_the_limit_on_either_side_is_refused_and_so_is_no_number(off, passes):
    found = drift.Drift(off, None, None, 1, 1)
    if passes:
        drift.check_drift(found, drift.LIMIT_BF16, "x")
    else:
        with pytest.raises(data.RowError, match="x: .*0.005 is the limit.*--pixels"):
            drift.check_drift(found, drift.LIMIT_BF16, "x")


def test_a_chain_of_several_pairs_counts_once_and_one_without_a_figure_not_at_all():
    def pair(id, chosen, rejected, **more):
        return {"id": id, "chosen_token_ids": chosen, "rejected_token_ids": rejected, **more}

    pairs = [
        pair("a", [1, 2], [3], chosen_logp=-1.0, chosen_token_logps=[-0.4, -0.6], rejected_logp=-2),
        pair("a", [1, 2], [4], chosen_logp=-1.0, rejected_logp=None),  # an engine that tells none
        pair("b", [1, 2], [5], chosen_logp=-3.0),
        pair("b", None, None),  # an older file, of a text alone
        pair("c", None, [], chosen_logp=-1.0, rejected_logp=-1.0),  # tokens are made of the text
    ]
    values = [[-1.5, -2.5], [-1.5, -9.0], [-3.5, -9.0], [-9.0, -9.0], [-9.0, -9.0]]
    assert drift.chains_of(pairs, values) == {
        (0, 0): drift.Measured(-1.0, -1.5, 2, [-0.4, -0.6]),
        (0, 1): drift.Measured(-2, -2.5, 1),
        (2, 0): drift.Measured(-3.0, -3.5, 2),
    }


# --- other engines


def logprobs(*values) -> dict:
    return {"content": [{"token": "x", "logprob": value, "top_logprobs": []} for value in values]}


@pytest.mark.parametrize("told", [logprobs(-1.0, -0.5, -0.25), logprobs(-1.0), None])
def test_vllm_serve_is_asked_for_log_probabilities_and_told_only_where_each_token_has_one(
    serve,  # noqa: F811
    told,
):
    def play(question, time, body):
        assert body["logprobs"] is True
        status, content, headers = Chat.good("yes")
        content["choices"][0] |= {"token_ids": [5, 5, 5], "logprobs": told}
        return status, content, headers

    (completion,) = all_replies(open_at(Chat, serve(play, VLLM)), [request("a")])
    assert (completion.text, completion.token_ids) == ("yes", [5, 5, 5])
    whole = told and len(told["content"]) == 3
    assert completion.token_logps == ([-1.0, -0.5, -0.25] if whole else None)
    assert completion.logp == (-1.75 if whole else None)


def test_other_servers_are_not_asked_and_tell_none(serve):  # noqa: F811
    server = serve(lambda question, time, body: Chat.good("yes"))
    (completion,) = all_replies(open_at(Chat, server), [request("a")])
    assert completion.logp is None and "logprobs" not in server.requests[0][2]


# --- from the rollout to the pairs


def run_rollout(tmp_path, folder, films, name: str, samples: int) -> list[dict]:
    questions = [
        {"id": f"q{i}", "question": f"Why {i}?", "options": {}, "answer": "x", "images": images}
        for i, images in enumerate([[films[0].name], []])
    ]
    data.write_jsonl(tmp_path / "questions.jsonl", questions)
    rollout.main(
        [
            "--engine",
            f"hf:{folder}",
            "--questions",
            str(tmp_path / "questions.jsonl"),
            "--images",
            str(films[0].parent),
            "-n",
            str(samples),
            "--max-tokens",
            "4",
            "--out",
            str(tmp_path / name / "rollout"),
            "--pixels",
            str(SETUP.pixels),
        ]
    )
    return schema.read_rows(tmp_path / name / "rollout" / "rollouts.jsonl", "rollouts")


def test_a_rollout_keeps_the_sum_of_every_chain_and_every_token_of_the_first(
    checkpoints, films, tmp_path, monkeypatch
):
    monkeypatch.setattr(rollout, "BY_TOKEN", 64)
    rows = run_rollout(tmp_path, checkpoints["qwen"], films, "run", 40)
    assert [row["id"] for row in rows] == ["q0"] * 40 + ["q1"] * 40
    assert ["token_logps" in row for row in rows] == [True] * 64 + [False] * 16
    assert all(row["logp"] < 0 for row in rows)
    for row in rows[:64]:
        assert len(row["token_logps"]) == len(row["token_ids"])
        assert row["logp"] == pytest.approx(sum(row["token_logps"]))


def test_pairs_of_a_rollout_are_held_against_the_trainer_and_older_rows_still_pair(
    checkpoints, films, tmp_path
):
    folder = checkpoints["qwen"]
    rows = run_rollout(tmp_path, folder, films, "run", 4)
    for row in rows:  # a random model says nothing right: only what is read changes, not the tokens
        row["response"] = data.join_response(f"thought {row['sample']}", "x")
        row |= {"response_sha": data.response_hash(row["response"]), "finish_reason": "stop"}
    criteria = dict.fromkeys(data.JUDGED, True)
    verdicts = [
        {key: row[key] for key in ("id", "sample", "response_sha")}
        | {"verdict_sha": "v", "criteria": criteria | {"No_Hallucination": row["sample"] < 2}}
        for row in rows
    ]
    data.write_jsonl(tmp_path / "verdicts.jsonl", verdicts)

    def pairs_of(name: str, rows: list[dict]) -> list[dict]:
        data.write_jsonl(tmp_path / f"{name}.jsonl", rows)
        judge.main(
            [
                "pairs",
                "--rollouts",
                str(tmp_path / f"{name}.jsonl"),
                "--out",
                str(tmp_path / name),
                "--questions",
                str(tmp_path / "questions.jsonl"),
                "--verdicts",
                str(tmp_path / "verdicts.jsonl"),
            ]
        )
        return schema.read_rows(tmp_path / name / "pairs.jsonl", "pairs")

    pairs = pairs_of("new", rows)
    assert len(pairs) == 8
    processor = model.Processor(folder, SETUP.pixels, SETUP.tiles)
    policy, values, by_token = hub.load_policy(folder), [], []
    for pair in pairs:  # as dpo.py encodes a pair
        images = [processor.encode_file(films[0].parent / image) for image in pair["images"]]
        row = [processor.encode_prompt(pair["prompt"], images)]
        for which, side in enumerate(("chosen", "rejected"), 1):
            row.append(processor.encode_tokens(pair[f"{side}_token_ids"], which))
        batch = model.collate([row], processor)
        with torch.no_grad():
            logp = policy(batch)
        by_token.append([logp[batch.branch == which].tolist() for which in (1, 2)])
        values.append([sum(single) for single in by_token[-1]])
    chains = [
        replace(chain, trainer_tokens=by_token[index][side])
        for (index, side), chain in drift.chains_of(pairs, values).items()
    ]
    found = drift.compare(chains)
    assert found.chains == 8 and found.absolute < 1e-4
    drift.check_drift(found, drift.LIMIT_FP32, "pairs.jsonl")
    names = ("logp", "token_logps")
    old = [{key: value for key, value in row.items() if key not in names} for row in rows]
    older = pairs_of("old", old)
    assert older == [{k: v for k, v in pair.items() if "logp" not in k} for pair in pairs]
    assert drift.chains_of(older, values) == {}
