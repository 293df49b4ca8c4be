/* SPDX-License-Identifier: MIT */
/* Tiles of quantised weights in 512-bit registers.
 *
 * A lane is a row of the panel: a zmm register holds four columns of 16 rows, vpdpbusd multiplies them with four
 * activations broadcast from memory, and no sum ever crosses lanes. Unpacking runs on other pipes than multiplying;
 * every other multiplication takes a slot from vpdpbusd.
 *
 * Few tokens unpack weights as they multiply, up to FEW sharing a register of them. 8 and more go over two panels at
 * once, whose super-blocks are unpacked to bytes first, 8 KB that stay in L1: Zen 5 starts two vpdpbusd and two loads a
 * cycle, so that a broadcast has to serve two of them. A store of 64 bytes holds both multipliers up, so no sum may
 * leave the registers: 6 tokens have 12 sums and 12 totals, 4 tokens 16 sums where they go by pairs, and 8 totals.
 * TABLED and more are worth a table of scales times factors; mins are multiplied for a RUN of tokens
 * (docs/performance.md). */
#ifndef PHI3C_QUANTISED_AVX512_H
#define PHI3C_QUANTISED_AVX512_H

#include <immintrin.h>

#include "../kernels.h"

/* gcc would otherwise take every number that is broadcast out of the register that was stored, by two instructions. */
#if defined(__GNUC__)
#define STORED(array, n) __asm__("" : "+m"(*(__typeof__ (*(array))(*)[n])(array)))
#else
#define STORED(array, n)
#endif

enum { FEW = 4, MOST = 6, TABLED = 32, RUN = 48 };

INLINE __m512i load(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE __m128i load16(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE __m512 load_halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE __m512i low_nibbles(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
INLINE __m512i high_nibbles(__m512i v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }

INLINE __m512i shift_right(__m512i v, int count) { return _mm512_srlv_epi32(v, _mm512_set1_epi32(count)); }

/* Bits `from` and up of every byte, moved to `to` and cut to mask. */
INLINE __m512i bits(__m512i v, int from, int to, int mask) {
    v = from > to ? _mm512_srli_epi16(v, (unsigned)(from - to)) : _mm512_slli_epi16(v, (unsigned)(to - from));
    return _mm512_and_si512(v, _mm512_set1_epi8((char)(mask << to)));
}

/* 128 more than the values of the codes: unsigned, as vpdpbusd takes them. */
INLINE __m512i iq4_lookup(__m512i codes) {
    __m512i values = _mm512_broadcast_i32x4(load16((const uint8_t *)iq4_values));
    return _mm512_shuffle_epi8(_mm512_xor_si512(values, _mm512_set1_epi8(-128)), codes);
}

INLINE __m512i broadcast32(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

/* Four columns of 16 rows times four activations, onto sums of 16 rows. */
INLINE __m512i dot4(__m512i sum, __m512i weights, const int8_t *q) {
    return _mm512_dpbusd_epi32(sum, weights, broadcast32(q));
}

/* Types whose scales and mins are six-bit numbers, in planes. */
INLINE int has_planes(const int type) { return type == PHI3C_Q3_K || type == PHI3C_Q4_K || type == PHI3C_Q5_K; }
INLINE const uint8_t *planes_of(const int type, const uint8_t *p) { return p + (type == PHI3C_Q3_K ? 32 : 64); }

/* K types whose groups have 32 columns, not 16. */
INLINE int has_groups_of_32(const int type) { return type == PHI3C_Q4_K || type == PHI3C_Q5_K || type == PHI3C_IQ4_XS; }

/* K types whose sums of a group mostly fit 16 bits, those of q2_K and q3_K always: they go by pairs, side by side. */
INLINE int has_pairs(const int type) {
    return type == PHI3C_Q2_K || type == PHI3C_Q3_K || type == PHI3C_Q4_K || type == PHI3C_Q6_K;
}

/* Bit s: not those of group s of 32. */
INLINE int wide_groups(const int type, const block_x8 *block) {
    return type == PHI3C_Q6_K ? block->wide16 : type == PHI3C_Q4_K ? block->wide32 : 0;
}

/* Log2 of what the unsigned weights here exceed the signed ones by; 0 of the types that have mins instead. */
INLINE unsigned bias_bits(const int type) {
    switch (type) {
    case PHI3C_Q8_0:
    case PHI3C_IQ4_NL:
    case PHI3C_IQ4_XS: return 7;
    case PHI3C_Q6_K: return 5;
    case PHI3C_Q5_0: return 4;
    case PHI3C_Q4_0: return 3;
    case PHI3C_Q3_K: return 2;
    default: return 0;
    }
}
INLINE int has_mins(const int type) { return !bias_bits(type); }

/* First sums in the lower 16 bits of each lane, second in the upper; they fit. */
INLINE __m512i side_by_side(__m512i first, __m512i second) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, first, _mm512_slli_epi32(second, 16));
}

INLINE const block_x8 *token(const uint8_t *x, size_t x_stride, int t) {
    return (const block_x8 *)(x + (size_t)t * x_stride);
}

INLINE __m512i factor_of(const block_x8 *block, int s) { return _mm512_set1_epi32(block->factor[s]); }

/* Where a sum over group s of 32 columns begins so that it ends as that of signed weights. */
INLINE __m512i start_of(const int type, const block_x8 *block, int s) {
    if (has_mins(type)) return _mm512_setzero_si512();
    return _mm512_set1_epi32((block->nsum16[2 * s] + block->nsum16[2 * s + 1]) * (1 << bias_bits(type)));
}

/* The same over both groups of 16 columns: their numbers lie side by side. */
INLINE void starts_of(const int type, __m512i *first, __m512i *second, const block_x8 *block, int s) {
    *first = *second = _mm512_setzero_si512();
    if (has_mins(type)) return;
    const __m512i both = broadcast32(&block->nsum16[2 * s]);
    *first = _mm512_srai_epi32(_mm512_slli_epi32(both, 16), 16 - bias_bits(type));
    *second = _mm512_slli_epi32(_mm512_srai_epi32(both, 16), bias_bits(type));
}

/* The same over each group of 16 columns, to be broadcast from memory. */
INLINE void starts_of_16(const int type, int32_t starts[16], const block_x8 *block) {
    __m512i nsum16 = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)block->nsum16));
    _mm512_storeu_si512(starts, _mm512_slli_epi32(nsum16, bias_bits(type)));
    STORED(starts, 16);
}

