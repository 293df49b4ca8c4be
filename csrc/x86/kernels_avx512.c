/* SPDX-License-Identifier: MIT */
/* Kernels for AVX-512 F, BW, DQ, VL and VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later).
 *
 * A lane is a row of the panel: a zmm register holds four columns of 16 rows, vpdpbusd multiplies them with four
 * activations broadcast from memory at no cost, and no sum ever crosses lanes. A tile of up to TOKENS tokens shares
 * each unpacked register of weights. Zen 4 starts one vpdpbusd a cycle; unpacking runs on other pipes, every other
 * multiplication takes a slot from vpdpbusd. */
#include <immintrin.h>

#include "../expf.h"
#include "../kernels.h"

enum { TOKENS = 6 };

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

INLINE const block_x8 *token(const uint8_t *x, size_t x_stride, int t) {
    return (const block_x8 *)(x + (size_t)t * x_stride);
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

/* Legacy types: 32 columns, one float scale (and min). */
INLINE void legacy_super(const int type, const int M, __m512 part[], const uint8_t *p, const uint8_t *x,
                         size_t x_stride, int n32) {
    const int bias = type == PHI3C_Q4_0 ? 3 : type == PHI3C_Q5_0 ? 4 : 7; /* log2; unused by the types with a min */
    const int has_min = type == PHI3C_Q4_1 || type == PHI3C_Q5_1;
    UNROLL for (int t = 0; t < M; t++) part[t] = _mm512_setzero_ps();
    for (int s = 0; s < n32; s++) {
        __m512i w[8], sum[TOKENS];
        unpack32(type, w, p, s, n32);
        UNROLL for (int t = 0; t < M; t++) sum[t] =
            has_min ? _mm512_setzero_si512()
                    : _mm512_slli_epi32(broadcast32(&token(x, x_stride, t)->nsum32[s]), (unsigned)bias);
        UNROLL for (int g = 0; g < 8; g++) UNROLL for (int t = 0; t < M; t++) sum[t] =
            dot4(sum[t], w[g], token(x, x_stride, t)->q + 32 * s + 4 * g);
        __m512 d = load_halves(p + s * 32), m = has_min ? load_halves(p + n32 * 32 + s * 32) : d;
        UNROLL for (int t = 0; t < M; t++) {
            const block_x8 *block = token(x, x_stride, t);
            sum[t] = _mm512_mullo_epi32(sum[t], broadcast32(&block->factor[s]));
            part[t] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(sum[t]), part[t]);
            if (has_min) part[t] = _mm512_fmadd_ps(m, _mm512_set1_ps((float)block->sum32[s]), part[t]);
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

/* Integer scales, which fit int16, times the factor of group s: one vpmaddwd, as the upper half of a factor is 0. */
INLINE __m512i times_factor(__m512i scale, const block_x8 *block, int s) {
    return _mm512_madd_epi16(scale, broadcast32(&block->factor[s]));
}

/* q4_K, q5_K: two groups of 32 columns share a register of nibbles. */
INLINE void k32_super(const int type, const int M, __m512 part[], const uint8_t *p, const uint8_t *x, size_t x_stride) {
    const uint8_t *qh = p + 64 + 192, *qs = type == PHI3C_Q5_K ? qh + 512 : qh;
    uint8_t v[256];
    unpack_planes(v, p + 64);
    __m512i total[TOKENS], minsum[TOKENS];
    UNROLL for (int t = 0; t < M; t++) total[t] = minsum[t] = _mm512_setzero_si512();
    UNROLL for (int pair = 0; pair < 4; pair++) {
        const int s = 2 * pair;
        __m512i low[TOKENS], high[TOKENS];
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
        __m512i scale0 = _mm512_cvtepu8_epi32(load16(v + s * 16));
        __m512i scale1 = _mm512_cvtepu8_epi32(load16(v + s * 16 + 16));
        __m512i mins = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(v + 128 + pair * 32)));
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

/* Of a group of 32: 4 bits in scales_l, two in scales_h. */
INLINE __m512i iq4_xs_scale(const uint8_t *p, int s) {
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p + 32)));
    __m512i low = _mm512_cvtepu8_epi32(load16(p + 64 + s / 2 * 16));
    high = _mm512_and_si512(shift_right(high, 2 * s), _mm512_set1_epi32(3));
    low = _mm512_and_si512(shift_right(low, s % 2 * 4), _mm512_set1_epi32(15));
    return _mm512_sub_epi32(_mm512_or_si512(low, _mm512_slli_epi32(high, 4)), _mm512_set1_epi32(32));
}

