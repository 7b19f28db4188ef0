// The arithmetic of actnorm and affine coupling on whole vectors, for every scale: what the kernels that
// walk along tiles (native.cpp) and those that make the conditioner too (mlp_coupling) share.
#pragma once

#include <cstdint>

#include "native/lanes.h"
#include "native/memory.h"
#include "native/native.h"
#include "native/vector_math.h"

namespace {

struct Layout {  // what a call is like, beside its operands: native_impl.py's class of this name
  int64_t x_type, params_type;
  int64_t samples, channels, outer, inner, moved;
  int64_t flip, inverse, norm_shift_first, scale;
  int64_t shift_first, interleaved, shift_leads;
  double clamp, eps, factor;
};

enum Constant { kBefore, kScale, kAfter, kUnscale, kBound, kConstants };

enum Kind { kLogScale, kBias, kGain, kKinds };

inline double sum_double(const float* values, int64_t count) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < count; ++j) total += values[j];
  return total;
}

// Actnorm in the executed direction: v to (v + before) * scale + after, where one of before and after
// is zero, per channel of x.
class Norm {
 public:
  Norm(const float* log_scale, const float* bias, const Layout& l, bool inverse)
      : present(log_scale != nullptr),
        sign(inverse ? -1.0f : 1.0f),
        before_scale((l.norm_shift_first != 0) != inverse),
        bias_(bias),
        memory_(2 * l.channels),
        scale(memory_),
        unscale(memory_ + l.channels) {
    if (!present) return;
#pragma omp simd
    for (int64_t c = 0; c < l.channels; ++c) {
      const ExpPair<float> e = vector_exp_pair(sign * log_scale[c]);
      scale[c] = e.value;
      unscale[c] = e.inverse;
    }
  }

  // The constant of a kind for channel c, where there is an actnorm.
  float of(Constant kind, int64_t c) const {
    switch (kind) {
      case kBefore: return before_scale ? sign * bias_[c] : 0.0f;
      case kAfter: return before_scale ? 0.0f : sign * bias_[c];
      case kScale: return scale[c];
      default: return unscale[c];
    }
  }

  // Sums over the samples, of the terms that the kernels add, to gradients.
  void finish(int64_t channels, double grad_log_det, float* log_scale, float* bias) const {
    for (int64_t c = 0; c < channels; ++c) {
      log_scale[c] = sign * log_scale[c] + sign * static_cast<float>(grad_log_det);
      bias[c] *= before_scale ? sign * scale[c] : sign;
    }
  }

  const bool present;
  const float sign;
  const bool before_scale;

 private:
  const float* bias_;
  Memory<float> memory_;

 public:
  float* const scale;
  float* const unscale;
};

enum Order { kNoNorm, kNormFirst, kNormLast };

struct Settings {
  Order order = kNoNorm;
  bool shift_first = false;        // of the executed direction
  float raw_factor, shift_factor;  // of the conditioner's output; shift's with the direction's sign
  float amplitude;                 // f is amplitude · squash(raw_factor · raw)
  float inverse_clamp, eps;
};

struct Squashed {  // f of the form, without amplitude and gain, and its derivative
  Lanes value, slope;
};

struct Lines {  // pointers into a line of a tile's operands
  const float *v, *grad, *raw, *shift;
  float *out, *grad_raw, *grad_shift;
};

// --- the kernels: `get` gives a constant of their channel, p points to its lines -------------------

template <class Squash>
struct Map {  // v to v·e^s + t or (v + t)·e^s, with actnorm before or after; the result is s
  static constexpr bool kLight = false;
  static constexpr bool kGivesSum = true;
  Lanes before, scale, after, bound;

  template <class Get>
  explicit Map(const Get& get)
      : before(get(kBefore)), scale(get(kScale)), after(get(kAfter)), bound(get(kBound)) {}

