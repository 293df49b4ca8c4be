/* SPDX-License-Identifier: MIT */
/* Kernels for AVX-512 F, BW, DQ, VL and VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later).
 * Those of quantised weights: quantised_avx512.h. */
#include "quantised_avx512.h"

#include "../expf.h"

/* -- float weights ---------------------------------------------------------------------------------------- */

enum { TOKENS = 6 }; /* 24 sums */

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

INLINE void float_tile(const int type, float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n,
                       int64_t columns) {
    for (; n >= TOKENS; n -= TOKENS, x += TOKENS * x_stride, out += TOKENS * 16)
        float_tokens(type, TOKENS, out, panel, x, x_stride, columns);
    for (; n >= 2; n -= 2, x += 2 * x_stride, out += 2 * 16) float_tokens(type, 2, out, panel, x, x_stride, columns);
    if (n) float_tokens(type, 1, out, panel, x, x_stride, columns);
}

#define FLOAT_TILE(name, type)                                                                                         \
    static void name(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n, int64_t columns,      \
                     const outlier_list *lists) {                                                                      \
        (void)lists;                                                                                                   \
        float_tile(type, out, panel, x, x_stride, n, columns);                                                         \
    }
FLOAT_TILE(tile_f32, PHI3C_F32)
FLOAT_TILE(tile_f16, PHI3C_F16)
FLOAT_TILE(tile_bf16, PHI3C_BF16)

/* -- activations ------------------------------------------------------------------------------------------ */

/* Sum of lanes by halves, as sum_lanes in kernels_scalar.c. */
INLINE float sum_lanes(__m512 v) {
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

/* Lane j of the result is the largest lane of v[j], of unsigned integers. */
INLINE __m256i largest_lanes(const __m512i v[8]) {
    __m512i halves[4], quarters[2];
    for (int i = 0; i < 4; i++) /* 8 lanes of v[2 i], 8 of v[2 i + 1] */
        halves[i] = _mm512_max_epu32(_mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x44),
                                     _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xee));
    for (int i = 0; i < 2; i++) /* 4 lanes of each of v[4 i] to v[4 i + 3] */
        quarters[i] = _mm512_max_epu32(_mm512_shuffle_i32x4(halves[2 * i], halves[2 * i + 1], 0x88),
                                       _mm512_shuffle_i32x4(halves[2 * i], halves[2 * i + 1], 0xdd));
    __m512i pairs = _mm512_max_epu32(_mm512_unpacklo_epi64(quarters[0], quarters[1]),
                                     _mm512_unpackhi_epi64(quarters[0], quarters[1]));
    pairs = _mm512_max_epu32(pairs, _mm512_shuffle_epi32(pairs, _MM_PERM_CDAB)); /* of v[i], i, i + 4, i + 4, ... */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, pairs));
}

/* Lane 4 i + j becomes lane 4 j + i. */
INLINE __m512i transpose(__m512i v) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
}

/* 64 integers within int8 as bytes, in order. */
INLINE __m512i to_bytes(const __m512i q[4]) {
    return transpose(_mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3])));
}

/* Lane g of the result is the sum of bytes 16 g to 16 g + 15 of 256. */
INLINE __m512i sums_of_16(const __m512i bytes[4]) {
    __m512i fours[4];
    for (int i = 0; i < 4; i++) fours[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes[i]);
    __m512i low =
        _mm512_add_epi32(_mm512_unpacklo_epi32(fours[0], fours[1]), _mm512_unpackhi_epi32(fours[0], fours[1]));
    __m512i high =
        _mm512_add_epi32(_mm512_unpacklo_epi32(fours[2], fours[3]), _mm512_unpackhi_epi32(fours[2], fours[3]));
    return transpose(_mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high)));
}

/* Lane j of the even ones becomes the sum of lanes j and j + 1. */
INLINE __m512i add_pairs(__m512i v) { return _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB)); }

