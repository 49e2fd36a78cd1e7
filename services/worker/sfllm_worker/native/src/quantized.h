// Quantized weights: panels of small integers, which become panels of the model's words when they are used.
//
// The layout is that of quant/panels.py. A panel holds, for each group of 32 columns, the scales of its 32
// rows, their offsets if the kind has any, both in half precision, and the values of each pair of columns.

#pragma once

#include <algorithm>

#include "simd.h"

// How a weight is stored; see quant/panels.py and compressed.h.
enum WeightKind : int64_t { DENSE = 0, INT8 = 1, INT8_OFFSET = 2, INT4 = 3, INT4_OFFSET = 4, COMPRESSED = 5 };

namespace quantized {

constexpr int ROWS = 32, GROUP = 32, PAIRS = GROUP / 2;

constexpr bool nibbles(int64_t kind) { return kind == INT4 || kind == INT4_OFFSET; }
constexpr bool offsets(int64_t kind) { return kind == INT8_OFFSET || kind == INT4_OFFSET; }
constexpr int head_bytes(int64_t kind) { return (offsets(kind) ? 2 : 1) * ROWS * 2; }
constexpr int pair_bytes(int64_t kind) { return nibbles(kind) ? ROWS : 2 * ROWS; }
constexpr int group_bytes(int64_t kind) { return head_bytes(kind) + PAIRS * pair_bytes(kind); }
inline int64_t group_count(int64_t columns) { return (columns + GROUP - 1) / GROUP; }
// What stands for zero.
constexpr int middle(int64_t kind) { return kind == INT4 ? 8 : 0; }

// Memory is asked for so many groups before it is read: 7 to 13 kB. From memory this is half the time.
constexpr int GROUPS_AHEAD = 12;
constexpr int LINE = 64;
static_assert(group_bytes(INT8) % LINE == 0 && group_bytes(INT4) % LINE == 0);

INLINE float from_half(uint16_t half) {
    // The exponent's new place is 112 too low, also for subnormal numbers.
    const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    return half & 0x8000 ? -value : value;
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

// A group's scales or offsets as the pairs of columns need them: each row's twice, eight rows to a vector.
INLINE void load_pairs(const uint8_t *halves, __m512 *pairs) {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int v = 0; v < 2; v++) {
        const __m512 rows = _mm512_cvtph_ps(load_as<__m256i>(halves + 32 * v));
        pairs[2 * v] = _mm512_permutexvar_ps(low, rows);
        pairs[2 * v + 1] = _mm512_permutexvar_ps(high, rows);
    }
}

// Two columns of eight rows, then of the next eight.
template <int64_t KIND> INLINE void load_values(const uint8_t *bytes, __m512 numbers, __m512 *values) {
    if constexpr (nibbles(KIND)) {
        // The lookup sees only the lower four bits of a lane.
        const __m512i both = _mm512_cvtepu8_epi32(load_as<__m128i>(bytes));
        values[0] = _mm512_permutexvar_ps(both, numbers);
        values[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), numbers);
    } else {
        for (int v = 0; v < 2; v++)
            values[v] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(bytes + 16 * v)));
    }
}

INLINE void store_pairs(const __m512 *values, bf16 *, uint32_t *out) {
#if defined(__AVX512BF16__)
    const __m512bh words = _mm512_cvtne2ps_pbh(values[1], values[0]);
    memcpy(out, &words, sizeof words);
#else
    for (int v = 0; v < 2; v++) store((bf16 *)(out + 8 * v), (vf)values[v]);
#endif
}

INLINE void store_pairs(const __m512 *values, float *, uint32_t *out) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(values[0], even, values[1]));
    _mm512_storeu_ps(out + ROWS, _mm512_permutex2var_ps(values[0], odd, values[1]));
}

// Calls `take(pair, half, values)` for each pair of columns and half of the rows, with the values of two columns
// of eight rows and of the next eight. `ahead` is the group that memory is asked for.
template <int64_t KIND, class Take>
INLINE void each_pair(const uint8_t *group, const uint8_t *ahead, int pairs, Take take) {
    const __m512 count = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 numbers = _mm512_sub_ps(count, _mm512_set1_ps(middle(KIND)));
    __m512 scales[4], added[4];
    load_pairs(group, scales);
    if constexpr (offsets(KIND)) load_pairs(group + ROWS * 2, added);
    const uint8_t *bytes = group + head_bytes(KIND);
    for (int i = 0; i < head_bytes(KIND); i += LINE) __builtin_prefetch(ahead + i);
    ahead += head_bytes(KIND);
    for (int p = 0; p < pairs; p++, bytes += pair_bytes(KIND)) {
        if (p * pair_bytes(KIND) % LINE == 0) __builtin_prefetch(ahead + p * pair_bytes(KIND));
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512 values[2];
            load_values<KIND>(bytes + half * pair_bytes(KIND) / 2, numbers, values);
            for (int v = 0; v < 2; v++) {
                const int i = 2 * half + v;
                if constexpr (offsets(KIND))
                    values[v] = _mm512_fmadd_ps(values[v], scales[i], added[i]);
                else
                    values[v] = _mm512_mul_ps(values[v], scales[i]);
            }
            take(p, half, values);
        }
    }
}

