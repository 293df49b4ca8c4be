/* SPDX-License-Identifier: MIT */
/* Tiles of quantised weights in 256-bit registers, for AVX2 and AVX-VNNI, which differ in one thing: how four columns
 * of int8 are multiplied and added up. Each kernel file defines scaled_dot() below with what its set has.
 *
 * A lane is a row of the panel: a ymm register holds four columns of 8 rows, and every step takes both halves of the 16
 * rows. No sum ever crosses lanes.
 *
 * Few tokens unpack weights as they multiply. Many unpack a super-block to bytes first, 4 KB that stay in L1, and go
 * over it TOKENS at a time: 16 rows times 4 tokens are 8 sums, which leaves registers for weights and
 * activations (docs/performance.md has 2, 3, 5 and 6). */
#ifndef PHI3C_QUANTISED_H
#define PHI3C_QUANTISED_H

#include <immintrin.h>

#include "../kernels.h"

/* Sums of integers are associative, which gcc takes as leave to turn a chain of them into a tree, for which 16
 * registers do not suffice. This keeps a sum in its register and in its order. */
#ifdef __GNUC__
#define KEEP(sum) __asm__("" : "+x"(sum))
#else
#define KEEP(sum)
#endif

enum { TOKENS = 4 };

INLINE __m256i load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE __m128i load16(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE __m128i load8(const uint8_t *p) { return _mm_loadl_epi64((const __m128i *)p); }
INLINE __m256 load_halves(const uint8_t *p) { return _mm256_cvtph_ps(load16(p)); }
INLINE __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
INLINE __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }

/* Bits `from` and up of every byte, moved to `to` and cut to mask. */
INLINE __m256i bits(__m256i v, int from, int to, int mask) {
    v = from > to ? _mm256_srli_epi16(v, from - to) : _mm256_slli_epi16(v, to - from);
    return _mm256_and_si256(v, _mm256_set1_epi8((char)(mask << to)));
}

/* Bits cross from one byte to the next: cut with bits(). */
INLINE __m256i shift_right(__m256i v, int count) { return _mm256_srl_epi16(v, _mm_cvtsi32_si128(count)); }

INLINE __m256i broadcast32(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

/* Pairs of 16-bit numbers: even ones of a, odd ones of b. */
INLINE __m256i even_odd(__m256i a, __m256i b) { return _mm256_blend_epi16(a, b, 0xaa); }
/* int32 that fit int16, in both halves of their lanes. */
INLINE __m256i twice(__m256i v) { return even_odd(v, _mm256_slli_epi32(v, 16)); }

/* Of the K types; of the others they have 16 columns. */
INLINE int has_groups_of_32(const int type) { return type == PHI3C_Q4_K || type == PHI3C_Q5_K || type == PHI3C_IQ4_XS; }

/* Groups of 32 that share bytes of a panel: which bits are a group's, its place among these says. */
INLINE int groups_together(const int type) { return has_blocks_of_32(type) ? 1 : has_groups_of_32(type) ? 2 : 4; }

/* Types whose weights are signed bytes; those of the others are unsigned. */
INLINE int is_signed(const int type) { return type == PHI3C_Q8_0 || type == PHI3C_IQ4_NL || type == PHI3C_IQ4_XS; }

INLINE __m256i iq4_lookup(__m256i codes) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16((const uint8_t *)iq4_values)), codes);
}

INLINE const block_x8 *token(const uint8_t *x, size_t x_stride, int t) {
    return (const block_x8 *)(x + (size_t)t * x_stride);
}

/* Sums of q * factor over 16 columns. */
INLINE void factored_sums(int16_t sums[16], const block_x8 *block) {
    __m128i factors = _mm_sub_epi16(_mm_setzero_si128(), _mm_cvtepu8_epi16(load8(block->factor)));
    __m256i twice = _mm256_set_m128i(_mm_unpackhi_epi16(factors, factors), _mm_unpacklo_epi16(factors, factors));
    __m256i nsum16 = load((const uint8_t *)block->nsum16);
    _mm256_storeu_si256((__m256i *)sums, _mm256_mullo_epi16(nsum16, twice));
}

