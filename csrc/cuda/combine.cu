// Linear combinations of whole models. See docs/arithmetic.md, step 12.
#include <cmath>

#include "elements.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned THREADS = 256;

struct Term {
    Array array;
    double coefficient;
};

struct Job {
    Array output;
    size_t inputs;
    bool divides, fused;
    double divisor;
    uint64_t* non_finite;
};

template <DType Working, int V>
__global__ void __launch_bounds__(THREADS, 1) combine_kernel(const Job job, const List<Term> terms, uint64_t first, uint64_t last) {
    using Real = RealOf<Working>;
    const auto count = [&](size_t slot, int found) {
        auto* counters = reinterpret_cast<unsigned long long*>(job.non_finite);
        if (found) atomicAdd(counters + slot, static_cast<unsigned long long>(found));
    };
    const uint64_t stride = uint64_t{gridDim.x} * blockDim.x * V;
    for (uint64_t at = first + (uint64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V; at < last; at += stride) {
        Real sum[V];
        // -0 is what a sum starts from: adding it changes nothing, the sign of a zero included.
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] = job.fused ? Real{0} : -Real{0};
        for (size_t i = 0; i < job.inputs; ++i) {
            const auto x = load_pack<Working, V>(terms[i].array, at);
            const Real c = static_cast<Real>(terms[i].coefficient);
            count(i, non_finite_in(x));
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const Real value = x.template value<Real>(j);
                sum[j] = job.fused ? std::fma(value, c, sum[j]) : sum[j] + c * value;
            }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (job.divides) sum[j] /= static_cast<Real>(job.divisor);
            if (job.fused) sum[j] = RoundedTo<Working>::round(sum[j]);
        }
        count(job.inputs, store_values<Working, V>(job.output, at, sum));
    }
}

template <DType Working, int V>
void combine_range(const Queue& queue, const Job& job, const List<Term>& terms, uint64_t first, uint64_t last) {
    constexpr unsigned BLOCKS_PER_PROCESSOR = 8;
    const unsigned blocks = blocks_for(last - first, uint64_t{THREADS} * V, BLOCKS_PER_PROCESSOR, queue.device);
    launch(combine_kernel<Working, V>, blocks, THREADS, 0, queue, job, terms, first, last);
}

}  // namespace

void combine(const Queue& queue, const Combine& op, uint64_t count, uint64_t* non_finite) {
    const OnDevice on(queue.device);
    const Job job{op.output, op.inputs.size(), op.divides, op.fused, op.divisor, non_finite};
    std::vector<Term> terms;
    bool vectors = fits_vectors(op.output, op.working);
    for (size_t i = 0; i < op.inputs.size(); ++i) {
        terms.push_back({op.inputs[i], op.coefficients[i]});
        vectors &= fits_vectors(op.inputs[i], op.working);
    }
    const Listed<Term> listed(queue, terms);
    with_dtype(op.working, [&](auto dtype) {
        constexpr int V = VECTOR<dtype()>;
        const uint64_t whole = vectors ? count / V * V : 0;
        combine_range<dtype(), V>(queue, job, listed.list, 0, whole);
        combine_range<dtype(), 1>(queue, job, listed.list, whole, count);
    });
}

}  // namespace merge_engine
