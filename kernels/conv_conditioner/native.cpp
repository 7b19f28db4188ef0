// The conditioner of a coupling, convolution, ReLU, convolution, and its gradients, without the hidden
// layer ever reaching memory.
//
// The lanes of a panel are images: a group of kPanel images is turned into panels, one for each position
// and channel, so that all lanes have the same neighbours, and taps outside of the image are skipped.
// An image of which too few would fill a group is cut into strips of rows, each a lane of its own, with
// the rows next to it as a halo.
//   gather:   the hidden layer at a position, from the panels around it: a product with weights packed as
//             tile of hidden rows x tap x channel x row of the tile;
//   scatter:  what a position's hidden layer adds to the panels around it, weights packed as
//             tap x tile of channels x hidden row x row of the tile.
// The gradient goes through the second convolution as a gather and through the first as a scatter, with
// the same code. Gradients of weights are inner products of panels, over the lanes and over the positions
// whose hidden layer is held at a time.
// An item of work is a chunk of groups and a range of hidden rows. The items, and the order of every sum,
// depend on the shape alone.
// For most whole batches winograd.h has fewer products.
#include <algorithm>

#include "conv_conditioner/net.h"
#include "conv_conditioner/winograd.h"
#include "native/denormals.h"
#include "native/native.h"
#include "native/panels.h"

namespace {

constexpr int64_t kHeldPanels = 32;  // positions whose hidden layer is held for the weights' gradients
constexpr int64_t kHeldRows = 64;    // of the hidden layer, at a time

// --- shapes --------------------------------------------------------------------------------------

struct Grid {
  int64_t samples, height, width, reach;
  int64_t strips = 1, groups = 0;

  Grid(int64_t samples, int64_t height, int64_t width, int64_t reach)
      : samples(samples), height(height), width(width), reach(reach) {
    if (samples * height * width == 0) return;
    int64_t least = INT64_MAX;
    for (int64_t s = 1; s <= height; ++s) {
      if (height % s != 0) continue;
      // A strip cannot skip the rows above and below the image.
      const int64_t skipped = s == 1 ? std::min(height, reach) * (reach + 1) : 0;
      const int64_t rows = (2 * reach + 1) * (height / s) - skipped;
      const int64_t cost = ratio_up(samples * s, kPanel) * rows;
      if (cost < least) {
        least = cost;
        strips = s;
      }
    }
    groups = ratio_up(lanes(), kPanel);
  }

  int64_t lanes() const { return samples * strips; }
  int64_t core() const { return height / strips; }
  int64_t halo() const { return strips == 1 ? 0 : reach; }
  int64_t rows() const { return core() + 2 * halo(); }
  int64_t positions() const { return rows() * width; }
};

// --- arrays to panels and back -------------------------------------------------------------------

// How a group's panels lie: (rows, margin + width + margin, channels).
struct Layout {
  int64_t rows, width, channels, margin;

  Layout(const Grid& grid, int64_t channels, int64_t margin = 0)
      : rows(grid.rows()), width(grid.width), channels(channels), margin(margin) {}
  int64_t at(int64_t y, int64_t x) const {
    return (y * (width + 2 * margin) + margin + x) * channels * kPanel;
  }
  int64_t floats() const { return rows * (width + 2 * margin) * channels * kPanel; }
};

// `count` positions of four images, `image` apart, to neighbouring lanes of panels `step` apart.
void stage_four(const float* from, int64_t image, int64_t count, float* panel, int64_t step) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    Quad rows[4];
    for (int l = 0; l < 4; ++l) std::memcpy(rows + l, from + l * image + i, sizeof(Quad));
    transpose(rows);
    for (int j = 0; j < 4; ++j) std::memcpy(panel + (i + j) * step, rows + j, sizeof(Quad));
  }
  for (; i < count; ++i)
    for (int64_t l = 0; l < 4; ++l) panel[i * step + l] = from[l * image + i];
}

