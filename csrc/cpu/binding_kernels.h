// The primitives of the CPU as Python calls them: everything that could lead out of memory is checked here.
#pragma once

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "../binding_types.h"
#include "primitives.h"

namespace merge_engine {

// Lets other Python threads run while a primitive does. Not for a few elements: getting the lock back would
// take longer.
class Released {
  public:
    explicit Released(uint64_t count) {
        constexpr uint64_t FEW = 1 << 15;
        if (count > FEW) released_.emplace();
    }

  private:
    std::optional<py::gil_scoped_release> released_;
};

// The bytes of a buffer.
class Bytes {
  public:
    explicit Bytes(const py::handle& memory) {
        if (PyObject_GetBuffer(memory.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    }
    ~Bytes() { PyBuffer_Release(&view_); }
    Bytes(const Bytes&) = delete;

    void* data() const { return view_.buf; }
    uint64_t size() const { return static_cast<uint64_t>(view_.len); }

  private:
    Py_buffer view_;
};

// Numbers that the caller has made room for.
template <class Number>
Number* numbers(const py::buffer& memory, uint64_t count) {
    const py::buffer_info info = memory.request(true);
    if (!info.item_type_is_equivalent_to<Number>() || static_cast<uint64_t>(info.size) != count) {
        throw std::invalid_argument("needs memory for " + std::to_string(count) + " numbers");
    }
    return static_cast<Number*>(info.ptr);
}

// Elements in host memory, or computed from such. `owner` keeps the memory alive.
struct HostArray {
    Array array;
    uint64_t count;
    py::object owner;
    std::shared_ptr<const Computed> computed = nullptr;
};
using Inputs = std::vector<HostArray>;

inline uint64_t bytes_of(DType dtype) { return dtype == DType::F64 ? 8 : dtype == DType::F32 ? 4 : 2; }

inline Array checked(const HostArray& array, uint64_t count) {
    if (array.count == count) return array.array;
    throw std::invalid_argument("a chunk of " + std::to_string(count) + " elements got an array of " +
                                std::to_string(array.count));
}

// The same for what must be in memory.
inline Array stored(const HostArray& array, uint64_t count) {
    if (array.computed) throw std::invalid_argument("needs an array in memory");
    return checked(array, count);
}

// The arrays of a chunk of `count` elements.
inline std::vector<Array> checked(const Inputs& inputs, uint64_t count) {
    if (count >= uint64_t{1} << 32) {
        throw std::invalid_argument("a chunk of " + std::to_string(count) +
                                    " elements is too large; cut it below 2**32");
    }
    if (inputs.empty()) throw std::invalid_argument("a chunk needs an input");
    std::vector<Array> arrays;
    for (const HostArray& input : inputs) arrays.push_back(checked(input, count));
    return arrays;
}

// The input of a model. The base is the first of all inputs.
inline const Array& model_of(const std::vector<Array>& inputs, uint64_t model) {
    return inputs.at(1 + model);
}

inline std::vector<Array> models_of(const std::vector<Array>& inputs) {
    return {inputs.begin() + 1, inputs.end()};
}

template <class T>
void demand_as_many(const std::vector<T>& items, uint64_t count, const char* what) {
    if (items.size() == count) return;
    throw std::invalid_argument(std::to_string(items.size()) + " " + what + " for " + std::to_string(count) +
                                " inputs");
}

inline uint64_t sum_blocks_of(uint64_t count) { return (count + SUM_BLOCK - 1) / SUM_BLOCK; }

// What was found with all bits of the key, at whatever level.
struct WholeFound : Found {};

// The primitives of an instruction set, on so many threads. Inputs of a chunk begin with the base, where a
// primitive needs one; models are counted from 0.
class Kernels {
  public:
    Kernels(const std::string& instruction_set, int threads)
        : table_(cpu_primitives(instruction_set.c_str())), threads_(threads) {
        if (!table_) throw std::invalid_argument("this processor cannot run " + instruction_set + " code");
    }

    // `columns` are (model, prefix, slot), `counts` is [slots, bins].
    void count_keys(const Inputs& inputs,
                    const std::vector<std::tuple<uint64_t, uint64_t, uint64_t>>& columns, DType working,
                    int level, uint64_t count, uint64_t slots, const py::buffer& counts) const {
        const std::vector<Array> arrays = checked(inputs, count);
        const int bits = level_bits(level);
        uint64_t* tables = numbers<uint64_t>(counts, slots << bits);
        std::vector<KeyColumn> where;
        for (const auto& [model, prefix, slot] : columns) {
            if (slot >= slots) throw std::out_of_range("there is no such slot");
            where.push_back({model_of(arrays, model), prefix, tables + (slot << bits)});
        }
        const Released released(count);
        table_->count_keys(arrays[0], where, working, level_shift(working, level), count, threads_);
    }

    // `sought` are (model, ranks). For each, what was found for its ranks.
    std::vector<std::vector<WholeFound>> find_all(
        const Inputs& inputs, const std::vector<std::tuple<uint64_t, std::vector<uint64_t>>>& sought, DType working,
        uint64_t count) const {
        const std::vector<Array> arrays = checked(inputs, count);
        std::vector<Sought> asked;
        for (const auto& [model, ranks] : sought) asked.push_back({model_of(arrays, model), ranks});
        const Released released(count);
        std::vector<std::vector<WholeFound>> whole;
        for (const auto& of_model : table_->find_all(arrays[0], asked, working, count, threads_)) {
            whole.emplace_back();
            for (const Found& found : of_model) whole.back().push_back({found});
        }
        return whole;
    }

    // How many elements have the key, and the offset of the `nth` of them, -1 if there are not so many.
    std::pair<uint64_t, int64_t> locate(const Inputs& inputs, uint64_t model, DType working, uint64_t key,
                                        uint64_t nth, uint64_t count) const {
        const std::vector<Array> arrays = checked(inputs, count);
        const Array& array = model_of(arrays, model);
        const Released released(count);
        int64_t offset = -1;
        const uint64_t found = table_->locate(arrays[0], array, working, key, nth, count, threads_, &offset);
        return {found, offset};
    }

    // `sums` is [blocks, models, 2], `notes` the addresses of room for what is kept of each model, or 0.
    void l1_norms(const Inputs& inputs, const std::vector<Mask>& masks, const std::vector<uintptr_t>& notes,
                  DType working, bool storage_rounding, uint64_t start, uint64_t count,
                  const py::buffer& sums) const {
        sum(table_->l1_norms, inputs, masks, notes, working, storage_rounding, start, count, sums);
    }
    void squares(const Inputs& inputs, const std::vector<Mask>& masks, const std::vector<uintptr_t>& notes,
                 DType working, bool storage_rounding, uint64_t start, uint64_t count,
                 const py::buffer& sums) const {
        sum(table_->squares, inputs, masks, notes, working, storage_rounding, start, count, sums);
    }

    // What each model's mask keeps alone, and what others keep too.
    std::vector<std::pair<uint64_t, uint64_t>> overlaps(const Inputs& inputs, const std::vector<Mask>& masks,
                                                        DType working, uint64_t start, uint64_t count) const {
        const std::vector<Array> arrays = checked(inputs, count), models = models_of(arrays);
        demand_as_many(masks, models.size(), "masks");
        std::vector<uint64_t> counts(2 * models.size());
        {
            const Released released(count);
            table_->overlaps(arrays[0], models, masks, working, start, count, threads_, counts.data());
        }
        std::vector<std::pair<uint64_t, uint64_t>> of_models;
        for (size_t i = 0; i < models.size(); ++i) of_models.emplace_back(counts[2 * i], counts[2 * i + 1]);
        return of_models;
    }

    // `found` has a number for each line of `length` elements.
    void divergences(const Inputs& inputs, DType working, uint64_t length, uint64_t count,
                     const py::buffer& found) const {
        const std::vector<Array> arrays = checked(inputs, count);
        if (length == 0 || count % length) throw std::invalid_argument("a chunk holds whole lines");
        double* written = numbers<double>(found, count / length);
        const Array& model = model_of(arrays, 0);
        const Released released(count);
        table_->divergences(arrays[0], model, working, length, count, threads_, written);
    }

    // A base of zeros, and a model that has the scores of a chunk as its task vector, in the dtype of the arithmetic.
    Inputs scores(const Inputs& inputs, const Score& score, DType working, uint64_t count) const {
        const std::shared_ptr<const Computed> model = table_->scores(checked(inputs, count), score, working);
        const DType dtype = working == DType::F64 ? DType::F64 : DType::F32;
        // Zeros are never freed.
        const std::shared_ptr<const Computed> base(&table_->zeros(), [](const Computed*) {});
        return {{{nullptr, dtype, base.get()}, count, py::none(), base},
                {{nullptr, dtype, model.get()}, count, py::cast(inputs), model}};
    }

    // `notes` is the address of room for what the mask keeps of the only model.
    void note_band(const Inputs& inputs, const Mask& mask, DType working, uint64_t start, uint64_t count,
                   uintptr_t notes) const {
        const std::vector<Array> arrays = checked(inputs, count);
        const Array& model = model_of(arrays, 0);
        const Released released(count);
        table_->note_band(arrays[0], model, mask, working, start, count, threads_, pointer<uint64_t>(notes));
    }

    // Returns how many values are not finite in the base, the model, and the output.
    std::vector<uint64_t> nearswap(const Inputs& inputs, const HostArray& output, double threshold,
                                   bool storage_rounding, DType working, uint64_t count) const {
        const std::vector<Array> arrays = checked(inputs, count);
        const Nearswap op{arrays[0], model_of(arrays, 0), stored(output, count),
                          working,   threshold,           storage_rounding};
        const Released released(count);
        std::vector<uint64_t> non_finite(3);
        table_->nearswap(op, count, threads_, non_finite.data());
        return non_finite;
    }

    // `sums` is [blocks, lines of a block, pairs].
    void gram(const Inputs& inputs, DType working, bool of_deltas, const Line& line, uint64_t start,
              uint64_t count, const py::buffer& sums) const {
        const std::vector<Array> arrays = checked(inputs, count);
        const uint64_t block = sum_block(line), vectors = arrays.size() - (of_deltas ? 1 : 0);
        if (start % block != 0) throw std::invalid_argument("a chunk begins with a block of sums");
        if (line.along_first() && count % line.stride != 0) throw std::invalid_argument("a chunk has whole rows");
        const uint64_t blocks = (count + block - 1) / block;
        double* written = numbers<double>(sums, blocks * lines_of_block(line) * vectors * (vectors + 1) / 2);
        const Released released(count);
        table_->gram(arrays, working, of_deltas, line, start, count, threads_, written);
    }

    // Lines are (length, stride).
    void rank_thresholds(const Inputs& inputs, uint64_t model, DType working,
                         const std::pair<uint64_t, uint64_t>& line, double density, double epsilon,
                         uint64_t count, uintptr_t thresholds) const {
        const std::vector<Array> arrays = checked(inputs, count);
        const Array& array = model_of(arrays, model);
        const Released released(count);
        table_->rank_thresholds(arrays[0], array, working, line.first, line.second, density, epsilon, count,
                                threads_, pointer<uint32_t>(thresholds));
    }

    void note_ranks(const Inputs& inputs, uint64_t model, DType working,
                    const std::pair<uint64_t, uint64_t>& line, double density, double epsilon,
                    uint64_t random_key, uint64_t start, uint64_t count, uintptr_t notes) const {
        const std::vector<Array> arrays = checked(inputs, count);
        const Array& array = model_of(arrays, model);
        const Released released(count);
        table_->note_ranks(arrays[0], array, working, line.first, line.second, density, epsilon, random_key,
                           start, count, threads_, pointer<uint64_t>(notes));
    }

    // `entries` are (weight, rescale, vote slack, retain slack). Returns ([(kept, lost, saved) of each
    // model], [values that are not finite in each input, and in the output]).
    std::pair<std::vector<std::tuple<uint64_t, uint64_t, uint64_t>>, std::vector<uint64_t>> consensus(
        const Inputs& inputs, const HostArray& output, const std::vector<Mask>& masks,
        const std::vector<std::tuple<double, double, double, double>>& entries, DType working,
        Election election, bool normalize, bool storage_rounding, double scale, double divisor,
        bool wide, uint64_t start, uint64_t count) const {
        const std::vector<Array> arrays = checked(inputs, count);
        demand_as_many(masks, arrays.size() - 1, "masks");
        demand_as_many(entries, arrays.size() - 1, "entries");
        Consensus op{arrays[0], stored(output, count), working, {},     election,
                     normalize, storage_rounding,       scale,   divisor, wide};
        for (size_t i = 0; i < entries.size(); ++i) {
            const auto& [weight, rescale, vote_slack, retain_slack] = entries[i];
            op.entries.push_back({arrays[1 + i], masks[i], rescale, weight, vote_slack, retain_slack});
        }
        std::vector<Counts> counts(entries.size());
        std::vector<uint64_t> non_finite(arrays.size() + 1);
        {
            const Released released(count);
            table_->consensus(op, start, count, threads_, counts.data(), non_finite.data());
        }
        std::vector<std::tuple<uint64_t, uint64_t, uint64_t>> of_models;
        for (const Counts& c : counts) of_models.emplace_back(c.kept, c.lost, c.saved);
        return {of_models, non_finite};
    }

    // `of_lines` is [lines, terms] if there is a line. Returns how many values are not finite in each input, and in the
    // output.
    std::vector<uint64_t> combine(const Inputs& inputs, const HostArray& output,
                                  const std::vector<double>& coefficients, std::optional<double> divisor,
                                  bool fused, bool rounded, bool stepwise, bool on_base, const Line& line,
                                  const std::optional<py::buffer>& of_lines, DType working, uint64_t start,
                                  uint64_t count) const {
        const std::vector<Array> arrays = checked(inputs, count);
        Combine op{arrays, coefficients, stored(output, count), working, divisor.has_value(), divisor.value_or(1),
                   fused,  rounded,      stepwise,               on_base, line,                nullptr};
        if (line.whole_tensor()) {
            demand_as_many(coefficients, op.terms(), "coefficients");
        } else if (count > 0) {
            const uint64_t lines = line.along_first() ? line.stride : (start + count - 1) / line.length + 1;
            const uint64_t size = static_cast<uint64_t>(of_lines.value().request().size);
            if (size < lines * op.terms()) throw std::invalid_argument("needs coefficients for every line");
            op.of_lines = numbers<double>(of_lines.value(), size);
        }
        const Released released(count);
        std::vector<uint64_t> non_finite(arrays.size() + 1);
        table_->combine(op, start, count, threads_, non_finite.data());
        return non_finite;
    }

    // Adds to `values`, elements [first, ...) of a matrix with `width` columns, in place. The factors of rows are
    // [rows, rank], those of columns [rank, width]; transposed, [rank, rows] and [width, rank].
    void add_low_rank(const HostArray& values, const HostArray& rows, const HostArray& columns, uint64_t rank,
                      uint64_t width, uint64_t first, bool transposed, double scale) const {
        if (rank == 0 || width == 0) throw std::invalid_argument("a product needs a rank and columns");
        const uint64_t row_count = rows.count / rank;
        const Array of_rows = stored(rows, row_count * rank), of_columns = stored(columns, rank * width);
        if (first > row_count * width || values.count > row_count * width - first) {
            throw std::out_of_range("there are elements without factors");
        }
        const LowRank op{stored(values, values.count), of_rows,   of_columns, rank, width, first, values.count,
                         row_count,    transposed, scale};
        const Released released(values.count);
        table_->add_low_rank(op);
    }

  private:
    void sum(decltype(Primitives::l1_norms) primitive, const Inputs& inputs, const std::vector<Mask>& masks,
             const std::vector<uintptr_t>& notes, DType working, bool storage_rounding, uint64_t start,
             uint64_t count, const py::buffer& sums) const {
        const std::vector<Array> arrays = checked(inputs, count), models = models_of(arrays);
        demand_as_many(masks, models.size(), "masks");
        demand_as_many(notes, models.size(), "notes");
        double* written = numbers<double>(sums, sum_blocks_of(count) * 2 * models.size());
        std::vector<uint64_t*> noted;
        for (const uintptr_t address : notes) noted.push_back(pointer<uint64_t>(address));
        const Released released(count);
        primitive(arrays[0], models, masks, noted, working, storage_rounding, start, count, threads_, written);
    }

    const Primitives* table_;
    int threads_;
};

inline void bind_kernels(py::module_& m) {
    const py::module_local local;
    const auto count = py::arg("count"), inputs = py::arg("inputs"), working = py::arg("working");
    const auto start = py::arg("start");
    py::class_<HostArray>(m, "HostArray", local)
        .def(py::init([](const py::object& memory, DType dtype) {
                 const Bytes bytes(memory);
                 return HostArray{{bytes.data(), dtype}, bytes.size() / bytes_of(dtype), memory};
             }),
             py::arg("memory"), py::arg("dtype"))
        .def(py::init([](uintptr_t address, uint64_t count, DType dtype, const py::object& owner) {
                 return HostArray{{pointer<void>(address), dtype}, count, owner};
             }),
             py::arg("address"), count, py::arg("dtype"), py::arg("owner"))
        .def_readonly("count", &HostArray::count);
    // Addresses are those of host memory.
    py::class_<Score>(m, "Score", local)
        .def_static(
            "variance",
            [](bool storage_rounding) { return Score{ScoreKind::Variance, storage_rounding, 0, nullptr}; },
            py::arg("storage_rounding"))
        .def_static(
            "divergence",
            [](uint64_t length, uintptr_t divergences) {
                return Score{ScoreKind::Divergence, false, length, pointer<const double>(divergences)};
            },
            py::arg("length"), py::arg("divergences"));
    py::class_<Kernels>(m, "Kernels", local)
        .def(py::init<const std::string&, int>(), py::arg("instruction_set"), py::arg("threads"))
        .def("count_keys", &Kernels::count_keys, inputs, py::arg("columns"), working, py::arg("level"), count,
             py::arg("slots"), py::arg("counts"))
        .def("find_all", &Kernels::find_all, inputs, py::arg("sought"), working, count)
        .def("locate", &Kernels::locate, inputs, py::arg("model"), working, py::arg("key"), py::arg("nth"),
             count)
        .def("l1_norms", &Kernels::l1_norms, inputs, py::arg("masks"), py::arg("notes"), working,
             py::arg("storage_rounding"), start, count, py::arg("sums"))
        .def("squares", &Kernels::squares, inputs, py::arg("masks"), py::arg("notes"), working,
             py::arg("storage_rounding"), start, count, py::arg("sums"))
        .def("overlaps", &Kernels::overlaps, inputs, py::arg("masks"), working, start, count)
        .def("divergences", &Kernels::divergences, inputs, working, py::arg("length"), count,
             py::arg("found"))
        .def("scores", &Kernels::scores, inputs, py::arg("score"), working, count)
        .def("note_band", &Kernels::note_band, inputs, py::arg("mask"), working, start, count, py::arg("notes"))
        .def("nearswap", &Kernels::nearswap, inputs, py::arg("output"), py::arg("threshold"),
             py::arg("storage_rounding"), working, count)
        .def("gram", &Kernels::gram, inputs, working, py::arg("of_deltas"), py::arg("line"), start, count,
             py::arg("sums"))
        .def("rank_thresholds", &Kernels::rank_thresholds, inputs, py::arg("model"), working, py::arg("line"),
             py::arg("density"), py::arg("epsilon"), count, py::arg("thresholds"))
        .def("note_ranks", &Kernels::note_ranks, inputs, py::arg("model"), working, py::arg("line"),
             py::arg("density"), py::arg("epsilon"), py::arg("random_key"), start, count, py::arg("notes"))
        .def("consensus", &Kernels::consensus, inputs, py::arg("output"), py::arg("masks"),
             py::arg("entries"), working, py::arg("election"), py::arg("normalize"),
             py::arg("storage_rounding"), py::arg("scale"), py::arg("divisor"), py::arg("wide"), start, count)
        .def("combine", &Kernels::combine, inputs, py::arg("output"), py::arg("coefficients"),
             py::arg("divisor"), py::arg("fused"), py::arg("rounded"), py::arg("stepwise"), py::arg("on_base"),
             py::arg("line"), py::arg("of_lines"), working, start, count)
        .def("add_low_rank", &Kernels::add_low_rank, py::arg("values"), py::arg("rows"), py::arg("columns"),
             py::arg("rank"), py::arg("width"), py::arg("first"), py::arg("transposed"), py::arg("scale"));
}

}  // namespace merge_engine
