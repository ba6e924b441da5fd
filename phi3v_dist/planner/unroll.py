"""Timelines of a few layers and slices → the timeline of all of them.

What comes in: what `trace.py` recorded of a model of three layers, and of rows of three and four slices. What goes out:
the same for the real numbers. Surprise: this is exact, not a fit. A loop that runs once more keeps the same tensors
once more, so every moment's memory is linear in the number of rounds; a test compares with everything traced.
"""

import numpy as np

from phi3v_dist.planner.trace import Key, Timeline

TRACED = 3  # layers, and rounds of a loop: a first, one that is repeated, a last
DECODER, TOWER = "model.layers", "model.vision_embed_tokens.img_processor.vision_model.encoder.layers"


def more_rounds(few: Timeline, one_more: Timeline, rounds: int) -> Timeline:
    """Loops of three rounds, and of four in `one_more` → of so many.

    A round's memory is a + b · rounds + c · its place, with b and c from the two timelines. Gradients come in a loop's
    last round alone, so that rounds are compared without them.
    """
    extra = rounds - TRACED
    ours, theirs = _Steps(few), _Steps(one_more)
    pairs: list[tuple[int, int]] = []  # what belongs together in the two
    loops: list[tuple[int, int, int, int]] = []  # where in `pairs` rounds are missing; the second of each; their length
    i = j = 0
    while i < len(ours.keys) or j < len(theirs.keys):
        if i < len(ours.keys) and j < len(theirs.keys) and ours.keys[i] == theirs.keys[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
            continue
        width = _round(theirs.keys, ours.keys[i : i + 3], j)
        del pairs[-width:]  # the last round of one goes with the last of the other
        loops.append((len(pairs), i - 2 * width, j - 2 * width, width))
        pairs += zip(range(i - width, i), range(j, j + width), strict=True)
        j += width
    keys: list[Key] = []
    pieces: list[np.ndarray] = []
    done = 0
    for place, own, other, width in [*loops, (len(pairs), 0, 0, 0)]:
        for i, j in pairs[done:place]:
            here, there = ours.columns[ours.at(i, i + 1)], theirs.columns[theirs.at(j, j + 1)]
            keys += few.keys[ours.at(i, i + 1)]
            pieces.append(here + extra * (there - here))
        done = place
        if width:
            second, first = ours.columns[ours.at(own, own + width)], theirs.at(other, other + width)
            change = theirs.columns[first] - second
            step = theirs.columns[theirs.at(other + width, other + 2 * width)] - theirs.columns[first]
            for number in range(1, extra + 1):
                keys += few.keys[ours.at(own, own + width)]
                pieces.append(second + extra * change + number * step)
    return _timeline(keys, np.concatenate(pieces))


class _Steps:
    """A timeline's moments, each with the gradients that come right after it."""

    def __init__(self, timeline: Timeline):
        self.columns = _columns(timeline)
        places = [i for i, (kind, _) in enumerate(timeline.keys) if kind != "gradient"]
        self.keys = [timeline.keys[i] for i in places]
        self._borders = [*places, len(timeline.keys)]

    def at(self, begin: int, end: int) -> slice:
        """Where these are in the timeline."""
        return slice(self._borders[begin], self._borders[end])


def _round(keys: list[Key], following: list[Key], at: int) -> int:
    """Length of the round of which `keys` has three before this place, and one more."""
    for width in range(1, at // TRACED + 1):
        again = keys[at : at + width]
        is_round = keys[at - width] == again[0] and keys[at - TRACED * width : at] == again * TRACED
        if is_round and keys[at + width : at + width + len(following)] == following:
            return width
    raise AssertionError(f"timelines differ by more than rounds of a loop, at {keys[at : at + 1]}")


def more_layers(few: Timeline, stack: str, num_layers: int) -> Timeline:
    """A stack of three layers → of so many: the middle one is repeated, wherever the pass goes through it."""
    extra = num_layers - TRACED
    if extra <= 0:
        return few
    columns = _columns(few)
    depth = np.array([_depth(name, stack) for _, name in few.keys])
    borders = [0, *(np.flatnonzero(np.diff(depth)) + 1).tolist(), len(depth)]
    runs = list(zip(borders, borders[1:], strict=False))
    shift = np.zeros(columns.shape[1], dtype=columns.dtype)
    keys: list[Key] = []
    pieces: list[np.ndarray] = []
    for number, (begin, end) in enumerate(runs):
        names = few.keys[begin:end]
        if depth[begin] != 1:
            keys += _renamed(names, stack, num_layers - 1) if depth[begin] == TRACED - 1 else names
            pieces.append(columns[begin:end] + shift)
            continue
        after = runs[number + 1][0]  # the next layer: the one above, or below in the backward pass
        live, host = few.live[after] - few.live[begin], few.host[after] - few.host[begin]
        each = np.concatenate([live, live, [host]])
        upwards = depth[after] > 1
        for copy in range(extra + 1):
            keys += _renamed(names, stack, 1 + (copy if upwards else extra - copy))
            pieces.append(columns[begin:end] + shift + copy * each)
        shift = shift + extra * each
    return _timeline(keys, np.concatenate(pieces))


def _depth(name: str, stack: str) -> int:
    if not name.startswith(stack + "."):
        return -1
    number = name[len(stack) + 1 :].partition(".")[0]
    return int(number)


def _renamed(keys: tuple[Key, ...] | list[Key], stack: str, number: int) -> list[Key]:
    """The same moments in another layer."""
    renamed = []
    for kind, name in keys:
        rest = name[len(stack) + 1 :].partition(".")[2]
        renamed.append((kind, f"{stack}.{number}.{rest}" if rest else f"{stack}.{number}"))
    return renamed


def _columns(timeline: Timeline) -> np.ndarray:
    return np.concatenate([timeline.live, timeline.most, timeline.host[:, None]], axis=1)


def _timeline(keys: list[Key], columns: np.ndarray) -> Timeline:
    half = (columns.shape[1] - 1) // 2
    return Timeline(tuple(keys), columns[:, :half], columns[:, half : 2 * half], columns[:, -1])
