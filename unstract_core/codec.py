"""The codec of the wire: `to_wire` writes strictly and `from_wire` reads tolerantly, through one cattrs converter.

The writer raises before anything is sent, with the JSON path of the invalid value. The reader accepts every message
that the product's own consumer runs. It ignores unknown keys, and replaces keys that are absent, null or empty by their
defaults. An invalid `fairness` gets defaults too, because no task depends on it. The reader does not guess the meaning
of a malformed task: it does not accept a string as a list of arguments. `salvage` reads the reply addresses of a
message that cannot be read, so that its sender still gets the error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

import attrs
from cattrs import Converter, transform_error
from cattrs.errors import ClassValidationError
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from unstract_core.errors import MalformedPayload, PayloadError
from unstract_core.payload import (
    DEFAULT_PRIORITY,
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    ContinuationSpec,
    FairnessKey,
    TaskPayload,
)
from unstract_core.values import normalise, normalise_members
from unstract_core.values.limits import json_path

RawMessage: TypeAlias = Mapping[str, Any] | str | bytes

MAX_NAME_BYTES = 255
"""The longest name of a task, queue, id or key, in bytes of UTF-8: that of an AMQP short string."""

_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_NESTED: dict[str, type] = {
    "fairness": FairnessKey,
    "on_success": ContinuationSpec,
    "on_error": ContinuationSpec,
}
_WORKLOAD_TYPES = ("api", "non_api")

MAX_HEADERS_BYTES = 8192
"""The largest `headers`, in bytes of UTF-8 of all names and values: a broker sends them in one frame."""


def to_wire(payload: TaskPayload) -> dict[str, Any]:
    """Encode a payload as a dict of plain JSON values in the key order of the wire; every value is a copy.

    Args:
        payload: The task to encode.

    Returns:
        The message; `from_wire` reads it back.

    Raises:
        PayloadError: A value has the wrong type, a name is empty or too long, or strict normalisation rejects a value.
            `path` starts at the root of the message, such as `$.on_success.kwargs.x`.
    """
    if not isinstance(payload, TaskPayload):
        raise PayloadError(f"expected a TaskPayload, got {type(payload).__name__}")
    for key, kind in _NESTED.items():
        if (part := getattr(payload, key)) is not None and type(part) is not kind:
            raise PayloadError(f"expected a {kind.__name__}, got {_kind(part)}", path=f"$.{key}")
    wire: dict[str, Any] = _unstructure(payload)
    check_name(wire["task_name"], "$.task_name")
    wire["args"] = _write_members(wire["args"], (list, tuple), "$.args")
    wire["kwargs"] = _write_members(wire["kwargs"], dict, "$.kwargs")
    check_name(wire["queue"], "$.queue")
    if payload.fairness is not None:
        wire["fairness"] = _write_fairness(payload.fairness, wire["fairness"], "$.fairness")
    for key in ("reply_key", "task_id"):
        if key in wire:
            check_name(wire[key], f"$.{key}")
    for key in ("on_success", "on_error"):
        if key in wire:
            _write_continuation(wire[key], f"$.{key}")
    if "headers" in wire:
        wire["headers"] = check_headers(wire["headers"], "$.headers")
    return wire


def to_json(payload: TaskPayload) -> str:
    """Encode a payload as compact JSON text; raises the errors of `to_wire`."""
    return _encoder.encode(to_wire(payload))


def value_to_json(value: object, *, path: str = "$") -> str:
    """Encode one value as compact JSON text, after strict normalisation.

    Args:
        value: The value to encode.
        path: The JSON path of the value in its message, for the error.

    Raises:
        PayloadError: The wire cannot carry the value.
    """
    return _encoder.encode(normalise(value, path=path))


def from_wire(raw: RawMessage, queue: str = "") -> TaskPayload:
    """Decode a stored message.

    Args:
        raw: The message: a mapping, or JSON as str or as UTF-8 bytes.
        queue: The queue of a message that does not name its queue. "" by default.

    Returns:
        The payload, with defaults for keys that are absent, null or empty.

    Raises:
        MalformedPayload: The message cannot be read; `problems` has every reason with its path. No other error is
            raised.
    """
    wire = _mapping(raw)
    named = wire.get("queue")
    if type(named) is not str or not named:
        wire = {**wire, "queue": queue}
    try:
        return _converter.structure(wire, TaskPayload)
    except ClassValidationError as exc:
        problems = tuple(transform_error(exc, format_exception=_problem))
        raise MalformedPayload("; ".join(problems), problems=problems) from exc


@attrs.frozen
class Salvage:
    """The reply addresses of a message that cannot be read. An address is None if it cannot be read either."""

    task_id: str | None = None
    reply_key: str | None = None
    on_error: ContinuationSpec | None = None
    fairness: FairnessKey | None = None
    headers: dict[str, str] | None = None


def salvage(raw: RawMessage) -> Salvage:
    """Read the reply addresses of a message that `from_wire` rejects. Never raises."""
    try:
        wire = _mapping(raw)
    except MalformedPayload:
        return Salvage()
    return Salvage(
        task_id=_readable(wire, "task_id", _read_address),
        reply_key=_readable(wire, "reply_key", _read_address),
        on_error=_readable(wire, "on_error", _read_continuation),
        fairness=_readable(wire, "fairness", _read_fairness),
        headers=_read_headers(wire.get("headers"), None),
    )


def check_name(name: Any, path: str) -> None:
    """Raise PayloadError with `path` unless `name` is a non-empty str that every transport can carry."""
    if type(name) is not str:
        raise PayloadError(f"expected str, got {_kind(name)}", path=path)
    if not name:
        raise PayloadError("must not be empty", path=path)
    if len(name) <= MAX_NAME_BYTES and name.isascii() and "\0" not in name:
        return
    normalise(name, path=path)
    if len(name.encode()) > MAX_NAME_BYTES:
        raise PayloadError(f"longer than {MAX_NAME_BYTES} bytes of UTF-8", path=path)


def check_headers(headers: Any, path: str) -> dict[str, str]:
    """Return a copy of `headers`; raises PayloadError with `path` unless every transport can carry it."""
    if not isinstance(headers, Mapping):
        raise PayloadError(f"expected a dict, got {_kind(headers)}", path=path)
    size = 0
    for name, value in headers.items():
        check_name(name, path)
        if type(value) is not str:
            raise PayloadError(f"expected str, got {_kind(value)}", path=json_path(path, [name]))
        normalise(value, path=json_path(path, [name]))
        size += len(name.encode()) + len(value.encode())
    if size > MAX_HEADERS_BYTES:
        raise PayloadError(f"names and values have {size} bytes of UTF-8; {MAX_HEADERS_BYTES} at most", path=path)
    return dict(headers)


def _readable(wire: Mapping[str, Any], key: str, read: Callable[[Any, Any], Any]) -> Any:
    try:
        return read(wire.get(key), None)
    except Exception:  # the address cannot be read, so there is no recipient for the error
        return None


def _mapping(raw: RawMessage) -> Mapping[str, Any]:
    if isinstance(raw, str | bytes):
        raw = _parse(raw)
    if not isinstance(raw, Mapping):
        raise _malformed(f"expected a JSON object, got {_kind(raw)}")
    return raw


def _parse(text: str | bytes) -> Any:
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), parse_constant=refuse_constant)
    except RecursionError:
        raise _malformed("nested too deep to be read") from None
    except (ValueError, UnicodeError) as exc:
        raise _malformed(f"not JSON: {exc}") from exc


def refuse_constant(name: str) -> NoReturn:
    """Raise ValueError for NaN and the infinities; the `parse_constant` of `json.loads`."""
    raise ValueError(f"{name} is not JSON")


def _malformed(problem: str) -> MalformedPayload:
    return MalformedPayload(problem, problems=(f"{problem} @ $",))


def _problem(exc: BaseException, kind: type | None) -> str:
    if isinstance(exc, KeyError):
        return "required field missing"
    return str(exc.args[0]) if exc.args and isinstance(exc, TypeError | ValueError) else type(exc).__name__


def _write_members(container: Any, kinds: Any, path: str) -> Any:
    if not isinstance(container, kinds):
        expected = "dict" if kinds is dict else "list"
        raise PayloadError(f"expected a {expected}, got {_kind(container)}", path=path)
    return normalise_members(container, path=path)


def _write_continuation(wire: dict[str, Any], path: str) -> None:
    check_name(wire["task_name"], f"{path}.task_name")
    wire["kwargs"] = _write_members(wire["kwargs"], dict, f"{path}.kwargs")
    check_name(wire["queue"], f"{path}.queue")


def _write_fairness(fairness: FairnessKey, wire: dict[str, Any], path: str) -> Any:
    if fairness.org_id is not None and type(fairness.org_id) is not str:
        raise PayloadError(f"expected str or None, got {_kind(fairness.org_id)}", path=f"{path}.org_id")
    if fairness.workload_type not in _WORKLOAD_TYPES:
        raise PayloadError(f"must be one of {', '.join(_WORKLOAD_TYPES)}", path=f"{path}.workload_type")
    priority = fairness.pipeline_priority
    if type(priority) is not int or not LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY:
        raise PayloadError(
            f"must be an int from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}", path=f"{path}.pipeline_priority"
        )
    return normalise(wire, path=path)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _is_empty(value: Any) -> bool:
    """Return whether a JSON value is null, or a value that the product's consumer treats like an absent one."""
    return value is None or (type(value) in (bool, int, float, str, list, dict) and not value)


