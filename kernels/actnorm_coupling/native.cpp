// Actnorm followed by affine coupling; the formulas are those of reference.py.
//
// An array of x's shape is rows of channels * inner elements, samples * outer rows in all: inner are
// the positions of a contiguous array (outer = 1), outer those of a channels-last one (inner = 1).
// The columns of a row belong to the identity part (kept) or to the transformed part (moved). Each
// part is cut into blocks of columns, the samples into chunks; an item of work is a block of a chunk.
// It walks over tiles of at most kTile elements, which are float32 and contiguous: arrays that are so
// are used where they lie, others go through a buffer in the first-level cache. Every sum is formed in
// an order that depends on the shape alone.
#include "native/native.h"
#include "native/vector_math.h"

namespace {

constexpr int64_t kTile = 512;       // floats in a buffer: some twenty of them fit into the cache
constexpr int64_t kShortRow = 64;    // narrower blocks take several rows to a tile
constexpr int64_t kChunk = 32768;    // elements of x in a chunk, about
constexpr int64_t kMostChunks = 128;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ratio_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
class Memory {
 public:
  explicit Memory(int64_t count) : data_(new T[static_cast<size_t>(count)]) {}
  ~Memory() { delete[] data_; }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* get() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_;
};

// A buffer for a tile. The space between neighbours keeps those of one function from having the same
// position in a page, which processors take for the same address when a load follows a store.
template <class T>
struct alignas(64) Buffer {
  T values[kTile];
  T between[576 / sizeof(T)];

  operator T*() { return values; }
  operator const T*() const { return values; }
};

// --- arrays and tiles ----------------------------------------------------------------------------

struct Shape {
  int64_t samples, channels, outer, inner;

  int64_t positions() const { return outer * inner; }
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

struct Tile {
  int64_t row, rows;          // of the array
  int64_t channel, channels;  // of the part
  int64_t offset, run;        // positions within each channel

  int64_t width() const { return channels * run; }
  int64_t count() const { return rows * width(); }
};

bool is_one_run(const Array& array, const Tile& tile) {
  const Columns& columns = array.columns;
  const bool row = tile.channels == 1 || (columns.index == nullptr && columns.step == 1);
  return row && (tile.rows == 1 || tile.width() == columns.row * array.inner);
}

int64_t begin(const Array& array, const Tile& tile) {
  const Columns& columns = array.columns;
  return (tile.row * columns.row + columns[tile.channel]) * array.inner + tile.offset;
}

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

// Between the array and a contiguous tile of its type, which is_one_run does not describe.
template <bool gather, class T>
void move_tile(const Array& array, const Tile& tile, T* buffer) {
  const Columns& columns = array.columns;
  const int64_t inner = array.inner, stride = columns.row * inner, width = tile.width();
  T* data = static_cast<T*>(array.data) + tile.row * stride + tile.offset;
  if (columns.index == nullptr && columns.step == 1) {
    move_rows<gather>(data + columns[tile.channel] * inner, stride, tile.rows, width, buffer);
  } else if (inner > 1) {
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t j = 0; j < tile.channels; ++j)
        move_run<gather>(data + r * stride + columns[tile.channel + j] * inner,
                         buffer + r * width + j * tile.run, tile.run);
  } else if (columns.index != nullptr) {
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t j = 0; j < width; ++j)
        move<gather>(data + r * stride + columns.index[tile.channel + j], buffer + r * width + j);
  } else {
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t j = 0; j < width; ++j)
        move<gather>(data + r * stride + columns[tile.channel] + 2 * j, buffer + r * width + j);
  }
}

// The tile as contiguous float32: where it lies in the array if it can be, else in the buffer.
const float* load(const Array& array, const Tile& tile, float* buffer) {
  const bool one_run = is_one_run(array, tile);
  if (array.type == kFloat32) {
    if (one_run) return static_cast<const float*>(array.data) + begin(array, tile);
    move_tile<true>(array, tile, buffer);
    return buffer;
  }
  Buffer<uint16_t> halves;
  const uint16_t* from = halves;
  if (one_run)
    from = static_cast<const uint16_t*>(array.data) + begin(array, tile);
  else
    move_tile<true>(array, tile, halves.values);
  if (array.type == kBFloat16)
    from_bfloat16(from, tile.count(), buffer);
  else
    from_float16(from, tile.count(), buffer);
  return buffer;
}

// Where to write a tile of the array before `store` is called with the same arguments.
float* target(const Array& array, const Tile& tile, float* buffer) {
  if (array.type != kFloat32 || !is_one_run(array, tile)) return buffer;
  return static_cast<float*>(array.data) + begin(array, tile);
}

