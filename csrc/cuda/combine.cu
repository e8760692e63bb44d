// Linear combinations of whole models. See docs/arithmetic.md, step 12.
#include <cmath>

#include "division.cuh"
#include "halves.cuh"
#include "jobs.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned THREADS = 256;
constexpr size_t MOST_FAST = 8;

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

__device__ inline void count_non_finite(const Job& job, size_t slot, int found) {
    auto* counters = reinterpret_cast<unsigned long long*>(job.non_finite);
    if (found) atomicAdd(counters + slot, static_cast<unsigned long long>(found));
}

// The elements [at, at + V).
template <DType Working, int V>
__device__ void combine_pack(const Job& job, const List<Term>& terms, uint64_t at) {
    using Real = RealOf<Working>;
    Real sum[V];
    // -0 is what a sum starts from: adding it changes nothing, the sign of a zero included.
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = job.fused ? Real{0} : -Real{0};
    for (size_t i = 0; i < job.inputs; ++i) {
        const Term& term = terms[job.first_term + i];
        const auto x = load_pack<Working, V>(term.array, at);
        const Real c = static_cast<Real>(term.coefficient);
        count_non_finite(job, i, non_finite_in(x));
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
    count_non_finite(job, job.inputs, store_values<Working, V>(job.output, at, sum));
}

// Few instructions, for what is rare.
template <DType Working>
__device__ __attribute__((noinline)) void combine_octet(const Job& job, const List<Term>& terms, uint64_t at) {
#pragma unroll 1
    for (int j = 0; j < 8; ++j) combine_pack<Working, 1>(job, terms, at + j);
}

template <DType Working, int V>
__global__ void __launch_bounds__(THREADS, 1) combine_kernel(const List<Job> jobs, size_t n, const List<Term> terms) {
    const Job& job = job_of_block(jobs, n, shared_memory<Job>());
    const uint64_t stride = uint64_t{job.blocks.count} * blockDim.x * V;
    const uint64_t thread = uint64_t{blockIdx.x - job.blocks.first} * blockDim.x + threadIdx.x;
    for (uint64_t at = job.first + thread * V; at < job.last; at += stride) combine_pack<Working, V>(job, terms, at);
}

// Up to N inputs of 16 bits, all of which are loaded before the first is used.
template <DType Working, int N>
__global__ void __launch_bounds__(THREADS, N <= 4 ? 4 : 2)
    fast_combine_kernel(const List<Job> jobs, size_t n, const __grid_constant__ List<Term> terms) {  // not copied
    using H = Halves<Working>;
    const Job& job = job_of_block(jobs, n, shared_memory<Job>());
    const int inputs = static_cast<int>(job.inputs);
    const void* data[N];
    float coefficient[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const Term& term = terms[job.first_term + static_cast<size_t>(min(i, inputs - 1))];
        data[i] = term.array.data;
        coefficient[i] = static_cast<float>(term.coefficient);
    }
    const bool fused = job.fused;
    const float value = job.divides ? static_cast<float>(job.divisor) : 1.0f;
    const Divisor divisor = Divisor::of(value);
    const bool divides = job.divides, well = !divides || divides_well(value);
    const uint32_t octets = static_cast<uint32_t>(job.last / 8), stride = job.blocks.count * blockDim.x;
    for (uint32_t octet = (blockIdx.x - job.blocks.first) * blockDim.x + threadIdx.x; octet < octets; octet += stride) {
        Octet x[N] = {};
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i < inputs) x[i] = Octet::load(data[i], octet);
        }
        Octet combined[1];
        uint32_t least = ~0u;
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            float low = 0, high = 0;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (i >= inputs) break;
                const float more_low = H::low(x[i].word[p]), more_high = H::high(x[i].word[p]);
                if (fused) {
                    low = __fmaf_rn(more_low, coefficient[i], low);
                    high = __fmaf_rn(more_high, coefficient[i], high);
                } else {
                    const float part_low = coefficient[i] * more_low, part_high = coefficient[i] * more_high;
                    low = i == 0 ? part_low : low + part_low;
                    high = i == 0 ? part_high : high + part_high;
                }
            }
            if (divides) {
                least = min(least, min(order_of_dividend(low), order_of_dividend(high)));
                low = low == 0 ? low : quotient(low, divisor);  // the sign of a zero stays
                high = high == 0 ? high : quotient(high, divisor);
            }
            combined[0].word[p] = H::stored(low, high);
        }
        const bool in_range = well && least >= order_of_dividend(SMALLEST_DIVIDEND);
        if (in_range && all_finite<Working>(x) && all_finite<Working>(combined)) {
            combined[0].store(job.output.data, octet);
        } else {
            combine_octet<Working>(job, terms, uint64_t{octet} * 8);
        }
    }
}

using CombineLaunches = Launches<Job, List<Term>>;

template <DType Working, int N>
void add_fast_range(CombineLaunches& launches, Job job, uint64_t last, int device) {
    if constexpr (N > 2) {
        if (job.inputs <= N / 2) return add_fast_range<Working, N / 2>(launches, job, last, device);
    }
    constexpr unsigned BLOCKS_PER_PROCESSOR = 64;  // many waves of blocks: the next one loads while this one computes
    job.first = 0, job.last = last;
    launches.add(fast_combine_kernel<Working, N>, job, blocks_for(last, uint64_t{THREADS} * 8, BLOCKS_PER_PROCESSOR, device), 0);
}

template <DType Working, int V>
void add_range(CombineLaunches& launches, Job job, uint64_t first, uint64_t last, int device) {
    constexpr unsigned BLOCKS_PER_PROCESSOR = 32;
    job.first = first, job.last = last;
    const unsigned blocks = blocks_for(last - first, uint64_t{THREADS} * V, BLOCKS_PER_PROCESSOR, device);
    launches.add(combine_kernel<Working, V>, job, blocks, 0);
}

template <DType Working>
void add_chunk(CombineLaunches& launches, const Job& job, uint64_t count, bool vectors, int device) {
    constexpr int V = VECTOR<Working>;
    const uint64_t whole = vectors ? count / V * V : 0;
    bool fast = false;
    if constexpr (V == 8) {
        fast = job.inputs <= MOST_FAST;
        if (fast) add_fast_range<Working, MOST_FAST>(launches, job, whole, device);
    }
    if (!fast) add_range<Working, V>(launches, job, 0, whole, device);
    add_range<Working, 1>(launches, job, whole, count, device);
}

}  // namespace

void combine(const Queue& queue, const std::vector<CombineCall>& calls) {
    const OnDevice on(queue.device);
    CombineLaunches launches;
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
            add_chunk<dtype()>(launches, job, call.count, vectors, queue.device);
        });
    }
    const Listed<Term> listed(queue, terms);
    launches.launch(queue, THREADS, listed.list);
}

}  // namespace merge_engine
