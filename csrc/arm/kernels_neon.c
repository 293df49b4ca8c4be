/* SPDX-License-Identifier: MIT */
/* Kernels for every 64-bit ARM processor (Raspberry Pi 3 and 4 and later).
 *
 * Quantised weights (quantised.h): smlal multiplies eight int8 with eight activations onto int16, two rows of a quad at
 * once, and these sums add up for as long as they cannot overflow. Floats: fused multiply-adds by lane, 16 partial sums
 * in four registers. Conversions from and to halves round as kernels_scalar.c does, NaNs included. */
#include "quantised.h"

#include "../expf.h"

/* -- quantised weights ------------------------------------------------------------------------------------- */

/* How many products an int16 holds: 8 of 31 * 127 for 5 bits and 4 of 63 * 127 for q6_K, which has no more in a group
 * of 16 columns, but 2 of -128 * 127 for q8_0 and of -127 * 127 for iq4. */
INLINE int int16_terms(const int type) {
    return type == PHI3C_Q8_0 || type == PHI3C_IQ4_NL || type == PHI3C_IQ4_XS ? 2 : 8;
}

INLINE void dot(const int type, const int M, int32x4_t sum[QUADS][TOKENS], const int from, const int to,
                const super_block *w, const uint8_t *bytes, int base, const int j, const uint8_t *x, size_t x_stride) {
    const int terms = int16_terms(type);
    for (int pair = 0; pair < QUADS; pair += 2) { /* of quads: 2 registers of sums each, times 4 tokens */
        int16x8_t low[2][TOKENS], high[2][TOKENS];
        UNROLL for (int g = from; g < to; g++) {
            const int term = (g - from) % terms;
            int8x16_t a[TOKENS];
            UNROLL for (int t = 0; t < M; t++) {
                int32_t four;
                memcpy(&four, token(x, x_stride, t)->q + 32 * (base + j) + 4 * g, 4);
                a[t] = vreinterpretq_s8_s32(vdupq_n_s32(four));
            }
            UNROLL for (int i = 0; i < 2; i++) {
                int8x16_t v = weights(type, w, bytes, pair + i, base, j, g);
                UNROLL for (int t = 0; t < M; t++) {
                    int16x8_t *l = &low[i][t], *h = &high[i][t];
                    *l = term ? vmlal_s8(*l, vget_low_s8(v), vget_low_s8(a[t]))
                              : vmull_s8(vget_low_s8(v), vget_low_s8(a[t]));
                    *h = term ? vmlal_high_s8(*h, v, a[t]) : vmull_high_s8(v, a[t]);
                    if (term == terms - 1 || g == to - 1)
                        sum[pair + i][t] = vaddq_s32(sum[pair + i][t], vpaddq_s32(vpaddlq_s16(*l), vpaddlq_s16(*h)));
                }
            }
        }
    }
}

/* -- float weights ----------------------------------------------------------------------------------------- */

enum { FLOAT_TOKENS = 3 };

/* Rows 4 quad to 4 quad + 3 of column c. */
INLINE float32x4_t column4(const int type, const uint8_t *panel, int64_t c, int quad) {
    if (type == PHI3C_F32) return vreinterpretq_f32_u8(vld1q_u8(panel + c * 64 + quad * 16));
    const uint8_t *p = panel + c * 32 + quad * 8;
    if (type == PHI3C_F16) return load_halves(p);
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}

