// The conditioner of a coupling, convolution, ReLU, convolution, and its gradients, by products of matrices
// in tiles of bfloat16, one or two of which stand for a float32.
//
// Pixels are columns. A chunk of whole images is split once, channel by channel; the windows of its pixels
// are a matrix with a row for each channel and tap, made by reading the channels shifted, and what comes of
// a product with such rows is added up shifted back. The hidden layer is held for some rows and all pixels
// of a chunk: on the right of the product with the second convolution's weights, and on the left of that
// with windows which gives the gradient of weights. In rows of 32 pixels on the left, parts of four are in
// mixed order, which is the order in which they then are interleaved without another shuffle.
// An item of work is a group of chunks and a range of hidden rows. The items, and the order of every sum,
// depend on the shape alone.
#include <algorithm>

#include "native/items.h"
#include "native/memory.h"
#include "native/native.h"
#include "native/panels.h"
#include "native/tiles.h"

namespace {

constexpr int64_t kHeldRows = 512;           // of the hidden layer
constexpr int64_t kChunkPixels = 256;        // where images are not larger
constexpr int64_t kItems = 16;               // of work, where there is enough of it
constexpr int64_t kPartialFloats = 1 << 20;  // of the weights' gradients, over all groups

thread_local Scratch shared_scratch, own_scratch;  // of the calling thread, for all; of each thread

Half* take_halves(Scratch& scratch, int64_t count) {
  return reinterpret_cast<Half*>(scratch.take(ratio_up(count, 2)));
}
int64_t of_halves(int64_t count) { return Scratch::rounded(ratio_up(count, 2)); }

// --- shapes --------------------------------------------------------------------------------------

// The windows of a convolution: rows, one for each channel and tap.
struct Windows {
  int64_t channels, taps;

  int64_t rows() const { return channels * taps; }
  int64_t depth() const { return ratio_up(rows(), kDepth); }
  int64_t tiles() const { return ratio_up(rows(), kTile); }
};

struct Shape {
  int64_t samples, height, width, inputs, hidden, outputs, size;

  int64_t plane() const { return height * width; }
  int64_t taps() const { return size * size; }
  Windows first() const { return {inputs, taps()}; }
  Windows second() const { return {outputs, taps()}; }
  int64_t hidden_depth() const { return ratio_up(hidden, kDepth); }
  int64_t hidden_rows() const { return hidden_depth() * kDepth; }
  int64_t weights() const { return hidden * (first().rows() + second().rows()); }
  // Of what the gradient of the first weights is a product with: a row of ones gives that of the bias.
  int64_t first_tiles() const { return ratio_up(first().rows() + 1, kTile); }

  int64_t offset(int64_t tap) const {  // from a pixel to what the tap sees
    return (tap / size - size / 2) * width + tap % size - size / 2;
  }
  bool sees(int64_t tap, int64_t pixel) const {
    const int64_t y = pixel / width + tap / size - size / 2, x = pixel % width + tap % size - size / 2;
    return y >= 0 && y < height && x >= 0 && x < width;
  }
};

struct Plan {
  Shape shape;
  int64_t images, chunks;  // images of a chunk
  int64_t blocks;          // of 32 pixels in a chunk
  int64_t groups, splits;  // of chunks, of the parts that are held
  int64_t held;            // parts of the hidden rows, of which one at a time is held

  Plan(const Shape& shape, int64_t partial_floats)
      : shape(shape), held(ratio_up(shape.hidden_rows(), kHeldRows)) {
    images = std::max<int64_t>(1, std::min(kChunkPixels / shape.plane(), shape.samples));
    chunks = ratio_up(shape.samples, images);
    blocks = blocks_of(images);
    const int64_t affordable = partial_floats == 0 ? chunks : kPartialFloats / partial_floats;
    const int64_t most_groups = partial_floats == 0 ? chunks : kItems;
    groups = std::max<int64_t>(1, std::min({chunks, affordable, most_groups}));
    splits = std::min(held, std::max<int64_t>(1, kItems / groups));
  }

