"""Prints the loss mask: every token of a demonstration or a pair in the colour of its label.

    python -m report show demos.jsonl --model runs/demo/base -n 2

reads demos.jsonl or pairs.jsonl and a model's tokenizer; loads no image: each is one placeholder
token. Of a pair with the token ids of its rollouts it shows those, since Stage II trains on them.

Where we depart from the paper, or it is silent: it shows no training row.
"""

import argparse

import torch

import data
from command import schema
from model import ImageInput, Processor, Segment

COLOURS = {  # ours: of a terminal
    data.PROMPT: "\033[90m",
    data.THINK: "\033[32m",
    data.ANSWER: "\033[36m",
    data.TAG: "\033[33m",
}
RESET = "\033[0m"


def response_of(row: dict, side: str, processor: Processor) -> Segment:
    """A side of a pair: the tokens that were sampled, or where there are none its text's."""
    ids = row.get(f"{side}_token_ids")
    if not ids:
        return processor.encode_response(row[side])
    # where each token begins in the text; "\ufffd" is a character of which a part is still to come
    starts = [len(processor.decode(ids[:k]).rstrip("\ufffd")) for k in range(len(ids))]
    return Segment(ids, data.label_spans(processor.decode(ids), starts))


def show(args: argparse.Namespace) -> None:
    kind = schema.kind_of_file(args.file)
    if kind not in ("demos", "pairs"):
        raise data.RowError(f"{args.file}: holds {kind}, expected demos or pairs")
    processor = Processor(args.model)
    for row in schema.read_rows(args.file, kind)[: args.n]:
        if kind == "demos":
            *messages, turn = row["messages"]
            responses = [processor.encode_response(turn["content"])]
        else:
            messages, sides = row["prompt"], ("chosen", "rejected")
            responses = [response_of(row, side, processor) for side in sides]
        blank = [ImageInput(torch.empty(0), (1, 1, 1), 1) for _ in row["images"]]
        prompt = processor.encode_prompt(messages, blank)
        images = f"one placeholder for each of {len(prompt.images)} images"
        print(f"--- {row['id']}: prompt {len(prompt.ids)} tokens, {images}")
        print(f"{COLOURS[data.PROMPT]}{processor.tokenizer.decode(prompt.ids)}{RESET}", end="")
        for response in responses:
            for index, label in zip(response.ids, response.labels):
                print(f"{COLOURS[label]}{processor.tokenizer.decode([index])}", end="")
            names = data.SPAN_NAMES.items()
            counts = ", ".join(f"{name} {response.labels.count(label)}" for label, name in names)
            print(f"{RESET}\n    supervised: {counts} tokens")
