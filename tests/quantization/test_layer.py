"""Each matrix is solved with what the quantized model really brings to it: against the textbook, straight on.

The model is walked layer by layer with what the output holds so far; at every linear map its inputs are known, and with
them the Hessian, the scales, the codes and the errors can be computed as the papers and the docstrings say, in F64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from quantizing import check_output, dequantized, exact_weights, integers, run, small, write_tokens
from tiny import V2_LITE, V3, V3_BF16, Tiny, write_tiny

from weightkit.family import Architecture
from weightkit.kernels.gptq_solve import solve_reference
from weightkit.model import Layer, Model, Rope, TensorWeights
from weightkit.quantization import QuantizationReport, Settings

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of the codes, how many may differ between F32 and F64: ties, and what follows from them in an output's later columns.
TIES = 0.001
TOKENS = 12, 64
Weights = dict[str, torch.Tensor]
Visit = Callable[[list[str], torch.Tensor], None]


@dataclass
class Walk:
    """A model on its way through the calibration tokens: before a layer's matrices are visited, ``weights`` holds the
    source's; from then on what ``quantized`` has, rounded to BF16, as engines compute with it."""

    model: Tiny
    weights: Weights
    quantized: Weights
    visit: Visit

    def go(self, tokens: torch.Tensor) -> Iterator[tuple[int, list[int]]]:
        """Each layer with the tokens of its routed experts."""
        arch = Architecture.from_config(self.model.config() | {"quantization_config": None})
        hidden, rope = self.weights["model.embed_tokens.weight"][tokens], Rope.of(arch)
        rotation = rope.at(torch.arange(tokens.shape[1]))
        for index in range(self.model.layers):
            seen: Weights = {}
            layer = Layer(arch, index, TensorWeights(self.weights), rope, seen.__setitem__)
            for group in (["q_proj", "q_a_proj", "kv_a_proj_with_mqa"], ["q_b_proj"], ["kv_b_proj"], ["o_proj"]):
                layer.attend(hidden, rotation)
                names = [f"model.layers.{index}.self_attn.{module}.weight" for module in group]
                self.meet([name for name in names if name in seen], seen)
            hidden = layer.attend(hidden, rotation)
            x = layer.mlp_input(hidden).flatten(0, 1)
            if index < self.model.dense_layers:
                counts: list[int] = []
                self.mlp(f"model.layers.{index}.mlp", x)
            else:
                counts = self.experts(f"model.layers.{index}.mlp", x)
            yield index, counts
            hidden = layer.feed_forward(hidden)

    def meet(self, names: list[str], seen: Weights) -> None:
        if names and names[0] in self.quantized:
            self.visit(names, seen[names[0]].flatten(0, -2))
            self.weights.update({name: self.quantized[name] for name in names})

    def mlp(self, at: str, x: torch.Tensor) -> None:
        gate, up, down = (f"{at}.{module}.weight" for module in ("gate_proj", "up_proj", "down_proj"))
        self.meet([gate, up], {gate: x})
        inner = torch.nn.functional.silu(x @ self.weights[gate].T) * (x @ self.weights[up].T)
        self.meet([down], {down: inner})

    def experts(self, at: str, x: torch.Tensor) -> list[int]:
        bias = self.weights.get(f"{at}.gate.e_score_correction_bias")
        chosen = [route(self.model, self.weights[f"{at}.gate.weight"], bias, token) for token in x]
        tokens = [[token for token, experts in enumerate(chosen) if number in experts] for number in range(8)]
        for number, rows in enumerate(tokens):
            self.mlp(f"{at}.experts.{number}", x[rows])
        self.mlp(f"{at}.shared_experts", x)
        return [len(rows) for rows in tokens]