/* In four partial sums by column modulo 4; see float_tile in kernels_scalar.c. Two quads at a time: 8 sums a token. */
INLINE void float_tokens(const int type, const int M, float *out, const uint8_t *panel, const uint8_t *x,
                         size_t x_stride, int64_t columns) {
    for (int pair = 0; pair < QUADS; pair += 2) {
        float32x4_t sum[FLOAT_TOKENS][2][4];
        UNROLL for (int t = 0; t < M; t++) UNROLL for (int q = 0; q < 2; q++) UNROLL for (int i = 0; i < 4; i++)
            sum[t][q][i] = vdupq_n_f32(0.0f);
        for (int64_t c = 0; c < columns; c += 4) UNROLL for (int i = 0; i < 4; i++) UNROLL for (int q = 0; q < 2; q++) {
                float32x4_t w = column4(type, panel, c + i, pair + q);
                UNROLL for (int t = 0; t < M; t++) {
                    const float *row = (const float *)(x + (size_t)t * x_stride);
                    sum[t][q][i] = vfmaq_n_f32(sum[t][q][i], w, row[c + i]);
                }
            }
        UNROLL for (int t = 0; t < M; t++) UNROLL for (int q = 0; q < 2; q++)
            vst1q_f32(out + t * 16 + (pair + q) * 4,
                      vaddq_f32(vaddq_f32(sum[t][q][0], sum[t][q][1]), vaddq_f32(sum[t][q][2], sum[t][q][3])));
    }
}

INLINE void float_tile(const int type, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n,
                       int64_t columns) {
    for (; n >= FLOAT_TOKENS; n -= FLOAT_TOKENS, x += FLOAT_TOKENS * x_stride, out += FLOAT_TOKENS * 16)
        float_tokens(type, FLOAT_TOKENS, out, panel, x, x_stride, columns);
    for (; n > 0; n--, x += x_stride, out += 16) float_tokens(type, 1, out, panel, x, x_stride, columns);
}

static void tile_f32(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n, int64_t columns,
                     const outlier_list *lists) {
    (void)lists; /* of quantised rows */
    float_tile(PHI3C_F32, out, panel, x, x_stride, n, columns);
}

static void tile_f16(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n, int64_t columns,
                     const outlier_list *lists) {
    (void)lists; /* of quantised rows */
    float_tile(PHI3C_F16, out, panel, x, x_stride, n, columns);
}

static void tile_bf16(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n, int64_t columns,
                      const outlier_list *lists) {
    (void)lists; /* of quantised rows */
    float_tile(PHI3C_BF16, out, panel, x, x_stride, n, columns);
}

/* -- activations ------------------------------------------------------------------------------------------ */

/* Sum of 16 lanes by halves, as sum_lanes in kernels_scalar.c. */
INLINE float sum_lanes(const float32x4_t v[4]) {
    float32x4_t four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

static void quantize_plain(block_x8 *out, const float x[256]) {
    uint32_t group_bits[8], block_bits = 0;
    for (int j = 0; j < 8; j++) {
        uint32x4_t largest = vdupq_n_u32(0);
        for (int i = 0; i < 32; i += 4)
            largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + 32 * j + i))));
        group_bits[j] = vmaxvq_u32(largest);
        if (group_bits[j] > block_bits) block_bits = group_bits[j];
    }
    float largest, group[8];
    memcpy(&largest, &block_bits, 4);
    memcpy(group, group_bits, sizeof group_bits);
    memset(out, 0, sizeof *out);
    if (block_bits >= 0x7f800000u) {
        out->d = NAN;
        return;
    }
    if (largest < 0x1p-100f) return;
    out->d = largest / 1016.0f;
    for (int j = 0; j < 8; j++) {
        int factor = group_factor(group[j], largest), sum[2], magnitude[2];
        float scale = group_scale(factor, largest);
        for (int i = 0; i < 2; i++) {
            int16x4_t words[4];
            int32x4_t total = vdupq_n_s32(0);
            UNROLL for (int k = 0; k < 4; k++) { /* to nearest, ties to even */
                int32x4_t q = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 32 * j + 16 * i + 4 * k), scale));
                total = vaddq_s32(total, q);
                words[k] = vmovn_s32(q);
            }
            int8x16_t bytes =
                vcombine_s8(vmovn_s16(vcombine_s16(words[0], words[1])), vmovn_s16(vcombine_s16(words[2], words[3])));
            vst1q_s8(out->q + 32 * j + 16 * i, bytes);
            sum[i] = vaddvq_s32(total);
            magnitude[i] = vaddlvq_u8(vreinterpretq_u8_s8(vabsq_s8(bytes)));
            out->nsum16[2 * j + i] = (int16_t)-sum[i];
        }
        out->factor[j] = (uint8_t)factor;
        out->sum32[j] = (int16_t)((sum[0] + sum[1]) * factor);
        out->wide16 |= (uint8_t)wide16_bit(j, magnitude[0], magnitude[1]);
        out->wide32 |= (uint8_t)wide32_bit(j, magnitude[0], magnitude[1], sum[0] + sum[1]);
    }
}