/* Sums of q * factor over 16 columns. */
INLINE void factored_sums(int16_t sums[16], const block_x8 *block) {
    __m128i factors = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)block->factor));
    factors = _mm_sub_epi16(_mm_setzero_si128(), factors);
    __m256i twice = _mm256_set_m128i(_mm_unpackhi_epi16(factors, factors), _mm_unpacklo_epi16(factors, factors));
    __m256i nsum16 = _mm256_loadu_si256((const __m256i *)block->nsum16);
    _mm256_storeu_si256((__m256i *)sums, _mm256_mullo_epi16(nsum16, twice));
    STORED(sums, 16);
}

/* 32 columns of a panel as 8 registers of unsigned weights; `s` counts groups of 32 in the super-block of n32. */
INLINE void unpack32(const int type, __m512i w[8], const uint8_t *p, int s, int n32) {
    const int half = s / 4, j = s % 4; /* of the K types: quarter j of a half block */
    if (type == PHI3C_Q8_0) {
        p += n32 * 32 + s * 512;
        UNROLL for (int g = 0; g < 8; g++) w[g] = load(p + g * 64);
    } else if (type == PHI3C_Q4_0 || type == PHI3C_Q4_1) {
        p += n32 * (type == PHI3C_Q4_0 ? 32 : 64) + s * 256;
        UNROLL for (int g = 0; g < 4; g++) {
            __m512i v = load(p + g * 64);
            w[g] = low_nibbles(v);
            w[g + 4] = high_nibbles(v);
        }
    } else if (type == PHI3C_IQ4_NL || type == PHI3C_IQ4_XS) {
        p += (type == PHI3C_IQ4_NL ? n32 * 32 : 32 + 32 + 64) + s * 256;
        UNROLL for (int g = 0; g < 4; g++) {
            __m512i v = load(p + g * 64);
            w[g] = iq4_lookup(low_nibbles(v));
            w[g + 4] = iq4_lookup(high_nibbles(v));
        }
    } else if (type == PHI3C_Q5_0 || type == PHI3C_Q5_1) {
        const uint8_t *qh = p + n32 * (type == PHI3C_Q5_0 ? 32 : 64), *qs = qh + n32 * 64 + s * 256;
        __m512i h = load(qh + s * 64);
        UNROLL for (int g = 0; g < 4; g++) {
            __m512i v = load(qs + g * 64);
            w[g] = _mm512_or_si512(low_nibbles(v), bits(h, g, 4, 1));
            w[g + 4] = _mm512_or_si512(high_nibbles(v), bits(h, g + 4, 4, 1));
        }
    } else if (type == PHI3C_Q4_K || type == PHI3C_Q5_K) {
        const uint8_t *qh = p + 64 + 192, *qs = (type == PHI3C_Q5_K ? qh + 512 : qh) + s / 2 * 512;
        UNROLL for (int g = 0; g < 8; g++) {
            w[g] = s % 2 ? high_nibbles(load(qs + g * 64)) : low_nibbles(load(qs + g * 64));
            if (type == PHI3C_Q5_K) w[g] = _mm512_or_si512(w[g], bits(load(qh + g * 64), s, 4, 1));
        }
    } else if (type == PHI3C_Q2_K) {
        p += 64 + 256 + half * 512;
        UNROLL for (int g = 0; g < 8; g++) w[g] = bits(load(p + g * 64), 2 * j, 0, 3);
    } else if (type == PHI3C_Q3_K) {
        const uint8_t *hmask = p + 32 + 192, *qs = hmask + 512 + half * 512;
        UNROLL for (int g = 0; g < 8; g++) w[g] =
            _mm512_or_si512(bits(load(qs + g * 64), 2 * j, 0, 3), bits(load(hmask + g * 64), s, 2, 1));
    } else { /* Q6_K */
        const uint8_t *qh = p + 32 + 256, *ql = qh + 1024 + half * 1024 + j % 2 * 512;
        qh += half * 512;
        UNROLL for (int g = 0; g < 8; g++) {
            __m512i v = load(ql + g * 64);
            w[g] = _mm512_or_si512(j < 2 ? low_nibbles(v) : high_nibbles(v), bits(load(qh + g * 64), 2 * j, 4, 3));
        }
    }
}

/* The 256 six-bit numbers of a FIELD_SCALE or FIELD_SCALE_MIN, as bytes. */
INLINE void unpack_planes(uint8_t v[256], const uint8_t *planes) {
    __m512i low0 = load(planes), low1 = load(planes + 64), high = load(planes + 128);
    _mm512_storeu_si512(v, _mm512_or_si512(low_nibbles(low0), bits(high, 0, 4, 3)));
    _mm512_storeu_si512(v + 64, _mm512_or_si512(low_nibbles(low1), bits(high, 2, 4, 3)));
    _mm512_storeu_si512(v + 128, _mm512_or_si512(high_nibbles(low0), bits(high, 4, 4, 3)));
    _mm512_storeu_si512(v + 192, _mm512_or_si512(high_nibbles(low1), bits(high, 6, 4, 3)));
}

/* Of a group of 32: 4 bits in scales_l, two in scales_h. */
INLINE __m512i iq4_xs_scale(const uint8_t *p, int s) {
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p + 32)));
    __m512i low = _mm512_cvtepu8_epi32(load16(p + 64 + s / 2 * 16));
    high = _mm512_and_si512(shift_right(high, 2 * s), _mm512_set1_epi32(3));
    low = _mm512_and_si512(shift_right(low, s % 2 * 4), _mm512_set1_epi32(15));
    return _mm512_sub_epi32(_mm512_or_si512(low, _mm512_slli_epi32(high, 4)), _mm512_set1_epi32(32));
}

/* K types: integer scales of group g of 16 columns. planes: six-bit scales and mins, as bytes. */
INLINE __m512i scale_of(const int type, const uint8_t *p, const uint8_t *planes, int g) {
    switch (type) {
    case PHI3C_Q6_K: return _mm512_cvtepi8_epi32(load16(p + 32 + g * 16));
    case PHI3C_IQ4_XS: return iq4_xs_scale(p, g / 2);
    case PHI3C_Q3_K: return _mm512_sub_epi32(_mm512_cvtepu8_epi32(load16(planes + g * 16)), _mm512_set1_epi32(32));
    case PHI3C_Q2_K: /* min << 4 | scale */
        return _mm512_and_si512(_mm512_cvtepu8_epi32(load16(p + 64 + g * 16)), _mm512_set1_epi32(15));
    default: return _mm512_cvtepu8_epi32(load16(planes + g / 2 * 16));
    }
}