// Lanes without an image, rows outside of it and margins are zero.
void stage(const Grid& grid, const Source& source, const Layout& layout, int64_t group, float* to) {
  const int64_t lanes = std::min(kPanel, grid.lanes() - group * kPanel);
  const int64_t plane = grid.height * grid.width, step = source.channels * kPanel;
  if (lanes < kPanel || grid.halo() > 0 || layout.margin > 0)
    std::fill(to, to + layout.floats(), 0.0f);
  // Whole images are one run of positions; so many at a time that their panels stay in the cache.
  const bool whole = grid.strips == 1 && layout.margin == 0;
  const int64_t run = whole ? std::min<int64_t>(plane, 32) : grid.width;
  for (int64_t begin = 0; begin < grid.positions(); begin += run) {
    const int64_t count = std::min(run, grid.positions() - begin);
    float* panels = to + (whole ? begin * step : layout.at(begin / run, 0));
    for (int64_t c = 0; c < source.channels; ++c) {
      float* panel = panels + c * kPanel;
      for (int64_t l = 0; l < lanes;) {
        const int64_t lane = group * kPanel + l, sample = lane / grid.strips;
        const int64_t above = (lane % grid.strips) * grid.core() - grid.halo();
        const int64_t position = above * grid.width + begin;
        const float* from = source.data + (sample * source.channels + c) * plane;
        if (grid.strips == 1 && l + 4 <= lanes) {
          stage_four(from + position, source.channels * plane, count, panel + l, step);
          l += 4;
          continue;
        }
        if (position >= 0 && position < plane)
          for (int64_t i = 0; i < count; ++i) panel[i * step + l] = from[position + i];
        ++l;
      }
    }
  }
}

// What a scatter adds to. With few channels a tile takes all taps of a row, and each row of panels has
// `reach` more on both sides for what lies outside of the image.
struct Target {
  int64_t channels, size, width, margin;

  Target(const Grid& grid, int64_t channels, int64_t size)
      : channels(channels), size(size), width(grid.width), margin(channels < 4 ? size / 2 : 0) {}

  bool joined() const { return margin > 0; }
  int64_t segment() const { return joined() ? size * channels : channels; }
  int64_t segments() const { return joined() ? size : size * size; }
  int64_t stride() const { return (width + 2 * margin) * channels * kPanel; }  // of a row
  // Of the packed weights of a segment: not a power of two, so that a hidden row's taps, which are
  // written together, do not all fall into the same set of the cache.
  int64_t weights(int64_t hidden) const { return segment() * hidden + 48; }
};

// to is (lanes, channels, rows, width), from the first lane of the group on.
void unstage(const Grid& grid, const Target& target, const float* from, int64_t group,
             const float* bias, float* to) {
  const int64_t lanes = std::min(kPanel, grid.lanes() - group * kPanel);
  const int64_t step = target.channels * kPanel;
  for (int64_t y = 0; y < grid.rows(); ++y)
    for (int64_t c = 0; c < target.channels; ++c) {
      const float* panel = from + y * target.stride() + target.margin * step + c * kPanel;
      const float shift = bias == nullptr ? 0.0f : bias[c];
      for (int64_t l = 0; l < lanes; ++l) {
        float* row = to + ((l * target.channels + c) * grid.rows() + y) * grid.width;
        for (int64_t x = 0; x < grid.width; ++x) row[x] = panel[x * step + l] + shift;
      }
    }
}

// What the items of different hidden rows, and strips, have to add up before it is the result.
struct Halves {
  int64_t splits;
  bool direct;
  int64_t each;  // floats of a split

  Halves(const Grid& grid, int64_t splits, int64_t channels)
      : splits(splits),
        direct(splits == 1 && grid.strips == 1),
        each(grid.lanes() * channels * grid.positions()) {}
  int64_t floats() const { return direct ? 0 : splits * each; }
};

void add_halves(const Grid& grid, const Halves& halves, int64_t channels, const float* from,
                const float* bias, int64_t sample, float* out) {
  const int64_t core = grid.core(), halo = grid.halo(), rows = grid.rows(), width = grid.width;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t y = 0; y < grid.height; ++y) {
      float* row = out + ((sample * channels + c) * grid.height + y) * width;
      std::fill(row, row + width, bias == nullptr ? 0.0f : bias[c]);
      for (int64_t split = 0; split < halves.splits; ++split)
        for (int64_t strip = std::max<int64_t>(0, (y - halo) / core);
             strip < std::min(grid.strips, (y + halo) / core + 1); ++strip) {
          const int64_t lane = sample * grid.strips + strip;
          const int64_t own = y - strip * core + halo;
          const float* part =
              from + split * halves.each + ((lane * channels + c) * rows + own) * width;
          for (int64_t x = 0; x < width; ++x) row[x] += part[x];
        }
    }
}

// --- weights -------------------------------------------------------------------------------------

