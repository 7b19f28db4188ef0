// Actnorm followed by affine coupling; the formulas are those of reference.py.
//
// The columns of a row (tiles.h) belong to the identity part (kept) or to the transformed part (moved).
// The samples are cut into chunks, the items of work; a chunk is gone through in the order of memory,
// tiles of the one part and of the other taking turns. Where a channel has a vector of neighbours, a
// kernel walks along one channel after the other with its parameters in registers; elsewhere it walks
// down the rows, a vector of columns at a time. Every sum is formed in an order that depends on the shape
// alone.
#include <initializer_list>

#include "actnorm_coupling/arithmetic.h"
#include "actnorm_coupling/tiles.h"
#include "native/denormals.h"
#include "native/items.h"
#include "native/lanes.h"
#include "native/native.h"
#include "native/vector_math.h"

namespace {

constexpr int64_t kChunk = 16384;  // elements of x in a chunk, or up to twice as many
constexpr int64_t kMostChunks = 128;
constexpr int64_t kBand = 32;  // rows after which the other part has its turn, about

// --- the plan of the work ------------------------------------------------------------------------

// A power of two, for threads, which come in such numbers, to meet the same images here as in the conditioner.
struct Chunks {
  int64_t samples, count;

  explicit Chunks(const Shape& shape) : samples(shape.samples), count(1) {
    const int64_t elements = samples * shape.channels * shape.positions();
    while (2 * count * kChunk <= elements && count < kMostChunks) count *= 2;
    count = least(count, samples);
  }

  Range of(int64_t chunk) const { return part_of(samples, count, chunk); }
};

Shape shape_of(const Layout& l) { return {l.samples, l.channels, l.outer, l.inner}; }

struct Part {  // kept or moved
  int64_t channels;
  Columns columns;  // in arrays of x's shape
};

// How a part is cut into tiles, and where per-channel values stand for its kernels: at(channel), one for
// each channel or for each column of a tile. Where no operand needs a buffer, tiles are larger than one.
struct Plan {
  Plan(const Shape& shape, const Part& part_, bool all_float32, bool interleaved)
      : part(part_), inner(shape.inner) {
    by_channels = inner >= kLanes;
    const bool in_order = part.columns.index == nullptr && part.columns.step == 1;
    const bool direct = all_float32 && (by_channels || (in_order && !interleaved));
    const int64_t fit = most(1, by_channels && direct ? part.channels : kTile / most(1, inner));
    const bool single = by_channels && direct && part.columns.index != nullptr;
    const int64_t blocks = ratio_up(part.channels, single ? 1 : fit);
    channels = blocks == 0 ? 1 : ratio_up(part.channels, blocks);
    run = by_channels && !direct ? ratio_up(inner, ratio_up(inner, kTile)) : inner;
    const int64_t width = channels * inner;
    if (!by_channels && width > 0 && width < kLanes)
      for (int64_t g = ratio_up(kLanes, width); g * width <= kTile && group == 1; ++g)
        if (shape.outer % g == 0) group = g;
    const int64_t line = most(kLanes, group * width);
    const bool unbounded = direct && group == 1 && width >= kLanes;
    if (!by_channels) rows = group * (unbounded ? kBand : most(1, least(kBand, kTile / line)));
  }

  int64_t at(int64_t channel) const { return by_channels ? channel : channel * inner * group; }

  int64_t size() const { return at(part.channels) + kLanes; }  // and what a whole vector reads beyond

  // Values per channel to where the kernels look for them.
  template <class F>
  void spread(const F& value, float* to) const {
    for (int64_t j = at(part.channels); j < size(); ++j) to[j] = 0.0f;
    const int64_t copies = by_channels ? 1 : inner;
    for (int64_t g = 0; g < (by_channels ? 1 : group); ++g)
      for (int64_t channel = 0; channel < part.channels; ++channel)
        for (int64_t j = 0; j < copies; ++j) *to++ = value(channel);
  }

  // Sums by the kernels, a vector for each channel or one value for each column, to set(channel, sum).
  template <class F>
  void gather(const float* sums, const F& set) const {
    for (int64_t channel = 0; channel < part.channels; ++channel) {
      float total = 0.0f;
      if (by_channels) {
        total = fold(load(sums + channel * kLanes));
      } else {
        for (int64_t g = 0; g < group; ++g)
          for (int64_t j = 0; j < inner; ++j)
            total += sums[(g * part.channels + channel) * inner + j];
      }
      set(channel, total);
    }
  }