void store(const Array& array, const Tile& tile, float* buffer) {
  const bool one_run = is_one_run(array, tile);
  if (array.type == kFloat32) {
    if (!one_run) move_tile<false>(array, tile, buffer);
    return;
  }
  Buffer<uint16_t> halves;
  uint16_t* to = one_run ? static_cast<uint16_t*>(array.data) + begin(array, tile) : halves;
  if (array.type == kBFloat16)
    to_bfloat16(buffer, tile.count(), to);
  else
    to_float16(buffer, tile.count(), to);
  if (!one_run) move_tile<false>(array, tile, halves.values);
}

// --- the plan of the work ------------------------------------------------------------------------

struct Chunks {
  int64_t samples;  // in each but the last
  int64_t count;

  explicit Chunks(const Shape& shape) {
    const int64_t elements = most(1, shape.channels * shape.positions());
    samples = most(most(1, kChunk / elements), ratio_up(shape.samples, kMostChunks));
    count = ratio_up(shape.samples, samples);
  }
};

struct Part {  // kept or moved
  int64_t channels;
  Columns columns;  // in arrays of x's shape
};

struct Block {
  int64_t number;
  int64_t channel, channels;  // of the part
  int64_t inner, run;         // a tile has run positions of each channel
  int64_t tile_rows;

  int64_t width() const { return channels * run; }
  int64_t count() const { return tile_rows * width(); }

  template <class F>
  void for_each_tile(int64_t row_begin, int64_t row_end, const F& f) const {
    for (int64_t row = row_begin; row < row_end; row += tile_rows)
      for (int64_t offset = 0; offset < inner; offset += run)
        f(Tile{row, least(tile_rows, row_end - row), channel, channels, offset,
               least(run, inner - offset)});
  }
};

struct Blocks {
  int64_t count, channels, inner, run, part_channels, tile_rows;

  Blocks(const Shape& shape, const Chunks& chunks, const Part& part) {
    part_channels = part.channels;
    inner = shape.inner;
    run = ratio_up(inner, most(1, ratio_up(inner, kTile)));
    channels = inner == 0 ? 1 : least(part_channels, most(1, kTile / inner));
    count = part_channels * shape.positions() == 0 ? 0 : ratio_up(part_channels, channels);
    const int64_t width = channels * run;
    const bool whole = channels == shape.channels && run == inner;
    const bool several = width < kShortRow || whole;
    tile_rows = several ? least(most(1, kTile / most(1, width)), chunks.samples * shape.outer) : 1;
  }

  Block operator[](int64_t number) const {
    const int64_t channel = number * channels;
    return {number, channel, least(channels, part_channels - channel), inner, run, tile_rows};
  }
};

// Calls kept or moved for every item: (block, chunk, first sample, last sample + 1).
template <class Kept, class Moved>
void for_each_item(const Shape& shape, const Chunks& chunks, const Blocks& kept_blocks,
                   const Blocks& moved_blocks, int64_t threads, const Kept& kept,
                   const Moved& moved) {
  const int64_t per_chunk = kept_blocks.count + moved_blocks.count;
  const int64_t items = chunks.count * per_chunk;
  const int64_t elements = shape.samples * shape.channels * shape.positions();
#pragma omp parallel for num_threads(team(elements, threads)) schedule(dynamic)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t chunk = item / per_chunk, number = item % per_chunk;
    const int64_t first = chunk * chunks.samples;
    const int64_t end = least(first + chunks.samples, shape.samples);
    if (number < moved_blocks.count)
      moved(moved_blocks[number], chunk, first, end);
    else
      kept(kept_blocks[number - moved_blocks.count], chunk, first, end);
  }
}

// --- sums and per-channel parameters -------------------------------------------------------------

// In four interleaved chains, since one would wait for each addition.
float sum(const float* HYBRIDFLOW_RESTRICT values, int64_t count) {
  const int64_t quarter = count / 64 * 16;
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f, rest = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t j = 0; j < quarter; ++j) {
    a += values[j];
    b += values[quarter + j];
    c += values[2 * quarter + j];
    d += values[3 * quarter + j];
  }
#pragma omp simd reduction(+ : rest)
  for (int64_t j = 4 * quarter; j < count; ++j) rest += values[j];
  return ((a + b) + (c + d)) + rest;
}

double sum_double(const float* values, int64_t count) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < count; ++j) total += values[j];
  return total;
}

void fill(float value, int64_t count, float* to) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = value;
}

void add(const float* HYBRIDFLOW_RESTRICT values, int64_t count, float* HYBRIDFLOW_RESTRICT to) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] += values[j];
}

// Calls f(sample, first element, number of elements) for the tile's elements of every sample.
template <class F>
inline void for_each_sample(const Shape& shape, const Tile& tile, const F& f) {
  int64_t sample = tile.row / shape.outer;
  for (int64_t row = 0; row < tile.rows; ++sample) {
    const int64_t end = least(tile.rows, (sample + 1) * shape.outer - tile.row);
    f(sample, row * tile.width(), (end - row) * tile.width());
    row = end;
  }
}