/* Columns 4 g to 4 g + 3 of 32-column group `base + j` in a super-block of n32, for half 0 or 1 of the rows. base is a
 * multiple of groups_together(). */
INLINE __m256i weights4(const int type, const uint8_t *p, int half, int base, const int j, const int g, int n32) {
    const uint8_t *q = p + 32 * half; /* in every array of [16 rows][4] bytes */
    __m256i v;
    if (type == PHI3C_Q8_0) return _mm256_xor_si256(load(q + n32 * 32 + base * 512 + g * 64), _mm256_set1_epi8(-128));
    if (type == PHI3C_Q4_0 || type == PHI3C_Q4_1) {
        v = load(q + n32 * (type == PHI3C_Q4_0 ? 32 : 64) + base * 256 + g % 4 * 64);
        return g < 4 ? low_nibbles(v) : high_nibbles(v);
    }
    if (type == PHI3C_IQ4_NL || type == PHI3C_IQ4_XS) {
        const uint8_t *qs = q + (type == PHI3C_IQ4_NL ? n32 * 32 : 32 + 32 + 64);
        v = load(qs + (base + j) * 256 + g % 4 * 64);
        return iq4_lookup(g < 4 ? low_nibbles(v) : high_nibbles(v));
    }
    if (type == PHI3C_Q5_0 || type == PHI3C_Q5_1) {
        const uint8_t *qh = q + n32 * (type == PHI3C_Q5_0 ? 32 : 64);
        v = load(qh + n32 * 64 + base * 256 + g % 4 * 64);
        return _mm256_or_si256(g < 4 ? low_nibbles(v) : high_nibbles(v), bits(load(qh + base * 64), g, 4, 1));
    }
    if (type == PHI3C_Q4_K || type == PHI3C_Q5_K) {
        const uint8_t *qh = q + 64 + 192, *qs = type == PHI3C_Q5_K ? qh + 512 : qh;
        v = load(qs + base * 256 + g * 64);
        v = j ? high_nibbles(v) : low_nibbles(v);
        return type == PHI3C_Q4_K ? v : _mm256_or_si256(v, bits(shift_right(load(qh + g * 64), base), j, 4, 1));
    }
    if (type == PHI3C_Q2_K) return bits(load(q + 64 + 256 + base * 128 + g * 64), 2 * j, 0, 3);
    if (type == PHI3C_Q3_K) {
        const uint8_t *hmask = q + 32 + 192;
        v = bits(load(hmask + 512 + base * 128 + g * 64), 2 * j, 0, 3);
        return _mm256_or_si256(v, bits(shift_right(load(hmask + g * 64), base), j, 2, 1));
    }
    const uint8_t *qh = q + 32 + 256; /* q6_K */
    v = load(qh + 1024 + base * 256 + j % 2 * 512 + g * 64);
    return _mm256_or_si256(j < 2 ? low_nibbles(v) : high_nibbles(v), bits(load(qh + base * 128 + g * 64), 2 * j, 4, 3));
}

/* A super-block of a panel with its scales made ready, for both halves of the rows. */
typedef struct {
    const uint8_t *panel; /* the packed super-block */
    int n32;
    __m256i scale[16][2];    /* K types: int16, twice a lane, by groups of 32 or 16 columns */
    __m256i min[8][2];       /* K types: pairs for vpmaddwd with two sums of 32 (at even groups) or 16 columns */
    __m256 d[8][2], m[8][2]; /* legacy types: by groups of 32; K types: [0], d and dmin */
} super_block;

/* sum[half][t] = scale[half] * (columns 4 from to 4 to - 1 of group base + j, times token t), for M tokens. `scale` is
 * int16, twice a lane. Weights are read out of `bytes`, [8 groups][8][16 rows][4], where they were unpacked there. */
static void scaled_dot(const int type, const int M, __m256i sum[2][TOKENS], const int from, const int to,
                       const __m256i scale[2], const super_block *w, const uint8_t *bytes, int base, const int j,
                       const uint8_t *x, size_t x_stride);