  int64_t sums_size() const { return by_channels ? part.channels * kLanes : size(); }
  int64_t sums_at(int64_t channel) const { return by_channels ? channel * kLanes : at(channel); }

  // f(tile) for the rows from begin to end.
  template <class F>
  void for_each_tile(int64_t begin, int64_t end, const F& f) const {
    for (int64_t row = begin; row < end; row += rows)
      for (int64_t c = 0; c < part.channels; c += channels)
        for (int64_t offset = 0; offset < inner; offset += run)
          f(Tile{by_channels, row, least(rows, end - row), group, c,
                 least(channels, part.channels - c), offset, least(run, inner - offset)});
  }

  Part part;
  int64_t inner;
  bool by_channels;
  int64_t channels, run, rows = 1, group = 1;  // of a tile
};

// Calls body(chunk, first row, last row + 1, scratch of so many floats) for every chunk.
template <class Body>
void for_each_chunk(const Shape& shape, const Chunks& chunks, int64_t scratch_size, int64_t threads,
                    const Body& body) {
  const int64_t elements = shape.samples * shape.channels * shape.positions();
  const int workers = team(elements, threads);
  const Items items(chunks.count, workers);
#pragma omp parallel num_threads(workers)
  {
    const NoDenormals no_denormals;
    const Memory<float> scratch(scratch_size);
    items.each([&](int64_t chunk) {
      const Range own = chunks.of(chunk);
      body(chunk, own.begin * shape.outer, own.end * shape.outer, scratch.get());
    });
  }
}

// Tiles of both parts in turn.
template <class Kept, class Moved>
void take_turns(const Plan& kept, const Plan& moved, int64_t begin, int64_t end,
                const Kept& of_kept, const Moved& of_moved) {
  const int64_t band = most(kept.rows, moved.rows);
  for (int64_t row = begin; row < end; row += band) {
    kept.for_each_tile(row, least(row + band, end), of_kept);
    moved.for_each_tile(row, least(row + band, end), of_moved);
  }
}

// --- per-channel parameters and sums ---------------------------------------------------------------

void fill(float value, int64_t count, float* to) {
  for (int64_t j = 0; j < count; ++j) to[j] = value;
}

class Constants {  // of each kind, where the plan says
 public:
  explicit Constants(const Plan& plan) : size_(plan.size()), data_(kConstants * size_) {}

  float* of(Constant kind) const { return data_ + kind * size_; }

 private:
  int64_t size_;
  Memory<float> data_;
};

class Sums {  // per chunk and channel, of each kind
 public:
  Sums(const Shape& shape, const Chunks& chunks)
      : chunks_(chunks.count),
        channels_(shape.channels),
        data_(kKinds * channels_ * most(1, chunks_)) {}

  float* at(int64_t chunk, Kind kind) const { return data_ + (chunk * kKinds + kind) * channels_; }

  void total(Kind kind, float factor, int64_t count, float* to) const {
    fill(0.0f, count, to);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const float* own = at(chunk, kind);
      for (int64_t j = 0; j < count; ++j) to[j] += own[j];
    }
    for (int64_t j = 0; j < count; ++j) to[j] *= factor;
  }

 private:
  int64_t chunks_, channels_;
  Memory<float> data_;
};

void spread(const Norm& norm, const Plan& plan, const Constants& to) {
  if (!norm.present) return;
  for (const Constant kind : {kBefore, kScale, kAfter, kUnscale})
    plan.spread([&](int64_t j) { return norm.of(kind, plan.part.columns[j]); }, to.of(kind));
}

// A part's sums of a chunk for actnorm, which the kernels left in `own`.
void gather(const Norm& norm, const Plan& plan, const float* const own[], const Sums& sums,
            int64_t chunk) {
  if (!norm.present) return;
  float* log_scale = sums.at(chunk, kLogScale);
  float* bias = sums.at(chunk, kBias);
  const Columns& c = plan.part.columns;
  plan.gather(own[kLogScale], [&](int64_t j, float value) { log_scale[c[j]] = value; });
  plan.gather(own[kBias], [&](int64_t j, float value) { bias[c[j]] = value; });
}

