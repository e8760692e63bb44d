// The Python module merge_engine._cuda: devices, memory, and the CUDA primitives. The GIL is released while a
// call hands work to a device or waits for it. Its Python types are in merge_engine/_cuda.pyi.
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
    m.def("free_memory", &free_memory, py::arg("device"));
    const py::module_local local;
    const auto queue = py::arg("queue"), bytes = py::arg("nbytes"), at = py::arg("at");
    py::class_<Queue>(m, "Queue", local)
        .def(py::init(&new_queue), py::arg("device"))
        .def(py::init(&callers_queue), py::arg("device"), py::arg("stream"))
        .def("wait", &wait_for, Released());
    py::class_<Event, std::shared_ptr<Event>>(m, "Event", local)
        .def(py::init<const Queue&>(), queue)
        .def("wait", &Event::wait, Released());
    py::class_<DeviceMemory>(m, "DeviceMemory", local)
        .def(py::init<const Queue&, uint64_t, bool>(), queue, bytes, py::arg("zero"))
        .def(py::init<const Queue&, const std::string&>(), queue, py::arg("contents"))
        .def_property_readonly("address", &DeviceMemory::address);
    // A caller's memory stays where it is at least as long.
    const auto callers_memory = [](const py::buffer& buffer) {
        const py::buffer_info memory = buffer.request(true);
        const py::gil_scoped_release released;
        return std::make_unique<HostMemory>(memory.ptr, static_cast<uint64_t>(memory.size * memory.itemsize));
    };
    py::class_<HostMemory>(m, "HostMemory", local)
        .def(py::init(callers_memory), py::arg("memory"), py::keep_alive<1, 2>())
        .def_property_readonly("address", &HostMemory::address);
    const auto to = py::arg("to"), to_at = py::arg("to_at"), source = py::arg("source"), source_at = py::arg("source_at");
    m.def("upload", &upload, queue, to, to_at, source, source_at, bytes, Released());
    m.def("download", &download, queue, to, to_at, source, source_at, bytes, Released());
    m.def(
        "read",
        [](const Queue& queue, const DeviceMemory& memory, uint64_t at, uint64_t nbytes) {
            std::string contents;
            {
                const py::gil_scoped_release released;
                contents = merge_engine::read(queue, memory, at, nbytes);
            }
            return py::bytes(contents);
        },
        queue, py::arg("memory"), at, bytes);
}

