"""Hugging Face folders: weights are read into a policy, and a policy is written as a folder.

    meta_policy(folder)    the module without weights; each rank then reads its own rows of a file
    load_policy(folder)    all of it, in this process
    save_policy(folder)    config, tokenizer, processors and weights; a kill leaves the old folder,
                           the new one, or one without weights, which nothing loads

Every tensor of a file is loaded, or named in an error. config.json says whether the head is tied.

Where we depart from the paper, or it is silent: it does not say how weights were stored.
"""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import lora
from model import Policy, Processor, load_config, reading

# ours: rows whose rounding is summed at a time, 30 MB in fp32 for the widest weight of a 72B
ROUNDED_ROWS = 256
# ours: the most bytes of a weight file, as on the hub, and so the most that saving holds
SHARD_BYTES = 5_000_000_000


class Checkpoint:
    """The weights in a Hugging Face folder, under the names that `model` gives its parameters. Only
    the rows asked for are read: of a 72B, a rank that holds an eighth of each weight reads an
    eighth.

    The hub's checkpoints have older names ("visual.blocks.0...", "model.layers.0..."). transformers
    maps them by the table used here when it loads, and back when it saves (`save_policy`).

    Raises RowError that names what is missing, unexpected, stored twice or of another shape, before
    any number is read. Only a head that is stored although it is tied is read, and must equal the
    embedding.
    """

    def __init__(self, folder: str | Path, model: nn.Module):
        from safetensors import safe_open
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import rename_source_key

        self.folder = Path(folder)
        renamings, modules = get_model_conversion_mapping(model), model.state_dict()
        self.stored = {}  # a parameter's name -> its slice: a place in a file, without its numbers
        self.keys = {}  # a parameter's name -> file and key, for error messages
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
        self.dtype = numbers.most_common(1)[0][0]  # that of most numbers: dtypes may be mixed

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
        """Raises RowError unless the files hold exactly what the model has."""
        named, modules = [*model.named_parameters(), *model.named_buffers()], model.state_dict()
        wanted = {name: list(tensor.shape) for name, tensor in named if name in modules}
        found = {name: stored.get_shape() for name, stored in self.stored.items()}
        both = wanted.keys() & found.keys()
        faults = {
            "missing": wanted.keys() - found.keys(),
            "unexpected": found.keys() - modules.keys(),
            "of another shape": {name for name in both if wanted[name] != found[name]},
        }
        wrong = [
            f"{len(names)} {fault}: " + ", ".join(self.keys.get(n, n) for n in sorted(names)[:3])
            for fault, names in faults.items()
            if names
        ]
        if wrong:
            raise data.RowError(
                f"{self.folder}: the weights do not fit the model of its config.json: "
                f"{'; '.join(wrong)}; copy or download the folder again, or mend config.json"
            )
        for name in found.keys() - wanted.keys():  # a tied head: a second name of the embedding
            head = model.get_parameter(name)
            twin = next(other for other, parameter in named if parameter is head)
            if not torch.equal(self.read(name), self.read(twin)):
                raise data.RowError(
                    f"{self.folder}: {self.keys[name]} differs from {self.keys[twin]}, but "
                    "config.json ties the two; set tie_word_embeddings to false there, or remove "
                    "the first tensor"
                )

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Those rows of a weight in the file's dtype: a view of the mapped file, to be copied."""
        return self.stored[name][rows]


def meta_policy(folder: str | Path, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy from a Hugging Face folder with its parameters on the `meta` device: shapes without
    memory. So a 72B can be built, adapted and sharded in every process. `policy.checkpoint` has the
    numbers; `materialize` or train.shard puts them in.

    Raises RowError for a folder that is no model of a known family or whose weights do not fit it.
    """
    from transformers import AutoModelForImageTextToText, GenerationConfig

    folder = Path(folder)
    config = load_config(folder)
    with reading(folder / "config.json"), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    if (folder / "generation_config.json").exists():
        with reading(folder / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    # Buffers that no file holds (the frequencies of rotary positions) are on meta too, without
    # values. transformers' own initialisation, as in from_pretrained, computes them on the CPU.
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name, buffer in buffers.items():  # NaN, so that one without an initialisation shows
            setattr(module, name, torch.full_like(buffer, math.nan, device="cpu"))
        if buffers:
            model._init_weights(module)
    policy = Policy(model)
    policy.checkpoint = Checkpoint(folder, model)
    return policy


def materialize(policy: Policy, read: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Loads each parameter still on `meta` by read(Hugging Face name, parameter) -> tensor."""
    parameters = policy.model.named_parameters()
    state = {name: read(name, p) for name, p in parameters if p.is_meta}
    if state:
        policy.model.load_state_dict(state, strict=False, assign=True)
        # for a head that shares the embedding's weight: only the embedding was assigned
        policy.model.tie_weights()


def load_policy(folder: str | Path, dtype: torch.dtype = torch.float32) -> Policy:
    """A whole policy from a Hugging Face folder, on the CPU. Errors as for `meta_policy`."""
    policy = meta_policy(folder, dtype)
    read = policy.checkpoint.read
    materialize(policy, lambda name, parameter: read(name).to(parameter.dtype, copy=True))
    return policy


class Rounding:
    """How much of training's changes saving keeps, summed tensor by tensor: a change of less than
    half the spacing of the file's numbers is rounded away."""

    def __init__(self, policy: Policy):
        self.start = policy.checkpoint  # None: the policy comes from no folder
        self.trained = lora.trained_weights(policy.model)
        self.count = self.changed = 0
        self.change = self.lost = 0.0  # squared norms

    def add(self, name: str, exact: Tensor, saved: Tensor) -> None:
        """exact: a weight as training left it; saved: the same weight as in the file."""
        if self.start is None or name not in self.trained:
            return
        for at in range(0, len(exact), ROUNDED_ROWS):
            part = slice(at, at + ROUNDED_ROWS)
            before = self.start.read(name, part).float()
            now, after = exact[part].float(), saved[part].float()
            self.count += now.numel()
            self.changed += int((after != before).sum())
            self.change += float((now - before).square().sum(dtype=torch.float64))
            self.lost += float((now - after).square().sum(dtype=torch.float64))

    def figures(self) -> dict[str, float]:
        """weights_changed: the share of trained weights whose saved value differs from the start's.
        rounding_lost: the norm of what rounding removed, over the norm of the whole change. Empty
        for a policy from no folder."""
        if not self.count:
            return {}
        lost = math.sqrt(self.lost / self.change) if self.change else 0.0
        return {"weights_changed": self.changed / self.count, "rounding_lost": lost}


def write_config(folder: Path, policy: Policy, dtype: torch.dtype) -> None:
    """config.json and generation_config.json for weights that are all of one dtype."""
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
    the tensors of the current file are held. All files are written to FOLDER/saving.tmp and then
    moved; the file that makes the weights loadable is last. So a kill at any moment leaves no
    incomplete checkpoint that loads.
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
        del tensor  # or the loop's variable would keep it while the next is made
        if held and sum(t.nbytes for t in held.values()) + saved.nbytes > shard_bytes:
            write()
        held[name] = saved
        total += saved.nbytes
    write()
    write_config(making, policy, dtype)
    processor.save(making)
    move_into(Path(folder), making, files, total)
    return rounding.figures()


def move_into(folder: Path, making: Path, files: list[list[str]], total: int) -> None:
    """Replaces an older checkpoint by the files in `making`. files: the keys of its weight files,
    which are named 0, 1 and so on; total: the bytes of all tensors."""
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
