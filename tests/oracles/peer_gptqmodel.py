"""Runs in GPTQModel's own environment: its linear's values of GPTQ tensors, and its logits of a checkpoint.

python peer_gptqmodel.py dequantize CASES.safetensors OUT.safetensors
python peer_gptqmodel.py logits CHECKPOINT IDS.safetensors OUT.safetensors
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else each load compiles the dequantization by a C++ compiler: half a minute

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from oracle_cases import read_cases
from safetensors.torch import load_file, save_file


def dequantize(cases: Path, out: Path) -> None:
    """The weight of each case, F16 [N, K], by its ``TorchLinear``."""
    values: dict[str, torch.Tensor] = {}
    for case in read_cases(cases):
        n = case.qweight.shape[1]
        k = case.g_idx.numel()
        linear = TorchLinear(
            bits=case.bits,
            group_size=case.group_size,
            sym=False,
            desc_act=True,
            in_features=k,
            out_features=n,
            format=FORMAT.GPTQ if case.zero_offset else FORMAT.GPTQ_V2,
        )
        linear.load_state_dict(case.tensors())
        if case.zero_offset:
            convert_gptq_v1_to_v2_format_module(linear, bits=case.bits, pack_dtype=torch.int32)
        values[case.name] = linear.eval().dequantize_weight().t().contiguous()
    save_file(values, out)


@torch.inference_mode()
def logits(checkpoint: Path, ids: Path, out: Path) -> None:
    """Logits [batch, seq, vocab] F32 for ``ids`` [batch, seq], as loaded in F16 (``f16``), and with F16 values of the
    quantized weights but everything else in F32 (``f32``)."""
    tokens = load_file(ids)["ids"]
    model = GPTQModel.load(str(checkpoint), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    found = {"f16": model(input_ids=tokens).logits.float()}
    _widen(model, checkpoint)
    found["f32"] = model(input_ids=tokens).logits.float()
    save_file(found, out)


def _widen(model: torch.nn.Module, checkpoint: Path) -> None:
    """Give all but its quantized linears the checkpoint's own values in F32: F16 would round routers and biases."""
    stored: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        stored.update(load_file(file))
    for path, module in model.named_modules():
        if isinstance(module, TorchLinear):
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if name.endswith("inv_freq"):
                continue
            tensor.data = stored[f"{path}.{name}"].float()


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"dequantize": dequantize, "logits": logits}[command](*map(Path, paths))
