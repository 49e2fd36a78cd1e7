// Linear layers: `y[m][n] = x[m] . w[n] + bias[n]`, over weights in panels.
//
// A panel holds PANEL rows of a weight side by side, `words[columns / PER_WORD][PANEL]`, so that outputs lie
// across the lanes and a weight is read in one run of memory. Each output is one sum along the columns in
// their order: it does not depend on how many other tokens are computed with it, nor on who computes it.

#pragma once

#include <algorithm>

#include "amx.h"
#include "team.h"

enum class Into { REPLACE, ADD };

// Token rows of a tile: as many as the registers hold beside the weight's vectors.
constexpr int TILE_TOKENS = LANES == 16 ? 12 : 6;
constexpr int TILE_VECTORS = 2;
static_assert(PANEL % (TILE_VECTORS * LANES) == 0);

// What is fetched into the cache while a tile is computed: `step` bytes further with every word. Few at a time,
// because a processor that has too many requests open stands still.
struct Ahead {
    const char *from;
    size_t step;
};

// Adds to the sums of MR tokens and TILE_VECTORS vectors of a panel. `x` is the first token's words.
template <class T, int MR>
INLINE void sum_tile(const uint32_t *x, size_t stride, const uint32_t *panel, int words, Ahead &ahead,
                     vf (*acc)[TILE_VECTORS]) {
    typedef typename Words<T>::V V;
    // Three rows to a pointer: that many addresses an instruction can make from one.
    constexpr int POINTERS = (MR + 2) / 3;
    const uint32_t *at[POINTERS];
    for (int p = 0; p < POINTERS; p++) at[p] = x + 3 * p * stride;
    const char *fetched = ahead.from;
    for (int k = 0; k < words; k++, panel += PANEL, fetched += ahead.step) {
        __builtin_prefetch(fetched);
        __builtin_prefetch(fetched + ahead.step / 2);
        V column[TILE_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) column[v] = load_as<V>(panel + v * LANES);
#pragma GCC unroll 12
        for (int m = 0; m < MR; m++) {
            const V word = splat_word<T>(at[m / 3] + (m % 3) * stride);
#pragma GCC unroll 2
            for (int v = 0; v < TILE_VECTORS; v++) acc[m][v] = Words<T>::dot(acc[m][v], word, column[v]);
        }
#pragma GCC unroll 4
        for (int p = 0; p < POINTERS; p++) at[p]++;
    }
    ahead.from = fetched;
}

// Long sums of floats lose less when they are made of shorter ones; those of bfloat16 are exact enough.
constexpr int FLOAT_PART = 64;

template <class T, int MR>
INLINE void sum_parts(const uint32_t *x, size_t stride, const uint32_t *panel, int words, Ahead ahead,
                      vf (*acc)[TILE_VECTORS]) {
    if (sizeof(T) < sizeof(float)) return sum_tile<T, MR>(x, stride, panel, words, ahead, acc);
    for (int k = 0; k < words; k += FLOAT_PART) {
        vf part[MR][TILE_VECTORS] = {};
        sum_tile<T, MR>(x + k, stride, panel + (size_t)k * PANEL, std::min(FLOAT_PART, words - k), ahead, part);
        for (int m = 0; m < MR; m++)
            for (int v = 0; v < TILE_VECTORS; v++) acc[m][v] += part[m][v];
    }
}

// One vector of sums to its place, of which `left` columns are still there.
INLINE void write_sums(vf sums, const float *bias, float *to, int left, Into into) {
    if (bias) sums += load(bias);
    if (left >= LANES)
        store(to, into == Into::ADD ? load(to) + sums : sums);
    else if (left > 0)
        store_some(to, into == Into::ADD ? load_some(to, left) + sums : sums, left);
}

template <class T, int MR>
static void panel_tile(const T *x, size_t x_stride, const uint32_t *panel, int words, const float *bias, int count,
                       float *y, size_t y_stride, Into into, Ahead ahead) {
    for (int n = 0; n < count; n += TILE_VECTORS * LANES) {
        vf acc[MR][TILE_VECTORS] = {};
        sum_parts<T, MR>((const uint32_t *)x, x_stride / PER_WORD<T>, panel + n, words, ahead, acc);
        for (int m = 0; m < MR; m++)
            for (int v = 0; v < TILE_VECTORS; v++) {
                const int at = n + v * LANES;
                write_sums(acc[m][v], bias ? bias + at : nullptr, y + m * y_stride + at, count - at, into);
            }
    }
}

