"""Nested calls of some threads → a flame graph as SVG, the callers on top.

What comes in: `Call`s in any order. What goes out: one file that any browser opens; the mouse over a box tells its
whole name and time. Surprise: nesting is not told, it follows from the times: a call lies in the one that was open when
it began, and what sticks out of it is cut.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

WIDTH_PX, ROW_PX, MARGIN_PX, LETTER_PX = 1400, 18, 10, 6.6
LEAST_PX = 0.4  # narrower boxes are left out
MOST_ROWS = 120


@dataclass(frozen=True)
class Call:
    """thread: calls of one nest. begin, duration: in any unit, the same for all; the times are shown as nanoseconds."""

    thread: str
    name: str
    begin: int
    duration: int


@dataclass
class Box:
    """Calls of one name under one chain of callers. total: their time."""

    name: str
    total: int = 0
    count: int = 0
    inside: dict[str, "Box"] = field(default_factory=dict)

    def child(self, name: str) -> "Box":
        return self.inside.setdefault(name, Box(name))


def fold(calls: Iterable[Call], top: str = "") -> Box:
    """One box for each chain of callers.

    top: of a thread with calls whose name begins so, those are the outermost ones, and named `top`: what is around
        them is left out, since it is the same for all.
    """
    threads: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        threads[call.thread].append(call)
    root = Box("all threads")
    for thread, its_calls in threads.items():
        is_cut = bool(top) and any(call.name.startswith(top) for call in its_calls)
        box = root.child(thread)
        open_calls: list[tuple[int, Box]] = []  # end and box, outermost first
        for call in sorted(its_calls, key=lambda one: (one.begin, -one.duration)):
            while open_calls and open_calls[-1][0] <= call.begin:
                open_calls.pop()
            end = min(call.begin + call.duration, open_calls[-1][0] if open_calls else call.begin + call.duration)
            if is_cut and call.name.startswith(top):
                parent, name = box, top
            elif open_calls or not is_cut:
                parent, name = open_calls[-1][1] if open_calls else box, call.name
            else:
                continue
            inner = parent.child(name)
            inner.total, inner.count = inner.total + end - call.begin, inner.count + 1
            open_calls.append((end, inner))
        box.total, box.count = sum(inner.total for inner in box.inside.values()), 1
    root.total, root.count = sum(box.total for box in root.inside.values()), 1
    return root


def draw(root: Box, title: str) -> str:
    """The SVG. Text from outside is escaped."""
    rows: list[str] = []
    depth = _draw(root, float(MARGIN_PX), (WIDTH_PX - 2 * MARGIN_PX) / max(1, root.total), 0, root.total, rows)
    height = 2 * MARGIN_PX + ROW_PX * (depth + 2)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {height}" width="{WIDTH_PX}" '
        f'height="{height}" font-family="monospace" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n<text x="{MARGIN_PX}" y="20" font-size="14">'
        f"{escape(title)}</text>\n"
    )
    return head + "\n".join(rows) + "\n</svg>\n"


def _draw(box: Box, left: float, scale: float, depth: int, whole: int, rows: list[str]) -> int:
    """Draws a box and what is in it; returns the deepest row."""
    width, top = box.total * scale, MARGIN_PX + ROW_PX * (depth + 1)
    share = 100 * box.total / max(1, whole)
    said = escape(f"{box.name}: {box.total / 1e6:,.3f} ms, {share:.1f} %, {box.count:,} calls")
    fits = int((width - 4) / LETTER_PX)
    short = box.name if len(box.name) <= fits else f"{box.name[: fits - 1]}…"
    text = f'<text x="{left + 2:.1f}" y="{top + 12.5:.1f}">{escape(short)}</text>' if fits >= 3 else ""
    rows.append(
        f'<g><title>{said}</title><rect x="{left:.1f}" y="{top}" width="{max(width - 0.3, 0.1):.1f}" '
        f'height="{ROW_PX - 1}" fill="{_colour(box.name)}"/>{text}</g>'
    )
    deepest = depth
    for inner in sorted(box.inside.values(), key=lambda one: -one.total):
        if inner.total * scale >= LEAST_PX and depth + 1 < MOST_ROWS:
            deepest = max(deepest, _draw(inner, left, scale, depth + 1, whole, rows))
        left += inner.total * scale
    return deepest


def _colour(name: str) -> str:
    """Pale; blue for operators, the same name always the same."""
    number = zlib.crc32(name.encode())
    hue = 195 + number % 40 if "::" in name else 20 + number % 40
    return f"hsl({hue},{55 + number // 64 % 30}%,{72 + number // 4096 % 12}%)"
