"""Remote engines against real HTTP servers on loopback that speak the wire formats of OpenAI and of
Gemini, and misbehave by a script."""

import base64
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

import data
import engines
import judge
from command import schema
from engines import apis, bill, inference, remote
from engines.inference import Request, Sampling

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-very-secret-0123456789"
WARM = Sampling(temperature=0.9, top_p=0.8, max_tokens=100, seed=5)
OPTIONS = {"A": "CT", "B": "MRI"}


# --- the servers


class Server:
    """`play(question, time, body)` says what the server does with the time-th request for a
    question: (status, body, headers), with bytes as a body sent as they are, a list of bytes chunk
    by chunk, and None in it a broken connection; "reset", which breaks the connection in the middle
    of a body; "hang", which never answers."""

    def __init__(self, play, models: object = None):
        self.play, self.models = (
            play,
            models
            or {
                "object": "list",
                "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "someone"}],
            },
        )
        self.requests, self.asked, self.busy, self.most, self.lock, self.over = (
            [],
            Counter(),
            0,
            0,
            threading.Lock(),
            threading.Event(),
        )
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.send(
                    *(
                        server.models
                        if isinstance(server.models, tuple)
                        else (200, server.models, {})
                    )
                )

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = re.search(r"<<(.*?)>>", json.dumps(body))[1]
                with server.lock:
                    server.requests.append(
                        (
                            self.path,
                            {name.lower(): value for name, value in self.headers.items()},
                            body,
                        )
                    )
                    server.asked[question] += 1
                    time_, server.busy = server.asked[question], server.busy + 1
                    server.most = max(server.most, server.busy)
                what = server.play(question, time_, body)
                with server.lock:
                    server.busy -= 1
                if what == "hang":
                    server.over.wait(20)
                    self.close_connection = True
                elif what == "reset":
                    self.wfile.write(
                        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                        b'Content-Length: 1000\r\n\r\n{"choices": ['
                    )
                    self.reset()
                else:
                    self.send(*what)

            def reset(self):
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                self.close_connection = True

            def stream(self, status, pieces, headers):
                self.send_response(status)
                for name, value in {**headers, "Transfer-Encoding": "chunked"}.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in [*pieces, b""]:  # the empty one is the end
                    if piece is None:
                        return self.reset()
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

            def send(self, status, body, headers):
                if isinstance(body, list) and all(isinstance(p, bytes | None) for p in body):
                    return self.stream(status, body, headers)
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for name, value in {
                        "Content-Type": "application/json",
                        "Content-Length": str(len(content)),
                        **headers,
                    }.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except ConnectionError:  # the client was killed
                    self.close_connection = True

        class Quiet(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 64

            def handle_error(self, request, address):
                pass  # connections that we broke

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


class Chat:
    """OpenAI's chat completions"""

    name, route, limit = "chat", "/v1/chat/completions", "max_tokens"

    @staticmethod
    def spec(server) -> str:
        return f"{server.base}/v1#some-model"

    @staticmethod
    def count(body) -> int:
        return body["n"]

    @staticmethod
    def room(body) -> int:
        return body["max_tokens"]

    @staticmethod
    def good(*texts, finish="stop", thoughts="", **message):
        extra = {"reasoning_content": thoughts} if thoughts else {}
        choices = [
            {
                "index": i,
                "message": {
                    "role": "assistant",
                    "content": text,
                    "refusal": None,
                    **extra,
                    **message,
                },
                "logprobs": None,
                "finish_reason": finish,
            }
            for i, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
        return (
            200,
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": "some-model",
                "choices": choices,
                "usage": usage,
            },
            {},
        )

    @staticmethod
    def bad(status, text="no", code=None, wait=None):
        error = {"message": text, "type": "some_error", "param": None, "code": code}
        return status, {"error": error}, {"Retry-After": wait} if wait else {}

    no_room = good(None, finish="length", thoughts="hm, hm")

    @staticmethod
    def event(value) -> bytes:
        return f"data: {json.dumps(value)}\n\n".encode()

    @staticmethod
    def pieces(*texts, finish="stop", thoughts="", usage=True, **extra) -> list[dict]:
        """The chunks of a stream: thoughts, then a character of each text in turn, then the ends,
        then the usage."""

        def chunk(*choices, usage=None):
            kind = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
            return {**kind, "choices": list(choices), "usage": usage}

        def piece(i, delta, **more):
            choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None, **more}
            return chunk(choice)

        said, numbers = [], range(len(texts))
        for word in thoughts:
            delta = {"role": "assistant", "content": None, "reasoning_content": word}
            said += [piece(i, delta) for i in numbers]
        for row in zip_longest(*texts):
            said += [piece(i, {"content": c}, **extra) for i, c in enumerate(row) if c]
        said += [piece(i, {"content": ""}, finish_reason=finish) for i in numbers]
        counts = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
        return said + [chunk(usage=counts), chunk()] * usage

    @classmethod
    def stream(cls, chunks):
        events = [b": keep-alive\n\n", *map(cls.event, chunks), b"data: [DONE]\n\n"]
        return 200, events, {"Content-Type": "text/event-stream"}


class Gemini:
    """Gemini's generateContent"""

    name, route = "gemini", "/models/some-model:generateContent"

    @staticmethod
    def spec(server) -> str:
        return "gemini:some-model"

    @staticmethod
    def count(body) -> int:
        return body["generationConfig"]["candidateCount"]

    @staticmethod
    def room(body) -> int:
        return body["generationConfig"]["maxOutputTokens"]

    @staticmethod
    def good(*texts, finish="STOP", thoughts=""):
        finish = {"stop": "STOP", "length": "MAX_TOKENS"}.get(finish, finish)
        thought = [{"text": thoughts, "thought": True}] if thoughts else []
        candidates = [
            {
                "content": {
                    "role": "model",
                    "parts": thought + ([{"text": text[:2]}, {"text": text[2:]}] if text else []),
                },
                "finishReason": finish,
                "index": i,
            }
            for i, text in enumerate(texts)
        ]
        usage = {
            "promptTokenCount": 11,
            "candidatesTokenCount": 4,
            "thoughtsTokenCount": 3,
            "totalTokenCount": 18,
        }
        return (
            200,
            {
                "candidates": candidates,
                "usageMetadata": usage,
                "modelVersion": "some-model",
                "responseId": "x",
            },
            {},
        )

    @staticmethod
    def bad(status, text="no", code=None, wait=None):
        details = (
            [
                {
                    "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                    "reason": code,
                    "domain": "googleapis.com",
                }
            ]
            if code
            else []
        )
        if wait:
            details.append(
                {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{wait}s"}
            )
        names = {
            400: "INVALID_ARGUMENT",
            401: "UNAUTHENTICATED",
            403: "PERMISSION_DENIED",
            404: "NOT_FOUND",
            429: "RESOURCE_EXHAUSTED",
            500: "INTERNAL",
            503: "UNAVAILABLE",
        }
        return (
            status,
            {
                "error": {
                    "code": status,
                    "message": text,
                    "status": names.get(status, "UNKNOWN"),
                    "details": details,
                }
            },
            {},
        )

    # what is left out when thinking used up everything: no parts at all
    usage = {"promptTokenCount": 11, "thoughtsTokenCount": 7}
    no_room = (
        200,
        {
            "candidates": [
                {"content": {"role": "model"}, "finishReason": "MAX_TOKENS", "index": 0}
            ],
            "usageMetadata": usage,
        },
        {},
    )


APIS = {"chat": Chat, "gemini": Gemini}


@pytest.fixture(params=list(APIS))
def api(request):
    return APIS[request.param]


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for variable in (
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "GOOGLE_API_KEY",
        "GOOGLE_GENAI_USE_VERTEXAI",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LOCAL_API_KEY", KEY)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)


@pytest.fixture
def serve(monkeypatch):
    started = []

    def start(play, models=None):
        started.append(Server(play, models))
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", started[-1].base)
        return started[-1]

    yield start
    for server in started:
        server.close()


class Clock(threading.Event):
    """An event whose waits are written down instead of waited for."""

    def __init__(self):
        super().__init__()
        self.pauses = []

    def wait(self, timeout=None):
        self.pauses.append(timeout)
        return self.is_set()


def open_at(api, server, **setup):
    engine = engines.open_engine(api.spec(server), inference.Setup(**setup))
    engine.stopping = Clock()
    return engine


def request(name: str, samples: int = 1, images=()) -> Request:
    return Request(
        name,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"What is <<{name}>>?"},
        ],
        list(images),
        tuple(range(samples)),
    )


