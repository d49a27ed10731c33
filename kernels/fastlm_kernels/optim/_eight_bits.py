"""Adam's two averages in 8 bits: a byte for each element, and an exponent for each 128 of them.

    m    1 bit of sign, 4 of exponent, 3 of mantissa        v    5 bits of exponent, 3 of mantissa (v >= 0)
    value = 2^(LOW + exponent - 127) (1 + mantissa / 8), code 0 is 0; LOW, one byte a block, puts the block's largest
    element into the highest octave, so that m spans 16 octaves below it and v 32

Why so. Each element's update is m / sqrt(v): what matters is the relative error of each element, however small beside
its neighbours. Linear codes give an absolute one: most of v would be 0, and those updates infinite. A float's steps are
relative, an eighth to a sixteenth of the value everywhere, and v, a square, gets twice m's octaves. The dynamic code
maps of others have such a range too, finer steps near the top and coarser ones below, and search a table for each
element; here coding is a shift. v is never rounded to 0 unless it is 0.

Both are rounded stochastically: a value between two codes takes the upper one with the probability of how far it lies
towards it, so that what is stored is right on average. Rounded to the nearest, an average that moves by less than half
a step an update would never move: with beta2 = 0.999 v moves by thousandths, half a step is three hundredths or more.
Since LOW only shifts exponents, a stored number stays a code whatever its block's largest element does next: what does
not change is stored exactly, again and again. The draw is that of `_rounding.py`: seed, parameter, step and element.

128 fp32 elements are what a warp reads at once: it finds the largest without waiting for another. An inf or NaN lifts
LOW so far that the rest of its block is lost: `skip_nonfinite` keeps them out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._runtime import kernel, tl
from ._rounding import hashed

BLOCK = 128
M_OCTAVES, V_OCTAVES = 16, 32
# As bitsandbytes and torchao draw the line: biases and norms are a thousandth of a model.
SMALLEST = 4096
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# torch's key, our keys of the codes and of LOW, octaves
STATES = (
    ("exp_avg", "fastlm/exp_avg", "fastlm/exp_avg_low", M_OCTAVES),
    ("exp_avg_sq", "fastlm/exp_avg_sq", "fastlm/exp_avg_sq_low", V_OCTAVES),
)
CODES = tuple(codes for _, codes, _, _ in STATES)
LOWS = tuple(low for _, _, low, _ in STATES)
_MANTISSA = 20  # bits of an fp32 mantissa that a code leaves out
_SALT = 0x632BE5AB  # tells these draws from those of the parameter's own rounding


@kernel()
def decoded(code, low, OCTAVES: tl.constexpr):
    """uint8 codes (rows, 128) and each row's LOW, uint8 (rows, 1), as fp32."""
    code, base = code.to(tl.int32), low.to(tl.int32) << 23
    magnitude = code & (8 * OCTAVES - 1)
    bits = tl.where(magnitude == 0, 0, (magnitude << 20) + base)
    if OCTAVES == 16:
        bits |= (code & 0x80) << 24
    return bits.to(tl.float32, bitcast=True)


@kernel()
def salted(bits):
    """Other draws than those that round the parameter."""
    return bits ^ 0x632BE5AB


@kernel()
def encoded(x, noise, OCTAVES: tl.constexpr):
    """x (rows, 128) as uint8 codes and each row's LOW, uint8; noise: 16 random bits for each element."""
    raw = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == x, raw & 0x7FFFFFFF, 0x7FC00000)
    # The largest element's octave, or the next where its mantissa rounds up to 2.
    top = (tl.max(bits, axis=1) + 0xFFFFF) >> 23
    low = tl.maximum(top - (OCTAVES - 1), 1)
    base = (low << 23)[:, None]
    # Half a draw more, so that the 16 bits are right on average.
    noise = noise.to(tl.int32) * 16 + 8
    code = (bits - base + noise) >> 20
    least = (base + (1 << 20)).to(tl.float32, bitcast=True)
    if OCTAVES == 16:
        up = noise.to(tl.float32) * (1.0 / (1 << 20)) * least < tl.abs(x)
    else:
        up = x > 0.0
    code = tl.where(bits < base + (1 << 20), up.to(tl.int32), code)
    if OCTAVES == 16:
        code |= (raw >> 24) & 0x80
    return code.to(tl.uint8), low.to(tl.uint8)


def covers(param: Tensor) -> bool:
    """Whether state_bits=8 holds for this parameter's averages."""
    return param.dtype in _DTYPES and param.numel() >= SMALLEST


