// Element by element: how near a model is to the base, and how many models changed an element.
#include "elements.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned THREADS = 256, BLOCKS_PER_PROCESSOR = 32;

__device__ inline void add(uint64_t* counter, uint64_t found) {
    if (found) atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(found));
}

// Step 20 of docs/arithmetic.md.
template <DType Working, bool Stored, class Real>
__device__ Real swapped(Real base, Real model, Real threshold) {
    using Rounding = std::conditional_t<Stored, RoundedTo<Working>, Unrounded>;
    const auto rn = [](Real value) { return Rounding::round(value); };
    const Real difference = model - base, distance = rn(difference < 0 ? -difference : difference);
    const Real nearest = rn(static_cast<Real>(NEAREST)), divisor = distance < nearest ? nearest : distance;
    const Real quotient = Stored ? rn(rn(Real(1) / divisor) * threshold) : threshold / divisor;
    const Real weight = quotient > 1 ? Real(1) : quotient;
    const Real mixed = rn(rn(weight * model) + rn(rn(Real(1) - weight) * base));
    return model == base ? base : mixed;
}

// Elements [first, last) in whole packs.
template <DType Working, bool Stored, int V>
__global__ void __launch_bounds__(THREADS, 1)
    nearswap_kernel(const Nearswap op, uint64_t first, uint64_t last, uint64_t* non_finite) {
    using Real = RealOf<Working>;
    const uint64_t stride = uint64_t{gridDim.x} * blockDim.x * V;
    for (uint64_t at = first + (uint64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V; at < last; at += stride) {
        const auto base = load_pack<Working, V>(op.base, at), model = load_pack<Working, V>(op.model, at);
        Real merged[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            merged[j] = swapped<Working, Stored>(base.template value<Real>(j), model.template value<Real>(j),
                                                 static_cast<Real>(op.threshold));
        }
        add(non_finite, static_cast<uint64_t>(non_finite_in(base)));
        add(non_finite + 1, static_cast<uint64_t>(non_finite_in(model)));
        add(non_finite + 2, static_cast<uint64_t>(store_values<Working, V>(op.output, at, merged)));
    }
}

template <DType Working, bool Stored, int V>
void launch_nearswap(const Queue& queue, const NearswapCall& call, uint64_t first, uint64_t last) {
    launch(nearswap_kernel<Working, Stored, V>,
           blocks_for(last - first, uint64_t{THREADS} * V, BLOCKS_PER_PROCESSOR, queue.device), THREADS, 0, queue,
           call.operation, first, last, call.non_finite);
}

template <DType Working, bool Stored>
void launch_nearswap(const Queue& queue, const NearswapCall& call) {
    constexpr int V = VECTOR<Working>;
    const Nearswap& op = call.operation;
    const bool vectors =
        fits_vectors(op.base, Working) && fits_vectors(op.model, Working) && fits_vectors(op.output, Working);
    const uint64_t whole = vectors ? call.count / V * V : 0;
    launch_nearswap<Working, Stored, V>(queue, call, 0, whole);
    launch_nearswap<Working, Stored, 1>(queue, call, whole, call.count);
}

struct Model {
    Array array;
    Mask mask;
};

// Counts in shared memory, two of each model. Warps stay whole, because they add up together.
template <DType Working>
__global__ void __launch_bounds__(THREADS, 1)
    overlap_kernel(const Array base, const List<Model> models, size_t n, uint64_t start, uint64_t count, uint64_t* counts) {
    using Real = RealOf<Working>;
    uint32_t* own = shared_memory<uint32_t>();
    for (size_t i = threadIdx.x; i < 2 * n; i += blockDim.x) own[i] = 0;
    __syncthreads();
    const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
    for (uint64_t block = uint64_t{blockIdx.x} * blockDim.x; block < count; block += stride) {
        const uint64_t at = block + threadIdx.x;
        const auto keeps = [&](size_t i) -> uint32_t {
            if (at >= count) return 0;
            const Real b = load_pack<Working, 1>(base, at).template value<Real>(0);
            const Real delta[1] = {load_pack<Working, 1>(models[i].array, at).template value<Real>(0) - b};
            return kept_bits<Working>(models[i].mask, delta, start + at, at);
        };
        uint32_t keeping = 0;
        for (size_t i = 0; i < n; ++i) keeping += keeps(i);
        for (size_t i = 0; i < n; ++i) {
            const uint32_t kept = keeps(i), shared = keeping > 1 ? kept : 0;
            const uint32_t packed = __reduce_add_sync(EVERY_LANE, (kept - shared) | shared << 16);
            if (threadIdx.x % WARP != 0 || packed == 0) continue;
            atomicAdd(own + 2 * i, packed & 0xFFFFu);
            atomicAdd(own + 2 * i + 1, packed >> 16);
        }
    }
    __syncthreads();
    for (size_t i = threadIdx.x; i < 2 * n; i += blockDim.x) add(counts + i, own[i]);
}

}  // namespace

void nearswap(const Queue& queue, const std::vector<NearswapCall>& calls) {
    const OnDevice on(queue.device);
    for (const NearswapCall& call : calls) {
        with_dtype(call.operation.working, [&](auto dtype) {
            if (call.operation.storage_rounding) {
                launch_nearswap<dtype(), true>(queue, call);
            } else {
                launch_nearswap<dtype(), false>(queue, call);
            }
        });
    }
}

void overlaps(const Queue& queue, const std::vector<OverlapCall>& calls) {
    const OnDevice on(queue.device);
    for (const OverlapCall& call : calls) {
        std::vector<Model> models;
        for (size_t i = 0; i < call.models.size(); ++i) models.push_back({call.models[i], call.masks[i]});
        const Listed<Model> listed(queue, models);
        with_dtype(call.working, [&](auto dtype) {
            launch(overlap_kernel<dtype()>, blocks_for(call.count, THREADS, BLOCKS_PER_PROCESSOR, queue.device), THREADS,
                   2 * models.size() * sizeof(uint32_t), queue, call.base, listed.list, models.size(), call.start,
                   call.count, call.counts);
        });
    }
}

}  // namespace merge_engine
