#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace merge_engine {
namespace {

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

struct Loop {
    const std::function<void(uint64_t, int)>* body;
    uint64_t blocks;
    std::atomic<uint64_t> next{0};
    std::mutex failure_lock;
    std::exception_ptr failure;

    void work(int worker) {
        IeeeArithmetic ieee;
        try {
            for (uint64_t block; (block = next.fetch_add(1)) < blocks;) (*body)(block, worker);
        } catch (...) {
            next = blocks;
            std::lock_guard<std::mutex> guard(failure_lock);
            if (!failure) failure = std::current_exception();
        }
    }
};

class Pool {
  public:
    void run(Loop& loop, int threads) {
        std::lock_guard<std::mutex> one_loop(callers_);
        const int helpers = threads - 1;
        {
            std::lock_guard<std::mutex> guard(lock_);
            while (static_cast<int>(workers_.size()) < helpers) {
                const int number = static_cast<int>(workers_.size()) + 1;
                workers_.emplace_back([this, number, seen = generation_] { serve(number, seen); });
                workers_.back().detach();
            }
            loop_ = &loop;
            wanted_ = helpers;
            busy_ = helpers;
            ++generation_;
        }
        wake_.notify_all();
        loop.work(0);
        std::unique_lock<std::mutex> guard(lock_);
        done_.wait(guard, [this] { return busy_ == 0; });
        loop_ = nullptr;
    }

  private:
    void serve(int number, uint64_t seen) {
        for (;;) {
            Loop* loop;
            {
                std::unique_lock<std::mutex> guard(lock_);
                wake_.wait(guard, [&] { return generation_ != seen; });
                seen = generation_;
                if (number > wanted_) continue;
                loop = loop_;
            }
            loop->work(number);
            std::lock_guard<std::mutex> guard(lock_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex callers_, lock_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Loop* loop_ = nullptr;
    uint64_t generation_ = 0;
    int wanted_ = 0, busy_ = 0;
};

// Never destroyed, because its threads run until the process ends; replaced in a forked child, which
// has none of the parent's threads.
Pool* pool = new Pool;
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void parallel_for(uint64_t blocks, int threads, const std::function<void(uint64_t, int)>& body) {
    Loop loop{&body, blocks, {}, {}, nullptr};
    const uint64_t useful = std::min<uint64_t>(blocks, static_cast<uint64_t>(std::max(threads, 1)));
    if (useful <= 1) {
        loop.work(0);
    } else {
        pool->run(loop, static_cast<int>(useful));
    }
    if (loop.failure) std::rethrow_exception(loop.failure);
}

}  // namespace merge_engine
