// Every operator's schema, in one place. Kernels register themselves beside their code (cpu/*.cpp);
// fake kernels, autograd and autocast are Python (d2_deform/ops).
//
// Gradients that are not asked for come back as empty tensors. deterministic: whether torch asks for bit-reproducible
// results; on the CPU they always are.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(d2_deform, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
      "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
      "SymInt dilation_w) -> Tensor");
  m.def(
      "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, "
      "Tensor? mask, SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, "
      "SymInt dilation_h, SymInt dilation_w, bool need_input, bool need_offset, bool need_weight, "
      "bool need_bias, bool need_mask, bool deterministic) -> (Tensor grad_input, Tensor "
      "grad_offset, Tensor grad_weight, Tensor grad_bias, Tensor grad_mask)");
  m.def(
      "deform_roi_pool(Tensor input, Tensor rois, Tensor? offset, SymInt pooled_h, SymInt "
      "pooled_w, float spatial_scale, SymInt sampling_ratio, float gamma, bool aligned) -> "
      "Tensor");
  m.def(
      "deform_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, "
      "float spatial_scale, SymInt sampling_ratio, float gamma, bool aligned, bool need_input, "
      "bool need_offset, bool deterministic) -> (Tensor grad_input, Tensor grad_offset)");
  m.def(
      "deform_ps_roi_pool(Tensor input, Tensor rois, Tensor? offset, SymInt pooled_h, SymInt "
      "pooled_w, SymInt group_size, float spatial_scale, SymInt sampling_ratio, float gamma, bool "
      "aligned) -> Tensor");
  m.def(
      "deform_ps_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, "
      "SymInt group_size, float spatial_scale, SymInt sampling_ratio, float gamma, bool aligned, "
      "bool need_input, bool need_offset, bool deterministic) -> (Tensor grad_input, Tensor "
      "grad_offset)");
  m.def("cpu_capability() -> str");
}
