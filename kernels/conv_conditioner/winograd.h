// The conditioner with fewer products than its convolutions have: a block of positions at a time, with
// points of both directions in place of the nine taps.
//
// Winograd's F(4, 3): polynomials of four and three coefficients have a product of six, so six products of
// their values at six points do for the twelve of their coefficients, and 36 for the 144 of a block of 4x4.
// Of a line with two positions, outside of which there is nothing, three products do for four. With G, A and
// B below, and for the taps w of a line, hidden values h at its positions and inputs d at these and, in a
// longer line, at their two neighbours:
//   gather:             h = Aᵀ (G w · Bᵀ d)
//   scatter:            what h adds to d = B (G w · A h)
//   weights' gradient:  w̄ = Gᵀ (A h · Bᵀ d)
// Blocks take each on both sides. What has few channels is turned once, into and from planes of points; the
// hidden layer by Aᵀ and A, which are cheap, between two products.
//
// Blocks come in batches of whole images, in as few groups of kPanel as they fill. What has few channels lies
// as (point, channel, block). So does the hidden layer of the forward; that of the backward lies as (point,
// block, hidden row), in panels of hidden rows, of which the weights' gradients are sums of outer products.
// An item of work is a chunk of batches and a range of hidden rows, as in native.cpp.
#pragma once

#include "conv_conditioner/net.h"
#include "native/denormals.h"
#include "native/handover.h"
#include "native/memory.h"
#include "native/native.h"

namespace {

namespace winograd {

constexpr int64_t kTaps = 3;
// Rows of a panel whose points are made at a time: hidden rows in the forward, blocks in the backward.
#if defined(__AVX512F__)
constexpr int kRawRows = 8;
#else
constexpr int kRawRows = 4;
#endif
constexpr int64_t kTilesHeld = kPanel / kRawRows;
constexpr float kRoot = 1.41421356237309505f;

// --- along a line --------------------------------------------------------------------------------

// F(4, 3) at 0, ±1/√2, ±√2 and ∞, which are off by half as much as 0, ±1, ±2 and ∞.
struct LineOfFour {
  static constexpr int span = 4, points = 6, margin = 1;
  static constexpr int64_t transforms = 250;  // operations on a hidden block, each counted as a product

  // G.
  static constexpr float of_taps[points][kTaps] = {
      {1, 0, 0},
      {-2.0f / 3, -kRoot / 3, -1.0f / 3},
      {-2.0f / 3, kRoot / 3, -1.0f / 3},
      {1.0f / 6, kRoot / 6, 1.0f / 3},
      {1.0f / 6, -kRoot / 6, 1.0f / 3},
      {0, 0, 1},
  };

  // Bᵀ d.
  static HYBRIDFLOW_INLINE void to_points(const Lanes* d, Lanes* p) {
    const Lanes even1 = d[4] - 2.0f * d[2], odd1 = d[3] - 2.0f * d[1];
    const Lanes even2 = d[4] - 0.5f * d[2], odd2 = d[3] - 0.5f * d[1];
    p[0] = d[0] - 2.5f * d[2] + d[4];
    p[1] = even1 + kRoot / 2 * odd1;
    p[2] = even1 - kRoot / 2 * odd1;
    p[3] = even2 + kRoot * odd2;
    p[4] = even2 - kRoot * odd2;
    p[5] = d[1] - 2.5f * d[3] + d[5];
  }

  // B p.
  static HYBRIDFLOW_INLINE void from_points(const Lanes* p, Lanes* d) {
    const Lanes sum1 = p[1] + p[2], difference1 = p[1] - p[2];
    const Lanes sum2 = p[3] + p[4], difference2 = p[3] - p[4];
    d[0] = p[0];
    d[1] = p[5] - kRoot * difference1 - kRoot / 2 * difference2;
    d[2] = -2.5f * p[0] - 2.0f * sum1 - 0.5f * sum2;
    d[3] = -2.5f * p[5] + kRoot / 2 * difference1 + kRoot * difference2;
    d[4] = p[0] + sum1 + sum2;
    d[5] = p[5];
  }

  // Aᵀ p.
  static HYBRIDFLOW_INLINE void to_span(const Lanes* p, Lanes* h) {
    const Lanes sum1 = p[1] + p[2], odd1 = kRoot / 2 * (p[1] - p[2]);
    const Lanes sum2 = p[3] + p[4], odd2 = kRoot * (p[3] - p[4]);
    h[0] = p[0] + sum1 + sum2;
    h[1] = odd1 + odd2;
    h[2] = 0.5f * sum1 + 2.0f * sum2;
    h[3] = 0.5f * odd1 + 2.0f * odd2 + p[5];
  }

  // A h.
  static HYBRIDFLOW_INLINE void from_span(const Lanes* h, Lanes* p) {
    const Lanes even1 = h[0] + 0.5f * h[2], odd1 = h[1] + 0.5f * h[3];
    const Lanes even2 = h[0] + 2.0f * h[2], odd2 = h[1] + 2.0f * h[3];
    p[0] = h[0];
    p[1] = even1 + kRoot / 2 * odd1;
    p[2] = even1 - kRoot / 2 * odd1;
    p[3] = even2 + kRoot * odd2;
    p[4] = even2 - kRoot * odd2;
    p[5] = h[3];
  }
};

// The whole of a line of two positions.
struct LineOfTwo {
  static constexpr int span = 2, points = 3, margin = 0;
  static constexpr int64_t transforms = 25;

  static constexpr float of_taps[points][kTaps] = {{0, 1, 0}, {0, -1, 1}, {1, -1, 0}};

  static HYBRIDFLOW_INLINE void to_points(const Lanes* d, Lanes* p) {
    p[0] = d[0] + d[1];
    p[1] = d[1];
    p[2] = d[0];
  }
  static HYBRIDFLOW_INLINE void from_points(const Lanes* p, Lanes* d) {
    d[0] = p[0] + p[2];
    d[1] = p[0] + p[1];
  }
  static HYBRIDFLOW_INLINE void to_span(const Lanes* p, Lanes* h) {
    h[0] = p[0] + p[1];
    h[1] = p[0] + p[2];
  }
  static HYBRIDFLOW_INLINE void from_span(const Lanes* h, Lanes* p) {
    p[0] = h[0] + h[1];
    p[1] = h[0];
    p[2] = h[1];
  }
};

template <class Line>
constexpr int kPositions = Line::span * Line::span;  // of a block
template <class Line>
constexpr int kPoints = Line::points * Line::points;

// --- images to planes of points and back ---------------------------------------------------------

template <class Line>
struct Blocks {
  int64_t samples, height, width;
  int64_t down, across;     // blocks of an image
  int64_t images, batches;  // images of a batch
  int64_t groups, lanes;    // of a batch, with those that stay empty
  int64_t edge;             // lanes before and after those of a batch, for neighbours
  Memory<int64_t> image, place;  // of each lane: which image of the batch, and where the block begins
  Memory<uint32_t> left, right, above, below;  // whether there is a block next to it, as masks

