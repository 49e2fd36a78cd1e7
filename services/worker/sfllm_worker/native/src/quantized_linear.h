// Products with quantized weights: a few groups of columns at a time become words in the nearest cache, and
// all tokens multiply those as they would a dense weight's. So an output is the same sum in the same order as
// if the whole weight had been unpacked beforehand.

#pragma once

#include "linear.h"

// Many tokens keep all words of a panel of up to so many a row; for fewer, writing them costs more than it saves.
constexpr int KEPT_WORDS = 1024, KEEPING_TOKENS = 64;

// 16 kB of words. For floats they are the parts of sums, as in linear.h.
template <class T> constexpr int GROUPS_AT_ONCE = sizeof(T) < sizeof(float) ? 8 : FLOAT_PART / quantized::GROUP;

// Adds a part of the columns to the sums of MR tokens, `[MR][PANEL]`.
template <class T, int MR>
static void add_part(const T *x, size_t x_stride, const uint32_t *part, int words, float *sums) {
    constexpr bool APART = sizeof(T) == sizeof(float);
    for (int n = 0; n < PANEL; n += TILE_VECTORS * LANES) {
        Ahead nothing{(const char *)part, 0};
        vf acc[MR][TILE_VECTORS] = {};
        for (int m = 0; m < MR && !APART; m++)
            for (int v = 0; v < TILE_VECTORS; v++) acc[m][v] = load(sums + m * PANEL + n + v * LANES);
        sum_tile<T, MR>((const uint32_t *)x, x_stride / PER_WORD<T>, part + n, words, nothing, acc);
        for (int m = 0; m < MR; m++)
            for (int v = 0; v < TILE_VECTORS; v++) {
                float *to = sums + m * PANEL + n + v * LANES;
                store(to, APART ? load(to) + acc[m][v] : acc[m][v]);
            }
    }
}

