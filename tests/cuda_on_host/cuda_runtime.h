// Just enough of the CUDA runtime to run the kernels of csrc/ on the host: one std::thread per CUDA thread of
// a block, blocks one after the other, and a barrier per warp for the shuffles. Found before the real header by its place in the include path.
#pragma once

#include <algorithm>
#include <array>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
struct float2 {
  float values[2];
};
struct float4 {
  float values[4];
};
inline thread_local Index threadIdx, blockIdx, blockDim;

using cudaStream_t = void *;
using cudaError_t = int;
enum { cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return 0; }
inline const char *cudaGetErrorString(cudaError_t) { return "CUDA error"; }

using std::max;
using std::min;

struct Warp {
  std::barrier<> barrier{32};
  std::array<double, 32> slots;

  template <class Value>
  Value exchange(Value value, int from) {
    *reinterpret_cast<Value *>(&slots[threadIdx.x % 32]) = value;
    barrier.arrive_and_wait();
    value = *reinterpret_cast<Value *>(&slots[from % 32]);
    barrier.arrive_and_wait();
    return value;
  }
};
inline thread_local Warp *warp;

template <class Value>
Value __shfl_sync(unsigned, Value value, int lane) {
  return warp->exchange(value, lane);
}

template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return warp->exchange(value, int(threadIdx.x) ^ mask);
}

// What `kernel<<<blocks, threads, 0, stream>>>(arguments...)` is rewritten to.
template <class Kernel>
void launch_on_host(unsigned blocks, unsigned threads, Kernel kernel) {
  std::vector<Warp> warps(threads / 32);
  std::vector<std::thread> running;
  for (unsigned thread = 0; thread < threads; ++thread) {
    running.emplace_back([=, &warps] {
      threadIdx = {thread}, blockDim = {threads};
      warp = &warps[thread / 32];
      for (blockIdx = {0}; blockIdx.x < blocks; ++blockIdx.x) {
        kernel();
        warp->barrier.arrive_and_wait();
      }
    });
  }
  for (std::thread &thread : running) thread.join();
}
