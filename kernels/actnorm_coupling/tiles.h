// Arrays of three types and several layouts, seen as tiles of contiguous float32 rows.
//
// An array of x's shape is rows of channels * inner elements, samples * outer rows in all: inner are
// the positions of a contiguous array (outer = 1), outer those of a channels-last one (inner = 1). A
// tile's rows are read and written where they lie if they are float32 and contiguous, and go through a
// buffer in the first-level cache if not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "native/memory.h"
#include "native/vector_math.h"

namespace {

constexpr int64_t kTile = 512;  // floats in a buffer: some ten of them fit into the cache

// The space between neighbours keeps buffers of one function from having the same position in a page,
// which processors take for the same address when a load follows a store.
template <class T>
struct alignas(64) Buffer {
  T values[kTile];
  T between[576 / sizeof(T)];

  operator T*() { return values; }
};

struct Shape {
  int64_t samples, channels, outer, inner;

  int64_t positions() const { return outer * inner; }
  int64_t rows() const { return samples * outer; }
};

struct Columns {  // where a part's channels are in a row
  int64_t row;           // channels in a row
  int64_t first, step;   // channel j of the part is first + step * j ...
  const int64_t* index;  // ... or index[j]

  int64_t operator[](int64_t j) const { return index != nullptr ? index[j] : first + step * j; }
};

enum Type : int64_t { kFloat32, kBFloat16, kFloat16 };

struct Array {
  void* data;
  int64_t type;
  int64_t inner;
  Columns columns;
};

// What a kernel works on at a time: by channels, `run` positions of each of `channels` channels of one
// row; or by rows, all positions of the channels in each of `rows` rows, taken in groups of `group`.
struct Tile {
  bool by_channels;
  int64_t row, rows, group;   // of the array
  int64_t channel, channels;  // of the part
  int64_t offset, run;        // positions within each channel

  int64_t width() const { return channels * run; }         // of a row of the array
  int64_t count() const { return rows * width(); }
  int64_t lines() const { return by_channels ? channels : rows / group; }
  int64_t columns() const { return by_channels ? run : group * width(); }  // of a line
  int64_t sums() const { return by_channels ? 1 : lines(); }  // by sample, or less
  int64_t stride() const { return most(columns(), kLanes); }  // between lines in a buffer
};

struct View {  // the lines of a tile
  float* data;
  int64_t stride;
};

inline bool is_one_run(const Array& array, const Tile& tile) {
  const Columns& columns = array.columns;
  const bool row = tile.channels == 1 || (columns.index == nullptr && columns.step == 1);
  return row && (tile.rows == 1 || tile.width() == columns.row * array.inner);
}

// Whether the kernel can work on the array itself, whose lines are then `stride` apart.
inline bool is_direct(const Array& array, const Tile& tile, int64_t* stride) {
  const Columns& columns = array.columns;
  const bool regular = tile.channels == 1 || columns.index == nullptr;
  if (array.type != kFloat32 || !regular || tile.columns() < kLanes) return false;
  *stride = (tile.by_channels ? columns.step : tile.group * columns.row) * array.inner;
  if (tile.by_channels) return true;
  if (tile.channels > 1 && columns.step != 1) return false;
  return tile.group == 1 || is_one_run(array, tile);
}

inline int64_t begin(const Array& array, const Tile& tile) {
  const Columns& columns = array.columns;
  return (tile.row * columns.row + columns[tile.channel]) * array.inner + tile.offset;
}

// --- between an array and a contiguous tile of its type --------------------------------------------

template <bool gather, class T>
inline void move(T* array, T* tile) {
  if constexpr (gather)
    *tile = *array;
  else
    *array = *tile;
}

template <bool gather, int count, class T>
inline void move_few(T* array, T* tile) {  // as one or two instructions
  std::memcpy(gather ? tile : array, gather ? array : tile, count * sizeof(T));
}

template <bool gather, class T>
inline void move_run(T* array, T* tile, int64_t count) {
  if (count < 8) {
    for (int64_t j = 0; j < count; ++j) move<gather>(array + j, tile + j);
    return;
  }
  for (int64_t j = 0; j + 8 < count; j += 8) move_few<gather, 8>(array + j, tile + j);
  move_few<gather, 8>(array + count - 8, tile + count - 8);  // may overlap the one before
}

template <bool gather, int width, class T>
void move_narrow_rows(T* array, int64_t stride, int64_t rows, T* tile) {
  for (int64_t r = 0; r < rows; ++r) {
    if constexpr (width > 4)
      move_few<gather, width>(array + r * stride, tile + r * width);
    else
      for (int j = 0; j < width; ++j) move<gather>(array + r * stride + j, tile + r * width + j);
  }
}

template <bool gather, class T>
void move_rows(T* array, int64_t stride, int64_t rows, int64_t width, T* tile) {
  switch (width) {
    case 1: return move_narrow_rows<gather, 1>(array, stride, rows, tile);
    case 2: return move_narrow_rows<gather, 2>(array, stride, rows, tile);
    case 3: return move_narrow_rows<gather, 3>(array, stride, rows, tile);
    case 4: return move_narrow_rows<gather, 4>(array, stride, rows, tile);
    case 5: return move_narrow_rows<gather, 5>(array, stride, rows, tile);
    case 6: return move_narrow_rows<gather, 6>(array, stride, rows, tile);
    case 7: return move_narrow_rows<gather, 7>(array, stride, rows, tile);
  }
  for (int64_t r = 0; r < rows; ++r) move_run<gather>(array + r * stride, tile + r * width, width);
}

template <bool gather, class T>
void move_tile(const Array& array, const Tile& tile, T* buffer) {
  const Columns& columns = array.columns;
  const int64_t inner = array.inner, stride = columns.row * inner, width = tile.width();
  T* data = static_cast<T*>(array.data) + tile.row * stride + tile.offset;
  if (columns.index == nullptr && columns.step == 1 && (tile.run == inner || tile.channels == 1)) {
    move_rows<gather>(data + columns[tile.channel] * inner, stride, tile.rows, width, buffer);
  } else if (inner > 1) {
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t j = 0; j < tile.channels; ++j)
        move_run<gather>(data + r * stride + columns[tile.channel + j] * inner,
                         buffer + r * width + j * tile.run, tile.run);
  } else if (columns.index != nullptr) {
    const int64_t* index = columns.index + tile.channel;
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t j = 0; j < width; ++j)
        move<gather>(data + r * stride + index[j], buffer + r * width + j);
  } else if (columns.step == 2) {  // known to the compiler, which shuffles whole vectors
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t j = 0; j < width; ++j)
        move<gather>(data + r * stride + columns[tile.channel] + 2 * j, buffer + r * width + j);
  } else {
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t j = 0; j < width; ++j)
        move<gather>(data + r * stride + columns[tile.channel + j], buffer + r * width + j);
  }
}