/* Mins of groups 2 pair and 2 pair + 1, side by side as 16-bit numbers: of 16 columns (q2_K) or of 32. */
INLINE __m512i pair_of_mins(const int type, const uint8_t *p, const uint8_t *planes, int pair) {
    if (type != PHI3C_Q2_K)
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(planes + 128 + pair * 32)));
    __m512i even = _mm512_cvtepu8_epi32(load16(p + 64 + pair * 32));
    __m512i odd = _mm512_cvtepu8_epi32(load16(p + 64 + pair * 32 + 16));
    return _mm512_or_si512(_mm512_srli_epi32(even, 4), _mm512_slli_epi32(_mm512_srli_epi32(odd, 4), 16));
}

/* -- few tokens ------------------------------------------------------------------------------------------- */

/* Factors of a block as integers, which are broadcast from memory, where a byte would go by way of a register. */
INLINE void widen_factors(int32_t factors[8], const block_x8 *block) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)block->factor);
    _mm256_storeu_si256((__m256i *)factors, _mm256_cvtepu8_epi32(bytes));
    STORED(factors, 8);
}

/* Legacy types: 32 columns, one float scale (and min). */
INLINE void legacy_super(const int type, const int M, __m512 part[], const uint8_t *p, const uint8_t *x,
                         size_t x_stride, int n32) {
    UNROLL for (int t = 0; t < M; t++) part[t] = _mm512_setzero_ps();
    for (int s = 0; s < n32; s++) {
        __m512i w[8], sum[FEW];
        unpack32(type, w, p, s, n32);
        UNROLL for (int t = 0; t < M; t++) sum[t] = start_of(type, token(x, x_stride, t), s);
        UNROLL for (int g = 0; g < 8; g++) UNROLL for (int t = 0; t < M; t++) sum[t] =
            dot4(sum[t], w[g], token(x, x_stride, t)->q + 32 * s + 4 * g);
        __m512 d = load_halves(p + s * 32), m = has_mins(type) ? load_halves(p + n32 * 32 + s * 32) : d;
        UNROLL for (int t = 0; t < M; t++) {
            const block_x8 *block = token(x, x_stride, t);
            sum[t] = _mm512_mullo_epi32(sum[t], factor_of(block, s));
            part[t] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(sum[t]), part[t]);
            if (has_mins(type)) part[t] = _mm512_fmadd_ps(m, _mm512_set1_ps((float)block->sum32[s]), part[t]);
        }
    }
}

/* Integer scales, which fit int16, times the factor of group s: one vpmaddwd, as the upper half of a factor is 0. */
INLINE __m512i times_factor(__m512i scale, const block_x8 *block, int s) {
    return _mm512_madd_epi16(scale, factor_of(block, s));
}

/* q4_K, q5_K: two groups of 32 columns share a register of nibbles. */
INLINE void k32_super(const int type, const int M, __m512 part[], const uint8_t *p, const uint8_t *x, size_t x_stride) {
    const uint8_t *qh = p + 64 + 192, *qs = type == PHI3C_Q5_K ? qh + 512 : qh;
    uint8_t v[256];
    unpack_planes(v, p + 64);
    __m512i total[FEW], minsum[FEW];
    UNROLL for (int t = 0; t < M; t++) total[t] = minsum[t] = _mm512_setzero_si512();
    UNROLL for (int pair = 0; pair < 4; pair++) {
        const int s = 2 * pair;
        __m512i low[FEW], high[FEW];
        UNROLL for (int t = 0; t < M; t++) low[t] = high[t] = _mm512_setzero_si512();
        UNROLL for (int g = 0; g < 8; g++) {
            __m512i q = load(qs + pair * 512 + g * 64), w0 = low_nibbles(q), w1 = high_nibbles(q);
            if (type == PHI3C_Q5_K) {
                __m512i h = load(qh + g * 64);
                w0 = _mm512_or_si512(w0, bits(h, s, 4, 1));
                w1 = _mm512_or_si512(w1, bits(h, s + 1, 4, 1));
            }
            UNROLL for (int t = 0; t < M; t++) {
                const int8_t *a = token(x, x_stride, t)->q + 32 * s + 4 * g;
                low[t] = dot4(low[t], w0, a);
                high[t] = dot4(high[t], w1, a + 32);
            }
        }
        __m512i scale0 = scale_of(type, p, v, 2 * s), scale1 = scale_of(type, p, v, 2 * s + 2);
        __m512i mins = pair_of_mins(type, p, v, pair);
        UNROLL for (int t = 0; t < M; t++) {
            const block_x8 *block = token(x, x_stride, t);
            low[t] = _mm512_mullo_epi32(low[t], times_factor(scale0, block, s));
            high[t] = _mm512_mullo_epi32(high[t], times_factor(scale1, block, s + 1));
            total[t] = _mm512_add_epi32(total[t], _mm512_add_epi32(low[t], high[t]));
            minsum[t] = _mm512_dpwssd_epi32(minsum[t], mins, broadcast32(&block->sum32[s]));
        }
    }
    __m512 d = load_halves(p), dmin = load_halves(p + 32);
    UNROLL for (int t = 0; t < M; t++) part[t] =
        _mm512_fnmadd_ps(dmin, _mm512_cvtepi32_ps(minsum[t]), _mm512_mul_ps(d, _mm512_cvtepi32_ps(total[t])));
}

/* iq4_xs: groups of 32 columns, each as a block of iq4_nl. */
INLINE void iq4_xs_super(const int M, __m512 part[], const uint8_t *p, const uint8_t *x, size_t x_stride) {
    __m512i total[FEW];
    UNROLL for (int t = 0; t < M; t++) total[t] = _mm512_setzero_si512();
    UNROLL for (int s = 0; s < 8; s++) {
        __m512i w[8], sum[FEW];
        unpack32(PHI3C_IQ4_XS, w, p, s, 8);
        UNROLL for (int t = 0; t < M; t++) sum[t] = start_of(PHI3C_IQ4_XS, token(x, x_stride, t), s);
        UNROLL for (int g = 0; g < 8; g++) UNROLL for (int t = 0; t < M; t++) sum[t] =
            dot4(sum[t], w[g], token(x, x_stride, t)->q + 32 * s + 4 * g);
        __m512i scale = iq4_xs_scale(p, s);
        UNROLL for (int t = 0; t < M; t++) {
            __m512i factored = times_factor(scale, token(x, x_stride, t), s);
            total[t] = _mm512_add_epi32(total[t], _mm512_mullo_epi32(sum[t], factored));
        }
    }
    __m512 d = load_halves(p);
    UNROLL for (int t = 0; t < M; t++) part[t] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(total[t]));
}

