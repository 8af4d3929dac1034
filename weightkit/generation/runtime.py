"""Text from a checkpoint on this machine: one prompt, or many that share each reading of the weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.direct import measure_read_rate
from weightkit.compute.engines import DeviceName, cuda_errors
from weightkit.errors import GenerationError, NonFiniteError, SpaceError, TokenizerError, WeightkitError, raise_all
from weightkit.family import Architecture
from weightkit.generation.memory import Budget, divide
from weightkit.generation.passes import run_pass
from weightkit.generation.plan import GenerationPlan, estimate, expected_expert_bytes
from weightkit.generation.prompts import Prompt
from weightkit.generation.result import Generation, StoppedBy, render_hits
from weightkit.generation.sampling import Sampling
from weightkit.generation.tokenizer import TextStream, Tokenizer
from weightkit.layouts import open_checkpoint, rank_share
from weightkit.model import AfterLayer, CheckpointWeights, LatentCache, Model, Parallel
from weightkit.model.stores import CacheUse
from weightkit.progress import Progress
from weightkit.ranks.ranks import Ranks
from weightkit.units import human_bytes

PREFILL_TOKENS = 4096
"""Prompt tokens of a sequence that go through a layer's attention at once."""

PASS_TOKENS = 65_536
"""Tokens of prompts and answers that share a pass: more prompts go in several, one after the other. Their caches are
4.6 GB at DeepSeek-V3's widths in BF16, their hidden states 1 GB."""

GENERATION_CONFIG_NAME = "generation_config.json"


@dataclass
class _Run:
    """The state of one generation. ``number``: of the prompt among several, from 1."""

    prompt_ids: tuple[int, ...]
    room: int
    sampling: Sampling
    cache: LatentCache
    generator: torch.Generator
    text: TextStream | None
    number: int | None = None
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    stopped_by: StoppedBy | None = None
    times: list[float] = field(default_factory=list)

    def draw(self, logits: torch.Tensor) -> int:
        """The next token's id from logits [vocab] F32."""
        return self.sampling.choose(logits, self.generator)

    def take(self, token: int, eos_ids: frozenset[int]) -> str:
        """Add a token. The text that it completes."""
        self.token_ids.append(token)
        self.times.append(time.perf_counter())
        piece = ""
        if token in eos_ids:
            self.stopped_by = "eos"
        else:
            piece = self.text.push(token) if self.text is not None else ""
            if len(self.token_ids) == self.room:
                self.stopped_by = "length"
        return self._add(piece)

    def finish(self) -> str:
        """Text that was held back, an incomplete character say."""
        return self._add(self.text.finish() if self.text is not None else "")

    def _add(self, piece: str) -> str:
        if piece:
            self.pieces.append(piece)
        return piece


class Stream:
    """Pieces of text as they are generated; ``result`` holds the whole once they are through."""

    def __init__(self, runtime: Runtime, run: _Run, progress: bool) -> None:
        self._runtime = runtime
        self._run = run
        self._pieces = self._generate(progress)
        self._result: Generation | None = None

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def result(self) -> Generation:
        """The finished generation; what is left of it is generated first."""
        for _ in self._pieces:
            pass
        if self._result is None:
            raise GenerationError("this generation was cut short and has no result")
        return self._result

    def _generate(self, progress: bool) -> Iterator[str]:
        runtime, run, started = self._runtime, self._run, time.perf_counter()
        before = runtime.weights.cache_use
        logits = runtime.prefill(run.prompt_ids, run.cache, progress=progress)
        while True:
            token = runtime.agree([run.draw(logits)])[0]
            if piece := run.take(token, runtime.eos_ids):
                yield piece
            if run.stopped_by is not None:
                break
            logits = runtime.step(token, run.cache, len(run.token_ids))
        if piece := run.finish():
            yield piece
        self._result = runtime.describe(run, started, before)


