"""The Celery transport: Celery's message protocol over kombu, and the two bridges to a Celery app.

`CeleryTransport` needs no celery at all. `CeleryAppDispatcher(app)` dispatches through an app of yours, and
`celery_tasks(app)` lets our Consumer run its tasks; celery is never imported by importing this.
"""

from transports.celery.app_dispatcher import CeleryAppDispatcher
from transports.celery.app_tasks import celery_tasks
from transports.celery.transport import CeleryTransport, from_url

__all__ = ["CeleryAppDispatcher", "CeleryTransport", "celery_tasks", "from_url"]