void pack_gather(const Weights& weights, const Parts& hidden, int64_t tile, float* packed) {
  const int64_t begin = hidden.begin(tile), rows = hidden.length(tile);
  float* to = packed + begin * weights.taps() * weights.channels;
  for (int64_t c = 0; c < weights.channels; ++c)
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = weights.data + (begin + r) * weights.row + c * weights.channel;
      for (int64_t tap = 0; tap < weights.taps(); ++tap)
        to[(weights.seen(tap) * weights.channels + c) * rows + r] = from[tap];
    }
}

void pack_scatter(const Weights& weights, const Target& target, const Parts& hidden, int64_t tile,
                  float* packed) {
  const Parts parts(target.segment(), kTileRows);
  for (int64_t j = 0; j < parts.count; ++j) {
    const int64_t rows = parts.length(j);
    const float* channels[kTileRows];
    int64_t columns[kTileRows];
    for (int64_t r = 0; r < rows; ++r) {
      columns[r] = (parts.begin(j) + r) / weights.channels;
      channels[r] = weights.data + (parts.begin(j) + r) % weights.channels * weights.channel;
    }
    for (int64_t h = hidden.begin(tile); h < hidden.begin(tile + 1); ++h) {
      float taps[kMostSize * kMostSize][kTileRows];
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t tap = 0; tap < weights.taps(); ++tap)
          taps[weights.seen(tap)][r] = channels[r][h * weights.row + tap];
      float* to = packed + parts.begin(j) * hidden.size + h * rows;
      for (int64_t s = 0; s < target.segments(); ++s)
        for (int64_t r = 0; r < rows; ++r)
          to[s * target.weights(hidden.size) + r] =
              taps[target.joined() ? s * weights.size + columns[r] : s][r];
    }
  }
}

// --- products ------------------------------------------------------------------------------------

struct Window {  // the panels around a position, as stretches of neighbouring ones
  struct Row {
    int64_t first;  // tap and channel
    const float* values;
    int64_t count;
  };
  Row rows[kMostSize];
  int64_t count = 0;

  Window(const Grid& grid, const Layout& layout, const float* staged, int64_t y, int64_t x) {
    const int64_t reach = grid.reach, size = 2 * reach + 1;
    const int64_t left = std::max<int64_t>(0, reach - x);
    const int64_t right = std::min(size, grid.width + reach - x);
    for (int64_t dy = 0; dy < size; ++dy) {
      const int64_t row = y + dy - reach;
      if (row < 0 || row >= grid.rows()) continue;
      rows[count++] = {(dy * size + left) * layout.channels,
                       staged + layout.at(row, x + left - reach),
                       (right - left) * layout.channels};
    }
  }

  template <int tile_rows>
  void add_to(Tile<tile_rows>& tile, const float* weights) const {
    for (int64_t i = 0; i < count; ++i)
      tile.add({weights + rows[i].first * tile_rows, rows[i].values, rows[i].count});
  }
};

// relu(first convolution) for the tiles [begin, end) of hidden rows.
void hidden_panel(const Window& window, int64_t taps_channels, const Parts& hidden, Range tiles,
                  const float* packed, const float* bias, float* to) {
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const int64_t begin = hidden.begin(t), rows = hidden.length(t);
    with_constant<kTileRows>(rows, [&](auto constant) {
      Tile<constant> tile;
      tile.start(bias + begin);
      window.add_to(tile, packed + begin * taps_channels);
      tile.finish([&](Lanes sum, int64_t offset) { store(positive(sum), to + offset); });
    });
    to += rows * kPanel;
  }
}

void hidden_gradient_panel(const Window& window, int64_t taps_channels, const Parts& hidden,
                           Range tiles, const float* packed, const float* panel, float* to) {
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const int64_t begin = hidden.begin(t), rows = hidden.length(t);
    with_constant<kTileRows>(rows, [&](auto constant) {
      Tile<constant> tile;
      tile.clear();
      window.add_to(tile, packed + begin * taps_channels);
      tile.finish([&](Lanes sum, int64_t offset) {
        store(where_positive(load(panel + offset), sum), to + offset);
      });
    });
    to += rows * kPanel;
    panel += rows * kPanel;
  }
}