// What kernels are told. Addresses are those of device memory; 0 where there is nothing.
void bind_calls(py::module_& m) {
    const py::module_local local;
    const auto base = py::arg("base"), model = py::arg("model"), models = py::arg("models"),
               working = py::arg("working");
    const auto start = py::arg("start"), count = py::arg("count"), sums = py::arg("sums");
    const auto output = py::arg("output"), non_finite = py::arg("non_finite");
    m.attr("FOUND_BYTES") = sizeof(Found);
    m.attr("SOLVED_BYTES") = sizeof(SolvedBand);
    m.attr("KEPT_OFFSET") = offsetof(SolvedBand, kept_without_slack);
    py::class_<Array>(m, "Array", local)
        .def(py::init([](uintptr_t address, DType dtype) { return Array{pointer<void>(address), dtype}; }),
             py::arg("address"), py::arg("dtype"));
    py::class_<HistogramColumn>(m, "HistogramColumn", local)
        .def(py::init([](const Array& model, uintptr_t within, uintptr_t counts) {
                 return HistogramColumn{model, pointer<const Found>(within), pointer<uint64_t>(counts), nullptr};
             }),
             model, py::arg("within"), py::arg("counts"));
    py::class_<HistogramCall>(m, "HistogramCall", local)
        .def(py::init([](const Array& base, const std::vector<HistogramColumn>& columns, DType working,
                         int level, uint64_t count) {
                 return HistogramCall{base, columns, working, level_shift(working, level), count};
             }),
             base, py::arg("columns"), working, py::arg("level"), count);
    py::class_<RankQuery>(m, "RankQuery", local)
        .def(py::init([](uintptr_t counts, uintptr_t within, uint64_t rank, uintptr_t found) {
                 return RankQuery{pointer<const uint64_t>(counts), pointer<const Found>(within), rank,
                                  pointer<Found>(found), nullptr};
             }),
             py::arg("counts"), py::arg("within"), py::arg("rank"), py::arg("found"));
    py::class_<SoughtColumn>(m, "SoughtColumn", local)
        .def(py::init([](const Array& model, uintptr_t within,
                         const std::vector<std::pair<uint64_t, uintptr_t>>& ranks) {
                 SoughtColumn column{model, pointer<const Found>(within), {}};
                 for (const auto& [rank, found] : ranks) column.ranks.push_back({rank, pointer<Found>(found)});
                 return column;
             }),
             model, py::arg("within"), py::arg("ranks"));
    py::class_<FindCall>(m, "FindCall", local)
        .def(py::init([](const Array& base, const std::vector<SoughtColumn>& columns, DType working,
                         uint64_t count) { return FindCall{base, columns, working, count}; }),
             base, py::arg("columns"), working, count);
    py::class_<BandQuery>(m, "BandQuery", local)
        .def(py::init(
                 [](const RankBand& band, DType working, uintptr_t low, uintptr_t high, uintptr_t solved) {
                     return BandQuery{band, working, pointer<const Found>(low), pointer<const Found>(high),
                                      pointer<SolvedBand>(solved)};
                 }),
             py::arg("band"), working, py::arg("low"), py::arg("high"), py::arg("solved"));
    py::class_<NormCall>(m, "NormCall", local)
        .def(py::init([](const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
                         DType working, bool storage_rounding, bool squared, uint64_t start, uint64_t count,
                         uintptr_t sums) {
                 return NormCall{base,  models, masks, working, storage_rounding, squared,
                                 start, count,  pointer<double>(sums)};
             }),
             base, models, py::arg("masks"), working, py::arg("storage_rounding"), py::arg("squared"), start,
             count, sums);
    py::class_<OverlapCall>(m, "OverlapCall", local)
        .def(py::init([](const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
                         DType working, uint64_t start, uint64_t count, uintptr_t counts) {
                 return OverlapCall{base, models, masks, working, start, count, pointer<uint64_t>(counts)};
             }),
             base, models, py::arg("masks"), working, start, count, py::arg("counts"));
    const auto scores = py::arg("scores");
    py::class_<ScoreCall>(m, "ScoreCall", local)
        .def_static(
            "variance",
            [](const std::vector<Array>& inputs, bool storage_rounding, DType working, uint64_t count,
               uintptr_t scores) {
                 return ScoreCall{inputs, {ScoreKind::Variance, storage_rounding, 0, nullptr}, working, count,
                                  pointer<void>(scores)};
             },
             py::arg("inputs"), py::arg("storage_rounding"), working, count, scores)
        .def_static(
            "divergence",
            [](const std::vector<Array>& inputs, uint64_t length, DType working, uint64_t count,
               uintptr_t scores) {
                 return ScoreCall{inputs, {ScoreKind::Divergence, false, length, nullptr}, working, count,
                                  pointer<void>(scores)};
             },
             py::arg("inputs"), py::arg("length"), working, count, scores);
    py::class_<NoteCall>(m, "NoteCall", local)
        .def(py::init([](const Array& scores, const Mask& mask, uint64_t start, uint64_t count,
                         uintptr_t notes) {
                 return NoteCall{scores, mask, start, count, pointer<uint32_t>(notes)};
             }),
             scores, py::arg("mask"), start, count, py::arg("notes"));
    py::class_<NearswapCall>(m, "NearswapCall", local)
        .def(py::init([](const Array& base, const Array& model, const Array& output, double threshold,
                         bool storage_rounding, DType working, uint64_t count, uintptr_t non_finite) {
                 const Nearswap operation{base, model, output, working, threshold, storage_rounding};
                 return NearswapCall{operation, count, pointer<uint64_t>(non_finite)};
             }),
             base, model, output, py::arg("threshold"), py::arg("storage_rounding"), working, count,
             non_finite);
    py::class_<GramCall>(m, "GramCall", local)
        .def(py::init([](const std::vector<Array>& inputs, DType working, bool of_deltas, const Line& line,
                         uint64_t start, uint64_t count, uintptr_t sums) {
                 return GramCall{inputs, working, of_deltas, line, start, count, pointer<double>(sums)};
             }),
             py::arg("inputs"), working, py::arg("of_deltas"), py::arg("line"), start, count, sums);
    py::class_<RankCall>(m, "RankCall", local)
        .def(py::init([](const Array& base, const Array& model, DType working,
                         const std::pair<uint64_t, uint64_t>& line, double density, double epsilon,
                         uint64_t count, uintptr_t thresholds) {
                 return RankCall{base,       model,       working,
                                 line.first, line.second, density,
                                 epsilon,    count,       pointer<uint32_t>(thresholds)};
             }),
             base, model, working, py::arg("line"), py::arg("density"), py::arg("epsilon"), count,
             py::arg("thresholds"));
    py::class_<Entry>(m, "Entry", local)
        .def(py::init([](const Array& model, const Mask& mask, double weight, double rescale,
                         double vote_slack, double retain_slack) {
                 return Entry{model, mask, rescale, weight, vote_slack, retain_slack};
             }),
             model, py::arg("mask"), py::arg("weight"), py::arg("rescale"), py::arg("vote_slack"),
             py::arg("retain_slack"));
    py::class_<ConsensusCall>(m, "ConsensusCall", local)
        .def(py::init([](const Array& base, const Array& output, DType working,
                         const std::vector<Entry>& entries, Election election, bool normalize,
                         bool storage_rounding, double scale, double divisor, bool wide, uint64_t start,
                         uint64_t count, uintptr_t counts, uintptr_t non_finite) {
                 const Consensus operation{base,      output,           working, entries, election,
                                           normalize, storage_rounding, scale,   divisor, wide};
                 return ConsensusCall{operation, start, count, pointer<Counts>(counts),
                                      pointer<uint64_t>(non_finite)};
             }),
             base, output, working, py::arg("entries"), py::arg("election"), py::arg("normalize"),
             py::arg("storage_rounding"), py::arg("scale"), py::arg("divisor"), py::arg("wide"), start, count,
             py::arg("counts"), non_finite);
    py::class_<CombineCall>(m, "CombineCall", local)
        .def(py::init([](const std::vector<Array>& inputs, const Array& output,
                         const std::vector<double>& coefficients, std::optional<double> divisor, bool fused,
                         bool rounded, bool stepwise, bool on_base, const Line& line, uintptr_t of_lines, DType working,
                         uint64_t start, uint64_t count, uintptr_t non_finite) {
                 const Combine operation{inputs,  coefficients, output,
                                         working, divisor.has_value(), divisor.value_or(1),
                                         fused,   rounded,      stepwise,
                                         on_base, line,    pointer<const double>(of_lines)};
                 return CombineCall{operation, start, count, pointer<uint64_t>(non_finite)};
             }),
             py::arg("inputs"), output, py::arg("coefficients"), py::arg("divisor"), py::arg("fused"),
             py::arg("rounded"), py::arg("stepwise"), py::arg("on_base"), py::arg("line"), py::arg("of_lines"), working, start,
             count, non_finite);
}

