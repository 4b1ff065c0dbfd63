"""For what keeps tensors between calls, and hands their addresses to kernels."""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch

F = TypeVar("F", bound=Callable)


def stateful(function: F) -> F:
    """A function that works wherever it is called, as it is written.

    A caller that `torch.compile` compiles runs it between two graphs. Under
    `torch.inference_mode()` it makes ordinary tensors, which may be written to afterwards.
    Anywhere else this costs two tests.
    """
    untraced = torch.compiler.disable(function)

    @functools.wraps(function)
    def called(*arguments, **keywords):
        if torch.compiler.is_compiling():
            return untraced(*arguments, **keywords)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return function(*arguments, **keywords)
        return function(*arguments, **keywords)

    return cast(F, called)
