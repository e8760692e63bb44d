// What can be asked of a device: inputs, masks and the element-wise formulas of a merge.
//
// Pointers may be host or device memory; nothing here owns anything. The formulas are those of
// docs/arithmetic.md; its numbering is repeated beside them.
#pragma once

#include <vector>

#include "philox.h"

namespace merge_engine {

// Values that are computed whenever they are read. Thread-safe.
class Computed {
  public:
    virtual ~Computed() = default;
    // Elements [first, first + count): where they are, or written to `room`.
    virtual const void* read(uint64_t first, int count, void* room) const = 0;
};

// One input or output of a chunk: `count` elements are implied by the call. An input may be computed on a CPU; then it
// has no data.
struct Array {
    void* data;
    DType dtype;
    const Computed* computed = nullptr;
};

// Which elements of a task vector survive. A position is the flat index or the random draw of an
// element; ranges are inclusive, and empty when first > last. Those of draws begin with 0.
struct Range {
    uint64_t first, last;
};

// The bound that draws in a range of them are below.
ME_INLINE uint64_t draws_below(const Range& draws) {
    return draws.first > draws.last ? 0 : draws.last < EVERY_DRAW ? draws.last + 1 : EVERY_DRAW;
}

enum class MaskKind : int {
    Dense,   // every element
    Band,    // low <= key <= high; keys equal to a bound only at positions inside its range
    Draw,    // draw within `low_positions`
    Ranked,  // draw below the element's own threshold (see rank_thresholds)
    Noted,   // what was decided before (see the CPU's l1_norms and note_ranks)
};

struct Mask {
    MaskKind kind = MaskKind::Dense;
    uint64_t low = 0, high = ~0ull;
    Range low_positions{0, ~0ull}, high_positions{0, ~0ull};
    bool by_draw = false;                  // positions are draws, not flat indices
    const uint32_t* thresholds = nullptr;  // Ranked: one per element of the chunk
    bool inverse_probability = false;      // Ranked: kept elements are divided by their probability
    uint64_t random_key = 0;
    const uint64_t* notes = nullptr;       // Noted: a bit for each element of the chunk, set where it is kept
    const Mask* solved = nullptr;  // in device memory: what a device found itself, to be read instead of all this

    ME_INLINE bool keeps_all_ties(const Range& positions) const {
        return positions.first == 0 && positions.last >= (by_draw ? EVERY_DRAW - 1 : ~0ull);
    }
};

// One fine-tuned model in a consensus.
struct Entry {
    Array model;
    Mask mask;
    double rescale = 1;       // multiplies the task vector before the weight
    double weight = 1;
    double vote_slack = 0;    // the vote counts (1 + vote_slack) times
    double retain_slack = 0;  // a lost entry stays when |vote| < retain_slack * sum of magnitudes; at 1 always
};

enum class Election : int {
    None,
    Sum,
    Count,
    Deltas,   // votes are not weighted
    Overlap,  // no vote: a weight counts where one model alone keeps an element, else how many do
};

// Whether weights come into play only after the votes were counted.
ME_INLINE bool weighs_last(Election election) { return election == Election::Deltas || election == Election::Overlap; }

struct Consensus {
    Array base, output;
    DType working;
    std::vector<Entry> entries;
    Election election = Election::Sum;
    bool normalize = false;
    bool storage_rounding = false;  // round every intermediate to the working dtype, as mergekit does
    double lambda = 1;
    double divisor = 1;  // of methods without an election, when they normalize
    bool wide = false;   // with storage_rounding: weights, sums and the result are not rounded
};

// Counts of one model in a consensus.
struct Counts {
    uint64_t kept = 0;   // not zero, and survived the trim or the draw
    uint64_t lost = 0;   // of those: left out of the mean by the election
    uint64_t saved = 0;  // of those: in the mean only because of a sign slack
};

// Lines of a tensor along its last dimension (stride 1) or its first: elements of a line, and their distance.
struct Line {
    uint64_t length = 0, stride = 1;

    ME_INLINE bool whole_tensor() const { return length == 0; }
    ME_INLINE bool along_first() const { return stride > 1; }
};

struct Combine {
    std::vector<Array> inputs;
    std::vector<double> coefficients;  // of the inputs, or with `on_base` of the models
    Array output;
    DType working;
    bool divides = false;
    double divisor = 1;
    bool fused = false;             // acc = fma(x, c, acc), as mergekit's linear computes
    bool rounded = false;           // round the result to the working dtype first, as `fused` does
    bool stepwise = false;          // round the result of every operation to it
    bool on_base = false;           // combine task vectors, and add the base, which is the first input
    Line line;                      // whose coefficients are [line][term] in `of_lines`; or the whole tensor
    const double* of_lines = nullptr;

    size_t terms() const { return inputs.size() - (on_base ? 1 : 0); }
};

// values += scale * (rows x columns): elements [first, first + count) of a matrix with `width` columns, in row-major
// order. The factors of rows are [row_count, rank], those of columns [rank, width]; transposed, [rank, row_count] and
// [width, rank].
struct LowRank {
    Array values, rows, columns;
    uint64_t rank, width, first, count, row_count;
    bool transposed;
    double scale;
};

// The base goes the way to the model as far as their distance allows.
constexpr double NEAREST = 1e-6;  // no distance counts as smaller
struct Nearswap {
    Array base, model, output;
    DType working;
    double threshold;
    bool storage_rounding;
};

// A number >= 0 of each position. Its key is its bits in the dtype of the arithmetic.
enum class ScoreKind : int {
    Variance,    // of the task vectors
    Divergence,  // |d| of the only model times the divergence of its line
};
struct Score {
    ScoreKind kind;
    bool storage_rounding;              // Variance: task vectors and variance are rounded to the working dtype
    uint64_t length;                    // Divergence: elements of a line
    const double* divergences;          // Divergence: one for each line of the chunk
};

// Sums are taken over blocks of this many elements, each as LANES interleaved running sums that are
// then added pairwise, and the block sums in order: the same result whatever the chunks and threads.
constexpr uint64_t SUM_BLOCK = 4096;
constexpr uint64_t SUM_LANES = 64;

// Sums of lines along the first dimension are taken over blocks of whole rows, about as many elements: a running sum for
// each line, and the block sums in order.
constexpr uint64_t COLUMNS_BLOCK = 1 << 18;

// Elements of a block of sums.
inline uint64_t sum_block(const Line& line) {
    if (!line.along_first()) return SUM_BLOCK;
    uint64_t block = line.stride;
    while (2 * block <= COLUMNS_BLOCK) block *= 2;
    return block;
}

// The largest number of lines that a block has elements of.
inline uint64_t lines_of_block(const Line& line) {
    if (line.whole_tensor()) return 1;
    if (line.along_first()) return line.stride;
    if (line.length % SUM_BLOCK == 0) return 1;
    return SUM_BLOCK % line.length == 0 ? SUM_BLOCK / line.length : (SUM_BLOCK - 2) / line.length + 2;
}

// Keys are counted from the top: first by their highest 15 bits, then by 16 at a time.
constexpr int FIRST_BITS = 15;
constexpr int NEXT_BITS = 16;

constexpr int level_bits(int level) { return level == 0 ? FIRST_BITS : NEXT_BITS; }

// How far a key is shifted right to give its bin at a level, with the prefix above.
constexpr int level_shift(DType working, int level) {
    const int key_bits = working == DType::F64 ? 63 : working == DType::F32 ? 31 : 15;
    return key_bits - FIRST_BITS - level * NEXT_BITS;
}

}  // namespace merge_engine
