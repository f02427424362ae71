"""Everything that turns a prompt into text, behind one small interface: y_1 ... y_n ~ M(. | q, I).

    engine = open_engine("hf:runs/demo/sft/merged", Setup())
    for replies in engine.answer(asks, Sampling(temperature=0.95, top_p=0.95, max_tokens=4096)): ...

    spec                       what answers
    hf:PATH                    a local checkpoint, sampled in plain PyTorch (decode.py)
    vllm:PATH                  a local checkpoint, sampled by vLLM: one process a GPU, or a GPU group (--tensor-parallel)
    http(s)://HOST/v1#MODEL    any server that speaks OpenAI's chat completions: `vllm serve`, GPT-4o, DeepSeek-R1, Qwen3, ...
    gemini:NAME                Google's API (both in remote.py)
    clinic:ROLE                the miniature's teachers, experts and judge

With hf: and vllm: a question's eighth answer is asked for in the same way whether alone, in a batch, or after a restart.

Where we depart from the paper, or it is silent:
  1. It samples its own checkpoints with vLLM; hf: is for reading and for machines without.
  2. One picture of an image: hf: and vllm: cut it as training does, and vllm: is held to training's token ids.
  3. hf: and vllm: tell each token's log-probability as training computes it, at temperature 1 over
     the whole vocabulary, whatever the sampling made of that. drift.py compares it with training's.
"""

import atexit
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import data
from asking import Ask, Engine, Reply, Sampling, Setup, Unavailable
from remote import ChatEngine, GeminiEngine

if TYPE_CHECKING:
    import model


def open_engine(spec: str, setup: Setup) -> Engine:
    """The engine that a spec names. Raises Unavailable for a spec that is unknown or lacks something, with what to do."""
    kind, _, rest = spec.partition(":")
    if kind == "clinic":
        return ClinicEngine(spec, rest)
    if kind in ("http", "https"):
        return ChatEngine(spec, setup)
    if kind == "gemini":
        return GeminiEngine(spec, rest, setup)
    if kind not in ("hf", "vllm"):
        raise Unavailable(f"{spec}: unknown engine; a spec is hf:PATH, vllm:PATH, http://HOST/v1#MODEL, gemini:NAME or clinic:ROLE")
    groups = gpu_groups(setup.tensor_parallel)
    replicas = setup.replicas or max(1, len(groups))
    if replicas > 1:
        return Replicas(spec, setup, (groups or [""] * replicas)[:replicas])
    return open_local(spec, setup)


def open_local(spec: str, setup: Setup) -> "HFEngine | VLLMEngine":
    """A local checkpoint in this process."""
    kind, _, rest = spec.partition(":")
    return HFEngine(spec, rest, setup) if kind == "hf" else VLLMEngine(spec, rest, setup)


class ClinicEngine:
    """The miniature's roles. They reply with text, like any remote engine, and no token ids."""

    def __init__(self, spec: str, role: str):
        import clinic

        if role not in clinic.ROLES:
            raise Unavailable(f"{spec}: is not a role of the clinic; known are {', '.join(clinic.ROLES)}")
        self.spec, self.role, self.tally = spec, role, Counter()

    def answer(self, asks: list[Ask], sampling: Sampling) -> Iterator[list[Reply]]:
        import clinic

        for ask in asks:
            seeds = [data.sample_seed(sampling.seed, ask.id, k) for k in ask.samples]
            try:
                said = [clinic.answer(self.role, ask.messages, ask.images, seed) for seed in seeds]
            except (StopIteration, LookupError, AttributeError, TypeError, ValueError):  # whatever it looks for
                raise data.RowError(f"{self.spec}: {ask.id} is no question of the clinic, and its roles know no other") from None
            yield [Reply(ask.id, k, text, None, "stop", seed) for k, text, seed in zip(ask.samples, said, seeds)]


# ---------------------------------------------------------------------------------------------------------------
# Local checkpoints


def overlong(ask: Ask, sampling: Sampling) -> list[Reply]:
    """What a prompt gets that leaves no room for an answer: nothing is cut off, and whoever counts counts it as wrong."""
    return [Reply(ask.id, k, "", [], "overlong", data.sample_seed(sampling.seed, ask.id, k)) for k in ask.samples]


MEMORY = 0.6  # ours: of the free memory, for keys and values; the rest is for one step's logits


