/* SPDX-License-Identifier: MIT */
/* The kernels in plain C: what they compute, and in which order, is defined here. */
#include "../kernels.h"

#include <math.h>

#include "../expf.h"

/* -- weights of one row and 32 columns -------------------------------------------------------------------- */

static f16 half_at(const uint8_t *p, int lane) {
    f16 h;
    memcpy(&h, p + 2 * lane, 2);
    return h;
}

static float scale_at(const uint8_t *p, int lane) { return f16_to_f32(half_at(p, lane)); }

/* Value k (0-255) of the planes of six-bit scales; see put_planes in pack.c. */
static int plane_at(const uint8_t *planes, int k) {
    return (planes[k % 128] >> (k < 128 ? 0 : 4) & 15) | (planes[128 + k % 64] >> (2 * (k / 64)) & 3) << 4;
}

/* Byte of the panel that holds column c of row `lane` in an array of [columns / 4][16 rows][4]. */
static int at(const uint8_t *quads, int lane, int c) { return quads[c / 4 * 64 + lane * 4 + c % 4]; }

static int32_t dot32(const int w[32], const int8_t *q, int from, int to) {
    int32_t sum = 0;
    for (int c = from; c < to; c++) sum += w[c] * q[c];
    return sum;
}

/* -- legacy types: 32 columns share one float scale (and min) --------------------------------------------- */

typedef struct {
    int has_min, has_high_bit, bias;
} legacy;

/* n32 blocks of 32 columns: part = sum_j d_j (float)(sum_j << shift_j) [+ m_j (float)sum32_j], in order of j. */
static float legacy_part(legacy type, const uint8_t *p, int lane, const block_x8 *x, int n32) {
    const uint8_t *d = p, *m = d + n32 * 32, *qh = type.has_min ? m + n32 * 32 : m;
    const uint8_t *qs = type.has_high_bit ? qh + n32 * 64 : qh;
    float part = 0.0f;
    for (int j = 0; j < n32; j++) {
        int w[32];
        for (int c = 0; c < 32; c++) {
            int nibble = at(qs + j * 256, lane, c % 16) >> (c < 16 ? 0 : 4) & 15;
            int high = type.has_high_bit ? qh[j * 64 + lane * 4 + c % 4] >> (c / 4) & 1 : 0;
            w[c] = (nibble | high << 4) - type.bias;
        }
        int32_t sum = dot32(w, x->q + 32 * j, 0, 32) * (1 << x->shift[j]);
        part = fmaf(scale_at(d + j * 32, lane), (float)sum, part);
        if (type.has_min) part = fmaf(scale_at(m + j * 32, lane), (float)x->sum32[j], part);
    }
    return part;
}

static float q8_0_part(const uint8_t *p, int lane, const block_x8 *x, int n32) {
    const uint8_t *d = p, *qs = d + n32 * 32;
    float part = 0.0f;
    for (int j = 0; j < n32; j++) {
        int w[32];
        for (int c = 0; c < 32; c++) w[c] = at(qs + j * 512, lane, c) - 128;
        int32_t sum = dot32(w, x->q + 32 * j, 0, 32) * (1 << x->shift[j]);
        part = fmaf(scale_at(d + j * 32, lane), (float)sum, part);
    }
    return part;
}

/* -- K types: 256 columns, integer scales per group, all sums exact in int32 ------------------------------ */

/* part = d (float)sum - dmin (float)minsum: one rounding each, in this order. */
static float k_part(float d, int32_t sum, float dmin, int32_t minsum) {
    return fmaf(-dmin, (float)minsum, d * (float)sum);
}

static float q4_K_part(const uint8_t *p, int lane, const block_x8 *x, int has_high_bit) {
    const uint8_t *planes = p + 64, *qh = planes + 192, *qs = has_high_bit ? qh + 512 : qh;
    int32_t sum = 0, minsum = 0;
    for (int s = 0; s < 8; s++) {
        int w[32];
        for (int c = 0; c < 32; c++) {
            int nibble = at(qs + s / 2 * 512, lane, c) >> (s % 2 ? 4 : 0) & 15;
            int high = has_high_bit ? at(qh, lane, c) >> s & 1 : 0;
            w[c] = nibble | high << 4;
        }
        sum += dot32(w, x->q + 32 * s, 0, 32) * plane_at(planes, s * 16 + lane) * (1 << x->shift[s]);
        minsum += plane_at(planes, 128 + s / 2 * 32 + lane * 2 + s % 2) * x->sum32[s];
    }
    return k_part(scale_at(p, lane), sum, scale_at(p + 32, lane), minsum);
}

