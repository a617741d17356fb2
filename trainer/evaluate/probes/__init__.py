"""Is an evaluator lawful? Experiments on it as a black box: a model, a tape and a spec go in,
losses come out.

`check.check_evaluator` runs it again and again, each time with fresh weights, on short texts that
it has never seen: with later tokens changed, with every token of the alphabet as the last target,
and with a recorder at the model's door. The text is drawn at random, so no dataset is needed, and
in it every pair of neighbours is met once, so that whatever reaches the model can be placed.

Nothing here scores anything, so nothing here ships with an artifact.
"""
