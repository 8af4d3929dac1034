"""How fast one layer goes at calibration scale, part by part. Run by hand:

    python tests/benchmarks/bench_forward.py [--tokens 65536] [--seq-len 4096] [--hidden 7168] [--experts 256]
    python tests/benchmarks/bench_forward.py --quick        # the script itself, at small widths, on a CPU

Synthetic BF16 weights of one MoE layer are made on the device (256 experts of DeepSeek-V3: 23 GB) and handed out by
``TensorWeights``; hidden states are random, so that tokens spread over experts as the random router has it. Each part
is run alone on the inputs that it has in the layer. Times are medians over ``--rounds`` after one run that is not
counted; a wait for the device stands at both ends. Products are counted as 2 m n k, causal attention as half of its
square, at the widths of the model and not of what is padded; parts without products have GB/s of what they must read
and write. The attention core is measured with each of torch's kernels as well, where the device has them.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from weightkit.family import Architecture
from weightkit.model import Layer, MoE, Rope, Rotation, TensorWeights, rms_norm

LAYER = 1
QUICK = {"tokens": 512, "seq_len": 128, "hidden": 256, "heads": 4, "experts": 16, "rounds": 3}


@dataclass(frozen=True)
class Row:
    """What was measured: name, seconds, floating-point operations or, without products, bytes."""

    name: str
    seconds: float
    flops: float = 0.0
    size_bytes: float = 0.0

    def render(self) -> str:
        rate = f"{self.flops / self.seconds * 1e-12:.2f} TFLOP/s" if self.flops else ""
        if self.size_bytes:
            rate = f"{self.size_bytes / self.seconds * 1e-9:.1f} GB/s"
        return f"| {self.name} | {self.seconds * 1e3:.2f} | {rate} |"


class Bench:
    """One layer, its inputs, and the clock."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.rounds: int = options.rounds
        self.device = device
        self.arch = Architecture.from_config(config(options))
        self.dtype = getattr(torch, options.dtype)
        torch.manual_seed(0)
        rope = Rope.of(self.arch)
        self.layer = Layer(self.arch, LAYER, TensorWeights(weights(self.arch, device, self.dtype)), rope)
        self.batch, self.seq = max(1, options.tokens // options.seq_len), options.seq_len
        self.tokens = self.batch * self.seq
        self.rotation: Rotation = rope.at(torch.arange(self.seq, device=device))
        self.hidden = torch.randn(self.batch, self.seq, self.arch.hidden_size, device=device, dtype=self.dtype)
        self.rows: list[Row] = []

    def measure(self, name: str, run: Callable[[], object], flops: float = 0.0, size_bytes: float = 0.0) -> None:
        """Add the median time of ``run``."""
        times = []
        for _ in range(1 + self.rounds):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - start)
        self.rows.append(Row(name, statistics.median(times[1:]), flops, size_bytes))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def config(options: argparse.Namespace) -> dict[str, object]:
    """DeepSeek-V3's config, its widths scaled to ``--hidden``."""
    scale = options.hidden / 7168
    group = 8 if options.experts % 8 == 0 else 1
    return {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": options.hidden,
        "vocab_size": 1024,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "q_lora_rank": round(1536 * scale),
        "kv_lora_rank": round(512 * scale) // 8 * 8 or 8,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": round(18432 * scale),
        "moe_intermediate_size": round(2048 * scale),
        "n_routed_experts": options.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(8, options.experts),
        "n_group": group,
        "topk_group": max(1, group // 2),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": None,
        "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
    }


def weights(arch: Architecture, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The layer's tensors, normal with the standard deviation that keeps a product's size."""
    attention = f"model.layers.{LAYER}.self_attn"
    mlp = f"model.layers.{LAYER}.mlp"
    h, heads, q_lora = arch.hidden_size, arch.num_attention_heads, arch.q_lora_rank or 0
    head, kv = arch.qk_head_dim, arch.qk_nope_head_dim + arch.v_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        f"{attention}.q_a_proj": (q_lora, h),
        f"{attention}.q_b_proj": (heads * head, q_lora),
        f"{attention}.kv_a_proj_with_mqa": (arch.kv_lora_rank + arch.qk_rope_head_dim, h),
        f"{attention}.kv_b_proj": (heads * kv, arch.kv_lora_rank),
        f"{attention}.o_proj": (h, heads * arch.v_head_dim),
    }
    for name in ("shared_experts", *(f"experts.{number}" for number in range(arch.n_routed_experts))):
        for module in ("gate_proj", "up_proj"):
            shapes[f"{mlp}.{name}.{module}"] = (arch.moe_intermediate_size, h)
        shapes[f"{mlp}.{name}.down_proj"] = (h, arch.moe_intermediate_size)
    made = {
        f"{name}.weight": torch.randn(shape, device=device, dtype=dtype).mul_(shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }
    norms = {f"{attention}.q_a_layernorm": q_lora, f"{attention}.kv_a_layernorm": arch.kv_lora_rank}
    norms |= {f"model.layers.{LAYER}.{name}": h for name in ("input_layernorm", "post_attention_layernorm")}
    made |= {f"{name}.weight": torch.ones(width, device=device, dtype=dtype) for name, width in norms.items()}
    made[f"{mlp}.gate.weight"] = torch.randn(arch.n_routed_experts, h, device=device) * h**-0.5
    made[f"{mlp}.gate.e_score_correction_bias"] = torch.zeros(arch.n_routed_experts, device=device)
    return made


def bench_attention(bench: Bench) -> None:
    """Projections and core of one slice of sequences after the other, as the layer does it."""
    arch, attention, rotation = bench.arch, bench.layer.attention, bench.rotation
    parts = [bench.hidden[part] for part in attention.slices(bench.hidden)]
    q_lora, heads = arch.q_lora_rank or 0, arch.num_attention_heads
    q = arch.hidden_size * q_lora + q_lora * heads * arch.qk_head_dim
    kv_a = arch.hidden_size * (arch.kv_lora_rank + arch.qk_rope_head_dim)
    kv_b = arch.kv_lora_rank * heads * (arch.qk_nope_head_dim + arch.v_head_dim)
    o = heads * arch.v_head_dim * arch.hidden_size
    core = bench.tokens * bench.seq * heads * (arch.qk_head_dim + arch.v_head_dim)  # 2 a product, halved: causal
    a_token = 2 * bench.tokens

    def every(run: Callable[[torch.Tensor], object]) -> Callable[[], None]:
        def all_parts() -> None:
            for part in parts:
                run(part)

        return all_parts

    bench.measure("queries (q_a, q_b, norm, rotation)", every(lambda x: attention.queries(x, rotation)), a_token * q)
    bench.measure("latents (kv_a, norm, rotation)", every(lambda x: attention.latents(x, rotation)), a_token * kv_a)
    query, latents = attention.queries(parts[0], rotation), attention.latents(parts[0], rotation)
    expanded = a_token * kv_b + core
    bench.measure(
        "kv_b and attention core", every(lambda x: attention.expanded(query[: len(x)], latents[: len(x)])), expanded
    )
    outputs = attention.expanded(query, latents).flatten(2)
    o_proj = bench.layer.weights.get(f"{attention.prefix}.o_proj.weight")
    linear = torch.nn.functional.linear
    bench.measure("o_proj", every(lambda x: linear(outputs[: len(x)], o_proj)), a_token * o)
    whole = a_token * (q + kv_a + kv_b + o) + core
    bench.measure("**attention**", lambda: attention(bench.hidden, rotation), whole)
    bench_kernels(bench, len(parts[0]))


def bench_kernels(bench: Bench, batch: int) -> None:
    """The core alone, on one slice, by each kernel of torch that takes it; values as wide as they are, and padded."""
    arch, heads = bench.arch, bench.arch.num_attention_heads
    shape = (batch, bench.seq, heads)
    new = partial(torch.randn, device=bench.device, dtype=bench.dtype)
    query, key = (new(*shape, arch.qk_head_dim).transpose(1, 2) for _ in range(2))
    value = new(*shape, arch.qk_nope_head_dim + arch.v_head_dim)[..., arch.qk_nope_head_dim :].transpose(1, 2)
    flops = batch * bench.seq**2 * heads * (arch.qk_head_dim + arch.v_head_dim)
    missing = arch.qk_head_dim - arch.v_head_dim
    backends = [SDPBackend.FLASH_ATTENTION]
    if bench.device.type == "cuda":
        backends += [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for backend in backends:
        for padded in (False, True):

            def run(padded: bool = padded) -> None:
                wide = pad(value, (0, missing)) if padded else value
                scaled_dot_product_attention(
                    query, key, wide, is_causal=True, scale=bench.layer.attention.softmax_scale
                )

            name = f"core of one slice, {backend.name.lower()}, value {'padded' if padded else 'as it is'}"
            with sdpa_kernel(backend), warnings.catch_warnings():
                try:
                    warnings.simplefilter("ignore")  # the reasons why a kernel is not taken
                    bench.measure(name, run, flops)
                except RuntimeError as error:
                    print(f"{name}: {str(error).splitlines()[0]}")


def bench_moe(bench: Bench) -> None:
    """Routing, dispatch, experts, shared experts, and all of it."""
    arch, moe = bench.arch, bench.layer.mlp
    if not isinstance(moe, MoE):
        raise SystemExit("the layer has no experts")
    x = bench.layer.mlp_input(bench.hidden).flatten(0, 1)
    ids, shares = moe.route(x)
    dispatch = moe.dispatch(ids)
    expert = 3 * 2 * arch.hidden_size * arch.moe_intermediate_size
    routed, shared = bench.tokens * arch.num_experts_per_tok * expert, bench.tokens * arch.n_shared_experts * expert
    router = 2 * bench.tokens * arch.hidden_size * arch.n_routed_experts
    bench.measure("routing (F32)", lambda: moe.route(x), router)
    bench.measure("dispatch", lambda: moe.dispatch(ids), size_bytes=ids.nbytes * 3)
    bench.measure("routed experts", lambda: moe.experts(x, ids, shares, dispatch), routed)
    shared_experts = type(moe.expert(0))(f"{moe.prefix}.shared_experts", moe.weights)
    bench.measure("shared experts", lambda: shared_experts(x), shared)
    bench.measure("**MoE**", lambda: moe(x), routed + shared + router)
    counts = sorted(dispatch.counts)
    print(f"tokens an expert: {counts[0]} to {counts[-1]}, median {statistics.median(counts):.0f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=7168, help="all widths but the heads' scale with it")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small widths, to try the script")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--quick" in given:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(given)
    device = torch.device(options.device)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    cudnn = f", cuDNN {torch.backends.cudnn.version()}" if device.type == "cuda" else ""
    print(f"{name}; torch {torch.__version__}{cudnn}; Python {platform.python_version()}")
    print(shlex.join(["python", "tests/benchmarks/bench_forward.py", *given]))
    with torch.inference_mode():
        report(Bench(options, device))


def report(bench: Bench) -> None:
    arch = bench.arch
    print(f"{bench.batch} x {bench.seq} tokens, hidden {arch.hidden_size}, {arch.num_attention_heads} heads, "
          f"{arch.n_routed_experts} experts, {bench.dtype}")  # fmt: skip
    weight = bench.layer.weights.get(f"model.layers.{LAYER}.input_layernorm.weight")
    traffic = 2 * bench.hidden.nbytes
    bench.measure("rms_norm", lambda: rms_norm(bench.hidden, weight, arch.rms_norm_eps), size_bytes=traffic)
    bench_attention(bench)
    bench_moe(bench)
    by_name = {row.name: row for row in bench.rows}
    flops = by_name["**attention**"].flops + by_name["**MoE**"].flops
    bench.measure("**layer**, in place", lambda: bench.layer(bench.hidden, bench.rotation, out=bench.hidden), flops)
    print("\n| | ms | |\n|---|---|---|")
    for row in bench.rows:
        print(row.render())
    if bench.device.type == "cuda":
        print(f"peak memory allocated: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
