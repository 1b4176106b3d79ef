"""Dispatch tasks, run them in workers and send their callbacks, over exchangeable transports with one wire format.

Producers use `Dispatcher` or `ExecutorDispatcher`. Workers use `Tasks` and `Consumer`. Transport authors implement
`Transport`. Importing this package imports attrs and cattrs, but no database or broker driver.
"""

from unstract_core.clock import Clock
from unstract_core.codec import from_wire, to_wire
from unstract_core.discovery import load_transport
from unstract_core.errors import (
    ConfigurationError,
    ContinuationNotAllowed,
    ContractError,
    DeadlineExceeded,
    Expired,
    GateFailed,
    MalformedPayload,
    NoRoom,
    NotSupported,
    PayloadError,
    QueueFull,
    ReplyTimeout,
    SignatureError,
    TaskFailed,
    TooManyAttempts,
    TransportClosed,
    TransportError,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
    UnknownTask,
    WorkerLost,
)
from unstract_core.observability.observer import LeaseLostEvent, Observer, TaskFinished, WorkerHeartbeat
from unstract_core.outcomes import RetryLater
from unstract_core.payload import ContinuationSpec, FairnessKey, TaskPayload
from unstract_core.producer.dispatch import Dispatcher, DispatchHandle
from unstract_core.producer.executor import ExecutionContext, ExecutionResult, ExecutorDispatcher
from unstract_core.producer.openfeature import OpenFeatureGate
from unstract_core.producer.routing import Gate, RoutingDispatcher
from unstract_core.signature import CallbackSignature, signature_to_continuation
from unstract_core.transport import (
    Capabilities,
    DeadLetter,
    DeadLetters,
    Delivery,
    Inspection,
    Message,
    QueueState,
    Reply,
    Settlement,
    Subscription,
    Transport,
    Verdict,
)
from unstract_core.values import normalise
from unstract_core.values.limits import JSONValue
from unstract_core.worker.consumer import Consumer
from unstract_core.worker.context import current_delivery
from unstract_core.worker.registry import Tasks

__version__ = "0.1.0"

__all__ = [
    "CallbackSignature",
    "Capabilities",
    "Clock",
    "ConfigurationError",
    "Consumer",
    "ContinuationNotAllowed",
    "ContinuationSpec",
    "ContractError",
    "DeadLetter",
    "DeadLetters",
    "DeadlineExceeded",
    "Delivery",
    "DispatchHandle",
    "Dispatcher",
    "ExecutionContext",
    "ExecutionResult",
    "ExecutorDispatcher",
    "Expired",
    "FairnessKey",
    "Gate",
    "GateFailed",
    "Inspection",
    "JSONValue",
    "LeaseLostEvent",
    "MalformedPayload",
    "Message",
    "NoRoom",
    "NotSupported",
    "Observer",
    "OpenFeatureGate",
    "PayloadError",
    "QueueFull",
    "QueueState",
    "Reply",
    "ReplyTimeout",
    "RetryLater",
    "RoutingDispatcher",
    "Settlement",
    "SignatureError",
    "Subscription",
    "TaskFailed",
    "TaskFinished",
    "TaskPayload",
    "Tasks",
    "TooManyAttempts",
    "Transport",
    "TransportClosed",
    "TransportError",
    "TransportNotReady",
    "TransportRefused",
    "TransportUnavailable",
    "UnknownTask",
    "Verdict",
    "WorkerHeartbeat",
    "WorkerLost",
    "current_delivery",
    "from_wire",
    "load_transport",
    "normalise",
    "signature_to_continuation",
    "to_wire",
]
