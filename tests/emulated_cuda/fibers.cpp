// Fibers that stand for the threads of a CUDA block. See cuda_runtime.h.
#include <cuda_runtime.h>

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <memory>
#include <vector>

namespace merge_engine {
alignas(16) unsigned char block_memory[228 << 10];  // what kernels call their dynamic shared memory
}

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

namespace {

constexpr size_t STACK = 64 << 10;
constexpr unsigned LANES = 32;

enum class State { Ready, AtBarrier, InWarp, Finished };

// Contexts start fibers, jumps switch between them: a context would save the signal mask each time, a system call.
struct Fiber {
    std::unique_ptr<char[]> stack;
    bool started = false;
    jmp_buf place;
    State state;
    uint32_t value;       // brought to a warp operation
    uint32_t all[LANES];  // what the lanes brought
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
const std::function<void()>* body;
unsigned current;

void leave_in(State state) {
    const unsigned self = current;
    fibers[self].state = state;
    if (_setjmp(fibers[self].place) == 0) _longjmp(scheduler, 1);
    threadIdx.x = self;
}

// A fiber lives on for the blocks to come.
void live() {
    for (;;) {
        (*body)();
        leave_in(State::Finished);
    }
}

void go_on_with(unsigned i) {
    current = i;
    threadIdx.x = i;
    Fiber& fiber = fibers[i];
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    fiber.stack.reset(new char[STACK]);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, live, 0);
    setcontext(&context);
}

// Whether fibers [first, last) that are not finished all wait in `state`. Those that left early do not count.
bool all_wait(unsigned first, unsigned last, State state) {
    bool some = false;
    for (unsigned i = first; i < last; ++i) {
        if (fibers[i].state == State::Finished) continue;
        if (fibers[i].state != state) return false;
        some = true;
    }
    return some;
}

void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::Ready;
    for (;;) {
        bool progress = false, finished = true;
        for (unsigned i = 0; i < threads; ++i) {
            finished &= fibers[i].state == State::Finished;
            if (fibers[i].state != State::Ready) continue;
            progress = true;
            go_on_with(i);
        }
        if (finished) return;
        for (unsigned first = 0; first < threads; first += LANES) {
            if (!all_wait(first, first + LANES, State::InWarp)) continue;
            uint32_t values[LANES];
            for (unsigned lane = 0; lane < LANES; ++lane) values[lane] = fibers[first + lane].value;
            for (unsigned lane = 0; lane < LANES; ++lane) {
                Fiber& fiber = fibers[first + lane];
                if (fiber.state == State::Finished) {
                    std::fprintf(stderr, "a warp operation waits for a lane that is gone\n");
                    std::abort();
                }
                std::memcpy(fiber.all, values, sizeof(values));
                fiber.state = State::Ready;
            }
            progress = true;
        }
        if (all_wait(0, threads, State::AtBarrier)) {
            for (unsigned i = 0; i < threads; ++i) {
                if (fibers[i].state == State::AtBarrier) fibers[i].state = State::Ready;
            }
            progress = true;
        }
        if (!progress) {
            std::fprintf(stderr, "the threads of a block wait for each other\n");
            std::abort();
        }
    }
}

}  // namespace

void wait_for_block() { leave_in(State::AtBarrier); }

const uint32_t* exchange(uint32_t value) {
    const unsigned self = current;
    fibers[self].value = value;
    leave_in(State::InWarp);
    return fibers[self].all;
}

void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
    if (threads % LANES != 0 || shared_bytes > sizeof(merge_engine::block_memory)) std::abort();
    if (fibers.empty()) fibers = std::vector<Fiber>(1024);
    if (threads > fibers.size()) std::abort();
    body = &kernel;
    blockDim = dim3(threads);
    gridDim = dim3(blocks);
    for (unsigned block = 0; block < blocks; ++block) {
        blockIdx.x = block;
        std::memset(merge_engine::block_memory, 0xC3, shared_bytes);
        run_block(threads);
    }
}

}  // namespace emulated
