"""Markup that cannot forget to escape: a plain string given to `el` is text, only `Html` is markup."""

from __future__ import annotations

from html import escape


class Html(str):
    """Markup that is safe to put into a page as it is."""

    __slots__ = ()


Child = str | Html | None
VOID = frozenset({"br", "img", "meta", "link", "input", "hr"})


def join(*children: Child) -> Html:
    """The children one after another; plain strings are escaped, None is left out."""
    return Html("".join(c if isinstance(c, Html) else escape(c) for c in children if c is not None))


def el(tag: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """The element `tag`. Attribute names: `class_` is class, underscores are hyphens; True is an empty attribute,
    None and False leave it out."""
    parts = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{escape(str(value))}"')
    start = f"<{' '.join(parts)}>"
    return Html(start) if tag in VOID else Html(f"{start}{join(*children)}</{tag}>")
