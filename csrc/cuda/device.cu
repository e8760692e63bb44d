#include "device.h"

#include <stdexcept>

#include <cuda_runtime_api.h>

namespace merge_engine {

static void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

std::vector<std::string> cuda_devices() {
    int count = 0;
    check(cudaGetDeviceCount(&count));
    std::vector<std::string> lines;
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp properties;
        check(cudaGetDeviceProperties(&properties, device));
        lines.push_back(std::string(properties.name) + ", sm_" + std::to_string(properties.major) +
                        std::to_string(properties.minor) + ", " +
                        std::to_string(properties.totalGlobalMem >> 30) + " GiB");
    }
    return lines;
}

}  // namespace merge_engine
