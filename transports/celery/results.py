"""Results of tasks as Celery's result backends write them, in both directions.

Celery's wire has a failure as the type and the arguments of an exception. No class is ever imported because of a
message: a failure is read as text. The text `Type: message` is written as a type with one argument, and a module if it
is known. An additional field has the whole text, because the arguments do not always reproduce it.
"""

from __future__ import annotations

import ast
import builtins
import datetime
import re
from collections.abc import Iterator, Mapping
from typing import Any

import kombu
from kombu.serialization import loads

from transports.celery.compression import NotDecompressed, readable_body
from transports.celery.decode import Received
from transports.celery.encode import Outgoing
from transports.celery.fields import name_of
from unstract_core.errors import Expired, MalformedPayload, UnknownTask
from unstract_core.transport import Reply
from unstract_core.values import cut, error_text, normalise
from unstract_core.values.limits import JSONValue

_ENDED = {"SUCCESS", "FAILURE", "REVOKED"}
_UNREAD_TTL = 86400.0
"""The time in seconds after which an unread answer may be removed; Celery keeps results for as long."""
_TEXT = "exc_text"
"""The field with the whole error text, which Celery does not have."""
_TYPE_NAME = re.compile(r"[A-Za-z_]\w*")
"""The names that are written as the type of a failure."""


def answers(received: Received, reply: Reply, *, error_type: str, error_message: str) -> Iterator[Outgoing]:
    """Write the answer to the sender; for a failed chain also the answers for its later tasks, as Celery does.

    Args:
        received: The message of the task.
        reply: The reply.
        error_type: The name of the error type of a failure; "" if it is not known.
        error_message: The error text of a failure without its type.
    """
    failure = {"error_type": error_type, "error_message": error_message}
    envelope = received.envelope
    reply_to = "" if received.message.headers.get("ignore_result") is True else envelope.reply_to
    if reply_to:
        task_id = envelope.id or reply.key
        correlation_id = envelope.correlation_id or task_id
        yield write_answer(reply, task_id=task_id, correlation_id=correlation_id, reply_to=reply_to, **failure)
    chain = envelope.body[2].get("chain") if envelope.body is not None and reply.status == "failed" else None
    for link in chain if isinstance(chain, list) else ():
        options = link.get("options") if isinstance(link, dict) else None
        if isinstance(options, dict):
            later, address = name_of(options.get("task_id")), name_of(options.get("reply_to"))
            if later is not None and address is not None:
                yield write_answer(reply, task_id=later, correlation_id=later, reply_to=address, **failure)


def write_answer(
    reply: Reply, *, task_id: str, correlation_id: str, reply_to: str, error_type: str = "", error_message: str = ""
) -> Outgoing:
    """Write a reply as the message that a Celery worker with the backend rpc:// sends to its client.

    Args:
        reply: The reply.
        task_id: The id of the task that the client waits for.
        correlation_id: The id by which the client finds its request.
        reply_to: The client's queue.
        error_type: The name of the error type of a failure; "" (default) if it is not known. A name must begin with an
            ASCII letter or "_", and continue with letters, digits and "_". Otherwise the type is written as
            "Exception", with the whole error text as its argument.
        error_message: The error text of a failure without its type; "" (default) for none.
    """
    status, result = "SUCCESS", reply.result
    if reply.status == "failed":
        status, result = _failure(reply.error, error_type, error_message)
    return Outgoing(
        queue=reply_to,
        headers={},
        properties={"correlation_id": correlation_id, "delivery_mode": 1},
        body={
            "status": status,
            "result": result,
            "traceback": None,
            "children": [],
            "date_done": datetime.datetime.now(datetime.UTC).isoformat(),
            "task_id": task_id,
        },
        declared=False,
        queue_ttl=_UNREAD_TTL,
    )


def read_answer(message: kombu.Message, key: str) -> Reply | None:
    """Return the reply of an answer under `key`; None if it is unreadable or not final (STARTED, RETRY). Never raises.

    An answer that cannot be decompressed within the limit is a failure, because no other answer will arrive.
    """
    try:
        body = readable_body(message)
    except NotDecompressed as exc:
        return Reply(key, "failed", error=error_text(MalformedPayload(f"the answer cannot be read: {exc}")))
    try:
        meta = loads(body, message.content_type, message.content_encoding, accept=["application/json"])
        status, result = meta["status"], meta["result"]
    except Exception:  # an unreadable message is no answer
        return None
    if status not in _ENDED:
        return None
    if status == "SUCCESS":
        return Reply(key, "completed", result=normalise(result, lenient=True))
    return Reply(key, "failed", error=cut(_text(result)))


def _failure(error: str, error_type: str, error_message: str) -> tuple[str, dict[str, JSONValue]]:
    if error_type == Expired.__name__:
        return "REVOKED", {
            "exc_type": "TaskRevokedError",
            "exc_message": ["expired"],
            "exc_module": "celery.exceptions",
            _TEXT: error,
        }
    name, message = (error_type, error_message) if _TYPE_NAME.fullmatch(error_type) else ("Exception", error)
    module = "builtins" if _is_builtin(name) else None
    if name == UnknownTask.__name__:
        name, module = "NotRegistered", "celery.exceptions"
    arguments: list[JSONValue] = [_key(message) if name == "KeyError" else message] if message else []
    return "FAILURE", {"exc_type": name, "exc_message": arguments, "exc_module": module, _TEXT: error}


def _key(message: str) -> str:
    """Return the argument of a KeyError, whose message is its repr."""
    try:
        key = ast.literal_eval(message)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return message
    return key if isinstance(key, str) else message


def _is_builtin(name: str) -> bool:
    """Whether Celery's client may raise it: SystemExit and the like would end the client's process."""
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, Exception)


def _text(result: Any) -> str:
    """Return `Type: message`, with the text of `str(exception)` in the worker."""
    if not isinstance(result, Mapping):
        return str(result)
    if isinstance(text := result.get(_TEXT), str):
        return text
    kind, arguments = str(result.get("exc_type", "Exception")), result.get("exc_message")
    if kind == "UnpickleableExceptionWrapper" and isinstance(arguments, list) and len(arguments) == 4:
        _, kind, arguments, _ = arguments
    if not isinstance(arguments, list | tuple):
        message = "" if arguments is None else str(arguments)
    elif len(arguments) == 1:
        message = repr(arguments[0]) if kind == "KeyError" else str(arguments[0])
    else:
        message = _os_error(kind, arguments) or (str(tuple(arguments)) if arguments else "")
    return f"{kind}: {message}" if message else kind


def _os_error(kind: str, arguments: Any) -> str | None:
    error = getattr(builtins, kind, None)
    if isinstance(error, type) and issubclass(error, OSError) and len(arguments) >= 2:
        return str(OSError(*arguments[:3]))
    return None