/* As in kernels_scalar.c. Blocks without outliers are not copied. */
static void quantize_block(block_x8 *out, outliers_x8 *outliers, const float *x, int n) {
    float rest[256];
    if (n < 256) {
        memset(rest, 0, sizeof rest);
        x = memcpy(rest, x, (size_t)n * sizeof(float));
    }
    float32x4_t lanes[4] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
    float32x4_t largest = vdupq_n_f32(0.0f);
    for (int i = 0; i < 256; i += 16) UNROLL for (int k = 0; k < 4; k++) {
            float32x4_t magnitude = vabsq_f32(vld1q_f32(x + i + 4 * k));
            lanes[k] = vaddq_f32(lanes[k], magnitude);
            largest = vmaxq_f32(largest, magnitude);
        }
    float limit = outlier_limit(sum_lanes(lanes), n);
    outliers->n = 0;
    if (vmaxvq_f32(largest) > limit) {
        for (int i = 0; i < 256; i += 4) {
            float32x4_t v = vld1q_f32(x + i);
            uint32x4_t apart = vcagtq_f32(v, vdupq_n_f32(limit)); /* |v| > limit */
            if (vmaxvq_u32(apart))
                for (int column = i; column < i + 4; column++) {
                    if (!(fabsf(x[column]) > limit)) continue;
                    outliers->column[outliers->n] = (uint8_t)column;
                    outliers->x[outliers->n++] = x[column];
                }
            /* x may be rest */
            vst1q_f32(rest + i, vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), apart)));
        }
        x = rest;
    }
    quantize_plain(out, x);
}

static void quantize_row(block_x8 *out, outliers_x8 *outliers, const float *x, int64_t columns) {
    for (; columns > 0; columns -= 256, x += 256)
        quantize_block(out++, outliers++, x, columns < 256 ? (int)columns : 256);
}

static void rms_norm_row(float *out, const float *x, const float *weight, float eps, int64_t columns) {
    float32x4_t squares[4] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
    for (int64_t i = 0; i < columns; i += 16) UNROLL for (int k = 0; k < 4; k++) {
            float32x4_t v = vld1q_f32(x + i + 4 * k);
            squares[k] = vfmaq_f32(squares[k], v, v);
        }
    float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)columns + eps);
    for (int64_t i = 0; i < columns; i += 4)
        vst1q_f32(out + i, vmulq_f32(vmulq_n_f32(vld1q_f32(x + i), scale), vld1q_f32(weight + i)));
}

