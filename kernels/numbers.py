"""Storage types, rounding and magnitude keys, as in csrc/numeric.h.

Tensors reach a kernel as unsigned integers, and a code (``BF16``, ``F16``, ``F32``, ``F64``) says what their bits
mean. Conversions are integer operations, because no conversion of a device or of the interpreter need then be
trusted with denormals, NaN or ties. ``WORKING`` is the working dtype; arithmetic runs in float64 if that is F64, in
float32 otherwise.
"""

import triton
import triton.language as tl


@triton.jit
def widen(bits, CODE: tl.constexpr, REAL: tl.constexpr):
    """The value that bits stand for, exactly."""
    if CODE == "BF16":
        value = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif CODE == "F16":
        wide = bits.to(tl.uint32)
        magnitude = (wide & 0x7FFF) << 13
        # The exponent moves from bias 15 to 127; multiplying by 2^112 also normalises denormals, exactly.
        scaled = (magnitude.to(tl.float32, bitcast=True) * 5192296858534827628530496329220096.0).to(
            tl.uint32, bitcast=True
        )
        unsigned = tl.where(magnitude >= 0x0F800000, magnitude | 0x7F800000, scaled)
        value = (unsigned | ((wide & 0x8000) << 16)).to(tl.float32, bitcast=True)
    elif CODE == "F32":
        value = bits.to(tl.float32, bitcast=True)
    else:
        value = bits.to(tl.float64, bitcast=True)
    return value.to(REAL)


@triton.jit
def sticky_float(value):
    """float32 of a float64, its rounding error kept in the last bit: rounding it again is then right."""
    nearest = value.to(tl.float32)
    back = nearest.to(tl.float64)
    bits = nearest.to(tl.uint32, bitcast=True)
    toward_zero = tl.where(tl.abs(back) > tl.abs(value), bits - 1, bits)
    inexact = (back != value) & (value == value)
    return tl.where(inexact, toward_zero | 1, bits).to(tl.float32, bitcast=True)


@triton.jit
def narrow(value, CODE: tl.constexpr):
    """The bits of a float32 or float64 rounded once, to nearest even. Every NaN becomes the same one."""
    if CODE == "F64":
        exact = value.to(tl.float64)
        bits = exact.to(tl.uint64, bitcast=True)
        rounded = tl.where(exact == exact, bits, 0x7FF8000000000000)
    elif CODE == "F32":
        single = value.to(tl.float32)
        rounded = tl.where(single == single, single.to(tl.uint32, bitcast=True), 0x7FC00000)
    else:
        if value.dtype == tl.float64:
            single = sticky_float(value)
        else:
            single = value
        bits = single.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        if CODE == "BF16":
            nearest = bits + 0x7FFF + ((bits >> 16) & 1)
            rounded = (tl.where(magnitude > 0x7F800000, 0x7FC00000, nearest) >> 16).to(tl.uint16)
        else:
            normal = (magnitude + 0xC8000FFF + ((magnitude >> 13) & 1)) >> 13
            # Below 2^-14 the addition of 0.5 shifts the denormal mantissa into place and rounds it.
            shifted = magnitude.to(tl.float32, bitcast=True) + 0.5
            denormal = shifted.to(tl.uint32, bitcast=True) - 0x3F000000
            finite = tl.where(magnitude < 0x38800000, denormal, normal)
            special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00 | ((bits >> 16) & 0x8000))
            signed = finite | ((bits >> 16) & 0x8000)
            rounded = tl.where(magnitude >= 0x477FF000, special, signed).to(tl.uint16)
    return rounded


@triton.jit
def rounded_to(value, CODE: tl.constexpr):
    """A value rounded to a storage type."""
    return widen(narrow(value, CODE), CODE, value.dtype)


@triton.jit
def rounded(value, WORKING: tl.constexpr, STORAGE_ROUNDING: tl.constexpr):
    """A result, rounded to the working dtype when every step is to be."""
    if STORAGE_ROUNDING:
        result = rounded_to(value, WORKING)
    else:
        result = value
    return result


@triton.jit
def reciprocal(divisor):
    """What ``divided`` multiplies by: 1 / divisor in float64."""
    return 1.0 / divisor.to(tl.float64)


@triton.jit
def divided(x, divisor, reciprocal):
    """x / divisor, rounded once.

    The quotient of two float32 is exact, or at least 2^-49 of itself away from where rounding to float32 changes. Two
    roundings to float64, of the reciprocal and of the product, are off by less than 2^-52.
    """
    if x.dtype == tl.float64:
        quotient = x / divisor
    else:
        quotient = (x.to(tl.float64) * reciprocal).to(tl.float32)
    return quotient