// Lines shorter than a vector stand a vector apart in a buffer.
inline void spread_lines(const Tile& tile, float* buffer) {
  const int64_t width = tile.columns();
  if (width >= kLanes) return;
  for (int64_t line = tile.lines() - 1; line > 0; --line)
    std::memmove(buffer + line * kLanes, buffer + line * width, sizeof(float) * width);
}

inline void join_lines(const Tile& tile, float* buffer) {
  const int64_t width = tile.columns();
  if (width >= kLanes) return;
  for (int64_t line = 1; line < tile.lines(); ++line)
    std::memmove(buffer + line * width, buffer + line * kLanes, sizeof(float) * width);
}

// --- the lines of a tile ---------------------------------------------------------------------------

// To read: where they lie in the array if they can be used there, else in the buffer.
inline View load(const Array& array, const Tile& tile, float* buffer) {
  int64_t stride = 0;
  if (is_direct(array, tile, &stride))
    return {static_cast<float*>(array.data) + begin(array, tile), stride};
  if (array.type == kFloat32) {
    move_tile<true>(array, tile, buffer);
  } else {
    Buffer<uint16_t> halves;
    const uint16_t* from = halves;
    if (is_one_run(array, tile))
      from = static_cast<const uint16_t*>(array.data) + begin(array, tile);
    else
      move_tile<true>(array, tile, halves.values);
    if (array.type == kBFloat16)
      from_bfloat16(from, tile.count(), buffer);
    else
      from_float16(from, tile.count(), buffer);
  }
  spread_lines(tile, buffer);
  return {buffer, tile.stride()};
}

// To write, before `store` is called with the same arguments.
inline View target(const Array& array, const Tile& tile, float* buffer) {
  int64_t stride = 0;
  if (is_direct(array, tile, &stride))
    return {static_cast<float*>(array.data) + begin(array, tile), stride};
  return {buffer, tile.stride()};
}

inline void store(const Array& array, const Tile& tile, float* buffer) {
  int64_t stride = 0;
  if (is_direct(array, tile, &stride)) return;
  join_lines(tile, buffer);
  if (array.type == kFloat32) {
    move_tile<false>(array, tile, buffer);
    return;
  }
  Buffer<uint16_t> halves;
  const bool one_run = is_one_run(array, tile);
  uint16_t* to = one_run ? static_cast<uint16_t*>(array.data) + begin(array, tile) : halves.values;
  if (array.type == kBFloat16)
    to_bfloat16(buffer, tile.count(), to);
  else
    to_float16(buffer, tile.count(), to);
  if (!one_run) move_tile<false>(array, tile, halves.values);
}

}  // namespace
