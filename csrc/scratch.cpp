#include "scratch.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tract_fast {
namespace {

constexpr size_t HUGE_PAGE = size_t{2} << 20;

void* allocate(size_t bytes) {
#ifdef __linux__
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: systems without huge pages answer with an error that changes nothing
  return memory;
#else
  void* memory = std::aligned_alloc(HUGE_PAGE, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
#endif
}

void release(void* memory, size_t bytes) {
#ifdef __linux__
  munmap(memory, bytes);
#else
  (void)bytes;
  std::free(memory);
#endif
}

struct Block {
  void* memory = nullptr;
  size_t bytes = 0;  // 0: there is none
};

struct Pool {
  std::mutex mutex;
  std::map<void*, size_t> in_use;
  std::array<Block, KEPT_BLOCKS> kept;

  Block& smallest() {
    return *std::min_element(kept.begin(), kept.end(), [](const Block& a, const Block& b) { return a.bytes < b.bytes; });
  }
};

Pool& pool() {
  static Pool* const one = new Pool;  // never destroyed: tensors may outlive static objects
  return *one;
}

void drop(Block& block) {
  if (block.bytes > 0) release(block.memory, block.bytes);
  block = {};
}

}  // namespace

void* take_scratch(size_t bytes) {
  bytes = (std::max<size_t>(bytes, 1) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  Block* best = nullptr;
  for (Block& block : p.kept)  // no small tensor holds a large block
    if (block.bytes >= bytes && block.bytes / 2 <= bytes && (best == nullptr || block.bytes < best->bytes)) best = &block;
  if (best != nullptr) {
    p.in_use.emplace(best->memory, best->bytes);
    return std::exchange(*best, {}).memory;
  }
  if (p.smallest().bytes < bytes) drop(p.smallest());  // before the new one, which will take its place
  void* memory = allocate(bytes);
  try {
    p.in_use.emplace(memory, bytes);
  } catch (...) {
    release(memory, bytes);
    throw;
  }
  return memory;
}

void return_scratch(void* memory) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto found = p.in_use.find(memory);
  if (found == p.in_use.end()) return;
  Block back{memory, found->second};
  p.in_use.erase(found);
  if (p.smallest().bytes < back.bytes) std::swap(p.smallest(), back);
  drop(back);
}

size_t kept_scratch() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  size_t bytes = 0;
  for (const Block& block : pool().kept) bytes += block.bytes;
  return bytes;
}

void release_scratch() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  for (Block& block : pool().kept) drop(block);
}

}  // namespace tract_fast
