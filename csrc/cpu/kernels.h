// The inner loops that depend on the instruction set, as one table per set, chosen when the library is loaded.
//
// T is float or double. Rows are runs of consecutive channels (channels-last inside).
#pragma once

#include <cstdint>

namespace d2_deform::cpu {

template <typename T>
struct Kernels {
  // Width of a packed panel in elements: two vector registers.
  int64_t panel;

  // C[m, 0:panel] (+)= sum_k A[m * row_stride + k * column_stride] * B[k * panel + 0:panel], for m < rows.
  void (*gemm)(
      int64_t rows,
      int64_t depth,
      const T* a,
      int64_t row_stride,
      int64_t column_stride,
      const T* b,
      T* c,
      int64_t c_stride,
      bool accumulate);

  // out[i, 0:length] = sum_j weight[4 i + j] * source[index[4 i + j], 0:length], for i < count; index -1 = no cell.
  void (*gather)(
      int64_t count,
      int64_t length,
      const T* source,
      int64_t source_stride,
      const int64_t* index,
      const T* weight,
      T* out,
      int64_t out_stride);

  // One pass over `count` samples of one panel of channels. index holds rows of `source` and `grad_source`, never -1.
  // column[i] = sampled value (as gather); grad_source[index] += weight * grad_column[i];
  // dots[4 i + j] = <grad_column[i], source[index[4 i + j]]>.
  void (*scatter)(
      int64_t count,
      const T* source,
      const int64_t* index,
      const T* weight,
      const T* grad_column,
      T* grad_source,
      T* column,
      T* dots);

  // out[0:length] = sum_i weight[i] * source[row[i] + 0:length], for i < count.
  void (*weighted_sum)(
      int64_t count, int64_t length, const T* source, const int64_t* row, const T* weight, T* out);

  // target[row[i] + 0:length] += weight[i] * gradient[0:length], for i < count.
  void (*weighted_scatter)(
      int64_t count,
      int64_t length,
      const T* gradient,
      const int64_t* row,
      const T* weight,
      T* target);

  // dots[i] = <source[row[i] + 0:length], gradient[0:length]>, for i < count.
  void (*dot_rows)(
      int64_t count,
      int64_t length,
      const T* source,
      const int64_t* row,
      const T* gradient,
      T* dots);

  // out[i, 0:length] += a[i, 0:length] * b[0:length], for i < count.
  void (*multiply_add)(
      int64_t count,
      int64_t length,
      const T* a,
      int64_t a_stride,
      const T* b,
      T* out,
      int64_t out_stride);

  // out[0:length] += sum_i a[i, 0:length] * b[i, 0:length], for i < count.
  void (*multiply_reduce)(
      int64_t count,
      int64_t length,
      const T* a,
      int64_t a_stride,
      const T* b,
      int64_t b_stride,
      T* out);
};

// The table of the best instruction set of this processor, or of the one named by the environment variable
// D2_DEFORM_CPU_CAPABILITY (default, avx2, avx512) if the processor has it.
template <typename T>
const Kernels<T>& kernels();

// Its name.
const char* capability();

namespace isa_default {
template <typename T>
Kernels<T> table();
}
#if defined(__x86_64__)
namespace isa_avx2 {
template <typename T>
Kernels<T> table();
}
namespace isa_avx512 {
template <typename T>
Kernels<T> table();
}
#endif

}  // namespace d2_deform::cpu
