// Products of rows: tiles of dot products between rows of activations and rows of a weight.
//
// Weights stay as they are stored, `[out, in]`, so that nothing is packed at load and the embedding can be
// the head. A dot product is summed over the lanes in the order of the row and then by halves, whatever
// tile it falls in: a row's result does not depend on how many other rows are computed with it.

#pragma once

#include "simd.h"

template <class T> struct Pairs;

template <> struct Pairs<float> {
    static constexpr int STEP = LANES;
    typedef vf V;
    static INLINE V load(const float *p) { return load_as<V>(p); }
    static INLINE V load_some(const float *p, int count) { return ::load_some(p, count); }
    static INLINE vf dot(vf acc, V a, V b) { return acc + a * b; }
};

template <> struct Pairs<bf16> {
    static constexpr int STEP = 2 * LANES;
    typedef vu V;
    static INLINE V load(const bf16 *p) { return load_as<V>(p); }
    static INLINE V load_some(const bf16 *p, int count) {
        V v = {};
        memcpy(&v, p, count * sizeof(bf16));
        return v;
    }
    static INLINE vf dot(vf acc, V a, V b) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
        vf even = acc + (vf)(a << 16) * (vf)(b << 16);
        return even + (vf)(a & 0xffff0000) * (vf)(b & 0xffff0000);
#endif
    }
};

// The sums of four accumulators, each in the order of `sum`.
INLINE void store_sums(const vf *acc, float *out) {
#if defined(__AVX512F__)
    __m512 a = (__m512)acc[0], b = (__m512)acc[1], c = (__m512)acc[2], d = (__m512)acc[3];
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    __m512 quarters = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    __m512 halves = _mm512_add_ps(quarters, _mm512_shuffle_ps(quarters, quarters, 0x4e));
    __m512 sums = _mm512_add_ps(halves, _mm512_shuffle_ps(halves, halves, 0xb1));
    __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, sums)));
#else
    for (int i = 0; i < 4; i++) out[i] = sum(acc[i]);
#endif
}

// Rows of a weight in a tile.
constexpr int NR = 4;

// `out[m][n]` for MR rows of `x` and NR rows of `w`.
template <class T, int MR>
INLINE void dot_tile(const T *x, size_t x_stride, const T *const *w, int depth, float (*out)[NR]) {
    typedef Pairs<T> P;
    vf acc[MR][NR] = {};
    int k = 0;
    for (; k + P::STEP <= depth; k += P::STEP) {
        typename P::V columns[NR];
#pragma GCC unroll 16
        for (int n = 0; n < NR; n++) columns[n] = P::load(w[n] + k);
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
            typename P::V row = P::load(x + m * x_stride + k);
#pragma GCC unroll 16
            for (int n = 0; n < NR; n++) acc[m][n] = P::dot(acc[m][n], row, columns[n]);
        }
    }
    if (k < depth) {
        typename P::V columns[NR];
        for (int n = 0; n < NR; n++) columns[n] = P::load_some(w[n] + k, depth - k);
        for (int m = 0; m < MR; m++) {
            typename P::V row = P::load_some(x + m * x_stride + k, depth - k);
            for (int n = 0; n < NR; n++) acc[m][n] = P::dot(acc[m][n], row, columns[n]);
        }
    }
    for (int m = 0; m < MR; m++) store_sums(acc[m], out[m]);
}
