"""What products with quantized weights may differ by from exact ones, and kernels compiled without a GPU.

The bound. BF16 and F16 products are exact in F32. A sum of K of them in F32, in any order, is off by at most
K * 2**-23 times the sum of their magnitudes: 2**-24 each where a sum is rounded, twice that where tensor cores cut it
off. F32 products are rounded themselves, which is one more. The result is rounded to its dtype once. In addition
roundings do not all go one way: the error's root mean square stays within that of the last rounding and sqrt(K) times
2**-23.
"""

from __future__ import annotations

import torch

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""Half a unit in the last place, as a fraction of the value."""

SUM_ROUNDING = 2.0**-23
"""Of a sum in F32, as a fraction of its terms' magnitudes: what each addition may lose."""

SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}


def assert_within_bound(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """``found`` [T, N] against x [T, K] times ``weight`` [N, K], exact values in any dtype."""
    rows, matrix = x.double(), weight.double()
    exact, magnitudes = rows @ matrix.T, rows.abs() @ matrix.abs().T
    rounding = ROUNDING[found.dtype]
    off = found.double() - exact
    bound = (x.shape[1] + 1) * SUM_ROUNDING * magnitudes + rounding * exact.abs() + SMALLEST[found.dtype]
    worst = int((off.abs() - bound).argmax())
    where = [worst // found.shape[1], worst % found.shape[1]]
    assert (off.abs() <= bound).all(), f"at {where}: found {found.flatten()[worst]}, exact {exact.flatten()[worst]}"
    size = float(magnitudes.square().mean().sqrt())
    likely = rounding * float(exact.square().mean().sqrt()) + (x.shape[1] + 1) ** 0.5 * SUM_ROUNDING * size
    assert float(off.square().mean().sqrt()) <= likely


def compiled(
    kernel: object, constants: dict[str, object], pointers: dict[str, str], capability: int, warps: int, stages: int
) -> str:
    """The PTX of ``kernel``, compiled without a GPU for one of this capability, through to machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names  # type: ignore[attr-defined]
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
        constexprs={(i,): constants[name] for i, name in enumerate(names) if name in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
    )
    built = compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    assert built.asm["cubin"]
    return str(built.asm["ptx"])
