// The Python module merge_engine._native: the CPU primitives, and files in memory. The GIL is released while a long call
// runs.
#include <cerrno>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <system_error>

#include "../binding_types.h"
#include "identical.h"
#include "mapping.h"
#include "pool.h"
#include "primitives.h"
#include "statistics.h"

namespace {

// Lets other Python threads run while a primitive does. Not for a few elements: getting the lock back would take longer.
class Released {
  public:
    explicit Released(uint64_t count) {
        constexpr uint64_t FEW = 1 << 15;
        if (count > FEW) released_.emplace();
    }

  private:
    std::optional<py::gil_scoped_release> released_;
};

const Primitives& table(const std::string& instruction_set) {
    const Primitives* found = cpu_primitives(instruction_set.c_str());
    if (!found) throw std::invalid_argument("this processor has no " + instruction_set);
    return *found;
}

// Numbers that the caller has made room for.
template <class Number>
Number* numbers(const py::buffer& memory, uint64_t count) {
    const py::buffer_info info = memory.request(true);
    if (!info.item_type_is_equivalent_to<Number>() || static_cast<uint64_t>(info.size) != count) {
        throw std::invalid_argument("needs memory for " + std::to_string(count) + " numbers");
    }
    return static_cast<Number*>(info.ptr);
}

uint64_t sum_blocks_of(uint64_t count) { return (count + SUM_BLOCK - 1) / SUM_BLOCK; }

// Calls f, and raises as OSError what the system refused.
template <class F>
auto or_os_error(F&& f) {
    try {
        return f();
    } catch (const std::system_error& error) {
        errno = error.code().value();
        PyErr_SetFromErrno(PyExc_OSError);
        throw py::error_already_set();
    }
}

py::memoryview view(const Mapping& mapping, uint64_t first, uint64_t last) {
    if (first > last || last > mapping.size()) throw std::out_of_range("the file is not as large");
    return py::memoryview::from_memory(mapping.data() + first, static_cast<py::ssize_t>(last - first));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of merge_engine. Use merge_engine.backends instead of calling this directly.";
    m.def("instruction_set", &cpu_instruction_set, "The best instruction set that this processor runs.");
    m.def("runs", [](const std::string& name) { return cpu_primitives(name.c_str()) != nullptr; });

    bind_operations(m);
    py::class_<Sought>(m, "Sought", py::module_local())
        .def(py::init([](const Array& model, const Found& within, const std::vector<uint64_t>& ranks) {
                 return Sought{model, within, ranks};
             }),
             py::arg("model"), py::arg("within"), py::arg("ranks"));
    py::class_<SolvedBand>(m, "SolvedBand", py::module_local())
        .def_readonly("mask", &SolvedBand::mask)
        .def_readonly("kept_without_slack", &SolvedBand::kept_without_slack);

    py::class_<Mapping>(m, "Mapping", py::module_local())
        .def(py::init([](int descriptor, uint64_t size) {
            return or_os_error([&] { return std::make_unique<Mapping>(descriptor, size); });
        }))
        .def("load",
             [](const Mapping& mapping, uint64_t first, uint64_t last) {
                 or_os_error([&] {
                     const py::gil_scoped_release released;
                     mapping.load(first, last);
                 });
             })
        .def("release", &Mapping::release)
        .def("view", &view, py::keep_alive<0, 1>())
        .def_property_readonly("torn", &Mapping::torn);
    m.def("address_of", [](const py::buffer& memory) { return reinterpret_cast<uintptr_t>(memory.request().ptr); });

    m.def("solve_band", py::overload_cast<const RankBand&, const Found&, const Found&, DType>(&solve_band));
    m.def("identical", [](const std::vector<uintptr_t>& addresses, uint64_t bytes, int element_bytes) {
        std::vector<const void*> arrays;
        for (const uintptr_t address : addresses) arrays.push_back(pointer<const void>(address));
        const Released released(bytes / 2);
        return identical(arrays, bytes, element_bytes);
    });
    // `columns` are (model, prefix, slot), `counts` is [slots][bins].
    m.def(
        "count_keys",
        [](const std::string& isa, const Array& base, const std::vector<std::tuple<Array, uint64_t, uint64_t>>& columns,
           DType working, int shift, uint64_t count, int threads, int bits, uint64_t slots, const py::buffer& counts) {
            uint64_t* tables = numbers<uint64_t>(counts, slots << bits);
            std::vector<KeyColumn> where;
            for (const auto& [model, prefix, slot] : columns) {
                if (slot >= slots) throw std::out_of_range("there is no such slot");
                where.push_back({model, prefix, tables + (slot << bits)});
            }
            const Released released(count);
            table(isa).count_keys(base, where, working, shift, count, threads);
        },
        py::arg("instruction_set"), py::arg("base"), py::arg("columns"), py::arg("working"), py::arg("shift"),
        py::arg("count"), py::arg("threads"), py::arg("bits"), py::arg("slots"), py::arg("counts"));
    m.def(
        "find_all",
        [](const std::string& isa, const Array& base, const std::vector<Sought>& sought, DType working, int shift,
           uint64_t count, int threads) {
            const Released released(count);
            return table(isa).find_all(base, sought, working, shift, count, threads);
        },
        py::arg("instruction_set"), py::arg("base"), py::arg("sought"), py::arg("working"), py::arg("shift"),
        py::arg("count"), py::arg("threads"));
    m.def(
        "find_in_counts",
        [](const py::buffer& counts, int bits, const Found& within, uint64_t rank) {
            return find_in_counts(numbers<uint64_t>(counts, uint64_t{1} << bits), bits, within, rank);
        },
        py::arg("counts"), py::arg("bits"), py::arg("within"), py::arg("rank"));
    m.def("locate", [](const std::string& isa, const Array& base, const Array& model, DType working, uint64_t key,
                       uint64_t nth, uint64_t count, int threads) {
        const Released released(count);
        int64_t offset = -1;
        const uint64_t found = table(isa).locate(base, model, working, key, nth, count, threads, &offset);
        return std::make_pair(found, offset);
    });
    m.def("l1_norms",
          [](const std::string& isa, const Array& base, const std::vector<Array>& models,
             const std::vector<Mask>& masks, const std::vector<uintptr_t>& notes, DType working,
             bool storage_rounding, uint64_t start, uint64_t count, int threads, const py::buffer& sums) {
              double* written = numbers<double>(sums, sum_blocks_of(count) * 2 * models.size());
              std::vector<uint64_t*> noted;
              for (const uintptr_t address : notes) noted.push_back(pointer<uint64_t>(address));
              const Released released(count);
              table(isa).l1_norms(base, models, masks, noted, working, storage_rounding, start, count, threads,
                                  written);
          });
    m.def("gram", [](const std::string& isa, const std::vector<Array>& inputs, DType working, uint64_t count,
                     int threads, const py::buffer& sums) {
        double* written = numbers<double>(sums, sum_blocks_of(count) * inputs.size() * (inputs.size() + 1) / 2);
        const Released released(count);
        table(isa).gram(inputs, working, count, threads, written);
    });
    m.def(
        "add_in_order",
        [](const py::buffer& sums, const py::buffer& totals) {
            const uint64_t size = static_cast<uint64_t>(sums.request().size);
            const uint64_t columns = static_cast<uint64_t>(totals.request().size);
            if (columns == 0 || size % columns != 0) throw std::invalid_argument("needs whole rows of sums");
            add_in_order(numbers<double>(sums, size), size / columns, numbers<double>(totals, columns), columns);
        },
        py::arg("sums"), py::arg("totals"));
    m.def("rank_thresholds", [](const std::string& isa, const Array& base, const Array& model, DType working,
                                uint64_t length, uint64_t stride, double density, double epsilon, uint64_t count,
                                int threads, uintptr_t thresholds) {
        const Released released(count);
        table(isa).rank_thresholds(base, model, working, length, stride, density, epsilon, count, threads,
                                   pointer<uint32_t>(thresholds));
    });
    m.def("note_ranks", [](const std::string& isa, const Array& base, const Array& model, DType working,
                           uint64_t length, uint64_t stride, double density, double epsilon, uint64_t random_key,
                           uint64_t start, uint64_t count, int threads, uintptr_t notes) {
        const Released released(count);
        table(isa).note_ranks(base, model, working, length, stride, density, epsilon, random_key, start, count, threads,
                              pointer<uint64_t>(notes));
    });
    // Returns ([(kept, lost, saved) per model], [non-finite values per input, base first, and in the output]).
    m.def("consensus", [](const std::string& isa, const Consensus& op, uint64_t start, uint64_t count, int threads) {
        std::vector<Counts> counts(op.entries.size());
        std::vector<uint64_t> non_finite(op.entries.size() + 2);
        {
            const Released released(count);
            table(isa).consensus(op, start, count, threads, counts.data(), non_finite.data());
        }
        std::vector<std::tuple<uint64_t, uint64_t, uint64_t>> per_model;
        for (const Counts& c : counts) per_model.emplace_back(c.kept, c.lost, c.saved);
        return std::make_pair(per_model, non_finite);
    });
    m.def("combine", [](const std::string& isa, const Combine& op, uint64_t count, int threads) {
        const Released released(count);
        std::vector<uint64_t> non_finite(op.inputs.size() + 1);
        table(isa).combine(op, count, threads, non_finite.data());
        return non_finite;
    });
}
