/* SPDX-License-Identifier: MIT */
/* Tiles of quantised weights for ARM's instruction sets, which differ in one thing: how four columns of int8 are
 * multiplied and added up. Each kernel file defines dot() below with what its set has.
 *
 * A lane is a row of the panel: a register holds four columns of 4 rows, a quad, and 16 rows are four quads. No sum
 * ever crosses lanes but that of the four columns. Bytes shift by themselves, so unpacking nibbles takes one operation.
 * Few tokens unpack weights as they multiply. Many unpack a super-block to bytes first, 4 KB that stay in L1, and go
 * over it TOKENS at a time: 4 quads times 4 tokens are 16 sums, half of the registers. */
#ifndef PHI3C_QUANTISED_H
#define PHI3C_QUANTISED_H

#include <arm_neon.h>

#include "../kernels.h"

enum { QUADS = 4, TOKENS = 4 };

INLINE float32x4_t load_halves(const uint8_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); /* exact; FPCR.FZ16 leaves conversions alone */
}

/* Bits `from` and up of every byte, cut to mask. */
INLINE uint8x16_t bits(uint8x16_t v, int from, uint8_t mask) { return vandq_u8(v >> (uint8_t)from, vdupq_n_u8(mask)); }

INLINE uint8x16_t low_nibbles(uint8x16_t v) { return vandq_u8(v, vdupq_n_u8(15)); }
/* `high` above the low nibble of v. */
INLINE uint8x16_t above_nibble(uint8x16_t v, uint8x16_t high) { return vsliq_n_u8(v, high, 4); }

INLINE const block_x8 *token(const uint8_t *x, size_t x_stride, int t) {
    return (const block_x8 *)(x + (size_t)t * x_stride);
}

/* -sum of q over group s of 32 columns. */
INLINE int nsum32(const block_x8 *block, int s) { return block->nsum16[2 * s] + block->nsum16[2 * s + 1]; }

/* Sums of q * factor over 16 columns, for the mins of q2_K. */
INLINE void factored_sums(int16_t sums[16], const block_x8 *block) {
    int16x8_t factors = vnegq_s16(vreinterpretq_s16_u16(vmovl_u8(vld1_u8(block->factor))));
    vst1q_s16(sums, vmulq_s16(vld1q_s16(block->nsum16), vzip1q_s16(factors, factors)));
    vst1q_s16(sums + 8, vmulq_s16(vld1q_s16(block->nsum16 + 8), vzip2q_s16(factors, factors)));
}

/* Of the K types; of the others they have 16 columns. */
INLINE int has_groups_of_32(const int type) { return type == PHI3C_Q4_K || type == PHI3C_Q5_K || type == PHI3C_IQ4_XS; }

INLINE int has_min(const int type) {
    return type == PHI3C_Q4_1 || type == PHI3C_Q5_1 || type == PHI3C_Q2_K || type == PHI3C_Q4_K || type == PHI3C_Q5_K;
}

/* By how much the bytes of unpack() exceed the weights. */
INLINE int bias_of(const int type) {
    switch (type) {
    case PHI3C_Q3_K: return 4;
    case PHI3C_Q4_0: return 8;
    case PHI3C_Q5_0: return 16;
    case PHI3C_Q6_K: return 32;
    default: return 0;
    }
}

/* Groups of 32 columns whose weights lie in the same bytes. */
INLINE int groups_together(const int type) {
    if (has_blocks_of_32(type) || type == PHI3C_IQ4_XS) return 1;
    return has_groups_of_32(type) ? 2 : 4;
}

/* A super-block of a panel with its scales made ready, by groups of columns and quads of rows. */
typedef struct {
    const uint8_t *panel;       /* the packed super-block */
    int n32;                    /* its groups of 32 columns */
    int32x4_t scale[16][QUADS]; /* K types: by groups of 32 or 16 columns */
    int16x4_t min[16][QUADS];
    float32x4_t d[8][QUADS], m[8][QUADS]; /* legacy types: by groups of 32; K types: [0], d and dmin */
} super_block;

