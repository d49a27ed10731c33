"""Functions that Triton's language lacks, whose library versions its interpreter cannot run or that cost too much.

Each keeps its argument's floating dtype and is as accurate, relative to its value, as fp32 allows.
"""

from __future__ import annotations

from ._runtime import kernel, tl


@kernel()
def tanh(x):
    """tanh, to about 2 units in the last place of fp32; NaN stays NaN."""
    # Near 0, where 1 - 2 / (e^2x + 1) would cancel: x (1 + z P(z)) with z = x^2, P fitted to 4e-8 on |x| < 0.55.
    z = tl.minimum(x * x, 1.0)
    p = 0.016437580722515284 * z - 0.052671813312148444
    p = p * z + 0.13320725052880053
    p = p * z - 0.33332946636446775
    near = x * (1.0 + z * p)
    # 1 - 2 e / (1 + e) with e = e^-2|x|, which cannot overflow; one rounding where tanh is close to 1.
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(z < 0.3025, near, tl.where(x < 0.0, -far, far))


@kernel()
def sigmoid(x):
    """1 / (1 + e^-x); NaN stays NaN."""
    # By e^-|x|: a divisor above 2^126, which e^-x reaches at x = -87, is flushed to infinity by fast division.
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@kernel()
def normal_cdf(x):
    """Phi(x) = (1 + erf(x / sqrt 2)) / 2, the tail without its cancellation; 0 below -6, as PyTorch's in fp32.

    Two thirds of the instructions of the library's erf, which would make a 16-bit GELU wait for arithmetic. Of NaN: 1.
    """
    # log2 of the tail Phi(-a), fitted on [0, 6]: to 5e-8 relative near 0, less by 1 + a^2 further out, as GELU allows.
    a = tl.abs(x)
    p = -1.9580240169985114e-08 * a + 6.216370315508346e-07
    p = p * a - 8.429719318111338e-06
    p = p * a + 6.175725166196336e-05
    p = p * a - 0.00022960741298549733
    p = p * a - 0.00010188215803996307
    p = p * a + 0.007067662649329615
    p = p * a - 0.05251896765812177
    p = p * a - 0.45919736286359186
    p = p * a - 1.1511065372839961
    tail = tl.where(a < 6.0, tl.exp2(p * a - 1.0), 0.0)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@kernel()
def expm1(x):
    """e^x - 1 for x <= 0, also where it is so near 0 that e^x rounds to 1; NaN stays NaN."""
    # Taylor's series, to 2e-8 where it is used.
    n = tl.maximum(x, -0.35)
    near = n * (1.0 + n / 2 * (1.0 + n / 3 * (1.0 + n / 4 * (1.0 + n / 5 * (1.0 + n / 6 * (1.0 + n / 7))))))
    return tl.where(x > -0.35, near, tl.exp(x) - 1.0)
