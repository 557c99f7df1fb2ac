// Small kernels with one mistake each, for the tests of the emulated machine: it must find every one of them.
// Compiled as a library, and with sanitizers as a program whose argument is the name of the mistake; by nvcc,
// which then sees the kernels alone, for the machine that executes PTX.
#include <cstdio>
#include <memory>

#include "device.cuh"

namespace planted_kernels {

using sparsekd_cuda::kAllLanes;
using sparsekd_cuda::Vector;

constexpr int kThreads = 64;

// out[thread] becomes the sum over the threads of the block, by shuffles, shared memory and barriers.
__global__ void sum_kernel(float* out) {
  SPARSEKD_SHARED(float, sums, [kThreads / 32]);
  float value = static_cast<float>(threadIdx.x);
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  out[threadIdx.x] = sums[0] + sums[1];
}

__global__ void missing_barrier_kernel(float* out) {
  SPARSEKD_SHARED(float, line, [kThreads]);
  line[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = line[kThreads - 1 - threadIdx.x];
}

// The barrier between two rounds is missing: who is ahead overwrites what others still read.
__global__ void missing_second_barrier_kernel(float* out) {
  SPARSEKD_SHARED(float, line, [kThreads]);
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    line[threadIdx.x] = static_cast<float>(round);
    __syncthreads();
    sum += line[kThreads - 1 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

__global__ void unwritten_shared_kernel(float* out) {
  SPARSEKD_SHARED(float, line, [kThreads]);
  out[threadIdx.x] = line[threadIdx.x];
}

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 7)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void caller_not_in_mask_kernel(float* out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); }

__global__ void lane_leaves_before_shuffle_kernel(float* out) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = __shfl_sync(kAllLanes, 1.0f, 0);
}

__global__ void absent_lanes_kernel(float* out) {  // the last warp of a block of 40 threads
  out[threadIdx.x] = __shfl_sync(kAllLanes, 1.0f, 0);
}

__global__ void different_collectives_kernel(float* out) {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    out[threadIdx.x] = static_cast<float>(__ballot_sync(kAllLanes, 1));
}

__global__ void different_masks_kernel(float* out) {
  out[threadIdx.x] = __shfl_sync(threadIdx.x % 32 < 16 ? kAllLanes : 0xffff0000u, 1.0f, 16);
}

__global__ void shuffle_from_outside_kernel(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);
}

__global__ void deadlock_kernel(float* out) {
  if (threadIdx.x % 32 < 16)
    __syncwarp();
  else
    __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void too_much_shared_kernel(float* out) {
  SPARSEKD_SHARED(float, a, [8192]);
  SPARSEKD_SHARED(float, b, [8192]);
  a[threadIdx.x] = b[threadIdx.x] = 1.0f;
  out[threadIdx.x] = a[0] + b[0];
}

__global__ void read_past_the_end_kernel(float* out) { out[threadIdx.x] = out[threadIdx.x + 1]; }

__global__ void shared_past_the_end_kernel(float* out) {
  SPARSEKD_SHARED(float, line, [kThreads]);
  line[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = line[threadIdx.x];
}

__global__ void misaligned_vector_kernel(float* out) {
  const auto part = *reinterpret_cast<Vector<float, 4>*>(out + 1);
  out[threadIdx.x] = part.v[0] + part.v[1] + part.v[2] + part.v[3];
}

// Both blocks count every thread, one after another read and write.
__global__ void plain_update_kernel(float* out) {
  if (threadIdx.x == 0) out[0] += 1.0f;
  out[1 + blockIdx.x * kThreads / 2 + threadIdx.x % (kThreads / 4)] = 1.0f;
}

// Counts without atomics in shared memory.
__global__ void plain_count_kernel(float* out) {
  SPARSEKD_SHARED(float, bins, [8]);
  if (threadIdx.x < 8) bins[threadIdx.x] = 0.0f;
  __syncthreads();
  bins[threadIdx.x % 8] += 1.0f;
  __syncthreads();
  if (threadIdx.x < 8) out[threadIdx.x] = bins[threadIdx.x];
}

// Two lanes of a warp exchange numbers without a barrier.
__global__ void missing_warp_barrier_kernel(float* out) {
  SPARSEKD_SHARED(float, line, [kThreads]);
  line[threadIdx.x] = out[threadIdx.x];
  out[threadIdx.x] = line[threadIdx.x ^ 1];
}

#ifdef SPARSEKD_HOST_EMULATION
struct Planted {
  const char* name;
  void (*kernel)(float*);
  unsigned threads;
  int blocks = 1;
};

constexpr Planted kPlanted[] = {
    {"nothing", sum_kernel, kThreads},
    {"missing barrier", missing_barrier_kernel, kThreads},
    {"missing second barrier", missing_second_barrier_kernel, kThreads},
    {"unwritten shared memory", unwritten_shared_kernel, kThreads},
    {"divergent barrier", divergent_barrier_kernel, kThreads},
    {"caller not in mask", caller_not_in_mask_kernel, kThreads},
    {"lane leaves before shuffle", lane_leaves_before_shuffle_kernel, kThreads},
    {"absent lanes", absent_lanes_kernel, 40},
    {"different collectives", different_collectives_kernel, kThreads},
    {"different masks", different_masks_kernel, kThreads},
    {"shuffle from outside", shuffle_from_outside_kernel, kThreads},
    {"deadlock", deadlock_kernel, kThreads},
    {"too much shared memory", too_much_shared_kernel, kThreads},
    {"too many threads", sum_kernel, 1025},
    {"read past the end", read_past_the_end_kernel, kThreads},
    {"shared memory past the end", shared_past_the_end_kernel, kThreads},
    {"misaligned vector", misaligned_vector_kernel, kThreads},
    {"plain update", plain_update_kernel, kThreads / 2, 2},
    {"plain count", plain_count_kernel, kThreads},
    {"missing warp barrier", missing_warp_barrier_kernel, kThreads},
};
#endif

}  // namespace planted_kernels

#ifdef SPARSEKD_HOST_EMULATION
// out [64]; returns CUDA's code, or -1 when there is no mistake of this name.
extern "C" __attribute__((visibility("default"))) int planted(const char* name, float* out) {
  for (const auto& p : planted_kernels::kPlanted)
    if (std::strcmp(p.name, name) == 0)
      return sparsekd_cuda::launch(p.kernel, p.blocks, dim3(p.threads), nullptr, out);
  return -1;
}

// out [64]; what a stream does to memory besides kernels: all but the first and the last number become 0.
extern "C" __attribute__((visibility("default"))) int clear_inside(float* out) {
  return cudaMemsetAsync(out + 1, 0, (planted_kernels::kThreads - 2) * sizeof(float), nullptr);
}

extern "C" __attribute__((visibility("default"))) const char* planted_error() {
  return emulation::machine().error.c_str();
}

int main(int count, char** names) {
  const std::unique_ptr<float[]> out(new float[planted_kernels::kThreads]());
  for (int i = 1; i < count; ++i)
    if (planted(names[i], out.get()) != 0) std::printf("%s: %s\n", names[i], planted_error());
  std::printf("%g\n", static_cast<double>(out[0]));
}
#endif