template <class T>
INLINE void panel_rows(int rows, const T *x, size_t x_stride, const uint32_t *panel, int words, const float *bias,
                       int count, float *y, size_t y_stride, Into into, Ahead ahead) {
#define CASE(MR)                                                                                        \
    case MR:                                                                                            \
        if constexpr (MR <= TILE_TOKENS)                                                                \
            panel_tile<T, MR>(x, x_stride, panel, words, bias, count, y, y_stride, into, ahead);        \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

// `linear_panel` for a weight that must be unpacked; in packed_linear.h.
template <class T>
static void packed_panel(const T *x, size_t x_stride, int tokens, const Matrix &matrix, int64_t index, int count,
                            float *y, size_t y_stride, Into into, int64_t next);

// Any number of token rows, in tiles of like height.
template <class T>
static void dense_tiles(const T *x, size_t x_stride, int tokens, const uint32_t *panel, int words, const float *bias,
                        int count, float *y, size_t y_stride, Into into, Ahead ahead) {
    for (int m = 0, left = (tokens + TILE_TOKENS - 1) / TILE_TOKENS; left > 0; left--) {
        const int rows = (tokens - m + left - 1) / left;
        panel_rows<T>(rows, x + m * x_stride, x_stride, panel, words, bias, count, y + m * y_stride, y_stride, into,
                      ahead);
        ahead.from += ahead.step * words;
        m += rows;
    }
}

#if SFLLM_AMX
// The same by matrix tiles.
static void panel_by_tiles(const bf16 *x, size_t x_stride, int tokens, const uint32_t *panel, int columns,
                           const float *bias, int count, float *y, size_t y_stride, Into into, Ahead ahead) {
    using namespace amx;
    alignas(64) float sums[4][SIDE * SIDE];
    const size_t step = ahead.step * DEPTH / PER_WORD<bf16>;
    for (int t = 0; t < tokens; t += 2 * SIDE) {
        const int first = std::min(tokens - t, SIDE), second = std::min(tokens - t - SIDE, SIDE);
        begin(first, second);
        (second > 0 ? panel_sums<true> : panel_sums<false>)(x + t * x_stride, x_stride, panel, columns, ahead.from, step, sums);
        end();
        ahead.from += columns / DEPTH * step;
        for (int m = 0; m < std::min(tokens - t, 2 * SIDE); m++)
            for (int n = 0; n < PANEL; n += LANES)
                write_sums(load(sums[m / SIDE * 2 + n / SIDE] + m % SIDE * SIDE + n % SIDE), bias ? bias + n : nullptr,
                           y + (t + m) * y_stride + n, count - n, into);
    }
}
#endif

// What `tokens` tokens fetch while they multiply a panel: the next one, unless that is null, or the memory would
// rest while tiles compute.
inline Ahead fetch_next(const uint32_t *panel, const char *next, int tokens) {
    const int tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    return {next ? next : (const char *)panel, next ? PANEL * sizeof(float) / tiles : 0};
}

// `tokens` rows of `x` times the first `count` rows of panel `index`; `y` points at the first output.
// `next` is the panel that this thread is likely to need afterwards.
template <class T>
static void linear_panel(const T *x, size_t x_stride, int tokens, const Matrix &matrix, int64_t index, int count,
                         float *y, size_t y_stride, Into into, int64_t next) {
    if (matrix.kind != DENSE)
        return packed_panel(x, x_stride, tokens, matrix, index, count, y, y_stride, into, next);
    const int words = (int)(matrix.columns / PER_WORD<T>);
    const uint32_t *panel = (const uint32_t *)panel_memory(matrix, index);
    const float *bias = matrix.bias ? matrix.bias + index * PANEL : nullptr;
    const Ahead ahead = fetch_next(panel, next < matrix.rows / PANEL ? panel_memory(matrix, next) : nullptr, tokens);
#if SFLLM_AMX
    if constexpr (sizeof(T) == sizeof(bf16))
        if (amx::serves(matrix.columns))
            return panel_by_tiles(x, x_stride, tokens, panel, (int)matrix.columns, bias, count, y, y_stride, into, ahead);
#endif
    dense_tiles(x, x_stride, tokens, panel, words, bias, count, y, y_stride, into, ahead);
}

// Token rows are taken in blocks of like height that stay in the cache while panels pass by.
class TokenBlocks {
  public:
    static constexpr int64_t LARGEST = 240;

    explicit TokenBlocks(int64_t tokens) : tokens(tokens), count(std::max<int64_t>(1, (tokens + LARGEST - 1) / LARGEST)) {
        const int64_t fair = (tokens + count - 1) / count;
        height = (fair + TILE_TOKENS - 1) / TILE_TOKENS * TILE_TOKENS;
    }

    int64_t first(int64_t block) const { return block * height; }
    int rows(int64_t block) const { return (int)std::clamp<int64_t>(tokens - first(block), 0, height); }

    int64_t tokens, count;

  private:
    int64_t height;
};
static_assert(TokenBlocks::LARGEST % TILE_TOKENS == 0);

// The whole product, to or onto the first `outputs` columns of `y`. Called by all threads of a team, who wait
// for each other afterwards.
template <class T>
void product(Team &team, const T *x, int64_t x_stride, int64_t tokens, const Matrix &matrix, int64_t outputs, float *y,
             int64_t y_stride, Into into) {
    const TokenBlocks blocks(tokens);
    const int64_t panels = matrix.rows / PANEL;
    team.share(blocks.count * panels, [&](int64_t i) {
        const int64_t first = blocks.first(i / panels), panel = i % panels;
        const int count = (int)std::min<int64_t>(PANEL, outputs - panel * PANEL);
        linear_panel(x + first * x_stride, x_stride, blocks.rows(i / panels), matrix, panel, count,
                     y + first * y_stride + panel * PANEL, y_stride, into, team.after(i) % panels);
    });
    team.wait();
}
