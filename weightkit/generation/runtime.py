"""Text from a checkpoint on this machine, one prompt at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from weightkit.checkpoint import Checkpoint
from weightkit.compute.engines import DeviceName
from weightkit.errors import GenerationError, NonFiniteError, TokenizerError
from weightkit.family import Architecture
from weightkit.generation.sampling import Sampling
from weightkit.generation.tokenizer import Messages, TextStream, Tokenizer
from weightkit.layouts import open_checkpoint
from weightkit.model import CheckpointWeights, LatentCache, Model
from weightkit.units import human_bytes, human_seconds

Prompt = str | Sequence[int] | Messages
"""Plain text, token ids, or a conversation."""

PREFILL_TOKENS = 4096
"""Prompt tokens a pass: each pass reads all weights that are not kept, and holds hidden states of so many tokens."""

GENERATION_CONFIG_NAME = "generation_config.json"


@dataclass(frozen=True)
class Generation:
    """What was generated, and what it took.

    Attributes:
        text: without special tokens.
        token_ids: all new tokens, the end-of-text token included.
        prompt_ids: the prompt's tokens.
        stopped_by: ``eos``, or ``length`` for ``max_new_tokens`` or the model's context.
        prefill_s: from the start to the first new token, reading of weights included.
        decode_s: from the first new token to the last.
        bytes_read: from the checkpoint's files, since the runtime was opened until the end of this generation.
        device: ``cpu`` or ``cuda``.
        dtype: in which was computed: ``bfloat16``, ``float16`` or ``float32``.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    stopped_by: Literal["eos", "length"]
    prefill_s: float
    decode_s: float
    bytes_read: int
    device: str
    dtype: str

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens a second, the first left out, which is the prompt's; None for a single token."""
        return (len(self.token_ids) - 1) / self.decode_s if len(self.token_ids) > 1 and self.decode_s > 0 else None

    def render(self) -> str:
        """One line for a terminal: tokens, rates, bytes read."""
        tokens = f"{len(self.prompt_ids)} tokens in, {len(self.token_ids)} out (stopped by {self.stopped_by})"
        rate = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tokens/s after it"
        took = f"first token after {human_seconds(self.prefill_s)}{rate}"
        return f"[{tokens}; {took}; {human_bytes(self.bytes_read)} read; {self.dtype} on {self.device}]"


@dataclass
class _Run:
    """The state of one generation."""

    prompt_ids: tuple[int, ...]
    room: int
    sampling: Sampling
    cache: LatentCache
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)


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
        text = TextStream(runtime.tokenizer) if runtime.tokenizer is not None else None
        logits = runtime.prefill(run.prompt_ids, run.cache, progress=progress)
        first_at = time.perf_counter()
        stopped_by: Literal["eos", "length"] = "length"
        while True:
            token = run.sampling.choose(logits, run.generator)
            run.token_ids.append(token)
            if len(run.token_ids) == 1:
                first_at = time.perf_counter()
            if token in runtime.eos_ids:
                stopped_by = "eos"
                break
            if text is not None and (piece := text.push(token)):
                run.pieces.append(piece)
                yield piece
            if len(run.token_ids) == run.room:
                break
            logits = runtime.step(token, run.cache, len(run.token_ids))
        ended_at = time.perf_counter()
        if text is not None and (piece := text.finish()):
            run.pieces.append(piece)
            yield piece
        self._result = runtime.describe(run, stopped_by, first_at - started, ended_at - first_at)