  Range images_of(int64_t chunk) const {
    return {chunk * images, std::min((chunk + 1) * images, shape.samples)};
  }
  int64_t blocks_of(int64_t some_images) const {
    return ratio_up(some_images * shape.plane(), kDepth);
  }
  int64_t pixels() const { return blocks * kDepth; }
  int64_t items() const { return groups * splits; }
  int64_t stride() const { return pixels() + kTile; }  // of rows of floats; no power of two
  Range held_rows(int64_t i) const {
    const Range tiles = part_of(shape.hidden_depth(), held, i);
    return {tiles.begin * kDepth, tiles.end * kDepth};
  }
  int64_t most_held() const { return ratio_up(shape.hidden_depth(), held) * kDepth; }
  // Threads are worth it from the time on that an elementwise operation on so many elements takes.
  int64_t elements() const {
    const int64_t products = shape.samples * shape.plane() * shape.weights();
    return products / 1024 + shape.weights() / 2;
  }
};

// --- windows -------------------------------------------------------------------------------------

// For each tap, and for none and for all, a bit for each pixel of a chunk: whether it sees one.
class Masks {
 public:
  explicit Masks(const Plan& plan)
      : blocks_(plan.blocks), taps_(plan.shape.taps()), bits_((taps_ + 2) * blocks_) {
    const int64_t plane = plan.shape.plane();
    std::fill(bits_.get(), bits_.get() + (taps_ + 2) * blocks_, 0u);
    std::fill(bits_.get() + (taps_ + 1) * blocks_, bits_.get() + (taps_ + 2) * blocks_, ~0u);
    for (int64_t tap = 0; tap < taps_; ++tap)
      for (int64_t pixel = 0; pixel < plan.images * plane; ++pixel)
        if (plan.shape.sees(tap, pixel % plane))
          bits_[tap * blocks_ + pixel / kDepth] |= 1u << (pixel % kDepth);
  }

  const uint32_t* tap(int64_t tap) const { return bits_ + tap * blocks_; }
  const uint32_t* none() const { return tap(taps_); }
  const uint32_t* all() const { return tap(taps_ + 1); }

 private:
  int64_t blocks_, taps_;
  Memory<uint32_t> bits_;
};

// The channels of a chunk in parts of bfloat16, seen through windows. Flipped, a tap sees what the last minus the tap
// sees: so the gradient of what a convolution reads sees that of what it gives.
template <int parts>
class View {
 public:
  View(const Plan& plan, const Masks& masks, const Windows& windows, bool flipped, Half* planes)
      : plan_(plan),
        windows_(windows),
        planes_(planes),
        rows_(padded_rows(windows)) {
    for (int64_t row = 0; row < padded_rows(windows); ++row) rows_[row] = {planes, masks.none()};
    for (int64_t row = 0; row < windows.rows(); ++row) {
      const int64_t tap = row % windows.taps, seen = flipped ? windows.taps - 1 - tap : tap;
      rows_[row] = {plane(row / windows.taps) + plan.shape.offset(seen), masks.tap(seen)};
    }
    Half* ones = plane(windows.channels);
    std::fill(ones, ones + plan.pixels(), Half{0x3f80});
    for (int part = 1; part < parts; ++part)
      std::fill(ones + part * step(), ones + part * step() + plan.pixels(), Half{0});
    rows_[windows.rows()] = {ones, masks.all()};
  }

  static int64_t halves(const Plan& plan, const Windows& windows) {
    return parts * part_halves(plan, windows);
  }

  // from is (images, channels, height, width)
  void stage(const float* from, int64_t images) {
    const int64_t size = plan_.shape.plane();
    blocks_ = plan_.blocks_of(images);
    for (int64_t channel = 0; channel < windows_.channels; ++channel) {
      Half* to = plane(channel);
      for (int64_t image = 0; image < images; ++image)
        for (int64_t i = 0; i < size; i += kDepth)
          split_row<parts>(from + (image * windows_.channels + channel) * size + i, size - i,
                           to + image * size + i, step());
      for (int part = 0; part < parts; ++part)
        std::fill(to + part * step() + images * size, to + part * step() + blocks_ * kDepth, Half{0});
    }
  }

  // Cells on the right, (pixels / 16, depth): columns are pixels, in mixed order.
  void put_pixels_in_columns(Half* to) const {
    const int64_t depth = windows_.depth();
    for (int64_t block = 0; block < blocks_; ++block)
      for (int64_t pair = 0; pair < depth * kTile; ++pair)
        for (int part = 0; part < parts; ++part) {
          Halves x, y, first, second;
          see(2 * pair, block, part, x);
          see(2 * pair + 1, block, part, y);
          spread(x);
          spread(y);
          interleave(x, y, first, second);
          Half* at = to + (2 * block * depth + pair / kTile) * kCell<parts> + part * kTileHalves +
                     pair % kTile * kDepth;
          write(first, at);
          write(second, at + depth * kCell<parts>);
        }
  }

  // Cells on the right, (tiles, pixels / 32): columns are rows of the windows, and the one of ones.
  void put_pixels_in_depth(int64_t tiles, Half* to) const {
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t block = 0; block < blocks_; ++block)
        for (int part = 0; part < parts; ++part) {
          Halves rows[kTile];
          for (int64_t r = 0; r < kTile; ++r) see(tile * kTile + r, block, part, rows[r]);
          put_pairs_in_rows(reinterpret_cast<const Half*>(rows),
                            to + (tile * blocks_ + block) * kCell<parts> + part * kTileHalves);
        }
  }