  HYBRIDFLOW_INLINE Lanes step(const Settings& k, const Lines& p, int64_t j, Lanes) {
    Lanes v = load(p.v + j);
    const Lanes t = k.shift_factor * load(p.shift + j);
    if (k.order == kNormFirst) v = (v + before) * scale + after;
    const Lanes s = bound * Squash::at(k.raw_factor * load(p.raw + j), k).value;
    const Lanes e = vector_exp(s);
    Lanes y = k.shift_first ? (v + t) * e : v * e + t;
    if (k.order == kNormLast) y = (y + before) * scale + after;
    store(y, p.out + j);
    return s;
  }

  template <class Add>
  void finish(const Add&) const {}
};

template <class Squash>
struct Gradients {  // from the output, in p.v; the inverse order has both signs of s and t changed
  static constexpr bool kLight = false;
  static constexpr bool kGivesSum = false;
  Lanes before, scale, after, unscale, bound;
  Lanes log_scale{}, bias{}, gain{};

  template <class Get>
  explicit Gradients(const Get& get)
      : before(get(kBefore)),
        scale(get(kScale)),
        after(get(kAfter)),
        unscale(get(kUnscale)),
        bound(get(kBound)) {}

  Lanes norm(Lanes out, Lanes grad) {
    bias += grad;
    log_scale += grad * (out - after);
    return grad * scale;
  }

  HYBRIDFLOW_INLINE Lanes step(const Settings& k, const Lines& p, int64_t j, Lanes grad_log_det) {
    Lanes out = load(p.v + j), g = load(p.grad + j);
    if (k.order == kNormLast) {
      g = norm(out, g);
      out = (out - after) * unscale - before;
    }
    const Squashed f = Squash::at(k.raw_factor * load(p.raw + j), k);
    const Lanes s = bound * f.value, t = k.shift_factor * load(p.shift + j);
    const ExpPair<Lanes> e =
        k.order == kNormFirst ? vector_exp_pair(s) : ExpPair<Lanes>{vector_exp(s), s};
    const Lanes scaled = k.shift_first ? out : out - t;
    const Lanes ge = g * e.value, gs = g * scaled + grad_log_det;
    store(k.shift_factor * (k.shift_first ? ge : g), p.grad_shift + j);
    store(k.raw_factor * (gs * bound * f.slope), p.grad_raw + j);
    gain += gs * f.value;
    Lanes grad_v = ge;
    if (k.order == kNormFirst) {
      const Lanes v = k.shift_first ? scaled * e.inverse - t : scaled * e.inverse;
      grad_v = norm(v, ge);
    }
    store(grad_v, p.out + j);
    return Lanes{};
  }

  template <class Add>
  void finish(const Add& add) const {
    add(kGain, gain);
    add(kLogScale, log_scale);
    add(kBias, bias);
  }
};

struct NormMap {  // of the kept part
  static constexpr bool kLight = true;
  static constexpr bool kGivesSum = false;
  Lanes before, scale, after;

  template <class Get>
  explicit NormMap(const Get& get)
      : before(get(kBefore)), scale(get(kScale)), after(get(kAfter)) {}

  HYBRIDFLOW_INLINE Lanes step(const Settings&, const Lines& p, int64_t j, Lanes) {
    store((load(p.v + j) + before) * scale + after, p.out + j);
    return Lanes{};
  }

  template <class Add>
  void finish(const Add&) const {}
};

struct NormGradients {
  static constexpr bool kLight = true;
  static constexpr bool kGivesSum = false;
  Lanes scale, after;
  Lanes log_scale{}, bias{};

  template <class Get>
  explicit NormGradients(const Get& get) : scale(get(kScale)), after(get(kAfter)) {}

  HYBRIDFLOW_INLINE Lanes step(const Settings&, const Lines& p, int64_t j, Lanes) {
    const Lanes g = load(p.grad + j);
    bias += g;
    log_scale += g * (load(p.v + j) - after);
    store(g * scale, p.out + j);
    return Lanes{};
  }

  template <class Add>
  void finish(const Add& add) const {
    add(kLogScale, log_scale);
    add(kBias, bias);
  }
};

// Copies p.v of the kept part where there is no actnorm; of its gradients, p.v is the gradient.
struct Copy {
  static constexpr bool kLight = true;
  static constexpr bool kGivesSum = false;

