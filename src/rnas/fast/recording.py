"""What a GPU computes again and again, recorded once and replayed: CUDA graphs, where they pay.

The host launches the thousands of kernels of an attack or of a training step one by one, and with small images a GPU
waits for it; recorded, they are one launch. Whether that is quicker depends on the network, the batch and the machine,
so it is tried: the second call is timed both ways, the results are compared, and the quicker way stays. All recordings
on a device share their memory. `RNAS_CUDA_GRAPHS=0` in the environment switches it off; `1` switches it on before torch
2.13, where a recording that fails spoils torch's random numbers for the rest of the process.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from rnas.compute.freezing import is_hooked, is_known

Values = tuple[Tensor, ...]
Function = Callable[..., Values]
R = TypeVar("R")


class Work(Hashable, Protocol):
    """What may be recorded: a frozen dataclass, so that equal ones do the same and a recording of one is one of all."""

    def __call__(self, net: nn.Module, /, *inputs: Any, **none: Any) -> Values:
        """What comes of `inputs`."""


@runtime_checkable
class TellsRecorded(Protocol):
    """A network that computes in another way where a host's time for launching kernels costs nothing."""

    def recorded(self) -> AbstractContextManager[None]:
        """Within, its passes are being recorded, or prepared for that."""


@dataclass(frozen=True)
class Kind:
    """What is recorded, and how much memory must be left for what is not."""

    name: str
    room: float
    """So many times what a call takes must be free beside its recording, for the largest call that may come launched:
    of the paper's supernet on an H100 a projection's step takes 6.1 times as much as an attack, 1.3 times as a weight
    step, and 1.1 times as an α step, or 2.1 times as one on adversarial images alone."""
    trains: bool = True
    """In the mode that the network is in, and perhaps with other buffers after it; an attack sees none of that."""


ATTACK = Kind("an attack", 7.0, trains=False)
WEIGHTS = Kind("a weight step", 1.6)
ALPHAS = Kind("an α step", 2.4)
PROJECTION = Kind("a projection's step", 1.2)


