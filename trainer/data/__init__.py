"""Text to shards, shards to batches, tokens to bytes.

`shards` and `manifest` own what lies on disk, `loader` what a training reads from it, `bytecount`
the denominator of bits per byte, `prepare` the way from text to shards, `fetch` the way from a
published export. Numpy only: nothing here imports torch.
"""
