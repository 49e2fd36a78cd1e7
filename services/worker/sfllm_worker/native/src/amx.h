// Products of bfloat16 on Intel's matrix tiles (AMX), where the compiler and the system give them.
//
// The weight's rows are the left tiles, read as they are stored; the tokens are packed into the right ones.
// Only with -DSFLLM_TILES, until it has been measured on such a CPU. With -DSFLLM_EMULATE_AMX the instructions are plain loops, so that the rest is tested on any machine.

#pragma once

#include <algorithm>

#include "panel.h"

#if defined(SFLLM_EMULATE_AMX) || (defined(SFLLM_TILES) && defined(__AMX_TILE__) && defined(__AMX_BF16__))
#define SFLLM_AMX 1
#else
#define SFLLM_AMX 0
#endif

#if SFLLM_AMX && !defined(SFLLM_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amx {

constexpr int SIDE = 16;        // rows of a tile, and words in one
constexpr int DEPTH = 32;       // elements of bfloat16 in a row
constexpr int FEWEST_TOKENS = 8;  // below, padding the tokens to a tile costs more than it brings

#if SFLLM_AMX

#if defined(SFLLM_EMULATE_AMX)
inline bool permitted() { return true; }

struct Tiles {
    float sums[4][SIDE][SIDE];
    bf16 left[2][SIDE][DEPTH];
    uint32_t right[2][SIDE][SIDE];
};
inline thread_local Tiles tiles;

inline void begin() {}
inline void end() {}
template <int C> void clear() { memset(tiles.sums[C], 0, sizeof tiles.sums[C]); }
template <int A> void load_left(const bf16 *rows, size_t stride) {
    for (int i = 0; i < SIDE; i++) memcpy(tiles.left[A][i], rows + i * stride, sizeof tiles.left[A][i]);
}
template <int B> void load_right(const uint32_t *words) { memcpy(tiles.right[B], words, sizeof tiles.right[B]); }
template <int C, int A, int B> void multiply() {
    for (int k = 0; k < SIDE; k++)
        for (int n = 0; n < SIDE; n++)
            for (int m = 0; m < SIDE; m++) {
                bf16 pair[2];
                memcpy(pair, &tiles.right[B][k][m], sizeof pair);
                tiles.sums[C][n][m] += to_float(tiles.left[A][n][2 * k]) * to_float(pair[0]);
                tiles.sums[C][n][m] += to_float(tiles.left[A][n][2 * k + 1]) * to_float(pair[1]);
            }
}
template <int C> void store_sums(float *to) { memcpy(to, tiles.sums[C], sizeof tiles.sums[C]); }
#else
// Linux lets a process use the tiles when it has asked for them.
inline bool permitted() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// What the tiles look like, as the processor reads it: a constant, because the compiler does not see that.
struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const Configuration CONFIGURATION;

