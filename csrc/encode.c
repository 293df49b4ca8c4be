/* SPDX-License-Identifier: MIT */
/* Floats as rows of GGUF blocks: the scales and integers whose weights come nearest, type by type.
 *
 * A group of 16 or 32 weights lies on a line, w = scale q - min, with whole q from low to high; some types have no min.
 * fit() tries STEPS ways to spread the q over a group's range, solves each for least squares and keeps the best. K
 * types store scales and mins as multiples of a d and a dmin of the block: settle() chooses these multiples, and d and
 * dmin are then solved for again. The error is the plain sum of squares: nothing is known here of what will be
 * multiplied.
 *
 * Eight groups are treated side by side, a group in a SIMD lane, so that plain C is fast and all sums have one order.
 */
#include <float.h>
#include <math.h>

#include "atomic.h"
#include "kernels.h"
#include "pool.h"

enum { LANES = 8, GROUP = 32, ROUNDS = 3 };
/* The candidates of fit() take the range of a group as that of the codes plus t, t = -1, -1 + 1/8, ... 1.25: a little
 * wider, so that no weight lies beyond the codes, or narrower, so that the others lie closer to one. */
enum { STEPS = 19 };
#define FIRST_STEP -1.0f
#define STEP 0.125f

typedef float lanes[LANES];

/* What a type can store of a group. */
typedef struct {
    int columns, low, high;              /* weights, least and largest q */
    int has_min;                         /* and K types store it as a number from 0 up: w is at most 0 where q is */
    int scale_low, scale_high, min_high; /* of the multiples that K types store */
} grid;

// clang-format off
static const grid grids[PHI3C_N_TYPES] = {
    [PHI3C_Q4_0] = {32, -8, 7, 0, 0, 0, 0},
    [PHI3C_Q4_1] = {32, 0, 15, 1, 0, 0, 0},
    [PHI3C_Q5_0] = {32, -16, 15, 0, 0, 0, 0},
    [PHI3C_Q5_1] = {32, 0, 31, 1, 0, 0, 0},
    [PHI3C_Q2_K] = {16, 0, 3, 1, 0, 15, 15},
    [PHI3C_Q3_K] = {16, -4, 3, 0, -32, 31, 0},
    [PHI3C_Q4_K] = {32, 0, 15, 1, 0, 63, 63},
    [PHI3C_Q5_K] = {32, 0, 31, 1, 0, 63, 63},
    [PHI3C_Q6_K] = {16, -32, 31, 0, -128, 127, 0},
};
// clang-format on

/* Lines through 8 groups, x ~ scale q - min, and the mean q and x of each. */
typedef struct {
    lanes scale, min, mean_q, mean_x;
} lines;

/* v rounded to a whole number, ties to even, after it was limited to low .. high. */
static inline float nearest(float v, float low, float high) {
    v = v < low ? low : v;
    v = v > high ? high : v;
    return (v + 0x1.8p23f) - 0x1.8p23f;
}

/* 1 / v, and 0 where v is 0 or so little that it would overflow. */
static inline float inverse(float v) { return v > 0x1p-100f || v < -0x1p-100f ? 1.0f / v : 0.0f; }

static inline float half(float v) { return f16_to_f32(f32_to_f16(v)); }

/* 8 groups of n weights that lie one after another, side by side. */
static void spread(lanes *out, const float *x, int n) {
    for (int i = 0; i < n; i++)
        for (int l = 0; l < LANES; l++) out[i][l] = x[l * n + i];
}

/* Where candidates of fit() begin: y = x - base, and the range of y, from 0 or, without a min, to both sides of it. */
static void find_range(lanes *y, lanes base, lanes reach, const lanes *x, const grid *g) {
    int has_top = g->min_high > 0; /* min may not be negative */
    lanes least, most;
    for (int l = 0; l < LANES; l++) {
        least[l] = has_top || !g->has_min ? 0.0f : x[0][l];
        most[l] = least[l];
    }
    for (int i = 0; i < g->columns; i++)
        for (int l = 0; l < LANES; l++) {
            float v = x[i][l];
            least[l] = v < least[l] ? v : least[l];
            most[l] = v > most[l] ? v : most[l];
        }
    for (int l = 0; l < LANES; l++) {
        float far = -least[l] > most[l] ? least[l] : most[l];
        base[l] = g->has_min ? least[l] : 0.0f;
        reach[l] = g->has_min ? most[l] - least[l] : far;
    }
    for (int i = 0; i < g->columns; i++)
        for (int l = 0; l < LANES; l++) y[i][l] = x[i][l] - base[l];
}

