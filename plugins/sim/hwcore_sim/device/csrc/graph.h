// Graphs: while a stream captures, what is submitted to it is recorded instead of queued.
//
// A graph holds one list of items for each stream that took part (a lane). At the end of the
// capture they become one order: that in which lazy queues would run them if the first lane were
// synchronised. A wait that is missing inside the captured function is thus as visible as outside.
#pragma once

#include <c10/core/Storage.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "streams.h"

namespace sim {

struct Pool;  // allocator.h

struct Graph : std::enable_shared_from_this<Graph> {
  enum class State { Empty, Capturing, Ready, Closed };

  struct Lane {
    Queue* queue;
    std::vector<Item> items;
  };

  explicit Graph(std::shared_ptr<Pool> pool) : pool(std::move(pool)) {}
  ~Graph();

  // Start recording what is submitted to `queue`.
  void begin(Queue* queue);
  // Stop; raise if what was captured cannot be a graph.
  void end();
  // Stop and forget everything.
  void abort() noexcept;
  void replay(Queue* queue);
  void close();

  // Called by streams.cpp with the state mutex held.
  void add(Queue* queue, Item item);
  uint64_t position_of(Queue* queue) const;
  void join(Queue* queue);  // make a stream a lane

  // Keep memory that is not of the pool.
  void keep(const c10::Storage& storage);

  // Note that fn did what a graph cannot hold, and raise. The capture cannot end well any more.
  [[noreturn]] void refuse(const std::string& problem);

  std::shared_ptr<Pool> pool;
  State state = State::Empty;
  DeviceIndex device = -1;
  std::string fault;
  std::vector<Lane> lanes;
  std::vector<Item> order;
  // Memory from outside the pool that the captured work uses: alive until the last replay has run.
  // By storage and address, for a storage that is resized has other memory than was captured.
  struct Kept {
    c10::Storage storage;
    std::shared_ptr<void> hold;
  };
  using External = std::map<std::pair<const void*, const void*>, Kept>;
  std::shared_ptr<External> external = std::make_shared<External>();
  size_t streams_held = 0;

 private:
  // Stop recording; the lanes are the caller's.
  std::vector<Lane> stop() noexcept;
};

// The graph that the calling thread is capturing, or nullptr.
Graph* capturing_here();

// Raise if the calling thread captures, or if the queue (may be nullptr) is being captured.
// `problem` says what was done, as "called aten::x, which reads a value on the host".
void refuse_while_capturing(Queue* queue, const std::string& problem);
bool is_capturing(Queue* queue);

size_t capture_stream_limit();
void set_capture_stream_limit(size_t limit);
size_t capture_streams_left();

}  // namespace sim
