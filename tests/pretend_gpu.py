"""A GPU that is not there: tensors that say they lie on one, while the CPU computes; and a book of every transfer.

What mixes devices fails as it would on a GPU. What makes the host wait for a GPU, and what is copied to or from it, is
entered with the line of our code that asked for it. Its queues (streams) know what they have waited for: what one of
them reads or writes too early, or whose memory may be given away too early, is found.
"""

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from captioner import kernels
from captioner.inference import lookahead
from captioner.kernels.lstm import lstm_layer

PACKAGE = str(Path(kernels.__file__).parents[1])
GPU = torch.device("cuda:0")
aten = torch.ops.aten
_tensor = torch.tensor

# The size of what they give is known to the GPU alone: the host waits for it.
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
}


class OnGpu(Tensor):
    """Numbers of the CPU that say they are a GPU's."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnGpu":
        made = Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=GPU
        )
        made.values = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the pretended GPU")


class Stream:
    """A queue of the GPU.

    Attributes:
        count: what it was given to do so far.
        seen: of each other queue, how much of that was done before what it is given now.
        left_behind: whenever the host waited for one of its events, how much it had been given since.
    """

    def __init__(self, name: str) -> None:
        self.name, self.count, self.seen = name, 0, Counter[Stream]()
        self.left_behind: list[int] = []

    def record_event(self) -> "Event":
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        assert event.stream, "nobody has recorded it"
        for stream, count in (event.seen | Counter({event.stream: event.count})).items():
            self.seen[stream] = max(self.seen[stream], count)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Event:
    stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream, self.count, self.seen = stream, stream.count, Counter(stream.seen)

    def synchronize(self) -> None:
        assert self.stream, "nobody has recorded it"
        self.stream.left_behind.append(self.stream.count - self.count)


class Memory:
    """A tensor's memory: whose queue it comes from, and who has used it."""

    def __init__(self, stream: Stream) -> None:
        self.owner, self.written = stream, (stream, stream.count)
        self.read: dict[Stream, int] = {}
        self.kept_for: set[Stream] = {stream}