/* iq4_xs: groups of 32 columns, each as a block of iq4_nl. */
INLINE void iq4_xs_super(const int M, __m512 part[], const uint8_t *p, const uint8_t *x, size_t x_stride) {
    __m512i total[TOKENS];
    UNROLL for (int t = 0; t < M; t++) total[t] = _mm512_setzero_si512();
    UNROLL for (int s = 0; s < 8; s++) {
        __m512i w[8], sum[TOKENS];
        unpack32(PHI3C_IQ4_XS, w, p, s, 8);
        UNROLL for (int t = 0; t < M; t++) sum[t] =
            _mm512_slli_epi32(broadcast32(&token(x, x_stride, t)->nsum32[s]), 7);
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
    const int bias = type == PHI3C_Q6_K ? 5 : 2; /* log2; unused by q2_K, which has mins */
    uint8_t v[256];
    if (type == PHI3C_Q3_K) unpack_planes(v, p + 32);
    const uint8_t *scales = type == PHI3C_Q3_K ? v : p + (type == PHI3C_Q6_K ? 32 : 64);
    __m512i total[TOKENS], minsum[TOKENS];
    UNROLL for (int t = 0; t < M; t++) total[t] = minsum[t] = _mm512_setzero_si512();
    UNROLL for (int s = 0; s < 8; s++) {
        __m512i w[8], first[TOKENS], second[TOKENS];
        unpack32(type, w, p, s, 8);
        UNROLL for (int t = 0; t < M; t++) {
            const block_x8 *block = token(x, x_stride, t);
            first[t] = second[t] = _mm512_setzero_si512();
            if (type != PHI3C_Q2_K) {
                first[t] = _mm512_slli_epi32(broadcast32(&block->nsum16[2 * s]), (unsigned)bias);
                second[t] = _mm512_slli_epi32(broadcast32(&block->nsum16[2 * s + 1]), (unsigned)bias);
            }
        }
        UNROLL for (int g = 0; g < 4; g++) UNROLL for (int t = 0; t < M; t++) {
            const int8_t *a = token(x, x_stride, t)->q + 32 * s + 4 * g;
            first[t] = dot4(first[t], w[g], a);
            second[t] = dot4(second[t], w[g + 4], a + 16);
        }
        __m128i bytes0 = load16(scales + s * 32);
        __m128i bytes1 = load16(scales + s * 32 + 16);
        __m512i scale0, scale1, mins = _mm512_setzero_si512();
        if (type == PHI3C_Q6_K) {
            scale0 = _mm512_cvtepi8_epi32(bytes0);
            scale1 = _mm512_cvtepi8_epi32(bytes1);
        } else {
            scale0 = _mm512_cvtepu8_epi32(bytes0);
            scale1 = _mm512_cvtepu8_epi32(bytes1);
        }
        if (type == PHI3C_Q3_K) {
            scale0 = _mm512_sub_epi32(scale0, _mm512_set1_epi32(32));
            scale1 = _mm512_sub_epi32(scale1, _mm512_set1_epi32(32));
        }
        if (type == PHI3C_Q2_K) { /* min << 4 | scale; mins of two groups side by side as 16-bit pairs */
            mins = _mm512_or_si512(_mm512_srli_epi32(scale0, 4), _mm512_slli_epi32(_mm512_srli_epi32(scale1, 4), 16));
            scale0 = _mm512_and_si512(scale0, _mm512_set1_epi32(15));
            scale1 = _mm512_and_si512(scale1, _mm512_set1_epi32(15));
        }
        UNROLL for (int t = 0; t < M; t++) {
            const block_x8 *block = token(x, x_stride, t);
            __m512i sum = _mm512_add_epi32(_mm512_mullo_epi32(first[t], scale0), _mm512_mullo_epi32(second[t], scale1));
            total[t] = _mm512_add_epi32(total[t], _mm512_mullo_epi32(sum, broadcast32(&block->factor[s])));
            if (type == PHI3C_Q2_K) minsum[t] = _mm512_dpwssd_epi32(minsum[t], mins, broadcast32(&block->sum16[2 * s]));
        }
    }
    __m512 d = load_halves(p);
    UNROLL for (int t = 0; t < M; t++) {
        part[t] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(total[t]));
        if (type == PHI3C_Q2_K) part[t] = _mm512_fnmadd_ps(load_halves(p + 32), _mm512_cvtepi32_ps(minsum[t]), part[t]);
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

/* Weights in column c of group s; see weight_at in kernels_scalar.c. */
INLINE __m512i column_weights(const int type, const uint8_t *p, int s, int c, int n32) {
    const int half = s / 4, j = s % 4; /* of the K types: quarter j of a half block */
    const uint8_t *qh;
    __m512i low, high = _mm512_setzero_si512();
    int bias = 0, high_bit = 4;
    switch (type) {
    case PHI3C_Q8_0:
        low = field(p + n32 * 32 + s * 512, c, 0, 255);
        bias = 128;
        break;
    case PHI3C_Q4_0:
    case PHI3C_Q4_1:
        low = field(p + n32 * (type == PHI3C_Q4_0 ? 32 : 64) + s * 256, c % 16, c / 16 * 4, 15);
        bias = type == PHI3C_Q4_0 ? 8 : 0;
        break;
    case PHI3C_IQ4_NL:
    case PHI3C_IQ4_XS:
        low = iq4_lookup(field(p + (type == PHI3C_IQ4_NL ? n32 * 32 : 32 + 32 + 64) + s * 256, c % 16, c / 16 * 4, 15));
        low = _mm512_and_si512(low, _mm512_set1_epi32(255));
        bias = 128;
        break;
    case PHI3C_Q5_0:
    case PHI3C_Q5_1:
        qh = p + n32 * (type == PHI3C_Q5_0 ? 32 : 64);
        low = field(qh + n32 * 64 + s * 256, c % 16, c / 16 * 4, 15);
        high = field(qh + s * 64, c % 4, c / 4, 1);
        bias = type == PHI3C_Q5_0 ? 16 : 0;
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
        bias = 32;
        break;
    case PHI3C_Q3_K:
        qh = p + 32 + 192;
        low = field(qh + 512 + half * 512, c, 2 * j, 3);
        high = field(qh, c, s, 1);
        high_bit = 2;
        bias = 4;
        break;
    default: /* Q2_K */ low = field(p + 64 + 256 + half * 512, c, 2 * j, 3);
    }
    high = _mm512_sllv_epi32(high, _mm512_set1_epi32(high_bit));
    return _mm512_sub_epi32(_mm512_or_si512(low, high), _mm512_set1_epi32(bias));
}

/* The same as floats; see float_weight_at in kernels_scalar.c. planes: six-bit scales and mins, as bytes. */
INLINE __m512 float_weights(const int type, const uint8_t *p, const uint8_t *planes, int s, int c, int n32) {
    __m512i q = column_weights(type, p, s, c, n32), scale, min = _mm512_setzero_si512();
    if (has_blocks_of_32(type)) {
        __m512 d = load_halves(p + s * 32), v = _mm512_cvtepi32_ps(q);
        const int has_min = type == PHI3C_Q4_1 || type == PHI3C_Q5_1;
        return has_min ? _mm512_fmadd_ps(d, v, load_halves(p + (n32 + s) * 32)) : _mm512_mul_ps(d, v);
    }
    const int group = 2 * s + c / 16; /* of 16 columns */
    switch (type) {
    case PHI3C_Q6_K: scale = _mm512_cvtepi8_epi32(load16(p + 32 + group * 16)); break;
    case PHI3C_IQ4_XS: scale = iq4_xs_scale(p, s); break;
    case PHI3C_Q3_K:
        scale = _mm512_sub_epi32(_mm512_cvtepu8_epi32(load16(planes + group * 16)), _mm512_set1_epi32(32));
        break;
    case PHI3C_Q2_K: /* min << 4 | scale */
        scale = _mm512_cvtepu8_epi32(load16(p + 64 + group * 16));
        min = _mm512_srli_epi32(scale, 4);
        scale = _mm512_and_si512(scale, _mm512_set1_epi32(15));
        break;
    default: /* Q4_K, Q5_K: mins of two groups side by side */
        scale = _mm512_cvtepu8_epi32(load16(planes + s * 16));
        min = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(planes + 128 + s / 2 * 32)));
        min = _mm512_and_si512(shift_right(min, s % 2 * 8), _mm512_set1_epi32(255));
    }
    __m512 v = _mm512_mul_ps(load_halves(p), _mm512_cvtepi32_ps(_mm512_mullo_epi32(q, scale)));
    const int has_min = type == PHI3C_Q4_K || type == PHI3C_Q5_K || type == PHI3C_Q2_K;
    return has_min ? _mm512_fnmadd_ps(load_halves(p + 32), _mm512_cvtepi32_ps(min), v) : v;
}

