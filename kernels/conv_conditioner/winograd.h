// The conditioner with fewer products than its convolutions have: along the rows of an image, a span of
// positions at a time, with three taps of a row turned into points.
//
// Winograd's F(4, 3): polynomials of four and three coefficients have a product of six, so six products of
// their values at six points do for the twelve of their coefficients. With G, A and B below, and for the
// taps w of a row, hidden values h at four neighbouring positions and inputs d at these and their two neighbours:
//   gather:             h = Aᵀ (G w · Bᵀ d)
//   scatter:            what h adds to the six = B (G w · A h)
//   weights' gradient:  w̄ = Gᵀ (A h · Bᵀ d)
// What has few channels is turned once, into and from planes of points; the hidden layer by Aᵀ and A, which
// are cheap, between two products.
//
// The lanes of a panel are spans: whole images, of which each row is `tiles` lanes. Panels lie as (point,
// row, channel), with a row of zeros above and below, so that the taps of a column are neighbours.
// An item of work is a chunk of groups of lanes and a range of hidden rows, as in native.cpp.
#pragma once

#include "conv_conditioner/net.h"
#include "native/denormals.h"
#include "native/native.h"

namespace {

namespace winograd {

constexpr int64_t kSpan = 4, kPoints = 6, kTaps = 3;
constexpr int64_t kForwardRows = 64;   // of the hidden layer, at a time
constexpr int64_t kBackwardRows = 24;  // the same, held for so many rows of images
constexpr int64_t kHeldImageRows = 16;

// --- transforms ----------------------------------------------------------------------------------

// Bᵀ d.
inline void to_points(const Lanes* d, Lanes* points) {
  const Lanes even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
  const Lanes near = d[4] - d[2], far = 2.0f * (d[3] - d[1]);
  points[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  points[1] = even + odd;
  points[2] = even - odd;
  points[3] = near + far;
  points[4] = near - far;
  points[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// B points: what the six positions around a span get.
inline void from_points(const Lanes* points, Lanes* d) {
  const Lanes sum1 = points[1] + points[2], difference1 = points[1] - points[2];
  const Lanes sum2 = points[3] + points[4], difference2 = points[3] - points[4];
  d[0] = 4.0f * points[0];
  d[1] = 4.0f * points[5] - 4.0f * difference1 - 2.0f * difference2;
  d[2] = -5.0f * points[0] - 4.0f * sum1 - sum2;
  d[3] = -5.0f * points[5] + difference1 + 2.0f * difference2;
  d[4] = points[0] + sum1 + sum2;
  d[5] = points[5];
}

// Aᵀ points: the values at a span's positions.
inline void to_span(const Lanes* points, Lanes* h) {
  const Lanes sum1 = points[1] + points[2], difference1 = points[1] - points[2];
  const Lanes sum2 = points[3] + points[4], difference2 = points[3] - points[4];
  h[0] = points[0] + sum1 + sum2;
  h[1] = difference1 + 2.0f * difference2;
  h[2] = sum1 + 4.0f * sum2;
  h[3] = difference1 + 8.0f * difference2 + points[5];
}

// A h.
inline void from_span(const Lanes* h, Lanes* points) {
  const Lanes even1 = h[0] + h[2], odd1 = h[1] + h[3];
  const Lanes even2 = h[0] + 4.0f * h[2], odd2 = 2.0f * h[1] + 8.0f * h[3];
  points[0] = h[0];
  points[1] = even1 + odd1;
  points[2] = even1 - odd1;
  points[3] = even2 + odd2;
  points[4] = even2 - odd2;
  points[5] = h[3];
}

constexpr int64_t kSumOfSpan = 1;  // the point at which h's polynomial is the sum of its coefficients

// G.
constexpr float kWeightPoints[kPoints][kTaps] = {
    {1.0f / 4, 0, 0},
    {-1.0f / 6, -1.0f / 6, -1.0f / 6},
    {-1.0f / 6, 1.0f / 6, -1.0f / 6},
    {1.0f / 24, 1.0f / 12, 1.0f / 6},
    {1.0f / 24, -1.0f / 12, 1.0f / 6},
    {0, 0, 1},
};

// --- images to planes of points and back ---------------------------------------------------------

struct Spans {
  int64_t samples, height, width, tiles, images, groups;

  Spans(int64_t samples, int64_t height, int64_t width)
      : samples(samples),
        height(height),
        width(width),
        tiles(width / kSpan),
        images(kPanel / std::max<int64_t>(tiles, 1)),  // of a group
        groups(images == 0 ? 0 : ratio_up(samples, images)) {}

  int64_t first(int64_t group) const { return group * images; }
  int64_t present(int64_t group) const { return std::min(images, samples - first(group)); }
};

// How the panels of a group lie: (point, margin + row + margin, channel).
struct Planes {
  int64_t height, channels;

  int64_t plane() const { return (height + 2) * channels * kPanel; }
  int64_t at(int64_t point, int64_t row) const {  // row is -1 ... height
    return point * plane() + (row + 1) * channels * kPanel;
  }
  int64_t floats() const { return kPoints * plane(); }
};

// The lanes of which a neighbour is in the same row of an image, as masks.
struct Neighbours {
  alignas(64) uint32_t left[kPanel], right[kPanel];

  explicit Neighbours(int64_t tiles) {
    for (int64_t l = 0; l < kPanel; ++l) {
      left[l] = l % tiles > 0 ? ~0u : 0u;
      right[l] = l % tiles < tiles - 1 ? ~0u : 0u;
    }
  }

  static Lanes of(Lanes value, const uint32_t* mask) {
    BitLanes bits;
    std::memcpy(&bits, mask, sizeof bits);
    return (Lanes)((BitLanes)value & bits);
  }
};

// Where the lanes' spans begin, from the first image on.
struct Places {
  int64_t at[kPanel];

  Places(const Spans& spans, int64_t image) {
    for (int64_t l = 0; l < kPanel; ++l) at[l] = l / spans.tiles * image + l % spans.tiles * kSpan;
  }
};

// A row of a group's images: position i of the spans at row(i), with a lane more at both ends.
struct ImageRow {
  alignas(64) float values[kSpan][kPanel + 32] = {};

  float* row(int64_t i) { return values[i] + 16; }
};

void stage(const Spans& spans, const Neighbours& neighbours, const Source& source,
           const Planes& planes, int64_t group, float* to) {
  const int64_t image = source.channels * spans.height * spans.width;
  const int64_t lanes = spans.present(group) * spans.tiles;
  const float* from = source.data + spans.first(group) * image;
  for (int64_t p = 0; p < kPoints; ++p) {
    const int64_t row = source.channels * kPanel;
    std::fill_n(to + planes.at(p, -1), row, 0.0f);
    std::fill_n(to + planes.at(p, spans.height), row, 0.0f);
  }
  const Places places(spans, image);
  ImageRow in;
  for (int64_t c = 0; c < source.channels; ++c)
    for (int64_t y = 0; y < spans.height; ++y) {
      const float* own = from + (c * spans.height + y) * spans.width;
      int64_t lane = 0;
      for (; lane + 4 <= lanes; lane += 4) {
        Quad quads[4];
        for (int64_t l = 0; l < 4; ++l) std::memcpy(quads + l, own + places.at[lane + l], sizeof(Quad));
        transpose(quads);
        for (int64_t i = 0; i < kSpan; ++i) std::memcpy(in.row(i) + lane, quads + i, sizeof(Quad));
      }
      for (; lane < lanes; ++lane)
        for (int64_t i = 0; i < kSpan; ++i) in.row(i)[lane] = own[places.at[lane] + i];
      for (int64_t l = 0; l < kPanel; l += kLanes) {
        Lanes d[kPoints], points[kPoints];
        d[0] = Neighbours::of(load(in.row(kSpan - 1) + l - 1), neighbours.left + l);
        for (int64_t i = 0; i < kSpan; ++i) d[1 + i] = load(in.row(i) + l);
        d[kPoints - 1] = Neighbours::of(load(in.row(0) + l + 1), neighbours.right + l);
        to_points(d, points);
        for (int64_t p = 0; p < kPoints; ++p)
          store(points[p], to + planes.at(p, y) + c * kPanel + l);
      }
    }
}

// to is (samples, channels, height, width).
void unstage(const Spans& spans, const Planes& planes, const float* from, int64_t group,
             const float* bias, float* to) {
  const int64_t image = planes.channels * spans.height * spans.width;
  const int64_t lanes = spans.present(group) * spans.tiles;
  to += spans.first(group) * image;
  const Places places(spans, image);
  ImageRow core;
  alignas(64) float first[kPanel], last[kPanel];  // what goes to the spans on the left and on the right
  for (int64_t c = 0; c < planes.channels; ++c)
    for (int64_t y = 0; y < spans.height; ++y) {
      for (int64_t l = 0; l < kPanel; l += kLanes) {
        Lanes points[kPoints], d[kPoints];
        for (int64_t p = 0; p < kPoints; ++p)
          points[p] = load(from + planes.at(p, y) + c * kPanel + l);
        from_points(points, d);
        const Lanes shift = every<Lanes>(bias == nullptr ? 0.0f : bias[c]);
        store(d[0], first + l);
        for (int64_t i = 0; i < kSpan; ++i) store(d[1 + i] + shift, core.row(i) + l);
        store(d[kPoints - 1], last + l);
      }
      float* own = to + (c * spans.height + y) * spans.width;
      int64_t lane = 0;
      for (; lane + 4 <= lanes; lane += 4) {
        Quad quads[4];
        for (int64_t i = 0; i < kSpan; ++i) std::memcpy(quads + i, core.row(i) + lane, sizeof(Quad));
        transpose(quads);
        for (int64_t l = 0; l < 4; ++l) std::memcpy(own + places.at[lane + l], quads + l, sizeof(Quad));
      }
      for (; lane < lanes; ++lane)
        for (int64_t i = 0; i < kSpan; ++i) own[places.at[lane] + i] = core.row(i)[lane];
      for (lane = 0; lane < lanes; lane += spans.tiles) {
        float* row = own + places.at[lane];
        for (int64_t t = 1; t < spans.tiles; ++t) {
          row[t * kSpan - 1] += first[lane + t];
          row[t * kSpan] += last[lane + t - 1];
        }
      }
    }
}

// What the ranges of hidden rows give, added up, for the planes `own` of (samples, channels, positions).
void add_splits(const float* from, int64_t splits, int64_t each, Range own, const float* bias,
                int64_t channels, int64_t positions, float* to) {
  for (int64_t plane = own.begin; plane < own.end; ++plane) {
    const float shift = bias == nullptr ? 0.0f : bias[plane % channels];
    for (int64_t i = plane * positions; i < (plane + 1) * positions; ++i) {
      float sum = shift;
      for (int64_t split = 0; split < splits; ++split) sum += from[split * each + i];
      to[i] = sum;
    }
  }
}

// --- weights -------------------------------------------------------------------------------------

// The columns of a scatter, or of a weights' gradient: with few channels the taps of a column are seen
// together, and all of them as neighbours.
struct Columns {
  int64_t channels;
  bool joined;

  int64_t segments() const { return joined ? 1 : kTaps; }
  int64_t width() const { return joined ? kTaps * channels : channels; }
  // The row from which on a segment's columns lie, or what is no row of the image where it is skipped.
  int64_t row(int64_t segment, int64_t y) const { return y + segment - 1; }
  bool skipped(int64_t segment, int64_t y, int64_t height) const {
    return !joined && (row(segment, y) < 0 || row(segment, y) >= height);
  }
};

Columns scattered(int64_t channels) { return {channels, channels < kTileRows}; }
Columns seen_by_gradient(int64_t channels) { return {channels, channels <= 4}; }

// G w for the rows of a tile; points are `step` apart.
void write_points(const float (*taps)[kTileRows], int64_t rows, int64_t step, float* to) {
  for (int64_t p = 0; p < kPoints; ++p) {
    const float* g = kWeightPoints[p];
    for (int64_t r = 0; r < rows; ++r)
      to[p * step + r] = g[0] * taps[0][r] + g[1] * taps[1][r] + g[2] * taps[2][r];
  }
}

// (tile of hidden rows, point, tap of a column, channel, row of the tile)
void pack_gather(const Weights& weights, const Parts& hidden, int64_t tile, float* packed) {
  const int64_t begin = hidden.begin(tile), rows = hidden.length(tile);
  const int64_t each = kTaps * weights.channels;
  float* to = packed + begin * kPoints * each;
  for (int64_t c = 0; c < weights.channels; ++c) {
    float taps[kTaps * kTaps][kTileRows];
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = weights.data + (begin + r) * weights.row + c * weights.channel;
      for (int64_t tap = 0; tap < kTaps * kTaps; ++tap) taps[weights.seen(tap)][r] = from[tap];
    }
    for (int64_t dy = 0; dy < kTaps; ++dy)
      write_points(taps + dy * kTaps, rows, each * rows, to + (dy * weights.channels + c) * rows);
  }
}

// Of a segment and a point; not a power of two, for what is written together not to fall into one set of
// the cache.
int64_t scatter_floats(const Columns& columns, int64_t hidden) {
  return columns.width() * hidden + 48;
}

// (point, segment, tile of columns, hidden row, row of the tile)
void pack_scatter(const Weights& weights, const Columns& columns, const Parts& hidden, int64_t tile,
                  float* packed) {
  const Parts parts(columns.width(), kTileRows);
  const int64_t each = scatter_floats(columns, hidden.size);
  for (int64_t segment = 0; segment < columns.segments(); ++segment)
    for (int64_t j = 0; j < parts.count; ++j) {
      const int64_t rows = parts.length(j);
      float* to = packed + segment * each + parts.begin(j) * hidden.size;
      for (int64_t h = hidden.begin(tile); h < hidden.begin(tile + 1); ++h) {
        float taps[kTaps][kTileRows];
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t column = parts.begin(j) + r, c = column % weights.channels;
          const int64_t dy = columns.joined ? column / weights.channels : segment;
          const float* from = weights.data + h * weights.row + c * weights.channel;
          for (int64_t dx = 0; dx < kTaps; ++dx) taps[dx][r] = from[weights.seen(dy * kTaps + dx)];
        }
        write_points(taps, rows, columns.segments() * each, to + h * rows);
      }
    }
}

// --- products ------------------------------------------------------------------------------------

// Into raw, (point, row of the tile): what a tile of hidden rows sees at row y.
template <int rows>
HYBRIDFLOW_INLINE void gather(const Planes& planes, const float* staged, int64_t y,
                              const float* packed, float* raw) {
  const int64_t top = std::max<int64_t>(0, y - 1), count = std::min(planes.height, y + 2) - top;
  const int64_t each = kTaps * planes.channels;
  const float* weights = packed + (top - y + 1) * planes.channels * rows;
  for (int64_t p = 0; p < kPoints; ++p) {
    Tile<rows> tile;
    tile.clear();
    tile.add({weights + p * each * rows, staged + planes.at(p, top), count * planes.channels});
    tile.finish([&](Lanes sum, int64_t offset) { store(sum, raw + p * rows * kPanel + offset); });
  }
}

HYBRIDFLOW_INLINE void load_points(const float* raw, int64_t step, Lanes* points) {
  for (int64_t p = 0; p < kPoints; ++p) points[p] = load(raw + p * step);
}

HYBRIDFLOW_INLINE void store_points(const Lanes* points, int64_t step, float* to) {
  for (int64_t p = 0; p < kPoints; ++p) store(points[p], to + p * step);
}

// relu(first convolution), from its points to points again, `step` apart.
HYBRIDFLOW_INLINE void hidden_points(const float* raw, int64_t rows, const float* bias, int64_t step,
                                     float* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t l = r * kPanel; l < (r + 1) * kPanel; l += kLanes) {
      Lanes points[kPoints], h[kSpan];
      load_points(raw + l, rows * kPanel, points);
      to_span(points, h);
      for (int64_t i = 0; i < kSpan; ++i) h[i] = positive(h[i] + every<Lanes>(bias[r]));
      from_span(h, points);
      store_points(points, step, to + l);
    }
}

// The same, and the points of its gradient, which is kept where the hidden layer is positive.
HYBRIDFLOW_INLINE void hidden_gradient_points(const float* raw, const float* raw_grad, int64_t rows,
                                              const float* bias, int64_t step, float* to,
                                              float* to_grad) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t l = r * kPanel; l < (r + 1) * kPanel; l += kLanes) {
      Lanes points[kPoints], h[kSpan], grad[kSpan];
      load_points(raw + l, rows * kPanel, points);
      to_span(points, h);
      load_points(raw_grad + l, rows * kPanel, points);
      to_span(points, grad);
      for (int64_t i = 0; i < kSpan; ++i) {
        h[i] = positive(h[i] + every<Lanes>(bias[r]));
        grad[i] = where_positive(h[i], grad[i]);
      }
      from_span(h, points);
      store_points(points, step, to + l);
      from_span(grad, points);
      store_points(points, step, to_grad + l);
    }
}

