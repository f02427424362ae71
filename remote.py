"""Engines behind an API: OpenAI's chat completions, which most servers speak, and Gemini.

    http(s)://HOST/v1#MODEL    `vllm serve`, GPT-4o, o1, DeepSeek-R1, Qwen3, gpt-oss, ...
    gemini:NAME                Google's API

What can go wrong is sorted by kind. After a busy server (429, 5xx) or a broken connection we ask
again, with the wait that the server names or else a doubling one. A garbled or empty reply is asked
for again a few times only, because no wait turns a web page into an answer. An answer that thinking
left no room for is asked again with more room. A request that asks for more than the server gives
(a reply in one piece, several samples, thoughts) is asked again without, and so are all after it: a
whole reply is asked for first, because less can go wrong with it, and a stream where the server
wants that. A question that the server refuses, or has nothing to say to, is an answer of no text,
marked so. A wrong key or model stops the run, and so does a server that stays down, that asks for
a wait of more than minutes, or that refuses or garbles one question after the other. Whatever was
answered by then is on disk, and the same command goes on from there. Nothing that went wrong is
ever an answer.

Keys come from the environment: GEMINI_API_KEY, or the name of the host: api.openai.com ->
OPENAI_API_KEY. They are never printed, not even where a server repeats them, and never sent over
the internet in the clear.

Where we depart from the paper, or it is silent:
  1. Which servers, how often to try again, how many requests at once: ours.
  2. A remote model gets an image upright and no larger than --pixels. `vllm serve` gets it whole
     and must be started with the settings of training. It tells log-probabilities as they are
     before temperature and top-p, unless it is started with another --logprobs-mode.
  3. Gemini tells summaries of its thoughts only, which `distill.py --expand` writes out.
"""

import base64
import ipaddress
import os
import random
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import cache
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

import bill
import data
from asking import Ask, Reply, Sampling, Setup, Unavailable

TRIES = 8  # ours: of one request; with waits of 1, 2, 4 ... 60 s that sits out an outage of some three minutes
FEW = 3  # ours: tries of one request whose replies are garbled or empty
SHORT_WAIT = 1.0  # ours: most seconds between two of these
SHOWN = 300  # ours: most characters of a failure that are shown, some two lines
LONGEST_WAIT = 60.0  # ours: seconds between two tries, unless the server asks for more
PATIENCE = 600.0  # ours: seconds, the longest wait a server may ask for; limits by the day ask more
TIMEOUT = 1800.0  # ours: seconds for one answer; a reasoning model may think for many minutes
MORE_ROOM = 3  # ours: how often an answer that thinking left no room for is asked again with twice the room
STRIKES = 8  # ours: questions in a row that get no answer before it is taken for the server's fault, or the request's
NOTHING = ("refused", "empty")  # finish reasons of a reply that says nothing


class Again(Exception):
    """A reply that is worth asking for again: garbled, or empty."""


class NoRoom(Exception):
    """Thinking used up the token limit: no answer was left."""


class Unanswered(Exception):
    """A question got nothing but server errors, while others were answered."""