/* q2_K, q3_K, q6_K: groups of 16 columns. */
INLINE void k16_super(const int type, const int M, __m512 part[], const uint8_t *p, const uint8_t *x, size_t x_stride) {
    uint8_t v[256];
    int16_t sum16[FEW][16];
    int32_t factors[FEW][8], starts[FEW][16];
    if (has_planes(type)) unpack_planes(v, planes_of(type, p));
    __m512i total[FEW], minsum[FEW];
    UNROLL for (int t = 0; t < M; t++) {
        total[t] = minsum[t] = _mm512_setzero_si512();
        widen_factors(factors[t], token(x, x_stride, t));
        if (has_mins(type))
            factored_sums(sum16[t], token(x, x_stride, t));
        else
            starts_of_16(type, starts[t], token(x, x_stride, t));
    }
    UNROLL for (int s = 0; s < 8; s++) {
        __m512i w[8], first[FEW], second[FEW], mins = _mm512_setzero_si512();
        unpack32(type, w, p, s, 8);
        UNROLL for (int t = 0; t < M; t++) {
            first[t] = has_mins(type) ? _mm512_setzero_si512() : broadcast32(&starts[t][2 * s]);
            second[t] = has_mins(type) ? _mm512_setzero_si512() : broadcast32(&starts[t][2 * s + 1]);
        }
        UNROLL for (int g = 0; g < 4; g++) UNROLL for (int t = 0; t < M; t++) {
            const int8_t *a = token(x, x_stride, t)->q + 32 * s + 4 * g;
            first[t] = dot4(first[t], w[g], a);
            second[t] = dot4(second[t], w[g + 4], a + 16);
        }
        __m512i scale0 = scale_of(type, p, v, 2 * s), scale1 = scale_of(type, p, v, 2 * s + 1);
        if (has_mins(type)) mins = pair_of_mins(type, p, v, s);
        UNROLL for (int t = 0; t < M; t++) {
            __m512i sum = _mm512_add_epi32(_mm512_mullo_epi32(first[t], scale0), _mm512_mullo_epi32(second[t], scale1));
            total[t] = _mm512_add_epi32(total[t], _mm512_mullo_epi32(sum, broadcast32(&factors[t][s])));
            if (has_mins(type)) minsum[t] = _mm512_dpwssd_epi32(minsum[t], mins, broadcast32(&sum16[t][2 * s]));
        }
    }
    __m512 d = load_halves(p);
    UNROLL for (int t = 0; t < M; t++) {
        part[t] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(total[t]));
        if (has_mins(type)) part[t] = _mm512_fnmadd_ps(load_halves(p + 32), _mm512_cvtepi32_ps(minsum[t]), part[t]);
    }
}

/* part[t] of M tokens in one super-block. */
INLINE void super_block(const int type, const int M, __m512 part[], const uint8_t *p, const uint8_t *x, size_t x_stride,
                        int n32) {
    if (has_blocks_of_32(type))
        legacy_super(type, M, part, p, x, x_stride, n32);
    else if (type == PHI3C_Q4_K || type == PHI3C_Q5_K)
        k32_super(type, M, part, p, x, x_stride);
    else if (type == PHI3C_IQ4_XS)
        iq4_xs_super(M, part, p, x, x_stride);
    else
        k16_super(type, M, part, p, x, x_stride);
}

/* Of column c in quads of columns: bits `from` and up of its bytes, cut to mask, as integers. */
INLINE __m512i field(const uint8_t *quads, int c, int from, int mask) {
    return _mm512_and_si512(shift_right(load(quads + c / 4 * 64), c % 4 * 8 + from), _mm512_set1_epi32(mask));
}

/* Unsigned weights in column c of group s, as integers. */
INLINE __m512i column_weights(const int type, const uint8_t *p, int s, int c, int n32) {
    const int half = s / 4, j = s % 4; /* of the K types: quarter j of a half block */
    const uint8_t *qh;
    __m512i low, high = _mm512_setzero_si512();
    int high_bit = 4;
    switch (type) {
    case PHI3C_Q8_0: low = field(p + n32 * 32 + s * 512, c, 0, 255); break;
    case PHI3C_Q4_0:
    case PHI3C_Q4_1: low = field(p + n32 * (type == PHI3C_Q4_0 ? 32 : 64) + s * 256, c % 16, c / 16 * 4, 15); break;
    case PHI3C_IQ4_NL:
    case PHI3C_IQ4_XS:
        low = iq4_lookup(field(p + (type == PHI3C_IQ4_NL ? n32 * 32 : 32 + 32 + 64) + s * 256, c % 16, c / 16 * 4, 15));
        low = _mm512_and_si512(low, _mm512_set1_epi32(255));
        break;
    case PHI3C_Q5_0:
    case PHI3C_Q5_1:
        qh = p + n32 * (type == PHI3C_Q5_0 ? 32 : 64);
        low = field(qh + n32 * 64 + s * 256, c % 16, c / 16 * 4, 15);
        high = field(qh + s * 64, c % 4, c / 4, 1);
        break;
    case PHI3C_Q4_K: low = field(p + 64 + 192 + s / 2 * 512, c, s % 2 * 4, 15); break;
    case PHI3C_Q5_K:
        qh = p + 64 + 192;
        low = field(qh + 512 + s / 2 * 512, c, s % 2 * 4, 15);
        high = field(qh, c, s, 1);
        break;
    case PHI3C_Q6_K:
        qh = p + 32 + 256;
        low = field(qh + 1024 + half * 1024 + j % 2 * 512, c, j / 2 * 4, 15);
        high = field(qh + half * 512, c, 2 * j, 3);
        break;
    case PHI3C_Q3_K:
        qh = p + 32 + 192;
        low = field(qh + 512 + half * 512, c, 2 * j, 3);
        high = field(qh, c, s, 1);
        high_bit = 2;
        break;
    default: /* Q2_K */ low = field(p + 64 + 256 + half * 512, c, 2 * j, 3);
    }
    high = _mm512_sllv_epi32(high, _mm512_set1_epi32(high_bit));
    return _mm512_or_si512(low, high);
}