  Blocks(int64_t samples, int64_t height, int64_t width)
      : samples(samples),
        height(height),
        width(width),
        down(height / Line::span),
        across(width / Line::span),
        images(std::max<int64_t>(1, kPanel / std::max<int64_t>(1, down * across))),
        batches(ratio_up(samples, images)),
        groups(ratio_up(images * down * across, kPanel)),
        lanes(groups * kPanel),
        edge(Scratch::rounded(across)),
        image(lanes),
        place(lanes),
        left(lanes),
        right(lanes),
        above(lanes),
        below(lanes) {}

  bool fits() const {
    if (height % Line::span != 0 || width % Line::span != 0) return false;
    return Line::margin > 0 || (height == Line::span && width == Line::span);
  }

  void find_places() {
    const int64_t each = down * across;
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t y = l % each / across, x = l % across;
      const bool empty = l >= images * each;
      const auto mask = [&](bool neighbour) { return neighbour && !empty ? ~0u : 0u; };
      image[l] = l / each;
      place[l] = (y * width + x) * Line::span;
      left[l] = mask(x > 0);
      right[l] = mask(x < across - 1);
      above[l] = mask(y > 0);
      below[l] = mask(y < down - 1);
    }
  }

  int64_t positions() const { return height * width; }
  int64_t all_groups() const { return batches * groups; }
  int64_t first(int64_t batch) const { return batch * images; }
  int64_t present(int64_t batch) const {
    return std::min(images, samples - first(batch)) * down * across;
  }
  int64_t stride() const { return lanes + 2 * edge; }
  int64_t room() const {
    constexpr int side = Line::span + 2 * Line::margin;
    return side * (Line::span + Line::points) * stride() + 2 * edge;
  }
};

// How the panels of a group lie: (point, channel). A little more than that, for points not to lie at the
// same place of a page.
template <class Line>
struct Planes {
  int64_t channels;

  int64_t at(int64_t point) const { return point * (channels * kPanel + 16); }
  int64_t floats() const { return at(kPoints<Line>); }
};

inline Lanes masked(Lanes value, const uint32_t* mask) {
  BitLanes bits;
  std::memcpy(&bits, mask, sizeof bits);
  return (Lanes)((BitLanes)value & bits);
}

// The positions of blocks in an image's channel, four at a time: f(where they begin, number of the first).
template <class Line, class F>
HYBRIDFLOW_INLINE void each_four(const Blocks<Line>& blocks, const F& f) {
  for (int64_t k = 0; k < kPositions<Line>; k += 4) f(k / 4 * blocks.width, k);
}

// Makes the planes of these channels, in all groups of a batch, in `room` for lines of lanes. Lanes without a
// block are zero.
template <class Line>
void stage(const Blocks<Line>& blocks, const Source& source, const Planes<Line>& planes,
           int64_t batch, Range channels, float* room, float* to) {
  constexpr int span = Line::span, points = Line::points, margin = Line::margin;
  const int64_t stride = blocks.stride(), across = blocks.across, present = blocks.present(batch);
  const int64_t plane = blocks.positions(), image = source.channels * plane;
  float* core = room + blocks.edge;                 // (row, column)
  float* lines = core + kPositions<Line> * stride;  // (row, point)
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const float* from = source.data + blocks.first(batch) * image + c * plane;
    each_four(blocks, [&](int64_t offset, int64_t k) {
      float* four = core + k * stride;
      int64_t l = 0;
      for (; l + 4 <= present; l += 4) {
        Quad quads[4];
        for (int64_t i = 0; i < 4; ++i)
          std::memcpy(quads + i, from + blocks.image[l + i] * image + blocks.place[l + i] + offset,
                      sizeof(Quad));
        transpose(quads);
        for (int64_t i = 0; i < 4; ++i) std::memcpy(four + i * stride + l, quads + i, sizeof(Quad));
      }
      for (; l < blocks.lanes; ++l)
        for (int64_t i = 0; i < 4; ++i)
          four[i * stride + l] =
              l < present ? from[blocks.image[l] * image + blocks.place[l] + offset + i] : 0.0f;
    });
    for (int64_t i = 0; i < span; ++i)
      for (int64_t l = 0; l < blocks.lanes; l += kLanes) {
        const float* row = core + i * span * stride + l;
        Lanes d[span + 2 * margin], p[points];
        for (int j = 0; j < span; ++j) d[margin + j] = load(row + j * stride);
        if constexpr (margin > 0) {
          d[0] = masked(load(row + (span - 1) * stride - 1), blocks.left + l);
          d[span + 1] = masked(load(row + 1), blocks.right + l);
        }
        Line::to_points(d, p);
        for (int j = 0; j < points; ++j) store(p[j], lines + (i * points + j) * stride + l);
      }
    for (int64_t j = 0; j < points; ++j)
      for (int64_t l = 0; l < blocks.lanes; l += kLanes) {
        const float* column = lines + j * stride + l;
        Lanes d[span + 2 * margin], p[points];
        for (int i = 0; i < span; ++i) d[margin + i] = load(column + i * points * stride);
        if constexpr (margin > 0) {
          d[0] = masked(load(column + (span - 1) * points * stride - across), blocks.above + l);
          d[span + 1] = masked(load(column + across), blocks.below + l);
        }
        Line::to_points(d, p);
        float* own = to + l / kPanel * planes.floats() + c * kPanel + l % kPanel;
        for (int i = 0; i < points; ++i) store(p[i], own + planes.at(i * points + j));
      }
  }
}

