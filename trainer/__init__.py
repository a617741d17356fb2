"""From a spec to a scored artifact. Knows nothing of sweeps, Ray or MLflow.

`python -m trainer RECIPE` walks the whole line alone: train, finalize, score.
"""
