"""The persistent queue of the service: who submitted what, in which order it runs, who may."""
