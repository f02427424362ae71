"""The clients of two APIs: OpenAI's chat completions, which most servers offer, and Gemini.

    http(s)://HOST/v1#MODEL    `vllm serve`, GPT-4o, o1, DeepSeek-R1, Qwen3, gpt-oss, ...
    gemini:NAME                Google's API

remote.py retries what fails. Here is how each API is asked, and what a response of it means. A
whole completion is asked for before a stream, because less can go wrong with it.

Keys come from the environment: GEMINI_API_KEY, or the name of the host: api.openai.com ->
OPENAI_API_KEY. They are never printed, and never sent over the internet unencrypted.

Where we depart from the paper, or it is silent:
  1. Which servers: ours.
  2. A remote model gets an image upright and no larger than --pixels. `vllm serve` gets it whole
     and must be started with the settings of training. Its log-probabilities are those before
     temperature and top-p, unless it is started with another --logprobs-mode.
  3. Gemini gives only summaries of its thoughts; `distill.py --expand` writes them out.
"""

import base64
import ipaddress
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import data
from engines.inference import Completion, Request, Sampling, Setup, Unavailable
from engines.remote import Garbled, NoRoom, RemoteEngine

TIMEOUT = 1800.0  # ours: seconds for one completion; a reasoning model may think for many minutes
SEEDS = 2**31  # both APIs take seeds below this
REASONING = ("reasoning_content", "reasoning")  # what servers call a model's thinking


class APIEngine(RemoteEngine):
    """What both share: a response is read choice by choice (`completion`), and what cannot be read
    is shown."""

    API = ""  # what the address must be, in words

    def __init__(self, spec: str, setup: Setup, key: str):
        super().__init__(spec, setup, key)
        self.heard = threading.local()  # .text: what the server sent last, in each thread

    def close(self) -> None:
        self.client.close()

    def completion(self, id: str, sample: int, choice, seed: int) -> Completion:
        """One choice of a response. An end that is not stop, length or blocked is kept as it is."""

    def hear(self, response) -> None:
        """Keeps what the server sent, as the clients drop what they cannot read. httpx calls it."""
        response.read()
        self.heard.text = response.text

    @contextmanager
    def reading(self) -> Iterator[None]:
        """For a request and the reading of its response. Raises Garbled for another form, which the
        clients do not check: these errors may come from anywhere inside them."""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise self.garbled(f"it cannot be read ({type(error).__name__})") from error

    def garbled(self, why: str) -> Garbled:
        sent = self.heard.text or "nothing"
        return Garbled(f"{why}; is this the address of {self.API}? The server sent: {sent}")

    def completions(self, request: Request, choices: list, seed: int) -> list[Completion]:
        """The completions among the choices. Raises the first failure if there are none."""
        completions, failures = [], []
        for k, choice in zip(request.samples, choices):
            try:
                with self.reading():  # a choice of another form costs only itself
                    one = self.completion(request.id, k, choice, seed)
                    check_text(one)
                    completions.append(one)
            except (Garbled, NoRoom) as failure:
                failures.append(failure)
        if not completions:
            raise failures[0]
        return completions


def check_text(one: Completion) -> None:
    """Raises Garbled or NoRoom for a completion without text that no filter has blocked."""
    if one.finish_reason not in ("stop", "length", "blocked"):
        raise Garbled(f"it ended with {one.finish_reason}")
    if one.text or one.finish_reason == "blocked":
        return
    if one.finish_reason == "length":
        raise NoRoom("thinking used up the token limit")
    if not one.token_ids:  # vLLM may end its turn at once
        raise Garbled("an empty completion")


