// The kernels of pack_kernels.h, compiled once per instruction set after kernels_impl.h, whose vectors they use.
//
// A bin is planned across boxes, a vector of boxes at a time: which cells each axis reads and with what weight
// (roi_geometry.h defines both). It is pooled box by box: kRowCells neighbours of a row at a time, so that no cell is gathered
// on its own.

namespace d2_deform::cpu::D2_DEFORM_ISA {
namespace {

// Stands for the cell of a sample that reads none.
template <typename T>
constexpr Index<T> kNoCell = -(Index<T>(1) << 30);

// kRowCells neighbours of a row, in one vector register or several.
template <typename T>
constexpr int64_t kPieceBytes =
    kRowCells * sizeof(T) < D2_DEFORM_VECTOR_BYTES ? kRowCells * sizeof(T) : D2_DEFORM_VECTOR_BYTES;
template <typename T>
constexpr int64_t kPieceLanes = kPieceBytes<T> / sizeof(T);
template <typename T>
constexpr int64_t kPieces = kRowCells / kPieceLanes<T>;
template <typename T>
struct PieceOf {
  typedef T type __attribute__((vector_size(kPieceBytes<T>), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Piece = typename PieceOf<T>::type;

template <typename T>
inline Piece<T>& piece_at(T* p) {
  return *reinterpret_cast<Piece<T>*>(p);
}
template <typename T>
inline const Piece<T>& piece_at(const T* p) {
  return *reinterpret_cast<const Piece<T>*>(p);
}

template <typename T>
struct Row {
  Piece<T> piece[kPieces<T>];
};

template <typename T>
inline Row<T> row_at(const T* p) {
  Row<T> row;
  for (int64_t i = 0; i < kPieces<T>; ++i) {
    row.piece[i] = piece_at(p + i * kPieceLanes<T>);
  }
  return row;
}

// sum + factor * row
template <typename T>
inline void add_product(Row<T>& sum, T factor, const Row<T>& row) {
  for (int64_t i = 0; i < kPieces<T>; ++i) sum.piece[i] += factor * row.piece[i];
}

template <typename T>
inline void add_product(Row<T>& sum, const Row<T>& factor, const Row<T>& row) {
  for (int64_t i = 0; i < kPieces<T>; ++i) sum.piece[i] += factor.piece[i] * row.piece[i];
}

// The row where `bits` (0 or -1) is set, else 0.
template <typename T>
inline Row<T> keep(const Row<T>& row, Index<T> bits) {
  Row<T> kept;
  for (int64_t i = 0; i < kPieces<T>; ++i) {
    kept.piece[i] = (Piece<T>)((Piece<Index<T>>)row.piece[i] & bits);
  }
  return kept;
}

template <typename T>
inline void put(const Row<T>& row, T* p) {
  for (int64_t i = 0; i < kPieces<T>; ++i) {
    piece_at(p + i * kPieceLanes<T>) = row.piece[i];
  }
}

// One row for each box of a pack; their sums are made for a piece of boxes at a time.
template <typename T>
struct RowSums {
  T row[kPackBoxes][kRowCells];
  T column[kRowCells][kPackBoxes];

  void turn() {
    for (int64_t b = 0; b < kPackBoxes; b += kRowCells) {
      transpose_eight(row[b], kRowCells, column[0] + b, kPackBoxes);
    }
  }

  // Of the boxes from b on. No wider than a piece: a vector would have to wait for what turn() writes in parts.
  Piece<T> sum(int64_t b) const {
    Piece<T> sum = piece_at(column[0] + b);
    for (int64_t k = 1; k < kRowCells; ++k) sum += piece_at(column[k] + b);
    return sum;
  }
};

// Which cells of a row count, from bits: the others are not read, or read as 0, and nothing is added to them.
#if D2_DEFORM_VECTOR_BYTES == 64
template <typename T>
struct RowMask {
  __mmask8 bits;
  explicit RowMask(Index<T> all) : bits(static_cast<__mmask8>(all)) {}
};

inline Row<float> load(const float* p, const RowMask<float>& mask) {
  return {{(Piece<float>)_mm256_maskz_loadu_ps(mask.bits, p)}};
}
inline Row<double> load(const double* p, const RowMask<double>& mask) {
  return {{(Piece<double>)_mm512_maskz_loadu_pd(mask.bits, p)}};
}

inline void add_at(float* p, const RowMask<float>& mask, float factor, const Row<float>& row) {
  const __m256 sum = _mm256_mask3_fmadd_ps(
      _mm256_set1_ps(factor), (__m256)row.piece[0], _mm256_loadu_ps(p), mask.bits);
  _mm256_storeu_ps(p, sum);
}
inline void add_at(double* p, const RowMask<double>& mask, double factor, const Row<double>& row) {
  const __m512d sum = _mm512_mask3_fmadd_pd(
      _mm512_set1_pd(factor), (__m512d)row.piece[0], _mm512_loadu_pd(p), mask.bits);
  _mm512_storeu_pd(p, sum);
}
#else
template <typename T>
struct RowMask {
  Piece<Index<T>> piece[kPieces<T>];
  explicit RowMask(Index<T> all) {
    for (int64_t i = 0; i < kPieces<T>; ++i) {
      Piece<Index<T>> bit;
      for (int64_t j = 0; j < kPieceLanes<T>; ++j) bit[j] = Index<T>(1) << (i * kPieceLanes<T> + j);
      piece[i] = (bit & all) != 0;
    }
  }
};

template <typename T>
inline Row<T> load(const T* p, const RowMask<T>& mask) {
  Row<T> row = row_at(p);
  for (int64_t i = 0; i < kPieces<T>; ++i) {
    row.piece[i] = (Piece<T>)((Piece<Index<T>>)row.piece[i] & mask.piece[i]);
  }
  return row;
}

template <typename T>
inline void add_at(T* p, const RowMask<T>& mask, T factor, const Row<T>& row) {
  for (int64_t i = 0; i < kPieces<T>; ++i) {
    const Piece<T> product = factor * row.piece[i];
    piece_at(p + i * kPieceLanes<T>) += (Piece<T>)((Piece<Index<T>>)product & mask.piece[i]);
  }
}
#endif

// The samples of one axis of a bin, for every box of a pack.
template <typename T>
struct PackSamples {
  Index<T> low[kPackSamples]
              [kPackBoxes];  // the cell at or before the sample; kNoCell if it is skipped
  Index<T> high[kPackSamples]
               [kPackBoxes];  // the next one; kNoCell if the sample does not move with the shift
  T fraction[kPackSamples][kPackBoxes];
  Index<T> first[kPackBoxes];  // the first cell that a box reads; 0 if there is none
  T count[kPackBoxes];         // of the samples that are not skipped
};

// kSamples: bin.samples where it is known when compiling, else 0.
template <typename T, int kSamples>
void find_samples(
    const PackBin<T>& bin,
    const PackAxis<T>& axis,
    const T* shift,
    int64_t index,
    int64_t extent,
    PackSamples<T>& s) {
  using V = Vector<T>;
  using I = IndexVector<T>;
  const T last = static_cast<T>(extent - 1);
  const T end = static_cast<T>(extent) - T(0.5);
  const Index<T> last_cell = static_cast<Index<T>>(extent - 1);
  const int64_t samples = kSamples > 0 ? kSamples : bin.samples;
  for (int64_t b = 0; b < kPackBoxes; b += kLanes<T>) {
    const V length = load(axis.length + b);
    const V step = load(axis.step + b);
    V begin = load(axis.start + b) + static_cast<T>(index) * load(axis.bin_length + b);
    if (shift) begin += load(shift + b) * bin.gamma * length;
    if (bin.aligned) begin += T(0.5) * step;
    I lowest = I{} - kNoCell<T>;
    I count{};
#pragma GCC unroll 4
    for (int64_t i = 0; i < samples; ++i) {
      const V position = begin + static_cast<T>(i) * step;
      const I inside = (position >= T(-0.5)) & (position <= end);
      const V capped = position > last ? V{} + last : position;
      const V clamped = inside & (position > T(0)) ? capped : V{};
      const I below = __builtin_convertvector(clamped, I);
      const I low = below > last_cell ? I{} + last_cell : below;
      const V fraction = clamped - __builtin_convertvector(low, V);
      I moves = inside & (low < last_cell) & (position >= T(0));
      if (!bin.aligned) moves &= fraction != T(0);
      const I low_read = inside ? low : I{} + kNoCell<T>;
      const I high_read = moves ? low + 1 : I{} + kNoCell<T>;
      at(s.low[i] + b) = low_read;
      at(s.high[i] + b) = high_read;
      at(s.fraction[i] + b) = fraction;
      const I lower = inside ? low : I{} - kNoCell<T>;
      lowest = lower < lowest ? lower : lowest;
      count -= inside;
    }
    at(s.first + b) = count > 0 ? lowest : I{};
    at(s.count + b) = __builtin_convertvector(count, V);
  }
}

// Of the samples whose lower cell is the one before: the sum of their fractions, and how many move with the shift.
template <typename T>
struct Before {
  Vector<T> fraction, moving;
};

// What the boxes b to b + kLanes read of one cell each: its weight, the weight's derivative, whether it is read at all. Called
// for one cell after another; `before` is 0 for the first that a box reads.
template <typename T, int kSamples>
inline void weigh(
    const PackSamples<T>& s,
    int64_t samples,
    int64_t b,
    const IndexVector<T>& cell,
    Before<T>& before,
    Vector<T>& weight,
    Vector<T>& derivative,
    IndexVector<T>& read) {
  using V = Vector<T>;
  using I = IndexVector<T>;
  V count{}, fraction{}, moving{};
  const int64_t all = kSamples > 0 ? kSamples : samples;
#pragma GCC unroll 4
  for (int64_t i = 0; i < all; ++i) {
    const I as_low = load(s.low[i] + b) == cell;
    const I moves = load(s.high[i] + b) == cell + 1;
    count = as_low ? count + T(1) : count;
    moving = moves ? moving + T(1) : moving;
    fraction = as_low ? fraction + load(s.fraction[i] + b) : fraction;
  }
  // A sample that does not move has no fraction: it reads its lower cell alone.
  weight = count - fraction + before.fraction;
  derivative = before.moving - moving;
  read = count + before.moving > T(0);
  before = {fraction, moving};
}

constexpr int64_t kChunks = kPackCells / kRowCells;

// How a bin of sixteen boxes is pooled: box i reads `rows` rows from first_row[i] on and, of each, kRowCells columns from
// column[j][i] on for j < chunks.
template <typename T>
struct Plan {
  int64_t rows, chunks;
  Index<T> first_row[kPackBoxes];
  T weight_y[kPackCells][kPackBoxes];
  T derivative_y[kPackCells][kPackBoxes];
  Index<T> read_y[kPackCells][kPackBoxes];  // -1 or 0: whether the box reads that row
  Index<T> column[kChunks][kPackBoxes];
  Index<T> read_x[kChunks][kPackBoxes];  // one bit for each of the kRowCells columns
  T scale[kPackBoxes];                   // 1 / number of samples kept; 0 if there is none

  // Makes the rows of zeros that begin() reads into.
  Plan() {
    for (int64_t j = 0; j < kChunks; ++j) {
      for (int64_t i = 0; i < kPackBoxes; ++i) {
        for (int64_t k = 0; k < kRowCells; ++k) along_x_[j][i][k] = T(0);
      }
    }
  }

  Row<T> weight_x(int64_t j, int64_t i) const { return row_at(begin(j, i)); }
  Row<T> derivative_x(int64_t j, int64_t i) const { return row_at(begin(j, i) + kRowCells); }

  // Puts down the cells of chunk j that boxes b to b + kLanes read.
  void set_columns(
      int64_t j,
      int64_t b,
      const IndexVector<T>& first,
      const IndexVector<T>& read,
      int64_t width) {
    using I = IndexVector<T>;
    // No row of the map is left, unless it is shorter than a chunk.
    const Index<T> last = static_cast<Index<T>>(width < kRowCells ? width : width - kRowCells);
    const I column = first < last ? first : I{} + last;
    const I back = first - column;
    const I most = I{} + static_cast<Index<T>>(kRowCells);
    at(this->column[j] + b) = column;
    at(back_[j] + b) = back < most ? back : most;
    at(read_x[j] + b) = read << (back < most ? back : most);
  }

  // along_x: weights of kRowCells cells, then their derivatives, each for all boxes.
  void set_weights(int64_t j, const T (&along_x)[2 * kRowCells][kPackBoxes]) {
    transpose(
        2 * kRowCells,
        kPackBoxes,
        along_x[0],
        kPackBoxes,
        &along_x_[j][0][kRowCells],
        3 * kRowCells);
  }

 private:
  const T* begin(int64_t j, int64_t i) const { return along_x_[j][i] + kRowCells - back_[j][i]; }

  // Of each box: zeros, the weights from the first cell that it reads, their derivatives. Where it reads no further than to
  // the map's border, kRowCells columns begin `back` cells before that, among the zeros; as many weights at the end are 0.
  T along_x_[kChunks][kPackBoxes][3 * kRowCells];
  Index<T> back_[kChunks][kPackBoxes];
};

template <typename T, bool kDerivatives, int kSamples>
void make_plan_for(
    const PackBin<T>& bin, const Pack<T>& pack, const T* shift_x, const T* shift_y, Plan<T>& plan) {
  using V = Vector<T>;
  using I = IndexVector<T>;
  PackSamples<T> y, x;
  find_samples<T, kSamples>(bin, pack.y, shift_y, bin.ph, bin.height, y);
  find_samples<T, kSamples>(bin, pack.x, shift_x, bin.pw, bin.width, x);
  plan.rows = pack.y.cells;
  plan.chunks = (pack.x.cells + kRowCells - 1) / kRowCells;
  V weight, derivative;
  I read;
  for (int64_t b = 0; b < kPackBoxes; b += kLanes<T>) {
    // A box that reads fewer rows than the longest must not reach beyond the map.
    const Index<T> last = static_cast<Index<T>>(bin.height - plan.rows);
    const I lowest = load(y.first + b);
    const I first = lowest > last ? I{} + last : lowest;
    at(plan.first_row + b) = first;
    Before<T> before{};
    for (int64_t k = 0; k < plan.rows; ++k) {
      const I cell = first + static_cast<Index<T>>(k);
      weigh<T, kSamples>(y, bin.samples, b, cell, before, weight, derivative, read);
      at(plan.weight_y[k] + b) = weight;
      at(plan.read_y[k] + b) = read;
      if constexpr (kDerivatives) at(plan.derivative_y[k] + b) = derivative;
    }
    const V count = load(y.count + b) * load(x.count + b);
    at(plan.scale + b) = count > T(0) ? T(1) / count : V{};
  }
  Before<T> before[kPackBoxes / kLanes<T>] = {};
  for (int64_t j = 0; j < plan.chunks; ++j) {
    T along_x[2 * kRowCells][kPackBoxes];
    const int64_t rest = pack.x.cells - j * kRowCells;
    const int64_t columns = rest < kRowCells ? rest : kRowCells;
    for (int64_t b = 0; b < kPackBoxes; b += kLanes<T>) {
      const I first = load(x.first + b) + static_cast<Index<T>>(j * kRowCells);
      I bits{};
      for (int64_t k = 0; k < columns; ++k) {
        const I cell = first + static_cast<Index<T>>(k);
        weigh<T, kSamples>(
            x, bin.samples, b, cell, before[b / kLanes<T>], weight, derivative, read);
        at(along_x[k] + b) = weight;
        at(along_x[kRowCells + k] + b) = derivative;
        bits |= read & (Index<T>(1) << k);
      }
      for (int64_t k = columns; k < kRowCells; ++k) {
        at(along_x[k] + b) = at(along_x[kRowCells + k] + b) = V{};
      }
      plan.set_columns(j, b, first, bits, bin.width);
    }
    plan.set_weights(j, along_x);
  }
}

template <typename T, bool kDerivatives>
void make_plan(
    const PackBin<T>& bin, const Pack<T>& pack, const T* shift_x, const T* shift_y, Plan<T>& plan) {
  if (bin.samples == 4) {
    make_plan_for<T, kDerivatives, 4>(bin, pack, shift_x, shift_y, plan);
  } else {
    make_plan_for<T, kDerivatives, 0>(bin, pack, shift_x, shift_y, plan);
  }
}

// Begins to bring the q-th of `count` shares of the next plane into the cache.
template <typename T>
inline void prefetch_next(const PackBin<T>& bin, int64_t q, int64_t count) {
  if (bin.next == nullptr) return;
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t lines = (bin.height * bin.width + kLine - 1) / kLine;
  const int64_t share = (lines + count - 1) / count;
  const int64_t end = (q + 1) * share < lines ? (q + 1) * share : lines;
  for (int64_t line = q * share; line < end; ++line) __builtin_prefetch(bin.next + line * kLine);
}

template <typename T>
void pack_forward(
    const PackBin<T>& bin,
    int64_t count,
    const Pack<T>* packs,
    int64_t stride,
    const T* shift_x,
    const T* shift_y,
    const T* plane,
    T* out) {
  Plan<T> plan;
  RowSums<T> sums;
  for (int64_t q = 0; q < count; ++q, out += stride) {
    prefetch_next(bin, q, count);
    make_plan<T, false>(
        bin,
        packs[q],
        shift_x ? shift_x + q * stride : nullptr,
        shift_y ? shift_y + q * stride : nullptr,
        plan);
    for (int64_t i = 0; i < kPackBoxes; ++i) {
      const T* top = plane + plan.first_row[i] * bin.width;
      Row<T> sum{};
      for (int64_t j = 0; j < plan.chunks; ++j) {
        const RowMask<T> mask(plan.read_x[j][i]);
        const T* p = top + plan.column[j][i];
        Row<T> along{};
        for (int64_t k = 0; k < plan.rows; ++k, p += bin.width) {
          add_product(along, plan.weight_y[k][i], keep(load(p, mask), plan.read_y[k][i]));
        }
        add_product(sum, along, plan.weight_x(j, i));
      }
      put(sum, sums.row[i]);
    }
    sums.turn();
    for (int64_t b = 0; b < kPackBoxes; b += kPieceLanes<T>) {
      piece_at(out + b) = sums.sum(b) * piece_at(plan.scale + b);
    }
  }
}

// What the boxes of a pack add to the plane's gradient, and what its cells add to theirs: still kRowCells parts of a sum.
template <typename T>
struct Gradients {
  T factor[kPackCells][kPackBoxes];  // of each row: what weight_x is multiplied by
  RowSums<T> along_x, along_y;
};

// kRows: plan.rows where it is known when compiling, else 0.
template <typename T, bool kInput, bool kShifts, int kRows>
void add_gradients(
    const Plan<T>& plan, int64_t width, const T* plane, T* grad_plane, Gradients<T>& gradients) {
  const int64_t rows = kRows > 0 ? kRows : plan.rows;
  for (int64_t i = 0; i < kPackBoxes; ++i) {
    const int64_t top = plan.first_row[i] * width;
    Row<T> along_x{}, along_y{};
    for (int64_t j = 0; j < plan.chunks; ++j) {
      const RowMask<T> mask(plan.read_x[j][i]);
      const Row<T> weight_x = plan.weight_x(j, i);
      int64_t cell = top + plan.column[j][i];
      Row<T> value{}, slope{};
#pragma GCC unroll 8
      for (int64_t k = 0; k < rows; ++k, cell += width) {
        if constexpr (kShifts) {
          const Row<T> row = keep(load(plane + cell, mask), plan.read_y[k][i]);
          add_product(value, plan.weight_y[k][i], row);
          add_product(slope, plan.derivative_y[k][i], row);
        }
        if constexpr (kInput) add_at(grad_plane + cell, mask, gradients.factor[k][i], weight_x);
      }
      if constexpr (kShifts) {
        add_product(along_x, value, plan.derivative_x(j, i));
        add_product(along_y, slope, weight_x);
      }
    }
    if constexpr (kShifts) {
      put(along_x, gradients.along_x.row[i]);
      put(along_y, gradients.along_y.row[i]);
    }
  }
}

template <typename T, bool kInput, bool kShifts>
void pack_gradients(
    const PackBin<T>& bin,
    int64_t count,
    const Pack<T>* packs,
    int64_t stride,
    const T* shift_x,
    const T* shift_y,
    const T* gradient,
    const T* plane,
    T* grad_plane,
    T* grad_x,
    T* grad_y) {
  using V = Vector<T>;
  using I = IndexVector<T>;
  Plan<T> plan;
  Gradients<T> gradients;
  for (int64_t q = 0; q < count; ++q) {
    const int64_t first = q * stride;
    if constexpr (kShifts) prefetch_next(bin, q, count);
    make_plan<T, kShifts>(
        bin,
        packs[q],
        shift_x ? shift_x + first : nullptr,
        shift_y ? shift_y + first : nullptr,
        plan);
    if constexpr (kInput) {
      for (int64_t b = 0; b < kPackBoxes; b += kLanes<T>) {
        const V factor = load(gradient + first + b) * load(plan.scale + b);
        for (int64_t k = 0; k < plan.rows; ++k) {
          const V product = factor * load(plan.weight_y[k] + b);
          at(gradients.factor[k] + b) = (V)((I)product & load(plan.read_y[k] + b));
        }
      }
    }
    const auto add = [&](auto rows) {
      add_gradients<T, kInput, kShifts, decltype(rows)::value>(
          plan, bin.width, plane, grad_plane, gradients);
    };
    switch (plan.rows) {
      case 2:
        add(std::integral_constant<int, 2>{});
        break;
      case 3:
        add(std::integral_constant<int, 3>{});
        break;
      case 4:
        add(std::integral_constant<int, 4>{});
        break;
      case 5:
        add(std::integral_constant<int, 5>{});
        break;
      case 6:
        add(std::integral_constant<int, 6>{});
        break;
      default:
        add(std::integral_constant<int, 0>{});
    }
    if constexpr (kShifts) {
      gradients.along_x.turn();
      gradients.along_y.turn();
      for (int64_t b = 0; b < kPackBoxes; b += kPieceLanes<T>) {
        using P = Piece<T>;
        const P scale = piece_at(plan.scale + b);
        const P factor = piece_at(gradient + first + b) * scale * bin.gamma;
        const P along_x = gradients.along_x.sum(b) * factor * piece_at(packs[q].x.length + b);
        const P along_y = gradients.along_y.sum(b) * factor * piece_at(packs[q].y.length + b);
        piece_at(grad_x + first + b) = scale > T(0) ? along_x : P{};
        piece_at(grad_y + first + b) = scale > T(0) ? along_y : P{};
      }
    }
  }
}

template <typename T>
void pack_backward(
    const PackBin<T>& bin,
    int64_t count,
    const Pack<T>* packs,
    int64_t stride,
    const T* shift_x,
    const T* shift_y,
    const T* gradient,
    const T* plane,
    T* grad_plane,
    T* grad_x,
    T* grad_y) {
  const auto gradients = grad_plane == nullptr ? pack_gradients<T, false, true>
                         : grad_x == nullptr   ? pack_gradients<T, true, false>
                                               : pack_gradients<T, true, true>;
  gradients(
      bin, count, packs, stride, shift_x, shift_y, gradient, plane, grad_plane, grad_x, grad_y);
}

}  // namespace

template <typename T>
PackKernels<T> pack_table() {
  return {pack_forward<T>, pack_backward<T>};
}

template PackKernels<float> pack_table<float>();
template PackKernels<double> pack_table<double>();

}  // namespace d2_deform::cpu::D2_DEFORM_ISA