def complete_into(path: Path, engine, requests: list[Request], spec: str = "remote") -> dict:
    """complete_all with a file of completions at `path`."""

    def to_row(completion: inference.Completion) -> dict:
        return inference.completion_row(completion, spec)

    with mock.patch.object(inference, "completions_file", lambda *_: path):
        return inference.complete_all(engine, requests, WARM, "test", to_row, Namespace())


def all_replies(engine, requests, sampling=WARM) -> list:
    return [
        completion
        for completions in engine.answer(requests, sampling)
        for completion in completions
    ]


def until_it_stops(engine, requests) -> tuple[list, inference.Unavailable]:
    """(what was answered, why it stopped)"""
    completions = []
    with pytest.raises(inference.Unavailable) as stopped:
        for group in engine.answer(requests, WARM):
            completions += group
    return completions, stopped.value


# --- what arrives


def test_images_prompt_and_settings_arrive_as_they_should(api, serve, tmp_path):
    tall = Image.new(
        "RGB", (300, 200), "red"
    )  # stored lying: once upright it is 200 x 300, red above blue
    tall.paste("blue", (150, 0, 300, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    tall.save(tmp_path / "tall.jpg", exif=exif, quality=95)
    Image.new("RGB", (20, 10), "green").save(tmp_path / "small.png")
    server = serve(lambda question, time, body: api.good("yes", "no"))
    images = [tmp_path / "tall.jpg", tmp_path / "small.png"]
    assert len(all_replies(open_at(api, server, pixels=60 * 100), [request("it", 2, images)])) == 2
    ((path, headers, body),) = server.requests
    seed = data.sample_seed(WARM.seed, "it", 0) % 2**31
    if api is Chat:
        assert path == api.route and headers["authorization"] == f"Bearer {KEY}"
        assert [turn["role"] for turn in body["messages"]] == ["system", "user"] and body[
            "messages"
        ][0]["content"] == "Be brief."
        *shown, text = body["messages"][1]["content"]
        assert text == {"type": "text", "text": "What is <<it>>?"}
        pictures = [
            base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
            for part in shown
        ]
        settings = {
            "model": "some-model",
            "n": 2,
            "max_tokens": 100,
            "temperature": 0.9,
            "top_p": 0.8,
            "seed": seed,
        }
        assert body == {**settings, "messages": body["messages"]}
    else:
        assert path.endswith(api.route) and headers["x-goog-api-key"] == KEY
        assert body["systemInstruction"]["parts"] == [{"text": "Be brief."}]
        (turn,) = body["contents"]
        *shown, text = turn["parts"]
        assert turn["role"] == "user" and text == {"text": "What is <<it>>?"}
        assert all(
            "image/png" in part["inlineData"].values() for part in shown
        )  # mimeType or mime_type, as the client has it
        pictures = [base64.urlsafe_b64decode(part["inlineData"]["data"]) for part in shown]
        settings = {"candidateCount": 2, "maxOutputTokens": 100, "seed": seed}
        settings |= {"temperature": 0.9, "topP": 0.8}
        thinking = body["generationConfig"].pop("thinkingConfig")
        assert thinking in ({"includeThoughts": True}, {"include_thoughts": True})  # the same
        assert body["generationConfig"] == settings
    assert KEY not in path and KEY not in json.dumps(body)
    large, small = (Image.open(BytesIO(picture)) for picture in pictures)
    assert (
        large.format == small.format == "PNG"
        and small.size == (20, 10)
        and small.getpixel((5, 5)) == (0, 128, 0)
    )
    assert large.width * large.height <= 60 * 100 and large.width / large.height == pytest.approx(
        2 / 3, abs=0.03
    )
    above, below = (
        large.getpixel((large.width // 2, 5)),
        large.getpixel((large.width // 2, large.height - 5)),
    )
    assert above[0] > 200 > 50 > above[2] and below[2] > 200 > 50 > below[0]


def test_answer_and_reasoning_come_apart_and_usage_is_counted(api, serve):
    server = serve(
        lambda question, time, body: api.good(
            "the answer", thoughts="so I thought", finish="length" if question == "b" else "stop"
        )
    )
    engine = open_at(api, server)
    completions = {
        completion.id: completion
        for completion in all_replies(engine, [request("a"), request("b")])
    }
    assert {
        (completion.text, completion.reasoning, completion.token_ids)
        for completion in completions.values()
    } == {("the answer", "so I thought", None)}
    assert (
        completions["a"].finish_reason == "stop" and completions["b"].finish_reason == "length"
    )  # kept, and marked
    assert completions["a"].seed == data.sample_seed(WARM.seed, "a", 0)
    assert engine.tally == Counter({"requests": 2, "tokens in": 22, "tokens out": 14, "length": 1})


@pytest.mark.parametrize(
    "models, vllm",
    [
        ({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]}, True),
        ({"object": "list", "data": [{"id": "m"}]}, False),
        ((404, {"detail": "Not Found"}, {}), False),
        ((403, {"error": "not for you"}, {}), False),
        ((200, b"<html>hello</html>", {"Content-Type": "text/html"}), False),
        ((200, b'{"data": [', {}), False),
        ((200, [], {}), False),
        ((200, {"data": 5}, {}), False),
        ((200, 3, {}), False),
        ((200, b"[" * 100_000, {}), False),
    ],
)
def test_vllm_is_known_by_its_list_of_models_and_asked_for_token_ids(serve, models, vllm):
    def play(question, time, body):
        status, content, headers = Chat.good(
            "Yes.<|im_end|>" if body.get("return_token_ids") else "Yes."
        )
        if body.get("return_token_ids"):
            content["choices"][0]["token_ids"] = [5, 6, 2]
        return status, content, headers

    server = serve(play, models)
    (completion,) = all_replies(open_at(Chat, server), [request("a")])
    assert completion.text == "Yes." and completion.token_ids == ([5, 6, 2] if vllm else None)
    assert (server.requests[0][2].get("top_k") == 0) is vllm


def test_a_server_that_is_not_there_or_not_ready_is_said_at_once(serve):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        spec = f"http://127.0.0.1:{free.getsockname()[1]}/v1#m"
    with pytest.raises(inference.Unavailable, match="no server answers there.*refused"):
        engines.open_engine(spec, inference.Setup())
    busy = serve(None, (503, {"error": {"message": "loading"}}, {"Retry-After": "0.01"}))
    with pytest.raises(inference.Unavailable, match="loading.*until the server is ready"):
        engines.open_engine(Chat.spec(busy), inference.Setup())


# --- servers that do not give all that is asked for

NO_THOUGHTS = (
    "Unable to submit request because thinking is not supported by this model.",
    "Thinking is not enabled for models/some-model",
    "Thinking_config.include_thoughts is only enabled when thinking is enabled.",
)
ONLY_STREAMS = (
    "This model only support stream mode, please enable the stream parameter to access the model. ",
    "parameter.enable_thinking must be set to false for non-streaming calls",
    "parameter.enable_thinking必须设置为false才能进行非流式调用",
)


@pytest.mark.parametrize("refusal", ONLY_STREAMS)
def test_a_server_that_only_streams_is_found_out_once_and_its_streams_are_read_whole(
    serve, refusal, capsys
):
    def play(question, time, body):
        if not body.get("stream"):
            return Chat.bad(400, refusal)
        return Chat.stream(Chat.pieces("It is A.", "No: B", thoughts="hm, é"))

    server = serve(play)
    engine = open_at(Chat, server, concurrency=1)
    completions = all_replies(engine, [request("a", 2), request("b", 2)])
    told = {(r.sample, r.text, r.reasoning, r.token_ids, r.finish_reason) for r in completions}
    assert len(completions) == 4
    assert told == {(0, "It is A.", "hm, é", None, "stop"), (1, "No: B", "hm, é", None, "stop")}
    assert engine.tally == {"requests": 3, "again": 1, "tokens in": 22, "tokens out": 14}
    assert engine.stopping.pauses == [0]
    asked = [(body.get("stream"), body.get("stream_options")) for _, _, body in server.requests]
    assert asked == [(None, None)] + 2 * [(True, {"include_usage": True})]
    assert capsys.readouterr().out.count("refuses requests for whole replies") == 1


def test_a_server_that_streams_one_sample_at_a_time_is_found_out_too(serve):
    def play(question, time, body):
        if not body.get("stream") or body["n"] > 1:
            return Chat.bad(400, "n must be 1" if body.get("stream") else ONLY_STREAMS[0])
        return Chat.stream(Chat.pieces(f"yes {time}", usage=False))

    server = serve(play)
    completions = all_replies(
        open_at(Chat, server, concurrency=1), [request("a", 2), request("b", 2)]
    )
    assert {(r.id, r.sample) for r in completions} == {(id, k) for id in "ab" for k in (0, 1)}
    assert [Chat.count(body) for _, _, body in server.requests] == [2, 2, 1, 1, 1, 1]


def test_a_choice_of_another_form_costs_only_itself_and_the_paid_one_beside_it_is_kept(serve):
    """Google's client checks the form of a whole response, so it is about chat servers."""

    def play(question, time, body):
        if time > 1:
            return Chat.good("later")
        status, content, headers = Chat.good("yes", "no")
        content["choices"][1] = {"message": 3, "finish_reason": "stop"}
        return status, content, headers

    server = serve(play)
    completions = all_replies(open_at(Chat, server), [request("a", 2)])
    assert {(one.sample, one.text) for one in completions} == {(0, "yes"), (1, "later")}
    assert [Chat.count(body) for _, _, body in server.requests] == [2, 1]


@pytest.mark.parametrize("what", ["streams", "thoughts"])
def test_requests_under_way_when_the_server_is_found_out_are_asked_again_too(serve, what):
    """Four are refused, one of them only after another has been asked again and answered."""
    api, text = (Chat, ONLY_STREAMS[0]) if what == "streams" else (Gemini, NO_THOUGHTS[0])
    together, answered = threading.Barrier(4), threading.Event()

    def play(question, time, body):
        first = "stream" not in body if api is Chat else "thinkingConfig" in json.dumps(body)
        if first:
            together.wait(10)
            if question == "q3":
                answered.wait(10)
            return api.bad(400, text)
        if question == "q4":
            answered.set()
        return Chat.stream(Chat.pieces("yes")) if api is Chat else Gemini.good("yes")

    server = serve(play)
    completions = all_replies(
        open_at(api, server, concurrency=4), [request(f"q{i}") for i in range(12)]
    )
    assert len(completions) == 12 and {completion.text for completion in completions} == {"yes"}
    assert len(server.requests) == 4 + 12


def test_token_ids_of_a_stream_come_whole(serve):
    models = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]}

    def play(question, time, body):
        if not body.get("stream"):
            return Chat.bad(400, ONLY_STREAMS[0])
        return Chat.stream(Chat.pieces("yes", "no", token_ids=[5, 6]))

    completions = all_replies(open_at(Chat, serve(play, models)), [request("a", 2)])
    told = [(completion.text, completion.token_ids) for completion in completions]
    assert told == [("yes", 3 * [5, 6]), ("no", 2 * [5, 6])]


GOOD = Chat.pieces("half an answer", usage=False)
SSE = {"Content-Type": "text/event-stream"}
BROKEN_STREAMS = {
    "a reset": (200, [*map(Chat.event, GOOD[:5]), None], SSE),
    "an end before the end": (200, [*map(Chat.event, GOOD[:5])], SSE),
    "DONE before the end": Chat.stream(GOOD[:-1]),
    "half an event": (200, [*map(Chat.event, GOOD[:5]), b'data: {"choices": [{"in\n\n'], SSE),
    "an error": Chat.stream([*GOOD[:5], {"error": {"message": "overloaded", "code": 503}}]),
    "an error event": (
        200, [*map(Chat.event, GOOD[:5]), b'event: error\ndata: {"error": "x"}\n\n'], SSE
    ),
    "null": Chat.stream([*GOOD[:5], None]), "a number": Chat.stream([3]),
    "a word for a piece": Chat.stream([{"object": "chat.completion.chunk", "choices": ["x"]}]),
    "a number for a text": Chat.stream(
        [{"choices": [{"index": 0, "delta": {"content": 5}, "finish_reason": "stop"}]}]
    ),
    "an end nobody knows": Chat.stream(Chat.pieces("half an", finish="error")),
    "a web page": (200, [b"<html>", b"hello</html>"], {"Content-Type": "text/html"}),
    "a whole reply": Chat.good("half an answer"), "nothing": (200, [], SSE),
    "no text": Chat.stream(Chat.pieces("")),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_STREAMS)
def test_a_stream_that_breaks_is_asked_again_and_never_half_an_answer(serve, name):
    def play(question, time, body):
        if not body.get("stream"):
            return Chat.bad(400, ONLY_STREAMS[0])
        return BROKEN_STREAMS[name] if time == 2 else Chat.stream(Chat.pieces("whole"))

    server = serve(play)
    engine = open_at(Chat, server)
    (completion,) = all_replies(engine, [request("a")])
    assert (completion.text, completion.finish_reason) == ("whole", "stop")
    assert len(server.requests) == 3 and 0.5 <= engine.stopping.pauses[1] <= 2


def test_a_server_whose_streams_always_break_stops_the_run(serve):
    def play(question, time, body):
        if not body.get("stream"):
            return Chat.bad(400, ONLY_STREAMS[0])
        return BROKEN_STREAMS["an end before the end"]

    server = serve(play)
    completions, stopped = until_it_stops(
        open_at(Chat, server, concurrency=1), [request("a"), request("b")]
    )
    assert not completions and server.asked == {"a": remote.TRIES}
    assert "a stream without an end" in str(stopped)


def test_of_a_stream_that_is_cut_off_the_finished_samples_are_kept(serve):
    def play(question, time, body):
        if not body.get("stream"):
            return Chat.bad(400, ONLY_STREAMS[0])
        chunks = Chat.pieces(*(f"{time}.{i}" for i in range(body["n"])), usage=False)
        return Chat.stream(chunks[:-1] if time == 2 else chunks)

    server = serve(play)
    completions = all_replies(open_at(Chat, server), [request("a", 3)])
    assert {completion.sample: completion.text for completion in completions} == {
        0: "2.0",
        1: "2.1",
        2: "3.0",
    }


def test_streams_end_as_whole_replies_do(serve):
    ends = {
        "filtered": Chat.pieces("So far", finish="content_filter"),
        "cut": Chat.pieces("So far", finish="length"),
        "full": Chat.pieces("", finish="length", thoughts="hm"),
    }

    def play(question, time, body):
        return Chat.stream(ends[question]) if body.get("stream") else Chat.bad(400, ONLY_STREAMS[0])

    engine = open_at(Chat, serve(play), concurrency=1)
    told = {r.id: (r.text, r.finish_reason) for r in all_replies(engine, [*map(request, ends)])}
    assert told.pop("full") == ("", "length")  # of room
    assert told == {"filtered": ("So far", "blocked"), "cut": ("So far", "length")}
    assert engine.tally["requests"] == 1 + 1 + 1 + remote.REMEDIES["no room"].tries


@pytest.mark.parametrize("refusal", NO_THOUGHTS)
def test_a_gemini_that_does_not_think_is_found_out_once(serve, refusal, capsys):
    def play(question, time, body):
        wanted = "thinkingConfig" in body["generationConfig"]
        return Gemini.bad(400, refusal) if wanted else Gemini.good("yes", "no")

    server = serve(play)
    engine = open_at(Gemini, server, concurrency=1)
    completions = all_replies(engine, [request("a", 2), request("b", 2)])
    assert [(completion.text, completion.reasoning) for completion in completions] == 2 * [
        ("yes", ""),
        ("no", ""),
    ]
    assert len(server.requests) == 3 and engine.stopping.pauses == [0]
    assert [Gemini.count(body) for _, _, body in server.requests] == [2, 2, 2]
    assert capsys.readouterr().out.count("refuses requests for thoughts") == 1


def test_a_refusal_that_asking_for_less_does_not_mend_is_held_against_nobody_else(api, serve):
    """The words of such a refusal may as well stand in a question that is repeated."""
    text = "what a stream of thinking"

    def play(question, time, body):
        return api.bad(400, text) if question == "q2" else api.good("yes")

    server = serve(play)
    completions = all_replies(
        open_at(api, server, concurrency=1), [request(f"q{i}") for i in range(4)]
    )
    assert {completion.id for completion in completions if completion.finish_reason == "stop"} == {
        "q0",
        "q1",
        "q3",
    }
    assert {
        completion.id for completion in completions if completion.finish_reason == "refused"
    } == {"q2"}
    last = server.requests[-1][2]
    assert "stream" not in last and (api is Chat or "thinkingConfig" in last["generationConfig"])


# --- failures that pass

PASSING = {
    "429": lambda api: api.bad(429, "slow down"), "500": lambda api: api.bad(500),
    "503": lambda api: api.bad(503, "overloaded"),
    "a proxy's 502": lambda api: (502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html"}),
    "reset in a body": lambda api: "reset", "time-out": lambda api: "hang",
    "truncated JSON": lambda api: (200, json.dumps(api.good("yes")[1]).encode()[:60], {}),
    "a web page": lambda api: (200, b"<html>hello</html>", {"Content-Type": "text/html"}),
    "no body": lambda api: (200, b"", {}), "a list": lambda api: (200, [1], {}),
    "null": lambda api: (200, None, {}), "not UTF-8": lambda api: (200, b'{"a": "\xff"}', {}),
    "an error in a 200": lambda api: (200, {"error": {"code": 502, "message": "upstream"}}, {}),
    "no choices": lambda api: api.good(),
    "null for choices": lambda api: (200, {"choices": None, "candidates": None}, {}),
    "a null choice": lambda api: (200, {"choices": [None], "candidates": [None]}, {}),
    "a choice of nothing": lambda api: (200, {"choices": [{}], "candidates": [{}]}, {}),
    "a choice of numbers": lambda api: (
        200,
        {
            "choices": [{"message": 3, "finish_reason": "stop"}],
            "candidates": [{"content": 3, "finishReason": "STOP"}],
        },
        {},
    ),
    "an empty answer": lambda api: api.good(""),
    "a broken end": lambda api: api.good("half an", finish="abort" if api is Chat else "OTHER"),
    "an end nobody knows": lambda api: api.good("half an", finish="NEVER_HEARD_OF"),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.filterwarnings("ignore:NEVER_HEARD_OF")
def test_a_failure_that_passes_is_asked_again(api, serve, name, monkeypatch):
    monkeypatch.setattr(apis, "TIMEOUT", 0.4 if name == "time-out" else 20)
    server = serve(
        lambda question, time, body: PASSING[name](api) if time == 1 else api.good("yes")
    )
    engine = open_at(api, server)
    (completion,) = all_replies(engine, [request("a")])
    assert (completion.text, completion.finish_reason) == ("yes", "stop")
    assert len(server.requests) == engine.tally["requests"] == 2 and engine.tally["again"] == 1
    assert len(engine.stopping.pauses) == 1 and 0.5 <= engine.stopping.pauses[0] <= 1


def test_waits_double_up_to_the_longest_unless_the_server_names_one(api, serve):
    waits = {2: "7", 3: "soon", 4: "0.25"}
    server = serve(
        lambda question, time, body: (
            api.bad(429, wait=waits.get(time)) if time < 8 else api.good("yes")
        )
    )
    engine = open_at(api, server)
    all_replies(engine, [request("a")])
    first, named, third, short, *rest = engine.stopping.pauses
    assert (named, short) == (7, 0.25) and 0.5 <= first <= 1 and 2 <= third <= 4
    assert [
        8 <= rest[0] <= 16,
        16 <= rest[1] <= 32,
        30 <= rest[2] <= remote.REMEDIES["busy"].wait == 60,
    ] == [True] * 3


@pytest.mark.parametrize("wait", ["601", "604800", "604799.5", "9" * 400])
def test_a_server_that_asks_for_a_wait_of_days_stops_the_run_with_its_length(api, serve, wait):
    def play(question, time, body):
        return api.bad(429, "no more today", wait=wait) if question == "b" else api.good("yes")

    server = serve(play)
    engine = open_at(api, server, concurrency=1)
    completions, stopped = until_it_stops(engine, [request("a"), request("b"), request("c")])
    assert [completion.id for completion in completions] == ["a"] and server.asked == {
        "a": 1,
        "b": 1,
    }
    assert re.search(r"a wait of (601|60(4800|479\d)|inf) s .*no more today", str(stopped))
    assert not engine.stopping.pauses


def test_a_wait_of_minutes_is_waited(api, serve):
    def play(question, time, body):
        return api.bad(429, wait="600") if time == 1 else api.good("yes")

    engine = open_at(api, serve(play))
    assert len(all_replies(engine, [request("a")])) == 1 and engine.stopping.pauses == [600]


def test_a_server_that_stays_down_stops_the_run(api, serve):
    server = serve(lambda question, time, body: api.bad(503, "overloaded"))
    engine = open_at(api, server, concurrency=1)
    completions, stopped = until_it_stops(engine, [request("a"), request("b")])
    assert (
        not completions
        and server.asked == {"a": remote.TRIES}
        and len(engine.stopping.pauses) == remote.TRIES - 1
    )
    assert "question a has no answer after 8 tries" in str(stopped) and "overloaded" in str(stopped)


def test_a_last_try_that_fails_in_another_way_says_nothing_of_the_question(api, serve):
    def play(question, time, body):
        return api.bad(503) if time < remote.TRIES else api.good("")

    completions, stopped = until_it_stops(open_at(api, serve(play)), [request("a")])
    assert not completions and "question a has no answer after 8 tries" in str(stopped)


def test_a_question_that_alone_breaks_the_server_holds_nobody_up(api, serve):
    server = serve(
        lambda question, time, body: api.bad(500) if question == "q3" else api.good("yes")
    )
    engine = open_at(api, server, concurrency=2)
    engine.stopping.wait = lambda timeout=None: time.sleep(
        0.05
    )  # long enough for the others to be answered meanwhile
    completions, stopped = until_it_stops(engine, [request(f"q{i}") for i in range(12)])
    assert {completion.id for completion in completions} == {f"q{i}" for i in range(12)} - {
        "q3"
    } and len(completions) == 11
    assert (
        "question q3" in str(stopped)
        and "1 questions" in str(stopped)
        and "asks them again" in str(stopped)
    )


COUNTS = ("prompt_tokens", "promptTokenCount")
GARBLED = {
    "a web page": lambda api: (200, b"<html>hello</html>", {"Content-Type": "text/html"}),
    "a web page called JSON": lambda api: (200, b"<html>hello</html>", {}),
    "a list": lambda api: (200, ["hello"], {}), "null": lambda api: (200, None, {}),
    "a number": lambda api: (200, 3, {}), "no body": lambda api: (200, b"", {}),
    "an error in a 200": lambda api: (200, {"error": {"message": "hello"}}, {}),
    "too deep": lambda api: (200, b"[" * 100_000, {}),
    "a number for choices": lambda api: (200, {"choices": 5, "candidates": 5}, {}),
    "a number for usage": lambda api: with_usage(api, 5),
    "a word for a count": lambda api: with_usage(api, dict.fromkeys(COUNTS, "x")),
    "a number for a text": lambda api: (200, {
        "choices": [{"message": {"content": 5}, "finish_reason": "stop"}],
        "candidates": [{"content": {"parts": [{"text": 5}]}, "finishReason": "STOP"}],
    }, {}),
}  # fmt: skip


def with_usage(api, usage) -> tuple[int, dict, dict]:
    """A good reply with another account of its tokens."""
    return 200, {**api.good("yes")[1], "usage": usage, "usageMetadata": usage}, {}


@pytest.mark.parametrize("name", GARBLED)
def test_a_server_that_garbles_every_question_stops_the_run_in_seconds(api, serve, name):
    server = serve(lambda question, time, body: GARBLED[name](api))
    engine = open_at(api, server, concurrency=1)
    completions, stopped = until_it_stops(engine, [request(f"q{i}") for i in range(40)])
    assert (
        not completions
        and len(server.requests) == remote.STRIKES * remote.REMEDIES["garbled"].tries
    )
    assert sum(engine.stopping.pauses) < 20
    wanted = "a chat completions API" if api is Chat else "the Gemini API"
    assert f"is this the address of {wanted}? The server sent: " in str(stopped)
    assert ("hello" in str(stopped)) is ("hello" in str(GARBLED[name](api)[1]))


def test_the_waits_for_a_garbling_server_are_real_and_short(api, serve):
    server = serve(lambda question, time, body: (200, b"<html>hello</html>", {}))
    engine = engines.open_engine(api.spec(server), inference.Setup(concurrency=16))
    started = time.monotonic()
    _, stopped = until_it_stops(engine, [request(f"q{i}") for i in range(40)])
    assert 0.5 < time.monotonic() - started < 10 and "<html>hello</html>" in str(stopped)


def test_a_question_that_alone_is_garbled_is_the_only_one_lost(api, serve):
    garbled = GARBLED["a web page"](api)
    server = serve(lambda question, time, body: garbled if question == "q3" else api.good("yes"))
    engine = open_at(api, server, concurrency=1)
    completions = {
        completion.id: completion
        for completion in all_replies(engine, [request(f"q{i}") for i in range(12)])
    }
    lost = {name for name, completion in completions.items() if completion.finish_reason != "stop"}
    assert lost == {"q3"} and completions["q3"].finish_reason == "empty" and len(completions) == 12
    assert (
        server.asked["q3"] == remote.REMEDIES["garbled"].tries
        and len(server.requests) == 11 + remote.REMEDIES["garbled"].tries
    )


def test_what_a_garbling_server_sent_is_shown_on_two_lines_without_key_or_controls(api, serve):
    page = f"<html>\n\x1b[31m who is {KEY}? \n".encode() + b"long " * 9000
    server = serve(lambda question, time, body: (200, page, {"Content-Type": "text/html"}))
    _, stopped = until_it_stops(open_at(api, server), [request("a")])
    assert "<html> [31m who is ...? long" in str(stopped) and KEY not in str(stopped)
    assert len(str(stopped)) < 600 and str(stopped).isprintable()


# --- no room, no answer, no permission


def test_an_answer_that_thinking_left_no_room_for_gets_more(api, serve):
    server = serve(
        lambda question, time, body: api.good("yes") if api.room(body) >= 400 else api.no_room
    )
    engine = open_at(api, server)
    (completion,) = all_replies(engine, [request("a")])
    assert completion.text == "yes" and [api.room(body) for _, _, body in server.requests] == [
        100,
        200,
        400,
    ]
    assert (
        engine.stopping.pauses == [0, 0] and engine.tally["tokens out"] == 21
    )  # what was only thought is paid for, too


@pytest.mark.parametrize("refused", [False, True])
def test_an_answer_that_never_has_room_is_cut_off(api, serve, refused):
    server = serve(
        lambda question, time, body: (
            api.bad(400, "too many tokens") if refused and api.room(body) > 200 else api.no_room
        )
    )
    (completion,) = all_replies(open_at(api, server), [request("a")])
    assert (completion.text, completion.finish_reason) == ("", "length")
    assert [api.room(body) for _, _, body in server.requests] == [100, 200, 400, 800][
        : 3 if refused else 4
    ]


BLOCKS = {
    "chat filter": (Chat, Chat.good("So far", finish="content_filter")),
    "chat refusal": (Chat, Chat.good(None, refusal="I cannot help with that.")),
    "gemini prompt": (
        Gemini,
        (
            200,
            {
                "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
                "usageMetadata": {"promptTokenCount": 11},
            },
            {},
        ),
    ),
    "gemini candidate": (
        Gemini,
        (200, {"candidates": [{"finishReason": "SAFETY", "index": 0, "safetyRatings": []}]}, {}),
    ),
    "gemini half way": (Gemini, Gemini.good("So far", finish="RECITATION")),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_safety_block_is_marked_and_not_asked_again(serve, name):
    api, block = BLOCKS[name]
    server = serve(lambda question, time, body: block)
    engine = open_at(api, server)
    (completion,) = all_replies(engine, [request("a")])
    assert (
        completion.finish_reason == "blocked"
        and engine.tally["blocked"] == len(server.requests) == 1
    )


@pytest.mark.parametrize("most", [1, 3])
def test_a_server_that_gives_fewer_answers_than_asked_for_is_asked_for_the_rest(api, serve, most):
    server = serve(
        lambda question, time, body: api.good(
            *[f"{time}.{i}" for i in range(min(most, api.count(body)))]
        )
    )
    completions = all_replies(open_at(api, server), [request("a", 8)])
    assert [completion.sample for completion in completions] == list(range(8)) and len(
        {completion.text for completion in completions}
    ) == 8
    assert [api.count(body) for _, _, body in server.requests] == list(range(8, 0, -most))
    assert len({json.dumps(body).split('"seed"')[1] for _, _, body in server.requests}) == len(
        server.requests
    )


def test_a_server_that_takes_one_at_a_time_is_found_out_once(api, serve):
    server = serve(
        lambda question, time, body: (
            api.bad(400, "n must be 1") if api.count(body) > 1 else api.good("yes")
        )
    )
    completions = all_replies(
        open_at(api, server, concurrency=1), [request("a", 3), request("b", 3)]
    )
    assert Counter(completion.id for completion in completions) == {"a": 3, "b": 3} and {
        completion.finish_reason for completion in completions
    } == {"stop"}
    assert [api.count(body) for _, _, body in server.requests] == [3, 1, 1, 1, 1, 1, 1]


def test_good_answers_beside_an_empty_one_are_kept(api, serve):
    server = serve(
        lambda question, time, body: api.good("a", "", "c") if time == 1 else api.good("b")
    )
    completions = all_replies(open_at(api, server), [request("a", 3)])
    assert {completion.sample: completion.text for completion in completions} == {
        0: "a",
        1: "b",
        2: "c",
    } and len(server.requests) == 2


def test_a_server_that_refuses_everything_stops_the_run_and_marks_nothing(api, serve, capsys):
    server = serve(lambda question, time, body: api.bad(400, "this model takes no pictures"))
    completions, stopped = until_it_stops(
        open_at(api, server, concurrency=2), [request(f"q{i}", 2) for i in range(40)]
    )
    assert (
        not completions
        and "this model takes no pictures" in str(stopped)
        and "8 questions in a row" in str(stopped)
    )
    assert len(server.asked) <= remote.STRIKES + 1 and len(server.requests) <= 2 * (
        remote.STRIKES + 1
    )
    completions, stopped = until_it_stops(
        open_at(api, server), [request("a")]
    )  # and so does the only one
    assert (
        not completions
        and "not one question was answered" in str(stopped)
        and "this model takes no pictures" in str(stopped)
    )


def test_a_server_that_takes_no_system_turn_is_told_with_the_flag_for_it(api, serve):
    refused = "This model does not support system messages."
    server = serve(lambda question, time, body: api.bad(400, refused))
    _, stopped = until_it_stops(open_at(api, server), [request("a")])
    assert f"{refused}" in str(stopped)
    assert "evaluate.py --prompt bare sends no system turn" in str(stopped)
    bare = replace(request("b"), messages=request("b").messages[1:])  # it has none already
    _, stopped = until_it_stops(open_at(api, server), [bare])
    assert refused in str(stopped) and "--prompt bare" not in str(stopped)


@pytest.mark.parametrize(
    "reason, what",
    [("refused", lambda api: api.bad(400, "too large")), ("empty", lambda api: api.good(""))],
)
def test_a_question_without_an_answer_is_kept_and_counted_even_if_it_is_the_first(
    api, serve, reason, what, tmp_path, capsys
):
    server = serve(
        lambda question, time, body: (
            what(api) if question in ("q0", "q7", "new") else api.good("yes")
        )
    )
    engine, requests, path = (
        open_at(api, server, concurrency=1),
        [request(f"q{i}") for i in range(10)],
        tmp_path / "rollouts.jsonl",
    )
    rows = complete_into(path, engine, requests)
    told = {id: (row["response"], row["finish_reason"]) for (id, _), row in rows.items()}
    assert told == {f"q{i}": ("", reason) if i in (0, 7) else ("yes", "stop") for i in range(10)}
    assert engine.tally[reason] == 2 and "question q7 is " + reason in capsys.readouterr().out
    before = len(server.requests)
    assert complete_into(path, open_at(api, server), requests) == rows
    assert len(server.requests) == before  # not asked again
    # nor does a run stop, that was killed with only such a question left
    (row,) = complete_into(path, open_at(api, server), [request("new")]).values()
    assert row["finish_reason"] == reason


def test_a_server_that_begins_to_refuse_everything_stops_the_run_and_marks_nothing(api, serve):
    server = serve(
        lambda question, time, body: (
            api.good("yes") if int(question[1:]) < 5 else api.bad(400, "no more")
        )
    )
    completions, stopped = until_it_stops(
        open_at(api, server, concurrency=1), [request(f"q{i}") for i in range(40)]
    )
    assert {completion.id for completion in completions} == {f"q{i}" for i in range(5)} and {
        completion.finish_reason for completion in completions
    } == {"stop"}
    assert "no more" in str(stopped) and len(server.requests) == 5 + remote.STRIKES


FATAL = {
    "401": lambda api: api.bad(401, "bad key"),
    "402": lambda api: api.bad(402, "Insufficient Balance"),
    "403": lambda api: api.bad(403, "not yours"), "404": lambda api: api.bad(404, "no such model"),
    "no money": lambda api: api.bad(
        429, "You exceeded your current quota", code="insufficient_quota"
    ),
    "Google's wrong key": lambda api: api.bad(
        400, "API key not valid. Please pass a valid API key.", code="API_KEY_INVALID"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, apis",
    [
        *[(name, (Chat, Gemini)) for name in ("401", "402", "403", "404")],
        ("no money", (Chat,)),
        ("Google's wrong key", (Gemini,)),
    ],
)
def test_what_no_waiting_helps_stops_the_run_with_what_to_check(serve, name, apis):
    for api in apis:
        what = FATAL[name](api)
        server = serve(
            lambda question, time, body, api=api, what=what: (
                api.good("yes") if question in ("q0", "q1") else what
            )
        )
        completions, stopped = until_it_stops(
            open_at(api, server, concurrency=1), [request(f"q{i}") for i in range(9)]
        )
        assert {completion.id for completion in completions} == {"q0", "q1"} and len(
            server.requests
        ) == 3
        assert what[1]["error"]["message"] in str(stopped) and "check the key" in str(stopped)


def test_an_image_that_cannot_be_read_stops_the_run_by_name(api, serve, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    server = serve(lambda question, time, body: api.good("yes"))
    with pytest.raises(data.RowError, match="torn.png"):
        all_replies(open_at(api, server), [request("a", images=[tmp_path / "torn.png"])])
    assert not server.requests


# --- stopping, going on, and how many at once


def test_replies_under_way_when_another_request_stops_the_run_are_kept(api, serve):
    told = threading.Event()

    def play(question, time, body):
        if question == "bad":
            told.set()
            return api.bad(401, "bad key")
        told.wait(10)
        server.over.wait(0.3)  # the others are answered after the run was stopped
        return api.good("yes")

    server = serve(play)
    completions, _ = until_it_stops(
        open_at(api, server, concurrency=4),
        [
            *[request(f"q{i}", 2) for i in range(3)],
            request("bad"),
            *[request(f"late{i}") for i in range(9)],
        ],
    )
    # one of two samples each: what is under way ends, and nothing new begins; one late question may
    # have slipped in
    assert (
        {completion.id for completion in completions} >= {"q0", "q1", "q2"}
        and len(completions) <= 4
        and len(server.requests) == len(completions) + 1
    )


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where a shell has started this process in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_replies_under_way_at_ctrl_c_are_kept(api, serve, tmp_path, interruptible):
    def play(question, time, body):
        server.over.wait(0.2)
        if question == "q6":
            os.kill(os.getpid(), signal.SIGINT)
        return api.good("yes")

    server, path = serve(play), tmp_path / "rollouts.jsonl"
    requests = [request(f"q{i}") for i in range(40)]
    with pytest.raises(KeyboardInterrupt):
        complete_into(path, open_at(api, server, concurrency=4), requests)
    kept = len(data.resume_jsonl(path))
    assert 7 <= kept < 40 and kept == len(server.requests)
    assert len(complete_into(path, open_at(api, server, concurrency=40), requests)) == 40
    assert len(server.requests) == 40  # none was asked twice


def test_ctrl_c_after_a_failure_keeps_the_replies_and_tells_the_failure(api, serve, interruptible):
    def play(question, time, body):
        if question == "bad":
            return api.bad(401, "bad key")
        server.over.wait(0.5)
        if question == "q0":
            os.kill(os.getpid(), signal.SIGINT)
        server.over.wait(0.3)
        return api.good("yes")

    server = serve(play)
    asked = [request("q0"), request("q1"), request("bad")]
    completions, stopped = until_it_stops(open_at(api, server, concurrency=3), asked)
    assert {one.id for one in completions} == {"q0", "q1"} and "bad key" in str(stopped)


def test_a_run_that_goes_on_is_not_stopped_again_where_refused_questions_stand_together(
    api, serve, tmp_path
):
    refused = {f"q{i}" for i in range(20, 20 + remote.STRIKES)}
    server = serve(
        lambda question, time, body: api.bad(400, "no") if question in refused else api.good("yes")
    )
    requests, path = [request(f"q{i}") for i in range(100)], tmp_path / "rollouts.jsonl"
    with pytest.raises(inference.Unavailable, match="8 questions in a row"):
        complete_into(path, open_at(api, server, concurrency=1), requests)
    rows = complete_into(path, open_at(api, server, concurrency=1), requests)
    ends = {key: row["finish_reason"] for (key, _), row in rows.items()}
    assert ends == {one.id: "refused" if one.id in refused else "stop" for one in requests}


def test_a_cap_on_requests_stops_with_all_answers_kept_and_the_same_command_goes_on(
    api, serve, tmp_path
):
    server, requests = (
        serve(
            lambda question, time, body: (
                api.bad(503) if time == 1 and question == "q1" else api.good("yes")
            )
        ),
        [request(f"q{i}") for i in range(10)],
    )

    def run():
        remote.RemoteEngine.made = 0  # as in a process of its own
        engine = open_at(api, server, max_requests=4, concurrency=3)
        return complete_into(tmp_path / "rows.jsonl", engine, requests, "x")

    for count in (4, 8):
        with pytest.raises(
            inference.Unavailable,
            match="4 requests were made .--max-requests.; the same command goes on",
        ):
            run()
        assert len(server.requests) == bill.paid(tmp_path)["requests"] == count
        assert 0 <= count - 1 - len(list(data.read_jsonl(tmp_path / "rows.jsonl"))) <= 1
    assert {id for id, _ in run()} == {f"q{i}" for i in range(10)}
    assert server.asked - Counter(f"q{i}" for i in range(10)) == {
        "q1": 1
    }  # nothing was asked twice but what failed


@pytest.mark.parametrize("concurrency", [1, 5])
def test_as_many_requests_at_once_as_the_flag_says(api, serve, concurrency):
    full = threading.Event()

    def play(question, time, body):
        if server.busy == concurrency:
            full.set()
        full.wait(10)
        return api.good("yes")

    server = serve(play)
    assert (
        len(
            all_replies(
                open_at(api, server, concurrency=concurrency), [request(f"q{i}") for i in range(30)]
            )
        )
        == 30
    )
    assert server.most == concurrency


def test_an_engine_that_was_used_up_answers_again(api, serve):
    """The judge asks three rounds of the same engine: the end of the first must not count as a stop
    of the second."""
    server = serve(lambda question, time, body: api.bad(503) if time == 1 else api.good("yes"))
    engine = open_at(api, server)
    for name in "ab":
        assert [completion.text for completion in all_replies(engine, [request(name)])] == ["yes"]


# --- the key


def test_no_message_shows_the_key_even_if_the_server_repeats_all_it_was_sent(api, serve, capsys):
    for status in (400, 401, 503):
        server = serve(
            lambda question, time, body: (
                api.good("yes")
                if question == "fine"
                else api.bad(status, f"wrong: {KEY} " + "x" * 9000)
            )
        )
        _, stopped = until_it_stops(
            open_at(api, server, concurrency=1),
            [request("fine"), *[request(f"q{i}") for i in range(9)]],
        )
        assert "wrong: ..." in str(stopped) and KEY not in str(stopped) and len(str(stopped)) < 800
    out = "".join(capsys.readouterr())
    assert "is refused" in out and KEY not in out


@pytest.mark.parametrize("key", [KEY[:9] + "\n" + KEY[9:], KEY + " x", KEY + "é"])
def test_a_key_that_no_header_carries_is_refused_unseen(api, serve, key, monkeypatch):
    for variable in ("LOCAL_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(variable, key)
    with pytest.raises(inference.Unavailable) as refused:
        open_at(api, serve(None))
    assert "_API_KEY" in str(refused.value) and KEY[:9] not in str(refused.value)


def test_the_key_is_named_after_the_host():
    hosts = {
        "api.openai.com": "OPENAI",
        "api.deepseek.com": "DEEPSEEK",
        "dash-scope.aliyuncs.com": "ALIYUNCS",
        "localhost": "LOCAL",
        "127.0.0.1": "LOCAL",
        "::1": "LOCAL",
    }
    assert {host: apis.key_variable(host) for host in hosts} == {
        host: f"{name}_API_KEY" for host, name in hosts.items()
    }


@pytest.fixture
def called(api, serve, monkeypatch):
    """called(host): a server on this machine that is found under this name or address, and the
    variable of its key."""
    resolve = socket.getaddrinfo

    def start(host):
        def here(name, *rest, **more):
            return resolve("127.0.0.1" if name == host.strip("[]") else name, *rest, **more)

        server = serve(lambda question, time, body: api.good("yes"))
        monkeypatch.setattr(socket, "getaddrinfo", here)
        server.base = server.base.replace("127.0.0.1", host)
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.base)
        return server, apis.key_variable(host.strip("[]"))

    return start


PUBLIC = ("api.example.com", "localhost.example.com", "8.8.8.8", "172.32.0.1", "[2001:4860::8888]")
PRIVATE = ("gpu-box", "a.cluster.local", "10.1.2.3", "192.168.0.7", "172.16.0.1", "[fd00::1]")
HERE = ("localhost", "a.localhost", "127.0.0.1", "127.8.9.1", "0.0.0.0", "[::1]")


@pytest.mark.parametrize("host", PUBLIC)
def test_a_key_is_not_sent_over_the_internet_in_the_clear(api, called, host, monkeypatch):
    server, variable = called(host)
    monkeypatch.setenv(variable, KEY)
    with pytest.raises(inference.Unavailable) as refused:
        open_at(api, server)
    wanted = variable if api is Chat else "GEMINI_API_KEY"
    assert "use https" in str(refused.value) and wanted in str(refused.value)
    assert not server.requests and KEY not in str(refused.value)
    if api is Chat:  # without a key there is nothing to hide
        monkeypatch.delenv(variable)
        assert [
            completion.text for completion in all_replies(open_at(api, server), [request("a")])
        ] == ["yes"]


@pytest.mark.parametrize("host", PRIVATE + HERE)
def test_in_a_private_network_and_on_this_machine_a_key_is_sent(api, called, host, monkeypatch):
    server, variable = called(host)
    monkeypatch.setenv(variable, KEY)
    (completion,) = all_replies(open_at(api, server), [request("a")])
    assert completion.text == "yes" and KEY in str(server.requests[0][1])


# --- whole scripts

YES = dict.fromkeys(judge.KEYS, "Yes")
VERDICTS = {  # what the judge says each time it is asked; the verdict; how often it is asked
    "plain": ([json.dumps({**YES, "No_Hallucination": "No"})], {"No_Hallucination": False}, 1),
    "prose around": ([f"Let me see {{hm}}.\n{json.dumps(YES)}\nThat is all."], {}, 1),
    "fenced": ([f"```json\n{json.dumps(YES, indent=4)}\n```"], {}, 1),
    "wrong case": ([json.dumps({key.lower(): "yES" for key in YES})], {}, 1),
    "extra keys": ([json.dumps({**YES, "Comment": "No"})], {}, 1),
    "cut off, then whole": ([json.dumps(YES)[:70], json.dumps(YES)], {}, 2),
    "always cut off": ([json.dumps({**YES, "Logical_Consistency": "No"})[:70]], None, 3),
    "a draft, then cut off": (
        [("length", json.dumps({**YES, "Logical_Consistency": "No"}) + " On second thought: {")],
        None,
        3,
    ),
    "echoed": ([json.dumps({**YES, "Logical_Consistency": "Yes/No"})], None, 3),
    "a key missing": ([json.dumps({key: "No" for key in judge.KEYS[:4]})], None, 3),
    "another word": ([json.dumps({**YES, "Logical_Consistency": "Partly"})], None, 3),
    "blocked": ([("content_filter", "")], None, 3),
    "blocked half way": (
        [("content_filter", json.dumps({**YES, "Logical_Consistency": "No"}))],
        None,
        3,
    ),
    "busy, then fine": ([Chat.bad(429), Chat.bad(500), "reset", json.dumps(YES)], {}, 4),
    "empty, then fine": (["", None, json.dumps(YES)], {}, 3),
    "no room, then fine": ([("length", None), json.dumps(YES)], {}, 2),
    "refused": ([Chat.bad(400, "no")], None, 3),
}


def questions_file(folder: Path, names) -> Path:
    data.write_jsonl(
        folder / "questions.jsonl",
        (data.Question(f"What is <<{name}>>?", OPTIONS, "B", id=name).to_row() for name in names),
    )
    return folder / "questions.jsonl"


def rollouts_file(folder: Path, names) -> Path:
    response = data.join_response("It must be.", "B")
    rows = (
        {
            "id": name,
            "sample": 0,
            "response": response,
            "token_ids": None,
            "finish_reason": "stop",
            "response_sha": data.content_hash(response)[:16],
        }
        for name in names
    )
    data.write_jsonl(folder / "rollouts.jsonl", rows)
    return folder / "rollouts.jsonl"


def verdict_of(said):
    """What the judge's server sends for an entry of VERDICTS."""
    if said == "reset" or (isinstance(said, tuple) and isinstance(said[0], int)):
        return said
    finish, text = said if isinstance(said, tuple) else ("stop", said)
    return Chat.good(text, finish=finish)


def test_every_verdict_is_read_or_asked_again_or_left_out_and_counted(
    serve, tmp_path, monkeypatch, capsys
):
    busy = remote.REMEDIES["busy"]._replace(wait=0.001)
    monkeypatch.setitem(remote.REMEDIES, "busy", busy)
    server = serve(
        lambda question, time, body: verdict_of(
            VERDICTS[question][0][min(time, len(VERDICTS[question][0])) - 1]
        )
    )
    questions, rollouts = questions_file(tmp_path, VERDICTS), rollouts_file(tmp_path, VERDICTS)
    command = [
        "verdicts",
        "--judge",
        Chat.spec(server),
        "--rollouts",
        str(rollouts),
        "--questions",
        str(questions),
        "--out",
        str(tmp_path / "out"),
    ]
    judge.main(command)
    rows = {row["id"]: row for _, row in data.read_jsonl(tmp_path / "out" / "verdicts.jsonl")}
    expected = {
        name: None if changes is None else {**dict.fromkeys(judge.KEYS, True), **changes}
        for name, (_, changes, _) in VERDICTS.items()
    }
    assert {name: row["criteria"] for name, row in rows.items()} == expected
    assert all(bool(row["error"]) == (row["criteria"] is None) for row in rows.values())
    assert server.asked == {name: times for name, (_, _, times) in VERDICTS.items()}
    unread = sum(criteria is None for criteria in expected.values())
    assert f"{len(VERDICTS)} chains judged, {unread} without a readable" in capsys.readouterr().out
    _, report = judge.make_pairs(
        [row for _, row in data.read_jsonl(rollouts)],
        list(rows.values()),
        {q.id: q for q in schema.read_questions(questions)},
        "all",
        0,
        0,
    )
    assert (
        report["no_verdict"] == unread
        and report["negative"] == 1
        and report["negatives_failing"]["No_Hallucination"] == 1
    )
    judge.main(command)
    assert sum(server.asked.values()) == sum(
        times for _, _, times in VERDICTS.values()
    )  # the same command again asks nothing


def script(tmp_path, *words) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / words[0]), *words[1:]],
        env=environment,
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("stage", ["rollout", "judge"])
def test_a_killed_run_goes_on_and_asks_nothing_twice(stage, serve, tmp_path):
    """kill -9 in the middle; then a run that the server stops, which ends with its message; then
    the rest. No file, no line shows the key."""
    names, mode = [f"q{i}" for i in range(40)], "slow"

    def play(question, time_, body):
        if mode == "slow":
            if len(server.requests) > 15:
                return "hang"
        elif mode == "strict" and len(server.requests) > 30:
            return Chat.bad(401, f"who is {KEY}?")
        return Chat.good(*[json.dumps(YES)] * body["n"])

    server, questions = serve(play), questions_file(tmp_path, names)
    if stage == "rollout":
        words = ["rollout.py", "--engine", Chat.spec(server), "-n", "2"]
    else:
        words = [
            "judge.py",
            "verdicts",
            "--judge",
            Chat.spec(server),
            "--rollouts",
            str(rollouts_file(tmp_path, names)),
        ]
    words += ["--questions", str(questions), "--out", str(tmp_path / "out"), "--concurrency", "3"]
    first = script(tmp_path, *words)
    written: list[Path] = []
    while (
        len(server.requests) < 18 or not written or written[0].read_bytes().count(b"\n") < 15
    ) and first.poll() is None:
        time.sleep(0.02)
        written = list((tmp_path / "replies").glob(f"{stage}-*.jsonl"))
    (kept,) = written
    os.kill(first.pid, signal.SIGKILL)
    output = [first.communicate()[0]]
    assert first.returncode == -signal.SIGKILL and not (tmp_path / "out" / "stage.json").exists()
    server.over.set()
    answered = {row["id"].split("/")[0] for _, row in data.read_jsonl(kept)}
    assert len(answered) == 15 and len(server.asked) == 18

    mode, before = "strict", server.asked.copy()
    second = script(tmp_path, *words)
    output.append(second.communicate()[0])
    assert (
        second.returncode == 1
        and "Traceback" not in output[1]
        and "who is ...?" in output[1]
        and "check the key" in output[1]
    )
    assert not answered & (server.asked - before).keys()
    answered = {row["id"].split("/")[0] for _, row in data.read_jsonl(kept)}

    mode, before = "kind", server.asked.copy()
    third = script(tmp_path, *words)
    output.append(third.communicate()[0])
    assert third.returncode == 0 and (server.asked - before).keys() == set(names) - answered
    rows = [row for _, row in data.read_jsonl(kept)]
    assert (
        len(rows)
        == len({(row["id"], row["sample"]) for row in rows})
        == (80 if stage == "rollout" else 40)
    )
    assert (
        (tmp_path / "out" / "stage.json").exists()
        and "answer/s" in output[2]
        and "tokens out=" in output[2]
    )
    for text in [*output, *[path.read_text() for path in tmp_path.rglob("*") if path.is_file()]]:
        assert KEY not in text


def test_a_row_that_cannot_be_used_ends_a_script_with_its_message(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}\n')
    process = script(
        tmp_path,
        "rollout.py",
        "--engine",
        "clinic:thorough",
        "--questions",
        "bad.jsonl",
        "--out",
        "out",
    )
    output = process.communicate()[0]
    assert (
        process.returncode == 1
        and output.startswith("bad.jsonl:1: missing 'question'")
        and "Traceback" not in output
    )