// Adds every sample's elements to its sum; changes the elements.
void add_by_sample(const Shape& shape, const Tile& tile, float* values, float* sums) {
  if (shape.outer > 1 || tile.rows == 1) {
    for_each_sample(shape, tile, [&](int64_t sample, int64_t begin, int64_t count) {
      sums[sample] += sum(values + begin, count);
    });
    return;
  }
  // A row is a sample, and short: all rows are halved together as often as their width allows.
  int64_t width = tile.width();
  float folded[kTile / 2];
  for (; width % 2 == 0; width /= 2) {
    const int64_t pairs = tile.rows * width / 2;
#pragma omp simd
    for (int64_t j = 0; j < pairs; ++j) folded[j] = values[2 * j] + values[2 * j + 1];
    std::memcpy(values, folded, static_cast<size_t>(pairs) * sizeof(float));
  }
  for (int64_t row = 0; row < tile.rows; ++row) {
    float total = 0.0f;
    for (int64_t j = 0; j < width; ++j) total += values[row * width + j];
    sums[tile.row + row] += total;
  }
}

constexpr int64_t kStride = 16;

// Every sample's value over its elements; writes past the tile, into the space between buffers.
void spread_by_sample(const Shape& shape, const Tile& tile, const float* per_sample, float* to) {
  for_each_sample(shape, tile, [&](int64_t sample, int64_t begin, int64_t count) {
    float many[kStride];
    for (int64_t j = 0; j < kStride; ++j) many[j] = per_sample[sample];
    for (int64_t j = begin; j < begin + count; j += kStride)  // the next sample overwrites the excess
      std::memcpy(to + j, many, sizeof many);
  });
}

// Per-channel values over the columns of a block's tiles.
template <class F>
void spread(const Block& block, const F& value, float* to) {
  const int64_t width = block.width();
  if (block.run == 1)
    for (int64_t j = 0; j < width; ++j) to[j] = value(block.channel + j);
  else
    for (int64_t j = 0; j < block.channels; ++j)
      fill(value(block.channel + j), block.run, to + j * block.run);
  for (int64_t row = 1; row < block.tile_rows; ++row)
    move_run<true>(to, to + row * width, width);
}

// Sums of a block's columns to sums of its channels, which are passed to set(channel, sum).
template <class F>
void gather_sums(const Block& block, float* columns, const F& set) {
  const int64_t width = block.width();
  for (int64_t row = 1; row < block.tile_rows; ++row) add(columns + row * width, width, columns);
  for (int64_t j = 0; j < block.channels; ++j)
    set(block.channel + j, block.run == 1 ? columns[j] : sum(columns + j * block.run, block.run));
}

enum Kind { kLogScale, kBias, kGain, kKinds };

class Sums {  // per chunk and channel, of each kind
 public:
  Sums(const Shape& shape, const Chunks& chunks)
      : chunks_(chunks.count),
        channels_(shape.channels),
        data_(kKinds * channels_ * most(1, chunks_)) {}

  float* at(int64_t chunk, Kind kind) const { return data_ + (chunk * kKinds + kind) * channels_; }

  void total(Kind kind, float factor, int64_t count, float* to) const {
    fill(0.0f, count, to);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) add(at(chunk, kind), count, to);
    for (int64_t j = 0; j < count; ++j) to[j] *= factor;
  }

 private:
  int64_t chunks_, channels_;
  Memory<float> data_;
};

// Actnorm in the executed direction: v to (v + before) * scale + after, where one of before and after
// is zero, per channel of x.
class Norm {
 public:
  Norm(const float* log_scale, const float* bias, int64_t channels, bool shift_first, bool inverse)
      : present(log_scale != nullptr),
        sign(inverse ? -1.0f : 1.0f),
        before_scale(shift_first != inverse),
        memory_(4 * channels),
        before(memory_),
        after(memory_ + channels),
        scale(memory_ + 2 * channels),
        unscale(memory_ + 3 * channels) {
    if (!present) return;
    for (int64_t c = 0; c < channels; ++c) {
      const ExpPair e = vector_exp_pair(sign * log_scale[c]);
      scale[c] = e.value;
      unscale[c] = e.inverse;
      before[c] = before_scale ? sign * bias[c] : 0.0f;
      after[c] = before_scale ? 0.0f : sign * bias[c];
    }
  }

  void finish(const Sums& sums, int64_t channels, double grad_log_det, float* grad_log_scale,
              float* grad_bias) const {
    if (!present) return;
    sums.total(kLogScale, sign, channels, grad_log_scale);
    sums.total(kBias, sign, channels, grad_bias);
    for (int64_t c = 0; c < channels; ++c) {
      grad_log_scale[c] += sign * static_cast<float>(grad_log_det);
      if (before_scale) grad_bias[c] *= scale[c];
    }
  }

