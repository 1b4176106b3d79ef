"""The tasks of observed_app as our registry: for `unstract-wire worker --app celery_wire.observed_tasks:tasks`."""

from __future__ import annotations

from celery_wire.observed_app import app

from transports.celery import celery_tasks

tasks = celery_tasks(app)
