"""One launch updates every parameter: the update rules of AdamW, Adam, SGD, Adagrad, Adadelta and RMSprop.

With g the gradient (negated for maximize, scaled by the clipping factor), p the parameter, t the step from 1 on:

    L2      all but AdamW: g += decay p                            AdamW: p -= lr decay p
    adam    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2     top = max(top, v) with amsgrad, else v
            p -= lr / (1 - b1^t)  m / (sqrt(top / (1 - b2^t)) + eps)
    sgd     m = b1 m + (1 - dampening) g, in the first step m = g  p -= lr (g + b1 m with Nesterov, else m)
    adagrad s += g^2                                               p -= lr / (1 + (t - 1) lr_decay)  g / (sqrt(s) + eps)
    adadelta v = b1 v + (1 - b1) g^2   d = g sqrt(a + eps) / sqrt(v + eps)   a = b1 a + (1 - b1) d^2   p -= lr d
    rmsprop v = b1 v + (1 - b1) g^2    a = b1 a + (1 - b1) g if centered     q = sqrt(v - a^2) + eps
            m = momentum m + g / q     p -= lr (m with momentum, else g / q)
    momentum m = b1 m + (1 - b1) g     p = (1 - b1) g + b1 m with Nesterov, else m
    apply   p -= lr decay p + lr scale g         Muon's two halves: its g is the orthogonalised p of the momentum

Memory traffic per parameter, s bytes for parameter and gradient, 4 for each fp32 state: AdamW reads p, g, m, v and
writes p, m, v, 3 s + 16: 28 in fp32, 16 with m and v in 8 bits (`_eight_bits.py`). Beside it: the norm for clipping or
the guard reads g once more, + s; zeroing gradients writes them, + s; 16-bit parameters with fp32 masters read the
master in p's stead and write both, 2 s + 24.

A program works on one chunk of one tensor: CHUNKS holds the tensor of each chunk, a row of TABLE where it lies, GRADS
the addresses of the gradients, which change most often. Tiles that are whole and whose tensors all lie on 16-byte
boundaries are read 128 bits at a time; the last tile of a tensor, and tensors that lie otherwise, element by element.

Nothing is read on the host: lr and decay come from addresses (of a tensor, or of a slot of this launch's own SCALARS),
t from the state's step tensor. The program that finishes a tensor last advances its step: a counter per tensor tells,
which decides who writes and not what, so that the result is the same bits every time.
"""

from __future__ import annotations

from .._runtime import kernel, tl
from ._eight_bits import decoded, encoded, salted

# A row of TABLE, int64: the parameter, three states, the master, the step and the first two states' LOW (8 bits) as
# addresses (0: has none), elements, first chunk, seed of the stochastic rounding, row of SCALARS.
ADDRESSES = ("param", "state0", "state1", "state2", "master", "step", "low0", "low1")
FIELDS = (*ADDRESSES, "size", "first_chunk", "seed", "group")
# A row of SCALARS, fp32: -1 to maximize, else 1; coefficients, their complements and logarithms, all formed in double
# precision; eps; lr_decay, the momentum of rmsprop or Muon's scale; lr and decay, unless they are tensors of their own.
SCALARS = ("sign", "b1", "one_minus_b1", "b2", "one_minus_b2", "ln_b1", "ln_b2", "eps", "extra", "lr", "decay", "")
# CONTROL, fp32: what gradients are multiplied by; 1 where the step is left out, else 0.


@kernel()
def _bias_correction(t, ln_b):
    """1 - b^t = -expm1(t ln b), without the cancellation of 1 - b^t near t ln b = 0."""
    x = t * ln_b
    # expm1(x) / x = 1 + x/2! + x^2/3! + ..., to 1e-8 on [-0.7, 0]
    z = tl.maximum(x, -0.7)
    series = 1.0 / 362880.0 + z * (1.0 / 3628800.0)
    series = 1.0 / 5040.0 + z * (1.0 / 40320.0 + z * series)
    series = 1.0 / 120.0 + z * (1.0 / 720.0 + z * series)
    series = 1.0 / 6.0 + z * (1.0 / 24.0 + z * series)
    series = 1.0 + z * (0.5 + z * series)
    return tl.where(x > -0.7, -z * series, 1.0 - tl.exp(x))


