// What the kernel sources share: the name under which a function is exported, the shape of its
// operands, and the split of samples into chunks.
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

#if defined(_MSC_VER)
#define HYBRIDFLOW_RESTRICT __restrict
#else
#define HYBRIDFLOW_RESTRICT __restrict__
#endif

// Everything but the exported names is local to its source: a shared inline function would be merged
// at link time into one version, perhaps of an instruction set that this processor lacks.
namespace {

// A contiguous (samples, channels, positions) array; the fields mirror native/__init__.py.
struct Shape {
  int64_t samples;
  int64_t channels;
  int64_t positions;
  int32_t flip;
  int32_t threads;

  int64_t columns() const { return channels * positions; }
  int64_t moved() const { return (channels / 2) * positions; }  // columns of the transformed half
  int64_t kept() const { return columns() - moved(); }          // columns of the identity half
  int64_t moved_begin() const { return flip ? 0 : kept(); }
  int64_t kept_begin() const { return flip ? moved() : 0; }
};

// Sums over samples are formed chunk by chunk. The chunks depend on the number of samples alone, so
// the sums do not depend on the number of threads.
inline int64_t chunk_rows(int64_t samples) {
  const int64_t rows = (samples + 255) / 256;
  return rows < 16 ? 16 : rows;
}

inline int64_t chunk_count(int64_t samples) {
  const int64_t rows = chunk_rows(samples);
  return (samples + rows - 1) / rows;
}

}  // namespace
