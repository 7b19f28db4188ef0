// Products of matrices whose columns come in panels: kPanel numbers side by side, two registers, for each
// row. The tiles below keep their sums in registers and read everything else from the first-level cache.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "native/items.h"
#include "native/lanes.h"
#include "native/native.h"

namespace {

constexpr int64_t kPanel = 2 * kLanes;
#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 24 of 32 registers hold sums
#else
constexpr int kTileRows = 6;  // 12 of 16
#endif

// n things in parts of almost the same size, at most `most`: part i begins at begin(i).
struct Parts {
  int64_t size, count;

  Parts(int64_t size, int64_t most) : size(size), count((size + most - 1) / most) {}
  int64_t begin(int64_t i) const { return i * size / count; }
  int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }
  int64_t of(int64_t thing) const { return ((thing + 1) * count - 1) / size; }  // the part it is in
};

// What so many parts hold.
inline Range held_by(Range parts, const Parts& all) {
  return {all.begin(parts.begin), all.begin(parts.end)};
}

// f(std::integral_constant<int, rows>()) for rows in 1 .. most.
template <int most, class F>
inline void with_constant(int64_t rows, const F& f) {
  if constexpr (most == 1) {
    f(std::integral_constant<int, 1>());
  } else {
    if (rows == most)
      f(std::integral_constant<int, most>());
    else
      with_constant<most - 1>(rows, f);
  }
}

// A stretch of a sum of products: `count` rows of a panel, and for each the weights of a tile's rows.
struct Stretch {
  const float* weights;
  const float* values;
  int64_t count;
};

template <int rows>
struct Tile {
  Lanes sum[rows][2];

  void start(const float* values) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = every<Lanes>(values[r]);
  }

  void clear() {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = Lanes{};
  }

  // The weights of a tile's rows are neighbours; those for the next row of the panel are `step` further on.
  void add(const Stretch& stretch, int64_t step = rows) {
    const float* weights = stretch.weights;
    const float* values = stretch.values;
    for (int64_t k = 0; k < stretch.count; ++k) {
      const Lanes a = load(values), b = load(values + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Lanes weight = every<Lanes>(weights[r]);
        sum[r][0] += weight * a;
        sum[r][1] += weight * b;
      }
      weights += step;
      values += kPanel;
    }
  }

  template <class F>
  void finish(const F& f) const {  // f(sum, offset in the panel)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      f(sum[r][0], r * kPanel);
      f(sum[r][1], r * kPanel + kLanes);
    }
  }
};

// --- four lanes at a time -------------------------------------------------------------------------

#if defined(__clang__)
#define HYBRIDFLOW_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t QuadIndex __attribute__((vector_size(16)));
#define HYBRIDFLOW_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, QuadIndex{i, j, k, l})
#endif

inline void transpose(Quad* rows) {
  const Quad a = HYBRIDFLOW_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5);
  const Quad b = HYBRIDFLOW_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7);
  const Quad c = HYBRIDFLOW_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5);
  const Quad d = HYBRIDFLOW_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = HYBRIDFLOW_SHUFFLE(a, c, 0, 1, 4, 5);
  rows[1] = HYBRIDFLOW_SHUFFLE(a, c, 2, 3, 6, 7);
  rows[2] = HYBRIDFLOW_SHUFFLE(b, d, 0, 1, 4, 5);
  rows[3] = HYBRIDFLOW_SHUFFLE(b, d, 2, 3, 6, 7);
}

#if defined(__clang__)
template <int half>
HYBRIDFLOW_INLINE Lanes halves_of(Lanes a, Lanes b, int which) {
  Lanes result;
  for (int i = 0; i < kLanes; ++i) {
    const int from = i / (2 * half) * (2 * half) + which * half + i % half;
    result[i] = i % (2 * half) < half ? a[from] : b[from];
  }
  return result;
}
#else
template <int half>
HYBRIDFLOW_INLINE Lanes halves_of(Lanes a, Lanes b, int which) {
  IntLanes from;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    from[i] = i / (2 * half) * (2 * half) + which * half + i % half + i / half % 2 * kLanes;
  return __builtin_shuffle(a, b, from);
}
#endif

// The sums of each of `count` vectors' lanes, in neighbouring lanes of one vector: two by two, the halves
// of ever smaller blocks are added up, of one vector on the left and of the other on the right.
template <int count, int half = kLanes / 2>
HYBRIDFLOW_INLINE Lanes fold_each(const Lanes* vectors) {
  if constexpr (half == 0) {
    return vectors[0];
  } else {
    constexpr int left = count > half ? half : count;  // the others are added to these
    Lanes sums[left];
#pragma GCC unroll 16
    for (int i = 0; i < left; ++i) {
      const Lanes other = i + half < count ? vectors[i + half < count ? i + half : i] : vectors[i];
      sums[i] = halves_of<half>(vectors[i], other, 0) + halves_of<half>(vectors[i], other, 1);
    }
    return fold_each<left, half / 2>(sums);
  }
}