// Adds what the hidden rows [rows.begin, rows.end) at a position give to the panels around it.
void scatter(const Grid& grid, const Target& target, int64_t all_hidden, Range rows,
             const float* packed, const float* panel, int64_t y, int64_t x, float* to) {
  const int64_t size = target.size, reach = grid.reach, segment = target.segment();
  const Parts parts(segment, kTileRows);
  const int64_t left = target.joined() ? 0 : std::max<int64_t>(0, reach - x);
  const int64_t right = target.joined() ? 1 : std::min(size, grid.width + reach - x);
  for (int64_t dy = 0; dy < size; ++dy) {
    const int64_t row = y + dy - reach;
    if (row < 0 || row >= grid.rows()) continue;
    for (int64_t dx = left; dx < right; ++dx) {
      const int64_t column = target.joined() ? x : x + dx - reach;
      const int64_t number = target.joined() ? dy : dy * size + dx;
      float* out = to + row * target.stride() + column * target.channels * kPanel;
      const float* weights = packed + number * target.weights(all_hidden);
      add_hidden(parts, all_hidden, rows, weights, panel, false, out);
    }
  }
}

// --- forward -------------------------------------------------------------------------------------

struct Forward {
  Net net;
  Grid grid;
  Source source;
  const float* bias1;
  const float* bias2;
  float* out;
  Parts hidden;
  Target target;
  int64_t splits;
  Halves halves;
  float* packed1 = nullptr;
  float* packed2 = nullptr;
  float* partial = nullptr;

  Forward(const Net& net, const Grid& grid, const Source& source, const float* bias1,
          const float* bias2, float* out)
      : net(net),
        grid(grid),
        source(source),
        bias1(bias1),
        bias2(bias2),
        out(out),
        hidden(net.hidden, kTileRows),
        target(grid, net.outputs, net.size),
        splits(splits_of(hidden, grid.groups, flops())),
        halves(grid, splits, net.outputs) {}

  double flops() const {
    return net.flops() * static_cast<double>(grid.samples * grid.height * grid.width);
  }

  int64_t most_rows() const { return kHeldRows + kTileRows; }
  int64_t target_floats() const { return grid.rows() * target.stride(); }

  void item(int64_t group, int64_t split) const {
    const Layout layout(grid, net.inputs);
    const int64_t staged_floats = layout.floats();
    own_scratch.reserve(Scratch::rounded(staged_floats) + Scratch::rounded(target_floats()) +
                        most_rows() * kPanel);
    float* staged = own_scratch.take(staged_floats);
    float* sums = own_scratch.take(target_floats());
    float* panel = own_scratch.take(most_rows() * kPanel);
    stage(grid, source, layout, group, staged);
    std::fill(sums, sums + target_floats(), 0.0f);

    const Range tiles = part_of(hidden.count, splits, split);
    const int64_t blocks = ratio_up(tiles.size() * kTileRows, kHeldRows);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range own = part_of(tiles, blocks, block);
      const Range rows = held_by(own, hidden);
      for (int64_t y = grid.halo(); y < grid.halo() + grid.core(); ++y)
        for (int64_t x = 0; x < grid.width; ++x) {
          const Window window(grid, layout, staged, y, x);
          hidden_panel(window, net.taps() * net.inputs, hidden, own, packed1, bias1, panel);
          scatter(grid, target, net.hidden, rows, packed2, panel, y, x, sums);
        }
    }
    const int64_t first = group * kPanel * net.outputs * grid.positions();
    if (halves.direct)
      unstage(grid, target, sums, group, bias2, out + first);
    else
      unstage(grid, target, sums, group, nullptr, partial + split * halves.each + first);
  }

  void run(const float* weight1, const float* weight2, int64_t threads) {
    const int64_t first = net.hidden * net.taps() * net.inputs;
    const int64_t second = target.segments() * target.weights(net.hidden);
    shared_scratch.reserve(Scratch::rounded(first) + Scratch::rounded(second) + halves.floats());
    packed1 = shared_scratch.take(first);
    packed2 = shared_scratch.take(second);
    partial = shared_scratch.take(halves.floats());
    const Weights weights1 = first_weights(net, weight1), weights2 = second_weights(net, weight2);
    const int workers = team(elements(net, flops()), threads);
    const bool more_weights = net.hidden * net.taps() > grid.samples * grid.positions();
    const Work work(grid.groups, splits, more_weights, workers);

#pragma omp parallel num_threads(workers)
    {
      const NoDenormals no_denormals;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < hidden.count; ++t) {
        pack_gather(weights1, hidden, t, packed1);
        pack_scatter(weights2, target, hidden, t, packed2);
      }
      work.each([&](int64_t group, int64_t split) { item(group, split); });
      if (!halves.direct) {
#pragma omp for schedule(static)
        for (int64_t s = 0; s < grid.samples; ++s)
          add_halves(grid, halves, net.outputs, partial, bias2, s, out);
      }
    }
  }
};