  int64_t blocks() const { return blocks_; }  // of what is staged

 private:
  struct Row {
    const Half* from;
    const uint32_t* bits;
  };

  static int64_t padded_rows(const Windows& windows) {
    return ratio_up(windows.rows() + 1, kDepth) * kDepth;
  }
  static int64_t stride(const Plan& plan) { return plan.pixels() + kDepth; }
  // A row more than there are channels, and room for what is written in whole vectors.
  static int64_t part_halves(const Plan& plan, const Windows& windows) {
    return (windows.channels + 1) * stride(plan);
  }
  int64_t step() const { return part_halves(plan_, windows_); }
  Half* plane(int64_t channel) const { return planes_ + channel * stride(plan_); }

  void see(int64_t row, int64_t block, int part, Halves& to) const {
    read_some(rows_[row].from + part * step() + block * kDepth, rows_[row].bits[block], to);
  }

  static void put_pairs_in_rows(const Half* rows, Half* to) {
    for (int64_t pairs = 0; pairs < kTile; pairs += 4)
      for (int64_t r = 0; r < kTile; r += 4) {
        Quad quads[4];
        for (int64_t i = 0; i < 4; ++i)
          std::memcpy(quads + i, rows + (r + i) * kDepth + 2 * pairs, sizeof(Quad));
        transpose(quads);
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t row = 2 * mixed((pairs + i) / 2) + i % 2;
          std::memcpy(to + row * kDepth + 2 * r, quads + i, sizeof(Quad));
        }
      }
  }

  const Plan& plan_;
  Windows windows_;
  Half* planes_;
  Memory<Row> rows_;
  int64_t blocks_ = 0;
};

// to (images, channels, height, width) = the sum of each channel's rows, one for each tap, shifted back.
void fold_windows(const Plan& plan, const Masks& masks, const Windows& windows, bool flipped,
                  const float* rows, const float* bias, int64_t images, float* line, float* to) {
  const int64_t size = plan.shape.plane(), vectors = ratio_up(images * size, kTile);
  for (int64_t channel = 0; channel < windows.channels; ++channel) {
    for (int64_t v = 0; v < vectors; ++v) {
      Floats sum = (bias == nullptr ? 0.0f : bias[channel]) - Floats{};
      for (int64_t tap = 0; tap < windows.taps; ++tap) {
        const int64_t seen = flipped ? windows.taps - 1 - tap : tap;
        const float* row = rows + (channel * windows.taps + tap) * plan.stride();
        const uint32_t bits = masks.tap(seen)[v / 2] >> (v % 2 * kTile);
        Floats value;
        read_some(row + plan.shape.offset(seen) + v * kTile, static_cast<uint16_t>(bits), value);
        sum += value;
      }
      write(sum, line + v * kTile);
    }
    for (int64_t image = 0; image < images; ++image)
      std::copy(line + image * size, line + (image + 1) * size,
                to + (image * windows.channels + channel) * size);
  }
}

// --- weights -------------------------------------------------------------------------------------

struct PackedWeights {
  Half* by_hidden;   // on the left, (hidden / 16, depth of the windows)
  Half* by_windows;  // on the left, (windows' tiles, hidden / 32)
};

// `lines` are the hidden rows block * 32 and on, with zeros up to the windows' whole depth.
template <int parts>
void pack_weights(const Shape& shape, const Windows& windows, int64_t block, const float* lines,
                  const PackedWeights& to) {
  const int64_t depth = windows.depth(), length = depth * kDepth;
  if (to.by_hidden != nullptr)
    for (int64_t r = 0; r < kDepth; ++r)
      for (int64_t k = 0; k < depth; ++k)
        split_row<parts>(lines + r * length + k * kDepth, kDepth,
                         to.by_hidden + ((2 * block + r / kTile) * depth + k) * kCell<parts> +
                             r % kTile * kDepth,
                         kTileHalves);
  if (to.by_windows != nullptr)
    for (int64_t row = 0; row < windows.tiles() * kTile; row += 4) {
      float columns[4 * kDepth];
      for (int64_t r = 0; r < kDepth; r += 4) {
        Quad quads[4];
        for (int64_t i = 0; i < 4; ++i)
          std::memcpy(quads + i, lines + (r + i) * length + row, sizeof(Quad));
        transpose(quads);
        for (int64_t i = 0; i < 4; ++i) std::memcpy(columns + i * kDepth + r, quads + i, sizeof(Quad));
      }
      Half* cell = to.by_windows + (row / kTile * shape.hidden_depth() + block) * kCell<parts>;
      for (int64_t i = 0; i < 4; ++i)
        split_row<parts>(columns + i * kDepth, kDepth, cell + (row + i) % kTile * kDepth,
                         kTileHalves);
    }
}

