"""The Triton walk over a block of columns against its plain twin, in Triton's interpreter."""

import pytest

from tests.interpreted import interpret, needs_triton

pytestmark = needs_triton

COMPARE = """\
import sys
import torch
from trainer.finalize.gptq import walk_block
from trainer.finalize.gptq_triton import walk_block_triton

columns, rows, bits, symmetric = map(int, sys.argv[1:])
torch.manual_seed(columns)
def eighths(most, *shape):
    return torch.randint(-most, most + 1, shape).float() / 8

# Every sum is exact, so that the order of sums is no excuse.
own = eighths(40, columns, rows)
aim = own + eighths(8, columns, rows)
wide = eighths(4, columns, 2 * columns + 1).triu(1)
mix = wide[:, :columns]  # a part of a larger matrix
scale = 2.0 ** -torch.arange(rows).remainder(4)
walks = {"plain": walk_block, "triton": walk_block_triton}
left = {}
for name, walk in walks.items():
    lost, q = aim.clone(), torch.empty_like(own, dtype=torch.int8)
    walk(own, lost, mix, scale, q, bits, symmetric=bool(symmetric))
    left[name] = lost, q
(lost, q), (expected, plain) = left["triton"], left["plain"]
assert torch.equal(q, plain), (q != plain).sum()
assert not q[own == 0].any()
assert q.any()
assert torch.equal(lost, expected)
"""


@pytest.mark.parametrize(("columns", "rows", "bits", "symmetric"), [
    (1, 20, 4, 1), (7, 13, 4, 0), (16, 8, 6, 1), (33, 9, 8, 0), (128, 5, 3, 1),
])  # fmt: skip
def test_the_kernel_leaves_what_its_plain_twin_leaves(columns, rows, bits, symmetric):
    interpret(COMPARE, columns, rows, bits, int(symmetric))