/* sum[t] += a super-block times the outliers of M tokens, by column. */
INLINE void outliers_of(const int type, int M, __m512 sum[], const uint8_t *p, const uint8_t *x, size_t x_stride,
                        int n32) {
    uint8_t unpacked[256];
    const uint8_t *planes = NULL; /* six-bit scales and mins, of the types that have them */
    if (type == PHI3C_Q3_K || type == PHI3C_Q4_K || type == PHI3C_Q5_K) {
        unpack_planes(unpacked, p + (type == PHI3C_Q3_K ? 32 : 64));
        planes = unpacked;
    }
    for (int t = 0; t < M; t++) {
        const block_x8 *block = token(x, x_stride, t);
        for (uint32_t i = 0; i < block->n_outliers; i++) {
            const uint32_t column = block->outliers[i].column;
            __m512 w = float_weights(type, p, planes, (int)(column / 32), (int)(column % 32), n32);
            sum[t] = _mm512_fmadd_ps(w, _mm512_set1_ps(block->outliers[i].x), sum[t]);
        }
    }
}

/* The same, once for all tiles of a type. */
NOINLINE void multiply_outliers(int type, int M, __m512 sum[], const uint8_t *p, const uint8_t *x, size_t x_stride,
                                int n32) {
    switch (type) {
    case PHI3C_Q4_0: outliers_of(PHI3C_Q4_0, M, sum, p, x, x_stride, n32); break;
    case PHI3C_Q4_1: outliers_of(PHI3C_Q4_1, M, sum, p, x, x_stride, n32); break;
    case PHI3C_Q5_0: outliers_of(PHI3C_Q5_0, M, sum, p, x, x_stride, n32); break;
    case PHI3C_Q5_1: outliers_of(PHI3C_Q5_1, M, sum, p, x, x_stride, n32); break;
    case PHI3C_Q8_0: outliers_of(PHI3C_Q8_0, M, sum, p, x, x_stride, n32); break;
    case PHI3C_Q2_K: outliers_of(PHI3C_Q2_K, M, sum, p, x, x_stride, n32); break;
    case PHI3C_Q3_K: outliers_of(PHI3C_Q3_K, M, sum, p, x, x_stride, n32); break;
    case PHI3C_Q4_K: outliers_of(PHI3C_Q4_K, M, sum, p, x, x_stride, n32); break;
    case PHI3C_Q5_K: outliers_of(PHI3C_Q5_K, M, sum, p, x, x_stride, n32); break;
    case PHI3C_Q6_K: outliers_of(PHI3C_Q6_K, M, sum, p, x, x_stride, n32); break;
    case PHI3C_IQ4_NL: outliers_of(PHI3C_IQ4_NL, M, sum, p, x, x_stride, n32); break;
    case PHI3C_IQ4_XS: outliers_of(PHI3C_IQ4_XS, M, sum, p, x, x_stride, n32); break;
    }
}

