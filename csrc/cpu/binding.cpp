// The Python module merge_engine._native: the CPU primitives, and files in memory. The GIL is released while
// a long call runs. Its Python types are in merge_engine/_native.pyi.
#include <cerrno>
#include <system_error>

#include "../angles.h"
#include "../geometry.h"
#include "binding_kernels.h"
#include "identical.h"
#include "mapping.h"
#include "rows.h"
#include "statistics.h"

namespace {

void bind_answers(py::module_& m) {
    // Python's Found will do wherever one is asked for.
    py::class_<Found>(m, "Found", py::module_local())
        .def(py::init([](const std::tuple<uint64_t, uint64_t, uint64_t>& found) {
                 const auto& [key, above, equal] = found;
                 return Found{key, above, equal};
             }),
             py::arg("found"))
        .def_readonly("key", &Found::key)
        .def_readonly("above", &Found::above)
        .def_readonly("equal", &Found::equal);
    py::implicitly_convertible<py::tuple, Found>();
    py::class_<WholeFound, Found>(m, "WholeFound", py::module_local());
    m.def(
        "find_in_counts",
        [](const py::buffer& counts, int level, const std::optional<Found>& within, uint64_t rank) {
            const int bits = level_bits(level);
            const uint64_t* table = numbers<uint64_t>(counts, uint64_t{1} << bits);
            return find_in_counts(table, bits, within.value_or(Found{}), rank);
        },
        py::arg("counts"), py::arg("level"), py::arg("within"), py::arg("rank"));
    m.def(
        "add_in_order",
        [](const py::buffer& sums, const py::buffer& totals) {
            const uint64_t size = static_cast<uint64_t>(sums.request().size);
            const uint64_t columns = static_cast<uint64_t>(totals.request().size);
            if (columns == 0 || size % columns != 0) throw std::invalid_argument("needs whole rows of sums");
            add_in_order(numbers<double>(sums, size), size / columns, numbers<double>(totals, columns),
                         columns);
        },
        py::arg("sums"), py::arg("totals"));
    const auto line = py::arg("line");
    m.def("sum_block", &sum_block, line);
    m.def("lines_of_block", &lines_of_block, line);
    m.def(
        "add_to_lines",
        [](const py::buffer& sums, uint64_t first_block, const Line& line, uint64_t columns,
           const py::buffer& totals) {
            const uint64_t size = static_cast<uint64_t>(sums.request().size);
            const uint64_t all = static_cast<uint64_t>(totals.request().size);
            const uint64_t of_block = columns * lines_of_block(line);
            if (line.whole_tensor() || line.along_first() || of_block == 0 || size % of_block != 0 || all % columns != 0) {
                throw std::invalid_argument("needs whole rows of sums");
            }
            add_to_lines(numbers<double>(sums, size), size / of_block, first_block, line, numbers<double>(totals, all),
                         all / columns, columns);
        },
        py::arg("sums"), py::arg("first_block"), line, py::arg("columns"), py::arg("totals"));
    // Returns the mask, and how many entries it would keep without slack.
    m.def(
        "solve_band",
        [](const RankBand& band, const Found& low, const std::optional<Found>& high, DType working) {
            const SolvedBand solved = solve_band(band, low, high.value_or(Found{}), working);
            return std::make_pair(solved.mask, solved.kept_without_slack);
        },
        py::arg("band"), py::arg("low"), py::arg("high"), py::arg("working"));
}

// The inner products of some lines of n vectors, and room for their coefficients.
struct Lines {
    Lines(const py::buffer& products, size_t n, const py::buffer& coefficients) {
        const size_t pairs = n * (n + 1) / 2, size = static_cast<size_t>(products.request().size);
        if (n == 0 || size % pairs != 0) throw std::invalid_argument("needs the inner products of whole lines");
        count = size / pairs;
        given = numbers<double>(products, size);
        written = numbers<double>(coefficients, count * n);
    }
    size_t count;
    const double* given;
    double* written;
};

void bind_geometry(py::module_& m) {
    const auto products = py::arg("products"), coefficients = py::arg("coefficients"), t = py::arg("t");
    const auto steps = py::arg("steps"), count = py::arg("count");
    m.def("arc_cosine", &arc_cosine, py::arg("x"));
    m.def("sine", &sine, py::arg("angle"));
    m.def("cosine", &cosine, py::arg("angle"));
    m.def(
        "slerp",
        [](const py::buffer& products, double t, StepType steps, const py::buffer& coefficients) {
            const Lines lines(products, 2, coefficients);
            slerp(lines.given, lines.count, t, steps, lines.written);
        },
        products, t, steps, coefficients);
    m.def(
        "nuslerp",
        [](const py::buffer& products, double t, StepType steps, const py::buffer& coefficients) {
            const Lines lines(products, 2, coefficients);
            nuslerp(lines.given, lines.count, t, steps, lines.written);
        },
        products, t, steps, coefficients);
    m.def(
        "nuslerp_arc",
        [](const py::buffer& products, double t, StepType steps) {
            const Arc arc = nuslerp_arc(numbers<double>(products, 3), t, steps);
            return std::make_tuple(arc.shares[0], arc.shares[1], arc.divisor);
        },
        products, t, steps);
    m.def(
        "multislerp",
        [](const py::buffer& products, const std::vector<double>& weights, double epsilon,
           const py::buffer& coefficients) {
            const Lines lines(products, weights.size(), coefficients);
            return multislerp(lines.given, lines.count, weights, epsilon, lines.written);
        },
        products, py::arg("weights"), py::arg("epsilon"), coefficients);
    m.def(
        "karcher",
        [](const py::buffer& products, size_t count, int max_iterations, double tolerance,
           const py::buffer& coefficients) {
            const Lines lines(products, count, coefficients);
            karcher(lines.given, lines.count, count, max_iterations, tolerance, lines.written);
        },
        products, count, py::arg("max_iterations"), py::arg("tolerance"), coefficients);
    m.def(
        "model_stock",
        [](const py::buffer& products, size_t count, double least_product, StepType steps,
           const py::buffer& coefficients) {
            const Lines lines(products, count, coefficients);
            model_stock(lines.given, lines.count, count, least_product, steps, lines.written);
        },
        products, count, py::arg("least_product"), steps, coefficients);
}

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

void bind_memory(py::module_& m) {
    const auto first = py::arg("first"), last = py::arg("last");
    py::class_<Mapping>(m, "Mapping", py::module_local())
        .def(py::init([](int descriptor, uint64_t size) {
                 return or_os_error([&] { return std::make_unique<Mapping>(descriptor, size); });
             }),
             py::arg("descriptor"), py::arg("size"))
        .def(
            "load",
            [](const Mapping& mapping, uint64_t first, uint64_t last) {
                or_os_error([&] {
                    const py::gil_scoped_release released;
                    mapping.load(first, last);
                });
            },
            first, last)
        .def("release", &Mapping::release, first, last)
        .def(
            "view",
            [](const Mapping& mapping, uint64_t first, uint64_t last) {
                if (first > last || last > mapping.size())
                    throw std::out_of_range("the file is not as large");
                const auto size = static_cast<py::ssize_t>(last - first);
                return py::memoryview::from_memory(mapping.data() + first, size);
            },
            first, last, py::keep_alive<0, 1>())
        .def_property_readonly("torn", &Mapping::torn);
    m.def(
        "address_of",
        [](const py::object& memory) { return reinterpret_cast<uintptr_t>(Bytes(memory).data()); },
        py::arg("memory"));
    m.def(
        "identical",
        [](const std::vector<py::object>& memories, int element_bytes) {
            std::vector<const void*> arrays;
            uint64_t size = 0;
            for (const py::object& memory : memories) {
                const Bytes bytes(memory);
                if (!arrays.empty() && bytes.size() != size) return false;
                size = bytes.size();
                arrays.push_back(bytes.data());
            }
            const Released released(size / 2);
            return identical(arrays, size, element_bytes);
        },
        py::arg("memories"), py::arg("element_bytes"));
}

void bind_rows(py::module_& m) {
    m.def(
        "add_rows",
        [](const HostArray& rows, const py::buffer& sums) {
            const auto width = static_cast<uint64_t>(sums.request().size);
            if (width == 0 || rows.count % width != 0) throw std::invalid_argument("needs whole rows");
            double* totals = numbers<double>(sums, width);
            const Released released(rows.count);
            add_rows(stored(rows, rows.count), rows.count / width, width, totals);
        },
        py::arg("rows"), py::arg("sums"));
    m.def(
        "store_means",
        [](const py::buffer& sums, double divisor, const HostArray& means) {
            store_means(numbers<double>(sums, means.count), divisor, means.count, stored(means, means.count));
        },
        py::arg("sums"), py::arg("divisor"), py::arg("means"));
    m.def(
        "read_rows",
        [](int descriptor, uint64_t position, uint64_t row_bytes, const py::buffer& firsts,
           const py::buffer& sources, const py::buffer& starts, int64_t rows, int64_t source, uint64_t begin,
           const py::object& memory) {
            const auto runs = static_cast<uint64_t>(firsts.request().size);
            const RowRuns from{numbers<int64_t>(firsts, runs), numbers<int64_t>(sources, runs),
                               numbers<int64_t>(starts, runs), runs, rows};
            const Bytes bytes(memory);
            if (row_bytes == 0) throw std::invalid_argument("rows must have bytes");
            return or_os_error([&] {
                const py::gil_scoped_release released;
                return read_rows(descriptor, position, row_bytes, from, source, begin, bytes.size(),
                                 static_cast<char*>(bytes.data()));
            });
        },
        py::arg("descriptor"), py::arg("position"), py::arg("row_bytes"), py::arg("firsts"),
        py::arg("sources"), py::arg("starts"), py::arg("rows"), py::arg("source"), py::arg("begin"),
        py::arg("memory"));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of merge_engine. Use merge_engine.backends instead of calling this directly.";
    m.def("instruction_set", &cpu_instruction_set);
    m.def(
        "runs",
        [](const std::string& instruction_set) { return cpu_primitives(instruction_set.c_str()) != nullptr; },
        py::arg("instruction_set"));
    bind_operations(m);
    bind_kernels(m);
    bind_answers(m);
    bind_geometry(m);
    bind_memory(m);
    bind_rows(m);
}
