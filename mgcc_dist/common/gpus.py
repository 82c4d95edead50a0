"""Peak FLOP/s of GPUs, from the vendor's data sheets: the one table that every utilisation is computed with."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class PeakTeraflops:
    """Dense peak in TFLOP/s (without sparsity), with float32 accumulation.

    Where the data sheet gives only the rate with sparsity, this is half of it.
    """

    fp16: float
    tf32: float
    """on GPUs without TF32, that of fp32"""
    fp32: float
    """on CUDA cores, no tensor cores"""
    has_bf16: bool = True
    """whether bfloat16 runs on the tensor cores, then at the rate of fp16"""


# Source: NVIDIA's data sheets of V100, T4, A10, A40, A100, L4, L40S, H100, H200 and HGX B200; of the RTX cards, the
# white papers of the Ampere GA102 and the Ada architecture.
PEAKS = {
    "V100 PCIe": PeakTeraflops(112, 14, 14, has_bf16=False),
    "V100 SXM2": PeakTeraflops(125, 15.7, 15.7, has_bf16=False),
    "T4": PeakTeraflops(65, 8.1, 8.1, has_bf16=False),
    "A10": PeakTeraflops(125, 62.5, 31.2),
    "A40": PeakTeraflops(149.7, 74.8, 37.4),
    "A100": PeakTeraflops(312, 156, 19.5),
    "RTX 3090": PeakTeraflops(71, 35.6, 35.6),
    "RTX 4090": PeakTeraflops(165.2, 82.6, 82.6),
    "L4": PeakTeraflops(121, 60, 30.3),
    "L40S": PeakTeraflops(362, 183, 91.6),
    "H100 PCIe": PeakTeraflops(756, 378, 51),
    "H100 NVL": PeakTeraflops(835, 417, 60),
    "H100": PeakTeraflops(989, 495, 67),
    "H200 NVL": PeakTeraflops(835, 417, 60),
    "H200": PeakTeraflops(989, 495, 67),
    "B200": PeakTeraflops(2250, 1125, 75),
}
# What torch.cuda.get_device_name says. A part of a GPU (MIG) or another variant, such as the A10G, matches none.
NAMES = {
    "V100 PCIe": r"Tesla V100-PCIE-(16|32)GB",
    "V100 SXM2": r"Tesla V100-SXM2-(16|32)GB",
    "T4": r"(NVIDIA|Tesla) T4",
    "A10": r"NVIDIA A10",
    "A40": r"NVIDIA A40",
    "A100": r"(NVIDIA )?A100(-SXM4-[48]0GB|-PCIE-[48]0GB| 80GB PCIe)",
    "RTX 3090": r"(NVIDIA )?GeForce RTX 3090",
    "RTX 4090": r"NVIDIA GeForce RTX 4090",
    "L4": r"NVIDIA L4",
    "L40S": r"NVIDIA L40S",
    "H100 PCIe": r"NVIDIA H100 PCIe",
    "H100 NVL": r"NVIDIA H100 NVL",
    "H100": r"NVIDIA H100 80GB HBM3",
    "H200 NVL": r"NVIDIA H200 NVL",
    "H200": r"NVIDIA H200",
    "B200": r"NVIDIA B200",
}


def peak_flops(device_name: str, precision: str, tf32: bool) -> float | None:
    """Return the peak FLOP/s of a GPU at `precision` ("no", "fp16" or "bf16"); None if it is not known."""
    gpu = next((gpu for gpu, pattern in NAMES.items() if re.fullmatch(pattern, device_name)), None)
    if gpu is None:
        return None
    peak = PEAKS[gpu]
    if precision == "no":
        return 1e12 * (peak.tf32 if tf32 else peak.fp32)
    return 1e12 * peak.fp16 if precision == "fp16" or peak.has_bf16 else None
