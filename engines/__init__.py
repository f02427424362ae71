"""Everything that turns a prompt into text, behind one small interface: y_1 ... y_n ~ M(. | q, I).

    engine = open_engine("hf:runs/demo/sft/merged", Setup())
    for completions in engine.answer(requests, Sampling(temperature=0.95, top_p=0.95,
                                                        max_tokens=4096)): ...

    spec                       what answers
    hf:PATH                    a local checkpoint, sampled in plain PyTorch (decode.py)
    vllm:PATH                  a local checkpoint, sampled by vLLM: one process for each GPU, or for
                               each group of GPUs (--tensor-parallel)
    http(s)://HOST/v1#MODEL    a server with OpenAI's chat completions: `vllm serve`, GPT-4o,
                               DeepSeek-R1, Qwen3, ...
    gemini:NAME                Google's API (both in apis.py)
    clinic:ROLE                the miniature's teachers, experts and judge

With hf: and vllm: a question's eighth answer has the same seed alone, in a batch and after a stop.

Where we depart from the paper, or it is silent:
  1. It samples its checkpoints with vLLM; hf: is for reading and for machines without vLLM.
  2. hf: and vllm: cut images as training does, and vllm: is held to training's token ids.
  3. hf: and vllm: give each token's log-probability as training computes it: at temperature 1 over
     the whole vocabulary, however it was sampled. drift.py compares it with training's.
"""

import atexit
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import data
from engines.apis import ChatEngine, GeminiEngine
from engines.inference import Completion, Engine, Request, Sampling, Setup, Unavailable, checkpoint

if TYPE_CHECKING:
    import torch

    import model


class ClinicEngine(Engine):
    """The miniature's roles. Like a remote engine they give text and no token ids."""

    def __init__(self, spec: str, setup: Setup):
        from clinic import roles

        role = spec.partition(":")[2]
        if role not in roles.ROLES:
            known = ", ".join(roles.ROLES)
            raise Unavailable(f"{spec}: is not a role of the clinic; known are {known}")
        self.spec, self.role, self.roles, self.tally = spec, role, roles, Counter()

    def answer(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        """Raises RowError for a question that is not of the clinic."""
        for request in requests:
            completions = []
            for k in request.samples:
                seed = data.sample_seed(sampling.seed, request.id, k)
                try:
                    text = self.roles.answer(self.role, request.messages, request.images, seed)
                except (StopIteration, LookupError, AttributeError, TypeError, ValueError) as error:
                    why = "is no question of the clinic, and its roles know no other"
                    raise data.RowError(f"{self.spec}: {request.id} {why}") from error
                completions.append(Completion(request.id, k, text, None, "stop", seed))
            yield completions


# --------------------------------------------------------------------------------------------------
# Local checkpoints

MEMORY = 0.6  # ours: share of free memory for keys and values; the rest is for one step's logits


def overlong(request: Request, sampling: Sampling) -> list[Completion]:
    """Completions of a prompt that leaves no room for any: not truncated, it counts as wrong."""
    seeds = [(k, data.sample_seed(sampling.seed, request.id, k)) for k in request.samples]
    return [Completion(request.id, k, "", [], "overlong", seed) for k, seed in seeds]


def free_memory(device: "torch.device") -> int:
    """Free bytes of the GPU, with what torch keeps in reserve, or of this machine."""
    import torch

    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:  # Linux; the file cache counts as free
        memory = Path("/proc/meminfo").read_text()
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", memory)[1])
    except OSError:  # elsewhere: all memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def local_completion(
    processor: "model.Processor", id: str, k: int, ids: list[int], seed: int, logps: list[float]
) -> Completion:
    finish = "stop" if ids and ids[-1] == processor.stop_id else "length"
    return Completion(id, k, processor.decode(ids), ids, finish, seed, "", logps)


