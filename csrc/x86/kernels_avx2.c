/* SPDX-License-Identifier: MIT */
/* Kernels for AVX2, FMA and F16C (Haswell, Zen and later).
 *
 * A lane is a row of the panel: a ymm register holds four columns of 8 rows, and a super-block is walked twice, once
 * for each half of the 16 rows. vpmaddubsw multiplies four columns with four activations, broadcast from memory, into
 * two int16 sums per row. These add up as int16 for as long as they cannot overflow; one vpmaddwd by the scale, which
 * stands in both halves of a lane, then makes them one scaled int32. No sum ever crosses lanes. A tile of up to TOKENS
 * tokens shares each unpacked register of weights. */
#include <immintrin.h>

#include "../expf.h"
#include "../kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* Sums of integers are associative, which gcc takes as leave to turn a chain of them into a tree, for which 16
 * registers do not suffice. This keeps a sum in its register and in its order. */
#ifdef __GNUC__
#define KEEP(sum) __asm__("" : "+x"(sum))
#else
#define KEEP(sum)
#endif

enum { TOKENS = 6, FLOAT_TOKENS = 3 };

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

INLINE const block_x8 *token(const uint8_t *x, size_t x_stride, int t) {
    return (const block_x8 *)(x + (size_t)t * x_stride);
}

/* Columns 4 g to 4 g + 3 of 32-column group `base + j` in a super-block of n32, for half 0 or 1 of the rows. base is 0
 * or 4 for groups of 16, even for q4_K and q5_K. Unsigned, but signed for q8_0. */