/* Unsigned weights q of column c of group s as signed floats; see float_weight_at in kernels_scalar.c. */
INLINE __m512 float_weights(const int type, __m512i q, const uint8_t *p, const uint8_t *planes, int s, int c, int n32) {
    if (bias_bits(type)) q = _mm512_sub_epi32(q, _mm512_set1_epi32(1 << bias_bits(type)));
    if (has_blocks_of_32(type)) {
        __m512 d = load_halves(p + s * 32), v = _mm512_cvtepi32_ps(q);
        return has_mins(type) ? _mm512_fmadd_ps(d, v, load_halves(p + (n32 + s) * 32)) : _mm512_mul_ps(d, v);
    }
    const int group = 2 * s + c / 16; /* of 16 columns */
    q = _mm512_mullo_epi32(q, scale_of(type, p, planes, group));
    __m512 v = _mm512_mul_ps(load_halves(p), _mm512_cvtepi32_ps(q));
    if (!has_mins(type)) return v;
    __m512i min;
    if (type == PHI3C_Q2_K) /* min << 4 | scale */
        min = _mm512_srli_epi32(_mm512_cvtepu8_epi32(load16(p + 64 + group * 16)), 4);
    else { /* those of two groups lie side by side: this one's becomes the upper byte of 16 bits */
        const uint8_t *mins = planes + 128 + s / 2 * 32 + s % 2 - 1;
        min = _mm512_cvtepu16_epi32(_mm256_srli_epi16(_mm256_loadu_si256((const __m256i *)mins), 8));
    }
    return _mm512_fnmadd_ps(load_halves(p + 32), _mm512_cvtepi32_ps(min), v);
}

/* sum[t] += a super-block times the outliers of M tokens, by column. */
INLINE void add_outliers(const int type, int M, __m512 sum[], const uint8_t *p, const outliers_x8 *first,
                         size_t x_stride, int n32) {
    uint8_t unpacked[256];
    const uint8_t *planes = NULL;
    if (has_planes(type)) {
        unpack_planes(unpacked, planes_of(type, p));
        planes = unpacked;
    }
    for (int t = 0; t < M; t++) {
        const outliers_x8 *outliers = outliers_at(first, x_stride, t);
        for (int i = 0; i < outliers->n; i++) {
            const int s = outliers->column[i] / 32, c = outliers->column[i] % 32;
            __m512 w = float_weights(type, column_weights(type, p, s, c, n32), p, planes, s, c, n32);
            sum[t] = _mm512_fmadd_ps(w, _mm512_set1_ps(outliers->x[i]), sum[t]);
        }
    }
}

/* The same, once for all tiles of a type. */
NOINLINE void multiply_outliers(int type, int M, __m512 sum[], const uint8_t *p, const outliers_x8 *first,
                                size_t x_stride, int n32) {
    switch (type) {
    case PHI3C_Q4_0: add_outliers(PHI3C_Q4_0, M, sum, p, first, x_stride, n32); break;
    case PHI3C_Q4_1: add_outliers(PHI3C_Q4_1, M, sum, p, first, x_stride, n32); break;
    case PHI3C_Q5_0: add_outliers(PHI3C_Q5_0, M, sum, p, first, x_stride, n32); break;
    case PHI3C_Q5_1: add_outliers(PHI3C_Q5_1, M, sum, p, first, x_stride, n32); break;
    case PHI3C_Q8_0: add_outliers(PHI3C_Q8_0, M, sum, p, first, x_stride, n32); break;
    case PHI3C_Q2_K: add_outliers(PHI3C_Q2_K, M, sum, p, first, x_stride, n32); break;
    case PHI3C_Q3_K: add_outliers(PHI3C_Q3_K, M, sum, p, first, x_stride, n32); break;
    case PHI3C_Q4_K: add_outliers(PHI3C_Q4_K, M, sum, p, first, x_stride, n32); break;
    case PHI3C_Q5_K: add_outliers(PHI3C_Q5_K, M, sum, p, first, x_stride, n32); break;
    case PHI3C_Q6_K: add_outliers(PHI3C_Q6_K, M, sum, p, first, x_stride, n32); break;
    case PHI3C_IQ4_NL: add_outliers(PHI3C_IQ4_NL, M, sum, p, first, x_stride, n32); break;
    case PHI3C_IQ4_XS: add_outliers(PHI3C_IQ4_XS, M, sum, p, first, x_stride, n32); break;
    }
}

/* M tokens against a panel of quantised weights. The super-block after next is fetched ahead, into L1 (of q8_0, which
 * takes twice the bytes, the next): on Zen 5 one token takes 0.5 to 0.9 of the time out of memory, q8_0 1.0, and four
 * 0.35 to 0.8; on Zen 4 a prototype took 1.1 to 1.4 (docs/performance.md). */
INLINE void quantised_tokens(const int type, const int M, float *out, const uint8_t *panel, const uint8_t *x,
                             size_t x_stride, int64_t columns) {
    const size_t bytes32 = phi3c_packed_bytes(type, 16, 256) / 8, ahead = type == PHI3C_Q8_0 ? 1 : 2;
    __m512 sum[FEW], part[FEW];
    const outliers_x8 *outliers = outliers_of(x, columns);
    UNROLL for (int t = 0; t < M; t++) sum[t] = _mm512_setzero_ps();
    for (int64_t left = columns / 32; left > 0; left -= 8) {
        int n32 = left < 8 ? (int)left : 8;
        uint32_t any = 0;
        for (size_t i = 0; phi3c_fetch_ahead && i < bytes32 * 8; i += 64)
            _mm_prefetch((const char *)panel + ahead * bytes32 * 8 + i, _MM_HINT_T0);
        super_block(type, M, part, panel, x, x_stride, n32);
        UNROLL for (int t = 0; t < M; t++) {
            sum[t] = _mm512_fmadd_ps(part[t], _mm512_set1_ps(token(x, x_stride, t)->d), sum[t]);
            any |= outliers_at(outliers, x_stride, t)->n;
        }
        if (any) multiply_outliers(type, M, sum, panel, outliers, x_stride, n32);
        panel += bytes32 * (size_t)n32;
        x += sizeof(block_x8);
        outliers++;
    }
    UNROLL for (int t = 0; t < M; t++) _mm512_storeu_ps(out + t * 16, sum[t]);
}

/* A panel and any number of tokens, FEW, two or one at a time: every size more costs seconds of compile time. */
INLINE void quantised_tile(const int type, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n,
                           int64_t columns) {
    for (; n >= FEW; n -= FEW, x += FEW * x_stride, out += FEW * 16)
        quantised_tokens(type, FEW, out, panel, x, x_stride, columns);
    if (n & 2) {
        quantised_tokens(type, 2, out, panel, x, x_stride, columns);
        x += 2 * x_stride, out += 2 * 16;
    }
    if (n & 1) quantised_tokens(type, 1, out, panel, x, x_stride, columns);
}

/* -- many tokens ------------------------------------------------------------------------------------------ */

/* gcc would otherwise broadcast an activation once for each panel, and the loads would take as long as twice as many
 * multiplications. */
