// Where work for a device is handed in. Needs no CUDA header, so that the Python module needs none.
#pragma once

#include <cstdint>

namespace merge_engine {

// A stream of a device. The handle is a cudaStream_t.
struct Queue {
    int device;
    uintptr_t stream;
};

}  // namespace merge_engine
