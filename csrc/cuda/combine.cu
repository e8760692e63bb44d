// Linear combinations of whole models and of task vectors. See docs/arithmetic.md, step 12.
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

// Elements [first, last) of a chunk, and the place of its terms in the list of all. With `on_base` the first of them is
// the base.
struct Job {
    Array output;
    size_t first_term, inputs;
    bool divides, fused, rounded, stepwise, on_base;
    double divisor;
    Line line;
    const double* of_lines;
    uint64_t* non_finite;
    uint64_t start, first, last;
    Blocks blocks;
};

// Where the coefficients are of the lines of neighbouring elements.
class LineWalk {
  public:
    __device__ LineWalk(const Job& job, uint64_t at) : job_(job), along_first_(job.line.along_first()) {
        if (along_first_) {
            line_ = (job.start + at) % job.line.stride;
        } else {
            inside_ = (job.start + at) % job.line.length;
            line_ = (job.start + at) / job.line.length - job.start / job.line.length;
        }
    }
    __device__ double coefficient(size_t term) const { return __ldg(job_.of_lines + line_ * terms() + term); }
    __device__ void step() {
        if (along_first_) {
            if (++line_ == job_.line.stride) line_ = 0;
        } else if (++inside_ == job_.line.length) {
            inside_ = 0, ++line_;
        }
    }

  private:
    __device__ size_t terms() const { return job_.inputs - (job_.on_base ? 1 : 0); }

    const Job& job_;
    const bool along_first_;
    uint64_t line_, inside_ = 0;
};

__device__ inline void count_non_finite(const Job& job, size_t slot, int found) {
    auto* counters = reinterpret_cast<unsigned long long*>(job.non_finite);
    if (found) atomicAdd(counters + slot, static_cast<unsigned long long>(found));
}