#if defined(__GNUC__) && defined(__AVX512F__)
#define KEEP(v) __asm__("" : "+v"(v))
#else
#define KEEP(v)
#endif

/* Super-blocks of two panels, made ready. */
typedef struct {
    const uint8_t *panel[2], *to_come[2]; /* of super-blocks */
    size_t bytes32;                       /* of 32 columns of a panel */
    int n32;
    uint8_t planes[2][256];                  /* six-bit scales and mins, as bytes, of the types that have them */
    _Alignas(64) uint8_t bytes[2][256 * 16]; /* unsigned weights, [4 columns][16 rows][4] */
    __m512i scaled[2][8][9];                 /* scales of a group times a factor, which is 0 in blocks of zeros */
    float minsums[2][RUN * 16];              /* of the K types with mins: sum of min * sum32 of a token of the run */
} super_blocks;

INLINE void unpack_super(const int type, super_blocks *w, const int i, const uint8_t *panel) {
    w->panel[i] = panel;
    if (has_planes(type)) unpack_planes(w->planes[i], planes_of(type, panel));
    UNROLL for (int s = 0; s < 8; s++) {
        if (s == w->n32) break;
        __m512i v[8];
        unpack32(type, v, panel, s, w->n32);
        UNROLL for (int g = 0; g < 8; g++) _mm512_storeu_si512(w->bytes[i] + s * 512 + g * 64, v[g]);
    }
}

/* For a run of tokens in one go: their sums, which wait for nothing, are 5 % of the multiplications, and take twice as
 * long behind those of the weights. */
INLINE void multiply_mins(const int type, super_blocks *w, const uint8_t *x, size_t x_stride, int n) {
    const int n_pairs = type == PHI3C_Q2_K ? 8 : 4;
    __m512i mins[2][8];
    UNROLL for (int i = 0; i < 2; i++) UNROLL for (int j = 0; j < n_pairs; j++) mins[i][j] =
        pair_of_mins(type, w->panel[i], w->planes[i], j);
    for (int t = 0; t < n; t++) {
        const block_x8 *block = token(x, x_stride, t);
        int16_t sum16[16];
        if (type == PHI3C_Q2_K) factored_sums(sum16, block);
        __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        UNROLL for (int j = 0; j < n_pairs; j++) {
            __m512i a = broadcast32(type == PHI3C_Q2_K ? &sum16[2 * j] : &block->sum32[2 * j]);
            KEEP(a);
            UNROLL for (int i = 0; i < 2; i++) sum[i] = _mm512_dpwssd_epi32(sum[i], mins[i][j], a);
        }
        UNROLL for (int i = 0; i < 2; i++) _mm512_storeu_ps(w->minsums[i] + t * 16, _mm512_cvtepi32_ps(sum[i]));
    }
}

/* sum[i][t] += `quads` times four columns of panel i, from `column` on, times token t. */
INLINE void dot(const int M, __m512i sum[2][MOST], const super_blocks *w, int column, const int quads, const uint8_t *x,
                size_t x_stride) {
    UNROLL for (int g = 0; g < quads; g++) {
        const int at = column + 4 * g;
        __m512i w0 = load(w->bytes[0] + at * 16), w1 = load(w->bytes[1] + at * 16);
        UNROLL for (int t = 0; t < M; t++) {
            __m512i a = broadcast32(token(x, x_stride, t)->q + at);
            KEEP(a);
            sum[0][t] = _mm512_dpbusd_epi32(sum[0][t], w0, a);
            sum[1][t] = _mm512_dpbusd_epi32(sum[1][t], w1, a);
        }
    }
}

/* The same of two groups of `columns` by turns: 4 tokens are 16 chains then, and the second sums need not wait. */
INLINE void dot_two(const int M, __m512i first[2][MOST], __m512i second[2][MOST], const super_blocks *w, int column,
                    const int columns, const uint8_t *x, size_t x_stride) {
    UNROLL for (int g = 0; g < columns / 4; g++) {
        dot(M, first, w, column + 4 * g, 1, x, x_stride);
        dot(M, second, w, column + columns + 4 * g, 1, x, x_stride);
    }
}

/* Sums of M tokens over group s where they begin. */
INLINE void begin(const int type, const int M, __m512i sum[2][MOST], int s, const uint8_t *x, size_t x_stride) {
    UNROLL for (int t = 0; t < M; t++) sum[0][t] = sum[1][t] = start_of(type, token(x, x_stride, t), s);
}

/* K types: scales of group s of 32 columns of panel i. Where sums go by pairs, as 16-bit numbers: one for either group
 * of 16 columns, or, of q4_K, one in the half that group s has in a pair, beside a 0. */
INLINE __m512i scales_of_group(const int type, const super_blocks *w, const int i, int s) {
    __m512i scale = scale_of(type, w->panel[i], w->planes[i], 2 * s);
    if (!has_pairs(type)) return scale;
    if (has_groups_of_32(type)) return s % 2 ? _mm512_slli_epi32(scale, 16) : scale;
    return side_by_side(scale, scale_of(type, w->panel[i], w->planes[i], 2 * s + 1));
}

/* By additions, which take no slot from multiplications. Types of 32: floats, exact, as a half has 11 bits. */
INLINE void fill_scaled(const int type, super_blocks *w) {
    UNROLL for (int i = 0; i < 2; i++) UNROLL for (int s = 0; s < 8; s++) {
        if (has_blocks_of_32(type)) {
            if (s == w->n32) break;
            const __m512 d = load_halves(w->panel[i] + s * 32);
            __m512 scaled = _mm512_mul_ps(d, _mm512_setzero_ps()); /* NaN where d is infinite */
            w->scaled[i][s][0] = _mm512_castps_si512(scaled);
            scaled = d;
            UNROLL for (int f = 1; f <= 8; f++, scaled = _mm512_add_ps(scaled, d)) w->scaled[i][s][f] =
                _mm512_castps_si512(scaled);
            continue;
        }
        const __m512i scales = scales_of_group(type, w, i, s);
        __m512i scaled = _mm512_setzero_si512();
        UNROLL for (int f = 0; f <= 8; f++) {
            w->scaled[i][s][f] = scaled;
            scaled = has_pairs(type) ? _mm512_add_epi16(scaled, scales) : _mm512_add_epi32(scaled, scales);
        }
    }
}