INLINE __m256i weights4(const int type, const uint8_t *p, int half, int base, const int j, const int g, int n32) {
    const uint8_t *q = p + 32 * half; /* in every array of [16 rows][4] bytes */
    __m256i v;
    if (type == PHI3C_Q8_0) return _mm256_xor_si256(load(q + n32 * 32 + base * 512 + g * 64), _mm256_set1_epi8(-128));
    if (type == PHI3C_Q4_0 || type == PHI3C_Q4_1) {
        v = load(q + n32 * (type == PHI3C_Q4_0 ? 32 : 64) + base * 256 + g % 4 * 64);
        return g < 4 ? low_nibbles(v) : high_nibbles(v);
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

/* How many vpmaddubsw, of 2 * max(w) * 127 each, an int16 holds: below 2^15 = 32768 are 8 * 3810 for 4 bits,
 * 4 * 7874 for 5, 2 * 16002 for 6, 1 * 32512 for q8_0's -128, and 8 * 1778 for q3_K. */
INLINE int int16_terms(const int type) {
    return type == PHI3C_Q8_0                                               ? 1
           : type == PHI3C_Q6_K                                             ? 2
           : type == PHI3C_Q5_0 || type == PHI3C_Q5_1 || type == PHI3C_Q5_K ? 4
                                                                            : 8;
}

/* sum[t] = scale * (columns 4 from to 4 to - 1 of group base + j, times token t), for 8 rows. */
INLINE void scaled_dot(const int type, const int M, __m256i sum[], const int from, const int to, __m256i scale,
                       const uint8_t *p, int half, int base, const int j, int n32, const uint8_t *x, size_t x_stride) {
    const int terms = int16_terms(type);
    __m256i chain[TOKENS];
    UNROLL for (int g = from; g < to; g++) {
        const int term = (g - from) % terms;
        __m256i w = weights4(type, p, half, base, j, g, n32);
        UNROLL for (int t = 0; t < M; t++) {
            __m256i a = broadcast32(token(x, x_stride, t)->q + 32 * (base + j) + 4 * g), product;
            if (type == PHI3C_Q8_0)
                product = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
            else
                product = _mm256_maddubs_epi16(w, a);
            chain[t] = term == 0 ? product : _mm256_add_epi16(chain[t], product);
            KEEP(chain[t]);
            if (term == terms - 1 || g == to - 1) {
                __m256i scaled = _mm256_madd_epi16(chain[t], scale);
                sum[t] = g - from < terms ? scaled : _mm256_add_epi32(sum[t], scaled);
                KEEP(sum[t]);
            }
        }
    }
}

/* Legacy types: 32 columns, one float scale (and min). */
INLINE void legacy_super(const int type, const int M, __m256 part[], const uint8_t *p, int half, const uint8_t *x,
                         size_t x_stride, int n32, uint32_t groups) {
    const int bias = type == PHI3C_Q4_0 ? 3 : 4; /* log2; of q4_0 and q5_0 */
    const int has_min = type == PHI3C_Q4_1 || type == PHI3C_Q5_1, has_bias = !has_min && type != PHI3C_Q8_0;
    UNROLL for (int t = 0; t < M; t++) part[t] = _mm256_setzero_ps();
    for (int s = 0; s < n32; s++) {
        if (!(groups >> s & 1)) continue;
        __m256i sum[TOKENS];
        scaled_dot(type, M, sum, 0, 8, _mm256_set1_epi16(1), p, half, s, 0, n32, x, x_stride);
        __m256 d = load_halves(p + s * 32 + half * 16), m = d;
        if (has_min) m = load_halves(p + n32 * 32 + s * 32 + half * 16);
        UNROLL for (int t = 0; t < M; t++) {
            const block_x8 *block = token(x, x_stride, t);
            if (has_bias) sum[t] = _mm256_add_epi32(sum[t], _mm256_slli_epi32(broadcast32(&block->nsum32[s]), bias));
            sum[t] = _mm256_sllv_epi32(sum[t], broadcast32(&block->shift[s]));
            part[t] = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(sum[t]), part[t]);
            if (has_min) part[t] = _mm256_fmadd_ps(m, _mm256_set1_ps((float)block->sum32[s]), part[t]);
        }
    }
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

/* q4_K, q5_K: groups of 32 columns. v: unpacked planes. */
INLINE void k32_super(const int type, const int M, __m256 part[], const uint8_t *p, const uint8_t *v, int half,
                      const uint8_t *x, size_t x_stride, uint32_t groups) {
    __m256i total[TOKENS], minsum[TOKENS];
    UNROLL for (int t = 0; t < M; t++) total[t] = minsum[t] = _mm256_setzero_si256();
    for (int s = 0; s < 8; s += 2) {
        if (!(groups >> s & 3)) continue;
        UNROLL for (int j = 0; j < 2; j++) {
            __m256i sum[TOKENS], scale = twice(_mm256_cvtepu8_epi32(load8(v + (s + j) * 16 + half * 8)));
            scaled_dot(type, M, sum, 0, 8, scale, p, half, s, j, 8, x, x_stride);
            UNROLL for (int t = 0; t < M; t++) {
                sum[t] = _mm256_sllv_epi32(sum[t], broadcast32(&token(x, x_stride, t)->shift[s + j]));
                total[t] = _mm256_add_epi32(total[t], sum[t]);
                KEEP(total[t]);
            }
        }
        __m256i mins = _mm256_cvtepu8_epi16(load16(v + 128 + s * 16 + half * 16));
        UNROLL for (int t = 0; t < M; t++) {
            __m256i sums = broadcast32(&token(x, x_stride, t)->sum32[s]);
            minsum[t] = _mm256_add_epi32(minsum[t], _mm256_madd_epi16(mins, sums));
        }
    }
    __m256 d = load_halves(p + half * 16), dmin = load_halves(p + 32 + half * 16);
    UNROLL for (int t = 0; t < M; t++) part[t] =
        _mm256_fnmadd_ps(dmin, _mm256_cvtepi32_ps(minsum[t]), _mm256_mul_ps(d, _mm256_cvtepi32_ps(total[t])));
}

/* q2_K, q3_K, q6_K: groups of 16 columns. v: scales, and mins of q2_K, as [16][16 rows] bytes. minsum is the sum of
 * mins times activations, or of scales times activations for the types whose weights have a bias: |minsum| is at most
 * 16 * 128 * 16256 < 2^25, and a biased sum is exact modulo 2^32. */
INLINE void k16_super(const int type, const int M, __m256 part[], const uint8_t *p, const uint8_t *v, int half,
                      const uint8_t *x, size_t x_stride, uint32_t groups) {
    const int bias = type == PHI3C_Q6_K ? 5 : 2; /* log2; of q6_K and q3_K */
    __m256i total[TOKENS], minsum[TOKENS];
    UNROLL for (int t = 0; t < M; t++) total[t] = minsum[t] = _mm256_setzero_si256();
    for (int base = 0; base < 8; base += 4) UNROLL for (int j = 0; j < 4; j++) {
            const int s = base + j;
            if (!(groups >> s & 1)) continue;
            __m128i bytes0 = load8(v + s * 32 + half * 8), bytes1 = load8(v + s * 32 + 16 + half * 8);
            __m256i scale0, scale1, mins, first[TOKENS], second[TOKENS];
            if (type == PHI3C_Q6_K) {
                scale0 = twice(_mm256_cvtepi8_epi32(bytes0));
                scale1 = twice(_mm256_cvtepi8_epi32(bytes1));
            } else {
                scale0 = twice(_mm256_cvtepu8_epi32(bytes0));
                scale1 = twice(_mm256_cvtepu8_epi32(bytes1));
            }
            if (type == PHI3C_Q3_K) {
                scale0 = _mm256_sub_epi16(scale0, _mm256_set1_epi16(32));
                scale1 = _mm256_sub_epi16(scale1, _mm256_set1_epi16(32));
            }
            mins = even_odd(scale0, scale1);
            if (type == PHI3C_Q2_K) { /* min << 4 | scale */
                mins = _mm256_srli_epi16(mins, 4);
                scale0 = _mm256_and_si256(scale0, _mm256_set1_epi16(15));
                scale1 = _mm256_and_si256(scale1, _mm256_set1_epi16(15));
            }
            scaled_dot(type, M, first, 0, 4, scale0, p, half, base, j, 8, x, x_stride);
            scaled_dot(type, M, second, 4, 8, scale1, p, half, base, j, 8, x, x_stride);
            UNROLL for (int t = 0; t < M; t++) {
                const block_x8 *block = token(x, x_stride, t);
                __m256i sum = _mm256_add_epi32(first[t], second[t]);
                total[t] = _mm256_add_epi32(total[t], _mm256_sllv_epi32(sum, broadcast32(&block->shift[s])));
                KEEP(total[t]);
                minsum[t] = _mm256_add_epi32(minsum[t], _mm256_madd_epi16(mins, broadcast32(&block->sum16[2 * s])));
            }
        }
    __m256 d = load_halves(p + half * 16);
    UNROLL for (int t = 0; t < M; t++) {
        if (type != PHI3C_Q2_K) total[t] = _mm256_sub_epi32(total[t], _mm256_slli_epi32(minsum[t], bias));
        part[t] = _mm256_mul_ps(d, _mm256_cvtepi32_ps(total[t]));
        if (type == PHI3C_Q2_K)
            part[t] = _mm256_fnmadd_ps(load_halves(p + 32 + half * 16), _mm256_cvtepi32_ps(minsum[t]), part[t]);
    }
}

/* part[t] = a super-block of half a panel times M blocks, of which only the groups of 32 set in `groups` are not 0. */
INLINE void super_block(const int type, const int M, __m256 part[], const uint8_t *p, const uint8_t *v, int half,
                        const uint8_t *x, size_t x_stride, int n32, uint32_t groups) {
    if (type <= PHI3C_Q8_0)
        legacy_super(type, M, part, p, half, x, x_stride, n32, groups);
    else if (type == PHI3C_Q4_K || type == PHI3C_Q5_K)
        k32_super(type, M, part, p, v, half, x, x_stride, groups);
    else
        k16_super(type, M, part, p, v, half, x, x_stride, groups);
}

/* Types that read two planes of a super-block by turns, which the hardware fetches ahead badly. With one token, asking
 * for the super-block after next makes q5_0 1.4, q5_K 1.04 to 1.35, q6_K 1.3 to 1.6 and q3_K 1.09 times as fast from
 * memory, but q4_K, q4_0, q8_0 and q2_K, one plane each, 0.82 to 1.06 times (docs/performance.md). */
INLINE int has_high_plane(const int type) {
    return type == PHI3C_Q5_0 || type == PHI3C_Q5_1 || type == PHI3C_Q3_K || type == PHI3C_Q5_K || type == PHI3C_Q6_K;
}

/* M tokens against a panel of quantised weights. */
INLINE void quantised_tokens(const int type, const int M, float *out, const uint8_t *panel, const uint8_t *x,
                             size_t x_stride, int64_t columns) {
    const size_t bytes32 = phi3c_packed_bytes(type, 16, 256) / 8, second_blocks = phi3c_x8_bytes(columns) / 2;
    __m256 sum[2][TOKENS], part[TOKENS];
    UNROLL for (int t = 0; t < M; t++) sum[0][t] = sum[1][t] = _mm256_setzero_ps();
    for (int64_t left = columns / 32; left > 0; left -= 8) {
        int n32 = left < 8 ? (int)left : 8;
        uint8_t planes[256];
        const uint8_t *v = planes; /* integer scales of the K types */
        if (type == PHI3C_Q3_K)
            unpack_planes(planes, panel + 32);
        else if (type == PHI3C_Q4_K || type == PHI3C_Q5_K)
            unpack_planes(planes, panel + 64);
        else
            v = panel + (type == PHI3C_Q6_K ? 32 : 64);
        if (M == 1 && has_high_plane(type))
            for (size_t i = 0; i < bytes32 * 8; i += 64)
                _mm_prefetch((const char *)panel + 2 * bytes32 * 8 + i, _MM_HINT_T1);
        for (int half = 0; half < 2; half++) {
            super_block(type, M, part, panel, v, half, x, x_stride, n32, 0xff);
            UNROLL for (int t = 0; t < M; t++) sum[half][t] =
                _mm256_fmadd_ps(part[t], _mm256_set1_ps(token(x, x_stride, t)->d), sum[half][t]);
        }
        /* Token by token: one group in eleven has outliers, but of six tokens together up to six in eleven. */
        for (int t = 0; t < M; t++) {
            uint32_t groups = token(x, x_stride, t)->outliers;
            if (!groups) continue;
            const uint8_t *second = x + (size_t)t * x_stride + second_blocks;
            __m256 d = _mm256_set1_ps(token(second, 0, 0)->d);
            for (int half = 0; half < 2; half++) {
                super_block(type, 1, part, panel, v, half, second, 0, n32, groups);
                sum[half][t] = _mm256_fmadd_ps(part[0], d, sum[half][t]);
            }
        }
        panel += bytes32 * (size_t)n32;
        x += sizeof(block_x8);
    }
    UNROLL for (int t = 0; t < M; t++) {
        _mm256_storeu_ps(out + t * 16, sum[0][t]);
        _mm256_storeu_ps(out + t * 16 + 8, sum[1][t]);
    }
}

/* Float weights, in four partial sums by column modulo 4; see float_tile in kernels_scalar.c. */
INLINE void float_tokens(const int type, const int M, float *out, const uint8_t *panel, const uint8_t *x,
                         size_t x_stride, int64_t columns) {
    for (int half = 0; half < 2; half++) {
        __m256 sum[FLOAT_TOKENS][4];
        UNROLL for (int t = 0; t < M; t++) UNROLL for (int i = 0; i < 4; i++) sum[t][i] = _mm256_setzero_ps();
        for (int64_t c = 0; c < columns; c += 4) {
            UNROLL for (int i = 0; i < 4; i++) {
                __m256 w;
                if (type == PHI3C_F32)
                    w = _mm256_loadu_ps((const float *)(panel + (c + i) * 64 + half * 32));
                else if (type == PHI3C_F16)
                    w = load_halves(panel + (c + i) * 32 + half * 16);
                else
                    w = _mm256_castsi256_ps(
                        _mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(panel + (c + i) * 32 + half * 16)), 16));
                UNROLL for (int t = 0; t < M; t++) {
                    const float *row = (const float *)(x + (size_t)t * x_stride);
                    sum[t][i] = _mm256_fmadd_ps(w, _mm256_set1_ps(row[c + i]), sum[t][i]);
                }
            }
        }
        UNROLL for (int t = 0; t < M; t++)
            _mm256_storeu_ps(out + t * 16 + half * 8,
                             _mm256_add_ps(_mm256_add_ps(sum[t][0], sum[t][1]), _mm256_add_ps(sum[t][2], sum[t][3])));
    }
}