// Of planes as one range of hidden rows gives them or, `each` apart, so many; to is (samples, channels,
// height, width).
template <class Line>
void unstage(const Blocks<Line>& blocks, const Planes<Line>& planes, const float* from,
             int64_t splits, int64_t each, int64_t batch, Range channels, const float* bias,
             float* room, float* to) {
  constexpr int span = Line::span, points = Line::points, margin = Line::margin;
  constexpr int side = span + 2 * margin;
  const int64_t stride = blocks.stride(), across = blocks.across, present = blocks.present(batch);
  const int64_t plane = blocks.positions(), image = planes.channels * plane;
  float* core = room + blocks.edge;            // (row, column of the block and around it)
  float* lines = core + span * side * stride;  // (row of the block and around it, point)
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    for (int64_t j = 0; j < points; ++j)
      for (int64_t l = 0; l < blocks.lanes; l += kLanes) {
        const float* own = from + l / kPanel * planes.floats() + c * kPanel + l % kPanel;
        Lanes p[points], d[side];
        for (int i = 0; i < points; ++i) {
          const float* sums = own + planes.at(i * points + j);
          p[i] = load(sums);
          for (int64_t split = 1; split < splits; ++split) p[i] += load(sums + split * each);
        }
        Line::from_points(p, d);
        for (int i = 0; i < side; ++i) store(d[i], lines + (i * points + j) * stride + l);
      }
    for (int64_t i = 0; i < span; ++i)
      for (int64_t l = 0; l < blocks.lanes; l += kLanes) {
        Lanes p[points], d[side];
        for (int j = 0; j < points; ++j) {
          const float* column = lines + j * stride + l;
          p[j] = load(column + (margin + i) * points * stride);
          if constexpr (margin > 0) {
            if (i == 0)
              p[j] += masked(load(column + (side - 1) * points * stride - across), blocks.above + l);
            if (i == span - 1) p[j] += masked(load(column + across), blocks.below + l);
          }
        }
        Line::from_points(p, d);
        for (int j = 0; j < side; ++j) store(d[j], core + (i * side + j) * stride + l);
      }
    const Lanes shift = every<Lanes>(bias == nullptr ? 0.0f : bias[c]);
    for (int64_t i = 0; i < span; ++i)
      for (int64_t l = 0; l < blocks.lanes; l += kLanes) {
        float* row = core + i * side * stride + l;
        for (int j = 0; j < span; ++j) {
          Lanes value = load(row + (margin + j) * stride) + shift;
          if constexpr (margin > 0) {
            if (j == 0) value += masked(load(row + (side - 1) * stride - 1), blocks.left + l);
            if (j == span - 1) value += masked(load(row + 1), blocks.right + l);
          }
          store(value, row + (margin + j) * stride);
        }
      }
    float* own = to + blocks.first(batch) * image + c * plane;
    each_four(blocks, [&](int64_t offset, int64_t k) {
      const float* four[4];
      for (int64_t i = 0; i < 4; ++i)
        four[i] = core + ((k + i) / span * side + margin + (k + i) % span) * stride;
      int64_t l = 0;
      for (; l + 4 <= present; l += 4) {
        Quad quads[4];
        for (int64_t i = 0; i < 4; ++i) std::memcpy(quads + i, four[i] + l, sizeof(Quad));
        transpose(quads);
        for (int64_t i = 0; i < 4; ++i)
          std::memcpy(own + blocks.image[l + i] * image + blocks.place[l + i] + offset, quads + i,
                      sizeof(Quad));
      }
      for (; l < present; ++l)
        for (int64_t i = 0; i < 4; ++i)
          own[blocks.image[l] * image + blocks.place[l] + offset + i] = four[i][l];
    });
  }
}

constexpr int64_t kStagedTogether = 16;  // channels

// f(batch, channels) for all channels of all batches, by the threads of a team.
template <class Line, class F>
void each_part(const Blocks<Line>& blocks, int64_t channels, const F& f) {
  const int64_t parts = ratio_up(channels, kStagedTogether);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < blocks.batches * parts; ++i)
    f(i / parts, part_of(channels, parts, i % parts));
}

// --- weights -------------------------------------------------------------------------------------

constexpr int kWindow = kTaps * kTaps;

// Taps of windows that are `step` apart, side by side.
template <int wide>
HYBRIDFLOW_INLINE void read_windows(const Weights& weights, const float* from, int64_t step,
                                    int64_t count, float (*taps)[wide]) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) {
    const float* own = from + r * step;
    for (int64_t tap = 0; tap + 4 <= kWindow; tap += 4) {
      Quad quads[4];
      for (int64_t i = 0; i < 4; ++i) std::memcpy(quads + i, own + i * step + tap, sizeof(Quad));
      transpose(quads);
      for (int64_t i = 0; i < 4; ++i)
        std::memcpy(taps[weights.seen(tap + i)] + r, quads + i, sizeof(Quad));
    }
    for (int64_t i = 0; i < 4; ++i)
      taps[weights.seen(kWindow - 1)][r + i] = own[i * step + kWindow - 1];
  }
  for (; r < count; ++r)
    for (int64_t tap = 0; tap < kWindow; ++tap) taps[weights.seen(tap)][r] = from[r * step + tap];
}

// The same in the other direction.
template <int wide>
HYBRIDFLOW_INLINE void write_windows(const Weights& weights, const float (*taps)[wide],
                                     int64_t step, int64_t count, float* to) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) {
    float* own = to + r * step;
    for (int64_t tap = 0; tap + 4 <= kWindow; tap += 4) {
      Quad quads[4];
      for (int64_t i = 0; i < 4; ++i)
        std::memcpy(quads + i, taps[weights.seen(tap + i)] + r, sizeof(Quad));
      transpose(quads);
      for (int64_t i = 0; i < 4; ++i) std::memcpy(own + i * step + tap, quads + i, sizeof(Quad));
    }
    for (int64_t i = 0; i < 4; ++i)
      own[i * step + kWindow - 1] = taps[weights.seen(kWindow - 1)][r + i];
  }
  for (; r < count; ++r)
    for (int64_t tap = 0; tap < kWindow; ++tap) to[r * step + tap] = taps[weights.seen(tap)][r];
}

template <int wide>
struct Vector {
  typedef float type __attribute__((vector_size(wide * sizeof(float))));
};

// G w Gᵀ of windows side by side.
template <class Line, class V>
HYBRIDFLOW_INLINE void taps_to_points(const V* taps, V* points) {
#pragma GCC unroll 8
  for (int j = 0; j < Line::points; ++j) {
    V lines[kTaps];
#pragma GCC unroll 8
    for (int dy = 0; dy < kTaps; ++dy) {
      V sum = V{};
#pragma GCC unroll 8
      for (int dx = 0; dx < kTaps; ++dx)
        if (Line::of_taps[j][dx] != 0) sum += Line::of_taps[j][dx] * taps[dy * kTaps + dx];
      lines[dy] = sum;
    }
#pragma GCC unroll 8
    for (int i = 0; i < Line::points; ++i) {
      V sum = V{};
#pragma GCC unroll 8
      for (int dy = 0; dy < kTaps; ++dy)
        if (Line::of_taps[i][dy] != 0) sum += Line::of_taps[i][dy] * lines[dy];
      points[i * Line::points + j] = sum;
    }
  }
}

// Gᵀ p G.
template <class Line>
HYBRIDFLOW_INLINE void points_to_taps(const Lanes* points, Lanes* taps) {
  Lanes lines[Line::points][kTaps];
#pragma GCC unroll 8
  for (int i = 0; i < Line::points; ++i)
#pragma GCC unroll 8
    for (int dx = 0; dx < kTaps; ++dx) {
      Lanes sum = Lanes{};
#pragma GCC unroll 8
      for (int j = 0; j < Line::points; ++j)
        if (Line::of_taps[j][dx] != 0) sum += Line::of_taps[j][dx] * points[i * Line::points + j];
      lines[i][dx] = sum;
    }
#pragma GCC unroll 8
  for (int dy = 0; dy < kTaps; ++dy)
#pragma GCC unroll 8
    for (int dx = 0; dx < kTaps; ++dx) {
      Lanes sum = Lanes{};
#pragma GCC unroll 8
      for (int i = 0; i < Line::points; ++i)
        if (Line::of_taps[i][dy] != 0) sum += Line::of_taps[i][dy] * lines[i][dx];
      taps[dy * kTaps + dx] = sum;
    }
}