/* Columns 4 g to 4 g + 3 of group `base + j`, where base is a multiple of groups_together() and j below it. From 0 to
 * 63, but all of int8 for q8_0 and iq4. */
INLINE int8x16_t unpack(const int type, const super_block *w, int quad, int base, const int j, const int g) {
    const uint8_t *p = w->panel + 16 * quad; /* in every array of [16 rows][4] bytes */
    uint8x16_t v, h;
    if (type == PHI3C_Q8_0) {
        v = veorq_u8(vld1q_u8(p + w->n32 * 32 + base * 512 + g * 64), vdupq_n_u8(0x80));
    } else if (type == PHI3C_Q4_0 || type == PHI3C_Q4_1) {
        v = vld1q_u8(p + w->n32 * (type == PHI3C_Q4_0 ? 32 : 64) + base * 256 + g % 4 * 64);
        v = g < 4 ? low_nibbles(v) : v >> 4;
    } else if (type == PHI3C_IQ4_NL || type == PHI3C_IQ4_XS) {
        v = vld1q_u8(p + (type == PHI3C_IQ4_NL ? w->n32 * 32 : 32 + 32 + 64) + base * 256 + g % 4 * 64);
        return vqtbl1q_s8(vld1q_s8(iq4_values), g < 4 ? low_nibbles(v) : v >> 4);
    } else if (type == PHI3C_Q5_0 || type == PHI3C_Q5_1) {
        const uint8_t *qh = p + w->n32 * (type == PHI3C_Q5_0 ? 32 : 64);
        v = vld1q_u8(qh + w->n32 * 64 + base * 256 + g % 4 * 64);
        h = bits(vld1q_u8(qh + base * 64), g, 1);
        v = above_nibble(g < 4 ? v : v >> 4, h);
    } else if (has_groups_of_32(type)) {
        const uint8_t *qh = p + 64 + 192, *qs = type == PHI3C_Q5_K ? qh + 512 : qh;
        v = vld1q_u8(qs + base * 256 + g * 64);
        if (type == PHI3C_Q4_K)
            v = j ? v >> 4 : low_nibbles(v);
        else
            v = above_nibble(j ? v >> 4 : v, bits(vld1q_u8(qh + g * 64), base + j, 1));
    } else if (type == PHI3C_Q2_K) {
        v = bits(vld1q_u8(p + 64 + 256 + base * 128 + g * 64), 2 * j, 3);
    } else if (type == PHI3C_Q3_K) {
        const uint8_t *hmask = p + 32 + 192;
        v = bits(vld1q_u8(hmask + 512 + base * 128 + g * 64), 2 * j, 3);
        v = vorrq_u8(v, bits(vld1q_u8(hmask + g * 64), base + j, 1) << 2);
    } else { /* q6_K */
        const uint8_t *qh = p + 32 + 256;
        v = vld1q_u8(qh + 1024 + base * 256 + j % 2 * 512 + g * 64);
        v = above_nibble(j < 2 ? v : v >> 4, bits(vld1q_u8(qh + base * 128 + g * 64), 2 * j, 3));
    }
    return vreinterpretq_s8_u8(v);
}

/* The same out of `bytes`, [8 groups][8][16 rows][4], where weights were unpacked there. */
INLINE int8x16_t weights(const int type, const super_block *w, const uint8_t *bytes, int quad, int base, const int j,
                         const int g) {
    if (bytes) return vreinterpretq_s8_u8(vld1q_u8(bytes + ((base + j) * 8 + g) * 64 + quad * 16));
    return unpack(type, w, quad, base, j, g);
}