class RemoteEngine:
    """A model behind an API: requests in parallel, each tried again by the kind of its failure.

    A subclass says how to ask (`call`), how to read one choice of a reply (`reply`), and what
    status a failure has (`status`).
    """

    API = ""  # what the address must be, in words
    SEVERAL = "several samples at once"
    made = 0  # requests of this process, whichever engine's: --max-requests bounds a command
    WISH, REFUSED = "", ""  # what else a request asks for, and how the text of its refusal is known

    def __init__(self, spec: str, setup: Setup, key: str):
        self.spec, self.setup, self.key = spec, setup, key
        self.tally = Counter({"requests": 0, "again": 0, "tokens in": 0, "tokens out": 0})
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self.wishes = {self.SEVERAL, self.WISH}  # less those that the server does not fulfil
        self.answers = 0  # requests that were answered
        self.proven = False
        # questions in a row without an answer, and why the last one has none
        self.strikes, self.complaint = 0, ""
        self.failure: Exception | None = None  # what stopped the run
        self.later: list[Unanswered] = []
        self.heard = threading.local()  # .text: what the server sent last, in each thread

    def call(self, ask: Ask, sampling: Sampling, seed: int, wish: bool) -> list[Reply]:
        """One request, for WISH, too, where `wish`. Replies to some of the samples of `ask`: one at
        least, all of them where the server can."""
        raise NotImplementedError

    def reply(self, id: str, sample: int, choice, seed: int) -> Reply:
        """One choice of a reply. Raises Again or NoRoom if it is no answer."""
        raise NotImplementedError

    def status(self, error: Exception) -> int | None:
        """The HTTP status of a failure; 0 where no whole reply arrived; None for an error that is not the server's."""
        raise NotImplementedError

    def hear(self, response) -> None:
        """Keeps what the server sent. httpx calls it; the clients drop what they cannot read."""
        response.read()
        self.heard.text = response.text

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around a request and the reading of its reply. Raises Again where the reply has another
        form: the clients check none, so that it fails anywhere in here, in any of these ways."""
        self.heard.text = ""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise self.garbled(f"the reply cannot be read ({type(error).__name__})") from None

    def garbled(self, why: str) -> Again:
        sent = self.heard.text or "nothing"
        return Again(f"{why}; is this the address of {self.API}? The server sent: {sent}")

    def answer(self, asks: list[Ask], sampling: Sampling) -> Iterator[list[Reply]]:
        """After a failure that stops the run, requests under way still end and are handed on: they are paid for.

        That a question has no answer is believed, and handed on, only once another one has been answered after it, or
        at the end: a server that refuses everything must not leave a file full of refusals.
        """
        away = bill.host_of(self.spec)
        if away and not self.setup.images_may_leave and any(ask.images for ask in asks):
            raise Unavailable(f"{self.spec}: images may not leave; give --images-may-leave if they may")
        self.stopping.clear()
        self.failure, self.later, held = None, [], []
        with ThreadPoolExecutor(self.setup.concurrency) as pool:
            running = [pool.submit(self.all_samples, ask, sampling) for ask in asks]
            try:
                for future in as_completed(running):
                    replies = future.result()
                    self.tally.update(reply.finish_reason for reply in replies if reply.finish_reason != "stop")
                    held += [reply for reply in replies if reply.finish_reason in NOTHING]
                    if answered := [reply for reply in replies if reply.finish_reason not in NOTHING]:
                        yield answered + held
                        held = []
            finally:  # also where the run is interrupted from outside
                self.stopping.set()
        if self.failure:
            raise self.failure
        if held and not self.answers and not self.proven:
            raise Unavailable(f"{self.spec}: not one question was answered; {self.complaint}")
        if held:
            yield held
        if self.later:
            raise Unavailable(f"{self.later[0]}; so it is with {len(self.later)} questions, all others are answered; the same command asks them again")

    def all_samples(self, ask: Ask, sampling: Sampling) -> list[Reply]:
        """Replies to all samples of a question, or those that came before the run was stopped."""
        replies: list[Reply] = []
        left = list(ask.samples)
        try:
            while left:  # a server may give fewer answers a request than were asked for
                replies += self.patiently(replace(ask, samples=tuple(left)), sampling)
                left = [k for k in left if k not in {reply.sample for reply in replies}]
        except Unanswered as error:
            self.later.append(error)
        except Exception as error:
            with self.lock:
                self.failure = self.failure or error
            self.stopping.set()
        return replies

    def patiently(self, ask: Ask, sampling: Sampling) -> list[Reply]:
        """One request, again and again by the kind of its failure."""
        seed, room = data.sample_seed(sampling.seed, ask.id, ask.samples[0]), 1
        last, pause, answers, few, wishes = None, 0.0, self.answers, 0, set(self.wishes)
        for attempt in range(TRIES):
            if attempt:
                with self.lock:
                    self.tally["again"] += 1
                self.stopping.wait(pause)
            self.count_request()
            pause = min(LONGEST_WAIT, 2.0**attempt) * random.uniform(0.5, 1)
            part = replace(ask, samples=ask.samples[: None if self.SEVERAL in wishes else 1])
            roomy = replace(sampling, max_tokens=sampling.max_tokens * room)
            try:
                replies = self.call(part, roomy, seed, self.WISH in wishes)
                self.learn(wishes)
                return replies
            except NoRoom as error:
                if room == 2**MORE_ROOM:
                    return [Reply(ask.id, ask.samples[0], "", None, "length", seed)]
                room, pause, last = room * 2, 0.0, error
            except Again as error:
                few, pause, last = few + 1, min(pause, SHORT_WAIT), error
                if few == FEW:
                    break
            except Exception as error:
                status, last = self.status(error), error
                if status is None:  # as of an image that cannot be read
                    raise
                if status in (401, 402, 403, 404):
                    check = "check the key and what is paid for, the address, and the model's name"
                    raise Unavailable(f"{self.spec}: {self.said(error)}; {check}") from None
                if 400 <= status < 500 and status not in (408, 409, 425, 429):
                    if room > 1:  # so much more than the model can give
                        return [Reply(ask.id, ask.samples[0], "", None, "length", seed)]
                    if (fewer := self.less(wishes, part, error)) == wishes:
                        return self.nothing(ask, sampling, "refused", error)
                    wishes, pause = fewer, 0.0
                pause = self.wait(error) or pause
        if isinstance(last, (Again, NoRoom)):
            return self.nothing(ask, sampling, "empty", last)
        text = f"question {ask.id} has no answer after {TRIES} tries; the last: {self.said(last)}"
        raise (Unavailable if self.answers == answers else Unanswered)(f"{self.spec}: {text}")

    def less(self, wishes: set[str], ask: Ask, error: Exception) -> set[str]:
        """What is left to ask for after a refusal: perhaps the server takes the question, but not
        all that came with it."""
        if self.WISH in wishes and re.search(self.REFUSED, str(error), re.IGNORECASE):
            return wishes - {self.WISH}
        return wishes - {self.SEVERAL} if len(ask.samples) > 1 else wishes

    def learn(self, wishes: set[str]) -> None:
        """After an answer: what was asked without to get it, no later request asks for."""
        with self.lock:
            self.answers, self.strikes = self.answers + 1, 0
            given_up, self.wishes = self.wishes - wishes, self.wishes & wishes
        for wish in given_up:
            tqdm.write(f"{self.spec}: refuses requests for {wish}; asked without from now on")

    def nothing(self, ask: Ask, sampling: Sampling, reason: str, error: Exception) -> list[Reply]:
        """Replies of no text, unless so many questions in a row went like this that it must be the
        server or the request."""
        with self.lock:
            self.complaint = f"question {ask.id} is {reason}: {self.said(error)}"
            self.strikes += 1
            if self.strikes >= STRIKES:
                row = f"{self.strikes} questions in a row have no answer"
                raise Unavailable(f"{self.spec}: {row}; {self.complaint}")
        tqdm.write(f"{self.spec}: {self.complaint}")
        seeds = {k: data.sample_seed(sampling.seed, ask.id, k) for k in ask.samples}
        return [Reply(ask.id, k, "", None, reason, seed) for k, seed in seeds.items()]

    def replies(self, ask: Ask, choices: list, seed: int) -> list[Reply]:
        """What can be kept of a reply's choices. Raises the failure of the first if none can be."""
        kept, failures = [], []
        for k, choice in zip(ask.samples, choices):
            try:
                reply = self.reply(ask.id, k, choice, seed)
                if not isinstance(reply.text, str) or not isinstance(reply.reasoning, str):
                    raise TypeError("what it says is no text")
                kept.append(reply)
            except (Again, NoRoom) as failure:
                failures.append(failure)
            except (AttributeError, TypeError) as failure:  # the clients check no form
                failures.append(self.garbled(f"a choice cannot be read ({failure})"))
        if not kept:
            raise failures[0]
        return kept

    def wait(self, error: Exception) -> float | None:
        """Seconds that the server asks us to wait, None if it does not say: Retry-After, in seconds
        or as a date, or Google's RetryInfo ("17s"). Raises Unavailable for more than PATIENCE."""
        headers = getattr(getattr(error, "response", None), "headers", {})
        info = re.search(r"'retryDelay': '([\d.]+)s'", str(error))
        told = headers.get("retry-after") or (info[1] if info else "")
        try:
            if re.fullmatch(r"\d+(\.\d+)?", told):
                seconds = float(told)
            else:
                seconds = (parsedate_to_datetime(told) - datetime.now(timezone.utc)).total_seconds()
        except (TypeError, ValueError, OverflowError):  # no date, or one without a zone
            return None
        if seconds > PATIENCE:
            wait = f"the server asks for a wait of {seconds:.0f} s ({self.said(error)})"
            raise Unavailable(f"{self.spec}: {wait}; after it, the same command goes on")
        return max(seconds, 0.0)

    def said(self, error: Exception | None) -> str:
        """A failure in a few words and without the key: some servers repeat all that they were sent."""
        text = str(error).replace(self.key, "...") if self.key else str(error)
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= SHOWN else text[:SHOWN] + " ..."

    def count_request(self) -> None:
        with self.lock:
            if self.stopping.is_set():
                raise Unavailable(f"{self.spec}: stopped")
            if 0 < self.setup.max_requests <= RemoteEngine.made:
                made = f"{RemoteEngine.made} requests were made (--max-requests)"
                raise Unavailable(f"{self.spec}: {made}; the same command goes on")
            self.tally["requests"] += 1
            RemoteEngine.made += 1

    def count_tokens(self, prompt: int | None, answer: int | None) -> None:
        with self.lock:
            self.tally["tokens in"] += prompt or 0
            self.tally["tokens out"] += answer or 0


