// Runs CUDA kernels on the CPU, strictly: what works by luck on a GPU is an error here.
//
// Each thread of a block is a fiber; it runs until a barrier or a warp instruction, and the lanes
// of a warp (the threads of a block) must meet at the same one, on the same line of source. Shared
// memory starts as poison. Reading what no barrier orders after its write, reading what cp.async
// has not delivered, leaving the registered global memory, and odd addresses are errors. So is what
// wgmma, which runs on its own, reads without a fence after the write, or is overwritten while it
// reads; its sums are poison until it was waited for. Blocks run one after another, in an order
// that `seed` shuffles. One header, though long: it stands for CUDA's own, which sources include.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::emulator::block().index())
#define blockIdx (::emulator::block().position)
#define gridDim (::emulator::block().grid)

namespace emulator {

using Site = std::source_location;
inline constexpr int kWarp = 32;
inline constexpr size_t kStack = 256 * 1024;

struct Index {
  unsigned x, y, z;
};

// What a launch did, to tell how well a kernel uses memory.
struct Counters {
  int64_t global_requests = 0, global_sectors = 0, global_ideal_sectors = 0;  // of a warp; 32 bytes
  int64_t weight_sectors = 0, weight_ideal_sectors = 0;  // of memory whose name begins with weight
  int64_t shared_requests = 0, shared_wavefronts = 0, shared_ideal_wavefronts = 0;
  int64_t mma = 0, barriers = 0;
  // The most of any block: its shared memory, and what of memory other than x cp.async had to
  // bring.
  int64_t shared_bytes = 0, bytes_in_flight = 0;
};

struct Range {
  const char* data;
  size_t bytes;
  std::string name;
};

struct Machine {
  std::vector<Range> memory;  // what kernels may touch
  Counters counters;
  unsigned seed = 1;
};
inline Machine& machine() {
  static Machine instance;
  return instance;
}

class Block {
 public:
  Index position{}, grid{};

  Block(unsigned threads, size_t shared_bytes) : threads_(threads), shared_(shared_bytes + 1024) {
    shadow_.resize(shared_bytes);
    base_ = shared_.data() + (1024 - reinterpret_cast<uintptr_t>(shared_.data()) % 1024) % 1024;
    std::memset(base_, 0xff, shared_bytes);  // NaN in every float type
    if (stacks().size() < threads) stacks().resize(threads);
    for (auto& stack : stacks()) {
      if (stack == nullptr) stack = std::make_unique<char[]>(kStack);
    }
  }

  Index index() const { return {current_, 0, 0}; }
  char* shared() const { return base_; }

  void run(const std::function<void()>& body) {
    body_ = &body;
    for (unsigned i = 0; i < threads_.size(); ++i) start(i);
    bool moved = true;
    while (moved) {
      moved = false;
      for (unsigned i = 0; i < threads_.size(); ++i) {
        if (threads_[i].state != State::ready) continue;
        current_ = i;
        if (_setjmp(scheduler_) == 0) _longjmp(threads_[i].context, 1);
        if (!error_.empty()) throw std::runtime_error(error_);
        moved = true;
      }
      moved |= pass_barrier();
    }
    for (const Thread& thread : threads_) {
      if (thread.state != State::done) stuck();
    }
    for (const Async& warp : async_) {
      if (!warp.open.empty() || !warp.groups.empty()) {
        throw std::runtime_error("a warp ends before its wgmma was waited for");
      }
    }
    account_all();
  }

  [[noreturn]] void fail(const std::string& what, const Site& site) {
    error_ = "block (" + std::to_string(position.x) + ", " + std::to_string(position.y) + ", " +
             std::to_string(position.z) + ") thread " + std::to_string(current_) + ", " +
             where(site) + ": " + what;
    _longjmp(scheduler_, 1);  // the fibers are abandoned
  }

  void barrier(const Site& site) {
    machine().counters.barriers += current_ == 0;
    wait(State::at_barrier, "barrier", site);
  }

