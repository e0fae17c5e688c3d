#include "scratch.h"

#include <algorithm>
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

struct Pool {
  std::mutex mutex;
  std::map<void*, size_t> in_use;
  void* kept = nullptr;
  size_t kept_bytes = 0;
};

Pool& pool() {
  static Pool* const one = new Pool;  // never destroyed: tensors may outlive static objects
  return *one;
}

}  // namespace

void* take_scratch(size_t bytes) {
  bytes = (std::max<size_t>(bytes, 1) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  if (p.kept != nullptr && p.kept_bytes >= bytes && p.kept_bytes / 2 <= bytes) {  // no small tensor holds a large block
    p.in_use.emplace(p.kept, p.kept_bytes);
    p.kept_bytes = 0;
    return std::exchange(p.kept, nullptr);
  }
  if (p.kept != nullptr && p.kept_bytes < bytes) {
    release(std::exchange(p.kept, nullptr), p.kept_bytes);
    p.kept_bytes = 0;
  }
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
  size_t bytes = found->second;
  p.in_use.erase(found);
  if (p.kept != nullptr && p.kept_bytes < bytes) {
    std::swap(p.kept, memory);
    std::swap(p.kept_bytes, bytes);
  } else if (p.kept == nullptr) {
    p.kept = memory;
    p.kept_bytes = bytes;
    return;
  }
  release(memory, bytes);
}

size_t kept_scratch() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().kept_bytes;
}

}  // namespace tract_fast
