#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>

#include "ieee.h"

namespace merge_engine {
namespace {

struct Loop {
    const std::function<void(uint64_t, int)>* body;
    uint64_t blocks;
    int helpers;      // that may join
    int joined = 0;   // helpers so far, which have the numbers from 1 on
    int working = 0;  // helpers
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

// Loops of several callers may run at a time. A loop is over when its blocks are done: who was to help and has not
// come yet, because other threads have the processors, is not waited for.
class Pool {
  public:
    void run(Loop& loop) {
        {
            std::lock_guard<std::mutex> guard(lock_);
            while (workers_ < loop.helpers) {
                std::thread([this] { serve(); }).detach();
                ++workers_;
            }
            loops_.push_back(&loop);
        }
        for (int helper = 0; helper < loop.helpers; ++helper) wake_.notify_one();
        loop.work(0);
        std::unique_lock<std::mutex> guard(lock_);
        const auto open = std::find(loops_.begin(), loops_.end(), &loop);
        if (open != loops_.end()) loops_.erase(open);
        done_.wait(guard, [&] { return loop.working == 0; });
    }

  private:
    void serve() {
        std::unique_lock<std::mutex> guard(lock_);
        for (;;) {
            wake_.wait(guard, [this] { return !loops_.empty(); });
            Loop& loop = *loops_.front();
            const int number = ++loop.joined;
            if (number == loop.helpers) loops_.erase(loops_.begin());
            ++loop.working;
            guard.unlock();
            loop.work(number);
            guard.lock();
            if (--loop.working == 0) done_.notify_all();
        }
    }

    std::mutex lock_;
    std::condition_variable wake_, done_;
    std::vector<Loop*> loops_;  // that helpers may join
    int workers_ = 0;
};

// Never destroyed, because its threads run until the process ends; replaced in a forked child, which
// has none of the parent's threads.
Pool* pool = new Pool;
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void parallel_for(uint64_t blocks, int threads, const std::function<void(uint64_t, int)>& body) {
    Loop loop;
    loop.body = &body;
    loop.blocks = blocks;
    loop.helpers = static_cast<int>(std::min<uint64_t>(blocks, static_cast<uint64_t>(std::max(threads, 1)))) - 1;
    if (loop.helpers <= 0) {
        loop.work(0);
    } else {
        pool->run(loop);
    }
    if (loop.failure) std::rethrow_exception(loop.failure);
}

}  // namespace merge_engine