/* M tokens against a panel of quantised weights. */
INLINE void quantised_tokens(const int type, const int M, float *out, const uint8_t *panel, const uint8_t *x,
                             size_t x_stride, int64_t columns) {
    const size_t bytes32 = phi3c_packed_bytes(type, 16, 256) / 8;
    __m512 sum[TOKENS], part[TOKENS];
    UNROLL for (int t = 0; t < M; t++) sum[t] = _mm512_setzero_ps();
    for (int64_t left = columns / 32; left > 0; left -= 8) {
        int n32 = left < 8 ? (int)left : 8;
        uint32_t any = 0;
        super_block(type, M, part, panel, x, x_stride, n32);
        UNROLL for (int t = 0; t < M; t++) {
            const block_x8 *block = token(x, x_stride, t);
            sum[t] = _mm512_fmadd_ps(part[t], _mm512_set1_ps(block->d), sum[t]);
            any |= block->n_outliers;
        }
        if (any) multiply_outliers(type, M, sum, panel, x, x_stride, n32);
        panel += bytes32 * (size_t)n32;
        x += sizeof(block_x8);
    }
    UNROLL for (int t = 0; t < M; t++) _mm512_storeu_ps(out + t * 16, sum[t]);
}

/* Float weights, in four partial sums by column modulo 4; see float_tile in kernels_scalar.c. */
INLINE void float_tokens(const int type, const int M, float *out, const uint8_t *panel, const uint8_t *x,
                         size_t x_stride, int64_t columns) {
    __m512 sum[TOKENS][4];
    UNROLL for (int t = 0; t < M; t++) UNROLL for (int i = 0; i < 4; i++) sum[t][i] = _mm512_setzero_ps();
    for (int64_t c = 0; c < columns; c += 4) {
        UNROLL for (int i = 0; i < 4; i++) {
            __m512 w;
            if (type == PHI3C_F32)
                w = _mm512_loadu_ps(panel + (c + i) * 64);
            else if (type == PHI3C_F16)
                w = load_halves(panel + (c + i) * 32);
            else
                w = _mm512_castsi512_ps(_mm512_slli_epi32(
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(panel + (c + i) * 32))), 16));
            UNROLL for (int t = 0; t < M; t++) {
                const float *row = (const float *)(x + (size_t)t * x_stride);
                sum[t][i] = _mm512_fmadd_ps(w, _mm512_set1_ps(row[c + i]), sum[t][i]);
            }
        }
    }
    UNROLL for (int t = 0; t < M; t++) _mm512_storeu_ps(
        out + t * 16, _mm512_add_ps(_mm512_add_ps(sum[t][0], sum[t][1]), _mm512_add_ps(sum[t][2], sum[t][3])));
}

