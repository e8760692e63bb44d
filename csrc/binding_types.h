// What the Python modules of all devices have in common: the structures of operations.h and bands.h. Types
// are local to each module, which need not load the others. Their Python types are in
// merge_engine/_native_types.pyi.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "bands.h"

namespace py = pybind11;
using namespace merge_engine;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Positions = std::pair<uint64_t, uint64_t>;
inline Range range_of(const Positions& positions, bool draws) {
    const Range range{positions.first, positions.second};
    if (draws && range.first != 0 && range.first <= range.last) {
        throw std::invalid_argument("a range of draws begins with 0, not with " + std::to_string(range.first));
    }
    return range;
}

inline void bind_masks(py::module_& m) {
    py::class_<Mask>(m, "Mask", py::module_local())
        .def_static("dense", [] { return Mask{}; })
        .def_static(
            "band",
            [](uint64_t low, uint64_t high, const Positions& low_positions, const Positions& high_positions,
               bool by_draw, uint64_t random_key) {
                Mask mask;
                mask.kind = MaskKind::Band;
                mask.low = low, mask.high = high;
                mask.low_positions = range_of(low_positions, by_draw);
                mask.high_positions = range_of(high_positions, by_draw);
                mask.by_draw = by_draw, mask.random_key = random_key;
                return mask;
            },
            py::arg("low"), py::arg("high"), py::arg("low_positions"), py::arg("high_positions"),
            py::arg("by_draw"), py::arg("random_key"))
        .def_static(
            "draw",
            [](uint64_t below, uint64_t random_key) {
                Mask mask;
                mask.kind = MaskKind::Draw;
                mask.low_positions = below ? Range{0, below - 1} : Range{1, 0};
                mask.random_key = random_key;
                return mask;
            },
            py::arg("below"), py::arg("random_key"))
        .def_static(
            "ranked",
            [](uintptr_t thresholds, bool inverse_probability, uint64_t random_key) {
                Mask mask;
                mask.kind = MaskKind::Ranked;
                mask.thresholds = pointer<const uint32_t>(thresholds);
                mask.inverse_probability = inverse_probability, mask.random_key = random_key;
                return mask;
            },
            py::arg("thresholds"), py::arg("inverse_probability"), py::arg("random_key"))
        .def_static(
            "noted",
            [](uintptr_t notes) {
                Mask mask;
                mask.kind = MaskKind::Noted;
                mask.notes = pointer<const uint64_t>(notes);
                return mask;
            },
            py::arg("notes"))
        .def_static(
            "solved",
            [](uintptr_t address) {
                Mask mask;
                mask.solved = pointer<const Mask>(address);
                return mask;
            },
            py::arg("address"))
        .def_property_readonly("low_positions", [](const Mask& mask) {
            return Positions(mask.low_positions.first, mask.low_positions.last);
        });
}

inline void bind_operations(py::module_& m) {
    const py::module_local local;
    py::enum_<DType>(m, "DType", local)
        .value("BF16", DType::BF16)
        .value("F16", DType::F16)
        .value("F32", DType::F32)
        .value("F64", DType::F64);
    py::enum_<Election>(m, "Election", local)
        .value("none", Election::None)
        .value("sum", Election::Sum)
        .value("count", Election::Count)
        .value("deltas", Election::Deltas)
        .value("overlap", Election::Overlap);
    // Python's Line will do wherever one is asked for.
    py::class_<Line>(m, "Line", local).def(py::init([](const std::tuple<uint64_t, uint64_t>& line) {
        return Line{std::get<0>(line), std::get<1>(line)};
    }), py::arg("line"));
    py::implicitly_convertible<py::tuple, Line>();
    bind_masks(m);
    py::class_<RankBand>(m, "RankBand", local)
        .def(py::init([](uint64_t first, uint64_t last, double slack, bool has_high, bool spread,
                         bool every_tie, const Positions& low_positions, const Positions& high_positions,
                         uint64_t random_key) {
                 return RankBand{first,
                                 last,
                                 slack,
                                 has_high,
                                 spread,
                                 every_tie,
                                 range_of(low_positions, false),
                                 range_of(high_positions, false),
                                 random_key};
             }),
             py::arg("first"), py::arg("last"), py::arg("slack"), py::arg("has_high"), py::arg("spread"),
             py::arg("every_tie"), py::arg("low_positions"), py::arg("high_positions"),
             py::arg("random_key"));
}
