// The product that everything is built from: words of one side times vectors of words of the other.
//
// A word is what one lane multiplies at once: a float, or two neighbouring bfloat16.

#pragma once

#include "simd.h"

template <class T> constexpr int PER_WORD = sizeof(float) / sizeof(T);

template <class T> struct Words;

template <> struct Words<float> {
    typedef vf V;
    static INLINE vf dot(vf acc, V a, V b) { return acc + a * b; }
};

template <> struct Words<bf16> {
    typedef vu V;
    static INLINE vf dot(vf acc, V a, V b) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
        vf even = acc + (vf)(a << 16) * (vf)(b << 16);
        return even + (vf)(a & 0xffff0000) * (vf)(b & 0xffff0000);
#endif
    }
};

// The word at `from` in every lane.
template <class T> INLINE typename Words<T>::V splat_word(const uint32_t *from) {
    return (typename Words<T>::V)(vu{} + *from);
}
