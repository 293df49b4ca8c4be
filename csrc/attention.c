/* SPDX-License-Identifier: MIT */
/* Rotary positions, the KV pages, and softmax(q k) v over them. */
#include <assert.h>
#include <math.h>

#include "kernels.h"
#include "pool.h"

/* -- rotary table ----------------------------------------------------------------------------------------- */

/* sin and cos by our own polynomials: a system's libm may differ from another's in the last bit. The angle is reduced
 * to |r| <= pi/4 with pi/2 in two parts, the first of 33 bits, so that n * HALF_PI_HI is exact up to n = 2^20;
 * Taylor's series to r^15 is then good to the last bit of a double. */
static void sincos_double(double angle, double *sine, double *cosine) {
    const double round = 0x1.8p52, half_pi_hi = 0x1.921fb544p+0, half_pi_lo = 0x1.0b4611a626331p-34;
    double n = (angle * 0.63661977236758134308 + round) - round;
    double r = (angle - n * half_pi_hi) - n * half_pi_lo, z = r * r, s = 0.0, c = 0.0;
    for (int k = 15; k >= 3; k -= 2) s = (s + 1.0) * -z / (double)(k * (k - 1));
    for (int k = 16; k >= 2; k -= 2) c = (c + 1.0) * -z / (double)(k * (k - 1));
    s = (s + 1.0) * r;
    c = c + 1.0;
    int quadrant = (int)((int64_t)n & 3);
    *sine = quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c;
    *cosine = quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s;
}

void phi3c_rope_table(float *cosines, float *sines, const double *frequency, int64_t first, int64_t n,
                      int64_t n_frequencies, float scale) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n_frequencies; j++) {
            double s, c;
            sincos_double((double)(first + i) * frequency[j], &s, &c);
            *sines++ = (float)(s * (double)scale);
            *cosines++ = (float)(c * (double)scale);
        }
}

/* -- pages ------------------------------------------------------------------------------------------------ */

/* Keys f16 [head_dim][64] of a layer's kv head in the page that holds `position`; the values follow. */
static f16 *keys_at(const phi3c_attention *a, int sequence, int position, int head) {
    int32_t page = a->page_tables[sequence * a->table_stride + position / PHI3C_TILE];
    size_t half = (size_t)a->head_dim * PHI3C_TILE;
    return (f16 *)a->pages[page] + 2 * half * (size_t)(a->layer * a->head_count_kv + head);
}

/* -- rotate and append ------------------------------------------------------------------------------------ */

typedef struct {
    const phi3c_attention *a;
    float *qkv;
    const phi3c_span *spans;
    const float *cosines, *sines;
    int64_t stride; /* floats in a row of qkv */
    float *out;
    int64_t out_stride;
    int tokens; /* of a query tile */
} attention_job;

/* NeoX pairs: element j turns with element j + rope_dims / 2; elements beyond rope_dims stay as they are. */
static void rotate(float *x, const float *c, const float *s, int rope_dims) {
    int half = rope_dims / 2;
    for (int j = 0; j < half; j++) {
        float a = x[j], b = x[j + half];
        x[j] = a * c[j] - b * s[j];
        x[j + half] = b * c[j] + a * s[j];
    }
}

/* Items are (span, kv head): one head's page of keys stays in L1 while a run of positions is written to it. */
static void rope_append(void *arg, int64_t first, int64_t last) {
    const attention_job *job = arg;
    const phi3c_attention *a = job->a;
    int hd = a->head_dim, group = a->head_count / a->head_count_kv, half_dims = a->rope_dims / 2;
    float q_scale = 1.0f / sqrtf((float)hd);
    f16 key[PHI3C_MAX_HEAD_DIM];
    for (int64_t item = first; item < last; item++) {
        const phi3c_span *span = &job->spans[item / a->head_count_kv];
        int head = (int)(item % a->head_count_kv);
        for (int i = 0; i < span->n; i++) {
            int position = span->position + i, slot = position % PHI3C_TILE;
            float *row = job->qkv + (span->row + i) * job->stride, *q = row + head * group * hd;
            float *k = row + (a->head_count + head) * hd, *v = k + a->head_count_kv * hd;
            const float *c = job->cosines + (size_t)position * half_dims,
                        *s = job->sines + (size_t)position * half_dims;
            for (int h = 0; h < group; h++) {
                rotate(q + h * hd, c, s, a->rope_dims);
                for (int d = 0; d < hd; d++) q[h * hd + d] *= q_scale;
            }
            rotate(k, c, s, a->rope_dims);
            f16 *keys = keys_at(a, span->sequence, position, head);
            phi3c_kernel.to_f16(key, k, hd);
            for (int d = 0; d < hd; d++) keys[d * PHI3C_TILE + slot] = key[d];
            phi3c_kernel.to_f16(keys + hd * PHI3C_TILE + slot * hd, v, hd);
        }
    }
}