  const bool present;
  const float sign;
  const bool before_scale;

 private:
  Memory<float> memory_;

 public:
  float* const before;
  float* const after;
  float* const scale;
  float* const unscale;
};

struct NormTile {  // Norm over the columns of a block's tiles, and the sums for its gradients
  const Norm& norm;
  Buffer<float> before, after, scale, unscale;
  Buffer<float> sum_log_scale, sum_bias;

  NormTile(const Norm& source, const Part& part, const Block& block) : norm(source) {
    if (!norm.present) return;
    const Columns& c = part.columns;
    spread(block, [&](int64_t j) { return norm.before[c[j]]; }, before);
    spread(block, [&](int64_t j) { return norm.after[c[j]]; }, after);
    spread(block, [&](int64_t j) { return norm.scale[c[j]]; }, scale);
  }

  void start_gradients(const Part& part, const Block& block) {
    if (!norm.present) return;
    spread(block, [&](int64_t j) { return norm.unscale[part.columns[j]]; }, unscale);
    fill(0.0f, block.count(), sum_log_scale);
    fill(0.0f, block.count(), sum_bias);
  }

  void map(int64_t count, const float* HYBRIDFLOW_RESTRICT v, float* HYBRIDFLOW_RESTRICT out) const {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) out[j] = (v[j] + before[j]) * scale[j] + after[j];
  }

  void invert(int64_t count, const float* HYBRIDFLOW_RESTRICT out, float* HYBRIDFLOW_RESTRICT v) const {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) v[j] = (out[j] - after[j]) * unscale[j] - before[j];
  }

  void gradients(int64_t count, const float* HYBRIDFLOW_RESTRICT out,
                 const float* HYBRIDFLOW_RESTRICT grad, float* HYBRIDFLOW_RESTRICT grad_v) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      grad_v[j] = grad[j] * scale[j];
      sum_bias[j] += grad[j];
      sum_log_scale[j] += grad[j] * (out[j] - after[j]);
    }
  }

  void finish(const Part& part, const Block& block, const Sums& sums, int64_t chunk) {
    if (!norm.present) return;
    float* log_scale = sums.at(chunk, kLogScale);
    float* bias = sums.at(chunk, kBias);
    const Columns& c = part.columns;
    gather_sums(block, sum_log_scale, [&](int64_t j, float value) { log_scale[c[j]] = value; });
    gather_sums(block, sum_bias, [&](int64_t j, float value) { bias[c[j]] = value; });
  }
};

// --- the coupling --------------------------------------------------------------------------------

struct Constants {
  float raw_factor, shift_factor;  // of the conditioner's output; shift's with the direction's sign
  float amplitude;                 // f is amplitude · squash(raw_factor · raw)
  float inverse_clamp, eps;
};

struct Squashed {
  float value, slope;
};

struct Plain {
  static Squashed at(float r, const Constants&) { return {r, 1.0f}; }
};

struct HyperbolicTangent {
  static Squashed at(float r, const Constants&) {
    const Tanh tanh = vector_tanh(r);
    return {tanh.value, tanh.derivative};
  }
};

struct ArcTangent {
  static Squashed at(float r, const Constants&) { return {vector_atan(r), 1.0f / (1.0f + r * r)}; }
};

struct SoftClamp {
  static Squashed at(float r, const Constants& k) {
    const float d = 1.0f / (1.0f + absolute(r) * k.inverse_clamp);
    return {r * d, d * d};
  }
};

struct LogOfSigmoid {
  static Squashed at(float r, const Constants&) {
    const LogSigmoid s = vector_log_sigmoid(r + 2.0f);
    return {s.value, s.derivative};
  }
};

struct LogOfSigmoidPlusEps {
  static Squashed at(float r, const Constants& k) {
    const Sigmoid s = vector_sigmoid(r + 2.0f);
    const float scale = s.value + k.eps;
    return {vector_log(scale), s.other * s.value / scale};
  }
};

// v to v·e^s + t or (v + t)·e^s, the inverse being the other order with both signs changed: those of
// s are in `bound`, those of t in shift_factor.
template <class Squash, bool shift_first>
void couple(int64_t count, const Constants& constants, const float* HYBRIDFLOW_RESTRICT v,
            const float* HYBRIDFLOW_RESTRICT raw, const float* HYBRIDFLOW_RESTRICT shift,
            const float* HYBRIDFLOW_RESTRICT bound, float* HYBRIDFLOW_RESTRICT out,
            float* HYBRIDFLOW_RESTRICT log_scale) {
  const Constants k = constants;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const float s = bound[j] * Squash::at(k.raw_factor * raw[j], k).value;
    const float t = k.shift_factor * shift[j], e = vector_exp(s);
    out[j] = shift_first ? (v[j] + t) * e : v[j] * e + t;
    log_scale[j] = s;
  }
}