// to[i * step] += the sum of vector i's lanes.
template <int count>
HYBRIDFLOW_INLINE void add_folded(const Lanes* vectors, int64_t step, float* to) {
  constexpr int most = count < kLanes ? count : kLanes;
  const Lanes sums = fold_each<most>(vectors);
#pragma GCC unroll 16
  for (int i = 0; i < most; ++i) to[i * step] += sums[i];
  if constexpr (most < count) add_folded<count - most>(vectors + most, step, to + most * step);
}

// Rows exchanged with lanes: the halves of ever smaller blocks change places.
template <int half = kLanes / 2>
HYBRIDFLOW_INLINE void transpose_lanes(Lanes* rows) {
  if constexpr (half > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i / half % 2 != 0) continue;
      const Lanes a = rows[i], b = rows[i + half];
      rows[i] = halves_of<half>(a, b, 0);
      rows[i + half] = halves_of<half>(a, b, 1);
    }
    transpose_lanes<half / 2>(rows);
  }
}

// to[c * step + i] += the sum over k of a[k][i] b[c][k], of a panel a of kPanel rows and b of `columns`; or =
// if the sums are `fresh`.
template <int columns>
inline void add_outer_products(const float* a, const float* b, int64_t step, bool fresh, float* to) {
  Tile<columns> tile;
  tile.clear();
  for (int64_t k = 0; k < kPanel; ++k) {
    const Lanes x = load(a + k * kPanel), y = load(a + k * kPanel + kLanes);
#pragma GCC unroll 16
    for (int c = 0; c < columns; ++c) {
      const Lanes value = every<Lanes>(b[c * kPanel + k]);
      tile.sum[c][0] += value * x;
      tile.sum[c][1] += value * y;
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < columns; ++c)
    for (int half = 0; half < 2; ++half) {
      float* own = to + c * step + half * kLanes;
      store(fresh ? tile.sum[c][half] : load(own) + tile.sum[c][half], own);
    }
}

// A pair of panels that belong together, by the offsets of their first rows.
struct Pair {
  int64_t a, b;
};

// Columns of b in a tile of inner products, at most, and the rows of a that go with so many. Three by
// three is faster than tiles of twelve sums, between which GCC moves registers about.
constexpr int kInnerColumns = 3;
constexpr int inner_rows(int columns) {
  constexpr bool many = kTileRows > 6;  // registers
  constexpr int rows[] = {8, many ? 8 : 5, many ? 6 : 3};
  return rows[columns - 1];
}

// to[r * step + places[c]] += the inner product of row r of all panels in a with row c of those in b.
template <int rows, int columns>
inline void inner_products(const float* a, const float* b, const Pair* pairs, int64_t count,
                           int64_t step, const int64_t* places, float* to) {
  Lanes sum[columns][rows];
#pragma GCC unroll 16
  for (int c = 0; c < columns; ++c)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sum[c][r] = Lanes{};
  for (int64_t i = 0; i < count; ++i) {
    const float* from_a = a + pairs[i].a;
    const float* from_b = b + pairs[i].b;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Lanes x[rows];
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) x[r] = load(from_a + r * kPanel + half * kLanes);
#pragma GCC unroll 16
      for (int c = 0; c < columns; ++c) {
        const Lanes y = load(from_b + c * kPanel + half * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) sum[c][r] += x[r] * y;
      }
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < columns; ++c) add_folded<rows>(sum[c], step, to + places[c]);
}

// --- layers with a ReLU ----------------------------------------------------------------------------

inline Lanes positive(Lanes v) { return v < Lanes{} ? Lanes{} : v; }

inline Lanes where_positive(Lanes h, Lanes v) { return h <= Lanes{} ? Lanes{} : v; }

// to += the sums of so many panels' rows, over their lanes; panels are `stride` apart.
inline void add_row_sums(const float* panels, int64_t stride, int64_t count, int64_t rows,
                         float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    Lanes a = Lanes{}, b = Lanes{};
    for (int64_t i = 0; i < count; ++i) {
      a += load(panels + i * stride + r * kPanel);
      b += load(panels + i * stride + r * kPanel + kLanes);
    }
    to[r] += fold(a + b);
  }
}

}  // namespace
