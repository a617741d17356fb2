"""The Triton walk over a block of columns against its plain twin, in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: torch for the CPU has none"
)

# In a process of its own: Triton reads TRITON_INTERPRET when it is imported.
COMPARE = """\
import sys
import torch
from trainer.finalize.gptq import walk_block
from trainer.finalize.gptq_triton import walk_block_triton
from trainer.quant import row_scale

columns, rows, bits, symmetric = map(int, sys.argv[1:])
torch.manual_seed(columns)
own = torch.randn(columns, rows)
own[own.abs() < 0.3] = 0.0
aim = own + 0.1 * torch.randn(columns, rows)
wide = torch.randn(columns, 2 * columns + 1).triu(1) / columns**0.5
mix = wide[:, :columns]  # a part of a larger matrix
scale = row_scale(own.abs().amax(dim=0) * 0.7, bits, 1e-12).float()
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
torch.testing.assert_close(lost, expected, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.parametrize(("columns", "rows", "bits", "symmetric"), [
    (1, 20, 4, 1), (7, 13, 4, 0), (16, 8, 6, 1), (33, 9, 8, 0), (128, 5, 3, 1),
])  # fmt: skip
def test_the_kernel_leaves_what_its_plain_twin_leaves(columns, rows, bits, symmetric):
    words = [str(word) for word in (columns, rows, bits, symmetric)]

    done = subprocess.run(
        [sys.executable, "-c", COMPARE, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )

    assert done.returncode == 0, done.stderr[-2000:]
