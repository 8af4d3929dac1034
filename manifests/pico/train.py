"""Trains pico: ``python -m weightkit.manifests.pico --minutes 7 --out FOLDER``.

Time-boxed: learning rate, bias updates and the quantized last stretch go by the share of the time that has passed, so
training always ends annealed, whatever the machine. Leaves in FOLDER: ``pico.tar`` (``checkpoint/`` and
``manifest.toml``) and ``train.log``. The published checkpoint's log lies beside this file; its first line has the
arguments.

The recipe: AdamW on packed conversations, no document sees another; cross-entropy on every token, answers counting ten
times as much as questions; 0.3 of the same for the MTP layer; experts balanced by the router's bias alone (the paper's
auxiliary-loss-free update). In the last fifth the forward pass sees the weights as they will be published, through FP8
blocks or BF16, while gradients go to the F32 masters: the exported checkpoint is the network that was trained.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from weightkit.manifests.pico.describe import card, manifest
from weightkit.manifests.pico.evaluate import Evaluation, evaluate, evaluate_checkpoint, evaluation_questions
from weightkit.manifests.pico.export import export, published
from weightkit.manifests.pico.network import Layer, Network, causal_mask
from weightkit.manifests.pico.packing import CHUNK_ROWS, ROW_LENGTH, Workers
from weightkit.manifests.pico.questions import Question
from weightkit.manifests.pico.tokenizer import ASSISTANT_ID, BOS_ID, PAD_ID, USER_ID, train_tokenizer

WARMUP_UNTIL = 0.02
DECAY_FROM = 0.35
QUANTIZED_FROM = 0.8
QUESTION_WEIGHT = 0.1
MTP_WEIGHT = 0.3
BIAS_STEP = 1e-3
WEIGHT_DECAY = 0.2
LOG_EVERY_S = 5.0
#: Rows kept on the device; fresh ones replace the oldest.
POOL_ROWS = 1 << 20


@dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
        minutes: wall time of everything, evaluation and export included.
        reserve_s: of that, what is kept for export and evaluation.
        out: where the results go.
        batch: rows a step.
        learning_rate: its peak.
        workers: processes that write questions.
        compile: whether to try torch.compile.
        seed: of initialisation and data.
        smoke: a few steps of everything, for a CPU.
    """

    minutes: float
    reserve_s: float
    out: Path
    batch: int
    learning_rate: float
    workers: int
    compile: bool
    seed: int
    smoke: bool


class Log:
    """Prints lines with the seconds since the start, and keeps them in a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def __call__(self, text: str) -> None:
        line = f"{self.elapsed_s:7.1f} s  {text}"
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


class Pool:
    """Rows on the device to draw batches from: a ring that fresh rows overwrite."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows = torch.zeros(rows, ROW_LENGTH, dtype=torch.int16, device=device)
        self._next = 0
        self.filled = 0
        self.received = 0

    def add(self, rows: Tensor) -> None:
        """Adds rows [count, ROW_LENGTH]; ``count`` divides the pool's size."""
        count = rows.shape[0]
        self._rows[self._next : self._next + count] = rows.to(self._rows.device, torch.int16, non_blocking=True)
        self._next = (self._next + count) % self._rows.shape[0]
        self.filled = min(self.filled + count, self._rows.shape[0])
        self.received += count

    def batch(self, count: int) -> Tensor:
        """``count`` random rows, I64."""
        return self._rows[torch.randint(self.filled, (count,), device=self._rows.device)].long()


@dataclass(frozen=True)
class Targets:
    """What a batch of rows asks for.

    Attributes:
        mask: who may see whom, [batch, 1, length, length].
        labels: the next token and the one after that, [2, batch, length].
        weights: what each label counts, F32 [2, batch, length]; 0 across documents and for padding.
        answers: where the next token belongs to an answer, [batch, length].
    """

    mask: Tensor
    labels: Tensor
    weights: Tensor
    answers: Tensor


