// Every formula of the shared headers, used in device code: it must compile for every architecture.
#include "../csrc/numeric.h"
#include "../csrc/philox.h"

using namespace merge_engine;

template <DType Working, class Real>
__global__ void merge_one(const typename Storage<Working>::Bits* base, const typename Storage<Working>::Bits* model,
                          typename Storage<Working>::Bits* out, uint64_t* key, uint64_t random_key, double slack) {
    const uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x;
    const Real b = Storage<Working>::template load<Real>(base[i]);
    const Real delta = RoundedTo<Working>::round(Storage<Working>::template load<Real>(model[i]) - b);
    const bool kept = magnitude_key<Working>(delta) >= relaxed_key<Working, Real>(key[0], slack) &&
                      philox_draw(random_key, i) < 0x80000000u && is_finite(delta);
    out[i] = Storage<Working>::store(Unrounded::round(b + (kept ? delta : Real{0})));
}

template __global__ void merge_one<DType::BF16, float>(const uint16_t*, const uint16_t*, uint16_t*, uint64_t*,
                                                       uint64_t, double);
template __global__ void merge_one<DType::F16, float>(const uint16_t*, const uint16_t*, uint16_t*, uint64_t*,
                                                      uint64_t, double);
template __global__ void merge_one<DType::F32, float>(const uint32_t*, const uint32_t*, uint32_t*, uint64_t*,
                                                      uint64_t, double);
template __global__ void merge_one<DType::F64, double>(const uint64_t*, const uint64_t*, uint64_t*, uint64_t*,
                                                       uint64_t, double);