/* phi3c_expf, lane by lane. */
INLINE float32x4_t exp_lanes(float32x4_t x) {
    const float32x4_t round = vdupq_n_f32(PHI3C_ROUND), one = vdupq_n_f32(1.0f);
    float32x4_t shifted = vfmaq_f32(round, x, vdupq_n_f32(PHI3C_LOG2E));
    float32x4_t n = vsubq_f32(shifted, round);
    float32x4_t r = vfmaq_f32(x, n, vdupq_n_f32(-PHI3C_LN2_HI));
    r = vfmaq_f32(r, n, vdupq_n_f32(-PHI3C_LN2_LO));
    float32x4_t p = vdupq_n_f32(PHI3C_E6);
    p = vfmaq_f32(vdupq_n_f32(PHI3C_E5), p, r);
    p = vfmaq_f32(vdupq_n_f32(PHI3C_E4), p, r);
    p = vfmaq_f32(vdupq_n_f32(PHI3C_E3), p, r);
    p = vfmaq_f32(vdupq_n_f32(PHI3C_E2), p, r);
    p = vfmaq_f32(one, p, r);
    p = vfmaq_f32(one, p, r);
    p = vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p), vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23)));
    p = vbslq_f32(vcltq_f32(x, vdupq_n_f32(PHI3C_EXP_MIN)), vdupq_n_f32(0.0f), p);
    p = vbslq_f32(vcgtq_f32(x, vdupq_n_f32(PHI3C_EXP_MAX)), vdupq_n_f32(INFINITY), p);
    return vbslq_f32(vceqq_f32(x, x), p, x);
}

static void silu_mul_row(float *out, const float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += 4) {
        float32x4_t g = vld1q_f32(gate + i);
        float32x4_t silu = vdivq_f32(g, vaddq_f32(vdupq_n_f32(1.0f), exp_lanes(vnegq_f32(g))));
        vst1q_f32(out + i, vmulq_f32(silu, vld1q_f32(up + i)));
    }
}

static void to_f16(f16 *out, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 4) vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
}

/* -- attention -------------------------------------------------------------------------------------------- */

/* What queries, or weights of keys, are multiplied with: row k is a dimension of 64 keys, or a value. */
typedef struct {
    const uint8_t *data;
    const float *scales; /* of q8_0: [k / 32][columns] of keys, [k][columns / 32] of values */
    int columns;
} factor;

enum { HALVES, Q8_KEYS, Q8_VALUES, FLOATS };
enum { ROWS = 6 }; /* of a product, with 16 columns: 24 sums in registers */

/* Eight columns, from c on, of row k. */
INLINE float32x4x2_t factor8(const int kind, factor b, int k, int c) {
    size_t at = (size_t)(k * b.columns + c);
    float32x4x2_t v;
    if (kind == FLOATS) {
        v.val[0] = vld1q_f32((const float *)b.data + at);
        v.val[1] = vld1q_f32((const float *)b.data + at + 4);
        return v;
    }
    if (kind == HALVES) {
        v.val[0] = load_halves(b.data + 2 * at);
        v.val[1] = load_halves(b.data + 2 * at + 8);
        return v;
    }
    int16x8_t q = vmovl_s8(vreinterpret_s8_u8(vld1_u8(b.data + at)));
    v.val[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(q)));
    v.val[1] = vcvtq_f32_s32(vmovl_high_s16(q));
    if (kind == Q8_KEYS) {
        const float *scales = b.scales + k / 32 * b.columns + c;
        v.val[0] = vmulq_f32(v.val[0], vld1q_f32(scales));
        v.val[1] = vmulq_f32(v.val[1], vld1q_f32(scales + 4));
    } else {
        float scale = b.scales[k * (b.columns / 32) + c / 32];
        v.val[0] = vmulq_n_f32(v.val[0], scale);
        v.val[1] = vmulq_n_f32(v.val[1], scale);
    }
    return v;
}

/* out[i][v] += sum_k a[i][k] b[k][c + v], in order of k, from <= k < to, for M rows and N times 8 columns. */
INLINE void multiply(const int kind, const int M, const int N, float *out, int out_stride, const float *a, int a_stride,
                     factor b, int c, int from, int to) {
    float32x4_t sum[ROWS][2 * 12];
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int v = 0; v < 2 * N; v++) sum[i][v] =
        vld1q_f32(out + i * out_stride + 4 * v);
    for (int k = from; k < to; k++) UNROLL for (int v = 0; v < N; v++) {
            float32x4x2_t row = factor8(kind, b, k, c + 8 * v);
            UNROLL for (int i = 0; i < M; i++) {
                float x = a[i * a_stride + k];
                sum[i][2 * v] = vfmaq_n_f32(sum[i][2 * v], row.val[0], x);
                sum[i][2 * v + 1] = vfmaq_n_f32(sum[i][2 * v + 1], row.val[1], x);
            }
        }
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int v = 0; v < 2 * N; v++)
        vst1q_f32(out + i * out_stride + 4 * v, sum[i][v]);
}