class Recorded:
    """`function` of tensors shaped like `inputs`, recorded. What else it reads must stay where it is in memory."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter] = ()):
        self._inputs = [t.clone() for t in inputs]
        self._replay, self._values = record(partial(function, *self._inputs), inputs[0].device)
        self._gradients = [(p, p.grad) for p in parameters]

    def __call__(self, *inputs: Tensor) -> Values:
        for kept, new in zip(self._inputs, inputs, strict=True):
            kept.copy_(new)
        self._replay()
        for p, gradient in self._gradients:
            p.grad = gradient
        return tuple(value.clone() for value in self._values)


@dataclass
class _Kept:
    """The recordings on a network whose tensors lie at `places`; None where launching is better."""

    places: tuple[int, ...]
    seen: dict[Hashable, tuple[object, ...]] = field(default_factory=dict)  # the modes of the newest calls
    recorded: dict[Hashable, Recorded | None] = field(default_factory=dict)


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def replayed(
    kind: Kind,
    work: Work,
    net: nn.Module,
    inputs: Sequence[Tensor],
    parameters: Sequence[nn.Parameter] = (),
) -> Values:
    """`work(net, *inputs)`, by replaying a recording of it where that is quicker; with the same random numbers.

    It depends on its inputs, the parameters, buffers and mode of `net` and the fields of `work` alone, and
    reads no value back to the host. It returns tensors of its own (of an attack: new images for the first of its
    inputs), changes buffers of `net` in place, gives each of `parameters` a new `.grad` (or None), and leaves nothing
    else behind. Only with networks of rnas's own is that known: with others it is called each time.

    The values are the caller's. Gradients may be the recording's own memory: theirs until the next replay of any.
    """
    function = partial(work, net)
    looked = _look(net, kind.trains) if recordable(inputs[0].device) else None
    if looked is None:
        return function(*inputs)
    places, mode = looked
    kept = _kept.get(net)
    if kept is None or kept.places != places:
        kept = _kept[net] = _Kept(places)
    key = (kind, work, *((t.shape, t.stride(), t.dtype, t.device) for t in inputs), *map(id, parameters))
    if kept.seen.get(key) != mode:  # the first call prepares kernels and chooses among them
        kept.seen[key] = mode
        kept.recorded.pop(key, None)  # of another mode, such as the drop-path of the last epoch: its memory is needed
        return function(*inputs)
    if key not in kept.recorded:
        kept.recorded[key], values = _tried(kind, function, net, inputs, parameters)
        return values
    recorded = kept.recorded[key]
    return function(*inputs) if recorded is None else recorded(*inputs)


def forget(net: nn.Module) -> None:
    """Give the memory of its recordings back."""
    _kept.pop(net, None)


def recordable(device: torch.device) -> bool:
    """Whether to record on `device`."""
    wish = os.environ.get("RNAS_CUDA_GRAPHS")
    return device.type == "cuda" and (torch.__version__ >= "2.13" if wish is None else wish != "0")


def _look(net: nn.Module, trains: bool) -> tuple[tuple[int, ...], tuple[object, ...]] | None:
    """Where all that `net` computes with lies, and its mode if it `trains`: flags and numbers that may change from call
    to call. None if that may not be all: it has hooks, or a module of others.

    Once for every call, so without the names that `net.parameters()` makes up and past `nn.Module.__getattr__`, and of
    torch's own modules only the probability of a dropout.
    """
    places: list[int] = []
    mode: list[object] = []
    kinds: set[type] = set()
    todo: list[nn.Module | None] = [net]
    while todo:
        module = todo.pop()
        if module is None:
            continue
        own, kind = module.__dict__, type(module)
        if is_hooked(module):
            return None
        kinds.add(kind)
        todo.extend(own["_modules"].values())
        tensors = [t for t in (*own["_parameters"].values(), *own["_buffers"].values()) if t is not None]
        places += [t.data_ptr() for t in tensors]
        if trains:
            if any(t._backward_hooks or t._post_accumulate_grad_hooks for t in tensors):
                return None
            mode += [own.get("training"), own.get("p")]
            mode += [t.requires_grad for t in tensors]
            if kind.__module__.startswith("rnas."):
                mode += [v for v in own.values() if isinstance(v, int | float | str)]
    return (tuple(places), tuple(mode)) if all(map(is_known, kinds)) else None


class _State:
    """What a call leaves behind beside its values, as it is now: random numbers, buffers, gradients."""

    def __init__(self, net: nn.Module, parameters: Sequence[nn.Parameter], device: torch.device):
        self.device = device
        self.generator = _generator_state(device)
        self.buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
        self.gradients = [(p, p.grad) for p in parameters]

    @torch.no_grad()
    def restore(self) -> None:
        _set_generator(self.device, self.generator)
        for buffer, value in self.buffers:
            buffer.copy_(value)
        for p, gradient in self.gradients:
            p.grad = gradient

    def equals(self, wanted: _State, start: _State) -> bool:
        """Up to rounding; both were reached from `start`."""
        gradients = ([gradient for _, gradient in state.gradients] for state in (self, wanted))
        return (
            torch.equal(self.generator, wanted.generator)
            and torch.equal(self._buffers(counts=True), wanted._buffers(counts=True))
            and _near(self._buffers(), wanted._buffers(), start._buffers())
            and _same_gradients(*gradients)
        )

    def _buffers(self, counts: bool = False) -> Tensor:
        """All that are numbers, or `counts`, joined (N,)."""
        values = [value.flatten() for _, value in self.buffers if value.is_floating_point() != counts]
        return torch.cat(values) if values else torch.empty(0)


def _tried(
    kind: Kind, function: Function, net: nn.Module, inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> tuple[Recorded | None, Values]:
    """The recording, if it is right, quicker and there is room for it; and the values.

    Whatever comes of the recording, random numbers, buffers and gradients are what one launched call leaves behind.
    """
    device = inputs[0].device
    before = _State(net, parameters, device)
    free = _free_memory(device)
    expected, taken = _weighed(partial(function, *inputs), device)
    if free < (1 + kind.room) * taken:
        return None, expected
    after = _State(net, parameters, device)
    try:
        before.restore()
        _, launched = _timed(partial(function, *inputs), device)
        before.restore()
        with net.recorded() if isinstance(net, TellsRecorded) else nullcontext():
            recorded = Recorded(function, inputs, parameters)
        before.restore()
        values, replayed_in = _timed(partial(recorded, *inputs), device)
        start = [torch.zeros_like(e) if kind.trains else inputs[0] for e in expected]
        right = all(map(_near, values, expected, start)) and _State(net, parameters, device).equals(after, before)
    except RuntimeError as error:
        if not _is_lack_of_memory(error):  # that is no fault: launching needs less
            why = next(iter(str(error).splitlines()), type(error).__name__)
            _warn(kind, f"could not be recorded as a CUDA graph ({why})")
        return None, expected
    finally:
        after.restore()
    if not right:
        _warn(kind, "gave another result when replayed as a CUDA graph")
    return (recorded if right and is_quicker(launched, replayed_in) else None), expected


def is_quicker(launched: float, replayed_in: float) -> bool:
    """Whether to replay, from the seconds of a call either way."""
    return replayed_in < launched


@torch.no_grad()
def _near(got: Tensor, wanted: Tensor, start: Tensor) -> bool:
    """Equal but for what rounding in another order does; both were reached from `start`. Where a gradient is about
    zero, its sign may differ, and so an attack's step."""
    got, wanted = got.nan_to_num(), wanted.nan_to_num()  # of a network that has diverged
    return bool((got - wanted).abs().sum() <= 0.1 * (wanted - start.nan_to_num()).abs().sum())