Range rows_of(const Shape& shape, int64_t block) {
  return {block * kDepth, std::min((block + 1) * kDepth, shape.hidden)};
}

// f(run, i, j): elements i, ... i + run - 1 of a tensor of the second weights are elements j, ... of rows
// whose first is range.begin.
template <class F>
void for_each_run(const Shape& shape, Range range, int64_t length, const F& f) {
  const auto of_taps = [&](auto taps) {
    for (int64_t output = 0; output < shape.outputs; ++output)
      for (int64_t row = range.begin; row < range.end; ++row)
        f(taps, (output * shape.hidden + row) * taps, (row - range.begin) * length + output * taps);
  };
  if (shape.size == 1)
    of_taps(std::integral_constant<int64_t, 1>());
  else
    of_taps(std::integral_constant<int64_t, 9>());
}

// Of 32 rows of which so many are there, what follows so many floats of each, and the others.
void clear_padding(int64_t rows, int64_t floats, int64_t length, float* lines) {
  for (int64_t r = 0; r < kDepth; ++r)
    std::fill(lines + r * length + (r < rows ? floats : 0), lines + (r + 1) * length, 0.0f);
}

int64_t lines_floats(const Shape& shape) {
  return std::max(shape.first().depth(), shape.second().depth()) * kDepth * kDepth;
}

// The hidden rows of a block, of both weights; `lines` is for use meanwhile.
template <int parts>
void pack(const Shape& shape, int64_t block, const float* weight1, const float* weight2,
          float* lines, const PackedWeights& to1, const PackedWeights& to2) {
  const Range range = rows_of(shape, block);
  const Windows first = shape.first(), second = shape.second();
  const int64_t length1 = first.depth() * kDepth, length2 = second.depth() * kDepth;
  clear_padding(range.size(), first.rows(), length1, lines);
  for (int64_t r = 0; r < range.size(); ++r) {
    const float* from = weight1 + (range.begin + r) * first.rows();
    std::copy(from, from + first.rows(), lines + r * length1);
  }
  pack_weights<parts>(shape, first, block, lines, to1);
  clear_padding(range.size(), second.rows(), length2, lines);
  for_each_run(shape, range, length2, [&](auto run, int64_t from, int64_t to) {
    std::memcpy(lines + to, weight2 + from, run * sizeof(float));
  });
  pack_weights<parts>(shape, second, block, lines, to2);
}

// In shared_scratch, with zeros for the rows that fill the last tile.
const float* padded_bias(const Shape& shape, const float* bias) {
  float* padded = shared_scratch.take(shape.hidden_rows());
  std::fill(std::copy(bias, bias + shape.hidden, padded), padded + shape.hidden_rows(), 0.0f);
  return padded;
}

// --- forward -------------------------------------------------------------------------------------

// A row of 32 sums to 32 of the hidden layer.
template <int parts>
void activate(const float* sums, float bias, Halves (&to)[parts]) {
  Floats low, high;
  read(sums, low);
  read(sums + kTile, high);
  low += bias;
  high += bias;
  rectify(low);
  rectify(high);
  split(low, high, to);
}

template <int parts>
struct Forward {
  const Plan& plan;
  const Masks& masks;
  const float* a;
  const float* bias1;
  const float* bias2;
  float* out;
  Half* weights1 = nullptr;
  Half* weights2 = nullptr;
  float* partial = nullptr;  // of the output, for each split

  int64_t out_floats() const {
    return plan.shape.samples * plan.shape.outputs * plan.shape.plane();
  }

  // 32 hidden rows of 32 pixels: two cells on the right, `step` apart, whose columns are pixels.
  static void hide(const float* sums, const float* bias, Half* to, int64_t step) {
    for (int64_t r = 0; r < kDepth; r += 2) {
      Halves x[parts], y[parts], low, high;
      activate(sums + r * kDepth, bias[r], x);
      activate(sums + (r + 1) * kDepth, bias[r + 1], y);
      for (int part = 0; part < parts; ++part) {
        interleave(x[part], y[part], low, high);
        Half* at = to + part * kTileHalves + r / 2 * kDepth;
        write(low, at);
        write(high, at + step);
      }
    }
  }