class HFEngine(Engine):
    """A local checkpoint in plain PyTorch and transformers' modules."""

    SAMPLES = 256  # ours: at once; fewer where memory is short

    def __init__(self, spec: str, setup: Setup):
        import torch

        import hub
        import model

        folder = checkpoint(spec)
        self.spec, self.batch, self.tally = spec, setup.batch or self.SAMPLES, Counter()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # cuDNN would plan anew for each length, so at every step
        torch.backends.cuda.enable_cudnn_sdp(False)
        # replicas on one CPU share its memory
        self.share = MEMORY / (max(1, setup.replicas) if self.device.type == "cpu" else 1)
        self.processor = model.Processor(folder, setup.pixels, setup.tiles)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.policy = hub.load_policy(folder, dtype).to(self.device)

    def close(self) -> None:
        import torch

        self.policy = None
        torch.cuda.empty_cache()

    def answer(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        """A question's completions when the last of them ends, and an empty list once a second.
        Raises Unavailable where memory runs out."""
        import torch

        shown = time.perf_counter()
        try:
            for sampled, completions in self.steps(requests, sampling):
                now = time.perf_counter()
                self.tally["tokens"] += sampled
                if completions or now - shown >= 1:
                    shown = now
                    yield completions
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "CPUAllocator" not in str(error):
                raise
            raise Unavailable(
                f"{self.spec}: out of memory; lower --batch ({self.batch}), which keeps what is "
                f"answered, or --max-tokens ({sampling.max_tokens}) or the samples a question (-n)"
            ) from None

    def steps(
        self, requests: list[Request], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(tokens just sampled, completions just ended), batch by batch: questions of similar
        length, as many as fit into memory if every answer is as long as it may be, or one."""
        from engines.decode import token_bytes

        room = int(self.share * free_memory(self.device)) // token_bytes(self.policy)  # tokens
        samples = max((len(request.samples) for request in requests), default=1)
        context = self.processor.config.get_text_config().max_position_embeddings
        group, longest = [], 0
        for request in sorted(requests, key=lambda one: (len(one.images), len(str(one.messages)))):
            prompt = self.encode(request)
            if len(prompt.ids) >= context:
                yield 0, overlong(request, sampling)
                continue
            yield 0, []  # encoding images takes time, too
            longest, count = max(longest, len(prompt.ids)), len(group) + 1
            row = longest + samples * sampling.max_tokens
            if group and (count * samples > self.batch or count * row > room):
                yield from self.sample(group, sampling)
                group, longest = [], len(prompt.ids)
            group.append((request, prompt))
        if group:
            yield from self.sample(group, sampling)

    def encode(self, request: Request) -> "model.Segment":
        images = [self.processor.encode_file(path) for path in request.images]
        return self.processor.encode_prompt(request.messages, images)

    def sample(
        self, group: "list[tuple[Request, model.Segment]]", sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """All samples of a few questions together; yields as `steps`."""
        import torch

        from engines.decode import decode_trees, uniforms

        most = max(len(request.samples) for request, _ in group)
        seeds = []
        for request, _ in group:
            # a question with fewer samples repeats its last one; the copies are dropped
            wanted = list(request.samples) + [request.samples[-1]] * (most - len(request.samples))
            seeds.append([data.sample_seed(sampling.seed, request.id, k) for k in wanted])
        draws = [
            torch.stack([uniforms(seed, sampling.max_tokens) for seed in row]) for row in seeds
        ]
        draws, prompts = torch.stack(draws).to(self.device), [prompt for _, prompt in group]
        how = (draws, sampling.temperature, sampling.top_p)
        for sampled, ended in decode_trees(self.policy, self.processor, prompts, *how):
            completions = []
            for row, responses in ended.items():
                request = group[row][0]
                for k, (ids, logps), seed in zip(request.samples, responses, seeds[row]):
                    one = local_completion(self.processor, request.id, k, ids, seed, logps)
                    completions.append(one)
            yield sampled, completions


class VLLMEngine(Engine):
    """A local checkpoint sampled by vLLM. Each sample is a request with its own seed, yielded when
    it ends. The samples of a question share its prompt through vLLM's prefix cache."""

    # ours: most tokens of prompt and response; the models allow more, which costs memory
    LENGTH = 32768
    IMAGES = 8  # ours: most images of a question; the benchmarks have up to seven
    # ours: at once (vLLM's own number for a GPU of 80 GB); what its KV cache cannot hold, waits
    SAMPLES = 1024

    def __init__(self, spec: str, setup: Setup):
        folder = checkpoint(spec)
        try:
            from vllm import EngineArgs, LLMEngine
        except ImportError:
            remedy = f"pip install -r requirements-gpu.txt, or use hf:{folder}"
            raise Unavailable(f"{spec}: vLLM is not installed; {remedy}") from None
        import torch

        import model

        self.spec, self.batch, self.tally = spec, setup.batch or self.SAMPLES, Counter()
        self.processor = model.Processor(folder, setup.pixels, setup.tiles)
        never = set(self.processor.special.values()) - {self.processor.stop_id}
        self.bias = dict.fromkeys(never, -100.0)
        if self.processor.family.grid_positions:
            size = self.processor.images.size
            cut = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        else:
            cut = {"crop_to_patches": setup.tiles > 1, "min_patches": 1, "max_patches": setup.tiles}
        self.length = min(self.LENGTH, self.processor.config.text_config.max_position_embeddings)
        settings = EngineArgs(
            model=folder,
            dtype="bfloat16" if torch.cuda.is_available() else "float32",
            tensor_parallel_size=setup.tensor_parallel,
            max_model_len=self.length,
            max_num_seqs=self.batch,
            limit_mm_per_prompt={"image": self.IMAGES, "video": 0},
            mm_processor_kwargs=cut,
            disable_log_stats=True,
            # on a CPU compiling takes minutes and gains nothing
            enforce_eager=not torch.cuda.is_available(),
            # else a checkpoint's own file could set a top-k and a repetition penalty
            generation_config="vllm",
            logprobs_mode="raw_logprobs",  # before bias, temperature and top-p, as in training
        )
        self.engine = LLMEngine.from_engine_args(settings)

    def close(self) -> None:
        self.engine.engine_core.shutdown()

    def prompt(self, request: Request) -> tuple[dict, list[int]]:
        """(vLLM's input, the token ids it must make). An image is one mark, which vLLM expands."""
        from command.images import load_image

        images = [load_image(path) for path in request.images]
        shown = [self.processor.encode_image(image) for image in images]
        encoded = self.processor.encode_prompt(request.messages, shown)
        marked = self.processor.tokenize(self.processor.render(request.messages, [1] * len(images)))
        # vLLM adds InternVL's <img> and </img> itself
        if not self.processor.family.grid_positions:
            frame = {self.processor.special["<img>"], self.processor.special["</img>"]}
            marked = [token for token in marked if token not in frame]
        prompt = {"prompt_token_ids": marked}
        return (prompt | {"multi_modal_data": {"image": images}} if images else prompt), encoded.ids

    def answer(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        """Raises Unavailable where vLLM's prompt is not training's."""
        waiting, running = iter(requests), {}
        while True:
            while len(running) < self.batch and (request := next(waiting, None)):
                prompt, expected = self.prompt(request)
                if len(expected) >= self.length:
                    yield overlong(request, sampling)
                    continue
                for k in request.samples:
                    name, seed = f"{request.id}/{k}", data.sample_seed(sampling.seed, request.id, k)
                    self.engine.add_request(name, prompt, self.params(sampling, seed))
                    running[name] = (request.id, k, seed, expected)
            if not running:
                return
            ended = [output for output in self.engine.step() if output.finished]
            if ended:
                yield [self.completion(output, *running.pop(output.request_id)) for output in ended]

    def params(self, sampling: Sampling, seed: int):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=seed,
            stop_token_ids=[self.processor.stop_id],
            logit_bias=self.bias,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            logprobs=0,  # of the sampled token only
        )

    def completion(self, output, id: str, k: int, seed: int, expected: list[int]) -> Completion:
        made = list(output.prompt_token_ids)
        if made != expected:
            lengths = f"vLLM made {len(made)} prompt tokens, training makes {len(expected)}"
            why = f"question {id}: {lengths}: their image settings differ"
            raise Unavailable(f"{self.spec}: {why}")
        ids = list(output.outputs[0].token_ids)
        logprobs = zip(ids, output.outputs[0].logprobs, strict=True)
        logps = [of[token].logprob for token, of in logprobs]
        self.tally["tokens"] += len(ids)
        return local_completion(self.processor, id, k, ids, seed, logps)


def gpu_groups(size: int) -> list[str]:
    """Visible GPUs in groups of `size`, as values of CUDA_VISIBLE_DEVICES; [] without GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(str(index) for index in range(torch.cuda.device_count()))
    gpus = [gpu for gpu in visible.split(",") if gpu]
    return [",".join(gpus[at : at + size]) for at in range(0, len(gpus) - size + 1, size)]


class Replicas(Engine):
    """The same local engine in several processes, each with its own GPUs and share of the
    questions. All completions come back here: one file, one progress bar, one thing to resume."""

    def __init__(self, spec: str, setup: Setup, groups: list[str]):
        from multiprocessing import get_context

        self.spec, self.tally, self.pipes, self.processes = spec, Counter(), [], []
        context = get_context("spawn")  # CUDA does not work after a fork
        for group in groups:
            ours, theirs = context.Pipe()
            process = context.Process(target=replica, args=(spec, setup, group, theirs))
            process.start()
            theirs.close()  # so that the pipe breaks when either side dies, and the other ends too
            self.processes.append(process)
            self.pipes.append(ours)
        atexit.register(self.close)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join()

    def answer(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        """Also yields the empty lists of the replicas."""
        from multiprocessing.connection import wait

        for number, pipe in enumerate(self.pipes):
            with suppress(ConnectionError):  # it ended while it loaded; why is read below
                pipe.send((requests[number :: len(self.pipes)], sampling))
        busy = list(self.pipes)
        while busy:
            for pipe in wait(busy):
                number = self.pipes.index(pipe)
                try:
                    message = pipe.recv()
                except (EOFError, OSError):  # OSError: in the middle of a message
                    message = "its process died"
                if message is None:
                    busy.remove(pipe)
                elif isinstance(message, str):
                    which = f"replica {number} of {len(self.pipes)}"
                    raise Unavailable(f"{self.spec}: {which}: {message}; the same command goes on")
                else:
                    completions, new = message
                    self.tally.update(new)
                    yield completions


def replica(spec: str, setup: Setup, gpus: str, pipe) -> None:
    """A worker of Replicas. It receives (requests, sampling), sends (completions, what its tally
    grew by) again and again, then None, or a text that says what went wrong."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    try:
        engine = ENGINES[spec.partition(":")[0]](spec, setup)
        while True:
            requests, sampling = pipe.recv()
            for completions in engine.answer(requests, sampling):
                pipe.send((completions, engine.tally))
                engine.tally.clear()
            pipe.send(None)
    except (EOFError, ConnectionError):
        pass  # the other side has ended
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


# --------------------------------------------------------------------------------------------------
# Opening

ENGINES = {
    "hf": HFEngine, "vllm": VLLMEngine, "http": ChatEngine, "https": ChatEngine,
    "gemini": GeminiEngine, "clinic": ClinicEngine,
}  # fmt: skip


def open_engine(spec: str, setup: Setup) -> Engine:
    """The engine that a spec names. Raises Unavailable, with what to do, for a spec that is unknown
    or lacks something."""
    kind = spec.partition(":")[0]
    if kind not in ENGINES:
        known = "hf:PATH, vllm:PATH, http://HOST/v1#MODEL, gemini:NAME or clinic:ROLE"
        raise Unavailable(f"{spec}: unknown engine; a spec is {known}")
    if checkpoint(spec) is not None:
        size = setup.tensor_parallel if kind == "vllm" else 1
        groups = gpu_groups(size)
        replicas = setup.replicas or max(1, len(groups))
        if groups and replicas > len(groups):
            raise Unavailable(
                f"{spec}: --replicas {replicas}: there are {len(groups)} x {size} GPUs"
            )
        if replicas > 1:
            return Replicas(spec, setup, groups[:replicas] or [""] * replicas)
    return ENGINES[kind](spec, setup)


def check_remote(specs: Iterable[str], setup: Setup) -> None:
    """Raises Unavailable, before anything is asked, for an engine without a key or a server that
    does not answer. A local model is loaded only when its turn comes."""
    for spec in specs:
        if checkpoint(spec) is None:
            open_engine(spec, setup).close()
