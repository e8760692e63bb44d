// The primitives of the CUDA backend. Each hands its work to a queue and returns; all pointers are device memory.
//
// A call is about one chunk: `count` elements of every array, the first of which has flat index `start` in its tensor.
// Those that take many calls launch them together, whatever their types and sizes; none may need another's result.
// What is counted is added to memory that the caller cleared.
#pragma once

#include "../bands.h"
#include "queue.h"

namespace merge_engine {

// A histogram to fill of one model. Below the first level only keys with the prefix that `within` found count. With
// `open`, histograms of a call are filled only if a flag of theirs is set.
struct HistogramColumn {
    Array model;
    const Found* within;
    uint64_t* counts;
    const uint32_t* open;
};

struct HistogramCall {
    Array base;
    std::vector<HistogramColumn> columns;
    DType working;
    int shift;
    uint64_t count;
};

// Asks for the `rank`-th largest key of a histogram, from 1. With `open`, it is asked only if this flag is set.
struct RankQuery {
    const uint64_t* counts;
    const Found* within;
    uint64_t rank;
    Found* found;
    const uint32_t* open;
};

// Ranks of the keys of one model, from 1. Below the first level, of those with the prefix that `within` found.
struct RankSought {
    uint64_t rank;
    Found* found;
};
struct SoughtColumn {
    Array model;
    const Found* within;
    std::vector<RankSought> ranks;
};

struct FindCall {
    Array base;
    std::vector<SoughtColumn> columns;
    DType working;
    uint64_t count;
};

// Ranks, and where what was found for them lies. `high` is null when nothing is dropped above.
struct BandQuery {
    RankBand band;
    DType working;
    const Found* low;
    const Found* high;
    SolvedBand* solved;
};

// sums[block][model][2]: the sums of |d| and of |d| over kept elements of every SUM_BLOCK, or those of d^2. `start` is a
// multiple of SUM_BLOCK.
struct NormCall {
    Array base;
    std::vector<Array> models;
    std::vector<Mask> masks;
    DType working;
    bool storage_rounding, squared;
    uint64_t start, count;
    double* sums;
};

// counts[model][2]: how many elements its mask keeps alone, and how many others keep too.
struct OverlapCall {
    Array base;
    std::vector<Array> models;
    std::vector<Mask> masks;
    DType working;
    uint64_t start, count;
    uint64_t* counts;
};

// scores[e] in the dtype of the arithmetic. Inputs begin with the base.
struct ScoreCall {
    std::vector<Array> inputs;
    Score score;
    DType working;
    uint64_t count;
    void* scores;
};

// Notes which elements have scores that a band keeps, a bit each in whole words.
struct NoteCall {
    Array scores;
    Mask mask;
    uint64_t start, count;
    uint32_t* notes;
};

// sums[block][line][pair]: the inner products of all pairs i <= j of inputs (or of task vectors: the first input is the
// base) over every block, row by row. What a block has fewer than lines_of_block stays as it is.
struct GramCall {
    std::vector<Array> inputs;
    DType working;
    bool of_deltas;
    Line line;
    uint64_t start, count;
    double* sums;
};

// thresholds[e] = floor(2^32 * p) of each element, as on the CPU.
struct RankCall {
    Array base, model;
    DType working;
    uint64_t length, stride;
    double density, epsilon;
    uint64_t count;
    uint32_t* thresholds;
};

struct ConsensusCall {
    Consensus operation;
    uint64_t start, count;
    Counts* counts;
    uint64_t* non_finite;
};

// `of_lines` is in device memory, and begins with the line that the chunk's first element belongs to; with lines along
// the first dimension it has all of them.
struct CombineCall {
    Combine operation;
    uint64_t start, count;
    uint64_t* non_finite;
};

// Adds to non_finite[0] for the base, [1] for the model and [2] for the output.
struct NearswapCall {
    Nearswap operation;
    uint64_t count;
    uint64_t* non_finite;
};

// How many elements have a key, and the offset of the one asked for (or none: ~0).
struct Located {
    uint64_t total, offset;
};

void histogram(const Queue& queue, const std::vector<HistogramCall>& calls);

void select(const Queue& queue, const std::vector<RankQuery>& queries, uint64_t bins);

// The same as counting chunks that hold all elements, and selecting in what was counted. What is not found stays as it is.
// Histograms take up to `counts_bytes` at a time, or those of one call.
void find_all(const Queue& queue, const std::vector<FindCall>& calls, int level, uint64_t counts_bytes);

void solve_bands(const Queue& queue, const std::vector<BandQuery>& queries);

void locate(const Queue& queue, const Array& base, const Array& model, DType working, uint64_t key, uint64_t nth,
            uint64_t count, Located* located);

void l1_norms(const Queue& queue, const std::vector<NormCall>& calls);

void overlaps(const Queue& queue, const std::vector<OverlapCall>& calls);

void scores(const Queue& queue, const std::vector<ScoreCall>& calls);

void note_scores(const Queue& queue, const std::vector<NoteCall>& calls);

void gram(const Queue& queue, const std::vector<GramCall>& calls);

void rank_thresholds(const Queue& queue, const std::vector<RankCall>& calls);

void consensus(const Queue& queue, const std::vector<ConsensusCall>& calls);

void combine(const Queue& queue, const std::vector<CombineCall>& calls);

void nearswap(const Queue& queue, const std::vector<NearswapCall>& calls);

}  // namespace merge_engine
