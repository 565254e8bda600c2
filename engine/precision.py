"""Which number format a run computes in: bf16 where the processor multiplies it itself, fp32 elsewhere."""

from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


def fitting_precision(device: torch.device) -> tuple[Precision, str]:
    """What `--precision auto` takes on a device, and why."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "which this GPU multiplies itself"
        return "fp32", "since this GPU does not multiply bf16 itself"
    if device.type == "mps":
        return "fp32", "on a Mac's GPU, on which nothing here was ever tried"
    # every AVX-512 processor can compute in bf16, but only these instructions make it faster than fp32
    has = torch.cpu.get_capabilities()
    if torch.backends.mkldnn.is_available() and (has.get("amx_bf16") or has.get("avx512_bf16")):
        return "bf16", f"which this processor multiplies itself ({'AMX' if has.get('amx_bf16') else 'AVX-512'})"
    return "fp32", "since this processor has no instructions for bf16 (AMX, AVX512-BF16)"