  template <class Get>
  explicit Copy(const Get&) {}

  HYBRIDFLOW_INLINE Lanes step(const Settings&, const Lines& p, int64_t j, Lanes) {
    store(load(p.v + j), p.out + j);
    return Lanes{};
  }

  template <class Add>
  void finish(const Add&) const {}
};

inline void add_to(float* sum, Lanes value) { store(load(sum) + value, sum); }

// --- the scales ------------------------------------------------------------------------------------

struct Plain {
  static Squashed at(Lanes r, const Settings&) { return {r, every<Lanes>(1.0f)}; }
};

struct HyperbolicTangent {
  static Squashed at(Lanes r, const Settings&) {
    const Tanh<Lanes> tanh = vector_tanh(r);
    return {tanh.value, tanh.derivative};
  }
};

struct ArcTangent {
  static Squashed at(Lanes r, const Settings&) { return {vector_atan(r), 1.0f / (1.0f + r * r)}; }
};

struct SoftClamp {
  static Squashed at(Lanes r, const Settings& k) {
    const Lanes d = 1.0f / (1.0f + absolute(r) * k.inverse_clamp);
    return {r * d, d * d};
  }
};

struct LogOfSigmoid {
  static Squashed at(Lanes r, const Settings&) {
    const LogSigmoid<Lanes> s = vector_log_sigmoid(r + 2.0f);
    return {s.value, s.derivative};
  }
};

struct LogOfSigmoidPlusEps {
  static Squashed at(Lanes r, const Settings& k) {
    const Sigmoid<Lanes> s = vector_sigmoid(r + 2.0f);
    const Lanes scale = s.value + k.eps;
    return {vector_log(scale), s.other * s.value / scale};
  }
};

enum Scale : int64_t {  // in the order of form.py
  kExp,
  kTanh,
  kAtan,
  kTwoSigmoid,
  kSoftClamp,
  kSigmoid,
  kInverseSigmoid
};

// f(the squash of the layout's scale).
template <class F>
auto with_squash(const Layout& l, const F& f) {
  switch (l.scale) {
    case kTanh:
    case kTwoSigmoid:  // 2σ(r) - 1 = tanh(r / 2)
      return f(HyperbolicTangent{});
    case kAtan: return f(ArcTangent{});
    case kSoftClamp: return f(SoftClamp{});
    case kSigmoid:
    case kInverseSigmoid: return l.eps > 0.0 ? f(LogOfSigmoidPlusEps{}) : f(LogOfSigmoid{});
  }
  return f(Plain{});
}

inline float amplitude(const Layout& l) {
  switch (l.scale) {
    case kTanh:
    case kTwoSigmoid: return static_cast<float>(l.clamp);
    case kAtan: return static_cast<float>(0.636 * l.clamp);
    case kInverseSigmoid: return -1.0f;
  }
  return 1.0f;
}

inline Settings settings_of(const Layout& l, const Norm& norm) {
  const bool inverse = l.inverse != 0;
  Settings settings;
  settings.order = !norm.present ? kNoNorm : inverse ? kNormLast : kNormFirst;
  settings.shift_first = (l.shift_first != 0) != inverse;
  settings.raw_factor = static_cast<float>(l.scale == kTwoSigmoid ? 0.5 * l.factor : l.factor);
  settings.shift_factor = norm.sign * static_cast<float>(l.factor);
  settings.amplitude = norm.sign * amplitude(l);
  settings.inverse_clamp = static_cast<float>(1.0 / l.clamp);
  settings.eps = static_cast<float>(l.eps);
  return settings;
}

// Channel j of raw and of shift among the conditioner's outputs is first + step * j.
struct ParamColumns {
  int64_t raw, shift, step;

  explicit ParamColumns(const Layout& l) : step(l.interleaved != 0 ? 2 : 1) {
    const int64_t second = l.interleaved != 0 ? 1 : l.moved;
    raw = l.shift_leads != 0 ? second : 0;
    shift = l.shift_leads != 0 ? 0 : second;
  }
};

}  // namespace
