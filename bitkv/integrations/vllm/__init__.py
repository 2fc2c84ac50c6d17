"""bitkv pages inside vLLM: blocks of its KV cache are pages, and its attention reads the packed bits.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in every process. Without a
recipe in the environment variable BITKV_RECIPE it does nothing.
"""

import os

RECIPE = "BITKV_RECIPE"
"""The environment variable that names a recipe, by its text or by a file of `bitkv calibrate`."""


def register() -> None:
    """Put bitkv's attention in the place of vLLM's own, if a recipe was chosen."""
    if not os.environ.get(RECIPE):
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
    from vllm.v1.attention.backends.registry import register_backend

    backend = f"{__name__}.backend.PackedBackend"
    if not current_platform.is_cpu():
        register_backend(Backends.CUSTOM, backend)
        return
    # on CPUs vLLM chooses by itself, whatever it was asked for; what it would choose is ours
    register_backend(Backends.CPU_ATTN, backend)
    for latent in ("CPU_MLA", "AMX_MLA"):
        if hasattr(Backends, latent):
            register_backend(getattr(Backends, latent), f"{__name__}.backend.NoLatentBackend")