constexpr int64_t kWindowsRead = 8;  // before their use, for what was written in parts to have arrived
constexpr int kScatterWide = kTileRows > 8 ? 16 : 8;

template <class Line, int wide>
HYBRIDFLOW_INLINE void windows_to_points(const float (*taps)[wide],
                                         typename Vector<wide>::type* points) {
  typename Vector<wide>::type vectors[kWindow];
  std::memcpy(vectors, taps, sizeof vectors);
  taps_to_points<Line>(vectors, points);
}

// Of at most `wide` hidden rows: to[(point, channel) * step + row]. Where channels are `apart` there is room for
// as many, and those that are missing are zero; else step is their number.
template <class Line, int wide, bool apart>
void pack_gather(const Weights& weights, Range rows, int64_t step, float* to, bool past) {
  alignas(64) float taps[kWindowsRead][kWindow][wide] = {};
  alignas(64) float side_by_side[kPoints<Line>][kWindowsRead * wide];
  for (int64_t first = 0; first < weights.channels; first += kWindowsRead) {
    const int64_t count = std::min(kWindowsRead, weights.channels - first);
    for (int64_t k = 0; k < count; ++k)
      read_windows(weights,
                   weights.data + rows.begin * weights.row + (first + k) * weights.channel,
                   weights.row, rows.size(), taps[k]);
    for (int64_t k = 0; k < count; ++k) {
      typename Vector<wide>::type points[kPoints<Line>];
      windows_to_points<Line>(taps[k], points);
      float* own = to + (first + k) * step;
#pragma GCC unroll 36
      for (int p = 0; p < kPoints<Line>; ++p, own += weights.channels * step)
        if constexpr (apart)
          store(points[p], own, past);
        else  // the next one overwrites what is too much
          std::memcpy(side_by_side[p] + k * step, points + p, sizeof points[p]);
    }
    if constexpr (!apart)
      for (int64_t p = 0; p < kPoints<Line>; ++p)
        copy(side_by_side[p], count * step, to + (p * weights.channels + first) * step, past);
  }
}

// Of a point, for a panel of hidden rows; not a power of two, for what is written together not to fall into
// one set of the cache.
int64_t scatter_floats(int64_t channels) { return channels * kPanel + 48; }

// For at most kRawRows of a panel of hidden rows, from row `at` of it on: (point, tile of channels, hidden row,
// channel), a point `each` apart. A panel's weights lie together, or the processor would load, ahead, those of
// a panel that another thread has written. each_tile(f) calls f(channels, numbers that each row takes, at most
// `most`) for all tiles.
template <class Line, int64_t most, class EachTile>
void pack_scatter(const Weights& weights, const EachTile& each_tile, Range rows, int64_t at,
                  int64_t each, float* packed, bool past) {
  alignas(64) float taps[kRawRows][kWindow][kScatterWide] = {};
  float packed_rows[kPoints<Line>][kRawRows * most + kScatterWide];
  each_tile([&](Range channels, int64_t wide) {
    for (int64_t first = 0; first < channels.size(); first += kScatterWide) {
      const int64_t channel = channels.begin + first;
      const int64_t count = std::min<int64_t>(kScatterWide, channels.end - channel);
      for (int64_t k = 0; k < rows.size(); ++k)
        read_windows(weights,
                     weights.data + (rows.begin + k) * weights.row + channel * weights.channel,
                     weights.channel, count, taps[k]);
      // Whole vectors, of which the next one overwrites what is too much.
      for (int64_t k = 0; k < rows.size(); ++k) {
        typename Vector<kScatterWide>::type points[kPoints<Line>];
        windows_to_points<Line>(taps[k], points);
#pragma GCC unroll 36
        for (int p = 0; p < kPoints<Line>; ++p)
          std::memcpy(packed_rows[p] + k * wide + first, points + p, sizeof points[p]);
      }
    }
    float* to = packed + channels.begin * kPanel + at * wide;
    for (int64_t p = 0; p < kPoints<Line>; ++p, to += each)
      copy(packed_rows[p], rows.size() * wide, to, past);
  });
}

// --- products ------------------------------------------------------------------------------------

constexpr int64_t kRawStep = kRawRows * kPanel + 16;  // from point to point of a tile
constexpr int64_t kHeldStep = (kPanel + 3) * kPanel;  // and of the hidden layer that is held

// Into raw, (point, row of the tile): what a tile of hidden rows sees.
template <int rows, class Line>
HYBRIDFLOW_INLINE void gather(const Planes<Line>& planes, const float* staged, const float* packed,
                              float* raw) {
  for (int64_t p = 0; p < kPoints<Line>; ++p) {
    Tile<rows> tile;
    tile.clear();
    tile.add({packed + p * planes.channels * rows, staged + planes.at(p), planes.channels});
    tile.finish([&](Lanes sum, int64_t offset) { store(sum, raw + p * kRawStep + offset); });
  }
}

// Points of a hidden row, `step` apart, to the lines of its block: (row, point).
template <class Line>
HYBRIDFLOW_INLINE void to_lines(const float* from, int64_t step, Lanes* lines) {
#pragma GCC unroll 8
  for (int j = 0; j < Line::points; ++j) {
    Lanes p[Line::points], h[Line::span];
#pragma GCC unroll 8
    for (int i = 0; i < Line::points; ++i) p[i] = load(from + (i * Line::points + j) * step);
    Line::to_span(p, h);
#pragma GCC unroll 8
    for (int i = 0; i < Line::span; ++i) lines[i * Line::points + j] = h[i];
  }
}

template <class Line>
HYBRIDFLOW_INLINE void from_lines(const Lanes* lines, int64_t step, float* to) {
#pragma GCC unroll 8
  for (int j = 0; j < Line::points; ++j) {
    Lanes h[Line::span], p[Line::points];
#pragma GCC unroll 8
    for (int i = 0; i < Line::span; ++i) h[i] = lines[i * Line::points + j];
    Line::from_span(h, p);
#pragma GCC unroll 8
    for (int i = 0; i < Line::points; ++i) store(p[i], to + (i * Line::points + j) * step);
  }
}

// Raw points to the block's positions, and what f(position, value) makes of these to points.
template <class Line, class F>
HYBRIDFLOW_INLINE void at_positions(const float* raw, float* to, const F& f) {
  Lanes lines[Line::span * Line::points];
  to_lines<Line>(raw, kRawStep, lines);
#pragma GCC unroll 8
  for (int i = 0; i < Line::span; ++i) {
    Lanes h[Line::span];
    Line::to_span(lines + i * Line::points, h);
#pragma GCC unroll 8
    for (int j = 0; j < Line::span; ++j) h[j] = f(i * Line::span + j, h[j]);
    Line::from_span(h, lines + i * Line::points);
  }
  from_lines<Line>(lines, kHeldStep, to);
}

