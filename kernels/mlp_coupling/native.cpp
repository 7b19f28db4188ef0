// Actnorm, dense conditioner and affine coupling; the formulas are those of reference.py.
//
// The lanes of a panel are samples: kPanel rows of x are turned into one panel for each entry, and stay
// panels through the whole coupling, in the first and second level of the cache. A layer is a product
// with weights packed as tile of outputs x input x row of the tile; a gradient goes back through it with
// the transposed weights, by the same code. Gradients of weights are inner products over the lanes of
// some panels, whose hidden layers are held for them.
// An item of work is a panel of the map, and a chunk of panels of its gradients. The items, and the order
// of every sum, depend on the shape alone.
#include <algorithm>
#include <initializer_list>

#include "actnorm_coupling/arithmetic.h"
#include "native/denormals.h"
#include "native/items.h"
#include "native/memory.h"
#include "native/native.h"
#include "native/panels.h"

namespace {

constexpr int64_t kHeldFloats = 1 << 18;  // of panels that are held, about
constexpr int64_t kMostHeld = 16;
constexpr int64_t kMostChunks = 16;
constexpr int64_t kPartialFloats = 1 << 20;  // of the gradients of parameters, over all chunks

thread_local Scratch shared_scratch, own_scratch;  // of the calling thread, for all; of each thread

// --- rows of samples to panels and back ------------------------------------------------------------

// from is (lanes, size). Lanes without a sample repeat the last one, or are zero.
void stage(const float* from, int64_t lanes, int64_t size, bool repeat, float* to) {
  int64_t c = 0;
  for (; lanes == kPanel && c + 4 <= size; c += 4)
    for (int64_t l = 0; l < kPanel; l += 4) {
      Quad rows[4];
      for (int i = 0; i < 4; ++i) std::memcpy(rows + i, from + (l + i) * size + c, sizeof(Quad));
      transpose(rows);
      for (int i = 0; i < 4; ++i) std::memcpy(to + (c + i) * kPanel + l, rows + i, sizeof(Quad));
    }
  for (; c < size; ++c)
    for (int64_t l = 0; l < kPanel; ++l)
      to[c * kPanel + l] = l < lanes || repeat ? from[least(l, lanes - 1) * size + c] : 0.0f;
}

void unstage(const float* from, int64_t lanes, int64_t size, float* to) {
  int64_t c = 0;
  for (; lanes == kPanel && c + 4 <= size; c += 4)
    for (int64_t l = 0; l < kPanel; l += 4) {
      Quad rows[4];
      for (int i = 0; i < 4; ++i) std::memcpy(rows + i, from + (c + i) * kPanel + l, sizeof(Quad));
      transpose(rows);
      for (int i = 0; i < 4; ++i) std::memcpy(to + (l + i) * size + c, rows + i, sizeof(Quad));
    }
  for (; c < size; ++c)
    for (int64_t l = 0; l < lanes; ++l) to[l * size + c] = from[c * kPanel + l];
}

// --- the conditioner -------------------------------------------------------------------------------

struct Layer {  // weight is (outputs, inputs)
  const float* weight;
  const float* bias;
  int64_t inputs, outputs;
  Parts of_outputs, of_inputs;
  float* packed = nullptr;
  float* packed_back = nullptr;

  Layer(const float* weight, const float* bias, int64_t inputs, int64_t outputs)
      : weight(weight),
        bias(bias),
        inputs(inputs),
        outputs(outputs),
        of_outputs(outputs, kTileRows),
        of_inputs(inputs, kTileRows) {}

  int64_t weights() const { return inputs * outputs; }

  void pack(int64_t t) const {
    const int64_t begin = of_outputs.begin(t), rows = of_outputs.length(t);
    float* to = packed + begin * inputs;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < inputs; ++k) to[k * rows + r] = weight[(begin + r) * inputs + k];
  }

  void pack_back(int64_t t) const {
    const int64_t begin = of_inputs.begin(t), rows = of_inputs.length(t);
    float* to = packed_back + begin * outputs;
    for (int64_t j = 0; j < outputs; ++j)
      for (int64_t r = 0; r < rows; ++r) *to++ = weight[j * inputs + begin + r];
  }