def picture_bytes(path: Path, pixels: int | None) -> bytes:
    """An image as a remote model gets it: upright RGB, no larger than `pixels`, as PNG."""
    from PIL import Image

    from images import load_image

    image = load_image(path)
    if pixels and image.width * image.height > pixels:
        scale = (pixels / (image.width * image.height)) ** 0.5
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def key_of(variable: str, url: str) -> str:
    """The key that an environment variable holds, "" for none. Raises Unavailable, without showing
    it, if no header can carry it, or if it must not go to `url`."""
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        why = "it holds blanks, line breaks or letters that no key has"
        raise Unavailable(f"{variable}: is no key: {why}")
    if key:
        guard_key(variable, url)
    return key


@cache  # one warning for each address
def guard_key(variable: str, url: str) -> None:
    """Raises Unavailable where a key would go over the internet in the clear. Warns where it goes
    over a private network so; on this machine it may."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https" or bill.is_here(host):
        return
    try:
        private = not ipaddress.ip_address(host).is_global
    except ValueError:  # a name; no public one has such an end, or no dot
        end = host.rpartition(".")[2]
        private = end in (host, "local", "internal")
    if not private:
        remedy = f"use https, or unset {variable} if the server wants no key"
        raise Unavailable(f"{url}: over http anybody on the way can read the key; {remedy}")
    tqdm.write(f"{url}: anybody in this network can read the key of {variable}; https hides it")


def key_variable(host: str) -> str:
    """api.openai.com -> OPENAI_API_KEY; LOCAL_API_KEY for an address or a name without a dot."""
    try:
        ipaddress.ip_address(host)
        name = "LOCAL"
    except ValueError:
        name = host.split(".")[-2] if "." in host else "LOCAL"
    return re.sub(r"\W", "_", name).upper() + "_API_KEY"


class ChatEngine(RemoteEngine):
    """Any server that speaks OpenAI's chat completions."""

    API = "a chat completions API"
    WISH = "whole replies"  # what is asked without is a stream
    REFUSED = r"\bstream|流式"  # Alibaba's and ModelScope's refusals, in either language

    def __init__(self, spec: str, setup: Setup):
        try:
            import openai
        except ImportError:
            raise Unavailable(f"{spec}: needs the openai package; pip install openai") from None
        url, _, self.model = spec.partition("#")
        if not self.model:
            raise Unavailable(f"{spec}: which model? Write {url}#MODEL")
        try:
            self.host = urlsplit(url).hostname or ""
        except ValueError as error:
            raise Unavailable(f"{spec}: is no address ({error})") from None
        variable = key_variable(self.host)
        key = key_of(variable, url)
        if not key and url.startswith("https:"):
            raise Unavailable(f"{spec}: no key; set {variable}")
        super().__init__(spec, setup, key)
        self.openai = openai
        http = openai.DefaultHttpxClient(event_hooks={"response": [self.hear]})
        self.client = openai.OpenAI(
            base_url=url, api_key=key or "none", timeout=TIMEOUT, max_retries=0, http_client=http
        )
        self.vllm = self.is_vllm()

    def is_vllm(self) -> bool:
        """Whether the server is vLLM, which tells token ids and takes settings that others refuse."""
        try:
            served = self.client.with_options(max_retries=2).models.list()
            return any(getattr(model, "owned_by", "") == "vllm" for model in served.data)
        except self.openai.APIStatusError as error:
            if error.status_code in (401, 429) or error.status_code >= 500:
                raise Unavailable(f"{self.spec}: {self.said(error)}; check the key, or wait until the server is ready") from None
            return False  # not every server lists its models
        except self.openai.APIConnectionError as error:
            raise Unavailable(f"{self.spec}: no server answers there ({self.said(error.__cause__ or error)})") from None
        except (AttributeError, TypeError, ValueError, RecursionError):  # what came is no list
            return False

    def call(self, ask: Ask, sampling: Sampling, seed: int, wish: bool) -> list[Reply]:
        settings: dict = {"n": len(ask.samples), "max_tokens": sampling.max_tokens}
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        settings["seed"] = seed % 2**31
        if self.host == "api.openai.com":
            settings["max_completion_tokens"] = settings.pop("max_tokens")
            if re.match(r"o\d|gpt-5", self.model):  # reasoning models sample as they see fit
                del settings["temperature"], settings["top_p"]
        if self.vllm:  # and nothing that a checkpoint's generation_config would bring along
            settings["extra_body"] = {"top_k": 0, "repetition_penalty": 1.0}
            settings["extra_body"] |= {"return_token_ids": True, "skip_special_tokens": False}
            settings["logprobs"] = True
        if not wish:
            settings |= {"stream": True, "stream_options": {"include_usage": True}}
        messages = self.messages(ask)
        with self.reading():
            create = self.client.chat.completions.create
            completion = create(model=self.model, messages=messages, **settings)
            if not wish:
                completion = self.collect(completion)
            if not completion.choices:  # some servers put their errors here
                raise self.garbled("a reply without choices")
            if used := completion.usage:
                self.count_tokens(used.prompt_tokens, used.completion_tokens)
            return self.replies(ask, completion.choices, seed)

    def collect(self, stream):
        """A stream as the whole reply that it spells out, of those choices that came to an end. It
        was cut off where none did."""
        choices, usage = defaultdict(dict), None
        for chunk in stream:
            usage = chunk.usage or usage
            for piece in chunk.choices or ():
                choice = choices[piece.index]
                message = choice.setdefault("message", {})
                for key in ("content", "refusal", "reasoning_content", "reasoning"):
                    if more := getattr(piece.delta, key, None):
                        message[key] = message.get(key, "") + more
                if more := getattr(piece, "token_ids", None):
                    choice["token_ids"] = choice.get("token_ids", []) + more
                if more := piece.logprobs and piece.logprobs.content:
                    told = choice.setdefault("logprobs", {"content": []})
                    told["content"] += [{"logprob": token.logprob} for token in more]
                choice["finish_reason"] = piece.finish_reason or choice.get("finish_reason")
        ended = [choice for _, choice in sorted(choices.items()) if choice["finish_reason"]]
        if choices and not ended:
            request = stream.response.request
            raise self.openai.APIConnectionError(message="a stream without an end", request=request)
        return self.openai.types.chat.ChatCompletion.construct(choices=ended, usage=usage)

    def messages(self, ask: Ask) -> list[dict]:
        """Images stand in front of the first user turn's text, as in training, or where its parts have them."""

        def sent(part: dict) -> dict:
            if part["type"] == "text":
                return part
            picture = base64.b64encode(picture_bytes(waiting.pop(0), None if self.vllm else self.setup.pixels)).decode()
            return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + picture}}

        messages, waiting = [], list(ask.images)
        for message in ask.messages:
            parts = [sent(part) for part in data.parts_of(message, len(waiting))]
            plain = len(parts) == 1 and parts[0]["type"] == "text"  # a text alone is sent as one: some servers take no parts
            messages.append({"role": message["role"], "content": parts[0]["text"] if plain else parts})
        return messages

    def reply(self, id: str, sample: int, choice, seed: int) -> Reply:
        message, finish = choice.message, choice.finish_reason
        text, extra = message.content or "", message.model_extra or {}
        reasoning = extra.get("reasoning_content") or extra.get("reasoning") or ""
        if finish == "content_filter" or message.refusal:
            return Reply(id, sample, text, None, "blocked", seed, reasoning)
        if finish not in ("stop", "length"):
            raise Again(f"it ended with {finish}")
        ids = (choice.model_extra or {}).get("token_ids")
        if not text and finish == "length":
            raise NoRoom("thinking used up the token limit")
        if not text and not ids:
            raise Again("an empty answer")
        if ids and finish == "stop":
            text = re.sub(r"<\|im_end\|>$", "", text)  # special tokens are asked for, to be seen; this one is the end
        logps = None
        if ids and choice.logprobs and len(told := choice.logprobs.content or []) == len(ids):
            logps = [token.logprob for token in told]
        return Reply(id, sample, text, ids, finish, seed, reasoning, logps)

    def status(self, error: Exception) -> int | None:
        if isinstance(error, self.openai.APIStatusError):
            return 402 if error.code == "insufficient_quota" else error.status_code  # a 429 that no waiting helps
        return 0 if isinstance(error, self.openai.APIError) else None