class Runtime:
    """A checkpoint opened for generation. Weights that were read stay for the next prompt while there is memory.

    Args:
        source: a path in any layout, or an opened checkpoint.
        device, dtype, memory_bytes, jobs: see ``CheckpointWeights``.

    Attributes:
        model: the forward pass.
        weights: where its weights come from.
        tokenizer: None where the checkpoint has no usable one; then prompts are token ids.
        eos_ids: the tokens that end a text.
        max_tokens: most tokens of prompt and answer together.

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
        jobs: int | None = None,
    ) -> None:
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
        self.root = checkpoint.root
        self.tokenizer, self._tokenizer_error = _try_tokenizer(checkpoint)
        self.weights = CheckpointWeights(checkpoint, device=device, dtype=dtype, memory_bytes=memory_bytes, jobs=jobs)
        self.model = Model(self.weights.arch, self.weights)
        self.eos_ids = _eos_ids(checkpoint, self.tokenizer)
        self.max_tokens = _max_tokens(self.weights.arch)

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
            progress: show a bar over the layers during the prompt's pass.

        Raises:
            GenerationError: a request that cannot be: an empty prompt, one longer than the model's context, ids outside
                the vocabulary, a sampling parameter out of range.
            TokenizerError: text for a checkpoint without tokenizer, or a chat template that fails.
            NonFiniteError: while reading the stream: NaN or Inf in logits.
        """
        sampling = Sampling(temperature, top_p, seed)
        ids = tuple(self.encode(prompt, chat=chat, template_variables=template_variables))
        self._check(ids, max_new_tokens)
        room = min(max_new_tokens, self.max_tokens - len(ids))
        return Stream(self, _Run(ids, room, sampling, self.model.new_cache(), sampling.generator()), progress)

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """As ``stream``, at once."""
        return self.stream(prompt, **options).result

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
        prompt, logits = torch.tensor([ids]), torch.empty(0)
        passes = prompt.split(PREFILL_TOKENS, dim=1)
        with tqdm(total=len(passes) * len(self.model.layers), unit="layer", disable=not progress, leave=False) as bar:

            def advance(layer: int, _: torch.Tensor) -> None:
                bar.update(layer >= 0)

            for chunk in passes:
                logits = self.model.logits(self.model.hidden_states(chunk, cache, advance)[0, -1])
        return self._require_finite(logits, prompt, cache, "after the prompt")

    @torch.inference_mode()
    def step(self, token: int, cache: LatentCache, number: int) -> torch.Tensor:
        """Logits [vocab] F32 after one more token, the ``number``-th new one. Raises ``NonFiniteError``."""
        ids = torch.tensor([[token]])
        logits = self.model.logits(self.model.hidden_states(ids, cache)[0, -1])
        return self._require_finite(logits, ids, cache, f"after new token {number}")

    def describe(
        self, run: _Run, stopped_by: Literal["eos", "length"], prefill_s: float, decode_s: float
    ) -> Generation:
        """The record of a finished run."""
        return Generation(
            text="".join(run.pieces),
            token_ids=tuple(run.token_ids),
            prompt_ids=run.prompt_ids,
            stopped_by=stopped_by,
            prefill_s=prefill_s,
            decode_s=decode_s,
            bytes_read=self.weights.bytes_read,
            device=self.weights.device.type,
            dtype=str(self.weights.dtype).removeprefix("torch."),
        )

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

    def _require_finite(self, logits: torch.Tensor, ids: torch.Tensor, cache: LatentCache, when: str) -> torch.Tensor:
        """``logits`` of ``ids``, or the error that names the layer. Layers are searched only then, in a second pass."""
        if bool(logits.isfinite().all()):
            return logits
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
    jobs: int | None = None,
    **options: Any,
) -> Generation:
    """Generate once from a checkpoint in any layout. For several prompts, open a ``Runtime``.

    Args:
        source: a path or an opened checkpoint.
        prompt: text, token ids, or a conversation.
        device, dtype, memory_bytes, jobs: see ``CheckpointWeights``.
        options: those of ``Runtime.stream``: ``max_new_tokens``, ``temperature``, ``top_p``, ``seed``, ``chat``,
            ``template_variables``, ``progress``.

    Raises:
        As ``Runtime`` and ``Runtime.stream``.
    """
    with Runtime(source, device=device, dtype=dtype, memory_bytes=memory_bytes, jobs=jobs) as runtime:
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