void bind_primitives(py::module_& m) {
    const auto queue = py::arg("queue"), calls = py::arg("calls"), queries = py::arg("queries");
    m.def("histogram", &histogram, queue, calls, Released());
    m.def(
        "select",
        [](const Queue& queue, const std::vector<RankQuery>& queries, int level) {
            merge_engine::select(queue, queries, uint64_t{1} << level_bits(level));  // not that of POSIX
        },
        queue, queries, py::arg("level"), Released());
    m.def("find_all", &find_all, queue, calls, py::arg("level"), py::arg("counts_bytes"), Released());
    m.def("solve_bands", &solve_bands, queue, queries, Released());
    m.def("l1_norms", &l1_norms, queue, calls, Released());
    m.def("gram", &gram, queue, calls, Released());
    m.def("rank_thresholds", &rank_thresholds, queue, calls, Released());
    m.def("consensus", &consensus, queue, calls, Released());
    m.def("combine", &combine, queue, calls, Released());
    m.def("overlaps", &overlaps, queue, calls, Released());
    m.def("scores", &scores, queue, calls, Released());
    m.def("note_scores", &note_scores, queue, calls, Released());
    m.def("nearswap", &nearswap, queue, calls, Released());
    m.def(
        "locate",
        [](const Queue& queue, const Array& base, const Array& model, DType working, uint64_t key,
           uint64_t nth, uint64_t count, uintptr_t located) {
            locate(queue, base, model, working, key, nth, count, pointer<Located>(located));
        },
        queue, py::arg("base"), py::arg("model"), py::arg("working"), py::arg("key"), py::arg("nth"),
        py::arg("count"), py::arg("located"), Released());
}

}  // namespace

PYBIND11_MODULE(ME_MODULE, m) {
    m.doc() = "CUDA kernels of merge_engine. Use merge_engine.backends instead of calling this directly.";
    bind_devices(m);
    bind_operations(m);
    bind_calls(m);
    bind_primitives(m);
}