// Adds what the hidden rows at row y give to the planes around it; their points are `step` apart.
void scatter(const Planes& planes, const Columns& columns, int64_t all_hidden, Range rows,
             const float* packed, const float* panel, int64_t step, int64_t y, float* to) {
  const Parts parts(columns.width(), kTileRows);
  const int64_t each = scatter_floats(columns, all_hidden);
  for (int64_t p = 0; p < kPoints; ++p)
    for (int64_t segment = 0; segment < columns.segments(); ++segment) {
      if (columns.skipped(segment, y, planes.height)) continue;
      float* out = to + planes.at(p, columns.row(segment, y));
      const float* weights = packed + (p * columns.segments() + segment) * each;
      add_hidden(parts, all_hidden, rows, weights, panel + p * step, out);
    }
}

// --- forward -------------------------------------------------------------------------------------

struct Forward {
  Net net;
  Spans spans;
  Neighbours neighbours;
  Source source;
  const float* bias1;
  const float* bias2;
  float* out;
  Parts hidden;
  Columns columns;
  int64_t splits;
  float* packed1 = nullptr;
  float* packed2 = nullptr;
  float* partial = nullptr;

  Forward(const Net& net, const Spans& spans, const Source& source, const float* bias1,
          const float* bias2, float* out)
      : net(net),
        spans(spans),
        neighbours(spans.tiles),
        source(source),
        bias1(bias1),
        bias2(bias2),
        out(out),
        hidden(net.hidden, kTileRows),
        columns(scattered(net.outputs)),
        splits(splits_of(hidden, spans.groups, flops())) {}

