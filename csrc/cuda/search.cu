// Keys found by their ranks in one read: a sample tells a window of keys in which a rank lies, then all keys above the
// window and those of every bin inside it are counted, and the counts prove where the rank lies.
//
// What is found is exact whatever the sample says. If a rank lies outside of its window, its column stays open, and a
// histogram of all keys follows. Nothing waits for the host.
#include <cmath>

#include "block_scan.cuh"
#include "halves.cuh"
#include "jobs.cuh"
#include "key_counters.cuh"
#include "search.h"

namespace merge_engine {
namespace {

constexpr unsigned SAMPLING_THREADS = 1024, COUNTING_THREADS = 256, PROVING_THREADS = 256;
static_assert(KeyCounters::KEYS == 1u << FIRST_BITS, "a counter for every bin of the first level");
constexpr uint64_t SAMPLED_SHARE = 16;     // of the elements, at most one in so many
constexpr double DEVIATIONS = 6;
constexpr uint32_t WIDEST = 1024;  // bins of a window
constexpr size_t MOST_COLUMNS = 8;

// Keys [low, high), and how many lie above and in each bin. Zeros are in no window.
struct Window {
    uint32_t low, high;
    uint64_t above;
    uint64_t counts[WIDEST];
};

// A rank sought among the keys of one model.
struct Column {
    Array base, model;
    DType working;
    uint64_t count, rank;
    Window* window;
    Found* found;
    uint32_t* open;
};

// Columns of one base, and their place in the list of all.
struct Job {
    Array base;
    size_t first_column, columns;
    uint64_t count;
    Blocks blocks;
};

// First-level keys of 16 bytes of elements, as sizes of halves (see halves.cuh). An element of 32 bits has a word of its
// own, with the key of a zero beside it.
template <DType Working>
__device__ Octet sizes_of(const Octet& base, const Octet& x) {
    Octet sizes;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        if constexpr (Working == DType::F32) {
            const float delta = bits_of<float>(x.word[p]) - bits_of<float>(base.word[p]);
            sizes.word[p] = bits_of<uint32_t>(delta) >> 16 | TRUTHS;
        } else {
            sizes.word[p] = Halves<Working>::difference(x.word[p], base.word[p]) | TRUTHS;
        }
    }
    return sizes;
}
__device__ Octet sizes_of(DType working, const Octet& base, const Octet& x) {
    switch (working) {
        case DType::BF16: return sizes_of<DType::BF16>(base, x);
        case DType::F16: return sizes_of<DType::F16>(base, x);
        default: return sizes_of<DType::F32>(base, x);
    }
}
__device__ inline uint32_t key_of_half(uint32_t word, int half) { return word >> (16 * half) & 0x7FFFu; }

__host__ __device__ constexpr uint64_t elements_of_octet(DType working) { return working == DType::F32 ? 4 : 8; }

// What is left at the end of an array, with zeros behind it.
__device__ inline Octet partial_octet(const Array& array, uint64_t bytes_before, uint64_t bytes) {
    Octet octet = {};
    for (uint64_t i = 0; i < bytes / 2; ++i) {
        const uint32_t half = __ldg(static_cast<const uint16_t*>(array.data) + bytes_before / 2 + i);
        for (int p = 0; p < PAIRS; ++p) octet.word[p] |= i / 2 == static_cast<uint64_t>(p) ? half << (16 * (i % 2)) : 0;
    }
    return octet;
}

// One block a column.
__global__ void __launch_bounds__(SAMPLING_THREADS, 1) sample(const List<Column> columns) {
    const Column column = columns[blockIdx.x];
    uint64_t* sums = shared_memory<uint64_t>();
    KeyCounters sampled(sums + SAMPLING_THREADS);
    sampled.clear();
    __syncthreads();
    const uint64_t each = elements_of_octet(column.working), octets = column.count / each;
    const uint64_t taken = min(octets / SAMPLED_SHARE + 1, min(octets, KeyCounters::MOST / each)), step = octets / taken;
    for (uint64_t j = threadIdx.x; j < taken; j += blockDim.x) {
        const uint32_t number = static_cast<uint32_t>(j * step);
        const Octet base = Octet::load(column.base.data, number), x = Octet::load(column.model.data, number);
        const Octet sizes = sizes_of(column.working, base, x);
        for (int i = 0; i < (column.working == DType::F32 ? PAIRS : 2 * PAIRS); ++i) {
            const int p = column.working == DType::F32 ? i : i / 2, half = column.working == DType::F32 ? 0 : i % 2;
            uint32_t word = sizes.word[0];
#pragma unroll
            for (int q = 1; q < PAIRS; ++q) word = q == p ? sizes.word[q] : word;
            sampled.count(key_of_half(word, half));
        }
    }
    __syncthreads();
    const auto count_of = [&](uint64_t key) -> uint64_t { return sampled[static_cast<uint32_t>(key)]; };
    const BinRuns runs(count_of, KeyCounters::KEYS, sums);
    Window& window = *column.window;
    const bool exists = column.rank > 0 && column.rank <= column.count;
    if (threadIdx.x == 0) {
        window.above = 0;
        window.low = 1, window.high = exists ? KeyCounters::KEYS : 1;
    }
    for (uint32_t i = threadIdx.x; i < WIDEST; i += blockDim.x) window.counts[i] = 0;
    __syncthreads();
    if (!exists) return;
    const double size = static_cast<double>(taken * each);
    const double share = static_cast<double>(column.rank) / static_cast<double>(column.count);
    const double margin = 2 + DEVIATIONS * sqrt(size * share * (1 - share));
    const auto rank_of = [](double place) { return place > 0 ? static_cast<uint64_t>(ceil(place)) : 0; };
    runs.find(rank_of(size * share - margin),
              [&](uint64_t key, uint64_t, uint64_t) { window.high = static_cast<uint32_t>(key) + 1; });
    runs.find(rank_of(size * share + margin),
              [&](uint64_t key, uint64_t, uint64_t) { window.low = max(static_cast<uint32_t>(key), 1u); });
}

// Counts the keys of up to N columns. A window that is too wide is cut, and then its rank may lie outside.
template <DType Working, int N>
__global__ void __launch_bounds__(COUNTING_THREADS, N <= 4 ? 4 : 2)
    count_windows(const List<Job> jobs, size_t n, const List<Column> list) {
    const Job& job = job_of_block(jobs, n, shared_memory<Job>());
    uint32_t* bins = behind<uint32_t>(shared_memory<Job>());
    struct Edges {
        const void* model;
        uint32_t low, high;  // in both halves
    };
    static __shared__ Edges edges[N];
    static __shared__ uint32_t above_in_block[N];
    const int columns = static_cast<int>(job.columns);
    if (threadIdx.x < job.columns) {
        const Column& column = list[job.first_column + threadIdx.x];
        const uint32_t low = column.window->low, high = max(min(column.window->high, low + WIDEST), low);
        edges[threadIdx.x] = {column.model.data, low * HALVES, high * HALVES};
        above_in_block[threadIdx.x] = 0;
    }
    for (uint32_t i = threadIdx.x; i < job.columns * WIDEST; i += blockDim.x) bins[i] = 0;
    __syncthreads();

    constexpr uint64_t EACH = elements_of_octet(Working);
    const uint32_t whole = static_cast<uint32_t>(job.count / EACH), stride = job.blocks.count * blockDim.x;
    uint32_t above[N] = {};
    const auto count_one = [&](int c, const Octet& base, const Octet& x) {
        const Octet sizes = sizes_of<Working>(base, x);
        const Edges& edge = edges[c];
        uint32_t reached[PAIRS], bits = 0;
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            const uint32_t beyond = sizes.word[p] - edge.high;
            reached[p] = sizes.word[p] - edge.low;
            bits |= (reached[p] & ~beyond & TRUTHS) >> p;
            above[c] -= whole_halves(beyond);
        }
        // Bits 15 and 31 are those of the first pair, the ones below of the others.
#pragma unroll 1
        for (; bits != 0; bits &= bits - 1) {
            const int bit = __ffs(static_cast<int>(bits)) - 1, half = bit / 16, p = 15 - bit % 16;
            const uint32_t first = p & 1 ? reached[1] : reached[0], second = p & 1 ? reached[3] : reached[2];
            atomicAdd(bins + c * WIDEST + key_of_half(p & 2 ? second : first, half), 1u);
        }
    };
    for (uint32_t octet = (blockIdx.x - job.blocks.first) * blockDim.x + threadIdx.x; octet < whole; octet += stride) {
        const Octet base = Octet::load(job.base.data, octet);
        Octet x[N];
#pragma unroll
        for (int c = 0; c < N; ++c) {
            if (c < columns) x[c] = Octet::load(edges[c].model, octet);
        }
#pragma unroll
        for (int c = 0; c < N; ++c) {
            if (c < columns) count_one(c, base, x[c]);
        }
    }
    if (blockIdx.x == job.blocks.first && threadIdx.x == 0 && job.count % EACH != 0) {
        const uint64_t before = uint64_t{whole} * 16, bytes = job.count % EACH * (16 / EACH);
        const Octet base = partial_octet(job.base, before, bytes);
#pragma unroll
        for (int c = 0; c < N; ++c) {
            if (c < columns) count_one(c, base, partial_octet(list[job.first_column + c].model, before, bytes));
        }
    }
#pragma unroll
    for (int c = 0; c < N; ++c) {
        const uint32_t of_warp = __reduce_add_sync(EVERY_LANE, counted_halves(above[c]));
        if (threadIdx.x % WARP == 0 && of_warp) atomicAdd(above_in_block + c, of_warp);
    }
    __syncthreads();
    const auto add = [](uint64_t& counter, uint32_t number) {
        if (number) atomicAdd(reinterpret_cast<unsigned long long*>(&counter), static_cast<unsigned long long>(number));
    };
    for (int c = 0; c < columns; ++c) {
        Window& window = *list[job.first_column + c].window;
        for (uint32_t i = threadIdx.x; i < WIDEST; i += blockDim.x) add(window.counts[i], bins[c * WIDEST + i]);
        if (threadIdx.x == 0) add(window.above, above_in_block[c]);
    }
}

