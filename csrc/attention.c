/* SPDX-License-Identifier: MIT */
/* Rotary positions, the KV pages, and softmax(q k) v over them. */
#include <assert.h>
#include <math.h>

#include "atomic.h"
#include "expf.h"
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

size_t phi3c_kv_bytes(int kv_type, int head_dim) {
    size_t values = 2 * (size_t)head_dim * PHI3C_TILE;
    if (kv_type == PHI3C_F16) return values * sizeof(f16);
    return kv_type == PHI3C_Q8_0 && head_dim % 32 == 0 ? values + 2 * q8_0_scale_bytes(head_dim) : 0;
}

/* Keys and values of a layer's kv head in the page that holds `position`. */
static uint8_t *kv_at(const phi3c_attention *a, int sequence, int position, int head) {
    int32_t page = a->page_tables[sequence * a->table_stride + position / PHI3C_TILE];
    return a->pages[page] + phi3c_kv_bytes(a->kv_type, a->head_dim) * (size_t)(a->layer * a->head_count_kv + head);
}

/* The key and the value k, v of the position in `slot`: keys as [head_dim][64], values as [64][head_dim]. */
static void append_f16(uint8_t *kv, const float *k, const float *v, int slot, int head_dim) {
    f16 *keys = (f16 *)kv, *values = keys + head_dim * PHI3C_TILE, key[PHI3C_MAX_HEAD_DIM];
    phi3c_kernel.to_f16(key, k, head_dim);
    for (int d = 0; d < head_dim; d++) keys[d * PHI3C_TILE + slot] = key[d];
    phi3c_kernel.to_f16(values + slot * head_dim, v, head_dim);
}

/* x[i] = q[i] * d[i / 32]: per 32 values d is the half nearest to their largest magnitude / 127; q is kept within 127
 * where d is subnormal. An infinity or NaN makes d, and so all 32 values, NaN. */
static void quantize_q8_0(int8_t *q, f16 d[PHI3C_MAX_HEAD_DIM / 32], const float *x, int head_dim) {
    float step[PHI3C_MAX_HEAD_DIM / 32] = {0};
    for (int g = 0; g < head_dim / 32; g++) {
        int32_t bits[32], largest = 0; /* of |x|, ordered like |x|, with infinities and then NaNs on top */
        memcpy(bits, x + 32 * g, sizeof bits);
        for (int i = 0; i < 32; i++) {
            bits[i] &= 0x7fffffff;
            largest = bits[i] > largest ? bits[i] : largest;
        }
        memcpy(&step[g], &largest, 4);
        step[g] = largest < 0x7f800000 ? step[g] / 127.0f : NAN;
    }
    phi3c_kernel.to_f16(d, step, PHI3C_MAX_HEAD_DIM / 32);
    for (int g = 0; g < head_dim / 32; g++) {
        float size = f16_to_f32(d[g]), scale = size > 0.0f && size < INFINITY ? 1.0f / size : 0.0f;
        for (int i = 0; i < 32; i++) {
            float rounded = (x[32 * g + i] * scale + PHI3C_ROUND) - PHI3C_ROUND; /* to nearest, ties to even */
            rounded = rounded < 127.0f ? rounded : 127.0f;
            q[32 * g + i] = (int8_t)(rounded > -127.0f ? rounded : -127.0f);
        }
    }
}

/* The same in q8_0: scales [head_dim / 32][64] before the keys, [64][head_dim / 32] before the values. */
static void append_q8_0(uint8_t *kv, const float *k, const float *v, int slot, int head_dim) {
    uint8_t *values = kv + phi3c_kv_bytes(PHI3C_Q8_0, head_dim) / 2;
    size_t scale_bytes = q8_0_scale_bytes(head_dim);
    int8_t q[PHI3C_MAX_HEAD_DIM];
    f16 d[PHI3C_MAX_HEAD_DIM / 32];
    int n = head_dim / 32;
    quantize_q8_0(q, d, k, head_dim);
    for (int g = 0; g < n; g++) ((f16 *)kv)[g * PHI3C_TILE + slot] = d[g];
    for (int i = 0; i < head_dim; i++) kv[scale_bytes + (size_t)(i * PHI3C_TILE + slot)] = (uint8_t)q[i];
    quantize_q8_0(q, d, v, head_dim);
    memcpy((f16 *)values + slot * n, d, (size_t)n * sizeof(f16));
    memcpy(values + scale_bytes + slot * head_dim, q, (size_t)head_dim);
}

/* -- rotate and append ------------------------------------------------------------------------------------ */

