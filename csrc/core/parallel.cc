#include "core/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

namespace sparsekd {
namespace {

struct OpenMp {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Query = int (*)();
  Parallel parallel = nullptr;
  Query thread = nullptr;
  Query threads = nullptr;
  std::string name = "std::thread";
};

// libgomp's entry points exist in every OpenMP runtime torch ships with (libgomp, libomp, libiomp5).
// RTLD_DEFAULT finds the one torch has loaded; a second runtime would mean a second pool of threads.
const OpenMp& openmp() {
  static const OpenMp found = [] {
    OpenMp omp;
    omp.parallel = reinterpret_cast<OpenMp::Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    omp.thread = reinterpret_cast<OpenMp::Query>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    omp.threads = reinterpret_cast<OpenMp::Query>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    if (!omp.parallel || !omp.thread || !omp.threads) return OpenMp{};
    Dl_info info{};
    omp.name =
        dladdr(reinterpret_cast<void*>(omp.parallel), &info) && info.dli_fname ? info.dli_fname : "OpenMP";
    return omp;
  }();
  return found;
}

// A fork takes one thread along. OpenMP's pool is not among them, but libgomp goes on waiting for it, for
// ever: a child runs threads of its own instead.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Job {
  void (*body)(void*, int);
  void* context;
  int slots;
  std::once_flag failed;
  std::exception_ptr error;

  // An exception that left a thread of the pool would end the process.
  void run_share(int first, int step) {
    try {
      for (int slot = first; slot < slots; slot += step) body(context, slot);
    } catch (...) {
      std::call_once(failed, [this] { error = std::current_exception(); });
    }
  }
};

void openmp_entry(void* argument) {
  const OpenMp& omp = openmp();
  // The runtime may grant fewer threads than asked for; every slot still runs.
  static_cast<Job*>(argument)->run_share(omp.thread(), omp.threads());
}

struct Buffer {
  void* data = nullptr;
  unsigned long bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void run_slots(int threads, int slots, void (*body)(void*, int), void* context) {
  threads = std::min(threads, slots);
  Job job{body, context, slots, {}, nullptr};
  if (threads <= 1) {
    job.run_share(0, 1);
  } else if (const OpenMp& omp = openmp(); omp.parallel && !forked) {
    omp.parallel(openmp_entry, &job, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> workers;
    workers.reserve(threads - 1);
    for (int thread = 1; thread < threads; ++thread)
      workers.emplace_back(&Job::run_share, &job, thread, threads);
    job.run_share(0, threads);
    for (std::thread& worker : workers) worker.join();
  }
  if (job.error) std::rethrow_exception(job.error);
}

const char* parallel_runtime() { return openmp().name.c_str(); }

void* scratch(Scratch purpose, unsigned long bytes) {
  thread_local std::array<Buffer, static_cast<int>(Scratch::kCount)> buffers;
  Buffer& buffer = buffers[static_cast<int>(purpose)];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const unsigned long rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace sparsekd
