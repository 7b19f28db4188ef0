// Products of matrices with sums in float32, in tiles of bfloat16: by AMX where this is compiled for it, and
// otherwise by plain loops that read the same layouts, for tests on any processor.
//
// A tile of sums is 16 x 16. A tile on the left is 16 rows of 32 numbers, one on the right 16 rows of 16
// pairs: row r holds the rows 2r and 2r + 1 of a matrix of 32 x 16, interleaved.
//
// A float32 is rounded to one bfloat16, or is the sum of two but for 2^-18 of it: then a tile of the larger
// parts and one of the smaller follow one another, and the product of two smaller parts is left out.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AMX_BF16__)
#include <immintrin.h>

#include <atomic>
#endif

namespace {

typedef uint16_t Half;  // the bits of a bfloat16
typedef float Floats __attribute__((vector_size(64)));
typedef Half Halves __attribute__((vector_size(64)));

constexpr int64_t kTile = 16;         // rows, and columns, of a tile of sums
constexpr int64_t kDepth = 32;        // products in each of its sums
constexpr int64_t kTileHalves = 512;  // of a tile on the left or the right

template <int parts>
constexpr int64_t kCell = parts * kTileHalves;  // of the tiles of all parts

inline void read(const float* from, Floats& to) { std::memcpy(&to, from, sizeof to); }
inline void read(const Half* from, Halves& to) { std::memcpy(&to, from, sizeof to); }
inline void write(const Floats& from, float* to) { std::memcpy(to, &from, sizeof from); }
inline void write(const Halves& from, Half* to) { std::memcpy(to, &from, sizeof from); }

// A row, or a column, of cells that follow one another; the next one begins `step` further on.
struct Tiles {
  const Half* data;
  int64_t step;