/* The same for 16 columns of floats and any number of rows up to ROWS. */
static void multiply_floats(int rows, float *out, int out_stride, const float *a, int a_stride, const float *b,
                            int from, int to) {
    factor floats = {(const uint8_t *)b, NULL, 16};
    if (rows == ROWS) {
        multiply(FLOATS, ROWS, 2, out, out_stride, a, a_stride, floats, 0, from, to);
        return;
    }
    for (; rows >= 2; rows -= 2, out += 2 * out_stride, a += 2 * a_stride)
        multiply(FLOATS, 2, 2, out, out_stride, a, a_stride, floats, 0, from, to);
    if (rows) multiply(FLOATS, 1, 2, out, out_stride, a, a_stride, floats, 0, from, to);
}

/* slice[k][0..15] = b[k][c..c + 15] for from <= k < to */
INLINE void to_floats(const int kind, float *slice, factor b, int c, int from, int to) {
    for (int k = from; k < to; k++) UNROLL for (int v = 0; v < 2; v++) {
            float32x4x2_t row = factor8(kind, b, k, c + 8 * v);
            vst1q_f32(slice + 16 * k + 8 * v, row.val[0]);
            vst1q_f32(slice + 16 * k + 8 * v + 4, row.val[1]);
        }
}

/* The largest of `max` and the scores p of keys [first, last); other scores become -inf. */
INLINE float mask_scores(float p[PHI3C_TILE], float max, int first, int last) {
    static const int32_t lanes[4] = {0, 1, 2, 3};
    const float32x4_t hidden = vdupq_n_f32(-INFINITY);
    float32x4_t largest = vdupq_n_f32(max);
    for (int j = 0; j < PHI3C_TILE; j += 4) {
        int32x4_t key = vaddq_s32(vld1q_s32(lanes), vdupq_n_s32(j));
        uint32x4_t seen = vandq_u32(vcgeq_s32(key, vdupq_n_s32(first)), vcltq_s32(key, vdupq_n_s32(last)));
        float32x4_t score = vbslq_f32(seen, vld1q_f32(p + j), hidden);
        vst1q_f32(p + j, score);
        largest = vmaxnmq_f32(largest, score); /* passes over a score that is NaN */
    }
    return vmaxnmvq_f32(largest);
}

/* Scores become weights; returns their sum. */
INLINE float weigh_scores(float p[PHI3C_TILE], float max) {
    float32x4_t lanes[4] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
    for (int j = 0; j < PHI3C_TILE; j += 16) UNROLL for (int k = 0; k < 4; k++) {
            float32x4_t weight = exp_lanes(vsubq_f32(vld1q_f32(p + j + 4 * k), vdupq_n_f32(max)));
            vst1q_f32(p + j + 4 * k, weight);
            lanes[k] = vaddq_f32(lanes[k], weight);
        }
    return sum_lanes(lanes);
}

/* n rows of scores become weights, and the state moves on but for what these keys add to o. Each pass over all rows
 * leaves the processor many that do not wait for one another. */
static void softmax(float *max, float *sum, float *o, float (*p)[PHI3C_TILE], const int *first, const int *last, int n,
                    int head_dim) {
    float kept[(PHI3C_QUERIES + 3) / 4 * 4] = {0};
    for (int i = 0; i < n; i++) {
        float largest = mask_scores(p[i], max[i], first[i], last[i]);
        kept[i] = max[i] - largest;
        max[i] = largest;
    }
    for (int i = 0; i < n; i += 4) vst1q_f32(kept + i, exp_lanes(vld1q_f32(kept + i)));
    for (int i = 0; i < n; i++) sum[i] = fmaf(sum[i], kept[i], weigh_scores(p[i], max[i]));
    for (int i = 0; i < n; i++) {
        if (kept[i] == 1.0f) continue;
        float *row = o + i * head_dim;
        for (int d = 0; d < head_dim; d += 4) vst1q_f32(row + d, vmulq_n_f32(vld1q_f32(row + d), kept[i]));
    }
}

