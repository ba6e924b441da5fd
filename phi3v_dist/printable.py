"""Words of the data → words that may stand in a log, in an error and on a terminal.

What comes in: any `str`, keys and file names of strangers included. What goes out: the same letters in any script, and
everything that does not show (control characters, ANSI codes, marks that turn the reading direction, half surrogates)
spelled out as Python would. Surprise: a line break counts as one of them unless it is asked for, because a key with a
line break in it could otherwise write a log line of its own.
"""


def printable(text: str, keep: str = "") -> str:
    """`text` with what does not show spelled out (`\\x1b`, `\\n`, `\\u202e`); characters in `keep` stay as they are."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )
