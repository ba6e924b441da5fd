"""How many crops a row will have → memory for them, used again and again.

What comes in: the number of crops of a planned row. What goes out: a `Slot` to write them to, taken back when the Batch
was used. Surprise: a slot that was given back may still be read. A copy to the GPU goes on by itself while the training
thread asks for the next Batch; so a slot remembers that moment on the GPU's clock, and whoever writes to it next waits.

A fresh tensor for each picture costs more than the copy that it saves: the system hands out its pages one by one,
and zeroed.
"""

import torch

from phi3v_dist.data.batch import Crops
from phi3v_dist.model.placement import CROP_SIZE


class Slot:
    """Room for the crops of one row.

    crops: [capacity, 3, 336, 336]; pinned where there is a GPU. What it holds at first is left from an earlier row.
    """

    def __init__(self, num_crops: int, dtype: torch.dtype):
        self._is_pinned = torch.cuda.is_available()
        self.crops: Crops = torch.empty(num_crops, 3, CROP_SIZE, CROP_SIZE, dtype=dtype, pin_memory=self._is_pinned)
        self._last_use: torch.cuda.Event | None = None

    def mark_used(self) -> None:
        """Called by the training thread, when all copies from the slot have been asked for."""
        if self._is_pinned:
            self._last_use = torch.cuda.Event(blocking=True)
            self._last_use.record()

    def wait(self) -> None:
        """Called by who is about to write: returns when no copy from the slot is under way."""
        if self._last_use is not None:
            self._last_use.synchronize()


class Slots:
    """Hands out slots; there are as many as were ever out at one time, each as large as it had to be.

    dtype: uint8 for fast crops, fp32 for exact ones.
    """

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._free: list[Slot] = []

    def take(self, num_crops: int) -> Slot:
        """A slot with room for so many crops, and for at least one: the smallest that will do, else a new one, which
        replaces the largest of those that are too small."""
        num_crops = max(1, num_crops)
        self._free.sort(key=lambda slot: len(slot.crops))
        for place, slot in enumerate(self._free):
            if len(slot.crops) >= num_crops:
                return self._free.pop(place)
        if self._free:
            self._free.pop()
        return Slot(num_crops, self._dtype)

    def give_back(self, slot: Slot) -> None:
        """The slot's crops are no longer needed, but for copies to a GPU that were already asked for."""
        slot.mark_used()
        self._free.append(slot)