/* The lines of least squared error that STEPS candidates find. */
static void fit(lines *best, const lanes *x, const grid *g) {
    int n = g->columns, has_min = g->has_min, has_top = g->min_high > 0;
    float low = (float)g->low, high = (float)g->high, bound = has_min ? high : low, count = (float)n;
    lanes y[GROUP], base, per_reach, sum = {0}, gain, rise = {0};
    find_range(y, base, per_reach, x, g);
    for (int i = 0; i < n; i++)
        for (int l = 0; l < LANES; l++) sum[l] += y[i][l];
    for (int l = 0; l < LANES; l++) {
        per_reach[l] = inverse(per_reach[l]);
        gain[l] = -1.0f;
    }
    for (int step = 0; step < STEPS; step++) {
        float t = FIRST_STEP + STEP * (float)step, range = bound < 0.0f ? bound - t : bound + t;
        lanes per, q1 = {0}, q2 = {0}, qy = {0};
        for (int l = 0; l < LANES; l++) per[l] = range * per_reach[l];
        for (int i = 0; i < n; i += 4) /* four at a time: sums go through memory */
            for (int l = 0; l < LANES; l++) {
                float y0 = y[i][l], y1 = y[i + 1][l], y2 = y[i + 2][l], y3 = y[i + 3][l];
                float a = nearest(y0 * per[l], low, high), b = nearest(y1 * per[l], low, high);
                float c = nearest(y2 * per[l], low, high), d = nearest(y3 * per[l], low, high);
                q1[l] += (a + b) + (c + d);
                q2[l] += (a * a + b * b) + (c * c + d * d);
                qy[l] += (a * y0 + b * y1) + (c * y2 + d * y3);
            }
        for (int l = 0; l < LANES; l++) { /* y ~ scale q + up */
            float det = count * q2[l] - q1[l] * q1[l];
            float up = (q2[l] * sum[l] - q1[l] * qy[l]) / (det > 0.0f ? det : 1.0f);
            up = has_min && det > 0.0f ? up : 0.0f;
            up = has_top && up > -base[l] ? -base[l] : up;
            float scale = (qy[l] - up * q1[l]) / (q2[l] > 0.0f ? q2[l] : 1.0f);
            float gained = scale * scale * q2[l] + up * (2.0f * sum[l] - count * up); /* off the sum of y^2 */
            int is_better = gained > gain[l];
            gain[l] = is_better ? gained : gain[l];
            best->scale[l] = is_better ? scale : best->scale[l];
            best->mean_q[l] = is_better ? q1[l] / count : best->mean_q[l];
            rise[l] = is_better ? up : rise[l];
        }
    }
    for (int l = 0; l < LANES; l++) {
        best->min[l] = -(base[l] + rise[l]);
        best->mean_x[l] = sum[l] / count + base[l];
    }
}

/* The codes of the groups on these lines, and their squared errors. */
static void place(lanes error, lanes *q, const lanes *x, const lanes scale, const lanes min, const grid *g) {
    float low = (float)g->low, high = (float)g->high;
    lanes per, sum = {0};
    for (int l = 0; l < LANES; l++) per[l] = inverse(scale[l]);
    for (int i = 0; i < g->columns; i += 2)
        for (int l = 0; l < LANES; l++) {
            float v = x[i][l] + min[l], w = x[i + 1][l] + min[l];
            float a = nearest(v * per[l], low, high), b = nearest(w * per[l], low, high);
            float off = v - scale[l] * a, off_too = w - scale[l] * b;
            q[i][l] = a;
            q[i + 1][l] = b;
            sum[l] += off * off + off_too * off_too;
        }
    memcpy(error, sum, sizeof sum);
}

/* -- K types ---------------------------------------------------------------------------------------------- */

/* A block of 256 in whole numbers: w = d sc[g] q - dmin m[g]. */
typedef struct {
    float d, dmin, error;
    float sc[16], m[16], q[256];
} block;

/* What a least-squares solution for d and dmin needs of a block, with a = sc q: x ~ d a - dmin m. */
typedef struct {
    float aa, am, mm, xa, xm;
} moments;

/* The multiples of d and dmin that suit 8 groups best, out of the two scales next to each line's and the min that
 * belongs to each. */
