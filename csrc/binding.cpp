// The Python module merge_engine._native: a thin layer that turns Python values into plain structures.
//
// Arrays are passed as (address, dtype) and must hold the given number of elements; the Python wrappers in
// merge_engine/backends check that. The GIL is released while a primitive runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>

#include "cpu/pool.h"
#include "cpu/primitives.h"
#ifdef MERGE_ENGINE_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace merge_engine;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

const Primitives& table(const std::string& instruction_set) {
    const Primitives* found = cpu_primitives(instruction_set.c_str());
    if (!found) throw std::invalid_argument("this processor has no " + instruction_set);
    return *found;
}

// (bin, count above it, count in it) of the element that is `rank`-th from the top, counted from 1.
std::tuple<uint64_t, uint64_t, uint64_t> select_bin(uintptr_t counts, uint64_t bins, uint64_t rank) {
    const uint64_t* count = pointer<const uint64_t>(counts);
    uint64_t above = 0;
    for (uint64_t bin = bins; bin-- > 0; above += count[bin]) {
        if (above + count[bin] >= rank) return {bin, above, count[bin]};
    }
    throw std::out_of_range("the histogram holds fewer elements than the rank asked for");
}

// The key of RN(float(1 - slack) * magnitude), the threshold of a trim relaxed by a slack.
uint64_t relax(uint64_t key, double slack, DType working) {
    switch (working) {
        case DType::BF16: return relaxed_key<DType::BF16, float>(key, slack);
        case DType::F16: return relaxed_key<DType::F16, float>(key, slack);
        case DType::F32: return relaxed_key<DType::F32, float>(key, slack);
        case DType::F64: return relaxed_key<DType::F64, double>(key, slack);
    }
    throw std::invalid_argument("unknown dtype");
}