  double flops() const {
    return net.flops() * static_cast<double>(spans.samples * spans.height * spans.width) / 2;
  }
  int64_t results() const { return spans.samples * net.outputs * spans.height * spans.width; }

  void item(int64_t group, int64_t split) const {
    const Planes in{spans.height, net.inputs}, sums{spans.height, net.outputs};
    // A little more than the rows, so that points do not all lie at the same place of a page.
    constexpr int64_t step = (kForwardRows + kTileRows + 1) * kPanel;
    own_scratch.reserve(in.floats() + sums.floats() + kPoints * (step + kTileRows * kPanel));
    float* staged = own_scratch.take(in.floats());
    float* to = own_scratch.take(sums.floats());
    float* panel = own_scratch.take(kPoints * step);
    float* raw = own_scratch.take(kPoints * kTileRows * kPanel);
    stage(spans, neighbours, source, in, group, staged);
    std::fill_n(to, sums.floats(), 0.0f);

    const Range tiles = part_of(hidden.count, splits, split);
    const int64_t blocks = ratio_up(tiles.size() * kTileRows, kForwardRows);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range own = part_of(tiles, blocks, block);
      const Range rows = held_by(own, hidden);
      for (int64_t y = 0; y < spans.height; ++y) {
        for (int64_t t = own.begin; t < own.end; ++t) {
          const int64_t begin = hidden.begin(t);
          with_constant<kTileRows>(hidden.length(t), [&](auto constant) {
            gather<constant>(in, staged, y, packed1 + begin * kPoints * kTaps * net.inputs, raw);
            hidden_points(raw, constant, bias1 + begin, step, panel + (begin - rows.begin) * kPanel);
          });
        }
        scatter(sums, columns, net.hidden, rows, packed2, panel, step, y, to);
      }
    }
    if (splits == 1)
      unstage(spans, sums, to, group, bias2, out);
    else
      unstage(spans, sums, to, group, nullptr, partial + split * results());
  }

  void run(const float* weight1, const float* weight2, int64_t threads) {
    const int64_t first = kPoints * kTaps * net.hidden * net.inputs;
    const int64_t second = kPoints * columns.segments() * scatter_floats(columns, net.hidden);
    const int64_t partials = splits == 1 ? 0 : splits * results();
    shared_scratch.reserve(Scratch::rounded(first) + Scratch::rounded(second) + partials);
    packed1 = shared_scratch.take(first);
    packed2 = shared_scratch.take(second);
    partial = shared_scratch.take(partials);
    const Weights weights1 = first_weights(net, weight1), weights2 = second_weights(net, weight2);

#pragma omp parallel num_threads(team(elements(net, flops()), threads))
    {
      const NoDenormals no_denormals;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < hidden.count; ++t) {
        pack_gather(weights1, hidden, t, packed1);
        pack_scatter(weights2, columns, hidden, t, packed2);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < spans.groups * splits; ++i) item(i / splits, i % splits);
      if (splits > 1) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < kItems; ++i)
          add_splits(partial, splits, results(), part_of(spans.samples * net.outputs, kItems, i),
                     bias2, net.outputs,
                     spans.height * spans.width, out);
      }
    }
  }
};