class PretendGpu(TorchDispatchMode):
    """Within, "cuda" exists.

    Attributes:
        book: how often what was done by which line ("upload, pageable", "upload", "download", "wait").
        kernels: operators that the GPU was given to compute; views are none.
        queued: the queue of each of them, and the line that asked for it.
        races: what a queue uses without having waited for another; what it uses of another's memory, unsaid.
    """

    def __init__(self) -> None:
        super().__init__()
        self.book: Counter[tuple[str, str]] = Counter()
        self.kernels = 0
        self.pinned: set[int] = set()
        self.default = self.stream = Stream("default")
        self.queued: list[tuple[str, str]] = []
        self.races: list[str] = []
        self._host_seen: Counter[Stream] = Counter()
        self._memory: dict[int, Memory] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled():  # there operators come whole that consist of others
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        given, _ = tree_flatten((args, kwargs))
        theirs = [value for value in given if isinstance(value, OnGpu)]
        ours = [value for value in given if isinstance(value, Tensor) and not isinstance(value, OnGpu)]
        target = kwargs.get("device")
        target = torch.device(target) if target is not None else None
        to_gpu = target.type == "cuda" if target else bool(theirs)
        if func is aten._to_copy.default:
            if ours and to_gpu:
                self._enter("upload" if self.is_pinned(ours[0]) else "upload, pageable")
            elif theirs and not to_gpu:
                self._enter("download")
        elif func is aten.copy_.default and theirs and ours:
            to_gpu = isinstance(args[0], OnGpu)
            self._enter("download" if not to_gpu else "upload" if self.is_pinned(ours[0]) else "upload, pageable")
        elif theirs and any(value.dim() for value in ours):  # a GPU takes single numbers of the CPU as they are
            assert func in (aten.index.Tensor, aten.index_put_.default), f"{func} mixes devices at {_line()}"
            self._enter("upload, pageable")  # indices of the CPU
        if func in WAITS and theirs:
            self._enter("wait")
        if func in (aten.index.Tensor, aten.index_put_.default) and theirs:
            masks = [one for one in tree_flatten(args[1])[0] if isinstance(one, Tensor) and one.dtype == torch.bool]
            if masks:
                self._enter("wait")
        if target is not None and target.type == "cuda":
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        plain_args, plain_kwargs = tree_map(lambda v: v.values if isinstance(v, OnGpu) else v, (args, kwargs))
        # What is made in inference mode would have no place for what wrapped tensors need.
        with torch.inference_mode(False), torch.set_grad_enabled(False):
            found = func(*plain_args, **plain_kwargs)
        views = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
        if theirs or to_gpu:
            self._queue(func, args, theirs, found if to_gpu else None, views)
        if not to_gpu:
            return found
        self.kernels += not views
        with torch.inference_mode(False):
            return self._wrapped(found, theirs)

    def begin(self) -> None:
        """Watch what comes from now on; what is there by now, as weights, stays for good."""
        for noted in (self.book, self.queued, self.races, self._memory):
            noted.clear()
        self.kernels = 0

    def _queue(self, func: Any, args: Any, theirs: list[OnGpu], found: Any, views: bool) -> None:
        """Note what the current queue is given, and what it reads and writes."""
        if views:
            return
        stream = self.stream
        stream.count += 1
        self.queued.append((stream.name, _line()))
        written = {
            _place(value)
            for value, known in zip(args, func._schema.arguments, strict=False)
            if isinstance(value, OnGpu) and known.alias_info and known.alias_info.is_write
        }
        for place in {_place(value) for value in theirs}:
            memory = self._memory.get(place)
            if memory is None:  # made before anybody looked
                continue
            others = [memory.written, *(memory.read.items() if place in written else ())]
            for other, count in others:
                if other is not stream and max(stream.seen[other], self._host_seen[other]) < count:
                    self.races.append(f"{func} in {stream.name} does not wait for {other.name}: {_line()}")
            if stream not in memory.kept_for:
                self.races.append(f"{func} in {stream.name} uses memory of {memory.owner.name}, unsaid: {_line()}")
            memory.read[stream] = stream.count
            if place in written:
                memory.written = stream, stream.count
        known = {_place(value) for value in theirs}
        for value in tree_flatten(found)[0]:
            if isinstance(value, Tensor) and (place := value.untyped_storage().data_ptr()) not in known:
                self._memory[place] = Memory(stream)
        if found is None or func in WAITS:  # the host has its answer: all that the queue was given is done
            self._host_seen[stream] = stream.count

    def keep_for(self, tensor: Tensor, stream: Stream) -> None:
        assert isinstance(tensor, OnGpu)
        if memory := self._memory.get(_place(tensor)):
            memory.kept_for.add(stream)

    @contextmanager
    def in_stream(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def _wrapped(self, found: Any, theirs: list[OnGpu]) -> Any:
        known = {id(value.values): value for value in theirs}
        return tree_map(lambda v: known[id(v)] if id(v) in known else OnGpu(v) if isinstance(v, Tensor) else v, found)

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def pin(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self.pinned.add(copy.untyped_storage().data_ptr())
        return copy

    def tensor(self, data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        made = _tensor(data, dtype=dtype)
        return made if device is None else made.to(device)

    def _enter(self, what: str) -> None:
        self.book[what, _line()] += 1

    def lines(self, *kinds: str) -> set[str]:
        """Where what is of one of these kinds was asked for."""
        return {line for what, line in self.book if what in kinds}

    def count(self, *kinds: str) -> int:
        return sum(times for (what, _), times in self.book.items() if what in kinds)


def _line() -> str:
    """The innermost line of the package on the stack: model/decoder.py: loss_sum."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "a test"
    return f"{Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()}: {frame.f_code.co_name}"


def _place(tensor: OnGpu) -> int:
    return tensor.values.untyped_storage().data_ptr()


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    """Within, code for "cuda" runs and is watched; kernels with operators of CPUs alone have their plain forms."""
    gpu = PretendGpu()
    if not torch.cuda.is_available():
        torch._C._ensureCUDADeviceGuardSet()  # as FakeTensorMode does: no driver is asked to change its device
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Event", Event)
        names = {0: "uploads", -1: "searches"}
        patch.setattr(torch.cuda, "Stream", lambda _, priority=0: Stream(names[priority]))
        patch.setattr(torch.cuda, "stream", gpu.in_stream)
        patch.setattr(torch.cuda, "current_stream", lambda _=None: gpu.stream)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: gpu.keep_for(tensor, stream))
        patch.setattr(lookahead, "_streams", functools.cache(lookahead._streams.__wrapped__))
        patch.setattr(Tensor, "pin_memory", lambda tensor: gpu.pin(tensor))
        patch.setattr(Tensor, "is_pinned", lambda tensor: gpu.is_pinned(tensor))
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        for kernel in kernels.KERNELS:
            patch.setattr(kernel, "verdicts", {"cpu": True, "cuda": True})  # proofs run in threads of their own
        # torch's LSTM has operators that only GPUs know.
        patch.setattr(kernels, "_plain_lstm", lambda lstm, inputs, counts: _lstm(lstm, inputs, counts))
        # torch.tensor(.., device="cuda") is an upload, too.
        patch.setattr(torch, "tensor", gpu.tensor)
        with gpu:
            yield gpu


def _lstm(lstm: torch.nn.LSTM, inputs: Tensor, counts: list[int]) -> Tensor:
    w_ih, w_hh, b_ih, b_hh = kernels.lstm_weights(lstm, 0)
    return lstm_layer(inputs, w_ih, w_hh, b_ih + b_hh, counts)