  // Waits for all lanes of the warp; the last to come calls perform(lanes' arguments).
  template <class Arguments, class Perform>
  void together(const char* name, const Site& site, Arguments& arguments, const Perform& perform) {
    threads_[current_].arguments = &arguments;
    const unsigned first = current_ / kWarp * kWarp;
    bool last = true;
    for (unsigned i = first; i < first + kWarp; ++i) {
      last &= i == current_ || (i < threads_.size() && threads_[i].state == State::at_warp);
    }
    if (!last) {
      wait(State::at_warp, name, site);
      return;
    }
    Arguments* lanes[kWarp];
    for (unsigned i = 0; i < kWarp; ++i) {
      Thread& thread = threads_[first + i];
      lanes[i] = static_cast<Arguments*>(thread.arguments);
      if (first + i == current_) continue;
      if (std::strcmp(thread.name, name) != 0 || thread.site.line() != site.line()) {
        fail("lanes diverge: " + std::string(name) + " here, lane " + std::to_string(i) + " at " +
                 thread.name + ", " + where(thread.site),
             site);
      }
      thread.state = State::ready;
    }
    account(first / kWarp);
    ++warp_epoch(first / kWarp);
    perform(lanes);
  }

  // Memory

  void check_global(const void* address, size_t bytes, size_t alignment, const Site& site) {
    const char* p = static_cast<const char*>(address);
    if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("global address is odd", site);
    if (machine().memory.empty()) return;  // whole ops: torch allocates what nobody registers
    if (const Range* range = range_of(p, bytes)) {
      const bool weight = range->name.starts_with("weight");
      note(site, weight ? Space::weight : Space::global, reinterpret_cast<uintptr_t>(p), bytes);
      return;
    }
    std::string near;
    for (const Range& range : machine().memory) {
      const auto past = p + bytes - (range.data + range.bytes);
      if (p + bytes > range.data && past > 0 && past < 4096) {
        near = std::string(": ") + std::to_string(past) + " bytes past " + range.name;
      }
    }
    fail("global access out of bounds" + near, site);
  }

  void read_shared(const void* address, size_t bytes, size_t alignment, const Site& site) {
    const size_t begin = shared_offset(address, bytes, alignment, site);
    note(site, Space::shared, begin, bytes);
    for (size_t i = begin; i < begin + bytes; ++i) {
      Byte& b = shadow_[i];
      if (b.pending) fail("shared memory is read before cp.async was waited for", site);
      if (b.writer == kNone) fail("shared memory is read that was never written", site);
      if (unordered(b.writer, b.write_block, b.write_warp)) {
        fail("no barrier between a write of thread " + std::to_string(b.writer) + " and this read",
             site);
      }
      const uint32_t now = warp_epoch(current_ / kWarp);
      const bool fresh = b.reader == kNone || b.read_block != block_epoch_;
      if (!fresh && (b.reader == kMany || b.reader / kWarp != current_ / kWarp)) {
        b.reader = kMany;
      } else {
        b.read_by_lanes = !fresh && b.read_warp == now && (b.read_by_lanes || b.reader != current_);
        b.reader = current_;
      }
      b.read_block = block_epoch_;
      b.read_warp = now;
    }
  }

  void write_shared(const void* address, size_t bytes, size_t alignment, const Site& site) {
    const size_t begin = shared_offset(address, bytes, alignment, site);
    note(site, Space::shared, begin, bytes);
    for (size_t i = begin; i < begin + bytes; ++i) own(shadow_[i], site);
  }

  void copy_async(void* to, const void* from, size_t size, size_t bytes, const Site& site) {
    const size_t begin = shared_offset(to, size, size, site);
    if (bytes > size) fail("cp.async of more bytes than its size", site);
    if (bytes > 0) {
      check_global(from, bytes, 1, site);
      if (reinterpret_cast<uintptr_t>(from) % size != 0) fail("global address is odd", site);
    }
    if (bytes == 0) note(site, Space::global, 0, 0);
    note(site, Space::shared, begin, size);
    for (size_t i = begin; i < begin + size; ++i) {
      own(shadow_[i], site);
      shadow_[i].pending = true;
    }
    const auto* source = static_cast<const char*>(from);
    const Range* range = bytes == 0 ? nullptr : range_of(source, bytes);
    const size_t streamed = range == nullptr || range->name == "x" ? 0 : bytes;
    threads_[current_].copies.push_back({begin, source, size, bytes, streamed});
    in_flight_ += static_cast<int64_t>(streamed);
    int64_t& most = machine().counters.bytes_in_flight;
    most = std::max(most, in_flight_);
  }

  void commit() {
    Thread& self = threads_[current_];
    self.groups.push_back(std::move(self.copies));
    self.copies.clear();
  }

  void wait_groups(size_t pending) {
    Thread& self = threads_[current_];
    while (self.groups.size() > pending) {
      for (const Copy& copy : self.groups.front()) {
        in_flight_ -= static_cast<int64_t>(copy.streamed);
        std::memcpy(base_ + copy.to, copy.from, copy.bytes);
        std::memset(base_ + copy.to + copy.bytes, 0, copy.size - copy.bytes);
        for (size_t i = copy.to; i < copy.to + copy.size; ++i) {
          Byte& b = shadow_[i];
          b.pending = false;
          b.writer = current_;
          b.write_block = block_epoch_;
          b.write_warp = warp_epoch(current_ / kWarp);
          b.write_fences = self.fences;
        }
      }
      self.groups.erase(self.groups.begin());
    }
  }

