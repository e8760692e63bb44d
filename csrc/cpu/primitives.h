// The primitives of the CPU backend, one table of functions per instruction set.
//
// Each works on one chunk: `count` elements of every array, the first of which has flat index `start` in
// its tensor. Sums demand that `start` is a multiple of SUM_BLOCK.
#pragma once

#include <memory>

#include "../bands.h"

namespace merge_engine {

// Keys to count: those of one model, and where. Below the first level only those count that agree with the prefix above
// the bins.
struct KeyColumn {
    Array model;
    uint64_t prefix;
    uint64_t* counts;
};

// Asks for the keys of some ranks of one model, from 1.
struct Sought {
    Array model;
    std::vector<uint64_t> ranks;
};

struct Primitives {
    // Adds to each column's counts[bin] the number of elements whose key, shifted right by `shift`, falls in the bin.
    void (*count_keys)(const Array& base, const std::vector<KeyColumn>& columns, DType working, int shift,
                       uint64_t count, int threads);

    // What counting the chunk alone, and then looking up the ranks, would find at the last level; mostly without a table
    // of all keys. Throws std::out_of_range for a rank that no key has.
    std::vector<std::vector<Found>> (*find_all)(const Array& base, const std::vector<Sought>& sought, DType working,
                                                uint64_t count, int threads);

    // Finds the offset of the `nth` element (from 0) whose key equals `key`, or -1, and returns how many
    // such elements the chunk holds.
    uint64_t (*locate)(const Array& base, const Array& model, DType working, uint64_t key, uint64_t nth,
                       uint64_t count, int threads, int64_t* offset);

    // Writes the sums of |d| and of |d| over kept elements of every SUM_BLOCK to sums[block][model][2]. Notes which
    // elements the masks keep in notes[model], a bit each in whole tiles, unless that is nullptr: drawing is most of
    // the work.
    void (*l1_norms)(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
                     const std::vector<uint64_t*>& notes, DType working, bool storage_rounding, uint64_t start,
                     uint64_t count, int threads, double* sums);

    // The same for the sums of d^2.
    void (*squares)(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
                    const std::vector<uint64_t*>& notes, DType working, bool storage_rounding, uint64_t start,
                    uint64_t count, int threads, double* sums);

    // Adds to counts[model][2] how many elements its mask keeps alone, and how many others keep too. Masks are bands
    // above 0.
    void (*overlaps)(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks, DType working,
                     uint64_t start, uint64_t count, int threads, uint64_t* counts);

    // Writes the divergence of each line of `length` elements.
    void (*divergences)(const Array& base, const Array& model, DType working, uint64_t length, uint64_t count,
                        int threads, double* found);

    // The score of each element, in the dtype of the arithmetic; inputs begin with the base. Zeros are its base where a
    // primitive takes it for a model.
    std::unique_ptr<const Computed> (*scores)(const std::vector<Array>& inputs, const Score& score, DType working);
    const Computed& (*zeros)();

    // Notes which elements a band keeps, a bit each in whole tiles.
    void (*note_band)(const Array& base, const Array& model, const Mask& mask, DType working, uint64_t start,
                      uint64_t count, int threads, uint64_t* notes);

    // Writes the inner products of all pairs i <= j of inputs (or of task vectors: the first input is the base) over
    // every block to sums[block][line][pair], row by row. What a block has fewer than lines_of_block stays as it is.
    void (*gram)(const std::vector<Array>& inputs, DType working, bool of_deltas, const Line& line, uint64_t start,
                 uint64_t count, int threads, double* sums);

    // DELLA: thresholds[e] = floor(2^32 * p) of each element, p rising with the magnitude's rank among the
    // `length` elements of its line, which are `stride` apart. The chunk holds whole lines.
    void (*rank_thresholds)(const Array& base, const Array& model, DType working, uint64_t length, uint64_t stride,
                            double density, double epsilon, uint64_t count, int threads, uint32_t* thresholds);

    // The same for draws: notes which elements have draws below their thresholds, a bit each in whole tiles.
    void (*note_ranks)(const Array& base, const Array& model, DType working, uint64_t length, uint64_t stride,
                       double density, double epsilon, uint64_t random_key, uint64_t start, uint64_t count, int threads,
                       uint64_t* notes);

    // Merges task vectors. Adds to counts[entry], and to non_finite[0] for the base, [1 + entry] for models and
    // the last one for the output.
    void (*consensus)(const Consensus& operation, uint64_t start, uint64_t count, int threads, Counts* counts,
                      uint64_t* non_finite);

    // output = sum of coefficient * input. Adds to non_finite[input], and to the last one for the output.
    void (*combine)(const Combine& operation, uint64_t start, uint64_t count, int threads, uint64_t* non_finite);

    // Adds a product of low rank to elements of a matrix, in place, on the calling thread.
    void (*add_low_rank)(const LowRank& operation);

    // Moves the base to the model. Adds to non_finite[0] for the base, [1] for the model and [2] for the output.
    void (*nearswap)(const Nearswap& operation, uint64_t count, int threads, uint64_t* non_finite);
};

// The best table that this processor can run, or the named one ("avx512", "avx2", "baseline"); nullptr if
// it cannot run here.
const Primitives* cpu_primitives(const char* instruction_set);
const char* cpu_instruction_set();

}  // namespace merge_engine
