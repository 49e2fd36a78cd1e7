// The functions that Python calls. Each returns 0, or 1 when memory ran out.

#include "decoder.h"
#include "embedding.h"
#include "led_step.h"
#include "sampling.h"

namespace {

template <class T> void decoder_step(const ModelSpec &model, const KVSpec &kv, const StepSpec &step) {
    if (is_led(step.num_tokens, step.threads)) return LedStep<T>::run(model, kv, step);
    DecoderStep<T> run(model, kv, step);
#pragma omp parallel num_threads((int)step.threads)
    run.run();
}

template <class T> void linear(const Matrix &matrix, const T *x, int64_t tokens, int64_t outputs, float *y, int64_t threads) {
    if (is_led(tokens, threads)) return led_product(matrix, x, tokens, outputs, y, threads);
    Team team(threads);
#pragma omp parallel num_threads((int)threads)
    {
        team.begin();
        product(team, x, matrix.columns, tokens, matrix, outputs, y, outputs, Into::REPLACE);
    }
}

template <class T>
void embed(const Matrix &weight, const int64_t *tokens, int64_t count, float scale, float *out, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t i = 0; i < count; i++) embed_token<T>(weight, tokens[i], scale, out + i * weight.columns);
}

Shape shape_of(const AttentionSpec &spec) {
    return {(int)spec.heads, (int)spec.kv_heads, (int)spec.head_dim, (int)spec.block_size};
}

template <class T> void attend(const AttentionSpec &spec, const StepSpec &step) {
    const Shape shape = shape_of(spec);
    const Attention<T> attention{shape,      (const T *)spec.keys, (const T *)spec.values,
                                 spec.scale, spec.soft_cap,        spec.window};
    const auto tasks = attention_tasks(step, shape, spec.window);
    std::vector<float> partials(partial_floats(tasks, shape));
    const Scratch scratch(step.threads, attention_scratch_floats<T>(shape));
    Team team(step.threads);
#pragma omp parallel num_threads((int)step.threads)
    {
        team.begin();
        run_attention(team, attention, tasks, partials.empty() ? nullptr : partials.data(), (const T *)spec.queries,
                      (T *)spec.result, scratch.mine());
    }
}

template <class T> void store_kv(const AttentionSpec &spec, const StepSpec &step, const T *keys, const T *values) {
    const Shape shape = shape_of(spec);
    for (int64_t t = 0; t < step.num_tokens; t++)
        for (int head = 0; head < shape.kv_heads; head++, keys += shape.head_dim, values += shape.head_dim) {
            const size_t at = block_offset<T>(shape, step.slots[t] / shape.block_size, head);
            const int slot = (int)(step.slots[t] % shape.block_size);
            put_key(shape, (T *)spec.keys + at, slot, keys);
            put_value(shape, (T *)spec.values + at, slot, values);
        }
}

