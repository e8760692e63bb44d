// The Python module merge_engine._cuda: the CUDA primitives. The GIL is released while one is handed to the device.
#include "../binding_types.h"
#include "device.h"

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of merge_engine. Use merge_engine.backends instead of calling this directly.";
    m.def("devices", &cuda_devices, "Names of the CUDA devices; raises RuntimeError with the driver's reason.");
    bind_operations(m);
}