def blocks_of(count: int) -> int:
    """How many blocks `count` elements make."""
    return -(-count // BLOCK)


def noise_of(param: Tensor, seed: int, index: int, step: Tensor) -> dict[str, Tensor]:
    """16 random bits for each element of each average, by torch's key."""
    draws = hashed(param.numel(), seed, index, step, param.device, salt=_SALT)
    return {"exp_avg": draws & 0xFFFF, "exp_avg_sq": draws >> 16}


def encode(x: Tensor, octaves: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """fp32 `x`, its elements one after another in memory, as (codes, LOW): the bits that the kernel gives.

    noise: 16 random bits for each element in memory order, int64; None rounds to the nearest.
    """
    flat = x.as_strided((x.numel(),), (1,))
    blocks = torch.nn.functional.pad(flat, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    raw = blocks.view(torch.int32)
    bits = torch.where(blocks == blocks, raw & 0x7FFFFFFF, 0x7FC00000)
    low = (((bits.amax(1) + 0xFFFFF) >> 23) - (octaves - 1)).clamp(min=1)
    base = (low << 23)[:, None]
    if noise is None:
        draws = torch.full_like(bits, 1 << (_MANTISSA - 1))
    else:
        draws = torch.nn.functional.pad(noise, (0, -x.numel() % BLOCK)).view(-1, BLOCK).int() * 16 + 8
    codes = (bits - base + draws) >> _MANTISSA
    least = (base + (1 << _MANTISSA)).view(torch.float32)
    signed = octaves == M_OCTAVES
    up = draws.float() * 2.0**-_MANTISSA * least < blocks.abs() if signed else blocks > 0
    codes = torch.where(bits < base + (1 << _MANTISSA), up.int(), codes)
    if signed:
        codes |= (raw >> 24) & 0x80
    flat_codes = codes.view(-1)[: x.numel()].to(torch.uint8)
    kept = torch.empty_like(x, dtype=torch.uint8)
    return kept.copy_(flat_codes.as_strided(kept.shape, kept.stride())), low.to(torch.uint8)


def decode(codes: Tensor, low: Tensor, octaves: int) -> Tensor:
    """What `encode` has stored, fp32 in the codes' shape and memory order. ValueError where LOW has another length."""
    _check_length(codes, low)
    flat = codes.as_strided((codes.numel(),), (1,)).int()
    magnitude = flat & (8 * octaves - 1)
    base = (low.int() << 23).repeat_interleave(BLOCK)[: flat.numel()]
    bits = torch.where(magnitude == 0, 0, (magnitude << _MANTISSA) + base)
    if octaves == M_OCTAVES:
        bits |= (flat & 0x80) << 24
    wide = torch.empty_like(codes, dtype=torch.float32)
    return wide.copy_(bits.view(torch.float32).as_strided(wide.shape, wide.stride()))


def _check_length(codes: Tensor, low: Tensor) -> None:
    """ValueError unless LOW has one byte for each block: the kernel reads and writes it unasked."""
    if low.numel() != blocks_of(codes.numel()):
        raise ValueError(
            f"state_bits: {low.numel()} exponents beside codes of shape {tuple(codes.shape)}, which have "
            f"{blocks_of(codes.numel())} blocks; load the state of the parameter as it is now"
        )


def narrow(state: dict[str, Any], param: Tensor, noise: dict[str, Tensor] | None = None) -> None:
    """torch's averages in one parameter's state become codes in its memory order; what is codes already stays."""
    for key, codes, low, octaves in STATES:
        if key in state:
            wide = torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(state.pop(key))
            state[codes], state[low] = encode(wide, octaves, None if noise is None else noise[key])


def widen(state: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Codes in one parameter's state become torch's averages; what is wide already stays."""
    for key, codes, low, octaves in STATES:
        if codes in state:
            state[key] = decode(state.pop(codes), state.pop(low), octaves).to(dtype)


def prepare(state: dict[str, Any], param: Tensor) -> None:
    """Every average of one parameter as codes in its memory order, those that are not there yet as 0.

    ValueError where what is there has the size of another parameter.
    """
    for codes, low in zip(CODES, LOWS, strict=True):
        if codes in state:
            _check_length(state[codes], state[low])
            if state[codes].shape != param.shape:
                raise ValueError(
                    f"state_bits: codes of shape {tuple(state[codes].shape)} for a parameter of shape "
                    f"{tuple(param.shape)}; load the state of the parameter as it is now"
                )
    if any(codes in state and state[codes].stride() != param.stride() for codes in CODES):
        widen(state)
    narrow(state, param)
    for codes, low in zip(CODES, LOWS, strict=True):
        if codes not in state:
            state[codes] = torch.zeros_like(param, dtype=torch.uint8, requires_grad=False)
            state[low] = torch.zeros(blocks_of(param.numel()), dtype=torch.uint8, device=param.device)
