// The table of primitives of one instruction set.
#include <type_traits>

#include "primitives.h"

#define ME_NAME_OF(isa) primitives_##isa
#define ME_NAME(isa) ME_NAME_OF(isa)

namespace merge_engine {
namespace ME_ISA {
std::remove_pointer_t<decltype(Primitives::count_keys)> count_keys;
std::remove_pointer_t<decltype(Primitives::find_all)> find_all;
std::remove_pointer_t<decltype(Primitives::locate)> locate;
std::remove_pointer_t<decltype(Primitives::l1_norms)> l1_norms;
std::remove_pointer_t<decltype(Primitives::squares)> squares;
std::remove_pointer_t<decltype(Primitives::overlaps)> overlaps;
std::remove_pointer_t<decltype(Primitives::divergences)> divergences;
std::remove_pointer_t<decltype(Primitives::scores)> scores;
std::remove_pointer_t<decltype(Primitives::zeros)> zeros;
std::remove_pointer_t<decltype(Primitives::note_band)> note_band;
std::remove_pointer_t<decltype(Primitives::gram)> gram;
std::remove_pointer_t<decltype(Primitives::rank_thresholds)> rank_thresholds;
std::remove_pointer_t<decltype(Primitives::note_ranks)> note_ranks;
std::remove_pointer_t<decltype(Primitives::consensus)> consensus;
std::remove_pointer_t<decltype(Primitives::combine)> combine;
std::remove_pointer_t<decltype(Primitives::add_low_rank)> add_low_rank;
std::remove_pointer_t<decltype(Primitives::nearswap)> nearswap;
}  // namespace ME_ISA

extern const Primitives ME_NAME(ME_ISA) = {
    ME_ISA::count_keys,   ME_ISA::find_all,    ME_ISA::locate,       ME_ISA::l1_norms, ME_ISA::squares,
    ME_ISA::overlaps,     ME_ISA::divergences, ME_ISA::scores,       ME_ISA::zeros,    ME_ISA::note_band,
    ME_ISA::gram,         ME_ISA::rank_thresholds,
    ME_ISA::note_ranks,   ME_ISA::consensus,   ME_ISA::combine,      ME_ISA::add_low_rank,
    ME_ISA::nearswap,
};

}  // namespace merge_engine
