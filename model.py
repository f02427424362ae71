"""The policy: Qwen2.5-VL and InternVL3 as one table of facts, and a function from a batch to
per-token log-probabilities.

    log pi(y | x) = sum over t of log p(y_t | x, y_<t)         all that SFT (paper 3.2) and DPO (paper 3.3) need

    Family        what differs between the two base models: image tokens, positions, module names
    Processor     messages + images -> Segment of token ids; response -> token ids and span labels, born together
    Segment, Row  a row is a small *tree* of segments: prompt -> response (SFT), prompt -> chosen and prompt -> rejected
                  (DPO: the prompt and its images are computed once), several roots or children (packing)
    collate       rows -> Batch; token i sees token j iff j <= i and j's segment is i's own or an ancestor of it (tree_attention)
    Policy        Batch -> (B, T) log-probabilities; the 152k-wide logits exist only chunk by chunk

reads and writes: Hugging Face folders (config, tokenizer, image processor, safetensors), which transformers and vLLM load.

    python model.py show demos.jsonl --model MODEL -n 3      prompt grey, think green, answer cyan, tags yellow, with counts

Letters in shape comments: B rows, T tokens of the longest row, D width, V vocabulary, N supervised tokens, S segments.

Where we depart from the paper, or it is silent:
  1. Pixels: 768 x 768 at most for Qwen, one 448 tile for InternVL (LLaMA-Factory's settings; the paper names none),
     the same for rollouts, training and evaluation.
  2. Chat templates are written out here (no Jinja, no hidden default turn) and tested against the tokenizer's own.
  3. Nothing is ever truncated. A row that is too long is refused by the stage that made it, and counted.
"""

import argparse
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import data
import flags
import lora
from images import load_image

MAX_PIXELS = 768 * 768  # ours: paper silent (LLaMA-Factory's image_max_pixels)
TILES = 1  # ours: paper silent (LLaMA-Factory trains InternVL on one tile an image)
LOGIT_CHUNK = 256  # supervised positions whose logits exist at one time; ours: 156 MB in fp32 for 152k tokens
# ours: weights are compared so many rows at a time, 30 MB in fp32 for the widest of a 72B
COMPARED_ROWS = 256
SHARD_BYTES = 5_000_000_000  # ours: a weight file is at most so large, as on the hub, and so is what saving holds


@dataclass(frozen=True)
class Family:
    """What a base model's architecture fixes. Module names are relative to the Hugging Face model."""

    image_token: str  # repeated once for each feature of an image
    before_image: str
    after_image: str
    # the vision tower and, below, the map into the language model's width: frozen in both stages
    vision: str
    projector: str
    grid_positions: bool  # an image takes (time, row, column) positions, or positions in reading order
    texts: tuple[str, ...]  # the model_types its language model may have


FAMILIES = {
    "qwen2_5_vl": Family(
        "<|image_pad|>", "<|vision_start|>", "<|vision_end|>",
        "model.visual", "model.visual.merger", True, ("qwen2_5_vl_text",),
    ),
    # the -hf form's template puts a newline after each image; the 9B's language model is a Llama
    "internvl": Family(
        "<IMG_CONTEXT>", "<img>", "</img>\n",
        "model.vision_tower", "model.multi_modal_projector", False, ("qwen2", "llama"),
    ),
}  # fmt: skip
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # both families: Qwen2.5's chat format


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """What goes wrong while a file of a model's folder is read becomes a RowError that names it."""
    try:
        yield
    except Exception as error:  # json, tokenizers, safetensors and transformers have their own ones
        said = f"{what}: cannot be read ({error}); copy or download it again"
        raise data.RowError(said) from None


def load_config(folder: str | Path):
    """The config of a Hugging Face folder. Raises RowError for no model, or none of a known family.

    Whether the output head is the embedding is taken from config.json as it stands, and set in both
    places where a reader may look. transformers has a default instead: it would tie the head of
    InternVL, whose published folders hold one of its own.
    """
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    if path.with_name("adapter_config.json").exists():
        raise data.RowError(f"{folder} is a LoRA adapter; give the merged checkpoint beside it")
    if not path.exists():
        raise data.RowError(
            f"{folder} is not a model's folder: it has no config.json; "
            "nothing is downloaded here, see README"
        )
    with reading(path):
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    if str(stored.get("model_type")) not in FAMILIES:
        raise data.RowError(
            f"{path}: model_type {stored.get('model_type')!r} is not supported; "
            f"give a model of {sorted(FAMILIES)} (InternVL in its -hf form)"
        )
    with reading(path):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = stored.get("text_config") or {}
        # untied where neither says it: if that is wrong, Checkpoint names the head as missing
        tied = stored.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    check_text(config, path)
    return config