/* sum[quad][t] += columns 4 from to 4 to - 1 of group `base + j` times token t, for M tokens. to - from is 4 or 8. */
static void dot(const int type, const int M, int32x4_t sum[QUADS][TOKENS], const int from, const int to,
                const super_block *w, const uint8_t *bytes, int base, const int j, const uint8_t *x, size_t x_stride);

/* Legacy types: 32 columns, one float scale (and min). */
INLINE void legacy_super(const int type, const int M, float32x4_t part[QUADS][TOKENS], const super_block *w,
                         const uint8_t *bytes, const uint8_t *x, size_t x_stride) {
    UNROLL for (int t = 0; t < M; t++) UNROLL for (int q = 0; q < QUADS; q++) part[q][t] = vdupq_n_f32(0.0f);
    for (int s = 0; s < w->n32; s++) {
        int32x4_t sum[QUADS][TOKENS];
        UNROLL for (int t = 0; t < M; t++) UNROLL for (int q = 0; q < QUADS; q++) sum[q][t] =
            vdupq_n_s32(nsum32(token(x, x_stride, t), s) * bias_of(type));
        dot(type, M, sum, 0, 8, w, bytes, s, 0, x, x_stride);
        UNROLL for (int t = 0; t < M; t++) {
            const block_x8 *block = token(x, x_stride, t);
            UNROLL for (int q = 0; q < QUADS; q++) {
                float32x4_t v = vcvtq_f32_s32(vmulq_n_s32(sum[q][t], block->factor[s]));
                part[q][t] = vfmaq_f32(part[q][t], w->d[s][q], v);
                if (has_min(type)) part[q][t] = vfmaq_n_f32(part[q][t], w->m[s][q], (float)block->sum32[s]);
            }
        }
    }
}

/* K types: groups of 32 or 16 columns with an integer scale (and min). */
INLINE void k_super(const int type, const int M, float32x4_t part[QUADS][TOKENS], const super_block *w,
                    const uint8_t *bytes, const uint8_t *x, size_t x_stride) {
    const int bias = bias_of(type), together = groups_together(type),
              parts = has_groups_of_32(type) ? 1 : 2; /* of 32 columns, with a scale each */
    int32x4_t total[QUADS][TOKENS];
    UNROLL for (int t = 0; t < M; t++) UNROLL for (int q = 0; q < QUADS; q++) total[q][t] = vdupq_n_s32(0);
    for (int base = 0; base < 8; base += together) UNROLL for (int j = 0; j < together; j++) {
            const int s = base + j;
            UNROLL for (int i = 0; i < parts; i++) {
                int32x4_t sum[QUADS][TOKENS];
                UNROLL for (int t = 0; t < M; t++) UNROLL for (int q = 0; q < QUADS; q++) sum[q][t] =
                    vdupq_n_s32(bias ? token(x, x_stride, t)->nsum16[2 * s + i] * bias : 0);
                dot(type, M, sum, 4 * i, parts == 1 ? 8 : 4 * i + 4, w, bytes, base, j, x, x_stride);
                UNROLL for (int t = 0; t < M; t++) {
                    int32_t factor = token(x, x_stride, t)->factor[s];
                    UNROLL for (int q = 0; q < QUADS; q++) total[q][t] =
                        vmlaq_s32(total[q][t], sum[q][t], vmulq_n_s32(w->scale[parts * s + i][q], factor));
                }
            }
        }
    UNROLL for (int t = 0; t < M; t++) {
        const block_x8 *block = token(x, x_stride, t);
        int32x4_t minsum[QUADS];
        UNROLL for (int q = 0; q < QUADS; q++) {
            part[q][t] = vmulq_f32(w->d[0][q], vcvtq_f32_s32(total[q][t]));
            minsum[q] = vdupq_n_s32(0);
        }
        if (!has_min(type)) continue;
        int16_t sum16[16];
        if (parts == 2) factored_sums(sum16, block);
        const int16_t *sums = parts == 1 ? block->sum32 : sum16;
        UNROLL for (int i = 0; i < 8 * parts; i++) UNROLL for (int q = 0; q < QUADS; q++) minsum[q] =
            vmlal_n_s16(minsum[q], w->min[i][q], sums[i]);
        UNROLL for (int q = 0; q < QUADS; q++) part[q][t] = vfmsq_f32(part[q][t], w->m[0][q], vcvtq_f32_s32(minsum[q]));
    }
}