void finish(const Norm& norm, const Sums& sums, int64_t channels, double grad_log_det,
            float* grad_log_scale, float* grad_bias) {
  if (!norm.present) return;
  sums.total(kLogScale, 1.0f, channels, grad_log_scale);
  sums.total(kBias, 1.0f, channels, grad_bias);
  norm.finish(channels, grad_log_det, grad_log_scale, grad_bias);
}

// --- the kernels -----------------------------------------------------------------------------------

struct Call {  // of a kernel, on one tile
  int64_t lines, columns;
  Lines first;
  int64_t v_stride, grad_stride, raw_stride, shift_stride;
  int64_t out_stride, grad_raw_stride, grad_shift_stride;
  const float* constants[kConstants];
  float* sums[kKinds];
  const float* given;  // by rows: a value for each line; by channels: one for the tile
  float* row_sums;     // the same
  Settings settings;

  void advance(Lines* lines_) const {
    lines_->v += v_stride;
    lines_->grad += grad_stride;
    lines_->raw += raw_stride;
    lines_->shift += shift_stride;
    lines_->out += out_stride;
    lines_->grad_raw += grad_raw_stride;
    lines_->grad_shift += grad_shift_stride;
  }
};

// Lines are channels: their parameters are the same in all lanes. What is left of a line after whole
// vectors is taken in a last vector that ends with it; what that repeats does not count.
template <class Op>
void walk_channels(const Call& call) {
  const Call c = call;  // what is stored to memory cannot change it
  const Settings k = c.settings;
  const Lanes given = c.given == nullptr ? Lanes{} : every<Lanes>(c.given[0]);
  const int64_t whole = c.columns - c.columns % kLanes, rest = most(0, c.columns - kLanes);
  const Some counts(whole - rest, c.columns - rest);
  Lines p = c.first;
  Lanes sum{};
  for (int64_t line = 0; line < c.lines; ++line, c.advance(&p)) {
    Op op([&](Constant kind) { return every<Lanes>(c.constants[kind][line]); });
    Op twin = op;
    int64_t j = 0;
    for (; j + 2 * kLanes <= c.columns; j += 2 * kLanes) {
      sum += op.step(k, p, j, given);
      sum += twin.step(k, p, j + kLanes, given);
    }
    if (j + kLanes <= c.columns) sum += op.step(k, p, j, given);
    const auto add = [&](Kind kind, Lanes value) { add_to(c.sums[kind] + line * kLanes, value); };
    op.finish(add);
    twin.finish(add);
    if (whole < c.columns) {
      Op last([&](Constant kind) { return every<Lanes>(c.constants[kind][line]); });
      sum += counts.of(last.step(k, p, rest, given));
      last.finish([&](Kind kind, Lanes value) { add(kind, counts.of(value)); });
    }
  }
  if (Op::kGivesSum) c.row_sums[0] += fold(sum);
}

// So many vectors of columns down the rows, from column j on. The last one ends with the line; what it
// repeats of the one before does not count.
template <class Op, int vectors>
void walk_down(const Call& call, int64_t j) {
  const Call c = call;  // as above
  const Settings k = c.settings;
  const int64_t before_last = j + (vectors - 1) * kLanes;
  const int64_t last = most(0, least(before_last, c.columns - kLanes));
  const Some counts(before_last - last, c.columns - last);
  struct Column {
    Op op;
    int64_t begin;
  };
  const auto column = [&](int64_t begin) {
    return Column{Op([&](Constant kind) { return load(c.constants[kind] + begin); }), begin};
  };
  Column end = column(last);
  Column whole[] = {column(j), column(vectors > 2 ? j + kLanes : j), column(vectors > 3 ? j + 2 * kLanes : j)};
  Lines p = c.first;
  for (int64_t line = 0; line < c.lines; ++line, c.advance(&p)) {
    const Lanes given = c.given == nullptr ? Lanes{} : every<Lanes>(c.given[line]);
    Lanes sum = counts.of(end.op.step(k, p, last, given));
#pragma GCC unroll 4
    for (int v = 0; v < vectors - 1; ++v) sum += whole[v].op.step(k, p, j + v * kLanes, given);
    if (Op::kGivesSum) c.row_sums[line] += fold(sum);
  }
  end.op.finish([&](Kind kind, Lanes value) { add_to(c.sums[kind] + last, counts.of(value)); });
#pragma GCC unroll 4
  for (int v = 0; v < vectors - 1; ++v)
    whole[v].op.finish([&](Kind kind, Lanes value) { add_to(c.sums[kind] + j + v * kLanes, value); });
}