/* Columns 4 g to 4 g + 3 of group `base + j`, for half 0 or 1 of the rows. */
INLINE __m256i weights(const int type, const super_block *w, const uint8_t *bytes, int half, int base, const int j,
                       const int g) {
    if (bytes) return load(bytes + ((base + j) * 8 + g) * 64 + half * 32);
    return weights4(type, w->panel, half, base, j, g, w->n32);
}

/* Legacy types: part += group s, 32 columns with one float scale (and min). */
INLINE void legacy_group(const int type, const int M, __m256 part[2][TOKENS], const super_block *w,
                         const uint8_t *bytes, const int s, const uint8_t *x, size_t x_stride) {
    const int bias = type == PHI3C_Q4_0 ? 3 : 4; /* log2; of q4_0 and q5_0 */
    const int has_min = type == PHI3C_Q4_1 || type == PHI3C_Q5_1, has_bias = !has_min && !is_signed(type);
    const __m256i ones[2] = {_mm256_set1_epi16(1), _mm256_set1_epi16(1)};
    __m256i sum[2][TOKENS];
    scaled_dot(type, M, sum, 0, 8, ones, w, bytes, s, 0, x, x_stride);
    UNROLL for (int t = 0; t < M; t++) UNROLL for (int half = 0; half < 2; half++) {
        const block_x8 *block = token(x, x_stride, t);
        __m256i v = sum[half][t];
        v = _mm256_mullo_epi32(v, _mm256_set1_epi32(block->factor[s]));
        if (has_bias) v = _mm256_sub_epi32(v, _mm256_set1_epi32(block->sum32[s] * (1 << bias)));
        part[half][t] = _mm256_fmadd_ps(w->d[s][half], _mm256_cvtepi32_ps(v), part[half][t]);
        if (has_min) {
            __m256 sum32 = _mm256_set1_ps((float)block->sum32[s]);
            part[half][t] = _mm256_fmadd_ps(w->m[s][half], sum32, part[half][t]);
        }
    }
}

/* K types: total += group base + j, 32 columns with one integer scale or two. */
INLINE void k_group(const int type, const int M, __m256i total[2][TOKENS], const super_block *w, const uint8_t *bytes,
                    int base, const int j, const uint8_t *x, size_t x_stride) {
    const int s = base + j;
    __m256i sum[2][TOKENS], second[2][TOKENS];
    if (has_groups_of_32(type))
        scaled_dot(type, M, sum, 0, 8, w->scale[s], w, bytes, base, j, x, x_stride);
    else {
        scaled_dot(type, M, sum, 0, 4, w->scale[2 * s], w, bytes, base, j, x, x_stride);
        scaled_dot(type, M, second, 4, 8, w->scale[2 * s + 1], w, bytes, base, j, x, x_stride);
    }
    UNROLL for (int t = 0; t < M; t++) {
        __m256i factor = _mm256_set1_epi32(token(x, x_stride, t)->factor[s]);
        UNROLL for (int half = 0; half < 2; half++) {
            __m256i v = sum[half][t];
            if (!has_groups_of_32(type)) v = _mm256_add_epi32(v, second[half][t]);
            total[half][t] = _mm256_add_epi32(total[half][t], _mm256_mullo_epi32(v, factor));
            KEEP(total[half][t]);
        }
    }
}

/* K types: what a super-block adds up to for half the rows. minsum is the sum of mins times activations, or of scales
 * times activations for the types whose weights have a bias: |minsum| is at most 16 * 128 * 16256 < 2^25, and a biased
 * sum is exact modulo 2^32. */
INLINE __m256 k_part(const int type, const super_block *w, const int half, __m256i total, __m256i minsum) {
    if (type == PHI3C_Q6_K) total = _mm256_sub_epi32(total, _mm256_slli_epi32(minsum, 5));
    if (type == PHI3C_Q3_K) total = _mm256_sub_epi32(total, _mm256_slli_epi32(minsum, 2));
    __m256 part = _mm256_mul_ps(w->d[0][half], _mm256_cvtepi32_ps(total));
    if (type != PHI3C_Q4_K && type != PHI3C_Q5_K && type != PHI3C_Q2_K) return part;
    return _mm256_fnmadd_ps(w->m[0][half], _mm256_cvtepi32_ps(minsum), part);
}

