// Scores of positions, and what a mask of them keeps. See docs/arithmetic.md, steps 22 to 25.
#include "../exponentials.h"
#include "elements.cuh"
#include "primitives.h"
#include "sums.cuh"

namespace merge_engine {
namespace {

constexpr unsigned THREADS = 256, BLOCKS_PER_PROCESSOR = 32;

template <DType Working>
__device__ RealOf<Working> element(const Array& array, uint64_t at) {
    return load_pack<Working, 1>(array, at).template value<RealOf<Working>>(0);
}

template <DType Working, bool Stored>
__global__ void __launch_bounds__(THREADS, 1)
    variances(const List<Array> inputs, size_t n, uint64_t count, RealOf<Working>* scores) {
    using Real = RealOf<Working>;
    using Wide = std::conditional_t<sizeof(typename Storage<Working>::Bits) == 2, float, double>;
    using Rounding = std::conditional_t<Stored, RoundedTo<Working>, Unrounded>;
    const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
    for (uint64_t at = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < count; at += stride) {
        const Real base = element<Working>(inputs[0], at);
        Wide mean = 0, squares = 0;
        for (size_t i = 1; i < n; ++i) {
            const Wide delta = static_cast<Wide>(Rounding::round(element<Working>(inputs[i], at) - base));
            const Wide distance = delta - mean;
            mean += distance / static_cast<Wide>(i);
            squares += distance * (delta - mean);
        }
        const Real found = Rounding::round(static_cast<Real>(squares / static_cast<Wide>(n - 1)));
        scores[at] = found != found ? Real(0) : found;
    }
}

// The value of each element of a line of `length`, added up as a tensor of its own by all threads of a block.
template <class Value>
__device__ double sum_line(double* memory, uint64_t length, Value&& value) {
    double total = 0;
    for (uint64_t block = 0; block < length; block += SUM_BLOCK) {
        double lane = 0;
        for (uint64_t j = block + threadIdx.x; j < min(length, block + SUM_BLOCK); j += SUM_LANES) lane += value(j);
        memory[threadIdx.x] = lane;
        total += sum_lanes(memory, threadIdx.x, SUM_LANES);
    }
    return total;
}

// The softmax of one line, softened.
template <DType Working>
class Softmax {
  public:
    __device__ Softmax(const Array& array, uint64_t first, uint64_t length, double* memory)
        : array_(array), first_(first) {
        double largest = -HUGE_VAL;
        for (uint64_t j = threadIdx.x; j < length; j += SUM_LANES) largest = larger(value(j), largest);
        memory[threadIdx.x] = largest;
        __syncthreads();
        for (unsigned lane = 0; lane < SUM_LANES; ++lane) largest = larger(memory[lane], largest);
        __syncthreads();
        largest_ = largest;
        total_ = sum_line(memory, length, [&](uint64_t j) { return power(j); });
    }
    __device__ double operator()(uint64_t j) const { return power(j) / total_ + SOFTENED; }

  private:
    static __device__ double larger(double a, double b) { return a > b ? a : b; }
    __device__ double value(uint64_t j) const { return element<Working>(array_, first_ + j); }
    __device__ double power(uint64_t j) const { return exponential(value(j) - largest_); }

    const Array& array_;
    uint64_t first_;
    double largest_, total_;
};

// A block to a line, with a thread for each running sum.
template <DType Working>
__global__ void __launch_bounds__(SUM_LANES, 1)
    importances(const Array base, const Array model, uint64_t length, uint64_t lines, RealOf<Working>* scores) {
    using Real = RealOf<Working>;
    double* memory = shared_memory<double>();
    for (uint64_t line = blockIdx.x; line < lines; line += gridDim.x) {
        const uint64_t first = line * length;
        const Softmax<Working> p(model, first, length, memory), q(base, first, length, memory);
        const double sum = sum_line(memory, length, [&](uint64_t j) {
            const double of_model = p(j);
            return of_model * logarithm(of_model / q(j));
        });
        const Real divergence = static_cast<Real>(sum > 0 ? sum : 0.0);
        for (uint64_t j = threadIdx.x; j < length; j += SUM_LANES) {
            const Real delta = element<Working>(model, first + j) - element<Working>(base, first + j);
            const Real found = (delta < 0 ? -delta : delta) * divergence;
            scores[first + j] = found != found ? Real(0) : found;
        }
    }
}

// A lane of a warp to an element, a word of notes to a warp.
template <DType Real>
__global__ void __launch_bounds__(THREADS, 1)
    note_kernel(const Array scores, const Mask given, uint64_t start, uint64_t count, uint32_t* notes) {
    const Mask mask = resolved(given);
    const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
    for (uint64_t block = uint64_t{blockIdx.x} * blockDim.x; block < count; block += stride) {
        const uint64_t at = block + threadIdx.x;
        uint32_t kept = 0;
        if (at < count) {
            const RealOf<Real> score[1] = {element<Real>(scores, at)};
            kept = kept_bits<Real>(mask, score, start + at, at);
        }
        const uint32_t word = __reduce_add_sync(EVERY_LANE, kept << threadIdx.x % WARP);
        if (threadIdx.x % WARP == 0 && at < count) notes[at / WARP] = word;
    }
}

}  // namespace

void scores(const Queue& queue, const std::vector<ScoreCall>& calls) {
    const OnDevice on(queue.device);
    for (const ScoreCall& call : calls) {
        if (call.count == 0) continue;
        const Listed<Array> inputs(queue, call.inputs);
        with_dtype(call.working, [&](auto dtype) {
            constexpr DType W = dtype();
            auto* found = static_cast<RealOf<W>*>(call.scores);
            if (call.score.kind == ScoreKind::Divergence) {
                const uint64_t lines = call.count / call.score.length;
                const unsigned blocks = blocks_for(lines, 1, BLOCKS_PER_PROCESSOR, queue.device);
                return launch(importances<W>, blocks, SUM_LANES, SUM_LANES * sizeof(double), queue, call.inputs[0],
                              call.inputs[1], call.score.length, lines, found);
            }
            const auto kernel = call.score.storage_rounding ? variances<W, true> : variances<W, false>;
            launch(kernel, blocks_for(call.count, THREADS, BLOCKS_PER_PROCESSOR, queue.device), THREADS, 0, queue,
                   inputs.list, call.inputs.size(), call.count, found);
        });
    }
}

void note_scores(const Queue& queue, const std::vector<NoteCall>& calls) {
    const OnDevice on(queue.device);
    for (const NoteCall& call : calls) {
        const auto kernel = call.scores.dtype == DType::F64 ? note_kernel<DType::F64> : note_kernel<DType::F32>;
        launch(kernel, blocks_for(call.count, THREADS, BLOCKS_PER_PROCESSOR, queue.device), THREADS, 0, queue,
               call.scores, call.mask, call.start, call.count, call.notes);
    }
}

}  // namespace merge_engine