static void settle(block *b, moments *sums, int first, const lanes *x, const lines *fitted, const grid *g) {
    float per = inverse(b->d), per_min = inverse(b->dmin), count = (float)g->columns;
    lanes sc[2], m[2], error[2], q[2][GROUP];
    for (int way = 0; way < 2; way++) {
        lanes scale, min;
        for (int l = 0; l < LANES; l++) {
            float below = nearest(fitted->scale[l] * per - 0.5f, -1000.0f, 1000.0f);
            sc[way][l] = nearest(below + (float)way, (float)g->scale_low, (float)g->scale_high);
            scale[l] = b->d * sc[way][l];
            float level = (scale[l] * fitted->mean_q[l] - fitted->mean_x[l]) * per_min;
            m[way][l] = nearest(level, 0.0f, (float)g->min_high);
            min[l] = b->dmin * m[way][l];
        }
        place(error[way], q[way], x, scale, min, g);
    }
    for (int l = 0; l < LANES; l++) {
        int way = error[1][l] < error[0][l];
        float scale = sc[way][l], min = m[way][l], q1 = 0.0f, q2 = 0.0f, qx = 0.0f;
        float *codes = b->q + (first + l) * g->columns;
        for (int i = 0; i < g->columns; i++) {
            float code = q[way][i][l];
            codes[i] = code;
            q1 += code;
            q2 += code * code;
            qx += code * x[i][l];
        }
        b->sc[first + l] = scale;
        b->m[first + l] = min;
        b->error += error[way][l];
        sums->aa += scale * scale * q2;
        sums->am += scale * min * q1;
        sums->mm += min * min * count;
        sums->xa += scale * qx;
        sums->xm += min * fitted->mean_x[l] * count;
    }
}

/* The block whose weights come nearest to x; `best` comes as zeros. */
static void encode_super(block *best, const float *x, const grid *g) {
    int n_groups = 256 / g->columns;
    lanes columns[2][GROUP];
    lines fitted[2];
    float largest = 0.0f, largest_min = 0.0f;
    for (int first = 0; first < n_groups; first += LANES) {
        lanes *part = columns[first / LANES];
        lines *line = &fitted[first / LANES];
        spread(part, x + first * g->columns, g->columns);
        fit(line, part, g);
        for (int l = 0; l < LANES; l++) {
            float size = line->scale[l] < 0.0f ? -line->scale[l] : line->scale[l];
            if (size > (largest < 0.0f ? -largest : largest)) largest = line->scale[l];
            if (line->min[l] > largest_min) largest_min = line->min[l];
        }
    }
    block b = *best;
    b.d = largest / (float)(g->scale_low < 0 ? g->scale_low : g->scale_high);
    if (g->has_min) b.dmin = largest_min / (float)g->min_high;
    for (int round = 0; round < ROUNDS; round++) {
        moments s = {0};
        b.d = half(b.d);
        b.dmin = half(b.dmin);
        b.error = 0.0f;
        for (int first = 0; first < n_groups; first += LANES)
            settle(&b, &s, first, columns[first / LANES], &fitted[first / LANES], g);
        if (round > 0 && b.error >= best->error) break;
        *best = b;
        float det = s.aa * s.mm - s.am * s.am;
        if (det > 0.0f) {
            b.d = (s.xa * s.mm - s.xm * s.am) / det;
            b.dmin = (s.xa * s.am - s.xm * s.aa) / det;
            if (b.dmin < 0.0f) b.dmin = 0.0f;
        } else
            b.d = s.xa * inverse(s.aa);
    }
}

static void put_q2_K(block_q2_K *out, const block *b) {
    memset(out, 0, sizeof *out);
    for (int j = 0; j < 16; j++) out->scales[j] = (uint8_t)((int)b->sc[j] | (int)b->m[j] << 4);
    for (int i = 0; i < 256; i++) out->qs[i / 128 * 32 + i % 32] |= (uint8_t)((int)b->q[i] << (i % 128 / 32 * 2));
    out->d = f32_to_f16(b->d);
    out->dmin = f32_to_f16(b->dmin);
}

/* q3_K's 12 bytes of 16 six-bit scales: low nibbles in bytes 0-7, upper bits in bytes 8-11. */
static void scale_to_12(uint8_t b[12], const uint8_t v[16]) {
    memset(b, 0, 12);
    for (int s = 0; s < 16; s++) {
        b[s % 8] |= (uint8_t)((v[s] & 15) << (s < 8 ? 0 : 4));
        b[8 + s % 4] |= (uint8_t)((v[s] >> 4) << (2 * (s / 4)));
    }
}

