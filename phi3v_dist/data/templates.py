"""A Jinja template and the fields of one record → words.

What comes in: a template of the user's (`Product: {{ title }}`) and the fields of a sample's JSON, or of a row of a
table. What goes out: plain text, or the reason why not, naming the field. Surprise: what cannot be meant is refused
rather than written: a missing field, null and NaN (which Python would spell None and nan), and a whole list or object.
The template runs in a sandbox, and words of the data are never a template. A field whose name Jinja cannot spell is
`record['Price (EUR)']`.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import SandboxedEnvironment

WHOLE = "record"  # all fields by name, for names that are no identifiers; a field of that name comes first


def fill_template(template: str, fields: Mapping[str, Any]) -> str:
    """The template with the record's fields.

    Raises:
        ValueError: naming the template, what is wrong, and the fields that are there or empty.
    """
    try:
        return _compile(template).render({WHOLE: fields, **fields})
    except Exception as error:  # a template is a small program of the user's, and can raise what it likes
        raise ValueError(f"template {template!r}: {error} ({describe_fields(template, fields)})") from error


def describe_fields(template: str, fields: Mapping[str, Any]) -> str:
    """`null: brand; fields: brand, price, title`: of the fields that the template names, those without a value."""
    try:
        named = template_fields(template)
    except Exception:  # the template itself is wrong, which its caller says
        named = set()
    nulls = sorted(name for name in named if name in fields and fields[name] is None)
    empty = sorted(name for name in named if isinstance(fields.get(name), str) and not fields[name].strip())
    parts = [("null", nulls), ("empty", empty), ("fields", sorted(map(str, fields)))]
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names) or "no fields"


def template_fields(template: str) -> set[str]:
    """Names of the fields that a template reads. Raises ValueError: it is no Jinja template."""
    try:
        tree = _environment.parse(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"template {template!r}: {error}") from error
    named = meta.find_undeclared_variables(tree)
    spelt = {
        item.arg.value
        for item in tree.find_all(nodes.Getitem)
        if isinstance(item.node, nodes.Name) and item.node.name == WHOLE and isinstance(item.arg, nodes.Const)
    }
    return named - {WHOLE} | spelt if spelt else named


def _only_words(value: Any) -> Any:
    if value is None or isinstance(value, float) and not math.isfinite(value):
        shown = "null, which would be written as None" if value is None else f"{value}, which is no number"
        raise ValueError(f"a value it shows is {shown}; {{{{ field or '' }}}} allows it")
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        raise ValueError(f"a value it shows is {kind}; name a part of it, or write {{{{ field | tojson }}}}")
    return value


_environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_only_words)


@lru_cache(maxsize=64)
def _compile(template: str) -> Template:
    return _environment.from_string(template)
