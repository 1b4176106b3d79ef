"""Tasks that get secrets and return, raise or retry with them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NoReturn

from unstract_core import RetryLater, Tasks

tasks = Tasks()


class Shown:
    """A value that JSON cannot store, so its repr is stored."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"<{self.text}>"


@tasks.register("give")
def give(secret: str, *, more: str = "") -> dict[str, str]:
    return {"secret": secret, "more": more}


@tasks.register("give_unfit")
def give_unfit(secret: str) -> list[Any]:
    return [Shown(secret), secret.encode(), float("nan"), f"{secret}\0"]


@tasks.register("fail")
def fail(secret: str, *, more: str = "") -> NoReturn:
    try:
        raise KeyError(secret)
    except KeyError as exc:
        exc.add_note(secret)
        raise ValueError(f"no {secret} {more}") from exc


@tasks.register("ask_again")
def ask_again(secret: str) -> NoReturn:
    raise RetryLater(delay=0) from ValueError(secret)


@tasks.register("hold")
def hold(secret: str, path: str) -> str:
    """Create a file that shows that it runs, and run until another file exists."""
    Path(f"{path}.runs").touch()
    while not Path(path).exists():
        time.sleep(0.02)
    return secret


@tasks.register("note")
def note(*args: Any, **kwargs: Any) -> None:
    """A callback that accepts all arguments."""
