// Device memory and page-locked host memory.
//
// Device memory is host memory in blocks. A freed block is poisoned by its stream's queue and
// reused at once by the same stream; other streams must have been announced by record_stream.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "streams.h"

namespace at {
struct HostAllocator;
}

namespace sim {

// Memory that belongs to graphs: allocated while capturing, and for nobody else until the last
// graph that shares the pool is closed.
struct Pool {
  size_t graphs = 0;  // open ones that use it
  bool closed = false;
  // Replays that may still be running, as positions of the queues they were submitted to.
  std::map<Queue*, uint64_t> replays;
};

c10::DeviceAllocator* device_allocator();
at::HostAllocator* pinned_allocator();

// Called by a graph: one more, or one fewer, uses the pool.
void open_pool(const std::shared_ptr<Pool>& pool);
void close_pool(const std::shared_ptr<Pool>& pool) noexcept;
void note_replay(const std::shared_ptr<Pool>& pool, Queue* queue);
// After a capture: any lane of the next capture may use what is free in the pool.
void settle_pool(const std::shared_ptr<Pool>& pool);
// Keep the memory that the storage has now, for nobody else, as long as the result lives: captured
// work has its address. Freed meanwhile, it is poisoned but stays where it is. nullptr for pinned
// memory, whose storages keep theirs: torch refuses to resize them.
std::shared_ptr<void> hold_memory(const c10::Storage& storage);
// Whether the storage's memory comes from this pool.
bool in_pool(const c10::Storage& storage, const Pool* pool);

void set_capacity(DeviceIndex device, size_t bytes);
// Give cached blocks back to the system, as far as no queued work can touch them.
void release_cached(DeviceIndex device);
// Which device a pointer into its memory belongs to; -1 for none.
DeviceIndex device_of(const void* data);

enum class PinnedReuse { Safe, Early };
void set_pinned_reuse(PinnedReuse reuse);
PinnedReuse pinned_reuse();
bool is_pinned(const void* data);
// Note that work submitted to `queue` just now reads or writes the pinned block around `data`.
void use_pinned(const void* data, Queue* queue);

}  // namespace sim