INLINE void tokens(const int type, const int M, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride,
                   int64_t columns) {
    if (type == PHI3C_F32 || type == PHI3C_F16 || type == PHI3C_BF16)
        float_tokens(type, M, out, panel, x, x_stride, columns);
    else
        quantised_tokens(type, M, out, panel, x, x_stride, columns);
}

/* Tiles of six tokens, then of four, two and one: every size more costs seconds of compile time. */
INLINE void tile(const int type, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n,
                 int64_t columns) {
    for (; n >= TOKENS; n -= TOKENS, x += TOKENS * x_stride, out += TOKENS * 16)
        tokens(type, TOKENS, out, panel, x, x_stride, columns);
    for (; n >= 4; n -= 4, x += 4 * x_stride, out += 4 * 16) tokens(type, 4, out, panel, x, x_stride, columns);
    for (; n >= 2; n -= 2, x += 2 * x_stride, out += 2 * 16) tokens(type, 2, out, panel, x, x_stride, columns);
    if (n) tokens(type, 1, out, panel, x, x_stride, columns);
}

#define TILE(name, type)                                                                                               \
    static void name(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n, int64_t columns,      \
                     const outlier_list *lists) {                                                                      \
        (void)lists; /* a few rows at a time, whose sums stay in registers, have theirs from their blocks */           \
        tile(type, out, panel, x, x_stride, n, columns);                                                               \
    }
TILE(tile_f32, PHI3C_F32)
TILE(tile_f16, PHI3C_F16)
TILE(tile_bf16, PHI3C_BF16)
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

/* -- activations ------------------------------------------------------------------------------------------ */

/* Sum of lanes by halves, as sum_lanes in kernels_scalar.c. */
INLINE float sum_lanes(__m512 v) {
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

static void quantize_plain(block_x8 *out, const float x[256]) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    uint32_t group_bits[8] = {0}, block_bits = 0;
    for (int j = 0; j < 8; j++) {
        __m512i a = _mm512_and_si512(_mm512_loadu_si512(x + 32 * j), magnitude);
        __m512i b = _mm512_and_si512(_mm512_loadu_si512(x + 32 * j + 16), magnitude);
        group_bits[j] = _mm512_reduce_max_epu32(_mm512_max_epu32(a, b));
        if (group_bits[j] > block_bits) block_bits = group_bits[j];
    }
    float largest, group[8];
    memcpy(&largest, &block_bits, 4);
    memcpy(group, group_bits, sizeof group);
    memset(out, 0, offsetof(block_x8, n_outliers));
    if (block_bits >= 0x7f800000u) {
        out->d = NAN;
        return;
    }
    if (largest < 0x1p-100f) return;
    out->d = largest / 1016.0f;
    for (int j = 0; j < 8; j++) {
        int factor = group_factor(group[j], largest), sum[2];
        __m512 scale = _mm512_set1_ps(group_scale(factor, largest));
        for (int i = 0; i < 2; i++) {
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 32 * j + 16 * i), scale));
            _mm_storeu_si128((__m128i *)(out->q + 32 * j + 16 * i), _mm512_cvtepi32_epi8(q));
            sum[i] = _mm512_reduce_add_epi32(q);
            out->nsum16[2 * j + i] = -sum[i];
            out->sum16[2 * j + i] = (int16_t)(sum[i] * factor);
        }
        out->factor[j] = factor;
        out->nsum32[j] = -(sum[0] + sum[1]);
        out->sum32[j] = (int16_t)(out->sum16[2 * j] + out->sum16[2 * j + 1]);
    }
}

