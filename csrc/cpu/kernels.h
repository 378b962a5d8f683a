// The inner loops that depend on the instruction set, as one table per set, chosen when the library is loaded.
//
// T is float or double. Rows are runs of consecutive channels (channels-last inside).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace d2_deform::cpu {

// A whole number as wide as T: cells are counted in it, so that a vector of T has as many.
template <typename T>
using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// What a sampling plan is made from; see Kernels::plan.
template <typename T>
struct PlanInputs {
  const int64_t* base_y;
  const int64_t* base_x;
  int64_t tap_y, tap_x;
  const T* dy;
  const T* dx;
  const T* mask;
  int64_t height, width;
  Index<T> first;    // cell of the map that has index 0
  Index<T> missing;  // index of a cell outside the map
};

// Where one tap samples for a run of output pixels, one array for each of the four cells: [0] top-left, [1] top-right,
// [2] bottom-left, [3] bottom-right. Arrays have room for whole vectors.
template <typename T>
struct PlanArrays {
  Index<T>* index[4];
  T* weight[4];  // times the mask; 0 where there is no cell
  T* ly;  // distance from the top-left cell; -1 where the sample is outside the map and counts for nothing
  T* lx;
};

template <typename T>
struct Kernels {
  // Width of a packed panel in elements: two vector registers.
  int64_t panel;
  // Rows that the matrix product takes at a time: other numbers of rows leave a slower rest.
  int64_t gemm_rows;

  // C[m, 0:panel] (+)= sum_k A[m * row_stride + k * column_stride] * B[k * panel + 0:panel], for m < rows.
  // next_b: the panel of the next call, or null; it is fetched from the level-3 cache meanwhile.
  void (*gemm)(
      int64_t rows,
      int64_t depth,
      const T* a,
      int64_t row_stride,
      int64_t column_stride,
      const T* b,
      T* c,
      int64_t c_stride,
      bool accumulate,
      const T* next_b);

  // out[j * out_stride + i] = in[i * in_stride + j], for i < rows, j < columns.
  void (*transpose)(
      int64_t rows, int64_t columns, const T* in, int64_t in_stride, T* out, int64_t out_stride);

  // The samples of `count` output pixels at (tap_y + base_y[i] + dy[i], tap_x + base_x[i] + dx[i]), written to
  // [begin, begin + count) of each array of `plan`; geometry.h is its definition. mask: a factor for each, or null.
  void (*plan)(const PlanInputs<T>& inputs, int64_t count, const PlanArrays<T>& plan);

  // out[i, 0:length] = sum_j plan.weight[j][i] * source[plan.index[j][i], 0:length], for i < count; index -1 = no cell.
  void (*gather)(
      int64_t count,
      int64_t length,
      const T* source,
      int64_t source_stride,
      const PlanArrays<T>& plan,
      T* out,
      int64_t out_stride);

  // One pass over `count` samples of one panel of channels. The plan's index holds rows of `source` and `grad_source`,
  // never -1. column[i] = sampled value (as gather); grad_source[index] += weight * grad_column[i];
  // dots[4 i + j] = <grad_column[i], source[index[j][i]]>.
  void (*scatter)(
      int64_t count,
      const T* source,
      const PlanArrays<T>& plan,
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

  // weighted_scatter and dot_rows in one pass.
  void (*scatter_and_dot_rows)(
      int64_t count,
      int64_t length,
      const T* source,
      const int64_t* row,
      const T* weight,
      const T* gradient,
      T* target,
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