static float q6_K_part(const uint8_t *p, int lane, const block_x8 *x) {
    const uint8_t *scales = p + 32, *qh = scales + 256, *ql = qh + 1024;
    int32_t sum = 0;
    for (int s = 0; s < 8; s++) {
        int half = s / 4, j = s % 4, w[32]; /* columns 32 s of the block: quarter j of a half */
        for (int c = 0; c < 32; c++) {
            int nibble = at(ql + half * 1024 + j % 2 * 512, lane, c) >> (j / 2 * 4) & 15;
            w[c] = (nibble | (at(qh + half * 512, lane, c) >> (2 * j) & 3) << 4) - 32;
        }
        for (int g = 0; g < 2; g++)
            sum += dot32(w, x->q + 32 * s, 16 * g, 16 * g + 16) * (int8_t)scales[(2 * s + g) * 16 + lane] *
                   (1 << x->shift[s]);
    }
    return scale_at(p, lane) * (float)sum;
}

static float q3_K_part(const uint8_t *p, int lane, const block_x8 *x) {
    const uint8_t *planes = p + 32, *hmask = planes + 192, *qs = hmask + 512;
    int32_t sum = 0;
    for (int s = 0; s < 8; s++) {
        int half = s / 4, j = s % 4, w[32];
        for (int c = 0; c < 32; c++) {
            int low = at(qs + half * 512, lane, c) >> (2 * j) & 3;
            w[c] = (low | (at(hmask, lane, c) >> s & 1) << 2) - 4;
        }
        for (int g = 0; g < 2; g++)
            sum += dot32(w, x->q + 32 * s, 16 * g, 16 * g + 16) * (plane_at(planes, (2 * s + g) * 16 + lane) - 32) *
                   (1 << x->shift[s]);
    }
    return scale_at(p, lane) * (float)sum;
}

static float q2_K_part(const uint8_t *p, int lane, const block_x8 *x) {
    const uint8_t *scales = p + 64, *qs = scales + 256;
    int32_t sum = 0, minsum = 0;
    for (int s = 0; s < 8; s++) {
        int half = s / 4, j = s % 4, w[32];
        for (int c = 0; c < 32; c++) w[c] = at(qs + half * 512, lane, c) >> (2 * j) & 3;
        for (int g = 0; g < 2; g++) {
            int sc = scales[(2 * s + g) * 16 + lane];
            sum += dot32(w, x->q + 32 * s, 16 * g, 16 * g + 16) * (sc & 15) * (1 << x->shift[s]);
            minsum += (sc >> 4) * x->sum16[2 * s + g];
        }
    }
    return k_part(scale_at(p, lane), sum, scale_at(p + 32, lane), minsum);
}

static float part(int type, const uint8_t *p, int lane, const block_x8 *x, int n32) {
    switch (type) {
    case PHI3C_Q4_0: return legacy_part((legacy){0, 0, 8}, p, lane, x, n32);
    case PHI3C_Q4_1: return legacy_part((legacy){1, 0, 0}, p, lane, x, n32);
    case PHI3C_Q5_0: return legacy_part((legacy){0, 1, 16}, p, lane, x, n32);
    case PHI3C_Q5_1: return legacy_part((legacy){1, 1, 0}, p, lane, x, n32);
    case PHI3C_Q8_0: return q8_0_part(p, lane, x, n32);
    case PHI3C_Q2_K: return q2_K_part(p, lane, x);
    case PHI3C_Q3_K: return q3_K_part(p, lane, x);
    case PHI3C_Q4_K: return q4_K_part(p, lane, x, 0);
    case PHI3C_Q5_K: return q4_K_part(p, lane, x, 1);
    default: return q6_K_part(p, lane, x);
    }
}

/* out = sum over super-blocks, in order, of part * x.d, each joined by one fused multiply-add. */
static inline void quantised_tile(int type, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n,
                                  int64_t columns) {
    size_t bytes32 = phi3c_packed_bytes(type, 16, 256) / 8; /* of a panel, per 32 columns */
    for (int t = 0; t < n; t++)
        for (int lane = 0; lane < 16; lane++) {
            const block_x8 *block = (const block_x8 *)(x + (size_t)t * x_stride);
            const uint8_t *p = panel;
            float sum = 0.0f;
            for (int64_t left = columns / 32; left > 0; left -= 8, block++) {
                int n32 = left < 8 ? (int)left : 8;
                sum = fmaf(part(type, p, lane, block, n32), block->d, sum);
                p += bytes32 * (size_t)n32;
            }
            out[t * 16 + lane] = sum;
        }
}

