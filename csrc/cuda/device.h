// Devices, their memory, and the order of work on them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "queue.h"

namespace merge_engine {

struct Device {
    std::string name;
    int major, minor;  // compute capability
    uint64_t memory;   // bytes
};

// Throws std::runtime_error with a remedy when there is no usable driver.
std::vector<Device> devices();

uint64_t free_memory(int device);

// A queue with a new stream, which does not wait for the default one.
Queue new_queue(int device);

// A queue of a caller's stream.
Queue callers_queue(int device, uintptr_t stream);

// Waits until all work that the queue was given is done.
void wait_for(const Queue& queue);

// A point in a queue's work, behind all that the queue was given before.
class Event {
  public:
    explicit Event(const Queue& queue);
    ~Event();
    Event(const Event&) = delete;
    void record();  // moves the point behind all that the queue was given since
    void wait() const;
    const Queue& queue() const { return queue_; }
    void* handle() const { return event_; }  // a cudaEvent_t

  private:
    Queue queue_;
    void* event_ = nullptr;
};

// Device memory for the work of a queue. It is given back behind that work and behind all copies, whatever queue they
// were given to. Throws std::bad_alloc when there is too little.
class DeviceMemory {
  public:
    DeviceMemory(const Queue& queue, uint64_t bytes, bool zero);
    DeviceMemory(const Queue& queue, const std::string& contents);
    ~DeviceMemory();
    DeviceMemory(const DeviceMemory&) = delete;
    uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }
    uint64_t bytes() const { return bytes_; }
    void outlive(const std::shared_ptr<Event>& copy);  // which is done at the event

  private:
    Queue queue_;
    uint64_t bytes_;
    void* data_ = nullptr;
    std::vector<std::shared_ptr<Event>> copies_;  // the last on each other queue
};

// A caller's host memory while it is copied from and to. It is pinned if the system lets it be; if not, copies are slower
// and as right. Its destructor waits for all copies.
class HostMemory {
  public:
    HostMemory(void* data, uint64_t bytes);
    ~HostMemory();
    HostMemory(const HostMemory&) = delete;
    uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }
    uint64_t bytes() const { return bytes_; }
    void outlive(const std::shared_ptr<Event>& copy);  // which is done at the event

  private:
    uint64_t bytes_;
    void* data_;
    bool pinned_;
    std::vector<std::shared_ptr<Event>> copies_;  // the last on each queue
};

// Copies `bytes` between places in both memories, and returns the point behind that. Both outlive the copy. Thread-safe.
// Throws std::out_of_range for what one of them does not hold.
std::shared_ptr<Event> upload(const Queue& queue, DeviceMemory& to, uint64_t to_at, HostMemory& from, uint64_t from_at,
                              uint64_t bytes);
std::shared_ptr<Event> download(const Queue& queue, HostMemory& to, uint64_t to_at, DeviceMemory& from,
                                uint64_t from_at, uint64_t bytes);

// Waits for the queue, and returns the first bytes of some memory.
std::string read(const Queue& queue, const DeviceMemory& memory, uint64_t at, uint64_t bytes);

}  // namespace merge_engine
