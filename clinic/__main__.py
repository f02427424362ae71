"""python -m clinic world | teach | show"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import data
from clinic import world
from clinic.roles import chain
from command import flags, stage


def make_world(args: argparse.Namespace) -> None:
    """The question bank, development questions to choose settings, test questions measured once,
    and what their films show, asked directly."""
    started, out = time.time(), Path(args.out)
    if not stage.open_folder(args, []):
        return
    bank, dev = (args.image, args.text), (args.dev_image, args.dev_text)
    counts = {"bank": bank, "dev": dev, "test": (args.test_image, args.test_text)}
    seed, modalities, withhold = args.seed, args.modalities, args.withhold
    for name, (image, text) in counts.items():
        kind = (out, modalities, withhold)
        questions = world.make_questions(image, seed, f"{name}-image", True, *kind)
        if name != "bank":
            questions = world.with_other_films(questions, seed, f"{name}-image", out)
        if name == "bank":
            questions = world.telling(questions, image // world.SPOILT, seed, out)
        questions += world.make_questions(text, seed, f"{name}-text", False, *kind)
        if name == "bank":
            questions += world.look_questions(image // world.SPOILT, seed, out, modalities)
        data.write_jsonl(out / f"{name}.jsonl", (question.to_row() for question in questions))
        if name == "test":
            asked = world.captions(questions, out)
            data.write_jsonl(out / "captions.jsonl", (one.to_row() for one in asked))
        print(f"{name}: {len(questions) - text} image questions, {text} text questions")
    names = [*counts, "captions"]
    stage.finish(args, [out / f"{name}.jsonl" for name in names], started, {})


def teach(args: argparse.Namespace) -> None:
    """The base model. Only this command needs torch."""
    from clinic import school

    school.teach(args)


def show(args: argparse.Namespace) -> None:
    """A sheet with films of all signs, numbers and sides; a question of each kind with its
    chains."""
    started, out = time.time(), Path(args.out)
    noise, rng = np.random.default_rng(args.seed), random.Random(args.seed)
    if not stage.open_folder(args, []):
        return
    big, margin, gap = 2 * world.SIDE, 90, 4
    size = margin + 6 * (big + gap), len(world.MODALITY_OF) * (big + gap)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for row, (sign, modality) in enumerate(world.MODALITY_OF.items()):
        top = row * (big + gap)
        pen.text((gap, top + big // 2 - 8), f"{modality}\n{sign}", fill="black")
        for column in range(6):
            number, side = column % 3 + 1, world.SIDES[column // 3]
            case = world.Case(sign, number, side, world.CLUES[0], world.SYMPTOMS[0], 50, "man")
            film = world.draw_film(case, noise).resize((big, big), Image.Resampling.NEAREST)
            sheet.paste(film, (margin + column * (big + gap), top))
    sheet.save(out / "films.png")
    print(f"{out / 'films.png'}: columns are one, two, three signs on the left, then on the right")
    for kind in world.ASK:
        case = world.draw_case(rng)
        for film in (None, "film.png"):
            question, form = world.make_question(case, kind, rng, film), "image" if film else "text"
            print(f"\n--- {kind}, {form} question, answer {question.answer}")
            print(data.question_text(question))
        for style in ("thorough", "hasty", "bookish"):
            print(f"{style}: {chain(case, kind, style)}")
    stage.finish(args, [out / "films.png"], started, {})


# how many questions of each kind
COUNTS = {
    "text": 900, "image": 1100, "dev-image": 200, "dev-text": 50, "test-image": 300,
    "test-text": 150,
}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The miniature clinic.")
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("world", help="write questions and films")
    made.set_defaults(run=make_world)
    # ours: one modality has 248,832 different text questions; a search for more never ends
    number = flags.whole(0, 200_000)
    for name, count in COUNTS.items():
        made.add_argument(f"--{name}", type=number, default=count, help="how many questions")
    taught = commands.add_parser("teach", help="teach the base model from scratch")
    taught.set_defaults(run=teach)
    add, positive = taught.add_argument, flags.whole(1)
    add("--family", choices=["qwen", "internvl"], default="qwen")
    add("--size", choices=["small", "tiny"], default="tiny")
    add("--films", type=positive, default=6000, help="films to learn to see from")
    about = "rounds over the films for the eye alone"
    add("--eye-epochs", type=flags.EPOCHS, default=3, help=about)
    add("--steps", type=positive, default=240, help="of the joint lessons")
    add("--batch", type=positive, default=24, help="lessons a step")
    add("--lr", type=flags.RATE, default=3e-3)
    about = "steps between states to resume from; 0: no states"
    add("--save-every", type=flags.whole(0), default=50, help=about)
    add("--print-every", type=positive, default=10, help="steps between printed lines")
    shown = commands.add_parser("show", help="a sheet of films and one question of each kind")
    shown.set_defaults(run=show)
    for command in (made, taught, shown):
        command.add_argument("--out", required=True, help="folder to write")
        command.add_argument("--seed", type=flags.SEED, default=0)
    modalities, about = flags.whole(1, len(world.SIGNS)), "how many of the clinic's modalities"
    for command in (made, taught):
        command.add_argument("--modalities", type=modalities, default=len(world.SIGNS), help=about)
        withheld = "without a third of the rules, and their patients"
        command.add_argument("--withhold", action="store_true", help=withheld)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    flags.run_script(main)