// From the output; `recover` also gives the input v, which only actnorm's gradients need.
template <class Squash, bool shift_first, bool recover>
void couple_gradients(int64_t count, const Constants& constants,
                      const float* HYBRIDFLOW_RESTRICT out, const float* HYBRIDFLOW_RESTRICT grad,
                      const float* HYBRIDFLOW_RESTRICT grad_log_det,
                      const float* HYBRIDFLOW_RESTRICT raw, const float* HYBRIDFLOW_RESTRICT shift,
                      const float* HYBRIDFLOW_RESTRICT bound, float* HYBRIDFLOW_RESTRICT v,
                      float* HYBRIDFLOW_RESTRICT grad_v, float* HYBRIDFLOW_RESTRICT grad_raw,
                      float* HYBRIDFLOW_RESTRICT grad_shift, float* HYBRIDFLOW_RESTRICT sum_gain) {
  const Constants k = constants;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const Squashed f = Squash::at(k.raw_factor * raw[j], k);
    const float s = bound[j] * f.value, t = k.shift_factor * shift[j];
    ExpPair e;
    if constexpr (recover)
      e = vector_exp_pair(s);
    else
      e.value = vector_exp(s);
    const float scaled = shift_first ? out[j] : out[j] - t;
    if constexpr (recover) v[j] = shift_first ? scaled * e.inverse - t : scaled * e.inverse;
    const float g = grad[j], ge = g * e.value, gs = g * scaled + grad_log_det[j];
    grad_v[j] = ge;
    grad_shift[j] = k.shift_factor * (shift_first ? ge : g);
    grad_raw[j] = k.raw_factor * (gs * bound[j] * f.slope);
    sum_gain[j] += gs * f.value;
  }
}

struct Loops {
  decltype(&couple<Plain, false>) map;
  decltype(&couple_gradients<Plain, false, false>) gradients;
};

template <class Squash>
Loops loops(bool shift_first, bool recover) {
  if (shift_first)
    return {couple<Squash, true>, recover ? couple_gradients<Squash, true, true>
                                          : couple_gradients<Squash, true, false>};
  return {couple<Squash, false>, recover ? couple_gradients<Squash, false, true>
                                         : couple_gradients<Squash, false, false>};
}

enum Scale : int64_t {  // in the order of form.py
  kExp,
  kTanh,
  kAtan,
  kTwoSigmoid,
  kSoftClamp,
  kSigmoid,
  kInverseSigmoid
};

Loops choose_loops(int64_t scale, bool has_eps, bool shift_first, bool recover) {
  switch (scale) {
    case kTanh:
    case kTwoSigmoid:  // 2σ(r) - 1 = tanh(r / 2)
      return loops<HyperbolicTangent>(shift_first, recover);
    case kAtan: return loops<ArcTangent>(shift_first, recover);
    case kSoftClamp: return loops<SoftClamp>(shift_first, recover);
    case kSigmoid:
    case kInverseSigmoid:
      return has_eps ? loops<LogOfSigmoidPlusEps>(shift_first, recover)
                     : loops<LogOfSigmoid>(shift_first, recover);
  }
  return loops<Plain>(shift_first, recover);
}

float amplitude(int64_t scale, double clamp) {
  switch (scale) {
    case kTanh:
    case kTwoSigmoid: return static_cast<float>(clamp);
    case kAtan: return static_cast<float>(0.636 * clamp);
    case kInverseSigmoid: return -1.0f;
  }
  return 1.0f;
}

struct Coupling {
  Coupling(const Shape& shape, int64_t moved, int64_t scale, bool shift_first, bool interleaved,
           bool shift_leads, double clamp, double eps, double factor, const float* gain_or_null,
           bool inverse, bool has_norm)
      : sign(inverse ? -1.0f : 1.0f),
        gain(gain_or_null),
        loops(choose_loops(scale, eps > 0.0, shift_first != inverse, has_norm && !inverse)) {
    k.raw_factor = static_cast<float>(scale == kTwoSigmoid ? 0.5 * factor : factor);
    k.shift_factor = sign * static_cast<float>(factor);
    k.amplitude = amplitude(scale, clamp);
    k.inverse_clamp = static_cast<float>(1.0 / clamp);
    k.eps = static_cast<float>(eps);
    const int64_t step = interleaved ? 2 : 1, second = interleaved ? 1 : moved;
    raw = {2 * moved, shift_leads ? second : 0, step, nullptr};
    shift = {2 * moved, shift_leads ? 0 : second, step, nullptr};
    inner = shape.inner;
  }

  Array raw_of(void* params, int64_t type) const { return {params, type, inner, raw}; }
  Array shift_of(void* params, int64_t type) const { return {params, type, inner, shift}; }

