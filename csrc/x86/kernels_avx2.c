/* SPDX-License-Identifier: MIT */
/* Kernels for AVX2, FMA and F16C (Haswell, Zen and later).
 *
 * Quantised weights (quantised.h): vpmaddubsw multiplies four columns with four activations, broadcast from memory,
 * into two int16 sums per row. These add up as int16 for as long as they cannot overflow; one vpmaddwd by the scale,
 * which stands in both halves of a lane, then makes them one scaled int32. */
#include "quantised.h"

#include "../expf.h"

/* -- quantised weights ------------------------------------------------------------------------------------- */

/* How many vpmaddubsw, of 2 * max(w) * 127 each, an int16 holds: below 2^15 = 32768 are 8 * 3810 for 4 bits,
 * 4 * 7874 for 5, 2 * 16002 for 6, 1 * 32512 for q8_0's -128, 1 * 32258 for iq4's -127, and 8 * 1778 for q3_K. */
INLINE int int16_terms(const int type) {
    return is_signed(type)                                                  ? 1
           : type == PHI3C_Q6_K                                             ? 2
           : type == PHI3C_Q5_0 || type == PHI3C_Q5_1 || type == PHI3C_Q5_K ? 4
                                                                            : 8;
}

/* vpmaddubsw takes one factor without sign: signed weights give theirs to the activations. For one token, whose
 * activations serve both halves, the other way about is one vpabsb less, and 1.08 times as fast; but q8_0's -128 has no
 * negative. */
INLINE void scaled_dot(const int type, const int M, __m256i sum[2][TOKENS], const int from, const int to,
                       const __m256i scale[2], const super_block *w, const uint8_t *bytes, int base, const int j,
                       const uint8_t *x, size_t x_stride) {
    const int terms = int16_terms(type), takes_sign = M == 1 && is_signed(type) && type != PHI3C_Q8_0;
    __m256i chain[2][TOKENS];
    UNROLL for (int g = from; g < to; g++) {
        const int term = (g - from) % terms;
        __m256i v[2], magnitude[2];
        UNROLL for (int half = 0; half < 2; half++) {
            v[half] = weights(type, w, bytes, half, base, j, g);
            if (is_signed(type)) magnitude[half] = _mm256_abs_epi8(v[half]);
        }
        UNROLL for (int t = 0; t < M; t++) {
            __m256i a = broadcast32(token(x, x_stride, t)->q + 32 * (base + j) + 4 * g);
            __m256i a_magnitude = _mm256_abs_epi8(a);
            UNROLL for (int half = 0; half < 2; half++) {
                __m256i product, *c = &chain[half][t];
                if (takes_sign)
                    product = _mm256_maddubs_epi16(a_magnitude, _mm256_sign_epi8(v[half], a));
                else if (is_signed(type))
                    product = _mm256_maddubs_epi16(magnitude[half], _mm256_sign_epi8(a, v[half]));
                else
                    product = _mm256_maddubs_epi16(v[half], a);
                *c = term == 0 ? product : _mm256_add_epi16(*c, product);
                KEEP(*c);
                if (term == terms - 1 || g == to - 1) {
                    __m256i scaled = _mm256_madd_epi16(*c, scale[half]);
                    sum[half][t] = g - from < terms ? scaled : _mm256_add_epi32(sum[half][t], scaled);
                    KEEP(sum[half][t]);
                }
            }
        }
    }
}

/* -- float weights ----------------------------------------------------------------------------------------- */

enum { FLOAT_TOKENS = 3 };

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