/* out[t] += a super-block times M blocks. */
INLINE void multiply_blocks(const int type, const int M, float *out, const super_block *w, const uint8_t *bytes,
                            const uint8_t *x, size_t x_stride) {
    float32x4_t part[QUADS][TOKENS];
    if (has_blocks_of_32(type))
        legacy_super(type, M, part, w, bytes, x, x_stride);
    else
        k_super(type, M, part, w, bytes, x, x_stride);
    UNROLL for (int t = 0; t < M; t++) UNROLL for (int q = 0; q < QUADS; q++) {
        float *sum = out + t * 16 + q * 4;
        vst1q_f32(sum, vfmaq_n_f32(vld1q_f32(sum), part[q][t], token(x, x_stride, t)->d));
    }
}

/* Weights q of column c of group s as floats; see float_weight_at in kernels_scalar.c. */
INLINE float32x4_t float_weights(const int type, const super_block *w, int quad, int32x4_t q, int s, int c) {
    q = vsubq_s32(q, vdupq_n_s32(bias_of(type)));
    if (has_blocks_of_32(type)) {
        float32x4_t v = vcvtq_f32_s32(q), d = w->d[s][quad];
        return has_min(type) ? vfmaq_f32(w->m[s][quad], d, v) : vmulq_f32(d, v);
    }
    const int i = has_groups_of_32(type) ? s : 2 * s + c / 16;
    float32x4_t v = vmulq_f32(w->d[0][quad], vcvtq_f32_s32(vmulq_s32(w->scale[i][quad], q)));
    return has_min(type) ? vfmsq_f32(v, w->m[0][quad], vcvtq_f32_s32(vmovl_s16(w->min[i][quad]))) : v;
}

/* Weights of a column as floats. */
INLINE void column_weights(const int type, float32x4_t v[QUADS], const super_block *w, const uint8_t *bytes,
                           int column) {
    const int s = column / 32, c = column % 32, j = s % groups_together(type);
    const int32x4_t above = vdupq_n_s32(24 - c % 4 * 8); /* bits of a lane */
    UNROLL for (int quad = 0; quad < QUADS; quad++) {
        int32x4_t q = vreinterpretq_s32_s8(weights(type, w, bytes, quad, s - j, j, c / 4));
        v[quad] = float_weights(type, w, quad, vshrq_n_s32(vshlq_s32(q, above), 24), s, c);
    }
}

INLINE void add_column(float *out, const float32x4_t v[QUADS], float x) {
    UNROLL for (int quad = 0; quad < QUADS; quad++)
        vst1q_f32(out + 4 * quad, vfmaq_n_f32(vld1q_f32(out + 4 * quad), v[quad], x));
}

/* out[t] += a super-block times the outliers of n rows, by column: where they are listed, from the list, as rows tend
 * to have them in the same columns. */
INLINE void multiply_outliers(const int type, float *out, const super_block *w, const uint8_t *bytes,
                              const outliers_x8 *first, size_t x_stride, int n, const outlier_list *list) {
    float32x4_t v[QUADS];
    if (list) {
        for (uint32_t i = 0; i < list->n;) {
            const int column = list->outliers[i].column;
            column_weights(type, v, w, bytes, column);
            do {
                add_column(out + list->outliers[i].row * 16, v, list->outliers[i].x);
                i++;
            } while (i < list->n && list->outliers[i].column == column);
        }
        return;
    }
    for (int t = 0; t < n; t++) {
        const outliers_x8 *outliers = outliers_at(first, x_stride, t);
        for (int i = 0; i < outliers->n; i++) {
            column_weights(type, v, w, bytes, outliers->column[i]);
            add_column(out + t * 16, v, outliers->x[i]);
        }
    }
}