  // What squash(raw) is multiplied by in the executed direction's s.
  void spread_bound(const Block& block, float* to) const {
    const float whole = sign * k.amplitude;
    spread(block, [&](int64_t j) { return gain == nullptr ? whole : whole * gain[j]; }, to);
  }

  float sign;
  const float* gain;
  Loops loops;
  Constants k;
  Columns raw, shift;
  int64_t inner;
};

// --- the split -----------------------------------------------------------------------------------

class Split {
 public:
  Split(const Shape& shape, int64_t moved_channels, bool flip, const int64_t* index)
      : valid(true), permutation_(index == nullptr ? 0 : shape.channels) {
    const int64_t n = shape.channels, kept_channels = n - moved_channels;
    if (index != nullptr) valid = copy_permutation(index, n);
    const int64_t* order = index == nullptr ? nullptr : permutation_.get();
    kept = {kept_channels, {n, flip ? moved_channels : 0, 1, order}};
    const int64_t* moved_order = order == nullptr ? nullptr : order + kept_channels;
    moved = {moved_channels, {n, flip ? 0 : kept_channels, 1, moved_order}};
  }

  bool valid;
  Part kept, moved;

 private:
  // A copy, so that what has been checked is what is used.
  bool copy_permutation(const int64_t* index, int64_t n) {
    const Memory<bool> seen(n);
    for (int64_t j = 0; j < n; ++j) seen[j] = false;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t channel = index[j];
      if (channel < 0 || channel >= n || seen[channel]) return false;
      seen[channel] = true;
      permutation_[j] = channel;
    }
    return true;
  }

  Memory<int64_t> permutation_;
};

void copy_tile(int64_t count, const float* from, float* to) {
  if (from != to) std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

void map_kept(const Shape& shape, const Part& part, const Block& block, int64_t first, int64_t end,
              const Norm& norm, const Array& x, const Array& out) {
  const NormTile norms(norm, part, block);
  Buffer<float> from, to;
  block.for_each_tile(first * shape.outer, end * shape.outer, [&](const Tile& tile) {
    const float* v = load(x, tile, from);
    float* y = target(out, tile, to);
    if (norm.present)
      norms.map(tile.count(), v, y);
    else
      copy_tile(tile.count(), v, y);
    store(out, tile, y);
  });
}

void gradients_kept(const Shape& shape, const Part& part, const Block& block, int64_t chunk,
                    int64_t first, int64_t end, const Norm& norm, const Array& out,
                    const Array& grad, const Array& grad_x, const Sums& sums) {
  NormTile norms(norm, part, block);
  norms.start_gradients(part, block);
  Buffer<float> from_out, from_grad, to;
  block.for_each_tile(first * shape.outer, end * shape.outer, [&](const Tile& tile) {
    const float* g = load(grad, tile, from_grad);
    float* gx = target(grad_x, tile, to);
    if (norm.present)
      norms.gradients(tile.count(), load(out, tile, from_out), g, gx);
    else
      copy_tile(tile.count(), g, gx);
    store(grad_x, tile, gx);
  });
  norms.finish(part, block, sums, chunk);
}

}  // namespace

// x, log_scale, bias, index or null -> a, (samples, channels - moved, ...), as reference.identity.
HYBRIDFLOW_CHECKED_KERNEL(actnorm_identity)
(void* x, const float* log_scale, const float* bias, const int64_t* index, void* a, int64_t x_type,
 int64_t samples, int64_t channels, int64_t outer, int64_t inner, int64_t moved, int64_t flip,
 int64_t norm_shift_first, int64_t threads) {
  const Shape shape{samples, channels, outer, inner};
  const Split split(shape, moved, flip != 0, index);
  if (!split.valid) return 0;
  const Norm norm(log_scale, bias, channels, norm_shift_first != 0, false);
  const Part& kept = split.kept;
  const Array from{x, x_type, inner, kept.columns};
  const Array to{a, x_type, inner, {kept.channels, 0, 1, nullptr}};
  const Chunks chunks(shape);
  for_each_item(
      shape, chunks, Blocks(shape, chunks, kept), Blocks(shape, chunks, {}), threads,
      [&](const Block& block, int64_t, int64_t first, int64_t end) {
        map_kept(shape, kept, block, first, end, norm, from, to);
      },
      [](const Block&, int64_t, int64_t, int64_t) {});
  return 1;
}

