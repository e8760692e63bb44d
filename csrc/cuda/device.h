// Devices, their memory, and the order of work on them.
#pragma once

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

// A stream that does not wait for the default one.
class Stream {
  public:
    explicit Stream(int device);
    ~Stream();
    Stream(const Stream&) = delete;
    Queue queue() const { return queue_; }
    void wait() const;  // until all work handed in is done

  private:
    Queue queue_;
};

// A point in a stream's work.
class Event {
  public:
    explicit Event(const Queue& queue);
    ~Event();
    Event(const Event&) = delete;
    void wait() const;
    void hold_back(const Queue& queue) const;  // what is handed to the queue from now on waits for the point

  private:
    int device_;
    void* event_ = nullptr;
};

// Device memory. Throws std::bad_alloc when there is too little.
class DeviceMemory {
  public:
    DeviceMemory(const Queue& queue, uint64_t bytes, bool zero);
    ~DeviceMemory();
    DeviceMemory(const DeviceMemory&) = delete;
    uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }

  private:
    Queue queue_;
    void* data_ = nullptr;
};

// Host memory that a device can copy from and to without a detour: its own, or a caller's for a while.
class PinnedMemory {
  public:
    explicit PinnedMemory(uint64_t bytes);
    PinnedMemory(uintptr_t address, uint64_t bytes);
    ~PinnedMemory();
    PinnedMemory(const PinnedMemory&) = delete;
    uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }

  private:
    void* data_;
    bool own_;
};

void upload(const Queue& queue, uintptr_t device_address, uintptr_t host_address, uint64_t bytes);
void download(const Queue& queue, uintptr_t host_address, uintptr_t device_address, uint64_t bytes);

// Waits for the queue and reads some of its device's memory.
void read(const Queue& queue, uintptr_t device_address, void* into, uint64_t bytes);

}  // namespace merge_engine
