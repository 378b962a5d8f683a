// Which instruction set this processor has, and so which kernels run.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "kernels.h"
#include "pack_kernels.h"

namespace d2_deform::cpu {
namespace {

enum class Set { kDefault, kAvx2, kAvx512 };

Set best_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Set::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Set::kAvx2;
#endif
  return Set::kDefault;
}

const char* name_of(Set set) {
  return set == Set::kAvx512 ? "avx512" : set == Set::kAvx2 ? "avx2" : "default";
}

Set choose_set() {
  const Set best = best_set();
  const char* wanted = std::getenv("D2_DEFORM_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Set set : {Set::kDefault, Set::kAvx2, Set::kAvx512}) {
    if (std::string(wanted) == name_of(set)) {
      STD_TORCH_CHECK(
          set <= best,
          "D2_DEFORM_CPU_CAPABILITY=",
          wanted,
          ": this processor has no more than ",
          name_of(best));
      return set;
    }
  }
  STD_TORCH_CHECK(false, "D2_DEFORM_CPU_CAPABILITY=", wanted, ": expected default, avx2 or avx512");
  return best;
}

Set chosen_set() {
  static const Set set = choose_set();
  return set;
}

template <typename T>
Kernels<T> choose_kernels() {
#if defined(__x86_64__)
  if (chosen_set() == Set::kAvx512) return isa_avx512::table<T>();
  if (chosen_set() == Set::kAvx2) return isa_avx2::table<T>();
#endif
  return isa_default::table<T>();
}

template <typename T>
PackKernels<T> choose_pack_kernels() {
#if defined(__x86_64__)
  if (chosen_set() == Set::kAvx512) return isa_avx512::pack_table<T>();
  if (chosen_set() == Set::kAvx2) return isa_avx2::pack_table<T>();
#endif
  return isa_default::pack_table<T>();
}

}  // namespace

template <typename T>
const Kernels<T>& kernels() {
  static const Kernels<T> table = choose_kernels<T>();
  return table;
}
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

template <typename T>
const PackKernels<T>& pack_kernels() {
  static const PackKernels<T> table = choose_pack_kernels<T>();
  return table;
}
template const PackKernels<float>& pack_kernels<float>();
template const PackKernels<double>& pack_kernels<double>();

const char* capability() {
  return name_of(chosen_set());
}

}  // namespace d2_deform::cpu

namespace {

std::string cpu_capability() {
  return d2_deform::cpu::capability();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
