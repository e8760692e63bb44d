// Elements as threads hold them: 16 bytes of an input at a time where all is aligned and of one type, else one.
#pragma once

#include <type_traits>

#include "../operations.h"
#include "../philox.h"
#include "runtime.h"

namespace merge_engine {

template <DType Working>
using RealOf = std::conditional_t<Working == DType::F64, double, float>;

template <DType Working>
constexpr int VECTOR = 16 / static_cast<int>(sizeof(typename Storage<Working>::Bits));

// Calls f with the working dtype as a compile-time constant.
template <class F>
void with_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::BF16: return f(std::integral_constant<DType, DType::BF16>());
        case DType::F16: return f(std::integral_constant<DType, DType::F16>());
        case DType::F32: return f(std::integral_constant<DType, DType::F32>());
        case DType::F64: return f(std::integral_constant<DType, DType::F64>());
    }
}

// V neighbouring elements in the working dtype, as they are stored.
template <DType Working, int V>
struct alignas(V == 1 ? alignof(typename Storage<Working>::Bits) : 16) Pack {
    typename Storage<Working>::Bits bits[V];

    template <class Real>
    __device__ Real value(int j) const {
        return Storage<Working>::template load<Real>(bits[j]);
    }
};

template <DType From, DType Working>
__device__ typename Storage<Working>::Bits converted(const void* data, uint64_t index) {
    const auto* bits = static_cast<const typename Storage<From>::Bits*>(data) + index;
    return Storage<Working>::store(Storage<From>::template load<double>(*bits));
}

// Elements [index, index + V) of an input, rounded to the working dtype. With V > 1 the input has that dtype.
template <DType Working, int V>
__device__ Pack<Working, V> load_pack(const Array& array, uint64_t index) {
    using Bits = typename Storage<Working>::Bits;
    Pack<Working, V> pack;
    if constexpr (V > 1) {
        // The address may come from shared memory; __ldg says that it leads to global memory nevertheless.
        const uint4 words = __ldg(reinterpret_cast<const uint4*>(static_cast<const Bits*>(array.data) + index));
        memcpy(pack.bits, &words, sizeof(words));
    } else if (array.dtype == Working) {
        pack.bits[0] = __ldg(static_cast<const Bits*>(array.data) + index);
    } else {
        switch (array.dtype) {
            case DType::BF16: pack.bits[0] = converted<DType::BF16, Working>(array.data, index); break;
            case DType::F16: pack.bits[0] = converted<DType::F16, Working>(array.data, index); break;
            case DType::F32: pack.bits[0] = converted<DType::F32, Working>(array.data, index); break;
            case DType::F64: pack.bits[0] = converted<DType::F64, Working>(array.data, index); break;
        }
    }
    return pack;
}

template <DType To, class Real>
__device__ int store_one(void* data, uint64_t index, Real value) {
    const auto bits = Storage<To>::store(value);
    static_cast<typename Storage<To>::Bits*>(data)[index] = bits;
    return is_finite(Storage<To>::template load<Real>(bits)) ? 0 : 1;
}

// Rounds and writes V elements; returns how many are then NaN or infinite.
template <DType Working, int V, class Real>
__device__ int store_values(const Array& array, uint64_t index, const Real (&values)[V]) {
    if constexpr (V > 1) {
        Pack<Working, V> pack;
        int non_finite = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            pack.bits[j] = Storage<Working>::store(values[j]);
            non_finite += is_finite(pack.template value<Real>(j)) ? 0 : 1;
        }
        uint4 words;
        memcpy(&words, pack.bits, sizeof(words));
        // Nothing reads the output again: it need not push inputs out of the cache.
        __stcs(reinterpret_cast<uint4*>(static_cast<typename Storage<Working>::Bits*>(array.data) + index), words);
        return non_finite;
    } else {
        switch (array.dtype) {
            case DType::BF16: return store_one<DType::BF16>(array.data, index, values[0]);
            case DType::F16: return store_one<DType::F16>(array.data, index, values[0]);
            case DType::F32: return store_one<DType::F32>(array.data, index, values[0]);
            default: return store_one<DType::F64>(array.data, index, values[0]);
        }
    }
}

