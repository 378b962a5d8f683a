// Compares csrc/cuda/divider.h with the processor's own division, up to the largest numbers that it promises.
#include "../../csrc/cuda/divider.h"

#include <cstdio>

namespace {

template <typename Word>
bool agrees(Word divisor, Word number) {
  const d2_deform::cuda::Divider<Word> divider(static_cast<int64_t>(divisor));
  Word rest = number;
  const Word quotient = divider.split(rest);
  if (quotient == number / divisor && rest == number % divisor) return true;
  std::printf(
      "%llu / %llu gives %llu\n",
      static_cast<unsigned long long>(number),
      static_cast<unsigned long long>(divisor),
      static_cast<unsigned long long>(quotient));
  return false;
}

// Divisors and numbers: around every power of two, around multiples of the divisor, and some in between.
template <typename Word>
bool all_agree() {
  constexpr int kBits = 8 * sizeof(Word) - 1;
  const Word most = (Word(1) << kBits) - 1;
  bool right = true;
  for (int i = 0; i < kBits; ++i) {
    for (int near = -3; near <= 3; ++near) {
      const Word divisor = (Word(1) << i) + static_cast<Word>(near);
      if (divisor == 0 || divisor > most) continue;
      for (int j = 0; j < kBits; ++j) {
        for (int by = -2; by <= 2; ++by) {
          const Word number = (Word(1) << j) + static_cast<Word>(by);
          const Word multiple = (most / divisor >> j) * divisor + static_cast<Word>(by);
          if (number <= most) right = agrees(divisor, number) && right;
          if (multiple <= most) right = agrees(divisor, multiple) && right;
          if (most - divisor * j <= most) right = agrees(divisor, most - divisor * j) && right;
        }
      }
    }
  }
  return right;
}

}  // namespace

int main() {
  return all_agree<uint32_t>() && all_agree<uint64_t>() ? 0 : 1;
}