  // f(sum, offset in panels) for every output of a panel of inputs.
  template <class F>
  void forward(const float* from, const F& f) const {
    product(of_outputs, inputs, packed, bias, from, f);
  }

  template <class F>
  void back(const float* from, const F& f) const {
    product(of_inputs, outputs, packed_back, nullptr, from, f);
  }

 private:
  template <class F>
  static void product(const Parts& parts, int64_t length, const float* packed, const float* start,
                      const float* from, const F& f) {
    for (int64_t t = 0; t < parts.count; ++t) {
      const int64_t begin = parts.begin(t);
      with_constant<kTileRows>(parts.length(t), [&](auto rows) {
        Tile<rows> tile;
        if (start != nullptr)
          tile.start(start + begin);
        else
          tile.clear();
        tile.add({packed + begin * length, from, length});
        tile.finish([&](Lanes sum, int64_t offset) { f(sum, begin * kPanel + offset); });
      });
    }
  }
};

struct Net {
  Layer first, second, third;

  // hidden layers and params from the conditioner's input, all panels.
  void run(const float* a, float* h1, float* h2, float* params) const {
    first.forward(a, [&](Lanes sum, int64_t at) { store(positive(sum), h1 + at); });
    second.forward(h1, [&](Lanes sum, int64_t at) { store(positive(sum), h2 + at); });
    third.forward(h2, [&](Lanes sum, int64_t at) { store(sum, params + at); });
  }

  int64_t weights() const { return first.weights() + second.weights() + third.weights(); }

  // Inside a parallel region.
  void pack(bool backward) const {
    for (const Layer* layer : {&first, &second, &third}) {
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < layer->of_outputs.count; ++t) layer->pack(t);
      if (backward) {
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < layer->of_inputs.count; ++t) layer->pack_back(t);
      }
    }
#pragma omp barrier
  }

  int64_t packed_floats(bool backward) const {
    int64_t floats = 0;
    for (const Layer* layer : {&first, &second, &third}) floats += Scratch::rounded(layer->weights());
    return backward ? 2 * floats : floats;
  }

  void take_packed(bool backward) {
    for (Layer* layer : {&first, &second, &third}) {
      layer->packed = shared_scratch.take(layer->weights());
      if (backward) layer->packed_back = shared_scratch.take(layer->weights());
    }
  }
};

// --- the coupling ----------------------------------------------------------------------------------

struct Coupling {
  const Layout& l;
  Norm norm;
  Settings settings;
  ParamColumns columns;
  Memory<float> memory;

  Coupling(const Layout& layout, const float* log_scale, const float* bias, const float* gain)
      : l(layout),
        norm(log_scale, bias, layout, layout.inverse != 0),
        settings(settings_of(layout, norm)),
        columns(layout),
        memory(kConstants * layout.channels) {
    for (int64_t c = 0; c < l.channels; ++c)
      for (const Constant kind : {kBefore, kScale, kAfter, kUnscale})
        memory[kind * l.channels + c] = norm.present ? norm.of(kind, c) : 0.0f;
    for (int64_t j = 0; j < l.moved; ++j)
      memory[kBound * l.channels + moved() + j] =
          gain == nullptr ? settings.amplitude : settings.amplitude * gain[j];
  }

  int64_t kept() const { return l.flip != 0 ? l.moved : 0; }  // first entry of the part
  int64_t moved() const { return l.flip != 0 ? 0 : l.channels - l.moved; }
  int64_t kept_count() const { return l.channels - l.moved; }
  bool inverse() const { return l.inverse != 0; }

  // op.step on both halves of the panels of entry c; what it gives is added to `given`s place in sums.
  template <class Op>
  void step(int64_t c, const Lines& lines, const float* given, float* of_lanes, float* sums) const {
    Op op([&](Constant kind) { return every<Lanes>(memory[kind * l.channels + c]); });
    for (int64_t j = 0; j < kPanel; j += kLanes) {
      const Lanes from = given == nullptr ? Lanes{} : load(given + j);
      const Lanes value = op.step(settings, lines, j, from);
      if (Op::kGivesSum) add_to(of_lanes + j, value);
    }
    op.finish([&](Kind kind, Lanes value) {
      add_to(sums + (kind * l.channels + c) * kLanes, value);
    });
  }