class ChatEngine(APIEngine):
    """Any server with OpenAI's chat completions."""

    API = "a chat completions API"
    WISH = "whole replies"  # without this wish, a stream is asked for
    REFUSED = r"\bstream|流式"  # refusals by Alibaba and ModelScope, in two languages

    def __init__(self, spec: str, setup: Setup):
        import openai

        url, _, self.model = spec.partition("#")
        if not self.model:
            raise Unavailable(f"{spec}: which model? Write {url}#MODEL")
        self.host = urlsplit(url).hostname or ""
        key = key_of(spec, key_variable(self.host), url)
        super().__init__(spec, setup, key)
        self.openai = openai
        http = openai.DefaultHttpxClient(event_hooks={"response": [self.hear]})
        self.client = openai.OpenAI(
            base_url=url, api_key=key or "none", timeout=TIMEOUT, max_retries=0, http_client=http
        )
        self.vllm = self.is_vllm()

    def is_vllm(self) -> bool:
        """Whether the server is vLLM: it gives token ids and takes settings that others refuse."""
        try:
            served = self.client.with_options(max_retries=2).models.list()
            return any(getattr(model, "owned_by", "") == "vllm" for model in served.data)
        except self.openai.APIStatusError as error:
            if error.status_code in (401, 429) or error.status_code >= 500:
                check = "check the key, or wait until the server is ready"
                raise Unavailable(f"{self.spec}: {self.shown(error)}; {check}") from None
        except self.openai.APIConnectionError as error:
            why = self.shown(error.__cause__ or error)
            raise Unavailable(f"{self.spec}: no server answers there ({why})") from None
        except (AttributeError, TypeError, ValueError, RecursionError):
            pass  # the response is no list of models: not every server has one
        return False

    def call(self, request: Request, sampling: Sampling, seed: int, wish: bool) -> list[Completion]:
        settings = {
            "model": self.model,
            "messages": self.messages(request),
            "n": len(request.samples),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed % SEEDS,
        }
        if self.host == "api.openai.com":
            settings["max_completion_tokens"] = settings.pop("max_tokens")
            if re.match(r"o\d|gpt-5", self.model):  # reasoning models set their own
                del settings["temperature"], settings["top_p"]
        if self.vllm:  # these override the checkpoint's generation_config
            more = {"top_k": 0, "repetition_penalty": 1.0}
            more |= {"return_token_ids": True, "skip_special_tokens": False}
            settings |= {"logprobs": True, "extra_body": more}
        if not wish:
            settings |= {"stream": True, "stream_options": {"include_usage": True}}
        self.heard.text = ""
        with self.reading():
            response = self.client.chat.completions.create(**settings)
            if not wish:
                response = self.collect(response)
            if not response.choices:  # some servers report errors this way
                raise self.garbled("a response without choices")
            if used := response.usage:
                self.count_tokens(used.prompt_tokens, used.completion_tokens)
            return self.completions(request, response.choices, seed)

    def collect(self, stream):
        """A stream as one whole response, with only the choices that ended. If there are none, the
        stream was cut off."""
        choices, usage = defaultdict(dict), None
        for chunk in stream:
            usage = chunk.usage or usage
            for piece in chunk.choices or ():
                choice = choices[piece.index]
                message = choice.setdefault("message", {})
                for key in ("content", "refusal", *REASONING):
                    if more := getattr(piece.delta, key, None):
                        message[key] = message.get(key, "") + more
                if more := getattr(piece, "token_ids", None):
                    choice["token_ids"] = choice.get("token_ids", []) + more
                if more := piece.logprobs and piece.logprobs.content:
                    logprobs = choice.setdefault("logprobs", {"content": []})
                    logprobs["content"] += [{"logprob": token.logprob} for token in more]
                choice["finish_reason"] = piece.finish_reason or choice.get("finish_reason")
        ended = [choice for _, choice in sorted(choices.items()) if choice["finish_reason"]]
        if choices and not ended:
            request = stream.response.request
            raise self.openai.APIConnectionError(message="a stream without an end", request=request)
        return self.openai.types.chat.ChatCompletion.construct(choices=ended, usage=usage)

    def messages(self, request: Request) -> list[dict]:
        messages = []
        for role, contents in turns(request, None if self.vllm else self.setup.pixels):
            parts = [self.part(content) for content in contents]
            # a single text is sent as a string: some servers take no parts
            plain = [part["type"] for part in parts] == ["text"]
            messages.append({"role": role, "content": parts[0]["text"] if plain else parts})
        return messages

    def part(self, content: str | bytes) -> dict:
        if isinstance(content, str):
            return {"type": "text", "text": content}
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    def completion(self, id: str, sample: int, choice, seed: int) -> Completion:
        message, finish = choice.message, choice.finish_reason
        text, extra = message.content or "", message.model_extra or {}
        reasoning = next(filter(None, map(extra.get, REASONING)), "")
        if not isinstance(text, str) or not isinstance(reasoning, str):
            raise TypeError("what it says is no text")
        if finish == "content_filter" or message.refusal:
            finish = "blocked"
        ids, logps = (choice.model_extra or {}).get("token_ids"), None
        if ids and finish == "stop":
            # special tokens are asked for, so that they are seen; this one is the end
            text = re.sub(r"<\|im_end\|>$", "", text)
        if ids and choice.logprobs and len(choice.logprobs.content or []) == len(ids):
            logps = [token.logprob for token in choice.logprobs.content]
        return Completion(id, sample, text, ids, finish, seed, reasoning, logps)

    def status(self, error: Exception) -> int | None:
        if isinstance(error, self.openai.APIStatusError):
            # a 429 that no wait ends
            return 402 if error.code == "insufficient_quota" else error.status_code
        return 0 if isinstance(error, self.openai.APIError) else None