@kernel()
def _with_l2(g, p, decay):
    # A decay of 0 must not touch g, also where p is infinite.
    return tl.where(decay != 0.0, g + decay * p, g)


@kernel()
def _lerp(m, g, b, c):
    """b m + c g with b + c = 1, from the nearer end: one rounding of the size of the smaller part, exact for b = 0."""
    return tl.where(c < 0.5, m + c * (g - m), g - b * (g - m))


@kernel()
def _adam(p, g, m, v, top, lr, rate, root, decay, b1, c1, b2, c2, eps, DECOUPLED: tl.constexpr, AMS: tl.constexpr):
    if DECOUPLED:
        p -= lr * decay * p
    else:
        g = _with_l2(g, p, decay)
    m = _lerp(m, g, b1, c1)
    v = b2 * v + c2 * g * g
    largest = v
    if AMS:
        # Not tl.maximum, which would drop a NaN.
        top = tl.where(v > top, v, tl.where(v != v, v, top))
        largest = top
    return p - rate * (m / (tl.sqrt(largest) / root + eps)), m, v, top


@kernel()
def _sgd(p, g, m, lr, first, decay, b1, c1, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr):
    g = _with_l2(g, p, decay)
    if MOMENTUM:
        m = tl.where(first, g, b1 * m + c1 * g)
        if NESTEROV:
            g += b1 * m
        else:
            g = m
    return p - lr * g, m


@kernel()
def _adagrad(p, g, s, rate, decay, eps):
    g = _with_l2(g, p, decay)
    s += g * g
    return p - rate * (g / (tl.sqrt(s) + eps)), s


@kernel()
def _adadelta(p, g, v, a, lr, decay, b1, c1, eps):
    g = _with_l2(g, p, decay)
    v = b1 * v + c1 * g * g
    d = tl.sqrt(a + eps) / tl.sqrt(v + eps) * g
    a = b1 * a + c1 * d * d
    return p - lr * d, v, a


@kernel()
def _rmsprop(p, g, v, m, a, lr, decay, b1, c1, momentum, eps, MOMENTUM: tl.constexpr, CENTERED: tl.constexpr):
    g = _with_l2(g, p, decay)
    v = b1 * v + c1 * g * g
    if CENTERED:
        a = _lerp(a, g, b1, c1)
        q = tl.sqrt(v - a * a) + eps
    else:
        q = tl.sqrt(v) + eps
    g = g / q
    if MOMENTUM:
        m = momentum * m + g
        g = m
    return p - lr * g, v, m, a