template <DType Working, int V>
__device__ int non_finite_in(const Pack<Working, V>& pack) {
    int found = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) found += is_finite(pack.template value<RealOf<Working>>(j)) ? 0 : 1;
    return found;
}

inline bool fits_vectors(const Array& array, DType working) {
    return array.dtype == working && reinterpret_cast<uintptr_t>(array.data) % 16 == 0;
}

// Array, `count` elements further on.
inline Array advanced(const Array& array, uint64_t count) {
    static const uint64_t size[] = {2, 2, 4, 8};
    return {static_cast<char*>(array.data) + count * size[static_cast<int>(array.dtype)], array.dtype};
}

__device__ inline bool inside(const Range& range, uint64_t position) {
    return position >= range.first && position <= range.last;
}

// Steps 3, 4 and 9: bit j is set where the mask keeps delta[j]. The first has flat index `index` in the tensor, and
// place `offset` in the chunk.
template <DType Working, int V, class Real>
__device__ uint32_t kept_bits(const Mask& mask, const Real (&delta)[V], uint64_t index, uint64_t offset) {
    uint32_t kept = (1u << V) - 1, at_low = 0, at_high = 0, undecided = 0;
    if (mask.kind == MaskKind::Dense) return kept;
    if (mask.kind == MaskKind::Noted) {
        for (int j = 0; j < V; ++j) {
            const uint64_t word = mask.notes[(offset + j) / 64];
            kept &= ~(static_cast<uint32_t>(~word >> (offset + j) % 64 & 1) << j);
        }
        return kept;
    }
    if (mask.kind == MaskKind::Band) {
        const bool low_open = !mask.keeps_all_ties(mask.low_positions);
        const bool high_open = !mask.keeps_all_ties(mask.high_positions);
        kept = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const uint64_t key = magnitude_key<Working>(delta[j]);
            kept |= static_cast<uint32_t>(key >= mask.low && key <= mask.high) << j;
            at_low |= static_cast<uint32_t>(key == mask.low && low_open) << j;
            at_high |= static_cast<uint32_t>(key == mask.high && high_open) << j;
        }
        undecided = kept & (at_low | at_high);
    } else {
        undecided = kept;
    }
    // One after the other, and only those that must be looked at: drawing is dear, and unrolled it would be long code.
    const bool by_draw = mask.kind != MaskKind::Band || mask.by_draw;
    PhiloxWords block{};
    uint64_t number = ~0ull;  // of the block
#pragma unroll 1
    for (uint32_t rest = undecided; rest != 0; rest &= rest - 1) {
        const int j = __ffs(static_cast<int>(rest)) - 1;
        const uint64_t place = index + j;
        if (by_draw && place / DRAW_BLOCK != number) {
            number = place / DRAW_BLOCK;
            block = top_bytes(mask.random_key, place);
        }
        const auto stays = [&](const Range& positions) {
            if (!by_draw) return inside(positions, place);
            return is_drawn_below(draws_below(positions), top_byte(block, place), mask.random_key, place);
        };
        bool keep = true;
        if (mask.kind == MaskKind::Ranked) {
            keep = is_drawn_below(mask.thresholds[offset + j], top_byte(block, place), mask.random_key, place);
        } else if (mask.kind == MaskKind::Draw) {
            keep = stays(mask.low_positions);
        } else {
            keep = (!(at_low >> j & 1) || stays(mask.low_positions)) &&
                   (!(at_high >> j & 1) || stays(mask.high_positions));
        }
        kept &= ~(static_cast<uint32_t>(!keep) << j);
    }
    return kept;
}

__device__ inline Mask resolved(const Mask& mask) { return mask.solved ? *mask.solved : mask; }

}  // namespace merge_engine
