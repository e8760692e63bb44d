#include "mapping.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <mutex>
#include <system_error>

#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace merge_engine {

// Never deleted, because the handler may be looking; used again by later mappings.
struct MappedRange {
    std::atomic<uintptr_t> first{0}, last{0};
    std::atomic<bool> torn{false};
    MappedRange* next = nullptr;
    bool used = false;  // known under the lock only
};

namespace {

const uint64_t page_size = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));

std::mutex lock;
int in_use = 0;
struct sigaction earlier;
std::atomic<MappedRange*> ranges{nullptr};

void put_zeros(int, siginfo_t* info, void*) {
    const int saved = errno;
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    for (MappedRange* range = ranges.load(); range; range = range->next) {
        if (address < range->first || address >= range->last) continue;
        range->torn = true;
        void* page = reinterpret_cast<void*>(address / page_size * page_size);
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
        if (mmap(page, page_size, PROT_READ, flags, -1, 0) == MAP_FAILED) break;
        errno = saved;
        return;
    }
    sigaction(SIGBUS, &earlier, nullptr);  // whoever touched it does so again, and meets the earlier handler
}

MappedRange* take_range() {
    const std::lock_guard<std::mutex> guard(lock);
    if (in_use++ == 0) {
        struct sigaction action = {};
        action.sa_sigaction = put_zeros;
        action.sa_flags = SA_SIGINFO;
        sigemptyset(&action.sa_mask);
        sigaction(SIGBUS, &action, &earlier);
    }
    MappedRange* range = ranges;
    while (range && range->used) range = range->next;
    if (!range) {
        range = new MappedRange;
        range->next = ranges;
        ranges = range;
    }
    range->used = true;
    range->torn = false;
    return range;
}

void give_back(MappedRange* range) {
    const std::lock_guard<std::mutex> guard(lock);
    range->last = range->first = 0;
    range->used = false;
    if (--in_use > 0) return;
    struct sigaction current;
    sigaction(SIGBUS, nullptr, &current);
    if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == put_zeros) sigaction(SIGBUS, &earlier, nullptr);
}

}  // namespace

Mapping::Mapping(int descriptor, uint64_t size) : size_(size), range_(take_range()) {
    if (size == 0) return;  // there is no such mapping
    void* memory = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
    if (memory == MAP_FAILED) {
        const int error = errno;
        give_back(range_);
        throw std::system_error(error, std::generic_category());
    }
    data_ = static_cast<const char*>(memory);
    range_->first = reinterpret_cast<uintptr_t>(data_);
    range_->last = range_->first + (size + page_size - 1) / page_size * page_size;
}

Mapping::~Mapping() {
    if (data_) munmap(const_cast<char*>(data_), size_);
    give_back(range_);
}

bool Mapping::torn() const { return range_->torn; }

void Mapping::load(uint64_t first, uint64_t last) const {
    first = first / page_size * page_size;
    if (first >= last) return;
    while (madvise(const_cast<char*>(data_) + first, last - first, MADV_POPULATE_READ) != 0) {
        if (errno == EINVAL) return touch(first, last);  // the system has no such call
        if (errno != EINTR && errno != EAGAIN) throw std::system_error(errno, std::generic_category());
    }
}

void Mapping::touch(uint64_t first, uint64_t last) const {
    madvise(const_cast<char*>(data_) + first, last - first, MADV_WILLNEED);  // a hint: read ahead
    for (uint64_t at = first; at < last; at += page_size) *static_cast<const volatile char*>(data_ + at);
}

void Mapping::release(uint64_t first, uint64_t last) const {
    first = (first + page_size - 1) / page_size * page_size;
    last = std::min(last, size_) == size_ ? size_ : last / page_size * page_size;
    if (first < last) madvise(const_cast<char*>(data_) + first, last - first, MADV_DONTNEED);
}

}  // namespace merge_engine