/* Of integers within int16. */
INLINE __m128i to_int16(__m256i v) {
    return _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

/* Bit j: lane 2 j exceeds `most`. */
INLINE uint8_t even_lanes_above(__m512i v, int most) {
    __m256i above = _mm256_cmpgt_epi32(_mm512_cvtepi64_epi32(v), _mm256_set1_epi32(most));
    return (uint8_t)_mm256_movemask_ps(_mm256_castsi256_ps(above));
}

static void quantize_plain(block_x8 *out, const float x[256]) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i lanes[8], bytes[4], magnitudes[4];
    for (int j = 0; j < 8; j++)
        lanes[j] = _mm512_max_epu32(_mm512_and_si512(_mm512_loadu_si512(x + 32 * j), magnitude),
                                    _mm512_and_si512(_mm512_loadu_si512(x + 32 * j + 16), magnitude));
    __m256i group_bits = largest_lanes(lanes);
    uint32_t block_bits = _mm512_reduce_max_epu32(_mm512_zextsi256_si512(group_bits));
    float largest, scales[8];
    memcpy(&largest, &block_bits, 4);
    if (block_bits >= 0x7f800000u || largest < 0x1p-100f) {
        memset(out, 0, sizeof *out);
        if (block_bits >= 0x7f800000u) out->d = NAN;
        return;
    }
    out->d = largest / 1016.0f;
    /* group_factor and group_scale */
    __m256 eighths = _mm256_mul_ps(_mm256_castsi256_ps(group_bits), _mm256_set1_ps(8.0f / largest));
    __m256i factor = _mm256_cvttps_epi32(eighths);
    factor =
        _mm256_sub_epi32(factor, _mm256_castps_si256(_mm256_cmp_ps(_mm256_cvtepi32_ps(factor), eighths, _CMP_LT_OQ)));
    factor = _mm256_min_epi32(_mm256_max_epi32(factor, _mm256_set1_epi32(1)), _mm256_set1_epi32(8));
    _mm256_storeu_ps(scales, _mm256_div_ps(_mm256_set1_ps(1016.0f / largest), _mm256_cvtepi32_ps(factor)));
    for (int i = 0; i < 4; i++) {
        __m512i q[4];
        for (int j = 0; j < 4; j++)
            q[j] = _mm512_cvtps_epi32(
                _mm512_mul_ps(_mm512_loadu_ps(x + 64 * i + 16 * j), _mm512_set1_ps(scales[2 * i + j / 2])));
        bytes[i] = to_bytes(q);
        magnitudes[i] = _mm512_abs_epi8(bytes[i]);
        _mm512_storeu_si512(out->q + 64 * i, bytes[i]);
    }
    const __m512i sums = sums_of_16(bytes), negative = _mm512_sub_epi32(_mm512_setzero_si512(), sums);
    __m128i factor16 = to_int16(factor);
    _mm_storel_epi64((__m128i *)out->factor, _mm_packus_epi16(factor16, factor16));
    _mm_storeu_si128((__m128i *)out->sum32,
                     _mm_mullo_epi16(to_int16(_mm512_cvtepi64_epi32(add_pairs(sums))), factor16));
    _mm256_storeu_si256((__m256i *)out->nsum16, _mm512_cvtepi32_epi16(negative));
    /* wide16_bit and wide32_bit */
    __m512i halves = sums_of_16(magnitudes);
    __m512i both = _mm512_add_epi32(add_pairs(halves), _mm512_abs_epi32(add_pairs(sums)));
    halves = _mm512_max_epi32(halves, _mm512_shuffle_epi32(halves, _MM_PERM_CDAB));
    out->wide16 = even_lanes_above(halves, MOST_OF_16);
    out->wide32 = even_lanes_above(both, 2 * MOST_OF_SIGN);
    out->zero = 0;
}

/* As in kernels_scalar.c. Blocks without outliers are not copied. */
static void quantize_block(block_x8 *out, outliers_x8 *outliers, const float *x, int n) {
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
    outliers->n = 0;
    if (_mm512_cmp_ps_mask(largest, limit, _CMP_GT_OQ)) {
        for (int i = 0; i < 256; i += 16) {
            __m512 v = _mm512_loadu_ps(x + i);
            __mmask16 apart = _mm512_cmp_ps_mask(_mm512_abs_ps(v), limit, _CMP_GT_OQ);
            for (uint32_t lanes_apart = apart; lanes_apart; lanes_apart &= lanes_apart - 1) {
                int column = i + lowest_bit(lanes_apart);
                outliers->column[outliers->n] = (uint8_t)column;
                outliers->x[outliers->n++] = x[column];
            }
            _mm512_storeu_ps(rest + i, _mm512_mask_mov_ps(v, apart, _mm512_setzero_ps())); /* x may be rest */
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

/* exp(r) of x = n ln2 + r, and, as the low bits of `shifted`, n; see phi3c_expf. */
INLINE __m512 exp_rest(__m512 *shifted, __m512 x) {
    const __m512 round = _mm512_set1_ps(PHI3C_ROUND), one = _mm512_set1_ps(1.0f);
    *shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(PHI3C_LOG2E), round);
    __m512 n = _mm512_sub_ps(*shifted, round);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-PHI3C_LN2_HI), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(-PHI3C_LN2_LO), r);
    __m512 p = _mm512_set1_ps(PHI3C_E6);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(PHI3C_E5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(PHI3C_E4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(PHI3C_E3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(PHI3C_E2));
    p = _mm512_fmadd_ps(p, r, one);
    return _mm512_fmadd_ps(p, r, one);
}

/* phi3c_expf, lane by lane. */
INLINE __m512 exp_lanes(__m512 x) {
    __m512 shifted, p = exp_rest(&shifted, x);
    p = _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
    p = _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, _mm512_set1_ps(PHI3C_EXP_MIN), _CMP_LT_OQ), _mm512_setzero_ps());
    p = _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, _mm512_set1_ps(PHI3C_EXP_MAX), _CMP_GT_OQ),
                           _mm512_set1_ps(INFINITY));
    return _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