// The points of relu(first convolution) in a tile of hidden rows.
template <class Line>
HYBRIDFLOW_INLINE void hidden_points(const float* raw, int64_t rows, const float* bias, float* to) {
  for (int64_t l = 0; l < rows * kPanel; l += kLanes) {
    const Lanes shift = every<Lanes>(bias[l / kPanel]);
    at_positions<Line>(raw + l, to + l, [&](int, Lanes h) { return positive(h + shift); });
  }
}

// Into raw, (point, block of the tile, hidden row): what the hidden rows of a panel see of kRawRows blocks.
template <class Line>
HYBRIDFLOW_INLINE void gather_panel(const Planes<Line>& planes, const float* staged,
                                    const float* packed, float* raw) {
  for (int64_t p = 0; p < kPoints<Line>; ++p) {
    Tile<kRawRows> tile;
    tile.clear();
    tile.add({staged + planes.at(p), packed + p * planes.channels * kPanel, planes.channels}, kPanel);
    tile.finish([&](Lanes sum, int64_t offset) { store(sum, raw + p * kRawStep + offset); });
  }
}

// The points of relu(first convolution) for a panel of hidden rows in kRawRows blocks; values, (block, half of
// the panel, position), are its own.
template <class Line>
HYBRIDFLOW_INLINE void hidden_panel_points(const float* raw, const float* bias, float* to,
                                           Lanes* values) {
  for (int64_t l = 0; l < kRawRows * kPanel; l += kLanes, values += kPositions<Line>) {
    const Lanes shift = load(bias + l % kPanel);
    at_positions<Line>(raw + l, to + l,
                       [&](int k, Lanes h) { return values[k] = positive(h + shift); });
  }
}

// The same for its gradient, which is kept where the values are positive; sums, (hidden row), are of that.
template <class Line>
HYBRIDFLOW_INLINE void gradient_panel_points(const float* raw, const Lanes* values, float* to,
                                             float* sums) {
  for (int64_t l = 0; l < kRawRows * kPanel; l += kLanes, values += kPositions<Line>) {
    Lanes sum = load(sums + l % kPanel);
    at_positions<Line>(raw + l, to + l, [&](int k, Lanes grad) {
      const Lanes kept = where_positive(values[k], grad);
      sum += kept;
      return kept;
    });
    store(sum, sums + l % kPanel);
  }
}

// Adds what the hidden rows give to a group's planes, or writes it if they are fresh.
template <class Line>
void scatter(const Planes<Line>& planes, int64_t rows, const float* packed, const float* held,
             bool fresh, float* to) {
  const Parts parts(planes.channels, kTileRows);
  const int64_t each = scatter_floats(planes.channels);
  for (int64_t p = 0; p < kPoints<Line>; ++p)
    add_hidden(parts, kPanel, {0, rows}, packed + p * each, held + p * kHeldStep, fresh,
               to + planes.at(p));
}

// Of n channels that are left, how many lie side by side: as many as two registers have lanes, or one, or half
// of one, with room for those that are missing.
constexpr int64_t kLeastWide = 4;
inline int64_t wide_of(int64_t n) {
  if (n > kLanes + kLanes / 2) return 2 * kLanes;
  int64_t wide = kLanes;
  while (wide > kLeastWide && 2 * n <= wide) wide /= 2;
  return wide;
}

// f(channels, the numbers that they take) for all of them.
template <class F>
HYBRIDFLOW_INLINE void each_wide(int64_t channels, const F& f) {
  for (int64_t begin = 0; begin < channels;) {
    const int64_t wide = wide_of(channels - begin);
    f(Range{begin, std::min(begin + wide, channels)}, wide);
    begin += wide;
  }
}

inline int64_t padded(int64_t channels) {
  int64_t floats = 0;
  each_wide(channels, [&](Range, int64_t wide) { floats += wide; });
  return floats;
}

// f(std::integral_constant<int, wide>()).
template <int64_t most = 2 * kLanes, class F>
HYBRIDFLOW_INLINE void with_wide(int64_t wide, const F& f) {
  if constexpr (most > kLeastWide) {
    if (wide < most) return with_wide<most / 2>(wide, f);
  }
  f(std::integral_constant<int, most>());
}

// How what a group gives to the input lies: (point, block, channel).
template <class Line>
struct Rows {
  int64_t channels, step;

  explicit Rows(int64_t channels) : channels(channels), step(padded(channels)) {}
  int64_t at(int64_t point) const { return point * (step * kPanel + 16); }
  int64_t floats() const { return at(kPoints<Line>) + kLanes; }
};

// to[k * step + c] += the sum over the hidden rows r of held[k][r] weights[r][c], for kPanel blocks k; or =
// if the sums are `fresh`.
template <int wide>
HYBRIDFLOW_INLINE void add_to_rows(const float* held, const float* weights, int64_t hidden,
                                   int64_t step, bool fresh, float* to) {
  constexpr int lanes = wide > kLanes ? kLanes : wide, count = wide / lanes;
  constexpr int rows = 2 * kRawRows / count;
  typedef typename Vector<lanes>::type V;
  for (int64_t first = 0; first < kPanel; first += rows, held += rows * kPanel, to += rows * step) {
    V sum[rows][count] = {};
    for (int64_t r = 0; r < hidden; ++r) {
      V x[count];
#pragma GCC unroll 2
      for (int i = 0; i < count; ++i)
        std::memcpy(x + i, weights + r * wide + i * lanes, sizeof x[i]);
#pragma GCC unroll 16
      for (int k = 0; k < rows; ++k)
#pragma GCC unroll 2
        for (int i = 0; i < count; ++i) sum[k][i] += held[k * kPanel + r] * x[i];
    }
#pragma GCC unroll 16
    for (int k = 0; k < rows; ++k)
#pragma GCC unroll 2
      for (int i = 0; i < count; ++i) {
        V own;
        std::memcpy(&own, to + k * step + i * lanes, sizeof own);
        own = fresh ? sum[k][i] : own + sum[k][i];
        std::memcpy(to + k * step + i * lanes, &own, sizeof own);
      }
  }
}

// Adds what a panel of hidden rows gives to a group's rows, or writes it if they are fresh.
template <class Line>
void scatter_panel(const Rows<Line>& rows, int64_t hidden, const float* packed, const float* held,
                   bool fresh, float* to) {
  const int64_t each = scatter_floats(rows.step);
  each_wide(rows.channels, [&](Range channels, int64_t wide) {
    with_wide(wide, [&](auto constant) {
      const float* weights = packed + channels.begin * kPanel;
      for (int64_t p = 0; p < kPoints<Line>; ++p)
        add_to_rows<constant>(held + p * kHeldStep, weights + p * each, hidden, rows.step, fresh,
                              to + rows.at(p) + channels.begin);
    });
  });
}

