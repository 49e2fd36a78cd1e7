// Weights of bfloat16 in three quarters of their memory, to the last bit.
//
// The upper byte of a bfloat16 is its sign and all but one bit of its exponent. In 32 rows of a model's weight
// nearly all upper bytes are among sixteen, so four bits say which one; the lower byte stands as it is. Weights
// with another upper byte are listed. That exponents tell so little is the finding of DFloat11 (Zhang et al.,
// 2025, arXiv:2504.11651), whose codes are shorter by a tenth but differ in length.
//
// A panel begins with a head and its list. Then come groups of 32 columns; in a group, for every two pairs of
// columns, 64 lower bytes of the first pair, 64 of the second, and 64 codes: of the first pair in the lower halves of
// the bytes, of the second in the upper ones. Interleaving the upper and the lower bytes of a vector gives words in
// their order.

#pragma once

#include <algorithm>

#include "simd.h"

namespace compressed {

constexpr int ROWS = 32, GROUP = 32, PAIRS = GROUP / 2, CODES = 16;
constexpr int PAIR_BYTES = 2 * ROWS, TWO_BYTES = 3 * PAIR_BYTES, GROUP_BYTES = PAIRS / 2 * TWO_BYTES;
constexpr int LINE = 64;

// Memory is asked for so many groups before it is read: 12 kB.
constexpr int GROUPS_AHEAD = 8;

struct Head {
    uint8_t upper[CODES];  // what the codes mean
    uint32_t bytes;        // of the head with its list
    uint32_t listed;

