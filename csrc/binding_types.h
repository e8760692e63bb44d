// What the Python modules of all devices have in common: the structures of operations.h and bands.h.
//
// Arrays are passed as (address, dtype) and must hold the given number of elements; the Python wrappers in
// merge_engine/backends check that. Types are local to each module, which need not load the others.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bands.h"

namespace py = pybind11;
using namespace merge_engine;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline void bind_operations(py::module_& m) {
    const py::module_local local;
    m.attr("SUM_BLOCK") = SUM_BLOCK;
    py::enum_<DType>(m, "DType", local)
        .value("BF16", DType::BF16)
        .value("F16", DType::F16)
        .value("F32", DType::F32)
        .value("F64", DType::F64);
    py::enum_<MaskKind>(m, "MaskKind", local)
        .value("Dense", MaskKind::Dense)
        .value("Band", MaskKind::Band)
        .value("Draw", MaskKind::Draw)
        .value("Ranked", MaskKind::Ranked)
        .value("Noted", MaskKind::Noted);
    py::enum_<Election>(m, "Election", local)
        .value("none", Election::None)
        .value("sum", Election::Sum)
        .value("count", Election::Count);

    py::class_<Array>(m, "Array", local).def(
        py::init([](uintptr_t address, DType dtype) { return Array{pointer<void>(address), dtype}; }));
    py::class_<Mask>(m, "Mask", local)
        .def(py::init<>())
        .def_readwrite("kind", &Mask::kind)
        .def_readwrite("low", &Mask::low)
        .def_readwrite("high", &Mask::high)
        .def_readwrite("by_draw", &Mask::by_draw)
        .def_readwrite("inverse_probability", &Mask::inverse_probability)
        .def_readwrite("random_key", &Mask::random_key)
        .def_property_readonly("low_positions", [](const Mask& mask) {
            return std::make_pair(mask.low_positions.first, mask.low_positions.last);
        })
        .def("set_low_positions", [](Mask& mask, uint64_t first, uint64_t last) { mask.low_positions = {first, last}; })
        .def("set_high_positions",
             [](Mask& mask, uint64_t first, uint64_t last) { mask.high_positions = {first, last}; })
        .def("set_thresholds",
             [](Mask& mask, uintptr_t address) { mask.thresholds = pointer<const uint32_t>(address); })
        .def("set_notes", [](Mask& mask, uintptr_t address) { mask.notes = pointer<const uint64_t>(address); })
        .def("set_solved", [](Mask& mask, uintptr_t address) { mask.solved = pointer<const Mask>(address); });
    py::class_<Entry>(m, "Entry", local)
        .def(py::init([](const Array& model, const Mask& mask, double rescale, double weight, double vote_slack,
                         double retain_slack) {
            return Entry{model, mask, rescale, weight, vote_slack, retain_slack};
        }));
    py::class_<Consensus>(m, "Consensus", local)
        .def(py::init([](const Array& base, const Array& output, DType working, const std::vector<Entry>& entries,
                         Election election, bool normalize, bool storage_rounding, double lambda, double divisor) {
            return Consensus{base, output, working, entries, election, normalize, storage_rounding, lambda, divisor};
        }));
    py::class_<Combine>(m, "Combine", local)
        .def(py::init([](const std::vector<Array>& inputs, const std::vector<double>& coefficients,
                         const Array& output, DType working, bool divides, double divisor, bool fused) {
            return Combine{inputs, coefficients, output, working, divides, divisor, fused};
        }));

    py::class_<Found>(m, "Found", local)
        .def(py::init([](uint64_t key, uint64_t above, uint64_t equal) { return Found{key, above, equal}; }),
             py::arg("key") = 0, py::arg("above") = 0, py::arg("equal") = 0)
        .def_readonly("key", &Found::key)
        .def_readonly("above", &Found::above)
        .def_readonly("equal", &Found::equal);
    py::class_<RankBand>(m, "RankBand", local)
        .def(py::init([](uint64_t first, uint64_t last, double slack, bool has_high, bool spread, bool every_tie,
                         std::pair<uint64_t, uint64_t> low, std::pair<uint64_t, uint64_t> high, uint64_t random_key) {
            return RankBand{first, last, slack, has_high, spread, every_tie, {low.first, low.second},
                            {high.first, high.second}, random_key};
        }));
}
