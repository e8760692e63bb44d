// The floating-point mode that all results depend on.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace merge_engine {

// Flush-to-zero and odd rounding modes leak in from other libraries; they would change bytes.
class IeeeArithmetic {
  public:
#if defined(__x86_64__)
    IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~IeeeArithmetic() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#elif defined(__aarch64__)
    IeeeArithmetic() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
        __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~IeeeArithmetic() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

  private:
    uint64_t saved_;
#endif
};

}  // namespace merge_engine
