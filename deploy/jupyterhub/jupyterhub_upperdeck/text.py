"""Text of users in pages of the hub."""

from __future__ import annotations

import html
import unicodedata

_MAX = 200


def shorten(text: object, most: int = _MAX) -> str:
    """Returns a text on one line, without characters that are not seen or reorder others, at most ``most`` long."""
    kept = "".join(
        " " if char.isspace() else char
        for char in str(text)[: most * 4]
        if char.isspace() or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn")
    )
    words = " ".join(kept.split())
    return words if len(words) <= most else words[: most - 1] + "…"


def markup(text: object, most: int = _MAX) -> str:
    """Returns a text for HTML that the hub takes for a template and renders.

    Besides what HTML needs, braces are written as character references: JupyterHub evaluates ``{{ … }}`` in the form of
    the spawn page, and KubeSpawner's template escapes nothing.
    """
    escaped = html.escape(shorten(text, most), quote=True)
    return escaped.replace("{", "&#123;").replace("}", "&#125;")


def size(count: object) -> str:
    """Returns a number of bytes for people, e.g. ``1.3 GB``."""
    if not isinstance(count, int | float) or count < 0:
        return ""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def date(text: object) -> str:
    """Returns a time (RFC 3339, UTC) as date, hours and minutes."""
    said = shorten(text or "", 40)
    return said[:16].replace("T", " ") + (" UTC" if len(said) >= 16 else "")