class Runtime:
    """A checkpoint opened for generation. Weights that were read stay for the next prompt while there is memory.

    Args:
        source: a path in any layout, or an opened checkpoint.
        device, dtype, memory_bytes, host_bytes, stream, jobs, dequantize: see ``CheckpointWeights``.
        gpu_memory: all that may be used of a GPU; what tokens take is set aside from it before a first weight is read,
            the rest is for weights. Not for a CPU, and not where ``memory_bytes`` is named.
        host_memory: the same of host memory: on a CPU for all, beside a GPU for weights and what reads them.
        ranks: of several processes, each has its share of the weights, and all must ask for the same. None: this one is
            alone.

    Attributes:
        model: the forward pass.
        weights: where its weights come from.
        tokenizer: None where the checkpoint has no usable one; then prompts are token ids.
        eos_ids: the tokens that end a text.
        max_tokens: most tokens of prompt and answer together.
        ranks: the processes that do the same with their shares of the weights.

    Raises:
        CheckpointError, FormatError, ConfigError, DeviceError: see ``open_checkpoint`` and ``CheckpointWeights``.
    """

    def __init__(
        self,
        source: str | Path | Checkpoint,
        *,
        device: DeviceName = "auto",
        dtype: str | None = None,
        memory_bytes: int | None = None,
        host_bytes: int | None = None,
        gpu_memory: int | None = None,
        host_memory: int | None = None,
        stream: bool | None = None,
        jobs: int | None = None,
        dequantize: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
        self.root = checkpoint.root
        self.ranks = Ranks() if ranks is None else ranks
        self.tokenizer, self._tokenizer_error = _try_tokenizer(checkpoint)
        self.weights = CheckpointWeights(
            checkpoint,
            device=device,
            dtype=dtype,
            memory_bytes=memory_bytes,
            host_bytes=host_bytes,
            stream=stream,
            jobs=jobs,
            dequantize=dequantize,
            share=None if self.ranks.size == 1 else partial(rank_share, rank=self.ranks.rank, mp=self.ranks.size),
        )
        self.model = Model(self.weights.arch, self.weights, parallel=Parallel(self.ranks))
        self.eos_ids = _eos_ids(checkpoint, self.tokenizer)
        self.max_tokens = _max_tokens(self.weights.arch)
        self._memory_bytes, self._host_bytes = memory_bytes, host_bytes
        self._gpu_memory, self._host_memory = gpu_memory, host_memory
        self._budget: Budget | None = None
        self._reserved: int | None = None

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the checkpoint's files."""
        self.weights.close()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        chat: bool | None = None,
        template_variables: Mapping[str, object] | None = None,
        progress: bool = False,
    ) -> Stream:
        """Start a generation. The request is checked now, the work is done while the stream is read.

        Args:
            prompt: text, token ids, or a conversation.
            max_new_tokens: most tokens to generate; the model's context may allow fewer.
            temperature, top_p, seed: see ``Sampling``.
            chat: whether text is put into the chat template as a user's message; None: if there is a template.
            template_variables: for the chat template, such as ``{"thinking": True}``.
            progress: show bytes and layers during the prompt's pass.

        Raises:
            GenerationError: a request that cannot be: an empty prompt, one longer than the model's context, ids outside
                the vocabulary, a sampling parameter out of range.
            TokenizerError: text for a checkpoint without tokenizer, or a chat template that fails.
            SpaceError: a memory budget that is too small.
            NonFiniteError: while reading the stream: NaN or Inf in logits.
            DeviceError: while reading the stream: the GPU failed, or its memory ran out.
        """
        sampling = Sampling(temperature, top_p, seed)
        ids = self.encode(prompt, chat=chat, template_variables=template_variables)
        self._check(ids, max_new_tokens)
        self._reserve(len(ids) + self._room(ids, max_new_tokens), 1)
        return Stream(self, self._start(ids, max_new_tokens, sampling), progress)

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """As ``stream``, at once."""
        return self.stream(prompt, **options).result

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        chat: bool | None = None,
        template_variables: Mapping[str, object] | None = None,
        progress: bool = False,
    ) -> list[Generation]:
        """Generate from many prompts that share passes, each layer's weights being read once for all of a pass.

        Each result is the prompt's own, as ``generate`` gives it: sampled with the same seed, stopped at its own end.
        In F32 that holds unless two logits are within about 1e-6 of each other; in BF16 answers may part where the best
        logits are about as close as BF16 is fine (see ``weightkit.generation.passes``).

        Arguments and errors as for ``stream``; all that is wrong with any prompt is raised at once, before any work.
        """
        sampling = Sampling(temperature, top_p, seed)
        all_ids = self.encode_many(
            prompts, max_new_tokens=max_new_tokens, chat=chat, template_variables=template_variables
        )
        results: list[Generation] = []
        for wave in self._waves(all_ids, max_new_tokens):
            runs = []
            for ids in wave:
                runs.append(self._start(ids, max_new_tokens, sampling))
                runs[-1].number = len(results) + len(runs)
            results += self._generate_together(runs, progress)
        return results

    def encode_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 1,
        chat: bool | None = None,
        template_variables: Mapping[str, object] | None = None,
    ) -> list[list[int]]:
        """The token ids of all prompts, checked. Raises as ``generate_many``."""
        found: list[list[int]] = []
        problems: list[WeightkitError] = []
        if not prompts:
            raise GenerationError("no prompts", where=self.root)
        for number, prompt in enumerate(prompts, start=1):
            try:
                ids = self.encode(prompt, chat=chat, template_variables=template_variables)
                self._check(ids, max_new_tokens)
                found.append(ids)
            except GenerationError as problem:
                if len(prompts) == 1 or problem is self._tokenizer_error:
                    raise
                problem.where = f"prompt {number}" + ("" if problem.where is None else f" for {problem.where}")
                problems.append(problem)
        raise_all("prompts that nothing can be generated from", problems, where=self.root)
        return found

    def plan(
        self, ids: Sequence[Sequence[int]], *, max_new_tokens: int = 128, measure: bool | None = None
    ) -> GenerationPlan:
        """What generating from these prompts' ids will read, and how memory is divided. Reads no weights.

        Args:
            measure: read from the checkpoint's files for a second, to say how long it takes; None: if weights are
                streamed.

        Raises:
            SpaceError: a memory budget that is too small; says the least that works.
        """
        waves, weights = self._waves(ids, max_new_tokens), self.weights
        if self._budget is None:
            raise GenerationError("weights were read before memory was divided", where=self.root)
        measure = weights.is_streamed if measure is None else measure
        return estimate(
            weights.arch,
            weights.sizes,
            self._budget,
            [[len(tokens) for tokens in wave] for wave in waves],
            dtype=_name(weights.dtype),
            device=weights.device.type,
            is_streamed=weights.is_streamed,
            multiplies_stored=weights.multiplies_stored,
            rate=measure_read_rate(weights.files, jobs=weights.jobs) if measure else None,
        )

    def encode(
        self, prompt: Prompt, *, chat: bool | None = None, template_variables: Mapping[str, object] | None = None
    ) -> list[int]:
        """The prompt's token ids. Arguments and errors as for ``stream``."""
        if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
            return [item for item in prompt if isinstance(item, int)]
        if self.tokenizer is None:
            raise self._tokenizer_error or TokenizerError("no tokenizer", where=self.root)
        if not isinstance(prompt, str):
            messages = [item for item in prompt if isinstance(item, Mapping)]
            return self.tokenizer.encode_chat(messages, template_variables)
        if chat or (chat is None and self.tokenizer.template is not None):
            return self.tokenizer.encode_chat([{"role": "user", "content": prompt}], template_variables)
        return self.tokenizer.encode(prompt)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], cache: LatentCache, *, progress: bool = False) -> torch.Tensor:
        """Logits [vocab] F32 after the prompt. Raises ``NonFiniteError``."""
        with self._shown(len(ids), progress) as watch:
            return self._logits([(ids, cache)], ["after the prompt"], watch)[0]

    @torch.inference_mode()
    def step(self, token: int, cache: LatentCache, number: int) -> torch.Tensor:
        """Logits [vocab] F32 after one more token, the ``number``-th new one. Raises ``NonFiniteError``."""
        return self._logits([([token], cache)], [f"after new token {number}"])[0]

    def agree(self, tokens: Sequence[int]) -> list[int]:
        """What rank 0 drew: ranks must go on with the same tokens."""
        return self.ranks.agree(tokens)

    def describe(self, run: _Run, started: float, before: CacheUse) -> Generation:
        """The record of a finished run, begun at ``started`` when ``before`` was the account of the cache."""
        return Generation(
            text="".join(run.pieces),
            token_ids=tuple(run.token_ids),
            prompt_ids=run.prompt_ids,
            stopped_by=run.stopped_by or "length",
            prefill_s=run.times[0] - started,
            decode_s=run.times[-1] - run.times[0],
            bytes_read=sum(self.ranks.everybodys(self.weights.bytes_read)),
            device=self.weights.device.type,
            dtype=_name(self.weights.dtype),
            cache=self.weights.cache_use.since(before),
            ranks=self.ranks.size,
        )

    def _generate_together(self, runs: list[_Run], progress: bool) -> list[Generation]:
        """The results of runs that share passes."""
        started, before = time.perf_counter(), self.weights.cache_use
        with self._shown(sum(len(run.prompt_ids) for run in runs), progress) as watch:
            logits = self._logits_of(runs, [run.prompt_ids for run in runs], watch)
        going, most = runs, max(run.room for run in runs)
        with Progress(most, "New tokens", shown=progress, unit="token", leave=False) as bar:
            while True:
                drawn = self.agree([run.draw(row) for run, row in zip(going, logits, strict=True)])
                for run, token in zip(going, drawn, strict=True):
                    run.take(token, self.eos_ids)
                bar.add(1)
                bar.note(
                    f"{human_bytes(self.weights.bytes_read)} read{render_hits(self.weights.cache_use.since(before))}"
                )
                going = [run for run in going if run.stopped_by is None]
                if not going:
                    break
                logits = self._logits_of(going, [run.token_ids[-1:] for run in going])
        for run in runs:
            run.finish()
        return [self.describe(run, started, before) for run in runs]

    @torch.inference_mode()
    def _logits_of(
        self, runs: Sequence[_Run], ids: Sequence[Sequence[int]], watch: AfterLayer | None = None
    ) -> torch.Tensor:
        """Logits [runs, vocab] F32 after ``ids`` more of each."""
        whens = []
        for run in runs:
            when = f"after new token {len(run.token_ids)}" if run.token_ids else "after the prompt"
            whens.append(when if run.number is None else f"{when} of prompt {run.number}")
        return self._logits([(tokens, run.cache) for run, tokens in zip(runs, ids, strict=True)], whens, watch)

    def _logits(
        self,
        sequences: Sequence[tuple[Sequence[int], LatentCache]],
        whens: Sequence[str],
        watch: AfterLayer | None = None,
    ) -> torch.Tensor:
        """Logits [sequences, vocab] F32 after each; ``whens`` say for an error where in a text that is."""
        with cuda_errors(self.weights.device, fix="Name a smaller --gpu-memory, or use --device cpu."):
            hidden = run_pass(self.model, self.weights, sequences, most_tokens=PREFILL_TOKENS, after_layer=watch)
            logits = self.model.logits(hidden)
            finite = logits.isfinite().all(dim=-1).tolist()
        for (ids, cache), when, is_finite in zip(sequences, whens, finite, strict=True):
            if not is_finite:
                self._raise_not_finite(torch.tensor([list(ids)]), cache, when)
        return logits

    @contextmanager
    def _shown(self, tokens: int, progress: bool) -> Iterator[AfterLayer | None]:
        """A bar of the bytes that a prompt's pass reads, and what moves it after each layer."""
        weights, layers = self.weights, len(self.model.layers)
        sizes = weights.sizes
        needed = sizes.always + expected_expert_bytes(weights.arch, sizes, tokens) + tokens * sizes.row
        left = needed - (weights.kept_bytes + weights.host_kept_bytes if weights.is_open else 0)
        if not progress or left <= 0:
            yield None
            return
        with Progress(left, "Prompt", leave=False) as bar:
            seen = weights.bytes_read

            def advance(layer: int, _: torch.Tensor) -> None:
                nonlocal seen
                bar.add(weights.bytes_read - seen)
                seen = weights.bytes_read
                bar.note(f"layer {layer + 1}/{layers}")

            yield advance

    def _start(self, ids: Sequence[int], max_new_tokens: int, sampling: Sampling) -> _Run:
        text = TextStream(self.tokenizer) if self.tokenizer is not None else None
        room, cache = self._room(ids, max_new_tokens), self.model.new_cache()
        return _Run(tuple(ids), room, sampling, cache, sampling.generator(), text)

    def _room(self, ids: Sequence[int], max_new_tokens: int) -> int:
        """The tokens that may be generated after these."""
        return min(max_new_tokens, self.max_tokens - len(ids))

    def _waves(self, all_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[Sequence[int]]]:
        """Prompts, in their order, in groups that fit in memory, the same on all ranks; it is set aside for the
        largest."""
        lengths = [len(ids) + self._room(ids, max_new_tokens) for ids in all_ids]
        most = min(self.ranks.everybodys(self._most_together(lengths)))
        return [[all_ids[number] for number in group] for group in _grouped(lengths, most)]

    def _most_together(self, lengths: Sequence[int]) -> int:
        """How many tokens of sequences of these lengths fit in memory, which is set aside for them."""
        longest = max(lengths)
        most = max(longest, min(sum(lengths), self._reserved or PASS_TOKENS))
        while True:
            groups = _grouped(lengths, most)
            try:
                largest = max(groups, key=lambda group: sum(lengths[number] for number in group))
                self._reserve(sum(lengths[number] for number in largest), max(map(len, groups)))
                return most
            except SpaceError:
                if most == longest:
                    raise
                most = max(longest, most // 2)

    def _reserve(self, tokens: int, sequences: int) -> None:
        """Set memory aside for passes of prompts and answers of so many tokens together, and leave the rest to weights.
        Once a weight was read it stays as it is."""
        if self.weights.is_open:
            return
        if self._gpu_memory is None and self._host_memory is None:
            tokens = max(tokens, PREFILL_TOKENS)  # nobody counts bytes: let later prompts be longer than the first
        budget = divide(
            self.weights,
            tokens=tokens,
            sequences=sequences,
            most_tokens=PREFILL_TOKENS,
            gpu_memory=self._gpu_memory,
            host_memory=self._host_memory,
        )
        if self._memory_bytes is not None:
            budget = replace(budget, device_weights=self._memory_bytes)
        if self._host_bytes is not None:
            budget = replace(budget, host_weights=self._host_bytes)
        self.weights.limit(budget.device_weights, budget.host_weights)
        self._budget, self._reserved = budget, tokens

    def _check(self, ids: Sequence[int], max_new_tokens: int) -> None:
        vocab = self.model.arch.vocab_size
        if max_new_tokens < 1:
            raise GenerationError(
                "nothing to generate", where="max_new_tokens", expected="at least 1", found=max_new_tokens
            )
        if not ids:
            raise GenerationError("the prompt is empty", fix="Give a prompt of at least one token.")
        if len(ids) >= self.max_tokens:
            raise GenerationError(
                "the prompt leaves no room for an answer in the model's context",
                where=self.root,
                expected=f"fewer than {self.max_tokens} tokens",
                found=len(ids),
                fix="Shorten the prompt.",
            )
        outside = [token for token in ids if not 0 <= token < vocab]
        if outside:
            raise GenerationError(
                "a token id outside the vocabulary: the tokenizer does not belong to these weights",
                where=self.root,
                expected=f"0 to {vocab - 1}",
                found=outside[0],
                fix="Take tokenizer.json from the repository that the weights come from.",
            )

    def _raise_not_finite(self, ids: torch.Tensor, cache: LatentCache, when: str) -> NoReturn:
        """The error that names the layer in which ``ids`` [1, seq] first go wrong. It is searched in a second pass."""
        cache.truncate(cache.length - ids.shape[1])
        broken = self._first_broken_layer(ids, cache)
        place = "in the final norm or the head" if broken is None else f"first in {broken}"
        advice = "Look for damaged weights with `weightkit verify --values`"
        if self.weights.dtype == torch.float16:
            advice += ", or compute in bf16: F16 overflows above 65504"
        raise NonFiniteError(f"NaN or Inf in the logits {when}, {place}", where=self.root, fix=f"{advice}.")

    def _first_broken_layer(self, ids: torch.Tensor, cache: LatentCache) -> str | None:
        found: list[int] = []

        def look(layer: int, hidden: torch.Tensor) -> None:
            if not found and not bool(hidden.isfinite().all()):
                found.append(layer)

        for chunk in ids.split(PREFILL_TOKENS, dim=1):
            self.model.hidden_states(chunk, cache, look)
            if found:
                return "the embedding" if found[0] < 0 else f"layer {found[0]}"
        return None


def generate(
    source: str | Path | Checkpoint,
    prompt: Prompt,
    *,
    device: DeviceName = "auto",
    dtype: str | None = None,
    memory_bytes: int | None = None,
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    stream: bool | None = None,
    jobs: int | None = None,
    dequantize: bool = False,
    **options: Any,
) -> Generation:
    """Generate once from a checkpoint in any layout. For several prompts, open a ``Runtime``.

    Args:
        source: a path or an opened checkpoint.
        prompt: text, token ids, or a conversation.
        device, dtype, memory_bytes, gpu_memory, host_memory, stream, jobs, dequantize: see ``Runtime``.
        options: those of ``Runtime.stream``: ``max_new_tokens``, ``temperature``, ``top_p``, ``seed``, ``chat``,
            ``template_variables``, ``progress``.

    Raises:
        As ``Runtime`` and ``Runtime.stream``.
    """
    with Runtime(
        source,
        device=device,
        dtype=dtype,
        memory_bytes=memory_bytes,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        stream=stream,
        jobs=jobs,
        dequantize=dequantize,
    ) as runtime:
        return runtime.generate(prompt, **options)


def _try_tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer | None, TokenizerError | None]:
    """A missing tokenizer is an error only once there is text to encode."""
    try:
        return Tokenizer.from_side_files(checkpoint.side_files, checkpoint.root), None
    except TokenizerError as error:
        return None, error