/* As in kernels_scalar.c. Blocks without outliers are not copied. */
static void quantize_block(block_x8 *out, const float *x, int n) {
    float rest[256];
    if (n < 256) {
        memset(rest, 0, sizeof rest);
        x = memcpy(rest, x, (size_t)n * sizeof(float));
    }
    __m512 lanes = _mm512_setzero_ps(), largest = _mm512_setzero_ps();
    for (int i = 0; i < 256; i += 16) {
        __m512 magnitude = _mm512_abs_ps(_mm512_loadu_ps(x + i));
        lanes = _mm512_add_ps(lanes, magnitude);
        largest = _mm512_max_ps(largest, magnitude);
    }
    __m512 limit = _mm512_set1_ps(outlier_limit(sum_lanes(lanes), n));
    uint32_t n_outliers = 0;
    if (_mm512_cmp_ps_mask(largest, limit, _CMP_GT_OQ)) {
        for (int i = 0; i < 256; i += 16) {
            __m512 v = _mm512_loadu_ps(x + i);
            __mmask16 apart = _mm512_cmp_ps_mask(_mm512_abs_ps(v), limit, _CMP_GT_OQ);
            for (uint32_t lanes_apart = apart; lanes_apart; lanes_apart &= lanes_apart - 1) {
                int column = i + lowest_bit(lanes_apart);
                out->outliers[n_outliers++] = (outlier_x8){x[column], (uint32_t)column};
            }
            _mm512_storeu_ps(rest + i, _mm512_mask_mov_ps(v, apart, _mm512_setzero_ps())); /* x may be rest */
        }
        x = rest;
    }
    quantize_plain(out, x);
    out->n_outliers = n_outliers;
}

static void quantize_row(block_x8 *out, const float *x, int64_t columns) {
    for (; columns > 0; columns -= 256, x += 256) quantize_block(out++, x, columns < 256 ? (int)columns : 256);
}

static void rms_norm_row(float *out, const float *x, const float *weight, float eps, int64_t columns) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < columns; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(sum_lanes(squares) / (float)columns + eps));
    for (int64_t i = 0; i < columns; i += 16)
        _mm512_storeu_ps(out + i,
                         _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(weight + i)));
}

/* phi3c_expf, lane by lane. */
INLINE __m512 exp_lanes(__m512 x) {
    const __m512 round = _mm512_set1_ps(PHI3C_ROUND), one = _mm512_set1_ps(1.0f);
    __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(PHI3C_LOG2E), round);
    __m512 n = _mm512_sub_ps(shifted, round);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-PHI3C_LN2_HI), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(-PHI3C_LN2_LO), r);
    __m512 p = _mm512_set1_ps(PHI3C_E6);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(PHI3C_E5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(PHI3C_E4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(PHI3C_E3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(PHI3C_E2));
    p = _mm512_fmadd_ps(p, r, one);
    p = _mm512_fmadd_ps(p, r, one);
    p = _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
    p = _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, _mm512_set1_ps(PHI3C_EXP_MIN), _CMP_LT_OQ), _mm512_setzero_ps());
    p = _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, _mm512_set1_ps(PHI3C_EXP_MAX), _CMP_GT_OQ),
                           _mm512_set1_ps(INFINITY));
    return _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

static void silu_mul_row(float *out, const float *gate, const float *up, int64_t n) {
    const __m512 sign = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1.0f);
    for (int64_t i = 0; i < n; i += 16) {
        __m512 g = _mm512_loadu_ps(gate + i);
        __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, exp_lanes(_mm512_xor_ps(g, sign))));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(silu, _mm512_loadu_ps(up + i)));
    }
}

static void to_f16(f16 *out, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 16)
        _mm256_storeu_si256((__m256i *)(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
}

/* -- attention -------------------------------------------------------------------------------------------- */

/* What queries, or weights of keys, are multiplied with: row k is a dimension of 64 keys, or a value. */
typedef struct {
    const uint8_t *data, *next; /* the next page's is fetched while this one's is read */
    const float *scales;        /* of q8_0: [k / 32][columns] of keys, [k][columns / 32] of values */
    int columns;
} factor;

enum { HALVES, Q8_KEYS, Q8_VALUES, FLOATS };
enum { ROWS = 12 }; /* of a product, with 16 columns: 12 sums in registers */

/* 16 columns, from c on, of row k. */
INLINE __m512 factor16(const int kind, factor b, int k, int c) {
    size_t at = (size_t)(k * b.columns + c);
    if (kind == FLOATS) return _mm512_loadu_ps((const float *)b.data + at);
    if (kind == HALVES) return load_halves(b.data + 2 * at);
    __m512 q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(b.data + at))));
    if (kind == Q8_KEYS) return _mm512_mul_ps(q, _mm512_loadu_ps(b.scales + k / 32 * b.columns + c));
    return _mm512_mul_ps(q, _mm512_set1_ps(b.scales[k * (b.columns / 32) + c / 32]));
}

