// What CUDA devices there are.
#pragma once

#include <string>
#include <vector>

namespace merge_engine {

// One line per device: name, compute capability and memory. Throws std::runtime_error with the driver's own
// words when there is no usable driver.
std::vector<std::string> cuda_devices();

}  // namespace merge_engine