// Along the lines, two at a time, for an Op that computes so little that the order of memory counts.
template <class Op>
void walk_along(const Call& call) {
  const Call c = call;  // as above
  const auto at = [&](const Lines& p, int64_t lines, int64_t j, const auto& counted) {
    Lines q = p;
    c.advance(&q);
    Op op([&](Constant kind) { return load(c.constants[kind] + j); });
    op.step(c.settings, p, j, Lanes{});
    if (lines == 2) op.step(c.settings, q, j, Lanes{});
    op.finish([&](Kind kind, Lanes value) { add_to(c.sums[kind] + j, counted(value)); });
  };
  const int64_t whole = c.columns - c.columns % kLanes, rest = most(0, c.columns - kLanes);
  const Some counts(whole - rest, c.columns - rest);
  const auto all = [](Lanes value) { return value; };
  const auto some = [&](Lanes value) { return counts.of(value); };
  Lines p = c.first;
  int64_t line = 0;
  for (; line + 2 <= c.lines; line += 2, c.advance(&p), c.advance(&p)) {
    for (int64_t j = 0; j < whole; j += kLanes) at(p, 2, j, all);
    if (whole < c.columns) at(p, 2, rest, some);
  }
  if (line < c.lines) {
    for (int64_t j = 0; j < whole; j += kLanes) at(p, 1, j, all);
    if (whole < c.columns) at(p, 1, rest, some);
  }
}

template <class Op>
void walk_rows(const Call& c) {
  for (int64_t j = 0; j < c.columns; j += 4 * kLanes) switch ((c.columns - j - 1) / kLanes) {
      case 0: walk_down<Op, 1>(c, j); break;
      case 1: walk_down<Op, 2>(c, j); break;
      case 2: walk_down<Op, 3>(c, j); break;
      default: walk_down<Op, 4>(c, j);
    }
}

struct Kernel {
  decltype(&walk_rows<Copy>) by_rows, by_channels;

  void operator()(const Tile& tile, const Call& call) const {
    (tile.by_channels ? by_channels : by_rows)(call);
  }
};

template <class Op>
constexpr Kernel kernel() {
  return {Op::kLight ? walk_along<Op> : walk_rows<Op>, walk_channels<Op>};
}

template <template <class> class Op>
Kernel choose(const Layout& l) {
  return with_squash(l, [](auto squash) { return kernel<Op<decltype(squash)>>(); });
}

// --- a coupling ------------------------------------------------------------------------------------

struct Coupling {
  Coupling(const Layout& l, const float* gain_or_null, const Norm& norm)
      : gain(gain_or_null), inner(l.inner), settings(settings_of(l, norm)) {
    const ParamColumns columns(l);
    raw = {2 * l.moved, columns.raw, columns.step, nullptr};
    shift = {2 * l.moved, columns.shift, columns.step, nullptr};
  }

  Array raw_of(void* params, int64_t type) const { return {params, type, inner, raw}; }
  Array shift_of(void* params, int64_t type) const { return {params, type, inner, shift}; }

  // What squash(raw) is multiplied by in the executed direction's s.
  void spread(const Plan& plan, const Constants& to) const {
    const float whole = settings.amplitude;
    plan.spread([&](int64_t j) { return gain == nullptr ? whole : whole * gain[j]; },
                to.of(kBound));
  }

