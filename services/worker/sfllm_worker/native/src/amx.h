// Products of bfloat16 on Intel's matrix tiles (AMX), where compiler, processor and system give them.
//
// Token rows are the left tiles and a panel's words the right ones, both read as they lie in memory. With
// -DSFLLM_EMULATE_AMX the instructions are plain loops, so that the rest is tested on any machine.

#pragma once

#include <algorithm>

#include "weight.h"

#if defined(SFLLM_EMULATE_AMX) || (defined(SFLLM_TILES) && defined(__AMX_TILE__) && defined(__AMX_BF16__))
#define SFLLM_AMX 1
#else
#define SFLLM_AMX 0
#endif

#if SFLLM_AMX

#if !defined(SFLLM_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amx {

constexpr int SIDE = 16;   // rows of a tile, and words in one
constexpr int DEPTH = 32;  // elements of bfloat16 in a row
static_assert(PANEL == 2 * SIDE);

#if defined(SFLLM_EMULATE_AMX)
inline bool permitted() { return true; }

struct Tiles {
    int rows[2];
    float sums[4][SIDE][SIDE];
    bf16 left[2][SIDE][DEPTH];
    uint32_t right[2][SIDE][SIDE];
};
inline thread_local Tiles tiles;

inline void begin(int first, int second) { tiles.rows[0] = first, tiles.rows[1] = second; }
inline void end() {}
template <int C> void clear() { memset(tiles.sums[C], 0, sizeof tiles.sums[C]); }
template <int A> void load_tokens(const bf16 *rows, size_t stride) {
    for (int i = 0; i < tiles.rows[A]; i++) memcpy(tiles.left[A][i], rows + i * stride, sizeof tiles.left[A][i]);
}
template <int B> void load_panel(const uint32_t *words) {
    for (int i = 0; i < SIDE; i++) memcpy(tiles.right[B][i], words + i * PANEL, sizeof tiles.right[B][i]);
}
template <int C, int A, int B> void multiply() {
    for (int m = 0; m < tiles.rows[A]; m++)
        for (int n = 0; n < SIDE; n++) {
            float sums[2] = {};
            for (int k = 0; k < SIDE; k++) {
                bf16 pair[2];
                memcpy(pair, &tiles.right[B][k][n], sizeof pair);
                for (int i = 0; i < 2; i++) sums[i] += to_float(tiles.left[A][m][2 * k + i]) * to_float(pair[i]);
            }
            tiles.sums[C][m][n] += sums[0] + sums[1];
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

// What the tiles look like, as the processor reads it: four of sums, two of tokens, two of panels.
struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
};

inline void begin(int first, int second) {
    Configuration configuration;
    const uint8_t a = first, b = std::max(second, 1), rows[8] = {a, a, b, b, a, b, SIDE, SIDE};
    memcpy(configuration.rows, rows, sizeof rows);
    asm volatile("" ::"m"(configuration) : "memory");  // GCC 12 does not know that loading it reads memory
    _tile_loadconfig(&configuration);
}
inline void end() { _tile_release(); }
// The compiler's macros paste the tiles' numbers into assembly, so each is written out.
template <int C> INLINE void clear() {
    if constexpr (C == 0) _tile_zero(0);
    if constexpr (C == 1) _tile_zero(1);
    if constexpr (C == 2) _tile_zero(2);
    if constexpr (C == 3) _tile_zero(3);
}
template <int A> INLINE void load_tokens(const bf16 *rows, size_t stride) {
    if constexpr (A == 0) _tile_loadd(4, rows, stride * sizeof(bf16));
    if constexpr (A == 1) _tile_loadd(5, rows, stride * sizeof(bf16));
}
template <int B> INLINE void load_panel(const uint32_t *words) {
    if constexpr (B == 0) _tile_loadd(6, words, PANEL * sizeof(uint32_t));
    if constexpr (B == 1) _tile_loadd(7, words, PANEL * sizeof(uint32_t));
}
template <int C, int A, int B> INLINE void multiply() {
    static_assert(C == 2 * A + B);
    if constexpr (C == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (C == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 3) _tile_dpbf16ps(3, 5, 7);
}
template <int C> INLINE void store_sums(float *to) {
    if constexpr (C == 0) _tile_stored(0, to, SIDE * sizeof(float));
    if constexpr (C == 1) _tile_stored(1, to, SIDE * sizeof(float));
    if constexpr (C == 2) _tile_stored(2, to, SIDE * sizeof(float));
    if constexpr (C == 3) _tile_stored(3, to, SIDE * sizeof(float));
}
#endif

// Whether products over so many columns go through the tiles: always or never, so that a row is computed in the
// same order whatever its neighbours.
inline bool serves(int64_t columns) { return columns % DEPTH == 0 && permitted(); }

// Up to 32 tokens times a whole panel: `sums[token / 16][row / 16][token % 16][row % 16]`.
template <bool TWO>
inline void panel_sums(const bf16 *x, size_t x_stride, const uint32_t *panel, int columns, const char *ahead,
                       size_t ahead_step, float (*sums)[SIDE * SIDE]) {
    clear<0>(), clear<1>();
    if (TWO) clear<2>(), clear<3>();
    for (int k = 0; k < columns; k += DEPTH, panel += SIDE * PANEL) {
        for (size_t i = 0; i < ahead_step; i += 64) __builtin_prefetch(ahead + i, 0, 2);
        ahead += ahead_step;
        load_panel<0>(panel), load_panel<1>(panel + SIDE);
        load_tokens<0>(x + k, x_stride);
        multiply<0, 0, 0>(), multiply<1, 0, 1>();
        if (TWO) {
            load_tokens<1>(x + SIDE * x_stride + k, x_stride);
            multiply<2, 1, 0>(), multiply<3, 1, 1>();
        }
    }
    store_sums<0>(sums[0]), store_sums<1>(sums[1]);
    if (TWO) store_sums<2>(sums[2]), store_sums<3>(sums[3]);
}

}  // namespace amx

#endif
