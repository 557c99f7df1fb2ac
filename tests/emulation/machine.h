// A machine that runs CUDA kernels one block after another, every thread on a stack of its own. A thread runs
// until it meets others, at a barrier or in a warp's collective; then the next one does, in an order that
// tests choose.
//
// It reports as errors what hangs, or is undefined, on a GPU: threads at different barriers, lanes in
// different collectives or with different masks, masks without the calling lane or with lanes that have left,
// shuffles from lanes that take no part, and deadlock. Shared memory starts as NaN. Blocks never run at the
// same time, so races between them, and between threads where no barrier is missing, are not seen.
#pragma once
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostShared = 48 << 10;  // of static shared memory, what every GPU has

enum { kSuccess = 0, kInvalidConfiguration = 9, kLaunchFailure = 719 };
enum class State : uint8_t { kReady, kAtBarrier, kInCollective, kDone };
enum class Order : int { kForward, kBackward, kShuffled };
enum class Collective : uint8_t { kShuffle, kBallot, kSync };

struct Thread {
  Context context;
  State state = State::kReady;
  uint3 index{};
  unsigned lane = 0;
  const char* file = "";  // of the barrier or collective it waits in
  int line = 0;
  Collective collective{};
  uint32_t mask = 0;
  uint64_t value = 0, result = 0;            // what it gives to a collective, and gets
  unsigned source = 0;                       // the lane that a shuffle reads
  unsigned met = 0, synced = 0;              // at how many barriers of its block, of its warp
  void* tag = nullptr;                       // what it has released for those that it meets, see races.h
  void* tags[kFindRaces ? kLanes : 1] = {};  // those of the lanes that it has met
};

struct Shared {
  int id;
  std::vector<char> bytes;
  char* data;
};

class Fault : public std::runtime_error {
 public:
  using runtime_error::runtime_error;
};

// A small generator, so that an order can be repeated from its seed.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252ull) {}
  unsigned below(unsigned n) {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return static_cast<unsigned>(state_ >> 11) % n;
  }

 private:
  uint64_t state_;
};

class Machine {
 public:
  Order order = Order::kForward;
  uint64_t seed = 1;
  int64_t repeats = 0;  // how often threads have made sums a second time
  std::string error;

  dim3 grid, block;
  uint3 block_index{};
  Thread* current = nullptr;

  template <class Body>
  int launch(unsigned blocks, dim3 threads, Body body) {
    const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
    error.clear();
    if (count == 0 || count > kMostThreads || blocks == 0) {
      error = "invalid configuration: " + std::to_string(blocks) + " blocks of " + std::to_string(count) +
              " threads";
      return kInvalidConfiguration;
    }
    grid = dim3(blocks);
    block = threads;
    const Unseen unseen;
    prepare_first(scheduler_);
    call_ = [](const void* b) { (*static_cast<const Body*>(b))(); };
    body_ = &body;
    threads_.resize(count);
    tags_.clear();
    try {
      for (unsigned i = 0; i < blocks; ++i) {
        block_index = {order == Order::kBackward ? blocks - 1 - i : i, 0, 0};
        run_block();
      }
    } catch (const std::exception& fault) {
      error = fault.what();
      return kLaunchFailure;
    }
    acquire(&ended_);  // who started this, and what it starts next, come after it
    return kSuccess;
  }

  void barrier(const char* file, int line) {
    const Unseen unseen;
    // The others may be at the next barrier already when this thread comes back from this one.
    void* tag = &tags_.back()[current->met++ % 2];
    release(tag);
    wait(State::kAtBarrier, file, line);
    acquire(tag);
  }

  uint64_t collect(Collective what, uint32_t mask, uint64_t value, unsigned source, const char* file,
                   int line) {
    const Unseen unseen;
    Thread& me = *current;
    me.file = file;
    me.line = line;
    if (what == Collective::kSync) {  // the others order nothing
      me.tag = &tags_.back()[2 + 2 * (&me - threads_.data()) + me.synced++ % 2];
      release(me.tag);
    }
    if (!(mask >> me.lane & 1)) throw Fault("the mask does not name the calling lane: " + place(me));
    me.collective = what;
    me.mask = mask;
    me.value = value;
    me.source = source;
    wait(State::kInCollective, file, line);
    if (kFindRaces && what == Collective::kSync)
      for (unsigned lane = 0; lane < kLanes; ++lane)
        if (mask >> lane & 1) acquire(me.tags[lane]);
    return me.result;
  }

