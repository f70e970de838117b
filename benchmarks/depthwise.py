"""The backward passes of the supernet's depthwise convolutions on a CPU: torch's own, and ours (`nets.fast_kernels`).

    python -m benchmarks.depthwise [--batch-size 16] [--threads 1] [--rounds 30] [--json FILE]

Milliseconds, medians of interleaved rounds, of the gradient for the input and of that for the kernels, at the three
sizes of the paper's supernet. Dilated ones with stride 2 are not listed: they are computed as plain ones of every other
pixel (`nets.fast_functions`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import add_options, interleaved, machine, median, program, save, settle
from rnas.compute.layout import arrange
from rnas.fast.cpu_kernels import depthwise, depthwise_input_grad, depthwise_weight_grad

MAPS = ((16, 32), (32, 16), (64, 8))  # channels, pixels a side
KERNELS = ((3, 1, 1), (5, 1, 1), (3, 1, 2), (5, 1, 2), (3, 2, 1), (5, 2, 1))  # size, dilation, stride


def torchs(x: Tensor, kernel: Tensor, grad: Tensor, stride: int, dilation: int, of_input: bool) -> Tensor:
    """The gradient as autograd computes it: for `x`, or for `kernel`."""
    padding = dilation * (kernel.shape[2] // 2)
    wanted = [of_input, not of_input, False]
    geometry = [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], x.shape[1]
    found = torch.ops.aten.convolution_backward(grad, x, kernel, None, *geometry, wanted)
    result: Tensor = found[0 if of_input else 1]
    return result


def measure(
    batch_size: int, channels: int, side: int, kernel_size: int, dilation: int, stride: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds of each gradient either way. Checks that they agree."""
    x = arrange(torch.randn(batch_size, channels, side, side))
    kernel = torch.randn(channels, 1, kernel_size, kernel_size)
    grad = arrange(torch.randn_like(depthwise(x, kernel, stride, dilation)))
    found: dict[str, Any] = {"channels": channels, "side": side, "kernel": kernel_size}
    found |= {"dilation": dilation, "stride": stride}
    for what, ours in (("input", depthwise_input_grad), ("kernels", depthwise_weight_grad)):

        def by_torch(of_input: bool = what == "input") -> Tensor:
            return torchs(x, kernel, grad, stride, dilation, of_input)

        def by_us(ours: Callable[..., Tensor] = ours) -> Tensor:
            return ours(x, kernel, grad, stride, dilation)

        torch.testing.assert_close(by_us(), by_torch(), rtol=1e-3, atol=1e-2)
        samples = interleaved({"torch": by_torch, "ours": by_us}, rounds, "cpu")
        found[what] = {way: round(1e3 * (median(of) or 0.0), 3) for way, of in samples.items()}
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch_size=16, rounds=30)
    options = parser.parse_args(arguments)
    settle(options)
    (size,) = options.batch_size
    result: dict[str, Any] = {"machine": machine("cpu"), "batch_size": size, "convolutions": []}
    print(f"{'ms, torch then ours':38}{'for the input':>15}{'for the kernels':>17}")
    for channels, side in MAPS:
        for kernel, dilation, stride in KERNELS:
            found = measure(size, channels, side, kernel, dilation, stride, options.rounds)
            result["convolutions"].append(found)
            name = f"{kernel}x{kernel}, dilation {dilation}, stride {stride}, {channels} x {side}x{side}"
            shown = (f"{found[what]['torch']:.2f} {found[what]['ours']:.2f}" for what in ("input", "kernels"))
            print(f"{name:38}" + "".join(f"{pair:>16}" for pair in shown), flush=True)
    save(options.json, result)


if __name__ == "__main__":
    program(main)