@kernel()
def _mixed(bits):
    """A 32-bit hash: every bit of the result depends on every bit of `bits`."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@kernel()
def _hashed(begin, at, seed, t):
    """32 random bits for each element begin + at of a chunk."""
    key = _mixed(seed.to(tl.uint32) ^ _mixed((seed >> 32).to(tl.uint32) ^ _mixed(t.to(tl.uint32))))
    # Element numbers may pass 2^32, at the beginning of a chunk: their upper half enters by the key.
    key = _mixed((begin >> 32).to(tl.uint32) ^ key)
    return _mixed((begin.to(tl.uint32) + at.to(tl.uint32)) ^ key)


@kernel()
def _rounded_stochastically(x, noise):
    """x as bf16, away from 0 with the probability of how far it lies beyond the nearer neighbour; exact values stay."""
    bits = x.to(tl.uint32, bitcast=True)
    up = ((bits + (noise & 0xFFFF)) >> 16).to(tl.uint16)
    # The carry would turn a NaN into a number.
    quiet = (bits >> 16).to(tl.uint16) | 0x40
    return tl.where(x == x, up, quiet).to(tl.bfloat16, bitcast=True)


@kernel()
def _address(word, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to DTYPE that an int64 holds."""
    pointer = word.to(tl.pointer_type(DTYPE))  # type: ignore[arg-type]
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@kernel()
def _load(word, begin, at, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements begin + at of the tensor at address `word`, in fp32; 0 where there is no such tensor."""
    x = tl.zeros(at.shape, tl.float32)
    if DTYPE is not None:
        x = tl.load(_address(word, DTYPE, ALIGNED) + begin + at, mask=mask, other=None if ALIGNED else 0.0)
        x = x.to(tl.float32)
    return x


@kernel()
def _store(word, begin, at, x, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    if DTYPE is not None:
        tl.store(_address(word, DTYPE, ALIGNED) + begin + at, x.to(DTYPE), mask=mask)


@kernel()
def _load_codes(word, low_at, begin, at, low_mask, mask, OCTAVES: tl.constexpr, ALIGNED: tl.constexpr):
    """An average of 8 bits in fp32: elements begin + at, a row of them for each LOW at `low_at`."""
    code = tl.load(_address(word, tl.uint8, ALIGNED) + begin + at, mask=mask, other=None if ALIGNED else 0)
    low = tl.load(low_at, mask=low_mask, other=None if ALIGNED else 0)
    return decoded(code, low[:, None], OCTAVES)


@kernel()
def _store_codes(word, low_at, begin, at, x, noise, low_mask, mask, OCTAVES: tl.constexpr, ALIGNED: tl.constexpr):
    code, low = encoded(x, noise, OCTAVES)
    tl.store(_address(word, tl.uint8, ALIGNED) + begin + at, code, mask=mask)
    tl.store(low_at, low, mask=low_mask)


@kernel()
def _tile(
    addresses,
    hyper,
    begin,
    at,
    blocks,
    left,
    t,
    seed,
    RULE: tl.constexpr,
    SWITCH: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE0: tl.constexpr,
    STATE1: tl.constexpr,
    STATE2: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ZERO_GRADS: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Read one tile of one tensor, update it, write it. ALIGNED: whole, and every tensor on a 16-byte boundary."""
    p_at, g_at, s0_at, s1_at, s2_at, master_at, low0_at, low1_at = addresses
    factor, lr, rate, root, decay, b1, c1, b2, c2, eps, extra = hyper
    mask = None
    if not ALIGNED:
        mask = at < left
    if RULE == "momentum":
        p = tl.zeros(at.shape, tl.float32)
    elif MASTER is not None:
        p = _load(master_at, begin, at, mask, MASTER, ALIGNED)
    else:
        p = _load(p_at, begin, at, mask, PARAM, ALIGNED)
    g = _load(g_at, begin, at, mask, GRAD, ALIGNED) * factor
    if tl.uint8 == STATE0:
        low_mask = None
        if not ALIGNED:
            low_mask = blocks * STATE_BLOCK < left
        first = begin // STATE_BLOCK + blocks
        low0_at, low1_at = _address(low0_at, tl.uint8, False) + first, _address(low1_at, tl.uint8, False) + first
        s0 = _load_codes(s0_at, low0_at, begin, at, low_mask, mask, 16, ALIGNED)
        s1 = _load_codes(s1_at, low1_at, begin, at, low_mask, mask, 32, ALIGNED)
    else:
        s0 = _load(s0_at, begin, at, mask, STATE0, ALIGNED)
        s1 = _load(s1_at, begin, at, mask, STATE1, ALIGNED)
    s2 = _load(s2_at, begin, at, mask, STATE2, ALIGNED)
    if RULE == "adam":
        p, s0, s1, s2 = _adam(p, g, s0, s1, s2, lr, rate, root, decay, b1, c1, b2, c2, eps, SWITCH, STATE2 is not None)
    elif RULE == "sgd":
        p, s0 = _sgd(p, g, s0, lr, t == 1.0, decay, b1, c1, STATE0 is not None, SWITCH)
    elif RULE == "adagrad":
        p, s0 = _adagrad(p, g, s0, rate, decay, eps)
    elif RULE == "adadelta":
        p, s0, s1 = _adadelta(p, g, s0, s1, lr, decay, b1, c1, eps)
    elif RULE == "rmsprop":
        p, s0, s1, s2 = _rmsprop(
            p, g, s0, s1, s2, lr, decay, b1, c1, extra, eps, STATE1 is not None, STATE2 is not None
        )
    elif RULE == "momentum":
        s0 = _lerp(s0, g, b1, c1)
        p = s0
        if SWITCH:
            p = _lerp(g, s0, c1, b1)
    else:
        tl.static_assert(RULE == "apply")
        p = p - lr * decay * p - rate * g
    if tl.uint8 == STATE0:
        noise = _mixed(salted(_hashed(begin, at, seed, t)))
        _store_codes(s0_at, low0_at, begin, at, s0, noise & 0xFFFF, low_mask, mask, 16, ALIGNED)
        _store_codes(s1_at, low1_at, begin, at, s1, noise >> 16, low_mask, mask, 32, ALIGNED)
    else:
        _store(s0_at, begin, at, s0, mask, STATE0, ALIGNED)
        _store(s1_at, begin, at, s1, mask, STATE1, ALIGNED)
    _store(s2_at, begin, at, s2, mask, STATE2, ALIGNED)
    _store(master_at, begin, at, p, mask, MASTER, ALIGNED)
    if STOCHASTIC:
        tl.static_assert(tl.bfloat16 == PARAM)
        p = _rounded_stochastically(p, _hashed(begin, at, seed, t))
    _store(p_at, begin, at, p, mask, PARAM, ALIGNED)
    if ZERO_GRADS:
        _store(g_at, begin, at, tl.zeros(at.shape, tl.float32), mask, GRAD, ALIGNED)


@kernel(do_not_specialize=("T",))
def update_kernel(
    TABLE,
    GRADS,
    SCALARS,
    CHUNKS,
    CONTROL,
    TICKETS,
    T,
    RULE: tl.constexpr,
    SWITCH: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE0: tl.constexpr,
    STATE1: tl.constexpr,
    STATE2: tl.constexpr,
    MASTER: tl.constexpr,
    STEP: tl.constexpr,
    CONTROLLED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ZERO_GRADS: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
    SCALAR_FIELDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Chunk `program_id` of the T tensors; TICKETS counts each tensor's finished programs and ends at 0."""
    tensor = tl.load(CHUNKS + tl.program_id(0))
    row = TABLE + tensor * FIELDS
    g_at, size = tl.load(GRADS + tensor), tl.load(row + 8)
    begin = (tl.program_id(0) - tl.load(row + 9)) * CHUNK
    left = tl.minimum(size - begin, CHUNK).to(tl.int32)
    # GRADS goes on behind the T gradients with two addresses a group: its learning rate and its decay.
    group = tl.load(row + 11)
    h = SCALARS + group * SCALAR_FIELDS
    lr = tl.load(_address(tl.load(GRADS + T + 2 * group), tl.float32, False))
    decay = tl.load(_address(tl.load(GRADS + T + 2 * group + 1), tl.float32, False))
    factor, b1, c1, b2, c2 = tl.load(h), tl.load(h + 1), tl.load(h + 2), tl.load(h + 3), tl.load(h + 4)
    eps, extra = tl.load(h + 7), tl.load(h + 8)
    skipped = 0.0
    if CONTROLLED:
        # What is applied is orthogonal already: its momentum was scaled.
        if RULE != "apply":
            factor *= tl.load(CONTROL)
        skipped = tl.load(CONTROL + 1)
    t = 0.0
    if STEP:
        step_at = _address(tl.load(row + 5), tl.float32, False)
        t = tl.load(step_at) + 1.0
    rate, root = lr, 1.0
    if RULE == "adam":
        rate = lr / _bias_correction(t, tl.load(h + 5))
        root = tl.sqrt(_bias_correction(t, tl.load(h + 6)))
    if RULE == "adagrad":
        rate = lr / (1.0 + (t - 1.0) * extra)
    if RULE == "apply":
        rate = lr * extra
    hyper = (factor, lr, rate, root, decay, b1, c1, b2, c2, eps, extra)

    p_at, s0_at, s1_at, s2_at, master_at = (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
    )
    addresses = (p_at, g_at, s0_at, s1_at, s2_at, master_at, tl.load(row + 6), tl.load(row + 7))
    seed = tl.load(row + 10)
    aligned = (p_at | g_at | s0_at | s1_at | s2_at | master_at) % 16 == 0
    tiles = tl.where(skipped == 0.0, tl.cdiv(left, BLOCK), 0)
    wide_tiles = tl.minimum(tl.where(aligned, left // BLOCK, 0), tiles)
    blocks, cols = 0, tl.arange(0, BLOCK)
    if tl.uint8 == STATE0:
        # A row of the tile is a block of the states, whose elements have one exponent.
        blocks = tl.arange(0, BLOCK // STATE_BLOCK)
        cols = blocks[:, None] * STATE_BLOCK + tl.arange(0, STATE_BLOCK)[None, :]
    # Two loops over one body, since what is aligned must be known when compiling.
    for i in range(wide_tiles):
        _tile(
            *(addresses, hyper, begin, i * BLOCK + cols, i * (BLOCK // STATE_BLOCK) + blocks, left, t, seed),
            *(RULE, SWITCH, PARAM, GRAD, STATE0, STATE1, STATE2, MASTER, STOCHASTIC, ZERO_GRADS, STATE_BLOCK, True),
        )
    for i in range(wide_tiles, tiles):
        _tile(
            *(addresses, hyper, begin, i * BLOCK + cols, i * (BLOCK // STATE_BLOCK) + blocks, left, t, seed),
            *(RULE, SWITCH, PARAM, GRAD, STATE0, STATE1, STATE2, MASTER, STOCHASTIC, ZERO_GRADS, STATE_BLOCK, False),
        )
    if CONTROLLED and ZERO_GRADS:
        for i in range(tiles, tl.cdiv(left, BLOCK)):
            at = i * BLOCK + cols
            _store(g_at, begin, at, tl.zeros(at.shape, tl.float32), at < left, GRAD, False)

    if STEP:
        # Every thread has read the step before this program counts as finished.
        tl.debug_barrier()
        programs = tl.maximum(tl.cdiv(size, CHUNK), 1)
        if tl.atomic_add(TICKETS + tensor, 1) == programs - 1:
            tl.store(TICKETS + tensor, 0)
            if skipped == 0.0:
                tl.store(step_at, t)


@kernel(do_not_specialize=("offset",))
def norm_partial_kernel(
    TABLE,
    GRADS,
    CHUNKS,
    PARTIAL,
    offset,
    GRAD: tl.constexpr,
    FIELDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """PARTIAL[offset + chunk] = sum of squares of the chunk's gradient, in fp32."""
    tensor = tl.load(CHUNKS + tl.program_id(0))
    row = TABLE + tensor * FIELDS
    g_at = tl.load(GRADS + tensor)
    begin = (tl.program_id(0) - tl.load(row + 9)) * CHUNK
    left = tl.minimum(tl.load(row + 8) - begin, CHUNK).to(tl.int32)
    wide_tiles = tl.where(g_at % 16 == 0, left // BLOCK, 0)
    cols = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for i in range(wide_tiles):
        g = _load(g_at, begin, i * BLOCK + cols, None, GRAD, True)
        squares += g * g
    for i in range(wide_tiles, tl.cdiv(left, BLOCK)):
        at = i * BLOCK + cols
        g = _load(g_at, begin, at, at < left, GRAD, False)
        squares += g * g
    tl.store(PARTIAL + offset + tl.program_id(0), tl.sum(squares, axis=0))


@kernel(do_not_specialize=("count",))
def control_kernel(
    PARTIAL,
    GRAD_SCALE,
    FOUND_INF,
    NORM,
    CONTROL,
    SKIPPED,
    count,
    max_norm,
    HAS_NORM: tl.constexpr,
    CLIP: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The norm, the gradients' factor and whether the step is left out, from the partial sums of squares."""
    factor, skipped = 1.0, 0.0
    if HAS_SCALE:
        factor = 1.0 / tl.load(GRAD_SCALE).to(tl.float32)
    if HAS_NORM:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            squares += tl.load(PARTIAL + at, mask=at < count, other=0.0)
        norm = tl.sqrt(tl.sum(squares, axis=0)) * factor
        tl.store(NORM, norm)
        if CLIP:
            # Not tl.minimum, which would drop a NaN: min(1, max_norm / (norm + 1e-6))
            ratio = max_norm / (norm + 1e-6)
            factor *= tl.where(ratio > 1.0, 1.0, ratio)
        if SKIP_NONFINITE:
            skipped = tl.where(tl.abs(norm) < float("inf"), 0.0, 1.0)
            tl.store(SKIPPED, tl.load(SKIPPED) + skipped.to(tl.int64))
    if HAS_FOUND:
        skipped = tl.where(tl.load(FOUND_INF) != 0.0, 1.0, skipped)
    tl.store(CONTROL, factor)
    tl.store(CONTROL + 1, skipped)