INLINE void tokens(const int type, const int M, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride,
                   int64_t columns) {
    if (type == PHI3C_F32 || type == PHI3C_F16 || type == PHI3C_BF16)
        float_tokens(type, M, out, panel, x, x_stride, columns);
    else
        quantised_tokens(type, M, out, panel, x, x_stride, columns);
}

/* Tiles of as many tokens as registers hold sums for, then of three, of two, of one. */
INLINE void tile(const int type, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n,
                 int64_t columns) {
    const int most = type == PHI3C_F32 || type == PHI3C_F16 || type == PHI3C_BF16 ? FLOAT_TOKENS : TOKENS;
    for (; n >= most; n -= most, x += (size_t)most * x_stride, out += most * 16)
        tokens(type, most, out, panel, x, x_stride, columns);
    for (; n >= 3; n -= 3, x += 3 * x_stride, out += 3 * 16) tokens(type, 3, out, panel, x, x_stride, columns);
    for (; n >= 2; n -= 2, x += 2 * x_stride, out += 2 * 16) tokens(type, 2, out, panel, x, x_stride, columns);
    if (n) tokens(type, 1, out, panel, x, x_stride, columns);
}

#define TILE(name, type)                                                                                               \
    static void name(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n, int64_t columns) {    \
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

/* -- activations ------------------------------------------------------------------------------------------ */

INLINE __m128i upper(__m256i v) { return _mm256_extracti128_si256(v, 1); }

/* Sum of 16 lanes, 8 in each of a and b, by halves, as sum_lanes in kernels_scalar.c. */
INLINE float sum_lanes(__m256 a, __m256 b) {
    a = _mm256_add_ps(a, b);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

INLINE uint32_t max_u32(__m256i v) {
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), upper(v));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1)));
}

