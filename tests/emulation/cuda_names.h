// CUDA's names for what kernels use, on the emulated machine. A name that is missing here is not emulated:
// the build of the tests fails, and whoever needs it adds it with a test of its own.
#pragma once
#include <cmath>

#include "half.h"
#include "machine.h"

// Kernels are found by their names, see Executor.
#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __launch_bounds__(...)

// Every use of the macro is one declaration; the array is the block's.
#define SPARSEKD_SHARED(type, name, extents) \
  type(&name) extents =                      \
      *reinterpret_cast<type(*) extents>(::emulation::machine().shared(__COUNTER__, sizeof(type extents)))

#define SPARSEKD_REPEATS() ++::emulation::machine().repeats

#define threadIdx (::emulation::machine().current->index)
#define blockIdx (::emulation::machine().block_index)
#define blockDim (::emulation::machine().block)
#define gridDim (::emulation::machine().grid)

using cudaError_t = int;
enum {
  cudaSuccess = emulation::kSuccess,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = emulation::kInvalidConfiguration,
};

inline const char* cudaGetErrorString(cudaError_t code) {
  if (code == cudaSuccess) return "no error";
  return code == cudaErrorInvalidValue ? "invalid argument" : emulation::machine().error.c_str();
}

using cudaStream_t = void*;

inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* devices) {
  *devices = 1;
  return cudaSuccess;
}

// The line that calls is part of the diagnosis.
#define EMULATION_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_CALLER) { emulation::machine().barrier(file, line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_CALLER) {
  emulation::machine().collect(emulation::Collective::kSync, mask, 0, 0, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int vote, EMULATION_CALLER) {
  const uint64_t all =
      emulation::machine().collect(emulation::Collective::kBallot, mask, vote != 0, 0, file, line);
  return static_cast<unsigned>(all);
}

namespace emulation {

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* file, int line) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "shuffles move up to eight bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = machine().collect(Collective::kShuffle, mask, bits, source, file, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, EMULATION_CALLER) {
  return emulation::shuffle(mask, value, source % emulation::kLanes, file, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, EMULATION_CALLER) {
  const unsigned lane = emulation::machine().current->lane;
  return emulation::shuffle(mask, value, (lane ^ distance) % emulation::kLanes, file, line);
}

// Threads change places only where they meet; that these are atomic is for races.h. They order nothing.
template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <class T>
T atomicExch(T* address, T value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}

template <class T>
T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// What tests set and ask for.
extern "C" __attribute__((visibility("default"), used)) inline void emulation_order(int64_t order,
                                                                                    int64_t seed) {
  emulation::machine().order = static_cast<emulation::Order>(order);
  emulation::machine().seed = static_cast<uint64_t>(seed);
}

extern "C" __attribute__((visibility("default"), used)) inline int64_t emulation_repeats() {
  return std::exchange(emulation::machine().repeats, 0);
}

extern "C" __attribute__((visibility("default"), used)) inline void emulation_executor(
    emulation::Executor executor) {
  emulation::executor() = executor;
}