  void map_kept(float* x) const {
    for (int64_t c = kept(); norm.present && c < kept() + kept_count(); ++c)
      step<NormMap>(c, {x + c * kPanel, nullptr, nullptr, nullptr, x + c * kPanel, nullptr, nullptr},
                    nullptr, nullptr, nullptr);
  }

  // x from what map_kept makes of it.
  void unmap_kept(const float* out, float* x) const {
    for (int64_t c = kept(); c < kept() + kept_count(); ++c)
      for (int64_t j = c * kPanel; j < (c + 1) * kPanel; ++j) {
        const float* constant = memory.get() + c;
        const float v = norm.present ? (out[j] - constant[kAfter * l.channels]) *
                                               constant[kUnscale * l.channels] -
                                           constant[kBefore * l.channels]
                                     : out[j];
        x[j - kept() * kPanel] = v;
      }
  }

  // grad becomes that of the input.
  void gradients_kept(const float* out, float* grad, float* sums) const {
    for (int64_t c = kept(); norm.present && c < kept() + kept_count(); ++c) {
      float* g = grad + c * kPanel;
      step<NormGradients>(c, {out + c * kPanel, g, nullptr, nullptr, g, nullptr, nullptr}, nullptr,
                          nullptr, sums);
    }
  }
};

using MapMoved = void (*)(const Coupling&, float* x, const float* params, float* of_lanes);
using GradientsMoved = void (*)(const Coupling&, const float* out, float* grad, float* params,
                                const float* grad_log_det, float* sums);

// x becomes the output, and s is added to of_lanes.
template <class Squash>
void map_moved(const Coupling& k, float* x, const float* params, float* of_lanes) {
  for (int64_t j = 0; j < k.l.moved; ++j) {
    float* v = x + (k.moved() + j) * kPanel;
    const float* raw = params + (k.columns.raw + j * k.columns.step) * kPanel;
    const float* shift = params + (k.columns.shift + j * k.columns.step) * kPanel;
    k.step<Map<Squash>>(k.moved() + j, {v, nullptr, raw, shift, v, nullptr, nullptr}, nullptr,
                        of_lanes, nullptr);
  }
}

// grad becomes that of the input, and params become their gradient.
template <class Squash>
void gradients_moved(const Coupling& k, const float* out, float* grad, float* params,
                     const float* grad_log_det, float* sums) {
  for (int64_t j = 0; j < k.l.moved; ++j) {
    const int64_t c = k.moved() + j;
    float* g = grad + c * kPanel;
    float* raw = params + (k.columns.raw + j * k.columns.step) * kPanel;
    float* shift = params + (k.columns.shift + j * k.columns.step) * kPanel;
    k.step<Gradients<Squash>>(c, {out + c * kPanel, g, raw, shift, g, raw, shift}, grad_log_det,
                              nullptr, sums);
  }
}

// --- the map ---------------------------------------------------------------------------------------

struct Call {
  const Layout& l;
  Net net;
  const Coupling& coupling;
  int64_t threads;

  int64_t panels() const { return ratio_up(l.samples, kPanel); }
  int64_t lanes(int64_t panel) const { return least(kPanel, l.samples - panel * kPanel); }

  // Of an elementwise operation that takes as long, about, for so many products with the weights.
  int team_of(int64_t products) const {
    const double flops = 2.0 * static_cast<double>(products * net.weights()) *
                         static_cast<double>(l.samples);
    return team(static_cast<int64_t>(flops / 256), threads);
  }
};