/* out[t] += a super-block times M blocks. */
INLINE void multiply_blocks(const int type, const int M, float *out, const super_block *w, const uint8_t *bytes,
                            const uint8_t *x, size_t x_stride) {
    const int step = bytes ? 1 : groups_together(type), min_step = has_groups_of_32(type) ? 2 : 1;
    __m256 part[2][TOKENS];
    if (has_blocks_of_32(type)) {
        UNROLL for (int t = 0; t < M; t++) part[0][t] = part[1][t] = _mm256_setzero_ps();
        for (int s = 0; s < w->n32; s++) legacy_group(type, M, part, w, bytes, s, x, x_stride);
    } else {
        __m256i total[2][TOKENS];
        int16_t sum16[TOKENS][16];
        UNROLL for (int t = 0; t < M; t++) {
            total[0][t] = total[1][t] = _mm256_setzero_si256();
            if (min_step == 1) factored_sums(sum16[t], token(x, x_stride, t));
        }
        for (int base = 0; base < 8; base += step)
            UNROLL for (int j = 0; j < step; j++) k_group(type, M, total, w, bytes, base, j, x, x_stride);
        UNROLL for (int t = 0; t < M; t++) {
            const block_x8 *block = token(x, x_stride, t);
            __m256i minsum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
            UNROLL for (int s = 0; s < 8; s += min_step) {
                if (type == PHI3C_IQ4_XS) continue;
                __m256i sums = broadcast32(min_step == 2 ? &block->sum32[s] : &sum16[t][2 * s]);
                UNROLL for (int half = 0; half < 2; half++) minsum[half] =
                    _mm256_add_epi32(minsum[half], _mm256_madd_epi16(w->min[s][half], sums));
            }
            UNROLL for (int half = 0; half < 2; half++) part[half][t] =
                k_part(type, w, half, total[half][t], minsum[half]);
        }
    }
    UNROLL for (int t = 0; t < M; t++) UNROLL for (int half = 0; half < 2; half++) {
        float *sum = out + t * 16 + half * 8;
        __m256 d = _mm256_set1_ps(token(x, x_stride, t)->d);
        _mm256_storeu_ps(sum, _mm256_fmadd_ps(part[half][t], d, _mm256_loadu_ps(sum)));
    }
}

/* Byte i of every lane. */
INLINE __m256i byte_of(__m256i v, const int sign, uint32_t i) {
    static const int8_t places[4][16] = {
        {0, -1, -1, -1, 4, -1, -1, -1, 8, -1, -1, -1, 12, -1, -1, -1},
        {1, -1, -1, -1, 5, -1, -1, -1, 9, -1, -1, -1, 13, -1, -1, -1},
        {2, -1, -1, -1, 6, -1, -1, -1, 10, -1, -1, -1, 14, -1, -1, -1},
        {3, -1, -1, -1, 7, -1, -1, -1, 11, -1, -1, -1, 15, -1, -1, -1},
    };
    v = _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(load16((const uint8_t *)places[i])));
    return sign ? _mm256_srai_epi32(_mm256_slli_epi32(v, 24), 24) : v;
}

