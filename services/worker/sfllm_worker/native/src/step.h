// What Python hands over: plain structures of numbers and addresses, mirrored in structures.py.

#pragma once

#include "linear.h"

// Element types of a model.
enum ElementType : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };

struct LayerSpec {
    Matrix qkv;     // each head's rows padded to whole panels
    Matrix output;
    Matrix gate_up; // the gates' rows padded to whole panels, then the others
    Matrix down;
    const float *input_norm;
    const float *qk_norm;              // [heads + kv_heads, head_dim] or null
    const float *post_attention_norm;  // or null
    const float *pre_feedforward_norm;
    const float *post_feedforward_norm;  // or null
    int64_t rotation;                    // which of the step's tables, -1 for none
    int64_t window;                      // how many of the newest tokens are seen, 0 for all
};

struct ModelSpec {
    int64_t element_type, hidden_size, intermediate_size, heads, kv_heads, head_dim, num_layers;
    int64_t activation;
    float norm_eps, attention_scale, attention_soft_cap;
    const float *final_norm;
    const LayerSpec *layers;
};

// A table of rotations: row p has the cosines and then the sines of position p.
struct RotationSpec {
    const float *table;
    int64_t channels;
};

struct KVSpec {
    void *storage;  // [layers, 2, blocks, kv_heads, block_size * head_dim], see blocks.h
    int64_t num_blocks, block_size;
};

struct StepSpec {
    int64_t num_tokens, num_sequences, table_width;
    const int64_t *positions, *slots;              // [num_tokens]
    const int64_t *context_lens, *last_rows;       // [num_sequences]
    const int64_t *block_tables;                   // [num_sequences, table_width]
    const RotationSpec *rotations;
    float *hidden;   // [num_tokens, hidden_size]: the embedded tokens, then working memory
    float *added;    // [num_tokens, hidden_size], working memory
    void *narrow;    // [num_tokens, hidden_size + max(intermediate_size, 2 * heads * head_dim)], working memory
    const int64_t *wanted;  // [num_wanted]: the tokens whose final hidden rows are asked for
    int64_t num_wanted;
    void *result;           // [num_wanted, hidden_size]: those rows, normed
    int64_t threads;
};

// Attention alone, for models whose other parts run elsewhere.
struct AttentionSpec {
    int64_t element_type, heads, kv_heads, head_dim, block_size, window;
    float scale, soft_cap;
    const void *queries;  // [num_tokens, heads, head_dim]
    void *keys, *values;  // one layer of the cache
    void *result;                         // like the queries
};