void phi3c_rope_append(const phi3c_attention *a, float *qkv, const phi3c_span *spans, int n_spans, const float *cosines,
                       const float *sines, phi3c_pool *pool) {
    assert(a->head_dim <= PHI3C_MAX_HEAD_DIM && a->head_dim % 16 == 0);
    attention_job job = {.a = a, .qkv = qkv, .spans = spans, .cosines = cosines, .sines = sines};
    job.stride = (int64_t)(a->head_count + 2 * a->head_count_kv) * a->head_dim;
    phi3c_pool_run(pool, rope_append, &job, (int64_t)n_spans * a->head_count_kv, n_spans == 1 && spans->n > 1 ? 1 : 8);
}

/* -- attend ----------------------------------------------------------------------------------------------- */

enum { QUERIES = 16 }; /* of a tile: heads of a group times tokens */

static int64_t token_tiles(const attention_job *job, const phi3c_span *span) {
    return (span->n + job->tokens - 1) / job->tokens;
}

/* `heads` query heads from `head` on (of one kv head), for tokens [from, to) of a span. */
static void attend_queries(const attention_job *job, const phi3c_span *span, int head, int heads, int from, int to) {
    const phi3c_attention *a = job->a;
    int hd = a->head_dim, n = (to - from) * heads, kv_head = head / (a->head_count / a->head_count_kv);
    float q[QUERIES * PHI3C_MAX_HEAD_DIM], o[QUERIES * PHI3C_MAX_HEAD_DIM], max[QUERIES], sum[QUERIES];
    for (int i = 0; i < n; i++) {
        const float *row = job->qkv + (span->row + from + i / heads) * job->stride;
        memcpy(q + i * hd, row + (head + i % heads) * hd, (size_t)hd * 4);
        max[i] = -INFINITY;
        sum[i] = 0.0f;
    }
    memset(o, 0, (size_t)n * (size_t)hd * 4);

    int oldest = span->position + from, newest = span->position + to - 1; /* positions of the tile's queries */
    int start = a->window && oldest >= a->window ? oldest - a->window + 1 : 0;
    for (int page = start / PHI3C_TILE; page <= newest / PHI3C_TILE; page++) {
        const f16 *keys = keys_at(a, span->sequence, page * PHI3C_TILE, kv_head);
        int first[QUERIES], last[QUERIES], begin = n, end = 0; /* queries that see any key of this page: a run */
        for (int i = 0; i < n; i++) {
            int position = oldest + i / heads, low = a->window ? position - a->window + 1 : 0;
            first[i] = low > page * PHI3C_TILE ? low - page * PHI3C_TILE : 0;
            last[i] = position + 1 - page * PHI3C_TILE < PHI3C_TILE ? position + 1 - page * PHI3C_TILE : PHI3C_TILE;
            if (first[i] < last[i]) {
                if (i < begin) begin = i;
                end = i + 1;
            }
        }
        phi3c_kernel.attend_tile(max + begin, sum + begin, o + begin * hd, q + begin * hd, keys, keys + hd * PHI3C_TILE,
                                 first + begin, last + begin, end - begin, hd);
    }
    for (int i = 0; i < n; i++) {
        float *out = job->out + (span->row + from + i / heads) * job->out_stride + (head + i % heads) * hd;
        for (int d = 0; d < hd; d++) out[d] = o[i * hd + d] / sum[i];
    }
}

/* Items are (span, kv head, part of its group, tile of tokens), tokens fastest. */
static void attend(void *arg, int64_t first, int64_t last) {
    const attention_job *job = arg;
    const phi3c_attention *a = job->a;
    int group = a->head_count / a->head_count_kv, parts = (group + QUERIES - 1) / QUERIES;
    const phi3c_span *span = job->spans;
    int64_t base = 0; /* first item of the span */
    for (int64_t item = first; item < last; item++) {
        while (item - base >= token_tiles(job, span) * a->head_count_kv * parts)
            base += token_tiles(job, span++) * a->head_count_kv * parts;
        int64_t tiles = token_tiles(job, span), part = (item - base) / tiles;
        int from = (int)((item - base) % tiles) * job->tokens, to = from + job->tokens;
        int head = (int)(part / parts) * group + (int)(part % parts) * QUERIES;
        int heads = group - (int)(part % parts) * QUERIES;
        attend_queries(job, span, head, heads < QUERIES ? heads : QUERIES, from, to < span->n ? to : span->n);
    }
}

void phi3c_attend(phi3c_activation out, const phi3c_attention *a, const float *qkv, const phi3c_span *spans,
                  int n_spans, phi3c_pool *pool) {
    int group = a->head_count / a->head_count_kv, parts = (group + QUERIES - 1) / QUERIES;
    attention_job job = {.a = a, .qkv = (float *)qkv, .spans = spans, .out = out.f32, .out_stride = out.columns};
    job.stride = (int64_t)(a->head_count + 2 * a->head_count_kv) * a->head_dim;
    job.tokens = group < QUERIES ? QUERIES / group : 1;
    int64_t n_items = 0, n_rows = 0;
    for (int i = 0; i < n_spans; i++) {
        n_items += token_tiles(&job, &spans[i]) * a->head_count_kv * parts;
        n_rows += spans[i].n;
    }
    phi3c_pool_run(pool, attend, &job, n_items, 1);
    phi3c_quantize(out, n_rows, pool);
}
