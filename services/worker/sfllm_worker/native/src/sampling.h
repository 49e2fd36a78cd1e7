// From a row of logits to a token, as sampling/sampler.py has it: greedy, or temperature, min-p, top-k and
// top-p and one keyed uniform number against the running sum. Sums are float64, so that their order is
// immaterial; the results equal those of the plain implementation except for draws that fall within
// rounding of a token's edge.

#pragma once

#include <algorithm>
#include <functional>

#include "simd.h"

struct SampleSpec {
    double top_p;
    float temperature, min_p;  // temperature 0 is greedy
    int64_t top_k;             // 0 is all
    uint64_t seed, position, choice;
    const uint64_t *allowed;  // bit t: token t may come; null allows all
};

// Philox4x32-10 (Salmon et al., SC 2011), the first word for counter (position, choice, purpose 0, 0).
inline float uniform_number(const SampleSpec &spec) {
    uint32_t c0 = (uint32_t)spec.position, c1 = (uint32_t)spec.choice, c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)spec.seed, k1 = (uint32_t)(spec.seed >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
    }
    return (float)(c0 >> 8) * 0x1p-24f;
}

// The first largest logit's index, and whether the row is sound: no NaN, and something finite to choose.
inline bool best_token(const float *logits, int64_t size, int64_t &token) {
    constexpr int64_t BLOCK = 64 * LANES;
    float top = -INFINITY;
    vi odd = {};
    bool has_nan = false;
    int64_t best_block = 0;
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t end = std::min(size, start + BLOCK);
        vf best = splat(-INFINITY);
        int64_t i = start;
        for (; i + LANES <= end; i += LANES) {
            const vf x = load(logits + i);
            odd |= x != x;
            best = maximum(best, x);
        }
        float block_top = largest(best);
        for (; i < end; i++) {
            has_nan |= logits[i] != logits[i];
            block_top = std::max(block_top, logits[i]);
        }
        if (block_top > top) {
            top = block_top;
            best_block = start;
        }
    }
    for (int lane = 0; lane < LANES; lane++) has_nan |= odd[lane] != 0;
    // Only the block that had it first is searched.
    token = std::find(logits + best_block, logits + size, top) - logits;
    return !has_nan && std::isfinite(top);
}

class RandomToken {
  public:
    static size_t scratch_floats(int64_t size) { return size + 2 * (size / BLOCK + 1); }

    // `logits` is overwritten with the weights.
    RandomToken(float *logits, int64_t size, float best, const SampleSpec &spec, float *scratch)
        : weights(logits), size(size), spec(spec), ends((double *)scratch), kept(scratch + 2 * (size / BLOCK + 1)) {
        const float top = best / spec.temperature;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES)
            store(weights + i, exponential(load(weights + i) / spec.temperature - top));
        if (i < size) {
            const int rest = (int)(size - i);
            store_some(weights + i, exponential(load_some(weights + i, rest) / spec.temperature - top), rest);
        }
    }

    int64_t draw() {
        const float threshold = spec.top_k > 0 || spec.top_p < 1 || spec.min_p > 0 ? find_threshold() : 0.0f;
        double total = 0, *end = ends;
        for (int64_t start = 0; start < size; start += BLOCK) *end++ = total += mass(start, threshold);
        const double target = std::min((double)uniform_number(spec) * total, std::nextafter(total, 0.0));
        const int64_t block = std::upper_bound(ends, end, target) - ends;
        double running = block > 0 ? ends[block - 1] : 0;
        int64_t last = 0;
        for (int64_t i = block * BLOCK; i < std::min(size, (block + 1) * BLOCK); i++) {
            if (weights[i] < threshold || weights[i] == 0) continue;
            last = i;
            if ((running += weights[i]) > target) break;
        }
        return last;
    }

  private:
    static constexpr int64_t BLOCK = 256;
    float *const weights;  // relative to the largest, which is 1
    const int64_t size;
    const SampleSpec &spec;
    double *const ends;  // running sums at the ends of blocks
    float *const kept;   // the largest weights, in descending order
    int64_t num_kept = 0;

    double mass(int64_t start, float threshold) const {
        const int64_t end = std::min(size, start + BLOCK);
        vf sums = {};
        int64_t i = start;
        for (; i + LANES <= end; i += LANES) {
            const vf x = load(weights + i);
            sums += choose(x >= splat(threshold), x, vf{});
        }
        double total = 0;
        for (int lane = 0; lane < LANES; lane++) total += sums[lane];
        for (; i < end; i++) total += weights[i] >= threshold ? weights[i] : 0;
        return total;
    }

    void keep_from(float cutoff) {
        num_kept = 0;
        for (int64_t i = 0; i < size; i += LANES) {
            const int count = (int)std::min<int64_t>(LANES, size - i);
            if (count == LANES && largest(load(weights + i)) < cutoff) continue;
            for (int lane = 0; lane < count; lane++)
                if (weights[i + lane] >= cutoff) kept[num_kept++] = weights[i + lane];
        }
        std::sort(kept, kept + num_kept, std::greater<float>());
    }

    // The smallest weight that min-p, top-k and top-p together keep. Only the largest weights are looked at,
    // more of them as long as they do not decide.
    float find_threshold() {
        const bool everything_passes = spec.min_p == 0 && (spec.top_k == 0 || spec.top_k >= size);
        const int64_t most = spec.top_k > 0 ? std::min(spec.top_k, size) : size;
        double whole = 0;
        if (everything_passes)
            for (int64_t start = 0; start < size; start += BLOCK) whole += mass(start, 0);
        for (const float limit : {0x1p-8f, 0x1p-14f, 0x1p-20f, 0.0f}) {
            const float cutoff = std::max(limit, spec.min_p);
            keep_from(cutoff);
            const bool complete = cutoff == spec.min_p || limit == 0 || num_kept >= most;
            if (!complete && !everything_passes) continue;
            num_kept = std::min(num_kept, most);
            double sum = 0;
            if (!everything_passes)
                for (int64_t i = 0; i < num_kept; i++) sum += kept[i];
            const double wanted = spec.top_p * (everything_passes ? whole : sum);
            if (spec.top_p < 1) {
                double running = 0;
                for (int64_t i = 0; i < num_kept; i++)
                    if ((running += kept[i]) >= wanted) return kept[i];
            }
            if (complete) return kept[num_kept - 1];
        }
        return 0;
    }
};

// Tokens whose bit is 0 get minus infinity, whatever their logit was.
inline void forbid(float *logits, int64_t size, const uint64_t *allowed) {
    static_assert(64 % LANES == 0);
    const vi lane_bits = 1 << lane_numbers();
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const vi bits = splat_int((int32_t)(allowed[i / 64] >> (i % 64))) & lane_bits;
        store(logits + i, choose(bits != 0, load(logits + i), splat(-INFINITY)));
    }
    for (; i < size; i++)
        if (!(allowed[i / 64] >> (i % 64) & 1)) logits[i] = -INFINITY;
}

// One row; the token, and whether the row was sound.
inline bool sample_row(float *logits, int64_t size, const SampleSpec &spec, float *scratch, int64_t &token) {
    if (spec.allowed) forbid(logits, size, spec.allowed);
    if (!best_token(logits, size, token)) return false;
    if (spec.temperature > 0) token = RandomToken(logits, size, logits[token], spec, scratch).draw();
    return true;
}
