#include "graph.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>

#include "allocator.h"

namespace sim {
namespace {

thread_local Graph* t_capturing = nullptr;
std::atomic<size_t> g_stream_limit{2048};
std::atomic<size_t> g_streams_held{0};

void hold_stream(Graph& graph) {
  if (g_streams_held++ >= g_stream_limit) {
    --g_streams_held;
    graph.refuse(c10::str("needs one more capture stream than the ", g_stream_limit.load(),
                          " that the device has"));
  }
  ++graph.streams_held;
}

}  // namespace

Graph* capturing_here() { return t_capturing; }

bool is_capturing(Queue* queue) { return queue->capture != nullptr; }

void refuse_while_capturing(Queue* queue, const std::string& problem) {
  Graph* graph = t_capturing;
  if (!graph && queue) graph = queue->capture;
  if (graph) graph->refuse(problem);
}

size_t capture_stream_limit() { return g_stream_limit; }

void set_capture_stream_limit(size_t limit) { g_stream_limit = limit; }

size_t capture_streams_left() {
  const size_t held = g_streams_held, limit = g_stream_limit;
  return limit - std::min(limit, held);
}

Graph::~Graph() {
  if (state == State::Capturing) abort();
  close();
}

void Graph::refuse(const std::string& problem) {
  if (fault.empty()) fault = problem;
  fail(ErrorKind::Capture,
       c10::str("Graph.capture: fn ", problem,
                "; expected device work alone, of shapes and addresses that are known beforehand. "
                "Move it out of the captured function."));
}

void Graph::begin(Queue* queue) {
  if (t_capturing) t_capturing->refuse("began another capture inside this one");
  fault.clear();
  {
    const auto lock = lock_streams();
    if (queue->capture) {  // and that capture goes on: it can do nothing for this mistake
      fail(ErrorKind::Capture,
           c10::str("Graph.capture: `stream` got ", name_of(*queue),
                    ", which another thread is capturing; expected one that nobody captures. "
                    "Capture on a stream of your own."));
    }
    hold_stream(*this);
    device = queue->device;
    lanes.push_back({queue, {}});
    state = State::Capturing;
    queue->capture = this;
  }
  open_pool(pool);
  t_capturing = this;
}

std::vector<Graph::Lane> Graph::stop() noexcept {
  if (t_capturing == this) t_capturing = nullptr;
  const auto lock = lock_streams();
  for (auto& lane : lanes) lane.queue->capture = nullptr;
  if (state == State::Capturing) state = State::Ready;
  return std::exchange(lanes, {});
}

void Graph::add(Queue* queue, Item item) {
  for (auto& lane : lanes) {
    if (lane.queue == queue) lane.items.push_back(std::move(item));
  }
}

uint64_t Graph::position_of(Queue* queue) const {
  for (auto& lane : lanes) {
    if (lane.queue == queue) return lane.items.size();
  }
  return 0;
}

void Graph::join(Queue* queue) {
  hold_stream(*this);
  lanes.push_back({queue, {}});
  queue->capture = this;
}

void Graph::keep(const c10::Storage& storage) {
  if (in_pool(storage, pool.get())) return;
  const auto key = std::make_pair(static_cast<const void*>(storage.unsafeGetStorageImpl()),
                                  storage.data_ptr().get());
  if (!external->count(key)) external->insert({key, {storage, hold_memory(storage)}});
}

void Graph::abort() noexcept {
  stop();
  order.clear();
  external = std::make_shared<External>();
  fault.clear();
  g_streams_held -= std::exchange(streams_held, 0);
  if (state != State::Empty) {
    settle_pool(pool);
    close_pool(pool);
  }
  state = State::Empty;
}

void Graph::end() {
  std::vector<Lane> lanes = stop();
  std::string problem = fault;
  // Run the lanes as lazy queues would if the first were synchronised.
  std::vector<size_t> done(lanes.size(), 0);
  std::vector<std::pair<size_t, size_t>> stack{{0, lanes[0].items.size()}};
  while (!stack.empty()) {
    auto [lane, until] = stack.back();
    if (done[lane] >= until) {
      stack.pop_back();
      continue;
    }
    Item& item = lanes[lane].items[done[lane]];
    if (item.source) {
      const auto source = std::find_if(lanes.begin(), lanes.end(),
                                       [&](auto& it) { return it.queue == item.source; });
      const size_t index = source - lanes.begin();
      if (index != lane && done[index] < item.position) {
        stack.emplace_back(index, item.position);
        continue;
      }
    } else {
      order.push_back(item);
    }
    ++done[lane];
  }
  for (size_t i = 0; problem.empty() && i < lanes.size(); ++i) {
    const auto& items = lanes[i].items;
    const bool work_left = std::any_of(items.begin() + done[i], items.end(),
                                       [](const Item& it) { return it.work != nullptr; });
    if (work_left || (i > 0 && done[i] == 0)) {
      problem = c10::str("forked to ", name_of(*lanes[i].queue),
                         " and did not join its work again (record an event there at the end, and "
                         "let the captured stream wait for it)");
    }
  }
  if (!problem.empty()) {
    abort();
    refuse(problem);  // of nothing any more: begin() starts afresh
  }
  settle_pool(pool);
}

void Graph::replay(Queue* queue) {
  refuse_while_capturing(queue, "replayed a graph inside the capture");
  if (queue->device != device) {
    fail(ErrorKind::Capture,
         c10::str("Graph.replay: current stream got ", name_of(*queue), "; expected one of ",
                  device_name(device), ", where it was captured. Make that device current."));
  }
  struct Hold final : Work {  // keeps what the replay needs until it has run
    std::shared_ptr<External> external;
    void run() override {}
    std::string name() const override { return "the end of a replay"; }
  };
  for (auto& item : order) {
    if (item.work) {
      submit(queue, item.work->for_replay(item.work));
    } else {
      submit_poison(queue, item.data, item.bytes);
    }
  }
  auto hold = std::make_shared<Hold>();
  hold->external = external;
  submit(queue, std::move(hold));
  note_replay(pool, queue);
}

void Graph::close() {
  if (state == State::Closed) return;
  if (state == State::Ready) close_pool(pool);
  g_streams_held -= std::exchange(streams_held, 0);
  // Queued replays hold the work; what it works on waits in the pool.
  order.clear();
  external = std::make_shared<External>();
  state = State::Closed;
}

}  // namespace sim
