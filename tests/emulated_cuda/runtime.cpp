// Streams, events and memory of the emulated device, stricter than a real one.
//
// It refuses every use of a stream, an event or memory that is not there, or not there any more, and copies and
// releases of the same memory that nothing orders. A real device crashes on such a program, or does it right on most
// days. Refusing throws; a destructor that is refused something ends the process.
#include <cuda_runtime.h>

#include "order.h"

namespace emulated {

uint64_t handed_in = 0, schedule = 0;

void launch(cudaStream_t handle, std::function<void()> grid) {
    const Locked locked(mutex);
    const auto stream = about_to_use(handle);
    ++handed_in;
    hand_in(*stream, std::move(grid));
}

uint64_t held() {
    const Locked locked(mutex);
    return streams.size() - 1 + events.size() + device_memory.size() + pinned_memory.size();
}

}  // namespace emulated

using namespace emulated;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned) {
    const Locked locked(mutex);
    ++last_handle;
    streams[last_handle] = std::make_shared<Stream>(last_handle);
    return *handle = reinterpret_cast<cudaStream_t>(last_handle), cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    const Locked locked(mutex);
    return wait_for(now(about_to_use(handle))), cudaSuccess;
}

// A device does what is left to do at some time. This one does it when an event is waited for, or never.
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    const Locked locked(mutex);
    return streams.erase(stream_of(handle)->id), cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
    const Locked locked(mutex);
    const auto stream = about_to_use(handle);
    const Event point = event_of(event);
    if (!point.stream) return cudaSuccess;
    take_in(stream->clock, point.clock);
    hand_in(*stream, [point] { finish(*point.stream, point.point); });
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
    const Locked locked(mutex);
    events[++last_handle] = {};
    return *handle = reinterpret_cast<cudaEvent_t>(last_handle), cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const Locked locked(mutex);
    return event_of(event) = now(about_to_use(stream)), cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const Locked locked(mutex);
    return wait_for(event_of(event)), cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    const Locked locked(mutex);
    event_of(event);
    return events.erase(reinterpret_cast<uint64_t>(event)), cudaSuccess;
}

// Fresh memory holds garbage, so that what forgets to clear it is noticed.
cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t handle) {
    const Locked locked(mutex);
    const auto stream = about_to_use(handle);
    if (bytes == 0) return cudaErrorInvalidValue;
    *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(*memory, 0xA5, bytes);
    Block& block = device_memory[reinterpret_cast<uintptr_t>(*memory)] = {bytes, false, {}};
    use(block, *stream, reinterpret_cast<uintptr_t>(*memory), bytes, true);
    hand_in(*stream, [] {});
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t handle) {
    const Locked locked(mutex);
    const auto stream = about_to_use(handle);
    const auto found = device_memory.find(reinterpret_cast<uintptr_t>(memory));
    if (found == device_memory.end()) refuse("device memory is freed that was freed before, or never allocated");
    for (const Use& use : found->second.uses) {
        if (use.stream == stream->id || comes_before(use, stream->clock)) continue;
        refuse("device memory is freed while another stream may use it");
    }
    const auto free = [memory, bytes = found->second.bytes] {
        std::memset(memory, 0x5A, bytes);
        std::free(memory);
    };
    device_memory.erase(found);
    if (stream->work.empty()) {
        free();
    } else {
        hand_in(*stream, free);
    }
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
    const Locked locked(mutex);
    *memory = std::malloc(bytes);
    std::memset(*memory, 0xA5, bytes);
    pinned_memory[reinterpret_cast<uintptr_t>(*memory)] = {bytes, false, {}};
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
    const Locked locked(mutex);
    unpin(memory, false);
    return std::free(memory), cudaSuccess;
}

cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
    const Locked locked(mutex);
    const auto first = reinterpret_cast<uintptr_t>(memory);
    if (bytes == 0) return cudaErrorInvalidValue;
    const auto after = pinned_memory.lower_bound(first + bytes);
    if (after != pinned_memory.begin() && std::prev(after)->first + std::prev(after)->second.bytes > first) {
        return cudaErrorHostMemoryAlreadyRegistered;
    }
    pinned_memory[first] = {bytes, true, {}};
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* memory) {
    const Locked locked(mutex);
    return unpin(memory, true), cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t handle) {
    const Locked locked(mutex);
    const auto stream = about_to_use(handle);
    ++handed_in;
    if (bytes == 0) return cudaSuccess;
    use_device(*stream, memory, bytes, true);
    hand_in(*stream, [=] { std::memset(memory, value, bytes); });
    return cudaSuccess;
}

// What is not pinned goes up before the call returns, and has come down.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle) {
    const Locked locked(mutex);
    const auto stream = about_to_use(handle);
    ++handed_in;
    if (bytes == 0) return cudaSuccess;
    const bool up = kind == cudaMemcpyHostToDevice;
    use_device(*stream, up ? to : from, bytes, up);
    const bool pinned = use_host(*stream, up ? from : to, bytes, !up);
    if (up && !pinned) {
        const auto* bytes_now = static_cast<const char*>(from);
        const auto staged = std::make_shared<std::vector<char>>(bytes_now, bytes_now + bytes);
        hand_in(*stream, [=] { std::memcpy(to, staged->data(), bytes); });
        return cudaSuccess;
    }
    hand_in(*stream, [=] { std::memcpy(to, from, bytes); });
    if (!pinned) wait_for(now(stream));
    return cudaSuccess;
}
