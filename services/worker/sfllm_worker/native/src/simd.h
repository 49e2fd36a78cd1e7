// Vectors of floats in the widest registers that the compiler may use, and the element types of models.
//
// Everything is written with GCC's vector extensions, so that one source serves AVX-512, AVX2 and plain
// SSE or NEON; only what those cannot say (the bfloat16 dot product, rounding to bfloat16) has variants.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

// For a thread that looks again and again whether another is ready.
INLINE void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

// A number's upper half: the sign, the exponent and seven bits of the fraction of a float.
struct bf16 {
    uint16_t bits;
};

template <class V> INLINE V load_as(const void *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf splat(float x) { return vf{} + x; }
INLINE vi splat_int(int32_t x) { return vi{} + x; }
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
// NaN in `b` stays.
INLINE vf maximum(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}
// NaN in `a` stays.
INLINE vf minimum(vf a, vf b) { return choose(a > b, b, a); }

struct LaneNumbers {
    int32_t lanes[LANES] = {};
    constexpr LaneNumbers() {
        for (int i = 0; i < LANES; i++) lanes[i] = i;
    }
};
alignas(64) constexpr LaneNumbers LANE_NUMBERS;

INLINE vi lane_numbers() { return load_as<vi>(LANE_NUMBERS.lanes); }

INLINE vf load(const float *p) { return load_as<vf>(p); }
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf load(const bf16 *p) {
#if defined(__AVX512F__)
    // GCC 12 makes two halves of the conversion below.
    const vu wide = (vu)_mm512_cvtepu16_epi32((__m256i)load_as<vh>(p));
#else
    const vu wide = __builtin_convertvector(load_as<vh>(p), vu);
#endif
    return (vf)(wide << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
INLINE vh to_bf16_bits(vf v) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu is_nan = (vu)(v != v);
    return __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), vh);
#endif
}

INLINE void store(bf16 *p, vf v) {
    vh bits = to_bf16_bits(v);
    memcpy(p, &bits, sizeof bits);
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The first `count` < LANES elements, zeros after them: what ends a row that is no multiple of a vector.
template <class T> INLINE vf load_some(const T *p, int count) {
    T part[LANES] = {};
    memcpy(part, p, count * sizeof(T));
    return load(part);
}

template <class T> INLINE void store_some(T *p, vf v, int count) {
    T part[LANES];
    store(part, v);
    memcpy(p, part, count * sizeof(T));
}

// Lane i changes places with lane i ^ distance.
template <class V> INLINE V swap_lanes(V v, int distance) { return __builtin_shuffle(v, lane_numbers() ^ distance); }

// Halves are added to each other, again and again: one order of additions, which the sums of four
// accumulators in dot.h follow as well.
INLINE float sum(vf v) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2) v += swap_lanes(v, half);
    return v[0];
}

INLINE float largest(vf v) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2) v = maximum(v, swap_lanes(v, half));
    return v[0];
}

// Turns LANES rows into one vector: lane i is row i, reduced by halves in the order of `sum`.
template <class Operation> INLINE vf reduce_rows(vf *rows, Operation operation) {
    const vi lanes = lane_numbers();
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) {
            const vf a = rows[i], b = rows[i + half];
            const vi second = (lanes & half) != 0;
            const vf own = choose(second, b, a);
            const vf other = __builtin_shuffle(a, b, (lanes ^ half) + (second & LANES));
            rows[i] = operation(own, other);
        }
    return rows[0];
}

// e to the x within 2 units in the last place (the polynomial of Cephes' expf). Below -87 the result is 0,
// from 88 on it grows no more; NaN stays.
INLINE vf exponential(vf x) {
    vi underflows = x < splat(-87.0f);
    x = minimum(x, splat(88.0f));
    x = choose(underflows, vf{}, x);
    // Adding and taking away 1.5 * 2^23 rounds to a whole number.
    const vf magic = splat(12582912.0f);
    vf shifted = x * 1.44269504088896341f + magic;
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vf power = (vf)((((vi)shifted - (vi)magic) + 127) << 23);
    return choose(underflows, vf{}, p * power);
}

// 2 to the x for x <= 0 within 3 units in the last place; from -160 down (elsewhere from -127) exactly 0. NaN stays.
INLINE vf power_of_two(vf x) {
#if defined(__AVX512F__)
    x = maximum(splat(-160.0f), x);
#else
    x = maximum(splat(-127.0f), x);
#endif
    // Adding and taking away 1.5 * 2^23 rounds to a whole number.
    const vf magic = splat(12582912.0f);
    const vf shifted = x + magic, n = shifted - magic, r = x - n;
    // Of least relative error for |r| <= 1/2, 2e-9 before rounding.
    vf p = splat(1.53533184e-4f);
    p = p * r + 1.33988651e-3f;
    p = p * r + 9.61843742e-3f;
    p = p * r + 5.55033249e-2f;
    p = p * r + 2.40226479e-1f;
    p = p * r + 6.93147203e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (vf)(((vi)shifted - (vi)magic + 127) << 23);
#endif
}

INLINE vf hyperbolic_tangent(vf x) {
    vf e = exponential(2.0f * x);
    return 1.0f - 2.0f / (e + 1.0f);
}
