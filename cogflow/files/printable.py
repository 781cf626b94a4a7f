"""Show text of unknown origin on a terminal or in a text log: escape what controls it, and what imitates other lines.

Clip names, captions, prompts and records come from others. Escape sequences can rewrite a terminal, line breaks can
imitate an error message, and marks of the writing direction can reorder a line.
"""

from __future__ import annotations

import unicodedata

_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories: controls, format characters such as bidirectional marks, lone surrogates, and separators."""
_JOINERS = frozenset("\u200c\u200d")  # part of the spelling of Persian and Indic words, and of emoji


def one_line(text: str) -> str:
    r"""Return ``text`` on one line: every control and format character is escaped as ``\n``, ``\x1b`` or ``\u202e``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(character) if _is_control(character) else character for character in text)


def printable(text: str) -> str:
    """Return ``text`` with its line breaks and tabs kept and every other control and format character escaped."""
    return "\n".join("\t".join(one_line(part) for part in line.split("\t")) for line in text.split("\n"))


def paragraph(text: str) -> str:
    """Return ``text`` as :func:`printable` does, with every line after the first indented by two spaces at least.

    A line break in a name then cannot begin a line that looks like a message of its own.
    """
    first, *others = printable(text).split("\n")
    return "\n".join([first, *(line if not line or line.startswith("  ") else f"  {line}" for line in others)])


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in _ESCAPED and character not in _JOINERS


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
