"""From a sweep to compared runs: Ray Tune asks, Ray Train runs the gangs, the ledger remembers."""