template <class T>
INLINE void add_part_rows(int rows, const T *x, size_t x_stride, const uint32_t *part, int words, float *sums) {
#define CASE(MR)                                                                            \
    case MR:                                                                                \
        if constexpr (MR <= TILE_TOKENS) add_part<T, MR>(x, x_stride, part, words, sums);   \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

// So many tokens multiply words in the registers in which they were made; others find them in the cache.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr int FEW_TOKENS = 8;

// `kept` gets the panel's words, unless it is null.
template <int64_t KIND, int MR>
static void sum_few(const uint32_t *x, size_t stride, const Matrix &matrix, const uint8_t *panel, const uint8_t *next,
                    float *sums, uint32_t *kept) {
    constexpr int BYTES = quantized::group_bytes(KIND), PAIRS = quantized::PAIRS;
    const int64_t groups = quantized::group_count(matrix.columns);
    vf acc[MR][2] = {};
    for (int64_t g = 0; g < groups; g++, x += PAIRS) {
        const uint8_t *ahead = quantized::group_ahead<KIND>(panel, next, g, groups);
        const int pairs = (int)std::min<int64_t>(PAIRS, matrix.columns / 2 - g * PAIRS);
        quantized::each_pair<KIND>(panel + g * BYTES, ahead, pairs, [&](int pair, int half, const __m512 *values) {
            const vu column = (vu)_mm512_cvtne2ps_pbh(values[1], values[0]);
            if (MR == FEW_TOKENS && kept) memcpy(kept + (g * PAIRS + pair) * PANEL + half * LANES, &column, sizeof column);
#pragma GCC unroll 8
            for (int m = 0; m < MR; m++)
                acc[m][half] = Words<bf16>::dot(acc[m][half], splat_word<bf16>(x + m * stride + pair), column);
        });
    }
    for (int m = 0; m < MR; m++)
        for (int half = 0; half < 2; half++) store(sums + m * PANEL + half * LANES, acc[m][half]);
}

template <int64_t KIND>
static void sum_few(int tokens, const uint32_t *x, size_t stride, const Matrix &matrix, const uint8_t *panel,
                    const uint8_t *next, float *sums, uint32_t *kept) {
    switch (tokens) {
    case 1: return sum_few<KIND, 1>(x, stride, matrix, panel, next, sums, kept);
    case 2: return sum_few<KIND, 2>(x, stride, matrix, panel, next, sums, kept);
    case 3: return sum_few<KIND, 3>(x, stride, matrix, panel, next, sums, kept);
    case 4: return sum_few<KIND, 4>(x, stride, matrix, panel, next, sums, kept);
    case 5: return sum_few<KIND, 5>(x, stride, matrix, panel, next, sums, kept);
    case 6: return sum_few<KIND, 6>(x, stride, matrix, panel, next, sums, kept);
    case 7: return sum_few<KIND, 7>(x, stride, matrix, panel, next, sums, kept);
    case 8: return sum_few<KIND, 8>(x, stride, matrix, panel, next, sums, kept);
    }
}

static void sum_few_tokens(const bf16 *x, size_t x_stride, int tokens, const Matrix &matrix, const char *panel,
                           const char *next, float *sums, uint32_t *kept) {
    const uint32_t *words = (const uint32_t *)x;
    const uint8_t *from = (const uint8_t *)panel, *then = (const uint8_t *)next;
    switch (matrix.kind) {
    case INT8: return sum_few<INT8>(tokens, words, x_stride / 2, matrix, from, then, sums, kept);
    case INT8_OFFSET: return sum_few<INT8_OFFSET>(tokens, words, x_stride / 2, matrix, from, then, sums, kept);
    case INT4: return sum_few<INT4>(tokens, words, x_stride / 2, matrix, from, then, sums, kept);
    case INT4_OFFSET: return sum_few<INT4_OFFSET>(tokens, words, x_stride / 2, matrix, from, then, sums, kept);
    }
}
#else
constexpr int FEW_TOKENS = 0;

static void sum_few_tokens(const bf16 *, size_t, int, const Matrix &, const char *, const char *, float *, uint32_t *) {}
#endif

// Any number of tokens: a few groups of columns for all of them, then the next.
template <class T>
static void sum_many(const T *x, size_t x_stride, int tokens, const Matrix &matrix, const char *panel,
                     const char *next, float *sums) {
    alignas(64) uint32_t part[GROUPS_AT_ONCE<T> * quantized::GROUP / PER_WORD<T> * PANEL];
    const int tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    const int64_t groups = quantized::group_count(matrix.columns), each = GROUPS_AT_ONCE<T>;
    memset(sums, 0, sizeof(float) * PANEL * tokens);
    for (int64_t g = 0; g < groups; g += each, x += each * quantized::GROUP) {
        const int64_t end = std::min(g + each, groups), columns = std::min(end * quantized::GROUP, matrix.columns);
        unpack_panel<T>(matrix.kind, panel, matrix.columns, g, end, part, next);
        const int words = (int)((columns - g * quantized::GROUP) / PER_WORD<T>);
        for (int m = 0, left = tiles; left > 0; left--) {
            const int rows = (tokens - m + left - 1) / left;
            add_part_rows<T>(rows, x + m * x_stride, x_stride, part, words, sums + m * PANEL);
            m += rows;
        }
    }
}

// Writes `[rows / PANEL][columns / PER_WORD][PANEL]` words, the panels of the dense weight.
template <class T> void unpack_quantized(const Matrix &matrix, uint32_t *out, int64_t threads) {
    const int64_t panels = matrix.rows / PANEL, words = matrix.columns / PER_WORD<T> * PANEL;
#pragma omp parallel for num_threads((int)threads)
    for (int64_t i = 0; i < panels; i++) {
        const char *panel = panel_memory(matrix, i);
        unpack_panel<T>(matrix.kind, panel, matrix.columns, 0, quantized::group_count(matrix.columns), out + i * words,
                        panel + matrix.panel_bytes);
    }
}

// `linear_panel` for a quantized weight.
template <class T>
static void quantized_panel(const T *x, size_t x_stride, int tokens, const Matrix &matrix, int64_t index, int count,
                            float *y, size_t y_stride, Into into, int64_t next) {
    alignas(64) float sums[TokenBlocks::LARGEST * PANEL];
    alignas(64) static thread_local uint32_t kept[KEPT_WORDS * PANEL];
    const int words = (int)(matrix.columns / PER_WORD<T>);
    const char *panel = panel_memory(matrix, index);
    const char *then = panel_memory(matrix, next < matrix.rows / PANEL ? next : index + 1);
    const float *bias = matrix.bias ? matrix.bias + index * PANEL : nullptr;
    int summed = tokens;
    bool done = false;
    if constexpr (sizeof(T) == sizeof(bf16))
        if (FEW_TOKENS && (tokens <= FEW_TOKENS || (tokens >= KEEPING_TOKENS && words <= KEPT_WORDS))) {
            summed = std::min(tokens, FEW_TOKENS);
            sum_few_tokens(x, x_stride, summed, matrix, panel, then, sums, kept);
            done = true;
        }
    if (!done) sum_many<T>(x, x_stride, tokens, matrix, panel, then, sums);
    for (int m = 0; m < summed; m++)
        for (int n = 0; n < PANEL; n += LANES)
            write_sums(load(sums + m * PANEL + n), bias ? bias + n : nullptr, y + m * y_stride + n, count - n, into);
    if (summed < tokens)
        dense_tiles(x + summed * x_stride, x_stride, tokens - summed, kept, words, bias, count, y + summed * y_stride,
                    y_stride, into, Ahead{(const char *)kept, 0});
}
