"""The moments of a step → what ZeRO-3 holds at each: gathered weights, and gradients on their way.

What comes in: the order in which modules run (a `Timeline`'s keys) and DeepSpeed's limits. What goes out: bytes for
every moment. Surprise: weights are not simply let go when their module is done. DeepSpeed looks ahead: it keeps what is
used again within `stage3_max_reuse_distance` elements, and fetches ahead up to `stage3_max_live_parameters`.

The rules are those of DeepSpeed 0.19.8, of a step whose order it knows already (the third and all later ones):
partitioned_param_coordinator.py for weights, stage3.py (`ipg_buckets`) for gradients. Tests compare with the engine.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from phi3v_dist.planner.trace import Key

NEVER = -1


@dataclass(frozen=True)
class Weight:
    """A parameter: its name, number of elements, and whether it is trained."""

    name: str
    elements: int
    trained: bool = True


@dataclass(frozen=True)
class Limits:
    """What of a ds_config decides how much is held: elements, except `itemsize` (bytes of an element)."""

    ranks: int
    itemsize: int
    prefetch_bucket: int
    max_live: int
    max_reuse_distance: int
    persistence_threshold: int
    reduce_bucket: int


@dataclass(frozen=True)
class Held:
    """Bytes for every moment: `during` its hook at most, and `after` it until the next one.

    gathered_elements: of all gathers of the step.
    """

    during: np.ndarray
    after: np.ndarray
    gathered_elements: int


@dataclass
class _Buffer:
    """Of several weights gathered together; it stays until each of them has been used."""

    weights: list[Weight]
    waiting: set[str]
    size: int


@dataclass
class _State:
    """One step under way. `weights`: what is there, and its bytes."""

    bytes_held: int = 0
    peak: int = 0
    live_elements: int = 0
    gathered: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    in_flight: dict[str, _Buffer | None] = field(default_factory=dict)
    users: dict[str, set[str]] = field(default_factory=dict)

    def hold(self, size: int) -> None:
        self.bytes_held += size
        self.peak = max(self.peak, self.bytes_held)


def replay(keys: Sequence[Key], owners: Mapping[str, Sequence[Weight]], limits: Limits) -> Held:
    """What is held at each moment.

    Args:
        owners: module → the weights that are its own; modules without any may be missing.
    """
    uses = [(name, owners.get(name, ())) for kind, name in keys if kind in ("forward", "backward")]
    replayed = _Replay(uses, limits)
    during, after = np.zeros(len(keys)), np.zeros(len(keys))
    gradients = _Gradients(limits, {weight.name: weight for group in owners.values() for weight in group})
    for number, (kind, name) in enumerate(keys):
        own = owners.get(name, ())
        state = replayed.state
        state.peak = state.bytes_held
        extra = gradients.held
        if kind in ("forward", "backward"):
            replayed.fetch(name, own, backward=kind == "backward")
        elif kind in ("forward_end", "backward_end"):
            replayed.release(name, own, backward=kind == "backward_end")
        elif kind == "gradient":
            extra = max(extra, gradients.ready(name))
        elif kind == "end":
            extra = max(extra, gradients.reduce())
        during[number] = state.peak + extra
        after[number] = state.bytes_held + gradients.held
    return Held(during, after, replayed.state.gathered)


class _Replay:
    """Weights: fetched, kept and let go."""

    def __init__(self, uses: list[tuple[str, Sequence[Weight]]], limits: Limits):
        self.limits, self.state = limits, _State()
        self.step = 0
        self.queue = deque((weight, step) for step, (_, own) in enumerate(uses) for weight in sorted(own, key=_order))
        self.traversed = [0]  # elements of all modules before a step
        self.next_use: dict[str, list[int]] = {}
        for step, (_, own) in enumerate(uses):
            self.traversed.append(self.traversed[-1] + sum(weight.elements for weight in own))
            for weight in own:
                self.next_use.setdefault(weight.name, []).append(step)
        self.fetched_for: dict[str, int] = {}
        self.running_back: dict[str, dict[str, Weight]] = {}  # modules at work, frozen weights recomputed for them
        persistent = {w.name: w for _, own in uses for w in own if w.elements <= limits.persistence_threshold}
        for weight in persistent.values():  # gathered together after every optimizer step
            self.state.weights[weight.name] = self._size(weight)
            self.state.hold(self._size(weight))

    def fetch(self, module: str, own: Sequence[Weight], backward: bool) -> None:
        """Gather what the module needs, then what comes next."""
        state = self.state
        if backward:
            self.running_back.setdefault(module, {})
        self._gather([w for w in own if not self._known(w)])
        for weight in own:
            state.users.setdefault(weight.name, set()).add(module)
            if not backward and self.running_back and not weight.trained:
                next(reversed(self.running_back.values()))[weight.name] = weight
            self._wait(weight)
        new = {w.name for w in own if self.fetched_for.get(w.name, NEVER) < self.step}
        found: set[str] = set()
        while self.queue and len(found) < len(new):
            weight, step = self.queue.popleft()
            self.fetched_for[weight.name] = step
            found.add(weight.name)
        most = min(self.limits.max_live - state.live_elements, self.limits.prefetch_bucket)
        ahead: dict[str, Weight] = {}
        elements = 0
        while self.queue and elements < most:
            weight, step = self.queue.popleft()
            self.fetched_for[weight.name] = max(self.fetched_for.get(weight.name, NEVER), step)
            if not self._known(weight) and weight.name not in ahead:
                ahead[weight.name] = weight
                elements += weight.elements
        self._gather(list(ahead.values()))
        self.step += 1

    def release(self, module: str, own: Sequence[Weight], backward: bool) -> None:
        """Let go what is not needed soon."""
        weights = {w.name: w for w in own}
        going = {name for name, weight in weights.items() if not self._is_kept(weight)}
        if backward:
            recomputed = self.running_back.pop(module, {})
            going |= {name for name, weight in recomputed.items() if not self._is_persistent(weight)}
            weights |= recomputed
        for name, weight in weights.items():
            users = self.state.users.setdefault(name, set())
            users.discard(module)
            if name in going and not users and name in self.state.weights:
                self.state.bytes_held -= self.state.weights.pop(name)
                self.state.live_elements -= weight.elements

    def _is_persistent(self, weight: Weight) -> bool:
        return weight.elements <= self.limits.persistence_threshold

    def _is_kept(self, weight: Weight) -> bool:
        if self._is_persistent(weight) or self.fetched_for.get(weight.name, NEVER) > self.step:
            return True
        steps = self.next_use[weight.name]
        place = bisect_left(steps, self.step)
        if place == len(steps):
            return False
        return self.traversed[steps[place]] - self.traversed[self.step] < self.limits.max_reuse_distance

    def _known(self, weight: Weight) -> bool:
        return weight.name in self.state.weights or weight.name in self.state.in_flight

    def _size(self, weight: Weight) -> int:
        return weight.elements * self.limits.itemsize if self.limits.ranks > 1 else 0

    def _gather(self, weights: list[Weight]) -> None:
        """One alone is gathered in place; several through a common buffer, from which each is copied when used."""
        state, limits = self.state, self.limits
        elements = sum(w.elements for w in weights)
        state.live_elements += elements
        state.gathered += elements
        if len(weights) == 1:
            state.in_flight[weights[0].name] = None
            state.hold(self._size(weights[0]))
        elif weights:
            padded = sum(math.ceil(w.elements / limits.ranks) * limits.ranks for w in weights)
            size = padded * limits.itemsize if limits.ranks > 1 else 0
            buffer = _Buffer(weights, {w.name for w in weights}, size)
            state.hold(size)
            for weight in weights:
                state.in_flight[weight.name] = buffer

    def _wait(self, weight: Weight) -> None:
        if weight.name not in self.state.in_flight:
            return
        buffer = self.state.in_flight.pop(weight.name)
        if buffer is None:
            self.state.weights[weight.name] = self._size(weight)
            return
        for each in buffer.weights:
            if each.name not in self.state.weights:
                self.state.weights[each.name] = self._size(each)
                self.state.hold(self._size(each))
        buffer.waiting.discard(weight.name)
        if not buffer.waiting:
            self.state.bytes_held -= buffer.size


def _order(weight: Weight) -> str:
    return weight.name


class _Gradients:
    """Those that do not fit into the reduce bucket stay where they are until the next one is ready."""

    def __init__(self, limits: Limits, weights: Mapping[str, Weight]):
        self.limits, self.weights = limits, weights
        self.bucket: list[Weight] = []
        self.elements = self.held = 0

    def ready(self, name: str) -> int:
        """Takes a gradient; returns the bytes held meanwhile at most, itself not counted."""
        weight = self.weights[name]
        most = self.held
        if self.elements and self.elements + weight.elements > self.limits.reduce_bucket:
            most = self.reduce()
        if self.elements + weight.elements > self.limits.reduce_bucket:
            self.held += weight.elements * self.limits.itemsize
        self.bucket.append(weight)
        self.elements += weight.elements
        return most

    def reduce(self) -> int:
        """Sends the bucket; returns the bytes held meanwhile at most: several are laid out rank by rank in a copy."""
        ranks = self.limits.ranks
        if len(self.bucket) == 1 and self.bucket[0].elements % ranks == 0:
            copy = 0
        else:
            copy = sum(math.ceil(w.elements / ranks) * ranks for w in self.bucket) * self.limits.itemsize
        most = self.held + copy
        self.bucket, self.elements, self.held = [], 0, 0
        return most