/* The 256 six-bit numbers of a FIELD_SCALE or FIELD_SCALE_MIN, as bytes. */
INLINE void unpack_planes(uint8_t v[256], const uint8_t *planes) {
    for (int i = 0; i < 64; i += 16) {
        uint8x16_t low0 = vld1q_u8(planes + i), low1 = vld1q_u8(planes + 64 + i), high = vld1q_u8(planes + 128 + i);
        vst1q_u8(v + i, above_nibble(low0, bits(high, 0, 3)));
        vst1q_u8(v + 64 + i, above_nibble(low1, bits(high, 2, 3)));
        vst1q_u8(v + 128 + i, above_nibble(low0 >> 4, bits(high, 4, 3)));
        vst1q_u8(v + 192 + i, above_nibble(low1 >> 4, bits(high, 6, 3)));
    }
}

/* 16 bytes as int16, by quads. */
INLINE void widen_u8(int16x4_t out[QUADS], uint8x16_t v) {
    int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(v)));
    int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(v));
    out[0] = vget_low_s16(low), out[1] = vget_high_s16(low), out[2] = vget_low_s16(high), out[3] = vget_high_s16(high);
}

INLINE void widen_s8(int16x4_t out[QUADS], uint8x16_t v) {
    int16x8_t low = vmovl_s8(vget_low_s8(vreinterpretq_s8_u8(v))), high = vmovl_high_s8(vreinterpretq_s8_u8(v));
    out[0] = vget_low_s16(low), out[1] = vget_high_s16(low), out[2] = vget_low_s16(high), out[3] = vget_high_s16(high);
}

/* Scales of 8 groups: 4 bits of each in scales_l, two groups a byte, and two in scales_h. */
INLINE void unpack_iq4_xs_scales(uint8_t v[128], const uint8_t *panel) {
    uint8x16x2_t high = vld2q_u8(panel + 32); /* of groups 0-3, and 4-7 */
    for (int s = 0; s < 8; s++) {
        uint8x16_t low = vld1q_u8(panel + 64 + s / 2 * 16);
        vst1q_u8(v + 16 * s, above_nibble(s % 2 ? low >> 4 : low, bits(high.val[s / 4], s % 4 * 2, 3)));
    }
}

INLINE void unpack_scales(const int type, super_block *w) {
    const uint8_t *p = w->panel;
    const int n = has_blocks_of_32(type) ? w->n32 : 1;
    for (int s = 0; s < n; s++) UNROLL for (int q = 0; q < QUADS; q++) {
            w->d[s][q] = load_halves(p + s * 32 + q * 8);
            if (has_min(type)) w->m[s][q] = load_halves(p + (n + s) * 32 + q * 8);
        }
    if (has_blocks_of_32(type)) return;

    uint8_t v[256];
    const uint8_t *scales = p + (type == PHI3C_Q2_K ? 64 : 32);
    if (type == PHI3C_Q3_K || type == PHI3C_Q4_K || type == PHI3C_Q5_K) {
        unpack_planes(v, p + (type == PHI3C_Q3_K ? 32 : 64));
        scales = v;
    } else if (type == PHI3C_IQ4_XS) {
        unpack_iq4_xs_scales(v, p);
        scales = v;
    }
    for (int i = 0; i < (has_groups_of_32(type) ? 8 : 16); i++) {
        uint8x16_t bytes = vld1q_u8(scales + 16 * i);
        int16x4_t scale[QUADS];
        if (type == PHI3C_Q6_K)
            widen_s8(scale, bytes);
        else if (type == PHI3C_Q3_K || type == PHI3C_IQ4_XS)
            widen_s8(scale, vsubq_u8(bytes, vdupq_n_u8(32)));
        else
            widen_u8(scale, type == PHI3C_Q2_K ? low_nibbles(bytes) : bytes);
        UNROLL for (int q = 0; q < QUADS; q++) w->scale[i][q] = vmovl_s16(scale[q]);
        if (type == PHI3C_Q2_K) widen_u8(w->min[i], bytes >> 4); /* min << 4 | scale */
    }
    for (int pair = 0; (type == PHI3C_Q4_K || type == PHI3C_Q5_K) && pair < 4; pair++) {
        uint8x16x2_t mins = vld2q_u8(v + 128 + 32 * pair); /* of two groups, side by side */
        widen_u8(w->min[2 * pair], mins.val[0]);
        widen_u8(w->min[2 * pair + 1], mins.val[1]);
    }
}

