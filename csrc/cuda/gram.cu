// Inner products of inputs and of task vectors, of whole tensors and of each line, in a fixed order (sums.cuh). Products
// of numbers of up to 32 bits are exact in double.
#include "jobs.cuh"
#include "primitives.h"
#include "sums.cuh"

namespace merge_engine {
namespace {

// The inner products of a chunk, and the place of its inputs in the list of all. With `of_deltas` the first of them is
// the base. A block of sums has `block` elements of up to `most` lines.
struct Job {
    size_t first_input, vectors;
    bool of_deltas;
    Line line;
    uint64_t block, most, start, count;
    double* sums;
    Blocks blocks;
};

// Element `at` of a vector of a chunk.
template <DType Working>
__device__ double value_of(const Job& job, const List<Array>& inputs, size_t vector, uint64_t at) {
    using Real = RealOf<Working>;
    const auto value = [&](size_t input) {
        return load_pack<Working, 1>(inputs[job.first_input + input], at).template value<Real>(0);
    };
    if (!job.of_deltas) return static_cast<double>(value(vector));
    const Real delta = value(1 + vector) - value(0);
    return static_cast<double>(delta);
}

// Blocks of SUM_BLOCK elements, each cut where lines end. A thread is a lane.
template <DType Working>
__global__ void __launch_bounds__(LANES, 1) sum_runs(const List<Job> jobs, size_t n, const List<Array> inputs) {
    const Job& job = job_of_block(jobs, n, shared_memory<Job>());
    double* memory = behind<double>(shared_memory<Job>());
    const uint64_t sum_blocks = (job.count + SUM_BLOCK - 1) / SUM_BLOCK;
    const size_t pairs = job.vectors * (job.vectors + 1) / 2;
    for (uint64_t block = blockIdx.x - job.blocks.first; block < sum_blocks; block += job.blocks.count) {
        const uint64_t end = min(job.count, (block + 1) * SUM_BLOCK);
        double* sums = job.sums + block * job.most * pairs;
        for (uint64_t first = block * SUM_BLOCK; first < end;) {
            uint64_t last = end;
            if (!job.line.whole_tensor()) {
                last = min(end, first + job.line.length - (job.start + first) % job.line.length);
            }
            for (size_t i = 0; i < job.vectors; ++i) {
                for (size_t k = i; k < job.vectors; ++k) {
                    double lane = 0;
                    for (uint64_t at = first + threadIdx.x; at < last; at += LANES) {
                        lane += value_of<Working>(job, inputs, i, at) * value_of<Working>(job, inputs, k, at);
                    }
                    memory[threadIdx.x] = lane;
                    const double sum = sum_lanes(memory, threadIdx.x, LANES);
                    if (threadIdx.x == 0) *sums = sum;
                    ++sums;
                }
            }
            first = last;
        }
    }
}

// Blocks of whole rows. A thread is a line along the first dimension.
template <DType Working>
__global__ void __launch_bounds__(LANES, 1) sum_columns(const List<Job> jobs, size_t n, const List<Array> inputs) {
    const Job& job = job_of_block(jobs, n, shared_memory<Job>());
    const uint64_t block = job.block, stride = job.line.stride;
    const uint64_t parts = (job.count + block - 1) / block * stride;
    const size_t pairs = job.vectors * (job.vectors + 1) / 2;
    const uint64_t threads = uint64_t{job.blocks.count} * blockDim.x;
    for (uint64_t part = uint64_t{blockIdx.x - job.blocks.first} * blockDim.x + threadIdx.x; part < parts; part += threads) {
        const uint64_t first = part / stride * block, last = min(job.count, first + block);
        double* sums = job.sums + part * pairs;
        for (size_t i = 0; i < job.vectors; ++i) {
            for (size_t k = i; k < job.vectors; ++k) {
                double sum = 0;
                for (uint64_t at = first + part % stride; at < last; at += stride) {
                    sum += value_of<Working>(job, inputs, i, at) * value_of<Working>(job, inputs, k, at);
                }
                *sums++ = sum;
            }
        }
    }
}

constexpr unsigned BLOCKS_PER_PROCESSOR = 16;

}  // namespace

void gram(const Queue& queue, const std::vector<GramCall>& calls) {
    const OnDevice on(queue.device);
    Launches<Job, List<Array>> launches;
    std::vector<Array> inputs;
    for (const GramCall& call : calls) {
        const size_t vectors = call.inputs.size() - (call.of_deltas ? 1 : 0);
        const Job job{inputs.size(),  vectors,    call.of_deltas, call.line, sum_block(call.line), lines_of_block(call.line),
                      call.start,     call.count, call.sums,      {}};
        inputs.insert(inputs.end(), call.inputs.begin(), call.inputs.end());
        with_dtype(call.working, [&](auto dtype) {
            if (call.line.along_first()) {
                const uint64_t parts = (call.count + job.block - 1) / job.block * call.line.stride;
                const unsigned blocks = blocks_for(parts, LANES, BLOCKS_PER_PROCESSOR, queue.device);
                launches.add(sum_columns<dtype()>, job, blocks, 0);
            } else {
                const unsigned blocks = blocks_for(call.count, SUM_BLOCK, BLOCKS_PER_PROCESSOR, queue.device);
                launches.add(sum_runs<dtype()>, job, blocks, LANES * sizeof(double));
            }
        });
    }
    const Listed<Array> listed(queue, inputs);
    launches.launch(queue, LANES, listed.list);
}

}  // namespace merge_engine