INLINE int sum_i32(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), upper(v));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

static void quantize_plain(block_x8 *out, float group[8], const float x[256]) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    uint32_t group_bits[8] = {0}, block_bits = 0;
    for (int j = 0; j < 8; j++) {
        __m256i largest = _mm256_setzero_si256();
        for (int i = 0; i < 32; i += 8)
            largest = _mm256_max_epu32(largest, _mm256_and_si256(load((const uint8_t *)(x + 32 * j + i)), magnitude));
        group_bits[j] = max_u32(largest);
        if (group_bits[j] > block_bits) block_bits = group_bits[j];
    }
    float largest;
    memcpy(&largest, &block_bits, 4);
    memcpy(group, group_bits, sizeof group_bits);
    memset(out, 0, sizeof *out);
    if (block_bits >= 0x7f800000u) {
        out->d = NAN;
        return;
    }
    if (largest < 0x1p-100f) return;
    out->d = largest / 1016.0f;
    float scale = 127.0f / largest;
    for (int j = 0; j < 8; j++) {
        int doublings = (group[j] * 2.0f <= largest) + (group[j] * 4.0f <= largest) + (group[j] * 8.0f <= largest);
        int shift = 3 - doublings, sum[2];
        __m256 group_scale = _mm256_set1_ps(scale * (float)(1 << doublings));
        for (int i = 0; i < 2; i++) {
            const float *from = x + 32 * j + 16 * i;
            __m256i q0 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), group_scale));
            __m256i q1 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8), group_scale));
            __m128i words0 = _mm_packs_epi32(_mm256_castsi256_si128(q0), upper(q0));
            __m128i words1 = _mm_packs_epi32(_mm256_castsi256_si128(q1), upper(q1));
            _mm_storeu_si128((__m128i *)(out->q + 32 * j + 16 * i), _mm_packs_epi16(words0, words1));
            sum[i] = sum_i32(_mm256_add_epi32(q0, q1));
            out->nsum16[2 * j + i] = -sum[i];
            out->sum16[2 * j + i] = (int16_t)(sum[i] * (1 << shift));
        }
        out->shift[j] = shift;
        out->nsum32[j] = -(sum[0] + sum[1]);
        out->sum32[j] = (int16_t)(out->sum16[2 * j] + out->sum16[2 * j + 1]);
    }
}

