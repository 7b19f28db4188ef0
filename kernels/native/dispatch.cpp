// Which instruction sets this library holds and this processor runs.
#include <cstring>

#include "native/native.h"

#if defined(HYBRIDFLOW_HAS_AVX2)
#include <cpuid.h>
#endif

namespace {

#if defined(HYBRIDFLOW_HAS_AVX2)
bool runs_avx2() {
  // F16C is asked of the processor itself: not every compiler's __builtin_cpu_supports knows it.
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

bool runs(const char* isa) {
#if defined(HYBRIDFLOW_HAS_AVX512)
  if (std::strcmp(isa, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && runs_avx2();
#endif
#if defined(HYBRIDFLOW_HAS_AVX2)
  if (std::strcmp(isa, "avx2") == 0) return runs_avx2();
#endif
  return std::strcmp(isa, "baseline") == 0;
}

}  // namespace

// 1 if functions named hybridflow_<isa>_... exist and this processor can run them, else 0.
HYBRIDFLOW_API int32_t hybridflow_runs(const char* isa) { return runs(isa) ? 1 : 0; }
