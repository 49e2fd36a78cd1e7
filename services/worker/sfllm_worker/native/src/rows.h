// What happens to a row between the products: norms, rotations and gated activations.

#pragma once

#include "simd.h"

// Root-mean-square norm of `size` floats, times `weight`. `out` may be `x`.
template <class T> static void norm_row(const float *x, const float *weight, float eps, int size, T *out) {
    vf squares = {};
    int i = 0;
    for (; i + LANES <= size; i += LANES) {
        vf v = load(x + i);
        squares += v * v;
    }
    const int rest = size - i;
    if (rest) {
        vf v = load_some(x + i, rest);
        squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / (float)size + eps);
    for (i = 0; i + LANES <= size; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
    if (rest) store_some(out + i, load_some(x + i, rest) * scale * load_some(weight + i, rest), rest);
}

// Rotates the first `channels` of a head in place; `rotation` holds half as many cosines, then the sines.
// Channel i turns with channel i + channels / 2, as Hugging Face stores them.
static INLINE void rotate_head(float *head, const float *rotation, int channels) {
    const int half = channels / 2;
    const float *cosines = rotation, *sines = rotation + half;
    int i = 0;
    for (; i + LANES <= half; i += LANES) {
        vf a = load(head + i), b = load(head + half + i), c = load(cosines + i), s = load(sines + i);
        store(head + i, a * c - b * s);
        store(head + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * cosines[i] - b * sines[i];
        head[half + i] = b * cosines[i] + a * sines[i];
    }
}

template <class T> static void copy_row(const float *x, int size, T *out) {
    int i = 0;
    for (; i + LANES <= size; i += LANES) store(out + i, load(x + i));
    if (i < size) store_some(out + i, load_some(x + i, size - i), size - i);
}

static INLINE void add_row(float *to, const float *x, int size) {
    for (int i = 0; i < size; i++) to[i] += x[i];
}

enum Activation : int64_t { SILU = 0, GELU = 1, GELU_TANH = 2 };

INLINE vf activate(vf x, Activation kind) {
    switch (kind) {
    case SILU:
        return x / (1.0f + exponential(-x));
    case GELU_TANH:
        return 0.5f * x * (1.0f + hyperbolic_tangent(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case GELU:
        break;
    }
    // Rare: one lane after the other.
    for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.7071067811865476f));
    return x;
}

// `out[i] = activate(gate[i]) * up[i]`
template <class T> static void gated_row(const float *gate, const float *up, int size, Activation kind, T *out) {
    int i = 0;
    for (; i + LANES <= size; i += LANES) store(out + i, activate(load(gate + i), kind) * load(up + i));
    const int rest = size - i;
    if (rest) store_some(out + i, activate(load_some(gate + i, rest), kind) * load_some(up + i, rest), rest);
}