// --- backward ------------------------------------------------------------------------------------

// What a gradient of weights takes products with, and where its sums are: (point, tap of a column,
// channel, hidden row).
struct Seen {
  Planes planes;
  Columns columns;
  float* panels = nullptr;  // staged
  float* sums = nullptr;
  Pair* pairs[kTaps];  // for each segment, of a held hidden panel and what it sees, at the first point
  int64_t counts[kTaps];

  Seen(int64_t height, int64_t channels)
      : planes{height, channels}, columns(seen_by_gradient(channels)) {}

  static int64_t floats(int64_t channels, int64_t hidden) {
    return kPoints * kTaps * channels * hidden;
  }
};

struct Backward {
  Net net;
  Spans spans;
  Neighbours neighbours;
  Source grad, source;
  const float* bias1;
  float* grad_in;
  Gradients results;
  Parts hidden;
  Columns columns;
  int64_t groups_held, rows_held, chunks, splits;
  float* packed1 = nullptr;
  float* packed2 = nullptr;
  float* packed_in = nullptr;
  float* partial_in = nullptr;
  float* partials = nullptr;

  // A little more than the rows, so that panels do not all lie at the same place of a page.
  static constexpr int64_t kStride = (kBackwardRows + kTileRows + 3) * kPanel;

  Backward(const Net& net, const Spans& spans, const Source& grad, const Source& source,
           const float* bias1, float* grad_in, const Gradients& results)
      : net(net),
        spans(spans),
        neighbours(spans.tiles),
        grad(grad),
        source(source),
        bias1(bias1),
        grad_in(grad_in),
        results(results),
        hidden(net.hidden, kTileRows),
        columns(scattered(net.inputs)),
        groups_held(std::clamp<int64_t>(kHeldImageRows / spans.height, 1, spans.groups)),
        rows_held(std::min(kHeldImageRows, spans.height)),
        chunks(std::clamp<int64_t>(kPartialFloats / partial_floats(), 1,
                                   std::min(ratio_up(spans.groups, groups_held), 2 * kItems))),
        splits(splits_of(hidden, chunks, flops())) {}

