"""Test-time training: a model adapts to the text that it is scored on.

Each way seals scores on a `Tape` first and trains on what the tape lends afterwards; only `oracle`
does not. `steps` holds what they share.
"""