  const float* gain;
  int64_t inner;
  Settings settings;
  Columns raw, shift;
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

Call call_on(const Plan& plan, const Tile& tile, const Constants& constants) {
  Call call{};
  call.lines = tile.lines();
  call.columns = tile.columns();
  for (int kind = 0; kind < kConstants; ++kind)
    call.constants[kind] = constants.of(static_cast<Constant>(kind)) + plan.at(tile.channel);
  return call;
}

void set_sums(const Plan& plan, const Tile& tile, float* const own[], Call* call) {
  for (int kind = 0; kind < kKinds; ++kind)
    call->sums[kind] = own[kind] + plan.sums_at(tile.channel);
}

// The sums of a part in a chunk's scratch, set to zero; returns what is beyond them.
float* start_sums(const Plan& plan, float* scratch, float* own[]) {
  const int64_t size = plan.sums_size();
  fill(0.0f, kKinds * size, scratch);
  for (int kind = 0; kind < kKinds; ++kind) own[kind] = scratch + kind * size;
  return scratch + kKinds * size;
}

void map_kept(const Plan& plan, const Tile& tile, const Constants& constants, const Norm& norm,
              const Array& x, const Array& out) {
  Buffer<float> from, to;
  const View v = load(x, tile, from), y = target(out, tile, to);
  Call call = call_on(plan, tile, constants);
  call.first.v = v.data, call.v_stride = v.stride;
  call.first.out = y.data, call.out_stride = y.stride;
  (norm.present ? kernel<NormMap>() : kernel<Copy>())(tile, call);
  store(out, tile, to);
}

void gradients_kept(const Plan& plan, const Tile& tile, const Constants& constants,
                    const Norm& norm, const Array& out, const Array& grad, const Array& grad_x,
                    float* const own[]) {
  Buffer<float> from_out, from_grad, to;
  const View g = load(grad, tile, from_grad), gx = target(grad_x, tile, to);
  const View v = norm.present ? load(out, tile, from_out) : g;
  Call call = call_on(plan, tile, constants);
  set_sums(plan, tile, own, &call);
  call.first.v = v.data, call.v_stride = v.stride;
  call.first.grad = g.data, call.grad_stride = g.stride;
  call.first.out = gx.data, call.out_stride = gx.stride;
  (norm.present ? kernel<NormGradients>() : kernel<Copy>())(tile, call);
  store(grad_x, tile, to);
}

}  // namespace

// x, log_scale, bias, index or null -> a, (samples, channels - moved, ...), as reference.identity.
HYBRIDFLOW_CHECKED_KERNEL(actnorm_identity)
(void* x, const float* log_scale, const float* bias, const int64_t* index, void* a, const Layout* layout,
 int64_t threads) {
  const Layout& l = *layout;
  const Shape shape = shape_of(l);
  const Split split(shape, l.moved, l.flip != 0, index);
  if (!split.valid) return 0;
  const Norm norm(log_scale, bias, l, false);
  const Plan plan(shape, split.kept, l.x_type == kFloat32, false);
  const Constants constants(plan);
  spread(norm, plan, constants);
  const Array from{x, l.x_type, l.inner, split.kept.columns};
  const Array to{a, l.x_type, l.inner, {split.kept.channels, 0, 1, nullptr}};
  const Chunks chunks(shape);
  for_each_chunk(shape, chunks, 0, threads, [&](int64_t, int64_t begin, int64_t end, float*) {
    plan.for_each_tile(begin, end, [&](const Tile& tile) {
      map_kept(plan, tile, constants, norm, from, to);
    });
  });
  return 1;
}

// As reference.identity_backward.
HYBRIDFLOW_CHECKED_KERNEL(actnorm_identity_backward)
(void* grad, void* a, const float* log_scale, const float* bias, const int64_t* index, void* grad_kept,
 float* grad_log_scale, float* grad_bias, const Layout* layout, int64_t threads) {
  const Layout& l = *layout;
  const Shape shape = shape_of(l);
  const Split split(shape, l.moved, l.flip != 0, index);
  if (!split.valid) return 0;
  const Norm norm(log_scale, bias, l, false);
  const Plan plan(shape, split.kept, l.x_type == kFloat32, false);
  const Constants constants(plan);
  spread(norm, plan, constants);
  const Columns columns{split.kept.channels, 0, 1, nullptr};
  const Array from_out{a, l.x_type, l.inner, columns}, from_grad{grad, l.x_type, l.inner, columns};
  const Array to{grad_kept, l.x_type, l.inner, columns};
  const Chunks chunks(shape);
  const Sums sums(shape, chunks);
  for_each_chunk(
      shape, chunks, kKinds * plan.sums_size(), threads,
      [&](int64_t chunk, int64_t begin, int64_t end, float* scratch) {
        float* own[kKinds];
        start_sums(plan, scratch, own);
        plan.for_each_tile(begin, end, [&](const Tile& tile) {
          gradients_kept(plan, tile, constants, norm, from_out, from_grad, to, own);
        });
        gather(norm, plan, own, sums, chunk);
        for (int64_t j = 0; j < split.moved.channels; ++j) {
          const int64_t channel = split.moved.columns[j];
          sums.at(chunk, kLogScale)[channel] = sums.at(chunk, kBias)[channel] = 0.0f;
        }
      });
  finish(norm, sums, l.channels, 0.0, grad_log_scale, grad_bias);
  return 1;
}