void map_panel(const Call& call, int64_t panel, MapMoved map_moved, const float* x,
               const float* log_det_in, float constant, float* out, float* log_det) {
  const Net& net = call.net;
  const int64_t size = call.l.channels, lanes = call.lanes(panel), first = panel * kPanel;
  const int64_t rows[] = {size, net.first.outputs, net.second.outputs, net.third.outputs};
  own_scratch.reserve((rows[0] + rows[1] + rows[2] + rows[3]) * kPanel + 4 * 16);
  float* v = own_scratch.take(rows[0] * kPanel);
  float* h1 = own_scratch.take(rows[1] * kPanel);
  float* h2 = own_scratch.take(rows[2] * kPanel);
  float* params = own_scratch.take(rows[3] * kPanel);
  stage(x + first * size, lanes, size, true, v);
  if (!call.coupling.inverse()) call.coupling.map_kept(v);
  net.run(v + call.coupling.kept() * kPanel, h1, h2, params);
  if (call.coupling.inverse()) call.coupling.map_kept(v);
  float sums[kPanel] = {};
  map_moved(call.coupling, v, params, sums);
  unstage(v, lanes, size, out + first * size);
  for (int64_t i = first; i < first + lanes; ++i)
    log_det[i] = (log_det_in == nullptr ? constant : log_det_in[i] + constant) + sums[i - first];
}

// --- its gradients ---------------------------------------------------------------------------------

// to, (rows, columns), += inner products of rows of a with columns of b.
void add_inner_products(const float* a, int64_t rows, const float* b, int64_t columns,
                        const Pair* pairs, int64_t count, float* to) {
  const Parts parts(columns, kInnerColumns);
  for (int64_t j = 0; j < parts.count; ++j)
    with_constant<kInnerColumns>(parts.length(j), [&](auto wide) {
      constexpr int most_rows = inner_rows(wide);
      const int64_t first = parts.begin(j);
      int64_t places[wide];
      for (int c = 0; c < wide; ++c) places[c] = first + c;
      const Parts tiles(rows, most_rows);
      for (int64_t i = 0; i < tiles.count; ++i)
        with_constant<most_rows>(tiles.length(i), [&](auto high) {
          const int64_t r = tiles.begin(i);
          inner_products<high, wide>(a + r * kPanel, b + first * kPanel, pairs, count, columns,
                                     places, to + r * columns);
        });
    });
}

// The panels of one panel of samples, by the offsets of their first rows.
struct Frame {
  int64_t out, grad, a, params, h1, h2, g1, g2, floats;

  Frame(const Net& net, int64_t size) {
    int64_t end = 0;
    const auto take = [&](int64_t rows) {
      const int64_t begin = end;
      end += rows * kPanel;
      return begin;
    };
    out = take(size);
    grad = take(size);
    a = take(net.first.inputs);
    params = take(net.third.outputs);
    h1 = take(net.first.outputs);
    h2 = take(net.second.outputs);
    g1 = take(net.first.outputs);
    g2 = take(net.second.outputs);
    floats = end + 3 * kPanel;  // so that frames do not all lie at the same place of a page
  }
};

struct Backward {
  Call call;
  GradientsMoved gradients_moved;
  const float* grad_out;
  const float* grad_log_det;
  const float* out;
  float* grad_x;
  Frame frame;
  int64_t held, chunks;
  float* partials = nullptr;

  Backward(const Call& call_, GradientsMoved gradients_moved, const float* grad_out,
           const float* grad_log_det, const float* out, float* grad_x)
      : call(call_),
        gradients_moved(gradients_moved),
        grad_out(grad_out),
        grad_log_det(grad_log_det),
        out(out),
        grad_x(grad_x),
        frame(call.net, call.l.channels),
        held(most(1, least(kHeldFloats / frame.floats, kMostHeld))),
        chunks(most(1, least(kPartialFloats / partial_floats(),
                             least(ratio_up(call.panels(), held), kMostChunks)))) {}

  // Of a chunk: weight and bias of each layer, then log_scale, bias and gain.
  int64_t partial_floats() const {
    const Net& n = call.net;
    const int64_t biases = n.first.outputs + n.second.outputs + n.third.outputs;
    return Scratch::rounded(n.weights() + biases + kKinds * call.l.channels);
  }