  // wgmma, of the warp whose last thread to come is the current one

  size_t offset_of(const void* shared) const {
    return static_cast<size_t>(static_cast<const char*>(shared) - base_);
  }
  void fence_async() { ++threads_[current_].fences; }
  void fence_products() { async_[current_ / kWarp].fenced = true; }

  // Runs `perform` when it is waited for; until then it reads units of 16 bytes, eight at once.
  // What the four warps of a warpgroup issue must be the same `operands`.
  void issue(const std::vector<size_t>& units, std::vector<uint64_t> operands,
             std::function<void()> perform, const Site& site) {
    const unsigned warp = current_ / kWarp;
    Async& mine = async_[warp];
    if (!mine.fenced) fail("wgmma without wgmma.fence before the first of its group", site);
    for (unsigned other = warp / 4 * 4; other < warp / 4 * 4 + 4; ++other) {
      const auto& issued = async_[other].issued;
      if (issued.size() > mine.issued.size() && issued[mine.issued.size()] != operands) {
        fail("warps of a warpgroup issue different wgmma", site);
      }
    }
    mine.issued.push_back(std::move(operands));
    for (const size_t unit : units) {
      if (unit + 16 > shadow_.size()) fail("shared access out of bounds", site);
      for (size_t i = unit; i < unit + 16; ++i) {
        Byte& b = shadow_[i];
        if (b.pending) fail("shared memory is read before cp.async was waited for", site);
        if (b.writer == kNone) fail("shared memory is read that was never written", site);
        if (unordered(b.writer, b.write_block, b.write_warp)) {
          fail("no barrier between a write and wgmma", site);
        }
        if (threads_[b.writer].fences_at_barrier <= b.write_fences) {
          fail("no fence.proxy.async and barrier between a write and wgmma", site);
        }
        ++b.read_async;
      }
    }
    for (size_t i = 0; i < units.size(); i += 8) {
      int64_t banks[8] = {};
      for (size_t j = i; j < i + 8; ++j) ++banks[units[j] / 16 % 8];
      machine().counters.shared_wavefronts += *std::max_element(banks, banks + 8);
      ++machine().counters.shared_ideal_wavefronts;
    }
    mine.open.push_back({units, std::move(perform)});
  }
  void commit_products() {
    Async& mine = async_[current_ / kWarp];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
    mine.fenced = false;
  }
  void wait_products(size_t pending) {
    Async& mine = async_[current_ / kWarp];
    while (mine.groups.size() > pending) {
      for (const Product& product : mine.groups.front()) {
        product.perform();
        for (const size_t unit : product.units) {
          for (size_t i = unit; i < unit + 16; ++i) --shadow_[i].read_async;
        }
      }
      mine.groups.erase(mine.groups.begin());
    }
  }
  // Sums that are under way, by where they will stand, and how many products add to them.
  struct Sums {
    std::vector<int32_t> values;
    int products;
  };
  std::map<int32_t*, Sums> sums;

 private:
  enum class Space { global, weight, shared };
  enum class State { ready, at_warp, at_barrier, done };
  static constexpr unsigned kNone = ~0u, kMany = ~0u - 1;

  struct Copy {
    size_t to;
    const char* from;
    size_t size, bytes, streamed;
  };
  struct Thread {
    jmp_buf context;
    State state = State::ready;
    const char* name = "";
    Site site;
    void* arguments = nullptr;
    std::vector<Copy> copies;
    std::vector<std::vector<Copy>> groups;
    uint32_t fences = 0, fences_at_barrier = 0;
    std::map<unsigned, unsigned> visits;  // of a line since the last warp instruction
  };
  // Who last wrote and read a byte of shared memory, and after how many barriers.
  struct Byte {
    unsigned writer = kNone, reader = kNone;
    uint32_t write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;
    uint32_t write_fences = 0;   // of the writer, before
    uint32_t read_async = 0;     // by so many wgmma that are under way
    bool pending = false;        // a cp.async is on its way
    bool read_by_lanes = false;  // by several lanes of reader's warp since they last met
  };
  struct Product {
    std::vector<size_t> units;
    std::function<void()> perform;
  };
  struct Async {  // of a warp
    bool fenced = false;
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;
    std::vector<std::vector<uint64_t>> issued;
  };
  struct Access {
    uintptr_t address;
    size_t bytes;
    Space space;
    unsigned thread;
  };