// As reference.identity_backward.
HYBRIDFLOW_CHECKED_KERNEL(actnorm_identity_backward)
(void* grad, void* a, const float* log_scale, const float* bias, const int64_t* index, void* grad_kept,
 float* grad_log_scale, float* grad_bias, int64_t x_type, int64_t samples, int64_t channels,
 int64_t outer, int64_t inner, int64_t moved, int64_t flip, int64_t norm_shift_first,
 int64_t threads) {
  const Shape shape{samples, channels, outer, inner};
  const Split split(shape, moved, flip != 0, index);
  if (!split.valid) return 0;
  const Norm norm(log_scale, bias, channels, norm_shift_first != 0, false);
  const Part& kept = split.kept;
  const Columns columns{kept.channels, 0, 1, nullptr};
  const Array from_out{a, x_type, inner, columns}, from_grad{grad, x_type, inner, columns};
  const Array to{grad_kept, x_type, inner, columns};
  const Chunks chunks(shape);
  const Sums sums(shape, chunks);
  for_each_item(
      shape, chunks, Blocks(shape, chunks, kept), Blocks(shape, chunks, split.moved), threads,
      [&](const Block& block, int64_t chunk, int64_t first, int64_t end) {
        gradients_kept(shape, kept, block, chunk, first, end, norm, from_out, from_grad, to, sums);
      },
      [&](const Block& block, int64_t chunk, int64_t, int64_t) {
        for (int64_t j = 0; j < block.channels; ++j) {
          const int64_t channel = split.moved.columns[block.channel + j];
          sums.at(chunk, kLogScale)[channel] = sums.at(chunk, kBias)[channel] = 0.0f;
        }
      });
  norm.finish(sums, channels, 0.0, grad_log_scale, grad_bias);
  return 1;
}

// As reference.map; params, log_scale with bias, gain, log_det_in and index may be null.
HYBRIDFLOW_CHECKED_KERNEL(actnorm_coupling)
(void* x, void* params, const float* log_scale, const float* bias, const float* gain,
 const float* log_det_in, const int64_t* index, void* out, float* log_det, int64_t x_type,
 int64_t params_type, int64_t samples, int64_t channels, int64_t outer, int64_t inner,
 int64_t moved, int64_t flip, int64_t inverse, int64_t norm_shift_first, int64_t scale,
 int64_t shift_first, int64_t interleaved, int64_t shift_leads, double clamp, double eps,
 double factor, int64_t threads) {
  const Shape shape{samples, channels, outer, inner};
  const Split split(shape, moved, flip != 0, index);
  if (!split.valid) return 0;
  const Norm norm(log_scale, bias, channels, norm_shift_first != 0, inverse != 0);
  const Coupling coupling(shape, moved, scale, shift_first != 0, interleaved != 0,
                          shift_leads != 0, clamp, eps, factor, gain, inverse != 0, norm.present);
  const Array from_kept{x, x_type, inner, split.kept.columns};
  const Array to_kept{out, x_type, inner, split.kept.columns};
  const Array from{x, x_type, inner, split.moved.columns};
  const Array to{out, x_type, inner, split.moved.columns};
  const Array raw = coupling.raw_of(params, params_type);
  const Array shift = coupling.shift_of(params, params_type);
  const Chunks chunks(shape);
  const Blocks blocks(shape, chunks, split.moved);
  const Memory<float> sums(blocks.count * samples);  // of s per block and sample

  for_each_item(
      shape, chunks, Blocks(shape, chunks, split.kept), blocks, threads,
      [&](const Block& block, int64_t, int64_t first, int64_t end) {
        map_kept(shape, split.kept, block, first, end, norm, from_kept, to_kept);
      },
      [&](const Block& block, int64_t, int64_t first, int64_t end) {
        const NormTile norms(norm, split.moved, block);
        Buffer<float> bound;
        coupling.spread_bound(block, bound);
        Buffer<float> from_x, from_raw, from_shift;
        Buffer<float> between, to_out, s;
        float* own = sums + block.number * samples;
        fill(0.0f, end - first, own + first);
        block.for_each_tile(first * outer, end * outer, [&](const Tile& tile) {
          const int64_t n = tile.count();
          const float* v = load(from, tile, from_x);
          const float* r = load(raw, tile, from_raw);
          const float* t = load(shift, tile, from_shift);
          float* y = target(to, tile, to_out);
          if (norm.present && inverse == 0) {
            norms.map(n, v, between);
            coupling.loops.map(n, coupling.k, between, r, t, bound, y, s);
          } else if (norm.present) {
            coupling.loops.map(n, coupling.k, v, r, t, bound, between, s);
            norms.map(n, between, y);
          } else {
            coupling.loops.map(n, coupling.k, v, r, t, bound, y, s);
          }
          store(to, tile, y);
          add_by_sample(shape, tile, s, own);
        });
      });

  const double of_norm = norm.present ? sum_double(log_scale, channels) : 0.0;
  const float constant = norm.sign * static_cast<float>(of_norm * static_cast<double>(outer * inner));
  for (int64_t b = 1; b < blocks.count; ++b) add(sums + b * samples, samples, sums);
  for (int64_t i = 0; i < samples; ++i) {
    const float own = constant + (blocks.count > 0 ? sums[i] : 0.0f);
    log_det[i] = log_det_in == nullptr ? own : log_det_in[i] + own;
  }
  return 1;
}