  // The block's memory of the declaration `id`; all ones, which is NaN, until somebody writes.
  char* shared(int id, size_t bytes) {
    const Unseen unseen;
    constexpr size_t kAlign = 16;
    size_t total = bytes;
    for (Shared& s : shared_) {
      if (s.id == id) return s.data;
      total += s.bytes.size() - kAlign;
    }
    if (total > kMostShared) throw Fault("too much shared memory: " + std::to_string(total) + " bytes");
    shared_.push_back({id, std::vector<char>(bytes + kAlign, '\xff'), nullptr});
    Shared& made = shared_.back();
    const uintptr_t start = reinterpret_cast<uintptr_t>(made.bytes.data());
    made.data = made.bytes.data() + (kAlign - start % kAlign) % kAlign;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(made.data + bytes, made.bytes.data() + made.bytes.size() - made.data - bytes);
#endif
    return made.data;
  }

 private:
  std::string place(const Thread& t) const {
    const char* slash = std::strrchr(t.file, '/');
    char text[200];
    std::snprintf(text, sizeof text, "block %u, thread (%u, %u, %u), %s:%d", block_index.x, t.index.x,
                  t.index.y, t.index.z, slash ? slash + 1 : t.file, t.line);
    return text;
  }

  static Machine*& running() {
    static Machine* machine = nullptr;
    return machine;
  }

  static void entry() {
    Machine& machine = *running();
    arrived(machine.scheduler_);
    try {
      machine.call_(machine.body_);
    } catch (...) {
      machine.pending_ = std::current_exception();
    }
    release(&machine.ended_);
    {
      const Unseen unseen;
      machine.current->state = State::kDone;
    }
    switch_context(machine.current->context, machine.scheduler_, true);
    std::abort();
  }

  void wait(State state, const char* file, int line) {
    Thread& me = *current;
    me.state = state;
    me.file = file;
    me.line = line;
    switch_context(me.context, scheduler_, false);
  }

  void begin_block() {
#if defined(__SANITIZE_ADDRESS__)
    for (Shared& s : shared_) ASAN_UNPOISON_MEMORY_REGION(s.bytes.data(), s.bytes.size());
#endif
    shared_.clear();
    stacks_.reserve(static_cast<unsigned>(threads_.size()));
    // Other tags for every block, which nothing orders.
    tags_.emplace_back(new int64_t[2 + 2 * threads_.size()]);
    turns_.resize(threads_.size());
    for (unsigned i = 0; i < threads_.size(); ++i) {
      Thread& t = threads_[i] = Thread();
      t.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
      t.lane = i % kLanes;
      prepare(t.context, stacks_.of(i), &entry);
      turns_[i] = order == Order::kBackward ? static_cast<unsigned>(threads_.size()) - 1 - i : i;
    }
  }

  void run_block() {
    begin_block();
    Random random(seed + block_index.x);
    for (;;) {
      if (order == Order::kShuffled)
        for (unsigned i = static_cast<unsigned>(turns_.size()); i > 1; --i)
          std::swap(turns_[i - 1], turns_[random.below(i)]);
      bool progress = false;
      for (unsigned i : turns_) progress |= resume(threads_[i]);
      for (unsigned first = 0; first < threads_.size(); first += kLanes) progress |= complete_warp(first);
      unsigned done = 0, waiting = 0;
      for (const Thread& t : threads_) {
        done += t.state == State::kDone;
        waiting += t.state == State::kAtBarrier;
      }
      if (done == threads_.size()) {
        for (Thread& t : threads_) finish(t.context);
        return;
      }
      if (done + waiting == threads_.size())
        complete_barrier();
      else if (!progress)
        report_deadlock();
    }
  }

  bool resume(Thread& t) {
    if (t.state != State::kReady) return false;
    running() = this;
    current = &t;
    switch_context(scheduler_, t.context, false);
    if (pending_) std::rethrow_exception(std::exchange(pending_, nullptr));
    return true;
  }