// Whether all arrays hold the same bytes. With `element_bytes` set, an array of floats that holds a
// negative zero does not qualify: adding a zero task vector would turn it into a positive one.
bool identical(const std::vector<uintptr_t>& addresses, uint64_t bytes, int element_bytes) {
    const char* first = pointer<const char>(addresses.at(0));
    for (size_t i = 1; i < addresses.size(); ++i) {
        if (std::memcmp(first, pointer<const char>(addresses[i]), bytes) != 0) return false;
    }
    const auto no_negative_zero = [&](auto zero) {
        using Bits = decltype(zero);
        const Bits negative = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
        const Bits* values = pointer<const Bits>(addresses.at(0));
        uint64_t found = 0;
        for (uint64_t j = 0; j < bytes / sizeof(Bits); ++j) found += values[j] == negative;
        return found == 0;
    };
    switch (element_bytes) {
        case 2: return no_negative_zero(uint16_t{0});
        case 4: return no_negative_zero(uint32_t{0});
        case 8: return no_negative_zero(uint64_t{0});
        default: return true;
    }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of merge_engine. Use merge_engine.backends instead of calling this directly.";
#ifdef MERGE_ENGINE_WITH_CUDA
    m.attr("has_cuda") = true;
    m.def("cuda_devices", &cuda_devices, "Names of the CUDA devices; raises RuntimeError with the driver's reason.");
#else
    m.attr("has_cuda") = false;
#endif
    m.attr("SUM_BLOCK") = SUM_BLOCK;
    m.def("instruction_set", &cpu_instruction_set, "The best instruction set that this processor runs.");
    m.def("runs", [](const std::string& name) { return cpu_primitives(name.c_str()) != nullptr; });

    py::enum_<DType>(m, "DType")
        .value("BF16", DType::BF16)
        .value("F16", DType::F16)
        .value("F32", DType::F32)
        .value("F64", DType::F64);
    py::enum_<MaskKind>(m, "MaskKind")
        .value("Dense", MaskKind::Dense)
        .value("Band", MaskKind::Band)
        .value("Draw", MaskKind::Draw)
        .value("Ranked", MaskKind::Ranked);
    py::enum_<Election>(m, "Election")
        .value("none", Election::None)
        .value("sum", Election::Sum)
        .value("count", Election::Count);

    py::class_<Array>(m, "Array").def(
        py::init([](uintptr_t address, DType dtype) { return Array{pointer<void>(address), dtype}; }));
    py::class_<Column>(m, "Column").def(py::init([](const Array& model, uint64_t prefix, uintptr_t counts) {
        return Column{model, prefix, pointer<uint64_t>(counts)};
    }));
    py::class_<Mask>(m, "Mask")
        .def(py::init<>())
        .def_readwrite("kind", &Mask::kind)
        .def_readwrite("low", &Mask::low)
        .def_readwrite("high", &Mask::high)
        .def_readwrite("by_draw", &Mask::by_draw)
        .def_readwrite("inverse_probability", &Mask::inverse_probability)
        .def_readwrite("random_key", &Mask::random_key)
        .def("set_low_positions", [](Mask& mask, uint64_t first, uint64_t last) { mask.low_positions = {first, last}; })
        .def("set_high_positions",
             [](Mask& mask, uint64_t first, uint64_t last) { mask.high_positions = {first, last}; })
        .def("set_thresholds",
             [](Mask& mask, uintptr_t address) { mask.thresholds = pointer<const uint32_t>(address); });
    py::class_<Entry>(m, "Entry")
        .def(py::init([](const Array& model, const Mask& mask, double rescale, double weight, double vote_slack,
                         double retain_slack) {
            return Entry{model, mask, rescale, weight, vote_slack, retain_slack};
        }));
    py::class_<Consensus>(m, "Consensus")
        .def(py::init([](const Array& base, const Array& output, DType working, const std::vector<Entry>& entries,
                         Election election, bool normalize, bool storage_rounding, double lambda, double divisor) {
            return Consensus{base, output, working, entries, election, normalize, storage_rounding, lambda, divisor};
        }));
    py::class_<Combine>(m, "Combine")
        .def(py::init([](const std::vector<Array>& inputs, const std::vector<double>& coefficients,
                         const Array& output, DType working, bool divides, double divisor, bool fused) {
            return Combine{inputs, coefficients, output, working, divides, divisor, fused};
        }));

    m.def("select", &select_bin);
    m.def("relax", &relax);
    m.def("identical", &identical, py::call_guard<py::gil_scoped_release>());
    m.def("histogram", [](const std::string& isa, const Array& base, const std::vector<Column>& columns,
                          DType working, int shift, uint64_t count, int threads) {
        py::gil_scoped_release released;
        table(isa).histogram(base, columns, working, shift, count, threads);
    });
    m.def("locate", [](const std::string& isa, const Array& base, const Array& model, DType working, uint64_t key,
                       uint64_t nth, uint64_t count, int threads) {
        py::gil_scoped_release released;
        int64_t offset = -1;
        const uint64_t found = table(isa).locate(base, model, working, key, nth, count, threads, &offset);
        return std::make_pair(found, offset);
    });
    m.def("l1_norms",
          [](const std::string& isa, const Array& base, const std::vector<Array>& models,
             const std::vector<Mask>& masks, DType working, bool storage_rounding, uint64_t start, uint64_t count,
             int threads, std::vector<double> sums) {
              if (sums.size() != 2 * models.size()) throw std::invalid_argument("l1_norms needs two sums a model");
              py::gil_scoped_release released;
              table(isa).l1_norms(base, models, masks, working, storage_rounding, start, count, threads, sums.data());
              return sums;
          });
    m.def("gram", [](const std::string& isa, const std::vector<Array>& inputs, DType working, uint64_t count,
                     int threads, std::vector<double> sums) {
        if (sums.size() != inputs.size() * inputs.size()) throw std::invalid_argument("gram needs n * n sums");
        py::gil_scoped_release released;
        table(isa).gram(inputs, working, count, threads, sums.data());
        return sums;
    });
    m.def("rank_thresholds", [](const std::string& isa, const Array& base, const Array& model, DType working,
                                uint64_t length, uint64_t stride, double density, double epsilon, uint64_t count,
                                int threads, uintptr_t thresholds) {
        py::gil_scoped_release released;
        table(isa).rank_thresholds(base, model, working, length, stride, density, epsilon, count, threads,
                                   pointer<uint32_t>(thresholds));
    });
    // Returns ([(kept, lost, saved) per model], [non-finite values per input, base first, and in the output]).
    m.def("consensus", [](const std::string& isa, const Consensus& op, uint64_t start, uint64_t count, int threads) {
        std::vector<Counts> counts(op.entries.size());
        std::vector<uint64_t> non_finite(op.entries.size() + 2);
        {
            py::gil_scoped_release released;
            table(isa).consensus(op, start, count, threads, counts.data(), non_finite.data());
        }
        std::vector<std::tuple<uint64_t, uint64_t, uint64_t>> per_model;
        for (const Counts& c : counts) per_model.emplace_back(c.kept, c.lost, c.saved);
        return std::make_pair(per_model, non_finite);
    });
    m.def("combine", [](const std::string& isa, const Combine& op, uint64_t count, int threads) {
        py::gil_scoped_release released;
        std::vector<uint64_t> non_finite(op.inputs.size() + 1);
        table(isa).combine(op, count, threads, non_finite.data());
        return non_finite;
    });
}
