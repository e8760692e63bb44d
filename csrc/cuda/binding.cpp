// The Python module merge_engine._cuda: devices, memory, and the CUDA primitives. The GIL is released while a call
// hands work to a device or waits for it.
#include <cstddef>

#include "../binding_types.h"
#include "device.h"
#include "primitives.h"

#ifndef ME_MODULE
#define ME_MODULE _cuda
#endif

namespace {

using Released = py::call_guard<py::gil_scoped_release>;

void bind_devices(py::module_& m) {
    m.def("devices", [] {
        std::vector<std::tuple<std::string, int, int, uint64_t>> rows;
        for (const Device& d : devices()) rows.emplace_back(d.name, d.major, d.minor, d.memory);
        return rows;
    });
    m.def("free_memory", &free_memory);
    const py::module_local local;
    py::class_<Queue>(m, "Queue", local)
        .def(py::init(&new_queue))
        .def(py::init(&callers_queue))
        .def("wait", &wait_for, Released());
    py::class_<Event, std::shared_ptr<Event>>(m, "Event", local)
        .def(py::init<const Queue&>())
        .def("wait", &Event::wait, Released())
        .def("hold_back", &Event::hold_back);
    py::class_<DeviceMemory>(m, "DeviceMemory", local)
        .def(py::init<const Queue&, uint64_t, bool>())
        .def(py::init<const Queue&, const std::string&>())
        .def_property_readonly("address", &DeviceMemory::address);
    // A caller's memory stays where it is at least as long.
    const auto callers_memory = [](const py::buffer& buffer) {
        const py::buffer_info memory = buffer.request(true);
        const py::gil_scoped_release released;
        return std::make_unique<HostMemory>(memory.ptr, static_cast<uint64_t>(memory.size * memory.itemsize));
    };
    py::class_<HostMemory>(m, "HostMemory", local)
        .def(py::init<uint64_t>(), Released())
        .def(py::init(callers_memory), py::keep_alive<1, 2>())
        .def_property_readonly("address", &HostMemory::address);
    m.def("upload", &upload, Released());
    m.def("download", &download, Released());
    m.def("read", [](const Queue& queue, const DeviceMemory& memory, uint64_t at, uint64_t bytes) {
        std::string contents;
        {
            const py::gil_scoped_release released;
            contents = merge_engine::read(queue, memory, at, bytes);
        }
        return py::bytes(contents);
    });
}

void bind_primitives(py::module_& m) {
    const py::module_local local;
    m.attr("FOUND_BYTES") = sizeof(Found);
    m.attr("SOLVED_BYTES") = sizeof(SolvedBand);
    m.attr("KEPT_OFFSET") = offsetof(SolvedBand, kept_without_slack);
    py::class_<HistogramColumn>(m, "HistogramColumn", local).def(py::init([](const Array& model, uintptr_t within, uintptr_t counts) {
        return HistogramColumn{model, pointer<const Found>(within), pointer<uint64_t>(counts)};
    }));
    py::class_<HistogramCall>(m, "HistogramCall", local)
        .def(py::init([](const Array& base, const std::vector<HistogramColumn>& columns, DType working, int shift,
                         uint64_t count) { return HistogramCall{base, columns, working, shift, count}; }));
    py::class_<RankQuery>(m, "RankQuery", local)
        .def(py::init([](uintptr_t counts, uintptr_t within, uint64_t rank, uintptr_t found) {
            return RankQuery{pointer<const uint64_t>(counts), pointer<const Found>(within), rank, pointer<Found>(found)};
        }));
    py::class_<BandQuery>(m, "BandQuery", local)
        .def(py::init([](const RankBand& band, DType working, uintptr_t low, uintptr_t high, uintptr_t solved) {
            return BandQuery{band, working, pointer<const Found>(low), pointer<const Found>(high),
                             pointer<SolvedBand>(solved)};
        }));
    py::class_<NormCall>(m, "NormCall", local)
        .def(py::init([](const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
                         DType working, bool storage_rounding, uint64_t start, uint64_t count, uintptr_t sums) {
            return NormCall{base, models, masks, working, storage_rounding, start, count, pointer<double>(sums)};
        }));
    py::class_<GramCall>(m, "GramCall", local)
        .def(py::init([](const std::vector<Array>& inputs, DType working, uint64_t count, uintptr_t sums) {
            return GramCall{inputs, working, count, pointer<double>(sums)};
        }));
    py::class_<RankCall>(m, "RankCall", local)
        .def(py::init([](const Array& base, const Array& model, DType working, uint64_t length, uint64_t stride,
                         double density, double epsilon, uint64_t count, uintptr_t thresholds) {
            return RankCall{base,    model,   working, length,
                            stride,  density, epsilon, count,
                            pointer<uint32_t>(thresholds)};
        }));
    py::class_<ConsensusCall>(m, "ConsensusCall", local)
        .def(py::init([](const Consensus& operation, uint64_t start, uint64_t count, uintptr_t counts,
                         uintptr_t non_finite) {
            return ConsensusCall{operation, start, count, pointer<Counts>(counts), pointer<uint64_t>(non_finite)};
        }));
    py::class_<CombineCall>(m, "CombineCall", local)
        .def(py::init([](const Combine& operation, uint64_t count, uintptr_t non_finite) {
            return CombineCall{operation, count, pointer<uint64_t>(non_finite)};
        }));
    m.def("histogram", &histogram, Released());
    m.def("select", &merge_engine::select, Released());  // not that of POSIX
    m.def("solve_bands", &solve_bands, Released());
    m.def("l1_norms", &l1_norms, Released());
    m.def("gram", &gram, Released());
    m.def("rank_thresholds", &rank_thresholds, Released());
    m.def("consensus", &consensus, Released());
    m.def("combine", &combine, Released());
    m.def(
        "locate",
        [](const Queue& queue, const Array& base, const Array& model, DType working, uint64_t key, uint64_t nth,
           uint64_t count, uintptr_t located) {
            locate(queue, base, model, working, key, nth, count, pointer<Located>(located));
        },
        Released());
}

}  // namespace

PYBIND11_MODULE(ME_MODULE, m) {
    m.doc() = "CUDA kernels of merge_engine. Use merge_engine.backends instead of calling this directly.";
    bind_devices(m);
    bind_operations(m);
    bind_primitives(m);
}
