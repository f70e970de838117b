"""The colours of every drawing and of the page, by role, light and dark. Safe for the colour-blind: families differ in
hue, members of a family in lightness, and every mark is labelled as well."""

from __future__ import annotations

# role -> (light, dark)
COLORS: dict[str, tuple[str, str]] = {
    "page": ("#fcfcfa", "#14161a"),
    "surface": ("#ffffff", "#1b1e24"),
    "sunken": ("#f3f3ef", "#23272f"),
    "ink": ("#1d2127", "#e7e8ea"),
    "soft": ("#565c66", "#a9afba"),
    "faint": ("#8b919b", "#7b828e"),
    "rule": ("#e2e2dc", "#31363f"),
    "rail": ("#a3a9b3", "#6f7683"),
    "link": ("#0b5fa5", "#7ab8f0"),
    "clean": ("#1f6fb2", "#6fb1ea"),
    "adversarial": ("#c4511a", "#f0925c"),
    "bound": ("#1d2127", "#e7e8ea"),
    "warn": ("#8a5a00", "#f0c060"),
    "warn-surface": ("#fff6df", "#332a14"),
    "none": ("#9aa0a9", "#858c97"),
    "max_pool_3x3": ("#0f7a66", "#2fae93"),
    "avg_pool_3x3": ("#47b39a", "#8adcc6"),
    "skip_connect": ("#7d55bf", "#b79bea"),
    "sep_conv_3x3": ("#4b9be0", "#9ccdf7"),
    "sep_conv_5x5": ("#1a5a9e", "#5b9fe0"),
    "sep_conv_7x7": ("#0c386b", "#3f7fc4"),
    "dil_conv_3x3": ("#ea8a2e", "#fbc07f"),
    "dil_conv_5x5": ("#b1480b", "#ec8547"),
    "conv_7x1_1x7": ("#b13a6c", "#ea8bb3"),
    "series-1": ("#1f6fb2", "#6fb1ea"),
    "series-2": ("#c4511a", "#f0925c"),
    "series-3": ("#0f7a66", "#2fae93"),
    "series-4": ("#7d55bf", "#b79bea"),
    "series-5": ("#a1761a", "#dcb45a"),
    "series-6": ("#565c66", "#a9afba"),
}

VIRIDIS = (
    "440154 48186a 472d7b 424086 3b528b 33638e 2c728e 26828e 21918d 1fa088 28ae80 3fbc73 5ec962 84d44b "
    "addc30 d8e21a fde725"
).split()
"""Seventeen colours of matplotlib's viridis (Smith and van der Walt, CC0), evenly spaced from the lowest value up."""


def light(role: str) -> str:
    """The colour of `role` on a light page, as #rrggbb."""
    return COLORS[role][0]


def series(i: int) -> str:
    """The role of the `i`-th of several networks; after six the colours repeat."""
    return f"series-{i % 6 + 1}"


def _variables(dark: bool) -> str:
    return ";".join(f"--{role}:{pair[dark]}" for role, pair in COLORS.items())


def page_css() -> str:
    """The roles as CSS variables that follow the reader's preference, or `data-theme` on the root; and the classes
    `f-ROLE` and `s-ROLE` with which drawings fill and stroke."""
    dark = _variables(True)
    classes = "".join(f".f-{role}{{fill:var(--{role})}}.s-{role}{{stroke:var(--{role})}}" for role in COLORS)
    return (
        f":root{{color-scheme:light;{_variables(False)}}}"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}{classes}"
    )


def drawing_css(roles: set[str]) -> str:
    """What a drawing by itself needs to turn dark where the reader prefers it."""
    rules = "".join(f".f-{r}{{fill:{COLORS[r][1]}}}.s-{r}{{stroke:{COLORS[r][1]}}}" for r in sorted(roles))
    return f"@media (prefers-color-scheme:dark){{{rules}}}"