  Tiles at(int64_t i) const { return {data + i * step, step}; }
};

#if defined(__AMX_BF16__)

// The registers of this thread hold tiles while an object of this class lives.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette = 1, unused[15] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int rows>
inline void load_left(Tiles tiles) {
  _tile_loadd(4, tiles.data, 64);
  if constexpr (rows == 2) _tile_loadd(5, tiles.data + tiles.step, 64);
}

template <int columns>
inline void load_right(Tiles tiles) {
  _tile_loadd(6, tiles.data, 64);
  if constexpr (columns == 2) _tile_loadd(7, tiles.data + tiles.step, 64);
}

template <int rows, int columns>
inline void add_product_of_loaded() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (columns == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (rows == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (rows == 2 && columns == 2) _tile_dpbf16ps(3, 5, 7);
}

// sums (rows x columns tiles), or sums += if `add`, = a product over `depth` cells.
template <int rows, int columns, int parts>
inline void product(Tiles a, Tiles b, int64_t depth, bool add, float* sums, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  float* below = sums + kTile * stride;
  std::atomic_signal_fence(std::memory_order_seq_cst);  // not every compiler's _tile_loadd is one
  if (add) {
    _tile_loadd(0, sums, bytes);
    if constexpr (columns == 2) _tile_loadd(1, sums + kTile, bytes);
    if constexpr (rows == 2) _tile_loadd(2, below, bytes);
    if constexpr (rows == 2 && columns == 2) _tile_loadd(3, below + kTile, bytes);
  } else {
    _tile_zero(0);
    if constexpr (columns == 2) _tile_zero(1);
    if constexpr (rows == 2) _tile_zero(2);
    if constexpr (rows == 2 && columns == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Tiles left{a.data + k * kCell<parts>, a.step}, right{b.data + k * kCell<parts>, b.step};
    if constexpr (parts == 2) {
      load_left<rows>({left.data + kTileHalves, left.step});
      load_right<columns>(right);
      add_product_of_loaded<rows, columns>();
      load_left<rows>(left);
      add_product_of_loaded<rows, columns>();
      load_right<columns>({right.data + kTileHalves, right.step});
    } else {
      load_left<rows>(left);
      load_right<columns>(right);
    }
    add_product_of_loaded<rows, columns>();
  }
  _tile_stored(0, sums, bytes);
  if constexpr (columns == 2) _tile_stored(1, sums + kTile, bytes);
  if constexpr (rows == 2) _tile_stored(2, below, bytes);
  if constexpr (rows == 2 && columns == 2) _tile_stored(3, below + kTile, bytes);
}

// The numbers whose bit is set, zero for the others, which are not read.
inline void read_some(const float* from, uint16_t bits, Floats& to) {
  to = (Floats)_mm512_maskz_loadu_ps(bits, from);
}
inline void read_some(const Half* from, uint32_t bits, Halves& to) {
  to = (Halves)_mm512_maskz_loadu_epi16(bits, from);
}

inline void round_to_halves(const Floats& low, const Floats& high, Halves& to) {
  to = (Halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// Zero where negative; NaN stays, and so does the sign of zero.
inline void rectify(Floats& value) {
  value = (Floats)_mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), (__m512)value);
}

// Zero where a rectified number is.
inline void keep_active(const Halves& rectified, Halves& value) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  value = (Halves)_mm512_maskz_mov_epi16(_mm512_test_epi16_mask((__m512i)rectified, magnitude),
                                         (__m512i)value);
}

#else

class TileRegisters {
 public:
  TileRegisters() {}
};

inline float number(Half half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <int rows, int columns, int parts>
inline void product(Tiles a, Tiles b, int64_t depth, bool add, float* sums, int64_t stride) {
  for (int64_t r = 0; r < rows * kTile; ++r)
    for (int64_t c = 0; c < columns * kTile; ++c) {
      const Half* left = a.data + r / kTile * a.step + r % kTile * kDepth;
      const Half* right = b.data + c / kTile * b.step + c % kTile * 2;
      float sum = add ? sums[r * stride + c] : 0.0f;
      for (int64_t k = 0; k < depth * kCell<parts>; k += kCell<parts>)
        for (int64_t i = 0; i < kDepth; ++i) {
          const Half* x = left + k + i;
          const Half* y = right + k + i / 2 * kDepth + i % 2;
          if constexpr (parts == 2)
            sum += number(x[kTileHalves]) * number(*y) + number(*x) * number(y[kTileHalves]);
          sum += number(*x) * number(*y);
        }
      sums[r * stride + c] = sum;
    }
}

inline void read_some(const float* from, uint16_t bits, Floats& to) {
  for (int i = 0; i < 16; ++i) to[i] = (bits >> i & 1) != 0 ? from[i] : 0.0f;
}
inline void read_some(const Half* from, uint32_t bits, Halves& to) {
  for (int i = 0; i < 32; ++i) to[i] = (bits >> i & 1) != 0 ? from[i] : Half{0};
}

inline void round_to_halves(const Floats& low, const Floats& high, Halves& to) {
  for (int i = 0; i < 32; ++i) {
    const float value = i < 16 ? low[i] : high[i - 16];
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i] = static_cast<Half>((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

inline void rectify(Floats& value) { value = value < Floats{} ? Floats{} : value; }

inline void keep_active(const Halves& rectified, Halves& value) {
  value &= (Halves)((rectified & Half{0x7fff}) != Half{0});
}

#endif

#if defined(__clang__)
#define HYBRIDFLOW_HALVES(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HYBRIDFLOW_HALVES(a, b, ...) __builtin_shuffle(a, b, Halves{__VA_ARGS__})
#endif

// Two rows of 32 numbers become two rows of 16 pairs. Of rows in mixed order, that of their parts of four
// 0 4 1 5 2 6 3 7, the pairs come in order; of rows in order they come as 0 2 4 6 and 1 3 5 7.
inline void interleave(const Halves& x, const Halves& y, Halves& first, Halves& second) {
  first = HYBRIDFLOW_HALVES(x, y, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48,
                            17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
  second = HYBRIDFLOW_HALVES(x, y, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20,
                             52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
}

// Parts of four in the order that makes `interleave` give them as 0 4 1 5 and 2 6 3 7.
inline void spread(Halves& x) {
  x = HYBRIDFLOW_HALVES(x, x, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27, 4, 5, 6, 7,
                        12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// The place of the part i of four in mixed order.
constexpr int64_t mixed(int64_t i) { return i < 4 ? 2 * i : 2 * i - 7; }

// The nearest number, or of two the larger in magnitude, with the digits of a bfloat16.
inline void coarsen(Floats& value) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  value = (Floats)(((Words)value + 0x8000u) & 0xffff0000u);
}

// As many bfloat16 as there are parts, which add up to each of 32 numbers or to one close by.
template <int parts>
inline void split(Floats low, Floats high, Halves (&to)[parts]) {
  if constexpr (parts == 2) {
    Floats coarse_low = low, coarse_high = high;
    coarsen(coarse_low);
    coarsen(coarse_high);
    round_to_halves(coarse_low, coarse_high, to[0]);
    low -= coarse_low;
    high -= coarse_high;
  }
  round_to_halves(low, high, to[parts - 1]);
}

// 32 numbers, the last ones zero if there are fewer; the next part goes `step` further on.
template <int parts>
inline void split_row(const float* from, int64_t count, Half* to, int64_t step) {
  const uint32_t bits = count >= kDepth ? ~0u : (1u << count) - 1;
  Floats low, high;
  Halves row[parts];
  read_some(from, static_cast<uint16_t>(bits), low);
  read_some(from + kTile, static_cast<uint16_t>(bits >> 16), high);
  split(low, high, row);
  for (int part = 0; part < parts; ++part) write(row[part], to + part * step);
}

// a (row_tiles x depth) times b (depth x column_tiles), as in `product`.
template <int parts>
inline void multiply(Tiles a, int64_t row_tiles, Tiles b, int64_t column_tiles, int64_t depth,
                     bool add, float* sums, int64_t stride) {
  for (int64_t r = 0; r < row_tiles; r += 2)
    for (int64_t c = 0; c < column_tiles; c += 2) {
      float* to = sums + (r * stride + c) * kTile;
      const Tiles left = a.at(r), right = b.at(c);
      const bool two_rows = r + 1 < row_tiles, two_columns = c + 1 < column_tiles;
      if (two_rows && two_columns)
        product<2, 2, parts>(left, right, depth, add, to, stride);
      else if (two_rows)
        product<2, 1, parts>(left, right, depth, add, to, stride);
      else if (two_columns)
        product<1, 2, parts>(left, right, depth, add, to, stride);
      else
        product<1, 1, parts>(left, right, depth, add, to, stride);
    }
}

}  // namespace
