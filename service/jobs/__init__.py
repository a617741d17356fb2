"""Sweeps of the queue as processes that outlive the service, and what keeps the two in step."""
