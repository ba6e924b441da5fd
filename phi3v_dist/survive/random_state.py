"""Random number generators of this process ↔ tensors and numbers that a checkpoint can hold.

In: the generators of torch (CPU and this rank's accelerator), python and numpy. Out: their states, and back.

Surprise: building a data loader's iterator draws from torch's global generator, so restoring comes last of all.
"""

import logging
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Device type → torch's state (uint8), and the numbers of python's and numpy's global generators."""
    tensors = {"cpu": torch.get_rng_state()}
    accelerator = _accelerator()
    if accelerator is not None:
        tensors[accelerator.type] = torch.get_device_module(accelerator).get_rng_state().cpu()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return tensors, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def restore(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Continue exactly where `capture` was called."""
    python_version, python_keys, gauss = numbers["python"]
    random.setstate((python_version, tuple(python_keys), gauss))
    kind, keys, *rest = numbers["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["cpu"])
    accelerator = _accelerator()
    if accelerator is not None and accelerator.type in tensors:
        torch.get_device_module(accelerator).set_rng_state(tensors[accelerator.type])
    elif accelerator is not None:
        log.warning("the checkpoint has no random state of a %s: dropout continues differently", accelerator.type)


def reseed(seed: int, step: int, rank: int) -> None:
    """Give a rank of another world size its own streams, the same ones every time it starts from this step."""
    torch_seed, python_seed, numpy_seed = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    torch.manual_seed(int(torch_seed))  # accelerators included
    random.seed(int(python_seed))
    np.random.seed(numpy_seed)


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