def route(model: Tiny, gate: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> set[int]:
    """The experts of one token, straight from the published description."""
    logits = (gate.double() @ x.double()).tolist()
    if not model.sigmoid:
        return set(sorted(range(len(logits)), key=lambda expert: -logits[expert])[: model.top_k])
    assert bias is not None
    scores = [1 / (1 + np.exp(-logit)) + extra for logit, extra in zip(logits, bias.tolist(), strict=True)]
    size = len(scores) // model.groups
    groups = [range(start, start + size) for start in range(0, len(scores), size)]
    groups.sort(key=lambda group: -sum(sorted(scores[expert] for expert in group)[-2:]))
    allowed = [expert for group in groups[: model.top_groups] for expert in group]
    return set(sorted(allowed, key=lambda expert: -scores[expert])[: model.top_k])


@dataclass
class Case:
    """One quantization: the report, and the weights as they are and were, by published names."""

    model: Tiny
    settings: Settings
    report: QuantizationReport
    source: Weights  # F32, exact
    plain: Weights  # BF16's values in F32
    stored: Weights  # what the integers stand for, in F32
    codes: dict[str, tuple[torch.Tensor, torch.Tensor]]
    tokens: torch.Tensor

    def walk(self, visit: Visit, *, quantized: Weights | None = None) -> list[list[int]]:
        """Tokens by expert of each layer. ``quantized`` in place of what the output holds."""
        if quantized is None:
            quantized = {name: self.stored[name].bfloat16().float() for name in self.codes}
        return [counts for _, counts in Walk(self.model, dict(self.plain), quantized, visit).go(self.tokens)]


CASES = {
    "experts": (V3, Settings(group_size=16)),
    "all": (V3, Settings(group_size=32, scope="all")),
    "natural order, largest scales, BF16": (V3_BF16, Settings(group_size=16, order="none", scales="largest")),
    "greedy routing, whole columns, int8": (V2_LITE, Settings(group_size=-1, bits=8, scope="all", damping=0.05)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("layer")
    base, settings = CASES[request.param]
    model = small(base)
    contents = write_tiny(folder / "source", model, seed=3)
    tokens = write_tokens(folder / "tokens.npy", *TOKENS)
    report = run(folder / "source", folder / "out", settings, samples=TOKENS[0], seq_len=TOKENS[1])
    found = check_output(contents, folder / "out", model, settings)
    source = tensors(exact_weights(contents))
    modules = [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]
    read = {module: integers(found, module, settings.bits) for module in modules}
    codes = {f"{name}.weight": (torch.from_numpy(q), torch.from_numpy(scales)) for name, (q, scales) in read.items()}
    plain = {name: weight.bfloat16().float() if "bias" not in name else weight for name, weight in source.items()}
    stored = tensors(dequantized(found, model, settings))
    ids = torch.from_numpy(np.load(tokens)).long()
    return Case(model, settings, report, source, plain, stored, codes, ids)


def tensors(arrays: dict[str, np.ndarray]) -> Weights:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def textbook(case: Case, name: str, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] of GPTQ in F64."""
    hessian = x.double().T @ x.double()
    diagonal, k = hessian.diagonal(), len(hessian)
    order = torch.argsort(diagonal.float(), stable=True).flip(0) if case.settings.order == "act" else torch.arange(k)
    size = k if case.settings.group_size == -1 else case.settings.group_size
    added = case.settings.damping * diagonal.mean().item()
    weight = case.source[name].T.contiguous()
    return solve_reference(weight, scales, hessian, order, added, group_size=size, bits=case.settings.bits).T


def searched(case: Case, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Scales [groups, N], of the fractions that are tried those with the least error, in F64."""
    n, k = weight.shape
    size = k if case.settings.group_size == -1 else case.settings.group_size
    half, groups = 1 << (case.settings.bits - 1), weight.double().view(n, -1, size)
    largest = groups.abs().amax(2) * 2 / (2 * half - 1)
    fractions = [1 - 0.02 * step for step in range(20)] if case.settings.scales == "search" else [1.0]
    tried = torch.stack([(largest * fraction).half().double() for fraction in fractions])
    codes = torch.floor(groups / tried[..., None] + half + 0.5).clamp(0, 2 * half - 1)
    losses = ((groups - (codes - half) * tried[..., None]) ** 2 * importance.double().view(-1, size)).sum(3)
    best: torch.Tensor = tried.gather(0, losses.argmin(0)[None])[0].T.float()
    return best


def relative_error(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> float:
    x, weight, other = x.double(), weight.double(), other.double()
    return ((x @ (weight - other).T).norm() / (x @ weight.T).norm()).item()


def test_scales_and_codes(case: Case) -> None:
    """Those of the textbook for inputs that saw all matrices before quantized, and no others."""
    differing, other_scales, total = 0, 0, 0

    def visit(names: list[str], x: torch.Tensor) -> None:
        nonlocal differing, other_scales, total
        for name in names:
            codes, scales = case.codes[name]
            expected = searched(case, case.source[name], x.double().square().sum(0))
            other_scales += int((scales != expected).sum())
            differing += int((codes != textbook(case, name, x, scales)).sum())
            total += codes.numel()

    case.walk(visit)
    groups = sum(scales.numel() for _, scales in case.codes.values())
    assert total == sum(codes.numel() for codes, _ in case.codes.values())
    assert other_scales <= TIES * groups
    assert differing <= TIES * total


def test_the_textbook_tells_other_inputs_apart(case: Case) -> None:
    """With inputs that saw no matrix quantized the codes of later layers are others: the test above can fail."""
    differing = dict.fromkeys(range(3), 0)
    total = dict.fromkeys(range(3), 0)

    def visit(names: list[str], x: torch.Tensor) -> None:
        layer = int(names[0].split(".")[2])
        for name in names:
            codes, scales = case.codes[name]
            differing[layer] += int((codes != textbook(case, name, x, scales)).sum())
            total[layer] += codes.numel()

    case.walk(visit, quantized={name: case.plain[name] for name in case.codes})
    assert differing[2] > 10 * TIES * total[2]


def test_tokens_and_errors_of_the_report(case: Case) -> None:
    """Every token counted by routing it by hand; every error measured again with the integers that were written."""
    reported = {f"{matrix.name}.weight": matrix for matrix in case.report.matrices}
    seen: dict[str, int] = {}

    def visit(names: list[str], x: torch.Tensor) -> None:
        for name in names:
            matrix, weight = reported[name], case.source[name]
            seen[name] = len(x)
            assert matrix.tokens == len(x)
            error = relative_error(x, weight, case.stored[name])
            assert matrix.error == pytest.approx(error, rel=2e-3)
            _, scales = case.codes[name]
            half = 1 << (case.settings.bits - 1)
            each = scales.T.repeat_interleave(weight.shape[1] // len(scales), 1)
            rounded = (torch.floor(weight / each + half + 0.5).clamp(0, 2 * half - 1) - half) * each
            rounding = relative_error(x, weight, rounded)
            assert matrix.rounding_error == pytest.approx(rounding, rel=2e-3)
            assert matrix.damping == case.settings.damping
            assert matrix.shape == tuple(weight.shape)

    counts = case.walk(visit)
    assert seen.keys() == reported.keys()
    by_layer = {layer.layer: layer.tokens_by_expert for layer in case.report.layers}
    for index, expected in enumerate(counts):
        assert list(by_layer.get(index, ())) == expected
    assert sum(counts[1]) == TOKENS[0] * TOKENS[1] * case.model.top_k


def test_the_output_is_closer_than_rounding(case: Case) -> None:
    """The whole model's logits, against those of the source; with scales as they are, codes rounded or solved."""
    half = 1 << (case.settings.bits - 1)
    rounded = dict(case.plain)
    for name, (_, scales) in case.codes.items():
        each = scales.T.repeat_interleave(case.source[name].shape[1] // len(scales), 1)
        codes = torch.floor(case.source[name] / each + half + 0.5).clamp(0, 2 * half - 1)
        rounded[name] = ((codes - half) * each).bfloat16().float()
    solved = case.plain | {name: case.stored[name].bfloat16().float() for name in case.codes}
    arch = Architecture.from_config(case.model.config() | {"quantization_config": None})
    exact, ours, theirs = (
        Model(arch, TensorWeights(weights))(case.tokens).double() for weights in (case.plain, solved, rounded)
    )
    assert (ours - exact).norm() < 0.9 * (theirs - exact).norm()