  void complete_barrier() {
    const Thread* first = nullptr;
    for (Thread& t : threads_) {
      if (t.state != State::kAtBarrier) continue;
      if (first && t.line != first->line)
        throw Fault("threads of a block wait at different barriers: " + place(t) + " and " + place(*first));
      first = &t;
    }
    for (Thread& t : threads_)
      if (t.state == State::kAtBarrier) t.state = State::kReady;
  }

  // Completes the collectives whose lanes have all come.
  bool complete_warp(unsigned first) {
    bool progress = false;
    for (unsigned i = first; i < first + kLanes && i < threads_.size(); ++i)
      if (threads_[i].state == State::kInCollective) progress |= complete(first, threads_[i]);
    return progress;
  }

  bool complete(unsigned first, const Thread& leader) {
    const uint32_t mask = leader.mask;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (first + lane >= threads_.size() || threads_[first + lane].state == State::kDone)
        throw Fault("the mask names lane " + std::to_string(lane) + ", which has left: " + place(leader));
      const Thread& t = threads_[first + lane];
      if (t.state != State::kInCollective) return false;
      if (t.mask != mask || t.collective != leader.collective || t.line != leader.line)
        throw Fault("lanes meet in different collectives or with different masks: " + place(t) + " and " +
                    place(leader));
    }
    uint32_t votes = 0;
    for_lanes(first, mask, [&](Thread& t) { votes |= uint32_t{t.value != 0} << t.lane; });
    for_lanes(first, mask, [&](Thread& t) {
      if (t.collective == Collective::kShuffle && !(mask >> t.source & 1))
        throw Fault("a shuffle reads lane " + std::to_string(t.source) +
                    ", which takes no part: " + place(t));
      t.result = t.collective == Collective::kShuffle ? threads_[first + t.source].value : votes;
    });
    for_lanes(first, mask, [&](Thread& t) {
      t.state = State::kReady;
      if (kFindRaces) for_lanes(first, mask, [&](Thread& other) { t.tags[other.lane] = other.tag; });
    });
    return true;
  }

  template <class F>
  void for_lanes(unsigned first, uint32_t mask, F act) {
    for (unsigned lane = 0; lane < kLanes; ++lane)
      if (mask >> lane & 1) act(threads_[first + lane]);
  }

  [[noreturn]] void report_deadlock() {
    std::string text = "deadlock:";
    for (const Thread& t : threads_)
      if (t.state == State::kInCollective) {
        text += " a lane waits in a collective: " + place(t);
        break;
      }
    for (const Thread& t : threads_)
      if (t.state == State::kAtBarrier) {
        text += " a thread waits at a barrier: " + place(t);
        break;
      }
    throw Fault(text);
  }

  void (*call_)(const void*) = nullptr;
  const void* body_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<unsigned> turns_;
  std::vector<Shared> shared_;
  Stacks stacks_;
  Context scheduler_;
  std::vector<std::unique_ptr<int64_t[]>> tags_;  // for races.h, of every block
  int64_t ended_ = 0;
  std::exception_ptr pending_;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

// What runs kernels in the machine's stead, by their mangled names: what nvcc has made of them. The
// arguments come as the bytes of a kernel's parameters, every one aligned as its type.
using Executor = int (*)(const char* kernel, unsigned blocks, unsigned x, unsigned y, unsigned z,
                         const char* arguments, size_t bytes);

inline Executor& executor() {
  static Executor instance = nullptr;
  return instance;
}

template <class T>
void append(std::vector<char>& bytes, const T& argument) {
  static_assert(std::is_trivially_copyable<T>::value, "arguments are copied to GPUs byte by byte");
  const size_t start = (bytes.size() + alignof(T) - 1) / alignof(T) * alignof(T);
  bytes.resize(start + sizeof(T));
  std::memcpy(bytes.data() + start, &argument, sizeof(T));
}

template <class... Params>
int launch(void (*kernel)(Params...), unsigned blocks, dim3 threads, Params... args) {
  if (!executor()) return machine().launch(blocks, threads, [=] { kernel(args...); });
  Dl_info found;
  if (!dladdr(reinterpret_cast<void*>(kernel), &found) || !found.dli_sname) {
    machine().error = "a kernel without a name: it is not __global__, or local to its file";
    return kInvalidConfiguration;
  }
  std::vector<char> bytes;
  (append(bytes, args), ...);
  return executor()(found.dli_sname, blocks, threads.x, threads.y, threads.z, bytes.data(), bytes.size());
}

}  // namespace emulation
