"""This rank's own gradients, as they are made → whether all were finite, before ZeRO-3 mixes them with those of others.

Surprise: after the reduction every rank holds the same NaN, so where it began can only be seen here. The sum of each
gradient is added to one number on the device, which is read only when the step turned out bad.
"""

import torch
from torch import Tensor, nn


class LocalGradients:
    """Looks at the gradients of all trained parameters of `module`, one step after another."""

    def __init__(self, module: nn.Module, device: torch.device):
        self._total = torch.zeros((), dtype=torch.float32, device=device)
        self._hooks = [
            parameter.register_hook(self._add) for parameter in module.parameters() if parameter.requires_grad
        ]

    def begin(self) -> None:
        """A new step begins."""
        self._total.zero_()

    def were_finite(self) -> bool:
        """Since the step began; waits for the device. A sum of finite gradients that overflows is not finite."""
        return bool(torch.isfinite(self._total))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, gradient: Tensor) -> None:
        self._total += gradient.detach().sum(dtype=torch.float32)
