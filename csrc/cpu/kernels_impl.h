// The kernels of cpu/kernels.h in GCC's vector extensions, compiled once per instruction set: the including file defines
// D2_DEFORM_ISA (its namespace), D2_DEFORM_VECTOR_BYTES and D2_DEFORM_GEMM_ROWS (how many rows of accumulators fit the
// registers). It must not include anything here: code shared with other files would be compiled for this set.

namespace d2_deform::cpu::D2_DEFORM_ISA {
namespace {

template <typename T>
constexpr int64_t kLanes = D2_DEFORM_VECTOR_BYTES / sizeof(T);

template <typename T>
constexpr int64_t kPanel = 2 * kLanes<T>;

// Unaligned loads and stores.
template <typename T>
struct VectorOf {
  typedef T type
      __attribute__((vector_size(D2_DEFORM_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
inline const Vector<T>& load(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

template <typename T>
inline Vector<T>& at(T* p) {
  return *reinterpret_cast<Vector<T>*>(p);
}

template <typename T>
inline T horizontal_sum(const Vector<T>& v) {
  T sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

template <typename T, int kRows>
void gemm_rows(
    int64_t depth,
    const T* a,
    int64_t row_stride,
    int64_t column_stride,
    const T* b,
    T* c,
    int64_t c_stride,
    bool accumulate) {
  Vector<T> sum[kRows][2];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    if (accumulate) {
      sum[m][0] = load(c + m * c_stride);
      sum[m][1] = load(c + m * c_stride + kLanes<T>);
    } else {
      sum[m][0] = Vector<T>{};
      sum[m][1] = Vector<T>{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<T> b0 = load(b + k * kPanel<T>);
    const Vector<T> b1 = load(b + k * kPanel<T> + kLanes<T>);
    const T* ak = a + k * column_stride;
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const T value = ak[m * row_stride];
      sum[m][0] += value * b0;
      sum[m][1] += value * b1;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    at(c + m * c_stride) = sum[m][0];
    at(c + m * c_stride + kLanes<T>) = sum[m][1];
  }
}

// Rows that do not fill a block: halve the block until they do.
template <typename T, int kRows>
void gemm_rest(
    int64_t rows,
    int64_t depth,
    const T* a,
    int64_t row_stride,
    int64_t column_stride,
    const T* b,
    T* c,
    int64_t c_stride,
    bool accumulate) {
  if constexpr (kRows > 0) {
    if (rows >= kRows) {
      gemm_rows<T, kRows>(depth, a, row_stride, column_stride, b, c, c_stride, accumulate);
      a += kRows * row_stride;
      c += kRows * c_stride;
      rows -= kRows;
    }
    if (rows > 0) {
      gemm_rest<T, kRows / 2>(
          rows, depth, a, row_stride, column_stride, b, c, c_stride, accumulate);
    }
  }
}

template <typename T>
void gemm(
    int64_t rows,
    int64_t depth,
    const T* a,
    int64_t row_stride,
    int64_t column_stride,
    const T* b,
    T* c,
    int64_t c_stride,
    bool accumulate) {
  constexpr int kRows = D2_DEFORM_GEMM_ROWS;
  for (; rows >= kRows; rows -= kRows) {
    gemm_rows<T, kRows>(depth, a, row_stride, column_stride, b, c, c_stride, accumulate);
    a += kRows * row_stride;
    c += kRows * c_stride;
  }
  constexpr int kHalf = kRows >= 12 ? 8 : 4;
  gemm_rest<T, kHalf>(rows, depth, a, row_stride, column_stride, b, c, c_stride, accumulate);
}

template <typename T>
void gather(
    int64_t count,
    int64_t length,
    const T* source,
    int64_t source_stride,
    const int64_t* index,
    const T* weight,
    T* out,
    int64_t out_stride) {
  const int64_t whole = length - length % kLanes<T>;
  for (int64_t i = 0; i < count; ++i, index += 4, weight += 4, out += out_stride) {
    // A cell that does not exist must not be read, not even with weight 0: another cell may hold NaN.
    const T* rows[4];
    T weights[4];
    int64_t cells = 0;
    for (int j = 0; j < 4; ++j) {
      if (index[j] >= 0) {
        rows[cells] = source + index[j] * source_stride;
        weights[cells++] = weight[j];
      }
    }
    if (cells == 4) {
      for (int64_t c = 0; c < whole; c += kLanes<T>) {
        at(out + c) = weights[0] * load(rows[0] + c) + weights[1] * load(rows[1] + c) +
                      weights[2] * load(rows[2] + c) + weights[3] * load(rows[3] + c);
      }
      for (int64_t c = whole; c < length; ++c) {
        out[c] = weights[0] * rows[0][c] + weights[1] * rows[1][c] + weights[2] * rows[2][c] +
                 weights[3] * rows[3][c];
      }
      continue;
    }
    for (int64_t c = 0; c < whole; c += kLanes<T>) {
      Vector<T> sum{};
      for (int64_t j = 0; j < cells; ++j) sum += weights[j] * load(rows[j] + c);
      at(out + c) = sum;
    }
    for (int64_t c = whole; c < length; ++c) {
      T sum = 0;
      for (int64_t j = 0; j < cells; ++j) sum += weights[j] * rows[j][c];
      out[c] = sum;
    }
  }
}

template <typename T>
void scatter(
    int64_t count,
    const T* source,
    const int64_t* index,
    const T* weight,
    const T* grad_column,
    T* grad_source,
    T* column,
    T* dots) {
  constexpr int64_t kWidth = kPanel<T>;
  for (int64_t i = 0; i < count; ++i) {
    const Vector<T> g0 = load(grad_column + i * kWidth);
    const Vector<T> g1 = load(grad_column + i * kWidth + kLanes<T>);
    Vector<T> c0{};
    Vector<T> c1{};
    for (int j = 0; j < 4; ++j) {
      const int64_t row = index[4 * i + j] * kWidth;
      const T w = weight[4 * i + j];
      const Vector<T> s0 = load(source + row);
      const Vector<T> s1 = load(source + row + kLanes<T>);
      c0 += w * s0;
      c1 += w * s1;
      dots[4 * i + j] = horizontal_sum<T>(g0 * s0 + g1 * s1);
      at(grad_source + row) += w * g0;
      at(grad_source + row + kLanes<T>) += w * g1;
    }
    at(column + i * kWidth) = c0;
    at(column + i * kWidth + kLanes<T>) = c1;
  }
}

template <typename T>
void weighted_sum(
    int64_t count, int64_t length, const T* source, const int64_t* row, const T* weight, T* out) {
  int64_t c = 0;
  for (; c + 4 * kLanes<T> <= length; c += 4 * kLanes<T>) {
    Vector<T> sum[4] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T* p = source + row[i] + c;
      for (int v = 0; v < 4; ++v) sum[v] += weight[i] * load(p + v * kLanes<T>);
    }
    for (int v = 0; v < 4; ++v) at(out + c + v * kLanes<T>) = sum[v];
  }
  for (; c + kLanes<T> <= length; c += kLanes<T>) {
    Vector<T> sum{};
    for (int64_t i = 0; i < count; ++i) sum += weight[i] * load(source + row[i] + c);
    at(out + c) = sum;
  }
  for (; c < length; ++c) {
    T sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weight[i] * source[row[i] + c];
    out[c] = sum;
  }
}

template <typename T>
void weighted_scatter(
    int64_t count,
    int64_t length,
    const T* gradient,
    const int64_t* row,
    const T* weight,
    T* target) {
  const int64_t whole = length - length % kLanes<T>;
  for (int64_t i = 0; i < count; ++i) {
    T* out = target + row[i];
    for (int64_t c = 0; c < whole; c += kLanes<T>) at(out + c) += weight[i] * load(gradient + c);
    for (int64_t c = whole; c < length; ++c) out[c] += weight[i] * gradient[c];
  }
}

template <typename T>
void dot_rows(
    int64_t count,
    int64_t length,
    const T* source,
    const int64_t* row,
    const T* gradient,
    T* dots) {
  const int64_t whole = length - length % kLanes<T>;
  for (int64_t i = 0; i < count; ++i) {
    const T* p = source + row[i];
    Vector<T> sums{};
    for (int64_t c = 0; c < whole; c += kLanes<T>) sums += load(p + c) * load(gradient + c);
    T sum = horizontal_sum<T>(sums);
    for (int64_t c = whole; c < length; ++c) sum += p[c] * gradient[c];
    dots[i] = sum;
  }
}

template <typename T>
void multiply_add(
    int64_t count,
    int64_t length,
    const T* a,
    int64_t a_stride,
    const T* b,
    T* out,
    int64_t out_stride) {
  const int64_t whole = length - length % kLanes<T>;
  for (int64_t i = 0; i < count; ++i, a += a_stride, out += out_stride) {
    for (int64_t c = 0; c < whole; c += kLanes<T>) at(out + c) += load(a + c) * load(b + c);
    for (int64_t c = whole; c < length; ++c) out[c] += a[c] * b[c];
  }
}

template <typename T>
void multiply_reduce(
    int64_t count,
    int64_t length,
    const T* a,
    int64_t a_stride,
    const T* b,
    int64_t b_stride,
    T* out) {
  const int64_t whole = length - length % kLanes<T>;
  for (int64_t i = 0; i < count; ++i, a += a_stride, b += b_stride) {
    for (int64_t c = 0; c < whole; c += kLanes<T>) at(out + c) += load(a + c) * load(b + c);
    for (int64_t c = whole; c < length; ++c) out[c] += a[c] * b[c];
  }
}

}  // namespace

template <typename T>
Kernels<T> table() {
  return {
      kPanel<T>,
      gemm<T>,
      gather<T>,
      scatter<T>,
      weighted_sum<T>,
      weighted_scatter<T>,
      dot_rows<T>,
      multiply_add<T>,
      multiply_reduce<T>};
}

template Kernels<float> table<float>();
template Kernels<double> table<double>();

}  // namespace d2_deform::cpu::D2_DEFORM_ISA