  double flops() const {
    return net.flops() * kBackwardFlops *
           static_cast<double>(spans.samples * spans.height * spans.width) / 2;
  }
  int64_t inputs() const { return spans.samples * net.inputs * spans.height * spans.width; }
  int64_t first() const { return Seen::floats(net.inputs, net.hidden); }
  int64_t second() const { return Seen::floats(net.outputs, net.hidden); }
  int64_t partial_floats() const { return Scratch::rounded(first() + second() + net.hidden); }

  // Held hidden panels lie as (group, row, point).
  void find_pairs(const Held& held, Seen& seen) const {
    for (int64_t segment = 0; segment < seen.columns.segments(); ++segment) {
      int64_t panel = 0, count = 0;
      for (int64_t k = 0; k < held.groups; ++k)
        for (int64_t y = held.rows.begin; y < held.rows.end; ++y, panel += kPoints * kStride)
          if (!seen.columns.skipped(segment, y, spans.height))
            seen.pairs[segment][count++] = {
                panel, k * seen.planes.floats() + seen.planes.at(0, seen.columns.row(segment, y))};
      seen.counts[segment] = count;
    }
  }

  // sums += inner products of the hidden rows with what they see.
  void weight_gradients(const float* panels, Range rows, const Seen& seen) const {
    const Parts columns(seen.columns.width(), kInnerColumns);
    const int64_t channels = seen.planes.channels;
    for (int64_t p = 0; p < kPoints; ++p)
      for (int64_t segment = 0; segment < seen.columns.segments(); ++segment)
        for (int64_t j = 0; j < columns.count; ++j)
          with_constant<kInnerColumns>(columns.length(j), [&](auto wide) {
            constexpr int most = inner_rows(wide);
            const Parts tiles(rows.size(), most);
            const int64_t column = columns.begin(j);
            int64_t places[wide];
            for (int c = 0; c < wide; ++c)
              places[c] = ((p * kTaps + segment) * channels + column + c) * net.hidden;
            for (int64_t i = 0; i < tiles.count; ++i)
              with_constant<most>(tiles.length(i), [&](auto high) {
                const int64_t r = tiles.begin(i);
                inner_products<high, wide>(
                    panels + p * kStride + r * kPanel,
                    seen.panels + p * seen.planes.plane() + column * kPanel, seen.pairs[segment],
                    seen.counts[segment], 1, places, seen.sums + rows.begin + r);
              });
          });
  }

