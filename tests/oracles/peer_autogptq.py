"""Runs in auto-gptq's own environment: its quantized linears' values of GPTQ tensors (checkpoint_format ``gptq``).

python peer_autogptq.py CASES.safetensors OUT.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old
from oracle_cases import Case, read_cases
from safetensors.torch import save_file


@torch.inference_mode()
def weight_of(case: Case, kind: type[torch.nn.Module]) -> torch.Tensor:
    """The weight, F16 [N, K]: what the linear makes of each unit vector, sums of one product and zeros."""
    k, n = case.g_idx.numel(), case.qweight.shape[1]
    linear = kind(case.bits, case.group_size, k, n, bias=False)
    linear.load_state_dict(case.tensors())
    linear.eval()
    out: torch.Tensor = linear(torch.eye(k, dtype=torch.float16))
    return out.t().contiguous()


def main(cases: Path, out: Path) -> None:
    """``NAME`` by the linear that heeds ``g_idx``, ``NAME/old`` by the first one, which does not, where it need not."""
    values: dict[str, torch.Tensor] = {}
    for case in read_cases(cases):
        values[case.name] = weight_of(case, qlinear_cuda.QuantLinear)
        if case.ordered and (case.group_size == -1 or case.g_idx.numel() % case.group_size == 0):
            values[f"{case.name}/old"] = weight_of(case, qlinear_cuda_old.QuantLinear)
    save_file(values, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
