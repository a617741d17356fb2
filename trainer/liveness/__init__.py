"""Is everything that a recipe names alive? Small experiments on its real parts, on a CPU.

`check.check_recipe` runs them all; each gives an audit rule. Most of them would have caught a
bug of a published system (techniques 3.3, 8): a table that no optimizer held, a switch that the
compiled graph never read, a gate wired to nothing. Nothing here trains or scores, so nothing
here ships with an artifact.
"""