// The words of `pairs` pairs of columns.
template <class T, int64_t KIND>
INLINE void unpack_group(const uint8_t *group, const uint8_t *ahead, int pairs, uint32_t *out) {
    each_pair<KIND>(group, ahead, pairs, [&](int pair, int half, const __m512 *values) {
        store_pairs(values, (T *)nullptr, out + pair * 2 * ROWS * sizeof(T) / 4 + half * ROWS / 2);
    });
}

#else

INLINE void store_pairs(const float *values, bf16 *, uint32_t *out) {
    for (int i = 0; i < 2 * ROWS; i += LANES) store((bf16 *)out + i, load(values + i));
}

INLINE void store_pairs(const float *values, float *, uint32_t *out) {
    float *columns = (float *)out;
    for (int i = 0; i < ROWS; i++) {
        columns[i] = values[2 * i];
        columns[ROWS + i] = values[2 * i + 1];
    }
}

template <class T, int64_t KIND>
INLINE void unpack_group(const uint8_t *group, const uint8_t *ahead, int pairs, uint32_t *out) {
    for (int i = 0; i < group_bytes(KIND); i += LINE) __builtin_prefetch(ahead + i);
    float scales[2 * ROWS], added[2 * ROWS] = {}, values[2 * ROWS];
    for (int i = 0; i < 2 * ROWS; i++) {
        scales[i] = from_half(load_as<uint16_t>(group + i / 2 * 2));
        if constexpr (offsets(KIND)) added[i] = from_half(load_as<uint16_t>(group + ROWS * 2 + i / 2 * 2));
    }
    const uint8_t *bytes = group + head_bytes(KIND);
    for (int p = 0; p < pairs; p++, bytes += pair_bytes(KIND), out += 2 * ROWS * sizeof(T) / 4) {
        if constexpr (nibbles(KIND)) {
            for (int half = 0; half < 2; half++)
                for (int i = 0; i < 16; i++) {
                    values[32 * half + i] = (float)((bytes[16 * half + i] & 15) - middle(KIND));
                    values[32 * half + 16 + i] = (float)((bytes[16 * half + i] >> 4) - middle(KIND));
                }
        } else {
            for (int i = 0; i < 2 * ROWS; i++) values[i] = (float)(int8_t)bytes[i];
        }
        for (int i = 0; i < 2 * ROWS; i++) values[i] = values[i] * scales[i] + added[i];
        store_pairs(values, (T *)nullptr, out);
    }
}

#endif

// What memory is asked for while group `g` of `groups` is read.
template <int64_t KIND>
INLINE const uint8_t *group_ahead(const uint8_t *panel, const uint8_t *next, int64_t g, int64_t groups) {
    g += GROUPS_AHEAD;
    return g < groups ? panel + g * group_bytes(KIND) : next + (g - groups) * group_bytes(KIND);
}

// Groups `first` to `last`, of which the last one may have fewer columns.
template <class T, int64_t KIND>
static void unpack(const uint8_t *panel, int64_t columns, int64_t first, int64_t last, uint32_t *out,
                   const uint8_t *next) {
    constexpr int WORDS = GROUP * sizeof(T) / sizeof(uint32_t);
    const int64_t groups = group_count(columns), whole = std::min(last, columns / GROUP);
    const auto ahead = [&](int64_t g) { return group_ahead<KIND>(panel, next, g, groups); };
    for (int64_t g = first; g < whole; g++, out += WORDS * ROWS)
        unpack_group<T, KIND>(panel + g * group_bytes(KIND), ahead(g), PAIRS, out);
    if (whole == last) return;
    // Beyond the columns there is no room.
    const int left = (int)(columns % GROUP), bytes = left * sizeof(T), count = (bytes + 3) / 4;
    uint32_t words[GROUP * ROWS];
    unpack_group<T, KIND>(panel + whole * group_bytes(KIND), ahead(whole), (left + 1) / 2, words);
    memcpy(out, words, count * ROWS * sizeof *words);
    if (bytes % 4)
        for (int i = (count - 1) * ROWS; i < count * ROWS; i++) out[i] &= 0xffff;
}

}  // namespace quantized

// Writes the words of a panel's groups `first` to `last` (exclusive), of element type T, `[words][32]`, to `out`.
// The columns are rounded up to whole words. `next` is the panel that is likely to be read after this one.
template <class T>
void unpack_panel(int64_t kind, const void *panel, int64_t columns, int64_t first, int64_t last, uint32_t *out,
                  const void *next) {
    const uint8_t *from = (const uint8_t *)panel, *then = (const uint8_t *)next;
    switch (kind) {
    case INT8: return quantized::unpack<T, INT8>(from, columns, first, last, out, then);
    case INT8_OFFSET: return quantized::unpack<T, INT8_OFFSET>(from, columns, first, last, out, then);
    case INT4: return quantized::unpack<T, INT4>(from, columns, first, last, out, then);
    case INT4_OFFSET: return quantized::unpack<T, INT4_OFFSET>(from, columns, first, last, out, then);
    }
}
