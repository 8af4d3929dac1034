"""Greedy tokens of one full-width checkpoint in every form that weightkit writes, beside transformers' own model.

    python tests/benchmarks/full_width.py --dir /tmp/full/fp8 --layers 2 --experts 16 --tokenizer
    manifests/pico/checkpoint python tests/benchmarks/tokens.py --checkpoint /tmp/full/fp8 --work /tmp/full
    --new-tokens 16

Makes the BF16 cast, FP8 and BF16 rank files and the merged ones from the FP8 checkpoint, runs ``weightkit.generate``
on all of them, and transformers on the BF16 one. All of ours must give the same tokens; transformers rounds elsewhere
in BF16, so with random weights, whose logits lie close together, it may part after some tokens: the table says after
how many, and the F32 columns compare the first logits where rounding plays no part.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import weightkit as wk
from weightkit.generation import Runtime

PROMPT = list(range(40, 56))


def ours(path: Path, new_tokens: int, dtype: str | None = None) -> tuple[list[int], torch.Tensor, float]:
    """Greedy tokens, the logits after the prompt [vocab] F32 on the CPU, and seconds."""
    started = time.perf_counter()
    with Runtime(path, dtype=dtype) as runtime:
        runtime.eos_ids = frozenset()  # random weights stop at random
        tokens = list(runtime.generate(PROMPT, max_new_tokens=new_tokens).token_ids)
        logits = runtime.prefill(PROMPT, runtime.model.new_cache()).cpu()
    return tokens, logits, time.perf_counter() - started


def theirs(path: Path, new_tokens: int, dtype: torch.dtype) -> tuple[list[int], torch.Tensor, float]:
    """The same from transformers."""
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    ids, tokens = torch.tensor([PROMPT], device=device), []
    with torch.inference_mode():
        first = model(ids).logits[0, -1].float().cpu()
        for _ in range(new_tokens):
            tokens.append(int(model(ids).logits[0, -1].argmax()))
            ids = torch.cat((ids, ids.new_tensor([[tokens[-1]]])), dim=1)
    return tokens, first, time.perf_counter() - started


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two runs share from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a full-width FP8 checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder for the other forms")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--mp", type=int, default=8)
    args = parser.parse_args()

    source = wk.open_checkpoint(args.checkpoint)
    forms = {"fp8": args.checkpoint}
    for name, make in {
        "bf16": lambda: wk.cast(source, "bf16"),
        f"mp{args.mp}": lambda: wk.shard(source, mp=args.mp),
        f"bf16-mp{args.mp}": lambda: wk.shard(wk.cast(source, "bf16"), mp=args.mp),
        "merged": lambda: wk.merge(wk.open_checkpoint(args.work / f"mp{args.mp}")),
    }.items():
        forms[name] = args.work / name
        wk.write(make(), forms[name], progress=False)
    results = {f"weightkit, {name}": ours(path, args.new_tokens) for name, path in forms.items()}
    results["transformers, bf16"] = theirs(forms["bf16"], args.new_tokens, torch.bfloat16)
    reference = results["weightkit, fp8"][0]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}\n")
    print("| run | same first tokens | of | seconds | tokens |\n|---|---|---|---|---|")
    for name, (tokens, _, seconds) in results.items():
        shown = " ".join(map(str, tokens[:8]))
        print(f"| {name} | {common(tokens, reference)} | {len(reference)} | {seconds:.1f} | {shown} ... |")
    exact, other = ours(forms["bf16"], 1, "f32")[1], theirs(forms["bf16"], 1, torch.float32)[1]
    difference = float((exact - other).abs().max() / other.abs().max())
    print(f"\nF32, logits after the prompt: largest difference to transformers {difference:.1e} of the largest logit")
    parted = [name for name in forms if results[f"weightkit, {name}"][0] != reference]
    if parted:
        raise SystemExit(f"not the tokens of the FP8 checkpoint: {', '.join(parted)}")


if __name__ == "__main__":
    main()
