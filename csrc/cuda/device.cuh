// What the kernels need beyond C++: CUDA's names, shared memory, launches, vectors, conversions.
//
// nvcc compiles these files for GPUs. The tests compile the same files with g++ for the emulation in
// tests/emulation, which runs every thread of a block on the CPU; this header is the only place that knows.
#pragma once
#include <cstdint>

#ifdef SPARSEKD_HOST_EMULATION
#include "cuda_names.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// SPARSEKD_SHARED(float, tile, [32][33]) declares an array in the block's shared memory.
#define SPARSEKD_SHARED(type, name, extents) __shared__ type name extents
// SPARSEKD_REPEATS() tells tests that sums are made a second time, which costs many times the first.
#define SPARSEKD_REPEATS()
#endif

namespace sparsekd_cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Starts `kernel` on a line of blocks and returns CUDA's error code. Nothing is started on no blocks.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), int64_t blocks, dim3 threads, void* stream, Args... args) {
  if (blocks == 0) return cudaSuccess;
  if (blocks < 0 || blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
#ifdef SPARSEKD_HOST_EMULATION
  (void)stream;
  return emulation::launch(kernel, static_cast<unsigned>(blocks), threads, static_cast<Params>(args)...);
#else
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  // clang-format on
  return cudaGetLastError();
#endif
}

// What one memory instruction moves; 16 bytes are the most that there is. Pass it by value: through a
// reference, nvcc loads one element at a time.
template <class T, int kVec>
struct alignas(sizeof(T) * kVec) Vector {
  T v[kVec];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sparsekd_cuda