/* total += sum times the scales and factors of group g of 16 columns, or of the 32 that begin with them. */
INLINE void add_scaled(const int type, const int M, __m512i total[2][MOST], __m512i sum[2][MOST], const super_blocks *w,
                       int g, const uint8_t *x, size_t x_stride) {
    UNROLL for (int i = 0; i < 2; i++) {
        __m512i scale = scale_of(type, w->panel[i], w->planes[i], g);
        UNROLL for (int t = 0; t < M; t++) {
            __m512i scaled = _mm512_mullo_epi32(scale, factor_of(token(x, x_stride, t), g / 2));
            total[i][t] = _mm512_add_epi32(total[i][t], _mm512_mullo_epi32(sum[i][t], scaled));
        }
    }
}

/* total += group s of 32 columns, whose sums may take more than 16 bits. */
INLINE void multiply_group(const int type, const int M, const int tabled, __m512i total[2][MOST], const super_blocks *w,
                           int s, const uint8_t *x, size_t x_stride) {
    __m512i sum[2][MOST];
    begin(type, M, sum, s, x, x_stride);
    dot(M, sum, w, 32 * s, 8, x, x_stride);
    if (!tabled) {
        add_scaled(type, M, total, sum, w, 2 * s, x, x_stride);
        return;
    }
    UNROLL for (int t = 0; t < M; t++) {
        const uint8_t factor = token(x, x_stride, t)->factor[s];
        UNROLL for (int i = 0; i < 2; i++) total[i][t] =
            _mm512_add_epi32(total[i][t], _mm512_mullo_epi32(sum[i][t], w->scaled[i][s][factor]));
    }
}

/* total += two groups of 32 columns from group s on, or both of 16 of group s. One vpdpwssd multiplies two sums by
 * their scales, unless some are wide, which is rare (blocks.h). */
INLINE void multiply_pair(const int type, const int M, const int tabled, int wide, __m512i total[2][MOST],
                          const super_blocks *w, int s, const uint8_t *x, size_t x_stride) {
    const int columns = has_groups_of_32(type) ? 32 : 16, g0 = 2 * s, g1 = g0 + columns / 16;
    __m512i first[2][MOST], second[2][MOST], scales[2];
    UNROLL for (int t = 0; t < M; t++) {
        starts_of(type, &first[0][t], &second[0][t], token(x, x_stride, t), s); /* of groups of 32, at 0 */
        first[1][t] = first[0][t], second[1][t] = second[0][t];
    }
    dot_two(M, first, second, w, 32 * s, columns, x, x_stride);
    if (wide) {
        add_scaled(type, M, total, first, w, g0, x, x_stride);
        add_scaled(type, M, total, second, w, g1, x, x_stride);
        return;
    }
    UNROLL for (int i = 0; i < 2; i++) {
        scales[i] = scales_of_group(type, w, i, s);
        if (columns == 32) scales[i] = _mm512_or_si512(scales[i], scales_of_group(type, w, i, s + 1));
    }
    UNROLL for (int t = 0; t < M; t++) {
        const int f0 = token(x, x_stride, t)->factor[g0 / 2], f1 = token(x, x_stride, t)->factor[g1 / 2];
        UNROLL for (int i = 0; i < 2; i++) {
            __m512i scaled;
            if (tabled) {
                scaled = w->scaled[i][s][f0];
                if (columns == 32) scaled = _mm512_or_si512(scaled, w->scaled[i][s + 1][f1]);
            } else {
                scaled = _mm512_mullo_epi16(scales[i], _mm512_set1_epi32(f0 | f1 << 16));
            }
            total[i][t] = _mm512_dpwssd_epi32(total[i][t], side_by_side(first[i][t], second[i][t]), scaled);
        }
    }
}

/* While group s is multiplied with the first tokens: a share of the super-blocks to come. Asked for all at once, they
 * keep what is read meanwhile waiting: 8 tokens out of memory take 1.8 to 2.0 times as long, 48 take 1.26. */
INLINE void fetch_shares(const super_blocks *w, int s, int n) {
    for (int i = 0; i < 2; i++)
        for (size_t at = 0; at < (size_t)n * w->bytes32; at += 64)
            prefetch(w->to_come[i] + (size_t)s * w->bytes32 + at);
}

/* Types of 32: part = the super-blocks times M blocks, of tokens t0 and on. */
INLINE void legacy_parts(const int type, const int M, const int tabled, __m512 part[2][MOST], const super_blocks *w,
                         int t0, const uint8_t *x, size_t x_stride) {
    UNROLL for (int t = 0; t < M; t++) part[0][t] = part[1][t] = _mm512_setzero_ps();
    for (int s = 0; s < w->n32; s++) {
        __m512i sum[2][MOST];
        if (t0 == 0) fetch_shares(w, s, 1);
        begin(type, M, sum, s, x, x_stride);
        dot(M, sum, w, 32 * s, 8, x, x_stride);
        UNROLL for (int i = 0; i < 2; i++) {
            __m512 d = load_halves(w->panel[i] + s * 32);
            __m512 m = has_mins(type) ? load_halves(w->panel[i] + (w->n32 + s) * 32) : d;
            UNROLL for (int t = 0; t < M; t++) {
                const block_x8 *block = token(x, x_stride, t);
                if (tabled) {
                    __m512 scaled = _mm512_castsi512_ps(w->scaled[i][s][block->factor[s]]);
                    part[i][t] = _mm512_fmadd_ps(scaled, _mm512_cvtepi32_ps(sum[i][t]), part[i][t]);
                } else {
                    __m512i scaled = _mm512_mullo_epi32(sum[i][t], factor_of(block, s));
                    part[i][t] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(scaled), part[i][t]);
                }
                if (has_mins(type)) part[i][t] = _mm512_fmadd_ps(m, _mm512_set1_ps((float)block->sum32[s]), part[i][t]);
            }
        }
    }
}

/* K types: part = the super-blocks times M blocks, of tokens t0 and on. */
INLINE void k_parts(const int type, const int M, const int tabled, __m512 part[2][MOST], const super_blocks *w, int t0,
                    const uint8_t *x, size_t x_stride) {
    __m512i total[2][MOST];
    UNROLL for (int t = 0; t < M; t++) total[0][t] = total[1][t] = _mm512_setzero_si512();
    const int step = has_pairs(type) && has_groups_of_32(type) ? 2 : 1;
    int wide = 0; /* bit s: sums of group s, of some token */
    UNROLL for (int t = 0; t < M; t++) wide |= wide_groups(type, token(x, x_stride, t));
    for (int s = 0; s < 8; s += step) {
        if (t0 == 0) fetch_shares(w, s, step);
        if (has_pairs(type))
            multiply_pair(type, M, tabled, wide >> s & (step == 2 ? 3 : 1), total, w, s, x, x_stride);
        else
            multiply_group(type, M, tabled, total, w, s, x, x_stride);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        __m512 d = load_halves(w->panel[i]), dmin = has_mins(type) ? load_halves(w->panel[i] + 32) : d;
        UNROLL for (int t = 0; t < M; t++) {
            part[i][t] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(total[i][t]));
            if (!has_mins(type)) continue;
            __m512 minsum = _mm512_loadu_ps(w->minsums[i] + (t0 % RUN + t) * 16);
            part[i][t] = _mm512_fnmadd_ps(dmin, minsum, part[i][t]);
        }
    }
}

