// Which instruction sets this library holds and this processor runs.
#include <cstring>

#include "native/native.h"

#if defined(HYBRIDFLOW_HAS_AVX2)
#include <cpuid.h>
#endif
#if defined(HYBRIDFLOW_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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

#if defined(HYBRIDFLOW_HAS_AVX512)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && runs_avx2();
}
#endif

#if defined(HYBRIDFLOW_HAS_AMX) && defined(__linux__)
bool runs_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!runs_avx512() || __get_cpuid_count(7, 1, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kAvx512Bf16 = 1u << 5, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((a & kAvx512Bf16) == 0) return false;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  // The kernel gives a process the registers for tiles when asked, if the system has them on.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool runs(const char* isa) {
#if defined(HYBRIDFLOW_HAS_AMX) && defined(__linux__)
  if (std::strcmp(isa, "amx") == 0) return runs_amx();
#endif
#if defined(HYBRIDFLOW_HAS_AVX512)
  if (std::strcmp(isa, "avx512") == 0) return runs_avx512();
#endif
#if defined(HYBRIDFLOW_HAS_AVX2)
  if (std::strcmp(isa, "avx2") == 0) return runs_avx2();
#endif
  return std::strcmp(isa, "baseline") == 0 || std::strcmp(isa, "emulated") == 0;
}

}  // namespace

// 1 if functions named hybridflow_<isa>_... exist and this processor can run them, else 0.
HYBRIDFLOW_API int32_t hybridflow_runs(const char* isa) { return runs(isa) ? 1 : 0; }
