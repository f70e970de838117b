"""What a GPU computes again and again, recorded once and replayed: CUDA graphs, where they pay.

The host launches the thousands of kernels of an attack one by one, and with small images a GPU waits for it; recorded,
they are one launch. Whether that is quicker depends on the network, the batch and the machine, so it is tried: the
second call is timed both ways, the results are compared, and the quicker way stays. `RNAS_CUDA_GRAPHS=0` in the
environment switches it off; `1` switches it on before torch 2.13, where a recording that fails spoils torch's random
numbers for the rest of the process.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rnas.frozen import is_hooked, is_known

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
    """The recordings on a network whose tensors lie at `places`; None where launching is better."""

    places: tuple[int, ...]
    seen: set[Hashable] = field(default_factory=set)
    recorded: dict[Hashable, Recorded | None] = field(default_factory=dict)


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def replayed(function: Function, net: nn.Module, key: Hashable, *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, by replaying a recording of it where that is quicker; with the same random numbers.

    `function` depends on its inputs, the parameters and buffers of `net` and what `key` stands for alone, reads no
    value back to the host, and leaves nothing behind but its result, which is new images for the first of its inputs.
    Only with networks of rnas's own is that known: with others it is called each time.
    """
    places = _places(net) if recordable(inputs[0].device) else None
    if places is None:
        return function(*inputs)
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


def forget(net: nn.Module) -> None:
    """Give the memory of its recordings back."""
    _kept.pop(net, None)


def recordable(device: torch.device) -> bool:
    """Whether to record on `device`."""
    wish = os.environ.get("RNAS_CUDA_GRAPHS")
    return device.type == "cuda" and (torch.__version__ >= "2.13" if wish is None else wish != "0")


def _places(net: nn.Module) -> tuple[int, ...] | None:
    """Where all that `net` computes with lies; None if that may not be all: it has hooks, or a module of others.

    Once for every attack, so without the names that `net.parameters()` makes up: half of the time.
    """
    places: list[int] = []
    kinds: set[type] = set()
    todo = [net]
    while todo:
        module = todo.pop()
        if is_hooked(module):
            return None
        kinds.add(type(module))
        todo.extend(child for child in module._modules.values() if child is not None)
        for tensors in (module._parameters, module._buffers):
            places.extend(t.data_ptr() for t in tensors.values() if t is not None)
    return tuple(places) if all(map(is_known, kinds)) else None


ROOM = 6
"""A recording keeps the memory of a pass for good. So much more must be free: an α step keeps 5.5 times as much."""


def _tried(function: Function, inputs: tuple[Tensor, ...]) -> tuple[Recorded | None, Tensor]:
    """The recording, if it is right, quicker and there is room for it; and the result.

    Random numbers are drawn as by one call, whatever comes of the recording.
    """
    device = inputs[0].device
    before = _generator_state(device)
    expected, launched = _timed(partial(function, *inputs), device)
    after = _generator_state(device)
    try:
        free = _free_memory(device)
        _set_generator(device, before)
        recorded = Recorded(function, inputs)
        _set_generator(device, before)
        result, replayed_in = _timed(partial(recorded, *inputs), device)
        same_numbers = torch.equal(_generator_state(device), after)
        left = _free_memory(device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        why = next(iter(str(error).splitlines()), type(error).__name__)
        _warn(f"could not be recorded as a CUDA graph ({why})")
        return None, expected
    finally:
        _set_generator(device, after)
    if not (same_numbers and _alike(result, expected, inputs[0])):
        _warn("gave another result when replayed as a CUDA graph")
        return None, expected
    roomy = left >= ROOM * (free - left)
    return (recorded if roomy and pays(launched, replayed_in) else None), expected


def pays(launched: float, replayed_in: float) -> bool:
    """Whether to replay, from the seconds of a call either way."""
    return replayed_in < launched


def _alike(result: Tensor, expected: Tensor, start: Tensor) -> bool:
    """Equal but for what rounding in another order does: where a gradient is about zero, its sign may differ."""
    result, expected = result.nan_to_num(), expected.nan_to_num()  # of a network that has diverged
    return bool((result - expected).abs().mean() <= 0.1 * (expected - start).abs().mean())


def _warn(what: str) -> None:
    warnings.warn(f"an attack {what}: it goes on without", RuntimeWarning, stacklevel=4)


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_generator(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _free_memory(device: torch.device) -> int:
    """In bytes, what torch keeps for later use included; without end on a CPU."""
    if device.type != "cuda":
        return 2**63
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def _timed(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    wait(device)
    started = time.perf_counter()
    result = run()
    wait(device)
    return result, time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until `device` has computed all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# One for each device: libraries keep workspaces for every stream that they see.
_streams: dict[torch.device, torch.cuda.Stream] = {}


def record(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """What replays `run`, and where its result lies then."""
    with torch.cuda.device(device):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if device not in _streams:
            _streams[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside = _streams[device]
        try:
            aside.wait_stream(stream)
            with torch.cuda.stream(aside):
                run()  # once on that stream, as torch's notes on CUDA graphs want it
            stream.wait_stream(aside)
            with torch.cuda.graph(graph, stream=aside):
                output = run()
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own
    return graph.replay, output