// --- backward ------------------------------------------------------------------------------------

// What a gradient of weights takes products with. Of few channels, the taps of a row are seen together:
// they are neighbours, with a margin at both ends of the row, and there are enough of them for a tile.
struct Seen {
  Layout layout;
  Weights weights;
  bool joined;
  float* panels = nullptr;  // staged
  Pair* pairs[kMostSize * kMostSize];  // for each segment, of a held hidden panel and what it sees
  int64_t counts[kMostSize * kMostSize];

  Seen(const Grid& grid, const Weights& weights)
      : layout(grid, weights.channels, joins(grid, weights) ? grid.reach : 0),
        weights(weights),
        joined(layout.margin > 0) {}

  static bool joins(const Grid& grid, const Weights& weights) {
    return weights.channels <= 4 && grid.width >= 8;
  }
  int64_t segments() const { return joined ? weights.size : weights.taps(); }
  int64_t columns() const { return joined ? weights.size * weights.channels : weights.channels; }

  // Where the gradient of a segment's column is, for hidden row 0.
  int64_t place(int64_t segment, int64_t column) const {
    const int64_t tap = joined ? segment * weights.size + column / weights.channels : segment;
    return column % weights.channels * weights.channel + weights.seen(tap);
  }
};

struct Backward {
  Net net;
  Grid grid;
  Source grad, source;
  const float* bias1;
  float* grad_in;
  Gradients results;
  Parts hidden;
  Target target;
  int64_t groups_held, rows_held, chunks, splits;
  Halves halves;
  float* packed1 = nullptr;
  float* packed2 = nullptr;
  float* packed_in = nullptr;
  float* partial_in = nullptr;
  float* partials = nullptr;

  Backward(const Net& net, const Grid& grid, const Source& grad, const Source& source,
           const float* bias1, float* grad_in, const Gradients& results)
      : net(net),
        grid(grid),
        grad(grad),
        source(source),
        bias1(bias1),
        grad_in(grad_in),
        results(results),
        hidden(net.hidden, kTileRows),
        target(grid, net.inputs, net.size),
        groups_held(
            std::clamp<int64_t>(kHeldPanels / (grid.core() * grid.width), 1, grid.groups)),
        rows_held(std::clamp<int64_t>(kHeldPanels / grid.width, 1, grid.core())),
        chunks(std::clamp<int64_t>(kPartialFloats / partial_floats(), 1,
                                   std::min(ratio_up(grid.groups, groups_held), 2 * kItems))),
        splits(splits_of(hidden, chunks, flops())),
        halves(grid, splits, net.inputs) {}

  double flops() const {
    return net.flops() * kBackwardFlops *
           static_cast<double>(grid.samples * grid.height * grid.width);
  }

  int64_t partial_floats() const {
    return Scratch::rounded(net.weights() + net.hidden + net.outputs);
  }

  int64_t held_panels() const { return groups_held * rows_held * grid.width; }
  int64_t most_rows() const { return kHeldRows + kTileRows; }

  Gradients partial(int64_t chunk) const {
    if (chunks == 1) return results;
    const int64_t first = net.hidden * net.taps() * net.inputs;
    const int64_t second = net.hidden * net.taps() * net.outputs;
    float* weight1 = partials + chunk * partial_floats();
    float* weight2 = weight1 + first;
    return {weight1, weight2 + second, weight2, weight2 + second + net.hidden};
  }

  // Held hidden panels are stride apart.
  void find_pairs(const Held& held, int64_t stride, Seen& seen) const {
    for (int64_t segment = 0; segment < seen.segments(); ++segment) {
      const int64_t down = (seen.joined ? segment : segment / net.size) - grid.reach;
      const int64_t right = (seen.joined ? 0 : segment % net.size) - grid.reach;
      int64_t panel = 0, count = 0;
      for (int64_t k = 0; k < held.groups; ++k)
        for (int64_t y = held.rows.begin; y < held.rows.end; ++y)
          for (int64_t x = 0; x < grid.width; ++x, ++panel) {
            const int64_t row = y + down, column = x + right;
            if (row < 0 || row >= grid.rows()) continue;
            if (!seen.joined && (column < 0 || column >= grid.width)) continue;
            seen.pairs[segment][count++] = {
                panel * stride, k * seen.layout.floats() + seen.layout.at(row, column)};
          }
      seen.counts[segment] = count;
    }
  }

