/* SPDX-License-Identifier: MIT */
/* The kernels in plain C: what they compute, and in which order, is defined here. */
#include "../kernels.h"

#include <math.h>

#include "../expf.h"

/* -- quantised weights ------------------------------------------------------------------------------------- */

static f16 half_at(const uint8_t *p, int lane) {
    f16 h;
    memcpy(&h, p + 2 * lane, 2);
    return h;
}

static float scale_at(const uint8_t *p, int lane) { return f16_to_f32(half_at(p, lane)); }

/* Value k (0-255) of the planes of six-bit scales; see put_planes in pack.c. */
INLINE int plane_at(const uint8_t *planes, int k) {
    return (planes[k % 128] >> (k < 128 ? 0 : 4) & 15) | (planes[128 + k % 64] >> (2 * (k / 64)) & 3) << 4;
}

/* Column c of row `lane` in an array of [columns / 4][16 rows][4] bytes. */
INLINE int at(const uint8_t *quads, int lane, int c) { return quads[c / 4 * 64 + lane * 4 + c % 4]; }

/* Signed weight in column c of the s-th group of 32 columns of a super-block, which has n32 such groups. */
INLINE int weight_at(int type, const uint8_t *p, int lane, int s, int c, int n32) {
    const uint8_t *qs, *qh;
    int half = s / 4, j = s % 4, high; /* of the K types: quarter j of a half block */
    switch (type) {
    case PHI3C_Q8_0: return at(p + n32 * 32 + s * 512, lane, c) - 128;
    case PHI3C_Q4_0:
    case PHI3C_Q4_1:
        qs = p + n32 * (type == PHI3C_Q4_0 ? 32 : 64) + s * 256;
        return (at(qs, lane, c % 16) >> (c < 16 ? 0 : 4) & 15) - (type == PHI3C_Q4_0 ? 8 : 0);
    case PHI3C_IQ4_NL:
    case PHI3C_IQ4_XS:
        qs = p + (type == PHI3C_IQ4_NL ? n32 * 32 : 32 + 32 + 64) + s * 256;
        return iq4_values[at(qs, lane, c % 16) >> (c < 16 ? 0 : 4) & 15];
    case PHI3C_Q5_0:
    case PHI3C_Q5_1:
        qh = p + n32 * (type == PHI3C_Q5_0 ? 32 : 64);
        qs = qh + n32 * 64 + s * 256;
        high = qh[s * 64 + lane * 4 + c % 4] >> (c / 4) & 1;
        return ((at(qs, lane, c % 16) >> (c < 16 ? 0 : 4) & 15) | high << 4) - (type == PHI3C_Q5_0 ? 16 : 0);
    case PHI3C_Q4_K: return at(p + 64 + 192 + s / 2 * 512, lane, c) >> (s % 2 ? 4 : 0) & 15;
    case PHI3C_Q5_K:
        qh = p + 64 + 192;
        return (at(qh + 512 + s / 2 * 512, lane, c) >> (s % 2 ? 4 : 0) & 15) | (at(qh, lane, c) >> s & 1) << 4;
    case PHI3C_Q6_K:
        qh = p + 32 + 256;
        qs = qh + 1024 + half * 1024 + j % 2 * 512;
        return ((at(qs, lane, c) >> (j / 2 * 4) & 15) | (at(qh + half * 512, lane, c) >> (2 * j) & 3) << 4) - 32;
    case PHI3C_Q3_K:
        qh = p + 32 + 192;
        return ((at(qh + 512 + half * 512, lane, c) >> (2 * j) & 3) | (at(qh, lane, c) >> s & 1) << 2) - 4;
    default: /* Q2_K */ return at(p + 64 + 256 + half * 512, lane, c) >> (2 * j) & 3;
    }
}

/* K types: integer scale and min of a group g of 16 columns; those with groups of 32 have each twice. */
INLINE int scale_of(int type, const uint8_t *p, int lane, int g) {
    switch (type) {
    case PHI3C_Q6_K: return (int8_t)p[32 + g * 16 + lane];
    case PHI3C_Q3_K: return plane_at(p + 32, g * 16 + lane) - 32;
    case PHI3C_Q2_K: return p[64 + g * 16 + lane] & 15;
    case PHI3C_IQ4_XS:
        return ((p[64 + g / 4 * 16 + lane] >> (g / 2 % 2 * 4) & 15) | (half_at(p + 32, lane) >> (g / 2 * 2) & 3) << 4) -
               32;
    default: return plane_at(p + 64, g / 2 * 16 + lane);
    }
}

