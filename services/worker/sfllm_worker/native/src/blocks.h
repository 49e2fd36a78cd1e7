// How keys and values lie in a block of the paged cache: as attention multiplies them, so that it packs nothing.
//
// A block holds, for each key head, `block_size * head_dim` elements. Keys are `words[head_dim / PER_WORD]
// [block_size]`: a vector has one word of neighbouring tokens. Values are `words[block_size / PER_WORD]
// [head_dim]`: a word has one channel of as many neighbouring tokens as it holds.

#pragma once

#include <algorithm>

#include "dot.h"

struct Shape {
    int heads, kv_heads, head_dim, block_size;

    int group() const { return heads / kv_heads; }
    int padded_dim() const { return (head_dim + LANES - 1) / LANES * LANES; }
    size_t head_block() const { return (size_t)block_size * head_dim; }
};

// One head's part of a block.
template <class T> size_t block_offset(const Shape &s, int64_t block, int kv_head) {
    return (block * s.kv_heads + kv_head) * s.head_block();
}

template <class T> void put_key(const Shape &s, T *block, int slot, const T *key) {
    uint32_t *words = (uint32_t *)block + slot;
    for (int w = 0; w < s.head_dim / PER_WORD<T>; w++) memcpy(words + (size_t)w * s.block_size, key + w * PER_WORD<T>, sizeof *words);
}

template <class T> void put_value(const Shape &s, T *block, int slot, const T *value) {
    T *to = block + (size_t)(slot / PER_WORD<T>) * s.head_dim * PER_WORD<T> + slot % PER_WORD<T>;
    for (int i = 0; i < s.head_dim; i++) to[i * PER_WORD<T>] = value[i];
}
