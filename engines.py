"""Everything that turns a prompt into text, behind one small interface: y_1 ... y_n ~ M(. | q, I).

    engine = open_engine("hf:runs/demo/sft/merged")
    for replies in engine.answer(asks, Sampling(temperature=0.95, top_p=0.95, max_tokens=4096)): ...

    spec            what answers
    hf:PATH         a local checkpoint, sampled here: batched, with a KV cache, in plain PyTorch
    clinic:ROLE     the miniature's teachers, experts and judge
    vllm:PATH, http(s)://HOST/v1#MODEL, gemini:NAME     refused for now, with a message that says so

An Ask names its question and which of its samples are wanted; a Reply carries text, finish reason and, where the engine
knows them, the token ids. Every sample has a seed of its own, a hash of (seed, question, k): a question's eighth answer
is the same whether it was asked alone, in a batch, or after a restart.

The hf: engine samples the n answers of a question as one *tree row* (see model.py): the prompt and its images are
computed once, then every step feeds one token of each of the n branches, and a branch sees the prompt and itself. The
prompt's keys and values are held once instead of n times.

Where we depart from the paper, or it is silent:
  1. It samples with vLLM, and gives a temperature (0.5) only for majority vote and pass@n. Ours are flags.
  2. Special tokens other than the end of the turn are never sampled: a sampled image token would break training later.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

import data

if TYPE_CHECKING:
    import torch

    import model


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p 1 keeps the whole distribution; max_tokens bounds the response, stop token included."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise ValueError(f"{self}: temperature must be 0 or more, top_p above 0 and at most 1, max_tokens at least 1")


@dataclass(frozen=True)
class Ask:
    """One question to an engine: messages up to the response, images as files, and the numbers of the samples wanted."""

    id: str
    messages: list[dict]
    images: list[Path]
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Reply:
    """One answer. finish_reason is "stop", or "length" where the token limit cut it off; token_ids end with the stop token
    if there was one, and are None where the engine does not tell them."""

    id: str
    sample: int
    text: str
    token_ids: list[int] | None
    finish_reason: str
    seed: int


class Engine(Protocol):
    spec: str

    def answer(self, asks: list[Ask], sampling: Sampling) -> Iterator[list[Reply]]:
        """Lists of finished replies, in any order, until every sample of every ask is answered."""


def open_engine(spec: str, *, max_pixels: int, tiles: int, batch: int) -> Engine:
    """The engine that a spec names. max_pixels and tiles are the recipe's one picture of an image; batch is how many
    samples run at once. Raises ValueError for a spec that is unknown or not available."""
    kind, _, rest = spec.partition(":")
    if kind == "hf":
        return HFEngine(spec, rest, max_pixels, tiles, batch)
    if kind == "clinic":
        return ClinicEngine(spec, rest)
    if kind in ("vllm", "http", "https", "gemini"):
        raise ValueError(f"{spec}: the {kind}: engine is not available yet; use hf:PATH, which samples the same distribution")
    raise ValueError(f"{spec}: unknown engine; a spec is hf:PATH, clinic:ROLE, vllm:PATH, http://HOST/v1#MODEL or gemini:NAME")


def ask_all(engine: Engine, asks: list[Ask], sampling: Sampling, path: Path, to_row: Callable[[Reply], dict], title: str) -> list[dict]:
    """Asks whatever `path` does not hold yet, appending a row for each reply as it comes, with a progress bar.

    Rows carry `id` and `sample`; a killed run asks nothing twice. Returns the rows of these asks, in their order.
    """
    rows = {(row["id"], row["sample"]): row for row in data.resume_jsonl(path)}
    pending = []
    for ask in asks:
        missing = tuple(k for k in ask.samples if (ask.id, k) not in rows)
        if missing:
            pending.append(replace(ask, samples=missing))
    wanted = sum(len(ask.samples) for ask in asks)
    with open(path, "a", encoding="utf-8") as file, tqdm(total=wanted, initial=wanted - sum(len(ask.samples) for ask in pending), desc=title, unit="answer") as bar:
        for replies in engine.answer(pending, sampling):
            new = [to_row(reply) for reply in replies]
            data.append_jsonl(file, new)
            rows |= {(row["id"], row["sample"]): row for row in new}
            bar.update(len(new))
    return [rows[ask.id, k] for ask in asks for k in ask.samples]


def reply_row(reply: Reply, spec: str) -> dict:
    """A reply as a row of rollouts.jsonl."""
    return {
        "id": reply.id, "sample": reply.sample, "engine": spec, "response": reply.text, "token_ids": reply.token_ids,
        "finish_reason": reply.finish_reason, "seed": reply.seed, "response_sha": data.content_hash(reply.text)[:16],
    }  # fmt: skip


def question_asks(questions: list[data.Question], image_root: Path, samples: int) -> list[Ask]:
    """Each question as it is put to every engine: the paper's system prompt, the images, the question. Checks that every
    image is there before anything is asked. Raises RowError naming the first that is not."""
    for question in questions:
        for image in question.images:
            if not (image_root / image).is_file():
                raise data.RowError(f"question {question.id}: image {image} is not below {image_root}; check --images")
    return [Ask(q.id, data.prompt_messages(q), [image_root / image for image in q.images], tuple(range(samples))) for q in questions]


class ClinicEngine:
    """The miniature's roles. They reply with text, like any remote engine, and no token ids."""

    def __init__(self, spec: str, role: str):
        self.spec, self.role = spec, role

    def answer(self, asks: list[Ask], sampling: Sampling) -> Iterator[list[Reply]]:
        import clinic

        for ask in asks:
            seeds = [data.sample_seed(sampling.seed, ask.id, k) for k in ask.samples]
            yield [Reply(ask.id, k, clinic.answer(self.role, ask.messages, ask.images, seed), None, "stop", seed) for k, seed in zip(ask.samples, seeds)]


