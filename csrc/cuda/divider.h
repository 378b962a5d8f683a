// Division by a number that is known before the launch: a multiplication and a shift, where a GPU's division of
// 64-bit numbers takes about a hundred instructions.
//
// Source: Granlund and Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994, figure 4.1.
#pragma once

#include "../geometry.h"

namespace d2_deform::cuda {

// The upper half of a product.
D2_DEFORM_HOST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

D2_DEFORM_HOST_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// Word: uint32_t or uint64_t. Divides numbers from 0 to below half of what a Word holds, so that a sum fits.
template <typename Word>
class Divider {
 public:
  Divider() = default;

  explicit Divider(int64_t divisor) : divisor_(static_cast<Word>(divisor)) {
    while (shift_ < kBits - 1 && (Word(1) << shift_) < divisor_) ++shift_;
    const unsigned __int128 excess = (static_cast<unsigned __int128>(1) << shift_) - divisor_;
    multiplier_ = static_cast<Word>((excess << kBits) / divisor_ + 1);
  }

  D2_DEFORM_HOST_DEVICE Word quotient(Word number) const {
    return (multiply_high(number, multiplier_) + number) >> shift_;
  }

  // The quotient; `number` becomes the remainder.
  D2_DEFORM_HOST_DEVICE Word split(Word& number) const {
    const Word result = quotient(number);
    number -= result * divisor_;
    return result;
  }

 private:
  static constexpr int kBits = 8 * sizeof(Word);

  Word divisor_ = 1, multiplier_ = 1;
  int shift_ = 0;
};

}  // namespace d2_deform::cuda
