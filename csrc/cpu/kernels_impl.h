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

// Vectors of whole numbers with as many lanes as Vector<T>.
template <typename T>
struct IndexVectorOf {
  typedef Index<T> type
      __attribute__((vector_size(D2_DEFORM_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <typename T>
using IndexVector = typename IndexVectorOf<T>::type;

// Lane l of the result is lane choose(l, L) of a and b, counted through both: b's lanes are L to 2 L - 1.
template <typename T, typename F, std::size_t... lane>
inline Vector<T> choose_lanes(
    const Vector<T>& a, const Vector<T>& b, F choose, std::index_sequence<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, choose(lane, kLanes<T>)...);
#else
  return __builtin_shuffle(a, b, IndexVector<T>{Index<T>(choose(lane, kLanes<T>))...});
#endif
}

template <typename T, typename F>
inline Vector<T> choose_lanes(const Vector<T>& a, const Vector<T>& b, F choose) {
  return choose_lanes<T>(a, b, choose, std::make_index_sequence<kLanes<T>>{});
}

// a and b cut into blocks of `block` lanes: a0 b0 a2 b2 ... and a1 b1 a3 b3 ...
template <typename T, int64_t block>
inline Vector<T> even_blocks(const Vector<T>& a, const Vector<T>& b) {
  return choose_lanes<T>(a, b, [](int64_t lane, int64_t lanes) constexpr {
    return lane / block % 2 ? lanes + lane - block : lane;
  });
}

template <typename T, int64_t block>
inline Vector<T> odd_blocks(const Vector<T>& a, const Vector<T>& b) {
  return choose_lanes<T>(a, b, [](int64_t lane, int64_t lanes) constexpr {
    return lane / block % 2 ? lanes + lane : lane + block;
  });
}

// out[0:4] = the sums of a's, b's, c's and d's lanes.
template <typename T>
inline void sums_of_four(
    const Vector<T>& a, const Vector<T>& b, const Vector<T>& c, const Vector<T>& d, T* out) {
  const Vector<T> ab = even_blocks<T, 1>(a, b) + odd_blocks<T, 1>(a, b);
  const Vector<T> cd = even_blocks<T, 1>(c, d) + odd_blocks<T, 1>(c, d);
  if constexpr (kLanes<T> == 2) {
    at(out) = ab;
    at(out + 2) = cd;
  } else {
    Vector<T> sums = even_blocks<T, 2>(ab, cd) + odd_blocks<T, 2>(ab, cd);
    if constexpr (kLanes<T> >= 16) sums += odd_blocks<T, 8>(sums, sums);
    if constexpr (kLanes<T> >= 8) sums += odd_blocks<T, 4>(sums, sums);
    for (int j = 0; j < 4; ++j) out[j] = sums[j];
  }
}

template <typename T>
inline T horizontal_sum(const Vector<T>& v) {
  T sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

template <typename T, int kRows, bool kFetch = false>
void gemm_rows(
    int64_t depth,
    const T* a,
    int64_t row_stride,
    int64_t column_stride,
    const T* b,
    T* c,
    int64_t c_stride,
    bool accumulate,
    const T* fetch = nullptr,
    int64_t fetch_step = 0) {
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
    if constexpr (kFetch) __builtin_prefetch(fetch + k * fetch_step, 0, 2);
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
    bool accumulate,
    const T* next_b) {
  constexpr int kRows = D2_DEFORM_GEMM_ROWS;
  if (next_b != nullptr && rows >= kRows) {
    // Each block of rows fetches its share, so that the fetches hide behind the arithmetic.
    const int64_t blocks = rows / kRows < kPanel<T> ? rows / kRows : kPanel<T>;
    const int64_t step = kPanel<T> / blocks;
    for (int64_t i = 0; i < blocks; ++i, rows -= kRows) {
      gemm_rows<T, kRows, true>(
          depth,
          a,
          row_stride,
          column_stride,
          b,
          c,
          c_stride,
          accumulate,
          next_b + i * step * depth,
          step);
      a += kRows * row_stride;
      c += kRows * c_stride;
    }
  }
  for (; rows >= kRows; rows -= kRows) {
    gemm_rows<T, kRows>(depth, a, row_stride, column_stride, b, c, c_stride, accumulate);
    a += kRows * row_stride;
    c += kRows * c_stride;
  }
  constexpr int kHalf = kRows >= 12 ? 8 : 4;
  gemm_rest<T, kHalf>(rows, depth, a, row_stride, column_stride, b, c, c_stride, accumulate);
}

// One square of as many rows as a vector has lanes, in the registers: blocks of half a square, of a quarter and so on
// change places across the diagonal.
template <typename T, int64_t block>
inline void swap_blocks(Vector<T>* rows) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes<T>; ++i) {
    if (i / block % 2) continue;
    const Vector<T> upper = rows[i];
    rows[i] = even_blocks<T, block>(upper, rows[i + block]);
    rows[i + block] = odd_blocks<T, block>(upper, rows[i + block]);
  }
  if constexpr (block > 1) swap_blocks<T, block / 2>(rows);
}

template <typename T>
inline void transpose_square(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  constexpr int64_t kSquare = kLanes<T>;
  Vector<T> square[kSquare];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kSquare; ++r) square[r] = load(in + r * in_stride);
  swap_blocks<T, kSquare / 2>(square);
#pragma GCC unroll 16
  for (int64_t r = 0; r < kSquare; ++r) at(out + r * out_stride) = square[r];
}

// out[j * out_stride + i] = in[i * in_stride + j] for i, j < 8.
template <typename T>
inline void transpose_eight(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  for (int64_t i = 0; i < 8; ++i) {
    for (int64_t j = 0; j < 8; ++j) out[j * out_stride + i] = in[i * in_stride + j];
  }
}
#if D2_DEFORM_VECTOR_BYTES >= 32
template <>
inline void transpose_eight(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// Calls f(i, j) for the corners of squares that cover rows x columns, neither of them less than `side`: the last square of a
// line begins where it ends with the line, and so covers some elements a second time.
template <typename F>
inline void cover(int64_t side, int64_t rows, int64_t columns, bool along_rows, const F& f) {
  const int64_t outer = along_rows ? rows : columns;
  const int64_t inner = along_rows ? columns : rows;
  for (int64_t i = 0; i < outer; i += side) {
    const int64_t first = i + side <= outer ? i : outer - side;
    for (int64_t j = 0; j < inner; j += side) {
      const int64_t second = j + side <= inner ? j : inner - side;
      f(along_rows ? first : second, along_rows ? second : first);
    }
  }
}

template <typename T>
void transpose(
    int64_t rows, int64_t columns, const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  constexpr int64_t kSquare = kLanes<T>;
  // The side whose rows lie farther apart is walked along its rows, each of them once.
  const bool along_rows = in_stride > out_stride;
  const int64_t least = rows < columns ? rows : columns;
  if (least >= kSquare) {
    cover(kSquare, rows, columns, along_rows, [=](int64_t i, int64_t j) {
      transpose_square(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    });
  } else if (least >= 8) {
    cover(8, rows, columns, along_rows, [=](int64_t i, int64_t j) {
      transpose_eight(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    });
  } else {
    cover(1, rows, columns, along_rows, [=](int64_t i, int64_t j) {
      out[j * out_stride + i] = in[i * in_stride + j];
    });
  }
}

// One vector of samples; see geometry.h, bilinear_sample, whose steps it takes.
template <typename T>
inline void plan_vector(
    const PlanInputs<T>& in,
    const int64_t* base_y,
    const int64_t* base_x,
    const T* dy,
    const T* dx,
    const T* mask,
    int64_t i,
    const PlanArrays<T>& out) {
  using V = Vector<T>;
  using I = IndexVector<T>;
  V y, x;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
    y[lane] = static_cast<T>(base_y[lane] + in.tap_y);
    x[lane] = static_cast<T>(base_x[lane] + in.tap_x);
  }
  y += load(dy);
  x += load(dx);
  const I height = I{} + static_cast<Index<T>>(in.height);
  const I width = I{} + static_cast<Index<T>>(in.width);
  const V zero{};
  const V one = zero + T(1);
  const I inside = (y > -one) & (y < zero + static_cast<T>(in.height)) & (x > -one) &
                   (x < zero + static_cast<T>(in.width));
  y = inside ? y : zero;
  x = inside ? x : zero;
  I top = __builtin_convertvector(y + one, I) - 1;
  I left = __builtin_convertvector(x + one, I) - 1;
  top += (y - __builtin_convertvector(top, V)) < zero;  // -1 where y + 1 was rounded up
  left += (x - __builtin_convertvector(left, V)) < zero;
  const V ly = y - __builtin_convertvector(top, V);
  const V lx = x - __builtin_convertvector(left, V);
  const V factor = mask ? load(mask) : one;
  const I cell = top * width + left - in.first;
  const I missing = I{} + in.missing;
  const I rows[2] = {inside & (top >= 0), inside & (top + 1 < height)};
  const I columns[2] = {left >= 0, left + 1 < width};
  const V along_y[2] = {one - ly, ly};
  const V along_x[2] = {one - lx, lx};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const I exists = rows[j / 2] & columns[j % 2];
    const I index = cell + (j / 2 ? width : I{}) + (j % 2);
    *reinterpret_cast<I*>(out.index[j] + i) = exists ? index : missing;
    at(out.weight[j] + i) = exists ? along_y[j / 2] * along_x[j % 2] * factor : zero;
  }
  at(out.ly + i) = inside ? ly : -one;
  at(out.lx + i) = lx;
}

template <typename T>
void plan(const PlanInputs<T>& in, int64_t count, const PlanArrays<T>& out) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    const T* mask = in.mask ? in.mask + i : nullptr;
    plan_vector(in, in.base_y + i, in.base_x + i, in.dy + i, in.dx + i, mask, i, out);
  }
  if (i == count) return;
  // Nothing is read beyond the tensors' end.
  int64_t base_y[kLanes<T>] = {}, base_x[kLanes<T>] = {};
  T dy[kLanes<T>] = {}, dx[kLanes<T>] = {}, mask[kLanes<T>] = {};
  for (int64_t lane = 0; i + lane < count; ++lane) {
    base_y[lane] = in.base_y[i + lane];
    base_x[lane] = in.base_x[i + lane];
    dy[lane] = in.dy[i + lane];
    dx[lane] = in.dx[i + lane];
    if (in.mask) mask[lane] = in.mask[i + lane];
  }
  plan_vector(in, base_y, base_x, dy, dx, in.mask ? mask : nullptr, i, out);
}