/* Ask for what 16 N columns, from c on, of row k are on the next page. */
INLINE void fetch(const int kind, const int N, factor b, int k, int c) {
    const int width = kind == HALVES ? 2 : 1;
    const uint8_t *p = b.next + width * (k * b.columns + c);
    UNROLL for (int i = 0; i < (16 * N * width + 63) / 64; i++) _mm_prefetch((const char *)(p + 64 * i), _MM_HINT_T1);
}

/* out[i][v] += sum_k a[i][k] b[k][c + v], in order of k, from <= k < to, for M rows and N times 16 columns. */
INLINE void multiply(const int kind, const int M, const int N, float *out, int out_stride, const float *a, int a_stride,
                     factor b, int c, int from, int to) {
    __m512 sum[ROWS][6];
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int v = 0; v < N; v++) sum[i][v] =
        _mm512_loadu_ps(out + i * out_stride + 16 * v);
    for (int k = from; k < to; k++) {
        if (kind != FLOATS) fetch(kind, N, b, k, c);
        UNROLL for (int v = 0; v < N; v++) {
            __m512 row = factor16(kind, b, k, c + 16 * v);
            UNROLL for (int i = 0; i < M; i++) sum[i][v] =
                _mm512_fmadd_ps(_mm512_set1_ps(a[i * a_stride + k]), row, sum[i][v]);
        }
    }
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int v = 0; v < N; v++)
        _mm512_storeu_ps(out + i * out_stride + 16 * v, sum[i][v]);
}

/* The same for 16 columns of floats and any number of rows up to ROWS. */
static void multiply_floats(int rows, float *out, int out_stride, const float *a, int a_stride, const float *b,
                            int from, int to) {
    factor floats = {(const uint8_t *)b, NULL, NULL, 16};
    if (rows == ROWS) {
        multiply(FLOATS, ROWS, 1, out, out_stride, a, a_stride, floats, 0, from, to);
        return;
    }
    for (; rows >= 4; rows -= 4, out += 4 * out_stride, a += 4 * a_stride)
        multiply(FLOATS, 4, 1, out, out_stride, a, a_stride, floats, 0, from, to);
    for (; rows > 0; rows--, out += out_stride, a += a_stride)
        multiply(FLOATS, 1, 1, out, out_stride, a, a_stride, floats, 0, from, to);
}

/* slice[k][0..15] = b[k][c..c + 15] for from <= k < to */
INLINE void to_floats(const int kind, float *slice, factor b, int c, int from, int to) {
    for (int k = from; k < to; k++) {
        fetch(kind, 1, b, k, c);
        _mm512_storeu_ps(slice + 16 * k, factor16(kind, b, k, c));
    }
}

/* The largest of `max` and the scores p of keys [first, last); other scores become -inf. */
INLINE float mask_scores(float p[PHI3C_TILE], float max, int first, int last) {
    uint64_t below_last = last >= PHI3C_TILE ? ~0ull : (1ull << last) - 1, seen = below_last >> first << first;
    __m512 largest = _mm512_set1_ps(max);
    UNROLL for (int j = 0; j < PHI3C_TILE; j += 16) {
        __m512 score = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(seen >> j), _mm512_loadu_ps(p + j));
        _mm512_storeu_ps(p + j, score);
        largest = _mm512_max_ps(score, largest); /* in this order a NaN score is passed over */
    }
    return _mm512_reduce_max_ps(largest);
}

/* Scores become weights; returns their sum. */
INLINE float weigh_scores(float p[PHI3C_TILE], float max) {
    __m512 lanes = _mm512_setzero_ps();
    UNROLL for (int j = 0; j < PHI3C_TILE; j += 16) {
        __m512 weight = exp_lanes(_mm512_sub_ps(_mm512_loadu_ps(p + j), _mm512_set1_ps(max)));
        _mm512_storeu_ps(p + j, weight);
        lanes = _mm512_add_ps(lanes, weight);
    }
    return sum_lanes(lanes);
}

/* n rows of scores become weights, and the state moves on but for what these keys add to o. Each pass over all rows
 * leaves the processor many that do not wait for one another. */