inline void begin() {
    asm volatile("" ::: "memory");  // GCC 12 does not know that loading a tile reads memory
    _tile_loadconfig(&CONFIGURATION);
}
inline void end() { _tile_release(); }
// The compiler's macros paste the tiles' numbers into assembly, so each is written out.
template <int C> INLINE void clear() {
    if constexpr (C == 0) _tile_zero(0);
    if constexpr (C == 1) _tile_zero(1);
    if constexpr (C == 2) _tile_zero(2);
    if constexpr (C == 3) _tile_zero(3);
}
template <int A> INLINE void load_left(const bf16 *rows, size_t stride) {
    if constexpr (A == 0) _tile_loadd(4, rows, stride * sizeof(bf16));
    if constexpr (A == 1) _tile_loadd(5, rows, stride * sizeof(bf16));
}
template <int B> INLINE void load_right(const uint32_t *words) {
    if constexpr (B == 0) _tile_loadd(6, words, 64);
    if constexpr (B == 1) _tile_loadd(7, words, 64);
}
template <int C, int A, int B> INLINE void multiply() {
    static_assert(C == 2 * A + B);
    if constexpr (C == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (C == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 3) _tile_dpbf16ps(3, 5, 7);
}
template <int C> INLINE void store_sums(float *to) {
    if constexpr (C == 0) _tile_stored(0, to, 64);
    if constexpr (C == 1) _tile_stored(1, to, 64);
    if constexpr (C == 2) _tile_stored(2, to, 64);
    if constexpr (C == 3) _tile_stored(3, to, 64);
}
#endif

// Words that `tokens` rows of `depth` take when they are packed.
inline size_t packed_words(int64_t tokens, int64_t depth) { return (tokens + SIDE - 1) / SIDE * SIDE * depth / 2; }

// Sixteen rows (zeros after the `count`-th) as tiles in which word w of every row stands in row w.
inline void pack(const bf16 *x, size_t x_stride, int count, int depth, uint32_t *to) {
    for (int k = 0; k < depth; k += DEPTH, to += SIDE * SIDE)
        for (int w = 0; w < SIDE; w += LANES)
            for (int m = 0; m < SIDE; m += LANES) {
                vi square[LANES];
                for (int i = 0; i < LANES; i++)
                    square[i] = m + i < count ? load_as<vi>(x + (m + i) * x_stride + k + 2 * w) : vi{};
                transpose_words(square);
                for (int i = 0; i < LANES; i++) memcpy(to + (w + i) * SIDE + m, &square[i], sizeof(vi));
            }
}

// A tile of sums to rows of tokens: `y[m][n] = sums[n][m]` for the first `count` tokens.
inline void write(const float *sums, int count, float *y, size_t y_stride, bool add) {
    for (int n = 0; n < SIDE; n += LANES)
        for (int m = 0; m < count; m += LANES) {
            vi square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = (vi)load(sums + (n + i) * SIDE + m);
            transpose_words(square);
            for (int i = 0; i < std::min(LANES, count - m); i++) {
                float *to = y + (m + i) * y_stride + n;
                store(to, add ? load(to) + (vf)square[i] : (vf)square[i]);
            }
        }
}

// Two tiles of weight rows times two tiles of tokens, or fewer of either.
template <int ROW_TILES, int TOKEN_TILES>
void multiply_tiles(const uint32_t *packed, const bf16 *w, int depth, int tokens, float *y, size_t y_stride, bool add) {
    const size_t group = (size_t)SIDE * depth / 2;
    clear<0>();
    if (TOKEN_TILES > 1) clear<1>();
    if (ROW_TILES > 1) clear<2>();
    if (ROW_TILES > 1 && TOKEN_TILES > 1) clear<3>();
    for (int k = 0; k < depth; k += DEPTH, packed += SIDE * SIDE) {
        load_left<0>(w + k, depth);
        load_right<0>(packed);
        multiply<0, 0, 0>();
        if (TOKEN_TILES > 1) {
            load_right<1>(packed + group);
            multiply<1, 0, 1>();
        }
        if (ROW_TILES > 1) {
            load_left<1>(w + (size_t)SIDE * depth + k, depth);
            multiply<2, 1, 0>();
            if (TOKEN_TILES > 1) multiply<3, 1, 1>();
        }
    }
    alignas(64) float sums[SIDE * SIDE];
    const int first = std::min(tokens, SIDE), second = tokens - SIDE;
    store_sums<0>(sums), write(sums, first, y, y_stride, add);
    if (TOKEN_TILES > 1) store_sums<1>(sums), write(sums, second, y + SIDE * y_stride, y_stride, add);
    if (ROW_TILES > 1) store_sums<2>(sums), write(sums, first, y + SIDE, y_stride, add);
    if (ROW_TILES > 1 && TOKEN_TILES > 1)
        store_sums<3>(sums), write(sums, second, y + SIDE * y_stride + SIDE, y_stride, add);
}

// `rows` (a multiple of SIDE) rows of `w` times `tokens` packed rows.
inline void multiply_block(const uint32_t *packed, const bf16 *w, int depth, int rows, int tokens, float *y,
                           size_t y_stride, bool add) {
    const size_t group = (size_t)SIDE * depth / 2;
    begin();
    for (int n = 0; n < rows; n += 2 * SIDE)
        for (int t = 0; t < tokens; t += 2 * SIDE) {
            const uint32_t *x = packed + t / SIDE * group;
            const bf16 *wn = w + (size_t)n * depth;
            float *to = y + t * y_stride + n;
            const bool two_rows = rows - n > SIDE, two_tokens = tokens - t > SIDE;
            const int count = std::min(tokens - t, 2 * SIDE);
            if (two_rows && two_tokens) multiply_tiles<2, 2>(x, wn, depth, count, to, y_stride, add);
            if (two_rows && !two_tokens) multiply_tiles<2, 1>(x, wn, depth, count, to, y_stride, add);
            if (!two_rows && two_tokens) multiply_tiles<1, 2>(x, wn, depth, count, to, y_stride, add);
            if (!two_rows && !two_tokens) multiply_tiles<1, 1>(x, wn, depth, count, to, y_stride, add);
        }
    end();
}

#endif

// Whether products of so many tokens over rows of `depth` elements go through the tiles.
inline bool serves(int64_t tokens, int64_t depth) {
#if SFLLM_AMX
    return tokens >= FEWEST_TOKENS && depth % DEPTH == 0 && permitted();
#else
    (void)tokens, (void)depth;
    return false;
#endif
}

}  // namespace amx
