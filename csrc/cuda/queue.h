// Where work for a device is handed in. Needs no CUDA header, so that the Python module needs none.
#pragma once

#include <memory>

namespace merge_engine {

// A stream of a device. A stream of our own belongs to its queues together, and so lives as long as anything that holds
// one; a caller's stream stays the caller's, who keeps it for as long.
struct Queue {
    int device;
    std::shared_ptr<void> stream;  // a cudaStream_t
};

}  // namespace merge_engine
