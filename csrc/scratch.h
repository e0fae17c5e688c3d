// Memory for the chunk of logits and for dW on the CPU: huge pages where the system gives them, and kept for the next call.
//
// Why: fresh memory is paged in and zeroed at its first use. A dW of 56 MB costs half a GEMM of its size that way (measured:
// 150 ms into memory that was there, 218 ms into fresh). Three blocks are kept, the largest that came back: a call's logits,
// its dW, and the float32 sum of dW over chunks (whose 16-bit summands, 8 MB at a time, are not). So a process holds at most that much more than it uses, and a block is at most twice what was asked for (and
// at least a huge page).
#pragma once

#include <cstddef>

namespace tract_fast {

constexpr size_t KEPT_BLOCKS = 3;

void* take_scratch(size_t bytes);      // aligned to 64 bytes, contents undefined; throws std::bad_alloc
void return_scratch(void* memory);     // of take_scratch; any thread
size_t kept_scratch();                 // bytes of the blocks that are kept
void release_scratch();                // gives them back

}  // namespace tract_fast