// One block a column.
__global__ void __launch_bounds__(PROVING_THREADS, 1) prove(const List<Column> columns) {
    const Column column = columns[blockIdx.x];
    const Window& window = *column.window;
    const auto count_of = [&](uint64_t bin) { return window.counts[bin]; };
    const BinRuns runs(count_of, WIDEST, shared_memory<uint64_t>());
    if (column.rank > window.above) {
        runs.find(column.rank - window.above, [&](uint64_t bin, uint64_t above, uint64_t equal) {
            *column.found = {window.low + bin, window.above + above, equal};
        });
    }
    if (threadIdx.x != 0) return;
    const uint64_t reached = window.above + runs.total();
    const bool beyond = column.rank <= window.above || column.rank > column.count;
    if (beyond || (column.rank > reached && window.low > 1)) {
        *column.open = 1;
    } else if (column.rank > reached) {
        *column.found = {0, reached, column.count - reached};
    }
}

using CountLaunches = Launches<Job, List<Column>>;

template <DType Working, int N>
void add_job(CountLaunches& launches, const Job& job, int device) {
    if constexpr (N > 2) {
        if (job.columns <= N / 2) return add_job<Working, N / 2>(launches, job, device);
    }
    constexpr uint64_t PER_BLOCK = COUNTING_THREADS * elements_of_octet(Working);
    constexpr uint64_t MOST_PACKS = 0x3FFF;  // of a thread, with four in each half: then its counters are full
    const unsigned blocks = blocks_for(job.count, PER_BLOCK, 16, device, MOST_PACKS);
    launches.add(count_windows<Working, N>, job, blocks, job.columns * WIDEST * sizeof(uint32_t));
}

}  // namespace