static void softmax(float *max, float *sum, float *o, float (*p)[PHI3C_TILE], const int *first, const int *last, int n,
                    int head_dim) {
    float kept[(PHI3C_QUERIES + 15) / 16 * 16] = {0};
    for (int i = 0; i < n; i++) {
        float largest = mask_scores(p[i], max[i], first[i], last[i]);
        kept[i] = max[i] - largest;
        max[i] = largest;
    }
    for (int i = 0; i < n; i += 16) _mm512_storeu_ps(kept + i, exp_lanes(_mm512_loadu_ps(kept + i)));
    for (int i = 0; i < n; i++) sum[i] = fmaf(sum[i], kept[i], weigh_scores(p[i], max[i]));
    for (int i = 0; i < n; i++) {
        if (kept[i] == 1.0f) continue;
        float *row = o + i * head_dim;
        for (int d = 0; d < head_dim; d += 16)
            _mm512_storeu_ps(row + d, _mm512_mul_ps(_mm512_loadu_ps(row + d), _mm512_set1_ps(kept[i])));
    }
}

/* One query: the page is read once, as it is, a dimension of all keys and a whole value at a time. */
INLINE void attend_one(const int keys_kind, const int values_kind, float *max, float *sum, float *o, const float *q,
                       factor keys, factor values, int first, int last, int head_dim) {
    float p[1][PHI3C_TILE] = {{0}};
    multiply(keys_kind, 1, 4, p[0], 0, q, 0, keys, 0, 0, head_dim);
    softmax(max, sum, o, p, &first, &last, 1, head_dim);
    int d = 0;
    if (head_dim % 96 == 0)
        for (; d < head_dim; d += 96) multiply(values_kind, 1, 6, o + d, 0, p[0], 0, values, d, first, last);
    for (; head_dim - d >= 64; d += 64) multiply(values_kind, 1, 4, o + d, 0, p[0], 0, values, d, first, last);
    for (; d < head_dim; d += 16) multiply(values_kind, 1, 1, o + d, 0, p[0], 0, values, d, first, last);
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

static void attend_f16(float *max, float *sum, float *o, const float *q, const uint8_t *kv, const uint8_t *next,
                       const int *first, const int *last, int n, int head_dim) {
    size_t half = phi3c_kv_bytes(PHI3C_F16, head_dim) / 2;
    factor keys = {kv, next, NULL, PHI3C_TILE}, values = {kv + half, next + half, NULL, head_dim};
    if (n == 1)
        attend_one(HALVES, HALVES, max, sum, o, q, keys, values, *first, *last, head_dim);
    else
        attend_several(HALVES, HALVES, max, sum, o, q, keys, values, first, last, n, head_dim);
}

static void attend_q8_0(float *max, float *sum, float *o, const float *q, const uint8_t *kv, const uint8_t *next,
                        const int *first, const int *last, int n, int head_dim) {
    float scales[2][PHI3C_TILE * PHI3C_MAX_HEAD_DIM / 32];
    size_t half = phi3c_kv_bytes(PHI3C_Q8_0, head_dim) / 2, scale_bytes = q8_0_scale_bytes(head_dim);
    for (int i = 0; i < 2; i++)
        for (size_t g = 0; g < scale_bytes / 2; g += 16)
            _mm512_storeu_ps(scales[i] + g, load_halves(kv + half * (size_t)i + 2 * g));
    kv += scale_bytes;
    next += scale_bytes;
    factor keys = {kv, next, scales[0], PHI3C_TILE}, values = {kv + half, next + half, scales[1], head_dim};
    if (n == 1)
        attend_one(Q8_KEYS, Q8_VALUES, max, sum, o, q, keys, values, *first, *last, head_dim);
    else
        attend_several(Q8_KEYS, Q8_VALUES, max, sum, o, q, keys, values, first, last, n, head_dim);
}

/* -- limit ------------------------------------------------------------------------------------------------ */

static int64_t peak(void) {
    enum { CHAINS = 12 };       /* enough to hide latencies */
    volatile int8_t factor = 1; /* known to nobody at compile time */
    __m512i one = _mm512_set1_epi8(factor), weights = _mm512_set1_epi8(factor), sum[CHAINS];
    /* chains that begin alike would be computed once */
    UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_set1_epi32(i);
    for (int round = 0; round < PEAK_ROUNDS; round++)
        UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], weights, one);
    int64_t n = 0;
    for (int i = 0; i < CHAINS; i++) {
        int32_t lanes[16];
        _mm512_storeu_si512(lanes, sum[i]);
        for (int j = 0; j < 16; j++) n += lanes[j] - i;
    }
    return n;
}

const phi3c_kernels phi3c_kernels_avx512 = {
    .name = "avx512",
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