def free_memory(device: "torch.device") -> int:
    """Bytes that are free: of the GPU with what torch keeps for later, or of this machine."""
    import torch

    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:  # Linux; what holds files for later counts as free
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0])
    except OSError:  # elsewhere: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def together(sizes: list[tuple[int, int]], max_tokens: int, most: int, room: int) -> int:
    """How many of the first questions go into one batch: at most `most`, and `room` tokens in all.
    sizes: (prompt tokens, samples) of each. A row is as long as the longest prompt and the longest
    answers that all samples of a question may have."""
    longest = samples = 0
    for count, (length, wanted) in enumerate(sizes[:most]):
        longest, samples = max(longest, length), max(samples, wanted)
        if (count + 1) * (longest + samples * max_tokens) > room:
            return count
    return min(most, len(sizes))


class HFEngine:
    """A local checkpoint in plain PyTorch and transformers' modules."""

    def __init__(self, spec: str, folder: str, setup: Setup):
        import torch

        import model

        self.spec, self.batch, self.tally = spec, setup.batch, Counter()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length: at every step
        self.share = MEMORY  # processes on one machine's CPU share its memory
        if self.device.type == "cpu":
            self.share /= max(1, setup.replicas)
        self.processor = model.Processor(folder, setup.pixels, setup.tiles)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.policy = model.load_policy(folder, dtype).to(self.device)

    def answer(self, asks: list[Ask], sampling: Sampling) -> Iterator[list[Reply]]:
        """A question's replies when the last of them ends, and an empty list once a second. Raises
        Unavailable where memory does not do."""
        import torch

        told = time.perf_counter()
        try:
            for sampled, replies in self.steps(asks, sampling):
                now = time.perf_counter()
                self.tally["tokens"] += sampled
                if replies or now - told >= 1:
                    told = now
                    yield replies
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                remedy = f"lower --batch ({self.batch}), which keeps what is answered"
                raise Unavailable(
                    f"{self.spec}: out of memory; {remedy}, "
                    f"or --max-tokens ({sampling.max_tokens}) or the samples a question (-n)"
                ) from None
            raise

    def steps(self, asks: list[Ask], sampling: Sampling) -> Iterator[tuple[int, list[Reply]]]:
        """(tokens just sampled, replies just ended). Questions are encoded as they are reached, and
        batched with others of about the same prompt length."""
        from decode import token_bytes

        room = int(self.share * free_memory(self.device)) // token_bytes(self.policy)
        samples = max((len(ask.samples) for ask in asks), default=1)
        least = [(0, samples)] * max(1, self.batch // samples)  # rows, as if prompts were nothing
        rows = self.fit(least, sampling, len(least), room)
        window = 16 * rows  # few enough to hold their images, enough to find like lengths
        context = self.processor.config.get_text_config().max_position_embeddings
        for at in range(0, len(asks), window):
            encoded = []
            for ask in asks[at : at + window]:
                prompt = self.encode(ask)
                fits = len(prompt.ids) < context
                encoded += [(ask, prompt)] if fits else []
                yield 0, [] if fits else overlong(ask, sampling)
            encoded.sort(key=lambda item: len(item[1].ids))
            while encoded:
                sizes = [(len(prompt.ids), len(ask.samples)) for ask, prompt in encoded]
                count = self.fit(sizes, sampling, rows, room)
                yield from self.sample(encoded[:count], sampling)
                del encoded[:count]

    def fit(self, sizes: list[tuple[int, int]], sampling: Sampling, most: int, room: int) -> int:
        """`together`. Raises Unavailable where not even the first question has room."""
        from decode import token_bytes

        count = together(sizes, sampling.max_tokens, most, room)
        if not count:
            prompt, samples = sizes[0]
            needed, one = prompt + samples * sampling.max_tokens, token_bytes(self.policy) / 1e9
            raise Unavailable(
                f"{self.spec}: out of memory before it begins: {samples} answers of up to "
                f"{sampling.max_tokens} tokens to one question need {needed * one:.1f} GB for keys "
                f"and values, and {room * one:.1f} GB of what is free may be taken for them; "
                "lower --max-tokens, or the samples a question (-n)"
            )
        return count

    def encode(self, ask: Ask) -> "model.Segment":
        images = [self.processor.encode_file(path) for path in ask.images]
        return self.processor.encode_prompt(ask.messages, images)

    def sample(
        self, group: "list[tuple[Ask, model.Segment]]", sampling: Sampling
    ) -> Iterator[tuple[int, list[Reply]]]:
        """All samples of a few questions together, as `steps`."""
        import torch

        from decode import decode_trees, uniforms

        most = max(len(ask.samples) for ask, _ in group)
        seeds = []
        for ask, _ in group:
            # one that wants fewer samples than others repeats its last; the copies are dropped
            wanted = list(ask.samples) + [ask.samples[-1]] * (most - len(ask.samples))
            seeds.append([data.sample_seed(sampling.seed, ask.id, k) for k in wanted])
        draws = [[uniforms(seed, sampling.max_tokens) for seed in row] for row in seeds]
        draws = torch.stack([torch.stack(row) for row in draws]).to(self.device)
        prompts = [prompt for _, prompt in group]
        for sampled, ended in decode_trees(
            self.policy, self.processor, prompts, draws, sampling.temperature, sampling.top_p
        ):
            replies = []
            for row, responses in ended.items():
                ask = group[row][0]
                for k, (ids, logps), seed in zip(ask.samples, responses, seeds[row]):
                    finish = "stop" if ids[-1] == self.processor.stop_id else "length"
                    text = self.processor.decode(ids)
                    told = Reply(ask.id, k, text, ids, finish, seed, token_logps=logps)
                    replies.append(told)
            yield sampled, replies


class VLLMEngine:
    """A local checkpoint sampled by vLLM. Each sample is a request with its own seed; the samples of a question share its
    prompt through vLLM's prefix cache. Answers are handed on one by one as they end, so a long one holds nobody up."""

    LENGTH = 32768  # ours: most tokens of prompt and response; the models allow more, at the price of memory
    IMAGES = 8  # ours: most images of a question; the benchmarks have up to seven

    def __init__(self, spec: str, folder: str, setup: Setup):
        try:
            from vllm import EngineArgs, LLMEngine
        except ImportError:
            raise Unavailable(f"{spec}: vLLM is not installed; pip install -r requirements-gpu.txt, or use hf:{folder}") from None
        import torch

        import model

        self.spec, self.batch, self.tally = spec, setup.batch, Counter()
        self.processor = model.Processor(folder, setup.pixels, setup.tiles)
        self.never = {index: -100.0 for index in self.processor.special.values() if index != self.processor.stop_id}
        if self.processor.family.grid_positions:
            size = self.processor.images.size
            cut = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        else:
            cut = {"crop_to_patches": setup.tiles > 1, "min_patches": 1, "max_patches": setup.tiles}
        self.length = min(self.LENGTH, self.processor.config.text_config.max_position_embeddings)
        settings = EngineArgs(
            model=folder, dtype="bfloat16" if torch.cuda.is_available() else "float32", tensor_parallel_size=setup.tensor_parallel,
            max_model_len=self.length, max_num_seqs=setup.batch,
            limit_mm_per_prompt={"image": self.IMAGES, "video": 0}, mm_processor_kwargs=cut, disable_log_stats=True,
            enforce_eager=not torch.cuda.is_available(),  # on a CPU compiling takes minutes and gains nothing
            generation_config="vllm",  # a checkpoint's own file would bring a top-k and a repetition penalty along unseen
            logprobs_mode="raw_logprobs",  # before bias, temperature and top-p, as in training
        )  # fmt: skip
        self.engine = LLMEngine.from_engine_args(settings)

    def prompt(self, ask: Ask) -> tuple[dict, list[int]]:
        """(what vLLM is given, the ids it must make of that): an image stands as a single mark, which vLLM spreads out."""
        from images import load_image

        images = [load_image(path) for path in ask.images]
        encoded = self.processor.encode_prompt(ask.messages, [self.processor.encode_image(image) for image in images])
        marked = self.processor.tokenize(self.processor.render(ask.messages, [1] * len(images)))
        if not self.processor.family.grid_positions:  # vLLM writes InternVL's <img> and </img> itself
            frame = {self.processor.special["<img>"], self.processor.special["</img>"]}
            marked = [token for token in marked if token not in frame]
        prompt = {"prompt_token_ids": marked}
        return (prompt | {"multi_modal_data": {"image": images}} if images else prompt), encoded.ids

    def answer(self, asks: list[Ask], sampling: Sampling) -> Iterator[list[Reply]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        waiting, running = iter(asks), {}
        while True:
            while len(running) < self.batch and (ask := next(waiting, None)):
                prompt, expected = self.prompt(ask)
                if len(expected) >= self.length:
                    yield overlong(ask, sampling)
                    continue
                for k in ask.samples:
                    seed = data.sample_seed(sampling.seed, ask.id, k)
                    params = SamplingParams(
                        temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens, seed=seed % 2**63,
                        stop_token_ids=[self.processor.stop_id], logit_bias=self.never, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
                        logprobs=0,  # of the sampled token and of no other
                    )  # fmt: skip
                    self.engine.add_request(f"{ask.id}/{k}", prompt, params)
                    running[f"{ask.id}/{k}"] = (ask.id, k, seed, expected)
            if not running:
                return
            replies = []
            for output in self.engine.step():
                if not output.finished:
                    continue
                id, k, seed, expected = running.pop(output.request_id)
                if list(output.prompt_token_ids) != expected:
                    raise Unavailable(f"{self.spec}: vLLM made {len(output.prompt_token_ids)} prompt tokens of question {id}, training makes {len(expected)}: their image settings differ")
                answer = output.outputs[0]
                ids = list(answer.token_ids)
                told = zip(ids, answer.logprobs, strict=True)
                logps = [of[token].logprob for token, of in told]
                finish = "stop" if ids and ids[-1] == self.processor.stop_id else "length"
                self.tally["tokens"] += len(ids)
                text = self.processor.decode(ids)
                replies.append(Reply(id, k, text, ids, finish, seed, token_logps=logps))
            if replies:
                yield replies


def gpu_groups(size: int) -> list[str]:
    """The visible GPUs in groups of `size`, each as a value of CUDA_VISIBLE_DEVICES; [] on a machine without."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(str(index) for index in range(torch.cuda.device_count()))
    gpus = [gpu for gpu in visible.split(",") if gpu]
    return [",".join(gpus[at : at + size]) for at in range(0, len(gpus) - size + 1, size)]


class Replicas:
    """The same local engine in several processes, each on its own GPUs and with its own share of the questions. Replies come
    back here as they end, so that there is one file, one progress bar, and one thing to resume."""

    def __init__(self, spec: str, setup: Setup, groups: list[str]):
        from multiprocessing import get_context

        self.spec, self.tally, self.pipes, self.processes = spec, Counter(), [], []
        self.tallies = [Counter() for _ in groups]
        context = get_context("spawn")  # CUDA does not survive a fork
        for group in groups:
            mine, theirs = context.Pipe()
            self.processes.append(context.Process(target=replica, args=(spec, setup, group, theirs)))
            self.processes[-1].start()
            theirs.close()  # so that the pipe breaks when either side dies, and neither outlives the other
            self.pipes.append(mine)
        atexit.register(self.close)

    def close(self) -> None:
        """Ends the processes, which frees their GPUs for another engine."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join()

    def answer(self, asks: list[Ask], sampling: Sampling) -> Iterator[list[Reply]]:
        """Also the empty lists of the replicas."""
        from multiprocessing.connection import wait

        for number, pipe in enumerate(self.pipes):
            pipe.send((asks[number :: len(self.pipes)], sampling))
        busy = list(self.pipes)
        while busy:
            for pipe in wait(busy):
                try:
                    message = pipe.recv()
                except EOFError:
                    message = "its process died"
                if message is None:
                    busy.remove(pipe)
                elif isinstance(message, str):
                    which = f"replica {self.pipes.index(pipe)} of {len(self.pipes)}"
                    raise Unavailable(f"{self.spec}: {which}: {message}; the same command goes on")
                else:
                    replies, self.tallies[self.pipes.index(pipe)] = message
                    self.tally = sum(self.tallies, Counter())
                    yield replies


def replica(spec: str, setup: Setup, gpus: str, pipe) -> None:
    """A worker of Replicas. In: (asks, sampling); out: (replies, its tally) again and again, then
    None, or a text that says what went wrong."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    try:
        engine = open_local(spec, setup)
        while True:
            asks, sampling = pipe.recv()
            for replies in engine.answer(asks, sampling):
                pipe.send((replies, engine.tally))
            pipe.send(None)
    except (EOFError, BrokenPipeError):
        pass  # the other side has gone
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