  void item(int64_t chunk, int64_t split) const {
    const Shape& shape = plan.shape;
    const Windows seen = shape.first(), made = shape.second();
    const int64_t patches_halves = parts * plan.pixels() * seen.depth() * kDepth;
    const int64_t held_halves = parts * plan.pixels() * plan.most_held();
    const int64_t made_floats = made.tiles() * kTile * plan.stride();
    own_scratch.reserve(of_halves(View<parts>::halves(plan, seen)) + of_halves(patches_halves) +
                        of_halves(held_halves) + made_floats + plan.pixels());
    View<parts> view(plan, masks, seen, false, take_halves(own_scratch, View<parts>::halves(plan, seen)));
    Half* patches = take_halves(own_scratch, patches_halves);
    Half* hidden = take_halves(own_scratch, held_halves);
    float* rows = own_scratch.take(made_floats);
    float* line = own_scratch.take(plan.pixels());
    alignas(64) float sums[kDepth * kDepth];

    const Range images = plan.images_of(chunk);
    view.stage(a + images.begin * shape.inputs * shape.plane(), images.size());
    view.put_pixels_in_columns(patches);
    const TileRegisters registers;
    const Range range = part_of(plan.held, plan.splits, split);
    const int64_t deep = seen.depth() * kCell<parts>;
    for (int64_t part = range.begin; part < range.end; ++part) {
      const Range held = plan.held_rows(part);
      const int64_t depth = held.size() / kDepth;
      for (int64_t block = 0; block < view.blocks(); ++block)
        for (int64_t k = 0; k < depth; ++k) {
          const int64_t row = held.begin + k * kDepth;
          product<2, 2, parts>({weights1 + row / kTile * deep, deep}, {patches + 2 * block * deep, deep},
                        seen.depth(), false, sums, kDepth);
          Half* to = hidden + (2 * block * depth + k) * kCell<parts>;
          hide(sums, bias1 + row, to, depth * kCell<parts>);
        }
      multiply<parts>({weights2 + held.begin / kDepth * kCell<parts>, shape.hidden_depth() * kCell<parts>},
               made.tiles(), {hidden, depth * kCell<parts>}, 2 * view.blocks(), depth,
               part > range.begin, rows, plan.stride());
    }
    const int64_t first = images.begin * shape.outputs * shape.plane();
    const bool whole = plan.splits == 1;
    fold_windows(plan, masks, made, false, rows, whole ? bias2 : nullptr, images.size(), line,
                 whole ? out + first : partial + split * out_floats() + first);
  }

  void run(const float* weight1, const float* weight2, int64_t threads) {
    const Shape& shape = plan.shape;
    const int64_t first = parts * shape.hidden_rows() * shape.first().depth() * kDepth;
    const int64_t second = parts * shape.hidden_rows() * shape.second().tiles() * kTile;
    const int64_t partial_floats = plan.splits == 1 ? 0 : plan.splits * out_floats();
    shared_scratch.reserve(of_halves(first) + of_halves(second) +
                           Scratch::rounded(partial_floats) +
                           Scratch::rounded(shape.hidden_rows()));
    weights1 = take_halves(shared_scratch, first);
    weights2 = take_halves(shared_scratch, second);
    partial = shared_scratch.take(partial_floats);
    bias1 = padded_bias(shape, bias1);
    const int workers = team(plan.elements(), threads);
    const Items items(plan.items(), workers);

#pragma omp parallel num_threads(workers)
    {
#pragma omp for schedule(static)
      for (int64_t block = 0; block < shape.hidden_depth(); ++block) {
        own_scratch.reserve(lines_floats(shape));
        float* lines = own_scratch.take(lines_floats(shape));
        pack<parts>(shape, block, weight1, weight2, lines, {weights1, nullptr}, {nullptr, weights2});
      }
      items.each([&](int64_t i) { item(i / plan.splits, i % plan.splits); });
      if (plan.splits > 1) {
        const int64_t plane = shape.plane();
#pragma omp for schedule(static)
        for (int64_t p = 0; p < shape.samples * shape.outputs; ++p)
          for (int64_t i = p * plane; i < (p + 1) * plane; ++i) {
            float sum = bias2[p % shape.outputs];
            for (int64_t split = 0; split < plan.splits; ++split)
              sum += partial[split * out_floats() + i];
            out[i] = sum;
          }
      }
    }
  }
};

// --- backward ------------------------------------------------------------------------------------

// Sizes of what a group adds up: with a row for each hidden one, the gradients of the first weights, with
// that of their bias beside them, and of the second; and that of the second bias.
struct Sums {
  int64_t first, second, outputs;

  explicit Sums(const Shape& shape)
      : first(shape.first_tiles() * kTile),
        second(shape.second().tiles() * kTile),
        outputs(shape.outputs) {}
  int64_t floats(const Shape& shape) const {
    return shape.hidden_rows() * (first + second) + Scratch::rounded(outputs);
  }
};

struct Buffers {  // of a chunk
  Half *planes, *grad_planes;
  Half *patches, *grad_patches;            // pixels in columns
  Half *deep_patches, *deep_grad_patches;  // pixels in depth
  Half *hidden, *left, *right;             // held rows, and their gradient on both sides
  float *rows, *line;
};

