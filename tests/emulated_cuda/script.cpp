// Calls the emulated runtime as a script on standard input says, to see what it refuses: prints the number of the line
// and why. A line is a call and the names of what it is about; memory has 64 bytes.
#include <cuda_runtime.h>

#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>

namespace {

constexpr size_t BYTES = 64;

std::map<std::string, cudaStream_t> streams;
std::map<std::string, cudaEvent_t> events;
std::map<std::string, void*> memories;

cudaError_t call(std::istream& line) {
    const auto word = [&] {
        std::string next;
        line >> next;
        return next;
    };
    const auto stream = [&] { return streams[word()]; };
    const auto event = [&] { return events[word()]; };
    const auto memory = [&]() -> void*& { return memories[word()]; };
    const std::string what = word();
    if (what == "make_stream") return cudaStreamCreateWithFlags(&streams[word()], cudaStreamNonBlocking);
    if (what == "destroy_stream") return cudaStreamDestroy(stream());
    if (what == "wait_for_stream") return cudaStreamSynchronize(stream());
    if (what == "make_event") return cudaEventCreateWithFlags(&events[word()], cudaEventDisableTiming);
    if (what == "destroy_event") return cudaEventDestroy(event());
    if (what == "wait_for_event") return cudaEventSynchronize(event());
    if (what == "allocate_pinned") return cudaHostAlloc(&memory(), BYTES, cudaHostAllocPortable);
    if (what == "free_pinned") return cudaFreeHost(memory());
    if (what == "take_memory") return memory() = std::malloc(BYTES), cudaSuccess;
    if (what == "pin") return cudaHostRegister(memory(), BYTES, cudaHostRegisterPortable);
    if (what == "unpin") return cudaHostUnregister(memory());
    // Those on a stream name it first.
    const cudaStream_t on = stream();
    if (what == "record") return cudaEventRecord(event(), on);
    if (what == "wait") return cudaStreamWaitEvent(on, event(), 0);
    if (what == "allocate") return cudaMallocAsync(&memory(), BYTES, on);
    if (what == "free") return cudaFreeAsync(memory(), on);
    if (what == "clear") return cudaMemsetAsync(memory(), 0, BYTES, on);
    if (what == "clear_too_much") return cudaMemsetAsync(memory(), 0, BYTES + 1, on);
    void* device = memory();
    if (what == "upload") return cudaMemcpyAsync(device, memory(), BYTES, cudaMemcpyHostToDevice, on);
    if (what == "download") return cudaMemcpyAsync(memory(), device, BYTES, cudaMemcpyDeviceToHost, on);
    throw std::invalid_argument("there is no call " + what);
}

}  // namespace

int main() {
    std::string line;
    for (int number = 1; std::getline(std::cin, line); ++number) {
        std::istringstream words(line);
        try {
            if (call(words) == cudaSuccess) continue;
            std::cout << number << ": error";
        } catch (const std::invalid_argument&) {
            throw;
        } catch (const std::logic_error& refused) {
            std::cout << number << ": " << refused.what();
        }
        return 0;
    }
}