/* Float weights: four partial sums, of columns 0, 1, 2 and 3 modulo 4, joined as (0 + 1) + (2 + 3). */
static inline void float_tile(int type, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n,
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

#define TILE(name, kind, type)                                                                                        \
    static void name(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n, int64_t columns) {   \
        kind(type, out, panel, x, x_stride, n, columns);                                                              \
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

/* -- activations ------------------------------------------------------------------------------------------ */

static uint32_t magnitude_bits(float x) { /* ordered like |x|, with infinities and then NaNs on top */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffffu;
}

/* A block whose largest magnitude is below 2^-100 is zero; one that holds an infinity or NaN becomes NaN. */
static void quantize_block(block_x8 *out, const float *x, int n) {
    uint32_t group_bits[8] = {0}, block_bits = 0;
    for (int i = 0; i < n; i++)
        if (magnitude_bits(x[i]) > group_bits[i / 32]) group_bits[i / 32] = magnitude_bits(x[i]);
    for (int j = 0; j < 8; j++)
        if (group_bits[j] > block_bits) block_bits = group_bits[j];
    float largest;
    memcpy(&largest, &block_bits, 4);

    memset(out, 0, sizeof *out);
    if (block_bits >= 0x7f800000u) {
        out->d = NAN;
        return;
    }
    if (largest < 0x1p-100f) return;
    out->d = largest / 1016.0f; /* 127 * 8 */
    float scale = 127.0f / largest;
    for (int j = 0; 32 * j < n; j++) {
        float group;
        memcpy(&group, &group_bits[j], 4);
        int doublings = (group * 2.0f <= largest) + (group * 4.0f <= largest) + (group * 8.0f <= largest);
        float group_scale = scale * (float)(1 << doublings);
        int sum[2] = {0, 0};
        for (int i = 0; i < 32; i++) {
            float q = x[32 * j + i] * group_scale;
            q = (q + PHI3C_ROUND) - PHI3C_ROUND; /* to nearest, ties to even */
            out->q[32 * j + i] = (int8_t)q;
            sum[i / 16] += (int)q;
        }
        out->shift[j] = 3 - doublings;
        out->nsum16[2 * j] = -sum[0];
        out->nsum16[2 * j + 1] = -sum[1];
        out->nsum32[j] = -(sum[0] + sum[1]);
        out->sum16[2 * j] = (int16_t)(sum[0] * (1 << out->shift[j]));
        out->sum16[2 * j + 1] = (int16_t)(sum[1] * (1 << out->shift[j]));
        out->sum32[j] = (int16_t)(out->sum16[2 * j] + out->sum16[2 * j + 1]);
    }
}

static void quantize_row(block_x8 *out, const float *x, int64_t columns) {
    for (; columns > 0; columns -= 256) {
        quantize_block(out++, x, columns < 256 ? (int)columns : 256);
        x += 256;
    }
}

/* Sum of 16 lanes by halves: lane i takes lane i + 8, then i + 4, i + 2, i + 1. */
static float sum_lanes(const float lanes[16]) {
    float sum[8];
    for (int i = 0; i < 8; i++) sum[i] = lanes[i] + lanes[i + 8];
    for (int width = 4; width; width /= 2)
        for (int i = 0; i < width; i++) sum[i] += sum[i + width];
    return sum[0];
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

static f16 f32_to_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (f16)(sign | 0x7e00 | (bits >> 13 & 0x3ff)); /* NaN, kept quiet */
    if (bits >= 0x47800000u) return (f16)(sign | 0x7c00);                       /* 65536 and more: inf */
    if (bits < 0x38800000u) {                                                   /* below 2^-14: subnormal */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        float shifted = magnitude + 0.5f; /* the last bit of 0.5f's mantissa is worth 2^-24 */
        memcpy(&bits, &shifted, 4);
        return (f16)(sign | (bits - 0x3f000000u));
    }
    bits += 0xfff + (bits >> 13 & 1); /* round to nearest, ties to even */
    return (f16)(sign | ((bits - 0x38000000u) >> 13));
}

static void to_f16(f16 *out, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = f32_to_f16(x[i]);
}

/* -- attention -------------------------------------------------------------------------------------------- */

static void attend_tile(float *max, float *sum, float *o, const float *q, const f16 *k, const f16 *v, const int *first,
                        const int *last, int n, int head_dim) {
    for (int i = 0; i < n; i++, q += head_dim, o += head_dim) {
        float p[PHI3C_TILE], largest = max[i];
        for (int j = 0; j < PHI3C_TILE; j++) {
            float score = 0.0f;
            for (int d = 0; d < head_dim; d++) score = fmaf(q[d], f16_to_f32(k[d * PHI3C_TILE + j]), score);
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
            for (int j = first[i]; j < last[i]; j++) value = fmaf(p[j], f16_to_f32(v[j * head_dim + d]), value);
            o[d] = value;
        }
    }
}

const phi3c_kernels phi3c_kernels_scalar = {
    .name = "scalar",
    .tile = {[PHI3C_F32] = tile_f32, [PHI3C_F16] = tile_f16, [PHI3C_BF16] = tile_bf16, [PHI3C_Q4_0] = tile_q4_0,
             [PHI3C_Q4_1] = tile_q4_1, [PHI3C_Q5_0] = tile_q5_0, [PHI3C_Q5_1] = tile_q5_1, [PHI3C_Q8_0] = tile_q8_0,
             [PHI3C_Q2_K] = tile_q2_K, [PHI3C_Q3_K] = tile_q3_K, [PHI3C_Q4_K] = tile_q4_K, [PHI3C_Q5_K] = tile_q5_K,
             [PHI3C_Q6_K] = tile_q6_K},
    .attend_tile = attend_tile,
    .quantize_row = quantize_row,
    .rms_norm_row = rms_norm_row,
    .silu_mul_row = silu_mul_row,
    .to_f16 = to_f16,
};
