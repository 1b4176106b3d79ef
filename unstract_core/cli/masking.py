"""No password in what is printed or logged: neither this session's own, as a driver may echo it, nor another URL's."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote

from unstract_core.cli.output import printable

_CREDENTIALS = re.compile(r"(://[^\s:]*):\S*@")
_WHOLE_URL = re.compile(r"(.*?://[^\s:]*):(.*)@(.*)", re.DOTALL)
_NAMES = r"\w*(?:password|passwd|pwd|secret|scram_client_key|scram_server_key)"
_KEYWORD = re.compile(rf"(?i)({_NAMES}\s*=\s*)('(?:\\.|[^'\\])*'|(?:\\.|[^\s&'\"\\])+)")
_OPTION = re.compile(r"[?&]([^=&\s]*%[^=&\s]*)=([^&]*)")
_SHORTEST_PART = 3
_LONG = 8
"""Characters from which on a password is masked inside a word as well: nobody writes a long one by chance."""
_ESCAPED = r"(?<=\\[nrt])|(?<=\\x[0-9a-f]{2})|(?<=\\u[0-9a-f]{4})|(?<=\\U[0-9a-f]{8})"
"""After a character that was escaped for a line of a log a word may begin."""


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
    passwords += [match[2] for match in _KEYWORD.finditer(shown)]
    for match in _OPTION.finditer(shown):
        if re.fullmatch(_NAMES, unquote(match[1]), re.IGNORECASE):
            passwords.append(match[2])
            shown = shown.replace(match[0], "")
    passwords += [one[1:-1] for one in passwords if re.fullmatch("'.+'", one, re.DOTALL)]
    passwords += [re.sub(r"\\(.)", r"\1", one) for one in passwords]
    shown = _KEYWORD.sub("", shown)
    parts = {part for password in passwords for part in re.split("[@/?#:]", password) if len(part) >= _SHORTEST_PART}
    forms = {form for part in parts.union(passwords) for form in (part, unquote(part), quote(part, safe=""))}
    forms |= {written for form in forms for written in _written(form)}
    forms -= {"", *re.split(r"\W+", shown)}
    if not forms:
        return None
    return re.compile("|".join(map(_as_a_word, sorted(forms, key=len, reverse=True))))


def _written(text: str) -> Iterator[str]:
    """Yield a text as Python, JSON and a line of a log write it."""
    yield repr(text)[1:-1]
    yield printable(text)
    for ascii in (True, False):
        yield json.dumps(text, ensure_ascii=ascii)[1:-1]


def _as_a_word(text: str) -> str:
    if len(text) >= _LONG:
        return re.escape(text)
    before = rf"(?:(?<!\w)|{_ESCAPED})" if re.match(r"\w", text) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", text) else ""
    return before + re.escape(text) + after
