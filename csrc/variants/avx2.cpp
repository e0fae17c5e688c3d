#define TRACT_FAST_VARIANT avx2
#include "../row_pass_kernels.h"
#include "../sampled_kernels.h"
#include "../lean_kernels.h"