template <int parts>
struct Backward {
  const Plan& plan;
  const Masks& masks;
  const float* grad;
  const float* a;
  const float* bias1;
  float* grad_in;
  float* grad_weight1;
  float* grad_bias1;
  float* grad_weight2;
  float* grad_bias2;
  Sums sizes = Sums(plan.shape);
  PackedWeights weights1 = {};
  PackedWeights weights2 = {};
  float* partial_in = nullptr;  // of the input's gradient, for each split
  float* sums = nullptr;        // for each group

  int64_t in_floats() const { return plan.shape.samples * plan.shape.inputs * plan.shape.plane(); }
  float* sums1(int64_t group) const { return sums + group * sizes.floats(plan.shape); }
  float* sums2(int64_t group) const {
    return sums1(group) + plan.shape.hidden_rows() * sizes.first;
  }
  float* bias_sums(int64_t group) const {
    return sums2(group) + plan.shape.hidden_rows() * sizes.second;
  }

  // 32 hidden rows of 32 pixels: two cells on the left, `step` apart, whose depth is pixels.
  static void hide(const float* sums, const float* bias, Half* to, int64_t step) {
    for (int64_t r = 0; r < kDepth; ++r) {
      Halves x[parts];
      activate(sums + r * kDepth, bias[r], x);
      for (int part = 0; part < parts; ++part)
        write(x[part], to + r / kTile * step + part * kTileHalves + r % kTile * kDepth);
    }
  }

  // The gradient of such rows, likewise, and on the right as in the forward.
  static void hide_gradient(const float* sums, const Half* hidden, Half* left, int64_t left_step,
                            Half* right, int64_t right_step) {
    for (int64_t r = 0; r < kDepth; r += 2) {
      Halves rows[2][parts], low_pairs, high_pairs;
      const int64_t row = r / kTile * left_step + r % kTile * kDepth;
      for (int64_t i = 0; i < 2; ++i) {
        Floats low, high;
        Halves rectified;
        read(sums + (r + i) * kDepth, low);
        read(sums + (r + i) * kDepth + kTile, high);
        split(low, high, rows[i]);
        read(hidden + row + i * kDepth, rectified);
        for (int part = 0; part < parts; ++part) {
          keep_active(rectified, rows[i][part]);
          write(rows[i][part], left + row + part * kTileHalves + i * kDepth);
        }
      }
      for (int part = 0; part < parts; ++part) {
        interleave(rows[0][part], rows[1][part], low_pairs, high_pairs);
        Half* at = right + part * kTileHalves + r / 2 * kDepth;
        write(low_pairs, at);
        write(high_pairs, at + right_step);
      }
    }
  }

  void add_bias2(Range images, float* to) const {
    const int64_t plane = plan.shape.plane();
    for (int64_t p = images.begin * plan.shape.outputs; p < images.end * plan.shape.outputs; ++p) {
      Floats sum = {};
      for (int64_t i = 0; i < plane; i += kTile) {
        Floats some;
        const int64_t count = std::min(kTile, plane - i);
        read_some(grad + p * plane + i, static_cast<uint16_t>((1u << count) - 1), some);
        sum += some;
      }
      float total = 0.0f;
      for (int64_t i = 0; i < kTile; ++i) total += sum[i];
      to[p % plan.shape.outputs] += total;
    }
  }

  Buffers buffers() const {
    const Windows seen = plan.shape.first(), made = plan.shape.second();
    const int64_t pixels = plan.pixels(), held_halves = parts * pixels * plan.most_held();
    const int64_t rows_floats = seen.tiles() * kTile * plan.stride();
    Buffers own;
    const struct {
      Half** data;
      int64_t halves;
    } buffers[] = {
        {&own.planes, View<parts>::halves(plan, seen)},
        {&own.grad_planes, View<parts>::halves(plan, made)},
        {&own.patches, parts * pixels * seen.depth() * kDepth},
        {&own.grad_patches, parts * pixels * made.depth() * kDepth},
        {&own.deep_patches, parts * pixels * sizes.first},
        {&own.deep_grad_patches, parts * pixels * sizes.second},
        {&own.hidden, held_halves},
        {&own.left, held_halves},
        {&own.right, held_halves},
    };
    int64_t floats = rows_floats + pixels;
    for (const auto& buffer : buffers) floats += of_halves(buffer.halves);
    own_scratch.reserve(floats);
    for (const auto& buffer : buffers) *buffer.data = take_halves(own_scratch, buffer.halves);
    own.rows = own_scratch.take(rows_floats);
    own.line = own_scratch.take(pixels);
    return own;
  }