INLINE int min_of(int type, const uint8_t *p, int lane, int g) {
    switch (type) {
    case PHI3C_Q6_K:
    case PHI3C_Q3_K:
    case PHI3C_IQ4_XS: return 0;
    case PHI3C_Q2_K: return p[64 + g * 16 + lane] >> 4;
    default: return plane_at(p + 64, 128 + g / 4 * 32 + lane * 2 + g / 2 % 2);
    }
}

enum { TOKENS = 8 }; /* that share unpacked weights; the result does not depend on it */

/* sum[h][lane] = sum over columns 16 h to 16 h + 15 of w[c][lane] q[c] */
static void dot32(int32_t sum[2][16], int16_t w[32][16], const int8_t *q) {
    memset(sum, 0, 2 * 16 * sizeof(int32_t));
    for (int c = 0; c < 32; c++)
        for (int lane = 0; lane < 16; lane++) sum[c / 16][lane] += w[c][lane] * q[c];
}

/* A legacy super-block, 32 columns to a float scale (and min):
 * part = sum_s d_s (float)(sum_s factor_s) [+ m_s (float)sum32_s], in order of s, each by one fused multiply-add. */
INLINE void legacy_super(int type, float part[][16], const uint8_t *p, const block_x8 *const x[], int n, int n32) {
    int has_min = type == PHI3C_Q4_1 || type == PHI3C_Q5_1;
    memset(part, 0, (size_t)n * 16 * sizeof(float));
    for (int s = 0; s < n32; s++) {
        int16_t w[32][16];
        for (int c = 0; c < 32; c++)
            for (int lane = 0; lane < 16; lane++) w[c][lane] = (int16_t)weight_at(type, p, lane, s, c, n32);
        for (int t = 0; t < n; t++) {
            int32_t sum[2][16];
            dot32(sum, w, x[t]->q + 32 * s);
            for (int lane = 0; lane < 16; lane++) {
                int32_t scaled = (sum[0][lane] + sum[1][lane]) * x[t]->factor[s];
                part[t][lane] = fmaf(scale_at(p + s * 32, lane), (float)scaled, part[t][lane]);
                if (has_min)
                    part[t][lane] = fmaf(scale_at(p + (n32 + s) * 32, lane), (float)x[t]->sum32[s], part[t][lane]);
            }
        }
    }
}

/* A K super-block, whose sums are exact integers: part = d (float)total, then - dmin (float)minsum by one fused
 * multiply-add where the type has mins. */
INLINE void k_super(int type, float part[][16], const uint8_t *p, const block_x8 *const x[], int n) {
    int has_min = type == PHI3C_Q2_K || type == PHI3C_Q4_K || type == PHI3C_Q5_K;
    int32_t total[TOKENS][16] = {{0}}, minsum[TOKENS][16] = {{0}};
    for (int s = 0; s < 8; s++) {
        int16_t w[32][16], scale[2][16], min[2][16];
        for (int lane = 0; lane < 16; lane++) {
            for (int c = 0; c < 32; c++) w[c][lane] = (int16_t)weight_at(type, p, lane, s, c, 8);
            for (int h = 0; h < 2; h++) {
                scale[h][lane] = (int16_t)scale_of(type, p, lane, 2 * s + h);
                min[h][lane] = (int16_t)min_of(type, p, lane, 2 * s + h);
            }
        }
        for (int t = 0; t < n; t++) {
            int32_t sum[2][16];
            dot32(sum, w, x[t]->q + 32 * s);
            for (int lane = 0; lane < 16; lane++) {
                int32_t scaled = sum[0][lane] * scale[0][lane] + sum[1][lane] * scale[1][lane];
                total[t][lane] += scaled * x[t]->factor[s];
                int32_t mins = min[0][lane] * x[t]->nsum16[2 * s] + min[1][lane] * x[t]->nsum16[2 * s + 1];
                minsum[t][lane] -= mins * x[t]->factor[s];
            }
        }
    }
    for (int t = 0; t < n; t++)
        for (int lane = 0; lane < 16; lane++) {
            part[t][lane] = scale_at(p, lane) * (float)total[t][lane];
            if (has_min) part[t][lane] = fmaf(-scale_at(p + 32, lane), (float)minsum[t][lane], part[t][lane]);
        }
}