/* What a cut of a query's pages leaves to the next, besides o. `done`, of the tile's first query: how many are. */
typedef struct {
    atomic_word done;
    float max, sum;
} handover;

typedef struct {
    const phi3c_attention *a;
    float *qkv;
    const phi3c_span *spans;
    const phi3c_rope *ropes;
    int64_t stride; /* floats in a row of qkv */
    float *out;
    int64_t out_stride;
    int tokens, heads; /* of a query tile, at most */
    int64_t n_tiles;
    int cuts;            /* items that share the pages of a tile, one after the other */
    handover *handovers; /* of (row, query head), where there are cuts */
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

/* x = H x for each 32 values, H Sylvester's matrix of +-1, so H H = 32: sums and differences of neighbours, five times.
 * A dimension that outgrows the others spreads over all 32, so that a key in q8_0 rounds every one of them finely;
 * with q so turned as well, (H q) (H k) / 32 = q k. */
static void hadamard(float *x, int head_dim) {
    for (const float *end = x + head_dim; x < end; x += 32)
        for (int stage = 0; stage < 5; stage++) {
            float y[32];
            for (int i = 0; i < 16; i++) {
                y[i] = x[2 * i] + x[2 * i + 1];
                y[i + 16] = x[2 * i] - x[2 * i + 1];
            }
            memcpy(x, y, sizeof y);
        }
}

static int pages_of(const phi3c_span *span) {
    return (span->position + span->n - 1) / PHI3C_TILE - span->position / PHI3C_TILE + 1;
}

/* Ask for `n` floats that are about to be read and written. */
static void fetch(const float *x, int n) {
    for (int i = 0; i < n; i += 16) prefetch(x + i);
}

/* Rows [from, to) of a span, for one kv head and its group of query heads. */
static void append_head(const attention_job *job, const phi3c_span *span, int head, int from, int to) {
    const phi3c_attention *a = job->a;
    const phi3c_rope *rope = &job->ropes[span->rope];
    int hd = a->head_dim, group = a->head_count / a->head_count_kv;
    int mixed = a->kv_type == PHI3C_Q8_0;
    float q_scale = 1.0f / sqrtf((float)hd) / (mixed ? 32.0f : 1.0f);
    for (int i = from; i < to; i++) {
        int position = span->position + i, slot = position % PHI3C_TILE;
        float *row = job->qkv + (span->row + i) * job->stride, *q = row + head * group * hd;
        float *k = row + (a->head_count + head) * hd, *v = k + a->head_count_kv * hd;
        size_t angle = (size_t)position * (size_t)(a->rope_dims / 2);
        const float *c = rope->cosines + angle, *s = rope->sines + angle;
        if (i + 1 < to) { /* rows lie far apart: the hardware fetches none ahead */
            fetch(q + job->stride, group * hd);
            fetch(k + job->stride, hd);
            fetch(v + job->stride, hd);
        }
        for (int h = 0; h < group; h++) {
            rotate(q + h * hd, c, s, a->rope_dims);
            for (int d = 0; d < hd; d++) q[h * hd + d] *= q_scale;
            if (mixed) hadamard(q + h * hd, hd);
        }
        rotate(k, c, s, a->rope_dims);
        if (mixed) hadamard(k, hd);
        uint8_t *kv = kv_at(a, span->sequence, position, head);
        (mixed ? append_q8_0 : append_f16)(kv, k, v, slot, hd);
    }
}

/* Items are (span, kv head, page), pages fastest: a head's keys stay in L1 while the page is written, and two threads
 * that first touch a huge page of memory, which both would zero, rarely touch the same one. */
static void rope_append(void *arg, int64_t first, int64_t last) {
    const attention_job *job = arg;
    const phi3c_span *span = job->spans;
    int64_t base = 0; /* first item of the span */
    for (int64_t item = first; item < last; item++) {
        while (item - base >= (int64_t)pages_of(span) * job->a->head_count_kv)
            base += (int64_t)pages_of(span++) * job->a->head_count_kv;
        int head = (int)((item - base) / pages_of(span)), page = (int)((item - base) % pages_of(span));
        int begin = (span->position / PHI3C_TILE + page) * PHI3C_TILE - span->position, end = begin + PHI3C_TILE;
        append_head(job, span, head, begin > 0 ? begin : 0, end < span->n ? end : span->n);
    }
}

void phi3c_rope_append(const phi3c_attention *a, float *qkv, const phi3c_span *spans, int n_spans,
                       const phi3c_rope *ropes, phi3c_pool *pool) {
    assert(a->head_dim <= PHI3C_MAX_HEAD_DIM && a->head_dim % 16 == 0);
    attention_job job = {.a = a, .qkv = qkv, .spans = spans, .ropes = ropes};
    job.stride = (int64_t)(a->head_count + 2 * a->head_count_kv) * a->head_dim;
    int64_t n_items = 0, n_rows = 0;
    for (int i = 0; i < n_spans; i++) {
        n_items += (int64_t)pages_of(&spans[i]) * a->head_count_kv;
        n_rows += spans[i].n;
    }
    phi3c_pool_run(pool, rope_append, &job, n_items, n_rows > n_spans ? 1 : 8);
}

/* -- attend ----------------------------------------------------------------------------------------------- */

/* A tile of queries is some heads of a group times some tokens: as many queries as kernels take, fewer where heads are
 * larger than 128, so that q and o take 24 KiB each. */
enum { TILE_FLOATS = PHI3C_QUERIES * 128 };

static int most_queries(int head_dim) { return head_dim > 128 ? TILE_FLOATS / head_dim : PHI3C_QUERIES; }

static int64_t token_tiles(const attention_job *job, const phi3c_span *span) {
    return (span->n + job->tokens - 1) / job->tokens;
}

static int first_page(const phi3c_attention *a, int position) {
    return a->window && position >= a->window ? (position - a->window + 1) / PHI3C_TILE : 0;
}

static handover *handover_of(const attention_job *job, int64_t row, int head) {
    return &job->handovers[row * job->a->head_count + head];
}

/* `heads` query heads from `head` on (of one kv head), for tokens [from, to) of a span: one cut of their pages, which
 * takes up the running state where the cut before left it. Until the last, o lies in the rows of `out`. */
static void attend_queries(const attention_job *job, const phi3c_span *span, int head, int heads, int from, int to,
                           int cut) {
    const phi3c_attention *a = job->a;
    int hd = a->head_dim, n = (to - from) * heads, kv_head = head / (a->head_count / a->head_count_kv);
    float q[TILE_FLOATS], o[TILE_FLOATS], max[PHI3C_QUERIES], sum[PHI3C_QUERIES];
    int position[PHI3C_QUERIES]; /* kept: a division a query and page took 0.01 of the time */
    if (cut > 0) phi3c_pool_wait(&handover_of(job, span->row + from, head)->done, cut);
    for (int i = 0; i < n; i++) {
        int64_t row = span->row + from + i / heads;
        int h = head + i % heads;
        position[i] = span->position + from + i / heads;
        memcpy(q + i * hd, job->qkv + row * job->stride + h * hd, (size_t)hd * 4);
        if (cut > 0) {
            memcpy(o + i * hd, job->out + row * job->out_stride + h * hd, (size_t)hd * 4);
            max[i] = handover_of(job, row, h)->max;
            sum[i] = handover_of(job, row, h)->sum;
        } else {
            memset(o + i * hd, 0, (size_t)hd * 4);
            max[i] = -INFINITY;
            sum[i] = 0.0f;
        }
    }

    int oldest = span->position + from, newest = span->position + to - 1; /* positions of the tile's queries */
    int start = first_page(a, oldest), n_pages = newest / PHI3C_TILE + 1 - start;
    int stop = start + n_pages * (cut + 1) / job->cuts;
    for (int page = start + n_pages * cut / job->cuts; page < stop; page++) {
        int first[PHI3C_QUERIES], last[PHI3C_QUERIES];
        int begin = n, end = 0; /* queries that see any key of this page: a run */
        for (int i = 0; i < n; i++) {
            int end_key = position[i] + 1 - page * PHI3C_TILE, first_key = a->window ? end_key - a->window : 0;
            first[i] = first_key > 0 ? first_key : 0;
            last[i] = end_key < PHI3C_TILE ? end_key : PHI3C_TILE;
            if (first[i] < last[i]) {
                if (i < begin) begin = i;
                end = i + 1;
            }
        }
        const uint8_t *kv = kv_at(a, span->sequence, page * PHI3C_TILE, kv_head), *next = kv;
        if (page + 1 < stop) next = kv_at(a, span->sequence, (page + 1) * PHI3C_TILE, kv_head);
        phi3c_kernel.attend_tile[a->kv_type](max + begin, sum + begin, o + begin * hd, q + begin * hd, kv, next,
                                             first + begin, last + begin, end - begin, hd);
    }

    int is_last = cut + 1 == job->cuts;
    for (int i = 0; i < n; i++) {
        int64_t row = span->row + from + i / heads;
        int h = head + i % heads;
        float *out = job->out + row * job->out_stride + h * hd;
        for (int d = 0; d < hd; d++) out[d] = is_last ? o[i * hd + d] / sum[i] : o[i * hd + d];
        if (is_last) continue;
        handover_of(job, row, h)->max = max[i];
        handover_of(job, row, h)->sum = sum[i];
    }
    if (!is_last) word_store(&handover_of(job, span->row + from, head)->done, cut + 1);
}

/* Items are (cut, span, kv head, part of its group, tile of tokens), tokens fastest: the first cuts of all tiles, then
 * the second, so that a cut is mostly done before a thread gets to the next. */
static void attend(void *arg, int64_t first, int64_t last) {
    const attention_job *job = arg;
    const phi3c_attention *a = job->a;
    int group = a->head_count / a->head_count_kv, most = job->heads, parts = (group + most - 1) / most;
    for (int64_t item = first; item < last; item++) {
        const phi3c_span *span = job->spans;
        int64_t tile = item % job->n_tiles; /* of the span */
        for (; tile >= token_tiles(job, span) * a->head_count_kv * parts; span++)
            tile -= token_tiles(job, span) * a->head_count_kv * parts;
        int64_t tiles = token_tiles(job, span), part = tile / tiles;
        int from = (int)(tile % tiles) * job->tokens, to = from + job->tokens;
        int head = (int)(part / parts) * group + (int)(part % parts) * most;
        int heads = group - (int)(part % parts) * most;
        attend_queries(job, span, head, heads < most ? heads : most, from, to < span->n ? to : span->n,
                       (int)(item / job->n_tiles));
    }
}

enum { MOST_CUTS = 8, MOST_HANDOVERS = 512 };

/* How many cuts of each tile make threads finish soonest: 10 tiles on 8 threads are two rounds, in 4 cuts 5 rounds of a
 * quarter. To hand over and to begin without a page fetched ahead takes 0.4 to 0.8 pages (docs/performance.md), here
 * counted as one. Tiles of fewer pages than n_pages count like the others. */
static int best_cuts(int64_t n_tiles, int n_pages, int n_threads) {
    if (n_tiles <= n_threads) return 1;
    int best = 1;
    double least = INFINITY;
    for (int cuts = 1; cuts <= MOST_CUTS; cuts++) {
        int64_t rounds = (n_tiles * cuts + n_threads - 1) / n_threads;
        double time = (double)rounds * ((double)n_pages / cuts + (cuts > 1 ? 1.0 : 0.0));
        if (time >= least) continue;
        least = time;
        best = cuts;
    }
    return best;
}

void phi3c_attend(phi3c_activation out, const phi3c_attention *a, const float *qkv, const phi3c_span *spans,
                  int n_spans, phi3c_pool *pool) {
    int group = a->head_count / a->head_count_kv, most = most_queries(a->head_dim);
    handover handovers[MOST_HANDOVERS];
    attention_job job = {.a = a, .qkv = (float *)qkv, .spans = spans, .out = out.f32, .out_stride = out.columns};
    job.stride = (int64_t)(a->head_count + 2 * a->head_count_kv) * a->head_dim;
    job.tokens = group < most ? most / group : 1;
    job.handovers = handovers;
    int64_t n_groups = 0, n_rows = 0; /* groups of heads, for each tile of tokens */
    int n_pages = 0;                  /* of a token, at most */
    for (int i = 0; i < n_spans; i++) {
        int newest = spans[i].position + spans[i].n - 1, pages = newest / PHI3C_TILE + 1 - first_page(a, newest);
        n_groups += token_tiles(&job, &spans[i]) * a->head_count_kv;
        n_rows += spans[i].n;
        n_pages = pages > n_pages ? pages : n_pages;
    }
    /* Every part of a group reads its keys: so many parts that each has a thread of its own, else one. */
    int parts = 1;
    while (parts < group && n_groups * (parts + 1) <= phi3c_pool_size(pool)) parts++;
    int heads = (group + parts - 1) / parts;
    job.heads = heads < most ? heads : most;
    job.n_tiles = n_groups * ((group + job.heads - 1) / job.heads);
    int64_t n_queries = n_rows * a->head_count;
    job.cuts = n_queries <= MOST_HANDOVERS ? best_cuts(job.n_tiles, n_pages, phi3c_pool_size(pool)) : 1;
    if (job.cuts > 1)
        for (int64_t i = 0; i < n_queries; i++) word_store(&handovers[i].done, 0);
    phi3c_pool_run(pool, attend, &job, job.n_tiles * job.cuts, 1);
    phi3c_quantize(out, n_rows, pool);
}
