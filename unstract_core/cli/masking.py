"""No password in what is printed or logged: neither this session's own, as a driver may echo it, nor another URL's."""

from __future__ import annotations

import functools
import re
from urllib.parse import quote, unquote

_CREDENTIALS = re.compile(r"(://[^\s:]*):\S*@")
_WHOLE_URL = re.compile(r"(.*?://[^\s:]*):(.*)@(.*)", re.DOTALL)
_KEYWORD = re.compile(r"(?i)(\w*(?:password|passwd|pwd)\s*=\s*)('(?:\\.|[^'\\])*'|[^\s&'\"]+)")
_SHORTEST_PART = 3


def mask(text: str, url: str) -> str:
    """Return `text` without any password: those of `url`, as a driver may echo them, and those in any other URL."""
    if (echoed := _echoes(url)) is not None:
        text = echoed.sub("***", text)
    return _KEYWORD.sub(r"\1***", _CREDENTIALS.sub(r"\1:***@", text))


@functools.lru_cache(maxsize=8)
def _echoes(url: str) -> re.Pattern[str] | None:
    """Match the passwords of `url` in any text: whole, in parts as a parser may split them, quoted or unquoted.

    A word that the masked URL shows anyway, such as a user's name that is the password too, is left readable.
    """
    shown, passwords = url, []
    if match := _WHOLE_URL.fullmatch(url):
        shown, passwords = f"{match[1]}@{match[3]}", [match[2]]
    passwords += [match[2].strip("'") for match in _KEYWORD.finditer(shown)]
    shown = _KEYWORD.sub("", shown)
    parts = {part for password in passwords for part in re.split("[@/?#:]", password) if len(part) >= _SHORTEST_PART}
    forms = {form for part in parts.union(passwords) for form in (part, unquote(part), quote(part, safe=""))}
    forms |= {repr(form)[1:-1] for form in forms}
    forms -= {"", *re.split(r"\W+", shown)}
    if not forms:
        return None
    return re.compile("|".join(map(_as_a_word, sorted(forms, key=len, reverse=True))))


def _as_a_word(text: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", text) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", text) else ""
    return before + re.escape(text) + after