/* q4_K's and q5_K's of 16 six-bit numbers: scales 0-7, then mins 0-7. */
static void scale_min_to_12(uint8_t b[12], const uint8_t v[16]) {
    for (int s = 0; s < 4; s++) {
        b[s] = (uint8_t)(v[s] | (v[4 + s] >> 4) << 6);
        b[s + 4] = (uint8_t)(v[8 + s] | (v[12 + s] >> 4) << 6);
        b[s + 8] = (uint8_t)((v[4 + s] & 15) | (v[12 + s] & 15) << 4);
    }
}

static void put_q3_K(block_q3_K *out, const block *b) {
    uint8_t scales[16];
    memset(out, 0, sizeof *out);
    for (int j = 0; j < 16; j++) scales[j] = (uint8_t)((int)b->sc[j] + 32);
    scale_to_12(out->scales, scales);
    for (int i = 0; i < 256; i++) {
        int q = (int)b->q[i] + 4;
        out->qs[i / 128 * 32 + i % 32] |= (uint8_t)((q & 3) << (i % 128 / 32 * 2));
        out->hmask[i % 32] |= (uint8_t)((q >> 2) << (i / 32));
    }
    out->d = f32_to_f16(b->d);
}

/* q4_K and, where qh is not NULL, q5_K */
static void put_q4_K(f16 *d, f16 *dmin, uint8_t *scales, uint8_t *qh, uint8_t *qs, const block *b) {
    uint8_t numbers[16];
    for (int j = 0; j < 8; j++) {
        numbers[j] = (uint8_t)b->sc[j];
        numbers[8 + j] = (uint8_t)b->m[j];
    }
    scale_min_to_12(scales, numbers);
    memset(qs, 0, 128);
    if (qh) memset(qh, 0, 32);
    for (int i = 0; i < 256; i++) {
        int q = (int)b->q[i], s = i / 32;
        qs[i / 64 * 32 + i % 32] |= (uint8_t)((q & 15) << (s % 2 * 4));
        if (qh) qh[i % 32] |= (uint8_t)((q >> 4) << s);
    }
    *d = f32_to_f16(b->d);
    *dmin = f32_to_f16(b->dmin);
}

static void put_q6_K(block_q6_K *out, const block *b) {
    memset(out, 0, sizeof *out);
    for (int j = 0; j < 16; j++) out->scales[j] = (int8_t)b->sc[j];
    for (int i = 0; i < 256; i++) {
        int q = (int)b->q[i] + 32, half_block = i / 128, j = i % 128 / 32, l = i % 32;
        out->ql[half_block * 64 + j % 2 * 32 + l] |= (uint8_t)((q & 15) << (j / 2 * 4));
        out->qh[half_block * 32 + l] |= (uint8_t)((q >> 4) << (2 * j));
    }
    out->d = f32_to_f16(b->d);
}

static void encode_k(uint8_t *out, const float *x, int type) {
    union {
        block_q2_K q2_K;
        block_q3_K q3_K;
        block_q4_K q4_K;
        block_q5_K q5_K;
        block_q6_K q6_K;
    } u;
    block b = {0};
    encode_super(&b, x, &grids[type]);
    switch (type) {
    case PHI3C_Q2_K: put_q2_K(&u.q2_K, &b); break;
    case PHI3C_Q3_K: put_q3_K(&u.q3_K, &b); break;
    case PHI3C_Q4_K: put_q4_K(&u.q4_K.d, &u.q4_K.dmin, u.q4_K.scales, NULL, u.q4_K.qs, &b); break;
    case PHI3C_Q5_K: put_q4_K(&u.q5_K.d, &u.q5_K.dmin, u.q5_K.scales, u.q5_K.qh, u.q5_K.qs, &b); break;
    default: put_q6_K(&u.q6_K, &b);
    }
    memcpy(out, &u, (size_t)phi3c_block_bytes(type));
}

/* -- types of 32 ------------------------------------------------------------------------------------------ */