@triton.jit
def load_bits(pointer, offsets, inside, MASKED: tl.constexpr):
    """Bits as they are; 0 where a mask says that there are none."""
    if MASKED:
        bits = tl.load(pointer + offsets, mask=inside, other=0)
    else:
        bits = tl.load(pointer + offsets)
    return bits


@triton.jit
def value_of(bits, CODE: tl.constexpr, WORKING: tl.constexpr):
    """Elements of an input, rounded once to the working dtype."""
    REAL: tl.constexpr = tl.float64 if WORKING == "F64" else tl.float32
    if CODE == WORKING:
        value = widen(bits, CODE, REAL)
    else:
        value = widen(narrow(widen(bits, CODE, tl.float64), WORKING), WORKING, REAL)
    return value


@triton.jit
def load(pointer, offsets, inside, CODE: tl.constexpr, WORKING: tl.constexpr, MASKED: tl.constexpr):
    """Elements of an input in memory, rounded once to the working dtype."""
    return value_of(load_bits(pointer, offsets, inside, MASKED), CODE, WORKING)


@triton.jit
def store(pointer, offsets, inside, value, CODE: tl.constexpr, MASKED: tl.constexpr):
    """Write values, rounded once. Returns what was written, as values."""
    bits = narrow(value, CODE)
    if MASKED:
        tl.store(pointer + offsets, bits, mask=inside)
    else:
        tl.store(pointer + offsets, bits)
    return widen(bits, CODE, tl.float64 if CODE == "F64" else value.dtype)


@triton.jit
def stains(values):
    """[rows]: 0 where all values of a row are finite, NaN where one is not."""
    return tl.sum(values * 0.0, 1)


@triton.jit
def magnitude(value):
    """The bits of a float32 or float64 without the sign, uint32 or uint64: integers that order as magnitudes do."""
    if value.dtype == tl.float64:
        bits = value.to(tl.uint64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def first_magnitude(key, WORKING: tl.constexpr):
    """The least magnitude of a difference whose key in the working dtype is at least ``key``, an int64 from 0 on.

    Rounding is monotone, so the magnitudes of a key are a range. For a type of 16 bits the first lies half-way between
    the key's number and the one below, where rounding to even decides: it is that number's own key if the key is even.
    All NaN have one key.
    """
    if WORKING == "F64":
        INFINITY: tl.constexpr = 0x7FF0000000000000
        NAN: tl.constexpr = 0x7FF8000000000000
        first = key
    elif WORKING == "F32":
        INFINITY: tl.constexpr = 0x7F800000
        NAN: tl.constexpr = 0x7FC00000
        first = key
    elif WORKING == "BF16":
        INFINITY: tl.constexpr = 0x7F80
        NAN: tl.constexpr = 0x7FC0
        first = (key << 16) - 0x8000 + (key & 1)
    else:
        INFINITY: tl.constexpr = 0x7C00
        NAN: tl.constexpr = 0x7E00
        below = widen(tl.maximum(key - 1, 0).to(tl.uint16), WORKING, tl.float32)
        upper = tl.where(key == INFINITY, 65536.0, widen(key.to(tl.uint16), WORKING, tl.float32))
        half_way = (below + upper) * 0.5
        first = half_way.to(tl.uint32, bitcast=True).to(tl.int64) + (key & 1)
    if WORKING == "F64":
        first = tl.where(key > INFINITY, INFINITY + 1, first).to(tl.uint64)
        first = tl.where(key > NAN, 0x8000000000000000, first)
    else:
        first = tl.where(key > INFINITY, 0x7F800001, first)
        first = tl.where(key > NAN, 0x80000000, first).to(tl.uint32)
    return tl.where(key == 0, 0, first).to(first.dtype)


@triton.jit
def magnitude_key(delta, WORKING: tl.constexpr):
    """The bits of RN(|delta|) without the sign: an int32, or int64 when the working dtype is F64."""
    if WORKING == "F64":
        key = (narrow(delta, WORKING) & 0x7FFFFFFFFFFFFFFF).to(tl.int64)
    elif WORKING == "F32":
        key = (narrow(delta, WORKING) & 0x7FFFFFFF).to(tl.int32)
    else:
        key = (narrow(delta, WORKING) & 0x7FFF).to(tl.int32)
    return key


@triton.jit
def non_finite(value):
    """Whether a float32 or float64 is NaN or infinite."""
    if value.dtype == tl.float64:
        found = (value.to(tl.uint64, bitcast=True) & 0x7FF0000000000000) == 0x7FF0000000000000
    else:
        found = (value.to(tl.uint32, bitcast=True) & 0x7F800000) == 0x7F800000
    return found