// As reference.map; params, log_scale with bias, gain, log_det_in and index may be null.
HYBRIDFLOW_CHECKED_KERNEL(actnorm_coupling)
(void* x, void* params, const float* log_scale, const float* bias, const float* gain,
 const float* log_det_in, const int64_t* index, void* out, float* log_det,
 const Layout* layout, int64_t threads) {
  const Layout& l = *layout;
  const Shape shape = shape_of(l);
  const Split split(shape, l.moved, l.flip != 0, index);
  if (!split.valid) return 0;
  const Norm norm(log_scale, bias, l, l.inverse != 0);
  const Coupling coupling(l, gain, norm);
  const Kernel kernel = choose<Map>(l);
  const bool all_float32 = l.x_type == kFloat32 && l.params_type == kFloat32;
  const Plan kept_plan(shape, split.kept, l.x_type == kFloat32, false);
  const Plan moved_plan(shape, split.moved, all_float32, l.interleaved != 0);
  const Constants kept_constants(kept_plan), moved_constants(moved_plan);
  spread(norm, kept_plan, kept_constants);
  spread(norm, moved_plan, moved_constants);
  coupling.spread(moved_plan, moved_constants);
  const Array from_kept{x, l.x_type, l.inner, split.kept.columns};
  const Array to_kept{out, l.x_type, l.inner, split.kept.columns};
  const Array from{x, l.x_type, l.inner, split.moved.columns};
  const Array to{out, l.x_type, l.inner, split.moved.columns};
  const Array raw = coupling.raw_of(params, l.params_type);
  const Array shift = coupling.shift_of(params, l.params_type);
  const double of_norm = norm.present ? sum_double(log_scale, l.channels) : 0.0;
  const float constant = norm.sign * static_cast<float>(of_norm * static_cast<double>(l.outer * l.inner));
  const Chunks chunks(shape);

  for_each_chunk(shape, chunks, 0, threads, [&](int64_t, int64_t begin, int64_t end, float*) {
    for (int64_t i = begin / l.outer; i < end / l.outer; ++i)
      log_det[i] = log_det_in == nullptr ? constant : log_det_in[i] + constant;
    const auto map_moved = [&](const Tile& tile) {
      Buffer<float> from_x, from_raw, from_shift, to_out;
      float sums[kTile] = {};
      const View v = load(from, tile, from_x), r = load(raw, tile, from_raw);
      const View t = load(shift, tile, from_shift), y = target(to, tile, to_out);
      Call call = call_on(moved_plan, tile, moved_constants);
      call.settings = coupling.settings;
      call.first.v = v.data, call.v_stride = v.stride;
      call.first.raw = r.data, call.raw_stride = r.stride;
      call.first.shift = t.data, call.shift_stride = t.stride;
      call.first.out = y.data, call.out_stride = y.stride;
      call.row_sums = sums;
      kernel(tile, call);
      store(to, tile, to_out);
      for (int64_t line = 0; line < tile.sums(); ++line)
        log_det[(tile.row + line * tile.group) / l.outer] += sums[line];
    };
    take_turns(
        kept_plan, moved_plan, begin, end,
        [&](const Tile& tile) {
          map_kept(kept_plan, tile, kept_constants, norm, from_kept, to_kept);
        },
        map_moved);
  });
  return 1;
}