class GeminiEngine(APIEngine):
    """Google's API. Its client takes another address than Google's from GOOGLE_GEMINI_BASE_URL."""

    API = "the Gemini API"
    WISH, REFUSED = "thoughts", r"think"  # "Thinking is not enabled for models/..."
    BLOCKED = ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR")
    ENDS = {"STOP": "stop", "MAX_TOKENS": "length"} | dict.fromkeys(BLOCKED, "blocked")
    MOST = 8  # samples of one request

    def __init__(self, spec: str, setup: Setup):
        from google import genai

        url = os.environ.get("GOOGLE_GEMINI_BASE_URL") or "https:"
        key = key_of(spec, "GEMINI_API_KEY", url)
        super().__init__(spec, setup, key)
        self.model, self.genai = spec.partition(":")[2], genai
        hooks = {"event_hooks": {"response": [self.hear]}}
        options = genai.types.HttpOptions(timeout=int(TIMEOUT * 1000), client_args=hooks)
        self.client = genai.Client(api_key=key or "none", http_options=options)

    def call(self, request: Request, sampling: Sampling, seed: int, wish: bool) -> list[Completion]:
        types, request = self.genai.types, replace(request, samples=request.samples[: self.MOST])
        system = "\n".join(turn["content"] for turn in request.messages if turn["role"] == "system")
        config = types.GenerateContentConfig(
            system_instruction=system or None,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed % SEEDS,
            max_output_tokens=sampling.max_tokens,
            candidate_count=len(request.samples),
            thinking_config=types.ThinkingConfig(include_thoughts=True) if wish else None,
        )
        contents = self.contents(request)
        self.heard.text = ""
        with self.reading():
            generate = self.client.models.generate_content
            response = generate(model=self.model, contents=contents, config=config)
            if used := response.usage_metadata:
                sampled = (used.candidates_token_count or 0) + (used.thoughts_token_count or 0)
                self.count_tokens(used.prompt_token_count, sampled)
            if response.prompt_feedback and response.prompt_feedback.block_reason:
                samples = request.samples
                return [Completion(request.id, k, "", None, "blocked", seed) for k in samples]
            if not response.candidates:
                raise self.garbled("a response without candidates")
            return self.completions(request, response.candidates, seed)

    def contents(self, request: Request) -> list:
        """All turns but the system's, in Google's types."""
        found = []
        for role, contents in turns(request, self.setup.pixels):
            if role != "system":
                parts = [self.part(content) for content in contents]
                role = "model" if role == "assistant" else role
                found.append(self.genai.types.Content(role=role, parts=parts))
        return found

    def part(self, content: str | bytes):
        if isinstance(content, str):
            return self.genai.types.Part.from_text(text=content)
        return self.genai.types.Part.from_bytes(data=content, mime_type="image/png")

    def completion(self, id: str, sample: int, choice, seed: int) -> Completion:
        parts = choice.content.parts or [] if choice.content else []
        text = "".join(part.text or "" for part in parts if not part.thought)
        reasoning = "".join(part.text or "" for part in parts if part.thought)
        end = choice.finish_reason.name if choice.finish_reason else "none"
        return Completion(id, sample, text, None, self.ENDS.get(end, end), seed, reasoning)

    def status(self, error: Exception) -> int | None:
        if not isinstance(error, self.genai.errors.APIError):
            return 0 if type(error).__module__.startswith("httpx") else None  # a broken connection
        # a country or account without the API, or a key that is not valid
        unusable = error.status == "FAILED_PRECONDITION" or "API_KEY_INVALID" in str(error)
        return 401 if error.code == 400 and unusable else error.code


def turns(request: Request, pixels: int | None) -> Iterator[tuple[str, list[str | bytes]]]:
    """(role, texts and images as PNG) of each message. Images come before the first user turn's
    text, as in training, or where its parts say."""
    waiting = list(request.images)
    for message in request.messages:
        contents = []
        for part in data.parts_of(message, len(waiting)):
            text = part["type"] == "text"
            contents.append(part["text"] if text else picture_bytes(waiting.pop(0), pixels))
        yield message["role"], contents


def picture_bytes(path: Path, pixels: int | None) -> bytes:
    """An image as a remote model gets it: upright RGB, no larger than `pixels`, as PNG."""
    from PIL import Image

    from command.images import load_image

    image = load_image(path)
    if pixels and image.width * image.height > pixels:
        scale = (pixels / (image.width * image.height)) ** 0.5
        size = [max(1, int(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def key_variable(host: str) -> str:
    """api.openai.com -> OPENAI_API_KEY; LOCAL_API_KEY for an address or a name without a dot."""
    labels = host.split(".")
    named = len(labels) > 1 and not labels[-1].isdigit()
    return (re.sub(r"\W", "_", labels[-2]).upper() if named else "LOCAL") + "_API_KEY"


def is_private(host: str) -> bool:
    """Whether a host is this machine or in a private network."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:  # a name; public names have a dot and no such end
        return host.rpartition(".")[2] in (host, "localhost", "local", "internal")


def key_of(spec: str, variable: str, url: str) -> str:
    """The key in an environment variable, "" for none. Raises Unavailable, without showing the key,
    if no header can hold it, if it would cross the internet unencrypted, or if it is missing."""
    key, address = os.environ.get(variable, "").strip(), urlsplit(url)
    if not re.fullmatch(r"[!-~]*", key):
        raise Unavailable(f"{variable}: is no key: it holds blanks, line breaks or odd letters")
    if not key and address.scheme == "https":
        raise Unavailable(f"{spec}: no key; set {variable}")
    if key and address.scheme != "https" and not is_private(address.hostname or ""):
        remedy = f"use https, or unset {variable} if the server wants no key"
        raise Unavailable(f"{url}: over http anybody on the way can read the key; {remedy}")
    return key