  // The gradients of one panel of samples, in its frame, but for those of parameters.
  void panel(int64_t number, float* panels, float* sums) const {
    const Net& net = call.net;
    const Coupling& coupling = call.coupling;
    const int64_t size = call.l.channels, lanes = call.lanes(number), first = number * kPanel;
    float *y = panels + frame.out, *grad = panels + frame.grad, *params = panels + frame.params;
    float *h1 = panels + frame.h1, *h2 = panels + frame.h2;
    float *g1 = panels + frame.g1, *g2 = panels + frame.g2;
    float* grad_kept = grad + coupling.kept() * kPanel;
    float of_log_det[kPanel];
    stage(out + first * size, lanes, size, true, y);
    stage(grad_out + first * size, lanes, size, false, grad);
    stage(grad_log_det + first, lanes, 1, false, of_log_det);
    // The conditioner's input is actnorm's output in the forward, and the given y in the inverse.
    float* a = panels + frame.a;
    if (coupling.inverse())
      coupling.unmap_kept(y, a);
    else
      std::copy_n(y + coupling.kept() * kPanel, net.first.inputs * kPanel, a);
    net.run(a, h1, h2, params);
    gradients_moved(coupling, y, grad, params, of_log_det, sums);
    net.third.back(params, [&](Lanes sum, int64_t at) {
      store(where_positive(load(h2 + at), sum), g2 + at);
    });
    net.second.back(g2, [&](Lanes sum, int64_t at) {
      store(where_positive(load(h1 + at), sum), g1 + at);
    });
    if (coupling.inverse()) coupling.gradients_kept(y, grad, sums);
    net.first.back(g1, [&](Lanes sum, int64_t at) {
      store(load(grad_kept + at) + sum, grad_kept + at);
    });
    if (!coupling.inverse()) coupling.gradients_kept(y, grad, sums);
    unstage(grad, lanes, size, grad_x + first * size);
  }

  void item(int64_t chunk) const {
    const Net& net = call.net;
    const int64_t sums_floats = kKinds * call.l.channels * kLanes;
    own_scratch.reserve(held * frame.floats + sums_floats + 2 * 16);
    float* panels = own_scratch.take(held * frame.floats);
    float* sums = own_scratch.take(sums_floats);
    float* to = partials + chunk * partial_floats();
    std::fill_n(sums, sums_floats, 0.0f);
    std::fill_n(to, partial_floats(), 0.0f);
    Pair pairs[kMostHeld];
    for (int64_t i = 0; i < held; ++i) pairs[i] = {i * frame.floats, i * frame.floats};
    const int64_t end = (chunk + 1) * call.panels() / chunks;
    for (int64_t p = chunk * call.panels() / chunks; p < end; p += held) {
      const int64_t count = least(held, end - p);
      for (int64_t i = 0; i < count; ++i) panel(p + i, panels + i * frame.floats, sums);
      float* next = to;
      const auto add = [&](const Layer& layer, int64_t grads, int64_t values) {
        add_inner_products(panels + grads, layer.outputs, panels + values, layer.inputs, pairs, count,
                           next);
        next += layer.weights();
        add_row_sums(panels + grads, frame.floats, count, layer.outputs, next);
        next += layer.outputs;
      };
      add(net.first, frame.g1, frame.a);
      add(net.second, frame.g2, frame.h1);
      add(net.third, frame.params, frame.h2);
    }
    float* last = to + partial_floats() - kKinds * call.l.channels;
    for (int64_t i = 0; i < kKinds * call.l.channels; ++i) last[i] = fold(load(sums + i * kLanes));
  }