def _read_members(kind: type, name: str) -> Any:
    def read(value: Any, _: Any) -> Any:
        if _is_empty(value):
            return kind()
        if type(value) is not kind:
            raise TypeError(f"expected {name}, got {_kind(value)}")
        return value

    return read


def _read_name(value: Any, _: Any) -> str:
    if type(value) is not str or not value:
        raise TypeError(f"expected a non-empty string, got {'an empty one' if value == '' else _kind(value)}")
    return value


def _read_queue(value: Any, _: Any) -> str:
    """Read a continuation's queue; a number becomes its text, as in the product's database."""
    return _number_text(value) or _read_name(value, None)


def _read_address(value: Any, _: Any) -> str | None:
    """Read the key or id under which a sender waits: a text, or the JSON text of any other value that is not empty."""
    if type(value) is str:
        return value or None
    return None if _is_empty(value) else json.dumps(value, separators=(",", ":"))


def _read_continuation(value: Any, _: Any) -> ContinuationSpec | None:
    return None if _is_empty(value) else _converter.structure(value, ContinuationSpec)


def _read_fairness(value: Any, _: Any) -> FairnessKey | None:
    """Read the fairness key: an invalid member gets its default, and a value that is not an object counts as null."""
    if type(value) is not dict:
        return None
    org_id, kind, priority = (value.get(key) for key in ("org_id", "workload_type", "pipeline_priority"))
    if type(priority) is float and priority.is_integer():
        priority = int(priority)
    return FairnessKey(
        org_id=org_id if type(org_id) is str else _number_text(org_id),
        workload_type=kind if kind in _WORKLOAD_TYPES else "non_api",
        pipeline_priority=(
            priority if type(priority) is int and LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY else DEFAULT_PRIORITY
        ),
    )


