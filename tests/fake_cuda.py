"""A CUDA device that is not there: tensors that say they are on it, and compute on the CPU.

Inside `fake_cuda()` a tensor made with `device="gpu"`, or moved there, is a `FakeCuda` around a
tensor of the CPU. As on a GPU, an operator refuses tensors of both devices (but for scalars and
indices of the CPU). What goes from one device to the other is counted, as it makes the host wait.
So it shows where code that has only run on a CPU forgets the device. What it cannot show: kernels
(the reference implementations answer instead), streams, and what a GPU rounds differently.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.utils.backend_registration
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from saap.kernels.attention import api as attention_api
from saap.kernels.codes import api as codes_api

torch.utils.backend_registration._setup_privateuseone_for_python_backend("gpu")
CUDA = torch.device("gpu", 0)
_MOVES = {"aten._to_copy.default", "aten.copy_.default", "aten._copy_from_and_resize.default"}
_INDEXED = {
    "aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default",
    "aten._unsafe_index.Tensor", "aten._index_put_impl_.default",
}  # fmt: skip


_waits: Counter = Counter()


class FakeCuda(Tensor):
    """`inner`: what it holds, on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=CUDA, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **_):
        return f"FakeCuda({self.inner!r})"

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = FakeCuda(self.inner.clone())
        return copied

    def tolist(self):
        _waits["tolist"] += 1
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return _dispatch(function, arguments, keywords or {}, _waits)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return _dispatch(function, arguments, keywords or {}, _waits)


class _Functions(TorchFunctionMode):
    """What makes tensors asks for a device that is there, before it comes to dispatch."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        wanted = keywords.get("device")
        if wanted is None or torch.device(wanted).type != "gpu" or function is Tensor.to:
            return function(*arguments, **keywords)
        if isinstance(arguments[0] if arguments else None, FakeCuda):
            return function(*arguments, **keywords)  # new_zeros and the like
        found = function(*arguments, **{**keywords, "device": "cpu"})
        return found if isinstance(found, FakeCuda) else FakeCuda(found)


def _dispatch(function, arguments, keywords, waits: Counter):
    name = str(function)
    flat, spec = tree_flatten((arguments, keywords))
    fakes = [x for x in flat if isinstance(x, FakeCuda)]
    plain = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, FakeCuda)]
    wanted = keywords.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    if name == "aten._local_scalar_dense.default" and fakes:
        waits["item"] += 1
    elif fakes and name in ("aten.nonzero.default", "aten.masked_select.default"):
        waits[name] += 1
    moves = name in _MOVES
    if fakes and plain and not moves:
        if name in _INDEXED and isinstance(arguments[0], FakeCuda):
            strays = (
                [x for x in plain if x.ndim and x is arguments[2]] if len(arguments) > 2 else []
            )
            waits["index from the CPU"] += any(x.ndim for x in plain)
        else:
            strays = [x for x in plain if x.ndim]
        if strays:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu "
                f"{[tuple(x.shape) for x in strays]}"
            )
    if name == "aten.copy_.default" and isinstance(arguments[0], FakeCuda) != isinstance(
        arguments[1], FakeCuda
    ):
        waits["copy"] += 1
    if name == "aten._to_copy.default" and wanted is not None:
        from_gpu, to_gpu = bool(fakes), wanted.type == "gpu"
        waits["to the CPU" if from_gpu else "to the GPU"] += from_gpu != to_gpu
    inner = {id(x.inner): x for x in fakes}
    flat = [x.inner if isinstance(x, FakeCuda) else x for x in flat]
    flat = [torch.device("cpu") if _is_cuda(x) else x for x in flat]
    arguments, keywords = tree_unflatten(flat, spec)
    on_gpu = bool(fakes) if wanted is None else wanted.type == "gpu"
    if name == "aten.copy_.default":
        on_gpu = id(arguments[0]) in inner
    found = function(*arguments, **keywords)
    if not on_gpu:
        return found

    def wrap(x):
        if not isinstance(x, Tensor):
            return x
        return inner[id(x)] if id(x) in inner else FakeCuda(x)

    return tree_map(wrap, found)


def _is_cuda(x) -> bool:
    return isinstance(x, torch.device) and x.type == "gpu"


@contextmanager
def fake_cuda():
    """Yields a `Counter` of what made the host wait for the device."""

    def best_impl(q, k, v):
        return "reference" if isinstance(q, FakeCuda) else own_best(q, k, v)

    def chosen(package, backends, impl, best, limit):
        return own_chosen(package, backends, impl, best, limit)

    own_best, own_chosen = attention_api.best_impl, codes_api.chosen
    with ExitStack() as opened:
        opened.enter_context(mock.patch.object(attention_api, "best_impl", best_impl))
        opened.enter_context(mock.patch.object(codes_api, "chosen", chosen))
        opened.enter_context(_Functions())
        opened.enter_context(_Mode())
        _waits.clear()
        yield _waits
