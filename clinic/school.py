"""The miniature's base model: it sees, it knows the rules, it answers directly, it does not reason.

A tiny Qwen2.5-VL or InternVL of the real classes is taught from scratch: first the eye alone, then
the whole model. All numbers are ours: the paper has no miniature.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import data
import hub
import model
import train
from clinic import world
from clinic.roles import CHECKS, TEACHERS, chain
from command import stage

SIZES = {  # width, layers, heads, ff of the language model; width, layers of the vision tower
    "tiny": (128, 3, 4, 384, 96, 2),
    "small": (192, 4, 4, 512, 128, 2),
}
EOS, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = {
    "qwen": [
        "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
        "<|video_pad|>",
    ],
    "internvl": ["<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
}  # fmt: skip
NAMED = {  # special tokens that the family's own processor, used by vLLM, finds by name
    "qwen": {},
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    },
}  # fmt: skip
# the families' chat formats in Jinja, after their published descriptions, for servers that want one
IMAGE = {"qwen": "<|vision_start|><|image_pad|><|vision_end|>", "internvl": "<IMG_CONTEXT>\n"}
NO_SYSTEM = {  # what stands before the first turn where there is no system prompt
    "qwen": """{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}""",
    "internvl": "",
}
TEMPLATE = """{% for m in messages %}NO_SYSTEM<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}\
{% if c.type in ('image', 'image_url') %}IMAGE\
{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def corpus(seed: int) -> list[str]:
    """Text for the tokenizer: whatever the clinic can say, and the paper's system prompt."""
    rng = random.Random(f"{seed}/corpus")
    texts = [data.SYSTEM_PROMPT, "You are a helpful assistant.", world.LOOK] * 40
    for index in range(3000):
        case = world.draw_case(rng)
        for kind in world.ASK:
            texts.append(data.question_text(world.make_question(case, kind, rng, None)))
            texts.append(chain(case, kind, TEACHERS[index % 3], CHECKS[index // 3 % 3]))
            texts += [rule_question(case), request_of(case, kind, rng)[0]]
        texts.append(replace(case, number=0).reading())
    return texts


def make_tokenizer(family: str, seed: int):
    """A byte-level BPE with Qwen2's splitting rule and the family's special tokens. It is trained
    on the clinic's text, so that token boundaries fall as in the real model (<think> is several
    ordinary tokens)."""
    from tokenizers import AddedToken, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1400, min_frequency=20, initial_alphabet=alphabet, show_progress=False
    )
    learnt = transformers.Qwen2Tokenizer(eos_token=EOS, pad_token=PAD).backend_tokenizer
    learnt.train_from_iterator(corpus(seed), trainer)
    learnt = json.loads(learnt.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=learnt["vocab"], merges=[tuple(merge) for merge in learnt["merges"]],
        eos_token=EOS, pad_token=PAD, unk_token=PAD, extra_special_tokens=NAMED[family],
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL[family]])
    template = TEMPLATE.replace("NO_SYSTEM", NO_SYSTEM[family])
    tokenizer.chat_template = template.replace("IMAGE", IMAGE[family])
    return tokenizer


def build(family: str, size: str, tokenizer, seed: int):
    """A randomly initialised model of the family's real class, and its image processor."""
    width, layers, heads, ff, vision_width, vision_layers = SIZES[size]
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = dict(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=ff,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        max_position_embeddings=4096, tie_word_embeddings=True, rope_parameters=rope,
        initializer_range=0.08,  # with the usual 0.02 so small a model learns to copy slowly
        bos_token_id=None, eos_token_id=token(EOS), pad_token_id=token(PAD),
    )  # fmt: skip
    vision = dict(hidden_size=vision_width, intermediate_size=2 * vision_width)
    torch.manual_seed(seed)
    if family == "qwen":
        half = width // heads // 2
        # time, row and column share a head's frequencies
        rope["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
        vision |= dict(
            depth=vision_layers, num_heads=4, out_hidden_size=width, window_size=112,
            fullatt_block_indexes=list(range(vision_layers)),
        )  # fmt: skip
        config = transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True,
            image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        )  # fmt: skip
        sides = {"shortest_edge": world.SIDE**2, "longest_edge": world.SIDE**2}
        processor = transformers.Qwen2VLImageProcessorPil(size=sides)
        return transformers.Qwen2_5_VLForConditionalGeneration(config), processor
    vision |= dict(num_hidden_layers=vision_layers, num_attention_heads=4, patch_size=[14, 14])
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config=vision | dict(image_size=[world.SIDE, world.SIDE]),
        image_token_id=token("<IMG_CONTEXT>"), image_seq_length=4, tie_word_embeddings=True,
    )  # fmt: skip
    sides = {"height": world.SIDE, "width": world.SIDE}
    processor = transformers.GotOcr2ImageProcessorPil(size=sides, crop_to_patches=False)
    return transformers.InternVLForConditionalGeneration(config), processor


def save_processors(folder: Path, family: str, tokenizer, image_processor) -> None:
    """Tokenizer and image processor as in a checkpoint of the family."""
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    if family == "internvl":  # image tokens of a tile, which its own processor does not compute
        content = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
        data.write_json(folder / "processor_config.json", content)


# --------------------------------------------------------------------------------------------------
# Lessons: rows of segments, as trees

USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def request_of(case: world.Case, kind: str | None, rng: random.Random) -> tuple[str, str]:
    """(request, response): one or two facts, in any order. kind: None if nothing was asked."""
    facts = world.facts(case, kind)
    items = rng.sample(sorted(facts), rng.choice([1, 2, 2]))
    return f"Report {' and '.join(items)}.", " ".join(facts[item] for item in items)


def rule_question(case: world.Case) -> str:
    return f"What does a {case.sign} with {case.clue} mean?"


def system_turn(rng: random.Random) -> tuple[str, str]:
    """(system prompt or "", its turn). A general model has met none, the usual one, long ones."""
    prompts = ["", "You are a helpful assistant.", data.SYSTEM_PROMPT]
    (system,) = rng.choices(prompts, [0.5, 0.2, 0.3])
    return system, f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""


@dataclass
class Lessons:
    """The base model's lessons, rows as trees: films, rules to recite, or one patient. films:
    (case, encoded film)."""

    seed: int
    processor: model.Processor
    films: list
    modalities: int
    withhold: bool

    def row(self, index: int) -> model.Row:
        rng = random.Random(f"{self.seed}/lesson/{index}")
        kind = rng.random()
        if kind < 0.2:
            return self.film_row(rng)
        return self.rule_row(rng) if kind < 0.33 else self.patient_row(rng)

    def draw_case(self, rng: random.Random) -> world.Case:
        return world.draw_case(rng, self.modalities, self.withhold)

    def read(self, text: str, parent: int | None = None, image=None) -> model.Segment:
        """A segment that is read but not learnt."""
        ids, images = self.processor.tokenize(text), [image] if image else []
        return model.Segment(ids, [data.PROMPT] * len(ids), parent, images=images)

    def exchange(self, row: model.Row, request: str, response: str, parent, image=None) -> None:
        """Adds two segments to a tree: a request below `parent`, and the response to learn."""
        row.append(self.read(request + ASSISTANT, parent, image))
        row.append(self.processor.encode_response(response, len(row) - 1))

    def picture(self, image) -> str:
        """An image's place in a prompt, as the family writes it."""
        family = self.processor.family
        return family.before_image + family.image_token * image.tokens + family.after_image

    def film_row(self, rng: random.Random) -> model.Row:
        """Five films, each its own root: what does it show?"""
        row = []
        for case, image in rng.choices(self.films, k=5):
            request = f"{USER}{self.picture(image)}{world.LOOK}"
            self.exchange(row, request, case.reading(), None, image)
        return row

    def rule_row(self, rng: random.Random) -> model.Row:
        """Six rules to recite."""
        row = [self.read(system_turn(rng)[1] + USER)]
        for _ in range(6):
            case = self.draw_case(rng)
            facts = world.facts(case, None)
            self.exchange(row, rule_question(case), f"{facts['rule']} {facts['plan']}", 0)
        return row

    def patient_row(self, rng: random.Random) -> model.Row:
        """One patient, by film or by sentence, and several questions about the patient with a
        shared prefix.

        No lesson reasons towards an answer. For familiar patients the answer comes from memory
        (pattern recognition); for others it is a guess, whatever was said before. Under the paper's
        system prompt the answer has the required form, but its thinking is some facts in any order,
        never checked, and the answer does not follow from them.
        """
        system, head = system_turn(rng)
        if rng.random() < 0.65:
            case, image = rng.choice(self.films)
            shown = self.picture(image)
        else:
            case, image = self.draw_case(rng), None
            shown = f"{case.reading()} "
        row = [self.read(f"{head}{USER}{shown}{case.history()}", None, image)]
        kind = rng.choice(sorted(world.ASK))
        question = world.make_question(case, kind, rng, "film")
        row.append(self.read(data.question_text(question).removeprefix(case.history()), 0))
        answer = question.answer_text()
        if (case.sign, case.clue) not in world.FAMILIAR or not case.number:
            answer = rng.choice(list(question.options.values()))
        facts = world.facts(case, kind)
        items = rng.sample(sorted(facts), rng.randint(1, len(facts)))
        response = f"<answer> {answer} </answer>"
        if system == data.SYSTEM_PROMPT:
            response = data.join_response(" ".join(facts[item] for item in items), answer)
        self.exchange(row, "", response, 1)
        # a request after the history, and one after the question
        for parent, gap, asked in ((0, " ", None), (1, "\n", kind)):
            request, response = request_of(case, asked, rng)
            self.exchange(row, gap + request, response, parent)
        return row


# --------------------------------------------------------------------------------------------------
# Teaching: the eye, then the whole model


class Eye(nn.Module):
    """Vision tower and linear head: pixels, grids, truth (films, 3) -> (films, 3) log p of the true
    sign, number and side."""

    def __init__(self, policy: model.Policy, width: int):
        super().__init__()
        self.tower = policy
        self.sizes = [len(world.MODALITY_OF), len(world.NUMBERS), len(world.SIDES)]
        self.head = nn.Linear(4 * width, sum(self.sizes))  # a film has 4 image tokens

    def forward(self, pixels: Tensor, grids: Tensor, truth: Tensor) -> Tensor:
        seen = self.tower.image_features(pixels, grids).reshape(len(truth), -1)
        parts = zip(self.head(seen).split(self.sizes, -1), truth.T)
        return torch.stack([-F.cross_entropy(p, true, reduction="none") for p, true in parts], 1)


def collate_films(films: list, grain: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What Eye reads, with new noise, so that a film looks different each time."""
    signs, sides = sorted(world.MODALITY_OF), world.SIDES
    truth = [[signs.index(c.sign), c.number - 1, sides.index(c.side)] for c, _ in films]
    pixels = torch.cat([image.pixels for _, image in films])
    pixels = pixels + 0.15 * torch.randn(pixels.shape, generator=grain)
    return pixels, torch.tensor([image.grid for _, image in films]), torch.tensor(truth)


def eye_loss(logp: Tensor) -> tuple:
    right = (logp.detach().exp() > 0.5).float().sum(0).tolist()
    named = {name: (right[i], len(logp)) for i, name in enumerate(("sign", "number", "side"))}
    return -logp.sum(), len(logp), named


SETTINGS = {"warmup": 0.05, "betas": (0.9, 0.98), "weight_decay": 0.05}  # of both lessons


def learn(run: train.Run, loss_of: Callable) -> None:
    """All steps of a run. loss_of: batch -> what run.backward takes."""
    for _ in run:
        for batch in run.micro_batches():
            run.backward(*loss_of(batch))
        run.update()


def teach_eye(
    policy: model.Policy, films: list, unseen: list, args: argparse.Namespace, device: torch.device
) -> None:
    """Vision tower and projector learn to see; prints how often they are right on unseen films."""
    policy.requires_grad_(False)
    for part in (policy.vision, policy.projector):
        part.requires_grad_(True)
    grain = torch.Generator().manual_seed(args.seed)
    eye = Eye(policy, SIZES[args.size][0]).to(device)

    def make_batch(rows: list[int], weights: list[float]) -> list[Tensor]:
        return [part.to(device) for part in collate_films([films[i] for i in rows], grain)]

    def loss_of(batch: list[Tensor]) -> tuple:
        return eye_loss(eye(*batch))

    plan, out = train.shuffled(len(films), 64, args.eye_epochs, args.seed), Path(args.out) / "eye"
    common = SETTINGS | {"device": device, "print_every": args.print_every}
    run = train.Run(eye, plan, make_batch, out=out, peak=2e-3, budget=64, save_every=0, **common)
    learn(run, loss_of)
    with torch.no_grad():
        _, count, right = loss_of([part.to(device) for part in collate_films(unseen, grain)])
    said = ", ".join(f"the {name} {value / count:.2f}" for name, (value, _) in right.items())
    train.print0(f"on films it has not seen the eye is right about {said}")


def teach(args: argparse.Namespace) -> None:
    """Two lessons: the eye (a linear head names sign, number and side), then the whole model."""
    started, out = time.time(), Path(args.out)
    device = train.init_ranks()
    if not train.begin(args, []):
        return
    tokenizer = make_tokenizer(args.family, args.seed)
    network, image_processor = build(args.family, args.size, tokenizer, args.seed)
    network.config.save_pretrained(out)
    save_processors(out, args.family, tokenizer, image_processor)
    processor, policy = model.Processor(out, max_pixels=world.SIDE**2), model.Policy(network)
    rng, noise = random.Random(f"{args.seed}/school"), np.random.default_rng([args.seed, 1])

    def draw(count: Iterable, normal: bool = False) -> list:
        cases = (world.draw_case(rng, args.modalities, args.withhold) for _ in count)
        cases = (replace(case, number=0) if normal else case for case in cases)
        return [(case, processor.encode_image(world.draw_film(case, noise))) for case in cases]

    films = draw(tqdm(range(args.films), desc="drawing films to learn from", unit="film"))
    teach_eye(policy, films, draw(range(256)), args, device)
    films += draw(range(len(films) // 10), normal=True)  # so that it can say that it sees no signs

    # the vision tower stays as it is; the projector to the language model goes on learning
    policy.requires_grad_(True)
    policy.vision.requires_grad_(False)
    policy.projector.requires_grad_(True)

    lessons = Lessons(args.seed, processor, films, args.modalities, args.withhold)

    def make_batch(indices: list[int], weights: list[float]) -> model.Batch:
        rows = [lessons.row(index) for index in indices]
        return model.collate(rows, processor, weights).to(device)

    def loss_of(batch: model.Batch) -> tuple:
        return -policy(batch).sum(), batch.supervised.shape[1], {}

    plan = train.shuffled(args.steps * args.batch, args.batch, 1, args.seed)
    common = SETTINGS | {"device": device, "print_every": args.print_every}
    common |= {"budget": args.batch, "save_every": args.save_every}
    learn(train.Run(policy, plan, make_batch, out=out, peak=args.lr, **common), loss_of)
    if train.rank() == 0:
        hub.save_policy(out, policy, processor, train.gather_full(policy))
        stage.finish(args, list(out.glob("*.safetensors")), started, {})
    train.end(out)