/* Weights q of a column c of group s as floats; see float_weight_at in kernels_scalar.c. */
INLINE __m256 float_weights(const int type, const super_block *w, const int half, __m256i q, uint32_t s, uint32_t c) {
    if (type == PHI3C_Q3_K) q = _mm256_sub_epi32(q, _mm256_set1_epi32(4));
    if (type == PHI3C_Q4_0) q = _mm256_sub_epi32(q, _mm256_set1_epi32(8));
    if (type == PHI3C_Q5_0) q = _mm256_sub_epi32(q, _mm256_set1_epi32(16));
    if (type == PHI3C_Q6_K) q = _mm256_sub_epi32(q, _mm256_set1_epi32(32));
    if (has_blocks_of_32(type)) {
        __m256 v = _mm256_cvtepi32_ps(q);
        const int has_min = type == PHI3C_Q4_1 || type == PHI3C_Q5_1;
        return has_min ? _mm256_fmadd_ps(w->d[s][half], v, w->m[s][half]) : _mm256_mul_ps(w->d[s][half], v);
    }
    const int has_min = type == PHI3C_Q4_K || type == PHI3C_Q5_K || type == PHI3C_Q2_K;
    if (!has_min) q = _mm256_and_si256(q, _mm256_set1_epi32(0xffff)); /* times one of the two equal scales */
    __m256i scale = w->scale[has_groups_of_32(type) ? s : 2 * s + c / 16][half];
    __m256 v = _mm256_mul_ps(w->d[0][half], _mm256_cvtepi32_ps(_mm256_madd_epi16(q, scale)));
    if (!has_min) return v;
    const uint32_t of_pair = type == PHI3C_Q2_K ? c / 16 : s % 2;
    __m256i min = byte_of(w->min[type == PHI3C_Q2_K ? s : s - of_pair][half], 0, 2 * of_pair);
    return _mm256_fnmadd_ps(w->m[0][half], _mm256_cvtepi32_ps(min), v);
}

/* Weights of a column as floats. */
INLINE void column_weights(const int type, __m256 v[2], const super_block *w, const uint8_t *bytes, uint32_t column) {
    const uint32_t s = column / 32, c = column % 32, j = s % (uint32_t)groups_together(type);
    UNROLL for (int half = 0; half < 2; half++) {
        __m256i q = weights(type, w, bytes, half, (int)(s - j), (int)j, (int)(c / 4));
        v[half] = float_weights(type, w, half, byte_of(q, is_signed(type), c % 4), s, c);
    }
}

INLINE void add_column(float *out, const __m256 v[2], float x) {
    UNROLL for (int half = 0; half < 2; half++) {
        float *sum = out + 8 * half;
        _mm256_storeu_ps(sum, _mm256_fmadd_ps(v[half], _mm256_set1_ps(x), _mm256_loadu_ps(sum)));
    }
}

/* out[t] += a super-block times the outliers of n rows, by column: where they are listed, from the list, as rows tend
 * to have them in the same columns. */
