// How a kernel is started, on a GPU or, for tests, on the host.
//
// A kernel is a function object that does the work of one thread and whose call operator is host and device code. nvcc
// compiles it for GPUs; a plain C++ compiler makes loops of it, so that the same bodies, and all the code around them,
// run on tensors in the host's memory (tests/ops/cuda_emulation.cpp).
//
// A launch is one row of blocks of kThreads threads, thread i doing item i; a grid may have 2^31 - 1 blocks. Work that
// many threads add up to one result, such as the dot products of an offset's gradient, goes to groups of 1 to 32 lanes
// of one warp, which are summed by shuffles: always in the same order.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../geometry.h"
#include "../tensors.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define D2_DEFORM_CUDA_KEY CUDA
#else
#define D2_DEFORM_CUDA_KEY PrivateUse1
#endif

namespace d2_deform::cuda {

// The operands of one sum over lanes.
template <typename T, int N>
struct Sums {
  T value[N];
};

constexpr int kMostLanes = 32;

// The lanes that share `parts` pieces of work: a power of two.
inline int lanes_for(int64_t parts) {
  int lanes = 1;
  while (lanes < kMostLanes && lanes < parts) lanes *= 2;
  return lanes;
}

#if defined(__CUDACC__)

constexpr int kThreads = 256;

template <typename Body>
__global__ void __launch_bounds__(kThreads) each(const Body body, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) body(i);
}

// lanes: 1 << shift, at most a warp; count * lanes threads do anything.
template <typename Body>
__global__ void __launch_bounds__(kThreads) each_sum(const Body body, int64_t count, int shift) {
  const int lanes = 1 << shift;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t i = thread >> shift;
  typename Body::Result sums{};
  if (i < count) sums = body.share(i, lane, lanes);
  // All threads of the warp take part, those beyond the last item with zeros.
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    for (auto& value : sums.value) value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  if (i < count && lane == 0) body.finish(i, sums);
}

// Starts kernels on a tensor's device and torch's current stream there, which stays the current device meanwhile.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // body(i) for every i in [0, count), in any order and at the same time. Throws, with the name, if it cannot start.
  template <typename Body>
  void for_each(const char* name, int64_t count, const Body& body) const {
    if (count == 0) return;
    each<<<blocks(name, count), kThreads, 0, stream_>>>(body, count);
    check(name);
  }

  // body.finish(i, sum over lanes of body.share(i, lane, lanes)) for every i in [0, count).
  template <typename Body>
  void for_each_sum(const char* name, int64_t count, int lanes, const Body& body) const {
    if (count == 0) return;
    int shift = 0;
    while (1 << shift < lanes) ++shift;
    each_sum<<<blocks(name, count * lanes), kThreads, 0, stream_>>>(body, count, shift);
    check(name);
  }

 private:
  static unsigned blocks(const char* name, int64_t threads) {
    const int64_t number = (threads + kThreads - 1) / kThreads;
    STD_TORCH_CHECK(number < int64_t(1) << 31, "d2_deform: too much work for kernel ", name);
    return static_cast<unsigned>(number);
  }

  static void check(const char* name) {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(
        error == cudaSuccess, "d2_deform: kernel ", name, ": ", cudaGetErrorString(error));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

#else

// Goes through the items from last to first: no kernel may count on an order.
class Launcher {
 public:
  explicit Launcher(const Tensor&) {}

  template <typename Body>
  void for_each(const char*, int64_t count, const Body& body) const {
    for (int64_t i = count; i-- > 0;) body(i);
  }

  template <typename Body>
  void for_each_sum(const char*, int64_t count, int lanes, const Body& body) const {
    typename Body::Result share[kMostLanes];
    for (int64_t i = count; i-- > 0;) {
      for (int lane = 0; lane < lanes; ++lane) share[lane] = body.share(i, lane, lanes);
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        for (int lane = 0; lane < distance; ++lane) {
          auto& sums = share[lane].value;
          for (size_t j = 0; j < std::size(sums); ++j) {
            sums[j] += share[lane + distance].value[j];
          }
        }
      }
      body.finish(i, share[0]);
    }
  }
};

#endif

}  // namespace d2_deform::cuda