/* As in kernels_scalar.c: 16 lanes of magnitudes, then the outliers once more. */
static void quantize_block(block_x8 *out, block_x8 *second, const float *x, int n) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    float padded[256] = {0}, left[256] = {0}, group[8];
    if (n < 256) x = memcpy(padded, x, (size_t)n * sizeof(float));
    quantize_plain(out, group, x);
    __m256 lanes[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int i = 0; i < 256; i += 8)
        lanes[i / 8 % 2] = _mm256_add_ps(lanes[i / 8 % 2], _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
    out->outliers = find_outliers(out, group, sum_lanes(lanes[0], lanes[1]), n);
    second->d = 0.0f;
    if (!out->outliers) return;
    for (int i = 0; i < 256; i += 8) {
        if (!(out->outliers >> (i / 32) & 1)) continue;
        __m256 q = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8((const uint8_t *)(out->q + i))));
        __m256 step = _mm256_set1_ps(out->d * (float)(1 << out->shift[i / 32]));
        _mm256_storeu_ps(left + i, _mm256_fnmadd_ps(q, step, _mm256_loadu_ps(x + i)));
    }
    quantize_plain(second, group, left);
}

static void quantize_row(block_x8 *out, block_x8 *second, const float *x, int64_t columns) {
    for (; columns > 0; columns -= 256, x += 256)
        quantize_block(out++, second++, x, columns < 256 ? (int)columns : 256);
}

