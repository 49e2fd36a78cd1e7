// Decodes whose sequences begin with the same blocks, such as those after one system prompt: they read the keys
// that they share once for all of them (as Hydragen does: Juravsky et al., 2024), each its own ones afterwards.
//
// A row's sums do not depend on the rows beside it, and its tiles of keys come in the same order, so results are
// those of each sequence alone, to the last bit.

#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "step.h"

// A sequence that computes one token.
struct Decode {
    const int64_t *table;
    int64_t position, row;  // of the token, in its sequence and in the step
};

struct DecodeGroup {
    std::vector<Decode> members;
    int64_t shared = 0;  // keys, in whole tiles; none where there is one member
};

// For fewer keys gathering the queries costs more than it saves.
constexpr int64_t LEAST_SHARED = 2 * KEYS;

// How many whole tiles of keys two decodes share.
inline int64_t shared_keys(const Decode &a, const Decode &b, const Shape &shape) {
    const int64_t most = std::min(a.position, b.position) / shape.block_size;
    int64_t blocks = 0;
    while (blocks < most && a.table[blocks] == b.table[blocks]) blocks++;
    const int64_t keys = blocks * shape.block_size / KEYS * KEYS;
    // Partial results begin anew every SPLIT keys; a group goes on with its first or ends with a whole one.
    return keys > SPLIT ? keys / SPLIT * SPLIT : keys;
}

// Puts each decode into one group. None has more members than a tile has room for, and members are spread so
// that groups times key heads are at least `tasks` where there are as many decodes.
inline std::vector<DecodeGroup> decode_groups(const std::vector<Decode> &decodes, const Shape &shape, int64_t tasks) {
    std::vector<DecodeGroup> groups;
    std::vector<bool> taken(decodes.size());
    const int64_t pieces = std::max<int64_t>(1, (tasks + shape.kv_heads - 1) / shape.kv_heads);
    const int64_t fair = (decodes.size() + pieces - 1) / pieces;
    const size_t most = std::clamp<int64_t>(fair, 1, tokens_per_tile(shape));
    for (size_t i = 0; i < decodes.size(); i++) {
        if (taken[i]) continue;
        DecodeGroup group{{decodes[i]}};
        for (size_t j = i + 1; j < decodes.size() && group.members.size() < most; j++) {
            if (taken[j] || decodes[j].table[0] != decodes[i].table[0]) continue;
            const int64_t keys = shared_keys(decodes[i], decodes[j], shape);
            // Who shares much less than the others would have them read most keys alone.
            if (keys < LEAST_SHARED || 2 * keys < group.shared) continue;
            group.shared = group.shared ? std::min(group.shared, keys) : keys;
            group.members.push_back(decodes[j]);
            taken[j] = true;
        }
        groups.push_back(std::move(group));
    }
    return groups;
}
