"""Sizes of pictures and their places in a row → which token takes which feature, and who computes it.

What comes in: padded picture sizes, the positions of their tokens, the ranks that share the row. What goes out: a
`Placement`, plain indices made on the CPU. Surprise: a 2 x 2 merge of patches never crosses a crop, so tower and
projector work on crops in any order and on any rank; only the placing knows of pictures. A rank computes its share of
the row's crops and sends every other one exactly the rows which that one places.

A picture's tokens (`hd_transform_order` "sub_glb", MODEL.md §4): its local crops as one grid, row by row, each row
ended by a separator; another separator; the global view, rows ended likewise.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from phi3v_dist.parallel.ulysses import ALONE, SequenceGroup

CROP_SIZE = 336
PATCHES_PER_SIDE = 24  # 336 / 14
SIDE = PATCHES_PER_SIDE // 2  # tokens per side of a crop, after 2 x 2 patches are merged
CELLS = SIDE * SIDE  # of a crop
ROW_END, VIEW_END = 0, 1  # sources that are separators: after a row of a grid, between local crops and global view
SEPARATORS = 2


def num_image_tokens(height: int, width: int) -> int:
    """Tokens of a picture padded to height x width: rows end in a separator, one more stands between local and
    global."""
    rows, columns = height // CROP_SIZE * SIDE, width // CROP_SIZE * SIDE
    return rows * (columns + 1) + 1 + SIDE * (SIDE + 1)


def num_crops_of(height: int, width: int) -> int:
    """Crops of a picture padded to height x width, the global view included."""
    return (height // CROP_SIZE) * (width // CROP_SIZE) + 1


@dataclass(frozen=True)
class Placement:
    """How the image tokens of a slice get their features. All of it is known before anything is computed.

    positions: int64, of the image tokens within the slice, in order.
    sources: int64, for each of them: `ROW_END`, `VIEW_END`, or `SEPARATORS` + the number of a received feature.
    cells: int64, the features that this rank sends, of those of its own crops (crop · 144 + cell), by receiver.
    send, receive: how many it sends to, and gets from, every rank of the group.
    num_crops: of this rank; further crops in a Batch belong to no picture.
    """

    positions: Int[Tensor, " image_tokens"]
    sources: Int[Tensor, " image_tokens"]
    cells: Int[Tensor, " sent"]
    send: tuple[int, ...]
    receive: tuple[int, ...]
    num_crops: int

    @classmethod
    def of(
        cls, sizes: Int[Tensor, "images 2"], positions: Int[Tensor, " row_image_tokens"], num_tokens: int,
        group: SequenceGroup = ALONE,
    ) -> "Placement":  # fmt: skip
        """For one rank of a group.

        Args:
            sizes: padded (height, width) of the row's pictures, in order.
            positions: of their tokens in the whole row, ascending.
            num_tokens: of a slice, which is the whole row of a rank alone.
        """
        whole, places = _sources([(height, width) for height, width in sizes.tolist()]), positions.numpy()
        num_crops = sum(num_crops_of(height, width) for height, width in sizes.tolist())
        shares = [group.share(num_crops, rank) for rank in range(group.size)]
        owner = np.searchsorted([share.stop for share in shares], whole // CELLS, side="right")
        owner[whole < 0] = -1  # separators: every rank has them
        own, is_own = shares[group.rank], owner == group.rank
        receiver = places // num_tokens
        ours = receiver == group.rank
        by_sender = np.argsort(owner[ours], kind="stable")
        num_separators = int((owner[ours] < 0).sum())
        sources = np.empty(int(ours.sum()), np.int64)
        sources[by_sender] = np.arange(len(sources)) + SEPARATORS - num_separators
        sources[owner[ours] < 0] = whole[ours][owner[ours] < 0] + SEPARATORS
        return cls(
            positions=torch.from_numpy(places[ours] - num_tokens * group.rank),
            sources=torch.from_numpy(sources),
            cells=torch.from_numpy(whole[is_own] - own.start * CELLS),  # tokens are in order, so are their receivers
            send=tuple(np.bincount(receiver[is_own], minlength=group.size).tolist()),
            receive=tuple(np.bincount(owner[ours & (owner >= 0)], minlength=group.size).tolist()),
            num_crops=len(own),
        )

    @classmethod
    def in_row(cls, input_ids: Int[Tensor, "1 tokens"], sizes: Tensor | None) -> "Placement":
        """For ids whose negative positions take the pictures; waits for their device.

        Raises:
            ValueError: there are more or fewer places than the pictures have tokens.
        """
        sizes = torch.zeros(0, 2, dtype=torch.int64) if sizes is None else sizes
        positions = (input_ids[0] < 0).nonzero().flatten().cpu()
        wanted = sum(num_image_tokens(height, width) for height, width in sizes.tolist())
        if wanted != len(positions):
            found = f"{wanted} image tokens, the text has {len(positions)} places for them"
            raise ValueError(f"pictures of sizes {sizes.tolist()} give {found}")
        return cls.of(sizes, positions, input_ids.shape[1]).to(input_ids.device)

    def to(self, device: torch.device) -> "Placement":
        """The same with its tensors on a device."""
        names = ("positions", "sources", "cells")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def _sources(sizes: list[tuple[int, int]]) -> np.ndarray:
    """For every image token of a row its cell (crop · 144 + cell), or a separator - `SEPARATORS`."""
    tables, num_crops = [np.zeros(0, np.int64)], 0
    for height, width in sizes:
        table = _picture(height, width)
        tables.append(np.where(table < 0, table, table + num_crops * CELLS))
        num_crops += num_crops_of(height, width)
    return np.concatenate(tables)


@cache
def _picture(height: int, width: int) -> np.ndarray:
    """The same for one picture: the global view is its crop 0, local crops follow row by row."""
    rows, columns = height // CROP_SIZE, width // CROP_SIZE
    cells = np.arange((1 + rows * columns) * CELLS).reshape(-1, SIDE, SIDE)
    local = cells[1:].reshape(rows, columns, SIDE, SIDE).swapaxes(1, 2).reshape(rows * SIDE, columns * SIDE)
    return np.concatenate([_with_ends(local), [VIEW_END - SEPARATORS], _with_ends(cells[0])])


def _with_ends(grid: np.ndarray) -> np.ndarray:
    """A grid row by row, a separator after each row."""
    return np.pad(grid, ((0, 0), (0, 1)), constant_values=ROW_END - SEPARATORS).reshape(-1)
