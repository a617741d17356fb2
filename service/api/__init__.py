"""The HTTP service: routes, who may call them, what streams. Imports neither torch nor Ray."""
