// Working memory, kept by a thread from call to call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace d2_deform::cpu {

// Freed blocks of one thread, for its next call: the system hands out fresh memory page by page and cleared, which takes
// longer than to fill it.
class BlockCache {
 public:
  struct Delete {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  struct Block {
    std::unique_ptr<std::byte, Delete> data;
    int64_t bytes = 0;
  };

  static BlockCache& of_this_thread() {
    static thread_local BlockCache cache;
    return cache;
  }

  // The smallest block that is large enough and not four times too large, or a new one.
  Block take(int64_t bytes) {
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes / 4 <= bytes;
      if (fits && (best == blocks_.end() || block->bytes < best->bytes)) best = block;
    }
    if (best == blocks_.end()) {
      void* data = ::operator new(static_cast<std::size_t>(bytes), std::align_val_t(64));
      return {std::unique_ptr<std::byte, Delete>(static_cast<std::byte*>(data)), bytes};
    }
    Block block = std::move(*best);
    kept_ -= block.bytes;
    blocks_.erase(best);
    return block;
  }

  // Keeps the block, and frees the oldest ones beyond the limit.
  void give_back(Block block) {
    kept_ += block.bytes;
    blocks_.push_back(std::move(block));
    while (kept_ > kMostKept) {
      kept_ -= blocks_.front().bytes;
      blocks_.erase(blocks_.begin());
    }
  }

 private:
#if defined(D2_DEFORM_SANITIZE)
  static constexpr int64_t kMostKept = 0;  // a sanitizer cannot see where a kept block's use ends
#else
  static constexpr int64_t kMostKept = int64_t(32) << 20;  // bytes of one thread
#endif

  std::vector<Block> blocks_;
  int64_t kept_ = 0;
};

// Memory for `size` elements, not initialised, on a cache line's border. Made and destroyed by one thread.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : size_(size),
        block_(BlockCache::of_this_thread().take(std::max<int64_t>(size * sizeof(T), 64))) {}
  Buffer(int64_t size, T value) : Buffer(size) { fill(value); }
  ~Buffer() { BlockCache::of_this_thread().give_back(std::move(block_)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return reinterpret_cast<T*>(block_.data.get()); }
  const T* data() const { return reinterpret_cast<const T*>(block_.data.get()); }
  int64_t size() const { return size_; }
  void fill(T value) { std::fill_n(data(), size_, value); }

 private:
  int64_t size_;
  BlockCache::Block block_;
};

}  // namespace d2_deform::cpu
