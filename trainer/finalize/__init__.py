"""From a bank entry to the bytes that would be submitted: prune, quantize, compress, write.

Walk: `pipeline.finalize` calls `prune`, `quantize`, `artifact.write_weights` and
`code.write_code`; `artifact.read_weights` is the way back. Scoring is `trainer.evaluate`'s.
"""