def _eos_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids that end a text: the generation config's, the config's and the tokenizer's; the first two may be lists."""
    side_file = checkpoint.side_files.get(GENERATION_CONFIG_NAME)
    try:
        generation = {} if side_file is None else json.loads(side_file.read())
    except (OSError, ValueError) as exc:
        raise GenerationError(f"not JSON ({exc})", where=checkpoint.root / GENERATION_CONFIG_NAME) from exc
    found: set[int] = set()
    for config in (generation, checkpoint.config):
        value = config.get("eos_token_id") if isinstance(config, Mapping) else None
        found.update(item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))
    own = tokenizer.token_id("eos_token") if tokenizer is not None else None
    return frozenset(found if own is None else found | {own})


def _max_tokens(arch: Architecture) -> int:
    """The model's context; for members with an indexer, as far as their attention is dense."""
    return min(arch.max_position_embeddings, arch.index_topk or arch.max_position_embeddings)


def _grouped(lengths: Sequence[int], most: int) -> list[list[int]]:
    """The places of ``lengths``, in their order, in groups of at most ``most`` together, or one by itself."""
    groups: list[list[int]] = [[]]
    filled = 0
    for place, length in enumerate(lengths):
        if groups[-1] and filled + length > most:
            groups.append([])
            filled = 0
        groups[-1].append(place)
        filled += length
    return groups


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