bool worth_sampling(const FindCall& call) {
    if (call.count < WORTH_SAMPLING || call.working == DType::F64 || !fits_vectors(call.base, call.working)) return false;
    return std::all_of(call.columns.begin(), call.columns.end(), [&](const SoughtColumn& column) {
        return column.within == nullptr && fits_vectors(column.model, call.working);
    });
}

void search(const Queue& queue, const std::vector<const FindCall*>& calls, const std::vector<uint32_t*>& open) {
    std::vector<Column> columns;
    std::vector<Job> jobs;
    std::vector<DType> dtypes;
    size_t of_open = 0, ranks = 0;
    for (const FindCall* call : calls) {
        for (const SoughtColumn& column : call->columns) ranks += column.ranks.size();
    }
    const Scratch<Window> windows(queue, ranks);
    for (const FindCall* call : calls) {
        const size_t first = columns.size();
        for (const SoughtColumn& column : call->columns) {
            for (const RankSought& sought : column.ranks) {
                columns.push_back({call->base, column.model, call->working, call->count, sought.rank,
                                   windows.data + columns.size(), sought.found, open[of_open]});
            }
            ++of_open;
        }
        for (size_t at = first; at < columns.size(); at += MOST_COLUMNS) {
            jobs.push_back({call->base, at, std::min(MOST_COLUMNS, columns.size() - at), call->count, {}});
            dtypes.push_back(call->working);
        }
    }
    const Listed<Column> listed(queue, columns);
    const unsigned blocks = static_cast<unsigned>(columns.size());
    launch(sample, blocks, SAMPLING_THREADS, SAMPLING_THREADS * sizeof(uint64_t) + KeyCounters::BYTES, queue,
           listed.list);
    CountLaunches launches;
    for (size_t i = 0; i < jobs.size(); ++i) {
        switch (dtypes[i]) {
            case DType::BF16: add_job<DType::BF16, MOST_COLUMNS>(launches, jobs[i], queue.device); break;
            case DType::F16: add_job<DType::F16, MOST_COLUMNS>(launches, jobs[i], queue.device); break;
            default: add_job<DType::F32, MOST_COLUMNS>(launches, jobs[i], queue.device);
        }
    }
    launches.launch(queue, COUNTING_THREADS, listed.list);
    launch(prove, blocks, PROVING_THREADS, PROVING_THREADS * sizeof(uint64_t), queue, listed.list);
}

}  // namespace merge_engine
