"""What a GPU computes again and again, recorded once and replayed: CUDA graphs, where they pay.

The host launches the thousands of kernels of an attack one by one, and with small images a GPU waits for it; recorded,
they are one launch. Whether that is quicker depends on the network, the batch and the machine, so it is tried: the
second call is timed both ways, the results are compared, and the quicker way stays. `RNAS_CUDA_GRAPHS=0` in the
environment switches it off.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor]


class Recorded:
    """`function` of tensors shaped like `inputs`, recorded. What else it reads must stay where it is in memory."""

    def __init__(self, function: Function, inputs: tuple[Tensor, ...]):
        self._inputs = [t.clone() for t in inputs]
        self._replay, self._output = record(partial(function, *self._inputs), inputs[0].device)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for kept, new in zip(self._inputs, inputs, strict=True):
            kept.copy_(new)
        self._replay()
        return self._output.clone()


@dataclass
class _Kept:
    """The recordings on a network whose tensors lie at `places`; None where launching is quicker."""

    places: tuple[int, ...]
    seen: set[Hashable] = field(default_factory=set)
    recorded: dict[Hashable, Recorded | None] = field(default_factory=dict)


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def replayed(function: Function, net: nn.Module, key: Hashable, *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, by replaying a recording of it where that is quicker; with the same random numbers.

    `function` depends on its inputs, the parameters and buffers of `net` and what `key` stands for alone, reads no
    value back to the host, and leaves nothing behind but its result, which is new images for the first of its inputs.
    """
    if not recordable(inputs[0].device):
        return function(*inputs)
    places = tuple(t.data_ptr() for t in chain(net.parameters(), net.buffers()))
    kept = _kept.get(net)
    if kept is None or kept.places != places:
        kept = _kept[net] = _Kept(places)
    key = (key, *((t.shape, t.stride(), t.dtype, t.device) for t in inputs))
    if key not in kept.seen:  # the first call prepares kernels and chooses among them
        kept.seen.add(key)
        return function(*inputs)
    if key not in kept.recorded:
        kept.recorded[key], result = _tried(function, inputs)
        return result
    recorded = kept.recorded[key]
    return function(*inputs) if recorded is None else recorded(*inputs)


def recordable(device: torch.device) -> bool:
    """Whether there are graphs on `device`."""
    return device.type == "cuda" and os.environ.get("RNAS_CUDA_GRAPHS") != "0"


def _tried(function: Function, inputs: tuple[Tensor, ...]) -> tuple[Recorded | None, Tensor]:
    """The recording, if it is right and quicker, and the result. Random numbers are drawn as by one call."""
    device = inputs[0].device
    same_numbers = partial(torch.random.fork_rng, [device] if device.type == "cuda" else [])
    with same_numbers():
        expected, launched = _timed(partial(function, *inputs), device)
    try:
        with same_numbers():
            recorded = Recorded(function, inputs)
        result, replayed_in = _timed(partial(recorded, *inputs), device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        _warn(f"could not be recorded as a CUDA graph ({str(error).splitlines()[0]})")
        return None, function(*inputs)
    if not _alike(result, expected, inputs[0]):
        _warn("gave another result when replayed as a CUDA graph")
        return None, expected
    return (recorded if pays(launched, replayed_in) else None), result


def pays(launched: float, replayed_in: float) -> bool:
    """Whether to replay, from the seconds of a call either way."""
    return replayed_in < launched


def _alike(result: Tensor, expected: Tensor, start: Tensor) -> bool:
    """Equal but for what rounding in another order does: where a gradient is about zero, its sign may differ."""
    return bool((result - expected).abs().mean() <= 0.1 * (expected - start).abs().mean())


def _warn(what: str) -> None:
    warnings.warn(f"an attack {what}: it goes on without, as quick as before", RuntimeWarning, stacklevel=4)


def _timed(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    _wait(device)
    started = time.perf_counter()
    result = run()
    _wait(device)
    return result, time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def record(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """What replays `run`, and where its result lies then."""
    with torch.cuda.device(device):
        graph, stream, aside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            aside.wait_stream(stream)
            with torch.cuda.stream(aside):
                run()  # once on another stream, as torch's notes on CUDA graphs want it
            stream.wait_stream(aside)
            with torch.cuda.graph(graph):
                output = run()
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own
    return graph.replay, output
