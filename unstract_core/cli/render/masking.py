"""No password in what is printed or logged: neither this session's own, as a driver may echo it, nor another URL's.

Every mask takes time that is linear in the length of the text, whatever is in it: a line of a log may hold any text.
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
"""From the last word of a name on: what stands before it in the name stays, so that it need not be looked at."""
_OPTION = re.compile(r"[?&]([^=&\s?]*+)=([^&]*+)")
_SHORTEST_PART = 3
_LONG = 8
"""Characters from which on a password is masked inside a word as well: nobody writes a long one by chance."""
_ESCAPED = r"(?<=\\[nrt])|(?<=\\x[0-9a-f]{2})|(?<=\\u[0-9a-f]{4})|(?<=\\U[0-9a-f]{8})"
"""After a character that was escaped for a line of a log a word may begin."""


def mask(text: str, url: str) -> str:
    """Return `text` without any password: those of `url`, as a driver may echo them, and those in any other URL."""
    if (echoed := _echoes(url)) is not None:
        text = echoed.sub("***", text)
    if "://" in text:
        text = _WORD.sub(_without_credentials, text)
    return _KEYWORD.sub(r"\1***", text)


def _without_credentials(word: re.Match[str]) -> str:
    """Mask what stands between the user of a word's first URL and the last @ of the word."""
    if (found := _credentials(word[0])) is None:
        return word[0]
    start, end = found
    return f"{word[0][:start]}***{word[0][end:]}"


def _credentials(text: str) -> tuple[int, int] | None:
    """Return where the password of the first URL with one begins, and the place of the last @; None without any."""
    user, last = _USER.search(text), text.rfind("@")
    return None if user is None or last < user.end() else (user.end(), last)


@functools.lru_cache(maxsize=8)
def _echoes(url: str) -> re.Pattern[str] | None:
    """Match the passwords of `url` in any text: whole, in parts as a parser may split them, quoted or unquoted.

    A word that the masked URL shows anyway, such as a user's name that is the password too, is left readable.
    """
    shown, passwords = url, []
    if (found := _credentials(url)) is not None:
        start, end = found
        shown, passwords = f"{url[: start - 1]}{url[end:]}", [url[start:end]]
    passwords += [match[2] for match in _KEYWORD.finditer(shown)]
    for match in _OPTION.finditer(shown):
        if "%" in match[1] and _NAME.fullmatch(unquote(match[1])):
            passwords.append(match[2])
            shown = shown.replace(match[0], "")
    passwords += [one[1:-1] for one in passwords if re.fullmatch("'.+'", one, re.DOTALL)]
    passwords += [re.sub(r"\\(.)", r"\1", one) for one in passwords]
    shown = _KEYWORD.sub("=", shown)
    parts = {part for password in passwords for part in re.split("[@/?#:]", password) if len(part) >= _SHORTEST_PART}
    forms = {form for part in parts.union(passwords) for form in (part, unquote(part), quote(part, safe=""))}
    forms |= {written for form in forms for written in _written(form)}
    forms -= {"", *re.split(r"\W+", shown)}  # the rest of a keyword's name counts as shown, which it is
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
