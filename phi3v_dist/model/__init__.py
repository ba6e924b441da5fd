"""Phi-3-Vision: the module, its parts, and its weights in and out."""

from phi3v_dist.model.phi3v import Phi3VForCausalLM, Phi3VOutput

__all__ = ["Phi3VForCausalLM", "Phi3VOutput"]
