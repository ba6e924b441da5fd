"""Memory for crops: used again when it is large enough, and on a GPU's host only after the copies from it."""

import threading

import pytest
import torch

from phi3v_dist.data.slots import Slots


def test_the_smallest_that_will_do_is_taken_and_the_largest_is_replaced_when_none_will() -> None:
    slots = Slots(torch.uint8)
    small, large, middle = (slots.take(num_crops) for num_crops in (0, 9, 5))
    assert [tuple(slot.crops.shape) for slot in (small, large, middle)] == [(n, 3, 336, 336) for n in (1, 9, 5)]
    for slot in (small, large, middle):
        slots.give_back(slot)
    assert slots.take(4) is middle
    assert len(slots.take(12).crops) == 12  # instead of the one of 9
    assert slots.take(1) is small and len(slots.take(2).crops) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies in the background need a GPU")
def test_a_slot_is_not_written_while_a_copy_from_it_is_under_way() -> None:
    slots = Slots(torch.uint8)
    slot = slots.take(17)
    slot.crops.fill_(1)
    torch.cuda._sleep(1_000_000_000)  # the copy begins about half a second from now
    on_gpu = slot.crops.to("cuda", non_blocking=True)
    slots.give_back(slot)
    again = slots.take(17)
    assert again is slot and slot.crops.is_pinned()

    def write() -> None:
        again.wait()
        again.crops.fill_(2)

    writer = threading.Thread(target=write)
    writer.start()
    writer.join()
    assert (on_gpu == 1).all()