static void rms_norm_row(float *out, const float *x, const float *weight, float eps, int64_t columns) {
    __m256 squares0 = _mm256_setzero_ps(), squares1 = _mm256_setzero_ps();
    for (int64_t i = 0; i < columns; i += 16) {
        __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
        squares0 = _mm256_fmadd_ps(a, a, squares0);
        squares1 = _mm256_fmadd_ps(b, b, squares1);
    }
    __m256 scale = _mm256_set1_ps(1.0f / sqrtf(sum_lanes(squares0, squares1) / (float)columns + eps));
    for (int64_t i = 0; i < columns; i += 8)
        _mm256_storeu_ps(out + i,
                         _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), scale), _mm256_loadu_ps(weight + i)));
}

/* phi3c_expf, lane by lane. */
INLINE __m256 exp_lanes(__m256 x) {
    const __m256 round = _mm256_set1_ps(PHI3C_ROUND), one = _mm256_set1_ps(1.0f);
    __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(PHI3C_LOG2E), round);
    __m256 n = _mm256_sub_ps(shifted, round);
    __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-PHI3C_LN2_HI), x);
    r = _mm256_fmadd_ps(n, _mm256_set1_ps(-PHI3C_LN2_LO), r);
    __m256 p = _mm256_set1_ps(PHI3C_E6);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(PHI3C_E5));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(PHI3C_E4));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(PHI3C_E3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(PHI3C_E2));
    p = _mm256_fmadd_ps(p, r, one);
    p = _mm256_fmadd_ps(p, r, one);
    p = _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
    p = _mm256_blendv_ps(p, _mm256_setzero_ps(), _mm256_cmp_ps(x, _mm256_set1_ps(PHI3C_EXP_MIN), _CMP_LT_OQ));
    p = _mm256_blendv_ps(p, _mm256_set1_ps(INFINITY), _mm256_cmp_ps(x, _mm256_set1_ps(PHI3C_EXP_MAX), _CMP_GT_OQ));
    return _mm256_blendv_ps(p, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

static void silu_mul_row(float *out, const float *gate, const float *up, int64_t n) {
    const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    for (int64_t i = 0; i < n; i += 8) {
        __m256 g = _mm256_loadu_ps(gate + i);
        __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, exp_lanes(_mm256_xor_ps(g, sign))));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
    }
}

static void to_f16(f16 *out, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
}

/* -- attention -------------------------------------------------------------------------------------------- */

enum { QUERIES = 4 };

/* o[i] += sum_j p[i][j] v[j] over keys [from, to), for `vectors` times 8 columns from column d on. */
INLINE void weigh_columns(const int M, const int vectors, float *o, const float (*p)[PHI3C_TILE], const f16 *v,
                          int from, int to, int d, int head_dim) {
    __m256 sum[QUERIES][2];
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int c = 0; c < vectors; c++) sum[i][c] =
        _mm256_loadu_ps(o + i * head_dim + d + 8 * c);
    for (int j = from; j < to; j++) UNROLL for (int c = 0; c < vectors; c++) {
            __m256 value = load_halves((const uint8_t *)(v + j * head_dim + d + 8 * c));
            UNROLL for (int i = 0; i < M; i++) sum[i][c] = _mm256_fmadd_ps(_mm256_set1_ps(p[i][j]), value, sum[i][c]);
        }
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int c = 0; c < vectors; c++)
        _mm256_storeu_ps(o + i * head_dim + d + 8 * c, sum[i][c]);
}

INLINE void weigh_values(const int M, float *o, const float (*p)[PHI3C_TILE], const f16 *v, int from, int to,
                         int head_dim) {
    if (from >= to) return;
    for (int d = 0; d < head_dim; d += 16) weigh_columns(M, 2, o, p, v, from, to, d, head_dim);
}

