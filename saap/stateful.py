"""For what keeps tensors between calls, and hands their addresses to kernels."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar, cast

import torch

F = TypeVar("F", bound=Callable)

CASTING = ("cpu", "cuda")
"""Kinds of devices for which `torch.autocast` may be open."""


def stateful(function: F) -> F:
    """A function that works wherever it is called, as it is written.

    As `uncompiled`; and under `torch.autocast` it computes in the dtypes that it names.
    """

    @functools.wraps(function)
    def uncast(*arguments, **keywords):
        casts = [kind for kind in CASTING if torch.is_autocast_enabled(kind)]
        if not casts:
            return function(*arguments, **keywords)
        with ExitStack() as opened:
            for kind in casts:
                opened.enter_context(torch.autocast(kind, enabled=False))
            return function(*arguments, **keywords)

    return cast(F, uncompiled(uncast))


def uncompiled(function: F) -> F:
    """A function that runs as it is written, but for what `torch.autocast` makes of it.

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