def targets(ids: Tensor) -> Targets:
    """Labels, weights and mask of packed rows [batch, length]."""
    length = ids.shape[1]
    place = torch.arange(length, device=ids.device).expand_as(ids)
    documents = (ids == BOS_ID).cumsum(1)
    asked = torch.where((ids == USER_ID) | (ids == BOS_ID), place, -1).cummax(1).values
    answered = torch.where(ids == ASSISTANT_ID, place, -1).cummax(1).values
    # A token is part of an answer when the last marker is the assistant's; the end token is the answer's last.
    in_answer = (answered > asked) & (ids != ASSISTANT_ID) & (ids != PAD_ID)
    labels, weights = [], []
    for ahead in (1, 2):
        label = F.pad(ids[:, ahead:], (0, ahead), value=PAD_ID)
        same = F.pad(documents[:, ahead:], (0, ahead), value=-1) == documents
        answer = F.pad(in_answer[:, ahead:], (0, ahead), value=False)
        counted = same & (label != PAD_ID)
        labels.append(label)
        weights.append(torch.where(answer, 1.0, QUESTION_WEIGHT) * counted)
    answers = F.pad(in_answer[:, 1:], (0, 1), value=False) & (weights[0] > 0)
    return Targets(causal_mask(documents), torch.stack(labels), torch.stack(weights), answers)


def losses(
    hidden: Tensor, mtp_hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, answers: Tensor
) -> Tensor:
    """[loss to minimise, answer loss, main loss, MTP loss], F32 [4]."""
    flat = labels.flatten(1)
    counts = weights.flatten(1)
    parts = []
    for index, state in enumerate((hidden, mtp_hidden)):
        logits = F.linear(state.flatten(0, 1), head.to(state.dtype)).float()
        parts.append(F.cross_entropy(logits, flat[index], reduction="none"))
    main = (parts[0] * counts[0]).sum() / counts[0].sum()
    mtp = (parts[1] * counts[1]).sum() / counts[1].sum()
    wanted = answers.flatten()
    answer = (parts[0] * wanted).sum() / wanted.sum()
    return torch.stack((main + MTP_WEIGHT * mtp, answer.detach(), main.detach(), mtp.detach()))


def rate_at(share: float) -> float:
    """The learning rate's factor when ``share`` of the time has passed: warmup, plateau, linear to zero."""
    if share < WARMUP_UNTIL:
        return max(share / WARMUP_UNTIL, 0.01)
    return max(min(1.0, (1.0 - share) / (1.0 - DECAY_FROM)), 0.0)


class Masters:
    """Swaps a network's F32 masters for their published values around a forward and backward pass."""

    def __init__(self, network: Network) -> None:
        self._named = list(network.named_parameters())
        self._masters = [parameter.detach().clone() for _, parameter in self._named]

    @contextmanager
    @torch.no_grad()
    def published_values(self) -> Iterator[None]:
        """Within, parameters have the checkpoint's values; afterwards their own, gradients kept (straight through)."""
        data = [parameter.data for _, parameter in self._named]
        torch._foreach_copy_(self._masters, data)
        torch._foreach_copy_(
            data, [published(name, master) for (name, _), master in zip(self._named, self._masters, strict=True)]
        )
        try:
            with torch.enable_grad():
                yield
        finally:
            torch._foreach_copy_(data, self._masters)


