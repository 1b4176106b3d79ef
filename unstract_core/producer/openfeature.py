"""Gates that ask a feature flag: which way does this dispatch go?

`OpenFeatureGate` asks through the OpenFeature SDK, so that the flag may live with any provider (Flipt, Unleash,
LaunchDarkly, a file). It decides nothing itself and remembers nothing: providers evaluate, and may cache, as they were
set up; what a gate's failure means is `RoutingDispatcher`'s to say. Nothing but this file needs the SDK, and only once
a gate is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unstract_core.errors import ConfigurationError, GateFailed
from unstract_core.producer.executor import ExecutionContext

if TYPE_CHECKING:
    from openfeature.client import OpenFeatureClient
    from openfeature.evaluation_context import EvaluationContext

PRODUCT_FLAG = "pg_queue_enabled"
NOBODY = "default"
"""The targeting key of a context that has neither an organisation nor a run."""


class OpenFeatureGate:
    """A gate that is open where a boolean flag is true for the context's organisation, else its run.

    The targeting key is `organization_id`, else `run_id`, else "default"; the attributes are `executor_name` and,
    when there is one, `organization_id`.
    """

    def __init__(self, client: OpenFeatureClient | None = None, *, flag: str = PRODUCT_FLAG) -> None:
        """Ask `client`, else the SDK's client of the default domain, for `flag`.

        Raises ConfigurationError: the SDK is not installed, `client` evaluates no flags, or `flag` is no name.
        """
        try:
            from openfeature import api
            from openfeature.evaluation_context import EvaluationContext
        except ImportError as exc:
            raise ConfigurationError(
                "OpenFeatureGate needs openfeature, which is not installed: pip install 'unstract-wire[openfeature]'"
            ) from exc
        if client is not None and not callable(getattr(client, "get_boolean_details", None)):
            raise ConfigurationError(
                f"client is a {type(client).__name__}, which evaluates no flags; pass api.get_client()"
            )
        if not isinstance(flag, str) or not flag:
            raise ConfigurationError(f"flag must be the name of a boolean flag, such as {PRODUCT_FLAG!r}, not {flag!r}")
        self.client = api.get_client() if client is None else client
        self.flag = flag
        self._evaluation_context = EvaluationContext

    def __call__(self, context: ExecutionContext) -> bool:
        """Return the flag's value for this context, evaluated now.

        Raises GateFailed where the SDK would fall back on the default: no such flag, a flag of another type, a
        provider that is not ready or raised. `code` is OpenFeature's name for it, such as FLAG_NOT_FOUND. Without any
        provider the SDK's own stand-in answers, and the gate is closed.
        """
        details = self.client.get_boolean_details(self.flag, False, self._subject(context))
        if details.error_code or details.reason == "ERROR":
            code = str(getattr(details.error_code, "value", details.error_code or ""))
            raise GateFailed(f"flag {self.flag!r} could not be evaluated ({code or 'no reason given'})", code=code)
        return details.value

    def _subject(self, context: ExecutionContext) -> EvaluationContext:
        organization = getattr(context, "organization_id", None)
        run = getattr(context, "run_id", None)
        attributes = {"executor_name": context.executor_name}
        if organization:
            attributes["organization_id"] = organization
        return self._evaluation_context(targeting_key=organization or run or NOBODY, attributes=attributes)