// Planes of these channels of a group, from its rows as one range of hidden rows gives them or, `each` apart,
// so many.
template <class Line>
void rows_to_planes(const Rows<Line>& rows, const float* from, int64_t splits, int64_t each,
                    Range channels, const Planes<Line>& planes, float* to) {
  for (int64_t p = 0; p < kPoints<Line>; ++p)
    for (int64_t c = channels.begin; c < channels.end; c += kLanes)
      for (int64_t l = 0; l < kPanel; l += kLanes) {
        const float* own = from + rows.at(p) + l * rows.step + c;
        Lanes square[kLanes];  // of more channels than there are, at the end
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(own + i * rows.step);
        for (int64_t split = 1; split < splits; ++split)
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) square[i] += load(own + split * each + i * rows.step);
        transpose_lanes(square);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, channels.end - c); ++i)
          store(square[i], to + planes.at(p) + (c + i) * kPanel + l);
      }
}

// Multiplications and additions.
template <class Line>
double operations(const Net& net, const Blocks<Line>& blocks) {
  const double units = static_cast<double>(blocks.all_groups() * kPanel * net.hidden);
  const int64_t channels = net.inputs + net.outputs;
  return 2.0 * units * static_cast<double>(kPoints<Line> * channels + Line::transforms);
}

// --- forward -------------------------------------------------------------------------------------

template <class Line>
struct Forward {
  Net net;
  const Blocks<Line>& blocks;
  Source source;
  const float* bias1;
  const float* bias2;
  float* out;
  Parts hidden, panels;  // tiles of hidden rows, and panels of tiles
  Planes<Line> in, sums;
  int64_t splits;
  float* packed1 = nullptr;
  float* packed2 = nullptr;
  float* all_staged = nullptr;  // where hidden rows are split, of all batches
  float* all_sums = nullptr;    // the same, for each split

  Forward(const Net& net, const Blocks<Line>& blocks, const Source& source, const float* bias1,
          const float* bias2, float* out)
      : net(net),
        blocks(blocks),
        source(source),
        bias1(bias1),
        bias2(bias2),
        out(out),
        hidden(net.hidden, kRawRows),
        panels(hidden.count, kTilesHeld),
        in{net.inputs},
        sums{net.outputs},
        splits(splits_of(hidden, blocks.batches, flops())) {}

  double flops() const { return operations<Line>(net, blocks); }
  int64_t staged_floats() const { return blocks.groups * in.floats(); }  // of a batch
  int64_t sums_floats() const { return blocks.groups * sums.floats(); }
  int64_t panel_floats() const { return kPoints<Line> * scatter_floats(net.outputs); }

  void item(int64_t batch, int64_t split) const {
    constexpr int64_t held_floats = kPoints<Line> * kHeldStep;
    constexpr int64_t raw_floats = kPoints<Line> * kRawStep;
    own_scratch.reserve(Scratch::all(
        {held_floats, raw_floats, staged_floats(), sums_floats(), blocks.room()}));
    float* held = own_scratch.take(held_floats);
    float* raw = own_scratch.take(raw_floats);
    const Range own = part_of(panels.count, splits, split);
    if (splits > 1) {
      add_panels(own, all_staged + batch * staged_floats(), held, raw,
                all_sums + (split * blocks.batches + batch) * sums_floats());
      return;
    }
    float* staged = own_scratch.take(staged_floats());
    float* to = own_scratch.take(sums_floats());
    float* room = own_scratch.take(blocks.room());
    stage(blocks, source, in, batch, {0, net.inputs}, room, staged);
    add_panels(own, staged, held, raw, to);
    unstage(blocks, sums, to, 1, 0, batch, {0, net.outputs}, bias2, room, out);
  }

  // What panels of hidden rows give to the planes of a batch.
  void add_panels(Range own, const float* staged, float* held, float* raw, float* to) const {
    for (int64_t panel = own.begin; panel < own.end; ++panel) {
      const Range tiles{panels.begin(panel), panels.begin(panel + 1)};
      const Range rows = held_by(tiles, hidden);
      for (int64_t g = 0; g < blocks.groups; ++g) {
        for (int64_t t = tiles.begin; t < tiles.end; ++t) {
          const int64_t begin = hidden.begin(t);
          with_constant<kRawRows>(hidden.length(t), [&](auto constant) {
            gather<constant>(in, staged + g * in.floats(),
                             packed1 + begin * kPoints<Line> * net.inputs, raw);
            hidden_points<Line>(raw, constant, bias1 + begin, held + (begin - rows.begin) * kPanel);
          });
        }
        scatter(sums, rows.size(), packed2 + panel * panel_floats(), held, panel == own.begin,
                to + g * sums.floats());
      }
    }
  }

  void run(const float* weight1, const float* weight2, int64_t threads) {
    const int64_t first = kPoints<Line> * net.hidden * net.inputs;
    const int64_t second = panels.count * panel_floats();
    const int64_t shared = splits == 1 ? 0 : blocks.batches;
    shared_scratch.reserve(Scratch::all(
        {first, second, shared * staged_floats(), shared * splits * sums_floats()}));
    packed1 = shared_scratch.take(first);
    packed2 = shared_scratch.take(second);
    all_staged = shared_scratch.take(shared * staged_floats());
    all_sums = shared_scratch.take(shared * splits * sums_floats());
    const Weights weights1 = first_weights(net, weight1), weights2 = second_weights(net, weight2);
    const auto each_tile = [&](const auto& f) {
      const Parts tiles(net.outputs, kTileRows);
      for (int64_t j = 0; j < tiles.count; ++j)
        f(Range{tiles.begin(j), tiles.begin(j + 1)}, tiles.length(j));
    };
    const int workers = team(elements(net, flops()), threads);
    const Work work(blocks.batches, splits, net.hidden > blocks.batches * blocks.lanes, workers);
    const bool past = workers > 1 && !work.rows_first;  // the weights, that all threads read

#pragma omp parallel num_threads(workers)
    {
      const NoDenormals no_denormals;
      if (splits > 1)
        each_part(blocks, net.inputs, [&](int64_t b, Range channels) {
          own_scratch.reserve(blocks.room());
          stage(blocks, source, in, b, channels, own_scratch.take(blocks.room()),
                all_staged + b * staged_floats());
        });
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < hidden.count; ++t) {
        const Range rows{hidden.begin(t), hidden.begin(t + 1)};
        const int64_t panel = panels.of(t), at = rows.begin - hidden.begin(panels.begin(panel));
        pack_gather<Line, kRawRows, false>(weights1, rows, rows.size(),
                                           packed1 + rows.begin * kPoints<Line> * net.inputs,
                                           past);
        pack_scatter<Line, kTileRows>(weights2, each_tile, rows, at, scatter_floats(net.outputs),
                                      packed2 + panel * panel_floats(), past);
      }
      hand_over();
      work.each([&](int64_t batch, int64_t split) { item(batch, split); });
      if (splits > 1)
        each_part(blocks, net.outputs, [&](int64_t b, Range channels) {
          own_scratch.reserve(blocks.room());
          unstage(blocks, sums, all_sums + b * sums_floats(), splits,
                  blocks.batches * sums_floats(), b, channels, bias2,
                  own_scratch.take(blocks.room()), out);
        });
    }
  }
};