    // By place: a weight's place among the panel's elements, times 256, plus its upper byte.
    uint32_t *list() { return (uint32_t *)(this + 1); }
    const uint32_t *list() const { return (const uint32_t *)(this + 1); }
};

inline int64_t group_count(int64_t columns) { return (columns + GROUP - 1) / GROUP; }

// Bytes of a panel in which so many weights are listed.
inline int64_t panel_bytes(int64_t columns, int64_t listed) {
    return (sizeof(Head) + 4 * listed + LINE - 1) / LINE * LINE + group_count(columns) * GROUP_BYTES;
}

// Where the byte of a row in a column of a pair stands among 64.
constexpr int place(int row, int column) { return row % 16 / 4 * 16 + row / 16 * 8 + row % 4 * 2 + column; }

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define SFLLM_COMPRESSES 1
typedef __m512i Bytes;
INLINE Bytes repeated(const uint8_t *upper) { return _mm512_broadcast_i32x4(load_as<__m128i>(upper)); }
INLINE Bytes chosen(Bytes upper, Bytes codes) {
    return _mm512_shuffle_epi8(upper, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
}
INLINE Bytes later(Bytes codes) { return _mm512_srli_epi16(codes, 4); }
INLINE vu first_half(Bytes lower, Bytes upper) { return (vu)_mm512_unpacklo_epi8(lower, upper); }
INLINE vu second_half(Bytes lower, Bytes upper) { return (vu)_mm512_unpackhi_epi8(lower, upper); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define SFLLM_COMPRESSES 1
typedef __m256i Bytes;
INLINE Bytes repeated(const uint8_t *upper) { return _mm256_broadcastsi128_si256(load_as<__m128i>(upper)); }
INLINE Bytes chosen(Bytes upper, Bytes codes) {
    return _mm256_shuffle_epi8(upper, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
}
INLINE Bytes later(Bytes codes) { return _mm256_srli_epi16(codes, 4); }
INLINE vu first_half(Bytes lower, Bytes upper) { return (vu)_mm256_unpacklo_epi8(lower, upper); }
INLINE vu second_half(Bytes lower, Bytes upper) { return (vu)_mm256_unpackhi_epi8(lower, upper); }
#else
#define SFLLM_COMPRESSES 0
#endif

#if SFLLM_COMPRESSES
// Vectors of words that one vector of bytes in each of two halves of the rows becomes.
constexpr int VECTORS = ROWS / LANES;

// A panel's groups, read once, in order.
class Reader {
  public:
    // `next` is the panel that is likely to be read after this one.
    Reader(const void *panel, int64_t columns, const void *next)
        : head(*(const Head *)panel), columns(columns), groups((const uint8_t *)panel + head.bytes),
          next((const uint8_t *)next), upper(repeated(head.upper)), listed(head.list()), end(listed + head.listed) {}

    int pairs(int64_t group) const { return (int)std::min<int64_t>(PAIRS, columns / 2 - group * PAIRS); }

    // Calls `take(pair, words)` for each pair of columns of the next group, with the words of all rows as vectors.
    template <class Take> INLINE void group(int64_t g, Take take) {
        if (__builtin_expect(has_listed(g), 0)) {
            alignas(64) uint32_t words[PAIRS * ROWS];
            unpack(g, words);
            for (int p = 0; p < pairs(g); p++) {
                vu columns[VECTORS];
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) columns[v] = load_as<vu>(words + p * ROWS + v * LANES);
                take(p, columns);
            }
        } else {
            plain_group(g, take);
        }
    }

    // The words of the next group, `[pairs][ROWS]`.
    INLINE void unpack(int64_t g, uint32_t *words) {
        plain_group(g, [words](int pair, const vu *columns) {
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) memcpy(words + pair * ROWS + v * LANES, columns + v, sizeof *columns);
        });
        for (; has_listed(g); listed++)
            ((uint8_t *)words)[2 * ((*listed >> 8) - g * GROUP * ROWS) + 1] = (uint8_t)*listed;
    }

  private:
    const Head &head;
    const int64_t columns;
    const uint8_t *const groups, *const next;
    const Bytes upper;
    const uint32_t *listed, *const end;

    INLINE bool has_listed(int64_t g) const {
        return listed < end && (int64_t)(*listed >> 8) < (g + 1) * GROUP * ROWS;
    }

    // Without those that are listed.
    template <class Take> INLINE void plain_group(int64_t g, Take take) const {
        const int64_t ahead = g + GROUPS_AHEAD, count = group_count(columns);
        const uint8_t *at = groups + g * GROUP_BYTES;
        const uint8_t *fetched = ahead < count ? groups + ahead * GROUP_BYTES : next + (ahead - count) * GROUP_BYTES;
        const int all = pairs(g);
        for (int p = 0; p < all; p += 2, at += TWO_BYTES, fetched += TWO_BYTES) {
            for (int i = 0; i < TWO_BYTES; i += LINE) __builtin_prefetch(fetched + i);
            const Codes codes(at + 2 * PAIR_BYTES);
            pair(at, codes.first(), p, take);
            if (p + 1 < all) pair(at + PAIR_BYTES, codes.second(), p + 1, take);
        }
    }

    struct Codes {
        static constexpr int COUNT = PAIR_BYTES / sizeof(Bytes);
        Bytes bytes[COUNT];

        INLINE explicit Codes(const uint8_t *from) {
            for (int i = 0; i < COUNT; i++) bytes[i] = load_as<Bytes>(from + i * sizeof(Bytes));
        }
        INLINE Codes first() const { return *this; }
        INLINE Codes second() const {
            Codes shifted = *this;
            for (int i = 0; i < COUNT; i++) shifted.bytes[i] = later(bytes[i]);
            return shifted;
        }
    };

    template <class Take> INLINE void pair(const uint8_t *lower, const Codes &codes, int p, Take take) const {
        vu columns[VECTORS];
#pragma GCC unroll 2
        for (int i = 0; i < Codes::COUNT; i++) {
            const Bytes low = load_as<Bytes>(lower + i * sizeof(Bytes)), high = chosen(upper, codes.bytes[i]);
            columns[i] = first_half(low, high);
            columns[Codes::COUNT + i] = second_half(low, high);
        }
        take(p, columns);
    }
};
#endif

// One element of a panel's groups, and whatever is listed aside.
inline uint16_t plain_element(const uint8_t *panel, int row, int64_t column) {
    const Head &head = *(const Head *)panel;
    const int64_t pair = column / 2;
    const uint8_t *two = panel + head.bytes + pair / 2 * TWO_BYTES;
    const int at = place(row, (int)(column % 2)), code = two[2 * PAIR_BYTES + at] >> (pair % 2 * 4) & 15;
    return (uint16_t)(head.upper[code] << 8 | two[pair % 2 * PAIR_BYTES + at]);
}

// A row of a panel, `out[columns]`.
inline void unpack_row(const uint8_t *panel, int row, int64_t columns, uint16_t *out) {
    const Head &head = *(const Head *)panel;
    for (int64_t i = 0; i < columns; i++) out[i] = plain_element(panel, row, i);
    for (uint32_t i = 0; i < head.listed; i++) {
        const uint32_t entry = head.list()[i], element = entry >> 8;
        if ((int)(element / 2 % ROWS) != row) continue;
        uint16_t &listed = out[element / (2 * ROWS) * 2 + element % 2];
        listed = (uint16_t)((listed & 0xff) | (entry & 0xff) << 8);
    }
}

// The codes for a panel's elements.
class CodeBook {
  public:
    CodeBook(const uint16_t *elements, int64_t count) {
        int64_t seen[256] = {};
        for (int64_t i = 0; i < count; i++) seen[elements[i] >> 8]++;
        std::fill_n(code, 256, NONE);
        for (int c = 0; c < CODES; c++) {
            const int most = (int)(std::max_element(seen, seen + 256) - seen);
            upper[c] = (uint8_t)most;
            if (seen[most] > 0) code[most] = (uint8_t)c;
            seen[most] = 0;
        }
        for (const int64_t left : seen) listed += left;
    }

    static constexpr uint8_t NONE = CODES;
    uint8_t upper[CODES], code[256];
    int64_t listed = 0;
};

// Packs `words[columns / 2][ROWS]` into a panel of `bytes`, in which there must be room for its list.
inline void pack_panel(const uint32_t *words, int64_t columns, int64_t bytes, uint8_t *out) {
    const uint16_t *elements = (const uint16_t *)words;
    const CodeBook book(elements, columns * ROWS);
    memset(out, 0, bytes);
    Head &head = *(Head *)out;
    std::copy_n(book.upper, CODES, head.upper);
    head.bytes = (uint32_t)(bytes - group_count(columns) * GROUP_BYTES);
    head.listed = (uint32_t)book.listed;
    uint32_t *listed = head.list();
    uint8_t *two = out + head.bytes;
    for (int64_t p = 0; p < columns / 2; p++, elements += 2 * ROWS) {
        uint8_t *lower = two + p % 2 * PAIR_BYTES, *codes = two + 2 * PAIR_BYTES;
        for (int i = 0; i < 2 * ROWS; i++) {
            const int at = place(i / 2, i % 2), upper = elements[i] >> 8;
            uint8_t code = book.code[upper];
            if (code == CodeBook::NONE) {
                *listed++ = (uint32_t)((p * 2 * ROWS + i) << 8 | upper);
                code = 0;
            }
            lower[at] = (uint8_t)elements[i];
            codes[at] |= code << (p % 2 * 4);
        }
        if (p % 2) two += TWO_BYTES;
    }
}

}  // namespace compressed