// As reference.gradients; params, log_scale with bias, gain and index may be null, and what belongs
// to them is then null as well.
HYBRIDFLOW_CHECKED_KERNEL(actnorm_coupling_backward)
(void* grad, const float* grad_log_det, void* out, void* params, const float* log_scale,
 const float* bias, const float* gain, const int64_t* index, void* grad_x, void* grad_params,
 float* grad_log_scale, float* grad_bias, float* grad_gain, int64_t x_type, int64_t params_type,
 int64_t samples, int64_t channels, int64_t outer, int64_t inner, int64_t moved, int64_t flip,
 int64_t inverse, int64_t norm_shift_first, int64_t scale, int64_t shift_first,
 int64_t interleaved, int64_t shift_leads, double clamp, double eps, double factor,
 int64_t threads) {
  const Shape shape{samples, channels, outer, inner};
  const Split split(shape, moved, flip != 0, index);
  if (!split.valid) return 0;
  const Norm norm(log_scale, bias, channels, norm_shift_first != 0, inverse != 0);
  const Coupling coupling(shape, moved, scale, shift_first != 0, interleaved != 0,
                          shift_leads != 0, clamp, eps, factor, gain, inverse != 0, norm.present);
  const Columns& kept = split.kept.columns;
  const Array out_kept{out, x_type, inner, kept}, grad_kept{grad, x_type, inner, kept};
  const Array grad_x_kept{grad_x, x_type, inner, kept};
  const Columns& columns = split.moved.columns;
  const Array out_moved{out, x_type, inner, columns}, grad_moved{grad, x_type, inner, columns};
  const Array grad_x_moved{grad_x, x_type, inner, columns};
  const Array raw = coupling.raw_of(params, params_type);
  const Array shift = coupling.shift_of(params, params_type);
  const Array grad_raw = coupling.raw_of(grad_params, params_type);
  const Array grad_shift = coupling.shift_of(grad_params, params_type);
  const Chunks chunks(shape);
  const Sums sums(shape, chunks);

  for_each_item(
      shape, chunks, Blocks(shape, chunks, split.kept), Blocks(shape, chunks, split.moved), threads,
      [&](const Block& block, int64_t chunk, int64_t first, int64_t end) {
        gradients_kept(shape, split.kept, block, chunk, first, end, norm, out_kept, grad_kept,
                       grad_x_kept, sums);
      },
      [&](const Block& block, int64_t chunk, int64_t first, int64_t end) {
        NormTile norms(norm, split.moved, block);
        norms.start_gradients(split.moved, block);
        Buffer<float> bound, sum_gain, g_log_det;
        coupling.spread_bound(block, bound);
        fill(0.0f, block.count(), sum_gain);
        Buffer<float> from_out, from_grad, from_raw, from_shift;
        Buffer<float> v_between, g_between;
        Buffer<float> to_x, to_raw, to_shift;
        block.for_each_tile(first * outer, end * outer, [&](const Tile& tile) {
          const int64_t n = tile.count();
          const float* v = load(out_moved, tile, from_out);
          const float* g = load(grad_moved, tile, from_grad);
          const float* r = load(raw, tile, from_raw);
          const float* t = load(shift, tile, from_shift);
          float* gx = target(grad_x_moved, tile, to_x);
          float* gr = target(grad_raw, tile, to_raw);
          float* gt = target(grad_shift, tile, to_shift);
          spread_by_sample(shape, tile, grad_log_det, g_log_det);
          if (norm.present && inverse == 0) {
            coupling.loops.gradients(n, coupling.k, v, g, g_log_det, r, t, bound, v_between,
                                     g_between, gr, gt, sum_gain);
            norms.gradients(n, v_between, g_between, gx);
          } else if (norm.present) {
            norms.gradients(n, v, g, g_between);
            norms.invert(n, v, v_between);
            coupling.loops.gradients(n, coupling.k, v_between, g_between, g_log_det, r, t, bound,
                                     nullptr, gx, gr, gt, sum_gain);
          } else {
            coupling.loops.gradients(n, coupling.k, v, g, g_log_det, r, t, bound, nullptr, gx, gr,
                                     gt, sum_gain);
          }
          store(grad_x_moved, tile, gx);
          store(grad_raw, tile, gr);
          store(grad_shift, tile, gt);
        });
        norms.finish(split.moved, block, sums, chunk);
        float* to_gain = sums.at(chunk, kGain);
        gather_sums(block, sum_gain, [&](int64_t j, float value) { to_gain[j] = value; });
      });

  const double positions = static_cast<double>(outer * inner);
  norm.finish(sums, channels, positions * sum_double(grad_log_det, samples), grad_log_scale,
              grad_bias);
  if (gain != nullptr) sums.total(kGain, coupling.sign * coupling.k.amplitude, moved, grad_gain);
  return 1;
}