  // to += inner products of the hidden rows with what they see. The rows of a tile stay in the
  // first-level cache from segment to segment.
  static void weight_gradients(const float* panels, int64_t rows, const Seen& seen, float* to) {
    const Parts columns(seen.columns(), kInnerColumns);
    for (int64_t j = 0; j < columns.count; ++j)
      with_constant<kInnerColumns>(columns.length(j), [&](auto wide) {
        constexpr int most = inner_rows(wide);
        const Parts tiles(rows, most);
        const int64_t first = columns.begin(j);
        int64_t places[kMostSize * kMostSize][wide];
        for (int64_t segment = 0; segment < seen.segments(); ++segment)
          for (int c = 0; c < wide; ++c) places[segment][c] = seen.place(segment, first + c);
        for (int64_t i = 0; i < tiles.count; ++i)
          with_constant<most>(tiles.length(i), [&](auto high) {
            const int64_t r = tiles.begin(i);
            for (int64_t segment = 0; segment < seen.segments(); ++segment)
              inner_products<high, wide>(panels + r * kPanel, seen.panels + first * kPanel,
                                         seen.pairs[segment], seen.counts[segment],
                                         seen.weights.row, places[segment],
                                         to + r * seen.weights.row);
          });
      });
  }

  void start(Range rows, bool with_bias2, const Gradients& sums) const {
    const int64_t wide = net.taps() * net.inputs, taps = net.taps();
    std::fill(sums.weight1 + rows.begin * wide, sums.weight1 + rows.end * wide, 0.0f);
    std::fill(sums.bias1 + rows.begin, sums.bias1 + rows.end, 0.0f);
    for (int64_t c = 0; c < net.outputs; ++c) {
      float* own = sums.weight2 + c * net.hidden * taps;
      std::fill(own + rows.begin * taps, own + rows.end * taps, 0.0f);
    }
    if (with_bias2) std::fill(sums.bias2, sums.bias2 + net.outputs, 0.0f);
  }

  void add_bias2(const Seen& grad, int64_t groups, float* to) const {
    const int64_t last = grid.halo() + grid.core();
    for (int64_t k = 0; k < groups; ++k)
      // Rows of the halo belong to the strips next to this one.
      for (int64_t y = grid.halo(); y < last; ++y)
        add_row_sums(grad.panels + k * grad.layout.floats() + grad.layout.at(y, 0),
                     net.outputs * kPanel, grid.width, net.outputs, to);
  }

  void item(int64_t chunk, int64_t split) const {
    Seen in(grid, first_weights(net, nullptr)), out(grid, second_weights(net, nullptr));
    const int64_t sum_step = grid.rows() * target.stride();
    // A little more than the rows, so that panels do not all lie at the same place of a page.
    const int64_t stride = (most_rows() + 3) * kPanel;
    constexpr int64_t pair_floats = sizeof(Pair) / sizeof(float);
    const int64_t pairs_floats = 2 * net.taps() * held_panels() * pair_floats;
    own_scratch.reserve(groups_held * (in.layout.floats() + out.layout.floats() + sum_step) +
                        2 * held_panels() * stride + pairs_floats + 6 * 16);
    in.panels = own_scratch.take(groups_held * in.layout.floats());
    out.panels = own_scratch.take(groups_held * out.layout.floats());
    float* sums_in = own_scratch.take(groups_held * sum_step);
    float* panels = own_scratch.take(held_panels() * stride);
    float* grad_panels = own_scratch.take(held_panels() * stride);
    Pair* pairs = reinterpret_cast<Pair*>(own_scratch.take(pairs_floats));
    for (int64_t tap = 0; tap < net.taps(); ++tap) {
      in.pairs[tap] = pairs + 2 * tap * held_panels();
      out.pairs[tap] = pairs + (2 * tap + 1) * held_panels();
    }

    const Range tiles = part_of(hidden.count, splits, split);
    const Gradients sums = partial(chunk);
    start(held_by(tiles, hidden), split == 0, sums);
    const Range groups = part_of(grid.groups, chunks, chunk);
    for (int64_t g = groups.begin; g < groups.end; g += groups_held) {
      const int64_t count = std::min(groups_held, groups.end - g);
      for (int64_t k = 0; k < count; ++k) {
        stage(grid, source, in.layout, g + k, in.panels + k * in.layout.floats());
        stage(grid, grad, out.layout, g + k, out.panels + k * out.layout.floats());
      }
      std::fill(sums_in, sums_in + count * sum_step, 0.0f);
      if (split == 0) add_bias2(out, count, sums.bias2);
      const int64_t first = grid.halo(), last = first + grid.core();
      for (int64_t y = first; y < last; y += rows_held) {
        const Held held{count, {y, std::min(y + rows_held, last)}};
        find_pairs(held, stride, in);
        find_pairs(held, stride, out);
        hold(held, tiles, in, out, panels, grad_panels, stride, sums, sums_in);
      }
      for (int64_t k = 0; k < count; ++k) {
        const int64_t at = (g + k) * kPanel * net.inputs * grid.positions();
        float* to = halves.direct ? grad_in : partial_in + split * halves.each;
        unstage(grid, target, sums_in + k * sum_step, g + k, nullptr, to + at);
      }
    }
  }

