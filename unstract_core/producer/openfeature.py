"""A gate that evaluates a feature flag.

`OpenFeatureGate` uses the OpenFeature SDK, so that the flag may be stored in any provider (Flipt, Unleash,
LaunchDarkly, a file). The provider evaluates the flag and may cache it; the gate caches nothing. `RoutingDispatcher`
handles a failure of the gate. The SDK is imported when a gate is created.
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
"""The targeting key of a context without an organisation and without a run."""


class OpenFeatureGate:
    """A gate that is open if a boolean flag is true for the context's organisation, or else for its run.

    The targeting key is `organization_id`, else `run_id`, else "default". The attributes are `executor_name` and, if it
    is set, `organization_id`.
    """

    def __init__(self, client: OpenFeatureClient | None = None, *, flag: str = PRODUCT_FLAG) -> None:
        """Create a gate for one flag.

        Args:
            client: The OpenFeature client; None, the default, for the SDK's client of the default domain.
            flag: The name of the boolean flag; "pg_queue_enabled" by default.

        Raises:
            ConfigurationError: The SDK is not installed, or an argument has the wrong type.
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
                f"client is a {type(client).__name__}, not an OpenFeature client; pass api.get_client()"
            )
        if not isinstance(flag, str) or not flag:
            raise ConfigurationError(f"flag must be the name of a boolean flag, such as {PRODUCT_FLAG!r}, not {flag!r}")
        self.client = api.get_client() if client is None else client
        self.flag = flag
        self._evaluation_context = EvaluationContext

    def __call__(self, context: ExecutionContext) -> bool:
        """Evaluate the flag for a context.

        Args:
            context: The execution.

        Returns:
            The flag's value; False if the SDK has no provider.

        Raises:
            GateFailed: The flag does not exist or has another type, or the provider is not ready or raised. `code` is
                OpenFeature's error code, such as FLAG_NOT_FOUND.
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