static void quantize_plain(block_x8 *out, const float x[256]) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    uint32_t group_bits[8] = {0}, block_bits = 0;
    for (int j = 0; j < 8; j++) {
        __m256i largest = _mm256_setzero_si256();
        for (int i = 0; i < 32; i += 8)
            largest = _mm256_max_epu32(largest, _mm256_and_si256(load((const uint8_t *)(x + 32 * j + i)), magnitude));
        group_bits[j] = max_u32(largest);
        if (group_bits[j] > block_bits) block_bits = group_bits[j];
    }
    float largest, group[8];
    memcpy(&largest, &block_bits, 4);
    memcpy(group, group_bits, sizeof group);
    memset(out, 0, sizeof *out);
    if (block_bits >= 0x7f800000u) {
        out->d = NAN;
        return;
    }
    if (largest < 0x1p-100f) return;
    out->d = largest / 1016.0f;
    for (int j = 0; j < 8; j++) {
        int factor = group_factor(group[j], largest), sum[2], magnitude[2];
        __m256 scale = _mm256_set1_ps(group_scale(factor, largest));
        for (int i = 0; i < 2; i++) {
            const float *from = x + 32 * j + 16 * i;
            __m256i q0 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), scale));
            __m256i q1 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8), scale));
            __m128i words0 = _mm_packs_epi32(_mm256_castsi256_si128(q0), upper(q0));
            __m128i words1 = _mm_packs_epi32(_mm256_castsi256_si128(q1), upper(q1));
            __m128i bytes = _mm_packs_epi16(words0, words1);
            _mm_storeu_si128((__m128i *)(out->q + 32 * j + 16 * i), bytes);
            __m128i eights = _mm_sad_epu8(_mm_abs_epi8(bytes), _mm_setzero_si128()); /* two sums of 8 magnitudes */
            magnitude[i] = _mm_cvtsi128_si32(eights) + _mm_extract_epi16(eights, 4);
            sum[i] = sum_i32(_mm256_add_epi32(q0, q1));
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
    const __m256 sign = _mm256_set1_ps(-0.0f);
    float rest[256];
    if (n < 256) {
        memset(rest, 0, sizeof rest);
        x = memcpy(rest, x, (size_t)n * sizeof(float));
    }
    __m256 lanes[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, largest = _mm256_setzero_ps();
    for (int i = 0; i < 256; i += 8) {
        __m256 magnitude = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i));
        lanes[i / 8 % 2] = _mm256_add_ps(lanes[i / 8 % 2], magnitude);
        largest = _mm256_max_ps(largest, magnitude);
    }
    __m256 limit = _mm256_set1_ps(outlier_limit(sum_lanes(lanes[0], lanes[1]), n));
    outliers->n = 0;
    if (_mm256_movemask_ps(_mm256_cmp_ps(largest, limit, _CMP_GT_OQ))) {
        for (int i = 0; i < 256; i += 8) {
            __m256 v = _mm256_loadu_ps(x + i), apart = _mm256_cmp_ps(_mm256_andnot_ps(sign, v), limit, _CMP_GT_OQ);
            uint32_t lanes_apart = (uint32_t)_mm256_movemask_ps(apart);
            for (; lanes_apart; lanes_apart &= lanes_apart - 1) {
                int column = i + lowest_bit(lanes_apart);
                outliers->column[outliers->n] = (uint8_t)column;
                outliers->x[outliers->n++] = x[column];
            }
            _mm256_storeu_ps(rest + i, _mm256_andnot_ps(apart, v)); /* x may be rest */
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

/* What queries, or weights of keys, are multiplied with: row k is a dimension of 64 keys, or a value. */
typedef struct {
    const uint8_t *data, *next; /* the next page's is fetched while this one's is read */
    const float *scales;        /* of q8_0: [k / 32][columns] of keys, [k][columns / 32] of values */
    int columns;
} factor;

enum { HALVES, Q8_KEYS, Q8_VALUES, FLOATS };
enum { ROWS = 6 }; /* of a product, with 16 columns: 12 sums in registers */

/* Eight columns, from c on, of row k. */
INLINE __m256 factor8(const int kind, factor b, int k, int c) {
    size_t at = (size_t)(k * b.columns + c);
    if (kind == FLOATS) return _mm256_loadu_ps((const float *)b.data + at);
    if (kind == HALVES) return load_halves(b.data + 2 * at);
    __m256 q = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8(b.data + at)));
    if (kind == Q8_KEYS) return _mm256_mul_ps(q, _mm256_loadu_ps(b.scales + k / 32 * b.columns + c));
    return _mm256_mul_ps(q, _mm256_broadcast_ss(b.scales + k * (b.columns / 32) + c / 32));
}