  static std::vector<std::unique_ptr<char[]>>& stacks() {
    static std::vector<std::unique_ptr<char[]>> instance;
    return instance;
  }
  static const Range* range_of(const char* p, size_t bytes) {
    for (const Range& range : machine().memory) {
      if (p >= range.data && p + bytes <= range.data + range.bytes) return &range;
    }
    return nullptr;
  }
  static std::string where(const Site& site) {
    const std::string file = site.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
  }
  uint32_t& warp_epoch(unsigned warp) { return warp_epochs_[warp]; }

  static void enter(unsigned low, unsigned high) {
    auto* self = reinterpret_cast<Block*>(static_cast<uintptr_t>(high) << 32 | low);
    (*self->body_)();
    Thread& thread = self->threads_[self->current_];
    thread.state = State::done;
    if (!thread.copies.empty() || !thread.groups.empty()) {
      bool left = !thread.copies.empty();
      for (const auto& group : thread.groups) left |= !group.empty();
      if (left) self->fail("the thread ends before its cp.async arrived", Site::current());
    }
    _longjmp(self->scheduler_, 1);
  }

  void start(unsigned i) {
    ucontext_t context, back;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks()[i].get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    starting_ = i;
    makecontext(&context, reinterpret_cast<void (*)()>(&Block::prepare), 2,
                static_cast<unsigned>(self), static_cast<unsigned>(self >> 32));
    back_ = &back;
    swapcontext(&back, &context);
  }

  // First run of a fiber: remembers where it stands and returns; it goes on when it is scheduled.
  static void prepare(unsigned low, unsigned high) {
    auto* self = reinterpret_cast<Block*>(static_cast<uintptr_t>(high) << 32 | low);
    if (_setjmp(self->threads_[self->starting_].context) == 0) setcontext(self->back_);
    enter(low, high);
  }

  void wait(State state, const char* name, const Site& site) {
    Thread& self = threads_[current_];
    self.state = state;
    self.name = name;
    self.site = site;
    if (_setjmp(self.context) == 0) _longjmp(scheduler_, 1);
  }

  bool pass_barrier() {
    for (const Thread& thread : threads_) {
      if (thread.state != State::at_barrier) return false;
    }
    account_all();
    for (unsigned i = 0; i < threads_.size(); ++i) {
      current_ = i;
      if (threads_[i].site.line() != threads_[0].site.line()) {
        error_ = "threads 0 and " + std::to_string(i) + " meet at different barriers, " +
                 where(threads_[0].site) + " and " + where(threads_[i].site);
        throw std::runtime_error(error_);
      }
      threads_[i].state = State::ready;
      threads_[i].fences_at_barrier = threads_[i].fences;
    }
    ++block_epoch_;
    return true;
  }

  [[noreturn]] void stuck() {
    std::string text = "threads wait for others that never come:";
    State last = State::ready;
    for (unsigned i = 0; i < threads_.size(); ++i) {
      const Thread& thread = threads_[i];
      if (thread.state == last) continue;
      last = thread.state;
      text += " thread " + std::to_string(i) +
              (last == State::done
                   ? " has ended;"
                   : std::string(" at ") + thread.name + ", " + where(thread.site) + ";");
    }
    throw std::runtime_error(text);
  }

  size_t shared_offset(const void* address, size_t bytes, size_t alignment, const Site& site) {
    const auto offset = static_cast<const char*>(address) - base_;
    if (offset < 0 || offset + bytes > shadow_.size()) fail("shared access out of bounds", site);
    if (offset % alignment != 0) fail("shared address is odd", site);
    return static_cast<size_t>(offset);
  }

  bool unordered(unsigned other, uint32_t block_epoch, uint32_t warp_epoch_then) {
    if (other == kNone || other == current_ || block_epoch != block_epoch_) return false;
    return other == kMany || other / kWarp != current_ / kWarp ||
           warp_epoch_then == warp_epoch(current_ / kWarp);
  }