/* One query: the page is read once, as it is, a dimension of all keys and a whole value at a time. */
INLINE void attend_one(const int keys_kind, const int values_kind, float *max, float *sum, float *o, const float *q,
                       factor keys, factor values, int first, int last, int head_dim) {
    float p[1][PHI3C_TILE] = {{0}};
    multiply(keys_kind, 1, 8, p[0], 0, q, 0, keys, 0, 0, head_dim);
    softmax(max, sum, o, p, &first, &last, 1, head_dim);
    int d = 0;
    if (head_dim % 96 == 0)
        for (; d < head_dim; d += 96) multiply(values_kind, 1, 12, o + d, 0, p[0], 0, values, d, first, last);
    for (; head_dim - d >= 64; d += 64) multiply(values_kind, 1, 8, o + d, 0, p[0], 0, values, d, first, last);
    for (; d < head_dim; d += 16) multiply(values_kind, 1, 2, o + d, 0, p[0], 0, values, d, first, last);
}

/* Several queries: 16 columns of keys or values become floats once for all of them. */
INLINE void attend_several(const int keys_kind, const int values_kind, float *max, float *sum, float *o, const float *q,
                           factor keys, factor values, const int *first, const int *last, int n, int head_dim) {
    _Alignas(64) float p[PHI3C_QUERIES][PHI3C_TILE], slice[PHI3C_MAX_HEAD_DIM * 16];
    int begin = PHI3C_TILE, end = 0, from[PHI3C_QUERIES], to[PHI3C_QUERIES]; /* keys that any, or all of ROWS, see */
    for (int i = 0; i < n; i++) {
        int group = i / ROWS;
        if (i % ROWS == 0) from[group] = 0, to[group] = PHI3C_TILE;
        if (first[i] > from[group]) from[group] = first[i];
        if (last[i] < to[group]) to[group] = last[i];
        if (from[group] > to[group]) from[group] = to[group] = PHI3C_TILE;
        if (first[i] < begin) begin = first[i];
        if (last[i] > end) end = last[i];
    }
    memset(p, 0, (size_t)n * sizeof p[0]);
    for (int c = begin / 16 * 16; c < end; c += 16) {
        to_floats(keys_kind, slice, keys, c, 0, head_dim);
        for (int i = 0; i < n; i += ROWS)
            multiply_floats(n - i < ROWS ? n - i : ROWS, p[i] + c, PHI3C_TILE, q + i * head_dim, head_dim, slice, 0,
                            head_dim);
    }
    softmax(max, sum, o, p, first, last, n, head_dim);
    for (int c = 0; c < head_dim; c += 16) {
        to_floats(values_kind, slice, values, c, begin, end);
        for (int i = 0; i < n; i += ROWS) {
            int rows = n - i < ROWS ? n - i : ROWS, low = from[i / ROWS], high = to[i / ROWS];
            float *out = o + i * head_dim + c;
            for (int r = 0; r < rows; r++)
                if (first[i + r] < low)
                    multiply_floats(1, out + r * head_dim, 0, p[i + r], 0, slice, first[i + r],
                                    last[i + r] < low ? last[i + r] : low);
            multiply_floats(rows, out, head_dim, p[i], PHI3C_TILE, slice, low, high);
            for (int r = 0; r < rows; r++)
                if (high < last[i + r])
                    multiply_floats(1, out + r * head_dim, 0, p[i + r], 0, slice, high, last[i + r]);
        }
    }
}

