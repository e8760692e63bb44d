// Chooses the instruction set at run time.
#include <cstring>

#include "primitives.h"

namespace merge_engine {

extern const Primitives primitives_baseline;
#if defined(__x86_64__)
extern const Primitives primitives_avx2, primitives_avx512;
#endif

namespace {

struct Candidate {
    const char* name;
    const Primitives* table;
    bool (*runs_here)();
};

const Candidate candidates[] = {
#if defined(__x86_64__)
    {"avx512", &primitives_avx512,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &primitives_avx2,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     }},
#endif
    {"baseline", &primitives_baseline, [] { return true; }},
};

}  // namespace

const Primitives* cpu_primitives(const char* instruction_set) {
    for (const Candidate& candidate : candidates) {
        if (std::strcmp(candidate.name, instruction_set) == 0 && candidate.runs_here()) return candidate.table;
    }
    return nullptr;
}

const char* cpu_instruction_set() {
    for (const Candidate& candidate : candidates) {
        if (candidate.runs_here()) return candidate.name;
    }
    return "baseline";
}

}  // namespace merge_engine
