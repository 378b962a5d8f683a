// The inner loops of position-sensitive pooling that depend on the instruction set: one bin of one plane for sixteen boxes
// at a time. Chosen as the kernels of kernels.h are.
#pragma once

#include <cstdint>

namespace d2_deform::cpu {

constexpr int64_t kPackBoxes = 16;
constexpr int64_t kPackSamples = 16;  // per bin and axis, at most
constexpr int64_t kPackCells = 24;    // per bin and axis, at most
constexpr int64_t kRowCells = 8;      // of a map's row, read in one go

// One axis of sixteen boxes, in cells. A place that no box takes holds NaN and pools nothing.
template <typename T>
struct PackAxis {
  T start[kPackBoxes];
  T length[kPackBoxes];
  T bin_length[kPackBoxes];
  T step[kPackBoxes];  // from one sample to the next
  int64_t cells = 0;   // that a bin reads, at most, from the first one on
};

// Sixteen boxes of one picture. Those whose bins can read more than kPackCells cells along an axis do not belong here.
template <typename T>
struct Pack {
  PackAxis<T> y, x;
};

// One bin, the same of every box, and the plane that it reads.
template <typename T>
struct PackBin {
  int64_t ph, pw;
  int64_t samples;
  T gamma;
  bool aligned;
  // Of the plane, whose rows follow each other without a gap. Where they are shorter than kRowCells, as many elements after
  // its end may be read, and have 0 added.
  int64_t height, width;
  const T* next;  // the plane that comes next, brought into the cache meanwhile; or null
};

template <typename T>
struct PackKernels {
  // out[q * stride + i] = value of the bin of box i of pack q, for q < count. Shifts lie likewise; null for rigid bins.
  void (*forward)(
      const PackBin<T>& bin,
      int64_t count,
      const Pack<T>* packs,
      int64_t stride,
      const T* shift_x,
      const T* shift_y,
      const T* plane,
      T* out);

  // gradient, like `out` -> added to grad_plane (unless null); written to grad_x and grad_y, the shifts' (unless null).
  // plane is read for the shifts' gradients only.
  void (*backward)(
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
      T* grad_y);
};

template <typename T>
const PackKernels<T>& pack_kernels();

namespace isa_default {
template <typename T>
PackKernels<T> pack_table();
}
#if defined(__x86_64__)
namespace isa_avx2 {
template <typename T>
PackKernels<T> pack_table();
}
namespace isa_avx512 {
template <typename T>
PackKernels<T> pack_table();
}
#endif

}  // namespace d2_deform::cpu