  void hold(const Held& held, Range tiles, const Seen& in, const Seen& out, float* panels,
            float* grad_panels, int64_t stride, const Gradients& sums, float* sums_in) const {
    const int64_t sum_step = grid.rows() * target.stride();
    const int64_t blocks = ratio_up(tiles.size() * kTileRows, kHeldRows);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range own = part_of(tiles, blocks, block);
      const Range rows = held_by(own, hidden);
      const auto for_each_panel = [&](const auto& f) {
        int64_t panel = 0;
        for (int64_t k = 0; k < held.groups; ++k)
          for (int64_t y = held.rows.begin; y < held.rows.end; ++y)
            for (int64_t x = 0; x < grid.width; ++x, ++panel) f(k, y, x, panel * stride);
        return panel;
      };
      const int64_t count = for_each_panel([&](int64_t k, int64_t y, int64_t x, int64_t offset) {
        const Window window(grid, in.layout, in.panels + k * in.layout.floats(), y, x);
        hidden_panel(window, net.taps() * net.inputs, hidden, own, packed1, bias1,
                     panels + offset);
        const Window window_grad(grid, out.layout, out.panels + k * out.layout.floats(), y, x);
        hidden_gradient_panel(window_grad, net.taps() * net.outputs, hidden, own, packed2,
                              panels + offset, grad_panels + offset);
        scatter(grid, target, net.hidden, rows, packed_in, grad_panels + offset, y, x,
                sums_in + k * sum_step);
      });
      add_row_sums(grad_panels, stride, count, rows.end - rows.begin, sums.bias1 + rows.begin);
      weight_gradients(panels, rows.end - rows.begin, out,
                       sums.weight2 + rows.begin * out.weights.row);
      weight_gradients(grad_panels, rows.end - rows.begin, in,
                       sums.weight1 + rows.begin * in.weights.row);
    }
  }

  void add_partials(Range own, int64_t offset, float* to) const {
    std::copy(partials + offset + own.begin, partials + offset + own.end, to + own.begin);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const float* from = partials + chunk * partial_floats() + offset;
      for (int64_t i = own.begin; i < own.end; ++i) to[i] += from[i];
    }
  }

  void run(const float* weight1, const float* weight2, int64_t threads) {
    const int64_t first = net.hidden * net.taps() * net.inputs;
    const int64_t second = net.hidden * net.taps() * net.outputs;
    const int64_t of_scatter = target.segments() * target.weights(net.hidden);
    const int64_t all_partials = chunks == 1 ? 0 : chunks * partial_floats();
    shared_scratch.reserve(Scratch::rounded(first) + Scratch::rounded(of_scatter) +
                           Scratch::rounded(second) + Scratch::rounded(halves.floats()) +
                           all_partials);
    packed1 = shared_scratch.take(first);
    packed_in = shared_scratch.take(of_scatter);
    packed2 = shared_scratch.take(second);
    partial_in = shared_scratch.take(halves.floats());
    partials = shared_scratch.take(all_partials);
    const Weights weights1 = first_weights(net, weight1), weights2 = second_weights(net, weight2);
    const int workers = team(elements(net, flops()), threads);
    const bool more_weights = net.hidden * net.taps() > grid.samples * grid.positions();
    const Work work(chunks, splits, more_weights, workers);

#pragma omp parallel num_threads(workers)
    {
      const NoDenormals no_denormals;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < hidden.count; ++t) {
        pack_gather(weights1, hidden, t, packed1);
        pack_gather(weights2, hidden, t, packed2);
        pack_scatter(weights1, target, hidden, t, packed_in);
      }
      work.each([&](int64_t chunk, int64_t split) { item(chunk, split); });
      if (!halves.direct) {
#pragma omp for schedule(static) nowait
        for (int64_t s = 0; s < grid.samples; ++s)
          add_halves(grid, halves, net.inputs, partial_in, nullptr, s, grad_in);
      }
      if (chunks > 1) {
        constexpr int64_t parts = 64;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < parts; ++i) {
          add_partials(part_of(first, parts, i), 0, results.weight1);
          add_partials(part_of(second, parts, i), first, results.weight2);
          add_partials(part_of(net.hidden, parts, i), first + second, results.bias1);
          add_partials(part_of(net.outputs, parts, i), first + second + net.hidden, results.bias2);
        }
      }
    }
  }
};

