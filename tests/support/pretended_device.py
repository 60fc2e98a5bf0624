"""A device that is only pretended, to find what is left on the wrong one where there is no GPU.

Its tensors hold real numbers in the processor's memory and say that they are on ``pretend:0`` or ``pretend:1``. What
mixes devices raises, as it would with CUDA; numbers and gradients are those of the processor. Streams, pinned memory,
CUDA's own kernels and their rounding are not shown by it, nor where torch's CUDA operations allow more or less than
what is written here.

Registering a device cannot be taken back, so this is used in a process of its own: ``python -m tests.support.pretended_device`` runs
every case and prints what failed as JSON.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from tests.support.host_device import HostDevice

aten = torch.ops.aten
CPU = torch.device("cpu")
# May be given tensors of two devices: copies, and indices that are on the processor.
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor,
           aten._index_put_impl_.default}  # fmt: skip


class Elsewhere(Tensor):
    """A tensor that says it is on a pretended device."""

    numbers: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device) -> Elsewhere:
        assert not isinstance(real, Elsewhere)
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=device,
        )  # fmt: skip
        made.numbers = real
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Elsewhere({self.device}, {self.numbers})"

    def tolist(self) -> Any:
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (Elsewhere, Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented
        if func is aten._to_copy.default:
            return _moved(args[0], kwargs)
        device = _the_device(func, args, kwargs)
        given, named = tree_map(_real, args), tree_map(_real, kwargs)
        if (
            func is aten.histc.default
        ):  # transformers counts integers with it where CUDA can, which the processor cannot
            given = (given[0].float(), *given[1:])
        found = func(*given, **named)
        if func is aten._local_scalar_dense.default:
            return found
        wrapped = tree_map(lambda v: Elsewhere(v, device) if isinstance(v, Tensor) else v, found)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _real(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.numbers
    return CPU if isinstance(value, torch.device) else value


def _the_device(func: Any, args: Any, kwargs: Any) -> torch.device:
    if func in COPIES:
        return args[0].device
    given = args[:1] if func in INDEXED else (args, kwargs)
    if func in INDEXED:
        for index in tree_leaves(args[1]):
            if index is not None and index.device not in (CPU, args[0].device):
                raise RuntimeError(
                    f"{func}: indices on {index.device}, but the tensor is on {args[0].device}"
                )
        given = (args[0], args[2:], kwargs)
    # A number counts for nothing: torch takes it along.
    devices = {
        value.device
        for value in tree_leaves(given)
        if isinstance(value, Tensor) and not (value.device == CPU and value.dim() == 0)
    }
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if len(devices) > 1:
        raise RuntimeError(f"{func}: tensors on {' and '.join(sorted(map(str, devices)))}")
    return (
        devices.pop() if devices else next(v.device for v in tree_leaves(given) if isinstance(v, Elsewhere))
    )


def _moved(tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
    device = torch.device(kwargs.pop("device", None) or tensor.device)
    copy = aten._to_copy.default(_real(tensor), **kwargs)
    return copy if device == CPU else Elsewhere(copy, device)


class _Backend(_DummyBackendModule):
    def device_count(self) -> int:
        return 2


def register() -> None:
    """Make the device known to torch."""
    _setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())
    library = torch.library.Library("aten", "IMPL")
    for name in ("empty.memory_format", "empty_strided", "zeros", "ones", "full", "arange", "arange.start",
                 "arange.start_step", "scalar_tensor", "rand", "randn"):  # fmt: skip
        operation, _, overload = name.partition(".")
        func = getattr(getattr(aten, operation), overload or "default")

        def make(
            *args: Any, func: Any = func, device: Any = None, pin_memory: Any = None, **kwargs: Any
        ) -> Tensor:
            return Elsewhere(func(*args, **kwargs, device=CPU), torch.device(device))

        library.impl(name, make, "PrivateUse1")

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        _real(target).copy_(_real(source))
        return target

    # `torch.tensor` comes this way, past the dispatch above.
    library.impl("_copy_from", copy_from, "PrivateUse1")
    LIBRARIES.append(library)


LIBRARIES: list[Any] = []


class PretendedDevice(HostDevice):
    """A device whose copies are done at once, and checked."""

    def __init__(self, number: int, num_bytes: int = 1 << 40) -> None:
        super().__init__(num_bytes, torch.device("pretend", number))

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert source.device == CPU, "copies are from the host"
        assert target.device == self.torch_device, "copies are to this device"
        super().copy(target, source)


if __name__ == "__main__":
    from tests.support import pretended_cases

    pretended_cases.main()