INLINE void attend_queries(const int M, float *max, float *sum, float *o, const float *q, const f16 *k, const f16 *v,
                           const int *first, const int *last, int head_dim) {
    float p[QUERIES][PHI3C_TILE];
    for (int j = 0; j < PHI3C_TILE; j += 16) {
        __m256 score[QUERIES][2];
        UNROLL for (int i = 0; i < M; i++) score[i][0] = score[i][1] = _mm256_setzero_ps();
        for (int d = 0; d < head_dim; d++) UNROLL for (int c = 0; c < 2; c++) {
                __m256 key = load_halves((const uint8_t *)(k + d * PHI3C_TILE + j + 8 * c));
                UNROLL for (int i = 0; i < M; i++) score[i][c] =
                    _mm256_fmadd_ps(_mm256_set1_ps(q[i * head_dim + d]), key, score[i][c]);
            }
        UNROLL for (int i = 0; i < M; i++) UNROLL for (int c = 0; c < 2; c++)
            _mm256_storeu_ps(p[i] + j + 8 * c, score[i][c]);
    }
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int from = 0, to = PHI3C_TILE; /* keys that all queries see */
    for (int i = 0; i < M; i++) {
        __m256i before = _mm256_set1_epi32(first[i] - 1), end = _mm256_set1_epi32(last[i]);
        __m256 largest = _mm256_set1_ps(max[i]);
        for (int j = 0; j < PHI3C_TILE; j += 8) {
            __m256i key = _mm256_add_epi32(lane, _mm256_set1_epi32(j));
            __m256i seen = _mm256_and_si256(_mm256_cmpgt_epi32(key, before), _mm256_cmpgt_epi32(end, key));
            __m256 score =
                _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), _mm256_loadu_ps(p[i] + j), _mm256_castsi256_ps(seen));
            _mm256_storeu_ps(p[i] + j, score);
            largest = _mm256_max_ps(score, largest);
        }
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        float new_max = _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
        __m256 lanes[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int j = 0; j < PHI3C_TILE; j += 8) {
            __m256 weight = exp_lanes(_mm256_sub_ps(_mm256_loadu_ps(p[i] + j), _mm256_set1_ps(new_max)));
            _mm256_storeu_ps(p[i] + j, weight);
            lanes[j / 8 % 2] = _mm256_add_ps(lanes[j / 8 % 2], weight);
        }
        float kept = phi3c_expf(max[i] - new_max);
        max[i] = new_max;
        sum[i] = fmaf(sum[i], kept, sum_lanes(lanes[0], lanes[1]));
        for (int d = 0; d < head_dim; d += 8)
            _mm256_storeu_ps(o + i * head_dim + d,
                             _mm256_mul_ps(_mm256_loadu_ps(o + i * head_dim + d), _mm256_set1_ps(kept)));
        if (first[i] > from) from = first[i];
        if (last[i] < to) to = last[i];
    }
    if (from >= to) from = to = PHI3C_TILE;
    for (int i = 0; i < M; i++)
        weigh_values(1, o + i * head_dim, p + i, v, first[i], last[i] < from ? last[i] : from, head_dim);
    weigh_values(M, o, (const float (*)[PHI3C_TILE])p, v, from, to, head_dim);
    for (int i = 0; i < M; i++) weigh_values(1, o + i * head_dim, p + i, v, to, last[i], head_dim);
}

static void attend_tile(float *max, float *sum, float *o, const float *q, const f16 *k, const f16 *v, const int *first,
                        const int *last, int n, int head_dim) {
    int i = 0;
    for (; n - i >= QUERIES; i += QUERIES)
        attend_queries(QUERIES, max + i, sum + i, o + i * head_dim, q + i * head_dim, k, v, first + i, last + i,
                       head_dim);
    for (; n - i >= 2; i += 2)
        attend_queries(2, max + i, sum + i, o + i * head_dim, q + i * head_dim, k, v, first + i, last + i, head_dim);
    for (; i < n; i++)
        attend_queries(1, max + i, sum + i, o + i * head_dim, q + i * head_dim, k, v, first + i, last + i, head_dim);
}

const phi3c_kernels phi3c_kernels_avx2 = {
    .name = "avx2",
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
             [PHI3C_Q6_K] = tile_q6_K},
    .attend_tile = attend_tile,
    .quantize_row = quantize_row,
    .rms_norm_row = rms_norm_row,
    .silu_mul_row = silu_mul_row,
    .to_f16 = to_f16,
};