/* part * d joins the sum by one fused multiply-add. */
static void add_part(float *out, const float part[16], float d) {
    for (int lane = 0; lane < 16; lane++) out[lane] = fmaf(part[lane], d, out[lane]);
}

/* The weight in column c of group s as a float, as phi3c_dequantize_row has it: at most one rounding, that of a min. */
INLINE float float_weight_at(int type, const uint8_t *p, int lane, int s, int c, int n32) {
    int w = weight_at(type, p, lane, s, c, n32), g = 2 * s + c / 16;
    if (has_blocks_of_32(type)) {
        float d = scale_at(p + s * 32, lane);
        int has_min = type == PHI3C_Q4_1 || type == PHI3C_Q5_1;
        return has_min ? fmaf(d, (float)w, scale_at(p + (n32 + s) * 32, lane)) : d * (float)w;
    }
    float weight = scale_at(p, lane) * (float)(scale_of(type, p, lane, g) * w);
    int has_min = type == PHI3C_Q2_K || type == PHI3C_Q4_K || type == PHI3C_Q5_K;
    return has_min ? fmaf(-scale_at(p + 32, lane), (float)min_of(type, p, lane, g), weight) : weight;
}

/* out = sum over super-blocks, in order: the block's part, then its outliers by column, each by one fused multiply-add.
 */
INLINE void quantised_tile(int type, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n,
                           int64_t columns) {
    size_t bytes32 = phi3c_packed_bytes(type, 16, 256) / 8; /* of a panel, per 32 columns */
    int64_t supers = (columns + 255) / 256;
    for (int first = 0; first < n; first += TOKENS, out += TOKENS * 16) {
        int tokens = n - first < TOKENS ? n - first : TOKENS;
        const uint8_t *p = panel;
        memset(out, 0, (size_t)tokens * 16 * sizeof(float));
        for (int64_t super = 0; super < supers; super++) {
            int n32 = columns / 32 - super * 8 < 8 ? (int)(columns / 32 - super * 8) : 8;
            const block_x8 *block[TOKENS];
            float part[TOKENS][16];
            for (int t = 0; t < tokens; t++) block[t] = (const block_x8 *)(x + (size_t)(first + t) * x_stride) + super;
            if (has_blocks_of_32(type))
                legacy_super(type, part, p, block, tokens, n32);
            else
                k_super(type, part, p, block, tokens);
            for (int t = 0; t < tokens; t++) {
                add_part(out + t * 16, part[t], block[t]->d);
                const outliers_x8 *outliers = outliers_at(outliers_of(x, columns) + super, x_stride, first + t);
                for (int i = 0; i < outliers->n; i++) {
                    int s = outliers->column[i] / 32, c = outliers->column[i] % 32;
                    for (int lane = 0; lane < 16; lane++) {
                        float weight = float_weight_at(type, p, lane, s, c, n32);
                        out[t * 16 + lane] = fmaf(weight, outliers->x[i], out[t * 16 + lane]);
                    }
                }
            }
            p += bytes32 * (size_t)n32;
        }
    }
}