class Trainer:
    """One network in training: the step, the clock, the log."""

    def __init__(self, options: Options, log: Log, device: torch.device, tokenizer: Tokenizer) -> None:
        self.options, self.log, self.device, self.tokenizer = options, log, device, tokenizer
        torch.manual_seed(options.seed)
        self.network = Network().to(device)
        self.pool = Pool(POOL_ROWS if not options.smoke else CHUNK_ROWS, device)
        self.dtype = torch.bfloat16
        self.masters = Masters(self.network)
        self.loss = losses
        matrices = [parameter for parameter in self.network.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.network.parameters() if parameter.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        self.steps = 0
        self.loads = torch.zeros(len(self.network.routers()), self.network.routers()[0].experts, device=device)

    def step(self, share: float) -> Tensor:
        """One optimizer step when ``share`` of the time has passed; the four losses, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * rate_at(share)
        ids = self.pool.batch(self.options.batch)
        if share >= QUANTIZED_FROM:
            with self.masters.published_values():
                values, loads = self._gradients(ids)
        else:
            values, loads = self._gradients(ids)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._balance(loads, share)
        self.steps += 1
        return values

    def _gradients(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        wanted = targets(ids)
        out = self.network(ids, wanted.mask, self.dtype)
        values = self.loss(
            out.hidden, out.mtp_hidden, self.network.lm_head, wanted.labels, wanted.weights, wanted.answers
        )
        values[0].backward()
        return values.detach(), out.loads

    @torch.no_grad()
    def _balance(self, loads: Tensor, share: float) -> None:
        """Lifts the bias of experts below the mean load, lowers the others'; rests in the quantized stretch."""
        self.loads.lerp_(loads, 0.02)
        if share >= QUANTIZED_FROM:
            return
        for router, load in zip(self.network.routers(), loads, strict=True):
            router.e_score_correction_bias += BIAS_STEP * torch.sign(load.mean() - load)

    def compile(self) -> None:
        """Compiles the layers and the loss; on any failure says so and goes on without."""
        try:
            for layer in self.network.modules():
                if isinstance(layer, Layer):
                    layer.compile(dynamic=False)
            self.loss = torch.compile(losses, dynamic=False)
            begun = time.monotonic()
            self.step(0.0)
            self._synchronize()
            self.log(f"compiled in {time.monotonic() - begun:.1f} s")
        except Exception:  # whatever the compiler raises: training must go on
            self.log("torch.compile failed, going on without:\n" + traceback.format_exc(limit=3))
            torch._dynamo.reset()
            for layer in self.network.modules():
                layer._compiled_call_impl = None
            self.loss = losses
            self.optimizer.zero_grad(set_to_none=True)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def train(self, workers: Workers, until_s: float, max_steps: int | None = None) -> None:
        """Steps until the log's clock shows ``until_s``, or ``max_steps`` are done."""
        self.pool.add(torch.from_numpy(workers.wait()))
        if self.options.compile:
            self.compile()
        begin_s, logged_s, logged_steps = self.log.elapsed_s, self.log.elapsed_s, self.steps
        checks = [] if self.options.smoke else [0.25, 0.5, 0.75]
        sums = torch.zeros(4, device=self.device)
        while True:
            share = self._share(begin_s, until_s, max_steps)
            if share >= 1.0:
                break
            rows = workers.ready()
            if rows is not None:
                self.pool.add(torch.from_numpy(rows))
            sums += self.step(share)
            if self.steps % 10 == 0:
                self._synchronize()  # the clock must not run ahead of the device
            if self.log.elapsed_s - logged_s >= LOG_EVERY_S:
                self._report(
                    share,
                    sums / (self.steps - logged_steps),
                    (self.steps - logged_steps) / (self.log.elapsed_s - logged_s),
                )
                logged_s, logged_steps = self.log.elapsed_s, self.steps
                sums.zero_()
            if checks and share >= checks[0]:
                checks.pop(0)
                self._check(evaluation_questions(40), "held out")
                logged_s, logged_steps = self.log.elapsed_s, self.steps
                sums.zero_()
        self._synchronize()

    def _share(self, begin_s: float, until_s: float, max_steps: int | None) -> float:
        if max_steps is not None:
            return self.steps / max_steps
        return (self.log.elapsed_s - begin_s) / (until_s - begin_s)

    def _report(self, share: float, means: Tensor, steps_per_s: float) -> None:
        """One line: losses, speed, and the least and most loaded expert, 1 being even.

        Raises:
            FloatingPointError: the loss is no longer finite; training on would waste the machine.
        """
        _, answer, main, mtp = means.tolist()
        if not math.isfinite(answer + main + mtp):
            raise FloatingPointError(f"step {self.steps}: losses {means.tolist()}; lower --learning-rate")
        tokens_per_s = steps_per_s * self.options.batch * ROW_LENGTH
        mean = self.loads.mean(1, keepdim=True)
        low, high = (self.loads / mean).aminmax()
        self.log(
            f"{share:5.1%}  step {self.steps:6d}  {tokens_per_s / 1e6:5.2f} M tokens/s  answers {answer:.4f}  "
            f"all {main:.4f}  mtp {mtp:.4f}  rate {self.options.learning_rate * rate_at(share):.1e}  "
            f"load {low:.2f}..{high:.2f}  rows {self.pool.received:,}"
        )

    def _check(self, questions: list[Question], title: str) -> None:
        """Accuracy on the way, of a copy that is not compiled."""
        copy = Network().to(self.device)
        copy.load_state_dict(self.network.state_dict())
        begun = time.monotonic()
        result = evaluate(copy, self.tokenizer, questions, self.dtype)
        self.log(f"{title} ({time.monotonic() - begun:.1f} s): {summary(result)}")

    def expert_loads(self) -> list[list[float]]:
        """The share of its tokens' choices that each expert got lately, times the number of experts: 1 is even."""
        return [[round(value, 3) for value in row] for row in (self.loads / self.loads.mean(1, keepdim=True)).tolist()]


def summary(result: Evaluation) -> str:
    """An evaluation in a line or two: shares by category, then the kinds that are not nearly perfect."""
    shares = result["accuracy"]
    weak = {kind: share for kind, share in shares["by_kind"].items() if share < 0.97}
    return (
        f"{shares['overall']:.2%} of {shares['questions']} right; {_percent(shares['by_category'])}; "
        f"{_percent(shares['by_language'])}; "
        f"perplexity {result['perplexity']['text']:.4f}, of answers {result['perplexity']['answers']:.4f}; "
        f"mtp {result['mtp_accuracy']:.2%}; weak: {_percent(weak) or 'none'}"
    )


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def _finish(trainer: Trainer, questions: list[Question], training: dict[str, object]) -> None:
    """Exports, evaluates what was exported, writes the manifest; the archive is written whatever fails."""
    out, log = trainer.options.out, trainer.log
    folder = out / "checkpoint"
    try:
        export(trainer.network, trainer.tokenizer, folder, card="")
        log("exported")
        metrics = evaluate_checkpoint(folder, questions, trainer.device)
        for name, result in metrics.items():
            log(f"{name}: {summary(result)}")
        loads = trainer.expert_loads()
        log(
            "expert load, 1 is even; the MTP layer last: "
            + "; ".join(f"{min(row):.2f}..{max(row):.2f}" for row in loads)
        )
        (folder / "README.md").write_text(card(folder, metrics), encoding="utf-8")
        (out / "manifest.toml").write_text(manifest(folder, metrics, training), encoding="utf-8")
    finally:
        with tarfile.open(out / "pico.tar", "w") as archive:
            for name in ("checkpoint", "manifest.toml"):
                if (out / name).exists():
                    archive.add(out / name, name)
    files = list(folder.iterdir())
    log(f"done: {sum(file.stat().st_size for file in files):,} bytes in {len(files)} files")


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="python -m weightkit.manifests.pico", description="Train pico.")
    parser.add_argument("--minutes", type=float, default=7.0, help="wall time of everything")
    parser.add_argument("--reserve", type=float, default=30.0, help="seconds of it for export and evaluation")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=512, help=f"rows of {ROW_LENGTH} tokens a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, on a CPU, in under a minute")
    given = parser.parse_args()
    return Options(
        minutes=given.minutes,
        reserve_s=given.reserve,
        out=given.out,
        batch=8 if given.smoke else given.batch,
        learning_rate=given.learning_rate,
        workers=1 if given.smoke else given.workers,
        compile=not given.no_compile and not given.smoke,
        seed=given.seed,
        smoke=given.smoke,
    )


def main() -> None:
    """Trains, exports, evaluates."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "train.log")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    log(f"torch {torch.__version__}, {device}, {' '.join(sys.argv[1:])}")
    tokenizer = train_tokenizer()
    with Workers(tokenizer, options.seed, options.workers) as workers:
        trainer = Trainer(options, log, device, tokenizer)
        log(f"{sum(parameter.numel() for parameter in trainer.network.parameters()):,} parameters")
        trainer.train(workers, options.minutes * 60 - options.reserve_s, max_steps=6 if options.smoke else None)
    training = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "wall_s": round(log.elapsed_s, 1),
        "steps": trainer.steps,
        "tokens": trainer.steps * options.batch * ROW_LENGTH,
        "distinct_rows": trainer.pool.received,
        "seed": options.seed,
    }
    log(f"trained: {training}")
    torch.set_float32_matmul_precision("highest")
    _finish(trainer, evaluation_questions(2) if options.smoke else evaluation_questions(), training)
