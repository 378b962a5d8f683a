// The memory that kernels read and write: arrays that know their size, packs of neighbours moved at once, atomic sums.
#pragma once

#include <type_traits>

#include "launch.h"

namespace d2_deform::cuda {

// N neighbours that one instruction loads or stores: 16 bytes where N is pack_size<T>().
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <typename T>
constexpr int pack_size() {
  return 16 / static_cast<int>(sizeof(T));
}

#if defined(__CUDA_ARCH__)
// Adds `values` to elements that other threads add to as well.
template <typename T>
__device__ __forceinline__ void add_atomically(
    T* elements, const T* values, std::integral_constant<int, 1>) {
  atomicAdd(elements, values[0]);
}

#if __CUDA_ARCH__ >= 900  // adds four floats at once
__device__ __forceinline__ void add_atomically(
    float* elements, const float* values, std::integral_constant<int, 4>) {
  atomicAdd(
      reinterpret_cast<float4*>(elements), make_float4(values[0], values[1], values[2], values[3]));
}

template <typename T, int N>
__device__ constexpr int added_together() {
  return std::is_same_v<T, float> && N % 4 == 0 ? 4 : 1;
}
#else
template <typename T, int N>
__device__ constexpr int added_together() {
  return 1;
}
#endif
#endif

// On the host, where tests run the kernels, every access is checked.
template <typename T>
struct Array {
  T* data = nullptr;
  int64_t size = 0;

  D2_DEFORM_HOST_DEVICE bool exists() const { return data != nullptr; }

  D2_DEFORM_HOST_DEVICE T& operator[](int64_t i) const {
    check(i, 1);
    return data[i];
  }

  // Elements [i, i + N) as U. With N > 1, i is a multiple of N and data is aligned to a pack.
  template <typename U, int N>
  D2_DEFORM_HOST_DEVICE void load(int64_t i, U (&out)[N]) const {
    check(i, N);
    using Element = std::remove_const_t<T>;
    const auto pack = *reinterpret_cast<const Pack<Element, N>*>(data + i);
    for (int j = 0; j < N; ++j) out[j] = static_cast<U>(pack.value[j]);
  }

  template <typename U, int N>
  D2_DEFORM_HOST_DEVICE void store(int64_t i, const U (&in)[N]) const {
    check(i, N);
    Pack<T, N> pack;
    for (int j = 0; j < N; ++j) pack.value[j] = static_cast<T>(in[j]);
    *reinterpret_cast<Pack<T, N>*>(data + i) = pack;
  }

  // Adds to elements that other threads add to as well.
  template <int N>
  D2_DEFORM_HOST_DEVICE void atomic_add(int64_t i, const T (&in)[N]) const {
    check(i, N);
#if defined(__CUDA_ARCH__)
    constexpr int kTogether = added_together<T, N>();
    for (int j = 0; j < N; j += kTogether) {
      add_atomically(data + i + j, in + j, std::integral_constant<int, kTogether>{});
    }
#else
    for (int j = 0; j < N; ++j) data[i + j] += in[j];
#endif
  }

 private:
  D2_DEFORM_HOST_DEVICE void check(int64_t i, int64_t count) const {
#if !defined(__CUDACC__)
    STD_TORCH_CHECK(
        i >= 0 && i + count <= size && reinterpret_cast<uintptr_t>(data + i) % sizeof(T) == 0,
        "a kernel reads or writes [",
        i,
        ", ",
        i + count,
        ") of ",
        size);
    STD_TORCH_CHECK(
        count == 1 || reinterpret_cast<uintptr_t>(data + i) % (count * sizeof(T)) == 0,
        "a kernel moves a pack that is not aligned");
#endif
  }
};

// All elements of a dense tensor.
template <typename T>
Array<T> array_of(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.numel()};
}

template <typename T>
Array<T> array_or_none(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? array_of<T>(*tensor) : Array<T>{};
}

template <typename T>
bool aligned_to_packs(const Array<T>& array) {
  return reinterpret_cast<uintptr_t>(array.data) % 16 == 0;
}

// Calls f with the number of channels that a thread moves at once: a pack where the channels that belong together are a
// multiple of it and all arrays are aligned, else 1.
template <typename S, typename F>
void dispatch_pack(bool fits, const F& f) {
  if (fits) {
    f(std::integral_constant<int, pack_size<S>()>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

}  // namespace d2_deform::cuda