/* The same for scores less their maximum, so x <= 0 or NaN, in lanes of `seen`; 0 in others. A NaN of a key remains
 * one, as its low 9 bits, which go to the exponent, are 0; one of a query makes max - max NaN, and so the whole row. */
INLINE __m512 exp_negative_lanes(__m512 x, __mmask16 seen) {
    __m512 shifted, p = exp_rest(&shifted, x);
    __m512i scale = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    __mmask16 normal = _mm512_mask_cmp_ps_mask(seen, x, _mm512_set1_ps(PHI3C_EXP_MIN), _CMP_NLT_UQ);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(normal, _mm512_castps_si512(p), scale));
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
    const uint8_t *data, *next; /* the next page's is fetched while this one's is read; NULL: not again */
    const float *scales;        /* of q8_0: [k / 32][columns] of keys, [k][columns / 32] of values */
    int columns;
} factor;

enum { HALVES, Q8_KEYS, Q8_VALUES, FLOATS };
enum { ROWS = 12 }; /* of a product, with 32 columns: 24 sums in registers */
enum { FEW_QUERIES = 6 };

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

enum { PUT, ADD }; /* out = product, out += product */

/* out[i][v] (+)= sum_k a[i][k] b[k][c + v], in order of k, from <= k < to, for M rows and N times 16 columns. */
INLINE void multiply(const int into, const int kind, const int M, const int N, float *out, int out_stride,
                     const float *a, int a_stride, factor b, int c, int from, int to) {
    __m512 sum[ROWS][6];
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int v = 0; v < N; v++) sum[i][v] =
        into == ADD ? _mm512_loadu_ps(out + i * out_stride + 16 * v) : _mm512_setzero_ps();
    for (int k = from; k < to; k++) {
        __m512 row[6];
        if (b.next) fetch(kind, N, b, k, c);
        UNROLL for (int v = 0; v < N; v++) row[v] = factor16(kind, b, k, c + 16 * v);
        UNROLL for (int i = 0; i < M; i++) {
            __m512 x = _mm512_set1_ps(a[i * a_stride + k]);
            KEEP(x);
            UNROLL for (int v = 0; v < N; v++) sum[i][v] = _mm512_fmadd_ps(x, row[v], sum[i][v]);
        }
    }
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int v = 0; v < N; v++)
        _mm512_storeu_ps(out + i * out_stride + 16 * v, sum[i][v]);
}

/* The same for any number of rows up to ROWS. */
INLINE void multiply_rows(const int into, const int kind, const int N, int rows, float *out, int out_stride,
                          const float *a, int a_stride, factor b, int c, int from, int to) {
    if (from >= to) return;
    if (rows == ROWS) {
        multiply(into, kind, ROWS, N, out, out_stride, a, a_stride, b, c, from, to);
        return;
    }
    for (; rows >= 4; rows -= 4, out += 4 * out_stride, a += 4 * a_stride)
        multiply(into, kind, 4, N, out, out_stride, a, a_stride, b, c, from, to);
    for (; rows > 0; rows--, out += out_stride, a += a_stride)
        multiply(into, kind, 1, N, out, out_stride, a, a_stride, b, c, from, to);
}

/* slice[k][v] = b[k][c + v] for from <= k < to and N times 16 columns */
INLINE void to_floats(const int kind, const int N, float *slice, factor b, int c, int from, int to) {
    for (int k = from; k < to; k++) {
        fetch(kind, N, b, k, c);
        UNROLL for (int v = 0; v < N; v++) _mm512_storeu_ps(slice + 16 * (N * k + v), factor16(kind, b, k, c + 16 * v));
    }
}

