"""Deliberate breaks, each with the test that must notice it.

    cd tests && python -m mutations [NAME ...]

A mutation replaces one piece of a kernel package's text. It is applied to a copy of the package, never in place, and
its test is run on the copy. A mutation that survives, whose text no longer occurs exactly once, or whose test cannot be
found is a defect of the tests. A family's mutations lie in the file of the family's name.
"""

from __future__ import annotations

from mutations import (
    activation,
    attention,
    cross_entropy,
    hf,
    linear_cross_entropy,
    norm,
    optim,
    rotary,
    runtime,
    softmax,
)

MUTATIONS = (
    *norm.MUTATIONS,
    *activation.MUTATIONS,
    *softmax.MUTATIONS,
    *rotary.MUTATIONS,
    *cross_entropy.MUTATIONS,
    *linear_cross_entropy.MUTATIONS,
    *attention.MUTATIONS,
    *optim.MUTATIONS,
    *hf.MUTATIONS,
    *runtime.MUTATIONS,
)
