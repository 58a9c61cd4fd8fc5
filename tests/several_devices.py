"""GPUs that are not there: tensors that say they are on ``cuda:1``, compute on the CPU, and refuse to meet others.

As with real GPUs, an operation takes tensors of one device. Exceptions are those that CUDA has: numbers without
dimensions and indices may be on the CPU, and copies go anywhere. Under their label the tensors are of torch's ``lazy``
type, which autograd's engine runs in the calling thread, as it does a CPU's; it would look for threads of a GPU.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_COPIES = ("_to_copy", "copy_")


class OnGpu(torch.Tensor):
    """A tensor of a GPU; its numbers are in a tensor on the CPU."""

    numbers: torch.Tensor
    index: int

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, index: int) -> "OnGpu":
        """Of the same shape and strides, so that views are views."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=torch.device("lazy", index),
        )  # fmt: skip
        made.numbers, made.index = numbers, index
        return made

    @property
    def device(self) -> torch.device:
        """What programs see."""
        return torch.device("cuda", self.index)

    @property
    def is_cuda(self) -> bool:
        """What programs see."""
        return True

    def __repr__(self) -> str:
        return f"{self.numbers!r} on cuda:{self.index}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Where no mode is active: in a thread of a library."""
        return _run(func, args, kwargs or {}, Counter())


class _Computing(TorchDispatchMode):
    """Runs every operation, those inside of torch's own compositions too."""

    def __init__(self, used: Counter[int]) -> None:
        super().__init__()
        self.used = used

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its import takes longer than a test

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.used)


class _Naming(TorchFunctionMode):
    """Says ``lazy`` where a program says ``cuda``: torch would look for a driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _named(each) for name, each in (kwargs or {}).items()}
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.tensor and (device := kwargs.pop("device", None)) is not None:
            return torch.tensor(*args, **kwargs).to(device)  # made in one place, past all modes
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])  # likewise
        return func(*map(_named, args), **kwargs)


def _named(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("cuda"):
        value = torch.device(value)
    is_gpu = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("lazy", value.index or 0) if is_gpu else value


@cache
def _is_composition(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], used: Counter[int]) -> Any:
    # In inference mode they arrive whole.
    if _is_composition(func):
        with _Computing(used):
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    name = func.overloadpacket.__name__
    index = _index_of_result(func, name, tensors)
    if (device := kwargs.get("device")) is not None:
        index = device.index or 0 if device.type == "lazy" else None
        kwargs = {**kwargs, "device": torch.device("cpu") if device.type == "lazy" else device}
    if index is not None:
        used[index] += 1
    numbers = func(*_each(_numbers_of, args), **{key: _each(_numbers_of, each) for key, each in kwargs.items()})
    if index is None:
        return numbers
    # What was changed in place is the tensor that came.
    known = {id(each.numbers): each for each in tensors if isinstance(each, OnGpu)}
    # In inference mode a view of a tensor from outside is none of inference mode either.
    like = tensors[0].is_inference() if func.is_view else torch.is_inference_mode_enabled()
    with torch.inference_mode(like):
        return _each(lambda each: known[id(each)] if id(each) in known else OnGpu(each, index), numbers)


def _index_of_result(func: Any, name: str, tensors: Sequence[torch.Tensor]) -> int | None:
    """The GPU of what comes out.

    Raises:
        RuntimeError: Two devices meet.
    """
    places = {
        each.index if isinstance(each, OnGpu) else None
        for place, each in enumerate(tensors)
        if isinstance(each, OnGpu) or (each.dim() and not (place and name.startswith(("index", "_index"))))
    }
    if len(places) > 1 and name not in _COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {places} in {func}.")
    if name in _COPIES:
        return tensors[0].index if isinstance(tensors[0], OnGpu) else None
    return next(iter(places), None)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for each in values:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


def _numbers_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.numbers if isinstance(tensor, OnGpu) else tensor


def _each(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(_each(change, each) for each in value) if isinstance(value, list | tuple) else value


@contextmanager
def gpus(*free: int) -> Iterator[Counter[int]]:
    """A machine with GPUs of which each has so many bytes free; lends how many operations each has run."""
    used: Counter[int] = Counter()
    with pytest.MonkeyPatch.context() as patch, _Naming(), _Computing(used):
        patch.setattr(torch.cuda, "device_count", lambda: len(free))
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free[torch.device(device).index or 0],) * 2)
        # Modes belong to a thread.
        patch.setitem(os.environ, "HF_DEACTIVATE_ASYNC_LOAD", "1")
        yield used