/* Float weights: four partial sums, of columns 0, 1, 2 and 3 modulo 4, joined as (0 + 1) + (2 + 3). */
INLINE void float_tile(int type, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n,
                       int64_t columns) {
    for (int t = 0; t < n; t++)
        for (int lane = 0; lane < 16; lane++) {
            const float *row = (const float *)(x + (size_t)t * x_stride);
            float sum[4] = {0};
            for (int64_t c = 0; c < columns; c++) {
                float w;
                if (type == PHI3C_F32)
                    memcpy(&w, panel + c * 64 + lane * 4, 4);
                else if (type == PHI3C_F16)
                    w = scale_at(panel + c * 32, lane);
                else
                    w = bf16_to_f32(half_at(panel + c * 32, lane));
                sum[c % 4] = fmaf(w, row[c], sum[c % 4]);
            }
            out[t * 16 + lane] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
}

#define TILE(name, kind, type)                                                                                         \
    static void name(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n, int64_t columns,      \
                     const outlier_list *lists) {                                                                      \
        (void)lists; /* the same outliers as those of the rows */                                                      \
        kind(type, out, panel, x, x_stride, n, columns);                                                               \
    }
TILE(tile_f32, float_tile, PHI3C_F32)
TILE(tile_f16, float_tile, PHI3C_F16)
TILE(tile_bf16, float_tile, PHI3C_BF16)
TILE(tile_q4_0, quantised_tile, PHI3C_Q4_0)
TILE(tile_q4_1, quantised_tile, PHI3C_Q4_1)
TILE(tile_q5_0, quantised_tile, PHI3C_Q5_0)
TILE(tile_q5_1, quantised_tile, PHI3C_Q5_1)
TILE(tile_q8_0, quantised_tile, PHI3C_Q8_0)
TILE(tile_q2_K, quantised_tile, PHI3C_Q2_K)
TILE(tile_q3_K, quantised_tile, PHI3C_Q3_K)
TILE(tile_q4_K, quantised_tile, PHI3C_Q4_K)
TILE(tile_q5_K, quantised_tile, PHI3C_Q5_K)
TILE(tile_q6_K, quantised_tile, PHI3C_Q6_K)
TILE(tile_iq4_nl, quantised_tile, PHI3C_IQ4_NL)
TILE(tile_iq4_xs, quantised_tile, PHI3C_IQ4_XS)

/* -- activations ------------------------------------------------------------------------------------------ */

static uint32_t magnitude_bits(float x) { /* ordered like |x|, with infinities and then NaNs on top */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffffu;
}

/* Sum of 16 lanes by halves: lane i takes lane i + 8, then i + 4, i + 2, i + 1. */
static float sum_lanes(const float lanes[16]) {
    float sum[8];
    for (int i = 0; i < 8; i++) sum[i] = lanes[i] + lanes[i + 8];
    for (int width = 4; width; width /= 2)
        for (int i = 0; i < width; i++) sum[i] += sum[i + width];
    return sum[0];
}

/* All but the outliers. A block whose largest magnitude is below 2^-100 is zero; one that holds an infinity or NaN
 * becomes NaN. */
static void quantize_plain(block_x8 *out, const float x[256]) {
    uint32_t group_bits[8] = {0}, block_bits = 0;
    for (int i = 0; i < 256; i++)
        if (magnitude_bits(x[i]) > group_bits[i / 32]) group_bits[i / 32] = magnitude_bits(x[i]);
    for (int j = 0; j < 8; j++)
        if (group_bits[j] > block_bits) block_bits = group_bits[j];
    float largest, group[8];
    memcpy(&largest, &block_bits, 4);
    memcpy(group, group_bits, sizeof group);

    memset(out, 0, sizeof *out);
    if (block_bits >= 0x7f800000u) {
        out->d = NAN;
        return;
    }
    if (largest < 0x1p-100f) return;
    out->d = largest / 1016.0f; /* 127 * 8 */
    for (int j = 0; j < 8; j++) {
        int factor = group_factor(group[j], largest), sum[2] = {0, 0}, magnitude[2] = {0, 0};
        float scale = group_scale(factor, largest);
        for (int i = 0; i < 32; i++) {
            float q = x[32 * j + i] * scale;
            q = (q + PHI3C_ROUND) - PHI3C_ROUND; /* to nearest, ties to even */
            out->q[32 * j + i] = (int8_t)q;
            sum[i / 16] += (int)q;
            magnitude[i / 16] += (int)fabsf(q);
        }
        out->factor[j] = (uint8_t)factor;
        out->nsum16[2 * j] = (int16_t)-sum[0];
        out->nsum16[2 * j + 1] = (int16_t)-sum[1];
        out->sum32[j] = (int16_t)((sum[0] + sum[1]) * factor);
        out->wide16 |= (uint8_t)wide16_bit(j, magnitude[0], magnitude[1]);
        out->wide32 |= (uint8_t)wide32_bit(j, magnitude[0], magnitude[1], sum[0] + sum[1]);
    }
}

/* Magnitudes are added up in 16 strided lanes. */
static void quantize_block(block_x8 *out, outliers_x8 *outliers, const float *x, int n) {
    float rest[256] = {0}, lanes[16] = {0};
    memcpy(rest, x, (size_t)n * sizeof(float));
    for (int i = 0; i < 256; i++) lanes[i % 16] += fabsf(rest[i]);
    float limit = outlier_limit(sum_lanes(lanes), n);
    outliers->n = 0;
    for (int i = 0; i < 256; i++) {
        if (!(fabsf(rest[i]) > limit)) continue;
        outliers->column[outliers->n] = (uint8_t)i;
        outliers->x[outliers->n++] = rest[i];
        rest[i] = 0.0f;
    }
    quantize_plain(out, rest);
}

static void quantize_row(block_x8 *out, outliers_x8 *outliers, const float *x, int64_t columns) {
    for (; columns > 0; columns -= 256, x += 256)
        quantize_block(out++, outliers++, x, columns < 256 ? (int)columns : 256);
}

static void rms_norm_row(float *out, const float *x, const float *weight, float eps, int64_t columns) {
    float squares[16] = {0};
    for (int64_t i = 0; i < columns; i++) squares[i % 16] = fmaf(x[i], x[i], squares[i % 16]);
    float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)columns + eps);
    for (int64_t i = 0; i < columns; i++) out[i] = x[i] * scale * weight[i];
}