  // The current thread writes a byte: every earlier write and read must be ordered before.
  void own(Byte& b, const Site& site) {
    if (b.pending) fail("shared memory is written before cp.async was waited for", site);
    if (b.read_async > 0) fail("shared memory is written while wgmma reads it", site);
    if (unordered(b.writer, b.write_block, b.write_warp)) {
      fail("no barrier between two writes, one of thread " + std::to_string(b.writer), site);
    }
    const bool lanes = b.read_by_lanes && b.read_block == block_epoch_ &&
                       b.read_warp == warp_epoch(current_ / kWarp);
    if (lanes || unordered(b.reader, b.read_block, b.read_warp)) {
      fail("no barrier between a read and this write", site);
    }
    b.writer = current_;
    b.write_block = block_epoch_;
    b.write_warp = warp_epoch(current_ / kWarp);
    b.write_fences = threads_[current_].fences;
    b.reader = kNone;
    b.read_by_lanes = false;
  }

  // Collects what the lanes of a warp do on one line, until the warp meets again.
  void note(const Site& site, Space space, uintptr_t address, size_t bytes) {
    const unsigned line = site.line() * 2 + (space == Space::shared);
    const unsigned visit = threads_[current_].visits[line]++;
    if (bytes == 0) return;  // a lane that a copy of zeros leaves out
    accesses_[current_ / kWarp][{line, visit}].push_back({address, bytes, space, current_});
  }

  void account_all() {
    for (unsigned warp = 0; warp * kWarp < threads_.size(); ++warp) account(warp);
  }

  void account(unsigned warp) {
    Counters& c = machine().counters;
    for (auto& [key, lanes] : accesses_[warp]) {
      // The last lane to meet the others goes on first.
      std::sort(lanes.begin(), lanes.end(),
                [](const Access& a, const Access& b) { return a.thread < b.thread; });
      if (key.first % 2 == 0) {
        std::vector<uintptr_t> sectors;
        size_t bytes = 0;
        for (const Access& a : lanes) {
          bytes += a.bytes;
          for (uintptr_t s = a.address / 32; s <= (a.address + a.bytes - 1) / 32; ++s) {
            sectors.push_back(s);
          }
        }
        std::sort(sectors.begin(), sectors.end());
        sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
        ++c.global_requests;
        c.global_sectors += static_cast<int64_t>(sectors.size());
        const auto ideal = static_cast<int64_t>(std::min(sectors.size(), (bytes + 31) / 32));
        c.global_ideal_sectors += ideal;
        if (lanes.front().space == Space::weight) {
          c.weight_sectors += static_cast<int64_t>(sectors.size());
          c.weight_ideal_sectors += ideal;
        }
      } else {
        // 128 bytes a wavefront: so many lanes at once, each bank one word.
        const size_t lanes_at_once = 128 / std::max<size_t>(4, lanes.front().bytes);
        for (size_t i = 0; i < lanes.size(); i += lanes_at_once) {
          std::vector<uintptr_t> words;
          for (size_t j = i; j < std::min(lanes.size(), i + lanes_at_once); ++j) {
            for (size_t b = 0; b < lanes[j].bytes; b += 4) {
              words.push_back((lanes[j].address + b) / 4);
            }
          }
          std::sort(words.begin(), words.end());
          words.erase(std::unique(words.begin(), words.end()), words.end());
          int64_t banks[32] = {};
          for (const uintptr_t word : words) ++banks[word % 32];
          c.shared_wavefronts += *std::max_element(banks, banks + 32);
          ++c.shared_ideal_wavefronts;
        }
        ++c.shared_requests;
      }
    }
    accesses_[warp].clear();
    for (unsigned i = warp * kWarp; i < std::min<size_t>(threads_.size(), (warp + 1) * kWarp);
         ++i) {
      threads_[i].visits.clear();
    }
  }

  std::vector<Thread> threads_;
  std::vector<char> shared_;
  char* base_;
  std::vector<Byte> shadow_;
  const std::function<void()>* body_ = nullptr;
  unsigned current_ = 0, starting_ = 0;
  jmp_buf scheduler_;
  ucontext_t* back_ = nullptr;
  std::string error_;
  int64_t in_flight_ = 0;
  uint32_t block_epoch_ = 1;
  uint32_t warp_epochs_[32] = {};
  Async async_[32];
  std::map<std::pair<unsigned, unsigned>, std::vector<Access>> accesses_[32];
};

inline Block*& running() {
  static Block* instance = nullptr;
  return instance;
}
inline Block& block() { return *running(); }

template <class Kernel>
void run_grid(Index grid, unsigned threads, size_t shared_bytes, const Kernel& kernel) {
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::mt19937(machine().seed));
  int64_t& most = machine().counters.shared_bytes;
  most = std::max(most, static_cast<int64_t>(shared_bytes));
  for (const unsigned i : order) {
    Block block(threads, shared_bytes);
    block.grid = grid;
    block.position = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    running() = &block;
    block.run(kernel);
  }
}

}  // namespace emulator