  void item(int64_t chunk, int64_t split) const {
    Seen in(spans.height, net.inputs), out(spans.height, net.outputs);
    const Planes sums{spans.height, net.inputs};
    constexpr int64_t pair_floats = sizeof(Pair) / sizeof(float);
    const int64_t held_panels = groups_held * rows_held;
    const int64_t pairs_floats = 2 * kTaps * held_panels * pair_floats;
    const int64_t panel_floats = held_panels * kPoints * kStride;
    const int64_t raw_floats = kPoints * kTileRows * kPanel;
    own_scratch.reserve(groups_held * (2 * in.planes.floats() + out.planes.floats()) +
                        2 * (panel_floats + raw_floats) + Scratch::rounded(pairs_floats));
    in.panels = own_scratch.take(groups_held * in.planes.floats());
    out.panels = own_scratch.take(groups_held * out.planes.floats());
    float* sums_in = own_scratch.take(groups_held * sums.floats());
    float* panels = own_scratch.take(panel_floats);
    float* grad_panels = own_scratch.take(panel_floats);
    float* raw = own_scratch.take(raw_floats);
    float* raw_grad = own_scratch.take(raw_floats);
    Pair* pairs = reinterpret_cast<Pair*>(own_scratch.take(pairs_floats));
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      in.pairs[tap] = pairs + 2 * tap * held_panels;
      out.pairs[tap] = pairs + (2 * tap + 1) * held_panels;
    }

