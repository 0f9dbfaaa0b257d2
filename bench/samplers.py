"""Samplers: largest differences from diffusers' schedulers, and the time of the noise and of the fused update.

    python bench/samplers.py [--only differences|times]

Differences are those of the final latents over their largest absolute value, the worst of 1, 2, 4, 10, 25 and 50 steps,
with and without Karras spacing, eta 0 and 0.7. They need diffusers. Times need neither diffusers nor a GPU; the CPU's
are of one thread, and on a GPU the Triton kernel is first checked against the torch reference.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec

import torch
from timing import device_us, median_us, print_table

from accel.kernels.sampler_step import sampler_step, sampler_step_reference
from accel.samplers.noise import gaussian

BATCH = 8


def difference_table() -> None:
    from tests.accel.against_diffusers import cases, combinations, differences

    def rows() -> Iterable[list[str]]:
        for sampler, prediction, spacing in combinations():
            found = [(case.zero_snr, differences(case)) for case in cases(sampler, prediction, spacing)]
            plain = [item.float32 for zero_snr, item in found if not zero_snr]
            zero = [item for zero_snr, item in found if zero_snr]
            yield [
                sampler,
                prediction,
                "any" if sampler in ("lcm", "consistency") else spacing,
                f"{max(plain):.1e}",
                f"{max(item.float32 for item in zero):.1e}" if zero else "-",
                f"{max(item.own_rounding for item in zero):.1e}" if zero else "-",
                f"{max(item.float64 for _, item in found):.1e}",
            ]

    print_table(
        [
            "sampler",
            "prediction",
            "spacing",
            "float32",
            "float32, zero terminal SNR",
            "diffusers float32 against float64, zero terminal SNR",
            "float64",
        ],
        rows(),
    )


def batch(shape: tuple[int, int, int], device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(BATCH, *shape, generator=generator),
        "previous": torch.randn(BATCH, *shape, generator=generator),
        "slots": torch.randperm(BATCH, generator=generator),
        "denoised": torch.randn(BATCH, *shape, generator=generator),
        "coefficients": torch.rand(BATCH, 4, generator=generator) / 2,
        "seeds": torch.arange(BATCH),
        "rows": torch.arange(BATCH),
        "finite": torch.ones(BATCH, dtype=torch.bool),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def check_kernel(shape: tuple[int, int, int]) -> float:
    """Largest absolute difference of the kernel from the reference; ends the run if it is more than rounding."""
    ours, reference = batch(shape, "cuda"), batch(shape, "cuda")
    sampler_step(**ours)
    sampler_step_reference(**reference)
    difference = float((ours["x"] - reference["x"]).abs().max())
    same = all(torch.equal(ours[name], reference[name]) for name in ("previous", "finite"))
    if difference > 1e-5 or not same:
        sys.exit(f"the Triton kernel differs from the reference by {difference:.1e} at {list(shape)}")
    return difference


def time_table(device: str) -> None:
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread"
    print(f"\n{name}, torch {torch.__version__}, batch of {BATCH}, median of 100, in µs")

    def rows() -> Iterable[list[str]]:
        for shape in ((4, 32, 32), (4, 64, 64), (4, 128, 128)):
            tensors = batch(shape, device)
            noise = median_us(partial(gaussian, tensors["seeds"], tensors["rows"], shape, device))
            reference = median_us(partial(sampler_step_reference, **tensors))
            row = ["x".join(map(str, shape)), f"{noise:.0f}", f"{reference:.0f}"]
            if device == "cuda":
                difference = check_kernel(shape)
                kernel = partial(sampler_step, **tensors)
                called = median_us(kernel)
                row += [f"{called:.0f}", f"{device_us(kernel):.1f}", f"{reference / called:.0f}x", f"{difference:.1e}"]
            yield row

    header = ["latent", "noise in torch", "update in torch"]
    if device == "cuda":
        header += ["update in Triton", "of it on the device", "speed-up", "largest difference"]
    print_table(header, rows())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["differences", "times"])
    only = parser.parse_args().only
    if only != "times":
        if find_spec("diffusers") is None:
            print("DIFFERENCES FROM DIFFUSERS NOT MEASURED: diffusers is not installed here")
        else:
            warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
            difference_table()
    if only != "differences":
        time_table("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
