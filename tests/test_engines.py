"""engines.py against Hugging Face's own generate() and against a hand loop that samples one token
at a time without a cache."""

import argparse
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import attention
import data
import engines
import model
import rollout
import train
from command import schema
from engines import bill, decode, inference
from engines.inference import Completion, Request, Sampling

ROOT = Path(__file__).resolve().parent.parent
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=10)
WARM = Sampling(temperature=0.8, top_p=0.9, max_tokens=12, seed=5)
STOP_BOOST = 1.4  # about one token in ten ends the turn
RARE_BOOST = 0.6  # about one in two hundred


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """These claims are about equal tokens: in fp32, where a rounding does not turn one token into
    another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def tilt(folder, out, boosts: dict[str, float], extra_rows: int = 0):
    """The checkpoint with a random head of its own (a tied one only repeats the last token), and
    some tokens made likelier. A head has no bias, so one is made: channel 0 is 1 in every embedding
    and no layer writes to it, so it is positive in every last hidden state, and a token whose row
    of the head has more of it gains everywhere. extra_rows: likely rows of the head beyond the
    vocabulary, like the padding of the published checkpoints."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    shutil.copytree(folder, out)
    network, tokenizer = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    generator = torch.Generator().manual_seed(4)
    network.config.tie_word_embeddings = network.config.text_config.tie_word_embeddings = False
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    if extra_rows:
        network.resize_token_embeddings(len(tokenizer) + extra_rows, mean_resizing=False)
    with torch.no_grad():
        for name, parameter in network.model.named_parameters():
            if (
                "language_model" not in name
            ):  # the tower's usual 0.02 would hardly be seen in the logits
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0
        network.get_input_embeddings().weight.mul_(6)[:, 0] = (
            1  # larger, so that what is said next hangs on what was said
        )
        network.model.language_model.norm.weight[0] = 4
        head = network.lm_head.weight
        head.copy_(torch.randn(head.shape, generator=generator) * 0.1)
        head[:, 0] = 0
        for token, boost in boosts.items():
            head[tokenizer.convert_tokens_to_ids(token), 0] = boost
        head[len(tokenizer) :, 0] = 8
    network.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def talking(folders, tmp_path_factory):
    """Checkpoints that go on talking, differently from prompt to prompt"""
    base = tmp_path_factory.mktemp("talking")
    return {family: tilt(folder, base / family, {}) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def stopping(folders, tmp_path_factory):
    """Checkpoints that end their turn every few tokens"""
    base = tmp_path_factory.mktemp("stopping")
    return {
        family: tilt(folder, base / family, {"<|im_end|>": STOP_BOOST})
        for family, folder in folders.items()
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three noisy films"""
    base = tmp_path_factory.mktemp("films")
    for seed in range(3):
        Image.fromarray(
            np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
        ).save(base / f"{seed}.png")
    return [base / f"{seed}.png" for seed in range(3)]


def engine_of(folder, batch: int = 64) -> engines.HFEngine:
    return engines.open_engine(f"hf:{folder}", inference.Setup(pixels=56 * 56, batch=batch))


def test_a_prompt_that_leaves_no_room_is_said_to_be_overlong_and_the_others_are_answered(
    folder, tmp_path
):
    shutil.copytree(folder, tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 200
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    requests = [
        Request(key, [{"role": "user", "content": text}], [], (0, 1))
        for key, text in (("long", "word " * 300), ("short", "word"))
    ]
    completions = {
        (completion.id, completion.sample): completion
        for batch in engine_of(tmp_path / "short").answer(requests, GREEDY)
        for completion in batch
    }
    assert [
        (completions["long", k].finish_reason, completions["long", k].text) for k in (0, 1)
    ] == [("overlong", "")] * 2
    assert all(
        completions["short", k].finish_reason in ("stop", "length")
        and completions["short", k].token_ids
        for k in (0, 1)
    )


def turns(text: str) -> list[dict]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def asks_of(pictures, samples: int = 1) -> list[Request]:
    """Prompts of different lengths, with no image, one and two"""
    wanted = tuple(range(samples))
    return [
        Request("short", turns("Why?"), [], wanted),
        Request("film", turns("What does the film show?"), pictures[:1], wanted),
        Request(
            "long",
            turns("A man of fifty has a cough. " * 4 + "What is the best next step?"),
            [],
            wanted,
        ),
        Request("two", turns("Which of the two is worse, and why?"), pictures[1:], wanted),
        Request("other film", turns("What does the film show?"), pictures[2:], wanted),
    ]


def ids_by_sample(engine, requests, sampling) -> dict[tuple[str, int], list[int]]:
    completions = [
        completion
        for completions in engine.answer(requests, sampling)
        for completion in completions
    ]
    found = {(completion.id, completion.sample): completion.token_ids for completion in completions}
    assert len(found) == len(completions) == sum(len(request.samples) for request in requests)
    return found


def inputs_of(processor, request: Request) -> tuple[list[int], dict]:
    """Prompt ids, and Hugging Face's own preprocessing of the images"""
    images = [Image.open(path).convert("RGB") for path in request.images]
    prepared = dict(processor.images(images=images, return_tensors="pt")) if images else {}
    prepared.pop("num_patches", None)
    return processor.encode_prompt(
        request.messages, [processor.encode_image(image) for image in images]
    ).ids, prepared


def reference(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()


def next_logits(network, processor, ids: list[int], prepared: dict) -> torch.Tensor:
    """Hugging Face's logits for the token after `ids`: one full forward, no cache, no padding.
    (V,)"""
    ids = torch.tensor([ids])
    types = (
        {"mm_token_type_ids": (ids == processor.image_id).int()}
        if processor.family.grid_positions
        else {}
    )
    with torch.no_grad():
        return network(
            input_ids=ids, attention_mask=torch.ones_like(ids), **types, **prepared
        ).logits[0, -1]


def banned_ids(processor) -> list[int]:
    return sorted(index for token, index in processor.special.items() if token != "<|im_end|>")


def sampled_by_hand(
    network, processor, request: Request, sample: int, sampling: Sampling
) -> list[int]:
    """The same distribution and the same random numbers, one token at a time, in numpy"""
    ids, prepared = inputs_of(processor, request)
    seed = data.sample_seed(sampling.seed, request.id, sample)
    draws, said = (
        torch.rand(
            sampling.max_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).tolist(),
        [],
    )
    for draw in draws:
        logits = (
            next_logits(network, processor, ids + said, prepared).double().numpy()
            / sampling.temperature
        )
        logits[banned_ids(processor)] = -np.inf
        mass = np.exp(logits - logits.max())
        mass /= mass.sum()
        order, total, kept = np.argsort(-mass, kind="stable"), 0.0, []
        for token in order:
            kept.append(token)
            total += mass[token]
            if total >= sampling.top_p:
                break
        place = draw * total
        for token in kept:
            place -= mass[token]
            if place < 0:
                break
        said.append(int(token))
        if said[-1] == processor.stop_id:
            break
    return said


# --- against Hugging Face


def test_greedy_answers_equal_generate(talking, family, pictures):
    engine, network = engine_of(talking[family]), reference(talking[family])
    requests = asks_of(pictures)
    ours = ids_by_sample(
        engine, requests, replace(GREEDY, max_tokens=24)
    )  # one batch: prompts are padded to the longest
    for request in requests:
        ids, prepared = inputs_of(engine.processor, request)
        ids = torch.tensor([ids])
        types = (
            {"mm_token_type_ids": (ids == engine.processor.image_id).int()}
            if family == "qwen"
            else {}
        )
        out = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **types,
            **prepared,
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=engine.processor.stop_id,
            pad_token_id=engine.processor.stop_id,
            suppress_tokens=banned_ids(engine.processor),
        )
        assert ours[request.id, 0] == out[0, ids.shape[1] :].tolist(), request.id
    assert (
        len({tuple(ids) for ids in ours.values()}) > 3
    )  # the model says different things to different prompts
    films = [
        next_logits(network, engine.processor, *inputs_of(engine.processor, request))
        for request in requests
        if "film" in request.id
    ]
    assert (films[0] - films[1]).abs().max() > 0.1  # and looks at the film


def test_sampling_equals_a_hand_loop_without_a_cache(stopping, family, pictures):
    engine, network = engine_of(stopping[family]), reference(stopping[family])
    requests = asks_of(pictures, samples=3)
    ours = ids_by_sample(engine, requests, WARM)
    for request in requests:
        for k in request.samples:
            assert ours[request.id, k] == sampled_by_hand(
                network, engine.processor, request, k, WARM
            ), (request.id, k)
    assert (
        len({len(ids) for ids in ours.values()}) > 2
    )  # some stopped early, so that rows and branches were dropped


def test_samples_that_share_a_prompt_equal_samples_decoded_one_at_a_time(
    stopping, talking, family, pictures
):
    requests = asks_of(pictures, samples=4)[:2]
    for folder in (stopping[family], talking[family]):
        engine = engine_of(folder)
        engine.policy.double()  # or rounding, other in another batch, decides a draw
        together, alone = ids_by_sample(engine, requests, WARM), {}
        for request in requests:
            for k in request.samples:
                alone |= ids_by_sample(engine, [replace(request, samples=(k,))], WARM)
        assert together == alone
    assert (
        len({tuple(ids) for ids in together.values()}) == 8
    )  # different k differ, different questions differ


def test_answers_do_not_depend_on_batch_size_order_or_batch_mates(stopping, family, pictures):
    requests = asks_of(pictures, samples=2)
    engine = engine_of(stopping[family], batch=64)
    expected = ids_by_sample(engine, requests, WARM)
    assert ids_by_sample(engine, requests, WARM) == expected  # once more
    assert ids_by_sample(engine, requests[::-1], WARM) == expected
    assert ids_by_sample(engine, requests[1:2], WARM).items() <= expected.items()
    for batch in (1, 3, 5):  # one at a time; less than a pair of questions; two questions
        engine.batch = batch
        assert ids_by_sample(engine, requests, WARM) == expected
    fewer = [
        replace(request, samples=request.samples[i % 2 :]) for i, request in enumerate(requests)
    ]  # after a restart, some are done already
    engine.batch = 64
    assert ids_by_sample(engine, fewer, WARM).items() <= expected.items()
    assert ids_by_sample(engine, requests, replace(WARM, seed=6)) != expected


def test_no_questions_give_no_answers(stopping):
    assert list(engine_of(stopping["qwen"]).answer([], WARM)) == []


# --- what comes back


def test_replies_carry_text_finish_reason_and_the_seed_of_their_own(stopping, family, pictures):
    engine = engine_of(stopping[family])
    completions = [
        completion
        for group in engine.answer(asks_of(pictures, samples=16), WARM)
        for completion in group
    ]
    stop = engine.processor.stop_id
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert completion.seed == data.sample_seed(WARM.seed, completion.id, completion.sample)
        body = (
            completion.token_ids[:-1]
            if completion.finish_reason == "stop"
            else completion.token_ids
        )
        assert stop not in body and completion.text == engine.processor.tokenizer.decode(body)
        if completion.finish_reason == "stop":
            assert completion.token_ids[-1] == stop and len(completion.token_ids) <= WARM.max_tokens
        else:
            assert len(completion.token_ids) == WARM.max_tokens
        row = json.loads(json.dumps(inference.completion_row(completion, engine.spec)))
        schema.check_row(row, "here", "rollouts")
        assert row["engine"] == engine.spec and row["token_ids"] == completion.token_ids


def test_a_limit_of_one_token_cuts_every_answer_or_ends_it(stopping):
    engine = engine_of(stopping["qwen"])
    for completion in next(
        engine.answer(
            [Request("a", turns("Why?"), [], tuple(range(20)))], replace(WARM, max_tokens=1)
        )
    ):
        assert len(completion.token_ids) == 1
        assert (
            (completion.finish_reason == "stop")
            == (completion.token_ids == [engine.processor.stop_id])
            == (completion.text == "")
        )


def test_special_tokens_are_never_sampled_however_likely(folders, family, tmp_path):
    names = [token for token in model.Processor(folders[family]).special if token != "<|im_end|>"]
    folder = tilt(folders[family], tmp_path / "tempted", dict.fromkeys(names, 8.0), extra_rows=16)
    engine, request = engine_of(folder), Request("a", turns("Why?"), [], tuple(range(8)))
    ids, prepared = inputs_of(engine.processor, request)
    likeliest = (
        next_logits(reference(folder), engine.processor, ids, prepared)
        .topk(len(names) + 16)
        .indices.tolist()
    )
    beyond = list(range(len(engine.processor.tokenizer), len(engine.processor.tokenizer) + 16))
    assert sorted(likeliest) == sorted(
        banned_ids(engine.processor) + beyond
    )  # the temptation is real
    for sampling in (GREEDY, replace(WARM, temperature=1.5, top_p=1.0)):
        for said in ids_by_sample(engine, [request], sampling).values():
            assert not set(said) & set(banned_ids(engine.processor) + beyond)


def test_the_policy_agrees_with_what_was_sampled(talking, family, pictures):
    engine = engine_of(talking[family])
    request = asks_of(pictures)[1]
    greedy = ids_by_sample(engine, [request], GREEDY)[request.id, 0]
    row = [engine.encode(request), engine.processor.encode_tokens(greedy)]
    batch = model.collate([row], engine.processor)
    start = len(row[0].ids)
    with torch.no_grad():
        logp = engine.policy(batch)[0, start:]
        logits = engine.policy.model.lm_head(engine.policy.hidden_states(batch))[0, start - 1 : -1]
    logits[:, banned_ids(engine.processor)] = float("-inf")
    assert logits.argmax(-1).tolist() == greedy
    assert (
        logp.isfinite().all()
        and (logp < 0).all()
        and logp.sum() > -len(greedy) * np.log(logits.shape[1])
    )


# --- while it samples


def test_a_questions_replies_come_when_its_own_last_one_ends(stopping, family, pictures):
    engine, requests = engine_of(stopping[family]), asks_of(pictures, samples=2)
    seen, lists = [], []
    for completions in engine.answer(requests, replace(WARM, temperature=1.0, max_tokens=60)):
        if completions:  # an empty list is a sign of life, on a slow machine
            seen.append(engine.tally["tokens"])
            lists.append(completions)
    assert len(lists) > 2  # of one batch
    for completions in lists:
        assert {(completion.id, completion.sample) for completion in completions} == {
            (request.id, k)
            for request in requests
            if request.id in {completion.id for completion in completions}
            for k in (0, 1)
        }
    longest = [
        max(len(completion.token_ids) for completion in completions) for completions in lists
    ]
    assert longest == sorted(longest) and longest[0] < longest[-1]
    # what had been sampled by then: of each branch, as many tokens as that step allows
    lengths = [len(completion.token_ids) for completions in lists for completion in completions]
    assert seen == [sum(min(length, steps) for length in lengths) for steps in longest]


def test_a_second_without_a_reply_gives_an_empty_list_and_a_rate(
    talking, pictures, monkeypatch, tmp_path, capsys
):
    clock = iter(np.arange(0, 1e6, 0.4))  # every step takes 0.4 seconds
    monkeypatch.setattr(engines, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    engine, (request,) = engine_of(talking["qwen"]), asks_of(pictures)[:1]
    sampling = replace(GREEDY, max_tokens=8)
    lists = list(engine.answer([request], sampling))
    assert [len(completions) for completions in lists] == [0, 0, 1]  # after 3, 6 and all 9 steps
    assert engine.tally == Counter({"tokens": 8})
    to_row = lambda one: inference.completion_row(one, "hf")
    complete_into(tmp_path / "x", engine, [request], sampling, to_row)
    states = capsys.readouterr().err.split("\r")
    alive = [state for state in states if "| 0/1 [" in state and "tokens=" in state]
    assert len(alive) >= 2 and all("tokens/s=" in state for state in alive)


def test_a_killed_rollout_keeps_what_had_ended_and_goes_on_to_the_same_rows(
    folders, pictures, tmp_path
):
    folder = tilt(folders["qwen"], tmp_path / "model", {"<|im_end|>": RARE_BOOST})
    questions = [
        {"id": f"q{i}", "question": f"Why {i}?", "options": {}, "answer": "x", "images": images}
        for i, images in enumerate([[], ["0.png"], [], ["1.png"], [], []])
    ]
    data.write_jsonl(tmp_path / "questions.jsonl", questions)

    def flags(run: str) -> list[str]:
        return [
            "--engine",
            f"hf:{folder}",
            "--questions",
            str(tmp_path / "questions.jsonl"),
            "-n",
            "1",
            "--images",
            str(pictures[0].parent),
            "--out",
            str(tmp_path / run / "rollout"),
            "--max-tokens",
            "1500",
            "--temperature",
            "1",
            "--top-p",
            "1",
            "--pixels",
            "3136",
        ]

    command = [sys.executable, str(ROOT / "rollout.py"), *flags("killed")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    completions = tmp_path / "killed" / "replies"
    while not any(path.stat().st_size for path in completions.glob("*.jsonl")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.005)
    process.kill()  # -9
    process.wait()
    (path,) = completions.glob("*.jsonl")
    kept = path.read_bytes()
    assert 1 <= kept.count(b"\n") < 6  # of one batch
    rollout.main(flags("killed"))
    rollout.main(flags("whole"))
    assert path.read_bytes().startswith(kept)
    runs = [tmp_path / run / "rollout" / "rollouts.jsonl" for run in ("killed", "whole")]
    (said, told), (again, anew) = (said_and_told(schema.read_rows(run, "rollouts")) for run in runs)
    assert said == again
    for one, other in zip(told, anew, strict=True):
        assert one == pytest.approx(other, abs=1e-4 * len(one) ** 0.5)


# --- memory


@pytest.mark.parametrize("batch, room", [(64, 10**9), (4, 10**9), (64, 400), (64, 180), (64, 1)])
def test_a_batch_is_as_many_questions_as_their_longest_answers_leave_room_for(
    talking, pictures, monkeypatch, batch, room
):
    engine, batches = engine_of(talking["qwen"], batch), []
    bytes_free = room * decode.token_bytes(engine.policy) / engine.share + 1
    monkeypatch.setattr(engines, "free_memory", lambda device: bytes_free)
    lengths_of = lambda group, sampling: batches.append([len(prompt.ids) for _, prompt in group])
    monkeypatch.setattr(engine, "sample", lambda *group: lengths_of(*group) or [])
    list(engine.steps(asks_of(pictures, samples=2), WARM))

    def fits(lengths: list[int]) -> bool:
        tokens = len(lengths) * (max(lengths) + 2 * WARM.max_tokens)
        return 2 * len(lengths) <= batch and tokens <= room

    assert sum(map(len, batches)) == 5
    assert all(fits(lengths) or len(lengths) == 1 for lengths in batches)
    assert not any(fits([*one, other[0]]) for one, other in zip(batches, batches[1:]))
    assert len(batches) == {(64, 10**9): 1, (4, 10**9): 3, (64, 1): 5}.get(
        (batch, room), len(batches)
    )


def test_a_token_of_the_cache_takes_what_the_engine_counts_for_it(
    talking, family, pictures, monkeypatch
):
    caches, made = [], decode.TreeCache.__init__

    def recorded(self, limit):
        made(self, limit)
        caches.append(self)

    monkeypatch.setattr(decode.TreeCache, "__init__", recorded)
    engine, requests = engine_of(talking[family]), asks_of(pictures, samples=3)[:2]
    ids_by_sample(engine, requests, replace(GREEDY, max_tokens=16))
    (cache,) = caches
    buffers = [buffer for layer in cache.layers.values() for buffer in layer]
    assert {buffer.shape[2] for buffer in buffers} == {cache.limit}  # it grew to its end
    assert cache.used == cache.limit  # and not beyond what was fed
    tokens = 2 * cache.limit  # two rows, neither of which ends before
    assert sum(buffer.nbytes for buffer in buffers) == tokens * decode.token_bytes(engine.policy)
    room = int(engine.share * engines.free_memory(engine.device))
    of_four = engines.HFEngine(f"hf:{talking[family]}", inference.Setup(replicas=4))
    assert room > 2**20 and of_four.share == pytest.approx(engine.share / 4)  # on one machine


def test_the_cache_doubles_and_keeps_what_it_holds():
    generator = torch.Generator().manual_seed(0)
    cache, fed = decode.TreeCache(limit=40), torch.randn(2, 3, 2, 40, 5, generator=generator)
    for start, stop in [(0, 7), *((at, at + 3) for at in range(7, 40, 3))]:
        key, value = cache.update(fed[0, :, :, start:stop], fed[1, :, :, start:stop], 0)
        cache.used = stop
        assert torch.equal(key, fed[0, :, :, :stop]) and torch.equal(value, fed[1, :, :, :stop])
        assert stop <= cache.layers[0][0].shape[2] <= min(40, 2 * stop)
        if stop == 22:
            cache.keep(torch.tensor([0, 2]))
            fed = fed[:, [0, 2]]


def test_a_question_for_which_there_is_hardly_room_is_answered_alone(talking, pictures):
    engine, requests = engine_of(talking["qwen"]), asks_of(pictures, samples=3)
    expected = ids_by_sample(engine, requests, WARM)
    engine.share = 1e-9
    assert ids_by_sample(engine, requests, WARM) == expected


def test_out_of_memory_ends_with_what_to_lower(talking, pictures):
    engine = engine_of(talking["qwen"])
    engine.share = 1e12  # as if there were room for everything
    endless = replace(WARM, max_tokens=10**14)  # 800 TB of random numbers
    with pytest.raises(inference.Unavailable, match="lower --batch .64.*--max-tokens .10{14}.*-n"):
        list(engine.answer(asks_of(pictures), endless))


# --- attention of a step


@pytest.mark.parametrize("heads, groups, new, held", [(4, 2, 3, 50), (9, 3, 8, 300), (2, 2, 1, 9)])
def test_heads_that_share_keys_attend_as_if_they_were_repeated(heads, groups, new, held):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, new, 16, generator=generator)
    key, value = torch.randn(2, 3, groups, 2 * held, 16, generator=generator)[:, :, :, :held]
    mask = torch.rand(3, 1, new, held, generator=generator) < 0.5
    mask[..., 0] = True
    module = SimpleNamespace(num_key_value_groups=heads // groups)
    repeated, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert torch.equal(attention.grouped_attention(query, key, value, mask, 0.3), repeated)
    stacked = attention.stacked_attention(query, key, value, mask, 0.3).transpose(1, 2)  # on a GPU
    torch.testing.assert_close(stacked, repeated, rtol=0, atol=2e-6)


def test_engine_and_ranks_do_without_cudnns_attention(talking, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for start in (lambda: engine_of(talking["qwen"]), train.init_ranks):
        torch.backends.cuda.enable_cudnn_sdp(True)
        start()
        assert not torch.backends.cuda.cudnn_sdp_enabled()


# --- choosing a token


def sorted_whole(mass: torch.Tensor, draw: torch.Tensor, top_p: float) -> torch.Tensor:
    """Top-p by a stable sort of all tokens"""
    mass, tokens = mass.double().sort(dim=-1, descending=True, stable=True)
    total = mass.cumsum(-1)
    kept = ((total - mass) < top_p).sum(-1, keepdim=True)
    place = torch.searchsorted(total, draw[..., None] * total.gather(-1, kept - 1), right=True)
    return tokens.gather(-1, place.clamp_max(kept - 1))[..., 0]


@settings(max_examples=100, deadline=None)
@given(
    seed=some.integers(0, 2**31),
    size=some.integers(1, 120),
    count=some.integers(1, 40),
    levels=some.integers(1, 30),
    flat=some.floats(0.05, 3),
    top_p=some.floats(0.01, 0.999),
)
def test_top_p_of_the_likeliest_chooses_what_a_sort_of_all_chooses(
    seed, size, count, levels, flat, top_p
):
    """few levels: many tokens are equally likely"""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, levels, (40, size), generator=generator) / flat
    logits[:, torch.rand(size, generator=generator) < 0.1] = float("-inf")
    logits[:, seed % size] = 0.0
    mass = logits.softmax(-1)
    draw = torch.rand(40, generator=generator, dtype=torch.float64)
    chosen = decode.choose_likely(mass, draw, top_p, count)
    assert torch.equal(chosen, sorted_whole(mass, draw, top_p))


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_top_p_of_a_real_vocabulary_chooses_what_a_sort_of_all_chooses(spread):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 30_000, generator=generator) * spread
    draw = torch.rand(2, 4, generator=generator, dtype=torch.float64)
    expected = sorted_whole((logits / 0.9).softmax(-1), draw, 0.95)
    assert torch.equal(decode.choose(logits, draw, 0.9, 0.95), expected)


def test_choose_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    for draw, token in [(0.0, 0), (0.49, 0), (0.51, 1), (0.79, 1), (0.81, 2), (0.999999, 2)]:
        assert decode.choose(logits, torch.tensor(draw, dtype=torch.float64), 1.0, 1.0) == token
    # at temperature 1/2 the masses are squared: 0.25, 0.09, 0.04 of 0.38
    for draw, token in [(0.65, 0), (0.67, 1), (0.88, 1), (0.9, 2)]:
        assert decode.choose(logits, torch.tensor(draw, dtype=torch.float64), 0.5, 1.0) == token


def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it():
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    draws = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]

    def shares(top_p: float) -> list[float]:
        return (
            decode.choose(logits.expand(1000, 3), draws, 1.0, top_p).bincount(minlength=3) / 1000
        ).tolist()

    for top_p, expected in [
        (0.01, [0, 1, 0]),
        (0.49, [0, 1, 0]),
        (0.51, [0, 5 / 8, 3 / 8]),
        (0.79, [0, 5 / 8, 3 / 8]),
        (0.81, [0.2, 0.5, 0.3]),
        (1.0, [0.2, 0.5, 0.3]),
    ]:
        assert shares(top_p) == pytest.approx(expected, abs=2e-3)


def test_temperature_zero_is_argmax_and_tiny_temperature_too():
    generator = torch.Generator().manual_seed(0)
    logits, draws = (
        torch.randn(50, 30, generator=generator),
        torch.rand(50, generator=generator, dtype=torch.float64),
    )
    for temperature in (0.0, 1e-4):
        assert torch.equal(decode.choose(logits, draws, temperature, 1.0), logits.argmax(-1))


def test_a_banned_token_is_not_chosen_by_the_last_draw():
    generator, last = (
        torch.Generator().manual_seed(0),
        torch.tensor(np.nextafter(1.0, 0.0), dtype=torch.float64),
    )
    logits = torch.randn(20, 5, 100, generator=generator)  # any leading shape
    logits[..., ::7] = logits[..., -3:] = float("-inf")
    for top_p in (1.0, 0.999999):
        for draw in (last, torch.zeros_like(last)):
            chosen = decode.choose(logits, draw.repeat(20, 5), 1.0, top_p)
            assert logits.gather(-1, chosen[..., None]).isfinite().all()


def test_frequencies_follow_the_softmax():
    logits, count, temperature = (
        torch.randn(12, generator=torch.Generator().manual_seed(1)),
        40_000,
        0.7,
    )
    chosen = decode.choose(logits.expand(count, -1), decode.uniforms(11, count), temperature, 1.0)
    expected = (logits.double() / temperature).softmax(-1).numpy() * count
    chi_square = ((np.bincount(chosen.numpy(), minlength=12) - expected) ** 2 / expected).sum()
    assert chi_square < 31.3  # the 99.9 % point for eleven degrees of freedom


def test_a_samples_random_numbers_come_from_its_seed_alone():
    assert torch.equal(decode.uniforms(3, 8), decode.uniforms(3, 20)[:8])
    assert not torch.equal(decode.uniforms(3, 8), decode.uniforms(4, 8))
    assert ((decode.uniforms(3, 1000) >= 0) & (decode.uniforms(3, 1000) < 1)).all()
    # the hash tells questions, samples and run seeds apart
    seeds = {
        data.sample_seed(seed, key, k) for seed in range(3) for key in ("a", "b") for k in range(8)
    }
    assert len(seeds) == 48


# --- asking


class Scribe:
    """An engine that says what it is asked, counts, and breaks off after `breath` replies"""

    spec = "scribe"

    def __init__(self, breath: int = 10**9):
        self.asked, self.breath, self.tally = Counter(), breath, Counter()

    def answer(self, requests, sampling):
        for request in reversed(requests):  # in any order
            for k in request.samples:
                if sum(self.asked.values()) == self.breath:
                    raise KeyboardInterrupt
                self.asked[request.id, k] += 1
                yield [
                    Completion(
                        request.id,
                        k,
                        f"{request.id} says {k}",
                        None,
                        "stop",
                        data.sample_seed(sampling.seed, request.id, k),
                    )
                ]


def complete(engine, requests: list[Request], path: Path, spec: str = "scribe") -> dict:
    """All completions of the requests as rows, by (id, sample)."""

    def to_row(completion: Completion) -> dict:
        return inference.completion_row(completion, spec)

    return complete_into(path, engine, requests, WARM, to_row)


def complete_into(path: Path, engine, requests: list[Request], sampling, to_row) -> dict:
    """complete_all with a file of completions at `path`."""
    with mock.patch.object(inference, "completions_file", lambda *_: path):
        args = argparse.Namespace()
        return inference.complete_all(engine, requests, sampling, "test", to_row, args)


def test_asking_resumes_after_a_kill_and_asks_nothing_twice(tmp_path):
    path, requests = (
        tmp_path / "rollouts.jsonl",
        [Request(name, turns(name), [], (0, 1, 2)) for name in "abcd"],
    )

    def request(scribe, requests=requests):
        return complete(scribe, requests, path)

    first, second, third, fourth = Scribe(breath=7), Scribe(), Scribe(), Scribe()
    with pytest.raises(KeyboardInterrupt):
        request(first)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 7
    path.write_bytes(whole[:-10])  # the machine went down in the middle of a line
    rows = request(second)
    assert list(rows) == [(name, k) for name in "abcd" for k in range(3)]  # however it was answered
    assert all(row["response"] == f"{name} says {k}" for (name, k), row in rows.items())
    torn = list(first.asked)[-1]
    assert first.asked + second.asked == Counter(
        {(name, k): 1 + ((name, k) == torn) for name in "abcd" for k in range(3)}
    )
    assert request(third) == rows and not third.asked
    # four samples instead of three: only the fourth is asked; a subset of the questions gives a
    # subset of the rows
    more = request(fourth, [replace(item, samples=(0, 1, 2, 3)) for item in requests[:2]])
    assert fourth.asked == Counter({("a", 3): 1, ("b", 3): 1}) and len(more) == 8
    assert len(list(data.read_jsonl(path))) == 14


@pytest.mark.parametrize("what", ["text", "image"])
def test_a_reply_to_something_else_under_the_same_id_is_never_taken_and_stays(
    tmp_path, pictures, what
):
    path, film = tmp_path / "rollouts.jsonl", tmp_path / "film.png"
    film.write_bytes(pictures[0].read_bytes())

    def request(scribe, text="Why?"):
        requests = [
            Request("a", turns(text), [film], (0, 1)),
            Request("b", turns("Who?"), [], (0,)),
        ]
        return complete(scribe, requests, path)

    first = request(Scribe())
    before = path.read_bytes()
    other = "Why not?" if what == "text" else "Why?"
    if what == "image":
        film.write_bytes(pictures[1].read_bytes() + b" ")
    scribe, again = Scribe(), Scribe()
    renewed = request(scribe, other)
    assert scribe.asked == Counter({("a", 0): 1, ("a", 1): 1})
    assert renewed["b", 0] == first["b", 0] and renewed["a", 0]["asked"] != first["a", 0]["asked"]
    assert request(again, other) == renewed and not again.asked
    assert path.read_bytes().startswith(before)  # the first replies were paid for
    # what an engine said is evidence: a row that was edited is no reply any more
    edited = path.read_text().replace("b says 0", "b says 1")
    path.write_text(edited)
    with pytest.raises(data.RowError, match="rollouts.jsonl: row 1 is not as it was written"):
        request(again, other)
    assert not again.asked and path.read_text() == edited


def test_two_processes_never_append_to_one_file_of_replies(tmp_path):
    path = tmp_path / "rows.jsonl"
    hold = (
        "from command import stage; import sys, pathlib; "
        "file = stage.hold(pathlib.Path(sys.argv[1])); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    requests, scribe = [Request("a", turns("a"), [], (0,))], Scribe()
    with pytest.raises(data.RowError, match="rows.jsonl: another process"):
        complete(scribe, requests, path)
    assert not scribe.asked
    other.kill()  # -9: whoever is dead holds nothing
    other.wait()
    assert len(complete(scribe, requests, path)) == 1


def test_replies_are_bound_to_what_answers_and_to_every_setting(tmp_path, folders):
    model = tmp_path / "model"
    shutil.copytree(folders["qwen"], model)
    args = argparse.Namespace(
        out=str(tmp_path / "run" / "rollout"), replies="", pixels=3136, tiles=1
    )

    def name(role="rollout", spec=f"hf:{model}", sampling=WARM, **changed):
        return inference.completions_file(
            argparse.Namespace(**{**vars(args), **changed}), role, spec, sampling
        ).name

    names = [
        name(),
        name(role="judge"),
        name(spec=f"vllm:{model}"),
        name(sampling=replace(WARM, seed=99)),
        name(pixels=784),
        name(tiles=4),
    ]
    assert len(set(names)) == len(names) and name() == names[0]
    assert {path.name for path in (tmp_path / "run" / "replies").glob("*.jsonl")} == set()
    (model / "README.md").write_text("About this model")
    (model / ".cache" / "huggingface").mkdir(parents=True)
    (model / ".cache" / "huggingface" / "download.json").write_text("{}")
    assert name() == names[0]  # not the model
    shutil.move(model, tmp_path / "moved")
    assert name(spec=f"hf:{tmp_path / 'moved'}") == names[0]  # nor is its place
    weights = next((tmp_path / "moved").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert name(spec=f"hf:{tmp_path / 'moved'}") != names[0]


def test_half_a_character_in_a_reply_is_replaced_and_the_reply_is_kept(tmp_path):
    class Torn(Scribe):
        def answer(self, requests, sampling):
            yield [
                Completion(
                    "a",
                    0,
                    "half \ud83d, whole \ud83d\ude00, \u4e2d",
                    None,
                    "stop",
                    0,
                    "thought \udc00",
                )
            ]

    def request():
        to_row = lambda completion: {
            **inference.completion_row(completion, "torn"),
            "reasoning": completion.reasoning,
        }
        requests = [Request("a", turns("a"), [], (0,))]
        return complete_into(tmp_path / "rows.jsonl", Torn(), requests, WARM, to_row)

    (row,) = request().values()
    assert (
        row["response"] == "half \ufffd, whole \U0001f600, \u4e2d"
        and row["reasoning"] == "thought \ufffd"
    )
    assert [row] == inference.read_completions(tmp_path / "rows.jsonl")


def said_and_told(rows) -> tuple[list[dict], list[list[float]]]:
    """Rows without their log-probabilities, and these, which round by the batch they are in"""
    names = ("logp", "token_logps")
    said = [{name: value for name, value in row.items() if name not in names} for row in rows]
    return said, [[row["logp"], *row.get("token_logps", [])] for row in rows]


def test_a_resumed_hf_run_writes_what_an_unbroken_one_writes(stopping, pictures, tmp_path):
    engine, requests = engine_of(stopping["qwen"]), asks_of(pictures, samples=3)

    def run(name):
        return complete(engine, requests, tmp_path / name, "hf")

    rows = run("whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "resumed.jsonl").write_text("".join(lines[::2]) + lines[1][:20])
    resumed = run("resumed.jsonl")
    assert list(resumed) == list(rows)
    (said, told), (again, anew) = said_and_told(rows.values()), said_and_told(resumed.values())
    assert said == again
    for one, other in zip(told, anew, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(
    "spec, remedy",
    [
        ("nonsense:x", "hf:PATH"),
        ("no-colon", "hf:PATH"),
        ("http://host:1/v1", "#MODEL"),
        ("https://api.example.com/v1#m", "EXAMPLE_API_KEY"),
        ("gemini:some-model", "GEMINI_API_KEY"),
    ],
)
def test_a_spec_that_lacks_something_is_refused_with_what_to_do(spec, remedy, monkeypatch):
    for variable in ("GEMINI_API_KEY", "EXAMPLE_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(inference.Unavailable) as refused:
        engines.open_engine(spec, inference.Setup())
    assert str(refused.value).startswith(spec) and remedy in str(refused.value)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_is_refused_with_what_to_install_where_it_is_missing(folders):
    with pytest.raises(inference.Unavailable, match="requirements-gpu.txt"):
        engines.open_engine(f"vllm:{folders['qwen']}", inference.Setup())


def test_every_flag_of_an_engine_is_explained_and_read():
    assert all(field.metadata["help"] for field in fields(inference.Setup))


def test_replicas_answer_what_one_engine_answers(stopping, pictures):
    """two processes, each with a share of the questions"""
    requests = asks_of(pictures, samples=2)
    alone = ids_by_sample(engine_of(stopping["qwen"]), requests, WARM)
    both = engines.open_engine(
        f"hf:{stopping['qwen']}", inference.Setup(pixels=56 * 56, batch=64, replicas=2)
    )
    assert isinstance(both, engines.Replicas)
    assert ids_by_sample(both, requests, WARM) == alone
    assert both.tally["tokens"] == sum(map(len, alone.values()))  # each is counted once
    more = ids_by_sample(engine_of(stopping["qwen"]), requests[:1], GREEDY)
    assert ids_by_sample(both, requests[:1], GREEDY) == more  # one has nothing to do
    assert both.tally["tokens"] == sum(map(len, [*alone.values(), *more.values()]))
    both.close()
    assert not any(
        process.is_alive() for process in both.processes
    )  # their GPUs are free for the next engine


def test_a_replica_that_cannot_start_says_why():
    broken = engines.open_engine("hf:/nowhere", inference.Setup(replicas=2))
    # more than a pipe holds: it has ended before it takes them
    asked = [Request("a", turns("What?" * 200_000), [], (0,))] * 2
    with pytest.raises(inference.Unavailable, match="hf:/nowhere: replica .*no config.json"):
        list(broken.answer(asked, GREEDY))
    broken.close()


def test_a_closed_engine_keeps_no_weights(stopping):
    engine = engine_of(stopping["qwen"])
    weights = weakref.ref(next(engine.policy.parameters()))
    assert weights() is not None
    engine.close()
    gc.collect()
    assert weights() is None


def test_more_replicas_than_groups_of_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(inference.Unavailable, match="--replicas 3: there are 2 x 1 GPUs"):
        engines.open_engine("hf:/nowhere", inference.Setup(replicas=3))
    with pytest.raises(inference.Unavailable, match="--replicas 2: there are 1 x 2 GPUs"):
        engines.open_engine("vllm:/nowhere", inference.Setup(replicas=2, tensor_parallel=2))


def test_what_was_asked_is_in_the_ledger_as_soon_as_it_is_answered(tmp_path):
    class Paid(Scribe):
        def answer(self, requests, sampling):
            for completions in super().answer(requests, sampling):
                self.tally["requests"] += 1
                yield completions
                asked = bill.paid(tmp_path)["requests"]
                assert asked == self.tally["requests"]  # a kill here would lose nothing

    engine = Paid()
    complete(engine, [Request("a", turns("a"), [], (0, 1, 2))], tmp_path / "rollouts.jsonl")
    assert bill.paid(tmp_path)["requests"] == 3


def test_gpus_are_grouped_for_engines_that_need_several(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5,6")
    assert engines.gpu_groups(1) == ["0", "1", "2", "5", "6"] and engines.gpu_groups(2) == [
        "0,1",
        "2,5",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert engines.gpu_groups(1) == []


def test_a_missing_image_is_refused_before_anything_is_asked(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "here.png")
    questions = [
        data.Question("What?", {}, "x", images, id=name)
        for name, images in [("q1", ["here.png"]), ("q2", ["here.png", "gone.png"])]
    ]
    with pytest.raises(data.RowError, match="q2.*gone.png"):
        inference.question_requests(questions, tmp_path, 2)
    (request,) = inference.question_requests(questions[:1], tmp_path, 2)
    assert request.images == [tmp_path / "here.png"] and request.samples == (0, 1)
    assert [turn["role"] for turn in request.messages] == ["system", "user"] and request.messages[
        0
    ]["content"] == data.SYSTEM_PROMPT


def test_an_image_that_cannot_be_cut_into_patches_is_refused_by_name(folders, family, tmp_path):
    Image.new("RGB", (400, 1)).save(
        tmp_path / "line.png"
    )  # Qwen's processor takes no image 200 times as long as wide
    engine, request = (
        engine_of(folders[family]),
        Request("a", turns("What?"), [tmp_path / "line.png"], (0,)),
    )
    if family == "internvl":  # squeezes anything into its tile
        assert len(ids_by_sample(engine, [request], GREEDY)) == 1
        return
    with pytest.raises(data.RowError, match="line.png"):
        list(engine.answer([request], GREEDY))


def test_the_clinics_engine_answers_each_sample_by_its_own_seed(world):
    questions = [
        question for question in schema.read_questions(world / "bank.jsonl") if question.images
    ][:3]
    requests = inference.question_requests(questions, world, 4)
    engine = engines.open_engine("clinic:thorough", inference.Setup())
    said = {
        (completion.id, completion.sample): completion.text
        for completions in engine.answer(requests, WARM)
        for completion in completions
    }
    alone = {
        (r.id, r.sample): r.text
        for request in requests
        for k in (3, 1)
        for rs in engine.answer([replace(request, samples=(k,))], WARM)
        for r in rs
    }
    assert alone.items() <= said.items() and len(said) == 12
    assert all(data.split_response(text) for text in said.values())