class GeminiEngine(RemoteEngine):
    """Google's API. Its client reads another address than Google's from GOOGLE_GEMINI_BASE_URL."""

    API = "the Gemini API"
    WISH, REFUSED = "thoughts", r"think"  # "Thinking is not enabled for models/..."
    BLOCKED = ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR")

    def __init__(self, spec: str, name: str, setup: Setup):
        try:
            from google import genai
        except ImportError:
            need = "needs the google-genai package; pip install google-genai"
            raise Unavailable(f"{spec}: {need}") from None
        key = key_of("GEMINI_API_KEY", os.environ.get("GOOGLE_GEMINI_BASE_URL") or "https:")
        if not key:
            raise Unavailable(f"{spec}: no key; set GEMINI_API_KEY")
        super().__init__(spec, setup, key)
        self.name, self.genai = name, genai
        options = genai.types.HttpOptions(
            timeout=int(TIMEOUT * 1000), client_args={"event_hooks": {"response": [self.hear]}}
        )
        self.client = genai.Client(api_key=key, http_options=options)

    def call(self, ask: Ask, sampling: Sampling, seed: int, wish: bool) -> list[Reply]:
        types, ask = self.genai.types, replace(ask, samples=ask.samples[:8])  # the API's own limit
        system = "\n".join(turn["content"] for turn in ask.messages if turn["role"] == "system")
        contents, waiting = [], list(ask.images)
        for message in ask.messages:
            if message["role"] == "system":
                continue
            parts = [
                types.Part.from_text(text=part["text"]) if part["type"] == "text"
                else types.Part.from_bytes(
                    data=picture_bytes(waiting.pop(0), self.setup.pixels), mime_type="image/png"
                )
                for part in data.parts_of(message, len(waiting))
            ]  # fmt: skip
            role = "model" if message["role"] == "assistant" else "user"
            contents.append(types.Content(role=role, parts=parts))
        config = types.GenerateContentConfig(
            system_instruction=system or None, temperature=sampling.temperature,
            top_p=sampling.top_p, seed=seed % 2**31, max_output_tokens=sampling.max_tokens,
            candidate_count=len(ask.samples),
            thinking_config=types.ThinkingConfig(include_thoughts=True) if wish else None,
        )  # fmt: skip
        with self.reading():
            generate = self.client.models.generate_content
            response = generate(model=self.name, contents=contents, config=config)
            if used := response.usage_metadata:
                answer = (used.candidates_token_count or 0) + (used.thoughts_token_count or 0)
                self.count_tokens(used.prompt_token_count, answer)
            if response.prompt_feedback and response.prompt_feedback.block_reason:
                return [Reply(ask.id, k, "", None, "blocked", seed) for k in ask.samples]
            if not response.candidates:
                raise self.garbled("a reply without candidates")
            return self.replies(ask, response.candidates, seed)

    def reply(self, id: str, sample: int, choice, seed: int) -> Reply:
        parts = choice.content.parts or [] if choice.content else []
        text = "".join(part.text or "" for part in parts if not part.thought)
        reasoning = "".join(part.text or "" for part in parts if part.thought)
        finish = choice.finish_reason.name if choice.finish_reason else "none"
        if finish in self.BLOCKED:
            return Reply(id, sample, text, None, "blocked", seed, reasoning)
        if finish not in ("STOP", "MAX_TOKENS"):
            raise Again(f"it ended with {finish}")
        if not text:
            raise NoRoom("thinking used up the token limit") if finish == "MAX_TOKENS" else Again("an empty answer")
        return Reply(id, sample, text, None, "stop" if finish == "STOP" else "length", seed, reasoning)

    def status(self, error: Exception) -> int | None:
        if isinstance(error, self.genai.errors.APIError):
            unusable = error.code == 400 and (error.status == "FAILED_PRECONDITION" or "API_KEY_INVALID" in str(error))
            return 401 if unusable else error.code  # a country or an account without the API, a key that is not or no longer one
        return 0 if type(error).__module__.startswith("httpx") else None  # a broken connection