// The elements [at, at + V). With `Lined` each line has coefficients of its own.
template <DType Working, int V, bool Lined>
__device__ void combine_pack(const Job& job, const List<Term>& terms, uint64_t at) {
    using Real = RealOf<Working>;
    Real sum[V], base[V];
    // -0 is what a sum starts from: adding it changes nothing, the sign of a zero included.
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = job.fused ? Real{0} : -Real{0};
    for (size_t i = 0; i < job.inputs; ++i) {
        const Term& term = terms[job.first_term + i];
        const auto x = load_pack<Working, V>(term.array, at);
        count_non_finite(job, i, non_finite_in(x));
        if (job.on_base && i == 0) {
#pragma unroll
            for (int j = 0; j < V; ++j) base[j] = x.template value<Real>(j);
            continue;
        }
        Real coefficient[V];
        if constexpr (Lined) {
            LineWalk walk(job, at);
#pragma unroll
            for (int j = 0; j < V; ++j, walk.step()) {
                coefficient[j] = static_cast<Real>(walk.coefficient(i - (job.on_base ? 1 : 0)));
            }
        } else {
#pragma unroll
            for (int j = 0; j < V; ++j) coefficient[j] = static_cast<Real>(term.coefficient);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            Real value = x.template value<Real>(j);
            if (job.on_base) value = value - base[j];
            if (job.stepwise) {
                const Real part = RoundedTo<Working>::round(coefficient[j] * RoundedTo<Working>::round(value));
                sum[j] = RoundedTo<Working>::round(sum[j] + part);
            } else {
                sum[j] = job.fused ? std::fma(value, coefficient[j], sum[j]) : sum[j] + coefficient[j] * value;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
        if (job.divides) sum[j] /= static_cast<Real>(job.divisor);
        if (job.stepwise) sum[j] = RoundedTo<Working>::round(sum[j]);
        if (job.on_base) sum[j] = base[j] + sum[j];
        if (job.fused || job.rounded || job.stepwise) sum[j] = RoundedTo<Working>::round(sum[j]);
    }
    count_non_finite(job, job.inputs, store_values<Working, V>(job.output, at, sum));
}

// Few instructions, for what is rare.
template <DType Working>
__device__ __attribute__((noinline)) void combine_octet(const Job& job, const List<Term>& terms, uint64_t at) {
#pragma unroll 1
    for (int j = 0; j < 8; ++j) combine_pack<Working, 1, false>(job, terms, at + j);
}

template <DType Working, int V, bool Lined>
__global__ void __launch_bounds__(THREADS, 1) combine_kernel(const List<Job> jobs, size_t n, const List<Term> terms) {
    const Job& job = job_of_block(jobs, n, shared_memory<Job>());
    const uint64_t stride = uint64_t{job.blocks.count} * blockDim.x * V;
    const uint64_t thread = uint64_t{blockIdx.x - job.blocks.first} * blockDim.x + threadIdx.x;
    for (uint64_t at = job.first + thread * V; at < job.last; at += stride) combine_pack<Working, V, Lined>(job, terms, at);
}

// Up to N inputs of 16 bits, all of which are loaded before the first is used. With `OnBase` the first is the base.
template <DType Working, bool OnBase, int N>
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
            const float base_low = H::low(x[0].word[p]), base_high = H::high(x[0].word[p]);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (i >= inputs) break;
                if (OnBase && i == 0) continue;
                float more_low = H::low(x[i].word[p]), more_high = H::high(x[i].word[p]);
                if (OnBase) more_low = more_low - base_low, more_high = more_high - base_high;
                if (fused) {
                    low = __fmaf_rn(more_low, coefficient[i], low);
                    high = __fmaf_rn(more_high, coefficient[i], high);
                } else {
                    const float part_low = coefficient[i] * more_low, part_high = coefficient[i] * more_high;
                    constexpr int FIRST = OnBase ? 1 : 0;
                    const bool first = i == FIRST;
                    low = first ? part_low : low + part_low;
                    high = first ? part_high : high + part_high;
                }
            }
            if (divides) {
                least = min(least, min(order_of_dividend(low), order_of_dividend(high)));
                low = low == 0 ? low : quotient(low, divisor);  // the sign of a zero stays
                high = high == 0 ? high : quotient(high, divisor);
            }
            if (OnBase) low = base_low + low, high = base_high + high;
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
    const auto kernel = job.on_base ? fast_combine_kernel<Working, true, N> : fast_combine_kernel<Working, false, N>;
    launches.add(kernel, job, blocks_for(last, uint64_t{THREADS} * 8, BLOCKS_PER_PROCESSOR, device), 0);
}

template <DType Working, int V>
void add_range(CombineLaunches& launches, Job job, uint64_t first, uint64_t last, int device) {
    constexpr unsigned BLOCKS_PER_PROCESSOR = 32;
    job.first = first, job.last = last;
    const unsigned blocks = blocks_for(last - first, uint64_t{THREADS} * V, BLOCKS_PER_PROCESSOR, device);
    const auto kernel = job.line.whole_tensor() ? combine_kernel<Working, V, false> : combine_kernel<Working, V, true>;
    launches.add(kernel, job, blocks, 0);
}

template <DType Working>
void add_chunk(CombineLaunches& launches, const Job& job, uint64_t count, bool vectors, int device) {
    constexpr int V = VECTOR<Working>;
    const uint64_t whole = vectors ? count / V * V : 0;
    bool fast = false;
    if constexpr (V == 8) {
        fast = job.inputs <= MOST_FAST && job.line.whole_tensor() && !job.stepwise;
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
        const Job job{op.output,  terms.size(), op.inputs.size(), op.divides,      op.fused,   op.rounded, op.stepwise,
                      op.on_base, op.divisor,   op.line,          op.of_lines,     call.non_finite, call.start, 0, 0, {}};
        bool vectors = fits_vectors(op.output, op.working);
        for (size_t i = 0; i < op.inputs.size(); ++i) {
            const bool is_term = op.line.whole_tensor() && (i > 0 || !op.on_base);
            terms.push_back({op.inputs[i], is_term ? op.coefficients[i - (op.on_base ? 1 : 0)] : 0});
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
