// The native conditioner between the native actnorm and coupling, in one call; the formulas are those of
// reference.py. Raw scale and shift, which are as large as x, may be kept for the backward.
#include "actnorm_coupling/arithmetic.h"
#include "native/memory.h"
#include "native/native.h"

HYBRIDFLOW_CHECKED_KERNEL(actnorm_identity)
(void*, const float*, const float*, const int64_t*, void*, const Layout*, int64_t);
HYBRIDFLOW_CHECKED_KERNEL(actnorm_identity_backward)
(void*, void*, const float*, const float*, const int64_t*, void*, float*, float*, const Layout*, int64_t);
HYBRIDFLOW_CHECKED_KERNEL(actnorm_coupling)
(void*, void*, const float*, const float*, const float*, const float*, const int64_t*, void*, float*,
 const Layout*, int64_t);
HYBRIDFLOW_CHECKED_KERNEL(actnorm_coupling_backward)
(void*, const float*, void*, void*, const float*, const float*, const float*, const int64_t*, void*, void*,
 float*, float*, float*, const Layout*, int64_t);
HYBRIDFLOW_KERNEL(conv_conditioner)
(const float*, const float*, const float*, const float*, const float*, float*, int64_t, int64_t, int64_t,
 int64_t, int64_t, int64_t, int64_t, int64_t);
HYBRIDFLOW_KERNEL(conv_conditioner_backward)
(const float*, const float*, const float*, const float*, const float*, float*, float*, float*, float*,
 float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);

#define HYBRIDFLOW_CALL(name) HYBRIDFLOW_JOIN(HYBRIDFLOW_ISA, name)

namespace {

struct Image {  // of one sample
  int64_t height, width, hidden, size;
};

struct Weights {
  const float *weight1, *bias1, *weight2, *bias2;
};

int64_t kept(const Layout& l) { return l.channels - l.moved; }
int64_t identity_size(const Layout& l) { return l.samples * kept(l) * l.inner; }

// The conditioner's input from the given x (forward) or from either end (inverse): log_scale null takes
// the identity part as it is.
void conditioner_input(float* x, const float* log_scale, const float* bias, float* a, const Layout& l,
                       int64_t threads) {
  HYBRIDFLOW_CALL(actnorm_identity)(x, log_scale, bias, nullptr, a, &l, threads);
}

void conditioner(const float* a, const Weights& w, float* params, const Layout& l, const Image& image,
                 int64_t threads) {
  HYBRIDFLOW_CALL(conv_conditioner)
  (a, w.weight1, w.bias1, w.weight2, w.bias2, params, l.samples, image.height, image.width, kept(l),
   image.hidden, 2 * l.moved, image.size, threads);
}

void add(const float* from, int64_t count, float* to) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] += from[j];
}

// grad_a (samples, kept, ...) onto the identity part of grad_x.
void add_to_identity(const float* grad_a, float* grad_x, const Layout& l, int64_t threads) {
  const int64_t row = kept(l) * l.inner, first = l.flip != 0 ? l.moved * l.inner : 0;
#pragma omp parallel for schedule(static) num_threads(team(l.samples* row, threads))
  for (int64_t i = 0; i < l.samples; ++i)
    add(grad_a + i * row, row, grad_x + i * l.channels * l.inner + first);
}

}  // namespace

// x (samples, channels, height, width), contiguous float32 as everything else -> out, params (samples,
// 2 moved, height, width) and log_det; log_scale with bias, gain and log_det_in may be null.
HYBRIDFLOW_KERNEL(conv_coupling)
(float* x, const float* weight1, const float* bias1, const float* weight2, const float* bias2,
 const float* log_scale, const float* bias, const float* gain, const float* log_det_in, float* out,
 float* params, float* log_det, const Layout* layout, int64_t height, int64_t width, int64_t hidden,
 int64_t size, int64_t threads) {
  const Layout& l = *layout;
  const bool norm_first = l.inverse == 0;
  const Memory<float> a(identity_size(l));
  conditioner_input(x, norm_first ? log_scale : nullptr, norm_first ? bias : nullptr, a, l, threads);
  const Weights weights{weight1, bias1, weight2, bias2};
  conditioner(a, weights, params, l, {height, width, hidden, size}, threads);
  HYBRIDFLOW_CALL(actnorm_coupling)
  (x, params, log_scale, bias, gain, log_det_in, nullptr, out, log_det, layout, threads);
}

// Gradients of all operands from out, and from params or, where these are null, once more from the
// conditioner. What belongs to an operand that is null is null.
HYBRIDFLOW_KERNEL(conv_coupling_backward)
(float* grad, const float* grad_log_det, float* out, float* params, const float* weight1,
 const float* bias1, const float* weight2, const float* bias2, const float* log_scale, const float* bias,
 const float* gain, float* grad_x, float* grad_weight1, float* grad_bias1, float* grad_weight2,
 float* grad_bias2, float* grad_log_scale, float* grad_bias, float* grad_gain, const Layout* layout,
 int64_t height, int64_t width, int64_t hidden, int64_t size, int64_t threads) {
  const Layout& l = *layout;
  const bool norm_first = l.inverse == 0;  // the conditioner's input is in out, after actnorm
  const Memory<float> a(identity_size(l)), grad_a(identity_size(l));
  conditioner_input(out, norm_first ? nullptr : log_scale, norm_first ? nullptr : bias, a, l, threads);
  const int64_t count = 2 * l.samples * l.moved * l.inner;
  const Memory<float> made(params == nullptr ? count : 0), grad_params(count);
  if (params == nullptr) {
    const Weights weights{weight1, bias1, weight2, bias2};
    conditioner(a, weights, made, l, {height, width, hidden, size}, threads);
    params = made;
  }
  HYBRIDFLOW_CALL(actnorm_coupling_backward)
  (grad, grad_log_det, out, params, log_scale, bias, gain, nullptr, grad_x, grad_params, grad_log_scale,
   grad_bias, grad_gain, layout, threads);
  HYBRIDFLOW_CALL(conv_conditioner_backward)
  (grad_params, a, weight1, bias1, weight2, grad_a, grad_weight1, grad_bias1, grad_weight2, grad_bias2,
   l.samples, height, width, kept(l), hidden, 2 * l.moved, size, threads);
  if (norm_first && log_scale != nullptr) {
    const Memory<float> through(identity_size(l)), of_norm(2 * l.channels);
    HYBRIDFLOW_CALL(actnorm_identity_backward)
    (grad_a, a, log_scale, bias, nullptr, through, of_norm, of_norm + l.channels, layout, threads);
    add(of_norm, l.channels, grad_log_scale);
    add(of_norm + l.channels, l.channels, grad_bias);
    add_to_identity(through, grad_x, l, threads);
  } else {
    add_to_identity(grad_a, grad_x, l, threads);
  }
}