  // to = the sums over the chunks of what begins at an offset in each.
  void total(int64_t offset, int64_t count, float* to) const {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; ++i) {
      float sum = partials[offset + i];
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        sum += partials[chunk * partial_floats() + offset + i];
      to[i] = sum;
    }
  }

  void run(float* const grads[6], float* grad_log_scale, float* grad_bias, float* grad_gain) {
    const Layout& l = call.l;
    const int64_t all_partials = chunks * partial_floats();
    shared_scratch.reserve(call.net.packed_floats(true) + all_partials);
    call.net.take_packed(true);
    partials = shared_scratch.take(all_partials);
    const int64_t last = partial_floats() - kKinds * l.channels;
    const int workers = call.team_of(3);
    const Items items(chunks, workers);
#pragma omp parallel num_threads(workers)
    {
      const NoDenormals no_denormals;
      call.net.pack(true);
      items.each([&](int64_t chunk) { item(chunk); });
      int64_t offset = 0;
      float* const* to = grads;
      for (const Layer* layer : {&call.net.first, &call.net.second, &call.net.third}) {
        total(offset, layer->weights(), *to++);
        total(offset += layer->weights(), layer->outputs, *to++);
        offset += layer->outputs;
      }
      if (call.coupling.norm.present) {
        total(last + kLogScale * l.channels, l.channels, grad_log_scale);
        total(last + kBias * l.channels, l.channels, grad_bias);
      }
      if (grad_gain != nullptr)
        total(last + kGain * l.channels + call.coupling.moved(), l.moved, grad_gain);
    }
    if (call.coupling.norm.present)
      call.coupling.norm.finish(l.channels, sum_double(grad_log_det, l.samples), grad_log_scale,
                                grad_bias);
    for (int64_t j = 0; grad_gain != nullptr && j < l.moved; ++j)
      grad_gain[j] *= call.coupling.settings.amplitude;
  }
};

Net net_of(const Layout& l, int64_t first, int64_t second, const float* weight1, const float* bias1,
           const float* weight2, const float* bias2, const float* weight3, const float* bias3) {
  return {{weight1, bias1, l.channels - l.moved, first},
          {weight2, bias2, first, second},
          {weight3, bias3, second, 2 * l.moved}};
}

}  // namespace

// As reference.map, with hidden layers of the sizes first and second; log_scale with bias, gain and
// log_det_in may be null.
HYBRIDFLOW_KERNEL(mlp_coupling)
(const float* x, const float* weight1, const float* bias1, const float* weight2, const float* bias2,
 const float* weight3, const float* bias3, const float* log_scale, const float* bias,
 const float* gain, const float* log_det_in, float* out, float* log_det, const Layout* layout,
 int64_t first, int64_t second, int64_t threads) {
  const Layout& l = *layout;
  const Coupling coupling(l, log_scale, bias, gain);
  Call call{l, net_of(l, first, second, weight1, bias1, weight2, bias2, weight3, bias3), coupling,
            threads};
  const MapMoved moved =
      with_squash(l, [](auto squash) -> MapMoved { return map_moved<decltype(squash)>; });
  const float constant =
      coupling.norm.present
          ? coupling.norm.sign * static_cast<float>(sum_double(log_scale, l.channels))
          : 0.0f;
  shared_scratch.reserve(call.net.packed_floats(false));
  call.net.take_packed(false);
  const int workers = call.team_of(1);
  const Items items(call.panels(), workers);
#pragma omp parallel num_threads(workers)
  {
    const NoDenormals no_denormals;
    call.net.pack(false);
    items.each([&](int64_t panel) {
      map_panel(call, panel, moved, x, log_det_in, constant, out, log_det);
    });
  }
}

// As reference.gradients; what belongs to an operand that is null is null as well.
HYBRIDFLOW_KERNEL(mlp_coupling_backward)
(const float* grad, const float* grad_log_det, const float* out, const float* weight1,
 const float* bias1, const float* weight2, const float* bias2, const float* weight3,
 const float* bias3, const float* log_scale, const float* bias, const float* gain, float* grad_x,
 float* grad_weight1, float* grad_bias1, float* grad_weight2, float* grad_bias2, float* grad_weight3,
 float* grad_bias3, float* grad_log_scale, float* grad_bias, float* grad_gain, const Layout* layout,
 int64_t first, int64_t second, int64_t threads) {
  const Layout& l = *layout;
  const Coupling coupling(l, log_scale, bias, gain);
  const Call call{l, net_of(l, first, second, weight1, bias1, weight2, bias2, weight3, bias3),
                  coupling, threads};
  const GradientsMoved moved = with_squash(
      l, [](auto squash) -> GradientsMoved { return gradients_moved<decltype(squash)>; });
  float* const grads[] = {grad_weight1, grad_bias1, grad_weight2,
                          grad_bias2,   grad_weight3, grad_bias3};
  Backward(call, moved, grad, grad_log_det, out, grad_x)
      .run(grads, grad_log_scale, grad_bias, grad_gain);
}