@torch.no_grad()
def _same_gradients(got: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> bool:
    """As `_near`, all together; and each by itself is no other gradient, unless it is nothing but rounding, as that of
    a bias before BN."""
    if [g is None for g in got] != [w is None for w in wanted]:
        return False
    pairs = [
        (g.nan_to_num(), w.nan_to_num()) for g, w in zip(got, wanted, strict=True) if g is not None and w is not None
    ]
    if not pairs:
        return True
    counts = torch.tensor([w.numel() for _, w in pairs], dtype=torch.float64)
    off = torch.stack([(g - w).abs().sum(dtype=torch.float64) for g, w in pairs]).cpu()
    size = torch.stack([w.abs().sum(dtype=torch.float64) for _, w in pairs]).cpu()
    each = off <= 0.5 * size + 0.01 * counts * size.sum() / counts.sum()
    return bool(each.all() and off.sum() <= 0.1 * size.sum())


def _is_lack_of_memory(error: BaseException | None) -> bool:
    """Itself, or what it came of."""
    return error is not None and ("out of memory" in str(error) or _is_lack_of_memory(error.__context__))


def _warn(kind: Kind, what: str) -> None:
    warnings.warn(f"{kind.name} {what}: it goes on without", RuntimeWarning, stacklevel=4)


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


def _weighed(run: Callable[[], R], device: torch.device) -> tuple[R, int]:
    """What `run` returns, and the most bytes that it took meanwhile. Torch's statistics of the peak start anew."""
    if device.type != "cuda":
        return run(), 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    return result, torch.cuda.max_memory_allocated(device) - before


def _timed(run: Callable[[], R], device: torch.device) -> tuple[R, float]:
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
# They share a pool of memory, for one is replayed after the other; which torch closes for good with the last of them.
_graphs: dict[torch.device, WeakSet[torch.cuda.CUDAGraph]] = {}


def record(run: Callable[[], R], device: torch.device) -> tuple[Callable[[], None], R]:
    """What replays `run`, and where its result lies then."""
    with torch.cuda.device(device):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if device not in _streams:
            _streams[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside, others = _streams[device], _graphs.setdefault(device, WeakSet())
        pool = next((other.pool() for other in others), None)
        try:
            with _without_old_passes():
                aside.wait_stream(stream)
                with torch.cuda.stream(aside):
                    run()  # once on that stream, as torch's notes on CUDA graphs want it
                stream.wait_stream(aside)
                with torch.cuda.graph(graph, pool=pool, stream=aside):
                    output = run()
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own
        others.add(graph)
    return graph.replay, output


@contextmanager
def _without_old_passes() -> Iterator[None]:
    """Within, a pass that was launched before ties no recording to its stream: what autograd keeps for a parameter as
    long as a pass lives remembers it, and CUDA then refuses the recording."""
    follow = getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)  # 2.11 has none
    collects = gc.isenabled()
    gc.collect()
    gc.disable()  # nor may a recording that nobody needs any more be closed meanwhile
    try:
        if follow is not None:
            follow(True)
        yield
    finally:
        if follow is not None:
            follow(False)
        if collects:
            gc.enable()