// --- backward ------------------------------------------------------------------------------------

template <class Line>
struct Backward {
  Net net;
  const Blocks<Line>& blocks;
  Source grad, source;
  const float* bias1;
  float* grad_in;
  Gradients results;
  int64_t panels;  // of hidden rows
  Planes<Line> in, out;
  Rows<Line> rows;
  int64_t chunks, splits;
  float* packed1 = nullptr;
  float* packed2 = nullptr;
  float* packed_in = nullptr;
  float* packed_bias = nullptr;
  float* all_staged = nullptr;  // where hidden rows are split: in and out, of all batches
  float* all_rows = nullptr;    // the same: what each split gives
  float* partials = nullptr;

  Backward(const Net& net, const Blocks<Line>& blocks, const Source& grad, const Source& source,
           const float* bias1, float* grad_in, const Gradients& results)
      : net(net),
        blocks(blocks),
        grad(grad),
        source(source),
        bias1(bias1),
        grad_in(grad_in),
        results(results),
        panels(ratio_up(net.hidden, kPanel)),
        in{net.inputs},
        out{net.outputs},
        rows(net.inputs),
        chunks(1),
        splits(1) {
    // Many batches, with few weights, are cut into chunks of them. Otherwise ranges of hidden rows go
    // first, since the sums of each chunk are written and read once more; but so are those that each range
    // gives to the input, hence two chunks where they can be.
    const int64_t most = std::min(blocks.batches, kPartialFloats / partial_floats());
    if (most < kItems)
      splits = splits_of(Parts(net.hidden, kRawRows), std::clamp<int64_t>(most, 1, 2), flops());
    chunks = std::clamp<int64_t>(most, 1, ratio_up(kItems, splits));
  }

  double flops() const { return operations<Line>(net, blocks) * kBackwardFlops; }
  int64_t in_floats() const { return blocks.groups * in.floats(); }  // of a batch
  int64_t out_floats() const { return blocks.groups * out.floats(); }
  int64_t rows_floats() const { return blocks.groups * rows.floats(); }
  int64_t padded_hidden() const { return panels * kPanel; }
  int64_t panel_floats(int64_t channels) const { return kPoints<Line> * channels * kPanel; }
  // Sums of weights' gradients lie as (point, channel, hidden row).
  int64_t first() const { return kPoints<Line> * net.inputs * padded_hidden(); }
  int64_t second() const { return kPoints<Line> * net.outputs * padded_hidden(); }
  int64_t partial_floats() const { return first() + second() + padded_hidden(); }

  // sums += the products of a panel of hidden rows with what they see, over the blocks of a group.
  void weight_gradients(const float* held, const Planes<Line>& planes, const float* seen, bool fresh,
                        float* sums) const {
    const Parts columns(planes.channels, kTileRows);
    for (int64_t p = 0; p < kPoints<Line>; ++p)
      for (int64_t j = 0; j < columns.count; ++j)
        with_constant<kTileRows>(columns.length(j), [&](auto wide) {
          const int64_t column = columns.begin(j);
          add_outer_products<wide>(held + p * kHeldStep, seen + planes.at(p) + column * kPanel,
                                   padded_hidden(), fresh,
                                   sums + (p * planes.channels + column) * padded_hidden());
        });
  }

  void item(int64_t chunk, int64_t split) const {
    constexpr int64_t held_floats = kPoints<Line> * kHeldStep;
    constexpr int64_t raw_floats = kPoints<Line> * kRawStep;
    own_scratch.reserve(Scratch::all({in_floats() + out_floats(), rows_floats(), in_floats(),
                                      blocks.room(), held_floats, held_floats, raw_floats}));
    float* once = own_scratch.take(in_floats() + out_floats());
    float* rows_once = own_scratch.take(rows_floats());
    float* planes = own_scratch.take(in_floats());
    float* room = own_scratch.take(blocks.room());
    float* held = own_scratch.take(held_floats);
    float* held_grad = own_scratch.take(held_floats);
    float* raw = own_scratch.take(raw_floats);

    float* sums1 = partials + chunk * partial_floats();
    float* sums2 = sums1 + first();
    float* sums_bias = sums2 + second();
    const Range own = part_of(panels, splits, split);
    std::fill_n(sums_bias + own.begin * kPanel, own.size() * kPanel, 0.0f);

    const Range batches = part_of(blocks.batches, chunks, chunk);
    for (int64_t b = batches.begin; b < batches.end; ++b) {
      float* staged = splits == 1 ? once : all_staged + b * (in_floats() + out_floats());
      float* to_rows =
          splits == 1 ? rows_once : all_rows + (split * blocks.batches + b) * rows_floats();
      if (splits == 1) {
        stage(blocks, source, in, b, {0, net.inputs}, room, staged);
        stage(blocks, grad, out, b, {0, net.outputs}, room, staged + in_floats());
      }
      for (int64_t panel = own.begin; panel < own.end; ++panel) {
        const int64_t begin = panel * kPanel;
        for (int64_t g = 0; g < blocks.groups; ++g) {
          const float* seen_in = staged + g * in.floats();
          const float* seen_out = staged + in_floats() + g * out.floats();
          const bool fresh = b == batches.begin && g == 0;
          hold(panel, seen_in, seen_out, raw, held, held_grad, sums_bias + begin);
          scatter_panel(rows, std::min(kPanel, net.hidden - begin),
                        packed_in + panel * kPoints<Line> * scatter_floats(rows.step), held_grad,
                        panel == own.begin, to_rows + g * rows.floats());
          weight_gradients(held, out, seen_out, fresh, sums2 + begin);
          weight_gradients(held_grad, in, seen_in, fresh, sums1 + begin);
        }
      }
      if (splits == 1) finish_in(b, {0, net.inputs}, rows_once, planes, room);
    }
  }

  // The gradient of these channels of a batch, from what each split gives.
  void finish_in(int64_t b, Range channels, const float* from, float* planes, float* room) const {
    for (int64_t g = 0; g < blocks.groups; ++g)
      rows_to_planes(rows, from + g * rows.floats(), splits, blocks.batches * rows_floats(), channels,
                     in, planes + g * in.floats());
    unstage(blocks, in, planes, 1, 0, b, channels, nullptr, room, grad_in);
  }

