"""A GPU that is not there: tensors that say they are on it, and compute on the CPU.

Inside `fake_gpu()` a tensor made with `device="gpu"`, or moved there, is a `OnGpu` around a
tensor of the CPU. As on a GPU, an operator refuses tensors of both devices (but for scalars and
indices of the CPU). What goes from one device to the other is counted, as it makes the host wait.
So it shows where code that has only run on a CPU forgets the device. What it cannot show: the
GPU's kernels (those of the CPU answer instead), streams, and what a GPU rounds differently.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.utils.backend_registration
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from saap.kernels.attention import api as attention_api
from saap.kernels.attention import reference as attention_reference
from saap.kernels.codes import api as codes

torch.utils.backend_registration._setup_privateuseone_for_python_backend("gpu")
DEVICE = torch.device("gpu", 0)
_MOVES = {"aten._to_copy.default", "aten.copy_.default", "aten._copy_from_and_resize.default"}
_INDEXED = {
    "aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default",
    "aten._unsafe_index.Tensor", "aten._index_put_impl_.default",
}  # fmt: skip


_waits: Counter = Counter()


def waits() -> Counter:
    """What made the host wait for the device, by what it was."""
    return _waits


class OnGpu(Tensor):
    """`inner`: what it holds, on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **_):
        return f"OnGpu({self.inner!r})"

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = OnGpu(self.inner.clone())
        return copied

    def tolist(self):
        _waits["tolist"] += 1
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def numpy(self, **_):
        raise TypeError("can't convert gpu:0 device type tensor to numpy")

    def __array__(self, *_):
        raise TypeError("can't convert gpu:0 device type tensor to numpy")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return _dispatch(function, arguments, keywords or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return _dispatch(function, arguments, keywords or {})


class _Functions(TorchFunctionMode):
    """What makes tensors asks for a device that is there, before it comes to dispatch."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if function is Tensor.new_tensor and isinstance(arguments[0], OnGpu):
            return OnGpu(arguments[0].inner.new_tensor(*arguments[1:], **keywords))
        wanted = keywords.get("device")
        if wanted is None or torch.device(wanted).type != "gpu" or function is Tensor.to:
            return function(*arguments, **keywords)
        if isinstance(arguments[0] if arguments else None, OnGpu):
            return function(*arguments, **keywords)  # new_zeros and the like
        found = function(*arguments, **{**keywords, "device": "cpu"})
        return found if isinstance(found, OnGpu) else OnGpu(found)


def _mapped(change, x):
    """`change` of all that lists and tuples hold; torch's own trees take ten times as long."""
    if isinstance(x, (list, tuple)):
        return type(x)([_mapped(change, y) for y in x])
    return change(x)


def _dispatch(function, arguments, keywords):
    name = str(function)
    inner, plain = {}, []

    def held(x):
        if isinstance(x, OnGpu):
            inner[id(x.inner)] = x
            return x.inner
        if isinstance(x, Tensor):
            plain.append(x)
        elif isinstance(x, torch.device) and x.type == "gpu":
            return torch.device("cpu")
        return x

    def given_back(x):
        if not isinstance(x, Tensor):
            return x
        return inner[id(x)] if id(x) in inner else OnGpu(x)

    wanted = keywords.get("device")
    whole, first = arguments, arguments[0] if arguments else None
    arguments = _mapped(held, arguments)
    keywords = {key: _mapped(held, value) for key, value in keywords.items()}
    if not inner and (wanted is None or wanted.type != "gpu"):
        return function(*arguments, **keywords)
    if name in ("aten._local_scalar_dense.default", "aten.nonzero.default"):
        _waits["item"] += 1
    if inner and plain and name not in _MOVES:
        strays = plain
        if name in _INDEXED and isinstance(first, OnGpu):
            strays = [x for x in plain if any(x is value for value in whole[2:3])]
            _waits["index from the CPU"] += any(x.ndim for x in plain)
        if any(x.ndim for x in strays):
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found gpu:0 and cpu "
                f"{[tuple(x.shape) for x in strays]}"
            )
    on_gpu = bool(inner) if wanted is None else wanted.type == "gpu"
    if name == "aten.copy_.default":
        on_gpu = isinstance(first, OnGpu)
    if name in _MOVES:
        _waits["to the GPU" if on_gpu else "to the CPU"] += on_gpu == bool(plain)
    found = function(*arguments, **keywords)
    return _mapped(given_back, found) if on_gpu else found


def _held(x):
    """What kernels of the CPU get for an argument."""
    if isinstance(x, codes.Codes):
        return codes.Codes(*(_held(t) for t in (x.coarse, x.fine, x.scale)))
    if isinstance(x, codes.QueryMap):
        return codes.QueryMap(_held(x.weights), _held(x.scale))
    return x.inner if isinstance(x, OnGpu) else x


def _stand_in(kernel):
    """Computes on what its tensors hold, in place where it writes."""

    def call(*arguments, **keywords):
        there = any(isinstance(x, OnGpu) for x in arguments)
        keywords = {name: _mapped(_held, x) for name, x in keywords.items()}
        found = kernel(*_mapped(_held, arguments), **keywords)
        return tuple(map(OnGpu, found)) if there else found

    return call


@contextmanager
def fake_gpu():
    """While open, `DEVICE` is there; `waits()` counts from here on."""

    def best_impl(q, k, v):
        return "reference" if isinstance(q, OnGpu) else own_best(q, k, v)

    own_best = attention_api.best_impl
    with ExitStack() as opened:
        attend = _stand_in(attention_api.attend_ranges)
        select = _stand_in(codes.select_rows)
        opened.enter_context(mock.patch.object(attention_reference, "attend_ranges", attend))
        opened.enter_context(mock.patch.object(codes, "select_rows", select))
        opened.enter_context(mock.patch.object(attention_api, "best_impl", best_impl))
        opened.enter_context(_Functions())
        opened.enter_context(_Mode())
        _waits.clear()
        yield