/* The first n of 8 blocks. */
static void encode_legacy(uint8_t *out, const float *x, int type, int n) {
    const grid *g = &grids[type];
    lanes columns[GROUP], q[GROUP], scale, min, error;
    lines fitted;
    spread(columns, x, GROUP);
    fit(&fitted, columns, g);
    for (int l = 0; l < LANES; l++) {
        scale[l] = half(fitted.scale[l]);
        min[l] = g->has_min ? half(fitted.min[l]) : 0.0f;
    }
    place(error, q, columns, scale, min, g);
    for (int l = 0; l < n; l++, out += phi3c_block_bytes(type)) {
        f16 d = f32_to_f16(scale[l]), m = f32_to_f16(-min[l]);
        uint32_t high = 0;
        uint8_t qs[16] = {0}, *to = out;
        for (int i = 0; i < 32; i++) {
            int code = (int)q[i][l] - g->low;
            qs[i % 16] |= (uint8_t)((code & 15) << (i / 16 * 4));
            high |= (uint32_t)(code >> 4) << i;
        }
        memcpy(to, &d, 2), to += 2;
        if (g->has_min) memcpy(to, &m, 2), to += 2;
        if (type == PHI3C_Q5_0 || type == PHI3C_Q5_1) memcpy(to, &high, 4), to += 4;
        memcpy(to, qs, 16);
    }
}

/* As the format's authors define it: the largest magnitude becomes 127, halves round away from zero. */
static void encode_q8_0(block_q8_0 *out, const float *x) {
    float largest = 0.0f;
    for (int i = 0; i < 32; i++) {
        float size = x[i] < 0.0f ? -x[i] : x[i];
        if (size > largest) largest = size;
    }
    float d = largest / 127.0f, per = inverse(d);
    out->d = f32_to_f16(d);
    for (int i = 0; i < 32; i++) {
        float v = x[i] * per;
        out->qs[i] = (int8_t)(v + (v < 0.0f ? -0.5f : 0.5f));
    }
}

/* -- rows ------------------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t *out;
    const uint8_t *in;
    int type, in_type;
    int64_t n;
    atomic_word is_out_of_range;
} encode_job;

static size_t bytes_of(int type, int64_t n) {
    return (size_t)(n / phi3c_block_columns(type)) * (size_t)phi3c_block_bytes(type);
}

/* Items are pieces of 256 weights; the last may be shorter, in whole blocks of 32. */
static void encode_pieces(void *arg, int64_t first, int64_t last) {
    encode_job *job = arg;
    for (int64_t piece = first; piece < last; piece++) {
        int64_t begin = piece * 256, n = job->n - begin < 256 ? job->n - begin : 256;
        uint8_t *out = job->out + bytes_of(job->type, begin);
        float x[256] = {0};
        f16 halves[256];
        phi3c_dequantize_row(x, job->in + bytes_of(job->in_type, begin), job->in_type, n);
        float limit = job->type == PHI3C_F32 || job->type == PHI3C_BF16 ? FLT_MAX : 65504.0f;
        int fits = 1;
        for (int i = 0; i < 256; i++) fits &= x[i] >= -limit && x[i] <= limit;
        if (!fits) {
            word_store(&job->is_out_of_range, 1);
            return;
        }
        switch (job->type) {
        case PHI3C_F32: memcpy(out, x, (size_t)n * 4); break;
        case PHI3C_F16:
            phi3c_kernel.to_f16(halves, x, n);
            memcpy(out, halves, (size_t)n * 2);
            break;
        case PHI3C_BF16:
            for (int i = 0; i < n; i++) halves[i] = f32_to_bf16(x[i]);
            memcpy(out, halves, (size_t)n * 2);
            break;
        case PHI3C_Q8_0:
            for (int i = 0; i < n; i += 32) {
                block_q8_0 b;
                encode_q8_0(&b, x + i);
                memcpy(out + i / 32 * (int)sizeof b, &b, sizeof b);
            }
            break;
        case PHI3C_Q4_0:
        case PHI3C_Q4_1:
        case PHI3C_Q5_0:
        case PHI3C_Q5_1: encode_legacy(out, x, job->type, (int)n / 32); break;
        default: encode_k(out, x, job->type);
        }
    }
}

int phi3c_has_encoder(int type) {
    if (type == PHI3C_F32 || type == PHI3C_F16 || type == PHI3C_BF16 || type == PHI3C_Q8_0) return 1;
    return type >= 0 && type < PHI3C_N_TYPES && grids[type].columns > 0;
}

int phi3c_encode(uint8_t *out, int type, const uint8_t *in, int in_type, int64_t n, phi3c_pool *pool) {
    assert(phi3c_has_encoder(type) && n % phi3c_block_columns(type) == 0 && n % phi3c_block_columns(in_type) == 0);
    encode_job job = {.out = out, .in = in, .type = type, .in_type = in_type, .n = n};
    phi3c_pool_run(pool, encode_pieces, &job, (n + 255) / 256, 64);
    return word_load(&job.is_out_of_range) ? -1 : 0;
}
