"""The worker's side: receive deliveries, run their tasks on threads, and settle them."""