  void item(int64_t group, int64_t split) const {
    const Shape& shape = plan.shape;
    const Windows seen = shape.first(), made = shape.second();
    const Buffers own = buffers();
    View<parts> view(plan, masks, seen, false, own.planes);
    View<parts> grad_view(plan, masks, made, true, own.grad_planes);
    if (split == 0) std::fill(bias_sums(group), bias_sums(group) + shape.outputs, 0.0f);
    const Range chunks = part_of(plan.chunks, plan.groups, group);
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      const Range images = plan.images_of(chunk);
      view.stage(a + images.begin * shape.inputs * shape.plane(), images.size());
      grad_view.stage(grad + images.begin * shape.outputs * shape.plane(), images.size());
      view.put_pixels_in_columns(own.patches);
      grad_view.put_pixels_in_columns(own.grad_patches);
      view.put_pixels_in_depth(shape.first_tiles(), own.deep_patches);
      grad_view.put_pixels_in_depth(made.tiles(), own.deep_grad_patches);
      if (split == 0) add_bias2(images, bias_sums(group));
      multiply_chunk(view.blocks(), group, split, chunk > chunks.begin, own);
      const int64_t first = images.begin * shape.inputs * shape.plane();
      fold_windows(plan, masks, seen, true, own.rows, nullptr, images.size(), own.line,
                   (plan.splits == 1 ? grad_in : partial_in + split * in_floats()) + first);
    }
  }

  void multiply_chunk(int64_t blocks, int64_t group, int64_t split, bool add,
                      const Buffers& own) const {
    const Shape& shape = plan.shape;
    const Windows seen = shape.first(), made = shape.second();
    const int64_t of_seen = seen.depth() * kCell<parts>, of_made = made.depth() * kCell<parts>;
    const int64_t of_blocks = blocks * kCell<parts>;
    alignas(64) float tile_sums[kDepth * kDepth];
    const TileRegisters registers;
    const Range range = part_of(plan.held, plan.splits, split);
    for (int64_t part = range.begin; part < range.end; ++part) {
      const Range held = plan.held_rows(part);
      const int64_t depth = held.size() / kDepth, of_depth = depth * kCell<parts>;
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t k = 0; k < depth; ++k) {
          const int64_t row = held.begin + k * kDepth, tile = row / kTile;
          const int64_t at = 2 * k * of_blocks + block * kCell<parts>;
          product<2, 2, parts>({weights1.by_hidden + tile * of_seen, of_seen},
                        {own.patches + 2 * block * of_seen, of_seen}, seen.depth(), false,
                        tile_sums, kDepth);
          hide(tile_sums, bias1 + row, own.hidden + at, of_blocks);
          product<2, 2, parts>({weights2.by_hidden + tile * of_made, of_made},
                        {own.grad_patches + 2 * block * of_made, of_made}, made.depth(), false,
                        tile_sums, kDepth);
          hide_gradient(tile_sums, own.hidden + at, own.left + at, of_blocks,
                        own.right + 2 * block * of_depth + k * kCell<parts>, of_depth);
        }
      const int64_t tiles = held.size() / kTile;
      multiply<parts>({own.left, of_blocks}, tiles, {own.deep_patches, of_blocks}, shape.first_tiles(),
               blocks, add, sums1(group) + held.begin * sizes.first, sizes.first);
      multiply<parts>({own.hidden, of_blocks}, tiles, {own.deep_grad_patches, of_blocks}, made.tiles(),
               blocks, add, sums2(group) + held.begin * sizes.second, sizes.second);
      multiply<parts>({weights1.by_windows + held.begin / kDepth * kCell<parts>,
                shape.hidden_depth() * kCell<parts>},
               seen.tiles(), {own.right, of_depth}, 2 * blocks, depth, part > range.begin, own.rows,
               plan.stride());
    }
  }

  // The gradients of a block of hidden rows, from the groups' sums.
  void write_weights(int64_t block) const {
    const Shape& shape = plan.shape;
    const Range range = rows_of(shape, block);
    const int64_t of_first = shape.first().rows();
    float* first = sums1(0) + range.begin * sizes.first;
    float* second = sums2(0) + range.begin * sizes.second;
    for (int64_t group = 1; group < plan.groups; ++group) {
      const float* more = sums1(group) + range.begin * sizes.first;
      for (int64_t i = 0; i < range.size() * sizes.first; ++i) first[i] += more[i];
      more = sums2(group) + range.begin * sizes.second;
      for (int64_t i = 0; i < range.size() * sizes.second; ++i) second[i] += more[i];
    }
    for (int64_t row = range.begin; row < range.end; ++row, first += sizes.first) {
      std::copy(first, first + of_first, grad_weight1 + row * of_first);
      grad_bias1[row] = first[of_first];
    }
    for_each_run(shape, range, sizes.second, [&](auto run, int64_t to, int64_t from) {
      std::memcpy(grad_weight2 + to, second + from, run * sizeof(float));
    });
  }

  void run(const float* weight1, const float* weight2, int64_t threads) {
    const Shape& shape = plan.shape;
    const int64_t first = parts * shape.hidden_rows() * shape.first().depth() * kDepth;
    const int64_t first_in = parts * shape.hidden_rows() * shape.first().tiles() * kTile;
    const int64_t second = parts * shape.hidden_rows() * shape.second().depth() * kDepth;
    const int64_t partial_floats = plan.splits == 1 ? 0 : plan.splits * in_floats();
    const int64_t all_sums = plan.groups * sizes.floats(shape);
    shared_scratch.reserve(of_halves(first) + of_halves(first_in) + of_halves(second) + all_sums +
                           Scratch::rounded(partial_floats) +
                           Scratch::rounded(shape.hidden_rows()));
    weights1.by_hidden = take_halves(shared_scratch, first);
    weights1.by_windows = take_halves(shared_scratch, first_in);
    weights2.by_hidden = take_halves(shared_scratch, second);
    sums = shared_scratch.take(all_sums);
    partial_in = shared_scratch.take(partial_floats);
    bias1 = padded_bias(shape, bias1);
    const int workers = team(plan.elements(), threads);
    const Items items(plan.items(), workers);

#pragma omp parallel num_threads(workers)
    {
#pragma omp for schedule(static)
      for (int64_t block = 0; block < shape.hidden_depth(); ++block) {
        own_scratch.reserve(lines_floats(shape));
        float* lines = own_scratch.take(lines_floats(shape));
        pack<parts>(shape, block, weight1, weight2, lines, weights1, weights2);
      }
      items.each([&](int64_t i) { item(i / plan.splits, i % plan.splits); });
      if (plan.splits > 1) {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < in_floats(); ++i) {
          float sum = partial_in[i];
          for (int64_t split = 1; split < plan.splits; ++split)
            sum += partial_in[split * in_floats() + i];
          grad_in[i] = sum;
        }
      }
#pragma omp for schedule(static) nowait
      for (int64_t block = 0; block < shape.hidden_depth(); ++block) write_weights(block);
#pragma omp for schedule(static)
      for (int64_t output = 0; output < shape.outputs; ++output) {
        float sum = bias_sums(0)[output];
        for (int64_t group = 1; group < plan.groups; ++group) sum += bias_sums(group)[output];
        grad_bias2[output] = sum;
      }
    }
  }
};

}  // namespace