def check_text(config, path: Path) -> None:
    """Raises RowError for a language model that would be computed wrong, or not at all."""
    kind, known = config.text_config.model_type, FAMILIES[config.model_type].texts
    if kind not in known:
        raise data.RowError(
            f"{path}: text_config: model_type {kind!r} is not supported; "
            f"give a model whose language model is one of {sorted(known)}"
        )
    kinds = set(getattr(config.text_config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:  # every layer gets the same mask here
        raise data.RowError(
            f"{path}: text_config: layers with {sorted(kinds)[0]} are not supported; "
            "give a model whose layers all see the whole text (use_sliding_window false)"
        )


# ---------------------------------------------------------------------------------------------------------------
# Encoding: text and images to segments


@dataclass
class ImageInput:
    """One preprocessed image. pixels: (patches, 1176) for Qwen, (tiles, 3, 448, 448) for InternVL; grid: its
    (time, rows, columns) of *merged* patches, as the language model sees them; tokens: how many features it becomes."""

    pixels: Tensor
    grid: tuple[int, int, int]
    tokens: int


@dataclass
class Segment:
    """A run of tokens with one label each (0 = not supervised). parent: index of an earlier segment of the row that it
    continues, or None for a root. answer: which answer of the row it belongs to, for sums over whole responses."""

    ids: list[int]
    labels: list[int]
    parent: int | None = None
    answer: int = 0
    images: list[ImageInput] = field(default_factory=list)


Row = list[Segment]


class Processor:
    """Tokenizer and image processor of one checkpoint, and the chat format. Everything that becomes token ids does so here."""

    def __init__(self, folder: str | Path, max_pixels: int = MAX_PIXELS, tiles: int = TILES):
        from transformers import AutoTokenizer

        self.folder = str(folder)
        self.config = load_config(folder)
        self.family = FAMILIES[self.config.model_type]
        with reading(f"{folder}: its tokenizer (tokenizer.json and others)"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            vocabulary = self.tokenizer.get_vocab()
        self.settings = {"max_pixels": max_pixels} if self.family.grid_positions else {"tiles": tiles}
        settings = Path(folder) / "preprocessor_config.json"
        if self.family.grid_positions:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            with reading(settings):
                self.images = Qwen2VLImageProcessorPil.from_pretrained(folder)
            self.images.size = {"shortest_edge": min(self.images.size["shortest_edge"], max_pixels), "longest_edge": max_pixels}
        else:
            from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

            with reading(settings):
                self.images = GotOcr2ImageProcessorPil.from_pretrained(folder)
            self.images.crop_to_patches, self.images.min_patches, self.images.max_patches = tiles > 1, 1, tiles
        self.special = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        for token in (TURN_START, TURN_END, self.family.image_token):
            if token not in vocabulary:
                raise data.RowError(
                    f"{folder}: its tokenizer has no {token!r}, as {self.config.model_type} has; "
                    "copy the tokenizer of this model's own folder"
                )
            self.special[token] = vocabulary[token]
        self.stop_id = self.special[TURN_END]
        self.image_id = self.special[self.family.image_token]

    def encode_image(self, image: Image.Image) -> ImageInput:
        """Resizes and cuts into patches with Hugging Face's own PIL processor; counts features by the family's arithmetic."""
        prepared = self.images(images=[image], return_tensors="pt")
        if self.family.grid_positions:
            merge = self.config.vision_config.spatial_merge_size
            time, height, width = prepared["image_grid_thw"][0].tolist()
            grid = (time, height // merge, width // merge)
            return ImageInput(prepared["pixel_values"], grid, grid[0] * grid[1] * grid[2])
        pixels = prepared["pixel_values"]  # (tiles, 3, side, side)
        vision = self.config.vision_config
        side = int(pixels.shape[-1] // vision.patch_size[0] * self.config.downsample_ratio)
        return ImageInput(pixels, (1, len(pixels) * side, side), len(pixels) * side * side)

    def encode_file(self, path: str | Path) -> ImageInput:
        """`load_image` and `encode_image`. Raises RowError naming the file."""
        image = load_image(path)
        try:
            return self.encode_image(image)
        except ValueError as error:  # Qwen refuses pictures over 200 times as long as wide
            raise data.RowError(f"{path}: cannot be cut into patches ({error}); crop or remove it") from None

    def refuse_special(self, text: str, where: str) -> None:
        """Raises RowError if a text holds one of the tokenizer's special tokens: it would be read as structure."""
        planted = [token for token in self.special if token in text]
        if planted:
            raise data.RowError(f"the {where} contains the special token {planted[0]!r}; remove it")

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def render(self, messages: list[dict], image_tokens: list[int]) -> str:
        """The prompt as one string, ready for the response. Images stand in front of the first user turn's text, or where its
        parts have them."""
        family, text, waiting = self.family, "", list(image_tokens)
        for message in messages:
            text += f"{TURN_START}{message['role']}\n"
            for part in data.parts_of(message, len(waiting)):
                if part["type"] == "image":
                    text += family.before_image + family.image_token * waiting.pop(0) + family.after_image
                else:
                    self.refuse_special(part["text"], f"{message['role']} text")
                    text += part["text"]
            text += f"{TURN_END}\n"
        if waiting:
            raise data.RowError("the messages have images but no user turn to hold them")
        return text + f"{TURN_START}assistant\n"

    def encode_prompt(self, messages: list[dict], images: list[ImageInput]) -> Segment:
        """The unsupervised root of a row. Tokenised on its own, so that no merge can reach into the response."""
        ids = self.tokenize(self.render(messages, [image.tokens for image in images]))
        if ids.count(self.image_id) != sum(image.tokens for image in images):
            raise data.RowError(f"{ids.count(self.image_id)} image tokens for {sum(image.tokens for image in images)} features")
        return Segment(ids, [data.PROMPT] * len(ids), images=images)

    def encode_response(self, response: str, parent: int = 0, answer: int = 0) -> Segment:
        """A supervised segment: the response's tokens, each labelled by span, and the end of the turn.

        The response is tokenised once and whole: the ids are those the model itself would produce.
        """
        self.refuse_special(response, "response")
        encoded = self.tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
        labels = data.label_spans(response, encoded["offset_mapping"])
        return Segment(encoded["input_ids"] + [self.stop_id], labels + [data.TAG], parent, answer)

    def encode_tokens(self, ids: list[int], parent: int = 0, answer: int = 0) -> Segment:
        """A supervised segment from a rollout's own token ids: what was sampled is what is trained."""
        return Segment(list(ids), [data.TAG] * len(ids), parent, answer)

    def decode(self, ids: list[int]) -> str:
        """The text of a response, without the end-of-turn token."""
        kept = ids[:-1] if ids and ids[-1] == self.stop_id else ids
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.images.save_pretrained(folder)
        for name in ("processor_config.json", "video_preprocessor_config.json", "chat_template.json"):  # others may want them
            if (Path(self.folder) / name).exists():
                shutil.copyfile(Path(self.folder) / name, Path(folder) / name)


# ---------------------------------------------------------------------------------------------------------------
# Batches of tree rows


Run = tuple[int, int, tuple[tuple[int, int], ...]]  # start, stop, and the stretches of the row before it that it sees


@dataclass
class Batch:
    """Rows padded on the right to one length. `tree` is each row as runs of tokens that follow one another, or None where
    every row is one run: causal attention is then enough, since padding comes last and nothing real looks at it."""

    ids: Tensor  # (B, T) long
    labels: Tensor  # (B, T) long, 0 = not supervised
    predecessor: Tensor  # (B, T) long, the position whose hidden state predicts this token
    answer: Tensor  # (B, T) long, the answer of its row that a supervised token belongs to
    positions: Tensor  # (3, B, T) long, time / row / column; all three equal for text
    token_types: Tensor  # (B, T) long, 1 = image token (transformers' mm_token_type_ids)
    tree: list[list[Run]] | None
    pixels: Tensor | None  # the images of all rows, in order
    grids: Tensor | None  # (images, 3) long, merged patches
    weights: Tensor  # (B,) float, 1, or 0 for a row that only keeps this rank in step
    reference: Tensor | None = None  # (B, K) float, log pi_ref of each answer, 0 where a row has fewer
    edges: Tensor | None = None  # (3, E) long, the pairs (DPO): row, chosen answer, rejected answer

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for name, value in moved.items()})


def segment_positions(segment: Segment, start: int, image_id: int, grid_positions: bool) -> tuple[list[tuple[int, int, int]], int]:
    """(time, row, column) of each token, and the position that the next segment starts at.

    Text advances by one. With grid positions (M-RoPE) an image's tokens share one time and spread over rows and
    columns, and the text after it goes on from the larger side; without, image tokens are counted like text.
    """
    positions, grids, index, now = [], iter(segment.images), 0, start
    while index < len(segment.ids):
        if grid_positions and segment.ids[index] == image_id:
            image = next(grids)
            _, rows, columns = image.grid
            positions += [(now, now + row, now + column) for row in range(rows) for column in range(columns)]
            index += image.tokens
            now += max(rows, columns)
        else:
            positions.append((now, now, now))
            index += 1
            now += 1
    return positions, now


def collate(rows: list[Row], processor: Processor, weights: list[float] | None = None) -> Batch:
    """Rows (trees) to one batch. Raises ValueError for a segment whose parent does not come before it."""
    length = max(sum(len(segment.ids) for segment in row) for row in rows)
    shape = (len(rows), length)
    ids, labels, answer = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    predecessor = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(3, *shape, dtype=torch.long)
    tree: list[list[Run]] = [[] for _ in rows]
    images = []
    for b, row in enumerate(rows):
        at, ends, nexts, paths = 0, [], [], []  # of each segment: its last token, the position after it, where it and its ancestors lie
        for s, segment in enumerate(row):
            parent, stop = segment.parent, at + len(segment.ids)
            if parent is not None and not 0 <= parent < s:
                raise ValueError(f"segment {s} has parent {parent}; a parent must come before its children")
            ids[b, at:stop] = torch.tensor(segment.ids)
            labels[b, at:stop] = torch.tensor(segment.labels)
            answer[b, at:stop] = segment.answer
            predecessor[b, at:stop] = torch.arange(at - 1, stop - 1)
            if parent is None:
                predecessor[b, at] = at
                if segment.labels[0]:
                    raise ValueError("the first token of a root is supervised, but nothing predicts it")
            else:
                predecessor[b, at] = ends[parent]
            places, end = segment_positions(segment, 0 if parent is None else nexts[parent], processor.image_id, processor.family.grid_positions)
            positions[:, b, at:stop] = torch.tensor(places).T
            images += segment.images
            ends.append(stop - 1)
            nexts.append(end)
            before = () if parent is None else paths[parent]
            paths.append((*before, (at, stop)))
            if s and parent == s - 1:  # goes on where the row is: one run with its parent
                start, _, seen = tree[b].pop()
                tree[b].append((start, stop, seen))
            else:
                tree[b].append((at, stop, before))
            at = stop
    return Batch(
        ids, labels, predecessor, answer, positions, (ids == processor.image_id).long(), tree if any(len(runs) > 1 for runs in tree) else None,
        torch.cat([image.pixels for image in images]) if images else None,
        torch.tensor([image.grid for image in images]) if images else None,
        torch.tensor(weights if weights is not None else [1.0] * len(rows)),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The policy


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(h W^T)[target] for N positions without ever holding (N, V): chunks are made, used and dropped.

        d logp / d logits = onehot(target) - softmax(logits)             d logp / d h = (onehot - softmax) W

    The second is one (N, D) whatever comes back later: forward makes it while it has the chunk. Only a head that is
    trained makes the chunks again in backward, for its own gradient. The softmax is in fp32 (fp64 for fp64).
    """

    @staticmethod
    def residual(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """log p of n targets (n,) and onehot - softmax (n, V). In place, since V is too wide for a second copy."""
        logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))  # bf16 is not enough for sums over V
        top = logits.amax(-1, keepdim=True)
        at_target = logits.gather(1, targets[:, None]) - top
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        return (at_target - total.log())[:, 0], logits.div_(-total).scatter_add_(1, targets[:, None], torch.ones_like(total))

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """hidden (N, D), weight (V, D), targets (N,) -> (N,) float32"""
        logp = hidden.new_empty(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # d logp / d h, (N, D)
        for at in range(0, len(targets), chunk):
            part = slice(at, at + chunk)
            logp[part], g = ChunkedLogProbs.residual(hidden[part], weight, targets[part])
            if slope is not None:
                slope[part] = g.to(weight.dtype) @ weight
            del g  # or the next chunk would be made beside it
        ctx.save_for_backward(slope, *(hidden, weight, targets) if ctx.needs_input_grad[1] else ())
        ctx.chunk = chunk
        return logp

    @staticmethod
    def backward(ctx, grad: Tensor):
        slope, *head = ctx.saved_tensors
        grad_hidden = None if slope is None else (slope * grad[:, None]).to(slope.dtype)
        if not head:
            return grad_hidden, None, None, None
        hidden, weight, targets = head
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
        for at in range(0, len(targets), ctx.chunk):
            part = slice(at, at + ctx.chunk)
            _, g = ChunkedLogProbs.residual(hidden[part], weight, targets[part])
            scaled = (hidden[part] * grad[part, None]).to(hidden.dtype)
            if grad.dtype == weight.dtype:
                grad_weight.addmm_(g.T, scaled)  # without a second (V, D)
            else:
                grad_weight += g.to(weight.dtype).T @ scaled
            del g
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def segment_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_unused):
    """Attention inside each of many segments (images, or windows of an image): query, key, value (1, heads, P, d).

    transformers' own loop makes one call a segment. Here all segments of equal length run as one batch, which is the
    same sum: a film of 16 patches is nothing, sixty-four of them are a matrix. (The keyword arguments beyond those
    named are the interface that transformers defines for attention functions.)
    """
    starts = cu_seq_lens_q.tolist()
    groups: dict[int, list[int]] = {}
    for start, stop in zip(starts, starts[1:]):
        groups.setdefault(stop - start, []).append(start)
    out = query.new_empty(query.shape[2], *query.shape[1::2])  # (P, heads, d)
    for length, begin in groups.items():
        where = (torch.tensor(begin, device=query.device)[:, None] + torch.arange(length, device=query.device)).flatten()
        q, k, v = (t[0][:, where].unflatten(1, (-1, length)).transpose(0, 1) for t in (query, key, value))  # (n, heads, length, d)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        out = out.index_put((where,), mixed.transpose(1, 2).flatten(0, 1))
    return out[None], None


def tree_attention(module, query, key, value, attention_mask, scaling=None, tree=None, **_unused):
    """Attention of tree rows, run by run: query (B, heads, T, d), key and value (B, fewer heads, T, d) -> (B, T, heads, d).

    A run after the stretches it sees is a plain causal row. It is attended to as one, and what comes out for the earlier
    stretches, which have theirs already, is dropped. Computing that part twice costs less than a (T, T) mask, whose other
    half is computed for nothing, and the fastest kernels take no mask.
    """
    if tree is None:  # every row is a plain chain, or a decoder brings a mask of its own
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    rows = []
    for b, runs in enumerate(tree):
        mixed = []
        for start, stop, before in runs:
            q, k, v = (torch.cat([t[b : b + 1, :, i:j] for i, j in (*before, (start, stop))], 2) for t in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            mixed.append(out[:, :, start - stop :].transpose(1, 2))
        mixed.append(query.new_zeros(1, query.shape[2] - stop, *query.shape[1::2]))  # padding
        rows.append(torch.cat(mixed, 1))
    return torch.cat(rows), None


SEGMENT_ATTENTION = "medee_segment_flash_attention"  # transformers hands segment bounds to functions with "flash" in the name
TREE_ATTENTION = "medee_tree_attention"


class Policy(nn.Module):
    """A Hugging Face model as a function Batch -> (B, T) float32: entry t is log p(token t | its predecessor) where the
    token is supervised, 0 elsewhere. Always in eval mode: dropout would make policy and reference differ."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.family = FAMILIES[model.config.model_type]
        self.image_id = model.config.image_token_id
        self.checkpoint: Checkpoint | None = None  # where the numbers of parameters on `meta` are (meta_policy)
        from transformers import AttentionInterface

        # transformers makes no mask for an attention of which it knows none: each language model
        # gets the one that is handed in, (B, 1, queries, keys), or none
        AttentionInterface.register(TREE_ATTENTION, tree_attention)
        self.language_model.config._attn_implementation = TREE_ATTENTION
        if self.family.grid_positions:
            AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
            self.vision.config._attn_implementation = SEGMENT_ATTENTION
        super().train(False)

    def train(self, mode: bool = True) -> "Policy":
        """Keeps eval mode: gradients do not need training mode, and dropout must stay off."""
        return super().train(False)

    @property
    def vision(self) -> nn.Module:
        return self.model.get_submodule(self.family.vision)

    @property
    def projector(self) -> nn.Module:
        return self.model.get_submodule(self.family.projector)

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    def freeze_vision(self) -> None:
        """Vision tower and projector frozen, as in both of the paper's stages (LLaMA-Factory's default; paper silent)."""
        self.vision.requires_grad_(False)
        self.projector.requires_grad_(False)

    def image_features(self, pixels: Tensor, grids: Tensor) -> Tensor:
        """Features of all images in order, (image tokens, D). No gradient is kept where the tower is frozen."""
        trained = any(p.requires_grad for module in (self.vision, self.projector) for p in module.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            pixels = pixels.to(next(self.vision.parameters()).dtype)
            if self.family.grid_positions:
                merge = self.model.config.vision_config.spatial_merge_size
                return self.vision(pixels, grid_thw=grids * torch.tensor([1, merge, merge], device=grids.device)).pooler_output
            config = self.model.config
            features = self.model.model.get_image_features(
                pixels, vision_feature_layer=config.vision_feature_layer, vision_feature_select_strategy=config.vision_feature_select_strategy
            )
            return features.pooler_output.flatten(0, 1)

    def embed(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """Token embeddings with image features in the image tokens' places. (B, T, D)"""
        embedded = self.language_model.embed_tokens(ids)
        places = ids == self.image_id
        count = int(places.sum())
        if count != (0 if features is None else len(features)):
            raise ValueError(f"{count} image tokens but {0 if features is None else len(features)} image features: the pixel settings of prompt and images differ")
        if features is None:
            return embedded
        return embedded.masked_scatter(places[..., None], features.to(embedded.dtype))

    def hidden_states(self, batch: Batch) -> Tensor:
        """The language model's last hidden states. (B, T, D)"""
        features = None if batch.pixels is None else self.image_features(batch.pixels, batch.grids)
        return self.language_model(
            inputs_embeds=self.embed(batch.ids, features),
            position_ids=batch.positions if self.family.grid_positions else batch.positions[0],
            attention_mask=None,  # what a token sees is in the tree
            use_cache=False,
            tree=batch.tree,
        ).last_hidden_state

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.hidden_states(batch)
        rows, columns = (batch.labels > 0).nonzero(as_tuple=True)  # N supervised tokens
        before = hidden[rows, batch.predecessor[rows, columns]]  # (N, D)
        logp = ChunkedLogProbs.apply(before, self.model.lm_head.weight, batch.ids[rows, columns], LOGIT_CHUNK)
        out = torch.zeros(batch.ids.shape, dtype=logp.dtype, device=logp.device)
        return out.index_put((rows, columns), logp)  # (B, T)


# ---------------------------------------------------------------------------------------------------------------
# Folders


def row_parts(rows: int) -> Iterator[slice]:
    """A tensor's rows, COMPARED_ROWS at a time."""
    return (slice(at, at + COMPARED_ROWS) for at in range(0, rows, COMPARED_ROWS))


def equal(one, other) -> bool:
    """Do two stored tensors hold the same numbers? Neither is ever whole in memory."""
    if one.get_shape() != other.get_shape():
        return False
    parts = row_parts(one.get_shape()[0])
    return all(torch.equal(one[part].float(), other[part].float()) for part in parts)


class Checkpoint:
    """The weights in a Hugging Face folder, by the names that `model` gives its parameters. Nothing is read before it is
    asked for, and then only the rows asked for: of a 72B, a rank that holds an eighth of each weight reads an eighth.

    The hub's checkpoints carry older names ("visual.blocks.0...", "model.layers.0..."). transformers maps them as it loads,
    by the table that is used here, and back as it saves (`save_policy`).
    Every tensor of the files has a place in the model. Raises RowError that names what is missing,
    unexpected, there twice or of another shape, before any number is read; only a head that is
    stored although it is tied is read, and must equal the embedding.
    """

    def __init__(self, folder: str | Path, model: nn.Module):
        from safetensors import safe_open
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import rename_source_key

        self.folder = Path(folder)
        renamings, modules = get_model_conversion_mapping(model), model.state_dict()
        self.stored = {}  # a parameter's name -> its slice: a place in a file, without its numbers
        self.keys = {}  # a parameter's name -> file and key, to be named in an error
        for path in self.files():
            with reading(path):
                opened = safe_open(path, framework="pt")
            for key in opened.keys():
                name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, modules)
                place = f"{path.name}: {key}"
                if name in self.stored:
                    both = f"{self.keys[name]} and {place}"
                    raise data.RowError(f"{folder}: {both} are both {name}; remove the wrong one")
                self.stored[name], self.keys[name] = opened.get_slice(key), place
        self.check(model)
        numbers = Counter()
        for tensor in self.stored.values():
            numbers[tensor[:0].dtype] += math.prod(tensor.get_shape())
        self.dtype = numbers.most_common(1)[0][0]  # that of most numbers: a file may mix them

    def files(self) -> list[Path]:
        """The weight files. Raises RowError if one is not there."""
        index, names = self.folder / "model.safetensors.index.json", ["model.safetensors"]
        if index.exists():
            with reading(index):
                where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                names = sorted(set(where.values()))
        absent = [name for name in names if not (self.folder / name).exists()]
        if absent:
            raise data.RowError(
                f"{self.folder}: {len(absent)} of {len(names)} weight files are not there "
                f"({absent[0]}); copy or download the folder again"
            )
        return [self.folder / name for name in names]

    def check(self, model: nn.Module) -> None:
        """Raises RowError unless the files hold what the model has, no more and no less."""
        modules = model.state_dict()
        wanted = dict([*model.named_parameters(), *model.named_buffers()])
        wanted = {name: list(wanted[name].shape) for name in modules if name in wanted}
        found = {name: stored.get_shape() for name, stored in self.stored.items()}
        both = wanted.keys() & found.keys()
        faults = {
            "missing": wanted.keys() - found.keys(),
            "unexpected": found.keys() - modules.keys(),
            "of another shape": {name for name in both if wanted[name] != found[name]},
        }
        said = [
            f"{len(names)} {fault}: " + ", ".join(self.keys.get(n, n) for n in sorted(names)[:3])
            for fault, names in faults.items()
            if names
        ]
        if said:
            raise data.RowError(
                f"{self.folder}: the weights do not fit the model of its config.json: "
                f"{'; '.join(said)}; copy or download the folder again, or mend config.json"
            )
        for name in found.keys() - wanted.keys():  # a tied head: a second name of the embedding
            head = model.get_parameter(name)
            twin = next(other for other, parameter in model.named_parameters() if parameter is head)
            if not equal(self.stored[name], self.stored[twin]):
                raise data.RowError(
                    f"{self.folder}: {self.keys[name]} differs from {self.keys[twin]}, but "
                    "config.json ties the two; set tie_word_embeddings to false there, or remove "
                    "the first tensor"
                )

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Those rows of a weight in the dtype of the file: a view of the mapped file. Copy it, or the weight is the file."""
        return self.stored[name][rows]


def meta_policy(folder: str | Path, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy from a Hugging Face folder with its parameters on the `meta` device: shapes without memory, so that a 72B can
    be built, adapted and sharded in every process. `policy.checkpoint` has their numbers; `fill` or train.shard puts them in.

    Raises RowError for a folder that is no model of a known family or whose weights do not fit it.
    """
    from transformers import AutoModelForImageTextToText, GenerationConfig

    folder = Path(folder)
    config = load_config(folder)
    with reading(folder / "config.json"), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if (folder / "generation_config.json").exists():
        with reading(folder / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    # Buffers that no file holds (the frequencies of rotary positions) were computed on meta too, and so not at all.
    # They are a few numbers: transformers' own initialisation, as in from_pretrained, computes them again on the CPU.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.full_like(buffer, math.nan, device="cpu"))
        if any(True for _ in module.buffers(recurse=False)):
            model._init_weights(module)
    left = [name for name, buffer in model.named_buffers() if buffer.isnan().any()]
    if left:
        raise ValueError(f"{folder}: this version of transformers does not initialise {left[0]}")
    policy = Policy(model)
    policy.checkpoint = Checkpoint(folder, model)
    return policy


def fill(policy: Policy, read: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Gives every parameter that is still on `meta` its numbers: read(name in the Hugging Face model, parameter) -> tensor."""
    state = {name: read(name, parameter) for name, parameter in policy.model.named_parameters() if parameter.is_meta}
    if state:
        policy.model.load_state_dict(state, strict=False, assign=True)
        policy.model.tie_weights()  # a head that shares the embedding's weight: only the embedding was assigned


def load_policy(folder: str | Path, dtype: torch.dtype = torch.float32) -> Policy:
    """A whole policy from a Hugging Face folder, on the CPU. Errors as for `meta_policy`."""
    policy = meta_policy(folder, dtype)
    fill(policy, lambda name, parameter: policy.checkpoint.read(name).to(parameter.dtype, copy=True))
    return policy


class Rounding:
    """What becomes of a training's changes in saving, gathered tensor by tensor: a change of less
    than half the spacing of the file's numbers is rounded away."""

    def __init__(self, policy: Policy):
        self.start = policy.checkpoint  # None: the policy comes from no folder
        self.trained = lora.trained_weights(policy.model)
        self.count = self.changed = 0
        self.change = self.lost = 0.0  # squared norms

    def add(self, name: str, exact: Tensor, saved: Tensor) -> None:
        """exact: a weight as training left it; saved: the same as the file will have it."""
        if self.start is None or name not in self.trained:
            return
        for part in row_parts(len(exact)):
            before, after = self.start.read(name, part).float(), saved[part].float()
            now = exact[part].float()
            self.count += now.numel()
            self.changed += int((after != before).sum())
            self.change += float((now - before).square().sum(dtype=torch.float64))
            self.lost += float((now - after).square().sum(dtype=torch.float64))

    def figures(self) -> dict[str, float]:
        """weights_changed: the share of the trained weights whose saved value is not the start's.
        rounding_lost: the norm of what rounding took, over the norm of the whole change. Empty for
        a policy from no folder."""
        if not self.count:
            return {}
        lost = math.sqrt(self.lost / self.change) if self.change else 0.0
        return {"weights_changed": self.changed / self.count, "rounding_lost": lost}


def write_config(folder: Path, policy: Policy, dtype: torch.dtype) -> None:
    """config.json and generation_config.json of weights that are all of one dtype."""
    config = policy.model.config
    config.architectures = [type(policy.model).__name__]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    policy.model.generation_config.save_pretrained(folder)


def save_policy(
    folder: str | Path,
    policy: Policy,
    processor: Processor,
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Writes a folder that transformers and vLLM load: weights, all of one dtype, config,
    tokenizer, image processor. Returns Rounding's figures.

    tensors: (name in the Hugging Face model, whole tensor), one at a time; a tied weight once. Only
    the tensors of the file being filled are held. All is written to FOLDER/saving.tmp and then
    moved, the file that makes the weights loadable last: a kill at any moment leaves no checkpoint
    that loads and is not whole.
    """
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    making = Path(folder) / "saving.tmp"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    rounding, total = Rounding(policy), 0
    held: dict[str, Tensor] = {}
    files: list[list[str]] = []  # the keys of each file

    def write() -> None:
        stored = revert_weight_conversion(policy.model, held)  # names as on the hub
        save_file(stored, making / f"{len(files)}", metadata={"format": "pt"})
        files.append(list(stored))
        held.clear()

    for name, tensor in tensors:
        saved = tensor.detach().to("cpu", dtype).contiguous()
        rounding.add(name, tensor.detach(), saved)
        del tensor  # or the loop's variable would hold it while the next is made
        if held and sum(t.nbytes for t in held.values()) + saved.nbytes > shard_bytes:
            write()
        held[name] = saved
        total += saved.nbytes
        del saved
    write()
    write_config(making, policy, dtype)
    processor.save(making)
    move_into(Path(folder), making, files, total)
    return rounding.figures()


def move_into(folder: Path, making: Path, files: list[list[str]], total: int) -> None:
    """Puts what is in `making` in the place of an older checkpoint. files: the keys of its weight
    files, which are named 0, 1 and so on; total: the bytes of all tensors."""
    count = len(files)
    names = [f"model-{at + 1:05d}-of-{count:05d}.safetensors" for at in range(count)]
    last = "model.safetensors.index.json"
    if count == 1:
        names, last = ["model.safetensors"], "model.safetensors"
    for at, name in enumerate(names):
        os.replace(making / f"{at}", making / name)
    if count > 1:
        where = {key: name for name, keys in zip(names, files) for key in keys}
        data.write_json(making / last, {"metadata": {"total_size": total}, "weight_map": where})
    for older in [*folder.glob("model.safetensors*"), *folder.glob("model-*-of-*.safetensors")]:
        older.unlink()
    for path in sorted(making.iterdir(), key=lambda path: path.name == last):
        os.replace(path, folder / path.name)
    making.rmdir()


def iter_rows(rows: list[dict], processor: Processor) -> Iterator[tuple[str, Segment, list[Segment]]]:
    """(title, prompt, responses) of demos or pairs, for `show`. Images are not loaded: one placeholder token each."""
    for row in rows:
        if "chosen" in row:
            prompt, responses = row["prompt"], [("chosen", row["chosen"]), ("rejected", row["rejected"])]
        else:
            prompt, responses = row["messages"][:-1], [("response", row["messages"][-1]["content"])]
        blank = [ImageInput(torch.empty(0), (1, 1, 1), 1) for _ in row["images"]]
        encoded = processor.encode_prompt(prompt, blank)
        yield row["id"], encoded, [processor.encode_response(text) for _, text in responses]


COLOURS = {data.PROMPT: "\033[90m", data.THINK: "\033[32m", data.ANSWER: "\033[36m", data.TAG: "\033[33m"}


def show(path: str, folder: str, count: int) -> None:
    """Prints rows with every token in the colour of its label: the mask as one can read it."""
    kind = data.kind_of_file(path)
    if kind not in ("demos", "pairs"):
        raise data.RowError(f"{path}: holds {kind}, expected demos or pairs")
    processor = Processor(folder)
    for title, prompt, responses in iter_rows(data.read_rows(path, kind)[:count], processor):
        print(f"--- {title}: prompt {len(prompt.ids)} tokens, one placeholder for each of {len(prompt.images)} images")
        print(f"{COLOURS[data.PROMPT]}{processor.tokenizer.decode(prompt.ids)}\033[0m", end="")
        for response in responses:
            for index, label in zip(response.ids, response.labels):
                print(f"{COLOURS[label]}{processor.tokenizer.decode([index])}", end="")
            counts = ", ".join(f"{name} {response.labels.count(label)}" for label, name in data.SPAN_NAMES.items())
            print(f"\033[0m\n    supervised: {counts} tokens")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Look at the supervised tokens of demos.jsonl or pairs.jsonl.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("show", help="print rows with every token coloured by its label")
    shown.add_argument("file")
    shown.add_argument("--model", required=True, help="folder whose tokenizer is used")
    shown.add_argument("-n", type=flags.whole(1), default=3, help="how many rows")
    args = parser.parse_args(argv)
    show(args.file, args.model, args.n)


if __name__ == "__main__":
    flags.run_script(main)