    in.sums = partials + chunk * partial_floats();
    out.sums = in.sums + first();
    float* sums_bias = out.sums + second();
    const Range tiles = part_of(hidden.count, splits, split);
    const Range own_rows = held_by(tiles, hidden);
    for (int64_t place = 0; place < kPoints * kTaps * (net.inputs + net.outputs); ++place)
      std::fill_n(in.sums + place * net.hidden + own_rows.begin, own_rows.size(), 0.0f);
    std::fill_n(sums_bias + own_rows.begin, own_rows.size(), 0.0f);

    const Range groups = part_of(spans.groups, chunks, chunk);
    for (int64_t g = groups.begin; g < groups.end; g += groups_held) {
      const int64_t count = std::min(groups_held, groups.end - g);
      for (int64_t k = 0; k < count; ++k) {
        stage(spans, neighbours, source, in.planes, g + k, in.panels + k * in.planes.floats());
        stage(spans, neighbours, grad, out.planes, g + k, out.panels + k * out.planes.floats());
      }
      std::fill_n(sums_in, count * sums.floats(), 0.0f);
      for (int64_t y = 0; y < spans.height; y += rows_held) {
        const Held held{count, {y, std::min(y + rows_held, spans.height)}};
        find_pairs(held, in);
        find_pairs(held, out);
        const int64_t blocks = ratio_up(tiles.size() * kTileRows, kBackwardRows);
        for (int64_t block = 0; block < blocks; ++block) {
          const Range own = part_of(tiles, blocks, block);
          const Range rows = held_by(own, hidden);
          const int64_t panels_held =
              hold(held, own, in, out, panels, grad_panels, raw, raw_grad, sums_in);
          add_row_sums(grad_panels + kSumOfSpan * kStride, kPoints * kStride, panels_held,
                       rows.size(), sums_bias + rows.begin);
          weight_gradients(panels, rows, out);
          weight_gradients(grad_panels, rows, in);
        }
      }
      for (int64_t k = 0; k < count; ++k)
        unstage(spans, sums, sums_in + k * sums.floats(), g + k, nullptr,
                splits == 1 ? grad_in : partial_in + split * inputs());
    }
  }

  // The points of the hidden tiles and of their gradients at the held rows, which are counted; gradients go
  // on to the input.
  int64_t hold(const Held& held, Range tiles, const Seen& in, const Seen& out, float* panels,
               float* grad_panels, float* raw, float* raw_grad, float* sums_in) const {
    const Range rows = held_by(tiles, hidden);
    int64_t panel = 0;
    for (int64_t k = 0; k < held.groups; ++k)
      for (int64_t y = held.rows.begin; y < held.rows.end; ++y, ++panel) {
        const int64_t offset = panel * kPoints * kStride;
        for (int64_t t = tiles.begin; t < tiles.end; ++t) {
          const int64_t begin = hidden.begin(t);
          const int64_t own = offset + (begin - rows.begin) * kPanel;
          with_constant<kTileRows>(hidden.length(t), [&](auto constant) {
            gather<constant>(in.planes, in.panels + k * in.planes.floats(), y,
                             packed1 + begin * kPoints * kTaps * net.inputs, raw);
            gather<constant>(out.planes, out.panels + k * out.planes.floats(), y,
                             packed2 + begin * kPoints * kTaps * net.outputs, raw_grad);
            hidden_gradient_points(raw, raw_grad, constant, bias1 + begin, kStride, panels + own,
                                   grad_panels + own);
          });
        }
        scatter(in.planes, columns, net.hidden, rows, packed_in, grad_panels + offset, kStride, y,
                sums_in + k * in.planes.floats());
      }
    return panel;
  }

  // Gᵀ of the sums over all chunks, for a channel of these weights.
  void finish_weights(const float* sums, const Weights& weights, int64_t c, float* to) const {
    for (int64_t dy = 0; dy < kTaps; ++dy)
      for (int64_t h = 0; h < net.hidden; ++h) {
        float taps[kTaps] = {};
        for (int64_t p = 0; p < kPoints; ++p) {
          float sum = 0;
          const int64_t place = (p * kTaps + dy) * weights.channels + c;
          for (int64_t chunk = 0; chunk < chunks; ++chunk)
            sum += sums[chunk * partial_floats() + place * net.hidden + h];
          for (int64_t dx = 0; dx < kTaps; ++dx) taps[dx] += kWeightPoints[p][dx] * sum;
        }
        for (int64_t dx = 0; dx < kTaps; ++dx)
          to[h * weights.row + c * weights.channel + weights.seen(dy * kTaps + dx)] = taps[dx];
      }
  }

  // The sum of a channel of the output's gradient.
  float sum_of(int64_t channel) const {
    const int64_t plane = spans.height * spans.width;
    Lanes sum = Lanes{};
    float rest = 0;
    for (int64_t s = 0; s < spans.samples; ++s) {
      const float* from = grad.data + (s * net.outputs + channel) * plane;
      int64_t i = 0;
      for (; i + kLanes <= plane; i += kLanes) sum += load(from + i);
      for (; i < plane; ++i) rest += from[i];
    }
    return fold(sum) + rest;
  }

  void run(const float* weight1, const float* weight2, int64_t threads) {
    const int64_t of_scatter = kPoints * columns.segments() * scatter_floats(columns, net.hidden);
    const int64_t of_splits = splits == 1 ? 0 : splits * inputs();
    shared_scratch.reserve(Scratch::rounded(first()) + Scratch::rounded(second()) +
                           Scratch::rounded(of_scatter) + Scratch::rounded(of_splits) +
                           chunks * partial_floats());
    packed1 = shared_scratch.take(first());
    packed2 = shared_scratch.take(second());
    packed_in = shared_scratch.take(of_scatter);
    partial_in = shared_scratch.take(of_splits);
    partials = shared_scratch.take(chunks * partial_floats());
    const Weights weights1 = first_weights(net, weight1), weights2 = second_weights(net, weight2);

#pragma omp parallel num_threads(team(elements(net, flops()), threads))
    {
      const NoDenormals no_denormals;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < hidden.count; ++t) {
        pack_gather(weights1, hidden, t, packed1);
        pack_gather(weights2, hidden, t, packed2);
        pack_scatter(weights1, columns, hidden, t, packed_in);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < chunks * splits; ++i) item(i / splits, i % splits);
      if (splits > 1) {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < kItems; ++i)
          add_splits(partial_in, splits, inputs(), part_of(spans.samples * net.inputs, kItems, i),
                     nullptr, net.inputs,
                     spans.height * spans.width, grad_in);
      }
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < net.inputs; ++c)
        finish_weights(partials, weights1, c, results.weight1);
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < net.outputs; ++c) {
        finish_weights(partials + first(), weights2, c, results.weight2);
        results.bias2[c] = sum_of(c);
      }
#pragma omp for schedule(static)
      for (int64_t h = 0; h < net.hidden; ++h) {
        results.bias1[h] = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          results.bias1[h] += partials[chunk * partial_floats() + first() + second() + h];
      }
    }
  }
};

}  // namespace winograd

}  // namespace
