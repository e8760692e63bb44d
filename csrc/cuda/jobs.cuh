// Many tensors in one launch. Each job has its share of the blocks, and a block finds its job by bisection. A single
// tensor is a list of one, for which there is nothing to find.
#pragma once

#include "runtime.h"

namespace merge_engine {

// The blocks of a launch that work on one job.
struct Blocks {
    unsigned first, count;
};

// The job of this block, in `memory` that its threads share: registers are too few to keep it there. Jobs come in the
// order of their blocks.
template <class Job>
__device__ const Job& job_of_block(const List<Job>& jobs, size_t n, Job* memory) {
    if (threadIdx.x == 0) {
        size_t low = 0, high = n;
        while (high - low > 1) {
            const size_t middle = (low + high) / 2;
            if (jobs[middle].blocks.first <= blockIdx.x) {
                low = middle;
            } else {
                high = middle;
            }
        }
        *memory = jobs[low];
    }
    __syncthreads();
    return *memory;
}

// Where the shared memory of a kernel goes on, behind its job.
template <class T, class Job>
__device__ T* behind(Job* memory) {
    static_assert(sizeof(Job) % alignof(T) == 0, "the memory behind a job is aligned");
    return reinterpret_cast<T*>(memory + 1);
}

// Jobs sorted by the kernel that does them; all take the same lists beside the jobs. `shared_bytes` is what a job needs
// behind itself.
template <class Job, class... Lists>
class Launches {
  public:
    using Kernel = void (*)(List<Job>, size_t, Lists...);

    void add(Kernel kernel, Job job, unsigned blocks, size_t shared_bytes) {
        if (blocks == 0) return;
        Group& group = group_of(kernel);
        job.blocks = {group.blocks, blocks};
        group.blocks += blocks;
        group.shared_bytes = std::max(group.shared_bytes, sizeof(Job) + shared_bytes);
        group.jobs.push_back(job);
    }

    void launch(const Queue& queue, unsigned threads, const Lists&... lists) const {
        for (const Group& group : groups_) {
            const Listed<Job> jobs(queue, group.jobs);
            merge_engine::launch(group.kernel, group.blocks, threads, group.shared_bytes, queue, jobs.list,
                                 group.jobs.size(), lists...);
        }
    }

  private:
    struct Group {
        Kernel kernel;
        std::vector<Job> jobs;
        unsigned blocks = 0;
        size_t shared_bytes = 0;
    };

    Group& group_of(Kernel kernel) {
        for (Group& group : groups_) {
            if (group.kernel == kernel) return group;
        }
        groups_.push_back({kernel, {}});
        return groups_.back();
    }

    std::vector<Group> groups_;
};

}  // namespace merge_engine