INLINE void unpack_weights(const int type, uint8_t *bytes, const super_block *w) {
    for (int base = 0; base < w->n32; base += groups_together(type))
        UNROLL for (int j = 0; j < groups_together(type); j++) UNROLL for (int g = 0; g < 8;
                                                                           g++) UNROLL for (int q = 0; q < QUADS; q++)
            vst1q_u8(bytes + ((base + j) * 8 + g) * 64 + q * 16, vreinterpretq_u8_s8(unpack(type, w, q, base, j, g)));
}

INLINE void quantised_tile(const int type, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n,
                           int64_t columns, const outlier_list *list) {
    const size_t bytes32 = phi3c_packed_bytes(type, 16, 256) / 8;
    const outliers_x8 *outliers = outliers_of(x, columns);
    memset(out, 0, (size_t)n * 16 * sizeof(float));
    for (int64_t left = columns / 32; left > 0; left -= 8) {
        super_block w; /* not cleared: 2.5 KB, of which each type uses a part */
        uint8_t bytes[4096];
        w.panel = panel;
        w.n32 = left < 8 ? (int)left : 8;
        unpack_scales(type, &w);
        int t = 0;
        if (n >= TOKENS) {
            unpack_weights(type, bytes, &w);
            for (; n - t >= TOKENS; t += TOKENS)
                multiply_blocks(type, TOKENS, out + t * 16, &w, bytes, x + (size_t)t * x_stride, x_stride);
        }
        for (; n - t >= 2; t += 2) multiply_blocks(type, 2, out + t * 16, &w, NULL, x + (size_t)t * x_stride, x_stride);
        if (n - t == 1) multiply_blocks(type, 1, out + t * 16, &w, NULL, x + (size_t)t * x_stride, x_stride);
        multiply_outliers(type, out, &w, n >= TOKENS ? bytes : NULL, outliers, x_stride, n, list);
        panel += bytes32 * (size_t)w.n32;
        x += sizeof(block_x8);
        outliers++;
        if (list) list = list_at(list, 1, n);
    }
}

#define TILE(name, type)                                                                                               \
    static void name(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n, int64_t columns,      \
                     const outlier_list *lists) {                                                                      \
        quantised_tile(type, out, panel, x, x_stride, n, columns, lists);                                              \
    }
TILE(tile_q4_0, PHI3C_Q4_0)
TILE(tile_q4_1, PHI3C_Q4_1)
TILE(tile_q5_0, PHI3C_Q5_0)
TILE(tile_q5_1, PHI3C_Q5_1)
TILE(tile_q8_0, PHI3C_Q8_0)
TILE(tile_q2_K, PHI3C_Q2_K)
TILE(tile_q3_K, PHI3C_Q3_K)
TILE(tile_q4_K, PHI3C_Q4_K)
TILE(tile_q5_K, PHI3C_Q5_K)
TILE(tile_q6_K, PHI3C_Q6_K)
TILE(tile_iq4_nl, PHI3C_IQ4_NL)
TILE(tile_iq4_xs, PHI3C_IQ4_XS)

#endif