/* out[i * n + t] += the super-block of panel i times the blocks of M tokens from t0 on. */
INLINE void multiply_blocks(const int type, const int M, const int tabled, float *out, int n, const super_blocks *w,
                            int t0, const uint8_t *x, size_t x_stride) {
    __m512 part[2][MOST];
    x += (size_t)t0 * x_stride;
    if (has_blocks_of_32(type))
        legacy_parts(type, M, tabled, part, w, t0, x, x_stride);
    else
        k_parts(type, M, tabled, part, w, t0, x, x_stride);
    UNROLL for (int t = 0; t < M; t++) UNROLL for (int i = 0; i < 2; i++) {
        float *sum = out + (i * n + t0 + t) * 16;
        __m512 d = _mm512_set1_ps(token(x, x_stride, t)->d);
        _mm512_storeu_ps(sum, _mm512_fmadd_ps(part[i][t], d, _mm512_loadu_ps(sum)));
    }
}

/* The same for a run: tokens [from, to), at most RUN of them, `from` a multiple of RUN. */
INLINE void multiply_run(const int type, const int tabled, float *out, int n, super_blocks *w, int from, int to,
                         const uint8_t *x, size_t x_stride) {
    if (has_mins(type) && !has_blocks_of_32(type))
        multiply_mins(type, w, x + (size_t)from * x_stride, x_stride, to - from);
    for (int t = from; t < to;) {
        const int left = to - t;
        if (!has_pairs(type) && left >= MOST && left != 8) {
            multiply_blocks(type, MOST, tabled, out, n, w, t, x, x_stride);
            t += MOST;
        } else if (left >= 4) {
            multiply_blocks(type, 4, tabled, out, n, w, t, x, x_stride);
            t += 4;
        } else if (left >= 2) {
            multiply_blocks(type, 2, 0, out, n, w, t, x, x_stride);
            t += 2;
        } else {
            multiply_blocks(type, 1, 0, out, n, w, t, x, x_stride);
            t += 1;
        }
    }
}

/* out[i * n + t] += the super-block of panel i times the outliers of many tokens. */
INLINE void multiply_list(const int type, float *out, int n, const super_blocks *w, const outlier_list *list) {
    for (uint32_t j = 0; j < list->n;) {
        const int column = list->outliers[j].column, s = column / 32, c = column % 32;
        __m512 v[2];
        UNROLL for (int i = 0; i < 2; i++) {
            /* the column's byte becomes a lane's lowest: up to three bytes behind are read and cut off */
            __m512i q = _mm512_and_si512(load(w->bytes[i] + column / 4 * 64 + column % 4), _mm512_set1_epi32(255));
            v[i] = float_weights(type, q, w->panel[i], w->planes[i], s, c, w->n32);
        }
        do {
            const __m512 x = _mm512_set1_ps(list->outliers[j].x);
            float *sum = out + list->outliers[j].row * 16, *second = sum + n * 16;
            _mm512_storeu_ps(sum, _mm512_fmadd_ps(v[0], x, _mm512_loadu_ps(sum)));
            _mm512_storeu_ps(second, _mm512_fmadd_ps(v[1], x, _mm512_loadu_ps(second)));
            j++;
        } while (j < list->n && list->outliers[j].column == column);
    }
}

INLINE void quantised_pair(const int type, float *out, const uint8_t *panels, size_t panel_bytes, const uint8_t *x,
                           size_t x_stride, int n, int64_t columns, const outlier_list *lists) {
    const size_t bytes32 = phi3c_packed_bytes(type, 16, 256) / 8;
    const size_t ahead = n < 16 ? 2 : 1; /* super-blocks: less time each, more of them */
    for (int64_t left = columns / 32; left > 0; left -= 8) {
        super_blocks w; /* not cleared: 24 KB */
        w.bytes32 = bytes32;
        w.n32 = left < 8 ? (int)left : 8;
        w.to_come[0] = panels + ahead * bytes32 * 8;
        w.to_come[1] = w.to_come[0] + panel_bytes;
        unpack_super(type, &w, 0, panels);
        unpack_super(type, &w, 1, panels + panel_bytes);
        const int tabled = n >= TABLED;
        if (tabled) fill_scaled(type, &w);
        for (int from = 0; from < n; from += RUN) {
            int to = from + RUN < n ? from + RUN : n;
            if (tabled)
                multiply_run(type, 1, out, n, &w, from, to, x, x_stride);
            else
                multiply_run(type, 0, out, n, &w, from, to, x, x_stride);
        }
        multiply_list(type, out, n, &w, lists);
        panels += bytes32 * (size_t)w.n32;
        x += sizeof(block_x8);
        lists = list_at(lists, 1, n);
    }
}

/* -- a kernel for each type ------------------------------------------------------------------------------- */

#define TILE(name, type)                                                                                               \
    static void tile_##name(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n,                \
                            int64_t columns, const outlier_list *lists) {                                              \
        (void)lists; /* of few rows, whose sums stay in registers: from their blocks */                                \
        quantised_tile(type, out, panel, x, x_stride, n, columns);                                                     \
    }                                                                                                                  \
    static void pair_##name(float *out, const uint8_t *panels, size_t panel_bytes, const uint8_t *x, size_t x_stride,  \
                            int n, int64_t columns, const outlier_list *lists) {                                       \
        quantised_pair(type, out, panels, panel_bytes, x, x_stride, n, columns, lists);                                \
    }
TILE(q4_0, PHI3C_Q4_0)
TILE(q4_1, PHI3C_Q4_1)
TILE(q5_0, PHI3C_Q5_0)
TILE(q5_1, PHI3C_Q5_1)
TILE(q8_0, PHI3C_Q8_0)
TILE(q2_K, PHI3C_Q2_K)
TILE(q3_K, PHI3C_Q3_K)
TILE(q4_K, PHI3C_Q4_K)
TILE(q5_K, PHI3C_Q5_K)
TILE(q6_K, PHI3C_Q6_K)
TILE(iq4_nl, PHI3C_IQ4_NL)
TILE(iq4_xs, PHI3C_IQ4_XS)

#endif