/* Bit j: key j is seen. */
INLINE uint64_t seen_bits(int first, int last) {
    return (last >= PHI3C_TILE ? ~0ull : (1ull << last) - 1) >> first << first;
}

/* The largest of `max` and the scores p of keys seen. */
INLINE float largest_score(const float p[PHI3C_TILE], float max, uint64_t seen) {
    __m512 largest = _mm512_set1_ps(max);
    UNROLL for (int j = 0; j < PHI3C_TILE; j += 16) /* in this order a NaN score is passed over */
        largest = _mm512_mask_max_ps(largest, (__mmask16)(seen >> j), _mm512_loadu_ps(p + j), largest);
    return _mm512_reduce_max_ps(largest);
}

/* Scores become weights, 0 of keys that are not seen; returns their sum. */
INLINE float weigh_scores(float p[PHI3C_TILE], float max, uint64_t seen) {
    __m512 lanes = _mm512_setzero_ps();
    UNROLL for (int j = 0; j < PHI3C_TILE; j += 16) {
        __m512 score = _mm512_sub_ps(_mm512_loadu_ps(p + j), _mm512_set1_ps(max));
        __m512 weight = exp_negative_lanes(score, (__mmask16)(seen >> j));
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
        float largest = largest_score(p[i], max[i], seen_bits(first[i], last[i]));
        kept[i] = max[i] - largest;
        max[i] = largest;
    }
    for (int i = 0; i < n; i += 16) _mm512_storeu_ps(kept + i, exp_lanes(_mm512_loadu_ps(kept + i)));
    for (int i = 0; i < n; i++)
        sum[i] = fmaf(sum[i], kept[i], weigh_scores(p[i], max[i], seen_bits(first[i], last[i])));
    for (int i = 0; i < n; i++) {
        if (kept[i] == 1.0f) continue;
        float *row = o + i * head_dim;
        for (int d = 0; d < head_dim; d += 16)
            _mm512_storeu_ps(row + d, _mm512_mul_ps(_mm512_loadu_ps(row + d), _mm512_set1_ps(kept[i])));
    }
}

/* M queries that see the same keys: the page is read once, as it is, a dimension of all keys and a value at a time. */
INLINE void attend_m(const int keys_kind, const int values_kind, const int M, float *max, float *sum, float *o,
                     const float *q, factor keys, factor values, const int *first, const int *last, int head_dim) {
    float p[FEW_QUERIES][PHI3C_TILE];
    multiply(PUT, keys_kind, M, 4, p[0], PHI3C_TILE, q, head_dim, keys, 0, 0, head_dim);
    softmax(max, sum, o, p, first, last, M, head_dim);
    int d = 0;
    if (M == 1 && head_dim % 96 == 0)
        for (; d < head_dim; d += 96)
            multiply(ADD, values_kind, M, 6, o + d, head_dim, p[0], PHI3C_TILE, values, d, *first, *last);
    for (; head_dim - d >= 64; d += 64)
        multiply(ADD, values_kind, M, 4, o + d, head_dim, p[0], PHI3C_TILE, values, d, *first, *last);
    for (; d < head_dim; d += 16)
        multiply(ADD, values_kind, M, 1, o + d, head_dim, p[0], PHI3C_TILE, values, d, *first, *last);
}

/* The same for up to FEW_QUERIES: one token's heads of a group, or of one head. */
INLINE void attend_few(const int k, const int v, float *max, float *sum, float *o, const float *q, factor keys,
                       factor values, const int *first, const int *last, int n, int head_dim) {
    switch (n) {
    case 1: attend_m(k, v, 1, max, sum, o, q, keys, values, first, last, head_dim); break;
    case 2: attend_m(k, v, 2, max, sum, o, q, keys, values, first, last, head_dim); break;
    case 3: attend_m(k, v, 3, max, sum, o, q, keys, values, first, last, head_dim); break;
    case 4: attend_m(k, v, 4, max, sum, o, q, keys, values, first, last, head_dim); break;
    case 5: attend_m(k, v, 5, max, sum, o, q, keys, values, first, last, head_dim); break;
    default: attend_m(k, v, 6, max, sum, o, q, keys, values, first, last, head_dim);
    }
}

/* Which keys some queries see: [begin, end) at all, [from, to) every one; from = to = PHI3C_TILE where there is none.
 */
typedef struct {
    int begin, end, from, to;
} seen_keys;

