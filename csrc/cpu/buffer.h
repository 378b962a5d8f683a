// Working memory.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace d2_deform::cpu {

// Memory for `size` elements, not initialised, on a cache line's border.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {}
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Delete> data_;
};

}  // namespace d2_deform::cpu
