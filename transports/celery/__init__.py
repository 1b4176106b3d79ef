"""The Celery transport: Celery's message protocol over kombu, and the two bridges to a Celery app.

`CeleryTransport` does not need celery. `CeleryAppDispatcher(app)` dispatches through your Celery app, and
`celery_tasks(app)` lets our Consumer run its tasks. This package does not import celery.
"""

from transports.celery.app_dispatcher import CeleryAppDispatcher
from transports.celery.app_tasks import celery_tasks
from transports.celery.transport import CeleryTransport, from_url

__all__ = ["CeleryAppDispatcher", "CeleryTransport", "celery_tasks", "from_url"]
