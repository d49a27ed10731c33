"""hf.patch on tiny random models: every family in every case keeps the numbers of the unpatched model."""

from __future__ import annotations

import pytest
import torch
from hf_models import (
    CASES,
    FAMILIES,
    LEFT_OUT,
    assert_equal_numbers,
    cells,
)

import fastlm_kernels as fk
from fastlm_kernels import hf

SHORT = 8  # tokens a row, where the interpreter takes its time


def test_every_family_is_a_line_of_data_and_every_cell_is_run_or_has_a_reason() -> None:
    assert set(hf.FAMILIES) == set(FAMILIES)
    assert {(family, case) for family in FAMILIES for case in CASES} == {*cells(*CASES), *LEFT_OUT}
    assert all(LEFT_OUT.values())


@pytest.mark.parametrize(("family", "case"), cells(*(name for name in CASES if not CASES[name].compiled)))
def test_loss_states_logits_and_gradients_are_the_models_own(family: str, case: str) -> None:
    assert_equal_numbers(fk.hf.patch, family, CASES[case])


@pytest.mark.parametrize(("family", "case"), cells("compiled"))
def test_the_same_compiled_whole(family: str, case: str) -> None:
    torch._dynamo.reset()
    assert_equal_numbers(fk.hf.patch, family, CASES[case])


# In the interpreter padding on both sides under autocast, packed documents, and 16 bits; on a GPU every cell.
LLAMAS = ("olmo2", "smollm3")  # whose kernels are llama's
INTERPRETED = [cell for cell in cells("autocast", "packed") if cell[0] not in LLAMAS]
INTERPRETED += [("llama", "bf16"), ("gpt2", "bf16-packed")]
ON_A_GPU = [pytest.param(*cell, marks=pytest.mark.needs_gpu) for cell in cells(*CASES) if cell not in INTERPRETED]


@pytest.mark.needs_kernels
@pytest.mark.parametrize(("family", "case"), [*INTERPRETED, *ON_A_GPU])
def test_the_same_by_the_kernels(family: str, case: str, kernel_device: str) -> None:
    torch._dynamo.reset()
    assert_equal_numbers(fk.hf.patch, family, CASES[case], SHORT, kernel_device)