def _number_text(value: Any) -> str | None:
    return json.dumps(value) if type(value) in (int, float) else None


def _read_headers(value: Any, _: Any) -> dict[str, str] | None:
    """Read the headers: a value that is not an object of texts counts as absent."""
    if type(value) is not dict or not all(type(name) is str and type(text) is str for name, text in value.items()):
        return None
    return dict(value)


def _make_converter() -> Converter:
    converter = Converter(prefer_attrib_converters=False)
    name, address = override(struct_hook=_read_name), override(struct_hook=_read_address)
    array, mapping = _read_members(list, "an array"), _read_members(dict, "an object")
    read_continuation = make_dict_structure_fn(
        ContinuationSpec,
        converter,
        task_name=name,
        kwargs=override(struct_hook=mapping),
        queue=override(struct_hook=_read_queue),
    )

    def continuation(value: Any, _: Any) -> ContinuationSpec:
        return read_continuation(mapping(value, None), ContinuationSpec)

    converter.register_structure_hook(ContinuationSpec, continuation)
    converter.register_structure_hook(
        TaskPayload,
        make_dict_structure_fn(
            TaskPayload,
            converter,
            task_name=name,
            args=override(struct_hook=array),
            kwargs=override(struct_hook=mapping),
            queue=override(struct_hook=lambda value, _: value),
            fairness=override(struct_hook=_read_fairness),
            reply_key=address,
            on_success=override(struct_hook=_read_continuation),
            on_error=override(struct_hook=_read_continuation),
            task_id=address,
            headers=override(struct_hook=_read_headers),
        ),
    )
    as_it_is = override(unstruct_hook=lambda value: value)
    unless_unset = override(omit_if_default=True)
    converter.register_unstructure_hook(
        ContinuationSpec, make_dict_unstructure_fn(ContinuationSpec, converter, kwargs=as_it_is)
    )
    converter.register_unstructure_hook(
        TaskPayload,
        make_dict_unstructure_fn(
            TaskPayload,
            converter,
            args=as_it_is,
            kwargs=as_it_is,
            reply_key=unless_unset,
            on_success=unless_unset,
            on_error=unless_unset,
            task_id=unless_unset,
            headers=override(unstruct_hook=lambda value: value, omit_if_default=True),
        ),
    )
    return converter


_converter = _make_converter()
_unstructure = _converter.get_unstructure_hook(TaskPayload)