template <typename T>
void gather(
    int64_t count,
    int64_t length,
    const T* source,
    int64_t source_stride,
    const PlanArrays<T>& plan,
    T* out,
    int64_t out_stride) {
  const int64_t whole = length - length % kLanes<T>;
  for (int64_t i = 0; i < count; ++i, out += out_stride) {
    // A cell that does not exist must not be read, not even with weight 0: another cell may hold NaN.
    const T* rows[4];
    T weights[4];
    int64_t cells = 0;
    for (int j = 0; j < 4; ++j) {
      if (plan.index[j][i] >= 0) {
        rows[cells] = source + plan.index[j][i] * source_stride;
        weights[cells++] = plan.weight[j][i];
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
    const PlanArrays<T>& plan,
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
    Vector<T> products[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t row = plan.index[j][i] * kWidth;
      const T w = plan.weight[j][i];
      const Vector<T> s0 = load(source + row);
      const Vector<T> s1 = load(source + row + kLanes<T>);
      c0 += w * s0;
      c1 += w * s1;
      products[j] = g0 * s0 + g1 * s1;
      at(grad_source + row) += w * g0;
      at(grad_source + row + kLanes<T>) += w * g1;
    }
    sums_of_four<T>(products[0], products[1], products[2], products[3], dots + 4 * i);
    at(column + i * kWidth) = c0;
    at(column + i * kWidth + kLanes<T>) = c1;
  }
}

template <typename T>
void weighted_sum(
    int64_t count, int64_t length, const T* source, const int64_t* row, const T* weight, T* out) {
  int64_t c = 0;
  const auto sum_vectors = [&](auto vectors) {
    constexpr int64_t kVectors = decltype(vectors)::value;
    for (; c + kVectors * kLanes<T> <= length; c += kVectors * kLanes<T>) {
      Vector<T> sum[kVectors] = {};
      for (int64_t i = 0; i < count; ++i) {
        const T* p = source + row[i] + c;
        for (int64_t v = 0; v < kVectors; ++v) sum[v] += weight[i] * load(p + v * kLanes<T>);
      }
      for (int64_t v = 0; v < kVectors; ++v) at(out + c + v * kLanes<T>) = sum[v];
    }
  };
  sum_vectors(std::integral_constant<int64_t, 4>{});
  sum_vectors(std::integral_constant<int64_t, 2>{});
  sum_vectors(std::integral_constant<int64_t, 1>{});
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

// A run of kVectors vectors of one row: to the gradient's target, and the products whose lanes are yet to be summed.
template <typename T, int kVectors>
inline Vector<T> scatter_and_multiply(
    const T* source, T weight, const Vector<T>* gradient, T* target) {
  Vector<T> products{};
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    products += load(source + v * kLanes<T>) * gradient[v];
    at(target + v * kLanes<T>) += weight * gradient[v];
  }
  return products;
}

// scatter_and_dot_rows for the next kVectors vectors of every row, from channel c on: adds to dots.
template <typename T, int kVectors>
void scatter_and_dot_vectors(
    int64_t count,
    int64_t c,
    const T* source,
    const int64_t* row,
    const T* weight,
    const T* gradient,
    T* target,
    T* dots) {
  Vector<T> held[kVectors];
  for (int v = 0; v < kVectors; ++v) held[v] = load(gradient + c + v * kLanes<T>);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    Vector<T> products[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t at_row = row[i + j] + c;
      products[j] =
          scatter_and_multiply<T, kVectors>(source + at_row, weight[i + j], held, target + at_row);
    }
    T sums[4];
    sums_of_four<T>(products[0], products[1], products[2], products[3], sums);
    for (int j = 0; j < 4; ++j) dots[i + j] += sums[j];
  }
  for (; i < count; ++i) {
    const int64_t at_row = row[i] + c;
    dots[i] += horizontal_sum<T>(
        scatter_and_multiply<T, kVectors>(source + at_row, weight[i], held, target + at_row));
  }
}

template <typename T>
void scatter_and_dot_rows(
    int64_t count,
    int64_t length,
    const T* source,
    const int64_t* row,
    const T* weight,
    const T* gradient,
    T* target,
    T* dots) {
  int64_t c = 0;
  for (int64_t i = 0; i < count; ++i) dots[i] = T(0);
  for (; c + 4 * kLanes<T> <= length; c += 4 * kLanes<T>) {
    scatter_and_dot_vectors<T, 4>(count, c, source, row, weight, gradient, target, dots);
  }
  for (; c + 2 * kLanes<T> <= length; c += 2 * kLanes<T>) {
    scatter_and_dot_vectors<T, 2>(count, c, source, row, weight, gradient, target, dots);
  }
  for (; c + kLanes<T> <= length; c += kLanes<T>) {
    scatter_and_dot_vectors<T, 1>(count, c, source, row, weight, gradient, target, dots);
  }
  if (c == length) return;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t rest = c; rest < length; ++rest) {
      dots[i] += source[row[i] + rest] * gradient[rest];
      target[row[i] + rest] += weight[i] * gradient[rest];
    }
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
      D2_DEFORM_GEMM_ROWS,
      gemm<T>,
      transpose<T>,
      plan<T>,
      gather<T>,
      scatter<T>,
      weighted_sum<T>,
      weighted_scatter<T>,
      dot_rows<T>,
      scatter_and_dot_rows<T>,
      multiply_add<T>,
      multiply_reduce<T>};
}

template Kernels<float> table<float>();
template Kernels<double> table<double>();

}  // namespace d2_deform::cpu::D2_DEFORM_ISA
