// The two convolutions of a conditioner and their operands, as all its kernels on the CPU see them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "native/items.h"
#include "native/memory.h"
#include "native/native.h"
#include "native/panels.h"

namespace {

constexpr int64_t kMostSize = 3;         // of the convolutions' windows
constexpr int64_t kItems = 16;           // of work, where there is enough of it
constexpr int64_t kItemFlops = 1 << 22;  // enough
constexpr int64_t kPartialFloats = 1 << 20;  // of the weights' gradients, over all chunks

thread_local Scratch shared_scratch, own_scratch;  // of the calling thread, for all; of each thread

struct Net {
  int64_t inputs, hidden, outputs, size;

  int64_t taps() const { return size * size; }
  int64_t reach() const { return size / 2; }
  int64_t weights() const { return hidden * taps() * (inputs + outputs); }
  // Multiplications and additions of one position, all taps counted.
  double flops() const { return 2.0 * static_cast<double>(weights()); }
};

// Of the backward, for one of the forward.
constexpr double kBackwardFlops = 2.33;

struct Source {  // (samples, channels, height, width)
  const float* data;
  int64_t channels;
};

struct Weights {  // of hidden row h, channel c and a tap: data[h * row + c * channel + tap]
  const float* data;
  int64_t row, channel, channels;
  int64_t size;
  bool flipped;  // tap t is seen as the last minus t

  int64_t taps() const { return size * size; }
  int64_t seen(int64_t tap) const { return flipped ? taps() - 1 - tap : tap; }
};

Weights first_weights(const Net& net, const float* data) {
  return {data, net.inputs * net.taps(), net.taps(), net.inputs, net.size, false};
}

// The second convolution's position is that of its output, ours that of the hidden layer.
Weights second_weights(const Net& net, const float* data) {
  return {data, net.taps(), net.hidden * net.taps(), net.outputs, net.size, true};
}

struct Gradients {  // of a chunk, each in the layout of what it belongs to
  float* weight1;
  float* bias1;
  float* weight2;
  float* bias2;
};

// The positions whose hidden layer is held: rows [rows.begin, rows.end) of so many staged groups.
struct Held {
  int64_t groups;
  Range rows;
};

// Adds to the panels of `columns`, which are neighbours, what the hidden rows give to them, or writes it if
// they are `fresh`; weights are packed as tile of columns x hidden row x row of the tile.
HYBRIDFLOW_INLINE void add_hidden(const Parts& columns, int64_t all_hidden, Range rows,
                                  const float* weights, const float* panel, bool fresh, float* to) {
  for (int64_t j = 0; j < columns.count; ++j) {
    float* panels = to + columns.begin(j) * kPanel;
    with_constant<kTileRows>(columns.length(j), [&](auto constant) {
      Tile<constant> tile;
      tile.clear();
      tile.add({weights + columns.begin(j) * all_hidden + rows.begin * constant, panel, rows.size()});
      if (fresh)
        tile.finish([&](Lanes sum, int64_t offset) { store(sum, panels + offset); });
      else
        tile.finish([&](Lanes sum, int64_t offset) {
          store(load(panels + offset) + sum, panels + offset);
        });
    });
  }
}

// Of an elementwise operation that takes as long, about; each weight is moved once or twice.
int64_t elements(const Net& net, double flops) {
  return static_cast<int64_t>(flops / 256) + net.weights() / 2;
}

// Ranges into which the hidden rows are cut, for there to be enough items.
int64_t splits_of(const Parts& hidden, int64_t chunks, double flops) {
  const int64_t wanted = std::min(ratio_up(kItems, chunks), hidden.count / 4);
  const double affordable = flops / static_cast<double>(kItemFlops * chunks);
  return std::max<int64_t>(1, std::min(wanted, static_cast<int64_t>(affordable)));
}

// The work of all chunks of images on all ranges of hidden rows. A thread keeps to images or, `rows_first`, where
// the weights of the hidden rows are the larger and there are ranges of them, to these.
struct Work {
  int64_t chunks, splits;
  bool rows_first;
  Items items;

  Work(int64_t chunks, int64_t splits, bool more_weights, int workers)
      : chunks(chunks),
        splits(splits),
        rows_first(splits > 1 && more_weights),
        items(chunks * splits, workers) {}

  // f(chunk, split), by the threads of a team.
  template <class F>
  void each(const F& f) const {
    items.each([&](int64_t i) {
      if (rows_first)
        f(i % chunks, i / chunks);
      else
        f(i / splits, i % splits);
    });
  }
};

}  // namespace