// a (samples, inputs, height, width), weights and biases as those of nn.Conv2d -> out (samples, outputs,
// height, width). Operands of products are rounded to one bfloat16, or to the sum of two.
HYBRIDFLOW_KERNEL(conv_conditioner)
(const float* a, const float* weight1, const float* bias1, const float* weight2, const float* bias2,
 float* out, int64_t samples, int64_t height, int64_t width, int64_t inputs, int64_t hidden,
 int64_t outputs, int64_t size, int64_t parts, int64_t threads) {
  if (samples == 0) return;
  const Plan plan({samples, height, width, inputs, hidden, outputs, size}, 0);
  const Masks masks(plan);
  const auto run = [&](auto forward) { forward.run(weight1, weight2, threads); };
  if (parts == 1)
    run(Forward<1>{plan, masks, a, bias1, bias2, out});
  else
    run(Forward<2>{plan, masks, a, bias1, bias2, out});
}

// The gradients of the convolutions' operands; that of their input is (samples, inputs, height, width).
HYBRIDFLOW_KERNEL(conv_conditioner_backward)
(const float* grad, const float* a, const float* weight1, const float* bias1, const float* weight2,
 float* grad_in, float* grad_weight1, float* grad_bias1, float* grad_weight2, float* grad_bias2,
 int64_t samples, int64_t height, int64_t width, int64_t inputs, int64_t hidden, int64_t outputs,
 int64_t size, int64_t parts, int64_t threads) {
  const Shape shape{samples, height, width, inputs, hidden, outputs, size};
  if (samples == 0) {
    std::fill(grad_weight1, grad_weight1 + hidden * shape.first().rows(), 0.0f);
    std::fill(grad_weight2, grad_weight2 + hidden * shape.second().rows(), 0.0f);
    std::fill(grad_bias1, grad_bias1 + hidden, 0.0f);
    std::fill(grad_bias2, grad_bias2 + outputs, 0.0f);
    return;
  }
  const Plan plan(shape, Sums(shape).floats(shape));
  const Masks masks(plan);
  const auto run = [&](auto backward) { backward.run(weight1, weight2, threads); };
  if (parts == 1)
    run(Backward<1>{plan, masks, grad, a, bias1, grad_in, grad_weight1, grad_bias1, grad_weight2,
                    grad_bias2});
  else
    run(Backward<2>{plan, masks, grad, a, bias1, grad_in, grad_weight1, grad_bias1, grad_weight2,
                    grad_bias2});
}