/* The next page is left to the hardware: fetching it ahead paid on Zen 4, and has been measured on no ARM. */
static void attend_f16(float *max, float *sum, float *o, const float *q, const uint8_t *kv, const uint8_t *next,
                       const int *first, const int *last, int n, int head_dim) {
    size_t half = phi3c_kv_bytes(PHI3C_F16, head_dim) / 2;
    factor keys = {kv, NULL, PHI3C_TILE}, values = {kv + half, NULL, head_dim};
    (void)next;
    if (n == 1)
        attend_one(HALVES, HALVES, max, sum, o, q, keys, values, *first, *last, head_dim);
    else
        attend_several(HALVES, HALVES, max, sum, o, q, keys, values, first, last, n, head_dim);
}

static void attend_q8_0(float *max, float *sum, float *o, const float *q, const uint8_t *kv, const uint8_t *next,
                        const int *first, const int *last, int n, int head_dim) {
    float scales[2][PHI3C_TILE * PHI3C_MAX_HEAD_DIM / 32];
    size_t half = phi3c_kv_bytes(PHI3C_Q8_0, head_dim) / 2, scale_bytes = q8_0_scale_bytes(head_dim);
    (void)next;
    for (int i = 0; i < 2; i++)
        for (size_t g = 0; g < scale_bytes / 2; g += 4)
            vst1q_f32(scales[i] + g, load_halves(kv + half * (size_t)i + 2 * g));
    kv += scale_bytes;
    factor keys = {kv, scales[0], PHI3C_TILE}, values = {kv + half, scales[1], head_dim};
    if (n == 1)
        attend_one(Q8_KEYS, Q8_VALUES, max, sum, o, q, keys, values, *first, *last, head_dim);
    else
        attend_several(Q8_KEYS, Q8_VALUES, max, sum, o, q, keys, values, first, last, n, head_dim);
}

/* -- limit ------------------------------------------------------------------------------------------------ */

static int64_t peak(void) {
    enum { CHAINS = 12 };       /* enough to hide latencies */
    volatile int8_t factor = 1; /* known to nobody at compile time */
    int8x8_t one = vdup_n_s8(factor), weights = vdup_n_s8(factor);
    int16x8_t sum[CHAINS];
    /* chains that begin alike would be computed once */
    UNROLL for (int16_t i = 0; i < CHAINS; i++) sum[i] = vdupq_n_s16(i);
    for (int round = 0; round < PEAK_ROUNDS; round++)
        UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = vmlal_s8(sum[i], weights, one);
    int64_t n = 0;
    for (int i = 0; i < CHAINS; i++) n += vaddlvq_s16(sum[i]) - 8 * i;
    return n;
}

const phi3c_kernels phi3c_kernels_neon = {
    .name = "neon",
    .tile = {[PHI3C_F32] = tile_f32,
             [PHI3C_F16] = tile_f16,
             [PHI3C_BF16] = tile_bf16,
             [PHI3C_Q4_0] = tile_q4_0,
             [PHI3C_Q4_1] = tile_q4_1,
             [PHI3C_Q5_0] = tile_q5_0,
             [PHI3C_Q5_1] = tile_q5_1,
             [PHI3C_Q8_0] = tile_q8_0,
             [PHI3C_Q2_K] = tile_q2_K,
             [PHI3C_Q3_K] = tile_q3_K,
             [PHI3C_Q4_K] = tile_q4_K,
             [PHI3C_Q5_K] = tile_q5_K,
             [PHI3C_Q6_K] = tile_q6_K,
             [PHI3C_IQ4_NL] = tile_iq4_nl,
             [PHI3C_IQ4_XS] = tile_iq4_xs},
    .attend_tile = {[PHI3C_F16] = attend_f16, [PHI3C_Q8_0] = attend_q8_0},
    .quantize_row = quantize_row,
    .rms_norm_row = rms_norm_row,
    .silu_mul_row = silu_mul_row,
    .to_f16 = to_f16,
    .peak = peak,
};