  // The points of a panel of hidden rows and of their gradients, in all blocks of a group.
  void hold(int64_t panel, const float* seen_in, const float* seen_out, float* raw, float* to,
            float* to_grad, float* sums) const {
    Lanes values[2 * kRawRows * kPositions<Line>];
    for (int64_t first = 0; first < kPanel; first += kRawRows) {
      gather_panel(in, seen_in + first, packed1 + panel * panel_floats(net.inputs), raw);
      hidden_panel_points<Line>(raw, packed_bias + panel * kPanel, to + first * kPanel, values);
      gather_panel(out, seen_out + first, packed2 + panel * panel_floats(net.outputs), raw);
      gradient_panel_points<Line>(raw, values, to_grad + first * kPanel, sums);
    }
  }

  // The weights and biases of kLanes hidden rows, zero for those that a panel lacks.
  void pack(const Weights& weights1, const Weights& weights2, int64_t begin, bool past) const {
    const Range hidden{std::min(begin, net.hidden), std::min(begin + kLanes, net.hidden)};
    const int64_t panel = begin / kPanel, at = begin % kPanel;
    const auto each_tile = [&](const auto& f) { each_wide(net.inputs, f); };
    pack_gather<Line, kLanes, true>(weights1, hidden, kPanel,
                                    packed1 + panel * panel_floats(net.inputs) + at, past);
    pack_gather<Line, kLanes, true>(weights2, hidden, kPanel,
                                    packed2 + panel * panel_floats(net.outputs) + at, past);
    for (int64_t first = hidden.begin; first < hidden.end; first += kRawRows)
      pack_scatter<Line, 2 * kLanes>(
          weights1, each_tile, {first, std::min(first + kRawRows, hidden.end)}, first % kPanel,
          scatter_floats(rows.step), packed_in + panel * kPoints<Line> * scatter_floats(rows.step),
          past);
    std::fill_n(packed_bias + begin, kLanes, 0.0f);
    std::copy(bias1 + hidden.begin, bias1 + hidden.end, packed_bias + begin);
  }

  // Gᵀ (the sums over all chunks) G, for panels of hidden rows and a channel of these weights.
  void finish_weights(const float* sums, const Weights& weights, Range own, int64_t c,
                      float* to) const {
    for (int64_t h = own.begin * kPanel; h < std::min(own.end * kPanel, net.hidden); h += kLanes) {
      Lanes points[kPoints<Line>], taps[kWindow];
      for (int64_t p = 0; p < kPoints<Line>; ++p) {
        const float* from = sums + (p * weights.channels + c) * padded_hidden() + h;
        points[p] = load(from);
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
          points[p] += load(from + chunk * partial_floats());
      }
      points_to_taps<Line>(points, taps);
      alignas(64) float windows[kWindow][kLanes];
      for (int64_t tap = 0; tap < kWindow; ++tap) store(taps[tap], windows[tap]);
      write_windows(weights, windows, weights.row, std::min<int64_t>(kLanes, net.hidden - h),
                    to + h * weights.row + c * weights.channel);
    }
  }

  // The sum of a channel of the output's gradient.
  float sum_of(int64_t channel) const {
    const int64_t plane = blocks.positions();
    Lanes sum = Lanes{};
    float rest = 0;
    for (int64_t s = 0; s < blocks.samples; ++s) {
      const float* from = grad.data + (s * net.outputs + channel) * plane;
      int64_t i = 0;
      for (; i + kLanes <= plane; i += kLanes) sum += load(from + i);
      for (; i < plane; ++i) rest += from[i];
    }
    return fold(sum) + rest;
  }

  void run(const float* weight1, const float* weight2, int64_t threads) {
    const int64_t gather1 = panels * panel_floats(net.inputs);
    const int64_t gather2 = panels * panel_floats(net.outputs);
    const int64_t scattered = panels * kPoints<Line> * scatter_floats(rows.step);
    const int64_t shared = splits == 1 ? 0 : blocks.batches;
    shared_scratch.reserve(
        Scratch::all({gather1, gather2, scattered, padded_hidden(),
                      shared * (in_floats() + out_floats()), shared * splits * rows_floats(),
                      chunks * partial_floats()}));
    packed1 = shared_scratch.take(gather1);
    packed2 = shared_scratch.take(gather2);
    packed_in = shared_scratch.take(scattered);
    packed_bias = shared_scratch.take(padded_hidden());
    all_staged = shared_scratch.take(shared * (in_floats() + out_floats()));
    all_rows = shared_scratch.take(shared * splits * rows_floats());
    partials = shared_scratch.take(chunks * partial_floats());
    const Weights weights1 = first_weights(net, weight1), weights2 = second_weights(net, weight2);
    const int workers = team(elements(net, flops()), threads);
    const Work work(chunks, splits, net.hidden > blocks.batches * blocks.lanes, workers);
    const bool past = workers > 1 && !work.rows_first;  // the weights, that all threads read

#pragma omp parallel num_threads(workers)
    {
      const NoDenormals no_denormals;
      if (splits > 1) {
        const auto stage_part = [&](const Source& from, const Planes<Line>& planes, int64_t b,
                                    Range channels, int64_t place) {
          own_scratch.reserve(blocks.room());
          stage(blocks, from, planes, b, channels, own_scratch.take(blocks.room()),
                all_staged + b * (in_floats() + out_floats()) + place);
        };
        each_part(blocks, net.inputs,
                  [&](int64_t b, Range channels) { stage_part(source, in, b, channels, 0); });
        each_part(blocks, net.outputs, [&](int64_t b, Range channels) {
          stage_part(grad, out, b, channels, in_floats());
        });
      }
#pragma omp for schedule(static) nowait
      for (int64_t begin = 0; begin < padded_hidden(); begin += kLanes)
        pack(weights1, weights2, begin, past);
      hand_over();
      work.each([&](int64_t chunk, int64_t split) { item(chunk, split); });
      if (splits > 1)
        each_part(blocks, net.inputs, [&](int64_t b, Range channels) {
          own_scratch.reserve(Scratch::all({in_floats(), blocks.room()}));
          float* planes = own_scratch.take(in_floats());
          finish_in(b, channels, all_rows + b * rows_floats(), planes,
                    own_scratch.take(blocks.room()));
        });
      const int64_t parts = work.rows_first ? splits : 1, channels = net.inputs + net.outputs;
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < parts * channels; ++i) {
        const Range own = part_of(panels, parts, i / channels);
        const int64_t c = i % channels;
        if (c < net.inputs)
          finish_weights(partials, weights1, own, c, results.weight1);
        else
          finish_weights(partials + first(), weights2, own, c - net.inputs, results.weight2);
      }
#pragma omp for schedule(static) nowait
      for (int64_t h = 0; h < net.hidden; ++h) {
        results.bias1[h] = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          results.bias1[h] += partials[chunk * partial_floats() + first() + second() + h];
      }
#pragma omp for schedule(static)
      for (int64_t c = 0; c < net.outputs; ++c) results.bias2[c] = sum_of(c);
    }
  }
};

}  // namespace winograd

}  // namespace