// As reference.gradients; params, log_scale with bias, gain and index may be null, and what belongs
// to them is then null as well.
HYBRIDFLOW_CHECKED_KERNEL(actnorm_coupling_backward)
(void* grad, const float* grad_log_det, void* out, void* params, const float* log_scale,
 const float* bias, const float* gain, const int64_t* index, void* grad_x, void* grad_params,
 float* grad_log_scale, float* grad_bias, float* grad_gain, const Layout* layout,
 int64_t threads) {
  const Layout& l = *layout;
  const Shape shape = shape_of(l);
  const Split split(shape, l.moved, l.flip != 0, index);
  if (!split.valid) return 0;
  const Norm norm(log_scale, bias, l, l.inverse != 0);
  const Coupling coupling(l, gain, norm);
  const Kernel kernel = choose<Gradients>(l);
  const bool all_float32 = l.x_type == kFloat32 && l.params_type == kFloat32;
  const Plan kept_plan(shape, split.kept, l.x_type == kFloat32, false);
  const Plan moved_plan(shape, split.moved, all_float32, l.interleaved != 0);
  const Constants kept_constants(kept_plan), moved_constants(moved_plan);
  spread(norm, kept_plan, kept_constants);
  spread(norm, moved_plan, moved_constants);
  coupling.spread(moved_plan, moved_constants);
  const Columns& kept = split.kept.columns;
  const Array out_kept{out, l.x_type, l.inner, kept}, grad_kept{grad, l.x_type, l.inner, kept};
  const Array grad_x_kept{grad_x, l.x_type, l.inner, kept};
  const Columns& columns = split.moved.columns;
  const Array out_moved{out, l.x_type, l.inner, columns}, grad_moved{grad, l.x_type, l.inner, columns};
  const Array grad_x_moved{grad_x, l.x_type, l.inner, columns};
  const Array raw = coupling.raw_of(params, l.params_type);
  const Array shift = coupling.shift_of(params, l.params_type);
  const Array grad_raw = coupling.raw_of(grad_params, l.params_type);
  const Array grad_shift = coupling.shift_of(grad_params, l.params_type);
  const Chunks chunks(shape);
  const Sums sums(shape, chunks);

  for_each_chunk(
      shape, chunks, kKinds * (kept_plan.sums_size() + moved_plan.sums_size()), threads,
      [&](int64_t chunk, int64_t begin, int64_t end, float* scratch) {
        float *of_kept[kKinds], *of_moved[kKinds];
        start_sums(moved_plan, start_sums(kept_plan, scratch, of_kept), of_moved);
        const auto gradients_moved = [&](const Tile& tile) {
          Buffer<float> from_out, from_grad, from_raw, from_shift, to_x, to_raw, to_shift;
          float per_line[kTile];
          for (int64_t line = 0; line < tile.sums(); ++line)
            per_line[line] = grad_log_det[(tile.row + line * tile.group) / l.outer];
          const View v = load(out_moved, tile, from_out), g = load(grad_moved, tile, from_grad);
          const View r = load(raw, tile, from_raw), t = load(shift, tile, from_shift);
          const View gx = target(grad_x_moved, tile, to_x);
          const View gr = target(grad_raw, tile, to_raw);
          const View gt = target(grad_shift, tile, to_shift);
          Call call = call_on(moved_plan, tile, moved_constants);
          set_sums(moved_plan, tile, of_moved, &call);
          call.settings = coupling.settings;
          call.first = {v.data, g.data, r.data, t.data, gx.data, gr.data, gt.data};
          call.v_stride = v.stride, call.grad_stride = g.stride;
          call.raw_stride = r.stride, call.shift_stride = t.stride;
          call.out_stride = gx.stride;
          call.grad_raw_stride = gr.stride, call.grad_shift_stride = gt.stride;
          call.given = per_line;
          kernel(tile, call);
          store(grad_x_moved, tile, to_x);
          store(grad_raw, tile, to_raw);
          store(grad_shift, tile, to_shift);
        };
        take_turns(
            kept_plan, moved_plan, begin, end,
            [&](const Tile& tile) {
              gradients_kept(kept_plan, tile, kept_constants, norm, out_kept, grad_kept,
                             grad_x_kept, of_kept);
            },
            gradients_moved);
        gather(norm, kept_plan, of_kept, sums, chunk);
        gather(norm, moved_plan, of_moved, sums, chunk);
        float* to_gain = sums.at(chunk, kGain);
        moved_plan.gather(of_moved[kGain], [&](int64_t j, float value) { to_gain[j] = value; });
      });

  const double positions = static_cast<double>(l.outer * l.inner);
  finish(norm, sums, l.channels, positions * sum_double(grad_log_det, l.samples), grad_log_scale,
              grad_bias);
  if (gain != nullptr) sums.total(kGain, coupling.settings.amplitude, l.moved, grad_gain);
  return 1;
}
