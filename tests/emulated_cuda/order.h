// What comes before what on the emulated device, and which memory is used when.
//
// A clock says what is ordered: for each stream, how many pieces of its work come before. Each stream has a clock for
// its next piece of work, each event one for its point, and the host one for all that it has waited for. Which memory
// a kernel uses is not known: kernels are checked by what they find in it.
#pragma once

#include <cuda_runtime.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulated {

using Clock = std::map<uint64_t, uint64_t>;

struct Stream {
    uint64_t id;
    std::deque<std::function<void()>> work;
    uint64_t handed_in = 0, done = 0;
    Clock clock = {};
};

struct Event {
    std::shared_ptr<Stream> stream;
    uint64_t point = 0;
    Clock clock = {};
};

// A piece of work of a stream that reads or writes bytes [first, last).
struct Use {
    uint64_t stream, number;
    uintptr_t first, last;
    bool writes;
};

struct Block {
    size_t bytes;
    bool registered;  // host memory that is somebody else's
    std::vector<Use> uses;
};

using Blocks = std::map<uintptr_t, Block>;

// Python may destroy something in one thread while another waits for the device.
inline std::recursive_mutex mutex;
using Locked = std::lock_guard<std::recursive_mutex>;

// Handles are numbers that are never given out twice. The default stream has none.
inline uint64_t last_handle = 0;
inline std::map<uint64_t, std::shared_ptr<Stream>> streams{{0, std::make_shared<Stream>(0)}};
inline std::map<uint64_t, Event> events;
inline Blocks device_memory, pinned_memory;
inline Clock host;

[[noreturn]] inline void refuse(const std::string& what) { throw std::logic_error("emulated CUDA: " + what); }

inline std::shared_ptr<Stream> stream_of(cudaStream_t handle) {
    const auto found = streams.find(reinterpret_cast<uint64_t>(handle));
    if (found == streams.end()) refuse("a stream is used that was destroyed, or never made");
    return found->second;
}

inline Event& event_of(cudaEvent_t handle) {
    const auto found = events.find(reinterpret_cast<uint64_t>(handle));
    if (found == events.end()) refuse("an event is used that was destroyed, or never made");
    return found->second;
}

inline void take_in(Clock& clock, const Clock& other) {
    for (const auto& [stream, number] : other) clock[stream] = std::max(clock[stream], number);
}

inline bool comes_before(const Use& use, const Clock& clock) {
    const auto found = clock.find(use.stream);
    return found != clock.end() && found->second >= use.number;
}

inline void finish(Stream& stream, uint64_t point) {
    while (stream.done < point) {
        const std::function<void()> next = std::move(stream.work.front());
        stream.work.pop_front();
        next();
        ++stream.done;
    }
}

// The point of a stream behind all that it was given.
inline Event now(const std::shared_ptr<Stream>& stream) {
    Event event{stream, stream->handed_in, stream->clock};
    event.clock[stream->id] = stream->handed_in;
    return event;
}

inline void wait_for(const Event& event) {
    if (!event.stream) return;  // never recorded
    finish(*event.stream, event.point);
    take_in(host, event.clock);
}

// The stream, whose next piece of work comes after all that the host has waited for.
inline std::shared_ptr<Stream> about_to_use(cudaStream_t handle) {
    const auto stream = stream_of(handle);
    take_in(stream->clock, host);
    return stream;
}

// Where there is a schedule, streams do some of their work when any work is handed in.
inline void get_on() {
    static std::mt19937_64 random;
    static uint64_t seed = 0;
    if (schedule == 0) return;
    if (seed != schedule) random.seed(seed = schedule);
    for (const auto& [_, stream] : streams) {
        const uint64_t waiting = stream->handed_in - stream->done;
        if (waiting && random() % 2) finish(*stream, stream->done + random() % (waiting + 1));
    }
}

inline void hand_in(Stream& stream, std::function<void()> work) {
    stream.work.push_back(std::move(work));
    ++stream.handed_in;
    get_on();
}

// The block that holds the bytes, or null if no byte is in any.
inline Block* find(Blocks& blocks, uintptr_t first, size_t bytes) {
    auto after = blocks.lower_bound(first + bytes);
    if (after == blocks.begin()) return nullptr;
    const auto& [start, block] = *--after;
    if (first >= start + block.bytes) return nullptr;
    if (first < start || first + bytes > start + block.bytes) refuse("a copy goes beyond the memory it starts in");
    return &after->second;
}

// Notes that the stream's next piece of work uses some bytes of a block.
inline void use(Block& block, const Stream& stream, uintptr_t first, size_t bytes, bool writes) {
    std::erase_if(block.uses, [](const Use& earlier) { return comes_before(earlier, host); });
    for (const Use& earlier : block.uses) {
        if (earlier.last <= first || first + bytes <= earlier.first || !(earlier.writes || writes)) continue;
        if (earlier.stream == stream.id || comes_before(earlier, stream.clock)) continue;
        refuse("two streams use the same memory, and no event orders them");
    }
    block.uses.push_back({stream.id, stream.handed_in + 1, first, first + bytes, writes});
}

inline void use_device(const Stream& stream, const void* memory, size_t bytes, bool writes) {
    const auto first = reinterpret_cast<uintptr_t>(memory);
    Block* block = find(device_memory, first, bytes);
    if (!block) refuse("device memory is used that was freed, or never allocated");
    use(*block, stream, first, bytes, writes);
}

// Whether the memory is pinned.
inline bool use_host(const Stream& stream, const void* memory, size_t bytes, bool writes) {
    const auto first = reinterpret_cast<uintptr_t>(memory);
    if (find(device_memory, first, bytes)) refuse("device memory is used as host memory");
    Block* block = find(pinned_memory, first, bytes);
    if (block) use(*block, stream, first, bytes, writes);
    return block != nullptr;
}

inline void unpin(void* memory, bool registered) {
    const auto found = pinned_memory.find(reinterpret_cast<uintptr_t>(memory));
    if (found == pinned_memory.end() || found->second.registered != registered) {
        refuse("host memory is given back that is not pinned, or not in this way");
    }
    for (const Use& use : found->second.uses) {
        if (!comes_before(use, host)) refuse("pinned memory is given back before a copy of it is waited for");
    }
    pinned_memory.erase(found);
}

}  // namespace emulated
