// Which instruction sets this library holds and this processor runs.
#include <cstring>

#include "native/native.h"

namespace {

bool runs(const char* isa) {
#if defined(HYBRIDFLOW_HAS_AVX512)
  if (std::strcmp(isa, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(HYBRIDFLOW_HAS_AVX2)
  if (std::strcmp(isa, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return std::strcmp(isa, "baseline") == 0;
}

}  // namespace

// 1 if functions named hybridflow_<isa>_... exist and this processor can run them, else 0.
HYBRIDFLOW_API int32_t hybridflow_runs(const char* isa) { return runs(isa) ? 1 : 0; }

// Floats of scratch memory that the functions which sum over samples need.
HYBRIDFLOW_API int64_t hybridflow_scratch(const Shape* shape) {
  return 3 * shape->columns() * (1 + chunk_count(shape->samples));
}
