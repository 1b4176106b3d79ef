"""Passwords are masked in all that the command prints or logs."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
import traceback
from collections.abc import Callable
from urllib.parse import quote

import pytest
from cli.records import EveryRecord
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from contract_tests.messages import message
from unstract_core import TransportError, load_transport
from unstract_core.cli.context import CliContext
from unstract_core.cli.render.logs import LogFormatter
from unstract_core.cli.render.masking import mask

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=4, max_size=40)
SEPARATORS = st.lists(st.sampled_from([*"@:/?#&=%+'\"\\ $!~é日🧾", "p4", "%41", "pw"]), min_size=3).map("".join)
PASSWORDS = (ANY_TEXT | SEPARATORS).filter(lambda password: len(password.strip()) >= 4)


def encoded(password: str) -> str:
    return quote(password, safe="")


def in_quotes(password: str) -> str:
    """Return a value in the quotes of libpq's key=value strings."""
    return "'" + password.replace("\\", "\\\\").replace("'", "\\'") + "'"


PLACES: dict[str, Callable[[str], str]] = {
    "userinfo": lambda password: f"postgresql://user:{encoded(password)}@host:1/db",
    "several hosts": lambda password: f"postgresql://user:{encoded(password)}@one:1,two:2/db",
    "password=": lambda password: f"postgresql://host/db?user=u&password={encoded(password)}&sslmode=require",
    "sslpassword=": lambda password: f"postgresql://host/db?sslpassword={encoded(password)}",
    "an encoded name": lambda password: f"postgresql://host/db?p%61ssword={encoded(password)}&connect_timeout=3",
    "key=value": lambda password: f"host=h user=u password={in_quotes(password)} dbname=d",
    "broker": lambda password: f"amqps://user:{encoded(password)}@host:5671/vhost?heartbeat=3",
    "second broker": lambda password: f"amqp://u:one@one//;amqp://u:{encoded(password)}@two//",
}
ECHOES: dict[str, Callable[[str, str], str]] = {
    "the URL": lambda url, password: f"cannot connect to {url}: no",
    "the URL's repr": lambda url, password: f"bad URL {url!r}",
    "the password": lambda url, password: f"[{password}]",
    "its repr": lambda url, password: f"password={password!r} is wrong",
    "JSON": lambda url, password: json.dumps({"url": url, "password": password}),
    "readable JSON": lambda url, password: json.dumps([password], ensure_ascii=False),
    "encoded": lambda url, password: f"userinfo user:{encoded(password)} of",
    "a line of its own": lambda url, password: f"user\n{password}\nhost",
}


def shows(text: str, password: str) -> bool:
    """Whether a text has the password in any readable form."""
    return any(form in text for form in {password, encoded(password), repr(password)[1:-1]})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("echo", ECHOES)
@settings(max_examples=20)
@given(PASSWORDS)
@example("it's s3cret")
@example('say "s3cret"')
@example("back\\slash")
@example("new\nline")
@example("p@ss:w/o?r#d&x=y%41")
@example("пароль-密碼")
def test_each_password_is_masked_in_each_form(place: str, echo: str, password: str) -> None:
    """A password in any part of a URL is masked in every form: text, log line and traceback."""
    other = "XXXX-other-XXXX"
    url, harmless = PLACES[place](password), PLACES[place](other)
    said = ECHOES[echo](url, password)
    assume(not shows(ECHOES[echo](harmless, other), password))
    assume(not shows(mask(harmless, harmless), password))  # part of the URL anyway, such as its scheme
    session = CliContext(url=url)
    record = logging.LogRecord("driver", logging.DEBUG, __file__, 1, "%s", (said,), None)
    texts = {
        "masked": session.mask(said),
        "log": LogFormatter(session.mask).format(record).partition(" driver ")[2],
        "traceback": session.mask("".join(traceback.format_exception_only(ValueError(said)))),
    }
    for where, text in texts.items():
        assert not shows(text, password), (where, text)


@settings(max_examples=20)
@given(PASSWORDS)
@example("it's s3cret")
def test_library_errors_quote_no_password(password: str) -> None:
    """A transport's errors, causes, repr and log contain no password of its URL, also without the command."""
    for url in (
        f"postgresql://user:{encoded(password)}@127.0.0.1:1/db?timeout=1",
        f"postgresql://127.0.0.1:1/db?user=u&password={encoded(password)}&timeout=1",
        f"amqp://user:{encoded(password)}@127.0.0.1:1//?connect_timeout=1",
    ):
        caught = EveryRecord()
        with caught, contextlib.closing(load_transport(url)) as transport, pytest.raises(TransportError) as raised:
            transport.send([message("t", "q")])
        said = "".join(traceback.format_exception_only(raised.value)) + repr(transport) + caught.text()
        assume(not any(shows(part, password) for part in ("127.0.0.1:1", "ConnectionRefusedError", "postgresql user")))
        assert not shows(said, password)


CREDENTIALS_BEFORE = re.compile(r"(://[^\s:]*):\S*@")
KEYWORD_BEFORE = re.compile(
    r"(?i)(\w*(?:password|passwd|pwd|secret|scram_client_key|scram_server_key)\s*=\s*)"
    r"('(?:\\.|[^'\\])*'|(?:\\.|[^\s&'\"\\])+)"
)
"""The masks as their rules were first written: short, and quadratic."""
PIECES = [
    "://",
    ":",
    "@",
    "a",
    "_",
    " ",
    "\n",
    "=",
    "'",
    '"',
    "\\",
    "&",
    "?",
    "pwd",
    "PassWord",
    "secret",
    "scram_client_key",
]


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]), max_size=30).map("".join))
def test_masks_match_their_plain_definition(text: str) -> None:
    """The linear masks mask exactly the text that two short regular expressions define."""
    assert mask(text, "") == KEYWORD_BEFORE.sub(r"\1***", CREDENTIALS_BEFORE.sub(r"\1:***@", text))


HOSTILE = [
    *PIECES,
    "://:",
    "://a:@",
    "a:",
    "pwd=",
    "pwd ",
    "pwd='",
    "pwd=\\",
    "pwd='\\'",
    "s3cret-passwor",
    "%41",
    "?a%",
    "a" * 50 + "=",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_masks_are_quick_on_any_long_text(piece: str) -> None:
    """A log line of 100,000 characters or a URL of 20,000 is masked in far less than a second."""
    url = "postgresql://user:s3cret-password@host/db?sslpassword=an%20other"
    long = piece * (100_000 // len(piece))
    session = CliContext(url=url)
    for text in (long, long + "@", f"pwd=({long}", f"://u:{long}", f"{long}'"):
        began = time.process_time()
        record = logging.LogRecord("driver", logging.DEBUG, __file__, 1, "%s", (text,), None)
        LogFormatter(session.mask).format(record)
        assert time.process_time() - began < 1, repr(text[:40])
    began = time.process_time()
    mask("a text", f"postgresql://host/db?{long[:20_000]}")
    assert time.process_time() - began < 1


@pytest.mark.parametrize("word", ["a", "pwd", "://"])
def test_masks_take_a_second_for_a_million_characters(word: str) -> None:
    """One word of a million characters in a log line takes at most a second."""
    text = word * (1_000_000 // len(word))
    began = time.process_time()
    assert mask(text, "postgresql://user:s3cret-password@host/db") == text
    assert time.process_time() - began < 1