static seen_keys seen_by(const int *first, const int *last, int n) {
    seen_keys seen = {PHI3C_TILE, 0, 0, PHI3C_TILE};
    for (int i = 0; i < n; i++) {
        seen.begin = first[i] < seen.begin ? first[i] : seen.begin;
        seen.end = last[i] > seen.end ? last[i] : seen.end;
        seen.from = first[i] > seen.from ? first[i] : seen.from;
        seen.to = last[i] < seen.to ? last[i] : seen.to;
    }
    if (seen.from > seen.to) seen.from = seen.to = PHI3C_TILE;
    return seen;
}

/* Rows [from, to) of b, 16 N columns from c on, as they are multiplied with many rows: halves as they are, since they
 * become floats while multiplications wait for one another, others as a slice of floats. */
INLINE factor prepare(const int kind, const int N, float *slice, factor b, int c, int from, int to) {
    if (kind == HALVES) {
        b.data += 2 * c;
        b.next += 2 * c;
        return b;
    }
    to_floats(kind, N, slice, b, c, from, to);
    return (factor){(const uint8_t *)slice, NULL, NULL, 16 * N};
}

/* p[i][c..] = scores of 16 N keys from c on, for queries that see any of them. */
INLINE void score_keys(const int kind, const int N, float (*p)[PHI3C_TILE], float *slice, const float *q, factor keys,
                       int c, const seen_keys *groups, int n, int head_dim) {
    factor b = prepare(kind, N, slice, keys, c, 0, head_dim);
    for (int i = 0; i < n; i += ROWS) {
        int rows = n - i < ROWS ? n - i : ROWS;
        if (groups[i / ROWS].end <= c || groups[i / ROWS].begin >= c + 16 * N) continue;
        multiply_rows(PUT, kind == HALVES ? HALVES : FLOATS, N, rows, p[i] + c, PHI3C_TILE, q + i * head_dim, head_dim,
                      b, 0, 0, head_dim);
        b.next = NULL;
    }
}

INLINE int clamp(int v, int low, int high) { return v < low ? low : v > high ? high : v; }

/* out[i] += weights p[i] times the values that row i sees among keys [low, high), for up to four rows: most of them for
 * all at once. */
INLINE void add_four(const int kind, const int N, int rows, float *out, int head_dim, float (*p)[PHI3C_TILE], factor b,
                     const int *first, const int *last, int low, int high) {
    seen_keys all = seen_by(first, last, rows);
    int from = clamp(all.from, low, high), to = clamp(all.to, from, high);
    for (int i = 0; i < rows; i++)
        multiply_rows(ADD, kind, N, 1, out + i * head_dim, 0, p[i], 0, b, 0, clamp(first[i], low, from),
                      clamp(last[i], low, from));
    multiply_rows(ADD, kind, N, rows, out, head_dim, p[0], PHI3C_TILE, b, 0, from, to);
    for (int i = 0; i < rows; i++)
        multiply_rows(ADD, kind, N, 1, out + i * head_dim, 0, p[i], 0, b, 0, clamp(first[i], to, high),
                      clamp(last[i], to, high));
}

/* o[i][c..] += weights p times 16 N dimensions of the values from c on. */
INLINE void add_values(const int kind, const int N, float *o, float (*p)[PHI3C_TILE], float *slice, factor values,
                       int c, seen_keys seen, const seen_keys *groups, const int *first, const int *last, int n,
                       int head_dim) {
    const int prepared = kind == HALVES ? HALVES : FLOATS;
    factor b = prepare(kind, N, slice, values, c, seen.begin, seen.end);
    for (int i = 0; i < n; i += ROWS) {
        int end = n - i < ROWS ? n : i + ROWS;
        seen_keys all = groups[i / ROWS];
        for (int j = i; all.begin < all.from && j < end; j += 4)
            add_four(prepared, N, end - j < 4 ? end - j : 4, o + j * head_dim + c, head_dim, p + j, b, first + j,
                     last + j, 0, all.from);
        multiply_rows(ADD, prepared, N, end - i, o + i * head_dim + c, head_dim, p[i], PHI3C_TILE, b, 0, all.from,
                      all.to);
        for (int j = i; all.to < all.end && j < end; j += 4)
            add_four(prepared, N, end - j < 4 ? end - j : 4, o + j * head_dim + c, head_dim, p + j, b, first + j,
                     last + j, all.to, PHI3C_TILE);
        b.next = NULL;
    }
}

