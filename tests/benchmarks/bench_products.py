"""A new token's time with weights multiplied as they are stored, and dequantized. Run by hand:

    python tests/benchmarks/bench_products.py [--dir /tmp/products] [--layers 4] [--experts 32] [--batch 1 8 32]
    python tests/benchmarks/bench_products.py --quick --device cpu          # the script itself, at small widths

Writes two random checkpoints of DeepSeek-V3's widths into ``--dir`` (kept, and taken if they are there): FP8 in blocks
of 128, and GPTQ of 4 bits in groups of 128 with attention in BF16, as ``quantize`` leaves it. Of each, some sequences
get a token at a time, the same ones in all cases:

- *dense, resident*: all weights dequantized once, products by the matrix library;
- *dense, as stored*: dequantized at each use;
- *stored*: by the kernels, chosen experts in one launch where each has few tokens;
- *stored, one by one*: the same without that.

Times are medians over ``--new-tokens`` of a second run, after a first that reads and compiles; a wait for the device
stands at both ends of each. *GPU busy* is what the profiler counts of kernels: the rest of the time the GPU waits for
the host. Differences are those of the logits to *dense, resident*, root mean squares. The first layer has no experts.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import bench_forward
import torch
from safetensors.torch import save_file

from weightkit.family import Architecture
from weightkit.layouts import open_checkpoint
from weightkit.model import CheckpointWeights, Model, mlp
from weightkit.units import human_bytes

QUICK = {"hidden": 1792, "heads": 4, "experts": 8, "layers": 2, "new_tokens": 3, "batch": [1, 4]}
GROUP = 128
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
GPTQ = {
    "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False, "quant_method": "gptq",
    "checkpoint_format": "gptq", "pack_dtype": "int32",
    "dynamic": {r"-:.*self_attn\..*": {}, r"-:.*layers\.0\.mlp\..*": {}},
}  # fmt: skip
CASES = ("dense, resident", "dense, as stored", "stored", "stored, one by one")


@dataclass(frozen=True)
class Row:
    """What was measured in one case."""

    form: str
    case: str
    batch: int
    seconds: float
    busy_s: float | None
    size_bytes: int
    logits: torch.Tensor

    def render(self, first: Row) -> str:
        off = (self.logits - first.logits).square().mean().sqrt() / first.logits.square().mean().sqrt()
        busy = "" if self.busy_s is None else f"{self.busy_s * 1e3:.2f}"
        cells = [self.form, str(self.batch), self.case, f"{self.seconds * 1e3:.2f}", busy]
        cells += [f"{self.seconds / first.seconds:.2f}", human_bytes(self.size_bytes), f"{float(off):.1e}"]
        return "| " + " | ".join(cells) + " |"


def shapes_of(arch: Architecture, layer: int) -> dict[str, tuple[int, int]]:
    """The linear maps of a layer."""
    h, heads, q_lora, prefix = (
        arch.hidden_size,
        arch.num_attention_heads,
        arch.q_lora_rank or 0,
        f"model.layers.{layer}",
    )
    shapes = {
        "self_attn.q_a_proj": (q_lora, h),
        "self_attn.q_b_proj": (heads * arch.qk_head_dim, q_lora),
        "self_attn.kv_a_proj_with_mqa": (arch.kv_lora_rank + arch.qk_rope_head_dim, h),
        "self_attn.kv_b_proj": (heads * (arch.qk_nope_head_dim + arch.v_head_dim), arch.kv_lora_rank),
        "self_attn.o_proj": (h, heads * arch.v_head_dim),
    }
    widths = {"mlp": arch.intermediate_size}
    if arch.is_moe_layer(layer):
        names = ("shared_experts", *(f"experts.{number}" for number in range(arch.n_routed_experts)))
        widths = {f"mlp.{name}": arch.moe_intermediate_size for name in names}
    for name, width in widths.items():
        shapes |= {f"{name}.gate_proj": (width, h), f"{name}.up_proj": (width, h), f"{name}.down_proj": (h, width)}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def plain_tensors(arch: Architecture, layer: int) -> dict[str, torch.Tensor]:
    """Norms and the router of a layer."""
    prefix, h = f"model.layers.{layer}", arch.hidden_size
    norms = {"input_layernorm": h, "post_attention_layernorm": h}
    norms |= {"self_attn.q_a_layernorm": arch.q_lora_rank or 0, "self_attn.kv_a_layernorm": arch.kv_lora_rank}
    made = {f"{prefix}.{name}.weight": torch.ones(width, dtype=torch.bfloat16) for name, width in norms.items()}
    if arch.is_moe_layer(layer):
        made[f"{prefix}.mlp.gate.weight"] = (torch.randn(arch.n_routed_experts, h) * h**-0.5).bfloat16()
        made[f"{prefix}.mlp.gate.e_score_correction_bias"] = torch.zeros(arch.n_routed_experts)
    return made


def stored(form: str, name: str, shape: tuple[int, int], device: torch.device) -> dict[str, torch.Tensor]:
    """A random linear map, in the format that ``form`` keeps it in; normal, or nearly, with its products' size kept."""
    n, k = shape
    if form == "int4" and ".mlp." in name and not name.startswith("model.layers.0."):
        words = torch.randint(-(2**31), 2**31, (k // 8, n), device=device).to(torch.int32)
        scales = torch.full((k // GROUP, n), k**-0.5 / 4.6, dtype=torch.float16)
        zeros = torch.full((k // GROUP, n // 8), 0x77777777, dtype=torch.int32)
        g_idx = torch.arange(k, dtype=torch.int32) // GROUP
        parts = {"qweight": words, "qzeros": zeros, "scales": scales, "g_idx": g_idx}
        return {f"{name}.{leaf}": tensor.cpu() for leaf, tensor in parts.items()}
    weight = torch.randn(n, k, device=device)
    if form == "int4":
        return {f"{name}.weight": weight.mul_(k**-0.5).bfloat16().cpu()}
    scale = torch.full((-(-n // 128), -(-k // 128)), k**-0.5)
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn).cpu(), f"{name}.weight_scale_inv": scale}


def files(form: str, arch: Architecture, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each file."""
    vocab, h = arch.vocab_size, arch.hidden_size
    ends = {name: torch.randn(vocab, h).bfloat16() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    yield ends | {"model.norm.weight": torch.ones(h, dtype=torch.bfloat16)}
    for layer in range(arch.num_hidden_layers):
        made = plain_tensors(arch, layer)
        for name, shape in shapes_of(arch, layer).items():
            made |= stored(form, name, shape, device)
        yield made


def write(folder: Path, form: str, options: argparse.Namespace, device: torch.device) -> None:
    """Write the checkpoint, if it is not there."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = bench_forward.config(options) | {"num_hidden_layers": options.layers, "vocab_size": 8192}
    config["quantization_config"] = FP8 if form == "fp8" else GPTQ
    torch.manual_seed(0)
    weight_map, size = {}, 0
    for number, tensors in enumerate(files(form, Architecture.from_config(config), device)):
        file = f"model-{number:05}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def decode(model: Model, ids: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, list[float]]:
    """The last logits of ``ids`` [batch, tokens], a token at a time, and the seconds of each."""
    cache, times = model.new_cache(), []
    logits = torch.empty(0)
    for column in ids.split(1, dim=1):
        wait(device)
        started = time.perf_counter()
        logits = model(column, cache)
        wait(device)
        times.append(time.perf_counter() - started)
    return logits.float().cpu(), times


def busy(model: Model, ids: torch.Tensor, device: torch.device) -> float | None:
    """Seconds that a token's kernels run; None on a CPU."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        decode(model, ids[:, :4], device)
    events = profile.key_averages()
    return float(sum(event.self_device_time_total for event in events)) * 1e-6 / min(4, ids.shape[1])


def measure(path: Path, form: str, case: str, batches: Sequence[int], options: argparse.Namespace) -> Iterator[Row]:
    """One case with each number of sequences."""
    checkpoint = open_checkpoint(path)
    packed = CheckpointWeights(checkpoint, device=options.device, dtype="bf16").packed_bytes
    memory = packed if case == "dense, as stored" else None
    with CheckpointWeights(checkpoint, device=options.device, dtype="bf16", memory_bytes=memory) as weights:
        if case.startswith("dense"):
            weights.products = None
        if case.startswith("stored") and weights.products is None:
            return
        group_tokens = mlp.GROUP_TOKENS
        mlp.GROUP_TOKENS = 0 if case == "stored, one by one" else group_tokens
        try:
            model = Model(weights.arch, weights)
            for batch in batches:
                generator = torch.Generator().manual_seed(batch)
                ids = torch.randint(0, weights.arch.vocab_size, (batch, options.new_tokens), generator=generator)
                decode(model, ids, weights.device)
                logits, times = decode(model, ids, weights.device)
                median, running = statistics.median(times), busy(model, ids, weights.device)
                yield Row(form, case, batch, median, running, weights.kept_bytes, logits)
        finally:
            mlp.GROUP_TOKENS = group_tokens


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/tmp/products"))
    parser.add_argument("--forms", nargs="+", choices=("fp8", "int4"), default=["fp8", "int4"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=7168, help="all widths but the heads' scale with it")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences at once")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--quick", action="store_true", help="small widths, to try the script")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--quick" in given:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(given)
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; Python {platform.python_version()}")
    print(shlex.join(["python", "tests/benchmarks/bench_products.py", *given]))
    print(f"{options.layers} layers, the first dense; hidden {options.hidden}, {options.experts} experts\n", flush=True)
    print("| weights | sequences | | ms a token | GPU busy, ms | of dense, resident | kept | differs by |")
    print("|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for form in options.forms:
            path = options.dir / form
            write(path, form, options, torch.device("cuda" if on_gpu else "cpu"))
            first: dict[int, Row] = {}
            for case in options.cases:
                for row in measure(path, form, case, options.batch, options):
                    print(row.render(first.setdefault(row.batch, row)), flush=True)


if __name__ == "__main__":
    main()
