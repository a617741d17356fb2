"""One GPT with one forward, assembled from the blueprint.

Shapes in annotations: B batch, T tokens, D model width, H query heads, K kv heads, E width per
head, V vocabulary. Read `gpt.py` first, then `block.py`, `attention.py`, `mlp.py`.
"""