/* Any queries: 32 columns of keys or values at a time; 16 of keys in q8_0 so long that 32 would be much for a stack. */
INLINE void attend_several(const int keys_kind, const int values_kind, float *max, float *sum, float *o, const float *q,
                           factor keys, factor values, const int *first, const int *last, int n, int head_dim) {
    _Alignas(64) float p[PHI3C_QUERIES][PHI3C_TILE], slice[PHI3C_MAX_HEAD_DIM * 16];
    seen_keys seen = seen_by(first, last, n), groups[PHI3C_QUERIES / ROWS];
    for (int i = 0; i < n; i += ROWS) groups[i / ROWS] = seen_by(first + i, last + i, n - i < ROWS ? n - i : ROWS);
    for (int c = seen.begin / 32 * 32; c < seen.end; c += 32) {
        if (keys_kind == HALVES || head_dim <= PHI3C_MAX_HEAD_DIM / 2)
            score_keys(keys_kind, 2, p, slice, q, keys, c, groups, n, head_dim);
        else
            for (int half = 0; half < 32; half += 16)
                score_keys(keys_kind, 1, p, slice, q, keys, c + half, groups, n, head_dim);
    }
    softmax(max, sum, o, p, first, last, n, head_dim);
    int d = 0;
    for (; head_dim - d >= 32; d += 32)
        add_values(values_kind, 2, o, p, slice, values, d, seen, groups, first, last, n, head_dim);
    if (d < head_dim) add_values(values_kind, 1, o, p, slice, values, d, seen, groups, first, last, n, head_dim);
}

/* Whether n queries see the same keys, and are few. */
INLINE int are_few(const int *first, const int *last, int n) {
    for (int i = 1; i < n; i++)
        if (first[i] != *first || last[i] != *last) return 0;
    return n <= FEW_QUERIES;
}

/* The same. Rows of q and o lie so far apart that their addresses take a register each, unless the compiler knows
 * how far: 1.05 for the heads of Phi-3-mini, and of the others. */
INLINE void attend_by_head_dim(const int keys_kind, const int values_kind, float *max, float *sum, float *o,
                               const float *q, factor keys, factor values, const int *first, const int *last, int n,
                               int head_dim) {
    switch (head_dim) {
    case 96: attend_several(keys_kind, values_kind, max, sum, o, q, keys, values, first, last, n, 96); break;
    case 128: attend_several(keys_kind, values_kind, max, sum, o, q, keys, values, first, last, n, 128); break;
    default: attend_several(keys_kind, values_kind, max, sum, o, q, keys, values, first, last, n, head_dim);
    }
}

static void attend_f16(float *max, float *sum, float *o, const float *q, const uint8_t *kv, const uint8_t *next,
                       const int *first, const int *last, int n, int head_dim) {
    size_t half = phi3c_kv_bytes(PHI3C_F16, head_dim) / 2;
    factor keys = {kv, next, NULL, PHI3C_TILE}, values = {kv + half, next + half, NULL, head_dim};
    if (are_few(first, last, n))
        attend_few(HALVES, HALVES, max, sum, o, q, keys, values, first, last, n, head_dim);
    else
        attend_by_head_dim(HALVES, HALVES, max, sum, o, q, keys, values, first, last, n, head_dim);
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
    if (are_few(first, last, n))
        attend_few(Q8_KEYS, Q8_VALUES, max, sum, o, q, keys, values, first, last, n, head_dim);
    else
        attend_by_head_dim(Q8_KEYS, Q8_VALUES, max, sum, o, q, keys, values, first, last, n, head_dim);
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
    .pair = {[PHI3C_Q4_0] = pair_q4_0,
             [PHI3C_Q4_1] = pair_q4_1,
             [PHI3C_Q5_0] = pair_q5_0,
             [PHI3C_Q5_1] = pair_q5_1,
             [PHI3C_Q8_0] = pair_q8_0,
             [PHI3C_Q2_K] = pair_q2_K,
             [PHI3C_Q3_K] = pair_q3_K,
             [PHI3C_Q4_K] = pair_q4_K,
             [PHI3C_Q5_K] = pair_q5_K,
             [PHI3C_Q6_K] = pair_q6_K,
             [PHI3C_IQ4_NL] = pair_iq4_nl,
             [PHI3C_IQ4_XS] = pair_iq4_xs},
    .attend_tile = {[PHI3C_F16] = attend_f16, [PHI3C_Q8_0] = attend_q8_0},
    .quantize_row = quantize_row,
    .rms_norm_row = rms_norm_row,
    .silu_mul_row = silu_mul_row,
    .to_f16 = to_f16,
    .peak = peak,
};
