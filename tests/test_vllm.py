"""The real vLLM against our own encoding and log-probabilities. Runs where vLLM is installed, on a
GPU or with its CPU build:

VLLM_CPU_KVCACHE_SPACE=1 python -m pytest -m vllm tests/test_vllm.py
"""

import importlib.util
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import data
import engines
import hub
import model
from engines import drift, inference
from engines.inference import Request, Sampling

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed (requirements-gpu.txt)",
    ),
]
WARM = Sampling(temperature=0.9, top_p=1.0, max_tokens=24, seed=3)
SETUP = inference.Setup(pixels=112 * 112, tiles=1, batch=8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noise of three shapes: one as large as allowed, one larger, one to be turned upright"""
    base, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, shape in (("a", (112, 112, 3)), ("b", (150, 290, 3)), ("c", (84, 56, 3))):
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "c" else 1
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(
            base / f"{name}.png", exif=exif
        )
    return [base / f"{name}.png" for name in "abc"]


def asks_of(pictures, samples: int) -> list[Request]:
    def turns(text):
        return [
            {"role": "system", "content": data.SYSTEM_PROMPT},
            {"role": "user", "content": text},
        ]

    return [
        Request(
            f"q{number}",
            turns(f"Question {number}?\nWhat does it show?"),
            images,
            tuple(range(samples)),
        )
        for number, images in enumerate(([], pictures[:1], pictures[1:2], pictures[2:], pictures))
    ]


@pytest.fixture(scope="module", params=["qwen", "internvl"])
def opened(request, folders):
    """(folder, engine) of a family, one after the other"""
    folder = folders[request.param]
    engine = engines.open_engine(f"vllm:{folder}", SETUP)
    processes = multiprocessing.active_children()
    assert processes
    yield folder, engine
    engine.close()
    for process in processes:  # they have been told to end, or were killed
        process.join(10)
        assert not process.is_alive()


def policy_logprobs(folder, processor, request: Request, ids: list[int]) -> list[float]:
    """log pi of every token of a response, by our Policy in fp32."""
    policy = hub.load_policy(folder)
    prompt = processor.encode_prompt(
        request.messages, [processor.encode_file(path) for path in request.images]
    )
    batch = model.collate([[prompt, processor.encode_tokens(ids)]], processor)
    with torch.no_grad():
        return policy(batch)[0][batch.labels[0] > 0].tolist()


def test_vllm_answers_every_sample_from_prompts_of_our_own_ids(opened, pictures):
    folder, engine = opened
    requests = asks_of(pictures, 3)
    completions = [
        completion for part in engine.answer(requests, WARM) for completion in part
    ]  # raises where a prompt's ids are not ours
    assert {(completion.id, completion.sample) for completion in completions} == {
        (request.id, k) for request in requests for k in range(3)
    }
    special = set(engine.processor.special.values())
    for completion in completions:
        assert completion.finish_reason == (
            "stop" if completion.token_ids[-1] == engine.processor.stop_id else "length"
        )
        assert (
            not special & set(completion.token_ids[:-1])
            and len(completion.token_ids) <= WARM.max_tokens
        )
        assert completion.text == engine.processor.decode(completion.token_ids)
    again = [
        completion
        for part in engine.answer(
            [Request(requests[1].id, requests[1].messages, requests[1].images, (2,))], WARM
        )
        for completion in part
    ]
    assert again[0].token_ids == next(
        r.token_ids for r in completions if (r.id, r.sample) == (requests[1].id, 2)
    )  # a seed of its own


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9)])
def test_vllms_log_probabilities_are_our_policys_whatever_the_sampling(
    opened, pictures, temperature, top_p
):
    folder, engine = opened
    assert engine.engine.model_config.logprobs_mode == "raw_logprobs"
    requests = asks_of(pictures, 3)
    chains, sampling = [], Sampling(temperature, top_p, max_tokens=24, seed=3)
    for completion in [
        completion for part in engine.answer(requests, sampling) for completion in part
    ]:
        request = next(request for request in requests if request.id == completion.id)
        ours = policy_logprobs(folder, engine.processor, request, completion.token_ids)
        theirs = completion.token_logps
        chains.append(drift.Measured(completion.logp, sum(ours), len(ours), theirs, ours))
    found, bf16 = drift.compare(chains), torch.cuda.is_available()
    print(f"\nvLLM against Policy: {drift.describe(found)}")
    assert found.absolute <= (5e-2 if bf16 else 1e-3)
    drift.check_drift(found, drift.LIMIT_BF16 if bf16 else drift.LIMIT_FP32, "vLLM")


def test_vllm_serve_answers_over_http_with_token_ids_of_our_own_prompt(folders, pictures, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processor = model.Processor(folders["qwen"], SETUP.pixels)
    size = processor.images.size
    cut = f'{{"min_pixels": {size["shortest_edge"]}, "max_pixels": {size["longest_edge"]}}}'
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folders["qwen"]),
        "--served-model-name",
        "mini",
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--mm-processor-kwargs",
        cut,
        "--max-model-len",
        "4096",
        "--enforce-eager",
    ]
    command += [] if torch.cuda.is_available() else ["--dtype", "float32"]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        engine = engines.open_engine(f"http://127.0.0.1:{port}/v1#mini", SETUP)
        assert engine.vllm
        requests = asks_of(pictures, 3)
        completions = [completion for part in engine.answer(requests, WARM) for completion in part]
        assert {(completion.id, completion.sample) for completion in completions} == {
            (request.id, k) for request in requests for k in range(3)
        }
        for completion in completions:
            assert completion.token_ids and len(completion.token_ids) <= WARM.max_tokens
            assert len(completion.token_logps) == len(completion.token_ids) and completion.logp < 0
            assert completion.text == processor.decode(completion.token_ids).rstrip(
                "\ufffd"
            )  # the server holds a last half character back
        for request in requests:  # and what it made of the prompt is what training makes
            completion = engine.client.chat.completions.create(
                model="mini",
                messages=engine.messages(request),
                max_tokens=1,
                extra_body={"return_token_ids": True},
            )
            ours = processor.encode_prompt(
                request.messages, [processor.encode_file(path) for path in request.images]
            ).ids
            assert completion.model_extra["prompt_token_ids"] == ours
    finally:
        server.terminate()
        server.wait(60)