template <class Call> int guarded(Call call) {
    try {
        call();
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

}  // namespace

extern "C" {

// The sizes of the structures in the order of structures.py, so that a mismatch is found at load.
int64_t sfllm_structure_size(int64_t index) {
    const int64_t sizes[] = {sizeof(Matrix), sizeof(LayerSpec), sizeof(ModelSpec),    sizeof(RotationSpec),
                             sizeof(KVSpec), sizeof(StepSpec),  sizeof(AttentionSpec),
                             sizeof(SampleSpec)};
    return index < (int64_t)(sizeof sizes / sizeof *sizes) ? sizes[index] : -1;
}

// Whether products of this element type go through matrix tiles.
int sfllm_uses_tiles(int64_t element_type) {
#if SFLLM_AMX
    return element_type == BFLOAT16 && amx::permitted();
#else
    return (void)element_type, 0;
#endif
}

// Before weights or a cache go that steps have used.
void sfllm_wait_for_helpers() { Helpers::all().wait(); }

int sfllm_decoder_step(const ModelSpec *model, const KVSpec *kv, const StepSpec *step) {
    return guarded([&] {
        if (model->element_type == BFLOAT16)
            decoder_step<bf16>(*model, *kv, *step);
        else
            decoder_step<float>(*model, *kv, *step);
    });
}

// `y[tokens][outputs] = x[tokens][columns]` times the first `outputs` rows of `matrix`, in float32.
int sfllm_linear(int64_t element_type, const Matrix *matrix, const void *x, int64_t tokens, int64_t outputs, float *y,
                 int64_t threads) {
    return guarded([&] {
        if (element_type == BFLOAT16)
            linear(*matrix, (const bf16 *)x, tokens, outputs, y, threads);
        else
            linear(*matrix, (const float *)x, tokens, outputs, y, threads);
    });
}

// Bytes of a panel of a dense weight of bfloat16 when it is compressed, or 0 where that does not pay.
int64_t sfllm_compressed_panel_bytes(const Matrix *dense, int64_t threads) { return compressed_panel_bytes(*dense, threads); }

// Writes the panels of a dense weight compressed, each in `panel_bytes`.
void sfllm_compress(const Matrix *dense, int64_t panel_bytes, void *out, int64_t threads) {
    compress(*dense, panel_bytes, (uint8_t *)out, threads);
}

// The words of a weight's panels, as a dense weight's lie.
void sfllm_unpack(int64_t element_type, const Matrix *matrix, void *out, int64_t threads) {
    if (element_type == BFLOAT16)
        unpack_matrix<bf16>(*matrix, (uint32_t *)out, threads);
    else
        unpack_matrix<float>(*matrix, (uint32_t *)out, threads);
}

// `y[count][columns]`: rows of an embedding times `scale`, in float32. Returns 1 where a token is not below
// `vocab_size`.
int sfllm_embed(int64_t element_type, const Matrix *weight, int64_t vocab_size, const int64_t *tokens, int64_t count,
                float scale, float *y, int64_t threads) {
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= vocab_size) return 1;
    // Few rows are not worth waking a thread.
    if (count < 64) threads = 1;
    if (element_type == BFLOAT16)
        embed<bf16>(*weight, tokens, count, scale, y, threads);
    else
        embed<float>(*weight, tokens, count, scale, y, threads);
    return 0;
}

int sfllm_attend(const AttentionSpec *spec, const StepSpec *step) {
    return guarded([&] {
        if (spec->element_type == BFLOAT16)
            attend<bf16>(*spec, *step);
        else
            attend<float>(*spec, *step);
    });
}

// Puts rows `[num_tokens, kv_heads, head_dim]` of keys and values into the slots of a step.
void sfllm_store_kv(const AttentionSpec *spec, const StepSpec *step, const void *keys, const void *values) {
    if (spec->element_type == BFLOAT16)
        store_kv(*spec, *step, (const bf16 *)keys, (const bf16 *)values);
    else
        store_kv(*spec, *step, (const float *)keys, (const float *)values);
}

// A token for each row of logits, which are overwritten. Without `specs` all rows are greedy. `sound` says
// whether a row had one to give.
int sfllm_sample(float *logits, int64_t rows, int64_t size, const SampleSpec *specs, int64_t *tokens,
                 uint8_t *sound, int64_t threads) {
    return guarded([&] {
        // Others are woken and waited for, which takes far longer where their core is needed elsewhere.
        if (rows * size < (specs ? 1 << 18 : 1 << 21)) threads = 1;
        const Scratch scratch(threads, specs ? RandomToken::scratch_floats(size) : 0);
        const SampleSpec greedy{};
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
        for (int64_t i = 0; i < rows; i++)
            sound[i] = sample_row(logits + i * size, size, specs ? specs[i] : greedy, scratch.mine(), tokens[i]);
    });
}

// Rows one by one, as the step does it inside; `y[tokens][size]`.
void sfllm_norm(const float *x, const float *weight, float eps, int64_t tokens, int64_t size, float *y) {
    for (int64_t t = 0; t < tokens; t++) norm_row(x + t * size, weight, eps, (int)size, y + t * size);
}

// `x[tokens][2 * size]`: gates, then what they are multiplied by.
void sfllm_gated(const float *x, int64_t activation, int64_t tokens, int64_t size, float *y) {
    for (int64_t t = 0; t < tokens; t++)
        gated_row(x + 2 * t * size, x + (2 * t + 1) * size, (int)size, (Activation)activation, y + t * size);
}
}
