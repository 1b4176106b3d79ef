"""Masks passwords in all output: those of the transport's URL, as a driver may print them, and those of other URLs.

A log line may contain any text, so the time for masking is linear in the length of the text, for every text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote

from unstract_core.cli.render.output import printable

_USER = re.compile(r"://[^\s:]*+:")
_WORD = re.compile(r"\S++")
_NAMES = r"(?:password|passwd|pwd|secret|scram_client_key|scram_server_key)"
_NAME = re.compile(rf"(?i)\w*{_NAMES}")
_KEYWORD = re.compile(rf"(?i)({_NAMES}\s*+=\s*+)('(?:\\.|[^'\\])*+'|(?:\\.|[^\s&'\"\\])++)")
"""Matches from the last word of a name on. The start of the name is not masked, so the pattern need not match it."""
_OPTION = re.compile(r"[?&]([^=&\s?]*+)=([^&]*+)")
_SHORTEST_PART = 3
_LONG = 8
"""The shortest password that is masked inside a word as well: a longer one hardly occurs there by chance."""
_ESCAPED = r"(?<=\\[nrt])|(?<=\\x[0-9a-f]{2})|(?<=\\u[0-9a-f]{4})|(?<=\\U[0-9a-f]{8})"
"""A word may begin after a character that was escaped for a log line."""


def mask(text: str, url: str) -> str:
    """Return `text` with all passwords masked: those of `url` in any form, and those of other URLs."""
    if (echoed := _echoes(url)) is not None:
        text = echoed.sub("***", text)
    if "://" in text:
        text = _WORD.sub(_without_credentials, text)
    return _KEYWORD.sub(r"\1***", text)


def _without_credentials(word: re.Match[str]) -> str:
    """Mask the text between the user of the first URL in a word and the last @ of the word."""
    if (span := _credentials(word[0])) is None:
        return word[0]
    start, end = span
    return f"{word[0][:start]}***{word[0][end:]}"


def _credentials(text: str) -> tuple[int, int] | None:
    """Return the start of the first password and the position of the last @; None if there is no password."""
    user, last = _USER.search(text), text.rfind("@")
    return None if user is None or last < user.end() else (user.end(), last)


@functools.lru_cache(maxsize=8)
def _echoes(url: str) -> re.Pattern[str] | None:
    """Return a pattern for the passwords of `url`: whole, in the parts that a parser may split, quoted or unquoted.

    A word that the masked URL shows anyway is not masked, such as a user name that is also the password.
    """
    shown, passwords = url, []
    if (span := _credentials(url)) is not None:
        start, end = span
        shown, passwords = f"{url[: start - 1]}{url[end:]}", [url[start:end]]
    passwords += [match[2] for match in _KEYWORD.finditer(shown)]
    for match in _OPTION.finditer(shown):
        if "%" in match[1] and _NAME.fullmatch(unquote(match[1])):
            passwords.append(match[2])
            shown = shown.replace(match[0], "")
    passwords += [text[1:-1] for text in passwords if re.fullmatch("'.+'", text, re.DOTALL)]
    passwords += [re.sub(r"\\(.)", r"\1", text) for text in passwords]
    shown = _KEYWORD.sub("=", shown)
    parts = {part for password in passwords for part in re.split("[@/?#:]", password) if len(part) >= _SHORTEST_PART}
    forms = {form for part in parts.union(passwords) for form in (part, unquote(part), quote(part, safe=""))}
    forms |= {written for form in forms for written in _written(form)}
    forms -= {"", *re.split(r"\W+", shown)}  # the start of a keyword's name is shown too
    if not forms:
        return None
    return re.compile("|".join(map(_as_a_word, sorted(forms, key=len, reverse=True))))


def _written(text: str) -> Iterator[str]:
    """Yield the text as Python, JSON and a log line write it."""
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
