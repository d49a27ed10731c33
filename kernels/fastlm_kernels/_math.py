"""Functions that Triton's language lacks, or whose library versions its interpreter cannot run.

Each keeps its argument's floating dtype and is as accurate, relative to its value, as fp32 allows.
"""

from __future__ import annotations

from ._runtime import kernel, tl


@kernel()
def tanh(x):
    """tanh, to about 2 units in the last place of fp32; NaN stays NaN."""
    # Near 0, where 1 - 2 / (e^2x + 1) would cancel: x (1 + z P(z)) with z = x^2, P fitted to 6e-12 on |x| < 0.625.
    z = tl.minimum(x * x, 1.0)
    p = -0.0008051973610087301 * z + 0.0032316068135643545
    p = p * z - 0.008753070311770023
    p = p * z + 0.021850505606149644
    p = p * z - 0.05396648136669198
    p = p * z + 0.1333332542386223
    p = p * z - 0.3333333321331868
    near = x * (1.0 + z * p)
    # By e^-2|x|, which cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.390625, near, tl.where(x < 0.0, -far, far))


@kernel()
def sigmoid(x):
    """1 / (1 + e^-x); NaN stays NaN."""
    return 1.0 / (1.0 + tl.exp(-x))
