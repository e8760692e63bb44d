// Linear combinations of whole models. See docs/arithmetic.md, step 12.
#include <cmath>

#include "elements.cuh"
#include "jobs.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned THREADS = 256;

struct Term {
    Array array;
    double coefficient;
};

// Elements [first, last) of a chunk, and the place of its terms in the list of all.
struct Job {
    Array output;
    size_t first_term, inputs;
    bool divides, fused;
    double divisor;
    uint64_t* non_finite;
    uint64_t first, last;
    Blocks blocks;
};

template <DType Working, int V>
__global__ void __launch_bounds__(THREADS, 1) combine_kernel(const List<Job> jobs, size_t n, const List<Term> terms) {
    using Real = RealOf<Working>;
    const Job& job = job_of_block(jobs, n, shared_memory<Job>());
    const auto count = [&](size_t slot, int found) {
        auto* counters = reinterpret_cast<unsigned long long*>(job.non_finite);
        if (found) atomicAdd(counters + slot, static_cast<unsigned long long>(found));
    };
    const uint64_t stride = uint64_t{job.blocks.count} * blockDim.x * V;
    const uint64_t thread = uint64_t{blockIdx.x - job.blocks.first} * blockDim.x + threadIdx.x;
    for (uint64_t at = job.first + thread * V; at < job.last; at += stride) {
        Real sum[V];
        // -0 is what a sum starts from: adding it changes nothing, the sign of a zero included.
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] = job.fused ? Real{0} : -Real{0};
        for (size_t i = 0; i < job.inputs; ++i) {
            const Term& term = terms[job.first_term + i];
            const auto x = load_pack<Working, V>(term.array, at);
            const Real c = static_cast<Real>(term.coefficient);
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
void add_range(Launches<Job, List<Term>>& launches, Job job, uint64_t first, uint64_t last, int device) {
    constexpr unsigned BLOCKS_PER_PROCESSOR = 8;
    job.first = first, job.last = last;
    const unsigned blocks = blocks_for(last - first, uint64_t{THREADS} * V, BLOCKS_PER_PROCESSOR, device);
    launches.add(combine_kernel<Working, V>, job, blocks, 0);
}

}  // namespace

void combine(const Queue& queue, const std::vector<CombineCall>& calls) {
    const OnDevice on(queue.device);
    Launches<Job, List<Term>> launches;
    std::vector<Term> terms;
    for (const CombineCall& call : calls) {
        const Combine& op = call.operation;
        const Job job{op.output,  terms.size(),    op.inputs.size(), op.divides, op.fused,
                      op.divisor, call.non_finite, 0,                0,          {}};
        bool vectors = fits_vectors(op.output, op.working);
        for (size_t i = 0; i < op.inputs.size(); ++i) {
            terms.push_back({op.inputs[i], op.coefficients[i]});
            vectors &= fits_vectors(op.inputs[i], op.working);
        }
        with_dtype(op.working, [&](auto dtype) {
            constexpr int V = VECTOR<dtype()>;
            const uint64_t whole = vectors ? call.count / V * V : 0;
            add_range<dtype(), V>(launches, job, 0, whole, queue.device);
            add_range<dtype(), 1>(launches, job, whole, call.count, queue.device);
        });
    }
    const Listed<Term> listed(queue, terms);
    launches.launch(queue, THREADS, listed.list);
}

}  // namespace merge_engine
