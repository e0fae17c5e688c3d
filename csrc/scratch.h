// Memory for the chunk of logits on the CPU: huge pages where the system gives them, and kept for the next call.
//
// Why: a fresh buffer of 200 MB costs 49152 page faults and the zeroing of each page, at every call. One block is kept,
// the largest that came back, so a process holds at most one chunk more than it uses, and a block is at most twice what
// was asked for (and at least a huge page).
#pragma once

#include <cstddef>

namespace tract_fast {

void* take_scratch(size_t bytes);      // aligned to 64 bytes, contents undefined; throws std::bad_alloc
void return_scratch(void* memory);     // of take_scratch; any thread
size_t kept_scratch();                 // bytes of the block that is kept

}  // namespace tract_fast
