// Operators that are broken on purpose. tools/sanitize.py compiles them in beside the true ones and calls them first: a check
// that lets one pass would let all pass.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "../tensors.h"
#include "buffer.h"

namespace {

using d2_deform::Tensor;

// One element beyond the tensor, in torch's memory.
double read_beyond_tensor(const Tensor& x) {
  return static_cast<const float*>(x.data_ptr())[x.numel()];
}

// One beyond the working memory of an earlier, larger use, which a cache of blocks would have handed out again.
double write_beyond_buffer(const Tensor& x) {
  {
    d2_deform::cpu::Buffer<float> larger(2 * x.numel());
  }
  d2_deform::cpu::Buffer<float> buffer(x.numel());
  buffer.data()[x.numel()] = 1;
  return buffer.data()[0];
}

double overflow(const Tensor& x) {
  const int64_t large = std::numeric_limits<int64_t>::max() - 2 + x.numel();
  return static_cast<double>(large);
}

double whole_number_of_nan(const Tensor& x) {
  return static_cast<double>(static_cast<int64_t>(*static_cast<const float*>(x.data_ptr())));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(d2_deform, m) {
  m.def("canary_read_beyond_tensor(Tensor x) -> float");
  m.def("canary_write_beyond_buffer(Tensor x) -> float");
  m.def("canary_overflow(Tensor x) -> float");
  m.def("canary_whole_number_of_nan(Tensor x) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(d2_deform, CPU, m) {
  m.impl("canary_read_beyond_tensor", TORCH_BOX(&read_beyond_tensor));
  m.impl("canary_write_beyond_buffer", TORCH_BOX(&write_beyond_buffer));
  m.impl("canary_overflow", TORCH_BOX(&overflow));
  m.impl("canary_whole_number_of_nan", TORCH_BOX(&whole_number_of_nan));
}
