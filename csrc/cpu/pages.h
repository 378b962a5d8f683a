// Memory for large results.
#pragma once

#include "../tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace d2_deform::cpu {

constexpr int64_t kFreshBytes = int64_t(32) << 20;
constexpr int64_t kLargePage = int64_t(2) << 20;

// A result about to be written. A block of kFreshBytes or more is not kept by the allocator (glibc's M_MMAP_THRESHOLD goes no
// higher): it comes from the system anew each time, and every page is made when it is first written to, which takes longer
// than to write it. So large pages are asked for, where the system has them.
inline Tensor in_large_pages(const Tensor& result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t bytes = result.numel() * static_cast<int64_t>(result.element_size());
  if (bytes < kFreshBytes) return result;
  // Whole pages of the result alone.
  const int64_t begin = reinterpret_cast<int64_t>(result.data_ptr());
  const int64_t first = round_up(begin, kLargePage);
  const int64_t end = (begin + bytes) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(first), static_cast<std::size_t>(end - first), MADV_HUGEPAGE);
#endif
  return result;
}

}  // namespace d2_deform::cpu