static void silu_mul_row(float *out, const float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = gate[i] / (1.0f + phi3c_expf(-gate[i])) * up[i];
}

static void to_f16(f16 *out, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = f32_to_f16(x[i]);
}

/* -- attention -------------------------------------------------------------------------------------------- */

/* Dimension d of key j, and of value j. Exact: a half, or the product of a half and 8 bits. */
INLINE float key_at(int kv_type, const uint8_t *keys, int d, int j, int head_dim) {
    if (kv_type == PHI3C_F16) return scale_at(keys, d * PHI3C_TILE + j);
    int8_t q = (int8_t)keys[q8_0_scale_bytes(head_dim) + d * PHI3C_TILE + j];
    return scale_at(keys, d / 32 * PHI3C_TILE + j) * (float)q;
}

INLINE float value_at(int kv_type, const uint8_t *values, int d, int j, int head_dim) {
    if (kv_type == PHI3C_F16) return scale_at(values, j * head_dim + d);
    int8_t q = (int8_t)values[q8_0_scale_bytes(head_dim) + j * head_dim + d];
    return scale_at(values, j * (head_dim / 32) + d / 32) * (float)q;
}

INLINE void attend_tile(int kv_type, float *max, float *sum, float *o, const float *q, const uint8_t *kv,
                        const int *first, const int *last, int n, int head_dim) {
    const uint8_t *values = kv + phi3c_kv_bytes(kv_type, head_dim) / 2;
    for (int i = 0; i < n; i++, q += head_dim, o += head_dim) {
        float p[PHI3C_TILE], largest = max[i];
        for (int j = 0; j < PHI3C_TILE; j++) {
            float score = 0.0f;
            for (int d = 0; d < head_dim; d++) score = fmaf(q[d], key_at(kv_type, kv, d, j, head_dim), score);
            p[j] = j >= first[i] && j < last[i] ? score : -INFINITY;
            if (p[j] > largest) largest = p[j];
        }
        float lanes[16] = {0};
        for (int j = 0; j < PHI3C_TILE; j++) {
            p[j] = phi3c_expf(p[j] - largest);
            lanes[j % 16] += p[j];
        }
        float kept = phi3c_expf(max[i] - largest);
        max[i] = largest;
        sum[i] = fmaf(sum[i], kept, sum_lanes(lanes));
        for (int d = 0; d < head_dim; d++) {
            float value = o[d] * kept;
            for (int j = first[i]; j < last[i]; j++)
                value = fmaf(p[j], value_at(kv_type, values, d, j, head_dim), value);
            o[d] = value;
        }
    }
}

#define ATTEND(name, kv_type)                                                                                          \
    static void name(float *max, float *sum, float *o, const float *q, const uint8_t *kv, const uint8_t *next,         \
                     const int *first, const int *last, int n, int head_dim) {                                         \
        (void)next;                                                                                                    \
        attend_tile(kv_type, max, sum, o, q, kv, first, last, n, head_dim);                                            \
    }
ATTEND(attend_f16, PHI3C_F16)
ATTEND(attend_q8_0, PHI3C_Q8_0)

const phi3c_kernels phi3c_kernels_scalar = {
    .name = "scalar",
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
};
