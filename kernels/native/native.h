// What the kernel sources share: how a function is exported. Everything but the exported names goes
// into an unnamed namespace: a shared inline function would be merged at link time into one version,
// perhaps of an instruction set that this processor lacks.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define HYBRIDFLOW_API extern "C" __declspec(dllexport)
#else
#define HYBRIDFLOW_API extern "C" __attribute__((visibility("default")))
#endif

// A source is compiled once per instruction set; HYBRIDFLOW_KERNEL(f) is exported as
// hybridflow_<instruction set>_f, so every version can be called, and tested, by its name.
#define HYBRIDFLOW_JOIN_(isa, name) hybridflow_##isa##_##name
#define HYBRIDFLOW_JOIN(isa, name) HYBRIDFLOW_JOIN_(isa, name)
#define HYBRIDFLOW_KERNEL(name) HYBRIDFLOW_API void HYBRIDFLOW_JOIN(HYBRIDFLOW_ISA, name)

// The same for a function that first looks at the values of its operands: it returns 1, or 0 if it has
// done nothing because they do not fit.
#define HYBRIDFLOW_CHECKED_KERNEL(name) HYBRIDFLOW_API int32_t HYBRIDFLOW_JOIN(HYBRIDFLOW_ISA, name)

#if defined(_MSC_VER)
#define HYBRIDFLOW_RESTRICT __restrict
#define HYBRIDFLOW_INLINE __forceinline
#else
#define HYBRIDFLOW_RESTRICT __restrict__
#define HYBRIDFLOW_INLINE inline __attribute__((always_inline))
#endif

namespace {

// Threads for an operation on so many elements. 32768 is PyTorch's own grain: a team waits for its slowest
// thread, which on a busy machine costs far more than a small operation on one core.
inline int team(int64_t elements, int64_t threads) {
  const int64_t useful = 1 + elements / 32768;
  return static_cast<int>(threads < useful ? threads : useful);
}

}  // namespace