INLINE void multiply_outliers(const int type, float *out, const super_block *w, const uint8_t *bytes,
                              const outliers_x8 *first, size_t x_stride, int n, const outlier_list *list) {
    __m256 v[2];
    if (list) {
        for (uint32_t i = 0; i < list->n;) {
            const uint32_t column = list->outliers[i].column;
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

typedef void outliers_tile(float *out, const super_block *w, const uint8_t *bytes, const outliers_x8 *first,
                           size_t x_stride, int n, const outlier_list *list);

/* The blocks of n tokens, then their outliers. */
INLINE void multiply_tokens(const int type, outliers_tile *multiply_outliers, float *out, const super_block *w,
                            const uint8_t *bytes, const uint8_t *x, const outliers_x8 *outliers, size_t x_stride, int n,
                            const outlier_list *list) {
    int t = 0;
    for (; n - t >= TOKENS; t += TOKENS)
        multiply_blocks(type, TOKENS, out + t * 16, w, bytes, x + (size_t)t * x_stride, x_stride);
    float *rest = out + t * 16;
    const uint8_t *x_rest = x + (size_t)t * x_stride;
    if (n - t == 3)
        multiply_blocks(type, 3, rest, w, bytes, x_rest, x_stride);
    else if (n - t == 2)
        multiply_blocks(type, 2, rest, w, bytes, x_rest, x_stride);
    else if (n - t == 1)
        multiply_blocks(type, 1, rest, w, bytes, x_rest, x_stride);
    multiply_outliers(out, w, bytes, outliers, x_stride, n, list);
}

/* The 256 six-bit numbers of a FIELD_SCALE or FIELD_SCALE_MIN, as bytes. */
INLINE void unpack_planes(uint8_t v[256], const uint8_t *planes) {
    __m256i *out = (__m256i *)v;
    for (int i = 0; i < 2; i++) {
        __m256i low0 = load(planes + 32 * i), low1 = load(planes + 64 + 32 * i), high = load(planes + 128 + 32 * i);
        _mm256_storeu_si256(out + i, _mm256_or_si256(low_nibbles(low0), bits(high, 0, 4, 3)));
        _mm256_storeu_si256(out + i + 2, _mm256_or_si256(low_nibbles(low1), bits(high, 2, 4, 3)));
        _mm256_storeu_si256(out + i + 4, _mm256_or_si256(high_nibbles(low0), bits(high, 4, 4, 3)));
        _mm256_storeu_si256(out + i + 6, _mm256_or_si256(high_nibbles(low1), bits(high, 6, 4, 3)));
    }
}

/* Of a group of 32: 4 bits in scales_l, two in scales_h. */
INLINE __m256i iq4_xs_scale(__m128i scales_h, __m128i scales_l, const int s) {
    __m256i high = _mm256_and_si256(_mm256_srli_epi32(_mm256_cvtepu16_epi32(scales_h), 2 * s), _mm256_set1_epi32(3));
    __m256i low = _mm256_srli_epi32(_mm256_cvtepu8_epi32(scales_l), s % 2 * 4);
    low = _mm256_and_si256(low, _mm256_set1_epi32(15));
    return _mm256_sub_epi32(_mm256_or_si256(low, _mm256_slli_epi32(high, 4)), _mm256_set1_epi32(32));
}

/* Scales and mins of half the rows. */
INLINE void unpack_scales(const int type, super_block *w, const uint8_t *planes, const int half) {
    const uint8_t *p = w->panel + half * 16; /* in every array of [16 rows] halves */
    if (has_blocks_of_32(type)) {
        for (int s = 0; s < w->n32; s++) {
            w->d[s][half] = load_halves(p + s * 32);
            if (type == PHI3C_Q4_1 || type == PHI3C_Q5_1) w->m[s][half] = load_halves(p + (w->n32 + s) * 32);
        }
        return;
    }
    w->d[0][half] = load_halves(p);
    if (type == PHI3C_Q4_K || type == PHI3C_Q5_K || type == PHI3C_Q2_K) w->m[0][half] = load_halves(p + 32);
    UNROLL for (int s = 0; s < 8; s++) {
        if (type == PHI3C_Q4_K || type == PHI3C_Q5_K) {
            w->scale[s][half] = twice(_mm256_cvtepu8_epi32(load8(planes + s * 16 + half * 8)));
            if (s % 2 == 0) w->min[s][half] = _mm256_cvtepu8_epi16(load16(planes + 128 + s * 16 + half * 16));
            continue;
        }
        if (type == PHI3C_IQ4_XS) {
            w->scale[s][half] = twice(iq4_xs_scale(load16(p + 32), load8(planes + s / 2 * 16 + half * 8), s));
            continue;
        }
        __m256i scale[2];
        UNROLL for (int h = 0; h < 2; h++) {
            __m128i v = load8(planes + s * 32 + h * 16 + half * 8);
            scale[h] = twice(type == PHI3C_Q6_K ? _mm256_cvtepi8_epi32(v) : _mm256_cvtepu8_epi32(v));
            if (type == PHI3C_Q3_K) scale[h] = _mm256_sub_epi16(scale[h], _mm256_set1_epi16(32));
            w->scale[2 * s + h][half] =
                type == PHI3C_Q2_K ? _mm256_and_si256(scale[h], _mm256_set1_epi16(15)) : scale[h];
        }
        w->min[s][half] = even_odd(scale[0], scale[1]);
        if (type == PHI3C_Q2_K) w->min[s][half] = _mm256_srli_epi16(w->min[s][half], 4); /* min << 4 | scale */
    }
}

INLINE void unpack_weights(const int type, uint8_t *bytes, const uint8_t *panel, int n32) {
    const int step = groups_together(type);
    for (int base = 0; base < n32; base += step)
        UNROLL for (int j = 0; j < step; j++) UNROLL for (int g = 0; g < 8; g++) {
            uint8_t *out = bytes + ((base + j) * 8 + g) * 64;
            _mm256_storeu_si256((__m256i *)out, weights4(type, panel, 0, base, j, g, n32));
            _mm256_storeu_si256((__m256i *)(out + 32), weights4(type, panel, 1, base, j, g, n32));
        }
}

/* Types whose weights lie in two planes of a super-block. */
INLINE int has_high_plane(const int type) {
    return type == PHI3C_Q5_0 || type == PHI3C_Q5_1 || type == PHI3C_Q3_K || type == PHI3C_Q5_K || type == PHI3C_Q6_K;
}

/* On Zen 4: whether to ask for the super-block after next, into L2. With less than TOKENS tokens the hardware fetches
 * ahead well but for types that go to and fro between their planes: q6_K gains 1.6 to 2.0, q5_0 1.6, q3_K 1.0; q5_K,
 * which goes through them in order, and types of one plane lose up to a third. More tokens pause the stream of weights
 * for longer than the hardware waits: q4_K, q5_K and q4_0 gain 1.1 to 1.3, q6_K 1.4 to 1.7, q8_0 0.8 to 1.1
 * (docs/performance.md). */
INLINE int pays_on_zen4(const int type, int n) {
    return n < TOKENS ? has_high_plane(type) && type != PHI3C_Q5_K : type != PHI3C_Q8_0;
}

/* Ask for the super-block after next. Elsewhere into L1 and always: on Zen 5 one token takes 0.5 to 0.9 of the time, 4
 * and 8 take 0.6 to 1.0. */
INLINE void fetch_after_next(const int type, const uint8_t *panel, size_t bytes, int n) {
    const char *p = (const char *)panel + 2 * bytes;
    if (phi3c_fetch_ahead)
        for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
    else if (pays_on_zen4(type, n))
        for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);
}

INLINE void quantised_tile(const int type, outliers_tile *multiply_outliers, float *out, const uint8_t *panel,
                           const uint8_t *x, size_t x_stride, int n, int64_t columns, const outlier_list *list) {
    const size_t bytes32 = phi3c_packed_bytes(type, 16, 256) / 8;
    const int many = has_high_plane(type) ? TOKENS : 2 * TOKENS; /* tokens that pay for unpacking first */
    const outliers_x8 *outliers = outliers_of(x, columns);
    memset(out, 0, (size_t)n * 16 * sizeof(float));
    for (int64_t left = columns / 32; left > 0; left -= 8) {
        super_block w; /* not cleared: 2 KB, of which each type uses a part */
        w.panel = panel;
        w.n32 = left < 8 ? (int)left : 8;
        uint8_t bytes[4096], unpacked[256];
        const uint8_t *planes = unpacked; /* integer scales of the K types */
        if (type == PHI3C_Q3_K)
            unpack_planes(unpacked, panel + 32);
        else if (type == PHI3C_Q4_K || type == PHI3C_Q5_K)
            unpack_planes(unpacked, panel + 64);
        else
            planes = panel + (type == PHI3C_Q6_K ? 32 : 64);
        unpack_scales(type, &w, planes, 0);
        unpack_scales(type, &w, planes, 1);
        fetch_after_next(type, panel, bytes32 * 8, n);
        if (n >= many) {
            unpack_weights(type, bytes, panel, w.n32);
            multiply_tokens(type, multiply_outliers, out, &w, bytes, x, outliers, x_stride, n, list);
        } else
            multiply_tokens(type, multiply_outliers, out, &w, NULL, x, outliers, x_stride, n, list);
        panel += bytes32 * (size_t)w.n32;
        x += sizeof(block_x8);
        outliers++;
        if (list) list = list_at(list, 1, n);
    }
}

#define TILE(name, type)                                                                                               \
    NOINLINE void name##_outliers(float *out, const super_block *w, const uint8_t *bytes, const outliers_x8 *first,    \
                                  size_t x_stride, int n, const outlier_list *list) {                                  \
        if (bytes)                                                                                                     \
            multiply_outliers(type, out, w, bytes, first, x_stride, n, list);                                          \
        else                                                                                                           \
            multiply_outliers(type, out, w, NULL, first, x_stride, n, list);                                           \
    }                                                                                                                  \
    static void name(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n, int64_t columns,      \
                     const outlier_list *lists) {                                                                      \
        quantised_tile(type, name##_outliers, out, panel, x, x_stride, n, columns, lists);                             \
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
