"""Phi-3-Vision: the module, its parts, and its weights in and out.

Surprise: the module itself is imported at its first use, since it brings transformers, which takes seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3v_dist.model.phi3v import Phi3VForCausalLM, Phi3VOutput

__all__ = ["Phi3VForCausalLM", "Phi3VOutput"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from phi3v_dist.model import phi3v

    return getattr(phi3v, name)