/* Ask for what 8 N columns, from c on, of row k are on the next page. */
INLINE void fetch(const int kind, const int N, factor b, int k, int c) {
    const int width = kind == HALVES ? 2 : 1;
    const uint8_t *p = b.next + width * (k * b.columns + c);
    UNROLL for (int i = 0; i < (8 * N * width + 63) / 64; i++) _mm_prefetch((const char *)(p + 64 * i), _MM_HINT_T1);
}

/* out[i][v] += sum_k a[i][k] b[k][c + v], in order of k, from <= k < to, for M rows and N times 8 columns. */
INLINE void multiply(const int kind, const int M, const int N, float *out, int out_stride, const float *a, int a_stride,
                     factor b, int c, int from, int to) {
    __m256 sum[ROWS][12];
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int v = 0; v < N; v++) sum[i][v] =
        _mm256_loadu_ps(out + i * out_stride + 8 * v);
    for (int k = from; k < to; k++) {
        __m256 row[12];
        if (kind != FLOATS) fetch(kind, N, b, k, c);
        if (M > 1) UNROLL for (int v = 0; v < N; v++) row[v] = factor8(kind, b, k, c + 8 * v);
        UNROLL for (int i = 0; i < M; i++) {
            __m256 x = _mm256_broadcast_ss(a + i * a_stride + k);
            UNROLL for (int v = 0; v < N; v++) sum[i][v] =
                _mm256_fmadd_ps(x, M > 1 ? row[v] : factor8(kind, b, k, c + 8 * v), sum[i][v]);
        }
    }
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int v = 0; v < N; v++)
        _mm256_storeu_ps(out + i * out_stride + 8 * v, sum[i][v]);
}

/* The same for 16 columns of floats and any number of rows up to ROWS. */
static void multiply_floats(int rows, float *out, int out_stride, const float *a, int a_stride, const float *b,
                            int from, int to) {
    factor floats = {(const uint8_t *)b, NULL, NULL, 16};
    switch (rows) {
    case 6: multiply(FLOATS, 6, 2, out, out_stride, a, a_stride, floats, 0, from, to); break;
    case 5: multiply(FLOATS, 5, 2, out, out_stride, a, a_stride, floats, 0, from, to); break;
    case 4: multiply(FLOATS, 4, 2, out, out_stride, a, a_stride, floats, 0, from, to); break;
    case 3: multiply(FLOATS, 3, 2, out, out_stride, a, a_stride, floats, 0, from, to); break;
    case 2: multiply(FLOATS, 2, 2, out, out_stride, a, a_stride, floats, 0, from, to); break;
    default: multiply(FLOATS, 1, 2, out, out_stride, a, a_stride, floats, 0, from, to);
    }
}

/* slice[k][0..15] = b[k][c..c + 15] for from <= k < to */
INLINE void to_floats(const int kind, float *slice, factor b, int c, int from, int to) {
    for (int k = from; k < to; k++) {
        fetch(kind, 2, b, k, c);
        _mm256_storeu_ps(slice + 16 * k, factor8(kind, b, k, c));
        _mm256_storeu_ps(slice + 16 * k + 8, factor8(kind, b, k, c + 8));
    }
}