// Runs f(blocks) if products of their points, and what it takes to transform these, are fewer than the
// products of taps, without those outside of the image.
template <class Line, class F>
bool in_blocks(const Net& net, const Grid& grid, const F& f) {
  winograd::Blocks<Line> blocks(grid.samples, grid.height, grid.width);
  if (net.size != winograd::kTaps || !blocks.fits()) return false;
  const int64_t rows = grid.strips == 1 ? 3 * grid.height - 2 : 3 * grid.core();
  const int64_t channels = net.inputs + net.outputs;
  if (blocks.all_groups() * (winograd::kPoints<Line> * channels + Line::transforms) >=
      grid.groups * rows * (3 * grid.width - 2) * channels)
    return false;
  blocks.find_places();
  f(blocks);
  return true;
}

template <class F>
bool in_any_blocks(const Net& net, const Grid& grid, const F& f) {
  return in_blocks<winograd::LineOfFour>(net, grid, f) ||
         in_blocks<winograd::LineOfTwo>(net, grid, f);
}

}  // namespace

// a (samples, inputs, height, width), weights and biases as those of nn.Conv2d -> out (samples, outputs,
// height, width).
HYBRIDFLOW_KERNEL(conv_conditioner)
(const float* a, const float* weight1, const float* bias1, const float* weight2, const float* bias2,
 float* out, int64_t samples, int64_t height, int64_t width, int64_t inputs, int64_t hidden,
 int64_t outputs, int64_t size, int64_t threads) {
  const Net net{inputs, hidden, outputs, size};
  const Grid grid(samples, height, width, net.reach());
  if (grid.groups == 0) return;
  const Source source{a, inputs};
  if (in_any_blocks(net, grid, [&](const auto& blocks) {
        winograd::Forward(net, blocks, source, bias1, bias2, out).run(weight1, weight2, threads);
      }))
    return;
  Forward(net, grid, source, bias1, bias2, out).run(weight1, weight2, threads);
}

// The gradients of the convolutions' operands; that of their input is (samples, inputs, height, width).
HYBRIDFLOW_KERNEL(conv_conditioner_backward)
(const float* grad, const float* a, const float* weight1, const float* bias1, const float* weight2,
 float* grad_in, float* grad_weight1, float* grad_bias1, float* grad_weight2, float* grad_bias2,
 int64_t samples, int64_t height, int64_t width, int64_t inputs, int64_t hidden, int64_t outputs,
 int64_t size, int64_t threads) {
  const Net net{inputs, hidden, outputs, size};
  const Grid grid(samples, height, width, net.reach());
  if (grid.groups == 0) {
    std::fill(grad_weight1, grad_weight1 + hidden * inputs * net.taps(), 0.0f);
    std::fill(grad_weight2, grad_weight2 + hidden * outputs * net.taps(), 0.0f);
    std::fill(grad_bias1, grad_bias1 + hidden, 0.0f);
    std::fill(grad_bias2, grad_bias2 + outputs, 0.0f);
    return;
  }
  const Source from_grad{grad, outputs};
  const Source source{a, inputs};
  const Gradients results{grad_weight1, grad_bias1, grad_weight2, grad_bias2};
  if (in_any_blocks(net, grid, [&](const auto& blocks) {
        winograd::Backward(net, blocks, from_grad, source, bias1, grad_in, results)
            .run(weight1, weight2, threads);
      }))
    return;
  Backward(net, grid, from_grad, source, bias1, grad_in, results).run(weight1, weight2, threads);
}