class HFEngine:
    """A local checkpoint in plain PyTorch and transformers' modules."""

    def __init__(self, spec: str, folder: str, max_pixels: int, tiles: int, batch: int):
        import torch

        import model

        self.spec, self.batch = spec, batch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = model.Processor(folder, max_pixels, tiles)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.policy = model.load_policy(folder, dtype).to(self.device)

    def answer(self, asks: list[Ask], sampling: Sampling) -> Iterator[list[Reply]]:
        """Questions are encoded as they are reached, and batched with others of about the same prompt length."""
        rows = max(1, self.batch // max(len(ask.samples) for ask in asks)) if asks else 1
        window = 16 * rows  # few enough to hold their images, enough to find prompts of a like length
        for at in range(0, len(asks), window):
            encoded = [(ask, self.encode(ask)) for ask in asks[at : at + window]]
            encoded.sort(key=lambda item: len(item[1].ids))
            for begin in range(0, len(encoded), rows):
                yield self.sample(encoded[begin : begin + rows], sampling)

    def encode(self, ask: Ask) -> "model.Segment":
        return self.processor.encode_prompt(ask.messages, [self.processor.encode_file(path) for path in ask.images])

    def sample(self, group: "list[tuple[Ask, model.Segment]]", sampling: Sampling) -> list[Reply]:
        """All samples of a few questions, together."""
        import torch

        most = max(len(ask.samples) for ask, _ in group)
        # a question that wants fewer samples than its neighbours repeats its last one; the copies are dropped
        wanted = [list(ask.samples) + [ask.samples[-1]] * (most - len(ask.samples)) for ask, _ in group]
        seeds = [[data.sample_seed(sampling.seed, ask.id, k) for k in samples] for (ask, _), samples in zip(group, wanted)]
        draws = torch.stack([torch.stack([uniforms(seed, sampling.max_tokens) for seed in row]) for row in seeds]).to(self.device)
        with torch.inference_mode():
            tokens = decode_trees(self.policy, self.processor, [segment for _, segment in group], draws, sampling)
        replies = []
        for (ask, _), row, row_seeds in zip(group, tokens, seeds):
            for k, ids, seed in zip(ask.samples, row, row_seeds):
                finish = "stop" if ids[-1] == self.processor.stop_id else "length"
                replies.append(Reply(ask.id, k, self.processor.decode(ids), ids, finish, seed))
        return replies


def uniforms(seed: int, count: int) -> "torch.Tensor":
    """The random numbers of one sample, one a token, in [0, 1): drawn from its seed alone, on the CPU."""
    import torch

    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choose(logits: "torch.Tensor", draw: "torch.Tensor", temperature: float, top_p: float) -> "torch.Tensor":
    """One token of each row by inverting the cumulative distribution. logits (..., V), draw (...) in [0, 1) -> (...).

    top_p keeps the likeliest tokens whose mass before them is below top_p; the draw is scaled to what is kept.
    """
    import torch

    if temperature == 0:
        return logits.argmax(-1)
    mass = torch.softmax(logits.float() / temperature, -1).double()
    tokens = None
    if top_p < 1:  # otherwise any order of the tokens will do, and sorting a vocabulary costs more than the rest
        mass, tokens = mass.sort(dim=-1, descending=True, stable=True)
    total = mass.cumsum(-1)  # (..., V)
    kept = ((total - mass) < top_p).sum(-1, keepdim=True) if top_p < 1 else torch.full_like(draw[..., None], logits.shape[-1], dtype=torch.long)
    ceiling = total.gather(-1, kept - 1)
    place = torch.searchsorted(total, draw[..., None] * ceiling, right=True).clamp_max(kept - 1)
    return (place if tokens is None else tokens.gather(-1, place))[..., 0]


class TreeCache:
    """Keys and values of every layer in one buffer each, filled from the left; transformers' attention calls `update`."""

    def __init__(self, room: int):
        self.room, self.used = room, 0
        self.layers: dict[int, list] = {}

    def update(self, key: "torch.Tensor", value: "torch.Tensor", layer: int, *_unused) -> "tuple[torch.Tensor, torch.Tensor]":
        """key, value (rows, heads, new, d) -> all so far (rows, heads, used + new, d)"""
        if layer not in self.layers:
            shape = (*key.shape[:2], self.room, key.shape[3])
            self.layers[layer] = [key.new_empty(shape), value.new_empty(shape)]
        stop = self.used + key.shape[2]
        for buffer, new in zip(self.layers[layer], (key, value)):
            buffer[:, :, self.used : stop] = new
        return tuple(buffer[:, :, :stop] for buffer in self.layers[layer])

    def get_seq_length(self, layer: int = 0) -> int:
        return self.used

    def keep(self, rows: "torch.Tensor") -> None:
        """Drops the other rows."""
        self.layers = {layer: [buffer[rows] for buffer in buffers] for layer, buffers in self.layers.items()}


def decode_trees(policy: "model.Policy", processor: "model.Processor", prompts: "list[model.Segment]", draws: "torch.Tensor", sampling: Sampling) -> list[list[list[int]]]:
    """n responses of each prompt. draws (R, n, max_tokens) -> token ids [R][n], ending with the stop token unless cut off.

    Rows are padded on the left. At step t a row feeds one token of each of its n branches; the cache then holds, after the
    prompt, the branches' tokens interleaved: step 0 of branches 0 ... n-1, step 1 of branches 0 ... n-1, and so on.
    """
    import torch

    import model

    device, (rows, n, steps) = draws.device, draws.shape
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(rows, longest, dtype=torch.long)
    positions = torch.zeros(3, rows, longest, dtype=torch.long)
    real = torch.zeros(rows, longest, dtype=torch.bool)
    after = torch.zeros(rows, dtype=torch.long)  # the position of the first token sampled
    for r, prompt in enumerate(prompts):
        places, end = model.segment_positions(prompt, 0, processor.image_id, processor.family.grid_positions)
        start = longest - len(prompt.ids)
        ids[r, start:], real[r, start:], after[r] = torch.tensor(prompt.ids), True, end
        positions[:, r, start:] = torch.tensor(places).T
    ids, positions, real, after = (tensor.to(device) for tensor in (ids, positions, real, after))
    images = [image for prompt in prompts for image in prompt.images]
    features = None
    if images:
        grids = torch.tensor([image.grid for image in images], device=device)
        features = policy.image_features(torch.cat([image.pixels for image in images]).to(device), grids)

    banned = torch.zeros(policy.model.lm_head.weight.shape[0], dtype=torch.bool, device=device)
    banned[[index for index in processor.special.values() if index != processor.stop_id]] = True
    banned[len(processor.tokenizer) :] = True  # rows of the head beyond the vocabulary (padding of the real checkpoints)
    cache = TreeCache(longest + n * steps)

    def advance(embedded: "torch.Tensor", places: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
        """New tokens (rows, new, D) through the language model; their logits' hidden states come back."""
        state = policy.language_model(
            inputs_embeds=embedded, position_ids=places if policy.family.grid_positions else places[0],
            attention_mask={"full_attention": mask}, past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        cache.used += embedded.shape[1]
        return state

    # a padded query has nothing to look at, which softmax turns into nan: let it look at itself
    mask = (real[:, None, :] & torch.ones(longest, longest, dtype=torch.bool, device=device).tril()) | torch.eye(longest, dtype=torch.bool, device=device)
    hidden = advance(policy.embed(ids, features), positions, mask[:, None])[:, -1:].expand(-1, n, -1)  # (R, n, D)

    tokens = torch.full((rows, n, steps), -1, dtype=torch.long, device=device)
    alive = torch.arange(rows, device=device)  # rows still being sampled, by their first numbering
    done = torch.zeros(rows, n, dtype=torch.bool, device=device)
    own = torch.eye(n, dtype=torch.bool, device=device)
    for step in range(steps):
        logits = policy.model.lm_head(hidden).masked_fill(banned, float("-inf"))  # (R, n, V)
        chosen = choose(logits, draws[alive, :, step], sampling.temperature, sampling.top_p)  # (R, n)
        tokens[alive, :, step] = torch.where(done, -1, chosen)
        done |= chosen == processor.stop_id
        going = (~done.all(1)).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) <= 0.75 * len(alive):  # copying the cache costs about a step: do it when it pays
            cache.keep(going)
            alive, done, chosen, real, after = alive[going], done[going], chosen[going], real[going], after[going]
        branch = own.repeat(1, step + 1).expand(len(alive), -1, -1)  # (R, n, n * (step + 1))
        mask = torch.cat([real[:, None, :].expand(-1, n, -1), branch], -1)[:, None]  # (R, 1, n, longest + n * (step + 1))
        places = (after + step)[None, :, None].expand(3, -1, n)
        hidden = advance(policy.language_model.embed_tokens(chosen), places, mask)
    return [[[token for token in branch if token >= 0] for branch in row] for row in tokens.tolist()]