/* The largest of `max` and the scores p of keys [first, last); other scores become -inf. */
INLINE float mask_scores(float p[PHI3C_TILE], float max, int first, int last) {
    __m256 largest = _mm256_set1_ps(max);
    if (first > 0 || last < PHI3C_TILE) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        __m256i before = _mm256_set1_epi32(first - 1), end = _mm256_set1_epi32(last);
        for (int j = 0; j < PHI3C_TILE; j += 8) {
            __m256i key = _mm256_add_epi32(lane, _mm256_set1_epi32(j));
            __m256i seen = _mm256_and_si256(_mm256_cmpgt_epi32(key, before), _mm256_cmpgt_epi32(end, key));
            __m256 score = _mm256_loadu_ps(p + j), hidden = _mm256_set1_ps(-INFINITY);
            _mm256_storeu_ps(p + j, _mm256_blendv_ps(hidden, score, _mm256_castsi256_ps(seen)));
        }
    }
    UNROLL for (int j = 0; j < PHI3C_TILE; j += 8) largest =
        _mm256_max_ps(_mm256_loadu_ps(p + j), largest); /* in this order a NaN score is passed over */
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

/* Scores become weights; returns their sum. */
INLINE float weigh_scores(float p[PHI3C_TILE], float max) {
    __m256 lanes[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    UNROLL for (int j = 0; j < PHI3C_TILE; j += 8) {
        __m256 weight = exp_lanes(_mm256_sub_ps(_mm256_loadu_ps(p + j), _mm256_set1_ps(max)));
        _mm256_storeu_ps(p + j, weight);
        lanes[j / 8 % 2] = _mm256_add_ps(lanes[j / 8 % 2], weight);
    }
    return sum_lanes(lanes[0], lanes[1]);
}

/* n rows of scores become weights, and the state moves on but for what these keys add to o. Each pass over all rows
 * leaves the processor many that do not wait for one another. */
static void softmax(float *max, float *sum, float *o, float (*p)[PHI3C_TILE], const int *first, const int *last, int n,
                    int head_dim) {
    float kept[(PHI3C_QUERIES + 7) / 8 * 8] = {0};
    for (int i = 0; i < n; i++) {
        float largest = mask_scores(p[i], max[i], first[i], last[i]);
        kept[i] = max[i] - largest;
        max[i] = largest;
    }
    for (int i = 0; i < n; i += 8) _mm256_storeu_ps(kept + i, exp_lanes(_mm256_loadu_ps(kept + i)));
    for (int i = 0; i < n; i++) sum[i] = fmaf(sum[i], kept[i], weigh_scores(p[i], max[i]));
    for (int i = 0; i < n; i++) {
        if (kept[i] == 1.0f) continue;
        float *row = o + i * head_dim;
        for (int d = 0; d < head_dim; d += 8)
            _mm256_storeu_ps(row + d, _mm256_mul_ps(_mm256_loadu_ps(row + d), _mm256_set1_ps(kept[i])));
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

/* M queries that see the same keys: the page is read as it is too, 8 N columns at a time; fewer than 6 sums would wait
 * for one another. */
INLINE void attend_m(const int keys_kind, const int values_kind, const int M, const int N, float *max, float *sum,
                     float *o, const float *q, factor keys, factor values, const int *first, const int *last,
                     int head_dim) {
    float p[ROWS][PHI3C_TILE];
    memset(p, 0, (size_t)M * sizeof p[0]);
    for (int c = 0; c < PHI3C_TILE; c += 8 * N)
        multiply(keys_kind, M, N, p[0] + c, PHI3C_TILE, q, head_dim, keys, c, 0, head_dim);
    softmax(max, sum, o, p, first, last, M, head_dim);
    int d = 0;
    for (; head_dim - d >= 8 * N; d += 8 * N)
        multiply(values_kind, M, N, o + d, head_dim, p[0], PHI3C_TILE, values, d, *first, *last);
    if (d < head_dim) multiply(values_kind, M, 2, o + d, head_dim, p[0], PHI3C_TILE, values, d, *first, *last);
}

/* The same for 2 to ROWS queries. */
INLINE void attend_few(const int k, const int v, float *max, float *sum, float *o, const float *q, factor keys,
                       factor values, const int *first, const int *last, int n, int head_dim) {
    switch (n) {
    case 2: attend_m(k, v, 2, 4, max, sum, o, q, keys, values, first, last, head_dim); break;
    case 3: attend_m(k, v, 3, 2, max, sum, o, q, keys, values, first, last, head_dim); break;
    case 4: attend_m(k, v, 4, 2, max, sum, o, q, keys, values, first, last, head_dim); break;
    case 5: attend_m(k, v, 5, 2, max, sum, o, q, keys, values, first, last, head_dim); break;
    default: attend_m(k, v, 6, 2, max, sum, o, q, keys, values, first, last, head_dim);
    }
}

/* Any queries: 16 columns of keys or values become floats once for all of them. */
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

/* Whether n queries see the same keys, and are few. */
INLINE int are_few(const int *first, const int *last, int n) {
    for (int i = 1; i < n; i++)
        if (first[i] != *first || last[i] != *last) return 0;
    return n <= ROWS;
}

static void attend_f16(float *max, float *sum, float *o, const float *q, const uint8_t *kv, const uint8_t *next,
                       const int *first, const int *last, int n, int head_dim) {
    size_t half = phi3c_kv_bytes(PHI3C_F16, head_dim) / 2;
    factor keys = {kv, next, NULL, PHI3C_TILE}, values = {kv + half, next + half, NULL, head_dim};
    if (n == 1)
        attend_one(HALVES, HALVES, max, sum, o, q, keys, values, *first, *last, head_dim);
    else if (are_few(first, last, n))
        attend_few(HALVES, HALVES, max, sum, o, q, keys, values, first, last, n, head_dim);
    else
        attend_several(HALVES, HALVES, max, sum, o, q, keys, values, first, last, n, head_dim);
}

static void attend_q8_0(float *max, float *sum, float *o, const float *q, const uint8_t *kv, const uint8_t *next,
                        const int *first, const int *last, int n, int head_dim) {
    float scales[2][PHI3C_TILE * PHI3C_MAX_HEAD_DIM / 32];
    size_t half = phi3c_kv_bytes(PHI3C_Q8_0, head_dim) / 2, scale_bytes = q8_0_scale_bytes(head_dim);
    for (int i = 0; i < 2; i++)
        for (size_t g = 0; g < scale_bytes / 2; g += 8)
            _mm256_storeu_ps(scales[i] + g, load_halves(kv + half * (size_t)i + 2 * g));
    kv += scale_bytes;
    next += scale_bytes;
    factor keys = {kv, next, scales[0], PHI3C_TILE}, values = {kv + half, next + half, scales[1], head_dim};
    if (n == 1)
        attend_one(Q8_KEYS, Q8_VALUES, max, sum, o, q, keys, values, *first, *last, head_dim);
    else if (are_few(first, last, n))
        attend_few(Q8_KEYS, Q8_VALUES, max, sum, o, q, keys, values, first, last, n, head_dim);
    else
        attend_several(Q8_KEYS, Q8_VALUES, max, sum, o, q, keys, values, first, last, n, head_dim);
}

/* -- limit ------------------------------------------------------------------------------------------------ */

static int64_t peak(void) {
    enum { CHAINS = 12 }; /* enough to hide latencies; with the factors and a product they take 15 of 16 registers */
    __m256i sum[CHAINS], one = _mm256_set1_epi8(1), weights = one;
    UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = _mm256_setzero_si256();
    for (int round = 0; round < PEAK_ROUNDS; round++) UNROLL for (int i = 0; i < CHAINS; i++) {
            KEEP(weights); /* so that no product is known from the one before */
            sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(weights, one));
            KEEP(sum[i]);
        }
    __m256i total = _mm256_setzero_si256();
    UNROLL for (int i = 0; i < CHAINS; i++) total =
        _mm256_add_epi32(total, _mm256_madd_epi16(sum[i], _mm256_set1_epi16(1)));
    int32_t lanes[8];
    _mm256_storeu_si256((__m256i *)lanes, total);
    int64_t n = 0;
    for (int i = 0; i < 8; i++) n += lanes[i];
    return n;
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
