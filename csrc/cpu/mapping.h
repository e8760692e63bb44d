// Files in memory without a copy, for inputs that lie in the page cache.
#pragma once

#include <cstdint>

namespace merge_engine {

struct MappedRange;  // what the handler of SIGBUS knows of a mapping

// A file, mapped for reading.
//
// To touch a page that cannot be had any more, because the file became shorter or its disk fails, raises SIGBUS, which
// ends the process. While there are mappings a handler puts zeros in such a page's place, and the mapping is `torn`
// from then on: what was made of its memory is worthless. Other causes of SIGBUS meet whatever handled it before.
class Mapping {
  public:
    // Throws std::system_error when the file cannot be mapped.
    Mapping(int descriptor, uint64_t size);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    const char* data() const { return data_; }
    uint64_t size() const { return size_; }
    bool torn() const;

    // Has the bytes [first, last) read, and mapped, by the time it returns. Throws std::system_error when they cannot be
    // read; where the system cannot tell (Linux before 5.14, gVisor), the mapping is `torn` instead.
    void load(uint64_t first, uint64_t last) const;
    // Takes whole pages among them out of this process's memory again. The page cache keeps them.
    void release(uint64_t first, uint64_t last) const;

  private:
    void touch(uint64_t first, uint64_t last) const;

    uint64_t size_;
    const char* data_ = nullptr;
    MappedRange* range_;
};

}  // namespace merge_engine
