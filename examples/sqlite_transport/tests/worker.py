"""Workers that the tests start as processes and kill: `worker.py what url queue`."""

from __future__ import annotations

import sys
import time

from unstract_core import Consumer, Message, Settlement, TaskPayload, Verdict, load_transport


def hang(url: str, queue: str) -> None:
    """Run a task that reports its start and never ends."""

    def task() -> None:
        print("begun", flush=True)
        time.sleep(600)

    Consumer(load_transport(url), {"t": task}, [queue], lease=1).run()


def follow(url: str, queue: str) -> None:
    """Acknowledge every message with a follow-up that carries its argument, until there are none."""
    subscription = load_transport(url).subscribe([queue], lease=0.5)
    print("begun", flush=True)
    while deliveries := subscription.receive(limit=3, wait=2):
        for delivery in deliveries:
            args = delivery.payload.args if delivery.payload else []
            after = Message(TaskPayload(task_name="t", args=args, queue=f"{queue}-after"), f"{queue}-after")
            subscription.settle([Settlement(delivery, Verdict.ACK, follow_up=after)])


if __name__ == "__main__":
    {"hang": hang, "follow": follow}[sys.argv[1]](*sys.argv[2:])
